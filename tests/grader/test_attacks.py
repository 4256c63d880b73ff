"""Attacks on the sandbox, each in a process of its own; after each nothing outside has changed and the next one starts.

A program asserts what it must not be able to do: ``refused(f)`` holds where f raises OSError, and ends the attack
otherwise.
"""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest

from svit_course import masters, notebooks
from svit_course.sandbox import sandbox
from svit_course.sandbox.sandbox import Sandbox
from tests.grader.conftest import Outside, run

pytestmark = pytest.mark.grader

HEAD = """
import ctypes, errno, mmap, os, resource, signal, socket, stat, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def refused(action, *arguments):
    try:
        action(*arguments)
    except (OSError, ValueError, RuntimeError):
        return
    raise AssertionError(f"{action} {arguments} was possible")
def fails(number):
    assert number < 0, number
"""
# What is asserted in a program that ends well; FILE and its kin are outside.
REFUSED = {
    # ------------------------------------------------------------------------------- files of others
    "chmod": "refused(os.chmod, FILE, 0)",
    "chmod by native code": "fails(libc.chmod(FILE.encode(), 0))",
    "chown": "refused(os.chown, FILE, 1, 1)",
    "utime": "refused(os.utime, FILE, (1, 1))",
    "setxattr": "refused(os.setxattr, FILE, 'user.x', b'1')",
    "unlink": "refused(os.unlink, FILE)",
    "rename": "refused(os.rename, FILE, FILE + 'x')",
    "truncate": "refused(os.truncate, FILE, 0)",
    "hard link": "refused(os.link, FILE, '/tmp/mine')",
    "write": "refused(open, FILE, 'w')",
    "read a submission": "refused(open, FILE)",
    "list submissions": "assert os.listdir(HOME) == []",
    "write beside submissions": "refused(open, HOME + '/new', 'w')",
    "chmod Python itself": "refused(os.chmod, sys.executable, 0); refused(os.chmod, os.__file__, 0)",
    "set a setuid bit on Python": "refused(os.chmod, os.path.realpath(sys.executable), 0o4755)",
    "utime of the library": "import svit_utils; refused(os.utime, svit_utils.__file__)",
    "setxattr of the library": "import svit_utils; refused(os.setxattr, svit_utils.__file__, 'user.x', b'1')",
    "write into the library": "import svit_utils; refused(open, os.path.dirname(svit_utils.__file__) + '/x.py', 'w')",
    "a .pth file for the grader": "import site; refused(open, site.getsitepackages()[0] + '/x.pth', 'w')",
    "sitecustomize for the grader": "refused(open, sys.prefix + '/lib/sitecustomize.py', 'w')",
    "write to the system": "for p in ('/x', '/usr/lib/x', '/etc/x', '/dev/x', '/dev/null/x'): refused(open, p, 'w')",
    "the list of fonts": "import glob\nfor p in glob.glob('/tmp/matplotlib/*'):\n    if os.stat(p).st_uid != os.getuid(): refused(open, p, 'w'); refused(os.unlink, p)",
    "read the masters": "refused(open, MASTER); refused(os.listdir, os.path.dirname(MASTER))",
    "read the judges": "refused(open, JUDGES); assert set(os.listdir(os.path.dirname(JUDGES))) == {'__init__.py', 'sandbox'}",
    "read the tests": "refused(os.listdir, ROOT + '/tests'); refused(os.listdir, ROOT + '/.git')",
    "read passwords": "refused(open, '/etc/shadow'); refused(open, '/etc/passwd')",
    "read somebody's home": "assert not os.path.exists(os.path.expanduser('~root/.ssh')); refused(os.listdir, '/home')",
    "read a disk": "for p in ('/dev/vda', '/dev/sda', '/dev/mem', '/dev/kmsg', '/dev/fuse'): refused(open, p, 'rb')",
    "make a disk": "refused(os.mknod, '/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0))",
    "open by handle": "fails(libc.open_by_handle_at(-100, bytes(64), 0))",
    "the kernel's settings": "for p in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger'): refused(open, p, 'w')",
    "the kernel's cgroups": "refused(os.listdir, '/sys'); refused(os.listdir, '/sys/fs/cgroup')",
    # ------------------------------------------------------------------------------- out of the sandbox
    "a way out through /proc": "for p in ('1', str(os.getppid())): refused(os.listdir, f'/proc/{p}/root' + HOME + '/submissions')",
    "chroot": "refused(os.chroot, '/tmp')",
    "mount": "fails(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "remount for writing": "fails(libc.mount(None, b'/', None, 32, None)); fails(libc.mount(None, b'/usr/lib', None, 32 | 4096, None))",
    "unmount": "fails(libc.umount2(b'/tmp', 2)); fails(libc.umount2(HOME.encode(), 2))",
    "pivot_root": "fails(libc.syscall(155, b'/tmp', b'/tmp'))",
    "a user namespace": "fails(libc.unshare(0x10000000))",
    "a mount namespace": "fails(libc.unshare(0x00020000))",
    "clone into a namespace": "fails(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0))",
    "setns": "fails(libc.setns(os.open('/proc/1/ns/mnt', 0) if os.access('/proc/1/ns/mnt', 4) else 0, 0))",
    "become root": "refused(os.setuid, 0) if os.getuid() else None; refused(os.setgroups, [0])",
    "capabilities": "caps = [l.split()[1] for l in open('/proc/self/status') if l[:6] in ('CapEff', 'CapPrm')]; assert set(caps) == {'0' * 16}",
    "new privileges": "assert 'NoNewPrivs:\\t1' in open('/proc/self/status').read(); fails(libc.prctl(38, 0, 0, 0, 0))",
    "a setuid program of one's own": "open('/tmp/x', 'w').close(); os.chmod('/tmp/x', 0o4755); assert os.statvfs('/tmp').f_flag & os.ST_NOSUID",
    "the filter of system calls": "fails(libc.prctl(22, 0, 0)); assert 'Seccomp:\\t2' in open('/proc/self/status').read()",
    "bpf": "fails(libc.syscall(321, 0, 0, 0))",
    "io_uring": "fails(libc.syscall(425, 8, bytes(256)))",
    "perf events": "fails(libc.syscall(298, bytes(128), 0, -1, -1, 0))",
    "userfaultfd": "fails(libc.syscall(323, 0))",
    "keyrings": "fails(libc.syscall(248, b'user', b'x', b'y', 1, -3)); fails(libc.syscall(250, 0, -3, 1))",
    "kernel modules": "fails(libc.syscall(175, b'', 0, b'')); fails(libc.syscall(313, 0, b'', 0))",
    "the clock and the host's name": "refused(time.clock_settime, time.CLOCK_REALTIME, 0); refused(socket.sethostname, 'x')",
    "priority": "refused(os.nice, -5); refused(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))",
    "type into the terminal": "import fcntl, termios\nrefused(os.open, '/dev/tty', os.O_RDWR); refused(os.open, '/dev/ptmx', os.O_RDWR)",
    "limits raised": "refused(resource.setrlimit, resource.RLIMIT_NOFILE, (4096, 4096)); refused(resource.setrlimit, resource.RLIMIT_DATA, (-1, -1))",
    # ------------------------------------------------------------------------------- network and sockets
    "a UNIX socket by its path": "refused(socket.socket(socket.AF_UNIX).connect, SOCKET)",
    "an abstract UNIX socket": "refused(socket.socket(socket.AF_UNIX).connect, ABSTRACT)",
    "a server on this machine": "refused(socket.create_connection, ('127.0.0.1', PORT), 2)",
    "the network": "refused(socket.create_connection, ('192.0.2.1', 80), 2)",
    "names of hosts": "refused(socket.gethostbyname, 'example.org')",
    "only a loopback, which is down": "assert [l.split(':')[0].strip() for l in open('/proc/net/dev') if ':' in l] == ['lo']",
    "raw sockets": "refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW); refused(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)",
    "netlink": "refused(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)",
    "virtual machines' sockets": "refused(socket.socket, 40, socket.SOCK_STREAM)",
    # ------------------------------------------------------------------------------- other processes
    "command lines of others": "import glob\nassert FILE not in ''.join(open(p, errors='replace').read() for p in glob.glob('/proc/[0-9]*/cmdline'))",
    "environments of others": "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'):\n    try: assert not [v for v in open(p).read().split(chr(0)) if v.partition('=')[0] not in ENVIRONMENT]\n    except OSError: pass",
    "at most its own processes": "assert len([p for p in os.listdir('/proc') if p.isdigit()]) <= 4",
    "memory of the waiting process by ptrace": "fails(libc.ptrace(16, os.getppid(), 0, 0))",
    "memory of the waiting process as a file": "refused(open, f'/proc/{os.getppid()}/mem', 'r+b')",
    "descriptors of the waiting process": "refused(os.listdir, f'/proc/{os.getppid()}/fd')",
    "the socket of the waiting process": """
def is_socket(number):
    try: return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError: return False
assert sum(map(is_socket, range(3, 128))) == 1""",
    "memory of another process": "fails(libc.process_vm_readv(os.getppid(), bytes(16), 1, bytes(16), 1, 0))",
    "a descriptor of another process": "fails(libc.syscall(438, os.pidfd_open(os.getppid()), 3, 0))",
    "a signal to pid 1": "for s in (2, 15, 9):\n    try: os.kill(1, s)\n    except OSError: pass",
    # ------------------------------------------------------------------------------- memory that nobody counts
    "memfd": "refused(os.memfd_create, 'x')",
    "System V shared memory": "fails(libc.shmget(0, 1 << 28, 0o1600))",
    "message queues": "fails(libc.msgget(0, 0o1600)); fails(libc.semget(0, 1, 0o1600)); fails(libc.syscall(240, b'q', 0o102, 0o600, None))",
    "shared anonymous memory": "refused(mmap.mmap, -1, 1 << 20)",
    "locked memory": "resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 1 << 30 or fails(libc.mlockall(3))",
    "a huge file": "f = open('/tmp/x', 'wb'); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); refused(f.truncate, 1 << 40)",
    "files beyond the limit": """
kept = []
def fill():
    for i in range(99):
        with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(8 << 20))
refused(fill)
assert sum(os.stat(f'/tmp/{n}').st_size for n in os.listdir('/tmp') if n.isdigit()) <= 64 << 20
[os.unlink(f'/tmp/{n}') for n in os.listdir('/tmp') if n.isdigit()]""",
    "open files that have no name": """
kept = []
def fill():
    while True:
        kept.append(open('/tmp/x', 'wb')); kept[-1].write(bytes(1 << 20)); kept[-1].flush(); os.unlink('/tmp/x')
refused(fill)
assert len(kept) <= 128""",
    "shared memory files": """
def fill():
    for i in range(99):
        with open(f'/dev/shm/{i}', 'wb') as f: f.write(bytes(8 << 20))
refused(fill)
[os.unlink(f'/tmp/{n}') for n in os.listdir('/tmp') if n.isdigit()]""",
    "four thousand threads": """
go = threading.Event()
def many():
    for _ in range(4000): threading.Thread(target=go.wait, daemon=True).start()
refused(many)
assert threading.active_count() < 200
go.set()""",
    "descriptors without end": "refused(lambda: [os.dup(1) for _ in range(10_000)])",
    "sockets full of bytes": """
pairs, held = [], 0
def fill():
    global held
    while True:
        pairs.append(socket.socketpair()); pairs[-1][0].setblocking(False)
        try:
            while True: held += pairs[-1][0].send(bytes(1 << 16))
        except BlockingIOError: pass
refused(fill)
assert held < 64 << 20, held""",
}


def attack(name: str, outside: Outside) -> str:
    """A program of `REFUSED`, with what it aims at."""
    there = {
        "FILE": str(outside.file),
        "HOME": str(outside.folder),
        "SOCKET": str(outside.socket),
        "ABSTRACT": f"\0svit-{os.getpid()}",
        "PORT": outside.port,
        "MASTER": str(masters.master("a")),
        "JUDGES": str(notebooks.ROOT / "svit_course" / "judging.py"),
        "ROOT": str(notebooks.ROOT),
        "ENVIRONMENT": ["", "PWD", *sandbox._environment(False)],
    }
    return "\n".join([*(f"{key} = {value!r}" for key, value in there.items()), HEAD, REFUSED[name]])


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(student: Sandbox, outside: Outside, name: str) -> None:
    assert run(student, attack(name, outside)) == ("", "")


# What ends with a status, whatever the program wants.
ENDED = {
    "an endless loop": ("while True: pass", "time"),
    "a loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "time",
    ),
    "a loop that ignores signals": ("for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "time"),
    "native code that never returns": ("import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", "time"),
    "children that compute": (
        "for _ in range(4):\n    if os.fork() == 0:\n        while True: pass\nos.wait()",
        "time",
    ),
    "orphans that compute": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\n    os._exit(0)\nwhile True: os.sched_yield()",
        "time",
    ),
    "lists without end": ("x = []\nwhile True: x.append(bytearray(10**7))", "memory"),
    "arrays without end": ("import numpy as np\nx = []\nwhile True: x.append(np.ones(10**7))", "memory"),
    "tensors without end": ("import torch\nx = []\nwhile True: x.append(torch.ones(10**7))", "memory|error"),
    "a text without end": ("x = 'x'\nwhile True: x += x", "memory"),
    "memory of children": ("if os.fork() == 0:\n    pass\nx = []\nwhile True: x.append(bytearray(10**7))", "memory"),
    "an impossible array": ("import numpy as np\nnp.ones((10**11,))", "error"),
    "a fork bomb": ("while True: os.fork()", "processes|memory|error|time|crash"),
    "a fork bomb that cannot be caught": (
        "while True:\n    try: os.fork()\n    except BaseException: pass",
        "processes|memory|time|crash",
    ),
    "twenty processes": (
        "for _ in range(20):\n    if os.fork() == 0: time.sleep(60)\ntime.sleep(60)",
        "processes|memory",
    ),
    "empty files": ("for i in range(10**6): open(f'/tmp/{i}', 'w').close()", "files|time"),
    "folders": ("for i in range(10**6): os.mkdir(f'/tmp/d{i}')", "files|time"),
    "deep folders": ("for i in range(10**6):\n    os.mkdir('d'); os.chdir('d')", "files|time|error"),
    "links": ("for i in range(10**6): os.symlink('x', f'/tmp/l{i}')", "files|time"),
    "a dereferenced null": ("ctypes.string_at(0)", "crash"),
    "an end of its own": ("os._exit(0)", "crash"),
    "abort": ("os.abort()", "crash"),
    "kill itself": ("os.kill(os.getpid(), 9)", "crash"),
    "kill everybody": ("for s in (15, 9): os.kill(-1, s)\nos._exit(0)", "crash"),
    "kill the waiting process": ("os.kill(os.getppid(), 9)\ntime.sleep(9)", "crash"),
    "stop the waiting process": ("os.kill(os.getppid(), 19)\nos._exit(0)", "crash"),
    "all channels closed": ("os.closerange(3, 99)", "crash"),
    "SystemExit": ("raise SystemExit", "error"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "error"),
    "an error that cannot be shown": ("class E(Exception):\n    def __str__(self): raise E\nraise E", "crash|error"),
    "an error with a long text": ("raise ValueError('x' * 10**8)", "error"),
    "an error with a long name": ("raise type('X' * 10**7, (Exception,), {})", "error"),
    "recursion": ("def f(): return f()\nf()", "error"),
    "recursion without a limit": ("sys.setrecursionlimit(10**9)\ndef f(): return [f()]\nf()", "crash|error|memory"),
    "a shell": ("assert os.system('id') == 0", "error"),
    "another program": ("subprocess.run(['/bin/sh', '-c', 'id'])", "error"),
}


@pytest.mark.parametrize("name", ENDED)
def test_it_ends_as_a_status(student: Sandbox, name: str) -> None:
    source, status = ENDED[name]
    got, message = run(student, HEAD + source, seconds=2)
    assert got in status.split("|"), (got, message)
    assert len(message) < 1000


# The whole address of a channel is known to the submission: it looks for sockets among its descriptors.
CHANNEL = """
def channels():
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                yield number
        except OSError:
            pass
"""
SPIN = "\nwhile True: pass"
FORGED = {
    "a number": b"5",
    "a list": b"[]",
    "no bytes": b"{}",
    "a wrong kind": b'{"missing": 5, "bytes": 0}',
    "a list for a text": b'{"error": ["x"], "bytes": 0}',
    "a negative size": b'{"bytes": -1}',
    "a size that is true": b'{"bytes": true}',
    "a size beyond the limit": b'{"bytes": 99999999999}',
    "an array that is none": b'{"seen": {"__array__": ["<f8", [Infinity], ""]}, "bytes": 0}',
    "objects": b'{"error": {"__array__": ["|O", [1], ""]}, "bytes": 0}',
    "brackets": b"[" * 60_000,
    "nested brackets": b'{"seen": ' + b"[" * 50_000,
    "no text": b"\xff\xfe",
    "a long number": b'{"bytes": ' + b"9" * 50_000 + b"}",
    "a line without end": b"x" * 100_000,
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_message_is_a_crash_and_nothing_else(student: Sandbox, name: str) -> None:
    line = FORGED[name]
    source = f"{HEAD}{CHANNEL}\nfor number in channels(): os.write(number, {line!r} + b'\\n'){SPIN}"
    assert run(student, source)[0] == "crash"


@pytest.mark.parametrize("line", [b'{"bytes": 16000000}\n', b"x", b""], ids=["much", "noise", "nothing"])
def test_a_flooded_channel_does_not_grow_the_grader(student: Sandbox, line: bytes) -> None:
    import psutil

    source = f"""{HEAD}{CHANNEL}
for number in channels():
    os.write(number, {line!r})
    while True: os.write(number, bytes(1 << 16))
"""
    before = psutil.Process().memory_info().rss
    assert run(student, source)[0] in ("crash", "time")
    assert psutil.Process().memory_info().rss - before < 128 * 2**20


def test_the_waiting_process_cannot_be_given_another_task(student: Sandbox) -> None:
    """What is written into any descriptor, opened again or not, is no order for anybody."""
    source = f"""{HEAD}
data = b'{{"cell": "x", "plot": false, "bytes": 5}}\\n1 / 0'
for number in range(3, 64):
    for descriptor in (number, libc.open(b"/proc/self/fd/%d" % number, 1), libc.open(b"/proc/%d/fd/%d" % (os.getppid(), number), 1)):
        if descriptor >= 0:
            try: os.write(descriptor, data)
            except OSError: pass
os._exit(0)
"""
    assert run(student, source)[0] == "crash"
    student.start()
    assert run(student, "x = 1") == ("", "")


def test_what_it_leaves_in_its_folder_is_gone_for_the_next_submission(loaded: Sandbox, outside: Outside) -> None:
    from svit_course.grading import probes
    from tests.grader.conftest import BOUNDS

    loaded.start()
    assert run(loaded, "open('/tmp/left', 'w').write('hidden case')") == ("", "")
    with Sandbox("student", BOUNDS, {"probes": probes.sources("a")}, [outside.folder]) as other:
        other.start()
        assert run(
            other, "import os\nassert os.listdir('/tmp') == ['matplotlib'] or not os.path.exists('/tmp/left')"
        ) == ("", "")


def test_sleeping_is_ended_by_the_clock(student: Sandbox) -> None:
    status, message = run(
        student, "import time\nwhile True:\n    try: time.sleep(99)\n    except BaseException: pass", 0.4
    )
    assert status == "time" and "does it wait for something" in message


def test_a_stopped_process_is_ended_by_the_clock(student: Sandbox) -> None:
    assert run(student, "import os\nos.kill(os.getpid(), 19)", 0.4)[0] == "time"


@pytest.mark.parametrize("repository", ["/opt", "/usr/lib", sys.prefix], ids=["/opt", "/usr/lib", "in Python's folder"])
def test_hidden_folders_stay_hidden_wherever_they_lie(tmp_path: Path, repository: str) -> None:
    """A repository below /usr, or below what is shown for Python's sake, shows no master and no submission."""
    from svit_course.sandbox import fence

    place = Path(repository).resolve() / "course-of-a-lecturer"  # as a repository is given: without links
    options = fence.mounts([place / "svit_utils"], [place, place / "submissions"], 1 << 20)
    hides, kept = options.index(str(place)), [i for i, o in enumerate(options) if o == str(place)]
    assert options[hides - 1] == "--tmpfs" and options[kept[-1] - 1] == "--remount-ro"
    shows = [i for i, o in enumerate(options) if o == "--ro-bind" and Path(options[i + 1]) in place.parents]
    assert all(i < hides for i in shows), "what is shown above it comes before, so that it hides"


def test_the_list_is_long_enough() -> None:
    assert len(REFUSED) + len(ENDED) + len(FORGED) >= 100
    assert textwrap.dedent(HEAD)


def test_a_clean_end_costs_no_second_load(student: Sandbox) -> None:
    """Also where folders that are hidden lie below /tmp, as pytest's do: what bubblewrap laid there is no litter."""
    assert student._process is not None
    first = student._process.pid
    assert run(student, "import os; os.makedirs('/tmp/a/b'); open('/tmp/a/b/c', 'w').write('x')") == ("", "")
    student.start()
    assert student._process is not None and student._process.pid == first
    assert run(student, "import os; assert not os.path.exists('/tmp/a')") == ("", "")
