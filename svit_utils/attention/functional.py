"""`thresholded_attention`: one signature over several backends, with the arguments checked once."""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from svit_utils.attention.backends import tiled, triton
from svit_utils.attention.backends.autograd import differentiates
from svit_utils.attention.call import Call
from svit_utils.attention.masks import allowed_keys
from svit_utils.attention.record import AttentionRecord, attend
from svit_utils.attention.rows import AttentionRows
from svit_utils.attention.thresholds import ThresholdLike

# "reference" is the formula itself, which keeps everything it computes; the others return the output only. Each has
# `attention(q, k, v, call, statistics)` and `unfit(q, k, v, dropout_p)`.
_FAST = {"tiled": tiled, "triton": triton}
# Where tiles are faster on a CPU, by results/bench/crossover.csv: scores in one map, from where always; and without
# and with a backward pass, in one map and in all maps of the call. Below, the formula's matrices fit in the cache.
_TILES_ALWAYS = 128 * 128
_TILES_FROM = {False: ((64 * 64, 2**17),), True: ((96 * 96, 2**18), (64 * 64, 2**20))}


@overload
def thresholded_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: ThresholdLike = ..., *, scale: float | None = ...,
    attn_mask: Tensor | None = ..., is_causal: bool = ..., dropout_p: float = ..., empty_rows: str = ...,
    return_weights: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def thresholded_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: ThresholdLike = ..., *, scale: float | None = ...,
    attn_mask: Tensor | None = ..., is_causal: bool = ..., dropout_p: float = ..., empty_rows: str = ...,
    return_weights: bool, backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


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
        backend: ``"auto"``, or one of `backends()`: ``"reference"`` (the formula), ``"tiled"`` (CPU) and ``"triton"``
            (GPU).

    Returns:
        out [B, H, N, Dv] in v's dtype; with ``return_weights`` also weights [B, H, N, M], float32 or wider.

    Raises:
        ValueError: shapes that do not fit, tau outside [0, 1) or NaN, unknown ``empty_rows`` or ``backend``, a forced
            ``backend`` that cannot do what the call asks.
    """
    check_backend(backend)
    call = Call.checked(
        q, k, v, threshold,
        scale=scale, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p, empty_rows=empty_rows,
    )  # fmt: skip
    name = _chosen(backend, q, k, v, call, return_weights)
    if name != "reference":
        return _FAST[name].attention(q, k, v, call)[0]
    record = _formula(q, k, v, call)
    return (record.out, record.weights) if return_weights else record.out


def attention_rows(
    q: Tensor, k: Tensor, v: Tensor, threshold: ThresholdLike = 0.01, *, backend: str = "auto", **options: Any
) -> tuple[Tensor, AttentionRows]:
    """`thresholded_attention` with statistics of its rows, taken from what is multiplied with V, without its map.

    ``options`` are `thresholded_attention`'s ``scale``, ``attn_mask``, ``is_causal``, ``dropout_p``, ``empty_rows``.
    """
    check_backend(backend)
    call = Call.checked(q, k, v, threshold, **options)
    name = _chosen(backend, q, k, v, call)
    if name == "reference":
        record = _formula(q, k, v, call)
        with torch.no_grad():
            return record.out, AttentionRows.from_record(record)
    out, statistics = _FAST[name].attention(q, k, v, call, statistics=True)
    return out, AttentionRows.from_statistics(statistics, allowed_keys(q, k, call.attn_mask, call.is_causal))


def attention_record(
    q: Tensor, k: Tensor, v: Tensor, threshold: ThresholdLike = 0.01, **options: Any
) -> AttentionRecord:
    """`thresholded_attention` by the formula, with its intermediates; ``options`` as for `attention_rows`."""
    return _formula(q, k, v, Call.checked(q, k, v, threshold, **options))


def _formula(q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionRecord:
    dropout = partial(F.dropout, p=call.dropout_p) if call.dropout_p else None
    return attend(q, k, v, call, scale=call.scale, attn_mask=call.attn_mask, is_causal=call.is_causal, dropout=dropout)


def backends() -> tuple[str, ...]:
    """The names ``backend=`` accepts besides ``"auto"``."""
    return ("reference", *_FAST)


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` is ``"auto"`` or one of `backends()`."""
    if backend != "auto" and backend not in backends():
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, backends()))}, got {backend!r}")


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

    ``"tiled"`` on the CPU from N x M = 128 x 128 on, and for large batches from 64 x 64 on, or 96 x 96 where gradients
    are taken (64 x 64 for very large ones); ``"triton"`` on CUDA for float16, bfloat16 and float32, heads up
    to 256 wide, without dropout. ``"reference"`` where these are not worth while or cannot serve: other devices, the
    weights are asked for, the mask is to get a gradient, forward-mode derivatives are taken, or the model is exported
    (a program of plain operators travels further).
    """
    if _needs_formula(attn_mask, return_weights) or _exporting() or forward_ad._current_level >= 0:
        return "reference"
    if q.device.type == "cpu" and _worth_tiling(q, k, v) and not tiled.unfit(q, k, v, dropout_p):
        return "tiled"
    if q.device.type == "cuda" and not triton.unfit(q, k, v, dropout_p):
        return "triton"
    return "reference"


def _worth_tiling(q: Tensor, k: Tensor, v: Tensor) -> bool:
    scores = q.shape[-2] * k.shape[-2]
    everything, least = scores * q.shape[0] * q.shape[1], _TILES_FROM[differentiates(q, k, v)]
    return scores >= _TILES_ALWAYS or any(scores >= one and everything >= every for one, every in least)


def _needs_formula(attn_mask: Tensor | None, return_weights: bool) -> str:
    """What no fast backend has, if the call asks for it; empty if it does not."""
    if return_weights:
        return "never holds the weights: use backend='auto' or 'reference'"
    if attn_mask is not None and attn_mask.requires_grad:
        return "has no gradient for attn_mask: use backend='auto' or 'reference'"
    return ""


def _chosen(backend: str, q: Tensor, k: Tensor, v: Tensor, call: Call, return_weights: bool = False) -> str:
    """The backend to use, or a ValueError where the one asked for cannot do what the call asks."""
    if backend == "auto":
        return backend_for(q, k, v, attn_mask=call.attn_mask, return_weights=return_weights, dropout_p=call.dropout_p)
    if backend == "reference" or _exporting():
        return "reference"  # a program of plain operators, whatever runs here
    why = _needs_formula(call.attn_mask, return_weights) or _FAST[backend].unfit(q, k, v, call.dropout_p)
    if why:
        raise ValueError(f"backend {backend!r} {why}")
    return backend


def _exporting() -> bool:
    # torch.compiler.is_exporting() is true under torch.compile as well, until PyTorch 2.12; what it returns is not.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag
