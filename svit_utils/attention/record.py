"""Attention computed the plain way, with everything it computed kept: the scores, the weights, what was cut."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from svit_utils.attention.formula import fully_masked, masked_softmax, no_autocast, statistics_dtype
from svit_utils.attention.masks import mask_scores


@dataclass(frozen=True)
class AttentionRecord:
    """Everything one call computed, for trackers and maps.

    Attributes:
        out: [B, H, N, Dv], the attention output before the projection.
        weights: [B, H, N, M], the weights multiplied with V (after dropout).
        undropped: [B, H, N, M], the same before dropout.
        scores: [B, H, N, M], scaled, masked keys at -inf.
        allowed: boolean, broadcastable to [B, H, N, M], False where a key is masked; None without a mask.
        v: [B, H, M, Dv].
        normaliser: what made the weights, with methods as `svit_utils.attention.normalisers.Normaliser`.
    """

    out: Tensor
    weights: Tensor
    undropped: Tensor
    scores: Tensor
    allowed: Tensor | None
    v: Tensor
    normaliser: Any

    @cached_property
    def probs(self) -> Tensor:
        """[B, H, N, M], the plain softmax of the scores, before anything is cut; 0 in a fully masked row."""
        return self.scores.softmax(dim=-1) if self.allowed is None else masked_softmax(self.scores)

    @cached_property
    def tau(self) -> Tensor | float:
        """The threshold each row was cut at, broadcastable to [B, H, N, 1]. A key survives where probs > tau."""
        return self.normaliser.cut_at(self.scores, self.undropped)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normaliser: Any,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: Callable[[Tensor], Any] | None = None,
) -> AttentionRecord:
    """Attention with q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv]: the N x M weights are formed and kept.

    Args:
        normaliser: turns scores into weights, as `svit_utils.attention.normalisers.Normaliser` does.
        scale: factor on Q K^T.
        attn_mask, is_causal: as in `mask_scores`. A query without any key to attend to gives 0 with gradient 0.
        dropout: applied to the weights, after the renormalisation: before it, dropout would move the cut.
    """
    with no_autocast(q.device.type):
        dtype = statistics_dtype(q)
        scores = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)  # [B, H, N, M]
        scores, allowed = mask_scores(scores, attn_mask, is_causal)
        if allowed is None:
            undropped = normaliser.weights(scores)  # [B, H, N, M]
        else:
            dead = fully_masked(scores)  # [B, H, N, 1]
            undropped = normaliser.weights(scores.masked_fill(dead, 0.0)).masked_fill(dead, 0.0)
        weights = undropped if dropout is None else dropout(undropped)
        out = (weights @ v.to(dtype)).to(v.dtype)  # [B, H, N, Dv]
    return AttentionRecord(out, weights, undropped, scores, allowed, v, normaliser)


def effective_support(weights: Tensor) -> Tensor:
    """Effective number of keys, 1 / sum_j A_ij^2 [..., N]; 0 for a zero row."""
    squares = weights.square().sum(dim=-1)
    return torch.where(squares > 0, 1 / squares, 0.0)
