"""What a hidden test says: the case in words and the likely cause, and nothing that the submission has chosen."""

from __future__ import annotations

import pytest

from svit_course import Wrong, question
from svit_course import masters as m
from svit_course.grading.judge import ours
from svit_course.question import ask, decide
from tests.course.test_bank import answered


def said(name: str, code: str, what: str) -> str:
    """The message of a hidden case, as a student reads it."""
    asked, scope = question(name), answered(name, code)
    cell = next(c for c in m.read_cells(m.master(name[0])) if c.id == f"{name}-hidden")
    case = next(case for case in m.hidden_cases(cell) if what in case["what"])
    seen = ask(asked, [scope[answer] for answer in asked.answers], case)
    with pytest.raises(Wrong) as wrong:
        decide(asked, case, seen)
    return ours(str(wrong.value), seen, name)


def edited(name: str, old: str, new: str) -> str:
    (cell,) = [c for c in m.read_cells(m.master(name[0])) if c.id == name]
    assert old in cell.source
    return cell.source.replace(old, new)


def causal(shift: int) -> str:
    """c1's solution whose triangle is off by ``shift``."""
    (cell,) = [c for c in m.read_cells(m.master("c")) if c.id == "c1"]
    assert cell.source.count(".tril()") == 1
    return cell.source.replace(".tril()", f".tril({shift})")


def test_a_triangle_off_by_one_is_named() -> None:
    """Once: "the output is … at […] and should be …"."""
    assert "itself" in said("c1", causal(-1), "is_causal")
    assert "one diagonal too wide" in said("c1", causal(1), "is_causal")


def test_a_grid_taken_for_a_square_is_named() -> None:
    code = edited("c4", "model.patch_embed.grid_size", "(int((row.shape[-1] - model.num_prefix_tokens) ** 0.5), -1)")
    message = said("c4", code, "four registers on a tall grid")
    assert message.startswith("c4, four registers on a tall grid: ") and (
        "written into the code" in message or "square" in message
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "c1, a case: the output is 0.5 at [0, 1] and should be 0.25",
            "the output is not what it should be on this input",
        ),
        ("c1, a case: the map is 1e-05 and should be 2", "the map is not what it should be on this input"),
        ("c1, a case: the map has shape (2, 3, 4, 4), expected (2, 3, 2, 8)", "the map has another shape"),
        ("c1, a case: the map has shape (), expected (2, 3)", "the map has another shape"),
    ],
)
def test_a_comparison_without_its_numbers_still_says_something(text: str, sentence: str) -> None:
    message = ours(text, {}, "c1")
    assert message.startswith("c1, a case: ") and sentence in message
    assert not [c for c in message.removeprefix("c1") if c.isdigit()]
