"""A sandbox seen from outside: start it, ask it, and end it when it takes too long or too much.

nbgrader bounds the time of a cell and nothing else (jupyter/nbgrader#1429). Here processor time is what is limited,
because wall time depends on what else the machine does; ten times a second it is read, with memory, processes and
files, from outside of what is watched.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from svit_course import notebooks
from svit_course.sandbox import fence, wire
from svit_utils.paths import data_dir, results_dir

_TICK = 0.1
_NUMBERS = itertools.count()
BACK = 2.0  # seconds to come back after an answer, which takes milliseconds
WALL = 5  # seconds in which nothing happens for each of processor time; waiting for a busy machine does not count


@dataclass(frozen=True)
class Limits:
    """Times are processor time; of a submission without what loading takes."""

    seconds: float = 20.0  # of an answer on all visible, or all hidden, cases
    cell: float = 60.0  # of a cell
    total: float = 300.0  # of a submission
    memory: int = 2 * 2**30  # resident bytes of its processes together
    processes: int = 16  # how many it may have
    files: int = 256 * 2**20  # bytes that it may write
    names: int = 10_000  # files and folders that it may make


class Ended(Exception):
    """The process is gone. ``status``: time, memory, processes, files or crash; ``by_clock``: nothing happened."""

    def __init__(self, status: str, message: str, by_clock: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.by_clock = status, message, by_clock


class Sandbox:
    """Processes of one kind, one after the other, forked by one that has loaded what they need. Use it in a ``with``.

    Args:
        role: ``"student"`` or ``"judge"``, see `svit_course.sandbox.worker`.
        setup: what the role wants to know.
        hide: folders whose contents it must not see: other submissions, marks.
        trusted: run it as a plain process, with the rights of the grader.
    """

    def __init__(
        self, role: str, bounds: Limits, setup: dict[str, Any], hide: Sequence[Path] = (), trusted: bool = False
    ) -> None:
        self.role, self.bounds, self.hide, self.trusted = role, bounds, hide, trusted
        self.setup = {**setup, "memory": bounds.memory, "tasks": 8 * bounds.processes}
        self.running = False
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._own: set[int] = set()
        self._settled: tuple[int, ...] = (0,) * 5
        self._idled = 0.0
        self._carried = self._loaded = 0.0  # processor time of processes that are gone; and of loading

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """A fresh process; RuntimeError where it does not start, which is not the submission's fault."""
        self.stop()
        for attempt in (1, 2):  # what a submission has left of the waiting process may be of no use
            try:
                if self._process is None:
                    self._load()
                self._fork()
                return
            except (Ended, OSError) as error:
                self.close()
                if attempt == 2:
                    raise RuntimeError(f"the sandbox does not start: {error}") from error

    def _load(self) -> None:
        mine, theirs = socket.socketpair()
        rules, writing = os.pipe()
        with open(writing, "wb") as stream:
            stream.write(b"" if self.trusted else fence.filtered())
        uid = fence.FIRST_UID + (os.getpid() << 8) % 2**24 + next(_NUMBERS) % 256
        program = [sys.executable, "-s", "-m", "svit_course.sandbox.worker", self.role, str(theirs.fileno()), str(uid)]
        # `said` is what it says while it loads; nothing of a submission's gets there.
        with tempfile.TemporaryFile() as said, theirs, open(rules, "rb"):
            self._process = subprocess.Popen(
                program if self.trusted else self._fenced(program, rules),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=[theirs.fileno(), rules],
                start_new_session=True,
                cwd="/",
                env=_environment(self.trusted),
            )
            theirs.close()
            self._control = mine
            mine.settimeout(600)
            mine.sendall(wire.packed(self.setup, b""))
            if self._heard(600) != b"loaded":
                said.seek(0)
                raise Ended("crash", f"torch and the checks do not load: {said.read()[-300:].decode(errors='replace')}")
        # Bubblewrap's two processes and the one that waits; where there is no sandbox there is one for everything.
        self._own = set() if self.trusted else {member.pid for member in self._family()}
        self._loaded += self.used() - self._carried

    def _fenced(self, program: Sequence[str], rules: int) -> list[str]:
        root, here = notebooks.ROOT, notebooks.ROOT / "svit_course"
        mine = [here, notebooks.NOTEBOOKS / "assignments"] if self.role == "judge" else [here / "sandbox"]
        mine += [
            *(root / name for name in ("svit_utils", "data", "results", "pyproject.toml")),
            data_dir(),
            results_dir(),
        ]
        options = fence.mounts(mine, [root, notebooks.NOTEBOOKS, *self.hide], self.bounds.files)
        if self.role == "student":
            place = options.index("--remount-ro")
            options[place:place] = ["--ro-bind", str(here / "sandbox" / "stub.py"), str(here / "__init__.py")]
        return fence.command(program, options, rules, 2 * self.bounds.memory, 2 * self.setup["tasks"])

    def _heard(self, seconds: float) -> bytes:
        """A line from the waiting process; b"" where none comes."""
        assert self._control is not None
        self._control.settimeout(seconds)
        line = b""
        with contextlib.suppress(OSError):
            while not line.endswith(b"\n") and len(line) < 99 and (part := self._control.recv(1)):
                line += part
        return line.strip()

    def _fork(self) -> None:
        assert self._control is not None
        self._channel, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
        self._channel.setblocking(False)
        self.running = True
        self._take(b"", 60, 60 * WALL)

    def ask(self, message: dict[str, Any], data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Send a message and wait for its answer, for so many seconds of processor time.

        Raises:
            Ended: it took longer, grew past a limit, or died. The process is then gone.
        """
        if over := self.over():
            self._end("time", over)
        answer, found = self._take(wire.packed(message, data), seconds, seconds * WALL)
        if what := answer.get("memory"):
            self._end("memory", f"stopped at {self.bounds.memory / 2**30:.2g} GiB of memory: {what}")
        self._back()
        return answer, found

    def _back(self) -> None:
        """End it where the process has not come back from what it answered: what is asked next must not pay for that.

        A submission can write to the channel itself. So it is asked for a word that nobody knows before.
        """
        word = secrets.token_hex(8)
        try:
            said = self._take(wire.packed({"back": word}, b""), BACK, BACK * WALL)
        except Ended as ended:
            if ended.status != "time":
                raise
            raise Ended("crash", "it answered and did not come to an end", ended.by_clock) from None
        if said != ({"back": word}, b""):
            self._end("crash", "it answered more than once")

    def _take(self, message: bytes, seconds: float, patience: float) -> tuple[dict[str, Any], bytes]:
        channel, control, got, needed = self._channel, self._control, bytearray(), 1
        outgoing = memoryview(message)
        assert channel is not None and control is not None
        began = looked = time.monotonic()
        begun, held_up, idle = self.used(), self._held_up(), 0.0
        while True:
            readable, writable, _ = select.select([channel, control], [channel] if outgoing else [], [], _TICK)
            try:
                if writable:
                    outgoing = outgoing[channel.send(outgoing[: 2**20]) :]  # a view: nothing is copied
                if channel in readable:
                    part = channel.recv(2**16)
                    got += part
                    if len(got) >= needed:
                        found = wire.unpacked(got)
                        if not isinstance(found, int):
                            return found
                        needed = found
                    if not part:
                        raise OSError("closed")
                elif control in readable:
                    raise OSError("the waiting process says that the one it forked has ended")
            except ValueError as error:
                self._end("crash", f"its answer cannot be read: {error}")
            except OSError:
                raise Ended("crash", _died(self.stop())) from None
            if time.monotonic() - looked > _TICK:
                looked, before = time.monotonic(), idle
                self._watch()
                used = self.used() - begun
                if used > seconds:
                    self._end("time", f"stopped after {seconds:.3g} seconds: an endless loop, or far too slow?")
                idle = looked - began - used - max(0.0, self._held_up() - held_up)
                self._idled += max(0.0, idle - before)
                if idle > patience:
                    self._end("time", f"stopped after {patience:.3g} seconds: does it wait for something?", True)

    def _family(self) -> list[psutil.Process]:
        """Every process of the sandbox."""
        found = [] if self._process is None else [self._process.pid]
        for pid in found:  # which grows on the way; quicker than psutil, which looks at every process of the machine
            for path in glob.glob(f"/proc/{pid}/task/*/children"):
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    found += [int(child) for child in file.read().split() if int(child) not in found]
        return self._each(psutil.Process, found)

    @staticmethod
    def _each(what: Callable[[Any], Any], family: Iterable[Any]) -> list[Any]:
        found = []
        for member in family:
            with contextlib.suppress(psutil.Error):
                found.append(what(member))
        return found

    def used(self) -> float:
        """Seconds of processor time since it was loaded, of all its processes, those that have ended included."""
        times = self._each(psutil.Process.cpu_times, self._family())
        return self._carried + sum(sum(each[:4]) for each in times) - self._loaded

    def _held_up(self) -> float:
        """Seconds that its processes and threads would have run, had the machine been free: no fault of theirs."""
        total = 0
        for member in self._family():
            for path in glob.glob(f"/proc/{member.pid}/task/*/schedstat"):
                with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
                    total += int(file.read().split()[1])
        return total / 1e9

    def over(self) -> str:
        """A sentence where the submission has had all its time; else ""."""
        if self.used() > self.bounds.total or self._idled > self.bounds.total * WALL:
            return f"the whole submission took more than {self.bounds.total:g} seconds"
        return ""

    def full(self) -> bool:
        """Whether less than a quarter is left of the bytes that it may write."""
        place = self._folder()
        return place is not None and 4 * place.f_bavail < place.f_blocks

    def settle(self) -> None:
        """Remember what is in use now, for `crowded`."""
        self._settled = self._in_use()

    def crowded(self) -> bool:
        """Whether more threads run than when it settled, or half of what was left then is used up."""
        most = (0, self.bounds.memory, fence.OPEN, self.bounds.files, self.bounds.names)
        then = self._settled
        return any(2 * (n - t) > max(0, m - t) for m, t, n in zip(most, then, self._in_use(), strict=True))

    def _in_use(self) -> tuple[int, ...]:
        """Threads of all processes, bytes of memory, open files, bytes and names in its folder."""
        members, place = [member for member in self._family() if member.pid not in self._own], self._folder()
        return (
            sum(self._each(psutil.Process.num_threads, members)),
            sum(each.rss for each in self._each(psutil.Process.memory_info, members)),
            sum(self._each(psutil.Process.num_fds, members)) if hasattr(psutil.Process, "num_fds") else 0,
            (place.f_blocks - place.f_bfree) * place.f_frsize if place else 0,
            place.f_files - place.f_ffree if place else 0,
        )

    def _folder(self) -> os.statvfs_result | None:
        """What its folder for files holds; None without a sandbox."""
        for member in () if self.trusted else reversed(self._family()):
            with contextlib.suppress(OSError):
                return os.statvfs(f"/proc/{member.pid}/root{fence.TMP}")
        return None

    def _watch(self) -> None:
        """End it where it is past a limit."""
        members = [member for member in self._family() if member.pid not in self._own]
        resident, limit = self._each(psutil.Process.memory_info, members), self.bounds.memory
        # Pages that processes share count once; to find out takes longer, so only where it matters.
        if sum(each.rss for each in resident) > limit and sum(self._each(_share, members)) > limit:
            self._end("memory", f"stopped at {self.bounds.memory / 2**30:.2g} GiB of memory")
        if len(members) > self.bounds.processes:
            self._end("processes", f"stopped at {self.bounds.processes} processes")
        place = self._folder()
        if place is not None and place.f_files - place.f_ffree > self.bounds.names:
            self.close()  # to remove them one by one takes longer
            self._end("files", f"stopped at {self.bounds.names:,} files and folders")

    def _end(self, status: str, message: str, by_clock: bool = False) -> NoReturn:
        self.stop()
        raise Ended(status, message, by_clock)

    def stop(self) -> int | None:
        """End what runs, with all that it has written. Returns the exit status, None if it is not known."""
        code, emptied = None, 0
        if self.running:
            self.running = False
            with contextlib.suppress(OSError, ValueError):
                if not self.trusted and self._control is not None:
                    self._control.send(b"k")
                    code, emptied = map(int, self._heard(30).split())
            if not emptied:
                self.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        return code

    def close(self) -> None:
        """End everything. Where bubblewrap's first process ends, its namespace does, and whatever is in there."""
        self._carried, self._loaded = self.used(), 0.0
        family, self._process, self.running = self._family(), None, False
        for channel in (self._control, self._channel):
            if channel is not None:
                channel.close()
        self._control = self._channel = None
        if family:
            with contextlib.suppress(OSError):
                os.killpg(family[0].pid, signal.SIGKILL)
        self._each(psutil.Process.kill, family)
        psutil.wait_procs(family, 10)


def _environment(trusted: bool) -> dict[str, str]:
    one = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "HOME", "TMPDIR", "SVIT_DATA_DIR") if key in os.environ}
    home = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCH_HOME"), "/tmp") | {
        "MPLCONFIGDIR": "/tmp/matplotlib"
    }
    ours = {"PYTHONPATH": str(notebooks.ROOT), "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **({} if trusted else home), **dict.fromkeys(one, "1"), **ours}


def _share(process: psutil.Process) -> int:
    full = process.memory_full_info()
    return int(getattr(full, "pss", full.rss))


def _died(code: int | None) -> str:
    if code is None:
        return "the process is gone"
    with contextlib.suppress(ValueError):
        if code < 0:
            return f"the process died ({signal.Signals(-code).name})"
    return f"the process ended itself (exit status {code})"
