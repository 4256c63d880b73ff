"""a1: softmax over the last axis, safe for large scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from svit_course.checks.a.shared import draw_scores, softmax
from svit_course.judging import Mistake, array, compare, untouched
from svit_course.question import Case, Question, Seen, Wrong


def probe(case: Case, answer: Any) -> Seen:
    """The weights, and the scores as they are afterwards."""
    scores = draw_scores(case)
    with np.errstate(all="ignore"):
        result = answer(scores)
    return {"weights": result, "scores": scores}


def mistakes(scores: np.ndarray) -> Iterator[Mistake]:
    """Weights of the scores' shape."""
    yield softmax(scores, axis=None), "the whole array sums to 1; each *row* should: axis=-1"
    if scores.ndim > 1:
        columns = "the columns sum to 1, not the rows: the softmax runs over the last axis, axis=-1"
        yield softmax(scores, axis=0), columns
        yield softmax(scores, axis=1), "the sum runs over axis 1, which is the last one only in a matrix"
    with np.errstate(over="ignore"):
        exponentials = np.exp(scores)
    yield exponentials, "these are exponentials: divide each row by its sum"


def judge(case: Case, seen: Seen) -> None:
    """The scores are left alone, nothing overflows, every row is its softmax."""
    scores = draw_scores(case)
    untouched(seen, scores=scores)
    got = array(seen, "weights", "the result")
    if got.shape == scores.shape and np.isnan(got).any() and not np.isnan(scores).any():
        raise Wrong("NaN: exp() overflows on large scores. Subtract the row's maximum first; the softmax is the same")
    compare(got, softmax(scores), "the result", mistakes(scores))


QUESTION = Question(
    name="a1",
    answers=("softmax",),
    cases=(
        {"what": "one row", "scores": [0.0, 1.0, 2.0, 4.0]},
        {"what": "rows of a matrix", "seed": 1, "shape": [3, 5]},
        {"what": "scores of a thousand", "scores": [[1000.0, 999.0, 0.0], [-1000.0, -1001.0, -1002.0]]},
        {"what": "a stack of matrices", "seed": 2, "shape": [2, 3, 4]},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Each row of weights is positive and sums to 1. Which function makes any number positive?",
        "exp(s_j) divided by the sum of exp(s_k) over the row. NumPy: axis=-1, and keepdims=True so that the sum "
        "lines up with its row.",
        "exp(1000) is infinite. softmax(s) = softmax(s - c) for any c: choose c so that the largest exponent is 0.",
    ),
    section="chapter 1, section 1.1",
)
