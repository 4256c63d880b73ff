"""Attention rollout: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv:2005.00928, section
3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svit_utils.explain.grid import readout_rows, token_grid
from svit_utils.explain.maps import attention_maps

__all__ = ["attention_rollout", "rollout_matrix"]


def _fuse(weights: Tensor, head_fusion: str) -> Tensor:
    """[B, H, N, N] -> [B, N, N]."""
    if head_fusion == "mean":
        return weights.mean(dim=1)
    if head_fusion == "max":
        return weights.amax(dim=1)
    if head_fusion == "min":
        return weights.amin(dim=1)
    raise ValueError(f"unknown head_fusion {head_fusion!r}: allowed are 'mean', 'max', 'min'")


def rollout_matrix(maps: list[Tensor], head_fusion: str = "mean", residual: float = 0.5) -> Tensor:
    """Rollout of the maps [B, H, N, N], first layer first: [B, N, N], rows are queries of the last layer.

    A_l = (1 - residual) fuse(W_l) + residual I, each row divided by its sum; rollout = A_L ... A_2 A_1. The sum of a
    row is not always 1 before the division: fusing by max or min, and rows that the threshold emptied, change it. A
    row that is zero throughout (emptied, with residual 0) stays zero.
    """
    if not maps:
        raise ValueError("rollout needs the map of at least one layer")
    if not 0.0 <= residual < 1.0:
        raise ValueError(f"residual must lie in [0, 1), got {residual!r}")
    shapes = {tuple(weights.shape[-2:]) for weights in maps}
    if len(shapes) != 1 or maps[0].shape[-2] != maps[0].shape[-1]:
        raise ValueError(f"rollout multiplies square maps of one size, got {sorted(shapes)}")
    rolled: Tensor | None = None
    for weights in maps:
        fused = _fuse(weights, head_fusion)  # [B, N, N]
        identity = torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
        step = (1.0 - residual) * fused + residual * identity
        total = step.sum(dim=-1, keepdim=True)
        step = step / torch.where(total > 0, total, torch.ones_like(total))
        rolled = step if rolled is None else step @ rolled  # later layers from the left
    assert rolled is not None
    return rolled


def attention_rollout(
    model: nn.Module, x: Tensor, head_fusion: str = "mean", residual: float = 0.5, start_layer: int = 0
) -> Tensor:
    """How much of each patch reaches the classifier's token when attention is followed through all layers: [B, h, w].

    The row of the class token is read (distilled DeiT: mean over class and distillation token). Mean-pooled and
    attention-pooled models have no such row: there the average over the rows of all patch tokens is read. What flows
    from prefix tokens is left out, so a map sums to at most 1. Layers before `start_layer` are left out of the product.

    Rollout follows the value path only, all values alike, without projections or MLPs, and knows no class: it is not
    evidence *for* a label.
    """
    grid = token_grid(model, x)
    maps = list(attention_maps(model, x).values())
    if not 0 <= start_layer < len(maps):
        raise ValueError(f"start_layer must lie in 0 to {len(maps) - 1}, got {start_layer!r}")
    if any(weights.shape[-1] != grid.num_tokens for weights in maps):
        raise ValueError(
            f"rollout needs one token grid in every layer ({grid.num_tokens} tokens), got "
            f"{[weights.shape[-1] for weights in maps]}"
        )
    rolled = rollout_matrix(maps[start_layer:], head_fusion, residual)  # [B, N, N]
    rows = rolled[:, readout_rows(model, grid).to(rolled.device)].mean(dim=1)  # [B, N]
    return rows[:, grid.num_prefix :].unflatten(-1, grid.size)  # [B, h, w]
