"""The operator, written as the formula reads. Every faster way to compute it is tested against this file.

    SparseAttention(Q, K, V) = A V,   A = R / sum(R),   R = ReLU(softmax(Q K^T / sqrt(d)) - tau)

The formula is 0/0 on a row whose largest probability does not exceed tau; ``empty_rows`` says what such a row gets.
Nearest published relatives: clipped softmax (Bondarenko et al. 2023, arXiv:2306.12929), the same numerator without the
renormalisation, and ReLA (Zhang et al. 2021, arXiv:2104.07012).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from svit_utils.attention.thresholds import ThresholdLike, check_empty_rows, resolve_threshold


def thresholded_softmax(scores: Tensor, threshold: ThresholdLike = 0.01, *, empty_rows: str = "dense") -> Tensor:
    """Softmax over the last dimension, cut at ``threshold`` and renormalised.

    Args:
        scores: attention scores [..., N, M], already scaled; a key at ``-inf`` is masked.
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
    wide = scores.to(statistics_dtype(scores))
    heads = scores.shape[-3] if scores.ndim >= 3 else None
    keys = (scores != -torch.inf).sum(dim=-1, keepdim=True)  # [..., N, 1]
    tau = resolve_threshold(threshold, keys, heads, wide.dtype)
    return cut_and_renormalise(masked_softmax(wide), tau, empty_rows).to(scores.dtype)


def cut_and_renormalise(probs: Tensor, tau: Tensor | float, empty_rows: str = "dense") -> Tensor:
    """The cut itself: probabilities [..., N, M] to attention weights [..., N, M]; tau broadcastable to [..., N, 1]."""
    r = (probs - effective_tau(probs, tau, empty_rows)).relu()  # R = ReLU(p - tau)
    return renormalise(r, probs, empty_rows)


def renormalise(r: Tensor, probs: Tensor, empty_rows: str) -> Tensor:
    """A = R / sum(R) over the last dimension; a row of R that is all 0 gets what ``empty_rows`` says.

    ``"cap"`` is not done here but before, by `effective_tau`, and leaves no such row.
    """
    if r.shape[-1] == 0:
        return r  # no keys, no weights
    z = r.sum(dim=-1, keepdim=True)  # [..., N, 1]
    empty = z == 0
    weights = r / z.masked_fill(empty, 1.0)  # 0 / 1: 0 / 0 is NaN, and by way of a hard cut so is its gradient
    if empty_rows == "dense":
        weights = torch.where(empty, probs, weights)
    elif empty_rows == "top1":
        largest = torch.zeros_like(probs).scatter(-1, probs.argmax(dim=-1, keepdim=True), 1.0)
        has_keys = probs.sum(dim=-1, keepdim=True) > 0  # a fully masked query has no largest key
        weights = torch.where(empty & has_keys, largest, weights)
    return weights


def effective_tau(probs: Tensor, tau: Tensor | float, empty_rows: str) -> Tensor | float:
    """The threshold each row is cut at: tau, or under ``"cap"`` min(tau, max_j p_ij / 2) [..., N, 1]."""
    if empty_rows != "cap" or probs.shape[-1] == 0:
        return tau
    half_max = probs.amax(dim=-1, keepdim=True) / 2
    return torch.where(half_max < tau, half_max, tau)


def level_of_cut(scores: Tensor, tau: Tensor | float, empty_rows: str) -> Tensor | float:
    """`effective_tau` of scores [..., N, M]; their softmax is only computed where it is needed."""
    return effective_tau(scores.softmax(dim=-1), tau, empty_rows) if empty_rows == "cap" else tau


def masked_softmax(scores: Tensor) -> Tensor:
    """Softmax whose fully masked rows are 0 with gradient 0 (as in SDPA), where plain softmax gives NaN."""
    dead = fully_masked(scores)
    return scores.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)


def fully_masked(scores: Tensor) -> Tensor:
    """Which rows have no key left to attend to: bool [..., N, 1]."""
    return (scores == -torch.inf).all(dim=-1, keepdim=True)


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast would compute product and softmax in half precision, too coarse for a comparison with tau."""
    # Switching off what is off takes as long as a small product; and the meta device, which has no data, has none.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores and weights: half precision is widened to float32, as a bf16 softmax is too coarse to cut."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
