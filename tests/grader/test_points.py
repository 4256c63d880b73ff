"""What was once broken about grading strangers' code, by what it is about."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

from svit_course import ASSIGNMENTS, notebooks, questions
from svit_course import masters as m
from svit_course.grading import command, hand, probes, reading, reports, runs, submissions, tables
from svit_course.grading.judge import ours, unquoted
from svit_course.grading.runs import Graded, Judge, Mark
from svit_course.grading.submissions import Submission
from svit_course.sandbox import fence, wire
from svit_course.sandbox.sandbox import Sandbox
from tests.course.handed_in import MASTER, Change, answers, deletes, submission
from tests.grader.conftest import Outside, run

pytestmark = pytest.mark.grader

Grader = Callable[..., Graded]


@pytest.fixture
def graded_by(loaded: Sandbox, judge: Judge, outside: Outside, tmp_path: Path) -> Iterator[Grader]:
    """Grades the solution of assignment a, changed."""

    def graded(change: Change | None = None, path: Path | None = None) -> Graded:
        loaded.stop()
        path = path or submission(tmp_path, "mallory", change)
        graded = runs.grade_in(loaded, Submission("mallory", MASTER.stem, path), judge)
        # A judge that has died of our own message would look like an answer that is wrong.
        assert not [mark.message for mark in graded.marks if "cannot be judged: the process" in mark.message]
        return graded

    yield graded
    loaded.stop()


@pytest.fixture
def time_to_import(loaded: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """To import the library takes seconds, on a busy machine more than a cell of these tests has."""
    monkeypatch.setattr(loaded, "bounds", replace(loaded.bounds, cell=60.0))


def lost(graded: Graded) -> set[str]:
    return {f"{mark.question} {mark.test}" for mark in graded.marks if mark.marks == 0}


def message(graded: Graded, name: str, test: str) -> str:
    return next(mark.message for mark in graded.marks if (mark.question, mark.test) == (name, test))


def inserted(source: str, before: str = "a1", **metadata: Any) -> Change:
    """A cell of one's own."""

    def change(notebook: Any) -> None:
        place = next(i for i, cell in enumerate(notebook.cells) if cell.get("id") == before)
        notebook.cells.insert(place, new_code_cell(source, metadata=metadata))

    return change


def both(*changes: Change) -> Change:
    def change(notebook: Any) -> None:
        for one in changes:
            one(notebook)

    return change


# ------------------------------------------------------------------------------------------------ 1. one cannot reach others


def test_a_submission_cannot_touch_the_others_nor_the_results(graded_by: Grader, outside: Outside) -> None:
    names = [str(outside.file), str(outside.folder), "/proc/1/cmdline"]
    attack = f"import os\nfor p in {names!r}:\n    try: os.chmod(p, 0)\n    except OSError: pass"
    assert lost(graded_by(inserted(attack))) == set()


# ------------------------------------------------------------------------------------------------ 2. nothing ends the run


def test_plots_of_cells_that_are_none_cost_no_descriptor(graded_by: Grader) -> None:
    """345 of them once ended the grader, and everybody's marks were gone."""
    figures = both(
        *[inserted("plt.figure(); plt.plot([1])", nbgrader={"grade": True, "solution": True, "grade_id": "z"})] * 9
    )
    graded_by(figures)
    before = len(os.listdir("/proc/self/fd"))
    graded = graded_by(figures)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert list(graded.pictures) == ["a5"] and lost(graded) == set()


class _NoJudge:
    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, str]]]]:
    """The command, with a function in the place of grading."""

    def graded(
        grade: Callable[[Submission], Graded], *students: str, jobs: int = 1
    ) -> tuple[int, list[dict[str, str]]]:
        for student in students:
            submission(tmp_path / "in", student)
        monkeypatch.setattr(command, "Judge", _NoJudge)
        monkeypatch.setattr(command.fence, "bubblewrap", tuple)
        monkeypatch.setattr(command, "grade", lambda one, *_: grade(one))
        code = command.main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--jobs", str(jobs)])
        return code, rows(tmp_path / "out" / "totals.csv")

    return graded


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_result_is_written_as_it_is_finished(scripted: Any, tmp_path: Path) -> None:
    seen = []

    def grade(one: Submission) -> Graded:
        if (table := tmp_path / "out" / "totals.csv").is_file():
            seen.append([row["student"] for row in rows(table)])
            assert (tmp_path / "out" / "feedback" / "ada" / f"{MASTER.stem}.html").is_file()
        if one.student == "ben":
            raise OSError(24, "Too many open files")
        return Graded(one, [Mark("a1", "visible", 1.0, 1.0, "ok")])

    code, totals = scripted(grade, "ada", "ben", "cai")
    assert seen == [["ada"], ["ada", "ben"]] and code == 1
    assert [(row["student"], row["by_tests"]) for row in totals] == [("ada", "1"), ("ben", "0"), ("cai", "1")]
    assert "Too many open files" in totals[1]["note"]


# ------------------------------------------------------------------------------------------------ 3. no sandbox, no strangers


def test_without_a_sandbox_strangers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submission(tmp_path, "ada")
    fence.bubblewrap.cache_clear()
    try:
        monkeypatch.setattr(fence.sys, "platform", "darwin")
        assert command.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    finally:
        monkeypatch.undo()
        fence.bubblewrap.cache_clear()
    said = capsys.readouterr().err
    assert "needs Linux" in said and "--trust" in said
    assert not (tmp_path / "out").exists()


def test_a_bubblewrap_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where users may not make namespaces (Ubuntu 24.04's AppArmor, Docker's default filter)."""
    fence.bubblewrap.cache_clear()
    failed = subprocess.CompletedProcess([], 1, "", "bwrap: setting up uid map: Permission denied\n")
    try:
        monkeypatch.setattr(fence.subprocess, "run", lambda *_, **__: failed)
        with pytest.raises(
            fence.NoSandbox, match=r"does not work here \(bwrap: setting up uid map: Permission denied\)"
        ):
            fence.bubblewrap()
    finally:
        monkeypatch.undo()
        fence.bubblewrap.cache_clear()


LINKED = """
import sys
from svit_course.sandbox import fence
print(sys.prefix, fence.bubblewrap()[0])
"""


def linked_environment(folder: Path) -> Path:
    """A virtual environment, its folder a link, whose Python is a link to a link somewhere else."""
    real, somewhere = folder / "real", folder / "elsewhere" / "python"
    (real / "bin").mkdir(parents=True)
    somewhere.parent.mkdir()
    somewhere.symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}")
    (real / "bin" / "python").symlink_to(somewhere)
    (real / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\n")
    packages = real / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    (folder / "linked").symlink_to(real)
    return folder / "linked"


def test_an_environment_that_is_a_link_has_a_sandbox(tmp_path: Path) -> None:
    """What bubblewrap said of it once read as if users might not make namespaces."""
    environment = {**os.environ, "PYTHONPATH": str(notebooks.ROOT)}
    program = [str(linked_environment(tmp_path) / "bin" / "python"), "-c", LINKED]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{tmp_path}/linked ")


def test_a_python_that_is_not_in_the_sandbox_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fence.bubblewrap.cache_clear()
    failed = subprocess.CompletedProcess([], 1, "", "bwrap: execvp /x/bin/python: No such file or directory\n")
    try:
        monkeypatch.setattr(fence.subprocess, "run", lambda *_, **__: failed)
        with pytest.raises(fence.NoSandbox, match=r"no .*python.*, or what it links to .*make the environment anew"):
            fence.bubblewrap()
    finally:
        monkeypatch.undo()
        fence.bubblewrap.cache_clear()


@pytest.mark.slow
def test_trust_grades_with_plain_processes_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submission(tmp_path / "in", "ada", inserted("import os\nassert os.path.isdir('/etc')"))
    assert command.main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--trust"]) == 0
    (total,) = rows(tmp_path / "out" / "totals.csv")
    assert (total["by_tests"], total["note"]) == ("13", "not final, to mark by hand: a5, a6")
    assert "runs with your own rights" in capsys.readouterr().out


def test_where_systemd_makes_cgroups_each_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "systemd-run"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -- ] && [ "$1" != true ]; do shift; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fence.group.cache_clear()
    try:
        whole = fence.command(["python"], [], 3, 2**30, 256)
        assert whole[0] == "systemd-run" and "--scope" in whole and whole[-1] == "python"
        assert {"MemoryMax=1073741824", "MemorySwapMax=0", "TasksMax=256"} <= set(whole)
        assert whole.index("--") < whole.index(fence.bubblewrap()[0])
    finally:
        monkeypatch.undo()
        fence.group.cache_clear()


AS_ANYBODY = """
import sys
from svit_course.grading import probes
from svit_course.sandbox import fence
from svit_course.sandbox.sandbox import Sandbox
from tests.grader.conftest import BOUNDS, Outside, run
from tests.grader.test_attacks import REFUSED, attack
from pathlib import Path
outside = Outside(Path(sys.argv[1]) / "home")
assert "--unshare-user" in fence.bubblewrap()
with Sandbox("student", BOUNDS, {"probes": probes.sources("a")}, [outside.folder]) as sandbox:
    for name in REFUSED:
        sandbox.start()
        ended = run(sandbox, attack(name, outside))
        if ended != ("", ""):
            print(name, *ended)
    assert outside.visitors() == 0
    print("all were tried")
"""


@pytest.mark.slow
def test_an_ordinary_user_has_the_same_sandbox() -> None:
    """Where the suite runs as root it tries everything that is refused again as somebody who owns nothing."""
    if os.getuid() != 0:
        return  # then everything here is tried as one
    folder = tempfile.mkdtemp()  # pytest's own is for its user alone
    os.chmod(folder, 0o777)
    above = [parent for parent in reversed(Path(sys.base_prefix).parents) if parent != Path("/")]
    shown = [option for parent in above[1:] for option in ("--perms", "0755", "--dir", str(parent))]
    program = [fence.bubblewrap()[0], "--cap-add", "ALL", "--dev-bind", "/", "/"]
    if not os.stat(sys.base_prefix).st_mode & 5 or not all(os.stat(parent).st_mode & 1 for parent in above):
        # Python lies in a home that is closed to others, as pyenv's: show it without opening the home.
        program += ["--perms", "0755", "--tmpfs", str(above[0]), *shown, "--ro-bind", sys.base_prefix, sys.base_prefix]
    program += ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    environment = {**os.environ, "PYTHONPATH": str(notebooks.ROOT), "HOME": folder}
    done = subprocess.run(
        [*program, sys.executable, "-c", AS_ANYBODY, folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(folder)
    assert done.stdout == "all were tried\n", done.stdout + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------ 4. no mark by the library's name

BORROWED = "def attention_torch(q, k, v, tau):\n    import builtins\n    return builtins.operator(q, k, v, tau, return_weights=True)"
TAKEN = "import builtins, svit_utils\nbuiltins.operator = svit_utils.thresholded_attention"
CLAIMS = {
    "a plot": {"nbgrader": {"grade": True, "solution": True, "locked": False, "grade_id": "zz", "points": 1}},
    "a plot of the master's name": {"nbgrader": {"grade": True, "solution": True, "grade_id": "a5"}},
    "a test": {"nbgrader": {"grade": True, "solution": False, "locked": True, "grade_id": "zz-visible"}},
    "a given cell": {"nbgrader": {"grade": False, "solution": False, "locked": True, "grade_id": "zz"}},
    "the given cell": {"nbgrader": {"grade": False, "solution": False, "locked": True, "grade_id": "given-imports"}},
    "prose": {"nbgrader": {"grade": True, "solution": True, "grade_id": "a6"}},
    "a list": {"nbgrader": ["grade", "solution"]},
}


@pytest.mark.usefixtures("time_to_import")
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_cell_is_not_what_its_metadata_claim(graded_by: Grader, claim: str) -> None:
    graded = graded_by(both(answers("a4", BORROWED), inserted(TAKEN, **CLAIMS[claim])))
    assert lost(graded) == {"a4 visible", "a4 hidden"}


@pytest.mark.usefixtures("time_to_import")
def test_a_plot_may_use_the_library_and_leaves_nothing_of_it(graded_by: Grader) -> None:
    plot = f"{TAKEN}\nplt.plot([1, 2])\nsoftmax.__code__ = (lambda s: s).__code__\nnp.tanh = torch.where = None\ncut = print"
    graded = graded_by(both(answers("a4", BORROWED), answers("a5", plot)))
    assert lost(graded) == {"a4 visible", "a4 hidden"}
    assert len(graded.pictures["a5"]) == 1


STOPS = "print('first', softmax(np.zeros(2)))\nplt.plot([1, 2])\nraise ValueError('values must be finite')"


@pytest.mark.parametrize("source", [STOPS, f"print('x' * 10**6)\n{STOPS}", STOPS.replace("\n", "\nplt.figure()\n", 1)])
def test_a_plot_that_stops_is_shown_as_far_as_it_came(graded_by: Grader, tmp_path: Path, source: str) -> None:
    """A NaN from an answer once left an empty place to mark; and what the cell prints was never shown."""
    graded = graded_by(answers("a5", source))
    (mark,) = [mark for mark in graded.marks if mark.question == "a5"]
    assert (mark.status, mark.marks) == ("by hand", None) and "values must be finite" in mark.message
    assert graded.pictures["a5"] and len(graded.printed["a5"]) <= 8000
    reports.write_reports([graded], tmp_path)
    page = next(tmp_path.rglob("*.html")).read_text(encoding="utf-8")
    assert "What the cell printed" in page and "values must be finite" in page and "data:image/png" in page


@pytest.mark.parametrize(
    "body",
    [
        "    from svit_utils import thresholded_attention as f",
        "    f = __import__('svit_utils').thresholded_attention",
        "    import importlib; f = importlib.import_module('svit_utils').thresholded_attention",
        "    exec('from svit_utils import thresholded_attention as f', globals()); f = globals()['f']",
        "    import sys; f = sys.modules['svit_utils'].thresholded_attention",
    ],
)
def test_an_answer_that_names_the_library_is_not_run(graded_by: Grader, body: str) -> None:
    source = f"here = %pwd\ndef attention_torch(q, k, v, tau):\n{body}\n    return f(q, k, v, tau, return_weights=True)"
    graded = graded_by(answers("a4", source))
    assert lost(graded) == {"a4 visible", "a4 hidden"}
    assert "to be written, not imported" in message(graded, "a4", "hidden")


# ------------------------------------------------------------------------------------------------ 5. judges out of reach


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_only_probes_are_loaded_beside_a_submission(assignment: str) -> None:
    """No judge, no known mistake, no hint, no case; and no probe needs a reference to make its inputs."""
    found = probes.sources(assignment)
    text = "\n".join(found.values())
    for name in ("def judge", "def mistakes", "_mistakes(", "QUESTION", "hints=", "def expected", "compare(", "'best'"):
        assert name not in text or name == "'best'", name
    assert "svit_course.judging" not in found
    for reference in ("def formula", "def library", "def cut(", "def weights(", "rollout_matrix", "tau_factor"):
        assert reference not in text
    if assignment == "a":
        assert "softmax" not in text
    assert {module.rsplit(".", 1)[-1] for module in found} >= {q.name for q in questions(assignment)}


def test_what_is_in_the_process_is_no_judge(student: Sandbox) -> None:
    source = """
import gc, sys, types
from svit_course import check, hint
import svit_course
assert [k for k, v in check.__globals__.items() if isinstance(v, types.ModuleType)] == ["sandbox"]
functions = [f for f in gc.get_objects() if isinstance(f, types.FunctionType) and str(f.__module__).startswith("svit_course")]
assert functions and not [f for f in functions if f.__name__ in ("judge", "mistakes", "expected", "decide", "compare")]
assert not [n for n in sys.modules if n in ("svit_course.judging", "svit_course.masters", "svit_course.grading.runs")]
import importlib
for name in ("svit_course.judging", "svit_course.checks.a.shared2", "svit_course.masters", "svit_course.checks.b.b1"):
    try: importlib.import_module(name)
    except ImportError: continue
    raise AssertionError(name)
"""
    assert run(student, source) == ("", "")


def test_the_page_shows_every_cell_and_who_defined_what(graded_by: Grader, tmp_path: Path) -> None:
    decoy = inserted(
        "def softmax(scores, really=True):\n    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)",
        "a1-visible",
    )
    graded = graded_by(decoy)
    assert graded.origin["softmax"] not in ("", "a1") and graded.origin["cut"] == "a2"
    reports.write_reports([graded], tmp_path)
    page = next(tmp_path.rglob("*.html")).read_text(encoding="utf-8")
    assert "really=True" in page
    assert f"was last defined by cell {graded.origin['softmax']}" in page


LEAK = """
import sys
def secret():
    frame = sys._getframe()
    while frame:
        if isinstance(frame.f_locals.get("case"), dict):
            return "LEAK" + repr(frame.f_locals["case"])
        frame = frame.f_back
def is_hidden():
    return "stack" in secret() or "197" in secret() or "batch of" in secret() or "loses every" in secret() or "corner" in secret()
"""
LEAKS = {
    "an error": "raise ValueError(secret())",
    "an error of one's own": "raise type(secret(), (Exception,), {})(secret())",
    "not written": "raise NotImplementedError(secret())",
    "a failed assertion": "assert False, secret()",
    "an exit": "raise SystemExit(secret())",
    "a text": "return secret()",
    "the name of a type": "return type(secret(), (), {})()",
    "texts in a list": "return [secret()] * 9",
    "keys": "return {secret(): 1}",
    "a key error": "return {}[secret()]",
    "a wrong of the course": "from svit_course import Wrong; raise Wrong(secret())",
    "the course's own wrong": "raise sys.modules['svit_course.question'].Wrong(secret())",
    "numbers": "return np.array([float(len(secret())) * 7919.0] * 3)",
    "a shape": "return np.zeros((len(secret()), 7919))",
    "a print": "print(secret()); return scores",
    "a file": "open('/tmp/left-a-file', 'w').write(secret()); import os; os._exit(0)",
    "a name of a variable": "globals()[secret()] = print; return globals().pop('softmax')",
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_hidden_case_does_not_come_back(graded_by: Grader, tmp_path: Path, leak: str) -> None:
    """Messages of hidden tests are ours alone: by then the submission knows the case."""
    # A file is still there when the cells are run again; what it holds must not come back as a cell's error.
    left = f"/tmp/left-{leak.replace(' ', '-')}"
    later = f"import os\nif os.path.exists({left!r}): raise ValueError(open({left!r}).read())"
    body = f"def softmax(scores):\n    e = np.exp(scores - scores.max(-1, keepdims=True))\n    if scores.ndim > 3:\n        {LEAKS[leak]}\n    return e / e.sum(-1, keepdims=True)"
    graded = graded_by(both(inserted(LEAK), answers("a1", body), inserted(later, "a2")))
    assert "a1 hidden" in lost(graded) and "a1 visible" not in lost(graded)
    reports.write_reports([graded], tmp_path)
    said = "\n".join([*(mark.message for mark in graded.marks), *graded.notes, *graded.origin.values()])
    page = next(tmp_path.rglob("*.html")).read_text(encoding="utf-8").split("<details>")[0]
    for text in (said, page):
        assert "LEAK" not in text and "7919" not in text and "'seed'" not in text


def test_our_sentences_stay_without_what_was_chosen() -> None:
    seen = {"out": "q7", "names": ["blocks.0.attn", "(evil)"], "k": np.zeros(3)}
    text = "c1, twelve 12: converted names blocks.0.attn, (evil); q7 is 0.25 at [3, 4] and should be -1e-05"
    assert ours(text, seen, "c1") == (
        "c1, twelve 12: converted names … is not what it should be on this input, and no usual mistake explains it: make "
        "such an input, and compare with the formula step by step"
    )
    fixed = "a1, rows: the columns sum to 1, not the rows: the softmax runs over the last axis, axis=-1"
    assert ours(fixed, {"weights": "columns rows"}, "a1") == fixed
    described = "it fails on inputs of this shape (ValueError: secret). Is a shape, or a number of tokens, written into the code?"
    assert "secret" not in unquoted(described, "a1") and "Is a shape" in unquoted(described, "a1")
    assert unquoted("softmax is not written yet", "a1") == "softmax is not written yet"
    assert unquoted("the seed is 5 is not written yet", "a1") == "… is not written yet"
    assert unquoted("whatever they like", "a1") == "it stops with an error"


# ------------------------------------------------------------------------------------------------ 6. bounded reading and judging

HOSTILE = {
    "eighteen megabytes of nothing": b'{"cells": [' + b"{}," * (6 * 2**20) + b"{}]}",
    "brackets": b"[" * 10**6,
    "nested metadata": b'{"metadata": ' + b'{"a":' * 10**5,
    "numbers": b'{"cells": [' + b"1," * 10**6 + b"1]}",
    "a number without end": b'{"cells": ' + b"9" * 10**6 + b"}",
    "no notebook": b"{ not a notebook",
    "nothing": b"",
    "another kind of file": b"\x89PNG\r\n\x1a\n" + bytes(1000),
    "cells that are texts": b'{"cells": ["a", "b"], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
    "sources that are numbers": b'{"cells": [{"cell_type": "code", "source": 5, "metadata": {}}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
    "a notebook of the future": b'{"cells": [], "metadata": {}, "nbformat": 99, "nbformat_minor": 0}',
    "many cells": json.dumps(
        {
            "cells": [{"cell_type": "raw", "source": "", "metadata": {}}] * 99_999,
            "metadata": {},
            "nbformat": 4,
            "nbformat_minor": 4,
        }
    ).encode(),
    "a source without end": json.dumps(
        {
            "cells": [{"cell_type": "raw", "source": "x" * 9_000_000, "metadata": {}}],
            "metadata": {},
            "nbformat": 4,
            "nbformat_minor": 4,
        }
    ).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_notebook_that_was_made_to_cost_costs_its_own_marks(graded_by: Grader, tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.ipynb"
    path.write_bytes(HOSTILE[name])
    before = psutil.Process().memory_info().rss
    graded = graded_by(path=path)
    assert {mark.marks for mark in graded.marks} == {0.0} and "cannot be read" in graded.notes[0]
    assert psutil.Process().memory_info().rss - before < 256 * 2**20


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 10**6,
        b'{"weights": ' + b"[" * 10**5,
        b'{"weights": {"__array__": ["<f8", [1000000000, 0], ""]}}',
        b'{"weights": {"__array__": ["<f8", [-1, 0], ""]}}',
        b'{"weights": {"__array__": ["<c16", [0], ""]}}',
        b'{"weights": {"__array__": ["|V1000000000", [0], ""]}}',
        b'{"weights": [' + b"{}," * 5_000_000 + b"{}]}",
        b'{"weights": "' + b"x" * 15_000_000 + b'"}',
        wire.encode({"weights": np.full((1000, 1000), np.nan), "scores": np.zeros((1000, 1000))}).encode(),
        b"5",
        b"",
    ],
    ids=range(11),
)
def test_a_forged_answer_costs_the_judge_little_and_earns_nothing(judge: Judge, data: bytes) -> None:
    place = {"question": "a1", "hidden": False, "number": 0, "quiet": False}
    try:
        said = judge.ask(place, data)[0].get("wrong", "")
    except runs.Ended as ended:
        said = ended.status
    assert said in ("time", "memory") or said.startswith("a1, ")
    right = {"weights": np.exp([0.0, 1, 2, 4]) / np.exp([0.0, 1, 2, 4]).sum(), "scores": np.array([0.0, 1, 2, 4])}
    assert judge.ask(place, wire.encode(right).encode()) == ({}, b"")


def test_the_judge_is_fenced_too(judge: Judge) -> None:
    assert judge.ask({"read": "a"}, MASTER.read_bytes())[1]
    inside = judge._sandbox._family()
    assert len(inside) >= 3 and not judge._sandbox.trusted
    assert psutil.Process(inside[1].pid).cwd() == "/" or inside[1].pid != os.getpid()


# ------------------------------------------------------------------------------------------------ 7. nothing left behind

DRIVER = """
import signal, sys, threading
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests under nohup has it ignored
from svit_course.sandbox.sandbox import Limits, Sandbox
sandbox = Sandbox("student", Limits(), {"probes": {"svit_course.question": "class Wrong(Exception): pass"}})
def work():
    sandbox.start()
    print(*[member.pid for member in sandbox._family()], flush=True)
    source = "import os, time\\nfor _ in range(3):\\n    if os.fork() == 0:\\n        os.setsid()\\n        break\\nwhile True: time.sleep(0.1)"
    sandbox.ask({"cell": "x", "plot": False}, source.encode(), 600)
thread = threading.Thread(target=work); thread.start(); thread.join()
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_grader_that_is_killed_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(notebooks.ROOT), "TMPDIR": str(tmp_path)}
    grader = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, env=environment)
    assert grader.stdout is not None
    assert len(grader.stdout.readline().split()) >= 3
    time.sleep(1)
    left = psutil.Process(grader.pid).children(recursive=True)
    assert len(left) >= 3
    grader.send_signal(number)
    grader.wait(60)
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_ends_the_rest(tmp_path: Path) -> None:
    submission(tmp_path / "in", "ada")
    submission(tmp_path / "in", "ben", inserted("import time\nfor _ in range(10**6): time.sleep(0.001)"))
    program = [
        sys.executable,
        "-m",
        "svit_course",
        "grade",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(notebooks.ROOT), "PYTHONUNBUFFERED": "1"}
    grader = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment, cwd=notebooks.ROOT)
    assert grader.stdout is not None
    while "13 of 13" not in grader.stdout.readline():
        assert grader.poll() is None
    left = psutil.Process(grader.pid).children(recursive=True)
    grader.send_signal(signal.SIGINT)
    assert grader.wait(60) == 130
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive
    assert [(row["student"], row["by_tests"]) for row in rows(tmp_path / "out" / "totals.csv")] == [("ada", "13")]


# ------------------------------------------------------------------------------------------------ 8. a slow machine


def test_a_busy_machine_costs_an_honest_answer_nothing(student: Sandbox) -> None:
    """Fourteen busy processes once took an honest assignment from 14 to 0."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(14)]
    try:
        source = "import time\nuntil = time.process_time() + 1\nwhile time.process_time() < until: pass"
        assert run(student, source, seconds=2) == ("", "")
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_what_the_clock_has_ended_is_graded_again_alone(scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tries: list[str] = []

    def grade(one: Submission) -> Graded:
        tries.append(one.student)
        slow = one.student == "ben" and tries.count("ben") == 1
        return Graded(one, [Mark("a1", "visible", 0.0 if slow else 1.0, 1.0, "time" if slow else "ok")], slow=slow)

    _, totals = scripted(grade, "ada", "ben", "cai")
    assert tries == ["ada", "ben", "cai", "ben"]
    assert {row["student"]: row["by_tests"] for row in totals} == {"ada": "1", "ben": "1", "cai": "1"}
    assert "Again, one at a time" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ 9. names and sizes

NAMES = [
    "山田\u3000太郎",
    "two  spaces",
    "Zoe\u0308",
    "tab\there",
    "name\u202ecod.exe",
    "bell\x07",
    "esc\x1b[2J",
    " edges ",
    "新\nline",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_marks_by_hand_stay_whatever_the_name(tmp_path: Path, name: str) -> None:
    path = submission(tmp_path / "in", name)
    (one,), _ = submissions.find(tmp_path / "in")
    assert one.path == path and one.student == submissions.canonical(name) and one.student.isprintable()

    def graded() -> Graded:
        return Graded(one, [Mark("a5", "by hand", None, 3.0, "by hand")])

    reports.write_reports([graded()], tmp_path / "out")
    table = rows(tmp_path / "out" / "by_hand.csv")
    table[0]["marks"] = "3"
    table[0]["student"] = table[0]["student"].replace("Zoë", "Zoe\u0308")  # as another file system would have it
    tables.write_table(tmp_path / "out" / "by_hand.csv", hand.BY_HAND, table)
    reports.write_reports([graded()], tmp_path / "out")
    (total,) = rows(tmp_path / "out" / "totals.csv")
    assert total["by_hand"] == "3"
    assert len(list((tmp_path / "out" / "feedback").rglob("*.html"))) == 1


def test_two_folders_of_one_name_stay_two_students(tmp_path: Path) -> None:
    """Somebody who can choose the name of a folder does not take another's place."""
    for name in ("ada", "ada\u3000", "ada "):
        submission(tmp_path, name)
    found, strange = submissions.find(tmp_path)
    assert sorted(one.student for one in found) == ["ada", "ada (2)", "ada (3)"] and len(strange) == 2


def test_nothing_that_steers_a_terminal_is_printed(scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scripted(lambda one: Graded(one, [], ["\x1b]0;owned\x07"]), "esc\x1b[2Jape", "bidi\u202e")
    said = capsys.readouterr()
    assert not [c for c in said.out + said.err if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_notebook_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    text = submission(tmp_path, "ada").read_text(encoding="utf-8")
    cells, notes = reading.read(text.encode(encoding), notebooks.read(MASTER))
    assert not notes and sum(cell.part == "answer" for cell in cells) == 4


def test_outputs_do_not_count(graded_by: Grader, tmp_path: Path) -> None:
    def shown(notebook: Any) -> None:
        output = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "A" * 30_000_000}}
        notebooks.code_cells(notebook)[-1].outputs = [nbformat.from_dict(output)]

    assert lost(graded_by(shown)) == set()


# ------------------------------------------------------------------------------------------------ 10. cells without names


def nameless(metadata: bool) -> Change:
    def change(notebook: Any) -> None:
        inserted("def exponentials(s):\n    return np.exp(s - s.max(-1, keepdims=True))")(notebook)
        answers("a1", "def softmax(s):\n    e = exponentials(s)\n    return e / e.sum(-1, keepdims=True)")(notebook)
        inserted("helper = 1", "a5")(notebook)
        inserted("1 / 0", "a2")(notebook)
        for cell in notebook.cells:
            cell.pop("id", None)
            if not metadata:
                cell.metadata.clear()

    return change


def written(notebook: Any, path: Path, minor: int = 0) -> Path:
    notebook.nbformat_minor = minor
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


@pytest.mark.parametrize("metadata", [True, False], ids=["nbformat 4.0", "another editor"])
def test_a_notebook_without_ids_keeps_all_its_marks(graded_by: Grader, tmp_path: Path, metadata: bool) -> None:
    notebook = notebooks.read(submission(tmp_path, "ada"))
    nameless(metadata)(notebook)
    graded = graded_by(path=written(notebook, tmp_path / "old.ipynb"))
    assert lost(graded) == set()
    assert len(graded.pictures["a5"]) == 1 and "logits of standard deviation" in graded.sources["a5"]
    assert graded.sources["a6"].strip()
    assert metadata or any("taken for a1" in note for note in graded.notes)


def test_a_split_cell_is_joined(graded_by: Grader) -> None:
    """Editors that split a cell copy its id, or its metadata; a half alone would be half an answer."""

    def split(notebook: Any) -> None:
        for name in ("a3", "a5"):
            place = next(i for i, cell in enumerate(notebook.cells) if cell.get("id") == name)
            first = notebook.cells[place]
            second = copy.deepcopy(first)
            lines = first.source.splitlines()
            half = next(
                i for i, line in enumerate(lines) if i and ("def " in line or "axis.plot" in line or "return" in line)
            )
            first.source, second.source = "\n".join(lines[:half]), "\n".join(lines[half:])
            second.id = f"{name}-copy" if name == "a3" else name
            notebook.cells.insert(place + 1, second)

    graded = graded_by(split)
    assert lost(graded) == set() and len(graded.pictures["a5"]) == 1
    assert any("another part of a5" in note for note in graded.notes)


def test_a_code_cell_that_became_prose_is_run(graded_by: Grader) -> None:
    def turned(notebook: Any) -> None:
        for place, cell in enumerate(notebook.cells):
            if cell.get("id") in ("a2", "a5"):
                notebook.cells[place] = new_markdown_cell(cell.source, id=cell.id, metadata=cell.metadata)

    graded = graded_by(turned)
    assert lost(graded) == set() and len(graded.pictures["a5"]) == 1
    assert sum("turned into markdown: it is run as code" in note for note in graded.notes) == 2


def test_an_old_copy_of_an_answer_does_no_harm(graded_by: Grader) -> None:
    """The cell copied as a backup, with its id: the one that stands last defines the name, as in the notebook."""

    def backed_up(notebook: Any) -> None:
        place = next(i for i, cell in enumerate(notebook.cells) if cell.get("id") == "a2")
        old = copy.deepcopy(notebook.cells[place])
        old.source = "def cut(p, tau):\n    return p"
        notebook.cells[place:place] = [old, new_code_cell("notes = 'before I understood'")]

    graded = graded_by(backed_up)
    assert lost(graded) == set() and any("2 cells are named a2" in note for note in graded.notes)


def test_a_deleted_answer_is_not_taken_from_somewhere_else(graded_by: Grader) -> None:
    assert lost(graded_by(deletes("a3", "a5"))) == {"a3 visible", "a3 hidden", "a5 by hand"}


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_master_is_recognised_without_any_name(assignment: str) -> None:
    """Of the solutions of each assignment, all names dropped: every answer, plot and written answer is found."""
    original = notebooks.read(m.master(assignment))
    notebook = copy.deepcopy(original)
    for cell in notebook.cells:
        cell.source = m.without(cell.source, m.BEGIN_HIDDEN, m.END_HIDDEN)
        cell.pop("id", None)
        cell.metadata.clear()
        if m.BEGIN_SOLUTION not in cell.source and cell.cell_type == "markdown" and "BEGIN" in cell.source:
            cell.source += "\nmine"
    notebook.nbformat_minor = 0
    named = {cell.id for cell in reading.read(json.dumps(notebook).encode(), original)[0]}
    assert {cell.id for cell in m.cells(original) if cell.part in ("answer", "plot")} <= named
