"""The walkthrough measures, reports failures, and ends with the book of its run."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from svit_course import notebooks, stamp

pytest.importorskip("nbclient")
pytest.importorskip("myst_nb")

from tools import book_pages, walkthrough

DRAW = """\
import base64
from IPython.display import display
png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
data = {"image/png": base64.b64decode(png), "text/plain": "a pixel"}
display(data, raw=True, metadata={"image/png": {"alt": 'A "quoted" pixel & <more>'}})"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """A small book of two chapters, the second of which fails, walked through once."""
    root = tmp_path_factory.mktemp("book")
    (root / "notebooks").mkdir()
    good = [
        new_markdown_cell("[Open in Colab](https://example.org)", id=stamp.LINKS_ID),
        new_markdown_cell("# First, with $\\tau$\n\n$$R = p - \\tau$$"),
        new_code_cell(DRAW),
        new_code_cell("block = bytearray(300 * 1024 * 1024)\nimport time; time.sleep(0.5); del block"),
        new_code_cell("print('seven  is\\nprime')", metadata={"tags": ["headline"]}),
    ]
    bad = [new_markdown_cell("# Second"), new_code_cell("1 / 0"), new_code_cell("print('not reached')")]
    nbformat.write(new_notebook(cells=good), root / "notebooks" / "01_good.ipynb")
    nbformat.write(new_notebook(cells=bad), root / "notebooks" / "02_bad.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "NOTEBOOKS", root / "notebooks")
        patch.setattr(notebooks, "ROOT", root)
        patch.setattr(book_pages, "MODULES", ())
        patch.setattr(book_pages, "COMMANDS", {})
        patch.setattr(walkthrough, "BUILD", root / "build")
        patch.setattr(walkthrough, "RESULT", root / "results" / "walkthrough.csv")
        status = walkthrough.main([])
        shutil.copytree(root / "build", root / "first")
        first = walkthrough.main(["01"])
    return root, status, first


def test_status_and_measurements(world) -> None:
    import json

    root, status, first = world
    assert (status, first) == (1, 0)
    summary = json.loads((root / "build" / "summary.json").read_text())
    [chapter] = summary["chapters"]  # of the second walk, through chapter 1 only
    assert chapter["headline"] == "seven is prime"
    assert chapter["title"] == "First, with $\\tau$"
    assert 300 < chapter["peak_memory_mb"] < 1500
    assert 0.5 / 60 < chapter["minutes"] < 2
    assert not (root / "results" / "walkthrough.csv").exists()  # neither a failed nor a partial walk is a result


def test_the_failed_chapter_has_a_page_too(world) -> None:
    root, *_ = world
    assert "division by zero" in (root / "first" / "notebooks" / "02_bad.html").read_text(encoding="utf-8")


def test_the_page_about_the_run_has_a_row_for_each_chapter(world) -> None:
    root, *_ = world
    both, one = ((root / name / "run.html").read_text(encoding="utf-8") for name in ("first", "build"))
    assert "seven is prime" in both and "seven is prime" in one
    assert ("<strong>failed</strong>" in both, "<strong>failed</strong>" in one) == (True, False)
    assert 'href="notebooks/01_good.html"' in one and "make walkthrough" in one


def test_the_chapter_is_that_of_the_run_and_keeps_alt_text(world) -> None:
    root, *_ = world
    page = (root / "build" / "notebooks" / "01_good.html").read_text(encoding="utf-8")
    assert "is\nprime" in page
    assert 'alt="A &quot;quoted&quot; pixel &amp; &lt;more&gt;"' in page
    assert "Open in Colab" not in page
    assert (root / "build" / "_static" / "mathjax" / "tex-chtml.js").is_file()


def test_notebooks_stay_as_they_are(world) -> None:
    root, *_ = world
    notebook = notebooks.read(root / "notebooks" / "01_good.ipynb")
    assert all(cell.execution_count is None and not cell.outputs for cell in notebooks.code_cells(notebook))


def test_a_complete_walk_is_recorded_with_its_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import csv

    monkeypatch.setattr(walkthrough, "RESULT", tmp_path / "results" / "walkthrough.csv")
    outcome = walkthrough.Outcome("01_x", "X", 1.234, 567, "it, works")
    walkthrough.write_results([outcome], walkthrough.provenance())
    with (tmp_path / "results" / "walkthrough.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["chapter"], row["minutes"], row["peak_memory_mb"], row["headline"]) == (
        "01_x",
        "1.23",
        "567",
        "it, works",
    )
    assert {"command", "python", "torch", "timm", "commit", "date", "threads"} <= set(row)
