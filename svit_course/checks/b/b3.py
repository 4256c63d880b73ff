"""b3: the gradient of a threshold for each head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from svit_course.checks.b.shared import FLATTER, Given, compare_tau, library, softmax
from svit_course.judging import array, untouched
from svit_course.question import Case, Question, Seen


def inputs(case: Case) -> Given:
    """scores [B, H, N, M], v [B, H, M, Dv], tau [H], d_out [B, H, N, Dv].

    ``flat``: so many of the last head's first queries lose every key.
    """
    rng, tau = np.random.default_rng(case["seed"]), np.array(case["tau"])
    lead, n, m, dv = (case["b"], len(tau)), case["n"], case["m"], case["dv"]
    scores = case.get("std", 1.5) * rng.standard_normal((*lead, n, m))
    scores[:, -1, : case.get("flat", 0)] *= FLATTER
    return scores, rng.standard_normal((*lead, m, dv)), tau, rng.standard_normal((*lead, n, dv))


def probe(case: Case, grad_tau: Any) -> Seen:
    """The gradient of tau, and the inputs as they are afterwards."""
    scores, v, tau, d_out = map(torch.tensor, inputs(case))
    p = scores.softmax(dim=-1)
    return {"dtau": grad_tau(p, v, tau, d_out), "p": p, "v": v, "tau": tau, "d_out": d_out}


def judge(case: Case, seen: Seen) -> None:
    """The inputs are left alone, and the gradient is autograd's, empty rows falling back to their softmax."""
    given = scores, v, tau, d_out = inputs(case)
    untouched(seen, p=softmax(scores), v=v, tau=tau, d_out=d_out)
    compare_tau(array(seen, "dtau", "the result"), library(given, "dense")["dtau"], "dtau", given)


QUESTION = Question(
    name="b3",
    answers=("grad_tau",),
    cases=(
        {"what": "one image, two heads", "seed": 3, "b": 1, "n": 4, "m": 6, "dv": 3, "tau": [0.1, 0.05]},
        {"what": "one head with empty rows", "seed": 4, "b": 1, "n": 5, "m": 6, "dv": 3, "tau": [0.1, 0.2], "flat": 2},
        {
            "what": "two images, as many heads as keys",
            "seed": 7,
            "b": 2,
            "n": 3,
            "m": 4,
            "dv": 2,
            "tau": [0.02, 0.05, 0.1, 0.2],
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "In one row, what does a slightly larger tau do to each r_j, and to Z? It is the same for all survivors.",
        "So a row gives -G, with G the sum of its g_j, or (dO.u - k D) / Z with k the number of survivors. tau of a "
        "head is shared by all rows of that head, in all images.",
        "tau[:, None, None] lines [H] up with [B, H, N, M]. Find the empty rows by (p > tau) before any fallback, make "
        "their G zero, and sum G [B, H, N] over dim=(0, 2), with a minus sign.",
    ),
    section="chapter 2, section 2.9, and chapter 1, section 1.7",
)
