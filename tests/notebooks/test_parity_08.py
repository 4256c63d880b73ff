"""Chapter 8 writes out the referee's scores, the display and Holm's correction; they are the package's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.explain import displayed
from svit_utils.referee import (
    average_precision,
    deletion_curve,
    energy_in_mask,
    holm,
    infidelity,
    random_maps,
)
from svit_utils.referee.infidelity import random_squares
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "08_the_referee"
EXACT = {"rtol": 0, "atol": 1e-12}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bent(nn.Module):
    """Three classes, nothing linear about them, in float64; images [B, 3, 8, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3 * 8 * 12, 3, generator=generator(5), dtype=torch.float64) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.double().flatten(1) @ self.weights).sin() * 2


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_average_precision(levels: int) -> None:
    by_hand = extract_function(CHAPTER, "average_precision_by_hand", {"torch": torch})
    heat = (torch.rand(6, 9, 7, generator=generator(0), dtype=torch.float64) * levels).floor()  # many ties, or none
    masks = torch.rand(6, 9, 7, generator=generator(1)) > 0.7
    got = torch.stack([by_hand(h, m) for h, m in zip(heat, masks, strict=True)])
    torch.testing.assert_close(got, average_precision(heat, masks), **EXACT)


@pytest.mark.parametrize("steps", [1, 4, 6, 24])
def test_deletion(steps: int) -> None:
    by_hand = extract_function(CHAPTER, "deletion_by_hand", {"torch": torch, "F": F})
    x = torch.randn(4, 3, 8, 12, generator=generator(0))
    heat, targets = random_maps(4, (4, 6), seed=1), [0, 2, 1, 1]
    wanted = deletion_curve(Bent(), x, heat, targets, steps=steps)
    got = torch.stack([by_hand(Bent(), *each, steps) for each in zip(x, heat, targets, strict=True)])
    assert got.shape == (4, steps + 1)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_the_true_order_of_a_sum_is_the_best_of_all() -> None:
    names = {"torch": torch, "nn": nn, "F": F}
    model = extract_function(CHAPTER, "WeightedSum", names)(torch.tensor([[0.4, -2.0], [1.5, 0.7]]).double())
    by_hand = extract_function(CHAPTER, "deletion_by_hand", names)
    best = by_hand(model, torch.ones(3, 4, 4), model.weights.detach(), 1, 4)
    for order in itertools.permutations(range(4)):
        curve = by_hand(model, torch.ones(3, 4, 4), torch.tensor(order).double().view(2, 2), 1, 4)
        assert (best <= curve + 1e-12).all()


@pytest.mark.parametrize("kind", ["noise", "gradient", "zeros"])
def test_infidelity(kind: str) -> None:
    by_hand = extract_function(CHAPTER, "infidelity_by_hand", {"torch": torch})
    model, target = Bent(), 1
    x = torch.randn(1, 3, 8, 12, generator=generator(3), dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(model(x)[0, target], x)[0].sum(dim=1)  # [1, 8, 12]
    heat = {"noise": random_maps(1, (8, 12)).double(), "gradient": slope, "zeros": torch.zeros(1, 8, 12)}[kind]
    x = x.detach()
    wanted = infidelity(model, x, heat, target, perturbations=30, multiply_by_inputs=False, seed=2)
    draws = torch.rand(1, 30, 3, generator=generator(2), dtype=torch.float64)[0]  # the same as the package's
    removed = random_squares(draws, (8, 12))
    got = by_hand(model, x[0], heat.expand(3, -1, -1), target, removed)
    torch.testing.assert_close(got, wanted[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.04, 0.2, 0.9])
def test_displayed(tau: float) -> None:
    by_hand = extract_function(CHAPTER, "displayed_by_hand", {"torch": torch})
    weights = (2 * torch.randn(5, 3, 40, generator=generator(0), dtype=torch.float64)).softmax(dim=-1)
    got = by_hand(weights, tau)
    torch.testing.assert_close(got, displayed(weights, tau), **EXACT)
    if tau == 0.9:  # no row has a survivor
        assert torch.equal(got, weights)


def test_holm() -> None:
    by_hand = extract_function(CHAPTER, "holm_by_hand")
    rng = np.random.default_rng(0)
    for m in (1, 2, 7, 40):
        for p in (rng.uniform(size=m), rng.uniform(size=m) ** 4, rng.integers(0, 3, size=m) / 100):
            np.testing.assert_allclose(by_hand(list(p)), holm(p), rtol=0, atol=1e-15)


def test_the_careless_scores_are_careless() -> None:
    """They depend on where the object lies, or give a blank map full marks; the package's do neither."""
    names = {"torch": torch}
    pointing, generous, iou = (
        extract_function(CHAPTER, name, names) for name in ("careless_pointing", "generous_pointing", "careless_iou")
    )
    blank, mask = torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    for careless in (pointing, iou):
        assert (careless(blank, mask), careless(blank, mask.flip(0))) == (1.0, 0.0)
    assert generous(blank, mask) == generous(blank, mask.flip(0)) == 1.0


def test_the_cheat_sees_only_the_frame() -> None:
    frame_reader = extract_function(CHAPTER, "FrameReader", {"torch": torch, "nn": nn, "F": F})
    x = torch.randn(40, 3, 12, 12, generator=generator(0))
    cheat = frame_reader(x, torch.arange(40) % 10)
    inside = x.clone()
    inside[:, :, 2:-2, 2:-2] = 7.0
    with torch.no_grad():
        torch.testing.assert_close(cheat(inside), cheat(x), rtol=0, atol=1e-6)
    gradient = extract_function(CHAPTER, "pixel_gradient", {"torch": torch})(cheat, x, torch.arange(40) % 10)
    middle = torch.zeros(40, 12, 12, dtype=torch.bool)
    middle[:, 2:-2, 2:-2] = True
    assert float(energy_in_mask(gradient, middle).max()) == 0
