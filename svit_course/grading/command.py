"""Grade submissions: ``make grade SUBMISSIONS=dir``, or ``python -m svit_course grade dir``, or ``... my_a.ipynb``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from svit_course import notebooks
from svit_course.grading.hand import marks_by_hand
from svit_course.grading.reports import write_left_out, write_reports
from svit_course.grading.runs import Graded, Judge, grade, not_graded
from svit_course.grading.submissions import Submission, find, left_out
from svit_course.grading.tables import writable
from svit_course.sandbox import fence
from svit_course.sandbox.sandbox import WALL, Limits

TRUSTED = (
    "NO SANDBOX: every submission runs with your own rights. It can read and change your files, use the network, and "
    "see the masters. Grade people whom you trust, or as a user who owns nothing else."
)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    whole = argparse.ArgumentParser(
        prog="python -m svit_course grade",
        description="Grade a folder of submissions, or one notebook: marks as CSV, feedback as HTML.",
    )
    whole.add_argument("submissions", type=Path, help="a folder per student; or one notebook")
    whole.add_argument("--out", type=Path, default=notebooks.ROOT / "build" / "grades", help="default: build/grades")
    whole.add_argument("--assignment", help="only this one, for example b")
    whole.add_argument("--jobs", type=int, default=2, help="submissions at a time (default: 2)")
    for name, default, what in (
        ("seconds", Limits.seconds, "of processor time, of a test"),
        ("cell", Limits.cell, "the same, of a cell"),
        ("total", Limits.total, "the same, of a submission"),
        ("memory", 2.0, "GiB of resident memory"),
    ):
        whole.add_argument(f"--{name}", type=float, default=default, help=f"{what} (default: %(default)g)")
    whole.add_argument("--trust", action="store_true", help="run without a sandbox, with your own rights")
    return whole


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, checked."""
    options = parser().parse_args(argv)
    if min(options.jobs, options.seconds, options.cell, options.total, options.memory) <= 0:
        parser().error("jobs, seconds, cell, total and memory must be positive")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Grade and write the reports. 0; 1 where a submission could not be graded; 2 where nothing could be."""
    options = parse(argv)
    try:
        if not options.trust:
            fence.bubblewrap()
        marks_by_hand(options.out / "by_hand.csv")  # before an hour of grading, not after
        found, strange = find(options.submissions, options.assignment)
    except fence.NoSandbox as error:
        print(f"make grade: {error}. Grading without a sandbox, for people whom you trust: --trust", file=sys.stderr)
        return 2
    except (ValueError, LookupError) as error:
        print(f"make grade: {writable(str(error))}", file=sys.stderr)
        return 2
    bounds = Limits(options.seconds, options.cell, options.total, int(options.memory * 2**30))
    how = TRUSTED if options.trust else f"in bubblewrap{', in a cgroup each' if fence.group() else ''}"
    print(f"{len(found)} submissions; each: {bounds.seconds:g} s a test, {options.memory:g} GiB; {how}")
    for line in strange:
        print(f"  {writable(line)}")
    hide = [options.out.resolve(), *([options.submissions.resolve()] if options.submissions.is_dir() else [])]
    options.out.mkdir(parents=True, exist_ok=True)
    write_left_out(left_out(options.submissions), options.out)
    writing = threading.Lock()

    def one(submission: Submission) -> Graded:
        try:
            graded = grade(submission, bounds, judge, hide, options.trust)
        except Exception as error:  # the grader's own fault must not cost the others their marks
            graded = not_graded(submission, f"not graded: {type(error).__name__}: {error}")
        if submission.note:
            graded.notes.insert(0, submission.note)
        marks = sum(mark.marks or 0 for mark in graded.marks if mark.test != "by hand")
        best = sum(mark.out_of for mark in graded.marks if mark.test != "by hand")
        with writing:
            write_reports([graded], options.out)
            print(
                f"  {writable(submission.student)}, {submission.assignment}: {marks:g} of {best:g} by tests", flush=True
            )
        return graded

    with Judge(hide, options.trust) as judge:
        everything = side_by_side(one, found, options.jobs)
        if slow := [graded.submission for graded in everything if graded.slow]:
            print(f"Again, one at a time, because they were not done after {WALL} times their seconds:")
            again = {graded.submission: graded for graded in side_by_side(one, slow, 1)}
            everything = [again.get(graded.submission, graded) for graded in everything]
    if options.submissions.is_file():
        for mark in everything[0].marks:
            got = "by hand" if mark.marks is None else f"{mark.marks:g} of {mark.out_of:g}"
            print(f"    {mark.question} {mark.test}: {got}{f' ({writable(mark.message)})' if mark.message else ''}")
    print(f"Marks: {options.out}/marks.csv and totals.csv. By hand: by_hand.csv. Feedback: {options.out}/feedback/")
    return 1 if any(mark.status == "not graded" for graded in everything for mark in graded.marks) else 0


def side_by_side(one: Callable[[Submission], Graded], found: Sequence[Submission], jobs: int) -> list[Graded]:
    """``one`` of each submission, ``jobs`` at a time. Ctrl-C ends at once: what is finished is written already."""
    if threading.current_thread() is not threading.main_thread():
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, found))
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # The sandboxes die with this process.
    before = {number: signal.signal(number, lambda n, _frame: os._exit(128 + n)) for number in numbers}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, found))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
