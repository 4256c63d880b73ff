"""The two cells at the head of every notebook: where it can be opened, and the set-up that Colab needs.

`tools.links` stamps them into the repository's notebooks, `svit_course.build` into those that students get.
"""

from __future__ import annotations

import argparse
import re
from typing import Any
from urllib.parse import quote

from nbformat.v4 import new_code_cell, new_markdown_cell

LINKS_ID = "svit-links"
SETUP_ID = "svit-setup"
GITHUB = re.compile(r"github\.com[:/]+([\w.-]+)/([\w.-]+?)(?:\.git)?/?$")


def owner_name(url: str) -> str | None:
    """``owner/name`` of a GitHub address, or of ``owner/name`` itself; None for anything else."""
    if found := GITHUB.search(url):
        return f"{found.group(1)}/{found.group(2)}"
    return url if re.fullmatch(r"[\w.-]+/[\w.-]+", url) else None


def named_repository(parser: argparse.ArgumentParser, given: str | None) -> str | None:
    """What an option ``--repository`` names, as ``owner/name``; None without it.

    Raises:
        SystemExit: it is neither ``owner/name`` nor a GitHub address; the parser says so.
    """
    named = owner_name(given) if given else None
    if given and not named:
        parser.error(f"--repository is owner/name or a GitHub address, not {given!r}")
    return named


def colab(repository: str, path: str, branch: str = "main") -> str:
    """The address that opens a notebook of ``owner/name`` in Colab."""
    return f"https://colab.research.google.com/github/{repository}/blob/{branch}/{path}"


def binder(repository: str, path: str, branch: str = "main") -> str:
    """The address that opens a notebook of ``owner/name`` on Binder."""
    return f"https://mybinder.org/v2/gh/{repository}/{quote(branch, safe='')}?urlpath=lab/tree/{path}"


_SETUP = """\
# On Colab: installs this book's package and what it needs. Anywhere else: does nothing.
import glob, importlib.util, subprocess, sys
if "google.colab" in sys.modules:
    if importlib.util.find_spec("svit_utils") is None:
{package}
        if subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", package]):
            raise RuntimeError("pip could not install the book's package, and says why above: run this cell again.")
    from svit_utils.colab import prepare
    prepare()  # timm, captum and others where Colab lacks them; never torch or numpy"""
_UPLOADED = """\
        package = max(glob.glob("selectivevit-*.whl"), default=None)  # uploaded beside this notebook
        if package is None:
            raise FileNotFoundError("Upload selectivevit-….whl (folder symbol, left), then run this cell again.")"""


def setup_source(package: str | None) -> str:
    """The source of the first code cell: plain Python, which prints nothing outside Colab.

    Args:
        package: what pip installs on Colab, an address; None for a wheel that the reader uploads beside the notebook.
    """
    return _SETUP.format(package=_UPLOADED if package is None else f'        package = "{package}"')


def stamp_cells(notebook: Any, links: str, setup: str) -> bool:
    """Put the two cells at the head of the notebook, or give those that are there these sources.

    Args:
        links: Markdown of the first cell.
        setup: source of the first code cell.

    Returns:
        Whether anything changed.
    """
    cells = notebook.cells
    before = [(cell.get("id"), cell.cell_type, cell.source) for cell in cells]
    first = _take(cells, LINKS_ID) or new_markdown_cell(id=LINKS_ID)
    code = _take(cells, SETUP_ID) or new_code_cell(id=SETUP_ID)
    first.source, code.source = links, setup
    cells.insert(0, first)
    place = next((index for index, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    cells.insert(place, code)
    return before != [(cell.get("id"), cell.cell_type, cell.source) for cell in cells]


def _take(cells: list[Any], identity: str) -> Any:
    """Take the cell of that id out of the list; None where there is none."""
    for index, cell in enumerate(cells):
        if cell.get("id") == identity:
            return cells.pop(index)
    return None
