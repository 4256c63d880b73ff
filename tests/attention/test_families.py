"""timm's families, one small random model each, sharpened until the cut takes a part of the keys of most rows."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm, RotaryEmbeddingCat
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from svit_utils.attention import (
    EMPTY_ROWS,
    SparseAttention,
    TokenSparsityTracker,
    densify,
    sparse_modules,
    sparsified,
    sparsify,
)

TAU = 0.01
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SMALL_32: dict[str, Any] = {"img_size": 32, "patch_size": 4, **SMALL}  # 8 x 8 patches


@dataclass(frozen=True)
class Family:
    name: str
    arguments: dict[str, Any]
    dense_class: type
    layers: int
    prefix: int | None = None  # num_prefix_tokens
    image: int = 32
    left: tuple[str, ...] = field(default=())
    padded: bool = False


FAMILIES = {
    "ViT": Family("vit_tiny_patch16_224", SMALL_32, Attention, 2, 1),
    "ViT with qk_norm and scale_norm": Family(
        "vit_tiny_patch16_224", {**SMALL_32, "qk_norm": True, "scale_attn_norm": True}, Attention, 2, 1
    ),
    "DeiT": Family("deit_tiny_patch16_224", SMALL_32, Attention, 2, 1),
    "distilled DeiT": Family("deit_tiny_distilled_patch16_224", SMALL_32, Attention, 2, 2),
    "DeiT3": Family("deit3_small_patch16_224", SMALL_32, Attention, 2, 1),
    "DINOv2 with registers": Family("vit_small_patch14_reg4_dinov2", SMALL_32, Attention, 2, 5),
    "SigLIP": Family("vit_base_patch16_siglip_224", SMALL_32, Attention, 2, 0, left=("attn_pool",)),
    "EVA": Family("eva_giant_patch14_224", SMALL_32, EvaAttention, 2, 1),
    "EVA02": Family("eva02_tiny_patch14_224", SMALL_32, EvaAttention, 2, 1),
    "EVA02 with scale_norm": Family("eva02_base_patch14_224", SMALL_32, EvaAttention, 2, 1),
    "ViT with rope": Family("vit_small_patch16_rope_224", SMALL_32, AttentionRope, 2, 1),
    "Perception Encoder": Family("vit_pe_core_tiny_patch16_384", SMALL_32, AttentionRope, 2, 1, left=("attn_pool",)),
    "DINOv3": Family("vit_small_patch16_dinov3", SMALL_32, EvaAttention, 2, 5),
    "NaFlexViT": Family("naflexvit_base_patch16_gap", {"patch_size": 4, **SMALL}, Attention, 2, 4),
    "NaFlexViT, padded": Family("naflexvit_base_patch16_gap", {"patch_size": 4, **SMALL}, Attention, 2, 4, padded=True),
    "NaFlexViT with attention pooling, padded": Family(
        "naflexvit_base_patch16_map", {"patch_size": 4, **SMALL}, Attention, 2, left=("attn_pool",), padded=True
    ),
    "MobileViT": Family("mobilevit_xxs", {"num_classes": 5}, Attention, 9, image=256),
    "ResNet hybrid": Family(
        "vit_tiny_r_s16_p8_224", {"img_size": 64, **SMALL, "patch_size": 1}, Attention, 2, 1, image=64
    ),
}


def sharpen(model: nn.Module, x: Any, spread: float = 1.5) -> None:
    """Scale query and key weights layer by layer until the scores of a row have this standard deviation."""
    sparsify(model, 0.0)
    seen: dict[nn.Module, float] = {}

    def measure(module, record):
        scores = record.probs.clamp(min=1e-30).log()
        allowed = torch.ones_like(scores, dtype=torch.bool) if record.allowed is None else record.allowed
        allowed = allowed.expand_as(scores)
        rows = [s[a].std() for s, a in zip(scores.flatten(0, 2), allowed.flatten(0, 2)) if a.sum() > 1]
        seen[module] = float(torch.stack(rows).mean())

    modules = list(sparse_modules(model).values())
    for module in modules:  # the layers behind it see its new output
        module.observers.append(measure)
        with torch.no_grad():
            model(x)
            factor = (spread / seen[module]) ** 0.5
            if not isinstance(module.q_norm, nn.Identity):
                module.q_norm.weight *= factor
                module.k_norm.weight *= factor
            elif module.qkv is None:
                for projection in (module.q_proj, module.k_proj):
                    for parameter in projection.parameters():
                        parameter *= factor
            else:
                for parameter in module.qkv.parameters():
                    parameter[: 2 * parameter.shape[0] // 3] *= factor
        module.observers.clear()
    densify(model)


def image(family: Family) -> Any:
    g = torch.Generator().manual_seed(1)
    if not family.padded:
        return torch.randn(2, 3, family.image, family.image, generator=g)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1, 40:] = False  # the second image has 5 x 8 patches
    return {
        "patches": torch.randn(2, 64, 48, generator=g) * valid[..., None],
        "patch_coord": torch.stack([y, x], dim=-1).flatten(0, 1).expand(2, -1, -1) * valid[..., None],
        "patch_valid": valid,
    }


@pytest.fixture(scope="module")
def prepared():
    """(model, input) by family, built once; every test leaves the model dense."""
    built: dict[str, tuple[nn.Module, Any]] = {}

    def get(case: str) -> tuple[nn.Module, Any]:
        if case not in built:
            torch.manual_seed(0)
            family = FAMILIES[case]
            model = timm.create_model(family.name, **family.arguments).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "gamma" in name.rpartition(".")[2]:
                        parameter.fill_(1.0)  # layer scale starts near 0 and would hide the attention
                heads = model.get_classifier()
                for head in heads if isinstance(heads, tuple) else (heads,):
                    head.weight.normal_(std=0.3)  # several families start with a head of zeros
            x = image(family)
            sharpen(model, x)
            built[case] = model, x
        return built[case]

    return get


def run(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("case", FAMILIES)
def test_family(case, prepared):
    family = FAMILIES[case]
    model, x = prepared(case)
    assert getattr(model, "num_prefix_tokens", None) == family.prefix or family.prefix is None
    dense = run(model, x)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())

    report = sparsify(model, 0.0)
    assert len(report.converted) == family.layers and set(report.converted) == set(sparse_modules(model))
    assert tuple(report.left) == family.left
    assert all("pooling attention" in reason for reason in report.left.values())
    assert all(isinstance(m, family.dense_class) for m in sparse_modules(model).values())
    assert list(model.state_dict()) == keys
    assert (run(model, x) - dense).abs().max() <= 1e-5 * max(1.0, float(dense.abs().max()))

    sparsify(model, TAU)
    with TokenSparsityTracker(model) as tracker:
        sparse = run(model, x)
    table = tracker.table()
    table = table[table["queries"] == "all"]
    assert 0.05 < table["cut_sparsity"].mean() < 0.95
    assert table["empty_rate"].mean() < 0.5
    assert (sparse - dense).abs().max() > 1e-3 * dense.abs().max()
    assert list(model.state_dict()) == keys
    model.load_state_dict(before, strict=True)

    assert densify(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert torch.equal(run(model, x), dense)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("mode", ["dense", "cap"])
def test_observed_weights_times_v_is_what_is_projected(case, mode, prepared):
    """The output before the projection is caught by timm's own `norm` child, which knows nothing of the tracker."""
    model, x = prepared(case)
    products: list[Tensor] = []
    caught: list[Tensor] = []
    hooks = []
    with sparsified(model, TAU, empty_rows=mode):
        for module in sparse_modules(model).values():
            module.observers.append(lambda m, r: products.append((r.weights @ r.v).transpose(1, 2).flatten(2)))
            hooks.append(module.norm.register_forward_pre_hook(lambda m, args: caught.append(args[0])))
        with TokenSparsityTracker(model):
            run(model, x)
    for hook in hooks:
        hook.remove()
    assert len(products) == len(caught) == FAMILIES[case].layers
    for product, output in zip(products, caught):
        assert output.abs().max() > 1e-3
        assert (product - output).abs().max() <= 1e-6 * max(1.0, float(output.abs().max()))


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_padded_patches_do_not_reach_the_valid_ones(mode, prepared):
    model, x = prepared("NaFlexViT, padded")
    with sparsified(model, TAU, empty_rows=mode):
        padded = run(model, x)
        alone = run(model, {name: value[1:, :40] for name, value in x.items()})
        other = {**x, "patches": torch.where(x["patch_valid"][..., None], x["patches"], 3.0)}
        torch.testing.assert_close(run(model, other), padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1:], alone, atol=1e-4, rtol=1e-4)


class OneAttention(nn.Module):
    """An attention module with what a timm block would pass to it."""

    def __init__(self, attn: nn.Module, rope: Tensor | None) -> None:
        super().__init__()
        self.attn = attn
        self.rope = rope

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return self.attn(x, **masks) if self.rope is None else self.attn(x, rope=self.rope, **masks)


VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (Attention, {}),
    "qkv bias": (Attention, {"qkv_bias": True}),
    "qk_norm": (Attention, {"qk_norm": True}),
    "scale_norm": (Attention, {"scale_norm": True}),
    "gated": (Attention, {"gated": True}),
    "head_dim and dim_out": (Attention, {"attn_head_dim": 12, "dim_out": 24}),
    "rope": (AttentionRope, {}),
    "rope, separate": (AttentionRope, {"qkv_fused": False}),
    "rope, half": (AttentionRope, {"rotate_half": True}),
    "rope, gated, qk_norm, scale_norm": (AttentionRope, {"gated": True, "qk_norm": True, "scale_norm": True}),
    "rope, grouped queries": (AttentionRope, {"qkv_fused": False, "num_kv_heads": 2}),
    "rope, one key head": (AttentionRope, {"qkv_fused": False, "num_kv_heads": 1, "qk_norm": True}),
    "eva": (EvaAttention, {"scale_norm": False}),
    "eva, scale_norm": (EvaAttention, {"scale_norm": True}),
    "eva, separate": (EvaAttention, {"qkv_fused": False, "scale_norm": False}),
    "eva, separate bias": (EvaAttention, {"qkv_bias_separate": True, "scale_norm": False}),
    "eva, no bias": (EvaAttention, {"qkv_bias": False, "scale_norm": False}),
    "eva, gated, qk_norm, half": (
        EvaAttention,
        {"gated": True, "qk_norm": True, "rotate_half": True, "scale_norm": False},
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_of_the_modules(case):
    cls, arguments = VARIANTS[case]
    try:
        attn = cls(48, num_heads=4, norm_layer=partial(LayerNorm, eps=1e-6), **arguments)
    except TypeError as error:
        pytest.skip(f"this timm has no such option: {error}")
    head_dim = arguments.get("attn_head_dim", 12)
    rope = None
    if cls is not Attention:
        rope = RotaryEmbeddingCat(head_dim, in_pixels=False, feat_shape=[8, 8]).get_embed()
    model = OneAttention(attn, rope).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # biases and norms away from 0 and 1
    x = torch.randn(2, 65, 48)
    sharpen(model, x)
    mask = torch.rand(2, 1, 65, 65) > 0.3
    mask[..., 0] = True
    calls = [{}, {"attn_mask": mask}, {"is_causal": True}]
    known = inspect.signature(cls.forward).parameters  # the dense one: older timm has no is_causal
    for masks in [call for call in calls if set(call) <= set(known)]:
        dense = run(partial(model, **masks), x)
        for fused in (True, False):
            attn.fused_attn = fused
            torch.testing.assert_close(run(partial(model, **masks), x), dense, atol=1e-5, rtol=1e-5)
            with sparsified(model, 0.0):
                torch.testing.assert_close(run(partial(model, **masks), x), dense, atol=1e-5, rtol=1e-5)
            with sparsified(model, TAU):
                assert (run(partial(model, **masks), x) - dense).abs().max() > 1e-3
            assert type(attn) is cls


def test_dropout_is_on_in_training_alone():
    attn = SparseAttention(48, num_heads=4, attn_drop=0.5, threshold=0.02)
    x = torch.randn(2, 10, 48)
    assert torch.equal(attn.eval()(x), attn(x))
    assert not torch.equal(attn.train()(x), attn(x))


# --- copies and compilers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["ViT", "EVA02", "ViT with rope", "MobileViT"])
def test_deepcopy_and_pickle(case, prepared):
    model, x = prepared(case)
    dense = run(model, x)
    with sparsified(model, TAU, empty_rows="cap"):
        expected = run(model, x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other, x), expected)
            sparsify(other, 0.1)
            assert torch.equal(run(model, x), expected)  # the copy shares no setting with the original
            assert torch.equal(run(densify(other), x), dense)


@pytest.mark.parametrize("case", ["ViT", "EVA02", "ViT with rope", "NaFlexViT"])
def test_compile(case, prepared):
    model, x = prepared(case)
    torch.compiler.reset()
    with sparsified(model, TAU):
        expected = run(model, x)
        torch.testing.assert_close(run(torch.compile(model, backend="aot_eager"), x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["ViT", "EVA02"])
def test_export(case, prepared):
    model, x = prepared(case)
    with sparsified(model, TAU):
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(run(program.module(), x), run(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["ViT", "EVA02"])
def test_autocast(case, prepared):
    model, x = prepared(case)
    with sparsified(model, TAU), torch.autocast("cpu", dtype=torch.bfloat16):
        with TokenSparsityTracker(model) as tracker:
            out = run(model, x)
    assert out.isfinite().all()
    with sparsified(model, TAU), TokenSparsityTracker(model) as full:
        run(model, x)
    assert tracker.summary().cut_sparsity == pytest.approx(full.summary().cut_sparsity, abs=0.02)


# --- refused ----------------------------------------------------------------------------------------------------

ONE_BLOCK: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}


class OwnForward(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask, is_causal)


REFUSED = {
    "Swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(1, 2), img_size=56
        ),
        "SwinTransformer .*swin_transformer.WindowAttention",
    ),
    "BEiT": (lambda: timm.create_model("beit_base_patch16_224", **ONE_BLOCK), r"Beit .*timm\.models\.beit\.Attention"),
    "CaiT": (lambda: timm.create_model("cait_xxs24_224", **ONE_BLOCK), "Cait .*TalkingHeadAttn"),
    "XCiT": (lambda: timm.create_model("xcit_nano_12_p16_224", **ONE_BLOCK), "Xcit .*xcit.XCA"),
    "SAM": (lambda: timm.create_model("samvit_base_patch16", **ONE_BLOCK), "VisionTransformerSAM .*_sam.Attention"),
    "parallel blocks": (
        lambda: VisionTransformer(**ONE_BLOCK, block_fn=ParallelScalingBlock),
        "VisionTransformer .*ParallelScalingBlock",
    ),
    "subclass": (lambda: VisionTransformer(**ONE_BLOCK, attn_layer=OwnForward), r"blocks\.0\.attn is a .*OwnForward"),
    "no attention": (lambda: nn.Sequential(nn.Linear(3, 3)), "Sequential has no attention .*no attention module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    build, message = REFUSED[case]
    model = build()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    for call in (lambda: sparsify(model, TAU), lambda: sparsified(model, TAU).__enter__()):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "timm.layers.attention.Attention" in str(caught.value)  # what is supported
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys


def test_one_unsupported_subclass_among_supported_leaves_the_model_unchanged():
    model = VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=3)
    model.blocks[1].attn = OwnForward(48, num_heads=3)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is a .*OwnForward"):
        sparsify(model, TAU)
    assert type(model.blocks[0].attn) is Attention and not sparse_modules(model)


def test_a_subclass_that_keeps_the_forward_comes_back_as_itself():
    class Named(Attention):
        pass

    model = VisionTransformer(img_size=32, embed_dim=48, depth=1, num_heads=3, attn_layer=Named)
    assert sparsify(model, TAU).converted == ("blocks.0.attn",)
    assert type(densify(model).blocks[0].attn) is Named
