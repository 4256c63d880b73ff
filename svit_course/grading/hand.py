"""Marks that people enter: in by_hand.csv, and in a file for each further marker beside it. All are joined.

A mark for a question that tests have marked stands in place of theirs, and needs a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from svit_course import masters
from svit_course.grading.runs import TESTS, Graded, Mark
from svit_course.grading.submissions import canonical
from svit_course.grading.tables import Row, number, read_table, write_table

BY_HAND = ("student", "assignment", "question", "marks", "out_of", "comment", "marker")
OPTIONAL = ("marker",)  # its file says it, too
OVERRIDDEN = "overridden"  # the status of the line in which a mark of the tests is changed
Key = tuple[str, str, str]  # student, assignment, question


@dataclass
class Hand:
    """What was entered.

    ``own``: the rows of by_hand.csv, which grading writes again; ``joined``: with those of the other files, which it
    never writes. Both by student, assignment and question.
    """

    own: dict[Key, Row]
    joined: dict[Key, Row]


def files_of(path: Path) -> list[Path]:
    """by_hand.csv, then by_hand_kim.csv and the like beside it, then those in a folder by_hand/."""
    beside = [*path.parent.glob(f"{path.stem}?*.csv"), *(path.parent / path.stem).glob("*.csv")]
    return [path, *sorted(other for other in beside if other.name[0] not in ".~")]


def marks_by_hand(path: Path) -> Hand:
    """What was entered in by_hand.csv and in the files of more markers.

    Raises:
        ValueError: columns are missing; a mark is no number, or out of range, or stands in place of the tests' without
            a reason; two rows give different marks to one answer.
    """
    own: dict[Key, Row] = {}
    joined: dict[Key, Row] = {}
    for file in files_of(path):
        for row in _rows(file, "" if file == path else _marker(file, path)):
            key = row["student"], row["assignment"], row["question"]
            if file == path:
                own[key] = dict(row)
            joined[key] = _joined(joined[key], row) if key in joined else row
    return Hand(own, joined)


def _marker(file: Path, path: Path) -> str:
    """``kim`` of by_hand_kim.csv and of by_hand/kim.csv."""
    return re.sub(rf"^{re.escape(path.stem)}[\W_]*", "", file.stem) or file.stem


def _joined(one: Row, other: Row) -> Row:
    if one["marks"] and other["marks"] and float(one["marks"]) != float(other["marks"]):
        raise ValueError(
            f"{one['student']}, {one['assignment']}, {one['question']} has two marks: {one['marks']} in {one['where']} "
            f"and {other['marks']} in {other['where']}. Empty one of them"
        )
    first, second = (one, other) if one["marks"] or not other["marks"] else (other, one)
    both = {name: "; ".join(dict.fromkeys(filter(None, (first[name], second[name])))) for name in ("comment", "marker")}
    return {**first, **both}


def _rows(file: Path, marker: str) -> Iterator[Row]:
    columns, rows = read_table(file)
    missing = [name for name in BY_HAND if name not in (*columns, *OPTIONAL)]
    if file.is_file() and missing:
        expected = ", ".join(BY_HAND)
        raise ValueError(f"{file} has no column {missing[0]}; its columns are {expected}, separated by commas or by ;")
    for line, read in enumerate(rows, 2):
        row = {name: read.get(name, "").strip() for name in BY_HAND} | {"where": f"{file}, line {line}"}
        row["student"], row["assignment"] = canonical(row["student"]), stem_of(row["assignment"])
        by_tests = _points(row["assignment"]).get(row["question"])
        if by_tests is not None:
            row["out_of"] = number(by_tests)
        if text := row["marks"].replace(",", "."):
            try:
                inside = 0 <= float(text) <= float(row["out_of"].replace(",", "."))
            except ValueError:
                inside = False
            if not inside:
                raise ValueError(f"{row['where']}: marks are a number from 0 to {row['out_of']}, not {text!r}")
            if by_tests is not None and not row["comment"]:
                raise ValueError(
                    f"{row['where']}: {row['question']} is marked by tests; a mark in place of theirs needs a reason, "
                    "in the column comment"
                )
            row["marks"], row["marker"] = text, row["marker"] or marker
        yield row


@cache
def stem_of(assignment: str) -> str:
    """The name of an assignment as it stands in the tables, also of ``a`` alone; as it is where there is none."""
    try:
        return masters.master(assignment.strip()).stem
    except LookupError:
        return assignment


@cache
def _points(assignment: str) -> dict[str, float]:
    """What each tested question of an assignment counts; nothing where there is no such assignment."""
    try:
        cells = masters.read_cells(masters.master(assignment))
    except LookupError:
        return {}
    found: dict[str, float] = {}
    for cell in cells:
        if cell.part in TESTS:
            found[cell.question] = found.get(cell.question, 0.0) + cell.points
    return found


# ------------------------------------------------------------------------------------------------ into the marks


def enter(graded: Graded, hand: Hand) -> list[str]:
    """Put what was entered into the submission's marks, and a row to fill in into ``hand`` where there is none yet.

    Returns:
        The questions that are still to be marked.
    """
    still_open, marks = [], list[Mark]()
    student, assignment = canonical(graded.submission.student), graded.submission.assignment
    for index, mark in enumerate(graded.marks):
        row = hand.joined.get((student, assignment, mark.question))
        if mark.status == "by hand" and row is None:
            row = {"student": student, "assignment": assignment, "question": mark.question, "marks": ""}
            row |= {"out_of": number(mark.out_of), "comment": "", "marker": ""}
            hand.joined[student, assignment, mark.question] = hand.own[student, assignment, mark.question] = row
        if mark.test == "by hand" and row is not None and row["marks"]:
            entered = float(row["marks"])
            mark = replace(mark, status="marked", marks=entered, message=row["comment"], marker=row["marker"])
        elif mark.status == "by hand":
            still_open.append(mark.question)
        marks.append(mark)
        is_last = mark.question not in [other.question for other in graded.marks[index + 1 :]]
        if mark.test in TESTS and is_last and row is not None and row["marks"]:
            marks.append(_instead(mark.question, row, [m for m in marks if m.question == mark.question]))
    graded.marks = marks
    return still_open


def _instead(question: str, row: Row, tests: Sequence[Mark]) -> Mark:
    """The line that makes of the tests' marks the one that was entered: their difference."""
    got, best, mark = sum(m.marks or 0.0 for m in tests), sum(m.out_of for m in tests), float(row["marks"])
    said = f"{number(mark)} of {number(best)} in place of {number(got)}: {row['comment']}"
    return Mark(question, "override", mark - got, 0.0, OVERRIDDEN, said, row["marker"])


def write_by_hand(path: Path, hand: Hand) -> None:
    """Write by_hand.csv: what was entered in it, and a row for each answer that nobody has marked yet."""
    rows = [row for key, row in hand.own.items() if row["marks"] or row["comment"] or not hand.joined[key]["marks"]]
    write_table(path, BY_HAND, sorted(rows, key=lambda row: (row["student"], row["assignment"])))


def unused(hand: Hand, everything: Iterable[Graded]) -> list[str]:
    """A sentence for each mark of an answer that was not graded: a name that is written otherwise, or a question."""
    known = {
        (canonical(g.submission.student), g.submission.assignment, m.question) for g in everything for m in g.marks
    }
    return [
        f"{row['where']}: {', '.join(key)} was not handed in; is a name written otherwise?"
        for key, row in hand.joined.items()
        if row["marks"] and key not in known
    ]
