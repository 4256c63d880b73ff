"""How many photographs a second one core reads, infers and trains, and what a run on ImageNet would take."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from research.photographs.pictures import IMAGENETTE, MODEL
from research.rows import origin, replace_rows
from svit_utils.attention import sparsified
from svit_utils.building import create_model
from svit_utils.data import ShardStream, image_folder, preprocessing, write_shards
from svit_utils.files import read_rows
from svit_utils.paths import data_dir
from svit_utils.training.evaluation import autocast

TAU, BATCH, READ, REPEATS = 0.01, 10, 100, 2


def per_second(work: Callable[[], int]) -> float:
    """Pictures a second of processor time of this process, the best of `REPEATS`; ``work`` returns how many it did."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        done = work()
        found.append(done / (time.process_time() - started))
    return max(found)


def rates(folder: Path) -> dict[tuple[str, str, str], float]:
    """(what, attention, precision) to pictures a second, for the photographs in ``folder`` and one thread.

    Training is a forward and a backward pass, without the optimiser's step.
    """
    model = create_model(MODEL, pretrained=True)
    prepare = preprocessing(model)
    data = image_folder(folder, "val", prepare=prepare)
    spread = range(0, len(data), max(1, len(data) // READ))
    found = {("read from folders", "", ""): per_second(lambda: len([data[place] for place in spread]))}
    with tempfile.TemporaryDirectory() as shards:
        write_shards(folder, shards, "val", per_shard=100)
        stream = ShardStream(shards, prepare=prepare, batch_size=BATCH)
        found["read from shards", "", ""] = per_second(lambda: sum(len(images) for images, _ in stream))
    x = torch.stack([data[place][0] for place in range(BATCH)])
    labels = torch.zeros(BATCH, dtype=torch.long)

    def infer(precision: str) -> int:
        with torch.no_grad(), autocast("cpu", precision):
            model(x)
        return BATCH

    def step(precision: str) -> int:
        with autocast("cpu", precision):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        return BATCH

    for attention in ("dense", "cut"):
        with sparsified(model, TAU) if attention == "cut" else nullcontext():
            for precision in ("fp32", "bf16"):
                infer(precision)
                found["inference", attention, precision] = per_second(lambda p=precision: infer(p))  # type: ignore[misc]
                found["training", attention, precision] = per_second(lambda p=precision: step(p))  # type: ignore[misc]
    return found


def write_throughput(out: Path) -> Path:
    """Write ``throughput.csv`` in ``out`` unless it is there: a row a rate, with the load of the machine beside it."""
    path = out / "throughput.csv"
    if read_rows(path):
        return path
    torch.set_num_threads(1)
    made_by = origin()
    rows: list[dict[str, Any]] = []
    for (what, attention, precision), rate in rates(data_dir() / IMAGENETTE).items():
        row = {"what": what, "model": MODEL, "attention": attention, "precision": precision}
        rows.append(row | {"per_core_second": f"{rate:.1f}", "load": f"{os.getloadavg()[0]:.1f}", **made_by})
    places = {tuple(row.values())[:4]: place for place, row in enumerate(rows)}
    key = ("what", "model", "attention", "precision")
    replace_rows(path, rows, key=key, order=lambda row: places[tuple(row[k] for k in key)], columns=rows[0])
    return path
