"""Attention rollout against a matrix product by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svit_utils import sparsify
from svit_utils.explain import attention_maps, attention_rollout, readout_rows, rollout_matrix, token_grid
from tests.explain.by_hand import calls

NAMES = ["vit", "distilled", "registers", "mean", "siglip", "eva"]


def by_hand(maps: list[torch.Tensor], image: int, fuse, residual: float) -> np.ndarray:
    product = None
    for weights in maps:
        fused = fuse(weights[image].double().numpy(), axis=0)
        n = len(fused)
        step = np.empty((n, n))
        for i in range(n):
            row = (1 - residual) * fused[i] + residual * np.eye(n)[i]
            step[i] = row / row.sum() if row.sum() > 0 else row
        product = step if product is None else step @ product
    return product


def test_two_tokens_by_hand():
    first = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    second = torch.tensor([[[[0.2, 0.8], [0.0, 1.0]]]])
    # with half identity: [[1, 0], [.25, .75]] and [[.6, .4], [0, 1]]; second @ first
    expected = torch.tensor([[[0.6 + 0.4 * 0.25, 0.4 * 0.75], [0.25, 0.75]]])
    torch.testing.assert_close(rollout_matrix([first, second]), expected)


@pytest.mark.parametrize("fusion, fuse", [("mean", np.mean), ("max", np.max), ("min", np.min)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_product_by_hand_for_every_image(name, fusion, fuse, family, images):
    model = family(name)
    sparsify(model, 0.03, layers=[0, 1], empty_rows="zero")
    grid = token_grid(model, images)
    maps = list(attention_maps(model, images).values())
    got = attention_rollout(model, images, head_fusion=fusion, residual=0.3)
    tokens = readout_rows(model, grid).tolist()
    shares = np.full((2, len(tokens)), 1 / len(tokens))
    if name == "siglip":  # its head reads the tokens by an attention of its own, the last call of a forward pass
        shares = calls(model, images)[-1].mean(dim=1)[:, 0].numpy()
    for image in range(2):
        rows = shares[image] @ by_hand(maps, image, fuse, 0.3)[tokens]
        np.testing.assert_allclose(got[image].flatten().numpy(), rows[grid.num_prefix :], atol=1e-6)
    assert not torch.allclose(got[0], got[1])


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rows_sum_to_one(fusion):
    maps = [torch.rand(2, 3, 7, 7).softmax(-1) for _ in range(4)]
    torch.testing.assert_close(rollout_matrix(maps, fusion).sum(-1), torch.ones(2, 7))


def test_an_emptied_row_passes_its_own_token_on():
    weights = torch.full((1, 1, 3, 3), 1 / 3)
    weights[0, 0, 1] = 0
    assert rollout_matrix([weights])[0, 1].tolist() == [0, 1, 0]
    assert rollout_matrix([weights], residual=0.0)[0, 1].tolist() == [0, 0, 0]


def test_start_layer_leaves_early_layers_out(family, images):
    model = family("vit")
    maps = list(attention_maps(model, images).values())
    grid = token_grid(model, images)
    expected = rollout_matrix(maps[2:])[:, 0, 1:].reshape(2, *grid.size)
    torch.testing.assert_close(attention_rollout(model, images, start_layer=2), expected)


def test_bad_input(family, images):
    model = family("vit")
    with pytest.raises(ValueError, match="unknown head_fusion 'median': allowed are"):
        attention_rollout(model, images, head_fusion="median")
    with pytest.raises(ValueError, match=r"residual must lie in \[0, 1\), got 1.0"):
        attention_rollout(model, images, residual=1.0)
    with pytest.raises(ValueError, match="unknown attention layer 3: allowed are indices -3 to 2"):
        attention_rollout(model, images, start_layer=3)
    with pytest.raises(ValueError, match="one size"):
        rollout_matrix([torch.rand(1, 1, 4, 4), torch.rand(1, 1, 5, 5)])
