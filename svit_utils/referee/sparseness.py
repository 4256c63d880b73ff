"""Sparseness of a map: Chalasani et al. 2018 (arXiv:1810.06583), as `quantus.Sparseness`."""

import torch
from torch import Tensor

from svit_utils.referee.inputs import check_maps, scaled_by_peak


def sparseness(maps: Tensor) -> Tensor:
    """Gini index of maps [B, h, w] by ``|map|``: [B] in [0, 1); higher is sparser, which is **no evidence of quality**.

    With ``|map|`` sorted upwards, v_1 <= ... <= v_n:

        sum_k (2 k - n - 1) v_k / (n sum_k v_k)

    0 where all values are equal (a map of zeros included), 1 - 1/n with a single value that is not zero. Unchanged by
    scaling, and by repeating every cell over its patch. It knows neither the model nor the object: one pixel drawn at
    random is as sparse as can be, and a threshold raises the score of any map. Report it beside the others, to tell
    sparser from more faithful. Raises ValueError for another rank, NaN or infinity.
    """
    values = scaled_by_peak(check_maps(maps)).abs().flatten(1).sort(dim=1).values  # [B, n]
    n, total = values.shape[1], values.sum(dim=1)
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return (values @ weights) / (n * torch.where(total > 0, total, torch.ones_like(total)))
