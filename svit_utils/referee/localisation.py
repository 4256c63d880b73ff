"""Does a map lie on the object? Scores [B] of maps [B, H, W] against masks bool [B, H, W], True on the object.

Each is 1 for the mask itself. Three are 0 for its complement, which average precision, looking at order alone, scores
like a blank map. A blank map gets what chance gives: the object's share a of the image (a / (2 - a) in IoU). No score
depends on the order in which pixels are stored: in the pointing game and the IoU, ties get what breaking them at random
would give on average; in average precision, tied pixels enter together. All scores are on the CPU, and all raise
ValueError for other shapes, masks that are not boolean or hold no object, NaN and infinity.
"""

import torch
from torch import Tensor

from svit_utils.referee.inputs import check_maps, scaled_by_peak


def _flatten(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and flattened to [B, H*W], on the CPU: maps in float64, masks boolean."""
    maps, masks = torch.as_tensor(maps), torch.as_tensor(masks).cpu()
    if maps.ndim != 3 or maps.shape != masks.shape:
        shapes = f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"maps and masks must both be [B, H, W], got {shapes}: upsample the maps first")
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}")
    if not bool(masks.flatten(1).any(dim=1).all()):
        raise ValueError("every mask must contain at least one pixel of the object")
    return check_maps(maps).flatten(1), masks.flatten(1)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Is the highest point on the object? [B] in {0, 1}, or the share of tied maxima that lies on the object.

    Zhang et al. 2016 (arXiv:1608.00507), without their tolerance of some pixels round the object. Unchanged by any
    increasing transformation of the map.
    """
    values, inside = _flatten(maps, masks)
    top = values == values.amax(dim=1, keepdim=True)
    return (top & inside).sum(dim=1).double() / top.sum(dim=1)


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's positive part that lies on the object: [B] in [0, 1].

    Energy-based pointing game, Wang et al. 2020 (Score-CAM, arXiv:1910.01279). Negative values count as 0. A map
    without anything positive says nothing about where, and is scored like a uniform one. Unchanged by positive scaling,
    not by an offset.
    """
    values, inside = _flatten(maps, masks)
    values = scaled_by_peak(values.clamp_min(0))
    values = torch.where((values > 0).any(dim=1, keepdim=True), values, torch.ones_like(values))
    return (values * inside).sum(dim=1) / values.sum(dim=1)


def iou_at_mask_area(maps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the mask with the map's highest pixels, as many as the mask has: [B] in [0, 1].

    The object's own area leaves no threshold to choose. Pixels tied at the boundary share the places left in
    proportion. Unchanged by any increasing transformation of the map.
    """
    values, inside = _flatten(maps, masks)
    area = inside.sum(dim=1, keepdim=True)  # [B, 1]
    level = values.sort(dim=1, descending=True).values.gather(1, area - 1)  # [B, 1], the value of the last pixel taken
    above, tied = values > level, values == level
    free = (area - above.sum(dim=1, keepdim=True)).squeeze(1).double()  # [B], places left for the tied
    shared = free * (tied & inside).sum(dim=1) / tied.sum(dim=1)
    intersection = (above & inside).sum(dim=1) + shared
    return intersection / (2 * area.squeeze(1) - intersection)


def average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """Area under precision and recall, the map's value being a pixel's score for "on the object": [B] in (0, 1].

        AP = mean over the object's pixels i of  |{j on the object: v_j >= v_i}| / |{j: v_j >= v_i}|

    as scikit-learn's `average_precision_score`. It takes every threshold at once, where the IoU takes one. Unchanged by
    any increasing transformation of the map. With m object pixels among n, a blank map and the mask's complement get
    m / n; a strict order drawn at random (m - 1) / (n - 1) + (n - m) / (n - 1) * H_n / n on average, H_n = 1 + 1/2 +
    ... + 1/n, a little over m / n (by 0.002 at 56 x 56 pixels with a quarter of them on the object); the worst strict
    order, the object last, (1 / m) sum_k k / (n - m + k), k = 1 ... m: below m / n, never 0.
    """
    values, inside = _flatten(maps, masks)
    # Negated, so that ascending order, which `searchsorted` needs, goes from the highest pixel down.
    levels, order = (-values).sort(dim=1)  # [B, n]
    on_object = inside.gather(1, order)
    at_least = torch.searchsorted(levels, levels, right=True)  # [B, n], pixels as high as this one or higher
    hits = on_object.cumsum(dim=1).gather(1, at_least - 1)  # [B, n], those of them that lie on the object
    precision = hits.double() / at_least
    return (precision * on_object).sum(dim=1) / on_object.sum(dim=1)


def localisation_scores(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """All scores of this file, each [B]: `pointing_game`, `energy_in_mask`, `iou_at_mask_area`, `average_precision`."""
    scores = (pointing_game, energy_in_mask, iou_at_mask_area, average_precision)
    return {score.__name__: score(maps, masks) for score in scores}
