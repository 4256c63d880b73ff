"""Attention rollout: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", arXiv:2005.00928, sec. 3."""

from functools import reduce

import torch
from torch import Tensor, nn

from svit_utils.explain.grid import read_out
from svit_utils.explain.maps import maps_on_grid

_FUSIONS = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


def rollout_matrix(maps: list[Tensor], head_fusion: str = "mean", residual: float = 0.5) -> Tensor:
    """Rollout of the maps [B, H, N, N], first layer first: [B, N, N], rows are queries of the last layer.

        A_l = (1 - residual) fuse(W_l) + residual I, each row divided by its sum;   rollout = A_L ... A_2 A_1

    with `fuse` the mean, max or min over heads, and `residual` in [0, 1). The division matters where rows do not sum to
    1: after fusing by max or min, and where the threshold emptied rows. A row that is zero throughout (emptied, with
    residual 0) stays zero. Raises ValueError for other settings, and maps that are not square and of one size.
    """
    if not maps:
        raise ValueError("rollout needs the map of at least one layer")
    if not 0.0 <= residual < 1.0:
        raise ValueError(f"residual must lie in [0, 1), got {residual!r}")
    if head_fusion not in _FUSIONS:
        raise ValueError(f"unknown head_fusion {head_fusion!r}: allowed are {', '.join(map(repr, _FUSIONS))}")
    shapes = {tuple(weights.shape[-2:]) for weights in maps}
    if len(shapes) != 1 or maps[0].shape[-2] != maps[0].shape[-1]:
        raise ValueError(f"rollout multiplies square maps of one size, got {sorted(shapes)}")
    identity = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    steps = []
    for weights in maps:
        step = (1.0 - residual) * _FUSIONS[head_fusion](weights, dim=1) + residual * identity  # [B, N, N]
        total = step.sum(dim=-1, keepdim=True)
        steps.append(step / torch.where(total > 0, total, torch.ones_like(total)))
    return reduce(lambda rolled, step: step @ rolled, steps)  # later layers from the left


def attention_rollout(
    model: nn.Module, x: Tensor, head_fusion: str = "mean", residual: float = 0.5, start_layer: int = 0
) -> Tensor:
    """How much of each patch reaches the classifier's token when attention is followed through all layers: [B, h, w].

    The mean over the tokens that the classifier reads, `readout_rows`. What flows from prefix tokens is left out, so a
    map sums to at most 1, and so are layers before `start_layer`. Rollout follows the value path only, treats all
    values alike, leaves out projections and MLPs, and knows no class: it is not evidence *for* a label. Raises
    ValueError for an unknown layer, and as `rollout_matrix` and `maps_on_grid`.
    """
    maps, grid = maps_on_grid(model, x)
    if not 0 <= start_layer < len(maps):
        raise ValueError(f"start_layer must lie in 0 to {len(maps) - 1}, got {start_layer!r}")
    return read_out(rollout_matrix(list(maps.values())[start_layer:], head_fusion, residual), model, grid)
