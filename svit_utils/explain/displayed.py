"""Attention drawn as if it had been cut: what any "sparse maps are cleaner" has to be compared with.

A dense model's map gets zeros by the drawing alone. If it then scores like the map of a model that was trained with
the cut, the training did nothing for the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svit_utils.attention import ThresholdLike, thresholded_softmax

__all__ = ["displayed", "displayed_top"]


def displayed(weights: Tensor, tau: ThresholdLike = 0.01, *, empty_rows: str = "dense") -> Tensor:
    """Rows of dense attention [..., N, M], each summing to 1, as the operator would have cut them: [..., N, M].

    The rows are probabilities already, and softmax(log p) is p again.
    """
    return thresholded_softmax(weights.log(), tau, empty_rows=empty_rows)


def displayed_top(weights: Tensor, kept: Tensor) -> Tensor:
    """Each row of ``weights`` [..., M] cut so that its ``kept`` [...] largest entries are left; rows sum to 1.

    The row is cut at its largest entry that has to go, as the operator cuts at tau: ReLU(p - t) / sum. Of equal entries
    round that place fewer than ``kept`` are left. Where ``kept`` is all of them, the row stays as it is.

    Raises:
        ValueError: ``kept`` of another shape, or outside 1 to M.
    """
    keys = weights.shape[-1]
    if kept.shape != weights.shape[:-1]:
        raise ValueError(f"kept must be one number per row, {tuple(weights.shape[:-1])}, got {tuple(kept.shape)}")
    if not bool(((kept >= 1) & (kept <= keys)).all()):
        raise ValueError(f"kept must lie in 1 to {keys}, got {int(kept.min())} to {int(kept.max())}")
    ordered = weights.sort(dim=-1, descending=True).values
    ordered = torch.cat([ordered, torch.zeros_like(ordered[..., :1])], dim=-1)  # [..., M + 1]: nothing below the last
    level = ordered.gather(-1, kept[..., None].long())  # [..., 1], the largest entry that has to go
    cut = (weights - level).relu()
    total = cut.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, cut / torch.where(total > 0, total, 1.0), weights)
