"""The pages of the chapters are short: what a reader meets is counted, and may only become less.

``LIMITS`` holds the highest number allowed for each chapter (``python -m tools.pages`` prints today's). Whoever
rewrites a chapter lowers its row.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
import pytest

from svit_course import notebooks
from svit_utils.files import read_rows
from tools import pages
from tools.pages import Counts

# teaching cells over 15 lines, checks over 8, constant prints, exercises without an answer, code lines over 88, words
LIMITS = {
    "01_attention_theory": Counts(0, 0, 0, 0, 0, 3248),
    "02_implementing_sparse_attention": Counts(0, 0, 0, 0, 0, 2674),
    "03_fine_tuning": Counts(0, 0, 0, 0, 0, 2603),
    "04_baseline_comparison": Counts(0, 0, 0, 0, 0, 3216),
    "05_interpretability": Counts(0, 0, 0, 0, 0, 3054),
    "06_what_it_costs": Counts(0, 0, 0, 0, 0, 1882),
    "07_thresholds_that_earn_their_place": Counts(0, 0, 0, 0, 0, 2180),
    "08_the_referee": Counts(0, 0, 0, 0, 0, 2991),
    "09_the_study": Counts(0, 0, 0, 0, 0, 2660),
    "10_a_verdict_on_the_card": Counts(0, 0, 0, 0, 0, 2590),
    "11_photographs": Counts(0, 0, 0, 0, 0, 2524),
}
FAST_READER = 200  # words a minute, of a text with formulas

FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}


@pytest.fixture(params=notebooks.chapters(), ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> Any:
    return notebooks.read(path)


def test_no_more_than_allowed(path: Path, notebook: Any) -> None:
    found, allowed = asdict(pages.count(notebook)), asdict(LIMITS[path.stem])
    over = {name: f"{found[name]}, allowed {allowed[name]}" for name in found if found[name] > allowed[name]}
    assert over == {}


def test_minutes_are_stated_and_true(path: Path, notebook: Any) -> None:
    stated = pages.stated_minutes(notebook)
    assert stated is not None, "say it as '25 minutes of reading, 1 minute of running'"
    reading, running = stated
    assert reading >= pages.words(notebook) / FAST_READER
    recorded = {row["chapter"]: row["minutes"] for row in read_rows(notebooks.ROOT / "results" / "walkthrough.csv")}
    assert running >= math.floor(float(recorded[path.stem]))


def test_a_folded_cell_is_folded_everywhere(notebook: Any) -> None:
    """In JupyterLab (source_hidden), in Colab (cellView, and a title that stays to be seen) and in the book (tag)."""
    for number, cell in enumerate(notebooks.code_cells(notebook), start=1):
        if pages.FOLDED & pages.tags(cell):
            assert {name: cell.metadata.get(name) for name in FOLDED} == FOLDED, f"code cell {number}"
            assert cell.source.startswith("# @title "), f"code cell {number}"
        assert not ({"check"} < pages.tags(cell) & ({"check"} | pages.FOLDED)), (
            f"code cell {number}: a check is visible"
        )


def test_glossary_links_lead_somewhere(path: Path, notebook: Any) -> None:
    """A link to ``glossary.md#term`` needs the heading ``### term``."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for page, anchor in re.findall(r"\]\(([\w/.]*glossary\.md)#([^)]*)\)", prose):
        headings = re.findall(r"^#+ (.+?)\s*$", (path.parent / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor


def test_numbered_headings_have_no_gap(path: Path, notebook: Any) -> None:
    """4.5, 4.7: without its heading a section becomes part of the one before, here of an optional one."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = re.findall(r"^## (\d+)\.(\d+)\b", prose, flags=re.MULTILINE)
    assert found == [(str(int(path.stem[:2])), str(place)) for place in range(1, len(found) + 1)] and len(found) > 1


def test_what_a_cell_imports_is_there(notebook: Any) -> None:
    """In functions too, which a run without the data that they are for does not reach."""
    for cell in notebook.cells:
        source = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for node in ast.walk(ast.parse(source)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("svit_utils", "svit_course")):
                module = importlib.import_module(str(node.module))
                lacking = [each.name for each in node.names if not hasattr(module, each.name)]
                for name in lacking:
                    importlib.import_module(f"{node.module}.{name}")


def test_every_chapter_has_a_row() -> None:
    assert sorted(LIMITS) == [path.stem for path in notebooks.chapters()]


def chapter(*cells: Any) -> Any:
    return nbformat.v4.new_notebook(cells=list(cells))


def code(source: str, *tags: str) -> Any:
    folded = FOLDED if pages.FOLDED & set(tags) else {}
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags), **folded})


def prose(source: str) -> Any:
    return nbformat.v4.new_markdown_cell(source)


def test_long_cells() -> None:
    long = "\n".join(f"a{number} = {number}" for number in range(16))
    assert pages.count(chapter(code(long))).long_cells == 1
    assert pages.count(chapter(code(long.replace("a3 = 3", "\n# a remark\n")))).long_cells == 0
    assert pages.count(chapter(code(f"# @title A plot\n{long}", "hide-input"))).long_cells == 0
    checks = pages.count(chapter(code(long, "check"), code("assert 1 + 1 == 2", "check")))
    assert (checks.long_cells, checks.long_checks) == (0, 1)


@pytest.mark.parametrize(
    ("source", "constant"),
    [
        ("print('every row was cut')", 1),
        ("print('yes' if x > 0 else 'no')", 1),
        ("for row in rows:\n    print('same', 'gradients')", 1),
        ("print(f'{1}: ' + 'one')", 1),
        ("print(f'{x:.2f}, allowed 0 to 1')", 0),
        ("print('largest:', x)", 0),
        ("print('tau  kept')\nfor t in (0.1, 0.2):\n    print(t, x)", 0),
        ("print()", 0),
        ("%matplotlib inline\nprint('done')", 1),
        ("%%bash\necho done", 0),
    ],
)
def test_constant_prints(source: str, constant: int) -> None:
    assert pages.constant_prints(source) == constant


def test_exercises_and_their_answers() -> None:
    head = prose("## Try it yourself\n\nHow far did you get?")
    first, second = prose("1. Halve tau."), prose("2. Double it.")
    words = prose("<details><summary>Answer</summary>\n\n1. More survive.\n\n</details>")
    run = code("# @title Answer: halve it\nx = 1", "answer", "hide-cell")
    assert pages.unanswered(chapter(head, first, words, second, run)) == 0
    assert pages.unanswered(chapter(head, first, second, run)) == 1
    assert pages.unanswered(chapter(head, first, code("x = 1"), second)) == 2
    assert pages.unanswered(chapter(head, prose("1. Halve tau.\n2. Double it."), words)) == 1
    assert (
        pages.unanswered(chapter(prose("## Sections\n\n1. What"), head, first, run, prose("## Summary\n\n1. So"))) == 0
    )


def test_words_and_minutes() -> None:
    goals = prose("It takes 25 minutes of reading and 1 minute of running.")
    answer = prose("<details><summary>Answer</summary>\n\nSeven words that are not counted\n\n</details>")
    assert pages.words(chapter(goals, answer)) == 11
    assert pages.stated_minutes(chapter(goals)) == (25, 1)
    assert pages.stated_minutes(chapter(prose("It takes some minutes."))) is None
