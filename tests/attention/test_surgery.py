"""Choosing layers, undoing, nesting, casting, and thresholds that learn."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn

from svit_utils.attention import (
    FixedThreshold,
    LearnableThreshold,
    RelativeThreshold,
    SparseAttention,
    TokenSparsityTracker,
    attention_record,
    densify,
    learnable_thresholds,
    sparse_modules,
    sparsified,
    sparsify,
)

NAMES = [f"blocks.{i}.attn" for i in range(4)]


def vit(**arguments: Any) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**{**settings, **arguments}).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:48] *= 14.0
    return model


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def taus(model: nn.Module) -> dict[str, Any]:
    return {name: pytest.approx(float(m.threshold.tau)) for name, m in sparse_modules(model).items()}


# --- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, chosen",
    [
        (None, [0, 1, 2, 3]),
        ([0], [0]),
        ([-1], [3]),
        ([1, -1], [1, 3]),
        (range(2), [0, 1]),
        (["blocks.2"], [2]),
        (["blocks.2.attn", 0], [0, 2]),
        ((i for i in (3, 3)), [3]),
        ([], []),
    ],
)
def test_choice_of_layers(layers, chosen):
    model = vit()
    report = sparsify(model, 0.05, layers=layers)
    assert list(report.converted) == [NAMES[i] for i in chosen] == list(sparse_modules(model))
    assert report.left == {NAMES[i]: "not among the chosen layers" for i in range(4) if i not in chosen}
    assert [type(b.attn) for b in model.blocks] == [SparseAttention if i in chosen else Attention for i in range(4)]


def test_a_threshold_per_layer():
    model = vit()
    report = sparsify(model, {0: 0.05, -1: RelativeThreshold(2.0), "blocks.1": torch.tensor([0.1, 0.2, 0.3])})
    assert report.converted == (NAMES[0], NAMES[1], NAMES[3])
    assert report.left == {NAMES[2]: "not named in the threshold dict"}
    assert model.blocks[0].attn.threshold.tau == 0.05
    assert model.blocks[3].attn.threshold.alpha == 2.0
    torch.testing.assert_close(model.blocks[1].attn.threshold.tau, torch.tensor([0.1, 0.2, 0.3]))
    report = sparsify(model, {0: 0.01, 1: 0.02}, layers=[1])
    assert model.blocks[0].attn.threshold.tau == 0.05 and model.blocks[1].attn.threshold.tau == 0.02
    assert "unchanged" in {layer.name: layer for layer in report.layers}[NAMES[0]].detail


def test_sparsify_again_gives_new_settings():
    model = vit()
    sparsify(model, 0.05)
    sparsify(model, 0.1, empty_rows="cap", backend="reference")
    for module in sparse_modules(model).values():
        assert (module.threshold.tau, module.empty_rows, module.backend) == (0.1, "cap", "reference")
    assert all(type(b.attn) is Attention for b in densify(model).blocks)


def test_each_layer_gets_its_own_fixed_threshold():
    model, threshold = vit(), FixedThreshold(0.05)
    sparsify(model, threshold)
    model.blocks[0].attn.threshold.set_warmup(0.0)
    assert taus(model) == {NAMES[0]: 0.0, **dict.fromkeys(NAMES[1:], 0.05)}
    assert threshold.tau == 0.05


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": [4]}, r"unknown layer 4: allowed are 0 to 3 or one of blocks\.0\.attn, .*blocks\.3\.attn"),
        ({"layers": [-5]}, "unknown layer -5"),
        ({"layers": ["blocks.9"]}, "unknown layer 'blocks.9'"),
        ({"layers": [True]}, "unknown layer True"),
        ({"layers": "blocks.0"}, r"layers must be a list .* got 'blocks.0'; write \['blocks.0'\]"),
        ({"layers": 3}, "layers must be a list"),
        ({"threshold": {7: 0.1}}, "unknown layer 7"),
        ({"threshold": {0: 0.1}, "layers": [0, 1]}, r"the threshold dict gives no value for blocks\.1\.attn"),
        ({"threshold": {0: 0.1, 1: 1.0}}, r"threshold must lie in \[0, 1\), got 1.0"),
        ({"threshold": -0.1}, r"threshold must lie in \[0, 1\), got -0.1"),
        ({"threshold": float("nan")}, r"threshold must lie in \[0, 1\), got nan"),
        ({"threshold": [0.1, 0.2]}, "tau has 2 entries, but the layer has 3 heads"),
        ({"empty_rows": "none"}, "empty_rows must be one of 'zero', 'dense', 'top1', 'cap', got 'none'"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of .*, got 'cuda'"),
    ],
)
def test_bad_settings_leave_the_model_as_it_was(arguments, message):
    for prepare in (lambda m: m, lambda m: sparsify(m, 0.05, empty_rows="cap", layers=[2])):
        model = vit()
        prepare(model)
        before = [(type(m), repr(m)) for m in model.modules()]
        for call in (sparsify, lambda m, **kw: sparsified(m, **kw).__enter__()):
            with pytest.raises(ValueError, match=message):
                call(model, **arguments)
        assert [(type(m), repr(m)) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("name", "sparse", "dense", "kind"),
    [("crossvit_9_240", 12, 6, "CrossAttention"), ("vit_base_patch16_siglip_224", 12, 1, "AttentionPoolLatent")],
)
def test_a_block_that_holds_attention_is_not_counted_itself(name, sparse, dense, kind):
    with torch.device("meta"):
        report = sparsify(timm.create_model(name))
    assert (len(report.converted), len(report.left)) == (sparse, dense)
    assert {layer.class_name for layer in report.layers if not layer.converted} == {kind}


@pytest.mark.parametrize(
    ("name", "found"),
    [("cait_xxs24_224", {"ClassAttn", "TalkingHeadAttn"}), ("xcit_nano_12_p16_224", {"ClassAttn", "XCA"})],
)
def test_a_refusal_names_the_attention_and_what_is_supported(name, found):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=r"as in ViT, DeiT, DINOv2, .* hybrids such as MobileViT") as error:
        sparsify(model)
    named = str(error.value).partition("its attention is ")[2].partition(";")[0]
    assert {each.rpartition(".")[2] for each in named.split(", ")} == found


def test_report_text():
    model = vit()
    text = str(sparsify(model, {0: 0.05, 1: RelativeThreshold(1.5)}))
    assert text.splitlines() == [
        "2 of 4 attention modules are sparse",
        "  sparse  blocks.0.attn (SparseAttention): FixedThreshold(tau=0.05)",
        "  sparse  blocks.1.attn (SparseAttention): RelativeThreshold(alpha=1.5)",
        "  dense   blocks.2.attn (Attention): not named in the threshold dict",
        "  dense   blocks.3.attn (Attention): not named in the threshold dict",
    ]


# --- nesting and undoing ----------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    return [
        (type(b.attn), *(getattr(b.attn, n, None) for n in ("threshold", "empty_rows", "backend")))
        for b in model.blocks
    ]


def test_sparsified_nests_and_restores():
    model, x = vit(), images()
    dense, classes = model(x), snapshot(model)
    with sparsified(model, 0.05, layers=[0, 1]) as report:
        assert report.converted == (NAMES[0], NAMES[1])
        outer, settings = model(x), snapshot(model)
        with sparsified(model, {1: 0.2, 2: 0.1}, empty_rows="cap"):
            assert taus(model) == {NAMES[0]: 0.05, NAMES[1]: 0.2, NAMES[2]: 0.1}
            assert not torch.equal(model(x), outer)
        assert snapshot(model) == settings and torch.equal(model(x), outer)
        with pytest.raises(RuntimeError, match="inside"), sparsified(model, 0.3):
            raise RuntimeError("inside")
        assert snapshot(model) == settings and torch.equal(model(x), outer)
        with sparsified(model, 0.3):
            densify(model)
        assert snapshot(model) == settings and torch.equal(model(x), outer)
    assert snapshot(model) == classes and torch.equal(model(x), dense)
    assert not torch.equal(outer, dense)
    with pytest.raises(RuntimeError, match="inside"), sparsified(model, 0.3):
        raise RuntimeError("inside")
    assert snapshot(model) == classes and torch.equal(model(x), dense)


def test_densify_leaves_no_trace():
    model = vit()
    before = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    sparsify(model, LearnableThreshold(0.05, per="head"), empty_rows="cap")
    with TokenSparsityTracker(model):
        model(images())
    densify(model)
    assert {name: sorted(m.__dict__) for name, m in model.named_modules()} == before
    assert not learnable_thresholds(model)
    assert densify(model) is model  # a dense model stays as it is


def test_model_built_with_the_sparse_layer():
    model = vit(attn_layer=SparseAttention)
    dense = vit()
    assert list(sparse_modules(model)) == NAMES
    assert all(m.threshold.tau == 0.01 for m in sparse_modules(model).values())
    model.load_state_dict(dense.state_dict(), strict=True)
    sparsify(dense, 0.01)
    assert torch.equal(model(images()), dense(images()))
    densify(model), densify(dense)
    assert [type(b.attn) for b in model.blocks] == [Attention] * 4
    assert torch.equal(model(images()), dense(images()))


def test_hooks_and_gradients_survive():
    model, calls = vit(), []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    parameters = list(model.parameters())
    sparsify(model, 0.05)
    model(images()).sum().backward()
    assert all(a is b for a, b in zip(parameters, model.parameters())) and len(calls) == 1
    densify(model)(images())
    assert len(calls) == 2


# --- dtypes and devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("threshold", [0.0123, RelativeThreshold(0.5), LearnableThreshold(0.0123, per="head")])
def test_casting_the_model_keeps_tau_in_float32(cast, threshold):
    model = vit()
    sparsify(model, threshold)
    before = [m.threshold(17).clone() for m in sparse_modules(model).values()]
    cast(model)
    weight = model.blocks[0].attn.qkv.weight
    assert weight.dtype != torch.float32
    for module, tau in zip(sparse_modules(model).values(), before):
        tensors = [*module.threshold.parameters(), *module.threshold.buffers()]
        assert tensors and all(t.dtype == torch.float32 for t in tensors)
        assert torch.equal(module.threshold(17), tau)
    out = model(images().to(weight.dtype))
    assert out.dtype == weight.dtype and out.isfinite().all()


def test_moving_the_model_moves_tau():
    model = vit()
    sparsify(model, {0: 0.05, 1: RelativeThreshold(0.5), 2: LearnableThreshold(0.05)})
    model.to("meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(images().to("meta")).is_meta
    built_on_meta = vit().to("meta")
    sparsify(built_on_meta, FixedThreshold(0.05))
    assert all(m.threshold.value.is_meta for m in sparse_modules(built_on_meta).values())
    assert built_on_meta(images().to("meta")).shape == (2, 5)


# --- learnable thresholds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("per, objects, numbers", [("model", 1, 1), ("layer", 4, 4), ("head", 4, 12)])
def test_learnable_thresholds_count_and_learn(per, objects, numbers):
    model, x = vit(), images(4)
    dense_parameters = {id(p) for p in model.parameters()}
    given = LearnableThreshold(0.06, per=per)
    sparsify(model, given)
    assert len(learnable_thresholds(model)) == objects
    extra = [p for p in model.parameters() if id(p) not in dense_parameters]
    assert len(extra) == objects and sum(p.numel() for p in extra) == numbers
    assert all(p.dtype == torch.float32 for p in extra)
    assert (given.logit is extra[0]) == (per == "model")
    for threshold in learnable_thresholds(model).values():
        assert threshold.logit.ndim == 1  # FSDP2 refuses parameters without a dimension
        torch.testing.assert_close(threshold.tau, torch.full((3,), 0.06) if per == "head" else torch.tensor(0.06))

    plain = {id(p) for group in param_groups_weight_decay(model, 0.05) if not group["weight_decay"]
             for p in group["params"]}  # fmt: skip
    assert all(id(p) in plain for p in extra)
    optimiser = torch.optim.SGD(param_groups_weight_decay(model, 0.05), lr=0.1)
    before = [p.detach().clone() for p in extra]
    nn.functional.cross_entropy(model.train()(x), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.all() for p in extra)
    optimiser.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, extra))
    densify(model)
    assert {id(p) for p in model.parameters()} == dense_parameters


@pytest.mark.parametrize("per", ["model", "layer", "head"])
@pytest.mark.parametrize("mode", ["zero", "dense", "top1", "cap"])
def test_learnable_gradient_is_the_formula(per, mode):
    """d loss / d logit = -sum over rows of G, times tau (1 - tau), with G = (dO.u - k D) / Z of section 4.5."""
    model = vit(depth=2).double()
    sparsify(model, LearnableThreshold(0.15, per=per), empty_rows=mode)
    threshold = next(iter(learnable_thresholds(model).values()))
    records = []
    for module in sparse_modules(model).values():

        def keep(m, record):
            record.out.retain_grad()
            records.append(record)

        module.observers.append(keep)
    model(images().double()).square().sum().backward()
    expected = torch.zeros(3, dtype=torch.float64)
    met = set()
    for record in records if per == "model" else records[:1]:
        tau = float(threshold.tau.detach().flatten()[0])
        p, v, out, do = record.probs.detach(), record.v.detach(), record.out.detach(), record.out.grad
        for b in range(p.shape[0]):
            for h in range(p.shape[1]):
                for i in range(p.shape[2]):
                    row = p[b, h, i]
                    inside = (row > tau).double()
                    capped = mode == "cap" and float(row.max()) < 2 * tau
                    met.add("capped" if capped else int(inside.sum() > 0))
                    if capped or not inside.any():
                        continue  # a fallback or a capped row adds nothing to d tau
                    z = ((row - tau) * inside).sum()
                    d = do[b, h, i] @ out[b, h, i]
                    expected[h] -= ((do[b, h, i] @ (inside @ v[b, h]) - inside.sum() * d) / z).detach()
    assert met >= ({"capped", 1} if mode == "cap" else {0, 1})
    expected = expected * tau * (1 - tau)
    grad = threshold.logit.grad.double()
    torch.testing.assert_close(grad, expected if per == "head" else expected.sum()[None], rtol=1e-4, atol=1e-7)


def test_learnable_tau_moves_in_a_bf16_model():
    """In bf16 an Adam step of 1e-4 on a logit near -4.6 would be rounded away."""
    model = vit().bfloat16()
    sparsify(model, LearnableThreshold(0.01))
    optimiser = torch.optim.Adam([t.logit for t in learnable_thresholds(model).values()], lr=1e-4)
    before = [t.logit.item() for t in learnable_thresholds(model).values()]
    model(images().bfloat16()).float().square().sum().backward()
    optimiser.step()
    after = [t.logit.item() for t in learnable_thresholds(model).values()]
    for a, b in zip(before, after):
        assert abs(b - a) == pytest.approx(1e-4, rel=0.05)
        assert torch.tensor(a).bfloat16() == (torch.tensor(a).bfloat16() + 1e-4)


def test_warm_up_scales_a_learnable_tau_and_its_gradient():
    q, k, v = (torch.randn(1, 3, 6, 4) * 2 for _ in range(3))
    threshold = LearnableThreshold(0.2).for_heads(3)
    attention_record(q, k, v, threshold.set_warmup(0.0)).out.square().sum().backward()
    assert float(threshold.tau.detach()) == 0 and float(threshold.logit.grad) == 0
    assert float(threshold.set_warmup(0.5).tau.detach()) == pytest.approx(0.1)


# --- state_dict -------------------------------------------------------------------------------------------------


def test_dense_weights_load_before_and_after():
    other = vit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = other.state_dict()
    sparsify(other, 0.05)
    expected = other(images())
    before, after = vit(), vit()
    before.load_state_dict(weights, strict=True)
    sparsify(before, FixedThreshold(0.05))
    sparsify(after, FixedThreshold(0.05))
    after.load_state_dict(weights, strict=True)
    assert torch.equal(before(images()), expected) and torch.equal(after(images()), expected)
    assert list(after.state_dict()) == list(weights)


@pytest.mark.parametrize("per", ["model", "layer", "head"])
def test_a_learnable_threshold_is_the_one_exception(per):
    model = vit()
    dense = list(model.state_dict())
    sparsify(model, LearnableThreshold(0.05, per=per))
    extra = {name: t for name, t in model.state_dict().items() if name not in dense}
    assert list(extra) == [f"{name}.threshold.logit" for name in NAMES]
    assert all(t.dtype == torch.float32 and t.shape == ((3,) if per == "head" else (1,)) for t in extra.values())
    with torch.no_grad():
        model.blocks[1].attn.threshold.logit.fill_(-1.0)
    twin = vit()
    sparsify(twin, LearnableThreshold(0.01, per=per))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(images()), model(images()))
    with pytest.raises(RuntimeError, match=r"threshold\.logit"):
        vit().load_state_dict(model.state_dict(), strict=True)
