"""Dense attention displayed as if it had been cut: the control for "sparse maps are cleaner".

A dense model's map gets zeros by the display alone. If it then scores like the map of a model that was trained with
the cut, the training did nothing for the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svit_utils.attention import ThresholdLike, thresholded_softmax
from svit_utils.attention.formula import renormalise


def displayed(weights: Tensor, tau: ThresholdLike = 0.01, *, empty_rows: str = "dense") -> Tensor:
    """Rows of dense attention [..., N, M], each summing to 1, as the operator would have cut them: [..., N, M].

    Raises:
        ValueError: as `thresholded_softmax`.
    """
    return thresholded_softmax(weights.log(), tau, empty_rows=empty_rows)  # softmax(log p) is p again


def displayed_top(weights: Tensor, kept: Tensor) -> Tensor:
    """Each row of ``weights`` [..., M] cut so that its ``kept`` [...] largest entries are left; rows sum to 1.

    The row is cut at its largest entry that has to go, as the operator cuts at tau: ReLU(p - t) / sum. Where entries
    equal to that one should stay, they go as well, and fewer than ``kept`` are left. A row of which all entries are
    kept, or none would be left, stays as it is.

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
    return renormalise((weights - level).relu(), weights, "dense")
