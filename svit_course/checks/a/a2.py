"""a2: cut the probabilities at tau and renormalise what is left of each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from svit_course.checks.a.shared import cut, draw_scores, softmax
from svit_course.judging import Mistake, array, compare, no_nan, not_renormalised, untouched
from svit_course.question import Case, Question, Seen

EXACT = "divide by the sum itself, and only where it is 0 by something else"


def inputs(case: Case) -> np.ndarray:
    """Probabilities [..., N, M]: written out in the case, or the softmax of its scores."""
    return np.array(case["p"], dtype=np.float64) if "p" in case else softmax(draw_scores(case))


def prepare(case: Case) -> Case:
    """The softmax is the answer to a1."""
    return {**case, "p": inputs(case)}


def probe(case: Case, answer: Any) -> Seen:
    """The weights, and p as it is afterwards."""
    p = np.array(case["p"], dtype=np.float64)
    with np.errstate(all="ignore"):
        result = answer(p, case["tau"])
    return {"weights": result, "p": p}


def mistakes(p: np.ndarray, tau: float) -> Iterator[Mistake]:
    """Weights of p's shape, or what is returned in their place."""
    r, hard = np.maximum(p - tau, 0), np.where(p > tau, p, 0)
    with np.errstate(all="ignore"):
        by_column = np.nan_to_num(r / r.sum(axis=0, keepdims=True))
        whole = np.nan_to_num(r / r.sum())
        hard_weights = np.nan_to_num(hard / hard.sum(axis=-1, keepdims=True))
    subtract = "survivors keep their whole p: the formula subtracts tau, ReLU(p - tau), it does not only ask p > tau"
    yield r, not_renormalised(r)
    z = r.sum(axis=-1, keepdims=True)
    for small in (
        1e-3,
        1e-4,
        1e-5,
        1e-6,
        1e-7,
    ):  # 1e-8 is below what float32 can tell, in a row such as the visible one
        total = float((r / (z + small)).sum(axis=-1).max())
        yield r / (z + small), f"{small:g} is added to the row's sum, so that a row sums to {total:.6g}: {EXACT}"
    yield hard_weights, subtract
    yield hard, subtract + ", and then divides by the row's sum"
    yield by_column, "divided by the sums of the columns: each *row* sums to 1, axis=-1 with keepdims=True"
    yield whole, "divided by the sum of the whole array: each row has its own sum, axis=-1 with keepdims=True"
    survives = (r > 0).any(axis=-1, keepdims=True)
    yield np.where(survives, cut(p, tau), p), "an empty row keeps its softmax; zeros are asked for"


def judge(case: Case, seen: Seen) -> None:
    """p is left alone, an empty row gives zeros, every row is cut and renormalised."""
    p, tau = inputs(case), case["tau"]
    untouched(seen, p=p)
    got = array(seen, "weights", "the result")
    no_nan(got, p, "NaN in a row that loses every key: 0/0. Such a row should get zeros")
    compare(got, cut(p, tau), "the result", mistakes(p, tau))


QUESTION = Question(
    name="a2",
    answers=("cut",),
    cases=(
        {"what": "a row by hand", "p": [[0.5, 0.25, 0.15, 0.1]], "tau": 0.2},
        {"what": "rows of a matrix", "seed": 2, "shape": [4, 6], "std": 2.0, "tau": 0.1},
        {"what": "a row that loses every key", "p": [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]], "tau": 0.3},
        {"what": "a row of which little is left", "p": [[0.21, 0.2, 0.2, 0.2, 0.19]], "tau": 0.2},
        {"what": "a stack of matrices", "seed": 3, "shape": [2, 3, 4], "tau": 0.2},
    ),
    prepare=prepare,
    probe=probe,
    judge=judge,
    hints=(
        "Three steps: subtract, clip at zero, divide by what is left in the row.",
        "np.maximum(p - tau, 0) is ReLU. Its sum over axis=-1, with keepdims=True, is Z.",
        "A row that loses every key has Z = 0. Divide where Z > 0 and leave zeros elsewhere: np.divide(..., where=...) "
        "with out=, or divide by Z with its zeros replaced by ones.",
    ),
    section="chapter 1, sections 1.2 and 1.5",
)
