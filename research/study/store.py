"""The files of a study: one row per finished cell, every mean, and the scores per image that comparisons need."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.rows import replace_rows
from research.study.scores import PARTS, Scores
from research.study.studies import Study
from svit_utils.files import write_file

CELL_COLUMNS = ("cell", "kind", "rho", "seed", "part", "empty_rows")
SCORE_COLUMNS = ("kind", "rho", "seed", "part", "map", "layer", "head", "metric", "value")
PLACE = ("kind", "rho", "seed", "part")  # what the scores of one cell have in common


def record_cell(study: Study, cell: Mapping[str, Any], scores: Scores) -> None:
    """Add a cell: its images, then its means, and last its row, which says that the others are there."""
    if scores.images:
        name = cell["cell"].split("/")[1]
        write_images(images_path(study, name, cell["part"]), scores.images)
    place = {key: str(cell[key]) for key in PLACE}
    means = [{**place, **row, "value": f"{row['value']:.6g}"} for row in scores.summary]
    parts = list(PARTS)

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return parts.index(row["part"]), str(row["rho"]), str(row["kind"]), str(row["seed"])

    replace_rows(study.out / "scores.csv", means, key=PLACE, order=order, columns=SCORE_COLUMNS)
    replace_rows(study.out / "cells.csv", [cell], key=("cell",), order=order, columns=CELL_COLUMNS)


def images_path(study: Study, name: str, part: str) -> Path:
    """The file with the scores per image of one run, or of the baselines, in one part."""
    return study.out / "images" / f"{name}-{part}.csv.gz"


def write_images(path: Path, images: Mapping[str, np.ndarray]) -> None:
    """Scores per image as a compressed CSV: a column per "map:metric", a row per image; the same bytes every time."""
    longest = max(len(values) for values in images.values())
    lines = [",".join(images)]
    for index in range(longest):
        row = (values[index] if index < len(values) else np.nan for values in images.values())
        lines.append(",".join("" if np.isnan(value) else f"{value:.4g}" for value in row))
    # mtime=0 and no file name: neither the hour nor the folder may change the bytes.
    write_file(path, gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


def read_images(path: Path) -> dict[str, np.ndarray]:
    """What `write_images` wrote: columns of [n], those of fewer images without their empty end."""
    rows = list(csv.reader(gzip.decompress(path.read_bytes()).decode().splitlines()))
    columns = {name: [row[index] for row in rows[1:]] for index, name in enumerate(rows[0])}
    found = {}
    for name, values in columns.items():
        last = max((index for index, value in enumerate(values) if value), default=-1)
        found[name] = np.array([float(value or "nan") for value in values[: last + 1]])
    return found
