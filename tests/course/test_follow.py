"""A later answer is judged with the master's earlier ones where the student's are missing or wrong.

With c1 alone unwritten, perfect c2 and c3 once lost 6 of 14 marks, and c3 was told that it was itself not written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svit_course import masters as m
from svit_course import notebooks
from svit_course.grading import runs
from svit_course.grading.follow import _leans_on, _tell_of
from svit_course.grading.runs import Graded, Judge, Mark
from svit_course.grading.submissions import Submission
from svit_course.question import describe, questions
from svit_course.sandbox.sandbox import Limits
from tests.course.handed_in import sandboxed

STUB = "# YOUR CODE HERE\nraise NotImplementedError()"


def stubbed(source: str) -> str:
    return m.without(source, m.BEGIN_SOLUTION, m.END_SOLUTION, STUB)


def handed_in(folder: Path, letter: str, **answers: str) -> Submission:
    """The solutions of an assignment with other answers in some of its cells; ``"stub"``: as it was handed out."""
    path = m.master(letter)
    notebook = notebooks.read(path)
    for cell in notebook.cells:
        cell.source = m.without(cell.source, m.BEGIN_HIDDEN, m.END_HIDDEN)
        if other := answers.get(cell.get("id")):
            cell.source = stubbed(cell.source) if other == "stub" else other
    notebooks.write(notebook, folder / path.name)
    return Submission("ada", path.stem, folder / path.name)


@pytest.fixture(scope="module")
def judge() -> Any:
    if not sandboxed():
        pytest.skip("no sandbox here: grading is refused, as the guide says")
    with Judge() as judge:
        yield judge


def by_test(graded: Graded) -> dict[str, Mark]:
    return {f"{mark.question} {mark.test}": mark for mark in graded.marks if mark.test != "by hand"}


@pytest.mark.slow
def test_what_builds_on_an_answer_that_is_missing_keeps_its_marks(tmp_path: Path, judge: Judge) -> None:
    marks = by_test(runs.grade(handed_in(tmp_path, "c", c1="stub"), Limits(seconds=60), judge))
    assert {name for name, mark in marks.items() if not mark.marks} == {"c1 visible", "c1 hidden"}
    for name in ("c2 visible", "c2 hidden", "c3 visible", "c3 hidden"):
        assert marks[name].message == "judged with our c1 in place of yours"
    assert marks["c4 visible"].message == ""


def test_only_what_is_wrong_is_replaced(tmp_path: Path, judge: Judge) -> None:
    wrong = "def cut(p, tau):\n    return p"
    marks = by_test(runs.grade(handed_in(tmp_path, "a", a2=wrong), Limits(seconds=60), judge))
    assert {name for name, mark in marks.items() if not mark.marks} == {"a2 visible", "a2 hidden"}
    assert marks["a3 hidden"].message == "judged with our a2 in place of yours"
    # An answer that is wrong itself stays wrong, and one that is not written says so of itself alone.
    answers = {
        "a1": "stub",
        "a2": "stub",
        "a3": "def attention(q, k, v, tau):\n    return cut(softmax(q @ k.T), tau) @ v",
    }
    marks = by_test(runs.grade(handed_in(tmp_path, "a", **answers), Limits(seconds=60), judge))
    assert marks["a1 visible"].message.endswith("softmax is not written yet")
    assert marks["a2 visible"].message.endswith("cut is not written yet")
    assert marks["a3 visible"].marks == 0
    assert "not divided by sqrt(d)" in marks["a3 visible"].message
    assert "our a1 and a2 in place of yours" in marks["a3 visible"].message


def test_nothing_of_our_answer_comes_back(tmp_path: Path, judge: Judge) -> None:
    """Beside the master's answer a submission is not quoted, in no test."""
    dig = "def attention(q, k, v, tau):\n    raise ValueError(repr(cut.__code__.co_names))"
    marks = by_test(runs.grade(handed_in(tmp_path, "a", a2="stub", a3=dig), Limits(seconds=60), judge))
    assert "maximum" not in marks["a3 visible"].message and "maximum" not in marks["a3 hidden"].message


def graded_with(**sources: str) -> Graded:
    return Graded(Submission("ada", m.master("c").stem, Path("none")), sources=sources)


def test_an_answer_leans_on_what_it_names_and_on_what_that_names() -> None:
    c1, c2, c3, _ = questions("c")
    graded = graded_with(c1="", c2="ThresholdedAttention()", c3="with convert(model): pass")
    assert _leans_on(c3, [c1, c2], [c1], graded, {"c1": "class"}) == ["c1"]
    assert _leans_on(c3, [c1, c2], [c1, c2], graded, {"c1": "", "c2": "ThresholdedAttention"}) == ["c1", "c2"]
    assert _leans_on(c3, [c1, c2], [c1, c2], graded, {"c1": "", "c2": ""}) == ["c2"]
    assert _leans_on(c2, [c1], [], graded, {}) == []


def test_a_plot_of_answers_that_do_not_hold_is_said_to_be_theirs() -> None:
    """What builds on them is judged with ours; the figure beside it stays the student's, and nobody was told."""
    asked = questions("c")
    c1, c2, c3, c4 = asked
    sources = {
        "c1": "class ThresholdedAttention: ...",
        "c2": "def convert(m): ThresholdedAttention",
        "c5": "convert(model)",
    }
    for bad, named in (([c1], "your own c1,"), ([c1, c2], "your own c1 and c2,"), ([c3, c4], "")):
        graded = graded_with(**sources)
        _tell_of("c5", graded, asked, bad)
        assert len(graded.notes) == bool(named) and named in "".join(graded.notes)


CELL = """
def convert(model):
    raise NotImplementedError()
class Attention:
    def forward(self):
        raise NotImplementedError()
def cut_for_a_while(model):
    return convert(model)
def other():
    return Attention().forward()
"""


@pytest.mark.parametrize(
    ("called", "sentence"),
    [
        ("cut_for_a_while(0)", "convert, which it needs, is not written yet"),
        ("other()", "Attention, which it needs, is not written yet"),
    ],
)
def test_the_message_names_what_is_not_written(called: str, sentence: str) -> None:
    scope = {"__name__": "__main__"}
    exec(compile(CELL, "cell", "exec"), scope)
    with pytest.raises(NotImplementedError) as raised:
        exec(called, scope)
    assert describe(raised.value, ("cut_for_a_while", "other")) == sentence
    own = sentence.split(",")[0]
    assert describe(raised.value, (own,)) == f"{own} is not written yet"
