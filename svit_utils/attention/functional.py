"""`thresholded_attention`: one signature over several backends, with the arguments checked once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svit_utils.attention.reference import AttentionRecord, reference_record
from svit_utils.attention.thresholds import ThresholdLike, check_empty_rows

# A backend takes what `reference_record` takes. Faster ones are added here and chosen in `backend_for`.
_BACKENDS: dict[str, Callable[..., AttentionRecord]] = {"reference": reference_record}


def thresholded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: ThresholdLike = 0.01,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    empty_rows: str = "dense",
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention cut after the softmax: A V with A = R / sum(R), R = ReLU(softmax(Q K^T scale) - tau).

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D].
        v: values [B, H, M, Dv].
        threshold: tau in [0, 1), a tensor [H], or a threshold object.
        scale: factor on Q K^T; D ** -0.5 if None.
        attn_mask: as in ``torch.nn.functional.scaled_dot_product_attention``: boolean, True = may attend, or
            additive; broadcast to [B, H, N, M]. A query whose keys are all masked gives 0 with gradient 0.
        is_causal: query i may attend to keys 0..i; not together with ``attn_mask``.
        dropout_p: dropout on the renormalised weights; pass 0 at evaluation.
        empty_rows: ``"zero"``, ``"dense"``, ``"top1"`` or ``"cap"``, see `thresholded_softmax`.
        return_weights: also return the weights multiplied with V.
        backend: ``"auto"`` or one of `backends()`.

    Returns:
        out [B, H, N, Dv] in v's dtype; with ``return_weights`` also weights [B, H, N, M], float32 or wider.

    Raises:
        ValueError: shapes that do not fit, tau outside [0, 1) or NaN, unknown ``empty_rows`` or ``backend``.
    """
    record = attention_record(
        q,
        k,
        v,
        threshold,
        scale=scale,
        attn_mask=attn_mask,
        is_causal=is_causal,
        dropout_p=dropout_p,
        empty_rows=empty_rows,
        backend=backend,
    )
    return (record.out, record.weights) if return_weights else record.out


def attention_record(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: ThresholdLike = 0.01,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    empty_rows: str = "dense",
    backend: str = "auto",
) -> AttentionRecord:
    """`thresholded_attention` with its intermediates, which trackers and maps read."""
    check_empty_rows(empty_rows)
    _check_shapes(q, k, v, attn_mask, is_causal)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    name = backend_for(q, k, v) if backend == "auto" else check_backend(backend)
    return _BACKENDS[name](
        q,
        k,
        v,
        threshold,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        attn_mask=attn_mask,
        is_causal=is_causal,
        dropout_p=dropout_p,
        empty_rows=empty_rows,
    )


def backends() -> tuple[str, ...]:
    """The names ``backend=`` accepts besides ``"auto"``."""
    return tuple(_BACKENDS)


def backend_for(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend ``"auto"`` chooses for these inputs."""
    del q, k, v
    return "reference"


def check_backend(backend: str) -> str:
    """Return ``backend`` if it is ``"auto"`` or known, else raise ValueError."""
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    return backend


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have rank 4, [B, H, N, D]; got {shapes}")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q, k and v must agree in batch and number of heads; got {shapes}")
    if q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise ValueError(f"q and k must agree in D, k and v in the number of keys; got {shapes}")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask and is_causal exclude each other: put the causal part into the mask")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    try:
        fits = torch.broadcast_shapes(attn_mask.shape, full) == full
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to [B, H, N, M] = {full}")
