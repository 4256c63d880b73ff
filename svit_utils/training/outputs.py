"""The folder of a run: one run at a time writes there, and what cannot be written is said in one kind of error."""

import json
import os
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

LOCK = "run.lock"
# The folders that this process has locked: (device, inode) of the folder to [process, thread, how often].
_held: dict[tuple[int, int], list[int]] = {}
_guard = threading.Lock()


class OutputError(OSError):
    """The output folder cannot be written to, or another run is writing there."""


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turn what goes wrong while ``path`` is written into `OutputError`; ``kept`` says what is left of earlier writes.

    A full disk shows itself as OSError, or as a RuntimeError ("enforce fail") of torch's own writer.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        free = ""
        with suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB are free there; is the disk full?)"
        raise OutputError(f"cannot write {path}: {reason}{free}.{kept} Make room, or choose another out_dir") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep ``folder``, made if it is missing, for this run; nested in the same thread, the outermost block counts.

    The file ``run.lock`` in it says who is there. It is removed at the end; one that a killed process of this machine
    left, or an earlier start of the same SLURM job, is taken over.

    Raises:
        OutputError: another run is writing there, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        status = folder.stat()
        key = (status.st_dev, status.st_ino)
        with _guard:
            mine = _held.get(key)
            if mine is not None and mine[0] == os.getpid() and mine[1] != threading.get_ident():
                raise _taken(folder, "another thread of this process")
            if mine is None or mine[0] != os.getpid():  # a forked child is not its parent
                _take(folder)
                mine = _held[key] = [os.getpid(), threading.get_ident(), 0]
            mine[2] += 1
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write to the output folder {folder}: {error.strerror}; choose another out_dir"
        ) from error
    try:
        yield
    finally:
        with _guard:
            mine[2] -= 1
            if mine[2] == 0 and mine[0] == os.getpid():
                del _held[key]
                with suppress(OSError), _alone(folder / LOCK) as file:
                    if _read(file).get("pid") == os.getpid():
                        os.ftruncate(file, 0)  # Windows keeps a file that is open; an empty one holds nobody up
                        (folder / LOCK).unlink()


def _take(folder: Path) -> None:
    """Write our name into the lock file, unless a run that may still be alive stands there."""
    path = folder / LOCK
    with suppress(FileNotFoundError):
        if not path.is_file():
            path.lstat()
            raise OutputError(f"{path} is not a file: remove it, or choose another out_dir")
    with _alone(path) as file:
        holder = _read(file)
        if holder and _alive(holder):
            who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            elsewhere = holder.get("host") != socket.gethostname()
            remedy = f" If that run is no longer alive, delete {path}." if elsewhere else ""
            raise _taken(folder, f"{who}: {holder.get('command')}", remedy)
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps(_own_name()).encode())


def _taken(folder: Path, who: str, remedy: str = "") -> OutputError:
    return OutputError(f"another run is writing to {folder} ({who}). Wait for it, or choose another out_dir.{remedy}")


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """The open lock file, while no other process has it open like this; the file is the one that has this name."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with suppress(ImportError, OSError):  # Windows and some network disks: without this short lock, then
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                yield file
                return
        finally:
            os.close(file)  # gives the lock back


def _read(file: int) -> dict[str, Any]:
    """What the lock file says; nothing where it is empty or damaged, as after a power cut."""
    os.lseek(file, 0, os.SEEK_SET)
    with suppress(ValueError):
        content = json.loads(os.read(file, 65536).decode("utf-8", "replace"))
        return content if isinstance(content, dict) else {}
    return {}


def _own_name() -> dict[str, Any]:
    import psutil

    return {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500],
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _alive(holder: dict[str, Any]) -> bool:
    """Whether the holder of a lock may still be running. Of another machine nothing is known, so it may."""
    import psutil

    if holder.get("host") != socket.gethostname():
        return holder.get("job") is None or holder.get("job") != os.environ.get("SLURM_JOB_ID")
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["started"])) < 2.0  # else the number was given out again
        return same and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
