"""metrics.csv: the curves of a run, written row by row while it trains."""

from __future__ import annotations

import csv
from pathlib import Path

from svit_utils.files import read_rows, write_rows

COLUMNS = ("step", "loss", "lr", "tau_factor", "val_accuracy", "val_loss", "seconds")


class Metrics:
    """The rows of a run, in memory and, with a folder, in its metrics.csv.

    Args:
        folder: where metrics.csv lies; None keeps the rows in memory only.
        keep_until: rows of an earlier part of the same run are kept up to this step, that of the checkpoint; the steps
            after it will be done, and written, again.
    """

    def __init__(self, folder: Path | None, keep_until: int = 0) -> None:
        self.path = None if folder is None else folder / "metrics.csv"
        self.rows: list[dict[str, float]] = []
        if self.path is None:
            return
        for row in read_rows(self.path) if keep_until else []:
            whole = None not in row.values()  # a kill can leave half a line at the end
            if whole and int(row["step"]) <= keep_until:
                self.rows.append({k: float(v) for k, v in row.items() if v} | {"step": int(row["step"])})
        write_rows(self.path, COLUMNS, self.rows)

    def add(self, row: dict[str, float]) -> None:
        """Append a row; its keys are among `COLUMNS`."""
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
