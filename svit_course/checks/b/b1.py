"""b1: the gradients of the probabilities and of the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from svit_course.checks.b.shared import TOY, Given, draw_rows, formula, library, softmax
from svit_course.judging import Mistake, array, close, compare, untouched
from svit_course.question import Case, Question, Seen, Wrong


def inputs(case: Case) -> tuple[np.ndarray, Given]:
    """p [..., N, M], and what it comes from."""
    given = draw_rows(case)
    return np.array(case["p"], dtype=np.float64) if "p" in case else softmax(given[0]), given


def probe(case: Case, grad_p_and_v: Any) -> Seen:
    """g and dv, and the inputs as they are afterwards."""
    p, (_, v, tau, d_out) = inputs(case)
    with np.errstate(all="ignore"):
        result = grad_p_and_v(p, v, tau, d_out)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Wrong("it should return two arrays: `return g, dv`")
    return {"g": result[0], "dv": result[1], "p": p, "v": v, "d_out": d_out}


def g_mistakes(given: Given) -> Iterator[Mistake]:
    """Gradients of the shape of p, [..., N, M]."""
    _, v, _, d_out = given
    right, constant = formula(given), formula(given, constant_sum=True)["dp"]
    g, z = right["dp"], right["z"]
    yield constant, "D is missing from g: raising p_j also raises Z, which divides every weight of the row"
    yield g * z, "g is not divided by Z, the row's sum of ReLU(p - tau)"
    yield constant * z, "g is dO.v_j on the survivors: subtract D = dO.o, and divide by Z"
    every = formula(given, every_key=True)["dp"]
    yield every, "cut keys have a g: below tau the ReLU is flat, so g is 0 there (the factor 1_J)"
    along = d_out @ v.swapaxes(-1, -2)
    yield along, "this is dO.v_j, the gradient of the weights A: go back through the division by Z and the ReLU"
    yield library(given)["ds"], "this is the gradient of the scores; g stops before the softmax, at p"
    yield -g, "g has the wrong sign"


def dv_mistakes(given: Given) -> Iterator[Mistake]:
    """Gradients of the shape of v, [..., M, Dv], or what is returned in their place."""
    d_out, right = given[3], formula(given)
    plain = right["p"].swapaxes(-1, -2) @ d_out
    yield plain, "dv uses the softmax p: the output is A v, so the weights after the cut count"
    yield right["r"].swapaxes(-1, -2) @ d_out, "dv uses ReLU(p - tau), not renormalised: divide by Z"
    yield library(given)["dv"].swapaxes(-1, -2), "dv is transposed: it has the shape of v"


def judge(case: Case, seen: Seen) -> None:
    """The inputs are left alone, the order is g, dv, an empty row gives no NaN, both are autograd's."""
    p, given = inputs(case)
    untouched(seen, p=p, v=given[1], d_out=given[3])
    got_g, got_dv = array(seen, "g", "the first result, g,"), array(seen, "dv", "the second result, dv,")
    right, dv = formula(given), library(given)["dv"]
    if close(got_g, dv) and not close(right["dp"], dv):
        raise Wrong("the results are in the wrong order: g first, then dv")
    for got, name in ((got_g, "g"), (got_dv, "dv")):
        if right["empty"].any() and np.isnan(got.astype(float)).any():
            raise Wrong(f"NaN in {name}: a row without survivors has Z = 0, and here it gets zeros. Guard the division")
    compare(got_g, right["dp"], "g", g_mistakes(given))
    compare(got_dv, dv, "dv", dv_mistakes(given))


QUESTION = Question(
    name="b1",
    answers=("grad_p_and_v",),
    cases=(
        TOY,
        {"what": "four queries, six keys", "seed": 1, "n": 4, "m": 6, "dv": 3, "tau": 0.1},
        {"what": "two heads", "seed": 2, "lead": [2], "n": 3, "m": 5, "dv": 2, "tau": 0.1},
        {"what": "a query that loses every key", "seed": 3, "n": 4, "m": 6, "dv": 3, "tau": 0.22, "flat": 1},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Run the forward pass first: the survivors, r, Z, the weights A and the output o. Then go back through it.",
        "dO.v_j for all queries and keys at once is one matrix product, [N, M]. D = dO.o is one number for each query.",
        "g = (p > tau) * (dO.v_j - D) / Z with D and Z of shape [..., N, 1], and dv = A transposed, times dO. Replace "
        "Z = 0 by 1 before you divide.",
    ),
    section="chapter 1, section 1.7",
)
