"""Does a model, or its maps, look at the background? Measured on PlantedShapes, where the answer is known.

There the class lies in the object's outline alone, unless the background is tied to the label (`rho`): a model that
goes by the background is found by giving every object another one, or by leaving the object out.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svit_utils.data import PlantedShapes
from svit_utils.referee.localisation import energy_in_mask

BACKGROUND_VARIANTS: dict[str, dict[str, Any]] = {
    "own": {},  # the background says nothing about the label
    "aligned": {"rho": 1.0},  # the background is of the label's own family
    "swapped": {"swap_background": True},  # the background is of another class's family
    "erased": {"erase_object": True, "rho": 1.0},  # no object; the background is of the label's own family
    "distractors": {"distractors": 4},  # small blobs and bars on the background
}


def background_accuracy(
    model: nn.Module, *, images: int = 1000, seed: int = 0, batch_size: int = 100
) -> dict[str, np.ndarray]:
    """Which of the first `images` test pictures the model gets right: bool [images] for each of `BACKGROUND_VARIANTS`.

    The variants show the same objects in the same order, so two of them can be compared in pairs (`paired_bootstrap`).
    Chance is 0.1. A model that reads shapes is as good on "swapped" as on "aligned", and at chance on "erased". One
    that reads the background is right on "aligned" and "erased", at chance on "own", and below chance on "swapped".
    """
    from svit_utils.training.evaluation import evaluate  # loads the training code, which no map needs

    return {
        name: evaluate(model, PlantedShapes("test", images, seed=seed, **options), batch_size=batch_size).correct
        for name, options in BACKGROUND_VARIANTS.items()
    }


def background_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive part that lies outside the object, 1 - `energy_in_mask`: [B], from [B, H, W] each.

    A map without anything positive counts as uniform. Compare with the uniform map's: the background's share.
    """
    return 1 - energy_in_mask(maps, masks)


def distractor_regions(images_with: Tensor, images_without: Tensor, masks: Tensor) -> Tensor:
    """The pixels off the object that differ between pictures with and without distractors: bool [B, H, W].

    Images are [B, C, H, W], masks bool [B, H, W], True on the object; raises ValueError for anything else.
    """
    if images_with.ndim != 4 or images_with.shape != images_without.shape or masks.shape != images_with[:, 0].shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (images_with, images_without, masks))
        raise ValueError(f"images must be [B, C, H, W] twice and masks [B, H, W], got {shapes}")
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}")
    return (images_with != images_without).any(dim=1) & ~masks


def distractor_mass(maps: Tensor, images_with: Tensor, images_without: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive part that lies on the distractors: [B] in [0, 1]; arguments as `distractor_regions`.

    NaN for a picture that shows no distractor (all of them behind the object), where 0 would look like a good score.
    Compare with `distractor_share`, the score of the uniform map.
    """
    regions = distractor_regions(images_with, images_without, masks)
    seen = regions.flatten(1).any(dim=1)  # [B]
    # `energy_in_mask` refuses an empty region, so a picture without any is given the whole frame, and NaN afterwards.
    return energy_in_mask(maps, regions | ~seen[:, None, None]).masked_fill(~seen, torch.nan)


def distractor_share(images_with: Tensor, images_without: Tensor, masks: Tensor) -> Tensor:
    """Share of each picture that visible distractors cover: [B]; NaN where there are none."""
    regions = distractor_regions(images_with, images_without, masks).flatten(1).double()
    return torch.where(regions.any(dim=1), regions.mean(dim=1), torch.nan)
