"""SaCo on models whose answer to every painted picture is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from svit_utils.referee import random_maps, saco


class Weighing(nn.Module):
    """The log odds of class 1 are a weighted sum of the cells' brightness: what painting a cell costs is its weight."""

    def __init__(self, weights: torch.Tensor, size: int = 4) -> None:
        super().__init__()
        self.weights, self.size = weights, size

    def forward(self, x):
        cells = nn.functional.avg_pool2d(x.mean(1, keepdim=True), self.size).squeeze(1)
        score = (cells * self.weights.to(x.dtype)).sum((1, 2))
        return torch.stack([torch.zeros_like(score), score], dim=1)


WEIGHTS = torch.linspace(0.1, 1.6, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(4))].view(4, 4)
X = torch.ones(1, 3, 16, 16)


@pytest.mark.parametrize("groups", [2, 4, 5, 8, 16])
def test_the_right_order_is_1_the_reverse_minus_1_and_no_order_0(groups):
    model, maps = Weighing(WEIGHTS), WEIGHTS[None]
    options = {"groups": groups, "fill": 0.0}
    assert saco(model, X, maps, 1, **options).tolist() == [1.0]
    assert saco(model, X, -maps, 1, **options).tolist() == [-1.0]
    for constant in (torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.3)):
        assert saco(model, X, constant, 1, **options).tolist() == [0.0]
    assert saco(model, X, maps * 7 - 2, 1, **options).tolist() == [1.0]
    assert saco(model, X, maps, 0, **options).tolist() == [-1.0]  # the other class loses what this one keeps


def by_hand(model, x, map_, target, groups, fill, order):
    """The authors' double loop over pairs, for one image, and sums over groups of one size."""
    cells = map_.flatten().double().numpy()
    parts = np.split(order, groups)
    with torch.no_grad():
        clean = model(x[None]).double().softmax(-1)[0, target].item()
        drops, sums = [], []
        for part in parts:
            painted = x.clone()
            for cell in part:
                i, j = divmod(int(cell), 4)
                painted[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = fill
            drops.append(clean - model(painted[None]).double().softmax(-1)[0, target].item())
            sums.append(cells[part].sum())
    found = total = 0.0
    for i in range(groups - 1):
        for j in range(i + 1, groups):
            weight = sums[i] - sums[j] if drops[i] >= drops[j] else -(sums[i] - sums[j])
            found += weight
            total += abs(weight)
    return found / total


@pytest.mark.parametrize("fill", [None, 0.0, 0.7])
@pytest.mark.parametrize("groups", [2, 4, 8, 16])
def test_equals_the_authors_program(groups, fill):
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(3, 3, 16, 16, generator=generator)
    maps, model = random_maps(3, (4, 4), seed=2), Weighing(WEIGHTS * torch.where(WEIGHTS > 0.8, 1, -1))
    got = saco(model, x, maps, [1, 0, 1], groups=groups, fill=fill)
    for image, target in enumerate([1, 0, 1]):
        paint = x[image].mean(dim=(1, 2))[:, None, None] if fill is None else fill
        order = np.argsort(-maps[image].flatten().numpy(), kind="stable")
        expected = by_hand(model, x[image], maps[image], target, groups, paint, order)
        assert got[image].item() == pytest.approx(expected, abs=1e-9)
    assert got.dtype == torch.float64 and (got.abs() <= 1).all()
    assert groups < 8 or len(set(got.tolist())) == 3


def test_random_maps_get_0_on_average_and_batches_do_not_matter():
    model, maps = Weighing(WEIGHTS), random_maps(200, (4, 4), seed=1)
    x = X.expand(200, -1, -1, -1)
    scores = saco(model, x, maps, 1, groups=8, fill=0.0)
    assert abs(scores.mean()) < 4 * scores.std() / math.sqrt(200) and scores.std() > 0.1
    assert torch.equal(scores, saco(model, x, maps, 1, groups=8, fill=0.0, batch_size=7))


def test_ties_are_broken_at_random_and_the_same_for_a_seed():
    half = torch.zeros(1, 4, 4)
    half[0, :2] = 1
    scores = [saco(Weighing(WEIGHTS), X, half, 1, groups=8, fill=0.0, seed=seed).item() for seed in (0, 0, *range(9))]
    assert scores[0] == scores[1] and len(set(scores)) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 1}, "groups must lie in 2 to 16, the cells of a map, got 1"),
        ({"groups": 17}, "groups must lie in 2 to 16, the cells of a map, got 17"),
        ({"groups": 2.5}, "groups must be a whole number"),
        ({"fill": float("nan")}, "fill must be a finite value"),
        ({"targets": 2}, "targets must lie in 0 to 1"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        saco(Weighing(WEIGHTS), X, WEIGHTS[None], **options)
