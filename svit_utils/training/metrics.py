"""metrics.csv: the curves of a run, written row by row while it trains."""

import csv
from pathlib import Path

from svit_utils.files import write_rows
from svit_utils.training.outputs import OutputError, writing

COLUMNS = ("step", "loss", "lr", "tau_factor", "val_accuracy", "val_loss", "seconds")


class Metrics:
    """The rows of a run, in memory and, with a folder, in its metrics.csv.

    Args:
        folder: where metrics.csv lies; None keeps the rows in memory only.
        keep_until: rows of an earlier part of the same run are kept up to this step, that of the checkpoint; the steps
            after it will be done, and written, again.

    Raises:
        OutputError: metrics.csv is not a file, or cannot be written.
    """

    def __init__(self, folder: Path | None, keep_until: int = 0) -> None:
        self.path = None if folder is None else folder / "metrics.csv"
        self.rows: list[dict[str, float]] = []
        if self.path is None:
            return
        if self.path.exists() and not self.path.is_file():  # to open a named pipe would wait for ever
            raise OutputError(f"{self.path} is not a file: remove it, or choose another out_dir")
        with writing(self.path):
            if keep_until and self.path.exists():
                self.rows = _whole_rows(self.path.read_text(encoding="utf-8", errors="replace"), keep_until)
            write_rows(self.path, COLUMNS, self.rows)

    def add(self, row: dict[str, float]) -> None:
        """Append a row; its keys are among `COLUMNS`. Raises `OutputError`, as on a full disk."""
        self.rows.append(row)
        if self.path is not None:
            with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def _whole_rows(text: str, keep_until: int) -> list[dict[str, float]]:
    """The rows up to that step. A kill or power cut can leave half a line, or zero bytes in the place of lines."""
    rows: list[dict[str, float]] = []
    for line in text.splitlines():
        values = line.strip("\0").split(",")
        try:
            row = {name: float(value) for name, value in zip(COLUMNS, values, strict=True) if value}
            step = int(values[0])
        except ValueError:  # the header too
            continue
        if (rows[-1]["step"] if rows else 0) < step <= keep_until:
            rows.append(row | {"step": step})
    return rows
