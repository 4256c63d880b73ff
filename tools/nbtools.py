"""What the other tools share about notebooks: finding, reading and writing them, and alt text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
LINKS_ID = "svit-links"
SETUP_ID = "svit-setup"
IGNORED = "nbval-ignore-output"
PICTURES = ("image/png", "image/jpeg", "image/gif")
WIDGET = "application/vnd.jupyter.widget-view+json"


def chapters(names: Sequence[str] = ()) -> list[Path]:
    """The chapters in reading order; ``names`` are paths, or beginnings of file names such as ``01``."""
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
    return nbformat.read(path, as_version=4)


def write(notebook: Any, path: Path) -> None:
    """Written through a temporary file, so that an interrupted write leaves the old notebook."""
    temporary = path.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def title(notebook: Any, default: str) -> str:
    """The first heading of the notebook."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^#\s+(.+)$", cell.source, flags=re.MULTILINE)):
            return found.group(1).strip()
    return default


def text_of(cell: Any) -> str:
    """What a cell prints or shows as plain text."""
    parts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif "data" in output and "text/plain" in output.data and not any(kind in output.data for kind in PICTURES):
            parts.append(output.data["text/plain"])
    return "".join(parts).strip()


def headline(notebook: Any) -> str:
    """The text of the cell tagged ``headline``, on one line; empty without one."""
    for cell in code_cells(notebook):
        if "headline" in cell.metadata.get("tags", []):
            return " ".join(text_of(cell).split())
    return ""


def pictures(cell: Any) -> Iterator[tuple[str, str]]:
    """Each picture that the cell shows, as (kind, alt text or ``""``): picture outputs and ``<img>`` in HTML."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        for kind in PICTURES:
            if kind in data:
                metadata = output.get("metadata", {})
                alt = metadata.get(kind, {}).get("alt") or metadata.get("alt") or cell.metadata.get("alt") or ""
                yield kind, str(alt)
        html = data.get("text/html", "")
        for tag in re.findall(r"<img\b[^>]*>", html if isinstance(html, str) else "".join(html)):
            found = re.search(r"""\balt\s*=\s*(?:"([^"]*)"|'([^']*)')""", tag)
            yield "img", (found.group(1) or found.group(2) or "") if found else ""
