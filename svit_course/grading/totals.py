"""Enter the marks by hand: ``make totals``, or ``python -m svit_course totals``. Nothing is graded again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from svit_course import notebooks
from svit_course.grading.record import saved
from svit_course.grading.reports import writable, write_reports


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    whole = argparse.ArgumentParser(
        prog="python -m svit_course totals",
        description="Take the marks from by_hand.csv into marks.csv, totals.csv and the feedback, without grading.",
    )
    whole.add_argument("--out", type=Path, default=notebooks.ROOT / "build" / "grades", help="default: build/grades")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Write the reports anew; the exit status: 2 where by_hand.csv cannot be read, or nothing was graded yet."""
    options = parser().parse_args(argv)
    try:
        everything = saved(options.out)
        write_reports(everything, options.out)
    except ValueError as error:
        print(f"make totals: {writable(str(error))}", file=sys.stderr)
        return 2
    print(f"{len(everything)} submissions: {options.out}/totals.csv, marks.csv and the feedback with the marks by hand")
    return 0
