"""The head's weighting of the tokens, of each pooling timm has: as the head weights them, or refused.

The situation of vit-explain 25: what is the row of a model without a class token?
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from svit_utils import sparsify
from svit_utils.attention import sparse_modules
from svit_utils.explain import attention_rollout, class_attention, explain, readout_rows, token_grid
from tests.explain.by_hand import TINY, calls, check_rollout, even, pictures, sharp, tiny

X = pictures()


def eva(**kwargs) -> Eva:
    torch.manual_seed(0)
    return sharp(Eva(**{**TINY, "use_rot_pos_emb": True, **kwargs}))


# name -> (model, tokens that the head reads, all alike; prefix tokens)
EVEN = {
    "token": (tiny, {}, [0], 1),
    "token, registers": (tiny, {"reg_tokens": 4}, [0], 5),
    "avg": (tiny, {"class_token": False, "global_pool": "avg"}, range(16), 0),
    "avg beside a class token": (tiny, {"global_pool": "avg"}, range(1, 17), 1),
    "avg beside registers": (tiny, {"class_token": False, "reg_tokens": 3, "global_pool": "avg"}, range(3, 19), 3),
    "avg with the class token": (tiny, {"global_pool": "avg", "pool_include_prefix": True}, range(17), 1),
    "avg with class token and registers": (
        tiny,
        {"reg_tokens": 4, "global_pool": "avg", "pool_include_prefix": True},
        range(21),
        5,
    ),
    "avg with registers": (
        tiny,
        {"class_token": False, "reg_tokens": 1, "global_pool": "avg", "pool_include_prefix": True},
        range(17),
        1,
    ),
    "avg, fc_norm off": (tiny, {"global_pool": "avg", "fc_norm": False}, range(1, 17), 1),
    "eva token": (eva, {"global_pool": "token"}, [0], 1),
    "eva avg": (eva, {"global_pool": "avg"}, range(1, 17), 1),
    "eva avg, registers": (eva, {"global_pool": "avg", "num_reg_tokens": 4}, range(5, 21), 5),
}


@pytest.mark.parametrize("name", EVEN)
def test_tokens_read_all_alike(name):
    build, kwargs, tokens, prefix = EVEN[name]
    model = build(**kwargs)
    weights, grid = calls(model, X), token_grid(model, X)
    assert grid.num_prefix == prefix and readout_rows(model, grid).tolist() == list(tokens)
    shares = even(list(tokens), grid.num_tokens)
    if build is tiny:  # Eva rotates q and k in its own attention; the hooks see that as well
        assert len(weights) == 3
    check_rollout(attention_rollout(model, X), weights, shares, prefix)
    got = class_attention(model, X, layer=1).flatten(2)
    expected = np.einsum("n,bhnm->bhm", shares, weights[1].numpy())[..., prefix:]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


# name -> (model, prefix tokens, whether the pooling attends to these as well)
POOLS = {
    "siglip": (tiny, {"class_token": False, "global_pool": "map"}, 0, True),
    "map beside a class token": (tiny, {"global_pool": "map"}, 1, False),
    "map beside registers": (tiny, {"class_token": False, "reg_tokens": 3, "global_pool": "map"}, 3, False),
    "map with registers": (
        tiny,
        {"class_token": False, "reg_tokens": 1, "global_pool": "map", "pool_include_prefix": True},
        1,
        True,
    ),
    "map with class token and registers": (
        tiny,
        {"reg_tokens": 2, "global_pool": "map", "pool_include_prefix": True},
        3,
        True,
    ),
    "eva map": (eva, {"global_pool": "map"}, 1, True),
    "prr token": (tiny, {"global_pool": "prr"}, 1, True),
    "prr avg": (tiny, {"class_token": False, "reg_tokens": 2, "global_pool": "prr"}, 2, True),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_an_attention_pooling_head_weights_the_tokens_as_it_does(name, sparse):
    build, kwargs, prefix, whole = POOLS[name]
    model = build(**kwargs)
    *weights, pool = calls(model, X)  # the last call is the head's: [B, H, 1, N] or [B, H, N, N]
    if sparse:
        sparsify(model, 0.03)
        weights = []
        for module in sparse_modules(model).values():
            module.observers.append(lambda _m, record: weights.append(record.weights.detach()))
        (pool,) = calls(model, X)
        for module in sparse_modules(model).values():
            module.observers.clear()
    grid = token_grid(model, X)
    assert pool.shape[-1] == (grid.num_tokens if whole else 16) and len(weights) == 3
    mean = pool.mean(dim=1)
    read = mean.mean(dim=1) if name == "prr avg" else mean[:, 0]
    shares = np.zeros((2, grid.num_tokens))
    shares[:, grid.num_tokens - pool.shape[-1] :] = read.numpy()
    assert not np.allclose(shares[0], shares[1], atol=1e-3)
    check_rollout(attention_rollout(model, X), weights, shares, prefix)
    expected = np.einsum("bn,bhnm->bhm", shares, weights[-1].double().numpy())[..., prefix:]
    np.testing.assert_allclose(class_attention(model, X).flatten(2).numpy(), expected, atol=1e-5)


REFUSED = {
    "avgmax": (tiny, {"global_pool": "avgmax"}),
    "max": (tiny, {"global_pool": "max"}),
    "none": (tiny, {"global_pool": ""}),
    "eva max": (eva, {"global_pool": "max"}),
    "eva none": (eva, {"global_pool": ""}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_without_one_weighting_is_refused(name):
    build, kwargs = REFUSED[name]
    model = build(**kwargs)
    for method in (attention_rollout, class_attention):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} .*global_pool={kwargs['global_pool']!r}.*rows"):
            method(model, X)
    if name != "none" and name != "eva none":  # Grad-CAM follows the score itself, whatever the head does
        assert explain(model, X, "grad_cam").shape == (2, 4, 4)


class OwnHead(VisionTransformer):
    """Says "token", and reads the mean of class token and patches."""

    def forward_head(self, x, pre_logits=False):
        x = (x[:, 0] + x[:, 1:].mean(1)) / 2
        return x if pre_logits else self.head(x)


class OwnPool(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x[:, 3]


@pytest.mark.parametrize("kind", [OwnHead, OwnPool])
def test_a_head_of_the_users_own_is_refused(kind):
    model = sharp(kind(**TINY))
    for method in (attention_rollout, class_attention):
        with pytest.raises(ValueError, match=rf"{kind.__name__} .*rows"):
            method(model, X)


class Encoder(nn.Module):
    """Tokens and grid as timm's, and nothing that says what is read of them."""

    def __init__(self):
        super().__init__()
        self.vit, self.num_prefix_tokens = tiny(), 1
        self.patch_embed = self.vit.patch_embed

    def forward(self, x):
        return self.vit(x)


def test_a_model_that_does_not_say_what_it_reads_is_refused():
    with pytest.raises(ValueError, match=r"Encoder .*rows"):
        class_attention(Encoder(), X)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_a_head_taken_off_changes_no_map(num_classes):
    model = tiny()
    expected = attention_rollout(model, X)
    model.reset_classifier(num_classes)
    torch.testing.assert_close(attention_rollout(model, X), expected)


def test_a_pooling_changed_afterwards_counts():
    model = tiny()
    weights = calls(model, X)
    model.reset_classifier(5, "avg")
    check_rollout(attention_rollout(model, X), weights, even(list(range(1, 17)), 17), 1)
    model = tiny(class_token=False, global_pool="map")
    weights = calls(model, X)[:-1]
    model.reset_classifier(5, "avg")
    check_rollout(attention_rollout(model, X), weights, even(list(range(16)), 16), 0)
