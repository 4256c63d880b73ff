"""`thresholded_attention`: one signature over several backends, with the arguments checked once."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.autograd import forward_ad

from svit_utils.attention.backends.tiled import tiled_out
from svit_utils.attention.backends.triton import DTYPES, WIDEST, triton_out, unavailable
from svit_utils.attention.formula import AttentionRecord, allowed_keys, reference_record, statistics_dtype
from svit_utils.attention.rows import AttentionRows
from svit_utils.attention.thresholds import ThresholdLike, check_empty_rows, resolve_threshold

# "reference" keeps everything it computes, the others return the output only.
_FAST = {"tiled": tiled_out, "triton": triton_out}
_TILED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Scores per head. Below, the reference's matrices fit in the cache whole, and it is faster (benchmarks/attention.py).
_WORTH_TILING = 128 * 128


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
        ValueError: shapes that do not fit, tau outside [0, 1) or NaN, unknown ``empty_rows`` or ``backend``, a forced
            ``backend`` that cannot do what the call asks.
    """
    name = _backend(backend, q, k, v, attn_mask, return_weights, dropout_p)
    settings = _checked(q, k, v, threshold, scale, attn_mask, is_causal, dropout_p, empty_rows)
    if name != "reference":
        return _FAST[name](q, k, v, **settings)[0]
    record = reference_record(q, k, v, **settings)
    return (record.out, record.weights) if return_weights else record.out


def attention_rows(
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
) -> tuple[Tensor, AttentionRows]:
    """`thresholded_attention` with statistics of its rows, taken from what is multiplied with V, without its map."""
    name = _backend(backend, q, k, v, attn_mask, dropout_p=dropout_p)
    settings = _checked(q, k, v, threshold, scale, attn_mask, is_causal, dropout_p, empty_rows)
    if name == "reference":
        record = reference_record(q, k, v, **settings)
        with torch.no_grad():
            return record.out, AttentionRows.of(record)
    out, statistics = _FAST[name](q, k, v, **settings, statistics=True)
    return out, AttentionRows.of_statistics(statistics, allowed_keys(q, k, attn_mask, is_causal))


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
) -> AttentionRecord:
    """`thresholded_attention` with its intermediates, for maps; always the reference, which alone keeps them."""
    settings = _checked(q, k, v, threshold, scale, attn_mask, is_causal, dropout_p, empty_rows)
    return reference_record(q, k, v, **settings)


def backends() -> tuple[str, ...]:
    """The names ``backend=`` accepts besides ``"auto"``."""
    return ("reference", *_FAST)


def backend_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    return_weights: bool = False,
    dropout_p: float = 0.0,
) -> str:
    """The backend ``"auto"`` chooses for a call.

    ``"tiled"`` on the CPU from N x M = 128 x 128 on; ``"triton"`` on CUDA for float16, bfloat16 and float32, heads up
    to 256 wide, without dropout. ``"reference"`` where these are not worth while or cannot serve: other devices, the
    weights are asked for, the mask is to get a gradient, forward-mode derivatives are taken, or the model is exported
    (a program of plain operators travels further).
    """
    if return_weights or (attn_mask is not None and attn_mask.requires_grad):
        return "reference"
    if _exporting() or forward_ad._current_level >= 0:
        return "reference"
    if q.device.type == "cpu" and q.dtype in _TILED_DTYPES and q.shape[-2] * k.shape[-2] >= _WORTH_TILING:
        return "tiled"
    if q.device.type == "cuda" and not dropout_p and not _unfit_for_triton(q, k, v):
        return "triton"
    return "reference"


def _unfit_for_triton(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the Triton kernels cannot take these tensors; empty if they can."""
    if any(x.dtype not in DTYPES for x in (q, k, v)):
        return f"backend 'triton' takes float16, bfloat16 and float32, but q is {q.dtype}, v {v.dtype}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"backend 'triton' takes heads up to {WIDEST} wide, got q {q.shape[-1]}, v {v.shape[-1]}"
    reason = unavailable(q.device)
    return f"backend 'triton' cannot run: {reason}" if reason else ""


def _exporting() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch < 2.7 has no such function
    return torch.compiler.is_compiling() if exporting is None else bool(exporting())


def _backend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    return_weights: bool = False,
    dropout_p: float = 0.0,
) -> str:
    """The backend to use, or a ValueError where the one asked for cannot do what the call asks."""
    if check_backend(backend) == "auto":
        return backend_for(q, k, v, attn_mask=attn_mask, return_weights=return_weights, dropout_p=dropout_p)
    if backend == "reference":
        return backend
    if return_weights:
        raise ValueError(f"backend {backend!r} never holds the weights: use backend='auto' or 'reference'")
    if attn_mask is not None and attn_mask.requires_grad:
        raise ValueError(f"backend {backend!r} has no gradient for attn_mask: use backend='auto' or 'reference'")
    if backend == "tiled" and q.device.type not in ("cpu", "meta"):
        raise ValueError(f"backend 'tiled' runs on the CPU, but q is on {q.device}: use backend='auto'")
    if backend == "triton":
        if reason := _unfit_for_triton(q, k, v):
            raise ValueError(f"{reason}; use backend='auto'")
        if dropout_p:
            raise ValueError("backend 'triton' has no dropout: set dropout_p=0, or use backend='auto'")
    return backend


class _Settings(TypedDict):
    tau: Tensor | float
    scale: float
    attn_mask: Tensor | None
    is_causal: bool
    dropout_p: float
    empty_rows: str


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: ThresholdLike,
    scale: float | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    empty_rows: str,
) -> _Settings:
    """The arguments after q, k and v as every backend takes them, or a ValueError."""
    check_empty_rows(empty_rows)
    _check_shapes(q, k, v, attn_mask, is_causal)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    return {
        "tau": resolve_threshold(threshold, allowed_keys(q, k, attn_mask, is_causal), q.shape[1], statistics_dtype(q)),
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "dropout_p": dropout_p,
        "empty_rows": empty_rows,
    }


def check_backend(backend: str) -> str:
    """Return ``backend`` if it is ``"auto"`` or known, else raise ValueError."""
    if backend != "auto" and backend not in backends():
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, backends()))}, got {backend!r}")
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
