"""Enter the marks by hand: ``make totals``, or ``python -m svit_course totals``. Nothing is graded again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from svit_course import notebooks
from svit_course.grading.hand import marks_by_hand, unused
from svit_course.grading.record import saved
from svit_course.grading.reports import Who, write_left_out, write_reports
from svit_course.grading.runs import Graded
from svit_course.grading.submissions import canonical
from svit_course.grading.tables import read_table, writable

ABSENT = "nothing was handed in"


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    whole = argparse.ArgumentParser(
        prog="python -m svit_course totals",
        description="Take the marks from by_hand.csv, and from by_hand_NAME.csv of more markers, into marks.csv, "
        "totals.csv and the feedback, without grading.",
    )
    whole.add_argument("--out", type=Path, default=notebooks.ROOT / "build" / "grades", help="default: build/grades")
    whole.add_argument("--roster", type=Path, help="who is in the course: a CSV file with a column student")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Write the reports anew; the exit status: 2 where a table cannot be read, or nothing was graded yet."""
    options = parser().parse_args(argv)
    try:
        everybody = roster(options.roster) if options.roster else []
        everything = saved(options.out)
        stray = unused(marks_by_hand(options.out / "by_hand.csv"), everything)
        not_final = write_reports(everything, options.out)
    except ValueError as error:
        print(f"make totals: {writable(str(error))}", file=sys.stderr)
        return 2
    left_out = [row for row in read_table(options.out / "totals.csv")[1] if not row.get("out_of")]
    missing = absent(everybody, everything)
    files = [(row["student"], row["assignment"], row["note"]) for row in left_out if row["note"] != ABSENT]
    write_left_out([*files, *((*who, ABSENT) for who in missing)], options.out)
    print(f"{len(everything)} submissions: {options.out}/totals.csv, marks.csv and the feedback with the marks by hand")
    print("\n".join(writable(line) for line in summary(not_final, stray, files, missing, bool(everybody))))
    return 0


def roster(path: Path) -> list[str]:
    """The names in the column ``student`` of a table, as they stand in every table.

    Raises:
        ValueError: there is no such file, column or name.
    """
    if not path.is_file():
        raise ValueError(f"no roster {path}: a CSV file with a column student, named as the folders are")
    columns, rows = read_table(path)
    names = list(dict.fromkeys(canonical(row["student"]) for row in rows if row.get("student", "").strip()))
    if not names:
        raise ValueError(f"{path} names nobody in a column student; its columns are {', '.join(columns) or 'none'}")
    return names


def absent(everybody: Sequence[str], everything: Sequence[Graded]) -> list[Who]:
    """Who on the roster has not handed in which of the assignments that were graded."""
    there = {(canonical(graded.submission.student), graded.submission.assignment) for graded in everything}
    assignments = sorted({assignment for _, assignment in there})
    return [(name, assignment) for name in everybody for assignment in assignments if (name, assignment) not in there]


def summary(
    not_final: dict[Who, str],
    stray: Sequence[str],
    left_out: Sequence[tuple[str, str, str]],
    missing: Sequence[Who],
    has_roster: bool,
) -> list[str]:
    """Sentences on what is still missing; that the totals are final only where nothing is, and a roster says so."""
    said = [f"  {student}, {assignment}: {why}" for (student, assignment), why in sorted(not_final.items())]
    said += [f"  {student}, {file}: {why}" for student, file, why in left_out]
    said += [f"  {student}, {assignment}: {ABSENT}" for student, assignment in missing]
    lines = ["Not final:", *said] if said else []
    if stray:
        lines += ["Marks that were entered and belong to nothing:", *(f"  {line}" for line in stray)]
    if not has_roster:
        lines.append("Without a roster nobody knows who has handed in nothing: --roster FILE, with a column student")
    return lines or ["Final: everybody has handed in, and every answer has its mark."]
