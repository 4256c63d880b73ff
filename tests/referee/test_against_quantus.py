"""Our localisation scores are those of Quantus where the two define the same thing; where they do not, the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svit_utils.data.planted_shapes import PlantedShapes
from svit_utils.referee.localisation import energy_in_mask, iou_at_mask_area, pointing_game

quantus = pytest.importorskip("quantus")

PLANTED = PlantedShapes("test", 30).batch(30)
MASKS = PLANTED.masks  # [30, 56, 56]
SHARE = MASKS.flatten(1).double().mean(1)


def tie_free(seed=0):
    """Maps [30, 56, 56] in (0, 1], each a random order of its pixels without a tie."""
    rng = np.random.default_rng(seed)
    n = MASKS[0].numel()
    return torch.from_numpy(np.stack([rng.permutation(n) + 1.0 for _ in MASKS]) / n).view(MASKS.shape)


MAPS = tie_free()


def by_quantus(metric, maps, *, abs=False, normalise=False):
    """[B] scores of maps [B, H, W] on MASKS. The localisation metrics ask for a model and never call it."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 56 * 56, 10)).eval()
    score = metric(abs=abs, normalise=normalise, disable_warnings=True, display_progressbar=False)
    values = score(
        model=model,
        x_batch=PLANTED.images.numpy(),
        y_batch=PLANTED.labels.numpy(),
        a_batch=maps[:, None].numpy(),
        s_batch=MASKS[:, None].numpy(),
        channel_first=True,
    )
    return torch.tensor(np.array(values, dtype=np.float64))


def test_pointing_game():
    # Half of the maps get their highest point moved onto the object, so that hits and misses are both many.
    maps = MAPS.clone()
    for heat, mask in zip(maps[::2], MASKS[::2], strict=True):
        heat[tuple(mask.nonzero()[3])] = 2.0
    got = pointing_game(maps, MASKS)
    assert torch.equal(got, by_quantus(quantus.PointingGame, maps))
    assert torch.equal(got, by_quantus(quantus.PointingGame, maps, normalise=True))  # scaled by the maximum: same place
    assert 15 <= got.sum() < 30


def test_energy_is_relevance_mass_accuracy():
    got = energy_in_mask(MAPS, MASKS)
    torch.testing.assert_close(got, by_quantus(quantus.RelevanceMassAccuracy, MAPS))
    concentrated = MAPS**20 + 5 * MASKS * MAPS
    torch.testing.assert_close(
        energy_in_mask(concentrated, MASKS), by_quantus(quantus.RelevanceMassAccuracy, concentrated)
    )
    assert got.max() < 0.5 < energy_in_mask(concentrated, MASKS).min()


def test_iou_is_a_function_of_relevance_rank_accuracy():
    # k of the highest pixels, k = the object's area, r k of them on it: union 2k - rk, so IoU = r / (2 - r).
    for maps in (MAPS, MAPS + 0.5001 * MASKS):
        rank = by_quantus(quantus.RelevanceRankAccuracy, maps)
        torch.testing.assert_close(iou_at_mask_area(maps, MASKS), rank / (2 - rank))
    assert rank.min() > 0.5 > SHARE.max()  # the second lies on the object far more than by chance


def test_energy_of_signed_maps_differs_because_quantus_keeps_the_negative_part():
    signed = MAPS - 0.4
    ours = energy_in_mask(signed, MASKS)
    # Quantus divides the sum inside by the sum overall, negative values included: not a share, even if it adds up.
    plain = by_quantus(quantus.RelevanceMassAccuracy, signed)
    inside, total = (signed * MASKS).flatten(1).sum(1), signed.flatten(1).sum(1)
    torch.testing.assert_close(plain, inside / total)
    assert (plain - ours).abs().max() > 0.02
    # With abs=True it counts evidence against the class as evidence for it.
    torch.testing.assert_close(
        by_quantus(quantus.RelevanceMassAccuracy, signed, abs=True), energy_in_mask(signed.abs(), MASKS)
    )
    # Without the negative part, which for a Grad-CAM is the ReLU, there is nothing left to differ about.
    torch.testing.assert_close(by_quantus(quantus.RelevanceMassAccuracy, signed.clamp_min(0)), ours)


def test_tied_maps_differ_because_quantus_counts_any_hit_and_orders_by_storage():
    # Quantus refuses a batch of one single value, but not blank maps of a value each.
    blank = torch.arange(1.0, 31.0)[:, None, None].expand(MAPS.shape).clone()
    assert torch.equal(by_quantus(quantus.PointingGame, blank), torch.ones(len(MASKS), dtype=torch.float64))
    torch.testing.assert_close(pointing_game(blank, MASKS), SHARE)
    # Which of the tied pixels are "highest" is left to the sort; that rank accuracy is one outcome of a lottery, of
    # which ours is the expectation: r = the object's share.
    torch.testing.assert_close(iou_at_mask_area(blank, MASKS), SHARE / (2 - SHARE))
    rank = by_quantus(quantus.RelevanceRankAccuracy, blank)
    assert (rank - SHARE).abs().max() > 0.05
