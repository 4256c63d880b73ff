"""The process in a sandbox: ``python -m svit_course.sandbox.worker ROLE NUMBER UID``.

It loads what its role needs, which takes seconds, and then only waits: for each channel that it is handed over the
socket NUMBER it forks a process that answers there. So starting again after an endless loop costs no second load, and
what has gone wrong in one, or was written, does not reach the next. Without bubblewrap (``--trust``) it answers itself,
once.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from svit_course.sandbox import fence, wire

# Where a submission runs, and where our own code looks at what came of it.
ROLES = {"student": "svit_course.sandbox.student", "judge": "svit_course.grading.judge"}
# In a process namespace of its own bubblewrap is the first process, and this the second. Outside, that is the kernel's.
FENCED = (os.getpid(), os.getppid()) == (2, 1)


def main(role: str, control: socket.socket, uid: int) -> None:
    """Load, say so, and fork until ``control`` closes."""
    if FENCED and os.getuid() == 0:  # the grader is root: become a user that owns nothing, before anything else
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if FENCED:  # nor can a submission look into this process, or take its descriptors
        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
    # The grader decides when this one ends; a submission must not be able to.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with control.makefile("rb", buffering=0) as stream:  # closed again: it would keep `control` open in the children
        setup, _ = wire.receive(stream) or ({}, b"")
    part = importlib.import_module(ROLES[role]).prepare(setup)
    kept = frozenset(laid_out(fence.TMP)) if FENCED else frozenset()
    control.sendall(b"loaded\n")
    while True:
        said, passed, _, _ = socket.recv_fds(control, 1, 1)
        if not said:
            return  # the grader is done
        if not passed:
            continue  # an end was asked for that had come by itself
        channel = socket.socket(fileno=passed[0])
        if not FENCED:
            threading.Thread(target=lambda: (control.recv(1), os._exit(1)), daemon=True).start()  # ends with the grader
            answer(channel, part, setup)
            return
        child = os.fork()
        if child == 0:
            try:
                control.close()
                answer(channel, part, setup)
            finally:
                os._exit(0)
        channel.close()
        # The grader writes a byte to end the child.
        watched: int = os.pidfd_open(child)
        select.select([watched, control.fileno()], [], [])
        os.close(watched)
        control.sendall(f"{end(child)} {int(emptied(fence.TMP, kept))}\n".encode())


def end(child: int) -> int:
    """Kill every other process of the namespace; the child's exit status. Orphans are bubblewrap's to collect."""
    # An end of its own is not overwritten: a process that has ended is not killed any more.
    with contextlib.suppress(OSError):
        os.kill(-1, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # until there is none that could be killed
        while True:
            os.kill(-1, signal.SIGKILL)
            time.sleep(0.01)
    return os.waitstatus_to_exitcode(status)


def laid_out(folder: Path) -> Iterator[Path]:
    """What bubblewrap has laid into a folder before a submission came: other disks, and the folders on the way."""
    for path in folder.iterdir():
        yield path
        if path.is_dir() and path.lstat().st_dev == folder.lstat().st_dev:
            yield from laid_out(path)


def emptied(folder: Path, kept: Set[Path]) -> bool:
    """Remove whatever the processes that are gone have left in a folder; False where something of it stays.

    Args:
        kept: what was laid into the folder at the beginning; of its folders only the contents are looked through.
    """
    try:
        for path in list(folder.iterdir()):
            if path not in kept:
                if path.is_symlink() or not path.is_dir():
                    path.unlink()
                else:
                    shutil.rmtree(path)
            elif path.lstat().st_dev == folder.lstat().st_dev and (
                path.is_symlink() or not path.is_dir() or not emptied(path, kept)
            ):
                return False  # something else stands in its place, or cannot be removed from it
    except (OSError, RecursionError):  # closed folders, or more in one another than can be walked through
        return False
    return True


def answer(channel: socket.socket, part: Any, setup: dict[str, Any]) -> None:
    """Answer messages until there is nothing more to ask."""
    incoming, outgoing = channel.makefile("rb"), channel.makefile("wb")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    fence.restrict(memory=setup["memory"], tasks=setup["tasks"], fenced=FENCED)
    # Printing goes nowhere, and can neither fill a disk nor imitate these messages.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    wire.send(outgoing, {"ready": True})
    while (received := wire.receive(incoming)) is not None:
        if "back" in received[0]:  # the grader wants to know whether the last answer was the end of it
            wire.send(outgoing, *received)
        else:
            wire.send(outgoing, *part.answer(*received))


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
