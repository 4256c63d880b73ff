"""Grad-CAM by two libraries and by the formula: one map."""

from __future__ import annotations

import pytest
import torch

from svit_utils import sparsify
from svit_utils.explain import grad_cam, layer_grad_cam, token_grid, tokens_to_grid

TARGETS = [3, 1]

NAMES = ["vit", "distilled", "registers", "mean", "siglip", "eva"]


def by_formula(model, x, targets):
    """ReLU left out: sum_c mean_hw(dy/dA_c) A_c, with autograd alone."""
    kept = {}
    handle = model.blocks[-1].norm1.register_forward_hook(lambda _m, _a, out: kept.setdefault("tokens", out))
    logits = model(x)
    handle.remove()
    score = logits[torch.arange(len(x)), torch.tensor(targets)].sum()
    (gradient,) = torch.autograd.grad(score, kept["tokens"])
    grid = token_grid(model, x)
    tokens, gradient = tokens_to_grid(kept["tokens"], grid), tokens_to_grid(gradient, grid)
    return (gradient.mean((2, 3), keepdim=True) * tokens).sum(1).detach()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_both_libraries_and_the_formula_agree_before_the_relu(name, sparse, family, images):
    model = family(name).double()
    if sparse:
        sparsify(model, 0.03)
    x = images.double()
    first = grad_cam(model, x, TARGETS, relu=False)
    second = layer_grad_cam(model, x, TARGETS, relu=False)
    assert first.shape == second.shape == (2, 4, 6)
    assert (first < 0).any() and first.abs().max() > 1e-6
    torch.testing.assert_close(first, second, atol=2e-10, rtol=0)
    torch.testing.assert_close(first, by_formula(model, x, TARGETS), atol=2e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_agree_in_single_precision(name, family, images):
    model = family(name)
    torch.testing.assert_close(
        grad_cam(model, images, relu=False), layer_grad_cam(model, images, relu=False), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("cam", [grad_cam, layer_grad_cam])
def test_relu_and_targets(cam, family, images):
    model = family("vit")
    signed = cam(model, images, TARGETS, relu=False)
    torch.testing.assert_close(cam(model, images, TARGETS), signed.clamp_min(0))
    predicted = model(images).argmax(-1)
    torch.testing.assert_close(cam(model, images), cam(model, images, predicted))
    torch.testing.assert_close(cam(model, images, 3, relu=False)[0], signed[0])
    assert not torch.allclose(cam(model, images, 0, relu=False), cam(model, images, 1, relu=False))
    with pytest.raises(ValueError, match="one for each of the 2 images, got 3"):
        cam(model, images, [0, 1, 2])


@pytest.mark.parametrize("cam", [grad_cam, layer_grad_cam])
def test_each_image_is_explained_on_its_own(cam, family, images):
    model = family("registers").double()
    x = images.double()
    together = cam(model, x, TARGETS, relu=False)
    for i in range(2):
        torch.testing.assert_close(cam(model, x[i : i + 1], TARGETS[i], relu=False)[0], together[i])


@pytest.mark.parametrize("cam", [grad_cam, layer_grad_cam])
@pytest.mark.parametrize("name", ["vit", "distilled", "registers"])
def test_tap_after_the_last_attention_is_refused(name, cam, family, images):
    model = family(name)
    with pytest.raises(ValueError, match="gradient on the patch tokens at LayerNorm is exactly zero"):
        cam(model, images, layer=model.blocks[-1].norm2)
    assert cam(model, images, layer=model.blocks[-2].norm2, relu=False).abs().max() > 0


@pytest.mark.parametrize("cam", [grad_cam, layer_grad_cam])
def test_training_state_and_gradients_survive(cam, family, images):
    model = family("vit").train()
    model.patch_embed.proj.weight.requires_grad_(False)
    model(images).sum().backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    cam(model, images)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "patch_embed.proj.weight")
        if before[name] is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, before[name])
    assert not any(m._forward_hooks for m in model.modules())


def test_works_inside_no_grad(family, images):
    model = family("vit")
    with torch.no_grad():
        a, b = grad_cam(model, images, relu=False), layer_grad_cam(model, images, relu=False)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_model_without_blocks_asks_for_a_layer(family, images):
    model = family("vit")
    del model.blocks
    with pytest.raises(ValueError, match=r"has no `blocks`: give the layer"):
        grad_cam(model, images)
