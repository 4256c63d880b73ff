"""Corners of the operator and its modules that users of attention libraries have met.

Situations: NaN and empty inputs as `scaled_dot_product_attention` takes them, masks of the wrong type, tensors on two
devices, `torch.jit.trace`, models built on the meta device, blocks used more than once, gradient checkpointing, and
timm's ``attn_layer``.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils import FixedThreshold, LearnableThreshold, RelativeThreshold, TokenSparsityTracker, sparsify
from svit_utils.attention import (
    EMPTY_ROWS,
    SparseAttention,
    attention_record,
    densify,
    sparse_modules,
    thresholded_attention,
)

BACKENDS = ["reference", "tiled"]
try:
    import triton  # noqa: F401

    BACKENDS.append("triton")
except ImportError:
    pass
SHAPES = {  # B, H, N, M, D, Dv
    "no batch": (0, 2, 4, 5, 8, 3),
    "no heads": (1, 0, 4, 5, 8, 3),
    "no queries": (1, 2, 0, 5, 8, 3),
    "no keys": (1, 2, 4, 0, 8, 3),
    "no head size": (1, 2, 4, 5, 0, 3),
    "no value size": (1, 2, 4, 5, 8, 0),
}


def qkv(*shape: int, seed: int = 0, grad: bool = False) -> list[Tensor]:
    b, h, n, m, d, dv = shape
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(b, h, rows, width, generator=g).requires_grad_(grad) for rows, width in ((n, d), (m, d), (m, dv))
    ]


def small_vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=4, **changes
    ).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 20
    return model


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("n", [1, 2, 4, 20, 33])
def test_nan_stays_in_the_rows_it_is_in(backend: str, mode: str, n: int) -> None:
    q, k, v = qkv(1, 2, n, n, 8, 8)
    clean = thresholded_attention(q, k, v, 0.05, empty_rows=mode, backend=backend)
    q[0, 0, 0] = torch.nan
    out = thresholded_attention(q, k, v, 0.05, empty_rows=mode, backend=backend)
    assert out[0, 0, 0].isnan().all()
    assert torch.equal(out[0, 1], clean[0, 1]) and torch.equal(out[0, 0, 1:], clean[0, 0, 1:])
    assert thresholded_attention(q, k, v, 0.05, empty_rows=mode, backend=backend, scale=float("nan")).isnan().all()
    k[0, 1, 0] = torch.nan
    assert thresholded_attention(q, k, v, 0.05, empty_rows=mode, backend=backend)[0, 1].isnan().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_size_of_zero_is_taken_as_sdpa_takes_it(backend: str, mode: str, shape: str) -> None:
    q, k, v = tensors = qkv(*SHAPES[shape], grad=True)
    out = thresholded_attention(q, k, v, 0.01, empty_rows=mode, backend=backend)
    assert out.shape == F.scaled_dot_product_attention(q, k, v).shape
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape and x.grad.isfinite().all() for x in tensors)
    if shape == "no keys":
        assert (out == 0).all()
    if shape == "no head size":  # all scores are 0: the plain softmax is uniform, and 1/5 exceeds tau
        torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32, torch.complex64])
def test_a_mask_is_boolean_or_floating_point(backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 2, 4, 4, 8, 8)
    with pytest.raises(ValueError, match=r"attn_mask must be boolean \(True = may attend\) or floating-point, got"):
        thresholded_attention(q, k, v, 0.01, attn_mask=torch.ones(4, 4).to(dtype), backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_only_floating_point_tensors_are_attended_with(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(1, 2, 4, 4, 8, 8))
    with pytest.raises(ValueError, match="q, k and v must be floating-point tensors"):
        thresholded_attention(q, k, v, 0.01, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("which", ["q", "k", "v", "mask"])
def test_tensors_on_two_devices_are_refused(backend: str, which: str) -> None:
    tensors = dict(zip("qkv", qkv(1, 2, 4, 4, 8, 8)), mask=torch.ones(4, 4, dtype=torch.bool))
    tensors[which] = tensors[which].to("meta")
    mask = tensors.pop("mask")
    with pytest.raises(ValueError, match=r"on one device|attn_mask is on meta"):
        thresholded_attention(*tensors.values(), 0.01, attn_mask=mask, backend=backend)


def test_fuzz_against_the_formula_in_float64() -> None:
    """A seeded sample of shapes, masks, modes, thresholds and scales: no wrong number, and every kind of case met."""
    g = torch.Generator().manual_seed(0)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    met: Counter[str] = Counter()
    for case in range(400):
        n, m, mode = draw(1, 2, 5, 17, 40), draw(1, 3, 5, 19, 41), draw(*EMPTY_ROWS)
        b, h, d, dv = draw(1, 2), draw(1, 3), draw(1, 4, 7), draw(1, 3, 8)
        q, k, v = qkv(b, h, n, m, d, dv, seed=case)
        q = q * draw(0.0, 0.3, 1.0, 6.0)
        options: dict = {"scale": draw(None, 0.0, 1.0, -2.0)}
        kind = draw("none", "none", "boolean", "additive", "causal")
        if kind == "causal":
            options["is_causal"] = True
        elif kind != "none":
            allowed = torch.rand(draw(1, b), draw(1, h), n, m, generator=g) > 0.3
            options["attn_mask"] = allowed if kind == "boolean" else torch.where(allowed, 0.5, -torch.inf)
        tau = draw(0.0, 0.01, 0.04, 0.2, 0.9, torch.linspace(0.02, 0.3, h), RelativeThreshold(0.9))
        met.update([mode, kind])
        wide = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}
        record = attention_record(q.double(), k.double(), v.double(), tau, empty_rows=mode, **wide)
        # In float32 a p within rounding of tau may fall on the other side, and a small Z enlarges every rounding error.
        z = (record.probs - record.tau).relu().sum(-1)
        clear = ((record.probs - record.tau).abs() > 1e-5).all(-1) & ((z == 0) | (z > 0.02))
        met["clear rows"] += int(clear.sum())
        for backend in ("reference", "tiled"):
            exact = thresholded_attention(
                q.double(), k.double(), v.double(), tau, empty_rows=mode, backend=backend, **wide
            )
            assert torch.allclose(exact, record.out, atol=1e-9), (case, backend)
            out = thresholded_attention(q, k, v, tau, empty_rows=mode, backend=backend, **options)
            assert torch.allclose(out[clear].double(), record.out[clear], atol=2e-4), (case, backend)
            assert out.isfinite().all() and out.dtype == torch.float32, (case, backend)
    assert met["clear rows"] > 5000
    assert min(met[kind] for kind in (*EMPTY_ROWS, "none", "boolean", "additive", "causal")) > 40


@pytest.mark.parametrize(
    "threshold",
    [0.03, FixedThreshold([0.02, 0.05, 0.1]), RelativeThreshold(1.5), LearnableThreshold(0.05, per="head")],
    ids=["number", "per head", "relative", "learnable"],
)
def test_built_on_the_meta_device_and_emptied_tau_is_what_was_asked_for(threshold) -> None:
    weights = small_vit().state_dict()
    expected = small_vit()
    sparsify(expected, threshold)
    with torch.device("meta"):
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=4).eval()
        sparsify(model, threshold)
    model.to_empty(device="cpu")
    for module in sparse_modules(model).values():
        module.threshold.set_warmup(1.0)
    model.load_state_dict(weights, strict=not isinstance(threshold, LearnableThreshold))
    assert torch.equal(model(X), expected(X))


def test_traced_it_is_made_of_operators_that_exist_everywhere() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=48, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4).eval()
    sparsify(model, 0.006)  # N = 145, where "auto" chooses the tiles
    x, fewer = torch.randn(3, 3, 48, 48), torch.randn(1, 3, 48, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the checks of shapes
        traced = torch.jit.trace(model, x)
    assert not [n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("svit::")]
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(traced(fewer), model(fewer))


def test_timms_attn_layer_takes_the_class_with_settings() -> None:
    model = small_vit(attn_layer=SparseAttention.using(threshold=0.03, empty_rows="cap"))
    by_surgery = small_vit()
    sparsify(by_surgery, 0.03, empty_rows="cap")
    assert torch.equal(model(X), by_surgery(X))
    assert repr(model.blocks[0].attn.threshold) == "FixedThreshold(tau=0.03)"
    named = timm.create_model("vit_tiny_patch16_224", depth=1, attn_layer=SparseAttention.using(threshold=0.02))
    assert next(iter(sparse_modules(named).values())).threshold.tau == 0.02
    assert not sparse_modules(densify(model))


def test_a_block_used_three_times_has_a_row_for_each_place() -> None:
    model = small_vit()
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    sparsify(model, 0.03)
    alone = []
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(X)))
    for _ in range(3):
        with TokenSparsityTracker(model.blocks[0]) as tracker, torch.no_grad():
            tokens = model.blocks[0](tokens)
        alone.append(tracker.table().query("queries == 'all'")["kept_mean"].tolist())
    with TokenSparsityTracker(model) as tracker, torch.no_grad():
        for _ in range(2):
            model(X)
    table = tracker.table().query("queries == 'all'")
    assert table["layer"].unique().tolist() == [f"blocks.{i}.attn" for i in range(3)]
    assert table["kept_mean"].tolist() == pytest.approx(list(itertools.chain(*alone)))


def test_gradient_checkpointing_counts_each_row_once() -> None:
    counts = {}
    for checkpointing in (False, True):
        model = small_vit()
        sparsify(model, 0.03)
        model.set_grad_checkpointing(checkpointing)
        model.train()
        with TokenSparsityTracker(model) as tracker:
            model(X).square().sum().backward()
        counts[checkpointing] = (tracker.summary().rows, tracker.table()["kept_mean"].tolist())
    assert counts[True][0] == counts[False][0] == 3 * 3 * 2 * 17
    assert counts[True][1] == pytest.approx(counts[False][1])
