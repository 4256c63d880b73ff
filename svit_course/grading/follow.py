"""Follow-through: an answer that builds on an earlier one is not lost with it.

What failed and calls an answer that is missing or wrong is asked again, with the master's answer in that one's place.
It comes last, in a process of its own, and nothing is quoted of what is said there: it knows that solution by then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from svit_course import Question, questions
from svit_course.grading.runs import ENDS, TESTS, Graded, Judge, Mark, Run
from svit_course.masters import Cell
from svit_course.sandbox.sandbox import Sandbox

_UNWRITTEN = " is not written yet"


def follow_through(
    graded: Graded, cells: Sequence[dict[str, str]], sandbox: Sandbox, judge: Judge, original: Sequence[Cell]
) -> None:
    """Raise the marks of answers that failed because of an earlier one; of the others the message may say more.

    Args:
        graded: with the marks of all tests.
        cells: those that were run.
        original: the master's.
    """
    solutions = {cell.id: cell.source for cell in original if cell.part == "answer"}
    tests = {(cell.question, cell.part): cell for cell in original if cell.part in TESTS}
    bad, run, taken = list[Question](), None, list[str]()
    asked = questions(graded.submission.assignment[0])
    for number, about in enumerate(asked):
        places = [i for i, m in enumerate(graded.marks) if m.question == about.name and m.test in TESTS]
        failed = [i for i in places if graded.marks[i].status not in ("ok", "refused", "not graded")]
        instead = _leans_on(about, asked[:number], bad, graded, solutions)
        if failed and instead and not any(_unwritten(graded.marks[i], about) for i in failed):
            if run is None or instead != taken:
                sandbox.stop()
                replaced = _with_ours(cells, instead, about.name, solutions)
                run, taken = Run(Graded(graded.submission), replaced, sandbox, judge, quoting=False), instead
            for i in failed:
                status, message = run.test(tests[about.name, graded.marks[i].test])
                graded.marks[i] = _better(graded.marks[i], status, message, instead)
                if status in ENDS:
                    break
        if any(graded.marks[i].status != "ok" for i in places):
            bad.append(about)
    sandbox.stop()
    for plot in [cell.id for cell in original if cell.part == "plot" and cell.id in graded.sources]:
        _tell_of(plot, graded, asked, bad)


def _tell_of(plot: str, graded: Graded, asked: Sequence[Question], bad: Sequence[Question]) -> None:
    """Say of a plot that it was drawn with answers that do not hold: with ours it is not drawn again.

    A figure shows whatever the cell wants, and beside our answer that would be our answer.
    """
    text, used = graded.sources[plot], list[str]()
    for other in reversed(asked):
        if any(re.search(rf"\b{name}\b", text) for name in other.answers):
            text += "\n" + graded.sources.get(other.name, "")
            used += [other.name] if other in bad else []
    if used:
        graded.notes.append(
            f"{plot} was drawn with your own {' and '.join(used[::-1])}, in which tests found something. A test that "
            "builds on it was judged with ours in its place; a plot is not drawn again, and is marked by its code"
        )


def _unwritten(mark: Mark, about: Question) -> bool:
    """Whether the answer itself is what is not written."""
    return any(f"{name}{_UNWRITTEN}" in mark.message for name in (*about.answers, " or ".join(about.answers)))


def _leans_on(
    about: Question, earlier: Sequence[Question], bad: Sequence[Question], graded: Graded, solutions: dict[str, str]
) -> list[str]:
    """The earlier questions whose answers are no good and are named by this one, or by what it names in turn.

    Looked for is the name, as a word: a stranger's code is not parsed here.
    """
    if about.name not in graded.sources:
        return []
    text, found = "\n".join([graded.sources[about.name], *graded.own.values()]), []
    for other in reversed(earlier):
        if any(re.search(rf"\b{name}\b", text) for name in other.answers):
            text += "\n" + (solutions if other in bad else graded.sources).get(other.name, "")
            found += [other.name] if other in bad else []
    return found[::-1]


def _with_ours(
    cells: Sequence[dict[str, str]], instead: Sequence[str], name: str, solutions: dict[str, str]
) -> list[dict[str, Any]]:
    """The cells, the named answers' replaced by the master's, which stand right before the answer that is asked for."""
    kept = [cell for cell in cells if cell["id"] not in instead]
    place = next((i for i, cell in enumerate(kept) if cell["id"] == name), len(kept))
    ours = [{"id": one, "part": "answer", "source": solutions[one], "refused": ""} for one in instead]
    return [*kept[:place], *ours, *kept[place:]]


def _better(mark: Mark, status: str, message: str, instead: Sequence[str]) -> Mark:
    how = f"judged with our {' and '.join(instead)} in place of yours"
    if status == "ok":
        return replace(mark, marks=mark.out_of, status="ok", message=how)
    if mark.status == "wrong" and _UNWRITTEN not in mark.message:
        return replace(mark, message=f"{mark.message} (also when {how})")
    return replace(mark, status=status, message=f"{message} ({how})")
