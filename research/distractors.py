"""How much of a map lies on the distractors of PlantedShapes: small blobs and bars on the background."""

import torch
from torch import Tensor

from svit_utils.referee import energy_in_mask


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
    """Share of each map's positive part that lies on the distractors: [B] in [0, 1].

    ``maps`` are [B, h, w], on their own grid as for `energy_in_mask`; the rest is as for `distractor_regions`. NaN for
    a picture that shows no distractor (all of them behind the object), where 0 would look like a good score. Compare
    with `distractor_share`, the score of the uniform map.
    """
    regions = distractor_regions(images_with, images_without, masks)
    seen = regions.flatten(1).any(dim=1)  # [B]
    # `energy_in_mask` refuses an empty region, so a picture without any is given the whole frame, and NaN afterwards.
    return energy_in_mask(maps, regions | ~seen[:, None, None]).masked_fill(~seen, torch.nan)


def distractor_share(images_with: Tensor, images_without: Tensor, masks: Tensor) -> Tensor:
    """Share of each picture that visible distractors cover: [B]; NaN where there are none."""
    regions = distractor_regions(images_with, images_without, masks).flatten(1).double()
    return torch.where(regions.any(dim=1), regions.mean(dim=1), torch.nan)
