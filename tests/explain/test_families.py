"""timm's families, small: maps, rollout and both Grad-CAMs against references by hand, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from svit_utils import sparsify
from svit_utils.explain import (
    METHODS,
    attention_maps,
    attention_rollout,
    class_attention,
    explain,
    grad_cam,
    layer_grad_cam,
    readout_rows,
    token_grid,
    tokens_to_grid,
)
from tests.explain.by_hand import calls, check_rollout, even, pictures, sharp

SMALL = {"img_size": (32, 48), "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}

# name -> (further arguments, prefix tokens, whether a pooling attention comes last)
READABLE = {
    "vit_small_patch16_224": ({}, 1, False),
    "deit_tiny_distilled_patch16_224": ({}, 2, False),
    "deit3_small_patch16_224": ({}, 1, False),
    "vit_small_patch14_reg4_dinov2": ({"patch_size": 8}, 5, False),
    "vit_small_patch14_dinov2": ({"patch_size": 8}, 1, False),
    "vit_base_patch16_siglip_224": ({"patch_size": 8}, 0, True),
    "vit_base_patch16_siglip_gap_224": ({"patch_size": 8}, 0, False),
    "vit_base_patch16_clip_224": ({"patch_size": 8}, 1, False),
    "vit_base_patch16_clip_quickgelu_224": ({"patch_size": 8}, 1, False),
    "vit_medium_patch16_gap_240": ({"patch_size": 8}, 0, False),
    "vit_base_patch16_rpn_224": ({"patch_size": 8}, 0, False),
    "vit_mediumd_patch16_reg4_gap_256": ({"patch_size": 8}, 4, False),
    "vit_betwixt_patch16_reg1_gap_256": ({"patch_size": 8}, 1, False),
    "vit_so150m_patch16_reg4_map_256": ({"patch_size": 8}, 4, True),
    "vit_base_patch16_18x2_224": ({"patch_size": 8}, 1, False),
    "vit_base_patch16_xp_224": ({"patch_size": 8}, 1, False),
    "flexivit_small": ({"patch_size": 8}, 1, False),
    "aimv2_large_patch14_224": ({"patch_size": 8}, 0, False),
    "eva02_tiny_patch14_224": ({"patch_size": 8}, 1, False),
    "eva02_base_patch16_clip_224": ({"patch_size": 8}, 1, False),
    "eva_giant_patch14_224": ({"patch_size": 8}, 1, False),
    "eva02_enormous_patch14_clip_224": ({"patch_size": 8}, 1, False),
    "vit_small_patch16_dinov3": ({"patch_size": 8}, 5, False),
    "vit_small_patch16_rope_224": ({"patch_size": 8}, 1, False),
    "vit_small_patch16_rope_mixed_ape_224": ({"patch_size": 8}, 1, False),
    "vit_pe_core_tiny_patch16_384": ({"patch_size": 8, "attn_pool_num_heads": 3}, 1, True),
}


def small(name: str) -> nn.Module:
    kwargs = READABLE[name][0]
    torch.manual_seed(0)
    return sharp(timm.create_model(name, **{**SMALL, "patch_size": 8, **kwargs}))


def shares_by_hand(model: nn.Module, weights: list, pooled: bool, prefix: int) -> np.ndarray:
    """What timm's `pool` and `forward_head` do, as shares of the tokens."""
    count = prefix + 24
    if pooled:
        read = weights.pop().mean(dim=1)[:, 0].numpy()
        return np.concatenate([np.zeros((2, count - read.shape[-1])), read], axis=1)
    if model.global_pool == "token":
        return even([0, 1] if hasattr(model, "head_dist") else [0], count)
    return even(list(range(prefix, count)), count)


@pytest.mark.parametrize("name", READABLE)
def test_maps_and_rollout(name):
    model, x = small(name), pictures(2, 32, 48)
    _, prefix, pooled = READABLE[name]
    weights = calls(model, x)
    grid = token_grid(model, x)
    assert (grid.num_prefix, grid.size) == (prefix, (4, 6))
    shares = shares_by_hand(model, weights, pooled, prefix)
    maps = attention_maps(model, x)
    for got, expected in zip(maps.values(), weights, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)
    steps = [torch.cat(weights[i : i + 2], 1) for i in (0, 2)] if "18x2" in name else weights
    check_rollout(attention_rollout(model, x), steps, shares, prefix)
    last = weights[-1].numpy()
    expected = np.einsum("n,bhnm->bhm" if shares.ndim == 1 else "bn,bhnm->bhm", shares, last)[..., prefix:]
    np.testing.assert_allclose(class_attention(model, x).flatten(2).numpy(), expected, atol=2e-5)


def before_attention(model: nn.Module) -> nn.Module:
    """The last place before the last attention, written out by the kind of block."""
    last = model.blocks[-1]
    after = type(last).__name__ in ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm")
    return model.blocks[-2] if after or not hasattr(last, "norm1") else last.norm1


def cam_by_hand(model, x, targets):
    kept = []
    handle = before_attention(model).register_forward_hook(lambda _m, _a, out: kept.append(out))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[range(len(x)), targets].sum(), kept[0])
    grid = token_grid(model, x)
    tokens, gradient = tokens_to_grid(kept[0], grid), tokens_to_grid(gradient, grid)
    return (gradient.mean((2, 3), keepdim=True) * tokens).sum(1).detach()


FURTHER = [
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "vit_relpos_base_patch16_cls_224",
    "vit_relpos_base_patch16_rpn_224",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
]


@pytest.mark.parametrize("name", [*READABLE, *FURTHER])
def test_both_grad_cams(name):
    model = small(name) if name in READABLE else sharp(timm.create_model(name, **SMALL, patch_size=8))
    dtype = torch.float32 if "rope_mixed" in name else torch.float64  # timm 1.0.26 turns its tokens in float32 only
    model, x = model.to(dtype), pictures(2, 32, 48).to(dtype)
    expected = cam_by_hand(model, x, [3, 1])
    assert expected.abs().max() > 1e-6
    tolerance = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
    for cam in (grad_cam, layer_grad_cam):
        torch.testing.assert_close(cam(model, x, [3, 1], relu=False), expected, **tolerance)


NO_GRID = {
    "swin_tiny_patch4_window7_224": {"img_size": 224},
    "volo_d1_224": {},
    "levit_128s": {},
    "pit_ti_224": {},
    "mobilevit_xxs": {},
    "crossvit_tiny_240": {},
    "resnet18": {},
    "naflexvit_base_patch16_map": {},
    "mvitv2_tiny": {},
    "hiera_tiny_224": {},
    "tnt_s_patch16_224": {},
    "twins_pcpvt_small": {},
    "coat_lite_tiny": {},
    "efficientformer_l1": {},
    "maxvit_tiny_tf_224": {},
}


@pytest.mark.parametrize("name", NO_GRID)
def test_families_without_one_grid_are_refused_by_every_method(name):
    with torch.device("meta"):
        model = timm.create_model(name, **NO_GRID[name])
    for method in METHODS:
        with pytest.raises(ValueError, match=rf"{type(model).__name__}|tokens|read"):
            explain(model, torch.zeros(1, 3, 224, 224, device="meta"), method)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cait_xxs24_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
        ("xcit_nano_12_p8_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
        ("samvit_base_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3, "global_attn_indexes": (0, 1)}),
    ],
)
def test_families_whose_blocks_hold_other_tokens_say_so(name, kwargs):
    model = sharp(timm.create_model(name, img_size=32, patch_size=8, num_classes=5, **kwargs))
    for method in METHODS:
        if method in ("occlusion", "integrated_gradients") and name == "cait_xxs24_224":
            assert explain(model, pictures(), method).shape == (2, 4, 4)  # these look at no token, and need none
            continue
        with pytest.raises(ValueError, match=r"expected tokens|no attention whose map can be read|token grid"):
            explain(model, pictures(), method)


OTHER_TOKENS = {
    "mobilevit_xxs": ({}, 64, 9),  # each position of a patch by itself: [4 B, H, N, N]
    "pit_ti_224": ({}, 224, 12),  # fewer tokens from stage to stage
    "naflexvit_base_patch16_gap": ({"embed_dim": 24, "depth": 2, "num_heads": 3}, 32, 2),
    "vitamin_small_224": ({"img_size": 64}, 64, 14),  # convolutions before its blocks
    "qwen3_vit_88m": ({"depth": 2}, 224, 2),  # patches in an order of its own
}


@pytest.mark.parametrize("name", OTHER_TOKENS)
def test_maps_over_other_tokens_than_a_grid(name):
    if not timm.is_model(name):
        pytest.skip("a model of a later timm")
    kwargs, size, count = OTHER_TOKENS[name]
    torch.manual_seed(0)
    model, x = timm.create_model(name, **kwargs).eval(), pictures(2, size, size)
    maps = list(attention_maps(model, x).values())
    assert len(maps) == count
    for got, expected in zip(maps, calls(model, x), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    (last,) = attention_maps(model, x, layers=-1).values()
    torch.testing.assert_close(last, maps[-1])


SIZES = [(32, 32), (40, 64), (64, 24), (8, 56), (16, 8)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_sizes_that_differ_from_the_models(name, size):
    torch.manual_seed(0)
    kwargs = {**SMALL, "img_size": 32, "patch_size": 8}
    model, x = sharp(timm.create_model(name, dynamic_img_size=True, **kwargs)), pictures(2, *size)
    weights, grid = calls(model, x), token_grid(model, x)
    assert grid.size == (size[0] // 8, size[1] // 8)
    shares = even(readout_rows(model, grid).tolist(), grid.num_tokens)
    check_rollout(attention_rollout(model, x), weights, shares, grid.num_prefix)
    for cam in (grad_cam, layer_grad_cam):
        expected = cam_by_hand(model, x, [3, 1])
        torch.testing.assert_close(cam(model, x, [3, 1], relu=False), expected, atol=1e-5, rtol=1e-4)


def test_a_padded_image_has_the_patches_of_the_padding():
    model = timm.create_model(
        "vit_small_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **{**SMALL, "patch_size": 8}
    )
    x = pictures(2, 30, 45)
    assert token_grid(model, x).size == (4, 6)
    assert attention_rollout(sharp(model), x).shape == (2, 4, 6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"])
def test_images_of_a_wrong_size_are_named(name, method):
    with pytest.raises(ValueError, match=r"\(2, 3, 40, 48\)"):
        explain(small(name), pictures(2, 40, 48), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 32, 48),
        torch.zeros(2, 3, 32, 48, dtype=torch.uint8),
        torch.zeros(2, 3, 32, 48, dtype=torch.int64),
        np.zeros((2, 3, 32, 48), dtype=np.float32),
        None,
    ],
    ids=["one image", "bytes", "integers", "numpy", "none"],
)
def test_what_is_no_batch_of_images_is_refused(x, method):
    with pytest.raises(ValueError, match="images must be"):
        explain(small("vit_small_patch16_224"), x, method)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224"])
def test_a_batch_of_no_images_gives_no_maps(name, sparse):
    model = small(name)
    if sparse:
        sparsify(model, 0.02)
    maps = {method: explain(model, pictures(0, 32, 48), method) for method in METHODS}
    assert {method: tuple(value.shape) for method, value in maps.items()} == {
        method: (0, 3, 4, 6) if method == "attention_heads" else (0, 4, 6) for method in METHODS
    }


@pytest.mark.parametrize("cam", [grad_cam, layer_grad_cam])
def test_a_head_before_the_logits_is_explained_by_feature(cam):
    model = small("vit_small_patch16_224").double()
    x = pictures(2, 32, 48).double()
    model.reset_classifier(0)
    torch.testing.assert_close(cam(model, x, [20, 7], relu=False), cam_by_hand(model, x, [20, 7]), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="0 to 23"):
        cam(model, x, 24)
