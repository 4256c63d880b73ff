"""Stored outputs are worth comparing: nbval passes a cell that was never run, or whose output is ignored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from svit_course import notebooks, stamp
from tools import outputs
from tools.lint_notebooks import problems

CHAPTERS = notebooks.chapters()
FIRST_FIVE = [
    "01_attention_theory",
    "02_implementing_sparse_attention",
    "03_fine_tuning",
    "04_baseline_comparison",
    "05_interpretability",
]
NOT_COMPARED_TAGS = {"nbval-ignore-output", "nbval-skip", "nbval-raises-exception", "raises-exception"}
NOT_COMPARED_COMMENT = re.compile(r"^\s*#+\s*(PYTEST_VALIDATE_IGNORE_OUTPUT|NBVAL_\w+)\s*$", flags=re.MULTILINE)
SECTIONS = ["goals", "try it yourself", "summary", "references"]


def compared_text(cell: Any) -> str:
    """What nbval compares of a cell: its text, not its pictures, widgets or the name of a figure; "" when ignored."""
    if NOT_COMPARED_TAGS & set(cell.metadata.get("tags", [])) or NOT_COMPARED_COMMENT.search(cell.source):
        return ""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        data = output.get("data", {})
        if outputs.WIDGET in data:
            continue
        texts += [str(value) for kind, value in data.items() if kind.startswith("text/")]
    return "".join(text for text in texts if not re.match(r"\s*<(Figure size|IPython\.core\.display)", text)).strip()


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> Any:
    return notebooks.read(path)


def test_the_chapters_are_there() -> None:
    stems = [path.stem for path in CHAPTERS]
    assert [stem for stem in FIRST_FIVE if stem not in stems] == []


def test_run_in_order_and_clean(path: Path) -> None:
    assert list(problems(path)) == []


def test_half_of_the_outputs_are_compared(notebook: Any) -> None:
    with_output = [cell for cell in notebooks.code_cells(notebook) if cell.outputs]
    compared = [cell for cell in with_output if compared_text(cell)]
    assert len(compared) >= 3
    assert len(compared) >= len(with_output) / 2, (
        f"{len(compared)} of {len(with_output)} cells with output are compared"
    )


def test_compared_cells_say_more_than_true(notebook: Any) -> None:
    compared = [text for cell in notebooks.code_cells(notebook) if (text := compared_text(cell))]
    bare = [text for text in compared if set(text.split()) <= {"True", "None", "ok", "OK"}]
    assert len(bare) <= len(compared) / 4, f"{len(bare)} of {len(compared)} compared cells print only True or OK"


def test_no_errors_stderr_or_svg(notebook: Any) -> None:
    for number, cell in enumerate(notebooks.code_cells(notebook), start=1):
        for output in cell.outputs:
            assert output.output_type != "error", f"code cell {number} ends in {output.get('ename')}"
            assert output.get("name") != "stderr", (
                f"code cell {number} writes to stderr: {output.get('text', '')[:200]}"
            )
            assert "image/svg+xml" not in output.get("data", {}), f"code cell {number} shows SVG"


def test_pictures_have_alt_text(notebook: Any) -> None:
    for number, cell in enumerate(notebooks.code_cells(notebook), start=1):
        for kind, alt in outputs.pictures(cell):
            assert len(alt.split()) >= 3, f"the {kind} of code cell {number} has alt text {alt!r}"


def test_a_picture_is_followed_by_a_checked_cell(notebook: Any) -> None:
    cells = notebooks.code_cells(notebook)
    for number, cell in enumerate(cells):
        if any(True for _ in outputs.pictures(cell)):
            # Two pictures may stand together; what they show is asserted in one of the next three cells, or here.
            assert any(compared_text(later) for later in cells[number : number + 4]), f"code cell {number + 1}"


def test_head_and_sections(notebook: Any) -> None:
    first, *_ = notebooks.code_cells(notebook)
    assert notebook.cells[0].get("id") == stamp.LINKS_ID
    assert first.get("id") == stamp.SETUP_ID
    assert len(first.source.splitlines()) < 12
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = [heading.lower() for heading in re.findall(r"^#+\s+(.+?)\s*$", prose, flags=re.MULTILINE)]
    for section in SECTIONS:
        assert any(section in heading for heading in headings), f"no section {section!r} among {headings}"
    assert re.search(r"\bminutes?\b", prose) and re.search(r"\d\s*(MB|GB)\b", prose), (
        "minutes and memory are not stated"
    )


def test_a_headline_for_the_walkthrough(notebook: Any) -> None:
    assert 10 <= len(outputs.headline(notebook)) <= 160
