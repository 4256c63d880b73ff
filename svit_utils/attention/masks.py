"""Attention masks, as `torch.nn.functional.scaled_dot_product_attention` takes them: boolean, additive, causal."""

import torch
from torch import Tensor


def mask_scores(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor | None]:
    """Put masked keys at -inf.

    Args:
        scores: [B, H, N, M].
        attn_mask: boolean, True = may attend, or additive; broadcast to [B, H, N, M]; None for none.
        is_causal: query i may attend to keys 0..i; not together with ``attn_mask``.

    Returns:
        The masked scores, and which keys a query may attend to: bool, broadcastable to [B, H, N, M], or None
        without a mask.
    """
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores, None
    # Keys are counted over the last dimension of the mask, so a mask broadcast along it is written out.
    attn_mask = attn_mask.expand(*attn_mask.shape[:-1], scores.shape[-1])
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf), attn_mask
    allowed = _may_attend(attn_mask)
    scores = scores + attn_mask.to(scores.dtype)
    # A key at the lowest finite number has weight 0 beside any other key. At -inf it has too, and is not counted.
    return scores.masked_fill(~allowed & allowed.any(dim=-1, keepdim=True), -torch.inf), allowed


def allowed_keys(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> int | Tensor:
    """How many keys each query of q [B, H, N, D] may attend to, broadcastable to [B, H, N, 1]; M without a mask."""
    n, m = q.shape[2], k.shape[2]
    if is_causal:
        return torch.arange(1, n + 1, device=q.device)[:, None].clamp(max=m)
    if attn_mask is None:
        return m
    return _may_attend(attn_mask.expand(*attn_mask.shape[:-1], m)).sum(dim=-1, keepdim=True)


def _may_attend(attn_mask: Tensor) -> Tensor:
    """True where a mask lets a query attend to a key."""
    # Padding is also written as the lowest finite number, as in timm's NaFlexViT: added like any other number, but
    # not counted among the keys a query may attend to.
    return attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min
