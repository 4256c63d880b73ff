"""Run one submission in a sandbox and judge it.

Its functions are called in the sandbox (`svit_course.sandbox`), and what they return is judged here, outside: marks and
verdicts never enter the sandbox, and a hidden case enters it when it is asked. The checks are loaded there, because
their probes call the functions: code that digs in its own process can find how a question is judged.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svit_course import Question, Wrong, masters, notebooks, questions
from svit_course.grading.submissions import Submission, borrows, plan, read
from svit_course.masters import Cell
from svit_course.question import decide
from svit_course.sandbox.sandbox import Ended, Limits, Sandbox

LONGEST = 200_000  # characters of a cell
ENDS = ("time", "memory", "processes", "files", "crash")  # statuses that have ended a process


@dataclass(frozen=True)
class Mark:
    """A line of marks.csv. ``status``: ok, wrong, missing, refused, one of `ENDS`, not graded, or by hand."""

    question: str
    test: str
    marks: float | None
    out_of: float
    status: str
    message: str = ""


@dataclass
class Graded:
    """A submission's marks, and what the feedback shows: its answers' sources, its pictures (PNG)."""

    submission: Submission
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, list[bytes]] = field(default_factory=dict)


def grade(submission: Submission, bounds: Limits, secret: Sequence[Path] = ()) -> Graded:
    """Run a submission and judge it. Whatever it does ends as marks and messages.

    Args:
        secret: folders that it must not read, besides the masters.
    """
    graded = Graded(submission)
    notebook = notebooks.read(masters.master(submission.assignment))
    original = masters.cells(notebook)
    asked = {q.name: q for q in questions(submission.assignment[0])}
    mine: list[Cell] = []
    try:
        mine = read(submission)
    except ValueError as error:
        graded.notes.append(str(error))
    theirs = {cell.id for cell in original if cell.part in ("answer", "plot", "written")}
    graded.sources = {cell.id: cell.source for cell in mine if cell.id in theirs}
    # Decided by the master alone: whether an answer that names the library is refused.
    strict = not masters.library_allowed(notebook)
    with Sandbox(bounds, [masters.ASSIGNMENTS, *secret], submission.assignment[0]) as sandbox:
        run = Run(graded, asked, plan(mine, original) if mine else [], sandbox, strict)
        run.judge([cell for cell in original if cell.part in ("visible", "hidden")])
    for cell in original:
        if cell.part in ("plot", "written"):
            if cell.id in graded.sources:
                graded.marks.append(Mark(cell.id, "by hand", None, cell.points, "by hand"))
            else:
                sentence = f"the cell {cell.id} is not there: was it deleted?"
                graded.marks.append(Mark(cell.id, "by hand", 0.0, cell.points, "missing", sentence))
    return graded


def not_graded(submission: Submission, sentence: str) -> Graded:
    """Zero for every test, so that the submission is not missing from the lists."""
    cells = [cell for cell in masters.read_cells(masters.master(submission.assignment)) if cell.points]
    tests = [cell for cell in cells if cell.part in ("visible", "hidden")]
    marks = [Mark(cell.question, cell.part, 0.0, cell.points, "not graded", sentence) for cell in tests]
    marks += [Mark(c.id, "by hand", None, c.points, "by hand") for c in cells if c.part in ("plot", "written")]
    return Graded(submission, marks, [sentence])


class Run:
    """One submission in its sandbox. Where a cell or a test ends the process, a fresh one runs the rest without it.

    Args:
        graded: is given the marks, notes and pictures.
        asked: the questions by name.
        cells: what `svit_course.grading.submissions.plan` says.
        strict: refuse answers that name the library.
    """

    def __init__(
        self, graded: Graded, asked: dict[str, Question], cells: Sequence[Cell], sandbox: Sandbox, strict: bool
    ) -> None:
        self.graded, self.asked, self.sandbox, self.bounds = graded, asked, sandbox, sandbox.bounds
        self.cells = list(cells)
        self.failed: dict[str, tuple[str, str]] = {}  # cell to status and message
        self.until = time.monotonic() + self.bounds.total
        for cell in cells:
            if len(cell.source) > LONGEST:
                self._note(cell, "refused", f"it has more than {LONGEST:,} characters")
        for cell in cells:
            if strict and cell.part in ("answer", "own") and cell.id not in self.failed and borrows(cell.source):
                sentence = "it names svit_utils: the answer is to be written, not imported"
                self.failed[cell.id] = ("refused" if cell.part == "answer" else "not run", sentence)

    def judge(self, tests: Sequence[Cell]) -> None:
        """Add a mark for each of the master's tests."""
        ended: dict[str, str] = {}
        for test in tests:
            if not self.cells:
                status, message = "missing", "there is no code to run"
            elif test.question in ended:  # once is enough: every such end costs a new start
                status, message = ended[test.question], "not run, because the test before it was ended"
            else:
                status, message = self._test(test)
                if status in ENDS:
                    ended[test.question] = status
            marks = test.points if status == "ok" else 0.0
            self.graded.marks.append(Mark(test.question, test.part, marks, test.points, status, message))

    def _test(self, test: Cell) -> tuple[str, str]:
        """Status and message of one test of one question."""
        about = self.asked[test.question]
        cases = about.cases if test.part == "visible" else tuple(masters.hidden_cases(test))
        try:
            sandbox = self._ready()
        except Ended as ended:
            return ended.status, ended.message
        # An answer whose cell failed has no name to call, or an older one: the cell's own message says more.
        status, said = self.failed.get(test.question, ("", ""))
        if status in ("refused", *ENDS):
            return status, said
        until = time.monotonic() + self.bounds.seconds
        for case in cases:
            try:
                seconds = min(until, self.until) - time.monotonic()
                answer = sandbox.ask({"question": about.name, "case": dict(case)}, max(0.1, seconds))
            except Ended as ended:
                sentence = ended.message
                if ended.status == "time":  # of all cases together, not of what was left for this one
                    sentence = f"stopped after {self.bounds.seconds:g} seconds: an endless loop, or far too slow?"
                return ended.status, f"{about.name}, {case['what']}: {sentence}"
            if missing := answer.get("missing"):
                return self._missing(about, [str(name) for name in missing], answer.get("defined"), said)
            if refused := answer.get("refused"):
                return "refused", f"{about.name}, {case['what']}: {refused}"
            if error := answer.get("error"):
                return "wrong", f"{about.name}, {case['what']}: {error}"
            if wrong := answer.get("wrong"):
                return "wrong", wrong
            try:
                decide(about, case, answer.get("seen") or {})
            except Wrong as judged:
                return "wrong", str(judged)
        return "ok", ""

    def _missing(self, about: Question, names: list[str], defined: Any, said: str) -> tuple[str, str]:
        """Why the answer's names are not there: its cell failed and ``said`` so, is gone, or defines others."""
        if said:
            return "wrong", said
        if about.name not in self.graded.sources:
            where = f"the cell {about.name} is not there: was it deleted?"
        else:
            where = "was it renamed?"
            others = [str(name) for name in defined or [] if str(name) in self.graded.sources.get(about.name, "")]
            if others:
                where += f" The cell defines {', '.join(others[:3])}"
        return "missing", f"{about.name}: there is no {' and no '.join(names)}: {where}"

    def _ready(self) -> Sandbox:
        """The sandbox with the cells run; cells that ended a process are left out from then on.

        Raises:
            Ended: the submission's time is up.
        """
        while not self.sandbox.running:
            if time.monotonic() > self.until:
                raise Ended("time", f"the whole submission took more than {self.bounds.total:g} seconds")
            self.sandbox.start()
            self._run_cells()
        return self.sandbox

    def _run_cells(self) -> None:
        """Run the cells one after the other, until one of them ends the process."""
        for cell in self.cells:
            if time.monotonic() > self.until:
                self.sandbox.stop()
                return
            if self.failed.get(cell.id, ("",))[0] not in ("", "wrong"):
                continue
            message = {"cell": cell.id, "source": cell.source, "pictures": cell.part == "plot"}
            try:
                answer = self.sandbox.ask(message, min(self.bounds.cell, max(0.1, self.until - time.monotonic())))
            except Ended as ended:
                self._note(cell, ended.status, ended.message)
                return
            if refused := answer.get("refused"):
                self._note(cell, "refused", refused)
            elif problem := answer.get("error") or answer.get("wrong"):
                self._note(cell, "wrong", problem)
            elif cell.part == "plot":
                self.graded.pictures[cell.id] = list(pngs(self.sandbox.folder, answer.get("pictures")))

    def _note(self, cell: Cell, status: str, message: str) -> None:
        """Remember the first failure of a cell; of cells without a test it becomes a note for the student."""
        if cell.id in self.failed:
            return
        self.failed[cell.id] = (status, f"cell {cell.id}: {message}")
        if cell.part != "answer":
            self.graded.notes.append(f"cell {cell.id}: {message}")


def pngs(folder: Path, names: Any) -> Iterator[bytes]:
    """The pictures that the sandbox drew, three at most. It may have put anything there: only PNG files of sane size.

    Args:
        names: file names, as the sandbox gives them.
    """
    for name in list(names or [])[:3]:
        with contextlib.suppress(OSError, ValueError):
            # Neither following a link nor waiting for a pipe, even if one takes the file's place meanwhile.
            number = os.open(folder / Path(str(name)).name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(number, "rb") as file:
                about = os.fstat(number)
                data = file.read(4 * 2**20) if stat.S_ISREG(about.st_mode) else b""
                if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) == about.st_size:
                    yield data
