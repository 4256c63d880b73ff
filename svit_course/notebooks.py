"""The notebooks of the repository: find them, read them, write them. Needs nbformat, which students do not."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from svit_utils.files import replacing

ROOT = Path(__file__).resolve().parent.parent  # of the repository
NOTEBOOKS = ROOT / "notebooks"

# A notebook's metadata about its kernel, as JupyterLab writes them. The version is that of no particular reader: the
# same in every notebook, so that storing outputs with another Python changes no line.
KERNEL: dict[str, dict[str, Any]] = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3.11.7",
    },
}


def chapters(names: Sequence[str] = ()) -> list[Path]:
    """The chapters in reading order.

    Args:
        names: only these: paths, or beginnings of file names such as ``"01"``.

    Raises:
        SystemExit: there is no chapter of such a name; the message lists those that there are.
    """
    everything = sorted(NOTEBOOKS.glob("*.ipynb"))
    if not names:
        return everything
    chosen = []
    for name in names:
        found = [Path(name)] if name.endswith(".ipynb") and Path(name).is_file() else []
        found = found or [path for path in everything if path.name.startswith(Path(name).name)]
        if not found:
            raise SystemExit(f"no chapter {name!r}; there are: {', '.join(path.stem for path in everything) or 'none'}")
        chosen += found
    return chosen


def read(path: Path) -> Any:
    """The notebook in a file, as nbformat's version 4."""
    return nbformat.read(path, as_version=4)


def write(notebook: Any, path: Path) -> None:
    """Write the notebook as JupyterLab would, so that opening it there changes nothing.

    An interrupted write leaves the old file.
    """
    notebook.metadata.update(copy.deepcopy(KERNEL))
    with replacing(path) as partial:
        nbformat.write(notebook, partial)


def code_cells(notebook: Any) -> list[Any]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def title(notebook: Any, default: str) -> str:
    """The text of the first heading; ``default`` where there is none."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^#\s+(.+)$", cell.source, flags=re.MULTILINE)):
            return found.group(1).strip()
    return default
