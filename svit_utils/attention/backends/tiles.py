"""Tiles of queries on the CPU: the probabilities of a few rows at a time, what is left of them, and their sums.

A tile of scores holds whole rows and fits in the processor's cache, so a row's softmax, cut and sum cost little beside
the two matrix products, and nothing of size N x N is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svit_utils.attention.call import Call
from svit_utils.attention.formula import statistics_dtype

# Floats of scores in one (batch, head) pair's tile: 4 MiB in float32. Larger than a core's own cache, because a matrix
# product rearranges the keys for each tile, which costs more than the shared cache does (benchmarks/attention.py).
TILE = 2**20
# Floats of scores where several pairs share a tile: their keys are rearranged once whatever its size, so it may be
# smaller, for the cache and for malloc; not much smaller, or the calls themselves take their time.
SEVERAL = 2**18
MOST = 2**23  # floats in the tiles of all threads together
PAIRS_WITH_DROPOUT = 8


@dataclass(frozen=True)
class Problem:
    """One call with batch and heads folded into G = B * H, in the dtype of the statistics.

    ``for_backward``: the tiles are those of the backward pass, which needs a third buffer.
    """

    q: Tensor  # [G, N, D]
    k: Tensor  # [G, M, D]
    v: Tensor  # [G, M, Dv]
    scale: float  # factor on the products of q and k
    tau: Tensor  # [G, 1, 1] one number per head, or [G, N, 1] one per query
    taus: list[float]  # the same as numbers, one per pair or one for all; empty where tau differs from query to query
    mask: Tensor | None  # [B, H, N, M]
    heads: int
    call: Call  # the other settings
    seed: int  # of the dropout
    for_backward: bool

    @classmethod
    def fold(cls, q: Tensor, k: Tensor, v: Tensor, call: Call, seed: int, for_backward: bool) -> Problem:
        """From q, k, v [B, H, ., .] and a call whose tau is a tensor."""
        batch, heads, n, _ = q.shape
        wide = statistics_dtype(q)
        assert isinstance(call.tau, Tensor)
        tau = call.tau.detach().to(wide)
        per_query = tau.ndim >= 2 and tau.shape[-2] > 1
        taus = [] if per_query else tau.expand(batch, heads, 1, 1).flatten().tolist()
        taus = taus[:1] if len(set(taus)) == 1 else taus
        rows = n if per_query else 1
        tau = tau.expand(batch, heads, rows, 1).reshape(batch * heads, rows, 1)
        mask = None if call.attn_mask is None else call.attn_mask.expand(batch, heads, n, k.shape[2])
        q, k, v = (x.to(wide).reshape(batch * heads, *x.shape[2:]) for x in (q, k, v))
        scale = call.scale
        if not math.isfinite(scale):  # as a factor of the product itself, BLAS libraries ignore NaN
            q, scale = q * scale, 1.0
        return cls(q, k, v, scale, tau, taus, mask, heads, call, seed, for_backward)

    def tiles(self) -> Iterator[Tile]:
        """The work in pieces, always in the same order, so that dropout draws the same numbers in both passes."""
        groups, n, m = self.q.shape[0], self.q.shape[1], self.k.shape[1]
        if m == 0:
            return
        dropout = self.call.dropout_p
        # One pair for each thread: a batch of products runs in parallel, a single one hardly does. Dropout draws tile
        # by tile, so there the size of a tile must not depend on the number of threads.
        pairs = PAIRS_WITH_DROPOUT if dropout else torch.get_num_threads()
        # The backward pass holds three such tiles, and is at its best when they are half as large. With dropout both
        # passes have to go through the same ones.
        size = TILE // 2 if self.for_backward or dropout else TILE
        size = max(1, min(size, MOST // pairs))
        tiles = max(1, round(n * m / size))
        rows = -(-n // min(tiles, max(n, 1))) or 1  # tiles of equal height
        chunk = max(1, min(groups, pairs * max(1, min(size, SEVERAL) // max(1, rows * m))))
        draws = torch.Generator().manual_seed(self.seed) if dropout else None
        buffers = [self.q.new_empty(chunk * rows * m) for _ in range(3 if self.for_backward else 2)]
        for first in range(0, groups, chunk):
            for start in range(0, n, rows):
                yield Tile(self, slice(first, min(first + chunk, groups)), start, min(start + rows, n), buffers, draws)


class Tile:
    """Queries ``start`` to ``stop`` of some (batch, head) pairs.

    Attributes:
        probs: p [g, n, m].
        r: R = ReLU(p - tau) [g, n, m]; in an exceptional row what that row gets instead.
        z: Z = sum(R) [g, n, 1].
        row_tau: what each row is cut at, broadcastable to [g, n, 1].
        exceptions: the rows that are not cut at tau, as indices into the tile's g * n rows; None for none.
        keep_mask: dropout's factors [g, n, m], or None.
        masked_rows: bool [g, n, 1], rows all of whose keys are masked, or None.
    """

    def __init__(
        self,
        problem: Problem,
        pairs: slice,
        start: int,
        stop: int,
        buffers: list[Tensor],
        draws: torch.Generator | None,
    ) -> None:
        self.problem, self.pairs, self.rows, self.buffers = problem, pairs, slice(start, stop), buffers
        m = problem.k.shape[1]
        # Under a causal mask the keys after the tile's last query are nobody's.
        self.keys = slice(0, min(stop, m) if problem.call.is_causal else m)
        self.shape = (pairs.stop - pairs.start, stop - start, self.keys.stop)
        self.masked_rows: Tensor | None = None
        self.probs = self._probabilities()
        tau = problem.tau[pairs]
        self.tau = tau if tau.shape[1] == 1 else tau[:, self.rows]  # [g, n, 1] or [g, 1, 1]
        self.row_tau = self.tau
        self.r = self._cut()
        self.z = self.r.sum(dim=-1, keepdim=True)
        self.exceptions = self._exceptional_rows()
        if self.exceptions is not None:
            replacements = self._replacements(self.exceptions)
            self.r.view(-1, self.shape[2])[self.exceptions] = replacements
            self.z.view(-1)[self.exceptions] = replacements.sum(dim=-1)
        self.keep_mask = None if draws is None else self._draw_dropout(draws)

    def buffer(self, which: int) -> Tensor:
        """One of the problem's buffers, in this tile's shape [g, n, m]."""
        g, n, m = self.shape
        return self.buffers[which][: g * n * m].view(g, n, m)

    def rows_of(self, x: Tensor) -> Tensor:
        """This tile's rows of a tensor [G, N, ...]."""
        return x[self.pairs, self.rows]

    def _probabilities(self) -> Tensor:
        problem, scores = self.problem, self.buffer(0)
        keys = problem.k[self.pairs, self.keys].transpose(1, 2)
        torch.baddbmm(scores, self.rows_of(problem.q), keys, beta=0, alpha=problem.scale, out=scores)
        if problem.call.is_causal:
            query = torch.arange(self.rows.start, self.rows.stop)[:, None]
            scores.masked_fill_(torch.arange(self.keys.stop) > query, -torch.inf)
        elif problem.mask is not None:
            self._mask(scores, problem.mask)
        if problem.call.is_causal or problem.mask is not None:
            masked = scores.amax(dim=-1, keepdim=True) == -torch.inf if scores.shape[-1] else None
            if masked is not None and bool(masked.any()):
                self.masked_rows = masked
                scores.masked_fill_(masked, 0.0)
        torch._softmax(scores, -1, False, out=scores)
        if self.masked_rows is not None:
            scores.masked_fill_(self.masked_rows, 0.0)
        return scores

    def _mask(self, scores: Tensor, mask: Tensor) -> None:
        for i in range(self.shape[0]):
            b, h = divmod(self.pairs.start + i, self.problem.heads)
            part = mask[b, h, self.rows]
            if mask.dtype == torch.bool:
                scores[i].masked_fill_(~part, -torch.inf)
            else:
                scores[i].add_(part.to(scores.dtype))

    def _cut(self) -> Tensor:
        """R = ReLU(p - tau). For p >= 0 that is soft shrinkage, which is one pass where two ops would be two."""
        r, taus = self.buffer(1), self.problem.taus
        if not taus:  # one tau per query
            return torch.sub(self.probs, self.tau, out=r).relu_()
        if len(taus) == 1:
            torch.ops.aten.softshrink.out(self.probs, taus[0], out=r)
        else:
            for i, tau in enumerate(taus[self.pairs]):
                torch.ops.aten.softshrink.out(self.probs[i], tau, out=r[i])
        return r

    def _exceptional_rows(self) -> Tensor | None:
        """The rows that are not cut at tau; sets ``row_tau`` under "cap"."""
        mode = self.problem.call.empty_rows
        if mode == "zero":
            return None
        if mode == "cap":
            half = self.probs.amax(dim=-1, keepdim=True) / 2
            which = half < self.tau
            self.row_tau = torch.where(which, half, self.tau)
        else:
            which = self.z == 0  # exactly the rows without a survivor: p - tau > 0 wherever p > tau
        if self.masked_rows is not None:
            which = which & ~self.masked_rows
        index = which.flatten().nonzero().squeeze(1)
        return index if index.numel() else None

    def _replacements(self, index: Tensor) -> Tensor:
        """What the rows ``index`` [e] get in place of R [e, m]."""
        mode = self.problem.call.empty_rows
        row = self.probs.view(-1, self.shape[2])[index]  # under "dense" the plain softmax takes the place of R
        if mode == "top1":
            return torch.zeros_like(row).scatter_(-1, row.argmax(dim=-1, keepdim=True), 1.0)
        if mode == "cap":
            return row.sub_(row.amax(dim=-1, keepdim=True) / 2).relu_()
        return row

    def _draw_dropout(self, draws: torch.Generator) -> Tensor:
        share = self.problem.call.dropout_p
        drawn = torch.rand(self.shape, generator=draws, dtype=torch.float32)
        return (drawn >= share).to(self.r.dtype).mul_(1 / (1 - share) if share < 1 else 0.0)

    def survivors(self) -> tuple[Tensor, Tensor]:
        """The number of keys with p > tau and the sum of their p, [g, n] each; before dropout."""
        count = torch.linalg.vector_norm(self.r, 0, dim=-1)
        mass = self.z.squeeze(-1) + count * self.row_tau.squeeze(-1)
        if self.exceptions is not None and self.problem.call.empty_rows != "cap":
            count.view(-1)[self.exceptions] = 0.0
            mass.view(-1)[self.exceptions] = 0.0
        return count, mass

    def statistics(self, count: Tensor, mass: Tensor) -> Tensor:
        """Survivors, their mass, weights that are not 0, and 1 / sum(A^2), [g, n, 4]; after dropout."""
        nonzero = torch.linalg.vector_norm(self.r, 0, dim=-1)
        norm = torch.linalg.vector_norm(self.r, dim=-1)
        support = torch.where(norm > 0, (self.z.squeeze(-1) / norm).square(), 0.0)
        return torch.stack((count, mass, nonzero, support), dim=-1)
