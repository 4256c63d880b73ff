"""Lint of notebooks, for pre-commit and ``make lint``.

Valid, with ids, run in order, no local paths in outputs, and stored as JupyterLab stores them, so that whoever opens
and closes one has changed nothing. ``python -m tools.lint_notebooks --fix FILES`` stores them so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from svit_course import notebooks
from svit_course.notebooks import KERNEL

# A home folder or a temporary one in an output says on whose machine it ran, and differs on the next.
LOCAL_PATH = re.compile(r"(?:/home/|/root/|/Users/|/tmp/|/var/folders/|/private/|[A-Z]:\\\\?Users\\)[\w.~-]*")

MEND = "`python -m tools.lint_notebooks --fix FILE`"


def problems(path: Path) -> Iterator[str]:
    """What is wrong with the notebook, a line each."""
    try:
        notebook = notebooks.read(path)
        nbformat.validate(notebook)
    except Exception as error:
        yield f"not a valid notebook: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        yield f"format {notebook.nbformat}.{notebook.nbformat_minor} has no cell ids: save it as 4.5"
    if any(notebook.metadata.get(name) != value for name, value in KERNEL.items()):
        yield f"JupyterLab would store other metadata about the kernel: {MEND}"
    elif path.read_text(encoding="utf-8") != nbformat.writes(notebook) + "\n":
        yield f"JupyterLab would lay the file out differently (indentation, order of keys or its end): {MEND}"
    if "widgets" in notebook.metadata:
        yield "carries widget state: store it with `make stored`"
    ids = [cell.get("id") for cell in notebook.cells]
    if len(set(ids)) != len(ids):
        yield "two cells have the same id"
    code = notebooks.code_cells(notebook)
    counts = [cell.execution_count for cell in code]
    if path.parent.name == "assignments":  # a master: what it printed could give a solution away
        if any(counts) or any(cell.outputs for cell in code):
            yield "a master holds no outputs: clear them"
    elif counts != list(range(1, len(code) + 1)):
        yield f"execution counts are {counts}, not 1 to {len(code)} in order: run it with `make stored`"
    root = str(notebooks.ROOT)
    for number, cell in enumerate(code, start=1):
        if not cell.source.strip():
            yield f"code cell {number} is empty"
        for text in output_texts(cell):
            if found := LOCAL_PATH.search(text):
                yield f"code cell {number} shows a local path: {found.group()}"
            elif root in text:
                yield f"code cell {number} shows where the repository lies: {root}"


def output_texts(cell: Any) -> Iterator[str]:
    """Everything that a cell's outputs hold as text."""
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield "\n".join(output.get("traceback", []))
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "application/json":
                yield value if isinstance(value, str) else str(value)


def main(arguments: list[str]) -> int:
    """Print the problems of the notebooks named; 1 if there are any, else 0. ``--fix`` mends what it can first."""
    found = 0
    for name in [name for name in arguments if name != "--fix"]:
        path = Path(name)
        if not path.is_file():  # an unexpanded pattern, when there is no notebook yet
            continue
        if "--fix" in arguments and any(MEND in problem for problem in problems(path)):
            notebooks.write(notebooks.read(path), path)
        for problem in problems(path):
            print(f"{name}: {problem}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
