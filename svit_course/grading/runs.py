"""Run one submission in a sandbox and have it judged in another.

Its functions are called in the first; what they return goes to the second unread. Marks and verdicts never enter the
first, and a hidden case enters it when it is asked: last of all, and after it nothing is quoted any more that the
submission has said.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svit_course import Question, masters, questions
from svit_course.grading import probes
from svit_course.grading.submissions import Submission, contents
from svit_course.masters import Cell
from svit_course.sandbox.sandbox import Ended, Limits, Sandbox

ENDS = ("time", "memory", "processes", "files", "crash")  # statuses that have ended a process
TESTS = ("visible", "hidden")
NO_CODE = "there is no code to run"
JUDGING = 120.0  # seconds of processor time, of all that a submission returns
PICTURE, PICTURES = 4 * 2**20, 3  # bytes of a figure; figures of a question
# Of a hidden case, in place of what the submission had to do with: an exit status, or how far it went.
HIDDEN_END = {
    "time": "it takes too long",
    "memory": "it takes too much memory",
    "processes": "it starts too many processes",
    "files": "it writes too many files",
    "crash": "the process ended",
}


@dataclass(frozen=True)
class Mark:
    """A line of marks.csv.

    ``status``: ok, wrong, missing, refused, one of `ENDS`, not graded, or by hand; marked or overridden where people
    have entered it, ``marker`` by name.
    """

    question: str
    test: str
    marks: float | None
    out_of: float
    status: str
    message: str = ""
    marker: str = ""


@dataclass
class Graded:
    """A submission's marks, and what the feedback shows.

    ``sources``: of the answers; ``own``: of all other cells that were run, by the number of the cell; ``flags``: what
    a human should look at, cell by cell; ``origin``: which cell last gave a name its value; ``pictures``: PNG files;
    ``printed``: by the cells of plots;
    ``slow``: the clock has ended something.
    """

    submission: Submission
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, list[bytes]] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    slow: bool = False


class Judge:
    """The sandbox in which notebooks are read and answers are judged, for all submissions, one at a time."""

    def __init__(self, hide: Sequence[Path] = (), trusted: bool = False) -> None:
        self._sandbox = Sandbox("judge", Limits(total=float("inf")), {}, hide, trusted)
        self._turn = threading.Lock()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.close()

    def ask(
        self, message: dict[str, Any], data: bytes = b"", spent: dict[str, float] | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """See `svit_course.grading.judge`.

        Args:
            spent: the seconds that a submission has had of it: read and added to.

        Raises:
            Ended: what was handed to it is more than it can bear.
        """
        spent = {} if spent is None else spent
        with self._turn:
            if not self._sandbox.running:
                self._sandbox.start()
            begun = self._sandbox.used()
            try:
                return self._sandbox.ask(message, data, max(1.0, JUDGING - spent.get("judging", 0.0)))
            finally:
                spent["judging"] = spent.get("judging", 0.0) + self._sandbox.used() - begun


def grade(
    submission: Submission, bounds: Limits, judge: Judge, hide: Sequence[Path] = (), trusted: bool = False
) -> Graded:
    """Run a submission and have it judged. Whatever it does ends as marks and messages.

    Args:
        hide: folders that it must not see, besides the repository.
        trusted: run it without a sandbox.
    """
    setup = {"probes": probes.sources(submission.assignment[0])}
    with Sandbox("student", bounds, setup, hide, trusted) as sandbox:
        return grade_in(sandbox, submission, judge)


def grade_in(sandbox: Sandbox, submission: Submission, judge: Judge) -> Graded:
    """`grade`, in a sandbox that is there."""
    graded, letter = Graded(submission), submission.assignment[0]
    cells: list[dict[str, str]] = []
    try:
        answer, data = judge.ask({"read": letter}, contents(submission.path))
        if problem := answer.get("wrong"):
            raise ValueError(problem)
        found = json.loads(data)
        cells, graded.notes = found["cells"], found["notes"]
    except Ended as ended:
        graded.notes.append(f"the notebook cannot be read: {ended.message}")
    except (ValueError, OSError) as error:
        graded.notes.append(str(error))
    for cell in cells:
        if cell["part"] in ("answer", "plot", "written"):
            before = graded.sources.get(cell["id"])
            graded.sources[cell["id"]] = cell["source"] if before is None else f"{before}\n\n{cell['source']}"
        elif cell["part"] == "own":
            graded.own[cell["id"]] = cell["source"]
        if cell.get("flags"):
            graded.flags.append(f"{cell['id'] if cell['part'] == 'answer' else 'cell ' + cell['id']}: {cell['flags']}")
    original = masters.read_cells(masters.master(letter))
    run = Run(graded, [cell for cell in cells if cell["part"] != "written"], sandbox, judge)
    run.judge([cell for cell in original if cell.part in TESTS])
    if run.cells:
        from svit_course.grading.follow import follow_through  # it runs cells as this module does

        follow_through(graded, run.cells, sandbox, judge, original)
    for asked in original:
        if asked.part in ("plot", "written"):
            if asked.id in graded.sources:
                _, stopped = run.failed.get(asked.id, ("", ""))
                graded.marks.append(Mark(asked.id, "by hand", None, asked.points, "by hand", stopped))
            else:
                sentence = f"the cell {asked.id} is not there: was it deleted?"
                graded.marks.append(Mark(asked.id, "by hand", 0.0, asked.points, "missing", sentence))
    return graded


def not_graded(submission: Submission, sentence: str) -> Graded:
    """Zero for every test, so that the submission is not missing from the lists."""
    cells = [cell for cell in masters.read_cells(masters.master(submission.assignment)) if cell.points]
    tests = [cell for cell in cells if cell.part in TESTS]
    marks = [Mark(cell.question, cell.part, 0.0, cell.points, "not graded", sentence) for cell in tests]
    marks += [Mark(c.id, "by hand", None, c.points, "by hand") for c in cells if c.part in ("plot", "written")]
    return Graded(submission, marks, [sentence])


class Run:
    """One submission in its sandbox. Where a cell or a test ends the process, a fresh one runs the rest without it.

    Args:
        graded: is given the marks, notes and pictures.
        cells: what `svit_course.grading.reading.read` says.
        quoting: whether the messages may quote what the submission says.
    """

    def __init__(
        self, graded: Graded, cells: Sequence[dict[str, str]], sandbox: Sandbox, judge: Judge, quoting: bool = True
    ) -> None:
        self.graded, self.sandbox, self.bounds, self._judge = graded, sandbox, sandbox.bounds, judge
        self.cells = list(cells)
        self.asked = {q.name: q for q in questions(graded.submission.assignment[0])}
        self.failed: dict[str, tuple[str, str]] = {}  # a cell, or the question that it answers: status and message
        self.done: set[int] = set()  # plots that were drawn
        self.quoting = quoting  # until the first hidden case
        self.fresh = False  # nothing was asked since the cells were run
        self.spent: dict[str, float] = {}
        for cell in cells:
            if refused := cell["refused"]:
                self._note(cell, "refused" if cell["part"] == "answer" else "not run", refused)

    def judge(self, tests: Sequence[Cell]) -> None:
        """Add a mark for each of the master's tests, in their order; those with hidden cases are asked last."""
        ended: dict[str, str] = {}
        marks: dict[str, Mark] = {}
        for test in sorted(tests, key=lambda cell: cell.part == "hidden"):
            if not self.cells:
                status, message = "missing", NO_CODE
            elif test.question in ended:  # once is enough: every such end costs a new start
                status, message = ended[test.question], "not run, because the test before it was ended"
            else:
                status, message = self.test(test)
                if status in ENDS:
                    ended[test.question] = status
            got = test.points if status == "ok" else 0.0
            marks[test.id] = Mark(test.question, test.part, got, test.points, status, message)
        self.graded.marks += [marks[test.id] for test in tests]

    def test(self, test: Cell) -> tuple[str, str]:
        """Status and message of one test of one question.

        What ends a process in which others were asked before is asked again in a fresh one: it may be their doing.
        """
        status, message, slow = "", "", self.graded.slow
        while True:
            try:
                self._ready()
            except Ended as ended:
                return (status, message) if status else (ended.status, ended.message)
            # An answer whose cell failed has no name to call, or an older one: the cell's own message says more.
            failed, said = self.failed.get(test.question, ("", ""))
            if failed in ("refused", *ENDS):
                return failed, said
            alone, self.graded.slow = self.fresh, slow
            status, message = self._cases(test, said)
            if status not in ENDS or alone or self.sandbox.running:
                return status, message

    def _cases(self, test: Cell, said: str) -> tuple[str, str]:
        """`test`, in the process that is there; ``said``: how the answer's cell failed."""
        about, hidden = self.asked[test.question], test.part == "hidden"
        cases, sandbox = masters.hidden_cases(test) if hidden else about.cases, self.sandbox
        begun = sandbox.used()
        for number, case in enumerate(cases):
            what = f"{about.name}, {case['what']}: "
            place = {"question": about.name, "hidden": hidden, "number": number, "quiet": hidden or not self.quoting}
            try:
                _, sent = self._judge.ask({"prepare": "", **place})
                self.quoting, self.fresh = self.quoting and not hidden, False
                left = self.bounds.seconds - (sandbox.used() - begun)
                asked = {"question": about.name, "answers": about.answers}
                answer, seen = sandbox.ask(asked, sent, max(0.1, left))
            except Ended as ended:
                self.graded.slow |= ended.by_clock
                sentence = ended.message
                if ended.status == "time" and not ended.by_clock:  # of all cases, not of what was left for this one
                    sentence = f"stopped after {self.bounds.seconds:g} seconds: an endless loop, or far too slow?"
                return ended.status, what + (HIDDEN_END[ended.status] if place["quiet"] else sentence)
            if missing := answer.get("missing"):
                return self._missing(about, [name for name in about.answers if name in missing], answer, said)
            if self.quoting:
                self.graded.origin.update(zip(about.answers, map(str, answer.get("origin", ()))))
            if wrong := self._verdict(place, answer, seen):
                return "wrong", wrong if wrong.startswith(what) else what + wrong
        return "ok", ""

    def _verdict(self, place: dict[str, Any], answer: dict[str, Any], seen: bytes) -> str:
        """What is wrong; "" if nothing is. Of a hidden case only in words of ours."""
        said = answer.get("wrong") or answer.get("error")
        try:
            if said and place["quiet"]:
                return str(self._judge.ask({"raised": said, **place}, spent=self.spent)[0].get("wrong", "it stops"))
            return said or str(self._judge.ask(place, seen, self.spent)[0].get("wrong", ""))
        except Ended as ended:
            self.graded.slow |= ended.by_clock
            return f"what it returns cannot be judged: {ended.message}"

    def _missing(self, about: Question, names: list[str], answer: dict[str, Any], said: str) -> tuple[str, str]:
        """Why the answer's names are not there: its cell failed and ``said`` so, is gone, or defines others."""
        if said:
            return "wrong", said
        if about.name not in self.graded.sources:
            where = f"the cell {about.name} is not there: was it deleted?"
        else:
            where = "was it renamed?"
            others = [str(n) for n in answer.get("defined", ()) if str(n) in self.graded.sources.get(about.name, "")]
            if others and self.quoting:
                where += f" The cell defines {', '.join(others[:3])}"
        return "missing", f"{about.name}: there is no {' and no '.join(names)}: {where}"

    def _ready(self) -> Sandbox:
        """The sandbox with the cells run; cells that ended a process are left out from then on.

        A test that has left little room to others, or something that runs, is followed by a fresh process.

        Raises:
            Ended: the submission's time is up.
        """
        if self.sandbox.running and not self.fresh and self.sandbox.crowded():
            self.sandbox.stop()
        while not self.sandbox.running:
            if over := self.sandbox.over():
                raise Ended("time", over)
            self.sandbox.start()
            self._run_cells()
        return self.sandbox

    def _run_cells(self) -> None:
        """Run the cells one after the other, until one of them ends the process.

        No answer is called in a process that has drawn plots: they may use the library.
        """
        drawn = len(self.done)
        for number, cell in enumerate(self.cells):
            if self.failed.get(str(number), ("",))[0] not in ("", "wrong") or number in self.done:
                continue
            plot = cell["part"] == "plot"
            message = {"cell": cell["id"], "plot": plot}
            try:
                answer, data = self.sandbox.ask(
                    message, cell["source"].encode("utf-8", "surrogatepass"), self.bounds.cell
                )
            except Ended as ended:
                self.graded.slow |= ended.by_clock
                self._note(cell, ended.status, ended.message)
                return
            if self.sandbox.full():
                self._note(cell, "files", f"it wrote so much that of {self.bounds.files >> 20} MiB nothing is left")
                self.sandbox.stop()
            if problem := answer.get("error") or answer.get("wrong"):
                self._note(cell, "wrong", problem)
            if plot and self.quoting:
                kept = self.graded.pictures.setdefault(cell["id"], [])
                kept += list(pngs(data))[: PICTURES - len(kept)]
                self.graded.printed[cell["id"]] = str(answer.get("printed", ""))
            if plot:
                self.done.add(number)
            if not self.sandbox.running:
                return
        if len(self.done) > drawn:
            self.sandbox.stop()
        else:
            self.sandbox.settle()
            self.fresh = True

    def _note(self, cell: dict[str, str], status: str, message: str) -> None:
        """Remember the first failure of a cell; of cells without a test it becomes a note for the student."""
        number = str(next(n for n, other in enumerate(self.cells) if other is cell))
        if number in self.failed:
            return
        if not self.quoting:
            message = "it failed when the cells were run again"
        self.failed[number] = (status, f"cell {cell['id']}: {message}")
        if cell["part"] in ("answer", "plot"):
            self.failed.setdefault(cell["id"], self.failed[number])
        if cell["part"] != "answer":
            self.graded.notes.append(f"cell {cell['id']}: {message}")


def pngs(data: bytes) -> Iterator[bytes]:
    """The pictures that the sandbox drew, three at most. It may have sent anything: only PNG files of sane size."""
    for line in data.split(b"\n", PICTURES)[:PICTURES]:
        try:
            picture = base64.b64decode(line, validate=True)
        except ValueError:
            continue
        if picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) <= PICTURE:
            yield picture
