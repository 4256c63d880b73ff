"""What the outputs of a notebook show: text, the headline, pictures and their alt text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from svit_course.notebooks import code_cells

PICTURES = ("image/png", "image/jpeg", "image/gif")
WIDGET = "application/vnd.jupyter.widget-view+json"


def text_of(cell: Any) -> str:
    """What a cell prints or shows as plain text."""
    parts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif "data" in output and "text/plain" in output.data and not any(kind in output.data for kind in PICTURES):
            parts.append(output.data["text/plain"])
    return "".join(parts).strip()


def drop_widgets(cell: Any) -> None:
    """Leave out the widget where the output holds a page of it, too: without a kernel a widget's view is an error."""
    for output in cell.get("outputs", []):
        if "text/html" in output.get("data", {}):
            output.data.pop(WIDGET, None)


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
