"""Dense attention displayed as if it had been cut: the control for "sparse maps are cleaner".

If it scores like the map of a model that was trained with the cut, the training did nothing for the map.
"""

import torch
from torch import Tensor

from svit_utils.attention import ThresholdLike, thresholded_softmax
from svit_utils.attention.formula import renormalise


def displayed(weights: Tensor, tau: ThresholdLike = 0.01, *, empty_rows: str = "dense") -> Tensor:
    """Rows of dense attention [..., N, M], each summing to 1, as `thresholded_softmax` would cut them: [..., N, M]."""
    return thresholded_softmax(weights.log(), tau, empty_rows=empty_rows)  # softmax(log p) is p again


def displayed_top(weights: Tensor, counts: Tensor) -> Tensor:
    """Each row of ``weights`` [..., M] cut so that its ``counts`` [...] largest entries are left; rows sum to 1.

    The row is cut at its largest entry that has to go, as the operator cuts at tau: ReLU(p - t) / sum. Where entries
    equal to that one should stay, they go as well, and fewer than ``counts`` are left. A row of which all entries are
    kept, or none would be left, stays as it is. Raises ValueError for ``counts`` of another shape, or outside 1 to M.
    """
    keys = weights.shape[-1]
    if counts.shape != weights.shape[:-1]:
        raise ValueError(f"counts must be one number per row, {tuple(weights.shape[:-1])}, got {tuple(counts.shape)}")
    if not bool(((counts >= 1) & (counts <= keys)).all()):
        raise ValueError(f"counts must lie in 1 to {keys}, got {int(counts.min())} to {int(counts.max())}")
    ordered = weights.sort(dim=-1, descending=True).values
    ordered = torch.cat([ordered, torch.zeros_like(ordered[..., :1])], dim=-1)  # [..., M + 1]: nothing below the last
    level = ordered.gather(-1, counts[..., None].long())  # [..., 1], the largest entry that has to go
    return renormalise((weights - level).relu(), weights, "dense")
