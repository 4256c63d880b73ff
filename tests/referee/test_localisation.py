"""Scores whose answers are known in closed form."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score

from svit_utils.explain import upsample
from svit_utils.referee.baselines import random_maps
from svit_utils.referee.localisation import (
    average_precision,
    energy_in_mask,
    iou_at_mask_area,
    localisation_scores,
    pointing_game,
)

SCORES = (pointing_game, energy_in_mask, iou_at_mask_area, average_precision)


def rectangles(batch=3, size=(20, 30)):
    masks = torch.zeros(batch, *size, dtype=torch.bool)
    for i in range(batch):
        masks[i, 2 + i : 8 + i, 5 : 15 + i] = True
    return masks


MASKS = rectangles()
SHARE = MASKS.flatten(1).double().mean(1)


@pytest.mark.parametrize("score", SCORES)
def test_the_mask_itself_scores_one(score):
    assert torch.equal(score(MASKS.float(), MASKS), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("score", [pointing_game, energy_in_mask, iou_at_mask_area])
def test_its_complement_scores_zero(score):
    assert torch.equal(score((~MASKS).float(), MASKS), torch.zeros(3, dtype=torch.float64))


def test_average_precision_of_the_complement_is_the_share_of_the_object():
    # Nothing of the object is found until its one tie comes, and with it the whole image.
    torch.testing.assert_close(average_precision((~MASKS).float(), MASKS), SHARE)


def test_the_worst_order_scores_above_zero_in_average_precision():
    n = MASKS[0].numel()
    worst = torch.arange(n, 0, -1.0).expand(3, -1).clone()
    for row, mask in zip(worst, MASKS.flatten(1), strict=True):
        row[mask] -= n  # the object strictly last
    expected = [sum(k / (n - m + k) for k in range(1, m + 1)) / m for m in MASKS.flatten(1).sum(1).tolist()]
    got = average_precision(worst.view(MASKS.shape), MASKS)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert (got > 0).all() and (got < SHARE).all()


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0])
def test_a_blank_map_scores_what_chance_gives(constant):
    blank = torch.full(MASKS.shape, constant)
    torch.testing.assert_close(pointing_game(blank, MASKS), SHARE)
    torch.testing.assert_close(energy_in_mask(blank, MASKS), SHARE)
    torch.testing.assert_close(iou_at_mask_area(blank, MASKS), SHARE / (2 - SHARE))
    torch.testing.assert_close(average_precision(blank, MASKS), SHARE)


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


def test_average_precision_of_a_random_order_is_a_little_over_the_share():
    # P(pixel at rank r is on the object) = m / n, and then (r - 1)(m - 1)/(n - 1) of those above it are, on average.
    batch, n, m = 4000, 600, int(MASKS[0].sum())
    found = average_precision(random_maps(batch, (20, 30), seed=5), MASKS[:1].expand(batch, -1, -1))
    harmonic = sum(1 / r for r in range(1, n + 1))
    expected = (m - 1) / (n - 1) + (n - m) / (n - 1) * harmonic / n
    assert m / n < expected < m / n + 0.011
    error = float(found.std()) / batch**0.5
    assert abs(found.mean() - expected) < 4 * error < 0.002


def region(grid, cell, box):
    """A mask [H, W] for maps of ``grid`` cells of ``cell`` pixels: rows and columns of ``box``, or the outer ring."""
    mask = torch.zeros(grid[0] * cell[0], grid[1] * cell[1], dtype=torch.bool)
    if box == "outer ring":
        mask[:] = True
        mask[cell[0] : -cell[0], cell[1] : -cell[1]] = False
    else:
        top, bottom, left, right = box
        mask[top:bottom, left:right] = True
    return mask


# name: grid, pixels of a cell, the object's box in pixels; most cut through patches.
PATCHES = {
    "inside": ((14, 14), (4, 4), (19, 42, 13, 37)),
    "one corner": ((14, 14), (4, 4), (0, 22, 0, 25)),
    "the outer ring": ((14, 14), (4, 4), "outer ring"),
    "one pixel": ((14, 14), (4, 4), (55, 56, 55, 56)),
    "a wide grid": ((4, 9), (3, 2), (2, 10, 5, 17)),
    "a tall grid, at the border": ((11, 3), (2, 5), (7, 22, 11, 15)),
    "one row of cells": ((1, 12), (8, 3), (3, 8, 0, 10)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_random_maps_of_patches_score_their_expectation_wherever_the_object_lies(name):
    grid, cell, box = PATCHES[name]
    batch, mask = 2000, region(grid, cell, box)
    maps, masks = random_maps(batch, grid, seed=11), mask.expand(batch, -1, -1)
    found = {key: scores.double() for key, scores in localisation_scores(maps, masks).items()}
    on = mask.unfold(0, cell[0], cell[0]).unfold(1, cell[1], cell[1]).sum(dim=(-1, -2)).double()  # per cell
    share, area = float(mask.double().mean()), float(on.sum())
    # The intersection: as many random pixels as the object has, hence its share of them. IoU = i / (2 area - i).
    found["intersection"] = 2 * found["iou_at_mask_area"] / (1 + found.pop("iou_at_mask_area"))
    # Average precision: a cell is at rank r = 1 ... k by chance; on the object are then its own pixels and, of the
    # r - 1 cells above it, on average their part of the other pixels.
    cells, pixels = on.numel(), cell[0] * cell[1]
    ranks = torch.arange(1, cells + 1).double()
    hits = on.view(-1, 1) + (ranks - 1) / (cells - 1) * (area - on.view(-1, 1))  # [k, k], cell and rank
    precision = float((on.view(-1, 1) / area * hits / (ranks * pixels)).sum() / cells)
    q, h = float((on**2).sum() / area), float((1 / ranks).mean())
    assert precision == pytest.approx((q * h + (area - q) * (1 - h) / (cells - 1)) / pixels)  # the docstring's
    for key, scores in found.items():
        expected = precision if key == "average_precision" else share
        error = float(scores.std()) / batch**0.5
        # A score in [0, 1] of mean m has a variance of at most m (1 - m); 5 % for that of a sample.
        assert 0 < error <= 1.05 * (expected * (1 - expected) / batch) ** 0.5, key
        assert abs(float(scores.mean()) - expected) < 4 * error, key


@pytest.mark.parametrize("levels", [2, None])
def test_a_map_of_patches_scores_as_the_map_of_their_pixels(levels):
    maps = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(2))
    maps = maps if levels is None else (maps * levels / 4).round()
    masks = torch.rand(6, 20, 14, generator=torch.Generator().manual_seed(3)) < 0.3
    pixels = torch.stack([torch.kron(heat, torch.ones(4, 2)) for heat in maps])  # [6, 20, 14]
    for score in SCORES:
        assert torch.equal(score(maps, masks), score(pixels, masks))


def test_patches_by_hand():
    # Two cells of four pixels. The upper one is highest; one of its pixels is on the object, two of the other's.
    maps = torch.tensor([[[2.0], [1.0]]])
    masks = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0]]], dtype=torch.bool)
    scores = {name: score.item() for name, score in localisation_scores(maps, masks).items()}
    assert scores == pytest.approx(
        {
            "pointing_game": 1 / 4,
            "energy_in_mask": (2 * 1 + 1 * 2) / (4 * 2 + 4 * 1),
            "iou_at_mask_area": (3 / 4) / (6 - 3 / 4),  # three places, all for the upper cell's four pixels
            "average_precision": (1 / 4 + 2 * 3 / 8) / 3,
        }
    )
    assert pointing_game(torch.ones(1, 2, 1), masks).item() == 3 / 8, "tied patches: the mean"


def test_bilinear_enlargement_drives_the_maxima_to_the_border():
    """Why maps are scored on their own grid; the scores of the first study were taken of enlarged ones.

    Of maps of different size, Quantus #296 asks the same: to be compared fairly.
    """
    batch, size = 2000, (56, 56)
    maps = random_maps(batch, (14, 14), seed=4)
    large = upsample(maps, size, mode="bilinear")
    ring = region((14, 14), (4, 4), "outer ring").expand(batch, -1, -1)  # 52 of 196 patches
    middle = region((14, 14), (4, 4), (16, 40, 16, 40)).expand(batch, -1, -1)  # 36 of 196
    for masks, share, biased in ((ring, 52 / 196, 0.64), (middle, 36 / 196, 0.08)):
        error = (share * (1 - share) / batch) ** 0.5
        assert abs(float(pointing_game(maps, masks).mean()) - share) < 4 * error
        found = float(pointing_game(large, masks).mean())
        assert abs(found - share) > 8 * error and abs(found - biased) < 4 * error


@pytest.mark.parametrize("levels", [2, 5, 50, None])
def test_average_precision_is_that_of_scikit_learn(levels):
    generator = torch.Generator().manual_seed(7)
    maps = torch.randn(40, 14, 14, generator=generator)
    if levels is not None:  # few values, many ties
        maps = (maps * levels / 4).round()
    masks = torch.rand(40, 14, 14, generator=generator) < torch.linspace(0.02, 1, 40)[:, None, None]
    masks[:, 3, 4] = True
    wanted = [
        average_precision_score(mask, heat)
        for mask, heat in zip(masks.flatten(1).numpy(), maps.flatten(1).numpy(), strict=True)
    ]
    got = average_precision(maps, masks)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


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
    for score in (pointing_game, iou_at_mask_area, average_precision):
        torch.testing.assert_close(score(maps.double().exp() + 7, MASKS), score(maps, MASKS))
    assert not torch.allclose(energy_in_mask(maps + 7, MASKS), energy_in_mask(maps, MASKS))
    torch.testing.assert_close(energy_in_mask(maps, MASKS), energy_in_mask(maps.clamp_min(0), MASKS))


def test_partial_overlap_by_hand():
    maps = torch.zeros(1, 1, 4)
    maps[0, 0] = torch.tensor([3.0, 1.0, 0.0, 4.0])
    masks = torch.tensor([[[True, True, False, False]]])
    scores = {name: score.item() for name, score in localisation_scores(maps, masks).items()}
    # From the top: a miss, a hit (precision 1/2), a hit (2/3).
    assert scores == pytest.approx(
        {"pointing_game": 0.0, "energy_in_mask": 0.5, "iou_at_mask_area": 1 / 3, "average_precision": 7 / 12}
    )


@pytest.mark.parametrize("score", SCORES)
def test_bad_input(score):
    # Cells that are not whole pixels, maps finer than the masks, other batches, another rank.
    for shape in ((3, 4, 7), (3, 8, 6), (3, 40, 60), (2, 20, 30), (1, 4, 6)):
        given = rf"got \({shape[0]}, {shape[1]}, {shape[2]}\) and \(3, 20, 30\)"
        with pytest.raises(ValueError, match=given + r": enlarge the maps .* upsample\(maps, size, mode=\"nearest\"\)"):
            score(torch.zeros(shape), MASKS)
    with pytest.raises(ValueError, match=r"maps must be \[B, h, w\] and masks \[B, H, W\], .* and \(20, 30\)"):
        score(torch.zeros(3, 4, 6), MASKS[0])
    with pytest.raises(ValueError, match=r"maps must be \[B, h, w\], got shape \(20, 30\)"):
        score(torch.zeros(20, 30), MASKS)
    with pytest.raises(ValueError, match=r"masks must be boolean, got torch.float32"):
        score(torch.zeros(3, 20, 30), MASKS.float())
    with pytest.raises(ValueError, match="must be finite"):
        score(torch.full((3, 20, 30), float("nan")), MASKS)
    with pytest.raises(ValueError, match="at least one pixel"):
        score(torch.zeros(3, 20, 30), torch.zeros_like(MASKS))
