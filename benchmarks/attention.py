"""What the cut costs: each backend against fused dense attention (SDPA), in one run.

    python benchmarks/attention.py [--threads 1] [--repeats 15] [--tau 0.01] [--out results/bench]

Times are medians over calls taken in turn, so that a slow moment meets all of them. Memory is what one call adds to the
resident set at its peak, in a process of its own (Linux only, by /proc). Logits are sums of 64 products of independent
Gaussians, standard deviation 2. Run it while nothing else does.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from svit_utils.attention import attention_record, thresholded_attention
from svit_utils.provenance import provenance

HEADS, WIDTH = 6, 64
LENGTHS = (65, 197, 577, 1025, 2049, 4097)
PLAIN = "reference"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def variants(tau: float) -> dict[str, Attention]:
    """SDPA, and the backends of this library."""

    def backend(name: str) -> Attention:
        return lambda q, k, v: thresholded_attention(q, k, v, tau, backend=name)

    return {"sdpa": F.scaled_dot_product_attention, PLAIN: backend(PLAIN), "tiled": backend("tiled")}


def inputs(n: int, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, 6, N, 64], B = 4, or 1 from N = 2049 on."""
    g = torch.Generator().manual_seed(0)
    batch = 4 if n < 2000 else 1
    q, k, v = (torch.randn(batch, HEADS, n, WIDTH, generator=g) for _ in range(3))
    return tuple(x.requires_grad_(grad) for x in (2 * q, k, v))  # type: ignore[return-value]


def call(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
    """One forward pass, and one backward pass where q asks for it."""
    out = attention(q, k, v)
    if q.requires_grad:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def in_turn(functions: dict[str, Attention], n: int, grad: bool, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each function's calls, after two that do not count."""
    q, k, v = inputs(n, grad)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 2):
        for name, attention in functions.items():
            started = time.perf_counter()
            call(attention, q, k, v)
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


def peak_growth(name: str, tau: float, n: int, grad: bool, threads: int) -> float:
    """MiB by which one call raises the peak of a fresh process that already holds the inputs and has run small ones."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_growth, (name, tau, n, grad, threads))


def _peak_growth(name: str, tau: float, n: int, grad: bool, threads: int) -> float:
    torch.set_num_threads(threads)
    attention = variants(tau)[name]
    call(attention, *inputs(65, grad))
    tensors = inputs(n, grad)
    before = _peak_kib(reset=True)
    call(attention, *tensors)
    return (_peak_kib() - before) / 1024


def _peak_kib(reset: bool = False) -> float:
    """The largest resident set so far, or since it was reset; getrusage's cannot be reset, and outlives exec."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return float(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Measure, print, and write ``attention.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="fewer are taken of the slowest")
    parser.add_argument("--tau", type=float, default=0.01)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=Path, help="folder for attention.csv; without it nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = provenance(seed=0)
    rows = []
    for n in args.lengths:
        with torch.no_grad():
            cut = 1 - float((attention_record(*inputs(min(n, 1025), False), args.tau).probs > args.tau).float().mean())
        for grad in (False, True):
            # The plain formula stores too much to be timed as often where N is large.
            repeats = max(3, args.repeats // (1 + n // 1000) // (2 if grad else 1))
            times = in_turn(variants(args.tau), n, grad, repeats)
            base = statistics.median(times["sdpa"])
            for name, taken in times.items():
                median = statistics.median(taken)
                row = {
                    "n": n,
                    "direction": "forward+backward" if grad else "forward",
                    "variant": name,
                    "repeats": repeats,
                    "median_ms": round(median, 3),
                    "fastest_ms": round(min(taken), 3),
                    "slowest_ms": round(max(taken), 3),
                    "ratio_to_sdpa": round(median / base, 3),
                    "peak_growth_mib": round(peak_growth(name, args.tau, n, grad, args.threads), 1),
                    "tau": args.tau,
                    "cut": round(cut, 4) if n <= 1025 else "",
                }
                rows.append({**row, **source})
                print(
                    f"N {n:5d}  {row['direction']:17s} {name:10s} {median:10.2f} ms  {row['ratio_to_sdpa']:6.2f} x SDPA"
                    f"  peak +{row['peak_growth_mib']:.0f} MiB",
                    flush=True,
                )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"attention_{args.threads}.csv"
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, path)


if __name__ == "__main__":
    main()
