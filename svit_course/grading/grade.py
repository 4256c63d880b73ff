"""Grade a folder of submissions: ``make grade SUBMISSIONS=dir``. Marks as CSV, feedback as HTML.

A folder per student with notebooks somewhere below it, named as they were handed out; or notebooks named
``<student>_<assignment>.ipynb`` side by side. Each submission runs in a sandbox (`svit_course.sandbox.sandbox`), and what its
functions returned is judged here, outside of it: nothing that a submission can read knows the expected values.

What is marked by hand is listed in ``by_hand.csv``: fill in its column ``marks`` and grade again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svit_course import Question, Wrong, masters, notebooks, questions, stamp
from svit_course.masters import Cell
from svit_course.question import decide
from svit_course.sandbox import limits
from svit_course.sandbox.sandbox import Ended, Limits, Sandbox, close_all
from svit_utils.files import write_rows

COLUMNS = ("student", "assignment", "question", "test", "marks", "out_of", "status", "message")
BY_HAND = ("student", "assignment", "question", "marks", "out_of", "comment")
TOTALS = ("student", "assignment", "by_tests", "by_hand", "total", "out_of", "note")
MESSAGE = 2000  # characters of a message
LONGEST = 200_000  # characters of a cell
ENDS = ("time", "memory", "processes", "files", "crash")  # what ends a process
LARGEST = 20 * 2**20  # bytes of a notebook


@dataclass(frozen=True)
class Submission:
    student: str
    assignment: str  # the stem of its master
    path: Path


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


# ------------------------------------------------------------------------------------------------ what is handed in


def submissions(folder: Path, only: str | None = None) -> tuple[list[Submission], list[str]]:
    """The submissions in the folder, and a sentence for each notebook that is left out.

    Raises:
        ValueError: no such folder, or nothing in it that could be graded.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: make grade SUBMISSIONS=folder, with a folder per student in it")
    stems, found, strange = [path.stem for path in masters.masters()], [], []
    wanted = {masters.master(only).stem} if only else set(stems)
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).parts
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        stem = next((stem for stem in stems if path.stem.endswith(stem)), None)
        student = parts[0] if len(parts) > 1 else path.stem[: -len(stem)].rstrip("_- ") if stem else ""
        if stem is None or not student:
            strange.append(f"left out: {path.relative_to(folder)}: not the name of an assignment that was handed out")
        elif stem in wanted:
            found.append(Submission(student, stem, path))
    for place, several in _by_student(found).items():
        if len(several) > 1:
            newest = max(several, key=lambda s: s.path.stat().st_mtime)
            found = [s for s in found if s not in several or s == newest]
            which = newest.path.relative_to(folder)
            strange.append(f"{place[0]}: {len(several)} notebooks for {place[1]}; graded is {which}")
    if not found:
        raise ValueError(
            f"nothing to grade in {folder}: expected {folder}/<student>/{(sorted(wanted) or ['…'])[0]}.ipynb"
            + "".join(f"\n  {line}" for line in strange)
        )
    return found, strange


def _by_student(found: Sequence[Submission]) -> dict[tuple[str, str], list[Submission]]:
    grouped: dict[tuple[str, str], list[Submission]] = {}
    for submission in found:
        grouped.setdefault((submission.student, submission.assignment), []).append(submission)
    return grouped


def plan(mine: Sequence[Cell], original: Sequence[Cell]) -> list[Cell]:
    """The cells to run: the student's, in their order, with the master's code wherever code was given.

    Given cells that were deleted are put back where they were. Tests are left out: they are asked for later.
    """
    given = {cell.id: cell for cell in original if cell.part == "given"}
    known = {cell.id: cell for cell in original}
    cells = []
    for cell in mine:
        twin = known.get(cell.id)
        if twin is not None:
            cell = twin if twin.part == "given" else replace(cell, part=twin.part, tags=twin.tags)
        if cell.part in ("visible", "hidden", "written") or cell.id == stamp.SETUP_ID:
            continue
        cells.append(cell)
    present = {cell.id for cell in cells}
    place = 0
    for cell in original:
        if cell.id in given and cell.id not in present:
            cells.insert(place, cell)
            place += 1
        elif cell.id in present:
            place = next(i for i, c in enumerate(cells) if c.id == cell.id) + 1
    return list(masters.runnable(cells))


def borrows(source: str) -> bool:
    """Whether the code names `svit_utils`: the answer is to be written, not imported."""
    try:
        code = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        nodes = list(ast.walk(ast.parse("\n".join(code))))
    except (SyntaxError, ValueError):
        return False  # it will say so itself
    except (RecursionError, MemoryError):
        return "svit_utils" in source
    for node in nodes:
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        names += [getattr(node, "module", None) or "", getattr(node, "id", "")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.count(" "):
            names.append(node.value)
        if any(str(name).split(".")[0] == "svit_utils" for name in names):
            return True
    return False


# ------------------------------------------------------------------------------------------------ one submission


def grade(submission: Submission, bounds: Limits, secret: Sequence[Path] = ()) -> Graded:
    """Run a submission and judge it. Whatever it does ends as marks and messages."""
    graded = Graded(submission)
    notebook = notebooks.read(masters.master(submission.assignment))
    original = masters.cells(notebook)
    asked = {q.name: q for q in questions(submission.assignment[0])}
    mine: list[Cell] = []
    try:
        if submission.path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        mine = masters.read_cells(submission.path)
    except Exception as error:  # whatever a broken file makes nbformat raise
        graded.notes.append(f"the notebook cannot be read ({type(error).__name__}: {str(error)[:200]})")
    theirs = {cell.id for cell in original if cell.part in ("answer", "plot", "written")}
    graded.sources = {cell.id: cell.source for cell in mine if cell.id in theirs}
    # Decided by the master alone: whether an answer that names the library is refused.
    strict = not masters.library_allowed(notebook)
    with Sandbox(bounds, [masters.ASSIGNMENTS, *secret], submission.assignment[0]) as sandbox:
        run = _Run(graded, asked, plan(mine, original) if mine else [], sandbox, strict)
        run.all([cell for cell in original if cell.part in ("visible", "hidden")])
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


class _Run:
    """The course of one grading: restarts where a step ended the process, and leaves that step out."""

    def __init__(
        self,
        graded: Graded,
        asked: dict[str, Question],
        cells: Sequence[Cell],
        sandbox: Sandbox,
        strict: bool,
    ) -> None:
        self.graded, self.asked, self.sandbox, self.bounds = graded, asked, sandbox, sandbox.bounds
        self.cells, self.failed = list(cells), {}  # type: list[Cell], dict[str, tuple[str, str]]
        self.until = time.monotonic() + self.bounds.total
        for cell in cells:
            if len(cell.source) > LONGEST:
                self.note(cell, "refused", f"it has more than {LONGEST:,} characters")
        for cell in cells:
            if strict and cell.part in ("answer", "own") and cell.id not in self.failed and borrows(cell.source):
                sentence = "it names svit_utils: the answer is to be written, not imported"
                self.failed[cell.id] = ("refused" if cell.part == "answer" else "not run", sentence)

    def all(self, tests: Sequence[Cell]) -> None:
        ended: dict[str, str] = {}
        for test in tests:
            if not self.cells:
                status, message = "missing", "there is no code to run"
            elif test.question in ended:  # once is enough: every such end costs a new start
                status, message = ended[test.question], "not run, because the test before it was ended"
            else:
                status, message = self.test(test)
                if status in ENDS:
                    ended[test.question] = status
            marks = test.points if status == "ok" else 0.0
            self.graded.marks.append(Mark(test.question, test.part, marks, test.points, status, message))

    def test(self, test: Cell) -> tuple[str, str]:
        """Status and message of one test of one question."""
        about = self.asked[test.question]
        cases = about.cases if test.part == "visible" else tuple(masters.hidden_cases(test))
        try:
            sandbox = self.ready()
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
            refused = answer.get("refused")
            if missing := answer.get("missing"):
                return self.missing(about, [str(name) for name in missing], answer.get("defined"), said)
            if refused:
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

    def missing(self, about: Question, names: list[str], defined: Any, said: str) -> tuple[str, str]:
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

    def ready(self) -> Sandbox:
        """The sandbox with the cells run; cells that ended a process are left out from then on.

        Raises:
            Ended: the submission's time is up.
        """
        while not self.sandbox.running:
            if time.monotonic() > self.until:
                raise Ended("time", f"the whole submission took more than {self.bounds.total:g} seconds")
            self.sandbox.start()
            self.run_cells()
        return self.sandbox

    def run_cells(self) -> None:
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
                self.note(cell, ended.status, ended.message)
                return
            if refused := answer.get("refused"):
                self.note(cell, "refused", refused)
            elif problem := answer.get("error") or answer.get("wrong"):
                self.note(cell, "wrong", problem)
            elif cell.part == "plot":
                self.graded.pictures[cell.id] = list(_pngs(self.sandbox.folder, answer.get("pictures")))

    def note(self, cell: Cell, status: str, message: str) -> None:
        if cell.id in self.failed:
            return
        self.failed[cell.id] = (status, f"cell {cell.id}: {message}")
        if cell.part != "answer":
            self.graded.notes.append(f"cell {cell.id}: {message}")


def _pngs(folder: Path, names: Any) -> Iterator[bytes]:
    """The pictures that the sandbox drew. It may have put anything there: only PNG files of sane size are taken."""
    for name in list(names or [])[:3]:
        with contextlib.suppress(OSError, ValueError):
            # Neither following a link nor waiting for a pipe, even if one takes the file's place meanwhile.
            number = os.open(folder / Path(str(name)).name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(number, "rb") as file:
                about = os.fstat(number)
                data = file.read(4 * 2**20) if stat.S_ISREG(about.st_mode) else b""
                if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) == about.st_size:
                    yield data


# ------------------------------------------------------------------------------------------------ the reports


def marks_by_hand(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """What the lecturer has entered, by student, assignment and question.

    Raises:
        ValueError: columns are missing, or a mark is no number, or out of range.
    """
    if not path.is_file():
        return {}
    found = {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            reader = csv.DictReader(file)
            lines = list(reader)
            missing = [name for name in BY_HAND if name not in (reader.fieldnames or ())]
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]}; its columns are {', '.join(BY_HAND)}, with commas between"
        )
    for number, line in enumerate(lines, 2):
        row = {name: _honest(line[name] or "") for name in BY_HAND}
        if text := row["marks"].strip().replace(",", "."):
            try:
                inside = 0 <= float(text) <= float(row["out_of"])
            except ValueError:
                inside = False
            if not inside:
                raise ValueError(f"{path}, line {number}: marks are a number from 0 to {row['out_of']}, not {text!r}")
            row["marks"] = text
        found[row["student"], row["assignment"], row["question"]] = row
    return found


def write_reports(everything: Sequence[Graded], out: Path) -> Path:
    """marks.csv, by_hand.csv, totals.csv and the feedback; a file appears whole or not at all.

    Lines of submissions that are not graded this time stay.
    """
    from svit_course.grading.feedback import write_feedback

    out.mkdir(parents=True, exist_ok=True)
    hand = marks_by_hand(out / "by_hand.csv")
    graded_now = {(_writable(g.submission.student), g.submission.assignment) for g in everything}
    lines, totals = (
        [r for r in _rows(out / name) if _who(r) not in graded_now] for name in ("marks.csv", "totals.csv")
    )
    for graded in everything:
        who = {"student": _writable(graded.submission.student), "assignment": graded.submission.assignment}
        by_tests = by_hand = out_of = 0.0
        open_questions = []
        for index, mark in enumerate(graded.marks):
            if mark.status == "by hand":
                new = {**who, "question": mark.question, "marks": "", "out_of": _number(mark.out_of), "comment": ""}
                row = hand.setdefault((who["student"], who["assignment"], mark.question), new)
                if row["marks"]:
                    mark = replace(mark, marks=float(row["marks"]), status="marked", message=row["comment"])
                else:
                    open_questions.append(mark.question)
            mark = graded.marks[index] = replace(mark, message=_harmless(mark.message))
            out_of += mark.out_of
            if mark.test == "by hand":
                by_hand += mark.marks or 0
            else:
                by_tests += mark.marks or 0
            about = {"question": mark.question, "test": mark.test, "status": mark.status, "message": mark.message}
            shown = "" if mark.marks is None else _number(mark.marks)
            lines.append({**who, **about, "marks": shown, "out_of": _number(mark.out_of)})
        graded.notes = [_harmless(note) for note in graded.notes[:20]]
        notes = [f"to mark by hand: {', '.join(open_questions)}"] if open_questions else []
        counted = {"by_tests": by_tests, "by_hand": by_hand, "total": by_tests + by_hand, "out_of": out_of}
        note = "; ".join(notes + graded.notes)
        totals.append({**who, **{key: _number(value) for key, value in counted.items()}, "note": note})
    _write(out / "marks.csv", COLUMNS, lines)
    _write(out / "by_hand.csv", BY_HAND, list(hand.values()))
    _write(out / "totals.csv", TOTALS, totals)
    for graded in everything:
        try:
            write_feedback(graded, out / "feedback")
        except Exception as error:  # one page that cannot be written must not cost the others theirs
            print(f"  no feedback for {_writable(graded.submission.student)}: {error}", file=sys.stderr)
    return out


def _rows(path: Path) -> list[dict[str, str]]:
    """The lines of a report of an earlier run."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return [{key: _honest(value or "") for key, value in row.items() if key} for row in csv.DictReader(file)]


def _who(row: dict[str, str]) -> tuple[str, str]:
    return row.get("student", ""), row.get("assignment", "")


def _number(value: float) -> str:
    return f"{value:g}"


def _harmless(text: str) -> str:
    """A cell of sane length that a spreadsheet does not take for a formula."""
    text = " ".join(_writable(text).split())
    text = f"{text[:MESSAGE]} …" if len(text) > MESSAGE else text
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _honest(text: str) -> str:
    """What `_harmless` was given, as far as names and comments go."""
    return text[1:] if text[:2] in ("'=", "'+", "'-", "'@") else text


def _writable(text: str) -> str:
    """Half characters, which Python has and files have not, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    write_rows(path, columns, ({name: _harmless(str(row.get(name, ""))) for name in columns} for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Grade a folder of submissions.")
    parser.add_argument("submissions", type=Path, help="a folder per student")
    parser.add_argument("--out", type=Path, default=notebooks.ROOT / "build" / "grades", help="default: build/grades")
    parser.add_argument("--assignment", help="only this one, for example b")
    parser.add_argument("--jobs", type=int, default=2, help="submissions at a time (default: 2)")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="of a test (default: %(default)g)")
    parser.add_argument("--cell", type=float, default=Limits.cell, help="seconds of a cell (default: %(default)g)")
    parser.add_argument(
        "--total", type=float, default=Limits.total, help="seconds of a submission (default: %(default)g)"
    )
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of resident memory (default: %(default)g)")
    options = parser.parse_args(argv)
    if min(options.jobs, options.seconds, options.cell, options.total, options.memory) <= 0:
        parser.error("jobs, seconds, cell, total and memory must be positive")
    try:
        marks_by_hand(options.out / "by_hand.csv")  # before an hour of grading, not after
        found, strange = submissions(options.submissions, options.assignment)
    except (ValueError, LookupError) as error:
        print(f"make grade: {error}", file=sys.stderr)
        return 2
    bounds = Limits(options.seconds, options.cell, options.total, int(options.memory * 2**30))
    print(f"{len(found)} submissions; each: {bounds.seconds:g} s a test, {options.memory:g} GiB; {limits.in_words()}")
    for line in strange:
        print(f"  {line}")
    secret = [
        options.submissions.resolve(),
        notebooks.ROOT / "tests",
        notebooks.ROOT / "build",
        notebooks.ROOT / "tools",
    ]

    def one(submission: Submission) -> Graded:
        try:
            graded = grade(submission, bounds, secret)
        except Exception as error:  # the grader's own fault must not cost the others their marks
            graded = not_graded(submission, f"not graded: {type(error).__name__}: {error}")
        marks = sum(mark.marks or 0 for mark in graded.marks if mark.test != "by hand")
        best = sum(mark.out_of for mark in graded.marks if mark.test != "by hand")
        print(f"  {_writable(submission.student)}, {submission.assignment}: {marks:g} of {best:g} by tests", flush=True)
        return graded

    def stopped(number: int, _frame: object) -> None:
        close_all()
        os._exit(128 + number)

    before = {number: signal.signal(number, stopped) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            everything = list(pool.map(one, found))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    write_reports(everything, options.out)
    print(f"Marks: {options.out}/marks.csv and totals.csv. By hand: by_hand.csv. Feedback: {options.out}/feedback/")
    return 1 if any(mark.status == "not graded" for graded in everything for mark in graded.marks) else 0


if __name__ == "__main__":
    sys.exit(main())
