"""a3: thresholded attention in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from svit_course.checks.a.shared import cut, draw_qkv, softmax
from svit_course.judging import Mistake, array, compare, untouched
from svit_course.question import Case, Question, Seen


def probe(case: Case, answer: Any) -> Seen:
    """The output, and q, k, v as they are afterwards."""
    q, k, v = draw_qkv(case)
    with np.errstate(all="ignore"):
        out = answer(q, k, v, case["tau"])
    return {"out": out, "q": q, "k": k, "v": v}


def mistakes(case: Case, scores: np.ndarray, v: np.ndarray) -> Iterator[Mistake]:
    """``scores`` [..., N, M] are not scaled yet."""
    tau, scaled = case["tau"], scores / np.sqrt(case["d"])
    p, shifted = softmax(scaled), np.maximum(scaled - tau, 0)
    by_tokens = softmax(scores / np.sqrt(case["n"]))
    yield cut(softmax(scores), tau) @ v, "the scores are not divided by sqrt(d)"
    yield cut(softmax(scores / case["d"]), tau) @ v, "the scores are divided by d, not by sqrt(d)"
    yield cut(by_tokens, tau) @ v, "divided by the root of the number of tokens: d is the last dimension of q"
    yield p @ v, "nothing is cut: this is dense attention"
    yield np.maximum(p - tau, 0) @ v, "not renormalised: divide ReLU(p - tau) by its sum in each row"
    first = "tau is applied to the scores, before the softmax: the cut comes after it, on the probabilities"
    yield softmax(shifted) @ v, first
    yield softmax(scaled - tau) @ v, first + " (and a softmax does not notice a constant)"
    if (scaled > tau).any(-1).all():
        yield softmax(np.where(scaled > tau, scaled, -np.inf)) @ v, first


def judge(case: Case, seen: Seen) -> None:
    """q, k, v are left alone, and the output is that of the formula."""
    q, k, v = draw_qkv(case)
    untouched(seen, q=q, k=k, v=v)
    scores = q @ k.swapaxes(-1, -2)
    expected = cut(softmax(scores / np.sqrt(case["d"])), case["tau"]) @ v
    compare(array(seen, "out", "the output"), expected, "the output", mistakes(case, scores, v))


QUESTION = Question(
    name="a3",
    answers=("attention",),
    cases=(
        {"what": "three queries, five keys", "seed": 3, "n": 3, "m": 5, "d": 4, "dv": 2, "tau": 0.1},
        {"what": "as many keys as queries", "seed": 4, "n": 6, "m": 6, "d": 8, "dv": 8, "tau": 0.05},
        {"what": "two heads", "seed": 5, "lead": [2], "n": 4, "m": 6, "d": 3, "dv": 2, "tau": 0.1},
        {"what": "a query that loses every key", "seed": 6, "n": 3, "m": 5, "d": 4, "dv": 2, "tau": 0.25, "flat": True},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "You have softmax and cut already. What is left is the scores before and one matrix product after.",
        "scores [N, M] = q [N, D] times k transposed [D, M], over the square root of D.",
        "attention = cut(softmax(q @ k.swapaxes(-1, -2) / np.sqrt(d)), tau) @ v, with d = q.shape[-1]. Test it with "
        "other numbers of queries than of keys, and with heads in front.",
    ),
    section="chapter 1, sections 1.1 and 1.2",
)
