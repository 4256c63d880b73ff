"""Every solution holds, every stub does not, and each planted answer is caught by its test with its message."""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import Any

import pytest

from svit_course import ASSIGNMENTS, Wrong, check, question, questions
from svit_course import masters as m

BANKS = {name: importlib.import_module(f"tests.course.bank.{name}") for name in ASSIGNMENTS}


@cache
def cells(assignment: str) -> tuple[m.Cell, ...]:
    return tuple(m.read_cells(m.master(assignment)))


@cache
def solved(assignment: str) -> dict[str, Any]:
    """What given cells and solutions of the master define; plots are not drawn."""
    scope: dict[str, Any] = {"__name__": f"assignment_{assignment}"}
    for cell in m.runnable(cells(assignment)):
        if cell.part in ("given", "answer"):
            exec(compile(cell.source, cell.id, "exec"), scope)
    return scope


def cases_of(name: str) -> dict[str, list[dict[str, Any]] | None]:
    hidden = next(cell for cell in cells(name[0]) if cell.id == f"{name}-hidden")
    return {"visible": None, "hidden": m.hidden_cases(hidden)}


def first_failure(name: str, scope: dict[str, Any]) -> tuple[str, str] | None:
    """(test, message) of the first test that fails; None where all hold."""
    for test, cases in cases_of(name).items():
        try:
            check(name, *(scope[answer] for answer in question(name).answers), cases=cases)
        except Wrong as wrong:
            return test, str(wrong)
    return None


def answered(name: str, code: str) -> dict[str, Any]:
    scope = dict(solved(name[0]))
    exec(compile(code, f"{name}-planted", "exec"), scope)
    return scope


ALL = [q.name for a in BANKS for q in questions(a)]


@pytest.mark.parametrize("name", ALL)
def test_the_solution_holds(name: str) -> None:
    assert first_failure(name, solved(name[0])) is None


@pytest.mark.parametrize("name", ALL)
def test_an_untouched_stub_gets_nothing(name: str) -> None:
    (cell,) = [c for c in cells(name[0]) if c.id == name]
    stub = m.without(cell.source, m.BEGIN_SOLUTION, m.END_SOLUTION, "# YOUR CODE HERE\nraise NotImplementedError()")
    scope = {key: value for key, value in solved(name[0]).items() if key not in question(name).answers}
    try:
        exec(compile(stub, "stub", "exec"), scope)
    except NotImplementedError:
        return  # a stub that is not a function stops at once
    answers = [scope[answer] for answer in question(name).answers]
    for cases in cases_of(name).values():
        with pytest.raises(Wrong, match="not written yet"):
            check(name, *answers, cases=cases)


@pytest.mark.parametrize(
    "planted", [p for b in BANKS.values() for p in b.PLANTED], ids=lambda p: f"{p.question}: {p.name}"
)
def test_a_planted_answer_is_caught(planted: Any) -> None:
    failure = first_failure(planted.question, answered(planted.question, planted.code))
    assert failure is not None, "it passes"
    test, message = failure
    assert re.search(planted.message, message), message
    assert test == planted.by, message


@pytest.mark.parametrize(
    "unusual", [u for b in BANKS.values() for u in b.UNUSUAL], ids=lambda u: f"{u.question}: {u.name}"
)
def test_an_unusual_answer_gets_full_marks(unusual: Any) -> None:
    assert first_failure(unusual.question, answered(unusual.question, unusual.code)) is None
