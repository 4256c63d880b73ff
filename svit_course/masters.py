"""The master notebooks: what each cell is for, and the hidden cases written in them.

An assignment has one master; the student's notebook, the solution and the grading are made from it. What a cell is for
stands in its nbgrader metadata, and its id is its grade_id: ``a1`` the answer, ``a1-visible`` and ``a1-hidden`` its
tests.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svit_course import notebooks

ASSIGNMENTS = notebooks.NOTEBOOKS / "assignments"
BEGIN_HIDDEN, END_HIDDEN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
BEGIN_SOLUTION, END_SOLUTION = "### BEGIN SOLUTION", "### END SOLUTION"
# The tag of a cell that no answer depends on, such as a training run: grading does not wait for it.
NOT_AT_GRADING = "not-at-grading"


@dataclass(frozen=True)
class Cell:
    """A cell and its ``part``.

    ``given`` (code that the student is handed), ``answer``, ``visible`` or ``hidden`` (tests), ``plot`` and ``written``
    (marked by hand), or ``own`` (the student's).
    """

    id: str
    part: str
    source: str
    points: float = 0
    tags: tuple[str, ...] = field(default=())

    @property
    def question(self) -> str:
        """``a1`` of ``a1``, ``a1-visible``, ``a1-hidden``."""
        return self.id.split("-")[0]


def masters() -> list[Path]:
    """The master notebooks, in order."""
    return sorted(ASSIGNMENTS.glob("[a-z]_*.ipynb"))


def master(assignment: str) -> Path:
    """The master of ``"a"`` or of ``"a_softmax_to_thresholded_attention"``.

    Raises:
        LookupError: there is none.
    """
    for path in masters():
        if assignment in (path.stem, path.stem[0]):
            return path
    known = ", ".join(path.stem for path in masters())
    raise LookupError(f"no assignment {assignment!r}: there are {known}")


def part(cell: Any) -> str:
    """What the cell is for; ``own`` if nbgrader knows nothing of it (prose, set-up, a student's own cells)."""
    marks = _nbgrader(cell)
    grade, solution = marks.get("grade", False), marks.get("solution", False)
    if grade and solution:
        return "plot" if cell.cell_type == "code" else "written"
    if grade:
        return "hidden" if str(marks.get("grade_id", "")).endswith("-hidden") else "visible"
    if solution:
        return "answer"
    return "given" if marks.get("locked") else "own"


def _nbgrader(cell: Any) -> Any:
    """nbgrader's metadata of a cell; what is handed in may hold anything there."""
    found = cell.metadata.get("nbgrader")
    return found if isinstance(found, dict) else {}


def grade_id(cell: Any) -> str:
    """The cell's name in nbgrader; its id where nbgrader knows nothing of it."""
    return str(_nbgrader(cell).get("grade_id") or cell.get("id", ""))


def cells(notebook: Any) -> list[Cell]:
    """The code cells and the written answers of a notebook; other prose is left out."""
    found = []
    for cell in notebook.cells:
        kind = part(cell)
        if cell.cell_type == "code" or kind == "written":
            points, tags = _nbgrader(cell).get("points", 0), cell.metadata.get("tags", ())
            points = float(points) if isinstance(points, int | float) else 0.0
            tags = tuple(map(str, tags)) if isinstance(tags, list | tuple) else ()
            found.append(Cell(grade_id(cell), kind, str(cell.source), points, tags))
    return found


def read_cells(path: Path) -> list[Cell]:
    """`cells` of the notebook in a file."""
    return cells(notebooks.read(path))


def hidden_cases(cell: Cell) -> list[dict[str, Any]]:
    """The cases in a hidden test. They are literals, so nothing is run to read them.

    Raises:
        ValueError: the cell is not one call of ``check`` with literal cases.
    """
    region = cell.source.split(BEGIN_HIDDEN, 1)[-1].split(END_HIDDEN, 1)[0]
    calls = [n for n in ast.walk(ast.parse(region)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "check"]
    given = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "cases"]
    if len(calls) != 1 or len(given) != 1:
        raise ValueError(f"{cell.id}: a hidden test is one check(..., cases=[...])")
    found: list[dict[str, Any]] = ast.literal_eval(given[0])
    return found


def without(source: str, begin: str, end: str, instead: str = "") -> str:
    """The source without its regions from a line ``begin`` to a line ``end``.

    Args:
        instead: lines to put in the place of each region, indented as ``begin`` was.
    """
    pattern = rf"^([ \t]*){re.escape(begin)}[^\n]*\n.*?^[ \t]*{re.escape(end)}[^\n]*\n?"

    def replaced(found: re.Match[str]) -> str:
        return "".join(f"{found.group(1)}{line}\n" for line in instead.splitlines())

    return re.sub(pattern, replaced, source, flags=re.DOTALL | re.MULTILINE).rstrip("\n")


def runnable(found: Sequence[Cell]) -> Iterator[Cell]:
    """The cells that grading runs, in order: everything but tests, written answers and what is not for grading."""
    for cell in found:
        if cell.part in ("given", "answer", "plot", "own") and NOT_AT_GRADING not in cell.tags:
            yield cell
