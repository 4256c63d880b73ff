"""What a chapter asks of its reader, counted: ``python -m tools.pages``.

A line for each chapter. ``tests/infra/test_pages.py`` holds the highest number allowed of each.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import astuple, dataclass, fields
from itertools import zip_longest
from typing import Any

from svit_course import notebooks, stamp

TEACHING_LINES = 15
CHECK_LINES = 8
WIDTH = 88  # what fits on a page 1,100 pixels wide without scrolling
FOLDED = {"hide-input", "hide-cell"}

DETAILS = re.compile(r"<details>.*?</details>", flags=re.DOTALL)
EXERCISE = re.compile(r"^\d+\. ", flags=re.MULTILINE)


@dataclass(frozen=True)
class Counts:
    """One chapter in numbers; each of them is better when it is smaller."""

    long_cells: int  # teaching cells of more than 15 lines
    long_checks: int  # check cells of more than 8 lines
    constant_prints: int  # prints that say the same whatever was computed
    unanswered: int  # exercises that no worked answer follows
    wide_lines: int  # lines of code over 88 characters
    words: int  # of prose, without the folded answers


def tags(cell: Any) -> set[str]:
    """The cell's tags."""
    return set(cell.metadata.get("tags", []))


def is_folded(cell: Any) -> bool:
    """Whether a reader sees the cell's title only, until they open it."""
    return bool(FOLDED & tags(cell)) and bool(cell.metadata.get("jupyter", {}).get("source_hidden"))


def lines_of_code(source: str) -> int:
    """Lines that are neither empty nor a comment alone."""
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in source.splitlines())


def count(notebook: Any) -> Counts:
    """Count one chapter."""
    code = [cell for cell in notebooks.code_cells(notebook) if cell.get("id") != stamp.SETUP_ID]
    shown = [cell for cell in code if not is_folded(cell)]
    checks = [cell for cell in shown if "check" in tags(cell)]
    teaching = [cell for cell in shown if "check" not in tags(cell)]
    return Counts(
        long_cells=sum(lines_of_code(cell.source) > TEACHING_LINES for cell in teaching),
        long_checks=sum(lines_of_code(cell.source) > CHECK_LINES for cell in checks),
        constant_prints=sum(constant_prints(cell.source) for cell in code),
        unanswered=unanswered(notebook),
        wide_lines=sum(len(line) > WIDTH for cell in code for line in cell.source.splitlines()),
        words=words(notebook),
    )


def words(notebook: Any) -> int:
    """Words of prose, without what is folded into ``<details>``."""
    prose = (DETAILS.sub("", cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    return sum(len(text.split()) for text in prose)


def stated_minutes(notebook: Any) -> tuple[int, int] | None:
    """Minutes of reading and of running as the chapter states them; None where it does not."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    reading = re.search(r"(\d+) minutes? of reading", prose)
    running = re.search(r"(\d+) minutes? of running", prose)
    return (int(reading.group(1)), int(running.group(1))) if reading and running else None


def constant_prints(source: str) -> int:
    """Calls of ``print`` whose text no result enters. The head of a table, printed before a loop, is none."""
    if source.startswith("%%"):
        return 0
    python = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
    bodies = [
        body
        for node in ast.walk(ast.parse(python))
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody"))
        if isinstance(body, list)
    ]
    return sum(
        _says_nothing(statement) and not _prints_in_a_loop(after)
        for body in bodies
        for statement, after in zip_longest(body, body[1:])
    )


def _is_print(node: Any) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def _says_nothing(statement: Any) -> bool:
    if not (isinstance(statement, ast.Expr) and _is_print(statement.value) and isinstance(statement.value, ast.Call)):
        return False
    arguments = statement.value.args
    return bool(arguments) and all(_is_constant(argument) for argument in arguments)


def _is_constant(node: ast.expr) -> bool:
    """Text that stands in the source: also ``"yes" if good else "no"``, and sums of such texts."""
    if isinstance(node, ast.IfExp):
        return _is_constant(node.body) and _is_constant(node.orelse)
    if isinstance(node, ast.BinOp):
        return _is_constant(node.left) and _is_constant(node.right)
    if isinstance(node, ast.JoinedStr):
        return all(_is_constant(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _is_constant(node.value)
    return isinstance(node, ast.Constant)


def _prints_in_a_loop(statement: Any) -> bool:
    return isinstance(statement, ast.For) and any(_is_print(node) for node in ast.walk(statement))


def unanswered(notebook: Any) -> int:
    """Exercises under "Try it yourself" without an answer: a ``<details>`` or a cell tagged ``answer`` after each."""
    inside, open_exercises, missing = False, 0, 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            open_exercises -= inside and "answer" in tags(cell) and open_exercises > 0
            continue
        if re.match(r"##? ", cell.source):
            inside = bool(re.match(r"##? .*try it yourself", cell.source, flags=re.IGNORECASE))
        if not inside:
            continue
        answers = len(DETAILS.findall(cell.source))
        exercises = len(EXERCISE.findall(DETAILS.sub("", cell.source)))
        if exercises:  # what was open before the next exercise stays without an answer
            missing += open_exercises
            open_exercises = exercises
        open_exercises = max(0, open_exercises - answers)
    return missing + open_exercises


def main(names: list[str]) -> int:
    """Print the table."""
    paths = notebooks.chapters(names)
    width = max(len(path.stem) for path in paths)
    heads = [field.name for field in fields(Counts)]
    print(f"{'chapter':<{width}}  " + "  ".join(heads) + "  minutes")
    for path in paths:
        notebook = notebooks.read(path)
        cells = "  ".join(
            f"{number:>{len(head)}}" for head, number in zip(heads, astuple(count(notebook)), strict=True)
        )
        stated = stated_minutes(notebook)
        print(f"{path.stem:<{width}}  {cells}  " + (f"{stated[0]} + {stated[1]}" if stated else "not stated"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
