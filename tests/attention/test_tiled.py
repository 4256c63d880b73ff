"""The tiled CPU backend against the reference: outputs, every gradient, statistics, and what it refuses."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svit_utils.attention import (
    EMPTY_ROWS,
    AttentionRows,
    RelativeThreshold,
    attention_record,
    attention_rows,
    backend_for,
    thresholded_attention,
)
from svit_utils.attention.backends import tiled, tiles
from svit_utils.attention.call import Call

MASKS = ("none", "boolean", "additive", "causal")
TAUS = ("zero", "tiny", "usual", "half", "around the largest", "per head", "per query")


@contextlib.contextmanager
def tile_of(floats: int):
    """Small tiles, so that small inputs are cut into many; the first tile also holds several heads."""
    before, tiles.TILE = tiles.TILE, floats
    try:
        yield
    finally:
        tiles.TILE = before


@contextlib.contextmanager
def poisoned_memory(monkeypatch):
    """Uninitialised memory is filled with NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def inputs(shape, seed, dtype=torch.float64, strided=False):
    b, h, n, m, d, dv = shape
    g = torch.Generator().manual_seed(seed)

    def draw(rows, width, spread=1.0):
        x = torch.randn(b, h, rows, width, generator=g, dtype=torch.float64) * spread
        if strided:  # as the projection of a Vision Transformer hands them over: [B, N, H, D], heads moved forward
            x = x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
        return x.to(dtype).requires_grad_()

    return draw(n, d, 2.5), draw(m, d), draw(m, dv)


def masking(kind, shape, seed) -> dict[str, Any]:
    b, _, n, m, _, _ = shape
    g = torch.Generator().manual_seed(seed)
    if kind == "causal":
        return {"is_causal": True}
    if kind == "none":
        return {}
    keep = torch.rand(b, 1, n, m, generator=g) > 0.4
    keep[:, :, n // 2] = False  # a query with no key
    if kind == "boolean":
        return {"attn_mask": keep}
    return {"attn_mask": torch.where(keep, torch.randn(n, m, generator=g, dtype=torch.float64), -torch.inf)}


def threshold(kind, q, k, v, mask) -> Any:
    if kind == "around the largest":
        probs = attention_record(q, k, v, 0.0, **mask).probs
        largest = probs.amax(dim=(0, 2, 3)).detach()  # one per head
        return (largest * torch.tensor([0.999, 1.001, 0.9])[: len(largest)]).clamp(max=0.99).requires_grad_()
    if kind == "per head":
        return torch.tensor([0.05, 0.3, 0.12], dtype=q.dtype)[: q.shape[1]].requires_grad_()
    if kind == "per query":
        return RelativeThreshold(0.9)
    tau = {"zero": 0.0, "tiny": 1e-6, "usual": 0.1, "half": 0.5}[kind]
    return torch.tensor(tau, dtype=q.dtype, requires_grad=True)


def derivatives(q, k, v, tau, seed=0, **settings):
    out = thresholded_attention(q, k, v, tau, **settings)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    of = (q, k, v, tau) if isinstance(tau, torch.Tensor) else (q, k, v)
    return out.detach(), *torch.autograd.grad(out, of, direction)


@settings(max_examples=250)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 3, 23, 23, 7, 5))),
    mask=st.sampled_from(MASKS),
    tau=st.sampled_from(TAUS),
    mode=st.sampled_from(EMPTY_ROWS),
    floats=st.sampled_from([1, 40, 500, 2**17]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_agrees_with_the_reference(shape, mask, tau, mode, floats, strided, seed):
    q, k, v = inputs(shape, seed, strided=strided)
    masked = masking(mask, shape, seed)
    tau = threshold(tau, q, k, v, masked)
    wanted = derivatives(q, k, v, tau, empty_rows=mode, backend="reference", **masked)
    with tile_of(floats):
        got = derivatives(q, k, v, tau, empty_rows=mode, backend="tiled", **masked)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dtau"), got, wanted, strict=False):
        # Where a row barely keeps a key, gradients are as large as 1 / Z, and rounding with them.
        scale = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_the_examples_are_of_every_kind():
    """The strategy above meets partly cut, whole, empty and keyless rows, or it would show little."""
    seen = {"partly cut": 0, "whole": 0, "empty": 0, "keyless": 0, "all": 0}
    for seed in range(40):
        shape = (2, 3, 9, 11, 4, 3)
        q, k, v = inputs(shape, seed)
        for mask in MASKS:
            masked = masking(mask, shape, seed)
            rows = AttentionRows.from_record(attention_record(q, k, v, 0.1, **masked))
            seen["all"] += rows.kept.numel()
            seen["keyless"] += int((rows.keys == 0).sum())
            seen["empty"] += int(((rows.keys > 0) & (rows.kept == 0)).sum())
            seen["whole"] += int(((rows.keys > 0) & (rows.kept == rows.keys)).sum())
            seen["partly cut"] += int(((rows.kept > 0) & (rows.kept < rows.keys)).sum())
    shares = {name: count / seen["all"] for name, count in seen.items()}
    assert shares["partly cut"] > 0.5
    assert min(shares["whole"], shares["keyless"]) > 0.01
    q, k, v = inputs(shape, 0)
    assert (AttentionRows.from_record(attention_record(q, k, v, 0.5)).kept == 0).float().mean() > 0.1


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives_by_differences(mode, masked):
    q, k, v = inputs((1, 2, 5, 6, 3, 2), seed=4)
    tau = torch.tensor([0.08, 0.2], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 1]] * 4 + [[0] * 6], dtype=torch.bool) if masked else None

    def f(q, k, v, tau):
        return thresholded_attention(q, k, v, tau, attn_mask=mask, empty_rows=mode, backend="tiled")

    with tile_of(12):
        assert torch.autograd.gradcheck(f, (q, k, v, tau))
        assert torch.autograd.gradgradcheck(f, (q, k, v, tau))


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "boolean"])
def test_opcheck(mode, dtype, mask):
    q, k, v = (x.detach() for x in inputs((2, 2, 5, 7, 4, 3), seed=1, dtype=dtype))
    tau, seed = torch.tensor([[[0.1]], [[0.3]]]), torch.tensor(3)
    allowed = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.3 if mask else None
    for statistics in (False, True):
        arguments = (q, k, v, tau, allowed, 0.5, False, 0.2, seed, mode, statistics)
        torch.library.opcheck(tiled.tiled_attention, arguments)
    out, rows, more = tiled.tiled_attention(*arguments)
    torch.library.opcheck(tiled.tiled_attention_backward, (torch.ones_like(out), out, rows, more, *arguments[:-1]))


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("tau", [0.004, 0.03])
def test_no_less_exact_than_the_reference(mode, tau):
    """The error against float64, of float32 inputs, is at most twice that of the reference in float32."""
    wide = inputs((2, 3, 150, 150, 32, 32), seed=2)
    narrow = [x.detach().float().requires_grad_() for x in wide]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    t = torch.tensor(tau, requires_grad=True)
    exact = derivatives(*wide, t.detach().double().requires_grad_(), empty_rows=mode, backend="reference")
    plain = derivatives(*narrow, t, empty_rows=mode, backend="reference")
    fast = derivatives(*narrow, t, empty_rows=mode, backend="tiled")
    for name, e, p, f in zip(("out", "dq", "dk", "dv", "dtau"), exact, plain, fast, strict=True):
        # dtau is a single number, whose error can be 0 by luck: it is judged against its size
        floor = 1e-6 * float(e.abs().max())
        assert float((f - e).abs().max()) <= 2 * float((p - e).abs().max()) + floor, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cuts_in_float32(dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs((1, 2, 40, 40, 8, 8), seed=3))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    got = derivatives(q, k, v, 0.02, backend="tiled")
    wanted = derivatives(*wide, 0.02, backend="tiled")
    assert all(x.dtype == dtype for x in got)
    torch.testing.assert_close(got[0], wanted[0].to(dtype), rtol=0, atol=0)
    with torch.autocast("cpu", dtype):
        assert torch.equal(thresholded_attention(q, k, v, 0.02, backend="tiled"), got[0])
        assert torch.equal(thresholded_attention(*wide, 0.02, backend="tiled"), wanted[0])


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_number_is_written(mode, mask, monkeypatch):
    """With uninitialised memory filled with NaN nothing changes."""
    shape = (2, 2, 9, 9, 4, 3)
    q, k, v = inputs(shape, seed=5)
    masked = masking(mask, shape, 5)
    with tile_of(30):
        wanted = derivatives(q, k, v, 0.1, empty_rows=mode, backend="tiled", **masked)
        with poisoned_memory(monkeypatch):
            got = derivatives(q, k, v, 0.1, empty_rows=mode, backend="tiled", **masked)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (1, 1)])
def test_nothing_to_attend_to_or_with(n, m):
    q, k, v = inputs((2, 3, n, m, 4, 3), seed=0)
    got = derivatives(q, k, v, 0.1, backend="tiled")
    wanted = derivatives(q, k, v, 0.1, backend="reference") if m else [torch.zeros_like(x) for x in got]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_nan_spreads_as_in_the_reference(mode, which):
    tensors = inputs((1, 2, 6, 6, 4, 3), seed=6)
    with torch.no_grad():
        tensors[which][0, 1, 2, 0] = float("nan")
    got, wanted = (thresholded_attention(*tensors, 0.1, empty_rows=mode, backend=b) for b in ("tiled", "reference"))
    assert torch.equal(got.isnan(), wanted.isnan())
    assert got.isnan().any()
    assert not got.isnan().all()


def test_dropout_drops_the_same_weights_forward_and_backward():
    q, k, _ = inputs((2, 2, 12, 12, 4, 3), seed=7)
    v = torch.eye(12, dtype=torch.float64).expand(2, 2, 12, 12).clone().requires_grad_()  # out is the weights
    weights = attention_record(q, k, v, 0.05).weights
    with tile_of(40):
        torch.manual_seed(0)
        out = thresholded_attention(q, k, v, 0.05, dropout_p=0.25, backend="tiled")
        (dv,) = torch.autograd.grad(out, v, torch.eye(12, dtype=torch.float64).expand_as(out), retain_graph=True)
        torch.manual_seed(0)
        again = thresholded_attention(q, k, v, 0.05, dropout_p=0.25, backend="tiled")
        other = thresholded_attention(q, k, v, 0.05, dropout_p=0.25, backend="tiled")
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    torch.testing.assert_close(dv, out.detach().transpose(-2, -1))
    kept = out != 0
    torch.testing.assert_close(out[kept], (weights / 0.75)[kept])
    assert 0.15 < 1 - kept.sum() / (weights != 0).sum() < 0.35
    # q's gradient is that of the weights with this very mask
    mask = kept.double() / 0.75
    with tile_of(40):  # the draws follow the tiles
        (dq,) = torch.autograd.grad(out.square().sum(), q)
    (wanted,) = torch.autograd.grad((weights * mask).square().sum(), q)
    torch.testing.assert_close(dq, wanted)
    with torch.no_grad():
        assert (thresholded_attention(q, k, v, 0.05, dropout_p=1.0, backend="tiled") == 0).all()


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tau", ["usual", "half", "per head", "per query"])
def test_statistics_are_those_of_the_map(mode, mask, tau):
    shape = (2, 3, 11, 11, 4, 3)
    q, k, v = inputs(shape, seed=8)
    masked = masking(mask, shape, 8)
    tau = threshold(tau, q, k, v, masked)
    wanted = AttentionRows.from_record(attention_record(q, k, v, tau, empty_rows=mode, **masked))
    with tile_of(50):
        out, rows = attention_rows(q, k, v, tau, empty_rows=mode, backend="tiled", **masked)
        assert torch.equal(out, thresholded_attention(q, k, v, tau, empty_rows=mode, backend="tiled", **masked))
    assert torch.equal(rows.valid, wanted.valid)
    for field in fields(AttentionRows):
        got, want = (getattr(x, field.name)[wanted.valid] for x in (rows, wanted))
        torch.testing.assert_close(got, want, msg=lambda m, name=field.name: f"{name}: {m}")
    out.sum().backward()  # the output of a watched call can still be trained on
    assert q.grad is not None


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_function_transforms(mode):
    q, k, v = (x.detach() for x in inputs((3, 2, 5, 5, 3, 3), seed=9))
    tau = torch.tensor(0.15, dtype=torch.float64)

    def loss(q, k, v, tau, backend):
        return thresholded_attention(q, k, v, tau, empty_rows=mode, backend=backend).square().sum()

    def single(q, k, v, tau, backend):
        return loss(q[None], k[None], v[None], tau, backend)

    for transform in (
        lambda b: torch.func.grad(loss, (0, 1, 2, 3))(q, k, v, tau, b),
        lambda b: torch.func.vmap(torch.func.grad(lambda *x: single(*x, tau, b), (0, 1, 2)))(q, k, v),
        lambda b: torch.func.vmap(lambda x: single(x, k[0], v[0], tau, b))(q),
        lambda b: torch.func.grad(lambda x: torch.func.vmap(lambda y: single(y, k[0], v[0], tau, b))(x).sum())(q),
        lambda b: torch.func.jacrev(torch.func.jacrev(lambda x: single(x, k[0], v[0], tau, b)))(q[0]),
        lambda b: torch.func.hessian(lambda x: single(x, k[0], v[0], tau, "auto"))(q[0]),
    ):
        for a, b in zip(transform("tiled"), transform("reference"), strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_with_dropout_are_refused():
    q, k, v = inputs((1, 1, 4, 4, 3, 3), seed=0)
    out = thresholded_attention(q, k, v, 0.1, dropout_p=0.5, backend="tiled")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="dropout_p=0 or backend='reference'"):
        dq.sum().backward()


def test_compiles_as_one_graph():
    q, k, v = inputs((1, 2, 20, 20, 4, 4), seed=1, dtype=torch.float32)
    tau = torch.tensor([0.02, 0.05], requires_grad=True)
    compiled = torch.compile(
        lambda q, k, v, tau: thresholded_attention(q, k, v, tau, backend="tiled"), fullgraph=True, backend="aot_eager"
    )
    out = compiled(q, k, v, tau)
    wanted = derivatives(q, k, v, tau, backend="tiled")
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    for a, b in zip((out, *torch.autograd.grad(out, (q, k, v, tau), direction)), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "grad", "chosen"),
    [
        ((1, 1, 128), False, "tiled"),
        ((1, 1, 127), False, "reference"),
        ((16, 2, 64), False, "tiled"),  # 2 ** 17 scores
        ((15, 2, 64), False, "reference"),
        ((1000, 2, 63), False, "reference"),
        ((16, 2, 96), True, "tiled"),
        ((16, 2, 64), True, "reference"),
        ((14, 2, 96), True, "reference"),  # fewer than 2 ** 18
        ((128, 2, 64), True, "tiled"),  # 2 ** 20
        ((127, 2, 64), True, "reference"),
        ((14, 2, 96), False, "tiled"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(shape, grad, chosen):
    q = torch.zeros(*shape, 4, requires_grad=grad)
    assert backend_for(q, q, q) == chosen
    with torch.no_grad():
        assert backend_for(q, q, q) == chosen or grad


def test_no_allocation_is_larger_than_a_tile_and_several_pairs_share_a_smaller_one():
    q = torch.zeros(64, 64, 8)
    call = Call(torch.tensor(0.01), 1.0)
    for n, most in ((64, tiles.SEVERAL), (2048, tiles.TILE)):
        q = torch.zeros(8, 16, n, 8)
        for backward in (False, True):
            problem = tiles.Problem.fold(q, q, q, call, 0, for_backward=backward)
            shapes = [tile.shape for tile in problem.tiles()]
            assert max(g * rows * m for g, rows, m in shapes) <= most * torch.get_num_threads()
            assert sum(g * rows for g, rows, _ in shapes) == 8 * 16 * n


def test_auto_takes_what_the_call_needs():
    q, k, v = inputs((1, 1, 128, 128, 4, 4), seed=0, dtype=torch.float32)
    small = inputs((1, 1, 16, 16, 4, 4), seed=0, dtype=torch.float32)
    mask = torch.zeros(128, 128)
    assert backend_for(q, k, v) == "tiled"
    assert backend_for(q, k, v, attn_mask=mask) == "tiled"
    assert backend_for(*small) == "reference"
    assert backend_for(q, k, v, return_weights=True) == "reference"
    assert backend_for(q, k, v, attn_mask=mask.clone().requires_grad_()) == "reference"
    assert backend_for(*(x.to("meta") for x in (q, k, v))) == "reference"
    with torch.autograd.forward_ad.dual_level():
        assert backend_for(q, k, v) == "reference"
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        out = thresholded_attention(dual, k, v, 0.01)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    grad_mask = mask.clone().requires_grad_()
    thresholded_attention(q, k, v, 0.01, attn_mask=grad_mask).square().sum().backward()
    assert grad_mask.grad.abs().sum() > 0
    out, weights = thresholded_attention(q, k, v, 0.01, return_weights=True)
    torch.testing.assert_close(out, weights @ v)


def test_a_forced_backend_says_what_it_cannot_do():
    q, k, v = inputs((1, 1, 4, 4, 3, 3), seed=0)
    with pytest.raises(ValueError, match="backend 'tiled' never holds the weights: use backend='auto' or 'reference'"):
        thresholded_attention(q, k, v, 0.1, return_weights=True, backend="tiled")
    with pytest.raises(ValueError, match="no gradient for attn_mask: use backend='auto' or 'reference'"):
        thresholded_attention(q, k, v, 0.1, attn_mask=torch.zeros(4, 4, requires_grad=True), backend="tiled")
