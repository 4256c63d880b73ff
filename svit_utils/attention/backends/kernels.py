"""Triton kernels of thresholded attention: tiles of the score matrix on chip, nothing of size N x N in memory.

Forward, for a block of queries: one pass over the keys finds each row's largest score and softmax normaliser, and with
them what the row is cut at; a second one computes the scores again, cuts, and multiplies with V. A tile without
survivors is left out of the second pass. Where all keys fit in one tile, its scores are computed once.

Backward: a kernel over blocks of queries for dQ, one over blocks of keys for dK and dV, so that no two programs write
to the same place and results do not depend on their order. See `svit_utils.attention.backends.triton` for the formulas.

Written for Triton's compiler and its interpreter alike: no early exit, no branch on anything but a scalar.
"""

import triton
import triton.language as tl

# MODE is empty_rows: 0 zero, 1 dense, 2 top1, 3 cap. A row's kind: 0 regular, 1 fallback, 2 capped, 3 without keys.
# Saved of each row, in this order: largest score, 1 / softmax normaliser, cut, Z, survivors, sum of squares, kind,
# index of the largest key (all float32; an index is exact in it up to 2 ** 24 keys).
# Scores are compared with the cut before they are exponentiated, with this much room for rounding.
ROOM = tl.constexpr(1e-3)


@triton.jit
def _load(pointer, rows, columns, row_stride, column_stride, n_rows, n_columns, WIDEN: tl.constexpr):
    """[rows, columns] of a matrix, 0 outside of it; in float32 with WIDEN."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    loaded = tl.load(pointer + at, mask=inside, other=0.0)
    return loaded.to(tl.float32) if WIDEN else loaded


@triton.jit
def _scores(
    q, k, mask, rows, keys, mask_row_stride, mask_key_stride, scale, n, m, CAUSAL: tl.constexpr, MASK: tl.constexpr
):
    """Scores [rows, keys] in float32, -inf where a query may not attend."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    inside = (rows[:, None] < n) & (keys[None, :] < m)
    at = rows[:, None].to(tl.int64) * mask_row_stride + keys[None, :].to(tl.int64) * mask_key_stride
    if MASK == 1:
        inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    if MASK == 2:
        s += tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
    if CAUSAL:
        inside = inside & (keys[None, :] <= rows[:, None])
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _weights(s, keys, largest, inverse, cut, kind, where, MODE: tl.constexpr):
    """Probabilities p [rows, keys], and what is left of them after the cut."""
    p = tl.exp(s - largest[:, None]) * inverse[:, None]
    left = tl.maximum(p - cut[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    if MODE == 2:
        one = (keys[None, :] == where[:, None]).to(tl.float32)
        left = tl.where((kind == 1)[:, None], one, left)
    return p, left


@triton.jit
def forward_kernel(
    Q, K, V, TAU, MASK_PTR, OUT, SAVED_ROWS, U, VISITED,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, tb, th, tn, mb, mh, mn, mm,
    blocks, heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SINGLE: tl.constexpr, GRAD: tl.constexpr,
    SKIP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, Dv], what is saved of each row, and with GRAD u = the sum of v over the survivors."""
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    depth, width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    K += b * kb + h * kh
    V += b * vb + h * vh
    MASK_PTR += b * mb + h * mh
    q = _load(Q + b * qb + h * qh, rows, depth, qn, qd, n, D, WIDEN)
    tau = tl.load(TAU + b * tb + h * th + rows * tn, mask=rows < n, other=0.0)
    stop = m
    if CAUSAL:
        stop = tl.minimum(m, (block + 1) * BLOCK_N)

    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    where = tl.zeros([BLOCK_N], tl.int32)
    s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, stop, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        k = _load(K, keys, depth, kn, kd, m, D, WIDEN)
        s = _scores(q, k, MASK_PTR, rows, keys, mn, mm, scale, n, m, CAUSAL, MASK)
        top = tl.max(s, axis=1)
        # The first of several largest keys: argmax breaks ties to the left, and a later tile has to exceed.
        where = tl.where(top > largest, start + tl.argmax(s, axis=1), where)
        new = tl.maximum(largest, top)
        anchor = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - anchor) + tl.sum(tl.exp(s - anchor[:, None]), axis=1)
        largest = new

    dead = (largest == float("-inf")) & (total == total)  # a row of NaN has no largest score either, and stays NaN
    anchor = tl.where(dead, 0.0, largest)
    inverse = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))  # the largest probability, too: exp(0) / total
    kind = tl.where(dead, 3, tl.where(inverse <= tau, 1, 0))
    cut = tau
    if MODE == 1:
        cut = tl.where(kind == 1, 0.0, tau)
    if MODE == 3:
        capped = (inverse * 0.5 < tau) & (kind != 3)
        kind = tl.where(capped, 2, kind)
        cut = tl.where(capped, inverse * 0.5, tau)
    # Below this score a key is cut, or has no weight: log(cut * total) + largest, and for a top-1 row its largest.
    floor = tl.where(cut > 0.0, anchor + tl.log(tl.maximum(cut * total, 1e-37)), -1e30)
    if MODE == 2:
        floor = tl.where(kind == 1, anchor, floor)
    floor = tl.where(dead, 1e30, floor - ROOM)
    if not SKIP:
        floor = tl.full([BLOCK_N], -1e30, tl.float32)
    poisoned = tl.max((inverse != inverse).to(tl.int32), axis=0)  # a NaN has to come out as one

    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    u = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    z = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    visited = 0
    for start in range(0, stop, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        if not SINGLE:
            k = _load(K, keys, depth, kn, kd, m, D, WIDEN)
            s = _scores(q, k, MASK_PTR, rows, keys, mn, mm, scale, n, m, CAUSAL, MASK)
        above = tl.max(tl.max(s - floor[:, None], axis=1), axis=0)
        if (above > 0.0) | (poisoned > 0):
            _, left = _weights(s, keys, anchor, inverse, cut, kind, where, MODE)
            survives = (left > 0.0).to(tl.float32)
            z += tl.sum(left, axis=1)
            count += tl.sum(survives, axis=1)
            squares += tl.sum(left * left, axis=1)
            v = _load(V, keys, width, vn, vd, m, DV, WIDEN)
            acc += tl.dot(left.to(v.dtype), v, input_precision="ieee")
            if GRAD:
                u += tl.dot(survives.to(v.dtype), v, input_precision="ieee")
            visited += 1

    pairs_row = pair * n + rows
    inside = (rows[:, None] < n) & (width[None, :] < DV)
    at = pairs_row[:, None] * DV + width[None, :]
    tl.store(OUT + at, (acc / tl.where(z > 0.0, z, 1.0)[:, None]).to(OUT.dtype.element_ty), mask=inside)
    if GRAD:
        tl.store(U + at, u, mask=inside)
    S = SAVED_ROWS + pairs_row * 8
    tl.store(S + 0, anchor, mask=rows < n)
    tl.store(S + 1, inverse, mask=rows < n)
    tl.store(S + 2, cut, mask=rows < n)
    tl.store(S + 3, z, mask=rows < n)
    tl.store(S + 4, count, mask=rows < n)
    tl.store(S + 5, squares, mask=rows < n)
    tl.store(S + 6, kind.to(tl.float32), mask=rows < n)
    tl.store(S + 7, where.to(tl.float32), mask=rows < n)
    tl.store(VISITED + tl.program_id(0), visited)


@triton.jit
def _gradients(
    s, do, v, keys, largest, inverse, cut, kind, where, over_sum, dots, shared, at_largest, MODE: tl.constexpr
):
    """Of one tile: A [rows, keys], and dS, the gradient of the scores."""
    p, left = _weights(s, keys, largest, inverse, cut, kind, where, MODE)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    survives = p > cut[:, None]
    if MODE == 2:
        survives = survives & (kind != 1)[:, None]
    g = tl.where(survives, (dp - dots[:, None]) * over_sum[:, None], 0.0)
    g -= shared[:, None]
    if MODE == 3:
        g += tl.where(keys[None, :] == where[:, None], at_largest[:, None], 0.0)
    return left * over_sum[:, None], p * g


@triton.jit
def _of_rows(saved, gradients, pairs_row, inside):
    """What `_gradients` needs of each row, from both passes: 0 for rows outside."""
    saved += pairs_row * 8
    gradients += pairs_row * 4
    return (
        tl.load(saved + 0, mask=inside, other=0.0),
        tl.load(saved + 1, mask=inside, other=0.0),
        tl.load(saved + 2, mask=inside, other=0.0),
        tl.load(saved + 6, mask=inside, other=0.0).to(tl.int32),
        tl.load(saved + 7, mask=inside, other=0.0).to(tl.int32),
        tl.load(gradients + 0, mask=inside, other=0.0),
        tl.load(gradients + 1, mask=inside, other=0.0),
        tl.load(gradients + 2, mask=inside, other=0.0),
        tl.load(gradients + 3, mask=inside, other=0.0),
    )


@triton.jit
def query_kernel(
    Q, K, V, MASK_PTR, DO, SAVED_ROWS, GRADIENTS, DQ,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, mb, mh, mn, mm,
    blocks, heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ [B, H, N, D] for a block of queries."""
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    depth, width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    K += b * kb + h * kh
    V += b * vb + h * vh
    MASK_PTR += b * mb + h * mh
    q = _load(Q + b * qb + h * qh, rows, depth, qn, qd, n, D, WIDEN)
    pairs_row = pair * n + rows
    do = _load(DO + pair * n * DV, rows, width, DV, 1, n, DV, WIDEN)
    largest, inverse, cut, kind, where, over_sum, dots, shared, at_largest = _of_rows(
        SAVED_ROWS, GRADIENTS, pairs_row, rows < n
    )
    stop = m
    if CAUSAL:
        stop = tl.minimum(m, (block + 1) * BLOCK_N)
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, stop, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        k = _load(K, keys, depth, kn, kd, m, D, WIDEN)
        v = _load(V, keys, width, vn, vd, m, DV, WIDEN)
        s = _scores(q, k, MASK_PTR, rows, keys, mn, mm, scale, n, m, CAUSAL, MASK)
        _, ds = _gradients(s, do, v, keys, largest, inverse, cut, kind, where, over_sum, dots, shared, at_largest, MODE)
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    inside = (rows[:, None] < n) & (depth[None, :] < D)
    tl.store(DQ + pairs_row[:, None] * D + depth[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def key_kernel(
    Q, K, V, MASK_PTR, DO, SAVED_ROWS, GRADIENTS, DK, DV_PTR,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, mb, mh, mn, mm,
    blocks, heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dK [B, H, M, D] and dV [B, H, M, Dv] for a block of keys."""
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    keys = block * BLOCK_M + tl.arange(0, BLOCK_M)
    depth, width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    Q += b * qb + h * qh
    MASK_PTR += b * mb + h * mh
    k = _load(K + b * kb + h * kh, keys, depth, kn, kd, m, D, WIDEN)
    v = _load(V + b * vb + h * vh, keys, width, vn, vd, m, DV, WIDEN)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first = 0
    if CAUSAL:
        first = (block * BLOCK_M) // BLOCK_N * BLOCK_N  # queries before the block's first key see none of its keys
    for start in range(first, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        pairs_row = pair * n + rows
        q = _load(Q, rows, depth, qn, qd, n, D, WIDEN)
        do = _load(DO + pair * n * DV, rows, width, DV, 1, n, DV, WIDEN)
        largest, inverse, cut, kind, where, over_sum, dots, shared, at_largest = _of_rows(
            SAVED_ROWS, GRADIENTS, pairs_row, rows < n
        )
        s = _scores(q, k, MASK_PTR, rows, keys, mn, mm, scale, n, m, CAUSAL, MASK)
        weights, ds = _gradients(
            s, do, v, keys, largest, inverse, cut, kind, where, over_sum, dots, shared, at_largest, MODE
        )
        dv += tl.dot(tl.trans(weights).to(do.dtype), do, input_precision="ieee")
        dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    pairs_key = pair * m + keys
    inside = keys[:, None] < m
    at = pairs_key[:, None]
    tl.store(DK + at * D + depth[None, :], (dk * scale).to(DK.dtype.element_ty), mask=inside & (depth[None, :] < D))
    tl.store(DV_PTR + at * DV + width[None, :], dv.to(DV_PTR.dtype.element_ty), mask=inside & (width[None, :] < DV))
