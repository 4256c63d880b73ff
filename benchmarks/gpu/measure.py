"""What attention costs on a GPU, against fused dense attention and the other ways to be sparse; then whole models.

Tokens per batch are constant, so that every length fills the card alike. What the targets need comes first, in case the
budget ends early. Fixed thresholds are modules on the device, as in a model.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import card, models, targets
from benchmarks.gpu.plan import Clock, Plan, Row, Table
from benchmarks.gpu.timing import graph_ms, median_ms, peak_growth_mib, reason
from benchmarks.gpu.workers import each
from benchmarks.variants import CLUSTERS, LOGITS, flex
from svit_utils.attention import FixedThreshold, thresholded_attention
from svit_utils.attention.backends import triton as kernels
from svit_utils.attention.call import Call
from svit_utils.attention.normalisers import entmax15, top_k

TAU = 0.01
TOKENS, HEADS, WIDTH = 32_768, 12, 64  # a batch of ViT-Base
LENGTHS = (65, 197, 577, 1025, 2049, 4097, 8193)
COMPILED_LENGTHS = (197, 1025, 4097)  # what has to be compiled for each length
OTHER_LENGTHS = (197, 577, 1025, 2049, 4097)
SETS = 3  # of inputs, taken in turn: together larger than the cache
MAIN = ("sdpa", "sdpa, PyTorch's choice", "triton")
COMPILED = ("plain, compiled", "flex, two passes")
OTHERS = ("entmax15", "adasplash", "top-k")
REP_MS = 60.0  # of calls that are timed, for each median
SLOWEST_MS = 400.0  # a variant that took longer is not measured at greater lengths
Attention = Callable[[Tensor, Tensor, Tensor], Any]


def inputs(plan: Plan, n: int, logits: str, grad: bool, seed: int = 0) -> list[Tensor]:
    """q, k, v [B, H, n, D]; logits of deviation 2, or lower by 8 between five groups, as in `benchmarks.variants`."""
    tokens, heads, width = (TOKENS, HEADS, WIDTH) if not plan.small else (66, 1, 16)
    dtype = torch.bfloat16 if not plan.small else torch.float32
    shape = (max(1, tokens // n), heads, n, width)
    generator = torch.Generator(plan.device).manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator, device=plan.device) for _ in range(3))
    q = 2 * q
    if logits == "clustered":
        group = (torch.arange(n, device=plan.device) * CLUSTERS) // n
        offset = (8.0 * width**0.5) ** 0.5 * F.one_hot(group, CLUSTERS).float()
        q[..., :CLUSTERS], k[..., :CLUSTERS] = offset, offset
    return [x.to(dtype).requires_grad_(grad) for x in (q, k, v)]


def variant(name: str, plan: Plan, n: int) -> Attention:
    """A way to attend by its name in the tables.

    Raises:
        ImportError: it needs a package that is not here.
    """
    tau = FixedThreshold(TAU).to(plan.device)
    if name == "sdpa":
        return F.scaled_dot_product_attention if plan.small else _flash
    if name == "sdpa, PyTorch's choice":
        return F.scaled_dot_product_attention
    if name in ("triton", "plain formula"):
        backend = "triton" if name == "triton" else "reference"
        return lambda q, k, v: thresholded_attention(q, k, v, tau, backend=backend)
    if name == "plain, compiled":
        plain: Attention = lambda q, k, v: thresholded_attention(q, k, v, TAU, backend="reference")  # noqa: E731
        return torch.compile(plain, dynamic=False)
    if name == "flex, two passes":
        return flex(TAU, plan.device)
    if name == "entmax15":
        if importlib.util.find_spec("entmax") is None:
            raise ImportError("entmax is not installed")
        return _over_scores(entmax15)
    if name == "top-k":
        return _over_scores(lambda scores: top_k(scores, min(32, n)))
    if name == "adasplash":
        if plan.small:
            raise ImportError("adasplash needs a GPU")
        from adasplash import adasplash

        # Without lengths it takes powers of two only.
        lengths = torch.full((max(1, TOKENS // n),), n, device=plan.device, dtype=torch.int32)
        return lambda q, k, v: adasplash(q, k, v, alpha=1.5, is_causal=False, varlen=lengths)
    raise ValueError(f"unknown variant {name!r}")


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _over_scores(weights: Callable[[Tensor], Tensor]) -> Attention:
    return lambda q, k, v: weights(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) @ v


def call(attention: Attention, tensors: list[Tensor]) -> None:
    """One forward pass, and one backward pass where q asks for it."""
    if not tensors[0].requires_grad:
        with torch.no_grad():
            attention(*tensors)
        return
    out = attention(*tensors)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


def direction(grad: bool) -> str:
    """As in the tables of `benchmarks`."""
    return "forward+backward" if grad else "forward"


def compare(plan: Plan, n: int, logits: str, grad: bool, names: tuple[str, ...]) -> list[Row]:
    """Rows of the variants, one after the other on the same inputs; the first, SDPA, is what they are compared with."""
    torch._dynamo.reset()
    sets = [inputs(plan, n, logits, grad, seed) for seed in range(1 if plan.small else SETS)]
    batch, heads, _, width = sets[0][0].shape
    rows: list[Row] = []
    for name in names:
        row: Row = {"n": n, "batch": batch, "heads": heads, "width": width, "direction": direction(grad)}
        row |= {"logits": logits, "tau": TAU, "dtype": str(sets[0][0].dtype).removeprefix("torch."), "variant": name}
        try:
            attention = variant(name, plan, n)
            calls = [partial(call, attention, tensors) for tensors in sets]
            row["peak_growth_mib"] = peak_growth_mib(calls[0], plan.device)
            row |= median_ms(calls, plan.device, REP_MS)
            if name in MAIN and not plan.small:
                row["graph_ms"] = graph_ms(calls, REP_MS)
            if name == "triton":
                row["tiles_visited"] = tiles_visited(*sets[0])
        except Exception as error:  # no memory, no package, no compiler: the table says so
            row["note"] = reason(error)
        if rows and "median_ms" in row and "median_ms" in rows[0]:
            row["ratio_to_sdpa"] = round(row["median_ms"] / rows[0]["median_ms"], 3)
        if rows and "graph_ms" in row and "graph_ms" in rows[0]:
            row["graph_ratio_to_sdpa"] = round(row["graph_ms"] / rows[0]["graph_ms"], 3)
        rows.append(row)
        print(_line(row), flush=True)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def tiles_visited(q: Tensor, k: Tensor, v: Tensor) -> float:
    """The share of tiles whose values the forward kernel reads; in the others no key survives."""
    found = Call(torch.tensor(TAU, device=q.device), q.shape[-1] ** -0.5)
    return round(kernels.share_visited(q.detach(), k.detach(), v.detach(), found), 4)


def _line(row: Row) -> str:
    if "note" in row:
        return f"N {row['n']:5d}  {row['direction']:17s} {row['logits']:12s} {row['variant']:23s} {row['note']}"
    more = "".join(
        f"  {label} {row[key]}"
        for key, label in (("ratio_to_sdpa", "x SDPA"), ("graph_ratio_to_sdpa", "graph"), ("tiles_visited", "tiles"))
        if key in row
    )
    return (
        f"N {row['n']:5d}  {row['direction']:17s} {row['logits']:12s} {row['variant']:23s}"
        f" {row['median_ms']:9.3f} ms{more}"
    )


def compile_one(item: tuple[Plan, str, int, bool]) -> None:
    """Compile one variant for one length, so that the caches on disk have it."""
    plan, name, n, grad = item
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(variant(name, plan, n), inputs(plan, n, "independent", grad))


def attention_main(plan: Plan, clock: Clock, table: Table) -> None:
    """SDPA and the kernels, all lengths and logits."""
    for n in (33, 65) if plan.small else LENGTHS:
        for logits in LOGITS:
            for grad in (False, True):
                if clock.allows(2.0):
                    table.extend(compare(plan, n, logits, grad, MAIN))


def attention_others(plan: Plan, clock: Clock, table: Table) -> None:
    """The plain formula, what is compiled from it, and the other normalisers, on independent logits."""
    plain = (("plain formula",), (65,) if plan.small else LENGTHS)
    compiled = (COMPILED, () if plan.small else COMPILED_LENGTHS)
    others = (OTHERS, (65,) if plan.small else OTHER_LENGTHS)
    if compiled[1]:
        items = [(plan, name, n, grad) for n in compiled[1] for name in COMPILED for grad in (False, True)]
        for outcome in each(compile_one, items, min(plan.processes, len(items)), Clock(min(60.0, clock.left() / 3))):
            if outcome.error:
                print(f"compiling {outcome.item[1:]}: {outcome.error.splitlines()[0]}")
        print(f"compiled after {clock.spent():.0f} s", flush=True)
    slow: set[tuple[str, bool]] = set()
    for names, lengths in (plain, compiled, others):
        for n in lengths:
            for grad in (False, True):
                wanted = tuple(name for name in names if (name, grad) not in slow)
                if not wanted or not clock.allows(5.0):
                    continue
                rows = compare(plan, n, LOGITS[0], grad, ("sdpa", *wanted))
                table.extend(rows[1:])
                slow |= {(r["variant"], grad) for r in rows if "note" in r or r["median_ms"] > SLOWEST_MS}


def run(plan: Plan) -> None:
    """Measure within the budget; write ``card.csv``, ``attention.csv``, ``vit.csv`` and ``targets.csv``."""
    clock = Clock(plan.measure_seconds)
    warnings.filterwarnings("ignore", category=UserWarning)
    facts, attention, whole = (Table(plan.out / f"{name}.csv", plan) for name in ("card", "attention", "vit"))
    for table in (facts, attention, whole):
        table.keep(lambda row: row.get("size") != plan.size)
    facts.extend(card.rows(plan))
    attention_main(plan, clock, attention)
    models.run(plan, clock, whole, facts)
    attention_others(plan, clock, attention)
    print(f"measured in {clock.spent():.0f} s")
    targets.run(plan)
