"""What was handed in: find the notebooks, and whose they are."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from svit_course import masters

LARGEST = 512 * 2**20  # bytes of a notebook, outputs included: they are left out before anything else looks at them
NAME, BYTES = 100, 240  # characters and bytes of a student's name, which becomes that of a folder
NOT_ITS_NAME = "not the name of an assignment that was handed out"
JOINERS = "\u200c\u200d"  # of some scripts' letters and of emoji: not printable, and harmless


@dataclass(frozen=True)
class Submission:
    """A student's notebook.

    ``student``: as in every table, see `canonical`; ``assignment``: the file name of its master, without ``.ipynb``;
    ``note``: what the tables say of how it was found.
    """

    student: str
    assignment: str
    path: Path
    note: str = ""


# What browsers, file managers and JupyterLab append to the name of a copy: " (1)", "-Copy1", " copy", " - Copy (2)".
_COPY = re.compile(r"(?:\s*\(\d+\)|[ _-]+(?:copy|kopie|copie|copia)(?:[ _-]?\d+)?)+$", re.IGNORECASE)


def _notebooks(folder: Path, stems: Sequence[str]) -> Iterator[tuple[Path, str, str]]:
    """Each notebook in a folder, whose it is and which assignment: "" where its name does not say."""
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).parts
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        name = _COPY.sub("", path.stem)
        stem = next((stem for stem in stems if name.endswith(stem)), "")
        yield path, parts[0] if len(parts) > 1 else name[: len(name) - len(stem)].rstrip("_- ") if stem else "", stem


def left_out(folder: Path) -> list[tuple[str, str]]:
    """(student, file) of each notebook in a folder that has not the name of an assignment."""
    if not folder.is_dir():
        return []
    found = _notebooks(folder, [path.stem for path in masters.masters()])
    return [
        (canonical(student or path.stem), path.relative_to(folder).as_posix())
        for path, student, stem in found
        if not stem or not student
    ]


def find(folder: Path, only: str | None = None) -> tuple[list[Submission], list[str]]:
    """The submissions in a folder, and a sentence for each notebook that is left out.

    A notebook in the place of the folder is one submission, see `alone`.

    Looked for: a folder per student with notebooks somewhere below it, named as they were handed out; or notebooks
    named ``<student>_<assignment>.ipynb`` side by side. Of several for one student and assignment the newest counts.

    Args:
        only: ``"b"``: this assignment alone.

    Raises:
        ValueError: no such folder, or nothing in it that could be graded.
        LookupError: no such assignment.
    """
    if folder.is_file():
        return [alone(folder, only)], []
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: make grade SUBMISSIONS=folder, with a folder per student in it")
    stems, found, strange = [path.stem for path in masters.masters()], [], []
    wanted = {masters.master(only).stem} if only else set(stems)
    for path, student, stem in _notebooks(folder, stems):
        if not stem or not student:
            strange.append(f"left out: {path.relative_to(folder)}: {NOT_ITS_NAME}")
        elif stem in wanted:
            found.append(Submission(student, stem, path))
    found = _with_keys(found, strange)
    for (student, stem), several in _by_student(found).items():
        if len(several) > 1:
            newest = max(several, key=lambda s: s.path.stat().st_mtime)
            which = newest.path.relative_to(folder)
            noted = replace(newest, note=f"{len(several)} notebooks were handed in; graded is the newest, {which}")
            found = [noted if s == newest else s for s in found if s not in several or s == newest]
            strange.append(f"{student}: {len(several)} notebooks for {stem}; graded is {which}")
    if not found:
        raise ValueError(
            f"nothing to grade in {folder}: expected {folder}/<student>/{(sorted(wanted) or ['…'])[0]}.ipynb"
            + "".join(f"\n  {line}" for line in strange)
        )
    return found, strange


def alone(path: Path, only: str | None = None) -> Submission:
    """One notebook, whatever its name: the assignment is that of most of its cells. The reader is called as the file.

    Raises:
        ValueError: it cannot be told.
        LookupError: no such assignment.
    """
    names = re.findall(rb'"(?:id|grade_id)": *"([a-z])[0-9]+(?:-visible)?"', contents(path))
    letter = only or (Counter(names).most_common(1)[0][0].decode() if names else "")
    if not letter:
        raise ValueError(f"{path}: of which assignment is it? Its cells do not say; name it: --assignment a")
    return Submission(canonical(path.stem), masters.master(letter).stem, path)


def _by_student(found: Sequence[Submission]) -> dict[tuple[str, str], list[Submission]]:
    grouped: dict[tuple[str, str], list[Submission]] = {}
    for submission in found:
        grouped.setdefault((submission.student, submission.assignment), []).append(submission)
    return grouped


def canonical(name: str) -> str:
    """One way to write a name, whatever file system, spreadsheet or terminal it has been through.

    Composed letters, single spaces, and escapes in the place of what cannot be printed.
    """
    spaced = " ".join(unicodedata.normalize("NFC", name).split())
    shown = "".join(c if c.isprintable() or c in JOINERS else ascii(c)[1:-1] for c in spaced)
    short = shown[:NAME].encode("utf-8", "backslashreplace")[:BYTES].decode("utf-8", "ignore")
    return short.strip() or "unnamed"


def _with_keys(found: Sequence[Submission], strange: list[str]) -> list[Submission]:
    """The submissions under canonical names. Folders whose names come out the same stay two students."""
    keys: dict[str, str] = {}
    for name in dict.fromkeys(submission.student for submission in found):
        key, number = canonical(name), 1
        while key in keys.values():
            number += 1
            key = f"{canonical(name)} ({number})"
        if number > 1:
            strange.append(f"{canonical(name)}: {number} folders have this name; the last of them is graded as {key}")
        keys[name] = key
    return [replace(submission, student=keys[submission.student]) for submission in found]


def contents(path: Path) -> bytes:
    """The bytes of a notebook. Neither a link is followed nor a pipe waited for.

    Raises:
        ValueError: it is no file, or too large.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("the notebook cannot be read: it is no file")
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"the notebook cannot be read: larger than {LARGEST >> 20} MiB")
    return data
