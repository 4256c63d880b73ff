"""Measuring: calls taken in turn, medians and spread, peak memory in a process of its own, rows with provenance."""

from __future__ import annotations

import csv
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svit_utils.provenance import provenance

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much to measure, and on what."""

    device: str = "cpu"
    threads: tuple[int, ...] = (1, 2)
    tau: float = 0.01
    seconds: float = 20.0  # per group of functions that are compared
    most: int = 31  # rounds at most
    quick: bool = False  # smallest sizes, to see that everything runs

    @property
    def all_threads(self) -> int:
        return max(self.threads)


def in_turn(functions: dict[str, Callable[[], object]], plan: Plan) -> dict[str, list[float]]:
    """Milliseconds of each function's calls, one round after the other, so that a slow moment meets all of them.

    A short call is preceded by one that does not count: it would otherwise pay for the caches and for the memory that
    its predecessor, a function with other habits, gave back.
    """
    once = {
        name: (timed(function, plan.device), timed(function, plan.device))[1] for name, function in functions.items()
    }
    rounds = min(plan.most, max(3, int(1e3 * plan.seconds / (2 * sum(once.values())))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if once[name] < 500:
                function()
            times[name].append(timed(function, plan.device))
    return times


def timed(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def summarised(times: dict[str, list[float]], base: str) -> dict[str, Row]:
    """Per function: median, quartiles, and its ratio to ``base``: of the medians, and the quartiles over rounds."""
    summary = {}
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times[base], strict=True)]
        low, _, high = statistics.quantiles(taken, n=4)
        ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4)
        median = statistics.median(taken)
        summary[name] = {
            "rounds": len(taken),
            "median_ms": round(median, 3),
            "q25_ms": round(low, 3),
            "q75_ms": round(high, 3),
            f"ratio_to_{base}": round(median / statistics.median(times[base]), 3),
            "ratio_q25": round(ratio_low, 3),
            "ratio_q75": round(ratio_high, 3),
        }
    return summary


def peak_growths(function: Callable[..., object], calls: list[tuple[Any, ...]]) -> list[float]:
    """MiB that each ``function(*call)()`` adds to resident memory at its peak, in one fresh process; NaN if it dies.

    ``function(*call)`` prepares and returns what is to be measured; it must be importable. Linux only (`/proc`).
    """
    # Every block of 64 KiB goes back to the system when it is freed, so that one call's memory is not the next one's.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_growths, args=(send, function, calls))
        process.start()
        send.close()
        growths: list[float] = []
        try:
            while len(growths) < len(calls):
                growths.append(receive.recv())
        except EOFError:  # it was killed, for memory as a rule
            growths += [float("nan")] * (len(calls) - len(growths))
        process.join()
        return growths
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _growths(send: Any, function: Callable[..., Callable[[], object]], calls: list[tuple[Any, ...]]) -> None:
    for call in calls:
        prepared = function(*call)
        prepared()
        before = _peak_kib(reset=True)
        prepared()
        send.send((_peak_kib() - before) / 1024)


def _peak_kib(reset: bool = False) -> float:
    """The largest resident set so far, or since it was reset; getrusage's cannot be reset, and outlives exec."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return float("nan")
    return float(status.split("VmHWM:")[1].split()[0])


def write(name: str, rows: list[Row], folder: Path) -> None:
    """``folder/name.csv``, each row with its provenance, complete or not at all."""
    source = provenance(seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns += [column for column in source if column not in columns]
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**source, **row} for row in rows)
    os.replace(partial, folder / f"{name}.csv")
