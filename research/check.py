"""Does a recorded result still come out of this code? Reruns the small row of each results file and compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from research.arms import DESIGNS, Design
from research.run import run_arm
from svit_utils.data import DataNotFoundError
from svit_utils.files import read_rows
from svit_utils.models import WeightsError
from svit_utils.paths import results_dir


@dataclass(frozen=True)
class Check:
    """What the comparison of one results file gave: ``passed`` is None where it could not be made here."""

    design: str
    passed: bool | None
    message: str


def check_design(design: Design, *, folder: Path | None = None) -> Check:
    """Rerun the first arm of ``design`` at small size and compare with the recorded small row.

    The bands are the design's own: `Design.accuracy_band` (share of right answers) and `Design.loss_band` (nats).
    """
    path = (results_dir() if folder is None else folder) / f"{design.name}.csv"
    arm = design.arms[0]
    rows = [row for row in read_rows(path) if row["name"] == arm.name and row["size"] == "small"]
    if not rows:
        return Check(design.name, None, f"{path.name} has no small row of {arm.name}")
    try:
        now, _ = run_arm(design, arm, size="small")
    except (DataNotFoundError, WeightsError) as error:
        return Check(design.name, None, str(error).splitlines()[0])
    differences = {
        name: abs(float(now[name]) - float(rows[0][name])) for name in ("test_accuracy", "test_loss", "train_loss")
    }
    bands = {"test_accuracy": design.accuracy_band, "test_loss": design.loss_band, "train_loss": design.loss_band}
    message = ", ".join(
        f"{name} {float(now[name]):.4f} (recorded {float(rows[0][name]):.4f}, band {bands[name]})" for name in bands
    )
    return Check(design.name, all(differences[name] <= bands[name] for name in bands), message)


def check_all() -> list[Check]:
    """`check_design` of every design, in order."""
    return [check_design(design) for design in DESIGNS.values()]
