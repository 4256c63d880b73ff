"""b2: the gradient of the scores, back through the softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from svit_course.checks.b.shared import TOY, draw_rows, formula, library, softmax
from svit_course.judging import Mistake, array, compare, untouched
from svit_course.question import Case, Question, Seen


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, its gradient g, and the gradient of the scores that is expected: all [..., N, M]."""
    given = draw_rows(case)
    p = np.array(case["p"], dtype=np.float64) if "p" in case else softmax(given[0])
    return p, formula(given)["dp"], library(given)["ds"]


def prepare(case: Case) -> Case:
    """g is the answer to b1."""
    p, g, _ = inputs(case)
    return {**case, "p": p, "g": g}


def probe(case: Case, grad_scores: Any) -> Seen:
    """The gradient of the scores, and p and g as they are afterwards."""
    p, g = np.array(case["p"], dtype=np.float64), np.array(case["g"])
    with np.errstate(all="ignore"):
        return {"ds": grad_scores(p, g, case["tau"]), "p": p, "g": g}


def mistakes(p: np.ndarray, g: np.ndarray, tau: float, expected: np.ndarray) -> Iterator[Mistake]:
    """Gradients of the shape of the scores, [..., N, M]."""
    inner = g - expected / p  # what the softmax subtracts in each row
    yield (
        np.where(p > tau, expected, 0),
        "cut keys get zero here. They have no weight, but their score is in the softmax's denominator: raising "
        "it lowers every p of the row. They get -tau G p_j",
    )
    yield g, "this is g itself: the softmax's Jacobian is missing. Each score moves every p of its row"
    yield p * g, "this is p * g, half of the softmax's Jacobian: subtract the row's part, tau G, from g first"
    yield p * (g - inner / tau), "G is subtracted without its factor tau"
    yield p * (g + inner), "tau G is added: it is subtracted from g"
    yield expected / p, "the factor p_j in front is missing"
    yield -expected, "the sign is wrong: dS = p * (g - tau G)"
    whole = "the sum runs over the whole array: each row has its own G, axis=-1 with keepdims"
    yield p * (g - (p * g).sum()), whole
    yield p * (g - tau * g.sum()), whole
    mean = g.mean(axis=-1, keepdims=True)
    yield p * (g - tau * mean), "G is the *sum* of g over the row's keys, and this is their mean"


def judge(case: Case, seen: Seen) -> None:
    """p and g are left alone, and the gradient is autograd's."""
    p, g, expected = inputs(case)
    untouched(seen, p=p, g=g)
    compare(array(seen, "ds", "the result"), expected, "the result", mistakes(p, g, case["tau"], expected))


QUESTION = Question(
    name="b2",
    answers=("grad_scores",),
    cases=(
        TOY,
        {"what": "five queries, seven keys", "seed": 2, "n": 5, "m": 7, "dv": 4, "tau": 0.1},
        {"what": "two heads", "seed": 5, "lead": [2], "n": 3, "m": 5, "dv": 2, "tau": 0.1},
        {"what": "a query that loses every key", "seed": 6, "n": 4, "m": 6, "dv": 3, "tau": 0.22, "flat": 1},
    ),
    prepare=prepare,
    probe=probe,
    judge=judge,
    hints=(
        "One score moves every probability of its row: dp_i/ds_j = p_i (1[i = j] - p_j). Sum over i.",
        "That gives p_j (g_j - sum_i p_i g_i). The sum runs over the row. Does a key with g_j = 0 get zero?",
        "The row's sum of p * g is tau G, with G the row's sum of g. Both forms are right: p * (g - tau * G), with G "
        "of shape [..., N, 1].",
    ),
    section="chapter 1, section 1.7",
)
