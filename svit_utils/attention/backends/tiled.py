"""The CPU backend: the same numbers as the reference, a tile of queries at a time, in memory linear in N.

A tile of scores holds whole rows and fits in the processor's cache, so a row's softmax, cut and sum cost little beside
the two matrix products, and nothing of size N x N is ever stored. The backward pass computes each tile again. With
S = {j : p_j > tau}, Z = sum_S (p_j - tau), D = dO . o and g_j = 1_S (dO . v_j - D) / Z (the gradient of p_j):

    dV = (R / Z)^T dO,   dS = p (g - sum_j p_j g_j),   dtau = -sum g

Rows that the formula leaves undefined, or that ``"cap"`` treats otherwise, are put right one by one after the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svit_utils.attention.formula import no_autocast, reference_record, statistics_dtype

# Floats of scores in one (batch, head) pair's tile: 4 MiB in float32. Larger than a core's own cache, because a matrix
# product rearranges the keys anew for each tile, which costs more than the shared cache does (benchmarks/attention.py).
TILE = 2**20
MOST = 2**23  # floats in the tiles of all threads together
PAIRS_WITH_DROPOUT = 8
STATISTICS = 4  # numbers per row, see `_Tile.statistics`


@dataclass(frozen=True)
class _Problem:
    """One call with batch and heads folded: q, k, v [G, N, D] in the dtype of the statistics, mask [B, H, N, M].

    The backward pass keeps a tile's probabilities beside the cut values; the forward pass cuts them in place.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tau: Tensor  # [G, 1, 1] one number per head, or [G, N, 1] one per query
    taus: list[float]  # per pair, or one for all; none where tau differs from query to query
    highest: float  # the largest tau
    mask: Tensor | None
    scale: float
    heads: int
    causal: bool
    dropout: float
    seed: int
    empty_rows: str
    keeps_probs: bool

    @classmethod
    def of(
        cls,
        keeps_probs: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tau: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        dropout: float,
        seed: int,
        empty_rows: str,
    ) -> _Problem:
        batch, heads, n, _ = q.shape
        wide = statistics_dtype(q)

        def fold(x: Tensor) -> Tensor:
            return x.to(wide).reshape(batch * heads, *x.shape[2:])

        tau = tau.detach().to(wide)
        per_query = tau.ndim >= 2 and tau.shape[-2] > 1
        taus = [] if per_query else tau.expand(batch, heads, 1, 1).flatten().tolist()
        taus = taus[:1] if len(set(taus)) == 1 else taus
        highest = max(taus) if taus else float(tau.max()) if tau.numel() else 0.0
        tau = tau.expand(batch, heads, n if per_query else 1, 1).reshape(batch * heads, -1, 1)
        if mask is not None:
            mask = mask.expand(batch, heads, n, k.shape[2])
        q, k, v = fold(q), fold(k), fold(v)
        return cls(q, k, v, tau, taus, highest, mask, scale, heads, causal, dropout, seed, empty_rows, keeps_probs)

    def tiles(self) -> Iterator[_Tile]:
        """The work in pieces, always in the same order, so that dropout draws the same numbers twice."""
        groups, n, m = self.q.shape[0], self.q.shape[1], self.k.shape[1]
        if m == 0:
            return
        # One pair for each thread: a batch of products runs in parallel, a single one hardly does. Dropout draws tile
        # by tile, so there the number of threads has no say.
        pairs = PAIRS_WITH_DROPOUT if self.dropout else torch.get_num_threads()
        # The backward pass holds three such tiles, and is at its best when they are half as large. With dropout both
        # passes have to go through the same ones.
        size = TILE // 2 if self.keeps_probs or self.dropout else TILE
        size = max(1, min(size, MOST // pairs))
        tiles = max(1, round(n * m / size))
        rows = -(-n // min(tiles, max(n, 1))) or 1  # tiles of equal height
        chunk = max(1, min(groups, pairs * max(1, size // max(1, rows * m))))
        draws = torch.Generator().manual_seed(self.seed) if self.dropout else None
        buffers = [self.q.new_empty(chunk * rows * m) for _ in range(3 if self.keeps_probs else 1)]
        for first in range(0, groups, chunk):
            for start in range(0, n, rows):
                yield _Tile(self, slice(first, min(first + chunk, groups)), start, min(start + rows, n), buffers, draws)


class _Tile:
    """Queries ``start`` to ``stop`` of some (batch, head) pairs: their probabilities, cut values and sums."""

    def __init__(
        self,
        problem: _Problem,
        pairs: slice,
        start: int,
        stop: int,
        buffers: list[Tensor],
        draws: torch.Generator | None,
    ) -> None:
        self.problem, self.pairs, self.rows, self.buffers = problem, pairs, slice(start, stop), buffers
        # Under a causal mask the keys after the tile's last query are nobody's.
        self.keys = slice(0, min(stop, problem.k.shape[1]) if problem.causal else problem.k.shape[1])
        self.shape = (pairs.stop - pairs.start, stop - start, self.keys.stop)
        self.dead: Tensor | None = None  # rows all of whose keys are masked
        self.probs = self._probabilities()
        tau = problem.tau[pairs]
        self.tau = tau if tau.shape[1] == 1 else tau[:, self.rows]  # [g, n, 1] or [g, 1, 1]
        self.row_tau = self.tau  # what each row is cut at: less under "cap"
        self.exceptions, put_right = self._exceptions()
        self.kept = self._cut()
        self.sum = self.kept.sum(dim=-1, keepdim=True)  # Z [g, n, 1]
        if self.exceptions is not None:
            self.kept.view(-1, self.shape[2])[self.exceptions] = put_right
            self.sum.view(-1)[self.exceptions] = put_right.sum(dim=-1)
        self.keep_mask: Tensor | None = None
        if draws is not None:
            share = problem.dropout
            drawn = torch.rand(self.shape, generator=draws, dtype=torch.float32)
            self.keep_mask = (drawn >= share).to(self.kept.dtype).mul_(1 / (1 - share) if share < 1 else 0.0)

    def buffer(self, which: int) -> Tensor:
        g, n, m = self.shape
        return self.buffers[which][: g * n * m].view(g, n, m)

    def of(self, x: Tensor) -> Tensor:
        """This tile's rows of a tensor [G, N, ...]."""
        return x[self.pairs, self.rows]

    def _probabilities(self) -> Tensor:
        problem, scores = self.problem, self.buffer(0)
        keys = problem.k[self.pairs, self.keys].transpose(1, 2)
        torch.baddbmm(scores, self.of(problem.q), keys, beta=0, alpha=problem.scale, out=scores)
        if problem.causal:
            query = torch.arange(self.rows.start, self.rows.stop)[:, None]
            scores.masked_fill_(torch.arange(self.keys.stop) > query, -torch.inf)
        elif problem.mask is not None:
            self._mask(scores)
        if problem.causal or problem.mask is not None:
            dead = scores.amax(dim=-1, keepdim=True) == -torch.inf if scores.shape[-1] else None
            if dead is not None and bool(dead.any()):
                self.dead = dead
                scores.masked_fill_(dead, 0.0)
        torch._softmax(scores, -1, False, out=scores)
        if self.dead is not None:
            scores.masked_fill_(self.dead, 0.0)
        return scores

    def _mask(self, scores: Tensor) -> None:
        mask = self.problem.mask
        assert mask is not None
        for i in range(self.shape[0]):
            b, h = divmod(self.pairs.start + i, self.problem.heads)
            part = mask[b, h, self.rows]
            if mask.dtype == torch.bool:
                scores[i].masked_fill_(~part, -torch.inf)
            else:
                scores[i].add_(part.to(scores.dtype))

    def _cut(self) -> Tensor:
        """R = ReLU(p - tau). For p >= 0 that is soft shrinkage, which is one pass where two ops would be two."""
        kept = self.buffer(1) if self.problem.keeps_probs else self.probs
        taus = self.problem.taus
        if not taus:  # one tau per query
            return torch.sub(self.probs, self.tau, out=kept).relu_()
        if len(taus) == 1:
            torch.ops.aten.softshrink.out(self.probs, taus[0], out=kept)
        else:
            for i, tau in enumerate(taus[self.pairs]):
                torch.ops.aten.softshrink.out(self.probs[i], tau, out=kept[i])
        return kept

    def _exceptions(self) -> tuple[Tensor | None, Tensor]:
        """The rows that are not cut at tau, as indices into the tile's rows, and what they get instead [e, m]."""
        mode, m = self.problem.empty_rows, self.shape[2]
        none = (None, self.probs)
        if mode == "zero":
            return none
        largest = self.probs.amax(dim=-1, keepdim=True)
        safe = 2 * self.problem.highest if mode == "cap" else self.problem.highest
        if float(largest.amin()) > safe:  # mostly so: the test of each row is left out
            return none
        which = largest / 2 < self.tau if mode == "cap" else largest <= self.tau
        if self.dead is not None:
            which = which & ~self.dead
        index = which.flatten().nonzero().squeeze(1)
        if index.numel() == 0:
            return none
        kept = self.probs.view(-1, m)[index]
        if mode == "top1":
            kept = torch.zeros_like(kept).scatter_(-1, kept.argmax(dim=-1, keepdim=True), 1.0)
        elif mode == "cap":
            half = largest / 2
            self.row_tau = torch.where(which, half, self.tau)
            kept = kept.sub_(half.flatten()[index, None]).relu_()
        return index, kept  # "dense" is a cut at 0

    def survivors(self) -> tuple[Tensor, Tensor]:
        """The number of keys with p > tau and the sum of their p, [g, n] each; before dropout."""
        count = torch.linalg.vector_norm(self.kept, 0, dim=-1)
        mass = self.sum.squeeze(-1) + count * self.row_tau.squeeze(-1)
        if self.exceptions is not None and self.problem.empty_rows != "cap":
            count.view(-1)[self.exceptions] = 0.0
            mass.view(-1)[self.exceptions] = 0.0
        return count, mass

    def statistics(self, count: Tensor, mass: Tensor) -> Tensor:
        """Survivors, their mass, weights that are not 0, and 1 / sum(A^2), [g, n, 4]; after dropout."""
        nonzero = torch.linalg.vector_norm(self.kept, 0, dim=-1)
        norm = torch.linalg.vector_norm(self.kept, dim=-1)
        support = torch.where(norm > 0, (self.sum.squeeze(-1) / norm).square(), 0.0)
        return torch.stack((count, mass, nonzero, support), dim=-1)


def forward(statistics: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    """out [B, H, N, Dv], and what `_Tile.statistics` says of each row [B, H, N, 4], or [.., 0] where not asked for."""
    q, v = arguments[0], arguments[2]
    problem = _Problem.of(False, *arguments)
    out = problem.v.new_empty(problem.q.shape[0], problem.q.shape[1], problem.v.shape[2])
    per_row = problem.q.new_empty(*problem.q.shape[:2], STATISTICS if statistics else 0)
    for tile in problem.tiles():
        survivors = tile.survivors() if statistics else None
        if tile.keep_mask is not None:
            tile.kept.mul_(tile.keep_mask)
        product = torch.bmm(tile.kept, problem.v[tile.pairs, tile.keys], out=tile.of(out))
        # A sum that is not 0 is at least a rounding error of 1 / M: the bound turns 0 / 0 into 0 and nothing else.
        product.div_(tile.sum.clamp_min_(torch.finfo(product.dtype).tiny))
        if survivors is not None:
            tile.of(per_row).copy_(tile.statistics(*survivors))
    if problem.k.shape[1] == 0:  # no tile wrote anything: nothing to attend to gives 0
        out.zero_()
        per_row.zero_()
    shape = q.shape[:3]
    return out.view(*shape, out.shape[-1]).to(v.dtype), per_row.view(*shape, per_row.shape[-1])


def backward(grad: Tensor, out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of each row's tau [B, H, N]."""
    q, k, v = arguments[:3]
    problem = _Problem.of(True, *arguments)
    wide = problem.q.dtype
    grad = grad.to(wide).reshape(problem.q.shape[0], problem.q.shape[1], grad.shape[-1])
    dots = (grad * out.to(wide).view_as(grad)).sum(dim=-1, keepdim=True)  # D [G, N, 1]
    dq, dk, dv = (torch.zeros_like(x) for x in (problem.q, problem.k, problem.v))
    dtau = torch.zeros_like(dots)
    for tile in problem.tiles():
        inverse = torch.where(tile.sum == 0, 0.0, tile.sum.reciprocal())
        scaled = tile.of(grad) * inverse  # dO / Z
        g = tile.buffer(2)
        torch.bmm(scaled, problem.v[tile.pairs, tile.keys].transpose(1, 2), out=g)
        used = tile.kept
        if tile.keep_mask is not None:
            g.mul_(tile.keep_mask)
            used = used * tile.keep_mask
        dv[tile.pairs, tile.keys].baddbmm_(used.transpose(1, 2), scaled)
        g.sub_(tile.of(dots) * inverse)
        # Survivors are where R > 0: threshold_backward passes the gradient there and nowhere else.
        torch.ops.aten.threshold_backward.grad_input(g, tile.kept, 0.0, grad_input=g)
        tile_dtau = g.sum(dim=-1, keepdim=True).neg_()
        if tile.exceptions is not None:
            _exceptions_backward(g, tile_dtau, tile)
        tile.of(dtau).copy_(tile_dtau)
        ds = torch._softmax_backward_data(g, tile.probs, -1, wide, grad_input=g)
        torch.baddbmm(tile.of(dq), ds, problem.k[tile.pairs, tile.keys], beta=0, alpha=problem.scale, out=tile.of(dq))
        dk[tile.pairs, tile.keys].baddbmm_(ds.transpose(1, 2), tile.of(problem.q), alpha=problem.scale)
    return dq.view_as(q).to(q.dtype), dk.view_as(k).to(k.dtype), dv.view_as(v).to(v.dtype), dtau.view(q.shape[:3])


def _exceptions_backward(g: Tensor, dtau: Tensor, tile: _Tile) -> None:
    """What the formula's gradient is not on rows that fall back or are capped: their own."""
    m = tile.shape[2]
    rows, index = g.view(-1, m), tile.exceptions
    assert index is not None
    mode = tile.problem.empty_rows
    if mode == "top1":
        rows[index] = 0.0  # a constant as far as the scores go
    elif mode == "cap":
        # tau is p_max / 2 here: -G / 2 goes to the largest p, or in equal parts to the largest ones
        probs = tile.probs.view(-1, m)[index]
        largest = probs == probs.amax(dim=-1, keepdim=True)
        rows[index] += largest * (0.5 * dtau.view(-1)[index, None] / largest.sum(dim=-1, keepdim=True))
    dtau.view(-1)[index] = 0.0


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor tau, Tensor? mask, float scale, bool causal, float dropout, Tensor seed, "
    "str empty_rows, bool statistics) -> (Tensor, Tensor)"
)


@torch.library.custom_op("svit::tiled_attention", mutates_args=(), schema=_SCHEMA)
def tiled_attention(q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, statistics):  # type: ignore[no-untyped-def]
    """The forward pass as one op for ``torch.compile``; see `forward`."""
    with no_autocast("cpu"):
        return forward(statistics, q, k, v, tau, mask, scale, causal, dropout, int(seed), empty_rows)


@torch.library.custom_op(
    "svit::tiled_attention_backward",
    mutates_args=(),
    schema=_SCHEMA.replace("(Tensor q", "(Tensor grad, Tensor out, Tensor q")
    .replace(", bool statistics", "")
    .replace("(Tensor, Tensor)", "(Tensor, Tensor, Tensor, Tensor)"),
)
def tiled_attention_backward(grad, out, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows):  # type: ignore[no-untyped-def]
    """The backward pass as one op; see `backward`."""
    with no_autocast("cpu"):
        return backward(grad, out, q, k, v, tau, mask, scale, causal, dropout, int(seed), empty_rows)


@tiled_attention.register_fake
def _(q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, statistics):  # type: ignore[no-untyped-def]
    per_row = q.new_empty((*q.shape[:3], STATISTICS if statistics else 0), dtype=statistics_dtype(q))
    return v.new_empty((*q.shape[:3], v.shape[3])), per_row


@tiled_attention_backward.register_fake
def _(grad, out, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows):  # type: ignore[no-untyped-def]
    return (*(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(q.shape[:3], dtype=statistics_dtype(q)))


def one_by_one(op: Any, info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """A vmap rule: each element is work enough for the whole processor."""
    results = [
        op(*(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def second_derivatives(
    tensors: list[Tensor],
    directions: tuple[Tensor, ...],
    mask: Tensor | None,
    scale: float,
    causal: bool,
    empty_rows: str,
) -> tuple[Tensor, ...]:
    """The derivative of the first derivatives of (q, k, v, each row's tau) in ``directions``, by the reference.

    ``tensors`` are the output's gradient, q, k, v and tau; the result belongs to the same five.
    """

    def out(q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> Tensor:
        return reference_record(
            q, k, v, tau, scale=scale, attn_mask=mask, is_causal=causal, dropout_p=0.0, empty_rows=empty_rows
        ).out

    def first(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv, dtau = torch.func.vjp(out, q, k, v, tau.expand(*q.shape[:3], 1))[1](grad)
        return dq, dk, dv, dtau.squeeze(-1)

    return torch.func.vjp(first, *tensors)[1](directions)


@tiled_attention.register_vmap
def _(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    return one_by_one(tiled_attention, info, in_dims, arguments)


class _Tiled(torch.autograd.Function):
    """Joins the two ops; as a Function because torch.func differentiates those, and ops with a formula it does not."""

    @staticmethod
    def forward(q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, statistics):  # type: ignore[no-untyped-def]
        return tiled_attention(q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[0], q, k, v, tau, mask, seed)
        ctx.settings = (scale, causal, dropout, empty_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        out, q, k, v, tau, mask, seed = ctx.saved_tensors
        scale, causal, dropout, empty_rows = ctx.settings
        dq, dk, dv, dtau = _TiledBackward.apply(grad, out, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows)
        dtau = dtau.unsqueeze(-1).sum_to_size(tau.shape).to(tau.dtype) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dtau, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return one_by_one(_Tiled.apply, info, in_dims, arguments)


class _TiledBackward(torch.autograd.Function):
    """The first derivative, itself differentiable: by the reference and its N x N matrices, since that is rare."""

    @staticmethod
    def forward(grad, out, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows):  # type: ignore[no-untyped-def]
        return tiled_attention_backward(grad, out, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, _, q, k, v, tau, mask, scale, causal, dropout, _, empty_rows = inputs
        ctx.save_for_backward(grad, q, k, v, tau, mask)
        ctx.settings = (scale, causal, dropout, empty_rows)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        scale, causal, dropout, empty_rows = ctx.settings
        if dropout:
            raise NotImplementedError(
                "backend 'tiled' has no second derivatives with dropout: set dropout_p=0 or backend='reference'"
            )
        *tensors, mask = ctx.saved_tensors

        dgrad, *rest = second_derivatives(tensors, directions, mask, scale, causal, empty_rows)
        # D = dO . o comes in as `out`, but it is q, k and v that it depends on: `rest` contains its share.
        return dgrad, None, *rest, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return one_by_one(_TiledBackward.apply, info, in_dims, arguments)


def differentiates(*tensors: Tensor) -> bool:
    """Whether a derivative may be asked for: by autograd, or by torch.func, whose tensors do not say so."""
    if _transforms_active():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# What torch.autograd.Function asks itself; should it be renamed, every call goes through the Function.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def tiled_out(
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
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Thresholded attention [B, H, N, Dv] without its weights, and statistics of its rows [B, H, N, 4] if asked for.

    tau broadcastable to [B, H, N, 1], already checked. The four numbers are those of `_Tile.statistics`.
    """
    if not isinstance(tau, Tensor):
        tau = torch.tensor(tau, dtype=statistics_dtype(q))
    seed = torch.randint(2**62, ()) if dropout_p else torch.zeros((), dtype=torch.int64)
    arguments = (q, k, v, tau, attn_mask, scale, is_causal, dropout_p, seed, empty_rows, statistics)
    # Without a derivative to take, the op alone does, and a Function's bookkeeping is felt where N is small.
    return _Tiled.apply(*arguments) if differentiates(q, k, v, tau) else tiled_attention(*arguments)
