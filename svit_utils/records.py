"""The recorded experiments in ``results/``, as the chapters read them.

``results/<experiment>.csv`` has one row per training run; ``results/<experiment>_correct.csv`` says which test images
each run got right, one bit per image in hexadecimal digits; ``results/planned.csv`` names every run that was planned.
The program ``research/`` wrote them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from svit_utils.files import read_rows
from svit_utils.paths import results_dir

Row = dict[str, str]


def run_rows(experiment: str, folder: Path | None = None) -> dict[str, Row]:
    """The full-size runs of an experiment by name, in the order in which they were planned.

    Args:
        experiment: the name of the file without ``.csv``.
        folder: where it lies; the repository's ``results/`` by default.

    Returns:
        Each run's recipe, accuracies and provenance, as text; empty where nothing is recorded.
    """
    rows = read_rows((results_dir() if folder is None else folder) / f"{experiment}.csv")
    return {row["name"]: row for row in rows if row["size"] == "full"}


def correct_by_run(experiment: str, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Which test images each full-size run got right: bool [n] by the run's name; see `run_rows`."""
    rows = read_rows((results_dir() if folder is None else folder) / f"{experiment}_correct.csv")
    return {row["name"]: unpack(row["correct"], int(row["n"])) for row in rows if row["size"] == "full"}


def planned_runs(experiment: str, folder: Path | None = None) -> list[Row]:
    """The full-size runs that were planned for an experiment, in order, whether or not they were done.

    Returns:
        Each run's name and recipe (threshold, tau_warmup, steps, lr, seed, ...), as text; see `run_rows`.

    Raises:
        ValueError: no experiment of that name is planned.
    """
    rows = read_rows((results_dir() if folder is None else folder) / "planned.csv")
    found = [row for row in rows if row["experiment"] == experiment]
    if not found:
        known = ", ".join(dict.fromkeys(row["experiment"] for row in rows)) or "none"
        raise ValueError(f"unknown experiment {experiment!r}; planned are: {known}")
    return found


def pack(correct: np.ndarray) -> str:
    """A bool array [n] as hexadecimal digits: eight images in two digits, the last byte filled with zeros."""
    return np.packbits(correct).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
    """The bool array [n] that `pack` wrote."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:n].astype(bool)


def verdict(results: Mapping[str, Sequence[str]], better: Mapping[str, str] | None = None) -> str:
    """The study plan's rule for one map: does it beat every model that it was compared with?

    Args:
        results: for each score, the outcomes of its comparisons: ``"higher"``, ``"lower"`` or ``"open"``.
        better: for each score, which outcome is the good one; ``"higher"`` where it is not named.

    Returns:
        ``"holds"`` where at least one score is better in all of its comparisons and no score is worse in any;
        ``"does not hold"`` the other way round; else ``"open"``.
    """
    good = {score: (better or {}).get(score, "higher") for score in results}
    up = any(found and all(r == good[score] for r in found) for score, found in results.items())
    down = any(r not in (good[score], "open") for score, found in results.items() for r in found)
    if up and not down:
        return "holds"
    return "does not hold" if down and not up else "open"
