"""Submissions to assignment a, as students hand them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbformat.v4 import new_code_cell

from svit_course import masters as m
from svit_course import notebooks
from svit_course.sandbox import fence

MASTER = m.master("a")
Change = Callable[[Any], None]


def submission(folder: Path, student: str, change: Change | None = None, name: str = MASTER.name) -> Path:
    """The solution of assignment a as a student would hand it in, changed."""
    notebook = notebooks.read(MASTER)
    for cell in notebook.cells:
        cell.source = m.without(cell.source, m.BEGIN_HIDDEN, m.END_HIDDEN)
    if change:
        change(notebook)
    path = folder / student / name
    path.parent.mkdir(parents=True, exist_ok=True)
    notebooks.write(notebook, path)
    return path


def answers(question: str, source: str) -> Change:
    def change(notebook: Any) -> None:
        (cell,) = [cell for cell in notebook.cells if cell.get("id") == question]
        cell.source = source

    return change


def inserted(source: str, before: str = "a1", **metadata: Any) -> Change:
    """A cell of one's own."""

    def change(notebook: Any) -> None:
        place = next(i for i, cell in enumerate(notebook.cells) if cell.get("id") == before)
        notebook.cells.insert(place, new_code_cell(source, metadata=metadata))

    return change


def deletes(*ids: str) -> Change:
    def change(notebook: Any) -> None:
        notebook.cells = [cell for cell in notebook.cells if cell.get("id") not in ids]

    return change


def sandboxed() -> bool:
    """Whether submissions can be graded here. `make test-grader` fails where they cannot."""
    try:
        return bool(fence.bubblewrap())
    except fence.NoSandbox:
        return False
