"""What was handed in: find the notebooks, read them, and say which of their cells are run."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from svit_course import masters
from svit_course.masters import Cell
from svit_course.stamp import SETUP_ID

LARGEST = 20 * 2**20  # bytes of a notebook


@dataclass(frozen=True)
class Submission:
    """A student's notebook; ``assignment`` is the file name of its master, without ``.ipynb``."""

    student: str
    assignment: str
    path: Path


def find(folder: Path, only: str | None = None) -> tuple[list[Submission], list[str]]:
    """The submissions in a folder, and a sentence for each notebook that is left out.

    Looked for: a folder per student with notebooks somewhere below it, named as they were handed out; or notebooks
    named ``<student>_<assignment>.ipynb`` side by side. Of several for one student and assignment the newest counts.

    Args:
        only: ``"b"``: this assignment alone.

    Raises:
        ValueError: no such folder, or nothing in it that could be graded.
        LookupError: no such assignment.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: make grade SUBMISSIONS=folder, with a folder per student in it")
    stems, found, strange = [path.stem for path in masters.masters()], [], []
    wanted = {masters.master(only).stem} if only else set(stems)
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).parts
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        stem = next((stem for stem in stems if path.stem.endswith(stem)), None)
        student = parts[0] if len(parts) > 1 else path.stem[: -len(stem)].rstrip("_- ") if stem else ""
        if stem is None or not student:
            strange.append(f"left out: {path.relative_to(folder)}: not the name of an assignment that was handed out")
        elif stem in wanted:
            found.append(Submission(student, stem, path))
    for (student, stem), several in _by_student(found).items():
        if len(several) > 1:
            newest = max(several, key=lambda s: s.path.stat().st_mtime)
            found = [s for s in found if s not in several or s == newest]
            which = newest.path.relative_to(folder)
            strange.append(f"{student}: {len(several)} notebooks for {stem}; graded is {which}")
    if not found:
        raise ValueError(
            f"nothing to grade in {folder}: expected {folder}/<student>/{(sorted(wanted) or ['…'])[0]}.ipynb"
            + "".join(f"\n  {line}" for line in strange)
        )
    return found, strange


def _by_student(found: Sequence[Submission]) -> dict[tuple[str, str], list[Submission]]:
    grouped: dict[tuple[str, str], list[Submission]] = {}
    for submission in found:
        grouped.setdefault((submission.student, submission.assignment), []).append(submission)
    return grouped


def read(submission: Submission) -> list[Cell]:
    """The cells of the notebook.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    try:
        if submission.path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        return masters.read_cells(submission.path)
    except Exception as error:  # whatever a broken file makes nbformat raise
        sentence = f"the notebook cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise ValueError(sentence) from error


def plan(mine: Sequence[Cell], original: Sequence[Cell]) -> list[Cell]:
    """The cells to run: the student's, in their order, with the master's code wherever code was given.

    Given cells that were deleted are put back where they were. Tests are left out: they are asked for later.
    """
    given = {cell.id: cell for cell in original if cell.part == "given"}
    known = {cell.id: cell for cell in original}
    cells = []
    for cell in mine:
        twin = known.get(cell.id)
        if twin is not None:
            cell = twin if twin.part == "given" else replace(cell, part=twin.part, tags=twin.tags)
        if cell.part in ("visible", "hidden", "written") or cell.id == SETUP_ID:
            continue
        cells.append(cell)
    present = {cell.id for cell in cells}
    place = 0
    for cell in original:
        if cell.id in given and cell.id not in present:
            cells.insert(place, cell)
            place += 1
        elif cell.id in present:
            place = next(i for i, c in enumerate(cells) if c.id == cell.id) + 1
    return list(masters.runnable(cells))


def borrows(source: str) -> bool:
    """Whether the code names `svit_utils`. An answer is to be written, not imported."""
    try:
        code = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        nodes = list(ast.walk(ast.parse("\n".join(code))))
    except (SyntaxError, ValueError):
        return False  # running it will say so
    except (RecursionError, MemoryError):
        return "svit_utils" in source
    for node in nodes:
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        names += [getattr(node, "module", None) or "", getattr(node, "id", "")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.count(" "):
            names.append(node.value)
        if any(str(name).split(".")[0] == "svit_utils" for name in names):
            return True
    return False
