"""Does a recorded result still come out of this code? Repeats the small row of each results file and compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from research.plans import Experiment
from research.training import train_run
from svit_utils.data import DataNotFoundError
from svit_utils.files import read_rows
from svit_utils.models import WeightsError
from svit_utils.paths import results_dir


@dataclass(frozen=True)
class Check:
    """What the comparison of one results file gave: ``passed`` is None where it could not be made here."""

    experiment: str
    passed: bool | None
    message: str


def check_experiment(experiment: Experiment, *, folder: Path | None = None) -> Check:
    """Repeat the first run at small size and compare with the recorded small row, within the experiment's bands."""
    path = (results_dir() if folder is None else folder) / f"{experiment.name}.csv"
    run = experiment.runs[0]
    rows = [row for row in read_rows(path) if row["name"] == run.name and row["size"] == "small"]
    if not rows:
        return Check(experiment.name, None, f"{path.name} has no small row of {run.name}")
    try:
        now, _ = train_run(experiment, run, size="small")
    except (DataNotFoundError, WeightsError) as error:
        return Check(experiment.name, None, str(error).splitlines()[0])
    bands = {
        "test_accuracy": experiment.accuracy_band,
        "test_loss": experiment.loss_band,
        "train_loss": experiment.loss_band,
    }
    passed = all(abs(float(now[name]) - float(rows[0][name])) <= band for name, band in bands.items())
    message = ", ".join(
        f"{name} {float(now[name]):.4f} (recorded {float(rows[0][name]):.4f}, band {band})"
        for name, band in bands.items()
    )
    return Check(experiment.name, passed, message)
