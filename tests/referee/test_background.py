"""What the variants change, and masses of maps known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from research.distractors import distractor_mass, distractor_regions, distractor_share
from svit_utils.data import PlantedShapes
from svit_utils.referee import uniform_maps
from svit_utils.referee.background import (
    BACKGROUND_VARIANTS,
    background_accuracy,
    background_mass,
)


class Always(nn.Module):
    """Answers with one class, whatever the picture."""

    def __init__(self, answer):
        super().__init__()
        self.logits = nn.Parameter(torch.eye(10)[answer])

    def forward(self, x):
        return self.logits.expand(len(x), 10)


def test_one_answer_is_right_on_its_own_class_in_every_variant():
    model = Always(3).train()
    correct = background_accuracy(model, images=40, batch_size=7)
    assert list(correct) == ["own", "aligned", "swapped", "erased", "distractors"]
    for values in correct.values():
        assert values.dtype == bool
        np.testing.assert_array_equal(values, np.arange(40) % 10 == 3)
    assert model.training
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        background_accuracy(model, images=0)


def test_variants_change_what_their_name_says():
    sets = {name: PlantedShapes("test", 50, **options).batch(50) for name, options in BACKGROUND_VARIANTS.items()}
    own = sets["own"]
    for name, batch in sets.items():
        assert torch.equal(batch.masks, own.masks) and torch.equal(batch.labels, own.labels), name
    agree = {name: float((batch.backgrounds == batch.labels).float().mean()) for name, batch in sets.items()}
    assert agree["aligned"] == agree["erased"] == 1.0 and agree["swapped"] == 0.0
    assert 0 < agree["own"] < 0.3 and agree["distractors"] == agree["own"]
    aligned, erased = sets["aligned"], sets["erased"]
    off = (aligned.coverage == 0)[:, None].expand_as(aligned.images)
    assert torch.equal(aligned.images[off], erased.images[off])
    assert not torch.equal(aligned.images[~off], erased.images[~off])


def test_background_mass():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, :2], masks[1, 0, 0] = True, True
    background = (~masks).flatten(1).double().mean(1)  # 1/2 and 23/24
    torch.testing.assert_close(background_mass(masks.float(), masks), torch.zeros(2).double())
    torch.testing.assert_close(background_mass((~masks).float(), masks), torch.ones(2).double())
    torch.testing.assert_close(background_mass(uniform_maps(2, (4, 6)), masks), background)
    torch.testing.assert_close(background_mass(torch.zeros(2, 4, 6), masks), background)


def toy():
    """A picture with one distractor pixel seen and one behind the object, and a picture with none to be seen."""
    without = torch.rand(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 2, 5, dtype=torch.bool)
    masks[:, 0, :2] = True
    with_them = without.clone()
    with_them[0, 2, 1, 4] += 0.5  # in one channel
    with_them[:, :, 0, 0] += 0.5
    return with_them, without, masks


def test_distractor_regions_and_masses_by_hand():
    images, without, masks = toy()
    regions = distractor_regions(images, without, masks)
    assert regions.nonzero().tolist() == [[0, 1, 4]]
    maps = torch.zeros(2, 2, 5)
    maps[:, 1, 4], maps[:, 0, 0], maps[:, 1, 1] = 3.0, 1.0, -5.0
    mass, chance = distractor_mass(maps, images, without, masks), distractor_share(images, without, masks)
    assert mass[0].item() == pytest.approx(0.75) and chance[0].item() == pytest.approx(0.1)
    assert mass.isnan().tolist() == chance.isnan().tolist() == [False, True]


def test_share_is_the_mass_of_a_uniform_map_on_real_pictures():
    plain, cluttered = PlantedShapes("test").batch(30), PlantedShapes("test", distractors=4).batch(30)
    arguments = (cluttered.images, plain.images, plain.masks)
    share = distractor_share(*arguments)
    torch.testing.assert_close(distractor_mass(uniform_maps(30, (56, 56)), *arguments), share, equal_nan=True)
    assert 0.005 < share.nanmean() < 0.1
    on_them = distractor_regions(*arguments)
    torch.testing.assert_close(distractor_mass(on_them.float(), *arguments)[~share.isnan()].min().item(), 1.0)
    assert not (on_them & plain.masks).any()


def test_bad_input():
    images, without, masks = toy()
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\] twice .* got \(2, 3, 2, 5\), \(2, 2, 5\)"):
        distractor_regions(images, without[:, 0], masks)
    with pytest.raises(ValueError, match=r"masks must be boolean, got torch\.float32"):
        distractor_regions(images, without, masks.float())
    with pytest.raises(ValueError, match=r"maps must be \[B, h, w\] and masks \[B, H, W\]"):
        distractor_mass(torch.zeros(2, 4, 4), images, without, masks)
