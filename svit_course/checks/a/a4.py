"""a4: thresholded attention in torch, for any leading dimensions, with gradients and a fallback for empty rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svit_course.checks.a.shared import draw_qkv, softmax
from svit_course.judging import Mistake, array, close, compare, no_nan
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention.formula import thresholded_softmax

GRADIENTS = {"dq": "q", "dk": "k", "dv": "v"}


def inputs(case: Case) -> list[Tensor]:
    """q, k, v of the case as float64 tensors that require gradients."""
    return [torch.from_numpy(x).requires_grad_() for x in draw_qkv(case)]


def upstream(out: Tensor) -> Tensor:
    """The gradient that arrives at the output: different in every place."""
    return torch.linspace(-1, 1, out.numel()).view_as(out)


def expected(case: Case, empty_rows: str = "dense") -> dict[str, np.ndarray]:
    """Output, weights and gradients of the library's operator."""
    q, k, v = inputs(case)
    weights = thresholded_softmax(q @ k.transpose(-1, -2) / case["d"] ** 0.5, case["tau"], empty_rows=empty_rows)
    out = weights @ v
    gradients = torch.autograd.grad((out * upstream(out)).sum(), (q, k, v))
    named = {"out": out, "weights": weights, **dict(zip(GRADIENTS, gradients, strict=True))}
    return {key: value.detach().numpy() for key, value in named.items()}


def probe(case: Case, answer: Any) -> Seen:
    """Output, weights, which inputs were changed, and the gradients of q, k, v; None where none comes."""
    q, k, v = inputs(case)
    before = [x.detach().clone() for x in (q, k, v)]
    result = answer(q, k, v, case["tau"])
    if not isinstance(result, tuple) or len(result) != 2:
        raise Wrong("it should return two tensors, the output and the weights: `return out, weights`")
    out, weights = result
    changed = [name for name, was, now in zip("qkv", before, (q, k, v)) if not torch.equal(was, now.detach())]
    seen: Seen = {"out": out, "weights": weights, "changed": changed}
    if isinstance(out, Tensor):
        if not out.requires_grad:
            raise Wrong("no gradient comes through. Is there a detach(), a .data, a no_grad or NumPy on the way?")
        gradients = torch.autograd.grad((out * upstream(out)).sum(), (q, k, v), allow_unused=True)
        seen.update(zip(GRADIENTS, gradients))
    return seen


def mistakes(case: Case, p: np.ndarray) -> Iterator[Mistake]:
    """Of the weights [..., N, M]."""
    r = np.maximum(p - case["tau"], 0)
    yield r, f"your rows sum to {float(r.sum(-1).max()):.2f}: did you renormalise after the cut?"
    zero = "a row that loses every key gets zeros: here it should keep its plain softmax"
    yield expected(case, "zero")["weights"], zero
    if not (r.sum(-1) > 0).all():
        yield p, "because one row is empty every row falls back: decide for each row, with torch.where"


def judge(case: Case, seen: Seen) -> None:
    """Weights first, then the output, then the gradients: a mistake in one shows in those after it."""
    if seen["changed"]:
        raise Wrong(f"it changed its input {', '.join(seen['changed'])} in place: the caller still needs it")
    right = expected(case)
    q, k, _ = draw_qkv(case)
    p = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(case["d"]))
    weights, out = array(seen, "weights", "the second result, weights,"), array(seen, "out", "the first result, out,")
    no_nan(weights, p, "NaN in the weights of a row that loses every key: 0/0. Such a row gets its plain softmax back")
    compare(weights, right["weights"], "weights", mistakes(case, p))
    compare(out, right["out"], "out", [(weights, "the results are in the wrong order: out first, then weights")])
    for key, letter in GRADIENTS.items():
        judge_gradient(seen, key, letter, right[key])


def judge_gradient(seen: Seen, key: str, letter: str, right: np.ndarray) -> None:
    """The gradient ``key`` of q, k or v, ``letter``, against the ``right`` one."""
    if seen.get(key) is None:
        raise Wrong(f"the output does not depend on {letter}, as far as autograd can see: is there a detach()?")
    got = array(seen, key, f"the gradient of {letter}")
    if np.isnan(got).any():
        raise Wrong(
            f"the gradient of {letter} is NaN though the output is right: torch.where chooses the value, and still "
            "differentiates 0/0 on the other side. Replace Z = 0 by 1 *before* dividing"
        )
    if not close(got, right) and letter != "v":
        raise Wrong(
            f"the output is right and the gradient of {letter} is not (largest difference "
            f"{np.abs(got - right).max():.3g}): is part of the formula detached, or computed in no_grad?"
        )
    compare(got, right, f"the gradient of {letter}")


QUESTION = Question(
    name="a4",
    answers=("attention_torch",),
    cases=(
        {"what": "one image, two heads", "seed": 5, "lead": [1, 2], "n": 4, "m": 4, "d": 3, "dv": 3, "tau": 0.1},
        {"what": "a batch of two", "seed": 6, "lead": [2, 3], "n": 5, "m": 7, "d": 4, "dv": 2, "tau": 0.05},
        {
            "what": "one query that loses every key",
            "seed": 7,
            "lead": [1, 2],
            "n": 3,
            "m": 6,
            "d": 3,
            "dv": 3,
            "tau": 0.2,
            "flat": True,
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Everything of a3, on the last two dimensions: k.transpose(-2, -1), and dim=-1. The leading ones go along.",
        "Which rows are empty? Z == 0, shape [..., N, 1]. torch.where(empty, p, a) chooses between two tensors.",
        "torch.where differentiates both sides. Where Z is 0, divide by 1 instead: r / z.masked_fill(empty, 1.0).",
    ),
    section="chapter 1, section 1.5, and chapter 2, section 2.2",
)
