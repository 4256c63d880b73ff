"""What grading writes: marks.csv, by_hand.csv, totals.csv, and the feedback pages.

What is marked by hand is listed in ``by_hand.csv``: fill in its columns ``marks`` and ``comment``, then `make totals`.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svit_course.grading.feedback import write_feedback
from svit_course.grading.record import save
from svit_course.grading.runs import Graded
from svit_course.grading.submissions import JOINERS, NOT_ITS_NAME, canonical
from svit_utils.files import write_rows

MARKS = ("student", "assignment", "question", "test", "marks", "out_of", "status", "message")
BY_HAND = ("student", "assignment", "question", "marks", "out_of", "comment")
TOTALS = ("student", "assignment", "by_tests", "by_hand", "total", "out_of", "flags", "note")
MESSAGE = 2000  # characters of a message
NOTES = 20  # of a submission
_FORMULA = re.compile(r"'*[=+\-@]")  # what a spreadsheet computes, or what was already kept from it
# by_hand.csv by student, assignment and question
Hand = dict[tuple[str, str, str], dict[str, str]]


def write_reports(everything: Sequence[Graded], out: Path) -> Path:
    """Write the three tables and the feedback into ``out``; a file appears whole or not at all.

    Lines of submissions that are not graded this time stay.

    Raises:
        ValueError: an earlier table cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    hand = marks_by_hand(out / "by_hand.csv")
    now = {_who(graded) for graded in everything}
    lines, totals = (
        [
            row
            for row in _read(out / name)[1]
            if (canonical(row.get("student", "")), row.get("assignment", "")) not in now
        ]
        for name in ("marks.csv", "totals.csv")
    )
    for graded in everything:
        save(graded, out)
        still_open = enter_marks_by_hand(graded, hand)
        graded.marks = [replace(mark, message=_short(mark.message)) for mark in graded.marks]
        graded.notes = [_short(note) for note in graded.notes[:NOTES]]
        lines += _lines(graded)
        totals.append(_total(graded, still_open))
    # Whichever submission was finished first: by student and assignment, questions as they stand in the master.
    write_table(out / "marks.csv", MARKS, sorted(lines, key=_place))
    write_table(out / "by_hand.csv", BY_HAND, sorted(hand.values(), key=_place))
    write_table(out / "totals.csv", TOTALS, sorted(totals, key=_place))
    for graded in everything:
        try:
            write_feedback(graded, out / "feedback")
        except Exception as error:  # one page that cannot be written must not cost the others theirs
            print(f"  no feedback for {canonical(graded.submission.student)}: {error}", file=sys.stderr)
    return out


def write_left_out(found: Sequence[tuple[str, str]], out: Path) -> None:
    """Give each notebook that is left out, (student, file), a line in totals.csv, in place of those of earlier runs."""
    rows = [row for row in _read(out / "totals.csv")[1] if row.get("out_of")]
    rows += [{"student": student, "assignment": file, "note": f"left out: {NOT_ITS_NAME}"} for student, file in found]
    if rows:
        write_table(out / "totals.csv", TOTALS, sorted(rows, key=_place))


def marks_by_hand(path: Path) -> Hand:
    """What the lecturer has entered.

    Raises:
        ValueError: columns are missing, or a mark is no number, or out of range.
    """
    columns, rows = _read(path)
    missing = [name for name in BY_HAND if name not in columns]
    if path.is_file() and missing:
        raise ValueError(
            f"{path} has no column {missing[0]}; its columns are {', '.join(BY_HAND)}, with commas between"
        )
    found = {}
    for number, row in enumerate(rows, 2):
        row = {name: row.get(name, "") for name in BY_HAND}
        if text := row["marks"].strip().replace(",", "."):
            try:
                inside = 0 <= float(text) <= float(row["out_of"])
            except ValueError:
                inside = False
            if not inside:
                raise ValueError(f"{path}, line {number}: marks are a number from 0 to {row['out_of']}, not {text!r}")
            row["marks"] = text
        row["student"] = canonical(row["student"])
        found[row["student"], row["assignment"], row["question"]] = row
    return found


def enter_marks_by_hand(graded: Graded, hand: Hand) -> list[str]:
    """Put the lecturer's marks into the submission's, and a line without marks into ``hand`` where there is none yet.

    Returns:
        The questions that are still to be marked.
    """
    still_open = []
    student, assignment = _who(graded)
    for index, mark in enumerate(graded.marks):
        if mark.status == "by hand":
            new = {"student": student, "assignment": assignment, "question": mark.question}
            new |= {"marks": "", "out_of": _number(mark.out_of), "comment": ""}
            row = hand.setdefault((student, assignment, mark.question), new)
            if row["marks"]:
                graded.marks[index] = replace(mark, marks=float(row["marks"]), status="marked", message=row["comment"])
            else:
                still_open.append(mark.question)
    return still_open


def _place(row: dict[str, str]) -> tuple[str, str]:
    return row.get("student", ""), row.get("assignment", "")


def _who(graded: Graded) -> tuple[str, str]:
    return canonical(graded.submission.student), graded.submission.assignment


def _lines(graded: Graded) -> list[dict[str, str]]:
    """The submission's lines of marks.csv."""
    student, assignment = _who(graded)
    return [
        {
            "student": student,
            "assignment": assignment,
            "question": mark.question,
            "test": mark.test,
            "marks": "" if mark.marks is None else _number(mark.marks),
            "out_of": _number(mark.out_of),
            "status": mark.status,
            "message": mark.message,
        }
        for mark in graded.marks
    ]


def _total(graded: Graded, still_open: Sequence[str]) -> dict[str, str]:
    """The submission's line of totals.csv."""
    by_hand = sum(mark.marks or 0.0 for mark in graded.marks if mark.test == "by hand")
    by_tests = sum(mark.marks or 0.0 for mark in graded.marks if mark.test != "by hand")
    notes = [f"not final, to mark by hand: {', '.join(still_open)}"] if still_open else []
    marked = any(mark.test == "by hand" and mark.status == "marked" for mark in graded.marks) or not still_open
    student, assignment = _who(graded)
    return {
        "student": student,
        "assignment": assignment,
        "by_tests": _number(by_tests),
        "by_hand": _number(by_hand) if marked else "",
        "total": _number(by_tests + by_hand) + (" (not final)" if still_open else ""),
        "out_of": _number(sum(mark.out_of for mark in graded.marks)),
        "flags": "; ".join(graded.flags[:NOTES]),
        "note": "; ".join(notes + graded.notes),
    }


# ------------------------------------------------------------------------------------------------ tables


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file that a spreadsheet opens without running anything; columns that a row lacks stay empty."""
    write_rows(path, columns, ({name: _harmless(str(row.get(name, ""))) for name in columns} for row in rows))


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a table that a spreadsheet may have saved; nothing where there is no file.

    Raises:
        ValueError: it is no CSV.
    """
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            rows = [{key: _honest(value or "") for key, value in row.items() if key} for row in reader]
            return list(reader.fieldnames or ()), rows
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _number(value: float) -> str:
    return f"{value:g}"


def _harmless(text: str) -> str:
    """A cell of sane length that a spreadsheet does not take for a formula, without control characters."""
    text = _short(text)
    return f"'{text}" if _FORMULA.match(text) else text


def _short(text: str) -> str:
    """A line of sane length without control characters."""
    text = " ".join(writable(text).split())
    return f"{text[:MESSAGE]} …" if len(text) > MESSAGE else text


def _honest(text: str) -> str:
    """What `_harmless` was given, as far as names and comments go."""
    return text[1:] if text[:1] == "'" and _FORMULA.match(text) else text


def writable(text: str) -> str:
    """What cannot be printed, lone surrogates and what steers a terminal included, as escapes; spaces stay."""
    return "".join(c if c.isprintable() or c.isspace() or c in JOINERS else ascii(c)[1:-1] for c in text)
