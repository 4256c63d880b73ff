"""The GPU backend: Triton kernels, in memory linear in N.

The forward pass saves eight numbers per row, and u = sum_S v_j. With S = {j : p_j > cut}, k = |S|, D = dO . o,
Z = sum_S (p_j - cut) and G = (dO . u - k D) / Z = sum g_j, the backward pass needs no sum over a row's keys:

    g_j = 1_S (dO . v_j - D) / Z,   dS = p (g - cut G),   dV = (R / Z)^T dO,   dtau = -G

since sum_j p_j g_j = sum_S (p_j - cut) g_j + cut G, and the first of these is 0. ``cut`` is what a row is cut at. Where
that is not tau, tau gets no gradient: an empty row is cut at 0 under ``"dense"``, has constant weights under ``"top1"``
and none under ``"zero"``; a row capped at half its largest p has -G / 2 in the gradient of that p in place of -cut G.
Of several equally large keys the first one gets it, where the formula divides it among them.

Triton is imported at the first call. ``TRITON_INTERPRET=1`` runs the kernels on the CPU, slowly, to test them.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svit_utils.attention.backends.autograd import SETTINGS, differentiates, from_flat, implements, one_by_one, run
from svit_utils.attention.call import Call
from svit_utils.attention.formula import no_autocast
from svit_utils.attention.thresholds import EMPTY_ROWS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # head sizes beyond do not fit on the chip
SAVED = 8  # numbers per row, see `kernels`
REGULAR, FALLBACK, CAPPED = 0, 1, 2  # kinds of row
SKIP_TILES = True
STAGES = 2  # tiles under way at once: a third one would not fit beside heads 128 wide
INSTALLED = importlib.util.find_spec("triton") is not None  # looked up once: torch.compile cannot trace the search
OLDEST = (8, 0)  # compute capability; older GPUs, such as the T4, have too little shared memory for these tiles


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile, and warps; ``single``: all keys fit in one tile."""

    queries: int
    keys: int
    warps: int
    single: bool = False


def forward_blocks(m: int, width: int, dtype: torch.dtype) -> Blocks:
    """Tiles of the forward kernel for m keys and head sizes up to ``width``.

    float32 products are done without tensor cores, and its tiles take twice the room: they are smaller. All of them fit
    into 99 KiB of shared memory, what a program gets on consumer cards from compute capability 8.0 on.
    """
    if m <= 256 and width <= 64 and dtype != torch.float32:
        return Blocks(64, _tile_side(m), 8 if m > 128 else 4, single=True)
    if m <= 64:
        return Blocks(32, _tile_side(m), 4, single=True)
    if dtype == torch.float32 or width > 128:
        return Blocks(32, 32, 4)
    return Blocks(128, 64, 8) if width <= 64 else Blocks(64, 64, 4)


def backward_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Tiles of the two backward kernels, which hold twice as many matrices."""
    if dtype == torch.float32 or width > 128:
        return Blocks(32, 32, 4)
    return Blocks(64, 64, 4)


def _tile_side(x: int) -> int:
    """The power of two that holds x, and at least 16, the smallest side of a product in Triton."""
    return max(16, 1 << max(0, x - 1).bit_length())


def unavailable(device: torch.device) -> str:
    """Why the kernels cannot run on this device; empty if they can."""
    if not INSTALLED:
        return "triton is not installed (it comes with PyTorch's CUDA builds on Linux)"
    if device.type != "cuda" and not _interpreted():
        return f"q is on {device}: it runs on CUDA devices, and elsewhere only under TRITON_INTERPRET=1"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        return "it needs a GPU of compute capability 8.0 or newer"
    return ""


def _interpreted() -> bool:
    """Triton's interpreter computes in NumPy, which has no bfloat16: there the kernels widen what they load."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _mask_of(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """The mask as the kernels read it, its strides over [B, H, N, M], and its kind: 0 none, 1 boolean, 2 additive."""
    if mask is None:
        return q, (0, 0, 0, 0), 0
    mask = mask.expand(*q.shape[:3], k.shape[2])
    kind = 1 if mask.dtype == torch.bool else 2
    return (mask.view(torch.uint8) if kind == 1 else mask), mask.stride(), kind


def constants(d: int, dv: int, blocks: Blocks, call: Call, mask_kind: int) -> dict[str, Any]:
    """What all three kernels are compiled for."""
    return {
        "D": d, "DV": dv, "BLOCK_D": _tile_side(d), "BLOCK_DV": _tile_side(dv),
        "BLOCK_N": blocks.queries, "BLOCK_M": blocks.keys,
        "MODE": EMPTY_ROWS.index(call.empty_rows), "CAUSAL": call.is_causal, "MASK": mask_kind,
        "WIDEN": _interpreted(), "num_warps": blocks.warps, "num_stages": STAGES,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, grad: bool, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, H, N, Dv], what is saved of each row [B, H, N, 8], u [B, H, N, Dv] (or [.., 0]), and tiles visited."""
    from svit_utils.attention.backends import kernels

    batch, heads, n, d = q.shape
    m, dv = k.shape[2], v.shape[3]
    blocks = blocks or forward_blocks(m, max(d, dv), torch.promote_types(q.dtype, v.dtype))
    out = v.new_empty((batch, heads, n, dv))
    saved = q.new_empty((batch, heads, n, SAVED), dtype=torch.float32)
    u = q.new_empty((batch, heads, n, dv if grad else 0), dtype=torch.float32)
    per_pair = -(-n // blocks.queries)
    visited = q.new_zeros((batch * heads, per_pair), dtype=torch.int32)
    if out.numel() == 0 or m == 0:
        return out.zero_(), saved.zero_(), u.zero_(), visited
    assert isinstance(call.tau, Tensor)
    tau = call.tau.to(torch.float32).expand(batch, heads, n, 1)
    given, strides, kind = _mask_of(call.attn_mask, q, k)
    with _on(q):
        kernels.forward_kernel[(batch * heads * per_pair,)](
            q, k, v, tau, given, out, saved, u, visited,
            *q.stride(), *k.stride(), *v.stride(), *tau.stride()[:3], *strides,
            per_pair, heads, n, m, call.scale,
            SINGLE=blocks.single, GRAD=grad, SKIP=SKIP_TILES, **constants(d, dv, blocks, call, kind),
        )  # fmt: skip
    return out, saved, u, visited


def backward(
    grad: Tensor,
    out: Tensor,
    saved: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of each row's tau [B, H, N]."""
    from svit_utils.attention.backends import kernels

    batch, heads, n, d = q.shape
    m, dv = k.shape[2], v.shape[3]
    dq, dk, dv_ = (x.new_empty(x.shape) for x in (q, k, v))
    if n == 0 or m == 0 or batch * heads == 0:
        return dq.zero_(), dk.zero_(), dv_.zero_(), saved.new_zeros((batch, heads, n))
    grad = grad.contiguous()
    wide = grad.float()
    _, _, cut, total, count, _, kind, _ = saved.unbind(-1)
    dots = (wide * out).sum(dim=-1)  # D [B, H, N]
    over_sum = torch.where(total > 0, 1 / total, torch.where(total == 0, 0.0, total))  # NaN stays
    shared = ((wide * u).sum(dim=-1) - count * dots) * over_sum  # G
    regular, capped = kind == REGULAR, kind == CAPPED
    dtau = torch.where(regular, -shared, 0.0)
    at_largest = torch.where(capped, -shared / 2, 0.0)
    prepared = torch.stack((over_sum, dots, torch.where(regular, cut * shared, 0.0), at_largest), dim=-1)
    blocks = blocks or backward_blocks(max(d, dv), torch.promote_types(q.dtype, v.dtype))
    given, strides, mask_kind = _mask_of(call.attn_mask, q, k)
    common = constants(d, dv, blocks, call, mask_kind)
    all_strides = (*q.stride(), *k.stride(), *v.stride(), *strides)
    of_queries, of_keys = -(-n // blocks.queries), -(-m // blocks.keys)
    with _on(q):
        kernels.query_kernel[(batch * heads * of_queries,)](
            q, k, v, given, grad, saved, prepared, dq, *all_strides, of_queries, heads, n, m, call.scale, **common
        )
        kernels.key_kernel[(batch * heads * of_keys,)](
            q, k, v, given, grad, saved, prepared, dk, dv_, *all_strides, of_keys, heads, n, m, call.scale, **common
        )
    return dq, dk, dv_, dtau


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x)


def statistics_of(saved: Tensor) -> Tensor:
    """What the tracker asks of each row, [B, H, N, 4], as `svit_utils.attention.backends.tiled` orders it."""
    _, _, cut, total, count, squares, kind, _ = saved.unbind(-1)
    fell_back = kind == FALLBACK
    support = torch.where(squares > 0, total.square() / squares, 0.0)
    survivors = torch.where(fell_back, 0.0, count)
    mass = torch.where(fell_back, 0.0, total + count * cut)
    return torch.stack((survivors, mass, count, support), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, statistics: bool = False) -> tuple[Tensor, Tensor]:
    """out [B, H, N, Dv], and what `statistics_of` says of each row [B, H, N, 4], or [.., 0] where not asked for."""
    if k.dtype != q.dtype:  # a norm on one of them, under autocast
        wide = torch.promote_types(q.dtype, k.dtype)
        q, k = q.to(wide), k.to(wide)
    tau = call.tau
    grad = differentiates(q, k, v, *([tau] if isinstance(tau, Tensor) else []))
    with no_autocast(q.device.type):
        out, saved, _ = run("triton_attention", q, k, v, call, grad)
    return out, statistics_of(saved.detach()) if statistics else saved[..., :0]


def unfit(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> str:
    """Why this backend cannot serve a call; empty if it can."""
    if any(x.dtype not in DTYPES for x in (q, k, v)):
        return f"takes float16, bfloat16 and float32, but q is {q.dtype}, v {v.dtype}; use backend='auto'"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"takes heads up to {WIDEST} wide, got q {q.shape[-1]}, v {v.shape[-1]}; use backend='auto'"
    if dropout_p:
        return "has no dropout: set dropout_p=0, or use backend='auto'"
    reason = unavailable(q.device)
    return f"cannot run: {reason}; use backend='auto'" if reason else ""


@torch.library.custom_op(
    "svit::triton_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SETTINGS}, bool grad) -> (Tensor, Tensor, Tensor)",
)
@implements("triton_attention")
def triton_attention(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass as one op; see `forward`."""
    *settings, grad = arguments
    return forward(q, k, v, from_flat(settings), grad)[:3]


@torch.library.custom_op(
    "svit::triton_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor out, Tensor saved, Tensor u, Tensor q, Tensor k, Tensor v, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@implements("triton_attention_backward")
def triton_attention_backward(
    grad: Tensor, out: Tensor, saved: Tensor, u: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass as one op; see `backward`."""
    return backward(grad, out, saved, u, q, k, v, from_flat(settings))


@triton_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[:3]
    saved = q.new_empty((*rows, SAVED), dtype=torch.float32)
    return v.new_empty((*rows, v.shape[3])), saved, saved.new_empty((*rows, v.shape[3] if arguments[-1] else 0))


@triton_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, saved: Tensor, u: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    return (*(x.new_empty(x.shape) for x in (q, k, v)), saved.new_empty(q.shape[:3]))


@triton_attention.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    return one_by_one(triton_attention, info, in_dims, arguments)
