"""Does a recorded result still come out of this code? Repeats the small rows of each results file and compares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.plans import Experiment, Run
from research.training import SPARSITY, train_run
from svit_utils.data import DataNotFoundError
from svit_utils.files import read_rows
from svit_utils.models import WeightsError
from svit_utils.paths import results_dir

# How a row came about, which another day and machine may do otherwise; every other column is compared.
ORIGIN = (
    "seconds",
    "command",
    "python",
    "torch",
    "timm",
    "torchvision",
    "device",
    "threads",
    "commit",
    "dirty",
    "date",
)
# How far a share of the tracker's summary may be from the recorded one, and the keys that a query keeps (by ratio):
# another processor rounds otherwise, and a few bf16 steps carry that on.
SHARE_BAND, KEYS_BAND = 0.05, 0.10


@dataclass(frozen=True)
class Check:
    """What the comparison of one recorded row gave: ``passed`` is None where it could not be made here."""

    experiment: str
    run: str
    passed: bool | None
    message: str


def check_experiment(experiment: Experiment, *, folder: Path | None = None) -> list[Check]:
    """Repeat at small size what has a small row (`Experiment.repeated`), and compare each with the recorded one."""
    path = (results_dir() if folder is None else folder) / f"{experiment.name}.csv"
    recorded = {row["name"]: row for row in read_rows(path) if row["size"] == "small"}
    return [_check(experiment, run, recorded.get(run.name)) for run in experiment.repeated]


def _check(experiment: Experiment, run: Run, recorded: Mapping[str, str] | None) -> Check:
    if recorded is None:
        return Check(experiment.name, run.name, None, f"{experiment.name}.csv has no small row of it")
    try:
        now, _ = train_run(experiment, run, size="small")
    except (DataNotFoundError, WeightsError) as error:
        return Check(experiment.name, run.name, None, str(error).splitlines()[0])
    allowed = bands(experiment, now)
    found = {name: value for name, value in now.items() if name in recorded and name not in ORIGIN}
    passed, parts = True, []
    for name, value in found.items():
        agrees, band = agree(value, recorded[name], allowed.get(name)), allowed.get(name)
        passed &= agrees
        if not agrees or (band is not None and value != ""):
            within = "" if band is None else f", band {band:.2g}"
            parts.append(f"{name} {as_text(value)} (recorded {recorded[name]}{within})")
    parts.append(f"{len(found) - len(parts)} other columns as recorded")
    return Check(experiment.name, run.name, passed, ", ".join(parts))


def bands(experiment: Experiment, row: Mapping[str, Any]) -> dict[str, float]:
    """How far each measured column of a small row may be from what is recorded; the others have to be equal."""
    coarser = math.sqrt(int(row["test_images"]) / int(row["val_images"]))  # accuracy on fewer pictures is less certain
    found = dict.fromkeys(SPARSITY, SHARE_BAND)
    if row["effective_support"] != "":
        found["effective_support"] = KEYS_BAND * float(row["effective_support"])
    return found | {
        "train_loss": experiment.loss_band,
        "test_loss": experiment.loss_band,
        "test_accuracy": experiment.accuracy_band,
        "val_accuracy": experiment.accuracy_band * max(1.0, coarser),
    }


def as_text(value: Any) -> str:
    """A value as a CSV file holds it."""
    return "" if value is None else str(value)


def agree(value: Any, recorded: str, band: float | None) -> bool:
    """Is a repeated value the recorded one, or within ``band`` of it? An empty value agrees with nothing else."""
    if band is None or as_text(value) == "" or recorded == "":
        return as_text(value) == recorded
    return abs(float(value) - float(recorded)) <= band  # False for NaN
