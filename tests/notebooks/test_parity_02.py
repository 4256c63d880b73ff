"""What chapter 2 writes out computes what the package does: values and gradients of the notebook's definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

import svit_utils
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "02_implementing_sparse_attention"
MODES = ("zero", "dense", "top1", "cap")
HELPERS = ("cut_rows", "masked_scores", "guarded_softmax")


def taught(name: str, *needs: str, **namespace: Any) -> Callable[..., Any]:
    return extract_function(CHAPTER, name, {"torch": torch, "F": F, "Attention": Attention} | namespace, needs=needs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_cut_rows(mode: str) -> None:
    cut_rows = taught("cut_rows")
    scores = draw(5, 2, 30, 20) * torch.tensor([0.05, 0.5, 1.0, 2.0, 6.0]).reshape(5, 1, 1, 1)
    survivors = (scores.softmax(-1) > 0.08).sum(-1)
    assert (survivors == 0).any() and (survivors == 1).any() and (survivors > 1).any()
    results = []
    for function in (
        lambda s: cut_rows(s.softmax(-1), 0.08, mode),
        lambda s: svit_utils.thresholded_softmax(s, 0.08, empty_rows=mode),
    ):
        s = scores.clone().requires_grad_()
        weights = function(s)
        results.append((weights.detach(), *torch.autograd.grad((weights * draw(*s.shape, seed=1)).sum(), s)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_cut_rows_on_ties(mode: str) -> None:
    """Empty rows with several largest keys, and a fully masked one: the first largest key, or none, and never all."""
    cut_rows, guarded_softmax = taught("cut_rows"), taught("guarded_softmax")
    scores = draw(4, 6)
    scores[0], scores[1, 2:5], scores[2, ::2], scores[3] = 0.0, 2.0, 3.0, -torch.inf
    probs = guarded_softmax(scores)
    assert (probs < 0.5).all() and all((row == row.max()).sum() >= 3 for row in probs)
    ours = cut_rows(probs, 0.5, mode)
    torch.testing.assert_close(ours, svit_utils.thresholded_softmax(scores, 0.5, empty_rows=mode), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal", "dropout"])
@pytest.mark.parametrize("per_head", [False, True])
def test_thresholded_attention(mode: str, mask: str, per_head: bool) -> None:
    ours = taught("thresholded_attention", *HELPERS)
    allowed = draw(2, 1, 9, 9, seed=2) > -0.5
    allowed[:, :, 4] = False
    settings: dict[str, Any] = {
        "none": {},
        "boolean": {"attn_mask": allowed},
        "additive": {"attn_mask": draw(9, 9, seed=3)},
        "causal": {"is_causal": True},
        "dropout": {"dropout_p": 0.3},
    }[mask]
    tau = torch.tensor([0.05, 0.15, 0.3] if per_head else 0.15, dtype=torch.float64)
    results = []
    for function in (ours, svit_utils.thresholded_attention):
        q, k, v = (draw(2, 3, 9, 4, seed=seed) for seed in (4, 5, 6))
        q[0] *= 4
        q[1] *= 0.3
        inputs = [t.requires_grad_() for t in (q, k, v, tau.clone())]
        torch.manual_seed(7)
        out, weights = function(*inputs, empty_rows=mode, return_weights=True, **settings)
        gradients = torch.autograd.grad((out * draw(*out.shape, seed=8)).sum(), inputs)
        results.append([out.detach(), weights.detach(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_cuts_in_float32(dtype: torch.dtype) -> None:
    ours = taught("thresholded_attention", *HELPERS)
    q, k, v = (1.2 * draw(1, 3, 197, 32, seed=seed).to(dtype) for seed in (9, 10, 11))
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(q, k, v, 0.01, return_weights=True)
    expected = svit_utils.thresholded_attention(q, k, v, 0.01, return_weights=True)
    assert out.dtype == dtype and weights.dtype == torch.float32
    torch.testing.assert_close((out, weights), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qkv_bias": True, "qk_norm": True, "norm_layer": torch.nn.LayerNorm},
        {"scale_norm": True, "norm_layer": torch.nn.LayerNorm},
        {"attn_drop": 0.4},
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_module(settings: dict[str, Any], mode: str) -> None:
    module = taught("SparseAttention", *HELPERS, "thresholded_attention")
    torch.manual_seed(0)
    theirs = svit_utils.SparseAttention(24, 3, threshold=0.12, empty_rows=mode, **settings)
    with torch.no_grad():
        theirs.qkv.weight.mul_(4)
    ours = module(24, 3, threshold=0.12, empty_rows=mode, **settings)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    allowed = draw(1, 1, 12, 12, seed=1) > -0.5
    results = []
    for one in (ours, theirs):
        x = draw(2, 12, 24, seed=2).float().requires_grad_()
        torch.manual_seed(3)  # for dropout
        out = one(x, attn_mask=allowed)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *one.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_surgery() -> None:
    module = taught("SparseAttention", *HELPERS, "thresholded_attention")
    sparsify = taught("sparsify_in_place", SparseAttention=module)
    densify = taught("densify_in_place", SparseAttention=module)
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
        x = draw(2, 3, 32, 32).float()
        dense, keys = model(x), list(model.state_dict())
        assert sparsify(model, 0.06) == 2
        ours = model(x)
        assert list(model.state_dict()) == keys
        assert torch.equal(densify(model)(x), dense)
        with svit_utils.sparsified(model, 0.06):
            torch.testing.assert_close(ours, model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, dense, atol=1e-4)


@pytest.mark.parametrize("mode", ["zero", "dense"])
def test_gradient_of_tau(mode: str) -> None:
    tau_gradient = taught("tau_gradient", "cut_rows")
    q, k, v, d_out = (draw(2, 3, 9, 4, seed=seed) for seed in (4, 5, 6, 7))
    tau = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
    out = svit_utils.thresholded_attention(q, k, v, tau, empty_rows=mode)
    (expected,) = torch.autograd.grad((out * d_out).sum(), tau)
    probs = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    torch.testing.assert_close(tau_gradient(probs, v, 0.15, d_out), expected)
