"""The functions that chapter 5 teaches compute what the package computes."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import svit_utils
from svit_utils import sparsify, thresholded_softmax
from svit_utils.explain import (
    attention_maps,
    attention_rollout,
    class_attention,
    grad_cam,
    layer_grad_cam,
    rollout_matrix,
    token_grid,
    tokens_to_grid,
)
from svit_utils.referee import energy_in_mask, iou_at_mask_area, pointing_game
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "05_interpretability"
NAMES = {"torch": torch, "thresholded_softmax": thresholded_softmax, "svit_utils": svit_utils}
TAU = 0.02


def taught(name: str):
    return extract_function(CHAPTER, name, NAMES)


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:48] *= 12  # rows that are partly cut
        model.head.weight.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("threshold", [None, TAU])
def test_attention_weights(model: VisionTransformer, images: torch.Tensor, threshold: float | None) -> None:
    if threshold is not None:
        sparsify(model, threshold)
    wanted = attention_maps(model, images)
    for index, block in enumerate(model.blocks):
        tokens = taught("tokens_into")(model, block.attn, images)
        got = taught("attention_weights")(block.attn, tokens, threshold)
        torch.testing.assert_close(got, wanted[f"blocks.{index}.attn"], rtol=0, atol=1e-5)
        assert threshold is None or 0 < (got == 0).float().mean() < 1


def test_gradients_of_attention_weights(model: VisionTransformer, images: torch.Tensor) -> None:
    sparsify(model, TAU)
    attention = model.blocks[1].attn
    tokens = taught("tokens_into")(model, attention, images).requires_grad_()
    seen = []
    attention.observers.append(lambda _, record: seen.append(record.weights))
    attention(tokens)
    weight = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((seen[0] * weight).sum(), tokens)[0]
    got = torch.autograd.grad((taught("attention_weights")(attention, tokens, TAU) * weight).sum(), tokens)[0]
    assert wanted.abs().max() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_on_grid(model: VisionTransformer, images: torch.Tensor) -> None:
    grid = token_grid(model, images)
    tokens = torch.randn(2, grid.num_tokens, 5)
    got = taught("on_grid")(tokens.transpose(1, 2), grid.num_prefix, *grid.size)
    assert torch.equal(got, tokens_to_grid(tokens, grid))
    with pytest.raises(AssertionError, match="do not add up"):
        taught("on_grid")(tokens.transpose(1, 2), grid.num_prefix + 1, *grid.size)


def test_rollout(model: VisionTransformer, images: torch.Tensor) -> None:
    sparsify(model, TAU, empty_rows="zero")  # rows that sum to 0 need the division
    maps = [m.clone().requires_grad_() for m in attention_maps(model, images).values()]
    got, wanted = taught("rollout")(maps), rollout_matrix(maps)
    torch.testing.assert_close(got, wanted)
    weight = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), maps), torch.autograd.grad((wanted * weight).sum(), maps), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cut", [False, True])
def test_attention_pair(model: VisionTransformer, images: torch.Tensor, cut: bool) -> None:
    grid = token_grid(model, images)
    scope = NAMES | {"attention_maps": attention_maps, "rollout_matrix": rollout_matrix, "grid": grid, "TAU": TAU}
    got = extract_function(CHAPTER, "attention_pair", scope, needs=["on_grid"])(model, images, cut)  # [2, 2, 4, 4]
    maps = list(attention_maps(model, images).values())
    if cut:  # the control: only the displayed weights are cut, so later layers still see what the dense model sees
        maps = [(p - TAU).clamp_min(0) for p in maps]
        assert all((m.sum(dim=-1) > 0).all() for m in maps), "an empty row would need its fallback"
        maps = [m / m.sum(dim=-1, keepdim=True) for m in maps]
        wanted = [maps[-1].mean(dim=1)[:, 0], rollout_matrix(maps)[:, 0]]
        wanted = [row[:, 1:].unflatten(1, grid.size) for row in wanted]
    else:
        wanted = [class_attention(model, images).mean(dim=1), attention_rollout(model, images)]
    torch.testing.assert_close(got, torch.stack(wanted, dim=1))
    plain = class_attention(model, images).mean(dim=1)
    assert torch.allclose(got[:, 0], plain, atol=1e-6) != cut


@pytest.mark.parametrize("cut", [False, True])
def test_grad_cam(model: VisionTransformer, images: torch.Tensor, cut: bool) -> None:
    if cut:
        sparsify(model, TAU)
    targets, grid = torch.tensor([1, 3]), token_grid(model, images)
    tokens, gradient = taught("features_and_gradient")(model, images, targets, model.blocks[-1].norm1)
    got = taught("grad_cam_by_hand")(tokens_to_grid(tokens, grid), tokens_to_grid(gradient, grid))
    for library in (grad_cam, layer_grad_cam):
        wanted = library(model, images, targets, relu=False)
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_drawing_leaves_a_head_its_highest_patch_and_moves_that_of_the_mean() -> None:
    """What exercise 2 asks: drawing keeps the order within a head, but scales the heads by different factors."""
    heads = torch.tensor([[0.40, 0.35, 0.25], [0.10, 0.44, 0.46]])  # two heads, three patches
    drawn = thresholded_softmax(heads.log(), 0.34)  # (0.06, 0.01, 0) / 0.07 and (0, 0.10, 0.12) / 0.22
    assert torch.equal(drawn.argmax(dim=-1), heads.argmax(dim=-1))
    assert (int(heads.mean(dim=0).argmax()), int(drawn.mean(dim=0).argmax())) == (1, 0)


@pytest.mark.parametrize("kind", ["noise", "ties", "blank", "negative"])
def test_scores(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    heat = torch.randn(20, 8, 8, generator=generator)
    if kind == "ties":
        heat = heat.clamp_min(0).round()  # few values, many zeros, as in a sparse map
    elif kind == "blank":
        heat = torch.zeros_like(heat)
    elif kind == "negative":
        heat = -heat.abs()
    masks = torch.rand(20, 8, 8, generator=generator) < 0.3
    for name, wanted in (("pointing", pointing_game), ("energy", energy_in_mask), ("iou", iou_at_mask_area)):
        expected = wanted(heat, masks).tolist()
        for h, m, value in zip(heat, masks, expected, strict=True):
            assert math.isclose(taught(name)(h, m), value, abs_tol=1e-6)
