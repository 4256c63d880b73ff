"""One loaded sandbox of each kind for all attacks, and what lies around it: nothing of that may change."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from svit_course.grading import probes
from svit_course.grading.runs import Judge
from svit_course.sandbox import fence
from svit_course.sandbox.sandbox import Ended, Limits, Sandbox

BOUNDS = Limits(seconds=4, cell=4, total=10_000, memory=2**30, processes=16, files=64 * 2**20, names=5000)


def photograph(folder: Path) -> dict[str, tuple[object, ...]]:
    """Contents, mode, owner, times and attributes of everything in a folder."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        about = path.lstat()
        data = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        names = tuple(os.listxattr(path, follow_symlinks=False)) if hasattr(os, "listxattr") else ()
        owner = (about.st_mode, about.st_uid, about.st_gid, about.st_nlink)
        found[str(path)] = (*owner, about.st_mtime_ns, about.st_ctime_ns, names, data)
    return found


class Outside:
    """A grader's folder with submissions, a UNIX socket such as Docker's, and a server on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.socket = folder, folder / "submissions" / "ada" / "a.ipynb", folder / "docker.sock"
        self.file.parent.mkdir(parents=True)
        self.file.write_text('{"cells": []}')
        self.unix, self.tcp = socket.socket(socket.AF_UNIX), socket.socket()
        self.abstract = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.socket))
        self.abstract.bind(f"\0svit-{os.getpid()}")
        self.tcp.bind(("127.0.0.1", 0))
        for server in (self.unix, self.tcp, self.abstract):
            server.listen()
            server.setblocking(False)

    @property
    def port(self) -> int:
        return int(self.tcp.getsockname()[1])

    def visitors(self) -> int:
        count = 0
        for server in (self.unix, self.tcp, self.abstract):
            try:
                server.accept()
                count += 1
            except BlockingIOError:
                pass
        return count


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    return Outside(tmp_path_factory.mktemp("grader") / "home")


@pytest.fixture(scope="session")
def loaded(outside: Outside) -> Iterator[Sandbox]:
    fence.bubblewrap()  # fails where there is no sandbox: a suite that was skipped has shown nothing
    with Sandbox("student", BOUNDS, {"probes": probes.sources("a")}, [outside.folder]) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def judge(outside: Outside) -> Iterator[Judge]:
    fence.bubblewrap()
    with Judge([outside.folder]) as judge:
        yield judge


@pytest.fixture
def student(loaded: Sandbox, outside: Outside) -> Iterator[Sandbox]:
    """A fresh process. Afterwards nothing outside has changed, nothing runs, and the next one starts and answers."""
    loaded.start()
    before = photograph(outside.folder)
    yield loaded
    assert photograph(outside.folder) == before
    assert outside.visitors() == 0
    if loaded._process is not None:
        loaded.stop()
        members = [member for member in loaded._family() if member.pid not in loaded._own]
        assert not psutil.wait_procs(members, timeout=60)[1]
    loaded.start()
    assert loaded.ask({"cell": "after", "plot": False}, b"x = 1", 20) == ({}, b"")
    loaded.stop()


def run(sandbox: Sandbox, source: str, seconds: float = 4) -> tuple[str, str]:
    """("", "") where the cell ends well, else a status and a message."""
    try:
        answer, _ = sandbox.ask({"cell": "cell", "plot": False}, source.encode("utf-8", "surrogatepass"), seconds)
    except Ended as ended:
        return ended.status, ended.message
    for key in ("error", "wrong"):
        if key in answer:
            return key, str(answer[key])
    return "", ""
