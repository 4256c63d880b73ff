"""Does it look at the background? Asked of the model, by changing the background, and of its maps, by measuring them.

On PlantedShapes the answer is known: the class lies in the object's outline, unless the ground is tied to the label
(`rho`). A model that answers by the ground is found by giving every object another ground, or by taking the object out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svit_utils.data import PlantedShapes
from svit_utils.referee.localisation import energy_in_mask

__all__ = [
    "BACKGROUND_VARIANTS",
    "background_accuracy",
    "background_mass",
    "distractor_mass",
    "distractor_regions",
    "distractor_share",
]

BACKGROUND_VARIANTS: dict[str, dict[str, Any]] = {
    "own": {},  # the ground says nothing about the label
    "aligned": {"rho": 1.0},  # the ground is of the label's own family: object and ground agree
    "swapped": {"swap_background": True},  # the ground is of another class's family: they contradict each other
    "erased": {"erase_object": True, "rho": 1.0},  # no object: only the ground tells
    "distractors": {"distractors": 4},  # small blobs and bars on the ground
}


def background_accuracy(
    model: nn.Module, *, images: int = 1000, seed: int = 0, batch_size: int = 100
) -> dict[str, np.ndarray]:
    """Which test pictures of PlantedShapes the model gets right, bool [images], for each of `BACKGROUND_VARIANTS`.

    The variants show the same objects in the same order, so two of them are compared in pairs
    (`svit_utils.referee.paired_bootstrap`). One class in ten: chance is 0.1 throughout. A model that reads shapes is
    as good on "swapped" as on "aligned" and at chance on "erased"; one that reads the ground is the reverse: right on
    "aligned" and "erased", at chance on "own", and below chance on "swapped".

    Args:
        images: the first so many test pictures.
        seed: of the pictures.

    Raises:
        ValueError: fewer than one image.
    """
    from svit_utils.training.evaluation import evaluate  # brings the whole training loop, which no map needs

    return {
        name: evaluate(model, PlantedShapes("test", images, seed=seed, **options), batch_size=batch_size).correct
        for name, options in BACKGROUND_VARIANTS.items()
    }


def background_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive part that lies outside the object: [B] in [0, 1], from [B, H, W] each.

    1 - `energy_in_mask`, with its conventions: a map without anything positive counts as uniform. Compare with the
    uniform map's, the share of the picture that is background.
    """
    return 1 - energy_in_mask(maps, masks)


def distractor_regions(images_with: Tensor, images_without: Tensor, masks: Tensor) -> Tensor:
    """Where the distractors can be seen: bool [B, H, W], pixels that differ between the two versions, off the object.

    Args:
        images_with: [B, C, H, W], pictures with distractors.
        images_without: [B, C, H, W], the same pictures without.
        masks: bool [B, H, W], True on the object.

    Raises:
        ValueError: shapes that do not fit, or masks that are not boolean.
    """
    expected = (images_with.shape[0], *images_with.shape[-2:])
    if images_with.ndim != 4 or images_with.shape != images_without.shape or tuple(masks.shape) != expected:
        raise ValueError(
            f"images must be [B, C, H, W] twice and masks [B, H, W], got {tuple(images_with.shape)}, "
            f"{tuple(images_without.shape)} and {tuple(masks.shape)}"
        )
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}")
    return (images_with != images_without).any(dim=1) & ~masks


def distractor_mass(maps: Tensor, images_with: Tensor, images_without: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive part that lies on the distractors: [B] in [0, 1]; arguments as `distractor_regions`.

    NaN for a picture on which no distractor can be seen (all of them behind the object): there is nothing to lie on,
    and 0 would look like a good answer. Compare with `distractor_share`, what the uniform map gets.
    """
    regions = distractor_regions(images_with, images_without, masks)
    seen = regions.flatten(1).any(dim=1)  # [B]
    # A picture without any borrows the whole frame as region, only to pass the check; its score is then struck out.
    shares = energy_in_mask(maps, regions | ~seen[:, None, None])
    return shares.masked_fill(~seen, torch.nan)


def distractor_share(images_with: Tensor, images_without: Tensor, masks: Tensor) -> Tensor:
    """Share of the picture that visible distractors cover: [B], `distractor_mass` of a uniform map; NaN where none."""
    regions = distractor_regions(images_with, images_without, masks).flatten(1).double()
    return torch.where(regions.any(dim=1), regions.mean(dim=1), torch.nan)
