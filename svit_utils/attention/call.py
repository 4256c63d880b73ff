"""One call of thresholded attention, described once: what every backend takes beside q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svit_utils.attention.formula import cut_and_renormalise, level_of_cut, statistics_dtype
from svit_utils.attention.masks import allowed_keys
from svit_utils.attention.thresholds import Threshold, ThresholdLike, check_empty_rows, resolve_threshold


@dataclass(frozen=True)
class Call:
    """The settings of one call, as `svit_utils.attention.functional.thresholded_attention` describes them, checked.

    ``tau`` is a number, or a tensor broadcastable to [B, H, N, 1]. As a normaliser a call is the formula with its tau.
    """

    tau: Tensor | float
    scale: float
    attn_mask: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    empty_rows: str = "dense"

    @classmethod
    def checked(
        cls, q: Tensor, k: Tensor, v: Tensor, threshold: ThresholdLike = 0.01, *, scale: float | None = None,
        attn_mask: Tensor | None = None, is_causal: bool = False, dropout_p: float = 0.0, empty_rows: str = "dense",
    ) -> Call:  # fmt: skip
        """The call with these arguments of `thresholded_attention`.

        Raises:
            ValueError: shapes that do not fit, tau outside [0, 1) or NaN, unknown ``empty_rows``.
        """
        check_empty_rows(empty_rows)
        check_shapes(q, k, v, attn_mask, is_causal)
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
        counted = isinstance(threshold, Threshold) and threshold.counts_keys
        keys = allowed_keys(q, k, attn_mask, is_causal) if counted else k.shape[2]
        tau = resolve_threshold(threshold, keys, q.shape[1], statistics_dtype(q))
        scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
        return cls(tau, scale, attn_mask, is_causal, dropout_p, empty_rows)

    def weights(self, scores: Tensor) -> Tensor:
        """Scores [B, H, N, M] to weights: the formula."""
        return cut_and_renormalise(scores.softmax(dim=-1), self.tau, self.empty_rows)

    def cut_at(self, scores: Tensor, weights: Tensor) -> Tensor | float:
        """The threshold each row was cut at, broadcastable to [B, H, N, 1]."""
        return level_of_cut(scores, self.tau, self.empty_rows)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError unless q, k, v and the mask fit in shape ([B, H, N, D], [B, H, M, D], ...), device and dtype."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have rank 4, [B, H, N, D]; got {shapes}")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q, k and v must agree in batch and number of heads; got {shapes}")
    if q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise ValueError(f"q and k must agree in D, k and v in the number of keys; got {shapes}")
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise ValueError(f"q, k and v must be floating-point tensors; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean (True = may attend) or floating-point, got {attn_mask.dtype}")
    if attn_mask.device != q.device:
        raise ValueError(f"attn_mask is on {attn_mask.device}, but q, k and v are on {q.device}")
    if is_causal:
        raise ValueError("attn_mask and is_causal exclude each other: put the causal part into the mask")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    try:
        fits = torch.broadcast_shapes(attn_mask.shape, full) == full
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to [B, H, N, M] = {full}")
