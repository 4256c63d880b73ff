"""A reader who has one notebook and nobody who grades it; and what feedback makes of formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

from svit_course import ASSIGNMENTS, masters, notebooks
from svit_course.grading import command, feedback, submissions
from tests.course.handed_in import MASTER, sandboxed, submission


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_formulas_of_titles_and_rubrics_can_be_read(assignment: str) -> None:
    title = notebooks.title(notebooks.read(masters.master(assignment)), "")
    lines = [line for name, lines in feedback.rubric().items() if name[0] == assignment for line in lines]
    assert lines
    for line in (title, *lines):
        shown = feedback.formulas(line)
        assert not {"$", "\\", "*", "`"} & set(shown)
    assert feedback.formulas(r"<b> of $N\tau \ge 1$") == "&lt;b&gt; of <i>Nτ ≥ 1</i>"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "of the *same* model, **not** `model.x`",
            "of the <em>same</em> model, <strong>not</strong> <code>model.x</code>",
        ),
        ("2 * 3 * 4 and $a*b$", "2 * 3 * 4 and <i>a*b</i>"),
        (r"$\frac12 \tau$", r"<i>\frac12 τ</i>"),  # a lecturer's own rubric; it once cost every page
        ("*<b>*", "<em>&lt;b&gt;</em>"),
    ],
)
def test_a_rubrics_emphasis_is_set(line: str, shown: str) -> None:
    assert feedback.formulas(line) == shown


def test_one_notebook_is_a_submission_whatever_its_name(tmp_path: Path) -> None:
    """Its cells say which assignment it is; where they do not, its reader is asked."""
    path = submission(tmp_path, "x", name="my_a.ipynb")
    (one,), strange = submissions.find(path)
    assert (one.student, one.assignment, one.path, strange) == ("my_a", MASTER.stem, path, [])
    notebooks.write(notebooks.read(masters.master("e")), path)
    assert submissions.find(path)[0][0].assignment.startswith("e_")
    path.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', encoding="utf-8")
    with pytest.raises(ValueError, match="--assignment a"):
        submissions.find(path)
    assert submissions.find(path, "b")[0][0].assignment.startswith("b_")


@pytest.mark.slow
@pytest.mark.skipif(not sandboxed(), reason="no sandbox here")
def test_a_reader_alone_gets_all_marks_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = submission(tmp_path, "x", name="my_a.ipynb")
    assert command.main([str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "13 of 13 by tests" in said and "a4 hidden: 3 of 3" in said and "a5 by hand" in said
    assert "Assignment a" in (tmp_path / "out" / "feedback" / "my_a" / f"{MASTER.stem}.html").read_text(
        encoding="utf-8"
    )
