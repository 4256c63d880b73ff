"""The same function on many items, in several processes: compiling and float64 references take cores, not the GPU.

A process that dies, or whose CUDA context is lost, takes one item with it and is replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks.gpu.plan import Clock

# One thread per process; cuBLAS asks for the last so that results repeat.
_SETTINGS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class Outcome:
    """What became of an item: its result, or the error: its kind and first line, then the traceback."""

    item: Any
    result: Any = None
    error: str = ""


def each(
    function: Callable[[Any], Any], items: Sequence[Any], processes: int, clock: Clock, *, stop_early: bool = False
) -> Iterator[Outcome]:
    """``function(item)`` for every item, in the order in which they finish, until the clock runs out.

    Args:
        function: importable by name, since other processes call it.
        items: picklable.
        processes: 1 does everything here.
        clock: nothing is begun after its end, and what is under way then is ended.
        stop_early: begin nothing after an error; what is under way is finished.
    """
    if processes <= 1:
        for item in items:
            if not clock.allows(0):
                return
            outcome = _attempt(function, item)
            yield outcome
            if outcome.error and stop_early:
                return
        return
    yield from _in_processes(function, list(items), min(processes, len(items)), clock, stop_early)


def _attempt(function: Callable[[Any], Any], item: Any) -> Outcome:
    try:
        return Outcome(item, function(item))
    except Exception as error:  # an assertion, a CUDA error, a compiler's: all are findings
        return Outcome(item, error=f"{one_line(error)}\n{traceback.format_exc()}")


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:300]


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    torch.set_num_threads(1)
    while (item := pipe.recv()) is not None:
        outcome = _attempt(function, item)
        pipe.send((outcome.result, outcome.error))


def _in_processes(
    function: Callable[[Any], Any], items: list[Any], processes: int, clock: Clock, stop_early: bool
) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    busy: dict[Connection, tuple[Any, Any]] = {}  # pipe -> (process, item)
    idle: list[tuple[Connection, Any]] = []

    def begin() -> tuple[Connection, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    try:
        idle = [begin() for _ in range(processes)]
        while (items or busy) and clock.allows(0):
            while items and idle:
                pipe, process = idle.pop()
                busy[pipe] = (process, items.pop(0))
                with contextlib.suppress(OSError):  # it died before its first item, which it takes with it
                    pipe.send(busy[pipe][1])
            for ready in wait(list(busy), timeout=max(0.0, min(clock.left(), 1.0))):
                assert isinstance(ready, Connection)
                pipe = ready
                process, item = busy.pop(pipe)
                outcome = _received(pipe, process, item)
                if outcome.error:
                    process.kill()
                    items = [] if stop_early else items
                    idle += [begin()] if items else []
                else:
                    idle.append((pipe, process))
                yield outcome
    finally:
        for process in [process for _, process in idle] + [process for process, _ in busy.values()]:
            process.kill()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _received(pipe: Connection, process: Any, item: Any) -> Outcome:
    try:
        result, error = pipe.recv()
        return Outcome(item, result, error)
    except (EOFError, OSError):
        process.join()
        return Outcome(item, error=f"the process died with exit code {process.exitcode}")
