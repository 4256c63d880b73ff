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
NOT_ITS_NAME = "not the name of an assignment that was handed out, nor its cells"
NOBODYS = "neither a folder nor its name says whose it is"
NO_NOTEBOOK = "no notebook; ask for the .ipynb file itself"
TOGETHER = 2.0  # seconds in which files are of one age: archives keep no more
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


def _named(path: Path, stems: Sequence[str]) -> tuple[str, str]:
    """What stands before the assignment in a file's name, and the assignment; "" where the name does not say."""
    name = _COPY.sub("", path.stem)
    stem = next((stem for stem in stems if name.endswith(stem)), "")
    return (name[: len(name) - len(stem)].rstrip("_- ") if stem else ""), stem


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file below a folder, and the folder of a student in which it lies, "" where it lies in none."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_symlink() or not path.is_file() or parts[0] == "__MACOSX" or any(p.startswith(".") for p in parts):
            continue
        yield path, parts[0] if len(parts) > 1 else ""


def _notebooks(folder: Path, stems: Sequence[str]) -> Iterator[tuple[Path, str, str]]:
    """Each notebook in a folder, whose it is and which assignment: "" where neither its name nor its cells say."""
    for path, student in _files(folder):
        if path.suffix == ".ipynb":
            before, stem = _named(path, stems)
            yield path, student or before, stem or by_cells(path)


def by_cells(path: Path) -> str:
    """The assignment of which a notebook has half of the questions or more, by the names of its cells; or ""."""
    try:
        names = set(re.findall(rb'"(?:id|grade_id)": *"([a-z][0-9]+)(?:-visible)?"', contents(path)))
    except (OSError, ValueError):
        return ""
    for letter, count in Counter(chr(name[0]) for name in names).most_common(1):
        for master in masters.masters():
            asked = {cell.question for cell in masters.read_cells(master) if cell.points}
            if master.stem[0] == letter and 2 * count >= len(asked):
                return master.stem
    return ""


def left_out(folder: Path) -> list[tuple[str, str, str]]:
    """(student, file, why) of what was handed in and is not graded: other notebooks, and other files in their place."""
    if not folder.is_dir():
        return []
    stems, found, there = (
        [path.stem for path in masters.masters()],
        list[tuple[str, str, str]](),
        set[tuple[str, str]](),
    )
    for path, student, stem in _notebooks(folder, stems):
        there |= {(student, stem), (student, "")}
        if not stem or not student:
            why = f"left out: {NOBODYS if stem else NOT_ITS_NAME}"
            found.append((canonical(student or path.stem), path.relative_to(folder).as_posix(), why))
    for path, inside in _files(folder):
        before, stem = _named(path, stems)
        student = inside or before
        if path.suffix != ".ipynb" and student and (student, stem) not in there:
            there.add((student, stem))
            found.append((canonical(student), path.relative_to(folder).as_posix(), f"left out: {NO_NOTEBOOK}"))
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    empty = folders - {student for student, _ in there} - {"__MACOSX"}
    return [*found, *((canonical(student), "", "the folder is empty") for student in sorted(empty))]


def find(folder: Path, only: str | None = None) -> tuple[list[Submission], list[str]]:
    """The submissions in a folder, and a sentence for each notebook that is left out.

    A notebook in the place of the folder is one submission, see `alone`.

    Looked for: a folder per student with notebooks somewhere below it, named as they were handed out, or otherwise and
    with the cells of an assignment; or notebooks named ``<student>_<assignment>.ipynb`` side by side. Of several for
    one student and assignment the newest counts, see `newest`.

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
            strange.append(f"left out: {path.relative_to(folder)}: {NOBODYS if stem else NOT_ITS_NAME}")
        elif stem in wanted:
            renamed = "" if _named(path, stems)[1] else f"{path.name} is taken for {stem} because of its cells"
            found.append(Submission(student, stem, path, renamed))
    found = _with_keys(found, strange)
    for (student, stem), several in _by_student(found).items():
        if len(several) > 1:
            chosen = newest([one.path for one in several])
            which = chosen.relative_to(folder)
            said = f"{len(several)} notebooks were handed in; graded is the newest, {which}"
            found = [
                replace(one, note="; ".join(filter(None, (said, one.note)))) if one.path == chosen else one
                for one in found
                if one not in several or one.path == chosen
            ]
            strange.append(f"{student}: {len(several)} notebooks for {stem}; graded is {which}")
    if not found:
        raise ValueError(
            f"nothing to grade in {folder}: expected {folder}/<student>/{(sorted(wanted) or ['…'])[0]}.ipynb"
            + "".join(f"\n  {line}" for line in strange)
        )
    return found, strange


def newest(paths: Sequence[Path]) -> Path:
    """The file changed last; of those changed together, as an archive leaves them, the last by name, (10) after (9)."""
    last = max(path.stat().st_mtime for path in paths)

    def by_name(path: Path) -> list[str]:
        return [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", str(path.with_suffix("")))]

    return max((path for path in paths if last - path.stat().st_mtime <= TOGETHER), key=by_name)


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
