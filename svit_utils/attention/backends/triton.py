"""The GPU backend: Triton kernels, in memory linear in N.

With J = {j : p_j > cut}, k = |J|, D = dO . o, Z = sum_J (p_j - cut) and G = sum_J (dO . v_j - D) / Z = sum g_j, the
backward pass is

    g_j = 1_J (dO . v_j - D) / Z,   dS = p (g - cut G),   dV = (R / Z)^T dO,   dtau = -G

since sum_j p_j g_j = sum_J (p_j - cut) g_j + cut G, and the first of these is 0. ``cut`` is what a row is cut at. Where
that is not tau, tau gets no gradient: an empty row is cut at 0 under ``"dense"``, has constant weights under ``"top1"``
and none under ``"zero"``; a row capped at half its largest p has -G / 2 in the gradient of that p in place of -cut G.
Of several equally large keys the first one gets it, where the formula divides it among them.

D and G are sums over the survivors, taken from the scores in float32, not from the output, which is rounded.

Nothing here waits for the GPU or copies to it, so a call can be captured in a CUDA graph, after one that compiled.
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
STATISTICS, GRADIENTS = 1, 2  # what is needed beside the output, to be added up
SAVED, PREPARED = 8, 4  # numbers per row, see `kernels`; the last two are for statistics only
FALLBACK = 1  # a kind of row
SKIP_TILES = True
GROUPS = 32  # of tiles at most: what the second pass visits or leaves out as a whole
INSTALLED = importlib.util.find_spec("triton") is not None  # looked up once: torch.compile cannot trace the search
OLDEST = (8, 0)  # compute capability; older GPUs, such as the T4, have too little shared memory for these tiles


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile, and how a program works on it.

    Attributes:
        queries, keys: sides of a tile, powers of two.
        warps: of a program.
        stages: tiles under way at once.
        registers: at most, for each thread; None for as many as the compiler likes.
        single: a tile has all keys, so that scores are computed once.
    """

    queries: int
    keys: int
    warps: int
    stages: int = 2
    registers: int | None = None
    single: bool = False


def forward_blocks(m: int, width: int, dtype: torch.dtype, plain: bool = True) -> Blocks:
    """Tiles of the forward kernel for m keys and head sizes up to ``width``.

    Chosen by what the compiler says for sm_90: next to no spilled registers, and where heads are 64 wide two or three
    programs on a multiprocessor. Every kernel keeps to 99 KiB of shared memory, what a program gets on consumer cards
    (8.6, 8.9). float32 products are done without tensor cores, which Triton unrolls: their tiles are small.

    Args:
        plain: without a mask, and with ``empty_rows`` "zero" or "dense". Others need more registers.
    """
    if dtype == torch.float32:
        return Blocks(32 if width <= 128 else 16, 16, 8)
    if width > 128:
        return Blocks(32, 32, 8)
    if plain and (m <= 128 or (m <= 256 and width <= 64)):
        return Blocks(64, _tile_side(m), 4, registers=168 if m > 128 else None, single=True)
    if width > 64:
        return Blocks(64, 32, 4)
    return Blocks(128, 64, 8, stages=3, registers=128) if plain else Blocks(64, 64, 4)


def query_blocks(m: int, width: int, dtype: torch.dtype, plain: bool = True) -> Blocks:
    """Tiles of the backward kernel that goes over the queries: the forward kernel's, unless one has all keys."""
    blocks = forward_blocks(m, width, dtype, plain)
    if not blocks.single:
        return blocks
    return Blocks(64, min(64, blocks.keys), 4, registers=168) if width <= 64 else Blocks(64, min(32, blocks.keys), 4)


def key_blocks(m: int, width: int, dtype: torch.dtype, plain: bool = True) -> Blocks:
    """Tiles of the backward kernel that goes over the keys."""
    if dtype == torch.float32:
        return Blocks(16, 32 if width <= 128 else 16, 8, stages=1)
    if width > 64:
        return Blocks(32, 64 if width <= 128 else 32, 8)
    return Blocks(64, 64, 4, registers=168) if plain else Blocks(32, 64, 4)


def _situation(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[int, int, torch.dtype, bool]:
    """What the size of tiles depends on."""
    plain = call.attn_mask is None and call.empty_rows in ("zero", "dense")
    return k.shape[2], max(q.shape[-1], v.shape[-1]), torch.promote_types(q.dtype, v.dtype), plain


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


def limits_registers(device: torch.device) -> bool:
    """Whether `Blocks.registers` apply: on Hopper, whose tensor cores read factors from shared memory."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


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


def constants(q: Tensor, v: Tensor, blocks: Blocks, call: Call, mask_kind: int) -> dict[str, Any]:
    """What all three kernels are compiled for."""
    d, dv = q.shape[-1], v.shape[-1]
    return {
        "D": d, "DV": dv, "BLOCK_D": _tile_side(d), "BLOCK_DV": _tile_side(dv),
        "BLOCK_N": blocks.queries, "BLOCK_M": blocks.keys,
        "MODE": EMPTY_ROWS.index(call.empty_rows), "CAUSAL": call.is_causal, "MASK": mask_kind,
        "WIDEN": _interpreted(), "num_warps": blocks.warps, "num_stages": blocks.stages,
        "maxnreg": blocks.registers if limits_registers(q.device) else None, "enable_fp_fusion": False,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, need: int = 0, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, N, Dv], what is saved of each row [B, H, N, 8], and which tiles have survivors [B, H, blocks].

    ``need`` is a sum of `STATISTICS` and `GRADIENTS`; without either, rows are not saved. The third has a bit for each
    group of tiles of a block of queries, see `groups_visited`; or is [B, H, 0] where one tile has all keys.
    """
    from svit_utils.attention.backends import kernels

    batch, heads, n, _ = q.shape
    m = k.shape[2]
    blocks = blocks or forward_blocks(*_situation(q, k, v, call))
    out, saved, alive = _empty(q, v, need, blocks)
    if out.numel() == 0 or m == 0:
        return out.zero_(), saved.zero_(), alive.zero_()
    assert isinstance(call.tau, Tensor)
    tau = call.tau.to(torch.float32).expand(batch, heads, n, 1)
    given, strides, kind = _mask_of(call.attn_mask, q, k)
    groups, span = _grouped(m, blocks)
    per_pair = -(-n // blocks.queries)
    with _on(q):
        kernels.forward_kernel[(batch * heads * per_pair,)](
            q, k, v, tau, given, out, saved, alive,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *tau.stride()[:3], *strides,
            per_pair, heads, n, m, batch * heads, span, call.scale,
            GROUPS=groups, SINGLE=blocks.single, STATS=bool(need & STATISTICS), GRAD=bool(need & GRADIENTS),
            SKIP=SKIP_TILES, **constants(q, v, blocks, call, kind),
        )  # fmt: skip
    return out, saved, alive


def _grouped(m: int, blocks: Blocks) -> tuple[int, int]:
    """Into how many groups, a power of two, the tiles of a row are divided, and how many tiles a group has."""
    tiles = -(-m // blocks.keys)
    groups = min(GROUPS, _tile_side(tiles))
    return groups, -(-tiles // groups)


def groups_visited(alive: Tensor) -> Tensor:
    """Of what `forward` gives, how many groups of tiles each block of queries multiplied with V [B, H, blocks]."""
    return ((alive[..., None] >> torch.arange(GROUPS, device=alive.device)) & 1).sum(dim=-1)


def share_visited(q: Tensor, k: Tensor, v: Tensor, call: Call) -> float:
    """The share of groups of tiles whose values the forward kernel reads; in the others no key survives."""
    blocks = forward_blocks(*_situation(q, k, v, call))
    if blocks.single:
        return 1.0
    _, span = _grouped(k.shape[2], blocks)
    visited = groups_visited(forward(q, k, v, call)[2])
    return float(visited.float().mean()) / -(-k.shape[2] // (blocks.keys * span))


def _empty(q: Tensor, v: Tensor, need: int, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` fills.

    In memory heads stand inside of tokens, so that joining them takes no copy; and what is saved of all rows stands
    together, number by number.
    """
    batch, heads, n, _ = q.shape
    out = v.new_empty((batch, n, heads, v.shape[3])).transpose(1, 2)
    numbers = SAVED if need & STATISTICS else SAVED - 2 if need else 0
    saved = q.new_empty((numbers, batch, heads, n), dtype=torch.float32).movedim(0, -1)
    per_pair = 0 if blocks.single else -(-n // blocks.queries)
    return out, saved, q.new_empty((batch, heads, per_pair), dtype=torch.int64)


def backward(
    grad: Tensor, saved: Tensor, alive: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of each row's tau [B, H, N]."""
    from svit_utils.attention.backends import kernels

    batch, heads, n, _ = q.shape
    m = k.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dtau = q.new_empty((batch, heads, n), dtype=torch.float32)
    if n == 0 or m == 0 or batch * heads == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dtau.zero_()
    prepared = q.new_empty((PREPARED, batch, heads, n), dtype=torch.float32)
    saved = saved.movedim(-1, 0).contiguous()  # no copy, except under torch.func
    of_queries, of_keys = query_blocks(*_situation(q, k, v, call)), key_blocks(*_situation(q, k, v, call))
    per_query, per_key = -(-n // of_queries.queries), -(-m // of_keys.keys)
    groups, span = _grouped(m, of_queries) if alive.shape[-1] else (0, 1)
    given, strides, kind = _mask_of(call.attn_mask, q, k)
    all_strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride(), *strides)
    with _on(q):
        kernels.query_kernel[(batch * heads * per_query,)](
            q, k, v, given, grad, saved, alive.contiguous(), prepared, dq, dtau, *all_strides,
            per_query, heads, n, m, batch * heads, span, call.scale,
            GROUPS=groups, **constants(q, v, of_queries, call, kind),
        )  # fmt: skip
        kernels.key_kernel[(batch * heads * per_key,)](
            q, k, v, given, grad, saved, prepared, dk, dv, *all_strides,
            per_key, heads, n, m, batch * heads, call.scale, **constants(q, v, of_keys, call, kind),
        )  # fmt: skip
    return dq, dk, dv, dtau


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x)


def statistics_of(saved: Tensor) -> Tensor:
    """What the tracker asks of each row, [B, H, N, 4], as `svit_utils.attention.backends.tiled` orders it."""
    _, _, cut, total, kind, _, count, squares = saved.unbind(-1)
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
        need = STATISTICS * statistics + GRADIENTS * grad
        out, saved, _ = run("triton_attention", q, k, v, call, need)
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
    schema=f"(Tensor q, Tensor k, Tensor v, {SETTINGS}, int need) -> (Tensor, Tensor, Tensor)",
)
@implements("triton_attention")
def triton_attention(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass as one op; see `forward`."""
    *settings, need = arguments
    return forward(q, k, v, from_flat(settings), need)


@torch.library.custom_op(
    "svit::triton_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor out, Tensor saved, Tensor alive, Tensor q, Tensor k, Tensor v, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@implements("triton_attention_backward")
def triton_attention_backward(
    grad: Tensor, out: Tensor, saved: Tensor, alive: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass as one op; see `backward`."""
    return backward(grad, saved, alive, q, k, v, from_flat(settings))


@triton_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *settings, need = arguments
    return _empty(q, v, need, forward_blocks(*_situation(q, k, v, from_flat(settings))))


@triton_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, saved: Tensor, alive: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    return (*(x.new_empty(x.shape) for x in (q, k, v)), saved.new_empty(q.shape[:3]))


@triton_attention.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    return one_by_one(triton_attention, info, in_dims, arguments)
