"""Gradient x attention, gradient-weighted rollout and Chefer's relevance against matrices written out in NumPy.

The toy is a two-layer ViT computed by hand from its weights: attention, cut, residuals, MLP, norm and head, all in this
file, with the gradient at each weight by central differences. Nothing of the library is used for what is expected.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import Tensor

from svit_utils import sparsify
from svit_utils.explain import (
    CLASS_FREE,
    METHODS,
    attention_gradients,
    attention_maps,
    explain,
    gradient_rollout,
    relevance,
    relevance_matrix,
)
from tests.explain.by_hand import pictures, sharp, tiny

X = pictures().double()
TOY = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3, "mlp_ratio": 1}
KINDS = {
    "class token": {},
    "two prefix tokens": {"reg_tokens": 1},
    "mean of the patches": {"class_token": False, "global_pool": "avg"},
}


def toy(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return sharp(VisionTransformer(**{**TOY, **kwargs})).double()


def small_pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5)).double()


def layer_norm(x: np.ndarray, norm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
    return scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def linear(x: np.ndarray, layer) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cut(p: np.ndarray, tau: float) -> np.ndarray:
    """ReLU(p - tau) / sum, and the plain softmax where no key survives."""
    r = np.maximum(p - tau, 0)
    total = r.sum(-1, keepdims=True)
    return np.where(total > 0, r / np.where(total > 0, total, 1), p)


class ByHand:
    """The forward pass of one image in NumPy, with any of its attention weights changed by `delta`."""

    def __init__(self, model: VisionTransformer, image: Tensor, tau: float | None) -> None:
        with torch.no_grad():
            patches = model.patch_embed(image[None])
            self.tokens = model._pos_embed(patches)[0].numpy()
        self.model, self.tau = model, tau
        self.read = [0] if model.global_pool == "token" else range(len(self.tokens))

    def run(self, delta: dict[tuple[int, int, int, int], float]) -> tuple[np.ndarray, list[np.ndarray]]:
        """(logits [C], the weights [H, N, N] of each layer)."""
        x, maps = self.tokens, []
        for index, block in enumerate(self.model.blocks):
            attn = block.attn
            qkv = linear(layer_norm(x, block.norm1), attn.qkv).reshape(len(x), 3, attn.num_heads, -1)
            q, k, v = qkv.transpose(1, 2, 0, 3)  # [H, N, D] each
            weights = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
            weights = weights if self.tau is None else cut(weights, self.tau)
            for (layer, head, i, j), change in delta.items():
                if layer == index:
                    weights[head, i, j] += change
            maps.append(weights)
            x = x + linear((weights @ v).transpose(1, 0, 2).reshape(len(x), -1), attn.proj)
            x = x + linear(gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)
        if self.model.global_pool == "token":
            pooled = layer_norm(x, self.model.norm)[0]
        else:
            pooled = layer_norm(x.mean(0), self.model.fc_norm)
        return linear(pooled, self.model.head), maps

    def gradients(self, target: int, step: float = 1e-5) -> list[np.ndarray]:
        found = [np.zeros_like(weights) for weights in self.run({})[1]]
        for layer, gradient in enumerate(found):
            for place in np.ndindex(gradient.shape):
                up, down = (self.run({(layer, *place): sign * step})[0][target] for sign in (1, -1))
                gradient[place] = (up - down) / (2 * step)
        return found


def expected_maps(hand: ByHand, target: int) -> dict[str, np.ndarray]:
    maps, gradients = hand.run({})[1], hand.gradients(target)
    n = len(hand.tokens)
    abar = [np.maximum(gradient * weights, 0).mean(0) for gradient, weights in zip(gradients, maps, strict=True)]
    r = np.eye(n)
    for one in abar:
        r = r + one @ r
    rolled = np.eye(n)
    for one in abar:
        step = (one + np.eye(n)) / 2
        rolled = (step / step.sum(1, keepdims=True)) @ rolled
    prefix, rows = n - 4, list(hand.read)
    expected = {"gradient_attention": abar[-1], "relevance": r, "gradient_rollout": rolled}
    return {name: matrix[rows].mean(0)[prefix:].reshape(2, 2) for name, matrix in expected.items()}


@pytest.mark.parametrize("tau", [None, 0.125, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_matrices_by_hand(kind, tau):
    model, x, targets = toy(**KINDS[kind]), small_pictures(), [2, 0]
    hands = [ByHand(model, image, tau) for image in x]
    if tau is not None:
        sparsify(model, tau)
    zeros = 0
    for image, target in enumerate(targets):
        logits, weights = hands[image].run({})
        np.testing.assert_allclose(model(x)[image].detach().numpy(), logits, atol=1e-10)
        found = attention_gradients(model, x, targets)
        for (got, gradient), map_, slope in zip(found.values(), weights, hands[image].gradients(target), strict=True):
            np.testing.assert_allclose(got[image].numpy(), map_, atol=1e-10)
            np.testing.assert_allclose(gradient[image].numpy(), slope, atol=1e-6)
            zeros += int((map_ == 0).sum())
        for method, expected in expected_maps(hands[image], target).items():
            assert np.ptp(expected) > 1e-4
            np.testing.assert_allclose(explain(model, x, method, targets)[image].numpy(), expected, atol=1e-6)
    assert (zeros > 0) == (tau is not None)


def test_the_gradient_at_a_cut_weight_is_not_zero_and_its_share_of_the_map_is():
    """A weight that the cut made zero would change the score if it grew; it carries nothing as it is."""
    model, x = toy(), small_pictures()
    sparsify(model, 0.1)
    weights, gradient = attention_gradients(model, x, 1)["blocks.0.attn"]
    gone = weights == 0
    assert gone.any() and (gradient[gone].abs() > 1e-3).any()
    assert not (weights * gradient)[gone].any()


def test_relevance_of_two_tokens_by_hand():
    first = torch.tensor([[[[0.0, 0.5], [0.25, 0.0]]]])
    second = torch.tensor([[[[0.5, 1.0], [0.0, 0.0]], [[0.5, 0.0], [0.0, 0.0]]]])  # mean [[.5, .5], [0, 0]]
    # (I + second) (I + first) = [[1.5, .5], [0, 1]] [[1, .5], [.25, 1]]
    expected = torch.tensor([[[1.5 + 0.125, 0.75 + 0.5], [0.25, 1.0]]])
    torch.testing.assert_close(relevance_matrix([first, second]), expected)
    with pytest.raises(ValueError, match="at least one layer"):
        relevance_matrix([])


GRADIENT = ["gradient_attention", "gradient_rollout", "relevance"]
NEW = [*GRADIENT, "occlusion", "integrated_gradients"]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_images_one_by_one(method, sparse):
    model = tiny().double()
    if sparse:
        sparsify(model, 0.03)
    whole = explain(model, X, method, [3, 1])
    for image, target in enumerate([3, 1]):
        alone = explain(model, X[image : image + 1], method, target)
        torch.testing.assert_close(whole[image : image + 1], alone, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_the_class_matters_to_all_but_those_that_say_so(method):
    model = tiny().double()
    first, second = (explain(model, X, method, target) for target in (0, 3))
    assert torch.equal(first, second) == (method in CLASS_FREE)
    torch.testing.assert_close(explain(model, X, method), explain(model, X, method, model(X).argmax(-1)))


@pytest.mark.parametrize("method", METHODS)
def test_other_weights_give_another_map(method):
    """All of these claim to depend on the weights (Adebayo et al., arXiv:1810.03292)."""
    from svit_utils.referee import weight_randomisation

    check = weight_randomisation(
        tiny(), pictures(4), lambda m, x: explain(m, x, method, 2).flatten(1, -1).unsqueeze(1), seed=1
    )
    assert check.correlation.abs().mean() < 0.6


@pytest.mark.parametrize("method", METHODS)
def test_a_head_with_shuffled_labels_is_told_apart_by_those_that_know_the_class(method):
    """The same features, read by a head whose classes are exchanged: what a class-free map cannot see."""
    model = tiny().double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.copy_(model.head.weight[[1, 2, 3, 4, 0]])
        other.head.bias.copy_(model.head.bias[[1, 2, 3, 4, 0]])
    same = torch.equal(explain(model, X, method, 2), explain(other, X, method, 2))
    assert same == (method in CLASS_FREE)
    torch.testing.assert_close(explain(model, X, method, 2), explain(other, X, method, 1))


@pytest.mark.parametrize("method", GRADIENT)
def test_blocks_side_by_side_are_one_attention_and_reused_blocks_have_their_calls(method):
    reused = tiny(depth=2).double()
    reused.blocks = torch.nn.Sequential(reused.blocks[0], reused.blocks[1], reused.blocks[0])
    copied = copy.deepcopy(reused)
    copied.blocks = torch.nn.Sequential(*[copy.deepcopy(block) for block in reused.blocks])
    torch.testing.assert_close(explain(reused, X, method, 1), explain(copied, X, method, 1))
    parallel = tiny(block_fn=ParallelThingsBlock).double()
    found = attention_gradients(parallel, X, 1)
    assert len(found) == 6
    weighted = [(weights * gradient).relu() for weights, gradient in found.values()]
    joined = [torch.cat(weighted[i : i + 2], dim=1) for i in (0, 2, 4)]
    if method == "relevance":
        expected = relevance_matrix(joined)[:, 0, 1:].unflatten(1, (4, 4))
        torch.testing.assert_close(relevance(parallel, X, 1), expected)


@pytest.mark.parametrize("kind", ["vit", "distilled", "registers", "mean", "siglip", "eva"])
@pytest.mark.parametrize("method", NEW)
def test_every_family_and_a_model_left_as_it_was(kind, method, family, images):
    model = family(kind)
    sparsify(model, 0.03, layers=[1])
    model.blocks[0].train()
    before = model(images[:1]).detach(), [m.training for m in model.modules()], list(map(id, model.modules()))
    got = explain(model, images, method, [0, 4])
    assert got.shape == (2, 4, 6) and torch.isfinite(got).all() and got.flatten(1).std(1).min() > 0
    assert not got.requires_grad and all(p.grad is None and p.requires_grad for p in model.parameters())
    after = model(images[:1]).detach(), [m.training for m in model.modules()], list(map(id, model.modules()))
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_checkpointing_changes_nothing():
    model = tiny().double()
    expected = {method: explain(model, X, method, 1) for method in NEW}
    model.set_grad_checkpointing()
    for method in NEW:
        torch.testing.assert_close(explain(model, X, method, 1), expected[method])


def test_where_no_gradient_reaches_it_is_said(family, images):
    class Frozen(VisionTransformer):
        def forward_features(self, x, **kwargs):
            with torch.no_grad():
                return super().forward_features(x, **kwargs)

    for method in GRADIENT:
        with pytest.raises(ValueError, match=r"no gradient reaches blocks\.\d\.attn"):
            explain(sharp(Frozen(**TOY)), small_pictures().float(), method, 1)
        model = family("vit")
        sparsify(model, 0.999, empty_rows="zero")
        with pytest.raises(ValueError, match="zero throughout"):
            explain(model, images, method, 1)
        with pytest.raises(ValueError, match="targets must lie in 0 to 4"):
            explain(family("vit"), images, method, 5)
    with pytest.raises(ValueError, match="without images"):
        attention_gradients(family("vit"), images[:0])


def test_start_layer_and_residual(family, images):
    model = family("vit")
    maps = [(a * g).relu() for a, g in attention_gradients(model, images, 1).values()]
    expected = relevance_matrix(maps[2:])[:, 0, 1:].unflatten(1, (4, 6))
    torch.testing.assert_close(relevance(model, images, 1, start_layer=2), expected)
    whole = gradient_rollout(model, images, 1, residual=0.9)
    assert (whole.flatten(1).sum(1) <= 1).all() and not torch.allclose(whole, gradient_rollout(model, images, 1))
    torch.testing.assert_close(
        attention_maps(model, images)["blocks.1.attn"], attention_gradients(model, images, 1)["blocks.1.attn"][0]
    )
