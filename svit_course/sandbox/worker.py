"""The process in which a submission runs. It gets code and questions, and gives back what it saw; it holds no marks.

On Linux the process that `svit_course.sandbox.sandbox` starts loads torch and the checks, and then only waits: it forks
one that runs the submission, and when that is over it says so and forks the next. The two never share a channel: the
waiting process is spoken to over a socket that its child closes at once, the child over one of its own, by messages as
in `svit_course.sandbox.wire`. First the cells are sent, then a question case by case, so that the grader knows where it
hung.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import linecache
import os
import signal
import socket
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svit_course.sandbox import limits, wire


class _Magics:
    """What `%time` and its kin call: the code below a cell magic runs, everything else does nothing."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope

    def run_cell_magic(self, name: str, line: str, body: str) -> None:
        if name in ("time", "timeit", "capture", "prun"):
            exec(compile(body, "cell", "exec"), self.scope)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class _Fence:
    """An audit hook: refuses with a sentence, and remembers the first refusal."""

    PATHS = {
        "os.remove": (0,),
        "os.rename": (0, 1),
        "os.mkdir": (0,),
        "os.rmdir": (0,),
        "os.link": (1,),
        "os.symlink": (1,),
        "os.truncate": (0,),
        "os.chmod": (0,),
        "shutil.rmtree": (0,),
    }
    PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
    NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request")

    def __init__(self, folder: str, secret: list[str]) -> None:
        self.folder, self.secret = os.path.realpath(folder), [os.path.realpath(path) for path in secret]
        self.refused: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._open(*arguments)
        elif event in self.PATHS:
            for place in self.PATHS[event]:
                path = _path(arguments[place])
                if path and not self._inside(path, self.folder):
                    self._refuse(f"it tried to change {Path(path).name}, outside its folder")
        elif event in self.PROGRAMS:
            self._refuse("it tried to start another program")
        elif event in self.NETWORK:
            self._refuse("it tried to use the network")

    def _open(self, path: Any, mode: Any, flags: Any) -> None:
        where = _path(path)
        if where is None:
            return
        writes = bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if writes and where != os.devnull and not self._inside(where, self.folder):
            self._refuse(f"it tried to write {Path(where).name}, outside its folder")
        if any(self._inside(where, secret) for secret in self.secret):
            self._refuse("it tried to read the masters, the tests or other submissions")

    @staticmethod
    def _inside(path: str, folder: str) -> bool:
        return path == folder or path.startswith(folder + os.sep)

    def _refuse(self, sentence: str) -> None:
        self.refused.append(sentence)
        raise PermissionError(f"refused at grading: {sentence}")


def _path(value: Any) -> str | None:
    """Absolute and without links; None for file descriptors."""
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    return os.path.realpath(value) if isinstance(value, str | os.PathLike) else None


def _readable() -> Iterator[Path | str]:
    """What Python, the library and its data need."""
    import svit_utils
    from svit_utils.paths import data_dir, results_dir

    yield from ("/usr", "/lib", "/lib64", "/opt", "/nix", "/System", "/Library", "/proc", "/sys/devices/system")
    yield from (
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/etc/fonts",
        "/dev/null",
        "/dev/zero",
        "/dev/random",
        "/dev/urandom",
    )
    yield from {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    yield Path(svit_utils.__file__).parent
    yield from (data_dir(), results_dir())
    root = Path(svit_utils.__file__).resolve().parent.parent
    yield from (root / "data", root / "results")


def main(assignment: str, control: socket.socket) -> None:
    """Load torch and the assignment's checks, then fork a process for each request on ``control``, until it closes."""
    # The grader decides when this one ends; a submission must not be able to.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    limits.keep_orphans()
    # IPython and pandas are used only later, by the cells: loaded here, once, they cost no submission its time.
    import IPython.core.inputtransformer2  # noqa: F401
    import matplotlib.pyplot as plt
    import pandas  # noqa: F401
    import torch

    from svit_course import questions

    # What runs here is inherited by every fork, so nothing that starts threads: no product, no gradient.
    torch.set_num_threads(1)
    questions(assignment)
    plt.figure()  # finds the fonts, which writes a cache
    plt.close("all")
    for module in (sys.modules[__name__], limits, wire):
        linecache.getlines(str(module.__file__))  # for warnings, which quote lines and must not read here later
    control.sendall(b"loaded\n")
    while True:
        _, passed, _, _ = socket.recv_fds(control, 1, 1)
        if not passed:
            return  # the grader is done
        channel = socket.socket(fileno=passed[0])
        if not sys.platform.startswith("linux"):
            control.close()
            run(channel)
            return
        child = os.fork()
        if child == 0:
            try:
                control.close()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                run(channel)
            finally:
                os._exit(0)
        channel.close()
        _, status = os.waitpid(child, 0)
        if os.getpid() == 1:  # of a process namespace: whatever the submission has left running there
            with contextlib.suppress(OSError):
                os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0 if os.getpid() == 1 else os.WNOHANG)[0]:
                pass
        control.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _say(outgoing: Any, **message: Any) -> None:
    outgoing.write((wire.encode(message) + "\n").encode())
    outgoing.flush()


def run(channel: socket.socket) -> None:
    """The submission, until there is nothing more to ask."""
    incoming, outgoing = channel.makefile("rb"), channel.makefile("wb")
    setup = wire.decode(incoming.readline())
    import matplotlib.pyplot as plt
    import torch
    from IPython.core.inputtransformer2 import TransformerManager

    from svit_course import Wrong, question
    from svit_course.question import ask

    folder = setup["folder"]
    os.chdir(folder)
    # For what libraries cache, and what asks for a temporary file.
    os.environ.update(dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TORCH_HOME"), folder))
    tempfile.tempdir = None
    # The submission's own printing goes nowhere, and can neither fill a disk nor imitate this process's messages.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    torch.manual_seed(0)
    fence = _Fence(folder, setup["secret"])
    limits.restrict(memory=setup["memory"], seconds=setup["seconds"], processes=setup["processes"])
    limits.fence(read=_readable(), write=[folder, os.devnull])
    sys.addaudithook(fence)

    scope: dict[str, Any] = {"__name__": "__main__"}
    magics = _Magics(scope)
    builtins.get_ipython = lambda: magics  # type: ignore[attr-defined]
    builtins.display = lambda *_, **__: None  # type: ignore[attr-defined]
    _say(outgoing, ready=True)
    for line in incoming:
        asked = wire.decode(line)
        fence.refused.clear()
        answer: dict[str, Any] = {}
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            try:
                if "cell" in asked:
                    source = TransformerManager().transform_cell(asked["source"])
                    exec(compile(source, asked["cell"], "exec"), scope)
                    if asked.get("pictures"):
                        answer["pictures"] = _pictures(plt)
                    plt.close("all")
                else:
                    about = question(asked["question"])
                    answers = [scope[name] for name in about.answers if name in scope]
                    answer["missing"] = [name for name in about.answers if name not in scope]
                    answer["defined"] = [n for n, v in scope.items() if callable(v) and not n.startswith("_")]
                    if not answer["missing"]:
                        answer["seen"] = ask(about, answers, asked["case"])
            except Wrong as wrong:
                answer["wrong"] = str(wrong)
            except BaseException as error:
                answer["error"] = _in_one_line(error)
        if fence.refused:
            answer["refused"] = fence.refused[0]
        _say(outgoing, **answer)


def _pictures(plt: Any) -> list[str]:
    """The open figures as files in the folder, three at most."""
    names = []
    for number in plt.get_fignums()[:3]:
        names.append(f"figure-{number}.png")
        with open(names[-1], "wb") as file:
            data = io.BytesIO()
            plt.figure(number).savefig(data, format="png", dpi=80)
            file.write(data.getvalue())
    return names


def _in_one_line(error: BaseException) -> str:
    # Not traceback.extract_tb, which opens source files to show their lines.
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    cells = [(name, line) for name, line in frames if os.sep not in name and not name.startswith("<")]
    at = f", line {cells[-1][1]} of cell {cells[-1][0]}" if cells else ""
    if isinstance(error, SyntaxError):
        at = f", line {error.lineno}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {text[0][:300]}' if text else ''}{at}"


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
