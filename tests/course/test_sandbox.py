"""Attacks on the sandbox, each in a process of its own; after each of them the next one starts and answers."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from svit_course import masters as m
from svit_course.grading import reports, runs, submissions
from svit_course.sandbox import limits
from svit_course.sandbox.sandbox import Ended, Limits, Sandbox

BOUNDS = Limits(seconds=5, cell=8, total=120, memory=3 * 2**29, processes=16, files=64 * 2**20)
needs_landlock = pytest.mark.skipif(not limits.landlock_version(), reason="no Landlock here, as the guide says")
# Without a namespace of its own it would be this machine's processes that are signalled.
needs_namespaces = pytest.mark.skipif(not limits.namespaces(), reason="users may not make namespaces here")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="through /proc")


@pytest.fixture(scope="module")
def loaded() -> Iterator[Sandbox]:
    with Sandbox(BOUNDS, [m.ASSIGNMENTS], "a") as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(loaded: Sandbox) -> Iterator[Sandbox]:
    loaded.start()
    yield loaded
    if not loaded.running:
        loaded.start()
    assert loaded.ask({"cell": "after", "source": "x = 1"}, 20) == {}
    loaded.stop()
    assert not loaded._family()


def run(sandbox: Sandbox, source: str, seconds: float = 8) -> tuple[str, str]:
    """("", "") where the cell ends well, else a status and a message."""
    try:
        answer = sandbox.ask({"cell": "cell", "source": source}, seconds)
    except Ended as ended:
        return ended.status, ended.message
    for key in ("refused", "error", "wrong"):
        if key in answer:
            return key, str(answer[key])
    return "", ""


# The whole address of a channel is known to the submission: it looks for sockets among its descriptors.
CHANNEL = """
import os, socket, stat
def channels():
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                yield number
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("while True: pass", "time"),
        ("import time\nwhile True:\n    try: time.sleep(99)\n    except BaseException: pass", "time"),
        ("import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "time"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "memory"),
        ("import numpy as np\nnp.ones((10**11,))", "error"),
        ("import ctypes\nctypes.string_at(0)", "crash"),
        ("import os\nos._exit(0)", "crash"),
        ("import os\nos.closerange(3, 99)", "crash"),
        ("raise SystemExit", "error"),
        ("raise KeyboardInterrupt", "error"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "crash|error"),
        ("def f(): return f()\nf()", "error"),
        ("import os\nos.system('id')", "refused"),
        ("import socket\nsocket.create_connection(('192.0.2.1', 80), 1)", "refused"),
        pytest.param("import os\nwhile True: os.fork()", "processes|memory|error", marks=needs_namespaces),
        ("open('x', 'wb').write(b'0' * 10**8)", "error"),
        ("for i in range(99):\n    open(str(i), 'wb').write(b'0' * 8 * 10**6)\nimport time; time.sleep(9)", "files"),
        ("import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')", "|error"),
        pytest.param("import os, signal\nfor s in (2, 15): os.kill(1, s)", "|error", marks=needs_namespaces),
        pytest.param("import os, signal\nos.kill(os.getppid(), 9)", "|error", marks=needs_namespaces),
    ],
)
def test_it_ends_as_a_status(sandbox: Sandbox, source: str, status: str) -> None:
    got, message = run(sandbox, source)
    assert got in status.split("|"), (got, message)


@linux
@pytest.mark.parametrize(
    "line",
    [b'{"seen": 5}', b'{"missing": 5}', b'{"error": ["x"]}', b'{"seen": {"__array__": ["<f8", [Infinity], ""]}}']
    + [b"[" * 100_000, b'{"seen": ' + b"[" * 50_000, b"\xff\xfe", b"5"],
    ids=lambda line: line[:20].decode(errors="replace"),
)
def test_a_forged_message_is_a_crash_and_nothing_else(sandbox: Sandbox, line: bytes) -> None:
    source = f"{CHANNEL}\nfor number in channels(): os.write(number, {line!r} + b'\\n')\nwhile True: pass"
    assert run(sandbox, source)[0] == "crash"


@linux
@needs_landlock
def test_the_waiting_process_cannot_be_given_another_task(sandbox: Sandbox, tmp_path: Path) -> None:
    """What a submission writes into any of its descriptors, opened again or not, makes no process without a fence."""
    order = {"folder": str(tmp_path), "secret": [], "memory": 1 << 31, "seconds": 60, "processes": 16}
    code = f"import ctypes; ctypes.CDLL(None).creat({str(tmp_path / 'pwned').encode()!r}, 0o600)"
    data = (json.dumps(order) + "\n" + json.dumps({"cell": "x", "source": code}) + "\n").encode()
    source = f"""
import ctypes, os
libc = ctypes.CDLL(None)
for number in range(3, 64):
    for descriptor in (number, libc.open(b"/proc/self/fd/%d" % number, 1)):
        if descriptor >= 0:
            try: os.write(descriptor, {data!r})
            except OSError: pass
os._exit(0)
"""
    assert run(sandbox, source)[0] == "crash"
    sandbox.start()
    time.sleep(1)
    assert not (tmp_path / "pwned").exists()


@linux
@needs_landlock
def test_native_code_reads_no_master_and_writes_nowhere(sandbox: Sandbox, tmp_path: Path) -> None:
    masters = str(m.master("a")).encode()
    source = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.open({masters!r}, 0) < 0
assert libc.creat({str(tmp_path / "x").encode()!r}, 0o600) < 0
assert libc.open(b"/etc/shadow", 0) < 0
assert libc.open(b"/dev/shm/x", 0o101, 0o600) < 0
assert libc.creat(b"mine", 0o600) >= 0
"""
    assert run(sandbox, source) == ("", "")


@linux
def test_children_that_outlive_their_parent_are_ended(sandbox: Sandbox) -> None:
    source = """
import os, time
for _ in range(20):  # zombies of orphans
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
if os.fork() == 0:  # and one that stays
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os._exit(0)
"""
    assert run(sandbox, source)[0] == "crash"
    time.sleep(0.5)
    assert not sandbox._family()


def test_a_pipe_in_the_place_of_a_picture_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "figure-1.png")
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "fine.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    names = ["figure-1.png", "link.png", "a" * 400]
    assert list(runs.pngs(tmp_path, names)) == []
    assert len(list(runs.pngs(tmp_path, ["text.png", "../" + tmp_path.name + "/fine.png", 5]))) == 1
    assert len(list(runs.pngs(tmp_path, ["fine.png"] * 1000))) == 3


def test_half_characters_and_formulas_cost_nobody_a_report(tmp_path: Path) -> None:
    submission = submissions.Submission("=cmd|x", m.master("a").stem, tmp_path / "none")
    bad = runs.Graded(
        submission, [runs.Mark("a1", "visible", 0.0, 1.0, "wrong", "\ud800" * 9 + "x" * 10**6)], ["\udfff"]
    )
    bad.sources["a1"] = "# \ud800" + "\n" * 30_000
    good = runs.not_graded(submissions.Submission("ada", m.master("a").stem, tmp_path / "none"), "not graded: a test")
    started = time.monotonic()
    reports.write_reports([bad, good], tmp_path)
    assert time.monotonic() - started < 20
    with (tmp_path / "totals.csv").open(newline="", encoding="utf-8") as file:
        assert [row["student"] for row in csv.DictReader(file)] == ["'=cmd|x", "ada"]
    assert len((tmp_path / "marks.csv").read_text(encoding="utf-8")) < 20_000
    assert len(list((tmp_path / "feedback").rglob("*.html"))) == 2
    # Again, so that what was written is read back: nothing doubles.
    reports.write_reports([bad, good], tmp_path)
    with (tmp_path / "totals.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("student;assignment;question;marks;out_of;comment\n", "no column student"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,9,3,\n", "from 0 to 3"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,two,3,\n", "from 0 to 3"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,1\n", "from 0 to"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,nan,3,\n", "from 0 to 3"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_before_grading(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "by_hand.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        reports.marks_by_hand(tmp_path / "by_hand.csv")


def test_a_short_line_without_marks_is_no_harm(tmp_path: Path) -> None:
    (tmp_path / "by_hand.csv").write_text(
        "student,assignment,question,marks,out_of,comment\nada,a,a5\n", encoding="utf-8"
    )
    assert reports.marks_by_hand(tmp_path / "by_hand.csv")["ada", "a", "a5"]["marks"] == ""


@pytest.mark.parametrize("source", ["x=" + "-" * 20_000, "a" + ".b" * 20_000, "1" + "+1" * 100_000, "'\ud800'", "\x00"])
def test_code_made_to_break_a_parser_does_not(source: str) -> None:
    assert submissions.borrows(source) is False


def test_no_process_stays_behind() -> None:
    with Sandbox(BOUNDS, [], "a") as sandbox:
        sandbox.start()
        assert sandbox._process is not None
        pid = sandbox._process.pid
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
