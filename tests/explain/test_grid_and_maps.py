"""Token grids and attention maps: every prefix count, non-square images, dense, sparse and mixed models."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from svit_utils import sparsified, sparsify
from svit_utils.attention import TokenSparsityTracker
from svit_utils.explain import (
    attention_layers,
    attention_maps,
    class_attention,
    readout_rows,
    token_grid,
    tokens_to_grid,
    upsample,
)
from tests.explain.by_hand import calls

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


PREFIX = {"vit": 1, "distilled": 2, "registers": 5, "mean": 0, "siglip": 0, "eva": 1}


@pytest.mark.parametrize("name", PREFIX)
def test_grid_is_the_models_own(name, family, images):
    grid = token_grid(family(name), images)
    assert (grid.num_prefix, grid.height, grid.width) == (PREFIX[name], 4, 6)
    assert grid.num_tokens == PREFIX[name] + 24


def test_grid_follows_a_dynamic_image_size():
    model = VisionTransformer(**{**SMALL, "img_size": 32}, dynamic_img_size=True).eval()
    x = torch.randn(1, 3, 40, 64)
    grid = token_grid(model, x)
    assert grid.size == (5, 8)
    assert next(iter(attention_maps(model, x).values())).shape[-1] == grid.num_tokens


def test_tokens_land_where_their_patch_is(family, images):
    grid = token_grid(family("registers"), images)
    tokens = torch.arange(grid.num_tokens).float()[None, :, None]
    laid_out = tokens_to_grid(tokens, grid)
    assert laid_out[0, 0, 0, 0] == 5
    assert laid_out[0, 0, 1, 2] == 5 + 1 * 6 + 2


@pytest.mark.parametrize(
    "name", ["mobilevit_xxs", "swin_tiny_patch4_window7_224", "resnet18", "naflexvit_base_patch16_gap"]
)
def test_no_grid_is_said_clearly(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=r"no token grid can be established for .* supported are"):
        token_grid(model, torch.empty(1, 3, 224, 224))


def test_wrong_token_count_names_the_expected_one(family, images):
    with pytest.raises(
        ValueError, match=r"expected tokens \[B, 25, C\] \(1 prefix \+ 4 x 6 patches\), got shape \(1, 24, 3\)"
    ):
        tokens_to_grid(torch.zeros(1, 24, 3), token_grid(family("vit"), images))


def output_before_projection(model: nn.Module) -> tuple[dict, list]:
    """Hooks on every `proj` (its input is A V, heads side by side) and on every projection of values."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for layer, module in attention_layers(model).items():
        handles.append(
            module.proj.register_forward_pre_hook(
                lambda _m, args, layer=layer: seen.__setitem__(layer + "/out", args[0])
            )
        )
        values = module.qkv if module.qkv is not None else module.v_proj
        handles.append(
            values.register_forward_hook(lambda _m, _a, out, layer=layer: seen.__setitem__(layer + "/v", out))
        )
    return seen, handles


@pytest.mark.parametrize("sparse", ["dense", "sparse", "mixed"])
@pytest.mark.parametrize("name", PREFIX)
def test_maps_are_what_multiplies_v(name, sparse, family, images):
    model = family(name)
    if sparse != "dense":
        sparsify(model, 0.03, layers=None if sparse == "sparse" else [1])
    expected = model(images)
    seen, handles = output_before_projection(model)
    maps = attention_maps(model, images)
    for handle in handles:
        handle.remove()
    assert list(maps) == [f"blocks.{i}.attn" for i in range(3)]
    for layer, weights in maps.items():
        module = attention_layers(model)[layer]
        batch, heads, tokens, _ = weights.shape
        assert (batch, heads, tokens) == (2, 3, token_grid(model, images).num_tokens)
        width = seen[layer + "/out"].shape[-1]
        v = seen[layer + "/v"][..., -width:]  # the last third of a fused projection
        if getattr(module, "q_bias", None) is not None and module.qkv is not None:
            v = v + module.v_bias
        v = v.unflatten(-1, (heads, width // heads)).transpose(1, 2)
        torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), seen[layer + "/out"], atol=1e-6, rtol=0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, tokens), atol=1e-5, rtol=0)
        cut = (weights == 0).float().mean()
        assert (cut > 0.05) == (sparse == "sparse" or (sparse == "mixed" and layer == "blocks.1.attn"))
    torch.testing.assert_close(model(images), expected, atol=0, rtol=0)  # nothing is left behind


def test_dense_maps_equal_those_under_threshold_zero(family, images):
    model = family("vit")
    dense = attention_maps(model, images)
    with sparsified(model, 0):
        zero = attention_maps(model, images)
    for layer in dense:
        torch.testing.assert_close(dense[layer], zero[layer], atol=1e-6, rtol=0)


def test_state_is_left_as_found(family, images):
    model = family("vit").train()
    model.blocks[0].eval()
    fused = [m.fused_attn for m in attention_layers(model).values()]
    attention_maps(model, images)
    assert model.training and model.blocks[1].attn.training and not model.blocks[0].training
    assert [m.fused_attn for m in attention_layers(model).values()] == fused
    assert not any(m.attn_drop._forward_hooks for m in attention_layers(model).values())
    sparsify(model, 0.02)
    with TokenSparsityTracker(model) as tracker:
        attention_maps(model, images)
    assert len(tracker.table()) > 0  # the tracker's observer stayed beside ours
    assert all(not m.observers for m in attention_layers(model).values())


def test_layers_can_be_chosen(family, images):
    model = family("vit")
    assert list(attention_maps(model, images, layers=[-1, 0])) == ["blocks.0.attn", "blocks.2.attn"]
    assert list(attention_maps(model, images, layers="blocks.1.attn")) == ["blocks.1.attn"]
    for wrong in (3, "blocks.7.attn", True):
        with pytest.raises(ValueError, match=r"unknown attention layer .* allowed are indices -3 to 2"):
            attention_maps(model, images, layers=[wrong])
    with pytest.raises(ValueError, match="no attention whose map can be read"):
        attention_maps(timm.create_model("resnet18"), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", PREFIX)
def test_class_attention_is_the_readout_row(name, family, images):
    model = family(name)
    weights = attention_maps(model, images, layers=1)["blocks.1.attn"]
    rows = {"vit": [0], "registers": [0], "eva": [0], "distilled": [0, 1]}.get(name, list(range(24)))
    prefix = PREFIX[name]
    if name == "eva" and model.global_pool != "token":
        rows = list(range(prefix, prefix + 24))
    assert readout_rows(model, token_grid(model, images)).tolist() == rows
    expected = weights[:, :, rows].mean(2)[..., prefix:].reshape(2, 3, 4, 6)
    if name == "siglip":  # its head reads the patches by an attention of its own, the last call of a forward pass
        shares = calls(model, images)[-1].mean(dim=1)[:, 0].float()
        expected = torch.einsum("bn,bhnm->bhm", shares, weights).reshape(2, 3, 4, 6)
    torch.testing.assert_close(class_attention(model, images, layer=1), expected)


def test_upsample_keeps_constant_maps_and_shapes():
    assert torch.equal(upsample(torch.ones(2, 3, 4, 6), (32, 48)), torch.ones(2, 3, 32, 48))
    nearest = upsample(torch.arange(4.0).view(1, 2, 2), (4, 4), mode="nearest")
    assert nearest[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
