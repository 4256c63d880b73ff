"""Part F on a public model: the sinks of DeiT-Tiny on photographs, dense and cut without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from research.photographs.pictures import IMAGENETTE, MODEL
from research.rows import origin
from research.second.sinks import sink_table
from svit_utils.attention import sparsified
from svit_utils.building import create_model
from svit_utils.data import image_folder, preprocessing
from svit_utils.explain import displayed
from svit_utils.files import write_rows
from svit_utils.paths import data_dir, results_dir

TAUS = (0.0025, 0.005, 0.01)


def deit_sinks(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """The heaviest column of each layer, see `sink_table`: dense, dense drawn cut, and cut as it runs, at each tau."""
    rows = []

    def add(kind: str, tau: Any, table: Any) -> None:
        for row in table.to_dict(orient="records"):
            values = {key: f"{row[key]:.4f}" for key in ("share", "value_norm", "is_prefix")}
            rows.append({"model": MODEL, "kind": kind, "tau": tau, "layer": row["layer"], **values})

    add("dense", "", sink_table(model, images))
    for tau in TAUS:
        drawn = sink_table(model, images, lambda maps, tau=tau: [displayed(each, tau) for each in maps.values()])  # type: ignore[misc]
        add("drawn", tau, drawn)
        with sparsified(model, tau):
            add("cut", tau, sink_table(model, images))
    return rows


def write_sinks(count: int = 200, out: Path | None = None) -> Path:
    """Write ``deit_sinks.csv`` into ``results/second``, or ``out``.

    Args:
        count: photographs, drawn evenly with a fixed seed from the validation part of Imagenette.
        out: folder.

    Raises:
        DataNotFoundError: the photographs are not in the data directory.
        WeightsError: the weights can neither be found nor loaded.
    """
    model = create_model(MODEL, pretrained=True).eval()
    photographs = image_folder(data_dir() / IMAGENETTE, "val", prepare=preprocessing(model))
    chosen = np.random.default_rng(0).permutation(len(photographs))[:count]
    images = torch.stack([photographs[int(index)][0] for index in chosen])
    made_by = origin(images=len(images))
    rows = [{**row, **made_by} for row in deit_sinks(model, images)]
    return write_rows((results_dir() / "second" if out is None else out) / "deit_sinks.csv", rows[0], rows)
