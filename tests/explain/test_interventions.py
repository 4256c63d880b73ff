"""Cutting an edge, ablating a head, patching an activation: as by hand, and gone without a trace afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from svit_utils import sparsified, sparsify
from svit_utils.attention import TokenSparsityTracker
from svit_utils.explain import ablate_head, attention_gradients, attention_maps, cut_edge, explain, patch_activation
from tests.explain.by_hand import TINY, Repeating, pictures, sharp, tiny

X = pictures().double()
OTHER = (pictures(4)[2:] * 2).double()


def state(model: nn.Module) -> list:
    """All that an intervention might leave behind."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    fused = [(vars(m).get("fused_attn"), m.attn_drop) for m in model.modules() if hasattr(m, "attn_drop")]
    return [modules, hooks, fused]


def by_hand(model: VisionTransformer, x: Tensor, edit) -> Tensor:
    """A pre-norm ViT's logits with the weights of each layer as `edit(layer, weights)` returns them."""
    tokens = model._pos_embed(model.patch_embed(x))
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        weights = edit(layer, (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1))
        tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.head(model.norm(tokens)[:, 0])


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("query", "key", "head"), [(0, 5, None), (0, [5, 6], 1), ([0, 3], range(1, 17), [0, 2])])
@pytest.mark.parametrize("layer", [0, 2, "blocks.1", "blocks.1.attn"])
def test_a_cut_edge(layer, query, key, head, renormalise):
    model = tiny().double()
    index = layer if isinstance(layer, int) else 1

    def edit(at: int, weights: Tensor) -> Tensor:
        if at != index:
            return weights
        weights = weights.clone()
        for h in range(3) if head is None else np.atleast_1d(head):
            for i in np.atleast_1d(query):
                for j in np.atleast_1d(key):
                    weights[:, h, i, j] = 0
                if renormalise:
                    weights[:, h, i] /= weights[:, h, i].sum(-1, keepdim=True)
        return weights

    before, clean = state(model), model(X)
    with cut_edge(model, layer, query, key, head=head, renormalise=renormalise):
        changed = model(X)
        maps = attention_maps(model, X)  # what is explained is the model as it computes now
    torch.testing.assert_close(changed, by_hand(model, X, edit))
    assert (changed - clean).abs().max() > 1e-3
    row = maps[f"blocks.{index}.attn"][:, 0 if head is None else np.atleast_1d(head)[0], 0]
    assert not row[:, np.atleast_1d(key)].any() and row.any()
    assert state(model) == before and torch.equal(model(X), clean)


def test_a_row_of_which_nothing_is_left_gives_nothing():
    model = tiny().double()
    with cut_edge(model, 1, 4, range(17), renormalise=True):
        weights = attention_maps(model, X)["blocks.1.attn"]
        assert torch.isfinite(model(X)).all()
    assert not weights[:, :, 4].any() and (weights[:, :, 5].sum(-1) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("head", [0, [0, 2]])
def test_an_ablated_head(head):
    model = tiny().double()

    def edit(at: int, weights: Tensor) -> Tensor:
        keep = torch.ones(3, dtype=weights.dtype)
        keep[head] = 0
        return weights * keep[:, None, None] if at == 1 else weights

    before, clean = state(model), model(X)
    with ablate_head(model, 1, head):
        torch.testing.assert_close(model(X), by_hand(model, X, edit))
    assert state(model) == before and torch.equal(model(X), clean)


def test_a_zero_of_the_cut_carries_no_value_and_its_score_still_counts():
    """A weight that the threshold made 0 can be cut without any change; the key's activation cannot be exchanged so."""
    model = tiny().double()
    sparsify(model, 0.05)
    weights = attention_maps(model, X[:1])["blocks.2.attn"]
    assert 0 < (weights == 0).float().mean() < 1
    key = int((weights[0, :, 0] == 0).all(0).nonzero()[0])  # no head of the class token reads it in the last layer
    kept = int(weights[0, :, 0].sum(0).argmax())
    with cut_edge(model, -1, 0, kept):  # unfused from here on
        less = model(X[:1])
    with cut_edge(model, -1, 0, key):
        same = model(X[:1])
    with cut_edge(model, -1, 0, key, renormalise=True):
        still = model(X[:1])
    assert torch.equal(same, still) and not torch.allclose(less, same)
    torch.testing.assert_close(same, model(X[:1]))
    with patch_activation(model, "blocks.2.norm1", key, OTHER[:1]):
        moved = attention_maps(model, X[:1])["blocks.2.attn"]
    assert not torch.allclose(moved[0, :, 0], weights[0, :, 0], atol=1e-4)  # the denominator of the class token's rows


@pytest.mark.parametrize("sparse", [False, True])
def test_patching_everything_makes_the_model_say_what_it_says_of_the_source(sparse):
    model = tiny().double()
    if sparse:
        sparsify(model, 0.05)
    before, clean, other = state(model), model(X), model(OTHER)
    for layer in (0, 2, -1, "blocks.1", model.blocks[1]):
        with patch_activation(model, layer, range(17), OTHER):
            torch.testing.assert_close(model(X), other)
    with patch_activation(model, 2, range(17), OTHER[:1]):
        torch.testing.assert_close(model(X), other[:1].expand(2, -1))
    with patch_activation(model, 2, range(1, 17), OTHER):  # after the last attention, only the class token is read
        torch.testing.assert_close(model(X), clean)
    with patch_activation(model, 1, [0, 5], OTHER):
        assert not torch.allclose(model(X), clean) and not torch.allclose(model(X), other)
    assert state(model) == before and torch.equal(model(X), clean)


def test_patching_some_tokens_by_hand():
    model = tiny().double()
    source = model.blocks[0](model._pos_embed(model.patch_embed(OTHER))).detach()
    own = model.blocks[0](model._pos_embed(model.patch_embed(X))).detach()
    mixed = own.clone()
    mixed[:, [0, 7]] = source[:, [0, 7]]
    expected = model.head(model.norm(model.blocks[2](model.blocks[1](mixed)))[:, 0])
    for given in (OTHER, source):
        with patch_activation(model, 0, [0, 7], given):
            torch.testing.assert_close(model(X), expected)
    with patch_activation(model, 0, [0, 7], torch.zeros(1, 17, 24)):
        assert not torch.allclose(model(X), expected)


class OwnError(Exception):
    pass


CASES = {
    "cut": lambda model: cut_edge(model, 1, 0, range(2, 6)),
    "cut, renormalised": lambda model: cut_edge(model, 1, 0, range(2, 6), renormalise=True),
    "ablate": lambda model: ablate_head(model, 1, 1),
    "patch": lambda model: patch_activation(model, 1, [0, 3], X),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["vit", "distilled", "registers", "mean", "siglip", "eva"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_is_bit_equal_afterwards_also_after_an_error(case, kind, sparse, family, images):
    model = family(kind)
    if sparse:
        sparsify(model, 0.03)
    model.train()
    model.blocks[0].eval()
    torch.manual_seed(0)
    before, clean = state(model), model(images).detach()
    intervene = {
        **CASES,
        "patch": lambda m: patch_activation(m, 1, [0, 3], images.flip(0)),
    }[case]
    with intervene(model):
        changed = model(images).detach()
    assert not torch.equal(changed, clean)
    assert state(model) == before and torch.equal(model(images), clean)
    with pytest.raises(OwnError), intervene(model):
        raise OwnError
    assert state(model) == before and torch.equal(model(images), clean)
    with pytest.raises(ValueError, match="must lie in 0 to"), cut_edge(model, 1, 0, 99):
        model(images)
    with pytest.raises((AssertionError, RuntimeError, ValueError)), intervene(model):
        model(images[..., :13])
    assert state(model) == before and torch.equal(model(images), clean)


def test_nested_and_inside_other_blocks():
    model = tiny().double()
    clean = model(X)
    with cut_edge(model, 1, 0, 3), ablate_head(model, 1, 2), cut_edge(model, 1, 0, 4, head=0):
        both = attention_maps(model, X)["blocks.1.attn"]
    assert not both[:, :, 0, 3].any() and not both[:, 2].any() and not both[:, 0, 0, 4].any() and both[:, 1, 0, 4].all()
    with sparsified(model, 0.05), cut_edge(model, 1, 0, 3), TokenSparsityTracker(model) as tracker:
        model(X)
        assert tracker.summary().rows == 2 * 3 * 3 * 17
        maps = [explain(model, X, method, 1) for method in ("relevance", "grad_cam", "rollout")]
    assert all(torch.isfinite(one).all() for one in maps)
    assert torch.equal(model(X), clean)


def test_gradients_pass_and_see_the_change():
    model = tiny().double()
    with cut_edge(model, 1, 0, range(1, 17)):
        weights, gradient = attention_gradients(model, X, 1)["blocks.1.attn"]
        assert not weights[:, :, 0, 1:].any() and gradient.any()
        model(X)[:, 1].sum().backward()
    assert model.patch_embed.proj.weight.grad.any()
    expected = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    with cut_edge(model, 1, 0, range(1, 17)):  # what checkpointing computes again is computed with the cut
        model(X)[:, 1].sum().backward()
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, expected)


def test_a_reused_block_is_changed_at_its_place():
    model = tiny(depth=2).double()
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[1], model.blocks[0])
    for index in (0, 2):
        edit = lambda at, w, index=index: torch.cat([w[:, :1], w[:, 1:] * (at != index)], dim=1)  # noqa: E731
        expected = by_hand(model, X, edit)
        with ablate_head(model, index, [1, 2]):
            for _ in range(2):
                torch.testing.assert_close(model(X), expected)
        with patch_activation(model, index, range(17), OTHER):
            torch.testing.assert_close(model(X), model.head(model.norm(tail(model, index))[:, 0]))
    with pytest.raises(ValueError, match="several places"), patch_activation(model, model.blocks[0], 0, OTHER):
        pass
    model.set_grad_checkpointing()  # timm then calls each block once: another model
    with pytest.raises(ValueError, match="give its name"), ablate_head(model, 2, 1):
        model(X)


def tail(model: VisionTransformer, index: int) -> Tensor:
    """The tokens of OTHER after all blocks, which are those of a model patched at any of them."""
    tokens = model._pos_embed(model.patch_embed(OTHER))
    for block in model.blocks:
        tokens = block(tokens)
    return tokens


def test_attention_inline_and_wrapped_and_compiled():
    model = tiny(block_fn=ParallelScalingBlock).double()
    with ablate_head(model, -1, [0, 1, 2]):
        maps = attention_maps(model, X)
        assert not maps["blocks.2"].any()
    plain = tiny().double()
    with ablate_head(plain, 1, 0):
        expected = plain(X)
    for wrapped in (nn.DataParallel(plain), torch.compile(plain, backend="eager")):
        clean = wrapped(X)
        with ablate_head(wrapped, 1, 0):
            torch.testing.assert_close(wrapped(X), expected)
        assert torch.equal(wrapped(X), clean)


def test_what_cannot_be_meant_is_refused():
    model = sharp(Repeating(**{**TINY, "depth": 1})).double()
    with pytest.raises(ValueError, match="was called 3 times"), ablate_head(model, 0, 1):
        model(X)
    model = tiny().double()
    for wrong in (True, 0.5, "x", [], -1, [0, -1], None):
        with (
            pytest.raises(ValueError, match="query must be one or several whole numbers"),
            cut_edge(model, 0, wrong, 1),
        ):
            pass
    with pytest.raises(ValueError, match="unknown attention layer 3"), ablate_head(model, 3, 0):
        pass
    with pytest.raises(ValueError, match="head must lie in 0 to 2 here, got 3"), ablate_head(model, 0, 3):
        model(X)
    with pytest.raises(ValueError, match="images must be"), patch_activation(model, 0, 0, None):
        pass
    with (
        pytest.raises(ValueError, match="source must be 1 or 2 images"),
        patch_activation(model, 0, 0, pictures(3).double()),
    ):
        model(X)
    with pytest.raises(ValueError, match=r"has no output \[B, N, C\]"), patch_activation(model, "head", 0, OTHER):
        model(X)


def test_other_threads_predict_as_if_nothing_were():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny().double()
    clean = model(X)
    with ablate_head(model, 1, 0), ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(model, X).result(), clean)
        assert not torch.allclose(model(X), clean)
