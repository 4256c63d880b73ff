"""Does a map lie on the object? Scores [B] of maps [B, h, w] against masks bool [B, H, W], True on the object.

H is a multiple of h and W of w: each cell of a map stands for its H/h by W/w pixels, a patch (equal sizes: a pixel).
Give a map on its own grid, never enlarged bilinearly: the border's cells keep their full height while those inside are
averaged with their neighbours, which drives the maxima to the border (of random 14 x 14 maps enlarged four times, 64 %
lie in the outer ring, which has 26.5 % of the patches).

Each score is 1 for the mask itself. Three are 0 for its complement, which average precision, looking at order alone,
scores like a blank map. A blank map gets what chance gives: the object's share a of the image (a / (2 - a) in IoU). No
score depends on the order in which pixels are stored: in the pointing game and the IoU, ties get what breaking them at
random would give on average; in average precision, tied pixels enter together. The pixels of a patch are tied. All
scores are on the CPU, and all raise ValueError for other shapes, masks that are not boolean or hold no object, NaN and
infinity.
"""

import torch
from torch import Tensor

from svit_utils.referee.inputs import check_maps, scaled_by_peak, to_pixels


def _flatten(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and flattened to [B, H*W], on the CPU: for every pixel its cell's value in float64, and the mask."""
    values, masks = check_maps(maps), torch.as_tensor(masks).cpu()
    batch, height, width = values.shape
    if masks.ndim != 3 or len(masks) != batch or masks.shape[1] % height or masks.shape[2] % width:
        raise ValueError(
            f"maps must be [B, h, w] and masks [B, H, W], H a multiple of h and W of w, got {tuple(values.shape)} and "
            f'{tuple(masks.shape)}: enlarge the maps to the masks\' size with upsample(maps, size, mode="nearest"), or '
            "resize the masks to a multiple of the grid"
        )
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}")
    if not bool(masks.flatten(1).any(dim=1).all()):
        raise ValueError("every mask must contain at least one pixel of the object")
    return to_pixels(values, masks).flatten(1), masks.flatten(1)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Is the highest point on the object? [B] in [0, 1]: the highest patch's share of pixels on it, mean over ties.

    Zhang et al. 2016 (arXiv:1608.00507), without their tolerance of some pixels round the object; by pixel it is 0 or 1
    where nothing is tied. A random map scores the object's share on average. Unchanged by any increasing transformation
    of the map.
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

    The object's own area leaves no threshold to choose. Pixels tied at the boundary, as those of a patch are, share the
    places left in proportion. Unchanged by any increasing transformation of the map.
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
    any increasing transformation of the map. With m of n pixels on the object, a blank map and the mask's complement
    get m / n. A strict order of k cells of s = n / k pixels each, drawn at random, gets on average

        (q h + (m - q) (1 - h) / (k - 1)) / s,    h = (1 + 1/2 + ... + 1/k) / k,

    q being the number of object pixels in a cell, averaged over the object's pixels (by pixel, s = q = 1). That is
    over m / n: by 0.002 with a quarter of 56 x 56 pixels on the object, by up to 0.02 on 14 x 14 patches. The worst
    strict order of pixels, the object last, gets (1 / m) sum_k k / (n - m + k), k = 1 ... m: below m / n, never 0.
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
