"""The book builds without a warning, every link in it leads somewhere, and it asks nothing of another host."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from research.__main__ import parser as research_parser
from svit_course import notebooks
from svit_utils.__main__ import COMMANDS

pytest.importorskip("sphinx_book_theme")
pytest.importorskip("myst_nb")

from tools import book, book_pages

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Page(HTMLParser):
    """What a page loads, where its links lead, the places in it that a link can name, and pictures without words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = {"", "top"}
        self.mute: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for name, value in attrs if name == "id" and value}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag == "link" and given.get("rel") not in ("search", "index", "next", "prev", "canonical", "author"):
            self.loads.append(str(given.get("href")))
        elif given.get("src"):
            self.loads.append(str(given["src"]))
        if tag == "img" and not given.get("alt"):
            self.mute.append(str(given.get("src")))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}


def test_every_chapter_assignment_and_command_has_a_page(site: Path) -> None:
    for path in notebooks.NOTEBOOKS.rglob("*.ipynb"):
        assert (site / path.relative_to(notebooks.ROOT)).with_suffix(".html").is_file()
    assert {title.split()[-1] for title in book_pages.COMMANDS if "svit_utils" in title} == set(COMMANDS)
    research = next(action.choices for action in research_parser()._actions if action.choices)
    assert {title.split()[-1] for title in book_pages.COMMANDS if "research" in title} == set(research)
    assert len(list((site / "commands").glob("*.html"))) == len(book_pages.COMMANDS)
    text = (site / "commands" / "svit_utils_train.html").read_text(encoding="utf-8")
    assert "--tau-warmup" in text and "--empty-rows" in text
    assert 'id="svit_utils.attention.sparsify"' in (site / "reference" / "attention.html").read_text(encoding="utf-8")


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    lost = []
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme:
                assert address.scheme in ("https", "mailto"), f"{path}: {link}"
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.is_file() or (target in pages and unquote(address.fragment) not in pages[target].places):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert lost == []


def test_pages_load_nothing_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for address in page.loads:
            if not address.startswith("data:"):
                assert not urlsplit(address).scheme and not address.startswith("//"), f"{path}: {address}"
                assert (path.parent / unquote(urlsplit(address).path)).resolve().is_file(), f"{path}: {address}"
    assert (site / "_static" / "mathjax" / "tex-chtml.js").is_file()
    for sheet in (site / "_static").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_picture_has_words(pages: dict[Path, Page]) -> None:
    assert {path.name: page.mute for path, page in pages.items() if page.mute} == {}


def test_assignments_hold_no_solution(site: Path) -> None:
    for path in (site / "notebooks" / "assignments").glob("?_*.html"):
        text = path.read_text(encoding="utf-8")
        assert "YOUR CODE HERE" in text and "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text
    # Nor what the download button or the search hands out.
    for path in [*(site / "_sources").rglob("*"), site / "searchindex.js"]:
        assert not path.is_file() or b"BEGIN SOLUTION" not in path.read_bytes()


def test_citations() -> None:
    linked = "*KVT*, [2106.00515](https://arxiv.org/abs/2106.00515). And [arXiv 1706.03762](https://arxiv.org/abs/1706.03762)."
    assert book_pages.cited(linked) == "*KVT*, {cite}`2106.00515`. And {cite}`1706.03762`."
    assert book_pages.cited("arXiv:0712.1111, (1602.02068)") == "{cite}`0712.1111`, ({cite}`1602.02068`)"
    untouched = "0.1234, 3407.12 and [the site](https://arxiv.org/abs/1706.03762)"
    assert book_pages.cited(untouched) == untouched


def test_a_folded_cell_keeps_its_title_and_a_picture_its_words() -> None:
    picture = new_output(
        "display_data", {"image/png": PIXEL, "text/plain": "x"}, metadata={"image/png": {"alt": "A pixel, black"}}
    )
    widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Box()"})
    cell = new_code_cell("# @title Answer: the row\nprint(1)", outputs=[picture, widget])
    shown = nbformat.reads(book_pages.as_page(new_notebook(cells=[cell]), master=False), as_version=4).cells[0]
    assert shown.source == "print(1)"
    assert shown.metadata.mystnb.code_prompt_show == "Answer: the row"
    assert shown.metadata.mystnb.image.alt == "A pixel, black"
    assert "JupyterLab" in shown.outputs[1].data["text/html"] and len(shown.outputs[1].data) == 2
    assert cell.source.startswith("# @title"), "the notebook itself stays as it is"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one chapter, and a book without the pages of library and commands."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("# Book\n", encoding="utf-8")
    cells = [new_markdown_cell("# One"), new_code_cell("print(1)")]
    notebook = new_notebook(cells=cells, metadata=notebooks.KERNEL)
    nbformat.write(notebook, tmp_path / "notebooks" / "01_one.ipynb")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(book_pages, "MODULES", ())
    monkeypatch.setattr(book_pages, "COMMANDS", {})
    return tmp_path


def test_launch_buttons_lead_to_the_repository(small: Path) -> None:
    book.build(small / "out", strict=False, repository="owner/name")
    text = (small / "out" / "notebooks" / "01_one.html").read_text(encoding="utf-8")
    assert "https://colab.research.google.com/github/owner/name/blob/main/notebooks/01_one.ipynb" in text
    assert "https://mybinder.org/v2/gh/owner/name/main?urlpath=lab/tree/notebooks/01_one.ipynb" in text


def test_a_warning_ends_a_strict_build_with_its_words(small: Path) -> None:
    (small / "README.md").write_text("# Book\n\n[nowhere](nowhere.md)\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"nowhere\.md"):
        book.build(small / "out")


def test_a_table_that_a_cell_shows_is_one_and_pages_of_renamed_chapters_go(small: Path) -> None:
    path = small / "notebooks" / "01_one.ipynb"
    notebook = notebooks.read(path)
    shown = {"text/markdown": "| claim | verdict |\n| --- | --- |\n| tidy | open |", "text/plain": "a table"}
    notebook.cells[1].outputs = [new_output("display_data", data=shown)]
    nbformat.write(notebook, path)
    book.build(small / "out", strict=False)
    page = small / "out" / "notebooks" / "01_one.html"
    assert re.search(r"<td>\s*(<p>)?tidy", page.read_text(encoding="utf-8"))
    path.rename(path.with_name("02_one.ipynb"))
    book.build(small / "out", strict=False)
    assert not page.exists() and page.with_name("02_one.html").is_file()
