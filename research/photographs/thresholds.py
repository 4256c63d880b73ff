"""The public model cut without any training: accuracy, sparsity, sinks and a linear probe against tau."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from research.photographs.measured import answers, attention_shares, probe
from research.photographs.pictures import MODEL, ImageNetLabels, imagenette
from research.rows import origin, replace_rows
from svit_utils.attention import sparsified
from svit_utils.building import create_model
from svit_utils.data import preprocessing
from svit_utils.files import read_rows
from svit_utils.records import pack

TAUS = (0.0, 0.00125, 0.0025, 0.005, 0.0075, 0.01, 0.02)
PROBED = (0.0, 0.0025, 0.005, 0.01)
TRACKED_EVERY = 25  # of the pictures: 20 of 500


def threshold_row(model: nn.Module, tau: float, train: ImageNetLabels, val: ImageNetLabels) -> dict[str, Any]:
    """What the model does on ``val`` when its attention is cut at ``tau``; `attention_shares`, and the probe's answers.

    ``correct`` and ``probe_correct`` say which pictures were right, as `svit_utils.records.pack` writes it.
    """
    started = time.time()
    with sparsified(model, tau):
        features, logits = answers(model, val)
        shares = attention_shares(model, val, TRACKED_EVERY)
        fitted = answers(model, train)[0] if tau in PROBED else None
    labels, ten = torch.tensor(val.targets), torch.tensor(val.ten)
    correct = logits.argmax(dim=1) == labels
    of_ten = (ten[logits[:, ten].argmax(dim=1)] == labels).float().mean()
    row: dict[str, Any] = {
        "model": MODEL,
        "tau": tau,
        "images": len(val),
        "accuracy": round(correct.double().mean().item(), 4),
    }
    row |= {"accuracy_of_ten": round(of_ten.item(), 4), **shares, "correct": pack(correct.numpy())}
    row |= {"probe_accuracy": "", "probe_correct": ""}
    if fitted is not None:
        said = probe(fitted, torch.tensor(train.pictures.targets), features, len(ten))
        right = said == torch.tensor(val.pictures.targets)
        row |= {"probe_accuracy": round(right.double().mean().item(), 4), "probe_correct": pack(right.numpy())}
    return row | {"seconds": round(time.time() - started, 1)} | origin()


def write_thresholds(out: Path, taus: Sequence[float] = TAUS) -> Path:
    """Add the missing rows to ``thresholds.csv`` in ``out``, one after the other; returns the path.

    Raises:
        DataNotFoundError: the photographs are not in the data directory.
        WeightsError: the weights can neither be found nor loaded.
    """
    path = out / "thresholds.csv"
    missing = [tau for tau in taus if tau not in {float(row["tau"]) for row in read_rows(path)}]
    if missing:
        model = create_model(MODEL, pretrained=True).eval()
        prepare = preprocessing(model)
        train, val = imagenette("train", prepare), imagenette("val", prepare)
    for tau in sorted(missing, key=lambda tau: tau not in PROBED):
        row = threshold_row(model, tau, train, val)
        replace_rows(path, [row], key=("tau",), order=lambda row: float(row["tau"]), columns=row)
        print(f"tau = {tau:g}: {row['accuracy']:.1%} right, {row['seconds']:.0f} s", flush=True)
    return path
