"""The cases that `benchmarks.gpu.prove` proves: every pair of settings occurs together in at least one of them.

All combinations would be a hundred thousand. A wrong stride or mask shows when two settings meet, so a few dozen cases
in which every two meet are worth as much (a covering array; Cohen et al. 1997, "The AETG system"). Most of the time
goes into compiling, so cases that compile to the same kernels stand together, in a `Group`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.attention import EMPTY_ROWS, FixedThreshold, LearnableThreshold, Threshold

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MASKS = ("none", "boolean", "additive", "causal")
LOGITS = ("independent", "clustered", "flat")
TAUS = ("number", "per head", "per query", "learnable", "zero")
LAYOUTS = ("contiguous", "as a ViT's", "offset")
# Head sizes of q and k, and of v.
HEADS = ((64, 64), (32, 32), (128, 128), (80, 80), (96, 96), (40, 40), (48, 24), (256, 256))
# Keys that fit in one small tile, in one tile, and that take several: each is another kernel.
LENGTHS = {"few": (1, 17, 50, 64), "one tile": (65, 130, 197, 256), "many": (257, 577, 1025, 2049, 4097)}
SMALL_HEADS = ((32, 32), (40, 40), (24, 16))
SMALL_LENGTHS = {"few": (1, 17), "one tile": (33,), "many": (65,)}
CLUSTERS = 5


@dataclass(frozen=True)
class Case:
    """One call, forward and backward.

    Attributes:
        dtype: name of q's, k's and v's.
        heads: width of q and k, and of v.
        mask, mode, logits, tau, layout: out of `MASKS`, `EMPTY_ROWS`, `LOGITS`, `TAUS`, `LAYOUTS`.
        length: which of `LENGTHS`; ``n`` queries and ``m`` keys.
        seed: of the inputs.
        shape: pictures and heads: fewer for long sequences, whose float64 reference takes the time.
    """

    dtype: str
    heads: tuple[int, int]
    mask: str
    mode: str
    length: str
    n: int = 0
    m: int = 0
    logits: str = "independent"
    tau: str = "number"
    layout: str = "contiguous"
    seed: int = 0
    shape: tuple[int, int] = (2, 3)

    def __str__(self) -> str:
        d, dv = self.heads
        width = str(d) if d == dv else f"{d}/{dv}"
        size = f"N={self.n}" if self.n == self.m else f"N={self.n} M={self.m}"
        parts = (self.dtype, f"head {width}", size, f"mask {self.mask}", self.mode, self.logits, f"tau {self.tau}")
        return ", ".join((*parts, self.layout))


Group = tuple[Case, ...]  # cases with the same compiled kernels


def covering(factors: Sequence[Sequence[object]], seed: int = 0, tries: int = 60) -> list[tuple[object, ...]]:
    """Rows with one value of each factor, such that every two values of different factors stand in some row together.

    Greedy: of ``tries`` random rows, the one with the most pairs that are still missing.
    """
    draw = random.Random(seed)
    pairs = itertools.combinations(range(len(factors)), 2)
    missing = {(i, a, j, b) for i, j in pairs for a in factors[i] for b in factors[j]}
    rows = []
    while missing:
        i, a, j, b = draw.choice(sorted(missing, key=str))  # whatever else, this pair gets its row
        best: tuple[int, tuple[object, ...]] = (0, ())
        for _ in range(tries):
            row = [draw.choice(list(factor)) for factor in factors]
            row[i], row[j] = a, b
            gain = len(_pairs(row) & missing)
            if gain > best[0]:
                best = (gain, tuple(row))
        rows.append(best[1])
        missing -= _pairs(best[1])
    return rows


def _pairs(row: Sequence[object]) -> set[tuple[int, object, int, object]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def groups(small: bool = False, per_group: int = 3) -> list[Group]:
    """The cases, most usual first: bfloat16, heads 64 wide, no mask, at a Vision Transformer's length."""
    heads, lengths = (SMALL_HEADS, SMALL_LENGTHS) if small else (HEADS, LENGTHS)
    draw = random.Random(1)
    usual = ("bfloat16", heads[0], "none", "dense", "one tile")
    rows = [usual, *covering((tuple(DTYPES), heads, MASKS, EMPTY_ROWS, tuple(lengths)))]
    seen: set[tuple[int, object, int, object]] = set()
    found = []
    for number, row in enumerate(rows):
        start = Case(*row)  # type: ignore[arg-type]
        cases = []
        for _ in range(1 if small else per_group):
            options = [_filled(start, lengths, draw) for _ in range(40)]
            best = max(options, key=lambda case: len(_pairs(_settings(case)) - seen))
            seen |= _pairs(_settings(best))
            cases.append(replace(best, seed=len(seen) + number, shape=(1, 2) if small or best.m > 256 else (2, 3)))
        found.append(tuple(cases))
    return found


def _filled(case: Case, lengths: dict[str, tuple[int, ...]], draw: random.Random) -> Case:
    n = draw.choice(lengths[case.length])
    m = n if draw.random() < 0.7 else draw.choice(lengths[case.length])
    chosen = (draw.choice(LOGITS), draw.choice(TAUS), draw.choice(LAYOUTS))
    return replace(case, n=n, m=m, logits=chosen[0], tau=chosen[1], layout=chosen[2])


def _settings(case: Case) -> tuple[object, ...]:
    return case.dtype, case.heads, case.mask, case.mode, case.n, case.m, case.logits, case.tau, case.layout


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D], k [B, H, M, D] and v [B, H, M, Dv] on the CPU, in the case's dtype; `laid_out` comes later.

    ``"flat"`` logits leave many rows without a survivor; ``"clustered"`` ones lie in five blocks on the diagonal.
    """
    g = torch.Generator().manual_seed(case.seed)
    (b, h), (d, dv) = case.shape, case.heads
    spread = 0.3 if case.logits == "flat" else 2.0
    q, k = spread * torch.randn(b, h, case.n, d, generator=g), torch.randn(b, h, case.m, d, generator=g)
    if case.logits == "clustered":
        code = torch.randint(2, (CLUSTERS, d), generator=g) * 2.0 - 1.0  # of each group, in every dimension
        for x in (q, k):
            group = (torch.arange(x.shape[2]) * CLUSTERS) // x.shape[2]
            x += (8.0 / d**0.5) ** 0.5 * code[group]  # logits rise by 8 within a group
    v = torch.randn(b, h, case.m, dv, generator=g)
    dtype = DTYPES[case.dtype]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == "as a ViT's":  # [B, N, 3, H, D], heads moved forward: what the joint projection of q, k and v gives
        wide = x.permute(0, 2, 1, 3).unsqueeze(2).repeat(1, 1, 3, 1, 1)
        return wide.permute(2, 0, 3, 1, 4)[1]
    if layout == "offset":  # rows that begin anywhere, as after cutting a piece out of something larger
        return F.pad(x, (3, 2, 1, 0))[..., 1:, 3 : 3 + x.shape[-1]]
    return x.contiguous()


def masking(case: Case) -> dict[str, Tensor | bool]:
    """The case's mask on the CPU, as keyword arguments; one query of a masked case has no key at all."""
    if case.mask in ("none", "causal"):
        return {"is_causal": True} if case.mask == "causal" else {}
    g = torch.Generator().manual_seed(case.seed + 1)
    b = case.shape[0]
    keep = torch.rand(b, 1, case.n, case.m, generator=g) > 0.4
    keep[:, :, case.n // 2] = False
    if case.mask == "boolean":
        return {"attn_mask": keep}
    bias = torch.randn(case.n, case.m, generator=g)
    return {"attn_mask": torch.where(keep, bias, -torch.inf).to(DTYPES[case.dtype])}


class PerQuery(Threshold):
    """One tau for each query, each with a gradient: what no learned threshold has, but every kernel must compute."""

    counts_keys = False

    def __init__(self, tau: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(tau)

    def forward(self, keys: int | Tensor) -> Tensor:
        return self.value * self.warmup


def threshold(case: Case) -> Threshold | Tensor:
    """The case's tau: about 1 / M, where some rows keep many keys, some few and some none."""
    g = torch.Generator().manual_seed(case.seed + 2)
    usual = min(1.2 / case.m, 0.3)
    heads = case.shape[1]
    if case.tau == "per head":
        return torch.linspace(0.4 * usual, 2.5 * usual, heads).clamp(max=0.9).requires_grad_()
    if case.tau == "per query":
        return PerQuery(usual * (0.5 + torch.rand(1, heads, case.n, 1, generator=g)))
    if case.tau == "learnable":
        return LearnableThreshold(usual, per="head").for_heads(heads)
    return FixedThreshold(0.0 if case.tau == "zero" else min(0.01, usual) if case.m < 128 else 0.01)


def parameter(tau: Threshold | Tensor) -> Tensor | None:
    """What of tau is differentiated; None for a fixed one."""
    return tau if isinstance(tau, Tensor) else next(iter(tau.parameters()), None)
