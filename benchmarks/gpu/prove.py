"""Every Triton kernel, forward and backward, against the formula in float64 on the CPU.

**The criterion.** An error is the distance from float64, as root mean square over a tensor's entries. The kernels' may
be at most twice that of the formula in the same dtype on the same device, plus `FLOORS`; the largest error of an entry
at most four times, since one entry can be unlucky. "The formula in the same dtype" takes its sums, softmax and cut in
float32 and rounds to the dtype what enters a matrix product, as autocast and every fused kernel do (`Rounded`);
FlashAttention's own tests compare in this way. The library's ``backend="reference"`` keeps float32 inside: its errors
are recorded beside (``reference_...``).

**Rows on the edge.** Where a probability lies within rounding of what a row is cut at, either side is right, and the
gradient differs by a whole key. Such rows (`on_edge`) are found in float64, counted, not compared, and get no gradient
from above, so that they do not enter dk, dv and dtau. On all others the number of survivors must be the same exactly.

Each case runs with uninitialised memory filled with NaN, and twice: the bits must repeat.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import special
from benchmarks.gpu.cases import Case, Group, groups, inputs, laid_out, masking, parameter, threshold
from benchmarks.gpu.plan import Clock, Plan, Row, Table
from benchmarks.gpu.workers import Outcome, each
from svit_utils.attention import AttentionRows, Threshold, attention_record, attention_rows, thresholded_attention
from svit_utils.attention.call import Call
from svit_utils.attention.record import AttentionRecord, attend

TIMES, TIMES_LARGEST = 2.0, 4.0
# Relative to a tensor's largest entry, for errors that are 0 in the formula by luck: a small part of a rounding.
FLOORS = {"float16": 2.0**-15, "bfloat16": 2.0**-12, "float32": 2.0**-23}
# tau's gradient is one number for many rows, whose error in the formula can be 0 by luck when nothing else is rounded.
FLOORS_DTAU = FLOORS | {"float32": 2.0**-20}
FLOOR_OF_ZERO = 32.0  # times the floor, where a gradient is 0 by nature and any rounding is infinitely larger
EDGE = 1e-4  # of a probability from what the row is cut at; float32 scores are a few 1e-6 from float64 ones
LEAST_SUM = 1 / 64  # of R's sum, over the cut: below, rounding is multiplied by more than 64
NAMES = ("out", "dq", "dk", "dv", "dtau")


class _RoundedGradient(torch.autograd.Function):
    """The identity; its gradient is rounded to a dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


class Rounded:
    """The formula with products in a dtype: weights and their gradients, and those of the scores, are rounded to it."""

    def __init__(self, call: Call, dtype: torch.dtype) -> None:
        self.call, self.dtype = call, dtype

    def weights(self, scores: Tensor) -> Tensor:
        """Scores to weights, both in float32."""
        weights = self.call.weights(_RoundedGradient.apply(scores, self.dtype))
        return weights.to(self.dtype).to(scores.dtype)  # the gradient is rounded on its way back

    def cut_at(self, scores: Tensor, weights: Tensor) -> Tensor | float:
        """As the formula."""
        return self.call.cut_at(scores, weights)


def formula_in_dtype(q: Tensor, k: Tensor, v: Tensor, tau: Any, **options: Any) -> Tensor:
    """What the kernels are compared with, see the module's docstring."""
    call = Call.checked(q, k, v, tau, **options)
    masks: dict[str, Any] = {"attn_mask": call.attn_mask, "is_causal": call.is_causal}
    return attend(q, k, v, Rounded(call, q.dtype), scale=call.scale, **masks).out


def backend(name: str) -> Callable[..., Tensor]:
    """One of the library's backends as a function of q, k, v, tau and options."""

    def attention(q: Tensor, k: Tensor, v: Tensor, tau: Any, **options: Any) -> Tensor:
        out = thresholded_attention(q, k, v, tau, backend=name, **options)
        assert isinstance(out, Tensor)
        return out

    return attention


def derivatives(
    attention: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    tau: Threshold | Tensor,
    direction: Tensor,
    **options: Any,
) -> list[Tensor]:
    """Output, and the gradients of q, k, v and of tau's parameter if it has one."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    out = attention(q, k, v, tau, **options)
    learned = parameter(tau)
    of = [q, k, v] if learned is None else [q, k, v, learned]
    return [out.detach(), *torch.autograd.grad(out, of, direction.to(out))]


def on_edge(record: AttentionRecord, tau: Tensor | float, mode: str) -> Tensor:
    """Rows whose support or kind is within rounding of another: bool [B, H, N]; from a record in float64."""
    probs, cut = record.probs, torch.as_tensor(record.tau, dtype=torch.float64)
    base = torch.as_tensor(tau, dtype=torch.float64)
    edge = ((probs - cut).abs() <= EDGE * cut).logical_and(cut > 0).any(dim=-1)
    total = (probs - cut).relu().sum(dim=-1, keepdim=True)
    edge |= ((total > 0) & (total < LEAST_SUM * cut)).squeeze(-1)
    largest = probs.amax(dim=-1, keepdim=True)
    if mode in ("top1", "cap") and probs.shape[-1] > 1:  # which of two equal keys is the largest?
        first, second = probs.topk(2, dim=-1).values.unbind(-1)
        looks = (largest <= base) if mode == "top1" else (largest / 2 < base)
        edge |= (first - second <= EDGE * first) & (first > 0) & looks.squeeze(-1)
    if mode == "cap":
        edge |= ((largest / 2 - base).abs() <= EDGE * base).logical_and(base > 0).squeeze(-1)
    return edge


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def prove_case(case: Case, device: str, kernels: Callable[..., Tensor] | None = None) -> Row:
    """One case: a row with the errors of kernels, formula and reference, and whether the kernels pass.

    ``kernels`` stands in for the Triton backend, to test this test.
    """
    q, k, v = inputs(case)
    masks, tau = masking(case), threshold(case)
    options: dict[str, Any] = {"empty_rows": case.mode, **masks}
    wide = (q.double(), k.double(), v.double())
    record = attention_record(*wide, detached(tau), **options)
    edge = on_edge(record, Call.checked(*wide, detached(tau), **options).tau, case.mode)
    g = torch.Generator().manual_seed(case.seed + 3)
    direction = torch.randn(record.out.shape, generator=g).to(q.dtype).masked_fill(edge[..., None], 0.0)
    exact = derivatives(backend("reference"), wide, tau, direction, **options)

    on_q, on_k, on_v = there = tuple(laid_out(x.to(device), case.layout) for x in (q, k, v))
    options |= {name: x.to(device) for name, x in masks.items() if isinstance(x, Tensor)}
    moved = tau.detach().to(device).requires_grad_() if isinstance(tau, Tensor) else copy.deepcopy(tau).to(device)
    own = kernels or backend("triton")

    def on_device(attention: Callable[..., Tensor]) -> list[Tensor]:
        return derivatives(attention, there, moved, direction.to(device), **options)  # type: ignore[arg-type]

    with poisoned_memory():
        got = on_device(own)
        repeated = all(torch.equal(a, b) for a, b in zip(got, on_device(own), strict=True))
    with torch.no_grad():
        _, rows = attention_rows(on_q, on_k, on_v, moved, backend="triton", **options)
    kept = AttentionRows.from_record(record).kept
    other_support = int(((rows.kept.cpu() != kept) & ~edge).sum())
    found: Row = {
        "case": str(case),
        "passed": None,
        **asdict(case),
        "heads": f"{case.heads[0]}/{case.heads[1]}",
        "rows": edge.numel(),
    }
    found["shape"] = f"{case.shape[0]} x {case.shape[1]}"
    found |= {"rows_on_edge": int(edge.sum()), "rows_with_another_support": other_support, "repeats": repeated}
    others = {"formula": on_device(formula_in_dtype), "reference": on_device(backend("reference"))}
    found |= _compared(case, got, others, exact, ~edge, direction)
    found["passed"] = repeated and not other_support and found["worst_ratio"] <= TIMES
    return found


def detached(tau: Threshold | Tensor) -> Threshold | Tensor:
    """Tau without its gradient."""
    return tau.detach() if isinstance(tau, Tensor) else copy.deepcopy(tau).requires_grad_(False)


def _compared(
    case: Case, got: list[Tensor], others: dict[str, list[Tensor]], exact: list[Tensor], used: Tensor, direction: Tensor
) -> Row:
    """Errors of each quantity, and the worst ratio to those of the formula in the same dtype."""
    q, k, v = (x.double().square().mean().sqrt() for x in inputs(case))
    of_products = float(direction.double().square().mean().sqrt() * v * direction.shape[-1] ** 0.5)  # dO . v, typically
    scale = case.heads[0] ** -0.5
    # A gradient can be 0 by nature (a single survivor): then what its terms are is what rounding is of.
    typical = {"out": float(v), "dq": of_products * float(k) * scale, "dk": of_products * float(q) * scale}
    typical |= {"dv": float(direction.double().square().mean().sqrt()), "dtau": of_products}
    row: Row = {}
    worst = (0.0, "")
    for name, own, formula, reference, wanted in zip(NAMES, got, *others.values(), exact, strict=False):
        size = max(float(wanted.abs().max()), typical[name]) or 1.0
        if name == "dtau":
            size *= max(1.0, (used.numel() / max(wanted.numel(), 1)) ** 0.5)  # a sum over so many rows
        errors = [_errors(x, wanted, used if name == "out" else None, size) for x in (own, formula, reference)]
        floor = (FLOORS_DTAU if name == "dtau" else FLOORS)[case.dtype] / TIMES
        floor *= FLOOR_OF_ZERO if float(wanted.abs().max()) < 1e-6 * size else 1.0
        ratio = errors[0][0] / (errors[1][0] + floor)
        largest = errors[0][1] / (errors[1][1] + floor) * TIMES / TIMES_LARGEST
        worst = max(worst, (ratio, name), (largest, f"{name}, largest"))
        for kind, (error, _) in zip(("kernel", *others), errors, strict=True):
            row[f"{kind}_{name}"] = f"{error:.2e}"
    return {"worst_ratio": round(worst[0], 3), "worst": worst[1], **row}


def _errors(x: Tensor, exact: Tensor, used: Tensor | None, size: float) -> tuple[float, float]:
    """Root mean square and largest error over ``size``; infinite where something is not finite."""
    error = (x.cpu().double() - exact.double()).abs() / size
    if used is not None:
        error = error[used]
    if error.numel() == 0:
        return 0.0, 0.0
    if not bool(torch.isfinite(error).all()):
        return float("inf"), float("inf")
    return float(error.square().mean().sqrt()), float(error.max())


def prove_item(item: tuple[Group | str, str]) -> list[Row]:
    """What a process does: a group's cases, or one of `special`'s by name."""
    what, device = item
    if isinstance(what, str):
        return [special.run(what, device)]
    return [prove_case(case, device) for case in what]


def run(plan: Plan) -> bool:
    """Prove everything within the budget, write ``prove.csv``, print a summary; True where nothing failed."""
    clock = Clock(plan.prove_seconds)
    table = Table(plan.out / "prove.csv", plan)
    table.keep(lambda row: row.get("size") != plan.size)
    todo = groups(plan.small)
    named = special.NAMES
    items: list[tuple[Group | str, str]] = [(todo[0], plan.device), *((name, plan.device) for name in named)]
    items += [(group, plan.device) for group in todo[1:]]
    planned = sum(map(len, todo)) + len(named)
    rows: list[Row] = []
    for outcome in each(prove_item, items, plan.processes, clock):
        new = outcome.result or [_of_error(outcome)]
        rows += new
        table.extend(new)
        for row in new:
            if row.get("passed") is False:
                print(f"FAILED: {row['case']}: {row.get('error') or _label(row)}", flush=True)
    failed = [row for row in rows if row["passed"] is False]
    print(summary(rows, planned, clock))
    return bool(rows) and not failed


def _label(row: Row) -> str:
    said = f"ratio {row['worst_ratio']} in {row['worst']}, rows with another support {row['rows_with_another_support']}"
    return f"{said}, repeats {row['repeats']}"


def _of_error(outcome: Outcome) -> Row:
    what = outcome.item[0]
    case = what if isinstance(what, str) else f"{what[0]} and {len(what) - 1} more"
    print(outcome.error, flush=True)
    return {"case": case, "passed": False, "error": outcome.error.splitlines()[0]}


def summary(rows: list[Row], planned: int, clock: Clock) -> str:
    """How many cases ran and failed, and per dtype the worst ratio and error."""
    skipped = sum(row["passed"] is None for row in rows)
    failed = sum(row["passed"] is False for row in rows)
    lines = [
        f"proved: {len(rows) - skipped} of {planned} cases run in {clock.spent():.0f} s, {failed} failed, "
        f"{skipped} do not apply on this device"
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows if "dtype" in row):
        of = [row for row in rows if row.get("dtype") == dtype]
        worst = max(of, key=lambda row: row["worst_ratio"])
        edge, total = sum(row["rows_on_edge"] for row in of), sum(row["rows"] for row in of)
        lines.append(
            f"  {dtype:8s} {len(of):3d} cases, worst ratio to the formula {worst['worst_ratio']:.2f} (at most "
            f"{TIMES:g}; {worst['worst']}), largest error of out {max(float(row['kernel_out']) for row in of):.1e}, "
            f"of gradients {max(float(row.get(f'kernel_{n}', 0)) for row in of for n in NAMES[1:4]):.1e}; "
            f"{edge} of {total} rows on the edge, left out"
        )
    return "\n".join(lines)
