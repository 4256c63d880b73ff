"""Assignment a: from softmax to thresholded attention, in NumPy and then in torch. What is checked, and the hints."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from svit_course.judging import Mistake, array, close, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention.formula import thresholded_softmax

# ------------------------------------------------------------------------------------------------ a1: softmax


def _scores(case: Case) -> np.ndarray:
    """Either written out in the case, or Gaussian: ``shape``, ``std``, ``seed``."""
    if "scores" in case:
        return np.array(case["scores"], dtype=np.float64)
    return case.get("std", 1.0) * np.random.default_rng(case["seed"]).standard_normal(case["shape"])


def _softmax(scores: np.ndarray, axis: Any = -1) -> np.ndarray:
    with np.errstate(all="ignore"):
        exp = np.exp(scores - scores.max(axis=axis, keepdims=True))
        return np.asarray(exp / exp.sum(axis=axis, keepdims=True))


def _probe_softmax(case: Case, softmax: Any) -> Seen:
    scores = _scores(case)
    with np.errstate(all="ignore"):
        result = softmax(scores)
    return {"weights": result, "scores": scores}


def _judge_softmax(case: Case, seen: Seen) -> None:
    scores = _scores(case)
    unchanged(scores, seen["scores"], "scores")
    got = array(seen, "weights", "the result")
    mistakes: list[Mistake] = [(_softmax(scores, axis=None), "the whole array sums to 1; each *row* should: axis=-1")]
    if scores.ndim > 1:
        rows = "the columns sum to 1, not the rows: the softmax runs over the last axis, axis=-1"
        mistakes.append((_softmax(scores, axis=0), rows))
        mistakes.append((_softmax(scores, axis=1), "the sum runs over axis 1, which is the last one only in a matrix"))
    with np.errstate(over="ignore"):
        exponentials = np.exp(scores)
    mistakes.append((exponentials, "these are exponentials: divide each row by its sum"))
    if got.shape == scores.shape and np.isnan(got).any() and not np.isnan(scores).any():
        raise Wrong("NaN: exp() overflows on large scores. Subtract the row's maximum first; the softmax is the same")
    compare(got, _softmax(scores), "the result", mistakes)


A1 = Question(
    name="a1",
    answers=("softmax",),
    cases=(
        {"what": "one row", "scores": [0.0, 1.0, 2.0, 4.0]},
        {"what": "rows of a matrix", "seed": 1, "shape": [3, 5]},
        {"what": "scores of a thousand", "scores": [[1000.0, 999.0, 0.0], [-1000.0, -1001.0, -1002.0]]},
    ),
    probe=_probe_softmax,
    judge=_judge_softmax,
    hints=(
        "Each row of weights is positive and sums to 1. Which function makes any number positive?",
        "exp(s_j) divided by the sum of exp(s_k) over the row. NumPy: axis=-1, and keepdims=True so that the sum "
        "lines up with its row.",
        "exp(1000) is infinite. softmax(s) = softmax(s - c) for any c: choose c so that the largest exponent is 0.",
    ),
    section="chapter 1, section 1",
)

# ------------------------------------------------------------------------------------------------ a2: the cut


def _cut(p: np.ndarray, tau: float) -> np.ndarray:
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(r, z, out=np.zeros_like(r), where=z > 0))


def _probabilities(case: Case) -> np.ndarray:
    return np.array(case["p"], dtype=np.float64) if "p" in case else _softmax(_scores(case))


def _probe_cut(case: Case, cut: Any) -> Seen:
    p = _probabilities(case)
    with np.errstate(all="ignore"):
        result = cut(p, case["tau"])
    return {"weights": result, "p": p}


def _judge_cut(case: Case, seen: Seen) -> None:
    p, tau = _probabilities(case), case["tau"]
    unchanged(p, seen["p"], "p")
    got, expected = array(seen, "weights", "the result"), _cut(p, tau)
    r, hard = np.maximum(p - tau, 0), np.where(p > tau, p, 0)
    with np.errstate(all="ignore"):
        by_column = np.nan_to_num(r / r.sum(axis=0, keepdims=True))
        whole = np.nan_to_num(r / r.sum())
        hard_weights = np.nan_to_num(hard / hard.sum(axis=-1, keepdims=True))
    sums = r.sum(axis=-1)
    example = float(sums[sums > 0].min()) if (sums > 0).any() else 0.0
    subtract = "survivors keep their whole p: the formula subtracts tau, ReLU(p - tau), it does not only ask p > tau"
    if got.shape == p.shape and np.isnan(got).any():
        raise Wrong("NaN in a row that loses every key: 0/0. Such a row should get zeros")
    compare(
        got,
        expected,
        "the result",
        (
            (r, f"your rows sum to {example:.2f}: did you renormalise after the cut?"),
            (hard_weights, subtract),
            (hard, subtract + ", and then divides by the row's sum"),
            (by_column, "divided by the sums of the columns: each *row* sums to 1, axis=-1 with keepdims=True"),
            (whole, "divided by the sum of the whole array: each row has its own sum, axis=-1 with keepdims=True"),
            (
                np.where(sums[..., None] > 0, expected, p),
                "an empty row keeps its softmax; zeros are asked for",
            ),
        ),
    )


A2 = Question(
    name="a2",
    answers=("cut",),
    cases=(
        {"what": "a row by hand", "p": [[0.5, 0.25, 0.15, 0.1]], "tau": 0.2},
        {"what": "rows of a matrix", "seed": 2, "shape": [4, 6], "std": 2.0, "tau": 0.1},
        {"what": "a row that loses every key", "p": [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]], "tau": 0.3},
    ),
    probe=_probe_cut,
    judge=_judge_cut,
    hints=(
        "Three steps: subtract, clip at zero, divide by what is left in the row.",
        "np.maximum(p - tau, 0) is ReLU. Its sum over axis=-1, with keepdims=True, is Z.",
        "A row that loses every key has Z = 0. Divide where Z > 0 and leave zeros elsewhere: np.divide(..., where=...) "
        "with out=, or divide by Z with its zeros replaced by ones.",
    ),
    section="chapter 1, sections 2 and 5",
)

# ------------------------------------------------------------------------------------------------ a3: attention


def _qkv(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [..., N, D], k [..., M, D], v [..., M, Dv] from ``n``, ``m``, ``d``, ``dv``, ``lead``, ``seed``."""
    rng, lead = np.random.default_rng(case["seed"]), tuple(case.get("lead", ()))
    q = case.get("std", 1.5) * rng.standard_normal((*lead, case["n"], case["d"]))
    k = rng.standard_normal((*lead, case["m"], case["d"]))
    if case.get("flat"):  # its first query is at right angles to every key: equal scores, nobody above tau
        q[..., 0, :] = 0
    return q, k, rng.standard_normal((*lead, case["m"], case["dv"]))


def _probe_attention(case: Case, attention: Any) -> Seen:
    q, k, v = _qkv(case)
    with np.errstate(all="ignore"):
        out = attention(q, k, v, case["tau"])
    return {"out": out, "q": q, "k": k, "v": v}


def _judge_attention(case: Case, seen: Seen) -> None:
    q, k, v = _qkv(case)
    for name, before in (("q", q), ("k", k), ("v", v)):
        unchanged(before, seen[name], name)
    tau, scores = case["tau"], q @ k.swapaxes(-1, -2)
    scaled = scores / np.sqrt(case["d"])
    p = _softmax(scaled)
    shifted = np.maximum(scaled - tau, 0)
    early = _softmax(np.where(scaled > tau, scaled, -np.inf)) if (scaled > tau).any(-1).all() else _softmax(shifted)
    first = "tau is applied to the scores, before the softmax: the cut comes after it, on the probabilities"
    compare(
        array(seen, "out", "the output"),
        _cut(p, tau) @ v,
        "the output",
        (
            (_cut(_softmax(scores), tau) @ v, "the scores are not divided by sqrt(d)"),
            (_cut(_softmax(scores / case["d"]), tau) @ v, "the scores are divided by d, not by sqrt(d)"),
            (
                _cut(_softmax(scores / np.sqrt(case["n"])), tau) @ v,
                "divided by the root of the number of tokens: d is the last dimension of q",
            ),
            (p @ v, "nothing is cut: this is dense attention"),
            (np.maximum(p - tau, 0) @ v, "not renormalised: divide ReLU(p - tau) by its sum in each row"),
            (_softmax(shifted) @ v, first),
            (_softmax(scaled - tau) @ v, first + " (and a softmax does not notice a constant)"),
            (early @ v, first),
        ),
    )


A3 = Question(
    name="a3",
    answers=("attention",),
    cases=(
        {"what": "three queries, five keys", "seed": 3, "n": 3, "m": 5, "d": 4, "dv": 2, "tau": 0.1},
        {"what": "as many keys as queries", "seed": 4, "n": 6, "m": 6, "d": 8, "dv": 8, "tau": 0.05},
    ),
    probe=_probe_attention,
    judge=_judge_attention,
    hints=(
        "You have softmax and cut already. What is left is the scores before and one matrix product after.",
        "scores [N, M] = q [N, D] times k transposed [D, M], over the square root of D.",
        "attention = cut(softmax(q @ k.T / sqrt(d)), tau) @ v, with d = q.shape[-1]. Test it with other numbers of "
        "queries than of keys.",
    ),
    section="chapter 1, sections 1 and 2",
)

# ------------------------------------------------------------------------------------------------ a4: torch


def _torch_inputs(case: Case) -> list[torch.Tensor]:
    return [torch.from_numpy(x).requires_grad_() for x in _qkv(case)]


def _reference(case: Case, empty_rows: str = "dense") -> dict[str, np.ndarray]:
    q, k, v = _torch_inputs(case)
    weights = thresholded_softmax(q @ k.transpose(-1, -2) / case["d"] ** 0.5, case["tau"], empty_rows=empty_rows)
    out = weights @ v
    gradients = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), (q, k, v))
    named = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return {key: value.detach().numpy() for key, value in {"out": out, "weights": weights, **named}.items()}


def _probe_torch(case: Case, attention: Any) -> Seen:
    q, k, v = _torch_inputs(case)
    before = [x.detach().clone() for x in (q, k, v)]
    result = attention(q, k, v, case["tau"])
    if not isinstance(result, tuple) or len(result) != 2:
        raise Wrong("it should return two tensors, the output and the weights: `return out, weights`")
    out, weights = result
    seen: Seen = {"out": out, "weights": weights}
    seen["changed"] = [n for n, b, x in zip("qkv", before, (q, k, v)) if not torch.equal(b, x.detach())]
    if isinstance(out, torch.Tensor):
        if not out.requires_grad:
            raise Wrong("no gradient comes through. Is there a detach(), a .data, a no_grad or NumPy on the way?")
        upstream = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads = torch.autograd.grad((out * upstream).sum(), (q, k, v), allow_unused=True)
        seen.update(zip(("dq", "dk", "dv"), grads))
    return seen


def _judge_torch(case: Case, seen: Seen) -> None:
    if seen["changed"]:
        raise Wrong(f"it changed its input {', '.join(seen['changed'])} in place: the caller still needs it")
    expected, zero = _reference(case), _reference(case, "zero")
    q, k, _ = _qkv(case)
    weights, out = array(seen, "weights", "the second result, weights,"), array(seen, "out", "the first result, out,")
    p = _softmax(q @ k.swapaxes(-1, -2) / np.sqrt(case["d"]))
    r = np.maximum(p - case["tau"], 0)
    if weights.shape == p.shape and np.isnan(weights).any():
        raise Wrong("NaN in the weights of a row that loses every key: 0/0. Such a row gets its plain softmax back")
    whole = p if not (r.sum(-1) > 0).all() else expected["weights"]
    compare(
        weights,
        expected["weights"],
        "weights",
        (
            (r, f"your rows sum to {float(r.sum(-1).max()):.2f}: did you renormalise after the cut?"),
            (zero["weights"], "a row that loses every key gets zeros: here it should keep its plain softmax"),
            (whole, "because one row is empty every row falls back: decide for each row, with torch.where"),
        ),
    )
    compare(out, expected["out"], "out", ((weights, "the results are in the wrong order: out first, then weights"),))
    for name, letter in (("dq", "q"), ("dk", "k"), ("dv", "v")):
        if seen.get(name) is None:
            raise Wrong(f"the output does not depend on {letter}, as far as autograd can see: is there a detach()?")
        got = array(seen, name, f"the gradient of {letter}")
        if np.isnan(got).any():
            raise Wrong(
                f"the gradient of {letter} is NaN though the output is right: torch.where chooses the value, and still "
                "differentiates 0/0 on the other side. Replace Z = 0 by 1 *before* dividing"
            )
        if not close(got, expected[name]) and name != "dv":
            raise Wrong(
                f"the output is right and the gradient of {letter} is not (largest difference "
                f"{np.abs(got - expected[name]).max():.3g}): is part of the formula detached, or computed in no_grad?"
            )
        compare(got, expected[name], f"the gradient of {letter}")


A4 = Question(
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
    probe=_probe_torch,
    judge=_judge_torch,
    hints=(
        "Everything of a3, on the last two dimensions: k.transpose(-2, -1), and dim=-1. The leading ones go along.",
        "Which rows are empty? Z == 0, shape [..., N, 1]. torch.where(empty, p, a) chooses between two tensors.",
        "torch.where differentiates both sides. Where Z is 0, divide by 1 instead: r / z.masked_fill(empty, 1.0).",
    ),
    section="chapter 1, section 5, and chapter 2, section 2",
)

QUESTIONS = (A1, A2, A3, A4)
