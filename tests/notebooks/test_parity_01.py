"""Chapter 1's written-out functions compute what the package computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import svit_utils
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "01_attention_theory"
N = 197


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    """Rows [60, 197] of every kind at tau = 0.01: empty, a single survivor, partly cut."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.logspace(-1.5, 0.7, 56).double()[:, None] * torch.randn(56, N, generator=rng, dtype=torch.float64)
    single = torch.full((4, N), (1 - 0.05) / (N - 1), dtype=torch.float64).log()
    single[:, 0] = torch.tensor(0.05).double().log()
    rows = torch.cat([drawn, single])
    kept = (rows.softmax(-1) > 0.01).sum(-1)
    assert (kept == 0).sum() >= 8 and (kept == 1).sum() >= 4 and (kept > 1).sum() >= 20
    return rows


@pytest.mark.parametrize("mode", ["zero", "dense", "top1", "cap"])
@pytest.mark.parametrize("tau", [0.0, 0.01, 0.1])
def test_thresholded_softmax(scores: torch.Tensor, tau: float, mode: str) -> None:
    taught = extract_function(CHAPTER, "thresholded_softmax", {"torch": torch, "F": F})
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs, gradients = [], []
    for function in (taught, svit_utils.thresholded_softmax):
        s = scores.clone().requires_grad_()
        outputs.append(function(s, tau, empty_rows=mode))
        gradients.append(torch.autograd.grad((outputs[-1] * upstream).sum(), s)[0])
    torch.testing.assert_close(*outputs, atol=1e-13, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("mode", ["zero", "dense", "top1", "cap"])
def test_thresholded_softmax_on_ties(mode: str) -> None:
    """Empty rows with several largest keys: all of 5, two of 5, and as many far above the others."""
    tied = torch.tensor([[0.0] * 5, [1.0, 0.0, 1.0, 0.0, 0.0], [-1.0, 2.0, 2.0, -1.0, 2.0]], dtype=torch.float64)
    assert (tied.softmax(-1) < 0.5).all()
    taught = extract_function(CHAPTER, "thresholded_softmax", {"torch": torch, "F": F})
    package = svit_utils.thresholded_softmax(tied, 0.5, empty_rows=mode)
    torch.testing.assert_close(taught(tied, 0.5, empty_rows=mode), package, atol=1e-13, rtol=0)


def test_thresholded_softmax_is_dense_by_default(scores: torch.Tensor) -> None:
    taught = extract_function(CHAPTER, "thresholded_softmax", {"torch": torch, "F": F})
    torch.testing.assert_close(taught(scores), svit_utils.thresholded_softmax(scores), atol=1e-13, rtol=0)


def test_cut_is_the_formula_where_a_key_survives(scores: torch.Tensor) -> None:
    taught = extract_function(CHAPTER, "cut")
    p = scores.softmax(-1)
    alive = (p > 0.01).any(-1)
    package = svit_utils.thresholded_softmax(scores, 0.01, empty_rows="zero")
    torch.testing.assert_close(taught(p[alive], 0.01), package[alive], atol=1e-13, rtol=0)
    assert taught(p[~alive], 0.01).isnan().all()


@pytest.mark.parametrize("mode", ["dense", "cap"])
def test_gradients_by_hand(scores: torch.Tensor, mode: str) -> None:
    rng = torch.Generator().manual_seed(2)
    v, d_out = (torch.randn(*shape, 5, generator=rng, dtype=torch.float64) for shape in ((N,), ()))
    by_hand = extract_function(CHAPTER, "gradients_by_hand", {"torch": torch})
    capped = extract_function(CHAPTER, "gradients_under_cap", {"torch": torch, "gradients_by_hand": by_hand})
    seen = 0
    for row in scores:
        p = row.softmax(-1)
        inside = p.max() < 0.02 if mode == "cap" else p.max() > 0.01
        if not inside:
            continue
        seen += 1
        s, values = row.clone().requires_grad_(), v.clone().requires_grad_()
        tau = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        loss = svit_utils.thresholded_softmax(s, tau, empty_rows=mode) @ values @ d_out
        ds, dv, dtau = torch.autograd.grad(loss, (s, values, tau))
        ours = (*capped(p, v, d_out), torch.zeros(())) if mode == "cap" else by_hand(p, 0.01, v, d_out)
        for a, b in zip(ours, (ds, dv, dtau), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-10, rtol=1e-9)
    assert seen >= 10


def test_sparsemax_and_entmax() -> None:
    """Not in the package: checked by what defines them."""
    sparsemax = extract_function(CHAPTER, "sparsemax", {"torch": torch})
    entmax = extract_function(CHAPTER, "entmax", {"torch": torch})
    s = 2 * torch.randn(50, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # Optimality on the support: s_j - p_j (sparsemax) and s_j / 2 - sqrt(p_j) (entmax 1.5) are one constant, theta.
    for p, slack in ((sparsemax(s), lambda p: s - p), (entmax(s, 1.5), lambda p: s / 2 - p.sqrt())):
        torch.testing.assert_close(p.sum(-1), torch.ones(50).double())
        theta = slack(p).masked_fill(p == 0, -torch.inf).amax(-1, keepdim=True)
        on_support = slack(p).masked_fill(p == 0, torch.inf).amin(-1, keepdim=True)
        torch.testing.assert_close(theta, on_support, atol=1e-8, rtol=0)
        assert ((slack(p) <= theta + 1e-8) | (p > 0)).all()


def test_the_relatives_known_properties() -> None:
    sparsemax = extract_function(CHAPTER, "sparsemax", {"torch": torch})
    entmax = extract_function(CHAPTER, "entmax", {"torch": torch})
    rng = torch.Generator().manual_seed(6)
    s = 2 * torch.randn(200, 30, generator=rng, dtype=torch.float64)
    for function in (sparsemax, entmax):
        torch.testing.assert_close(function(s + 7), function(s), atol=1e-9, rtol=0)
    torch.testing.assert_close(entmax(s, 2.0), sparsemax(s), atol=1e-9, rtol=0)
    torch.testing.assert_close(entmax(s, 1.0001), s.softmax(-1), atol=1e-3, rtol=0)
    others = torch.rand(500, 30, generator=rng, dtype=torch.float64).pow(6)
    others = others / others.sum(-1, keepdim=True)  # points of the simplex: sparsemax is nearer than each of them
    assert ((sparsemax(s) - s).norm(dim=-1, keepdim=True) <= torch.cdist(s, others) + 1e-12).all()
    sizes = [float((entmax(s, alpha) > 0).double().sum(-1).mean()) for alpha in (1.25, 1.5, 2.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]  # a larger alpha is sparser
