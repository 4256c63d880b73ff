"""The parts of the study by name, each a file of rows; what is recorded already is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from research.photographs.finetuned import write_finetuned
from research.photographs.maps import write_maps
from research.photographs.tables import write_tables
from research.photographs.thresholds import write_thresholds
from research.photographs.throughput import write_throughput
from svit_utils.paths import results_dir

PARTS: dict[str, Callable[[Path], Path]] = {
    "thresholds": write_thresholds,
    "finetuned": write_finetuned,
    "maps": write_maps,
    "throughput": write_throughput,
    "tables": write_tables,
}


def write_parts(parts: Sequence[str], out: Path | None = None) -> list[Path]:
    """Do these parts, one after the other, into ``out`` (``results/photographs`` by default); the files written.

    Raises:
        ValueError: an unknown part.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}: the study has {', '.join(PARTS)}")
    folder = results_dir() / "photographs" if out is None else out
    return [PARTS[part](folder) for part in parts]
