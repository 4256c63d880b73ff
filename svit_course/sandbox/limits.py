"""What the operating system forbids a submission. Each function does what this system can do and says whether it did.

| | Linux | macOS |
| --- | --- | --- |
| time, of a step and in all | the grader's clock, which kills | the same |
| resident memory, processes, size of the folder | watched from outside, ended | the same |
| address space, CPU time, open files, size of a file | `setrlimit` | the same, where it has them |
| network, shared memory, other processes | namespaces of its own (`unshare`), Landlock | refused by an audit hook |
| files | Landlock: only its folder may be written, only Python, the library and its data read | an audit hook |

An audit hook sees what goes through Python's own functions and can be got round by native code; it is there for its
messages, and as the only fence where the system has no other.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL"]


@cache
def namespaces() -> tuple[str, ...]:
    """The beginning of a command that runs the rest in empty network and process namespaces; () where that fails."""
    if not sys.platform.startswith("linux") or not shutil.which("unshare"):
        return ()
    try:
        done = subprocess.run([*NAMESPACES, "true"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(NAMESPACES) if done.returncode == 0 else ()


def keep_orphans() -> None:
    """Descendants whose parent ends become children of this process, so that they can be found (Linux)."""
    if sys.platform.startswith("linux"):
        set_child_subreaper = 36
        _libc().prctl(set_child_subreaper, 1, 0, 0, 0)


def in_words() -> str:
    """What this system adds to the clock and the memory limit, for the report."""
    found = ["no network (empty namespace)"] if namespaces() else ["network refused by an audit hook only"]
    found.append("files fenced by Landlock" if landlock_version() else "files fenced by an audit hook only")
    if hasattr(os, "getuid") and os.getuid() == 0:
        found.append("run as root: an ordinary user is safer")
    return "; ".join(found)


def restrict(*, memory: int, seconds: int, processes: int) -> None:
    """Limits on this process and its children: bytes above what torch needs to load, seconds of CPU time, processes."""
    import resource

    # Torch reserves many gigabytes of address space that it never touches; resident memory is the grader's to watch.
    wanted = [
        (resource.RLIMIT_AS, memory + 24 * 2**30),
        (resource.RLIMIT_CPU, seconds),
        # Together they bound what can be held in files without a name, which no one's resident memory shows.
        (resource.RLIMIT_FSIZE, 8 * 2**20),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
    ]
    if hasattr(resource, "RLIMIT_NPROC") and os.getuid() != 0 and not namespaces():
        # Counted for the user as a whole, threads included, so only a backstop; the grader counts the sandbox's own.
        wanted.append((resource.RLIMIT_NPROC, 4096 + processes))
    for what, value in wanted:
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError):
            continue  # a limit that this system does not have


# ------------------------------------------------------------------------------------------------ Landlock

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, the same numbers on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15
# Rights that each version of Landlock knows: removing and making (1), moving (2), truncating (3), devices (5).
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}


class _Ruleset(ctypes.Structure):
    """Files; from version 4 on TCP; from 6 on abstract sockets and signals to processes outside."""

    _fields_ = [
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def landlock_version() -> int:
    """0 where there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(_libc().syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def fence(*, read: Iterable[Path | str], write: Iterable[Path | str]) -> bool:
    """From here on this process and its children may read only below ``read`` and write only below ``write``.

    https://docs.kernel.org/userspace-api/landlock.html. Nothing is changed, and False returned, where the system has no
    Landlock.
    """
    version = landlock_version()
    if version == 0:
        return False
    rights, libc = _RIGHTS[min(version, 5)], _libc()
    rules = _Ruleset(rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    try:
        for paths, allowed in ((read, _READ), (write, rights)):
            for path in paths:
                _allow(ruleset, Path(path), allowed & rights)
        no_new_privileges = 38
        if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
            return False
        return bool(libc.syscall(_RESTRICT, ruleset, ctypes.c_uint32(0)) == 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, allowed: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # nothing there to allow
    try:
        rule = _Beneath(allowed if path.is_dir() else allowed & _FILE_ONLY, place)
        _libc().syscall(_ADD, ruleset, ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(place)
