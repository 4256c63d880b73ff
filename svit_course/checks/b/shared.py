"""What is expected, from autograd: through the library's operator, or through the formula written out here.

Everywhere ``given`` is (scores [..., N, M], v [..., M, Dv], tau, d_out [..., N, Dv]): the scores before the softmax,
and the gradient that arrives at the output. ``tau`` is a number, or one for each head, [H], of scores [B, H, N, M].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svit_course.judging import Mistake, close, compare
from svit_course.question import Case, Wrong
from svit_utils.attention.formula import thresholded_softmax

Given = tuple[np.ndarray, np.ndarray, Any, np.ndarray]

# Makes a row's scores nearly equal, so that no key exceeds tau; not quite equal, as a uniform row hides mistakes.
FLATTER = 0.05

TOY: dict[str, Any] = {
    "what": "the book's toy row",
    "p": [[1 / 16, 1 / 32, 1 / 8, 1 / 2, 1 / 4, 1 / 32]],
    "v": [[0, 0], [0, -8], [0, 8], [14, 0], [7, 7], [0, -8]],
    "d_out": [[1, 0]],
    "tau": 0.2,
}


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in the scores' precision."""
    return torch.tensor(scores).softmax(dim=-1).numpy()


def as_numpy(named: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The same names, with arrays for tensors."""
    return {key: value.detach().numpy() for key, value in named.items()}


def draw_rows(case: Case) -> Given:
    """Scores, v, tau and d_out: written out in the case as ``p``, ``v``, ``d_out``, or drawn from ``seed``.

    ``flat``: so many of the first queries have nearly equal scores, and lose every key.
    """
    if "p" in case:
        p, v, d_out = (np.array(case[name], dtype=np.float64) for name in ("p", "v", "d_out"))
        return np.log(p), v, case["tau"], d_out
    rng, lead = np.random.default_rng(case["seed"]), tuple(case.get("lead", ()))
    n, m, dv = case["n"], case["m"], case["dv"]
    scores = case.get("std", 1.5) * rng.standard_normal((*lead, n, m))
    if case.get("flat"):
        scores[..., : case["flat"], :] *= FLATTER
    return scores, rng.standard_normal((*lead, m, dv)), case["tau"], rng.standard_normal((*lead, n, dv))


def library(given: Given, empty_rows: str = "zero") -> dict[str, np.ndarray]:
    """Gradients ``ds``, ``dv``, ``dtau`` of autograd through the package's operator."""
    scores, v, tau, d_out = given
    s, values = (torch.tensor(x, requires_grad=True) for x in (scores, v))
    t = torch.tensor(tau, dtype=s.dtype, requires_grad=True)
    out = thresholded_softmax(s, t, empty_rows=empty_rows) @ values
    ds, dv, dtau = torch.autograd.grad(out, (s, values, t), torch.tensor(d_out))
    return as_numpy({"ds": ds, "dv": dv, "dtau": dtau})


def formula(
    given: Given, empty_rows: str = "zero", *, constant_sum: bool = False, every_key: bool = False
) -> dict[str, np.ndarray]:
    """The forward pass step by step, and gradients of p, of the scores, and of one tau for each row.

    Args:
        empty_rows: ``"zero"`` or ``"dense"``, what a row gets that loses every key.
        constant_sum: a mistake made on purpose: the row's sum does not depend on p.
        every_key: another one: the ReLU lets the gradient of cut keys through.

    Returns:
        ``p``, ``r``, ``z``, ``empty``, ``weights`` and ``dp``, ``ds``, ``dtau`` [..., N, 1].
    """
    scores, v, tau, d_out = given
    s, values = torch.tensor(scores, requires_grad=True), torch.tensor(v)
    per_head = torch.tensor(tau, dtype=s.dtype)
    t = (per_head[:, None, None] if per_head.ndim else per_head).expand(*s.shape[:-1], 1).clone().requires_grad_()
    p = s.softmax(dim=-1)
    r = (p - t).relu()
    if every_key:
        r = r + torch.where(p > t, torch.zeros_like(p), (p - t) - (p - t).detach())
    z = r.sum(dim=-1, keepdim=True)
    if constant_sum:
        z = z.detach()
    empty = (p > t).sum(dim=-1, keepdim=True) == 0
    weights = r / z.masked_fill(empty, 1.0)
    if empty_rows == "dense":
        weights = torch.where(empty, p, weights)
    dp, ds, dtau = torch.autograd.grad(weights @ values, (p, s, t), torch.tensor(d_out))
    return as_numpy({"p": p, "r": r, "z": z, "empty": empty, "weights": weights, "dp": dp, "ds": ds, "dtau": dtau})


def compare_tau(got: np.ndarray, expected: np.ndarray, name: str, given: Given) -> None:
    """Compare a gradient of tau [H]; ``name`` is what it is called in the message.

    Raises:
        Wrong: it is not ``expected``.
    """
    empty = formula(given)["empty"][..., 0]  # [B, H, N]
    if got.shape == expected.shape:
        if np.isnan(got).any() and empty.any():
            raise Wrong(f"NaN in {name}: an empty row has Z = 0, and 0/0. Guard the division; the row adds nothing")
        touched = empty.any(axis=(0, 2))
        elsewhere = close(got[~touched], expected[~touched], 1e-3)
        if touched.any() and elsewhere and not close(got[touched], expected[touched], 1e-3):
            if empty.all():
                raise Wrong(f"every row is empty here, so the output does not depend on tau: {name} is 0")
            if not touched.all():
                raise Wrong(
                    f"{name} is right in the heads without empty rows and wrong in those with: a row that falls back "
                    "to its plain softmax does not depend on tau, and adds nothing"
                )
    compare(got, expected, name, _tau_mistakes(expected, name, given), rtol=1e-3)


def _tau_mistakes(expected: np.ndarray, name: str, given: Given) -> Iterator[Mistake]:
    _, v, tau, d_out = given
    rows = formula(given, "dense")
    each, empty = rows["dtau"][..., 0], rows["empty"][..., 0]  # [B, H, N], one for each row
    batch, _, n = each.shape
    yield -expected, f"{name} has the wrong sign: raising tau lowers every r_j, so dtau is *minus* the sum of G"
    mean = f"{name} is a mean: tau moves every row, and each adds its part. Sum over the rows"
    yield expected / n, f"{mean} and the images"
    yield expected / (batch * n), f"{mean} and the images"
    yield expected / batch, f"{mean} and the images, not the mean over images"
    keys = rows["p"].shape[-1]
    yield expected / keys, f"{mean} and the keys: G is a sum over the survivors, not a mean over the keys"
    heads = f"all heads are summed into one number: each head has its own tau, so {name} has shape [H]"
    yield expected.sum(), heads
    images = f"{name} has one number for each image and head: tau is shared by the images, so sum these too"
    yield each.sum(axis=-1), images
    yield each, f"{name} has one number for each row: sum over rows and images"
    yield each[0].sum(axis=-1), f"{name} counts only the first image of the batch: sum over all images"
    constant = formula(given, constant_sum=True)["dtau"].sum(axis=(0, 2, 3))
    yield constant, f"{name} takes Z for a constant: raising tau lowers Z too, which is where k D comes from"
    kept = (rows["p"] > tau[:, None, None]).sum(axis=-1)
    z = np.where(empty, 1.0, rows["z"][..., 0])
    d = (d_out * (rows["weights"] @ v)).sum(axis=-1)
    one_d = each - np.where(empty, 0, kept - 1) * d / z
    yield one_d.sum(axis=(0, 2)), "D is subtracted once in each row's G: once for *every* survivor, k D"
