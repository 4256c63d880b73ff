"""What grading writes: marks.csv, by_hand.csv, totals.csv, and the feedback pages.

What is marked by hand is listed in ``by_hand.csv``: fill in its columns ``marks`` and ``comment``, then `make totals`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svit_course.grading.feedback import write_feedback
from svit_course.grading.hand import OVERRIDDEN, enter, marks_by_hand, write_by_hand
from svit_course.grading.record import save
from svit_course.grading.runs import NO_CODE, TESTS, Graded
from svit_course.grading.submissions import canonical
from svit_course.grading.tables import Row, number, read_table, short, write_table

MARKS = ("student", "assignment", "question", "test", "marks", "out_of", "status", "message", "marker")
TOTALS = ("student", "assignment", "by_tests", "by_hand", "total", "out_of", "overridden", "flags", "note")
NOTES = 20  # of a submission
Who = tuple[str, str]  # student and assignment


def write_reports(everything: Sequence[Graded], out: Path) -> dict[Who, str]:
    """Write the three tables and the feedback into ``out``; a file appears whole or not at all.

    Lines of submissions that are not graded this time stay.

    Returns:
        Why a total is not final, of each submission of which it is not.

    Raises:
        ValueError: an earlier table cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    hand = marks_by_hand(out / "by_hand.csv")
    now, reasons = {_who(graded) for graded in everything}, dict[Who, str]()
    lines, totals = (
        [
            row
            for row in read_table(out / name)[1]
            if (canonical(row.get("student", "")), row.get("assignment", "")) not in now
        ]
        for name in ("marks.csv", "totals.csv")
    )
    for graded in everything:
        save(graded, out)
    everything = [replace(graded) for graded in everything]  # what was entered is not what was graded
    for graded in everything:
        still_open = enter(graded, hand)
        graded.marks = [replace(mark, message=short(mark.message)) for mark in graded.marks]
        graded.notes = [short(note) for note in graded.notes[:NOTES]]
        if not_final := _not_final(graded, still_open):
            reasons[_who(graded)] = not_final
        lines += _lines(graded)
        totals.append(_total(graded, not_final))
    # Whichever submission was finished first: by student and assignment, questions as they stand in the master.
    write_table(out / "marks.csv", MARKS, sorted(lines, key=_place))
    write_by_hand(out / "by_hand.csv", hand)
    write_table(out / "totals.csv", TOTALS, sorted(totals, key=_place))
    for graded in everything:
        try:
            write_feedback(graded, out / "feedback")
        except Exception as error:  # one page that cannot be written must not cost the others theirs
            print(f"  no feedback for {canonical(graded.submission.student)}: {error}", file=sys.stderr)
    return reasons


def write_left_out(found: Sequence[tuple[str, str, str]], out: Path) -> None:
    """Give what was not graded, (student, file or assignment, why), a line in totals.csv; lines of earlier runs go."""
    rows = [row for row in read_table(out / "totals.csv")[1] if row.get("out_of")]
    rows += [{"student": student, "assignment": what, "note": why} for student, what, why in found]
    if rows:
        write_table(out / "totals.csv", TOTALS, sorted(rows, key=_place))


def _place(row: Row) -> Who:
    return row.get("student", ""), row.get("assignment", "")


def _who(graded: Graded) -> Who:
    return canonical(graded.submission.student), graded.submission.assignment


def _lines(graded: Graded) -> list[Row]:
    """The submission's lines of marks.csv."""
    student, assignment = _who(graded)
    return [
        {
            "student": student,
            "assignment": assignment,
            "question": mark.question,
            "test": mark.test,
            "marks": "" if mark.marks is None else number(mark.marks),
            "out_of": number(mark.out_of),
            "status": mark.status,
            "message": mark.message,
            "marker": mark.marker,
        }
        for mark in graded.marks
    ]


def _not_final(graded: Graded, still_open: Sequence[str]) -> str:
    """Why somebody still has to look at it; "" where nobody has to."""
    tests = [mark for mark in graded.marks if mark.test in TESTS]
    entered = any(mark.status in (OVERRIDDEN, "marked") for mark in graded.marks)
    if tests and not entered and all(mark.status == "not graded" or mark.message == NO_CODE for mark in tests):
        return "nothing of it could be graded"
    return f"to mark by hand: {', '.join(still_open)}" if still_open else ""


def _total(graded: Graded, not_final: str) -> Row:
    """The submission's line of totals.csv."""
    by_hand = sum(mark.marks or 0.0 for mark in graded.marks if mark.test == "by hand")
    by_tests = sum(mark.marks or 0.0 for mark in graded.marks if mark.test != "by hand")
    marked = any(mark.test == "by hand" and mark.status == "marked" for mark in graded.marks) or not not_final
    student, assignment = _who(graded)
    return {
        "student": student,
        "assignment": assignment,
        "by_tests": number(by_tests),
        "by_hand": number(by_hand) if marked else "",
        "total": number(by_tests + by_hand) + (" (not final)" if not_final else ""),
        "out_of": number(sum(mark.out_of for mark in graded.marks)),
        "overridden": "; ".join(f"{m.question}: {m.message}" for m in graded.marks if m.status == OVERRIDDEN),
        "flags": "; ".join(graded.flags[:NOTES]),
        "note": "; ".join([*([f"not final, {not_final}"] if not_final else []), *graded.notes]),
    }
