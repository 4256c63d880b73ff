"""The operator in NumPy, and inputs drawn from a case."""

from __future__ import annotations

from typing import Any

import numpy as np

from svit_course.question import Case


def softmax(scores: np.ndarray, axis: Any = -1) -> np.ndarray:
    """Weights of the scores' shape that sum to 1 along ``axis``; None: over the whole array."""
    with np.errstate(all="ignore"):
        exp = np.exp(scores - scores.max(axis=axis, keepdims=True))
        return np.asarray(exp / exp.sum(axis=axis, keepdims=True))


def cut(p: np.ndarray, tau: float) -> np.ndarray:
    """ReLU(p - tau) over its row's sum, [..., M]; zeros in a row that loses every key."""
    r = np.maximum(p - tau, 0)
    z = r.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(r, z, out=np.zeros_like(r), where=z > 0))


def draw_scores(case: Case) -> np.ndarray:
    """Either written out in the case (``scores``), or Gaussian: ``shape``, ``std``, ``seed``."""
    if "scores" in case:
        return np.array(case["scores"], dtype=np.float64)
    return case.get("std", 1.0) * np.random.default_rng(case["seed"]).standard_normal(case["shape"])


def draw_qkv(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [..., N, D], k [..., M, D], v [..., M, Dv] from ``n``, ``m``, ``d``, ``dv``, ``lead``, ``seed``.

    ``flat``: the first query is zero, so that its scores are all equal and no key exceeds tau.
    """
    rng, lead = np.random.default_rng(case["seed"]), tuple(case.get("lead", ()))
    q = case.get("std", 1.5) * rng.standard_normal((*lead, case["n"], case["d"]))
    k = rng.standard_normal((*lead, case["m"], case["d"]))
    if case.get("flat"):
        q[..., 0, :] = 0
    return q, k, rng.standard_normal((*lead, case["m"], case["dv"]))
