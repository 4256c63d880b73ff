"""Does a map lie on the object? Three scores against a known mask, each 1 for the mask itself and 0 for its complement.

Ties get what breaking them at random would give on average, so that a blank map scores exactly what chance gives
(the share of the image that the object covers) and never more by the order in which pixels are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["energy_in_mask", "iou_at_mask_area", "localisation_scores", "pointing_game"]


def _flatten(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and flattened to [B, H*W]: maps in float64, masks boolean."""
    maps, masks = torch.as_tensor(maps), torch.as_tensor(masks)
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"maps and masks must both be [B, H, W], got {tuple(maps.shape)} and {tuple(masks.shape)}: upsample the "
            f"maps first"
        )
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}")
    maps = maps.detach().flatten(1).double()
    masks = masks.to(maps.device).flatten(1)
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps must be finite: NaN or infinity found")
    if not bool(masks.any(dim=1).all()):
        raise ValueError("every mask must contain at least one pixel of the object")
    return maps, masks


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Is the highest point on the object? [B] in {0, 1}, or in between where the maximum is shared.

    Zhang et al. 2016 (arXiv:1608.00507), without their tolerance of some pixels round the object. Of tied maxima the
    share that lies on the object is scored: the chance that one drawn at random hits. Unchanged by any increasing
    transformation of the map.
    """
    values, inside = _flatten(maps, masks)
    top = values == values.amax(dim=1, keepdim=True)
    return (top & inside).sum(dim=1).double() / top.sum(dim=1)


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's positive part that lies on the object: [B] in [0, 1].

    Energy-based pointing game, Wang et al. 2020 (Score-CAM, arXiv:1910.01279). Negative values count as 0. A map
    without anything positive says nothing about where: it is scored like a uniform one, by the share of the image the
    object covers. Unchanged by positive scaling, not by an offset.
    """
    values, inside = _flatten(maps, masks)
    values = values.clamp_min(0)
    # Divided by its maximum first, so that maps of any scale keep their precision.
    peak = values.amax(dim=1, keepdim=True)
    values = torch.where(peak > 0, values / torch.where(peak > 0, peak, torch.ones_like(peak)), torch.ones_like(values))
    return (values * inside).sum(dim=1) / values.sum(dim=1)


def iou_at_mask_area(maps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the mask with the map's highest pixels, as many as the mask has: [B] in [0, 1].

    Taking the object's own area leaves no threshold to choose. Where the boundary runs through tied values, they share
    the places left in proportion, which gives the expected intersection under random tie-breaking. Unchanged by any
    increasing transformation.
    """
    values, inside = _flatten(maps, masks)
    area = inside.sum(dim=1, keepdim=True)  # [B, 1]
    level = values.sort(dim=1, descending=True).values.gather(1, area - 1)  # [B, 1], the value of the last pixel taken
    above, tied = values > level, values == level
    free = (area - above.sum(dim=1, keepdim=True)).squeeze(1).double()  # [B], places left for the tied
    shared = free * (tied & inside).sum(dim=1) / tied.sum(dim=1)
    intersection = (above & inside).sum(dim=1) + shared
    return intersection / (2 * area.squeeze(1) - intersection)


def localisation_scores(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """All three scores, each [B]: `pointing_game`, `energy_in_mask`, `iou_at_mask_area`."""
    return {score.__name__: score(maps, masks) for score in (pointing_game, energy_in_mask, iou_at_mask_area)}
