"""Attention rollout: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", arXiv:2005.00928, sec. 3."""

from functools import reduce
from itertools import groupby

import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

from svit_utils.attention.formula import no_autocast
from svit_utils.explain.grid import read_out
from svit_utils.explain.layers import Layer, block_of, check_one_stack, find_layer, places
from svit_utils.explain.maps import maps_on_grid
from svit_utils.explain.model_state import at_least_single, unwrap
from svit_utils.explain.pooling import pooling_weights

_FUSIONS = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


def rollout_matrix(maps: list[Tensor], head_fusion: str = "mean", residual: float = 0.5) -> Tensor:
    """Rollout of the maps [B, H, N, N], first layer first: [B, N, N], rows are queries of the last layer.

        A_l = (1 - residual) fuse(W_l) + residual I, each row divided by its sum;   rollout = A_L ... A_2 A_1

    with `fuse` the mean, max or min over heads, and `residual` in [0, 1). The division matters where rows do not sum to
    1: after fusing by max or min, and where the threshold emptied rows. A row that is zero throughout (emptied, with
    residual 0) stays zero. Half precision is widened to float32. Raises ValueError for other settings, and maps that
    are not square and of one size.
    """
    steps = rollout_factors(maps, head_fusion, residual)
    with no_autocast(maps[0].device.type):
        return reduce(lambda rolled, step: step @ rolled, steps)  # later layers from the left


def rollout_factors(maps: list[Tensor], head_fusion: str = "mean", residual: float = 0.5) -> list[Tensor]:
    """The factors A_1, A_2, ... [B, N, N] of `rollout_matrix`, whose arguments and errors it has."""
    if not maps:
        raise ValueError("rollout needs the map of at least one layer")
    if not 0.0 <= residual < 1.0:
        raise ValueError(f"residual must lie in [0, 1), got {residual!r}")
    if head_fusion not in _FUSIONS:
        raise ValueError(f"unknown head_fusion {head_fusion!r}: allowed are {', '.join(map(repr, _FUSIONS))}")
    shapes = {tuple(weights.shape[-2:]) for weights in maps}
    if len(shapes) != 1 or maps[0].shape[-2] != maps[0].shape[-1]:
        raise ValueError(f"rollout multiplies square maps of one size, got {sorted(shapes)}")
    steps = []
    with no_autocast(maps[0].device.type):
        for weights in map(at_least_single, maps):
            identity = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
            step = (1.0 - residual) * _FUSIONS[head_fusion](weights, dim=1) + residual * identity  # [B, N, N]
            total = step.sum(dim=-1, keepdim=True)
            steps.append(step / torch.where(total > 0, total, torch.ones_like(total)))
    return steps


def layer_steps(model: nn.Module, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer or block -> the weights [B, H, N, N] that it adds to the tokens at once, first step first.

    Attention that runs in parallel, as in timm's `ParallelThingsBlock`, adds up: it is one attention with the heads of
    all. Raises ValueError where the layers do not follow one another, or might not.
    """
    check_one_stack(model, maps)
    steps, named = {}, places(model)
    for block, group in groupby(maps, block_of):
        names = list(group)
        module = named[block].module
        if len(names) > 1 and type(module).forward is not ParallelThingsBlock.forward:
            raise ValueError(
                f"{block} ({type(module).__name__}) holds the attention modules {', '.join(names)}, one after another "
                f"or side by side: give `rollout_matrix` their maps, joined along the heads where they are side by side"
            )
        steps[names[0] if len(names) == 1 else block] = torch.cat([maps[name] for name in names], dim=1)
    return steps


def attention_rollout(
    model: nn.Module, x: Tensor, head_fusion: str = "mean", residual: float = 0.5, start_layer: Layer = 0
) -> Tensor:
    """How much of each patch reaches the classifier's token when attention is followed through all layers: [B, h, w].

    The mean over the tokens that the classifier reads, `readout_rows`, or with the weights of a head that pools by
    attention. What flows from prefix tokens is left out, so a map sums to at most 1, and so are layers before
    `start_layer`, an index or a name. Attention modules that run side by side are one layer, see `rollout_matrix` for
    the others. Rollout follows the value path only, treats all values alike, leaves out projections and MLPs, and knows
    no class: it is not evidence *for* a label. Raises ValueError for an unknown layer, layers that do not follow one
    another, and as `rollout_matrix`, `maps_on_grid` and `readout_rows`.
    """
    with pooling_weights(model) as pooled:
        maps, grid = maps_on_grid(model, x)
    steps = layer_steps(unwrap(model), maps)
    start = find_layer(start_layer, list(steps))
    return read_out(rollout_matrix(list(steps.values())[start:], head_fusion, residual), model, grid, *pooled)
