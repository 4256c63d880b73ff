"""The operator against the formula written as loops, against SDPA where tau is 0, and against bad input."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from svit_utils.attention import (
    EMPTY_ROWS,
    FixedThreshold,
    LearnableThreshold,
    RelativeThreshold,
    attention_record,
    backends,
    thresholded_attention,
    thresholded_softmax,
)

B, H, N, M, D, DV = 2, 3, 5, 7, 4, 6


def qkv(dtype=torch.float32, spread=2.0, seed=0, n=N, m=M):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, n, D, generator=g, dtype=torch.float64) * spread
    k = torch.randn(B, H, m, D, generator=g, dtype=torch.float64)
    v = torch.randn(B, H, m, DV, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def row_by_hand(scores, tau, mode):
    """One row of the operator in plain Python numbers; a key at -inf is masked."""
    keep = [s for s in scores if s != -math.inf]
    if not keep:
        return [0.0] * len(scores)
    total = sum(math.exp(s - max(keep)) for s in keep)
    p = [math.exp(s - max(keep)) / total if s != -math.inf else 0.0 for s in scores]
    if mode == "cap":
        tau = min(tau, max(p) / 2)
    r = [max(x - tau, 0.0) for x in p]
    if sum(r) > 0:
        return [x / sum(r) for x in r]
    if mode == "dense":
        return p
    if mode == "top1":
        return [1.0 if j == p.index(max(p)) else 0.0 for j in range(len(p))]
    return [0.0] * len(p)


def by_hand(q, k, v, tau, mode, mask=None, scale=None):
    """The whole operator in float64 loops; ``mask`` is additive, [B, H, N, M]; ``tau`` [H]."""
    q, k, v = (t.double().numpy() for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    weights = np.zeros((*q.shape[:3], k.shape[2]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        scores = [scale * sum(q[b, h, i] * k[b, h, j]) for j in range(k.shape[2])]
        if mask is not None:
            scores = [s + float(mask[b, h, i, j]) for j, s in enumerate(scores)]
        weights[b, h, i] = row_by_hand(scores, tau[h], mode)
        for j in range(k.shape[2]):
            out[b, h, i] += weights[b, h, i, j] * v[b, h, j]
    return out, weights


def random_mask(n=N, m=M):
    """Boolean [B, H, N, M] with one fully masked query in each batch entry."""
    mask = torch.rand(B, H, n, m, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[..., 0] = True
    mask[:, :, 1] = False
    return mask


def additive(mask, low=-math.inf):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


# --- the formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("masking", ["none", "bool", "additive", "causal"])
def test_formula_to_the_letter(mode, masking):
    q, k, v = qkv(torch.float64)
    tau = [0.02, 0.2, 0.45]  # nothing, some rows and many rows lose every key
    mask, settings = None, {}
    if masking == "bool":
        settings["attn_mask"] = random_mask()
        mask = additive(random_mask())
    elif masking == "additive":
        mask = additive(random_mask()) + torch.randn(B, H, N, M, dtype=torch.float64)
        settings["attn_mask"] = mask
    elif masking == "causal":
        settings["is_causal"] = True
        mask = additive(torch.ones(N, M, dtype=torch.bool).tril().expand(B, H, N, M))
    out, weights = thresholded_attention(
        q, k, v, torch.tensor(tau, dtype=torch.float64), empty_rows=mode, return_weights=True, **settings
    )
    expected_out, expected_weights = by_hand(q, k, v, tau, mode, mask)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-14)
    np.testing.assert_allclose(out, expected_out, atol=1e-13)


def test_the_loop_meets_every_kind_of_row():
    q, k, v = qkv(torch.float64)
    _, weights = by_hand(q, k, v, [0.02, 0.2, 0.45], "zero")
    kept = (weights > 0).sum(-1)
    assert (kept == 0).any() and (kept == 1).any() and ((kept > 1) & (kept < M)).any()


def test_weights_of_the_softmax_are_the_weights_of_the_attention():
    q, k, v = qkv()
    scores = (q * D**-0.5) @ k.transpose(-2, -1)
    for mode in EMPTY_ROWS:
        _, weights = thresholded_attention(q, k, v, 0.1, empty_rows=mode, return_weights=True)
        torch.testing.assert_close(thresholded_softmax(scores, 0.1, empty_rows=mode), weights)


def test_scale_replaces_the_default():
    q, k, v = qkv(torch.float64)
    out = thresholded_attention(q, k, v, 0.1, scale=0.9)
    np.testing.assert_allclose(out, by_hand(q, k, v, [0.1] * H, "dense", scale=0.9)[0], atol=1e-13)
    assert not torch.allclose(out, thresholded_attention(q, k, v, 0.1))


def test_a_worked_row():
    # p = (0.6, 0.3, 0.1), tau = 0.2: R = (0.4, 0.1, 0), A = (0.8, 0.2, 0).
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    expected = torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(thresholded_softmax(p.log(), 0.2), expected)
    # tau = 0.7: no key is left.
    for mode, row in {"zero": [0, 0, 0], "dense": [0.6, 0.3, 0.1], "top1": [1, 0, 0], "cap": [1, 0, 0]}.items():
        expected = torch.tensor(row, dtype=torch.float64)
        torch.testing.assert_close(thresholded_softmax(p.log(), 0.7, empty_rows=mode), expected)


# --- threshold 0 and masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("masking", ["none", "bool", "additive", "causal", "broadcast", "lowest"])
def test_threshold_zero_is_sdpa(mode, masking):
    q, k, v = qkv()
    full = torch.randn(B, H, N, M) + additive(random_mask()).float()
    settings = {
        "none": {},
        "bool": {"attn_mask": random_mask()},
        "additive": {"attn_mask": full},
        "causal": {"is_causal": True},
        "broadcast": {"attn_mask": random_mask()[:, :1, :1]},
        "lowest": {"attn_mask": additive(random_mask(), torch.finfo(torch.float32).min).float()},
    }[masking]
    expected = F.scaled_dot_product_attention(q, k, v, **settings)
    out = thresholded_attention(q, k, v, 0.0, empty_rows=mode, **settings)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_fully_masked_query_is_zero_with_gradient_zero(mode):
    q, k, v = (t.requires_grad_() for t in qkv(torch.float64))
    for mask in (random_mask(), additive(random_mask())):
        out = thresholded_attention(q, k, v, 0.2, empty_rows=mode, attn_mask=mask)
        assert torch.equal(out[:, :, 1], torch.zeros(B, H, DV, dtype=torch.float64))
        gq, gk, gv = torch.autograd.grad(out[:, :, 1].sum(), (q, k, v), retain_graph=True)
        assert not gq.any() and not gk.any() and not gv.any()
        whole = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(g.isfinite().all() for g in whole)
        assert not whole[0][:, :, 1].any() and whole[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_as_the_lowest_number_follows_sdpa(dtype):
    """timm's NaFlexViT: padded queries become uniform over all keys, other rows ignore the padded keys."""
    q, k, v = qkv(dtype)
    mask = additive(random_mask(), torch.finfo(dtype).min).to(dtype)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = thresholded_attention(q, k, v, 0.0, attn_mask=mask)
    torch.testing.assert_close(out, expected, atol={torch.float32: 1e-5}.get(dtype, 2e-2), rtol=0)
    cut = thresholded_attention(q, k, v, 0.1, attn_mask=mask, return_weights=True)[1]
    from_bool = thresholded_attention(q, k, v, 0.1, attn_mask=random_mask(), return_weights=True)[1]
    others = [i for i in range(N) if i != 1]
    torch.testing.assert_close(cut[:, :, others], from_bool[:, :, others], atol=1e-6, rtol=0)


def test_a_relative_threshold_counts_the_keys_of_the_query():
    q, k, v = qkv(torch.float64)
    mask = random_mask()
    mask[..., 1] = True  # at least two keys
    mask[:, :, 1] = False
    _, weights = thresholded_attention(q, k, v, RelativeThreshold(1.3), attn_mask=mask, return_weights=True)
    for b, h, i in np.ndindex(B, H, N):
        keys = int(mask[b, h, i].sum())
        if keys:
            scores = (q[b, h, i] @ k[b, h].T * D**-0.5).masked_fill(~mask[b, h, i], -math.inf).tolist()
            expected = torch.tensor(row_by_hand(scores, 1.3 / keys, "dense"), dtype=torch.float64)
            torch.testing.assert_close(weights[b, h, i], expected, atol=1e-6, rtol=0)


def test_a_mask_broadcast_along_the_keys_counts_every_key():
    q, k, v = qkv()
    mask = torch.ones(B, 1, N, 1, dtype=torch.bool)
    expected = thresholded_attention(q, k, v, RelativeThreshold(1.5))
    torch.testing.assert_close(thresholded_attention(q, k, v, RelativeThreshold(1.5), attn_mask=mask), expected)


# --- thresholds -------------------------------------------------------------------------------------------------


def test_threshold_per_head_cuts_each_head_at_its_own():
    q, k, v = qkv(torch.float64)
    taus = [0.0, 0.1, 0.3]
    expected = torch.cat([thresholded_attention(q[:, [h]], k[:, [h]], v[:, [h]], t) for h, t in enumerate(taus)], dim=1)
    given = (torch.tensor(taus, dtype=torch.float64), FixedThreshold(taus), FixedThreshold(torch.tensor(taus)))
    for threshold in given:
        torch.testing.assert_close(thresholded_attention(q, k, v, threshold), expected, atol=1e-6, rtol=0)


def test_threshold_objects_give_their_tau():
    q, k, v = qkv()
    for threshold in (FixedThreshold(0.14), RelativeThreshold(0.14 * M), LearnableThreshold(0.14), torch.tensor(0.14)):
        expected = thresholded_attention(q, k, v, 0.14)
        torch.testing.assert_close(thresholded_attention(q, k, v, threshold), expected, atol=1e-5, rtol=0)
    half = thresholded_attention(q, k, v, 0.07)
    for threshold in (FixedThreshold(0.14), RelativeThreshold(0.14 * M), LearnableThreshold(0.14)):
        scaled = thresholded_attention(q, k, v, threshold.set_warmup(0.5))
        torch.testing.assert_close(scaled, half, atol=1e-5, rtol=0)
        dense = thresholded_attention(q, k, v, threshold.set_warmup(0.0))
        torch.testing.assert_close(dense, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=0)
    assert FixedThreshold(0.01).tau == 0.01 and FixedThreshold(0.01).set_warmup(0.5).tau == 0.005


def test_a_tensor_threshold_is_not_rounded_to_bf16():
    scores = torch.randn(2, 64, 64).bfloat16()
    tau = 0.0203  # 0.02026 in bf16
    weights = thresholded_softmax(scores, torch.tensor([tau, tau]), empty_rows="zero")
    kept = scores.float().softmax(-1) > tau
    assert torch.equal(weights > 0, kept)
    assert not torch.equal(kept, scores.float().softmax(-1) > float(torch.tensor(tau).bfloat16()))


# --- precision --------------------------------------------------------------------------------------------------


def _probabilities_near(tau, dtype):
    """q, k, v of a precision in which a softmax of that precision would cut other keys."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 3, 65, 16, generator=g).to(dtype) for _ in range(3))
    exact = ((q.float() * 0.25) @ k.float().transpose(-2, -1)).softmax(-1) > tau
    coarse = ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1) > tau
    assert not torch.equal(exact, coarse)
    return q, k, v, exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_cuts_in_float32(dtype, autocast):
    tau = 0.0203
    q, k, v, exact = _probabilities_near(tau, dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for threshold in (tau, torch.full((3,), tau), FixedThreshold(tau)):
            out, weights = thresholded_attention(q, k, v, threshold, empty_rows="zero", return_weights=True)
            assert torch.equal(weights > 0, exact)
            assert out.dtype == dtype and weights.dtype == torch.float32
        full = thresholded_attention(q.float(), k.float(), v.float(), tau, empty_rows="zero", return_weights=True)
        assert torch.equal(full[1] > 0, exact)
        assert full[0].dtype == torch.float32
    torch.testing.assert_close(out.float(), full[0], atol=2e-2, rtol=0)


def test_float64_is_not_narrowed():
    q, k, v = qkv(torch.float64)
    out, weights = thresholded_attention(q, k, v, 0.1, return_weights=True)
    assert out.dtype == weights.dtype == torch.float64


# --- dropout, gradients, NaN ------------------------------------------------------------------------------------


def test_dropout_comes_after_the_renormalisation():
    q, k, v = qkv()
    _, plain = thresholded_attention(q, k, v, 0.1, return_weights=True)
    torch.manual_seed(1)
    out, dropped = thresholded_attention(q, k, v, 0.1, dropout_p=0.25, return_weights=True)
    kept = dropped != 0
    assert 0 < kept.sum() < (plain != 0).sum()
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)  # never renormalised again, support never larger
    torch.testing.assert_close(out, dropped @ v)


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(mode, masked):
    q, k, v = (t.requires_grad_() for t in qkv(torch.float64))
    tau = torch.tensor([0.02, 0.2, 0.45], dtype=torch.float64, requires_grad=True)
    mask = random_mask() if masked else None
    with torch.no_grad():  # no probability near a kink: tau itself, or twice tau for the largest under cap
        probs = attention_record(q, k, v, 0.0, attn_mask=mask).probs
        cut = tau[:, None, None]
        assert (probs - cut).abs().min() > 1e-4 and (probs.amax(-1, keepdim=True) - 2 * cut).abs().min() > 1e-4
        top = probs.topk(2).values
        alive = top[..., 0] > 0
        assert (top[..., 0] - top[..., 1])[alive].min() > 1e-4

    def f(q, k, v, tau):
        return thresholded_attention(q, k, v, tau, empty_rows=mode, attn_mask=mask)

    assert torch.autograd.gradcheck(f, (q, k, v, tau))


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_spreads_as_in_sdpa(mode, which):
    tensors = dict(zip("qkv", qkv()))
    tensors[which][0, 1, 2, 3] = math.nan
    expected = F.scaled_dot_product_attention(tensors["q"], tensors["k"], tensors["v"])
    for tau in (0.0, 0.1):
        out = thresholded_attention(tensors["q"], tensors["k"], tensors["v"], tau, empty_rows=mode)
        assert torch.equal(out.isnan(), expected.isnan())
    assert 0 < int(expected.isnan().sum()) < expected.numel()


# --- compilers and transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_compile(mode):
    torch.compiler.reset()
    q, k, v = qkv()
    threshold = FixedThreshold([0.05, 0.1, 0.3])

    def f(q, k, v, mask):
        return thresholded_attention(q, k, v, threshold, empty_rows=mode, attn_mask=mask)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, random_mask()), f(q, k, v, random_mask()))
    grads = []
    for function in (f, compiled):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        grads.append(torch.autograd.grad(function(*leaves, random_mask()).square().sum(), leaves))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_what_is_compiled_takes_the_fast_backend(backend):
    """Until PyTorch 2.12, torch.compiler.is_exporting() is true whenever Dynamo traces."""
    q, k, v = torch.randn(3, 1, 2, 140, 8).unbind(0)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: thresholded_attention(*x, 0.02, backend=backend), backend=keep, fullgraph=True)
    assert torch.equal(compiled(q, k, v), thresholded_attention(q, k, v, 0.02, backend="tiled"))
    assert any("svit.tiled_attention" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("threshold", [0.1, FixedThreshold(0.1), RelativeThreshold(0.7), LearnableThreshold(0.1)])
def test_export(threshold):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.threshold = threshold

        def forward(self, q, k, v, mask):
            return thresholded_attention(q, k, v, self.threshold, attn_mask=mask)

    mask = torch.rand(B, H, N, M) > 0.3
    mask[..., 0] = True
    inputs = (*qkv(), mask)
    program = torch.export.export(Wrapped(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Wrapped()(*inputs))


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_functional_transforms(mode):
    q, k, v = qkv(torch.float64)

    def f(q, k, v):
        return thresholded_attention(q, k, v, 0.2, empty_rows=mode, is_causal=True)

    stacked = [torch.stack([t, 0.5 * t]) for t in (q, k, v)]
    mapped = torch.func.vmap(f)(*stacked)
    torch.testing.assert_close(mapped, torch.stack([f(*(s[i] for s in stacked)) for i in range(2)]))
    grad = torch.func.grad(lambda q: f(q, k, v).square().sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(f(leaf, k, v).square().sum(), leaf)[0])


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [-0.01, -1e-9, 1.0, 1.5, math.nan, math.inf])
def test_tau_out_of_range(tau):
    q, k, v = qkv()
    message = re.escape("threshold must lie in [0, 1), got")
    for call in (
        lambda: thresholded_attention(q, k, v, tau),
        lambda: thresholded_softmax(torch.randn(3, 4), tau),
        lambda: thresholded_attention(q, k, v, torch.tensor(tau)),
        lambda: thresholded_attention(q, k, v, torch.tensor([0.1, tau, 0.1])),
        lambda: FixedThreshold(tau),
        lambda: FixedThreshold([0.1, tau]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


BAD_CALLS = {
    "rank of q": (lambda q, k, v: thresholded_attention(q[0], k, v), r"rank 4, \[B, H, N, D\].*q \(3, 5, 4\)"),
    "heads": (lambda q, k, v: thresholded_attention(q, k[:, :2], v), r"agree in batch and number of heads.*\(2, 2,"),
    "batch": (lambda q, k, v: thresholded_attention(q[:1], k, v), "agree in batch and number of heads"),
    "width": (lambda q, k, v: thresholded_attention(q[..., :3], k, v), "q and k must agree in D"),
    "keys": (lambda q, k, v: thresholded_attention(q, k, v[:, :, :3]), "k and v in the number of keys"),
    "mask shape": (
        lambda q, k, v: thresholded_attention(q, k, v, attn_mask=torch.ones(M, N, dtype=torch.bool)),
        r"attn_mask of shape \(7, 5\) does not broadcast to \[B, H, N, M\] = \(2, 3, 5, 7\)",
    ),
    "mask rank": (
        lambda q, k, v: thresholded_attention(q, k, v, attn_mask=torch.ones(1, B, H, N, M)),
        "attn_mask of shape .* does not broadcast",
    ),
    "mask and causal": (
        lambda q, k, v: thresholded_attention(q, k, v, attn_mask=random_mask(), is_causal=True),
        "attn_mask and is_causal exclude each other",
    ),
    "empty_rows": (
        lambda q, k, v: thresholded_attention(q, k, v, empty_rows="uniform"),
        "empty_rows must be one of 'zero', 'dense', 'top1', 'cap', got 'uniform'",
    ),
    "empty_rows of the softmax": (
        lambda q, k, v: thresholded_softmax(q, empty_rows="none"),
        "empty_rows must be one of .*, got 'none'",
    ),
    "backend": (
        lambda q, k, v: thresholded_attention(q, k, v, backend="magic"),
        "backend must be 'auto' or one of .*'reference'.*, got 'magic'",
    ),
    "dropout": (lambda q, k, v: thresholded_attention(q, k, v, dropout_p=1.5), r"dropout_p must lie in \[0, 1\]"),
    "threshold heads": (
        lambda q, k, v: thresholded_attention(q, k, v, torch.full((4,), 0.1)),
        "threshold has 4 entries, but the scores have 3 heads",
    ),
    "threshold object heads": (
        lambda q, k, v: thresholded_attention(q, k, v, FixedThreshold([0.1, 0.2])),
        "threshold has 2 entries, but the scores have 3 heads",
    ),
    "threshold rank": (
        lambda q, k, v: thresholded_attention(q, k, v, torch.full((3, 1), 0.1)),
        r"threshold must be a number or a tensor \[H\], got shape \(3, 1\)",
    ),
    "threshold type": (
        lambda q, k, v: thresholded_attention(q, k, v, "0.01"),
        r"threshold must be a number, a tensor \[H\] or a threshold object, got '0.01'",
    ),
    "threshold bool": (lambda q, k, v: thresholded_attention(q, k, v, True), "threshold must be a number.*got True"),
    "fixed rank": (lambda q, k, v: FixedThreshold(torch.ones(2, 2) / 9), r"tau must be a number or have shape \[H\]"),
    "fixed type": (lambda q, k, v: FixedThreshold("0.1"), r"tau must be a number or have shape \[H\], got '0.1'"),
    "relative": (
        lambda q, k, v: thresholded_attention(q, k, v, RelativeThreshold(7.0)),
        r"RelativeThreshold\(alpha=7.0\) gives tau = 1 for a query with 7 keys; tau must stay below 1",
    ),
    "relative, masked": (
        lambda q, k, v: thresholded_attention(
            q, k, v, RelativeThreshold(2.5), attn_mask=torch.tensor([True] * 2 + [False] * 5)
        ),
        r"gives tau = 1.25 for a query with 2 keys",
    ),
    "alpha": (lambda q, k, v: RelativeThreshold(-1.0), "alpha must be a finite number >= 0, got -1.0"),
    "alpha nan": (lambda q, k, v: RelativeThreshold(math.nan), "alpha must be a finite number >= 0, got nan"),
    "init": (lambda q, k, v: LearnableThreshold(0.0), r"init must lie in \(0, 1\), got 0.0"),
    "per": (
        lambda q, k, v: LearnableThreshold(0.1, per="token"),
        "per must be 'model', 'layer' or 'head', got 'token'",
    ),
    "set_warmup": (
        lambda q, k, v: FixedThreshold(0.1).set_warmup(1.1),
        r"warm-up factor of tau must lie in \[0, 1\], got 1.1",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_says_what_is_allowed(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(*qkv())


def test_backends_are_those_accepted():
    q, k, v = qkv()
    assert "reference" in backends()
    expected = thresholded_attention(q, k, v, 0.1)
    for name in (*backends(), "auto"):
        torch.testing.assert_close(thresholded_attention(q, k, v, 0.1, backend=name), expected, atol=1e-5, rtol=0)
