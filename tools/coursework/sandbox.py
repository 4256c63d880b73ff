"""A submission's process, seen from outside: start it, ask it, and end it when it takes too long or too much.

nbgrader bounds the time of a cell and nothing else (jupyter/nbgrader#1429); here the grader watches time, resident
memory and processes, twenty times a second, from outside of what it watches.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

import nbtools
from coursework import limits, wire

_TICK = 0.05
FORKS = sys.platform.startswith("linux")  # elsewhere a process that has loaded torch is not safely forked


@dataclass(frozen=True)
class Limits:
    """Attributes:
    seconds: of an answer on all visible, or all hidden, cases.
    cell: seconds of a cell.
    total: seconds of a submission, starts included.
    memory: resident bytes of its processes together.
    processes: how many it may have.
    """

    seconds: float = 20.0
    cell: float = 60.0
    total: float = 300.0
    memory: int = 2 * 2**30
    processes: int = 16


class Ended(Exception):
    """The process is gone. ``status``: ``time``, ``memory``, ``processes`` or ``crash``."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Sandbox:
    """The processes of one submission, one after the other, each with a folder of its own. Use it in a ``with``.

    On Linux a process that has loaded torch and the checks waits, runs nothing of the submission, and forks one that
    does: starting again after an endless loop then costs no second load.

    Args:
        bounds: see `Limits`.
        secret: folders that it must not read: masters, tests, the other submissions.
        assignment: whose checks are loaded before the clock starts.
    """

    def __init__(self, bounds: Limits, secret: Sequence[Path], assignment: str) -> None:
        self.bounds, self.secret, self.assignment = bounds, secret, assignment
        self._outer: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.running = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """The working folder of the process that runs now. Its parent is the grader's alone."""
        assert self._outer is not None
        return Path(self._outer.name) / "work"

    def start(self) -> None:
        """A fresh process in a fresh folder.

        Raises:
            RuntimeError: it does not start, which is not the submission's fault.
        """
        self.stop()
        self._outer = tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True)
        self.folder.mkdir()
        if self._process is None:
            self._load()
        setup = {
            "folder": str(self.folder),
            "secret": [str(path) for path in self.secret],
            "memory": self.bounds.memory,
            "seconds": int(self.bounds.total) + 60,
            "processes": self.bounds.processes,
        }
        self.running = True
        try:
            self.ask(setup, seconds=120)
        except Ended as ended:
            raise RuntimeError(f"the sandbox does not start: {ended}") from ended

    def _load(self) -> None:
        # HOME for matplotlib's cache of fonts; what runs the submission gets a home of its own.
        wanted = ("PATH", "LANG", "HOME", "MPLCONFIGDIR", "SVIT_DATA_DIR", "SYSTEMROOT")
        passed = {key: value for key, value in os.environ.items() if key in wanted}
        self._process = subprocess.Popen(
            [*limits.namespaces(), sys.executable, "-m", "coursework.worker", self.assignment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=nbtools.ROOT,
            start_new_session=True,
            env={
                **passed,
                **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
                "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
                "PYTHONDONTWRITEBYTECODE": "1",
                "MPLBACKEND": "Agg",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._lines = self._process.stdin, queue.Queue()  # type: IO[bytes], queue.Queue[bytes]
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        try:
            line = self._lines.get(timeout=300)
        except queue.Empty:
            line = b""
        if not line:
            said = self._process.stderr.read() if self._process.stderr and not line else b""
            self.close()
            raise RuntimeError(f"the sandbox does not start:\n{said.decode(errors='replace')[-2000:]}")

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            Ended: it took longer than ``seconds``, grew past a limit, or died. The process is then gone.
        """
        with contextlib.suppress(OSError):  # a process that is gone says so below
            self._to.write((wire.encode(message) + "\n").encode())
            self._to.flush()
        answer, until = None, time.monotonic() + seconds
        while answer is None:
            with contextlib.suppress(queue.Empty):
                answer = self._answer(self._lines.get(timeout=_TICK))
            if answer is None:
                self._watch()
                if time.monotonic() > until:
                    self._end("time", f"stopped after {seconds:g} seconds: an endless loop, or far too slow?")
        if "over" in answer:
            self.running = False
            raise Ended("crash", _died(answer["over"]))
        return answer

    def _answer(self, line: bytes) -> dict[str, Any] | None:
        """The message of a line; None for an empty one."""
        if not line:
            assert self._process is not None
            self._process.wait(10)
            return {"over": self._process.returncode}
        if len(line) > wire.LONGEST:
            self._end("memory", f"it returns more than {wire.LONGEST >> 20} MiB")
        if not line.strip():
            return None
        try:
            answer = wire.decode(line)
            if not isinstance(answer, dict):
                raise ValueError("not a message")
        except (ValueError, TypeError, KeyError) as error:
            self._end("crash", f"its answer cannot be read ({error})")
        found: dict[str, Any] = answer
        return found

    def _listen(self, stream: IO[bytes]) -> None:
        """A thread: pipes cannot be waited for with a time limit on every system. b"" says that the process is gone."""
        while True:
            try:
                line = stream.readline(wire.LONGEST + 1)
            except (OSError, ValueError):
                line = b""
            self._lines.put(line)
            if not line or len(line) > wire.LONGEST:
                return

    def _family(self) -> list[psutil.Process]:
        """The processes that run the submission: not the one that waits, nor `unshare` before it."""
        assert self._process is not None
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
            if limits.namespaces():
                family = family[1:]
            return family if FORKS else [psutil.Process(self._process.pid), *family]
        except psutil.Error:
            return []

    def _watch(self) -> None:
        family, resident = self._family(), 0
        for member in family:
            with contextlib.suppress(psutil.Error):
                resident += member.memory_info().rss
        if resident > self.bounds.memory:
            self._end("memory", f"stopped at {self.bounds.memory / 2**30:.2g} GiB of memory")
        if len(family) > self.bounds.processes:
            self._end("processes", f"stopped at {self.bounds.processes} processes")

    def _end(self, status: str, message: str) -> None:
        self.stop()
        raise Ended(status, message)

    def stop(self) -> None:
        """End what runs of the submission, and remove its folder."""
        if self.running:
            self.running = False
            if not FORKS:
                self._kill()
            else:
                for _ in range(5):  # one that forks while it is being killed leaves others behind
                    for member in (family := self._family()):
                        with contextlib.suppress(psutil.Error):
                            member.kill()
                    if not family:
                        break
                self._forget()
        if self._outer is not None:
            self._outer.cleanup()
            self._outer = None

    def _forget(self) -> None:
        """Read on until the waiting process says that the other is over; if it does not, end that one as well."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=_TICK)
                if not line or len(line) > wire.LONGEST:
                    break
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    if "over" in wire.decode(line):
                        return
        self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(OSError):
            self._to.close()

    def close(self) -> None:
        """End everything."""
        self.running = False
        self._kill()
        self.stop()


def _died(code: Any) -> str:
    number = -code if isinstance(code, int) and code < 0 else 0
    if number:
        with contextlib.suppress(ValueError):
            return f"the process died ({signal.Signals(number).name})"
    return f"the process ended itself (exit status {code})"
