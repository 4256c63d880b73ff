"""Medians of a call's time, its time replayed from a CUDA graph (without Python), and the memory it adds."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.plan import Row
from benchmarks.gpu.workers import one_line

Call = Callable[[], object]


def median_ms(calls: Sequence[Call], device: str, rep_ms: float = 100.0) -> Row:
    """Median and quintiles of the milliseconds of one call; ``calls`` do the same on inputs that are taken in turn.

    On a GPU by ``triton.testing.do_bench``, which also empties the cache before each call; on the CPU by a clock.
    """
    turns = itertools.cycle(calls)
    if device == "cpu":
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - started < rep_ms / 1e3 and len(times) < 50):
            before = time.perf_counter()
            next(turns)()
            times.append(1e3 * (time.perf_counter() - before))
        low, middle, high = min(times), statistics.median(times), max(times)
    else:
        from triton.testing import do_bench

        found = do_bench(lambda: next(turns)(), warmup=25, rep=int(rep_ms), quantiles=[0.2, 0.5, 0.8])
        assert isinstance(found, list)
        low, middle, high = found
    return {"median_ms": round(middle, 4), "q20_ms": round(low, 4), "q80_ms": round(high, 4)}


def graph_ms(calls: Sequence[Call], rep_ms: float = 100.0) -> float:
    """Median milliseconds of one call when all of them are captured in one CUDA graph and replayed."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = do_bench(graph.replay, warmup=25, rep=int(rep_ms), quantiles=[0.5])
    assert isinstance(found, float)
    return round(found / len(calls), 4)


def peak_growth_mib(call: Call, device: str) -> float | str:
    """MiB that a call adds to the allocated memory at its peak; empty on the CPU."""
    if device == "cpu":
        return ""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def reason(error: Exception) -> str:
    """Why something could not be measured, in one line for the table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return one_line(error)[:200]
