"""SaCo: Wu et al. 2024, "On the Faithfulness of Vision Transformer Explanations" (arXiv:2404.01415), algorithm 1.

The cells, from the map's highest to its lowest, are split into K groups G_1, ..., G_K of one size. With s_i the map's
mean over G_i and d_i the fall of the class's probability when G_i alone is painted over:

    SaCo = sum_{i<j} w_ij / sum_{i<j} |w_ij|,   w_ij = s_i - s_j where d_i >= d_j, else -(s_i - s_j)
"""

import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating
from svit_utils.explain.model_state import Targets
from svit_utils.referee.inputs import (
    check_count,
    check_maps,
    explained_classes,
    filled,
    places,
    probability,
    scaled_by_peak,
    to_pixels,
)


@torch.no_grad()
def saco(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    targets: Targets = None,
    *,
    groups: int = 10,
    fill: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Salience-guided faithfulness coefficient: [B] in [-1, 1]; **higher is better**, `groups` + 1 passes per image.

    1 where every group with a higher map matters at least as much as those below it, -1 where all of them matter less,
    about 0 for a map without information. Unlike the curves, each group is painted over by itself, and a pair counts by
    how far apart the map puts it. So adding a constant to a map or scaling it changes nothing, and squaring it does.

    A map whose groups all have one mean, a constant one say, claims no order: 0 (the authors' program stops there).
    The authors sum over a group where this takes the mean: the same where `groups` divides the cells, and what keeps a
    constant map constant where it does not.

    Args:
        x, maps, targets, seed: as for `deletion_curve`; ValueError for others.
        groups: K, from 2 to the number of cells.
        fill: what is painted, in units of the normalised images; None for each image's own mean colour, as the authors.
    """
    maps = check_maps(maps, x)
    check_count("groups", groups)
    cells = maps[0].numel()
    if not 2 <= groups <= cells:
        raise ValueError(f"groups must lie in 2 to {cells}, the cells of a map, got {groups}")
    paint = x.mean(dim=(2, 3), keepdim=True).expand_as(x) if fill is None else filled(x, fill)
    group = places(maps, seed) * groups // cells  # [B, h, w], 0 for the highest
    with evaluating(model):
        classes = explained_classes(model, x, targets, batch_size)
        values = []
        for pairs in torch.arange(len(x) * (groups + 1)).split(batch_size):
            image, number = pairs // (groups + 1), pairs % (groups + 1) - 1  # -1: the clean image
            taken = to_pixels(group[image] == number[:, None, None], x).to(x.device)  # [b, H, W]
            on_device = image.to(x.device)
            pictures = torch.where(taken[:, None], paint[on_device], x[on_device])
            values.append(probability(model, pictures, classes[image]))
    clean, painted = torch.cat(values).view(len(x), groups + 1).split([1, groups], dim=1)
    return _coefficient(_group_means(maps, group, groups), clean - painted)


def _group_means(maps: Tensor, group: Tensor, groups: int) -> Tensor:
    """The mean [B, K] of maps [B, h, w] over the cells of each group."""
    flat, group = scaled_by_peak(maps).flatten(1), group.flatten(1)
    total = torch.zeros(len(maps), groups, dtype=flat.dtype)
    return total.scatter_add(1, group, flat) / total.scatter_add(1, group, torch.ones_like(flat))


def _coefficient(salience: Tensor, drop: Tensor) -> Tensor:
    """SaCo [B] of the groups' means and of what painting them over costs, both [B, K]."""
    first, second = torch.triu_indices(salience.shape[1], salience.shape[1], offset=1)
    apart = salience[:, first] - salience[:, second]  # [B, pairs], 0 or more up to rounding
    apart = torch.where(apart.abs() > 1e-12, apart, 0.0)
    weight = torch.where(drop[:, first] >= drop[:, second], apart, -apart)
    total = weight.abs().sum(dim=1)
    return weight.sum(dim=1) / torch.where(total > 0, total, 1.0)
