"""Triton kernels of thresholded attention: tiles of the score matrix on chip, nothing of size N x N in memory.

Forward, for a block of queries: one pass over the keys finds each row's largest score and softmax normaliser, and with
them what the row is cut at; a second one computes the scores again, cuts, and multiplies with V. The first pass notes
where its largest scores lie, so the second visits only groups of tiles that can have a survivor. Where all keys fit in
one tile, its scores are computed once.

Backward: a kernel over blocks of queries for dQ, then one over blocks of keys for dK and dV, so that no two programs
write to the same place and results do not depend on their order. See `svit_utils.attention.backends.triton` for the
formulas.

Scores are in units of log 2, since the GPU exponentiates to base 2. Products and sums stay as they are written
(``enable_fp_fusion`` is off), so that forward and backward pass cut alike and a row's largest key has exp2(0) = 1.
Written for Triton's compiler and its interpreter alike: no early exit, no branch on anything but constants.
"""

import triton
import triton.language as tl

# MODE is empty_rows: 0 zero, 1 dense, 2 top1, 3 cap. A row's kind: 0 regular, 1 fallback, 2 capped, 3 without keys.
# Saved of each row, in this order: largest score, 1 / softmax normaliser, cut, Z, kind, index of the largest key, and
# with STATS survivors and the sum of their squares (all float32; an index is exact in it up to 2 ** 24 keys).
# Scores are compared with the cut before they are exponentiated, with this much room for rounding.
ROOM = tl.constexpr(1e-3)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3e38)  # of an additive mask; what lies below is no number any more in units of log 2
# Numbers whose divisibility by 16 makes no faster code: a kernel is not compiled anew for each length of a sequence.
ANY = ["tb", "th", "tn", "mb", "mh", "mn", "blocks", "heads", "n", "m", "pairs", "span"]


@triton.jit
def _load(pointer, first, rows, columns, row_stride, column_stride, n_rows, n_columns, WIDEN: tl.constexpr):
    """Rows ``first + rows`` and the columns of a matrix, 0 outside of it; in float32 with WIDEN."""
    # The part that a loop does not change stands apart; 64 bits, as a stride times an index can exceed 2 ** 31.
    at = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    inside = (rows[:, None] < n_rows - first) & (columns[None, :] < n_columns)
    loaded = tl.load(pointer + tl.cast(first, tl.int64) * row_stride + at, mask=inside, other=0.0)
    return loaded.to(tl.float32) if WIDEN else loaded


@triton.jit
def _rounded(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """Float32 numbers in another dtype, or with WIDEN what is left of them after a detour through it."""
    if WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)  # the interpreter cuts digits off instead of rounding to the nearest
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _masked(s, rows, keys, mask, row_stride, key_stride, n, m, CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Scores, -inf where a query may not attend; ``rows`` and ``keys`` are numbers that broadcast to the scores."""
    inside = keys < m
    if MASK > 0:
        there = (rows < n) & inside
        at = rows.to(tl.int64) * row_stride + keys.to(tl.int64) * key_stride
        if MASK == 1:
            inside = there & (tl.load(mask + at, mask=there, other=0) != 0)
        else:
            bias = tl.load(mask + at, mask=there, other=0.0).to(tl.float32)
            s += tl.maximum(bias * LOG2E, LOWEST)
            inside = inside & (bias != float("-inf"))
    if CAUSAL:
        inside = inside & (keys <= rows)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _first(s, top, keys, m):
    """The first key with each row's largest score (tl.argmax takes a minute to compile)."""
    return tl.min(tl.where(s == top[:, None], keys[None, :], m), axis=1)


@triton.jit
def _left(e, inverse, cut):
    """What is left of the probabilities ``e * inverse`` after the cut."""
    return tl.maximum(tl.fma(e, inverse, -cut), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _cuts(largest, total, tau, MODE: tl.constexpr):
    """Of each row: the largest score or 0, the largest probability, what it is cut at, and its kind."""
    dead = (largest == float("-inf")) & (total == total)  # a row of NaN has no largest score either, and stays NaN
    inverse = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))  # exp2(0) / total
    kind = tl.where(dead, 3, tl.where(inverse <= tau, 1, 0))
    cut = tau
    if MODE == 1:
        cut = tl.where(kind == 1, 0.0, tau)
    if MODE == 3:
        capped = (inverse * 0.5 < tau) & (kind != 3)
        kind = tl.where(capped, 2, kind)
        cut = tl.where(capped, inverse * 0.5, tau)
    return tl.where(dead, 0.0, largest), inverse, cut, kind


@triton.jit
def _may_survive(tops, anchor, inverse, cut, kind, groups, stop, MODE: tl.constexpr, SKIP: tl.constexpr):
    """Which groups of tiles the second pass visits [GROUPS]; ``tops`` [rows, GROUPS] are their largest scores."""
    # A key has a weight where its score minus the largest exceeds this: log2(cut * total), 0 for a top-1 row.
    floor = tl.where(cut > 0.0, tl.log2(tl.maximum(cut / tl.where(inverse > 0.0, inverse, 1.0), 1e-37)), -1e30)
    if MODE == 2:
        floor = tl.where(kind == 1, 0.0, floor)
    above = tl.where((kind == 3)[:, None], 0, (tops - anchor[:, None] > floor[:, None] - ROOM).to(tl.int32))
    alive = tl.max(above, axis=0) > 0
    poisoned = tl.max((inverse != inverse).to(tl.int32), axis=0)  # a NaN has to come out as one
    if not SKIP:
        poisoned = 1
    return tl.where(poisoned > 0, groups < stop, alive)


@triton.jit
def _next_tile(step, bits, span, BLOCK_M: tl.constexpr):
    """Where the tile of a step begins, ``span`` tiles for each bit from the lowest on, and the bits that remain."""
    place = ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # exponent of the lowest bit
    inside_group = step % span
    return (place * span + inside_group) * BLOCK_M, tl.where(inside_group == span - 1, bits & (bits - 1), bits)


@triton.jit(do_not_specialize=ANY)
def forward_kernel(
    Q, K, V, TAU, MASK_PTR, OUT, ROWS, ALIVE,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, od, tb, th, tn, mb, mh, mn, mm,
    blocks, heads, n, m, pairs, span, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SINGLE: tl.constexpr,
    STATS: tl.constexpr, GRAD: tl.constexpr, SKIP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, Dv]; with STATS or GRAD what is saved of each row; unless SINGLE, which tiles were visited."""
    DTYPE: tl.constexpr = V.dtype.element_ty
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    first, within, ahead = block * BLOCK_N, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    depth, width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = first + within
    K += b * kb + h * kh
    V += b * vb + h * vh
    MASK_PTR += b * mb + h * mh
    q = _load(Q + b * qb + h * qh, first, within, depth, qn, qd, n, D, WIDEN)
    tau = tl.load(TAU + b * tb + h * th + rows * tn, mask=rows < n, other=0.0)
    scale *= LOG2E
    stop = m
    if CAUSAL:
        stop = tl.minimum(m, first + BLOCK_N)

    where = tl.zeros([BLOCK_N], tl.int32)
    if SINGLE:
        k = _load(K, 0, ahead, depth, kn, kd, m, D, WIDEN)
        v = _load(V, 0, ahead, width, vn, vd, m, DV, WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = _masked(s, rows[:, None], ahead[None, :], MASK_PTR, mn, mm, n, m, CAUSAL, MASK)
        largest = tl.max(s, axis=1)
        if MODE >= 2:
            where = _first(s, largest, ahead, m)
        e = tl.exp2(s - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
        total = tl.sum(e, axis=1)
        anchor, inverse, cut, kind = _cuts(largest, total, tau, MODE)
        steps, bits = 1, 1
    else:
        largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        groups = tl.arange(0, GROUPS)
        tops = tl.full([BLOCK_N, GROUPS], float("-inf"), tl.float32)
        for start in range(0, stop, BLOCK_M):
            keys = start + ahead
            k = _load(K, start, ahead, depth, kn, kd, m, D, WIDEN)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = _masked(s, rows[:, None], keys[None, :], MASK_PTR, mn, mm, n, m, CAUSAL, MASK)
            top = tl.max(s, axis=1)
            if MODE >= 2:
                where = tl.where(top > largest, _first(s, top, keys, m), where)  # a later tile has to exceed
            new = tl.maximum(largest, top)
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(s - shift[:, None]), axis=1)
            largest = new
            here = groups[None, :] == start // (BLOCK_M * span)
            tops = tl.where(here, tl.maximum(tops, top[:, None]), tops)
        anchor, inverse, cut, kind = _cuts(largest, total, tau, MODE)
        tops = tl.where((rows < n)[:, None], tops, float("-inf"))
        alive = _may_survive(tops, anchor, inverse, cut, kind, groups, tl.cdiv(stop, BLOCK_M * span), MODE, SKIP)
        steps = tl.sum(alive.to(tl.int32), axis=0) * span
        bits = tl.sum(alive.to(tl.int64) << groups, axis=0)
        tl.store(ALIVE + tl.program_id(0), bits)

    # Weights are divided by the largest of the row before they are rounded, so that none of it is lost where little is
    # left; and the output by the sum of what they were rounded to, so that a single survivor's weight is 1.
    peak = tl.where(inverse > cut, inverse - cut, 1.0)
    lift = 1.0 / peak
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    rounded = tl.zeros([BLOCK_N], tl.float32)
    exact = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, steps):
        keys = ahead
        if not SINGLE:
            start, bits = _next_tile(step, bits, span, BLOCK_M)
            keys = start + ahead
            k = _load(K, start, ahead, depth, kn, kd, m, D, WIDEN)
            v = _load(V, start, ahead, width, vn, vd, m, DV, WIDEN)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = _masked(s, rows[:, None], keys[None, :], MASK_PTR, mn, mm, n, m, CAUSAL, MASK)
            e = tl.exp2(s - anchor[:, None])
        left = _left(e, inverse[:, None], cut[:, None]) * lift[:, None]
        if MODE == 2:
            left = tl.where((kind == 1)[:, None], (keys[None, :] == where[:, None]).to(tl.float32), left)
        weights = _rounded(left, DTYPE, WIDEN)
        rounded += tl.sum(weights.to(tl.float32), axis=1)
        if STATS or GRAD:
            exact += tl.sum(left, axis=1)
        if STATS:
            count += tl.sum((left > 0.0).to(tl.float32), axis=1)
            squares += tl.sum(left * left, axis=1)
        acc = tl.dot(weights, v, acc, input_precision="ieee")

    out = acc * (1.0 / tl.where(rounded > 0.0, rounded, 1.0))[:, None]
    row = rows < n
    inside = row[:, None] & (width[None, :] < DV)
    OUT += b * ob + h * oh + tl.cast(first, tl.int64) * on
    at = within[:, None].to(tl.int64) * on + width[None, :].to(tl.int64) * od
    tl.store(OUT + at, _rounded(out, OUT.dtype.element_ty, WIDEN).to(OUT.dtype.element_ty), mask=inside)
    saved = ROWS + pair * n + rows
    every = pairs.to(tl.int64) * n
    if STATS or GRAD:
        tl.store(saved, anchor, mask=row)
        tl.store(saved + every, inverse, mask=row)
        tl.store(saved + 2 * every, cut, mask=row)
        tl.store(saved + 3 * every, exact * peak, mask=row)
        tl.store(saved + 4 * every, kind.to(tl.float32), mask=row)
        tl.store(saved + 5 * every, where.to(tl.float32), mask=row)
    if STATS:
        tl.store(saved + 6 * every, count, mask=row)
        tl.store(saved + 7 * every, squares * peak * peak, mask=row)


@triton.jit
def _scores_gradient(e, left, dp, keys, factor, high, low, half, kind, where, MODE: tl.constexpr):
    """dS = p (g - cut G) of one tile, with everything over Z taken together in ``factor`` = 1 / (normaliser Z)."""
    survives = left > 0.0
    if MODE == 2:
        survives = survives & (kind != 1)
    g = tl.where(survives, dp - high, -low)
    if MODE == 3:
        g -= tl.where(keys == where, half, 0.0)
    return e * factor * g


@triton.jit(do_not_specialize=ANY[3:])
def query_kernel(
    Q, K, V, MASK_PTR, DO, ROWS, ALIVE, GRADIENTS, DQ, DTAU,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, gb, gh, gn, gd, mb, mh, mn, mm,
    blocks, heads, n, m, pairs, span, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, GROUPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ [B, H, N, D] and dtau [B, H, N] for a block of queries, and what `key_kernel` needs of each."""
    DTYPE: tl.constexpr = K.dtype.element_ty
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    first, within, ahead = block * BLOCK_N, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    depth, width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = first + within
    row = rows < n
    K += b * kb + h * kh
    V += b * vb + h * vh
    MASK_PTR += b * mb + h * mh
    q = _load(Q + b * qb + h * qh, first, within, depth, qn, qd, n, D, WIDEN)
    do = _load(DO + b * gb + h * gh, first, within, width, gn, gd, n, DV, WIDEN)
    saved = ROWS + pair * n + rows
    every = pairs.to(tl.int64) * n
    anchor = tl.load(saved, mask=row, other=0.0)
    inverse = tl.load(saved + every, mask=row, other=0.0)
    cut = tl.load(saved + 2 * every, mask=row, other=0.0)
    z = tl.load(saved + 3 * every, mask=row, other=0.0)
    kind = tl.load(saved + 4 * every, mask=row, other=0.0).to(tl.int32)
    where = tl.load(saved + 5 * every, mask=row, other=0.0).to(tl.int32)
    over = tl.where(z == 0.0, 0.0, 1.0 / tl.where(z == 0.0, 1.0, z))  # NaN stays
    scale_2 = scale * LOG2E
    stop = m
    if CAUSAL:
        stop = tl.minimum(m, first + BLOCK_N)

    # D = dO . o and the sum over the survivors of dO . v_j - D, from the tiles that have any.
    dot = tl.zeros([BLOCK_N], tl.float32)
    excess = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    steps, bits = tl.cdiv(stop, BLOCK_M), tl.cast(0, tl.int64)
    if GROUPS > 0:
        bits = tl.load(ALIVE + tl.program_id(0))
        steps = tl.sum(((bits >> tl.arange(0, GROUPS)) & 1).to(tl.int32), axis=0) * span
    for step in range(0, steps):
        start = step * BLOCK_M
        if GROUPS > 0:
            start, bits = _next_tile(step, bits, span, BLOCK_M)
        keys = start + ahead
        k = _load(K, start, ahead, depth, kn, kd, m, D, WIDEN)
        v = _load(V, start, ahead, width, vn, vd, m, DV, WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_2
        s = _masked(s, rows[:, None], keys[None, :], MASK_PTR, mn, mm, n, m, CAUSAL, MASK)
        left = _left(tl.exp2(s - anchor[:, None]), inverse[:, None], cut[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        dot += tl.sum(left * dp, axis=1)
        excess += tl.sum(tl.where(left > 0.0, dp, 0.0), axis=1)
        count += tl.sum((left > 0.0).to(tl.float32), axis=1)
    dot *= over
    excess -= count * dot
    regular = kind == 0
    low = tl.where(regular, cut * excess, 0.0)
    high = dot + low
    half = tl.where(kind == 2, excess * 0.5, 0.0)
    tl.store(DTAU + pair * n + rows, tl.where(regular, -excess * over, 0.0), mask=row)
    prepared = GRADIENTS + pair * n + rows
    tl.store(prepared, over, mask=row)
    tl.store(prepared + every, high, mask=row)
    tl.store(prepared + 2 * every, low, mask=row)
    tl.store(prepared + 3 * every, half, mask=row)

    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, stop, BLOCK_M):
        keys = start + ahead
        k = _load(K, start, ahead, depth, kn, kd, m, D, WIDEN)
        v = _load(V, start, ahead, width, vn, vd, m, DV, WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_2
        s = _masked(s, rows[:, None], keys[None, :], MASK_PTR, mn, mm, n, m, CAUSAL, MASK)
        e = tl.exp2(s - anchor[:, None])
        left = _left(e, inverse[:, None], cut[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = _scores_gradient(
            e, left, dp, keys[None, :], (inverse * over)[:, None], high[:, None], low[:, None],
            half[:, None], kind[:, None], where[:, None], MODE,
        )  # fmt: skip
        dq = tl.dot(_rounded(ds, DTYPE, WIDEN), k, dq, input_precision="ieee")
    DQ += (pair * n + first) * D
    at = within[:, None] * D + depth[None, :]
    dq = _rounded(dq * scale, DQ.dtype.element_ty, WIDEN).to(DQ.dtype.element_ty)
    tl.store(DQ + at, dq, mask=row[:, None] & (depth[None, :] < D))


@triton.jit(do_not_specialize=ANY[3:-1])
def key_kernel(
    Q, K, V, MASK_PTR, DO, ROWS, GRADIENTS, DK, DV_PTR,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, gb, gh, gn, gd, mb, mh, mn, mm,
    blocks, heads, n, m, pairs, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dK [B, H, M, D] and dV [B, H, M, Dv] for a block of keys; tiles are [keys, queries], ready for the products."""
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    begin, within, ahead = block * BLOCK_M, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    depth, width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = begin + ahead
    Q += b * qb + h * qh
    DO += b * gb + h * gh
    MASK_PTR += b * mb + h * mh
    k = _load(K + b * kb + h * kh, begin, ahead, depth, kn, kd, m, D, WIDEN)
    v = _load(V + b * vb + h * vh, begin, ahead, width, vn, vd, m, DV, WIDEN)
    ROWS += pair * n + within
    GRADIENTS += pair * n + within
    every = pairs.to(tl.int64) * n
    scale_2 = scale * LOG2E
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    start_row = 0
    if CAUSAL:
        start_row = begin // BLOCK_N * BLOCK_N  # queries before the block's first key see none of its keys
    for first in range(start_row, n, BLOCK_N):
        rows = first + within
        row = rows < n
        q = _load(Q, first, within, depth, qn, qd, n, D, WIDEN)
        do = _load(DO, first, within, width, gn, gd, n, DV, WIDEN)
        anchor = tl.load(ROWS + first, mask=row, other=0.0)[:, None]
        inverse = tl.load(ROWS + every + first, mask=row, other=0.0)[:, None]
        cut = tl.load(ROWS + 2 * every + first, mask=row, other=0.0)[:, None]
        over = tl.load(GRADIENTS + first, mask=row, other=0.0)[:, None]
        high = tl.load(GRADIENTS + every + first, mask=row, other=0.0)[:, None]
        low = tl.load(GRADIENTS + 2 * every + first, mask=row, other=0.0)[:, None]
        half, kind, where = 0.0, 0, 0
        if MODE >= 2:
            kind = tl.load(ROWS + 4 * every + first, mask=row, other=0.0).to(tl.int32)[:, None]
            where = tl.load(ROWS + 5 * every + first, mask=row, other=0.0).to(tl.int32)[:, None]
        if MODE == 3:
            half = tl.load(GRADIENTS + 3 * every + first, mask=row, other=0.0)[:, None]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_2
        if MASK > 0 or CAUSAL:  # what keys beyond m and rows beyond n give is not stored, or multiplied with 0
            s = _masked(s, rows[:, None], keys[None, :], MASK_PTR, mn, mm, n, m, CAUSAL, MASK)
        e = tl.exp2(s - anchor)
        left = _left(e, inverse, cut)
        weights = left * over
        if MODE == 2:
            weights = tl.where(kind == 1, (keys[None, :] == where).to(tl.float32), weights)
        weights = _rounded(weights, DO.dtype.element_ty, WIDEN)
        dv = tl.dot(tl.trans(weights), do, dv, input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = _scores_gradient(e, left, dp, keys[None, :], inverse * over, high, low, half, kind, where, MODE)
        dk = tl.dot(tl.trans(_rounded(ds, Q.dtype.element_ty, WIDEN)), q, dk, input_precision="ieee")
    key = keys[:, None] < m
    DK += (pair * m + begin) * D
    DV_PTR += (pair * m + begin) * DV
    dk = _rounded(dk * scale, DK.dtype.element_ty, WIDEN).to(DK.dtype.element_ty)
    tl.store(DK + ahead[:, None] * D + depth[None, :], dk, mask=key & (depth[None, :] < D))
    dv = _rounded(dv, DV_PTR.dtype.element_ty, WIDEN).to(DV_PTR.dtype.element_ty)
    tl.store(DV_PTR + ahead[:, None] * DV + width[None, :], dv, mask=key & (width[None, :] < DV))
