"""The CPU backend: the same numbers as the formula, a tile of queries at a time, in memory linear in N.

The backward pass computes each tile again. With J = {j : p_j > tau}, Z = sum_J (p_j - tau), D = dO . o and
g_j = 1_J (dO . v_j - D) / Z (the gradient of p_j):

    dV = (R / Z)^T dO,   dS = p (g - sum_j p_j g_j),   dtau = -sum g

Rows that the formula leaves undefined, and rows that ``"cap"`` cuts lower, are corrected one by one afterwards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svit_utils.attention.backends.autograd import SETTINGS, STATISTICS, from_flat, implements, one_by_one, run
from svit_utils.attention.backends.tiles import Problem, Tile
from svit_utils.attention.call import Call
from svit_utils.attention.formula import no_autocast, statistics_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, statistics: bool = False) -> tuple[Tensor, Tensor]:
    """out [B, H, N, Dv], and what `Tile.statistics` says of each row [B, H, N, 4], or [.., 0] where not asked for."""
    out, per_row, _ = run("tiled_attention", q, k, v, call, statistics)
    return out, per_row


def unfit(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> str:
    """Why this backend cannot serve a call; empty if it can."""
    if q.device.type not in ("cpu", "meta"):
        return f"runs on the CPU, but q is on {q.device}: use backend='auto'"
    return "" if q.dtype in DTYPES else f"takes floating-point tensors, but q is {q.dtype}"


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, seed: int, statistics: bool) -> tuple[Tensor, Tensor]:
    """The forward pass, see `attention`."""
    problem = Problem.fold(q, k, v, call, seed, for_backward=False)
    out = problem.v.new_empty(problem.q.shape[0], problem.q.shape[1], problem.v.shape[2])
    per_row = problem.q.new_empty(*problem.q.shape[:2], STATISTICS if statistics else 0)
    for tile in problem.tiles():
        survivors = tile.survivors() if statistics else None
        if tile.keep_mask is not None:
            tile.r.mul_(tile.keep_mask)
        product = torch.bmm(tile.r, problem.v[tile.pairs, tile.keys], out=tile.rows_of(out))
        # A sum that is not 0 is at least a rounding error of 1 / M: the bound turns 0 / 0 into 0 and nothing else.
        product.div_(tile.z.clamp_min_(torch.finfo(product.dtype).tiny))
        if survivors is not None:
            tile.rows_of(per_row).copy_(tile.statistics(*survivors))
    if problem.k.shape[1] == 0:  # no tile wrote anything: nothing to attend to gives 0
        out.zero_()
        per_row.zero_()
    shape = q.shape[:3]
    return out.view(*shape, out.shape[-1]).to(v.dtype), per_row.view(*shape, per_row.shape[-1])


def backward(
    grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of each row's tau [B, H, N]."""
    problem = Problem.fold(q, k, v, call, seed, for_backward=True)
    wide, scale = problem.q.dtype, problem.scale
    grad = grad.to(wide).reshape(problem.q.shape[0], problem.q.shape[1], grad.shape[-1])
    dots = (grad * out.to(wide).view_as(grad)).sum(dim=-1, keepdim=True)  # D [G, N, 1]
    # Without queries or keys no tile writes them; under a causal mask the first tile does not write all keys.
    new = torch.empty_like if problem.q.shape[1] and problem.k.shape[1] else torch.zeros_like
    summed = torch.zeros_like if call.is_causal else new
    dq, dtau, dk, dv = new(problem.q), new(dots), summed(problem.k), summed(problem.v)
    for tile in problem.tiles():
        inverse = torch.where(tile.z == 0, 0.0, tile.z.reciprocal())
        scaled = tile.rows_of(grad) * inverse  # dO / Z
        g = tile.buffer(2)
        torch.bmm(scaled, problem.v[tile.pairs, tile.keys].transpose(1, 2), out=g)
        beta = 1 if call.is_causal or tile.rows.start else 0  # 0: the first tile of these pairs replaces what is there
        used = tile.r
        if tile.keep_mask is not None:
            g.mul_(tile.keep_mask)
            used = used * tile.keep_mask
        dv[tile.pairs, tile.keys].baddbmm_(used.transpose(1, 2), scaled, beta=beta)
        g.sub_(tile.rows_of(dots) * inverse)
        # Survivors are where R > 0: threshold_backward passes the gradient there and nowhere else.
        torch.ops.aten.threshold_backward.grad_input(g, tile.r, 0.0, grad_input=g)
        tile_dtau = g.sum(dim=-1, keepdim=True).neg_()
        if tile.exceptions is not None:
            _correct_exceptions(g, tile_dtau, tile)
        tile.rows_of(dtau).copy_(tile_dtau)
        ds = torch._softmax_backward_data(g, tile.probs, -1, wide, grad_input=g)
        to_keys, own = problem.k[tile.pairs, tile.keys], tile.rows_of(dq)
        torch.baddbmm(own, ds, to_keys, beta=0, alpha=scale, out=own)
        dk[tile.pairs, tile.keys].baddbmm_(ds.transpose(1, 2), tile.rows_of(problem.q), beta=beta, alpha=scale)
    return dq.view_as(q).to(q.dtype), dk.view_as(k).to(k.dtype), dv.view_as(v).to(v.dtype), dtau.view(q.shape[:3])


def _correct_exceptions(g: Tensor, dtau: Tensor, tile: Tile) -> None:
    """Correct the gradients of exceptional rows: a fallback row has its own, and none of them depends on tau."""
    m = tile.shape[2]
    rows, index = g.view(-1, m), tile.exceptions
    assert index is not None
    mode = tile.problem.call.empty_rows
    if mode == "top1":
        rows[index] = 0.0  # the weights are constant, whatever the scores
    elif mode == "cap":
        # tau is p_max / 2 here: -G / 2 goes to the largest p, or in equal parts to the largest ones
        probs = tile.probs.view(-1, m)[index]
        largest = probs == probs.amax(dim=-1, keepdim=True)
        rows[index] += largest * (0.5 * dtau.view(-1)[index, None] / largest.sum(dim=-1, keepdim=True))
    dtau.view(-1)[index] = 0.0


def _seed(settings: Sequence[Any]) -> int:
    """The seed of the dropout among an op's settings."""
    seed = settings[5]
    return 0 if seed is None else int(seed)


@torch.library.custom_op(
    "svit::tiled_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SETTINGS}, bool statistics) -> (Tensor, Tensor, Tensor)",
)
@implements("tiled_attention")
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass as one op for ``torch.compile``; see `forward`. The backward pass needs no more than q, k, v."""
    *settings, statistics = arguments
    with no_autocast("cpu"):
        return *forward(q, k, v, from_flat(settings), _seed(settings), statistics), q.new_empty((*q.shape[:3], 0))


@torch.library.custom_op(
    "svit::tiled_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor out, Tensor rows, Tensor more, Tensor q, Tensor k, Tensor v, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@implements("tiled_attention_backward")
def tiled_attention_backward(
    grad: Tensor, out: Tensor, rows: Tensor, more: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass as one op; see `backward`. It computes again what ``rows`` and ``more`` could say."""
    with no_autocast("cpu"):
        return backward(grad, out, q, k, v, from_flat(settings), _seed(settings))


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[:3]
    per_row = q.new_empty((*rows, STATISTICS if arguments[-1] else 0), dtype=statistics_dtype(q))
    return v.new_empty((*rows, v.shape[3])), per_row, q.new_empty((*rows, 0))


@tiled_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, rows: Tensor, more: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    q, k, v, *_ = arguments
    return (*(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(q.shape[:3], dtype=statistics_dtype(q)))


@tiled_attention.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    return one_by_one(tiled_attention, info, in_dims, arguments)
