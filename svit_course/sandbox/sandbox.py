"""A submission's process, seen from outside: start it, ask it, and end it when it takes too long or too much.

nbgrader bounds the time of a cell and nothing else (jupyter/nbgrader#1429); here the grader watches time, resident
memory and processes, twenty times a second, from outside of what it watches.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from svit_course import notebooks
from svit_course.sandbox import limits, wire

_TICK = 0.05
_LIVE: weakref.WeakSet[Sandbox] = weakref.WeakSet()
FORKS = sys.platform.startswith("linux")  # elsewhere a process that has loaded torch is not safely forked


@dataclass(frozen=True)
class Limits:
    """Attributes:
    seconds: of an answer on all visible, or all hidden, cases.
    cell: seconds of a cell.
    total: seconds of a submission, starts included.
    memory: resident bytes of its processes together.
    processes: how many it may have.
    files: bytes in its folder.
    """

    seconds: float = 20.0
    cell: float = 60.0
    total: float = 300.0
    memory: int = 2 * 2**30
    processes: int = 16
    files: int = 256 * 2**20


class Ended(Exception):
    """The process is gone. ``status``: ``time``, ``memory``, ``processes``, ``files`` or ``crash``."""

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
        self.running = False
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._outer: Path | None = None
        self._weighed = 0.0
        _LIVE.add(self)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """The working folder of the process that runs now. Its parent is the grader's alone."""
        assert self._outer is not None
        return self._outer / "work"

    def start(self) -> None:
        """A fresh process in a fresh folder.

        Raises:
            RuntimeError: it does not start, which is not the submission's fault.
        """
        self.stop()
        for attempt in (1, 2):  # what a submission has left of the waiting process may be of no use
            self._outer = Path(tempfile.mkdtemp(prefix="grading-"))
            self.folder.mkdir()
            try:
                if self._process is None:
                    self._load()
                self._fork()
                return
            except (Ended, OSError) as error:
                self._kill()
                self.stop()
                if attempt == 2:
                    raise RuntimeError(f"the sandbox does not start: {error}") from error

    def _load(self) -> None:
        # HOME for matplotlib's cache of fonts; what runs the submission gets a home of its own.
        wanted = ("PATH", "LANG", "HOME", "MPLCONFIGDIR", "SVIT_DATA_DIR")
        passed = {key: value for key, value in os.environ.items() if key in wanted}
        mine, theirs = socket.socketpair()
        with theirs:
            number = str(theirs.fileno())
            self._process = subprocess.Popen(
                [*limits.namespaces(), sys.executable, "-m", "svit_course.sandbox.worker", self.assignment, number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd=notebooks.ROOT,
                start_new_session=True,
                env={
                    **passed,
                    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
                    "PYTHONPATH": str(notebooks.ROOT),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "MPLBACKEND": "Agg",
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
        self._control = mine
        if self._heard(300) != b"loaded":
            raise Ended("crash", "torch and the checks do not load: try `make doctor`")

    def _heard(self, seconds: float) -> bytes:
        """A line from the waiting process; b"" where none comes."""
        assert self._control is not None
        self._control.settimeout(seconds)
        line = b""
        with contextlib.suppress(OSError):
            while not line.endswith(b"\n") and (part := self._control.recv(1)):
                line += part
        return line.strip()

    def _fork(self) -> None:
        assert self._control is not None
        self._channel, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
        # The thread gets its own queue: one that is late must not speak for a process that is gone.
        self._lines = queue.Queue(maxsize=4)
        threading.Thread(target=_listen, args=(self._channel, self._lines), daemon=True).start()
        self.running, self._weighed = True, time.monotonic()
        setup = {
            "folder": str(self.folder),
            "secret": [str(path) for path in self.secret],
            "memory": self.bounds.memory,
            "seconds": int(self.bounds.total) + 60,
            "processes": self.bounds.processes,
        }
        self.ask(setup, seconds=60)

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            Ended: it took longer than ``seconds``, grew past a limit, or died. The process is then gone.
        """
        assert self._channel is not None
        until = time.monotonic() + seconds
        data = (wire.encode(message) + "\n").encode()
        # In a thread, because a process that does not read must not keep this one waiting.
        threading.Thread(target=_send, args=(self._channel, data), daemon=True).start()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._answer(self._lines.get(timeout=_TICK))
            self._watch()
            if self._is_over():
                with contextlib.suppress(queue.Empty):
                    return self._answer(self._lines.get(timeout=_TICK))
                return self._answer(b"")  # what it has left running may still hold the channel open
            if time.monotonic() > until:
                self._end("time", f"stopped after {seconds:g} seconds: an endless loop, or far too slow?")

    def _is_over(self) -> bool:
        """Whether the waiting process has said that the one it forked has ended."""
        return self._control is not None and bool(select.select([self._control], [], [], 0)[0])

    def _answer(self, line: bytes) -> dict[str, Any]:
        if not line:
            code = self.stop()
            raise Ended("crash", _died(code))
        if len(line) > wire.LONGEST:
            self._end("memory", f"it returns more than {wire.LONGEST >> 20} MiB")
        try:
            answer = wire.decode(line)
            kinds = {"seen": dict, "missing": list, "defined": list, "pictures": list, "ready": bool}
            if not isinstance(answer, dict):
                raise ValueError("not a message")
            for key, value in answer.items():
                if not isinstance(value, kinds.get(key, str)):
                    raise ValueError("not a message")
        except ValueError as error:
            self._end("crash", f"its answer cannot be read: {error}")
        found: dict[str, Any] = answer
        return found

    def _family(self) -> list[psutil.Process]:
        """The processes that run the submission: not the one that waits, nor `unshare` before it."""
        if self._process is None:
            return []
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
            if limits.namespaces():
                family = family[1:]
            if not FORKS:
                family = [psutil.Process(self._process.pid), *family]
        except psutil.Error:
            return []
        alive = []
        for member in family:
            with contextlib.suppress(psutil.Error):
                if member.status() != psutil.STATUS_ZOMBIE:
                    alive.append(member)
        return alive

    def _watch(self) -> None:
        family, resident = self._family(), 0
        for member in family:
            with contextlib.suppress(psutil.Error):
                resident += member.memory_info().rss
        if resident > self.bounds.memory:
            self._end("memory", f"stopped at {self.bounds.memory / 2**30:.2g} GiB of memory")
        if len(family) > self.bounds.processes:
            self._end("processes", f"stopped at {self.bounds.processes} processes")
        if time.monotonic() - self._weighed > 1:
            self._weighed = time.monotonic()
            if _size(self.folder) > self.bounds.files:
                self._end("files", f"stopped at {self.bounds.files >> 20} MiB of files, or folders without end")

    def _end(self, status: str, message: str) -> None:
        self.stop()
        raise Ended(status, message)

    def stop(self) -> Any:
        """End what runs of the submission, and remove its folder. Returns the exit status, None if it is not known."""
        code: Any = None
        if self.running:
            self.running = False
            for _ in range(20):  # one that forks while it is being killed leaves others behind
                family = self._family()
                for member in family:
                    with contextlib.suppress(psutil.Error):
                        member.kill()
                if not family:
                    break
                time.sleep(0.01)
            try:
                code = int(self._heard(10)) if FORKS else None
            except ValueError:
                code = None
            if code is None:
                self._kill()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._outer is not None:
            # Not shutil.rmtree, which gives up in folders a thousand deep.
            subprocess.run(["rm", "-rf", str(self._outer)], check=False, capture_output=True)
            self._outer = None
        return code

    def _kill(self) -> None:
        """End the waiting process, and with it everything."""
        process, self._process = self._process, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if process is None:
            return
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)

    def close(self) -> None:
        """End everything."""
        self.stop()
        self._kill()
        _LIVE.discard(self)


def close_all() -> None:
    """End every sandbox of this process, from a signal handler."""
    for sandbox in list(_LIVE):
        sandbox._kill()


def _send(channel: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # a process that is gone is noticed where its answer is waited for
        channel.sendall(data)


def _listen(channel: socket.socket, lines: queue.Queue[bytes]) -> None:
    """A thread: hands over line by line, and b"" at the end."""
    with contextlib.suppress(OSError, ValueError), channel.makefile("rb") as stream:
        while line := stream.readline(wire.LONGEST + 1):
            lines.put(line)
            if len(line) > wire.LONGEST:
                return
    lines.put(b"")


def _size(folder: Path) -> int:
    """Bytes in a folder; more than any limit where it is too deep to look through."""
    total = 0
    try:
        for place, _, names in os.walk(folder):
            if place.count(os.sep) > 200:
                return sys.maxsize
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(place, name)).st_blocks * 512
    except RecursionError:
        return sys.maxsize
    return total


def _died(code: Any) -> str:
    if code is None:
        return "the process is gone"
    with contextlib.suppress(ValueError):
        if code < 0:
            return f"the process died ({signal.Signals(-code).name})"
    return f"the process ended itself (exit status {code})"
