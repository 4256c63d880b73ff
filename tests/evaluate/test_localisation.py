"""Scores whose answers are known in closed form."""

from __future__ import annotations

import pytest
import torch

from svit_utils.evaluate import (
    centre_maps,
    energy_in_mask,
    iou_at_mask_area,
    localisation_scores,
    pointing_game,
    random_maps,
    uniform_maps,
)

SCORES = (pointing_game, energy_in_mask, iou_at_mask_area)


def rectangles(batch=3, size=(20, 30)):
    masks = torch.zeros(batch, *size, dtype=torch.bool)
    for i in range(batch):
        masks[i, 2 + i : 8 + i, 5 : 15 + i] = True
    return masks


MASKS = rectangles()
SHARE = MASKS.flatten(1).double().mean(1)


@pytest.mark.parametrize("score", SCORES)
def test_mask_scores_one_and_its_complement_zero(score):
    assert torch.equal(score(MASKS.float(), MASKS), torch.ones(3, dtype=torch.float64))
    assert torch.equal(score((~MASKS).float(), MASKS), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0])
def test_a_blank_map_scores_what_chance_gives(constant):
    blank = torch.full(MASKS.shape, constant)
    torch.testing.assert_close(pointing_game(blank, MASKS), SHARE)
    torch.testing.assert_close(energy_in_mask(blank, MASKS), SHARE)
    torch.testing.assert_close(iou_at_mask_area(blank, MASKS), SHARE / (2 - SHARE))


def test_random_maps_score_their_expectation():
    masks = MASKS[:1].expand(4000, -1, -1)
    maps = random_maps(4000, (20, 30), seed=3)
    share, area = float(SHARE[0]), int(MASKS[0].sum())
    assert abs(pointing_game(maps, masks).mean() - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert abs(energy_in_mask(maps, masks).mean() - share) < 0.002
    # The intersection of k random pixels with k given ones is hypergeometric: mean k * share.
    intersection = iou_at_mask_area(maps, masks)
    intersection = 2 * area * intersection / (1 + intersection)
    assert abs(intersection.mean() - area * share) < 0.2


def test_ties_at_the_maximum_count_by_their_share():
    maps = torch.zeros(1, 4, 4)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = True
    maps[0, 0, 1] = maps[0, 3, 3] = maps[0, 3, 2] = 1.0  # one of three maxima on the object
    assert pointing_game(maps, masks).item() == pytest.approx(1 / 3)
    # two places for three tied pixels, one of them inside: intersection 2/3
    assert iou_at_mask_area(maps, masks).item() == pytest.approx((2 / 3) / (4 - 2 / 3))


def test_ties_do_not_depend_on_where_pixels_are_stored():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 3, (3, 20, 30), generator=generator).float()
    order = torch.randperm(600, generator=generator)
    for score in SCORES:
        shuffled = score(maps.flatten(1)[:, order].view_as(maps), MASKS.flatten(1)[:, order].view_as(MASKS))
        torch.testing.assert_close(score(maps, MASKS), shuffled)


def test_invariances():
    maps = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(1))
    for score in SCORES:
        torch.testing.assert_close(score(maps * 1e-20, MASKS), score(maps, MASKS))
    for score in (pointing_game, iou_at_mask_area):
        torch.testing.assert_close(score(maps.double().exp() + 7, MASKS), score(maps, MASKS))
    assert not torch.allclose(energy_in_mask(maps + 7, MASKS), energy_in_mask(maps, MASKS))
    torch.testing.assert_close(energy_in_mask(maps, MASKS), energy_in_mask(maps.clamp_min(0), MASKS))


def test_partial_overlap_by_hand():
    maps = torch.zeros(1, 1, 4)
    maps[0, 0] = torch.tensor([3.0, 1.0, 0.0, 4.0])
    masks = torch.tensor([[[True, True, False, False]]])
    scores = {name: score.item() for name, score in localisation_scores(maps, masks).items()}
    assert scores == pytest.approx({"pointing_game": 0.0, "energy_in_mask": 0.5, "iou_at_mask_area": 1 / 3})


def test_centre_baseline_peaks_at_the_centre_on_any_size():
    maps = centre_maps(2, (21, 31))
    assert maps.shape == (2, 21, 31)
    assert maps[0].argmax().item() == 10 * 31 + 15
    torch.testing.assert_close(maps, maps.flip(1, 2))
    middle = torch.zeros(1, 20, 20, dtype=torch.bool)
    middle[0, 6:14, 6:14] = True
    corner = torch.zeros(1, 20, 20, dtype=torch.bool)
    corner[0, :8, :8] = True
    assert energy_in_mask(centre_maps(1, (20, 20)), middle) > 2 * energy_in_mask(centre_maps(1, (20, 20)), corner)
    with pytest.raises(ValueError, match="sigma must be positive"):
        centre_maps(1, (4, 4), sigma=0)


def test_random_maps_are_seeded():
    assert torch.equal(random_maps(2, (4, 5), seed=1), random_maps(2, (4, 5), seed=1))
    assert not torch.equal(random_maps(2, (4, 5), seed=1), random_maps(2, (4, 5), seed=2))
    assert torch.equal(uniform_maps(2, (4, 5)), torch.ones(2, 4, 5))


@pytest.mark.parametrize("score", SCORES)
def test_bad_input(score):
    with pytest.raises(ValueError, match=r"both be \[B, H, W\], got \(3, 4, 6\) and \(3, 20, 30\): upsample"):
        score(torch.zeros(3, 4, 6), MASKS)
    with pytest.raises(ValueError, match=r"masks must be boolean, got torch.float32"):
        score(torch.zeros(3, 20, 30), MASKS.float())
    with pytest.raises(ValueError, match="must be finite"):
        score(torch.full((3, 20, 30), float("nan")), MASKS)
    with pytest.raises(ValueError, match="at least one pixel"):
        score(torch.zeros(3, 20, 30), torch.zeros_like(MASKS))
