"""The operator, written as the formula reads. Every faster backend is tested against this file.

    SparseAttention(Q, K, V) = A V,   A = R / sum(R),   R = ReLU(softmax(Q K^T / sqrt(d)) - tau)

The formula is 0/0 on a row whose largest probability does not exceed tau; ``empty_rows`` says what such a row
gets. Nearest published relatives: clipped softmax (Bondarenko et al. 2023, arXiv 2306.12929), the same numerator
without the renormalisation, and ReLA (Zhang et al. 2021, arXiv 2104.07012).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from svit_utils.attention.thresholds import ThresholdLike, check_empty_rows, resolve_threshold


def thresholded_softmax(scores: Tensor, threshold: ThresholdLike = 0.01, *, empty_rows: str = "dense") -> Tensor:
    """Softmax over the last dimension, cut at ``threshold`` and renormalised.

    Args:
        scores: attention logits [..., N, M], already scaled; a key at ``-inf`` is masked.
        threshold: tau in [0, 1), a tensor [H] over the heads of scores [..., H, N, M], or a threshold object.
        empty_rows: what a query gets when no key survives: ``"zero"`` nothing, ``"dense"`` its plain softmax,
            ``"top1"`` its largest key; ``"cap"`` lowers tau to half the row's maximum, so that no row is empty.

    Returns:
        Weights of the shape and dtype of ``scores``; each row sums to 1, or to 0 where it is empty under
        ``"zero"`` or where all of its keys are masked.

    Raises:
        ValueError: tau outside [0, 1) or NaN, a tensor threshold that does not fit, an unknown ``empty_rows``.
    """
    check_empty_rows(empty_rows)
    allowed = scores != -torch.inf
    wide = scores.to(statistics_dtype(scores))
    probs = _masked_softmax(wide, masked=True)
    keys = allowed.sum(dim=-1, keepdim=True)
    heads = scores.shape[-3] if scores.ndim >= 3 else None
    tau = resolve_threshold(threshold, keys, heads, wide.dtype)
    return _weights_from_probs(probs, tau, empty_rows).to(scores.dtype)


def _weights_from_probs(probs: Tensor, tau: Tensor | float, empty_rows: str) -> Tensor:
    """The cut itself: probabilities [..., N, M] to attention weights [..., N, M]."""
    r = (probs - effective_tau(probs, tau, empty_rows)).relu()  # R = ReLU(p - tau)
    z = r.sum(dim=-1, keepdim=True)  # [..., N, 1]
    empty = z == 0
    weights = r / z.masked_fill(empty, 1.0)  # A = R / sum(R); the filled 1 keeps the gradient of an empty row finite
    if empty_rows == "dense":
        weights = torch.where(empty, probs, weights)
    elif empty_rows == "top1":
        largest = torch.zeros_like(probs).scatter(-1, probs.argmax(dim=-1, keepdim=True), 1.0)
        has_keys = probs.sum(dim=-1, keepdim=True) > 0  # a fully masked query has no largest key
        weights = torch.where(empty & has_keys, largest, weights)
    return weights


def effective_tau(probs: Tensor, tau: Tensor | float, empty_rows: str) -> Tensor | float:
    """The threshold each row is cut at: tau, or under ``"cap"`` min(tau, max_j p_ij / 2) [..., N, 1]."""
    if empty_rows != "cap":
        return tau
    half_max = probs.amax(dim=-1, keepdim=True) / 2
    return torch.where(half_max < tau, half_max, tau)


def _masked_softmax(scores: Tensor, masked: bool) -> Tensor:
    """Softmax whose fully masked rows are 0 with gradient 0 (as in SDPA), where plain softmax gives NaN."""
    if not masked:
        return scores.softmax(dim=-1)
    dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast would put the product and the softmax in half precision, where the cut is not safe."""
    # The meta device, on which shapes are worked out without data, has no autocast to switch off.
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Half precision is cut in float32: a bf16 softmax is coarse enough to move entries across tau."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


@dataclass(frozen=True)
class AttentionRecord:
    """Everything one call computed, for trackers and maps.

    Attributes:
        out: [B, H, N, Dv], the attention output before the projection.
        weights: [B, H, N, M], the weights multiplied with V (after dropout).
        probs: [B, H, N, M], the softmax before the cut.
        tau: the threshold each row was cut at, broadcastable to [B, H, N, 1].
        allowed: boolean, broadcastable to [B, H, N, M], False where a key is masked; None without a mask.
        v: [B, H, M, Dv].
    """

    out: Tensor
    weights: Tensor
    probs: Tensor
    tau: Tensor | float
    allowed: Tensor | None
    v: Tensor


def reference_record(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Tensor | float,
    *,
    scale: float,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    empty_rows: str,
) -> AttentionRecord:
    """Thresholded attention with every intermediate kept; tau broadcastable to [B, H, N, 1], already checked."""
    with no_autocast(q.device.type):
        dtype = statistics_dtype(q)
        scores = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)  # [B, H, N, M]
        scores, allowed = _apply_mask(scores, attn_mask, is_causal)
        probs = _masked_softmax(scores, masked=allowed is not None)
        weights = _weights_from_probs(probs, tau, empty_rows)
        weights = F.dropout(weights, dropout_p)  # after the renormalisation: before it, dropout would move the cut
        out = (weights @ v.to(dtype)).to(v.dtype)  # [B, H, N, Dv]
    return AttentionRecord(out, weights, probs, effective_tau(probs, tau, empty_rows), allowed, v)


def _apply_mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor | None]:
    """Scores with masked keys at -inf, and the boolean mask of the keys left (None when there is no mask)."""
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores, None
    # Keys are counted over the last dimension of the mask, so a mask broadcast along it is written out.
    attn_mask = attn_mask.expand(*attn_mask.shape[:-1], scores.shape[-1])
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf), attn_mask
    return scores + attn_mask.to(scores.dtype), _counted(attn_mask)


def allowed_keys(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> int | Tensor:
    """How many keys each query may attend to, broadcastable to [B, H, N, 1]; M without a mask."""
    n, m = q.shape[2], k.shape[2]
    if is_causal:
        return torch.arange(1, n + 1, device=q.device)[:, None].clamp(max=m)
    if attn_mask is None:
        return m
    attn_mask = attn_mask.expand(*attn_mask.shape[:-1], m)
    return _counted(attn_mask).sum(dim=-1, keepdim=True)


def _counted(attn_mask: Tensor) -> Tensor:
    """True where a mask lets a query attend to a key."""
    # Padding is also written as the lowest finite number, as in timm's NaFlexViT: added like any other number, but
    # not counted among the keys a query may attend to.
    return attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min
