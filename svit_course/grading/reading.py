"""Read a notebook that was handed in, and recognise its cells. What a cell is for, the master alone says.

Ids and nbgrader's names are only taken as names: what the student's metadata claim about a cell counts for nothing.
Where an editor has dropped the names, cells are recognised by what is in them and by where they stand. Runs in a
sandbox (`svit_course.grading.judge`), because a notebook may be made to cost whoever reads it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nbformat

from svit_course import masters, rule
from svit_course.grading.flags import flags, imported
from svit_course.masters import Cell
from svit_course.question import questions
from svit_course.stamp import SETUP_ID, setup_source

MOST = 5000  # cells
LARGEST = 8 * 2**20  # characters of all sources
LONGEST = 200_000  # characters of a cell
FLAGS = 300  # characters of what is said of a cell


@dataclass
class Found:
    """A cell as it was handed in; ``name``: of the master's cell that it is, ``""`` for one of the student's own."""

    name: str
    kind: str
    source: str
    number: int


@dataclass
class ToRun:
    """A cell to run or to show.

    ``part``: as the master's cell of that id says, or ``own``; ``refused``: why it is not run, ``""`` if it is;
    ``flags``: what in it a human should look at, see `svit_course.grading.flags`.
    """

    id: str
    part: str
    source: str
    refused: str = ""
    flags: str = ""


def read(data: bytes, original: Any) -> tuple[list[ToRun], list[str]]:
    """The cells to run and the written answers, in order, and what the student is told about them.

    Args:
        original: the master.

    Raises:
        ValueError: it is no notebook; the message says why.
    """
    found, notes = named(_cells(data), original)
    everything = masters.cells(original)
    shown = [ToRun(f.name, "written", f.source) for f in found if _part(everything, f.name) == "written"]
    result, planned = [], plan(found, everything)
    looked_at = [cell for cell in planned if cell.part != "plot" and not _long(cell)]  # a plot may use everything
    asked = rule.rule_of(everything[-1].id[0], (cell.source for cell in looked_at))
    modules = {name for cell in looked_at for node in _parsed(cell.source) for name in imported(node)}
    for cell in planned:
        source, refused, suspicious = cell.source, "", list[str]()
        if _long(cell):
            refused = f"it has more than {LONGEST:,} characters"
        elif cell.part in ("answer", "own"):
            refused, suspicious = asked.breach(source), flags(source, modules)
            if refused:
                source, unused = asked.without_unused(
                    source, [other.source for other in looked_at if other is not cell]
                )
                refused = asked.breach(source)
                if unused and not refused:
                    suspicious.append(f"imports {', '.join(unused)}, which nothing uses")
                    notes.append(_left_out(cell.id, unused))
            if refused and cell.part == "own":
                refused += "; what else the cell defines is missing now"
            if refused:
                source = cell.source
                refused += ". What you do not need, take out of the cell; the cell of a plot may use everything"
        result.append(ToRun(cell.id, cell.part, source, refused, ", ".join(suspicious)[:FLAGS]))
    return [*result, *shown], notes


def _left_out(name: str, unused: Sequence[str]) -> str:
    return (
        f"cell {name} was run without its import of {', '.join(unused)}, which is forbidden and which no answer uses; "
        "what a plot uses belongs into the plot's own cell"
    )


def _long(cell: Cell) -> bool:
    return len(cell.source) > LONGEST


def _part(cells: Sequence[Cell], name: str) -> str:
    return next((cell.part for cell in cells if cell.id == name), "own")


def _cells(data: bytes) -> list[Found]:
    try:
        content = json.loads(data)  # in whatever UTF it is, with a byte-order mark or without
        sheets = content.get("worksheets") or [content]
        raw = [cell for sheet in sheets for cell in sheet.get("cells", ())]
        if len(raw) > MOST:
            raise ValueError(f"it has more than {MOST:,} cells")
        for cell in raw:
            cell.pop("outputs", None)  # before anything looks at their size
            cell.pop("attachments", None)
            if cell.get("cell_type") == "code":
                cell["outputs"] = []
        cells = nbformat.reads(json.dumps(content), as_version=4).cells
        if sum(len(cell.source) for cell in cells) > LARGEST:
            raise ValueError(f"its cells have more than {LARGEST:,} characters")
    except Exception as error:  # whatever a broken file makes json or nbformat raise
        raise ValueError(f"the notebook cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
    return [
        Found(f"{cell.get('id', '')}\n{masters.grade_id(cell)}", cell.cell_type, str(cell.source), number)
        for number, cell in enumerate(cells, 1)
    ]


# ------------------------------------------------------------------------------------------------ recognising


def named(found: list[Found], original: Any) -> tuple[list[Found], list[str]]:
    """Give each cell the name of the master's cell that it is: by its id, by its content, by its place."""
    cells, notes = masters.cells(original), list[str]()
    known = {cell.id for cell in cells} | {SETUP_ID}
    for cell in found:
        cell.name = next((name for name in cell.name.split("\n") if name in known), "")
    _by_content(found, cells, notes)
    _by_place(found, original, notes)
    for cell in found:
        if _part(cells, cell.name) in ("answer", "plot") and cell.kind != "code":
            notes.append(f"cell {cell.number} ({cell.name}) was turned into {cell.kind}: it is run as code")
    return list(_joined(found, cells, notes)), notes


def _by_content(found: list[Found], cells: Sequence[Cell], notes: list[str]) -> None:
    """An answer defines the names that the question asks for; given cells and tests are as they were handed out."""
    there = {cell.name for cell in found}
    same = {_bare(_handed_out(cell)): cell.id for cell in cells if cell.part in ("given", "visible", "hidden")}
    asked = {name: q.name for q in questions(cells[-1].id[0]) for name in q.answers if q.name not in there}
    head = setup_source(None).splitlines()[0]
    for cell in found:
        if cell.name:
            continue
        name = SETUP_ID if cell.source.startswith(head) else same.get(_bare(cell.source), "")
        if not name and cell.kind == "code":
            names = {asked[defined] for defined in _defines(cell.source) if defined in asked}
            name = names.pop() if len(names) == 1 else ""
            if name:
                notes.append(f"cell {cell.number} has lost its name: taken for {name}, because of what it defines")
        if name and name not in there:
            cell.name = name


def _by_place(found: list[Found], original: Any, notes: list[str]) -> None:
    """What is still missing is what stands alone between the master's neighbours of the missing cell."""
    prose = {_bare(cell.source) for cell in original.cells if masters.part(cell) == "own"}
    order = [(masters.grade_id(cell), masters.part(cell)) for cell in original.cells]
    for place, (name, part) in enumerate(order):
        there = [cell.name for cell in found]
        if part not in ("answer", "plot", "written") or name in there:
            continue
        before = [there.index(n) for n, _ in order[:place] if n in there]
        after = [there.index(n) for n, _ in order[place + 1 :] if n in there]
        kind = "markdown" if part == "written" else "code"
        inside = found[max(before, default=-1) + 1 : min(after, default=len(found))]
        fits = [cell for cell in inside if not cell.name and cell.kind == kind and _bare(cell.source) not in prose]
        if part == "plot":  # helpers stand before it
            fits = [cell for cell in fits if re.search(r"plt|axis|axes|figure", cell.source)][-1:] or fits[-1:]
        elif part == "answer":
            fits = fits if len(fits) == 1 else []
        for cell in fits:
            cell.name = name
            notes.append(f"cell {cell.number} has lost its name: taken for {name}, because of where it stands")


def _joined(found: Sequence[Found], cells: Sequence[Cell], notes: list[str]) -> Iterator[Found]:
    """Neighbours of one name, as splitting a cell leaves them, are one cell; others of one name stay where they are."""
    waiting: Found | None = None
    for cell in found:
        if waiting and waiting.name and waiting.name == cell.name and not cell.source.lstrip().startswith("%%"):
            waiting = replace(waiting, source=f"{waiting.source}\n{cell.source}")
            notes.append(f"cell {cell.number} is another part of {cell.name}: both are taken together")
            continue
        if waiting:
            yield waiting
        waiting = cell
    if waiting:
        yield waiting
    several = [cell.name for cell in found if cell.name]
    for name in sorted(set(several)):
        if several.count(name) > 1 and _part(cells, name) in ("answer", "plot"):
            notes.append(f"{several.count(name)} cells are named {name}: all of them are run")


def _bare(source: str) -> str:
    """Without what editors change."""
    return "\n".join(line.strip() for line in source.strip().splitlines() if line.strip())


def _handed_out(cell: Cell) -> str:
    return masters.without(cell.source, masters.BEGIN_HIDDEN, masters.END_HIDDEN)


def _defines(source: str) -> set[str]:
    """The functions, classes and variables that code defines at its top level."""
    names: set[str] = set()
    for node in _parsed(source):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _parsed(source: str) -> list[ast.stmt]:
    """The statements of a cell; none where it is no Python, which running it will say."""
    try:
        return rule.tree_of(rule.transformed(source)).body
    except (RecursionError, MemoryError):
        return []


# ------------------------------------------------------------------------------------------------ what is run


def plan(found: Sequence[Found], original: Sequence[Cell]) -> list[Cell]:
    """The cells to run: the student's, in their order, with the master's code wherever code was given.

    Given cells that were deleted are put back where they were. Tests are left out: they are asked for later.
    """
    known = {cell.id: cell for cell in original}
    cells: list[Cell] = []
    for mine in found:
        twin = known.get(mine.name)
        if twin is None and mine.kind == "code" and mine.name != SETUP_ID:
            cells.append(Cell(str(mine.number), "own", mine.source))
        elif twin is not None and twin.part == "given" and twin not in cells:
            cells.append(twin)
        elif twin is not None and twin.part in ("answer", "plot"):
            cells.append(replace(twin, source=mine.source))
    present = {cell.id for cell in cells}
    place = 0
    for cell in original:
        if cell.part == "given" and cell.id not in present:
            cells.insert(place, cell)
            place += 1
        elif cell.id in present:
            place = next(i for i, c in enumerate(cells) if c.id == cell.id) + 1
    return list(masters.runnable(cells))
