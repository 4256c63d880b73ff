"""Where a submission runs: it gets code, then questions case by case, and gives back what it saw. It holds no marks.

Of the checks only the probes are here, as `svit_course.grading.probes` picks them.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import io
import os
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

from svit_course.sandbox import wire

PICTURES, QUOTED = 3, 300  # figures of a cell, characters of an error's text
PRINTED = 8000  # characters of what a plot's cell prints


def prepare(setup: dict[str, Any]) -> Student:
    """Load what cells and probes need, once. Every fork inherits what runs here, so nothing that starts threads."""
    import IPython.core.inputtransformer2  # noqa: F401
    import matplotlib.pyplot as plt
    import pandas  # noqa: F401
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    plt.figure()  # finds the fonts
    plt.close("all")
    for name, source in setup["probes"].items():
        sys.modules[name] = module = types.ModuleType(name)
        exec(compile(source, name, "exec"), module.__dict__)
    return Student(setup["memory"])


class _Printed(io.TextIOBase):
    """What is printed, from its beginning, as far as it is shown."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text[: PRINTED - len(self.text)]
        return len(text)


class _Magics:
    """What `%time` and its kin call: the code below a cell magic runs, everything else does nothing."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope

    def run_cell_magic(self, name: str, line: str, body: str) -> None:
        if name in ("time", "timeit", "capture", "prun"):
            exec(compile(body, "cell", "exec"), self.scope)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Student:
    """The submission: its names, and which cell last gave each of them its value."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.scope: dict[str, Any] = {"__name__": "__main__"}
        self.origin: dict[str, str] = {}
        magics = _Magics(self.scope)
        builtins.get_ipython = lambda: magics  # type: ignore[attr-defined]
        builtins.display = lambda *_, **__: None  # type: ignore[attr-defined]

    def answer(self, asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """One message: ``{"cell", "plot"}`` with a source, or ``{"question", "answers"}`` with a case."""
        wrong = sys.modules["svit_course.question"].Wrong
        try:
            if "question" in asked:
                return self._ask(asked["question"], asked["answers"], wire.decode(data))
            return self._run(asked["cell"], data.decode("utf-8", "surrogatepass"), asked["plot"])
        except wrong as error:
            return {"wrong": str(error)[: 2 * QUOTED]}, b""
        except MemoryError as error:
            # An array that could never be had is named in the error's text; else it is the limit that was met.
            size = getattr(error, "_total_size", 0)
            return ({"error": _in_one_line(error)} if size > self.memory else {"memory": "all of it"}), b""
        except BaseException as error:
            return {"error": _in_one_line(error)}, b""

    def _run(self, name: str, source: str, plot: bool) -> tuple[dict[str, Any], bytes]:
        """Run a cell. A plot is drawn by a process of its own, so that nothing of it is left for the answers."""
        import matplotlib.pyplot as plt
        from IPython.core.inputtransformer2 import TransformerManager

        code = compile(TransformerManager().transform_cell(source), name, "exec")
        if plot:
            return self._draw(code)
        before = dict(self.scope)
        try:
            exec(code, self.scope)
        finally:
            plt.close("all")
            self.origin.update({n: name for n, value in self.scope.items() if before.get(n, self) is not value})
        return {}, b""

    def _draw(self, code: types.CodeType) -> tuple[dict[str, Any], bytes]:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            message, data = {"error": "the plot ended its process"}, b""
            sys.stdout = printed = _Printed()
            try:
                os.closerange(3, writing)  # the grader is spoken to by the parent alone
                os.closerange(writing + 1, 4096)
                try:
                    exec(code, dict(self.scope))
                    message = {}
                except BaseException as error:
                    message = {"error": _in_one_line(error)}
                with contextlib.suppress(Exception):  # what stands already is shown, whatever came then
                    data = _pictures()
                message["printed"] = printed.text
                with open(writing, "wb") as stream:
                    stream.write(wire.packed(message, data))
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as stream:
            received = stream.read(wire.LONGEST)
        os.waitpid(child, 0)
        found = wire.unpacked(received)
        return ({"error": "the plot ended its process"}, b"") if isinstance(found, int) else found

    def _ask(self, name: str, answers: Sequence[str], case: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        question = sys.modules["svit_course.question"]
        answer: dict[str, Any] = {"missing": [name for name in answers if name not in self.scope]}
        if answer["missing"]:
            answer["defined"] = [n[:80] for n, v in self.scope.items() if callable(v) and n[:1] != "_"][-50:]
            return answer, b""
        probe = sys.modules[f"svit_course.checks.{name[0]}.{name}"].probe
        answer["origin"] = [self.origin.get(name, "")[:80] for name in answers]
        try:
            seen = probe(case, *(self.scope[name] for name in answers))
        except (question.Wrong, MemoryError):
            raise
        except Exception as error:
            return {**answer, "wrong": question.describe(error, answers)[: 2 * QUOTED]}, b""
        data = wire.encode({key: question.plain(value) for key, value in seen.items()}).encode()
        return ({"memory": "what it returns"}, b"") if len(data) > wire.LONGEST else (answer, data)


def _pictures() -> bytes:
    """The open figures as PNG files, three at most."""
    import matplotlib.pyplot as plt

    drawn = []
    for number in plt.get_fignums()[:PICTURES]:
        data = io.BytesIO()
        plt.figure(number).savefig(data, format="png", dpi=80)
        drawn.append(base64.b64encode(data.getvalue()).decode())
    return "\n".join(drawn).encode()


def _in_one_line(error: BaseException) -> str:
    # Not traceback.extract_tb, which opens source files to show their lines.
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    cells = [(name, line) for name, line in frames if os.sep not in name and not name.startswith(("<", "svit_"))]
    at = f", line {cells[-1][1]} of cell {cells[-1][0]}" if cells else ""
    if isinstance(error, SyntaxError):
        at = f", line {error.lineno}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {text[0][:QUOTED]}' if text else ''}{at}"[: 2 * QUOTED]
