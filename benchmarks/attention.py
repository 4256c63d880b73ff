"""Time and memory of one attention call: this library's backends, fused dense attention, and other sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import Plan, Row, in_turn, peak_growths, summarised
from benchmarks.variants import LENGTHS, LOGITS, Attention, cut_share, fast_backend, inputs, variants


def rows(plan: Plan) -> list[Row]:
    """All variants on one thread with independent logits; SDPA and this library's also on all threads and clustered."""
    lengths = (65, 197) if plan.quick else LENGTHS
    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    found = []
    for logits in LOGITS:
        cut = {n: cut_share(n, plan.tau, logits) for n in lengths}
        for threads in plan.threads if logits == "independent" and plan.device == "cpu" else plan.threads[:1]:
            everything = logits == "independent" and threads == plan.threads[0]
            torch.set_num_threads(threads)
            for n in lengths:
                for grad in (False, True):
                    common = {"n": n, "direction": direction(grad), "logits": logits, "threads": threads}
                    common |= {"device_type": plan.device, "dtype": str(dtype).removeprefix("torch.")}
                    common |= {"tau": plan.tau, "cut": round(cut[n], 4)}
                    for row in _compared(plan, n, grad, logits, dtype, everything):
                        found.append({**common, **row})
                        _print(found[-1])
    torch.set_num_threads(plan.threads[0])
    memory = _memory(plan, lengths, dtype)
    for row in found:
        if row["logits"] == "independent" and row["threads"] == plan.threads[0]:
            row["peak_growth_mib"] = memory.get((row["variant"], row["n"], row["direction"]), "")
    return found


def direction(grad: bool) -> str:
    """The name in the tables."""
    return "forward+backward" if grad else "forward"


def _compared(plan: Plan, n: int, grad: bool, logits: str, dtype: torch.dtype, everything: bool) -> list[Row]:
    torch._dynamo.reset()
    q, k, v = inputs(n, grad=grad, logits=logits, device=plan.device, dtype=dtype)
    functions: dict[str, Callable[[], object]] = {}
    for name, attention in variants(plan.tau, n, plan.device, grad).items():
        if everything or name in ("sdpa", "plain formula", fast_backend(plan.device)):
            functions[name] = partial(call, attention, q, k, v)
    summary = summarised(in_turn(functions, plan), "sdpa")
    return [{"variant": name, **row} for name, row in summary.items()]


def call(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One forward pass, and one backward pass where q asks for it."""
    if not q.requires_grad:
        with torch.no_grad():
            attention(q, k, v)
        return
    out = attention(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def prepared(name: str, tau: float, n: int, grad: bool, threads: int) -> Callable[[], object]:
    """A call of one variant with its inputs made, for a process that measures memory."""
    torch.set_num_threads(threads)
    return partial(call, variants(tau, n, "cpu", grad)[name], *inputs(n, grad=grad))


def _memory(plan: Plan, lengths: tuple[int, ...], dtype: torch.dtype) -> dict[tuple[str, int, str], float]:
    """MiB added at the peak by one call of each variant."""
    growths: dict[tuple[str, int, str], float] = {}
    for name in variants(plan.tau, lengths[0], plan.device, grad=False):
        calls = [
            (n, grad) for n in lengths for grad in (False, True) if name in variants(plan.tau, n, plan.device, grad)
        ]
        if plan.device == "cuda":
            measured = [_cuda_growth(name, plan.tau, n, grad, dtype) for n, grad in calls]
        else:
            measured = peak_growths(prepared, [(name, plan.tau, n, grad, plan.threads[0]) for n, grad in calls])
        for (n, grad), growth in zip(calls, measured, strict=True):
            growths[name, n, direction(grad)] = round(growth, 1)
        print(f"peak memory of {name}: " + ", ".join(f"{growth:.0f}" for growth in measured) + " MiB", flush=True)
    return growths


def _cuda_growth(name: str, tau: float, n: int, grad: bool, dtype: torch.dtype) -> float:
    function = partial(call, variants(tau, n, "cuda", grad)[name], *inputs(n, grad=grad, device="cuda", dtype=dtype))
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _print(row: Row) -> None:
    print(
        f"N {row['n']:5d}  {row['direction']:17s} {row['logits']:12s} {row['threads']} threads  {row['variant']:17s}"
        f"{row['median_ms']:10.2f} ms  {row['ratio_to_sdpa']:6.2f} x SDPA"
        f"  [{row['ratio_q25']:.2f}, {row['ratio_q75']:.2f}]",
        flush=True,
    )
