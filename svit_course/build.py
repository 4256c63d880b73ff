"""Build the course from its masters: ``make course`` (``python -m svit_course build``) writes build/course/.

    student/    to hand out, or to push as a repository of its own: chapters, assignments, glossary, the package's wheel
    solutions/  the masters, with solutions and hidden tests
    grading/    an nbgrader course: source/, release/, nbgrader_config.py, gradebook.db
    lecturer/   the guide, the plan of a semester, the rubric

nbgrader takes solutions and hidden tests out; `leaks` looks for what may have stayed, and the build fails if any did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svit_course import masters, notebooks, stamp

OUT = notebooks.ROOT / "build" / "course"
FOR_LECTURERS = ("lecturer.md", "semester.md", "rubric.md")
CONFIG = '''\
"""nbgrader's settings for this course, for use with its own tools: https://nbgrader.readthedocs.io"""

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "selectivevit"
# The library's checks are slower than nbgrader's 30 seconds on a busy machine.
c.ExecutePreprocessor.timeout = 180
c.Execute.timeout = 180
'''
STUDENT_README = """\
# Sparse attention in Vision Transformers: chapters and assignments

`notebooks/` holds the book, `notebooks/assignments/` the assignments a to f and a
[glossary](notebooks/glossary.md).

**On your machine** (Python 3.10 or newer):

    python -m venv .venv && . .venv/bin/activate     # Windows: .venv\\Scripts\\activate
    pip install "./{wheel}[notebooks]"
    jupyter lab notebooks/assignments

**In Colab**: {colab}
**On Binder**: {binder}

Write your answers where the cells say `YOUR CODE HERE` and `YOUR ANSWER HERE`, and leave the test cells alone: their
originals are run when you are graded. `check(...)` under a question tells at once what is wrong, `hint("a1")` helps on.
Import what you like, except what the head of an assignment forbids because it would be the answer: a cell that uses it
is not run when you are graded, and `check(...)` says so at once. Only the cell of a plot may use everything.
Keep the notebooks' names, and hand in the `.ipynb` file itself.
"""


def build(out: Path = OUT, repository: str | None = None) -> Path:
    """Build everything into ``out`` and return it.

    Args:
        out: what an earlier build left there is replaced, except for a ``gradebook.db`` and submissions in ``grading``.
        repository: ``owner/name`` that ``student/`` will be pushed to; without it no links to Colab and Binder.

    Raises:
        RuntimeError: nbgrader fails, or the student's version still holds something of a solution.
    """
    found = masters.masters()
    grading, student = out / "grading", out / "student"
    for folder in (student, out / "solutions", out / "lecturer", grading / "source", grading / "release"):
        shutil.rmtree(folder, ignore_errors=True)
    for path in found:
        _copy(path, grading / "source" / path.stem / path.name)
        _copy(path, out / "solutions" / path.name)
    (grading / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    release(grading, [path.stem for path in found])

    wheel = build_wheel(student)
    for chapter in notebooks.chapters():
        _copy(chapter, student / "notebooks" / chapter.name)
    for name in ("images", "reference"):
        shutil.copytree(notebooks.NOTEBOOKS / name, student / "notebooks" / name)
    assignments = student / "notebooks" / "assignments"
    for path in found:
        notebook = notebooks.read(grading / "release" / path.stem / path.name)
        stamp_for_students(notebook, path, repository, wheel)
        assignments.mkdir(parents=True, exist_ok=True)
        notebooks.write(notebook, assignments / path.name)
        # The notebook that nbgrader hands out is the same one.
        notebooks.write(notebook, grading / "release" / path.stem / path.name)
        if lost := list(leaks(notebook, notebooks.read(path))):
            raise RuntimeError(f"{path.name}: the student's version still holds\n  " + "\n  ".join(lost))
    _copy(notebooks.NOTEBOOKS / "glossary.md", student / "notebooks" / "glossary.md")
    for study in ("study", "second", "photographs"):  # the plans that chapters lead to
        _copy(notebooks.ROOT / "results" / study / "PLAN.md", student / "results" / study / "PLAN.md")
    _student_files(student, repository, wheel)
    for name in FOR_LECTURERS:
        _copy(masters.ASSIGNMENTS / name, out / "lecturer" / name)
    _copy(notebooks.NOTEBOOKS / "glossary.md", out / "lecturer" / "glossary.md")
    return out


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def release(grading: Path, stems: Sequence[str]) -> None:
    """Make the versions to hand out, in ``release/`` of an nbgrader course: ``generate_assignment`` for each master."""
    for stem in stems:
        nbgrader(grading, "generate_assignment", stem, "--force", "--create")


def nbgrader(folder: Path, *arguments: str, timeout: float = 600) -> str:
    """Run nbgrader in a course folder and return what it prints.

    Raises:
        RuntimeError: it fails; the message ends with what it printed.
    """
    # It calls `alembic` by name, which lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # Settings of the user's own nbgrader courses must not mix in.
    home = {"JUPYTER_CONFIG_DIR": str(folder / ".jupyter"), "JUPYTER_NO_CONFIG": "", "PATH": path}
    command = [sys.executable, "-m", "nbgrader", *arguments]
    environment = {**os.environ, **home}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"nbgrader {' '.join(arguments)} fails:\n{(done.stderr + done.stdout)[-3000:]}")
    return done.stderr + done.stdout


def build_wheel(folder: Path) -> str:
    """Build the package's wheel into ``folder`` and return its file name. Needs no network.

    Raises:
        RuntimeError: hatchling fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=notebooks.ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"the wheel cannot be built:\n{done.stderr[-2000:]}")
    return next(folder.glob("selectivevit-*.whl")).name


def stamp_for_students(notebook: Any, path: Path, repository: str | None, wheel: str) -> None:
    """Give a student's notebook its two cells at the head: where to open it, and the set-up for Colab.

    Args:
        path: of the master; the student's notebook has its name.
        repository: ``owner/name`` that ``student/`` will be pushed to, with the wheel in it; None if there is none.
        wheel: the wheel's file name.
    """
    place, package = f"notebooks/assignments/{path.name}", None
    text = "*In Colab, first upload the file `selectivevit-….whl` (the folder symbol on the left).*"
    if repository:
        package = f"https://github.com/{repository}/raw/main/{wheel}"
        text = f"[Open in Colab]({stamp.colab(repository, place)}) · "
        text += f"[Open in Binder]({stamp.binder(repository, place)})"
    stamp.stamp_cells(notebook, text, stamp.setup_source(package))


def _student_files(student: Path, repository: str | None, wheel: str) -> None:
    """environment.yml, postBuild and README.md."""
    environment = (notebooks.ROOT / "environment.yml").read_text(encoding="utf-8")
    kept = [line for line in environment.splitlines() if line.strip() != "- -e ." and not line.startswith("#")]
    (student / "environment.yml").write_text("\n".join([*kept, ""]), encoding="utf-8")
    # Binder runs this after the environment is made; a wheel named in environment.yml would not be there yet.
    script = student / "postBuild"
    script.write_text(f"#!/bin/sh\nset -e\npython -m pip install --no-deps ./{wheel}\n", encoding="utf-8", newline="\n")
    script.chmod(0o755)
    colab = f"upload `{wheel}` and the notebook; its first cell installs what is missing."
    binder = (
        "push this folder to a repository and name it on mybinder.org; `environment.yml` and `postBuild` do the rest."
    )
    if repository:
        colab = "the link at the head of each assignment; its first cell installs what is missing."
        binder = "the link at the head of each assignment."
    text = STUDENT_README.format(wheel=wheel, colab=colab, binder=binder)
    (student / "README.md").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ leaks

_WORDS = ("BEGIN SOLUTION", "END SOLUTION", "HIDDEN TESTS")


def leaks(released: Any, original: Any) -> Iterator[str]:
    """A line for each piece of a solution or of a hidden test that is left in a released notebook.

    Looked through are sources, outputs and metadata; looked for are every line of a solution, every hidden case, every
    sentence of a model answer, and any output, unless the master itself shows the same to the student elsewhere.
    """
    shown = "\n".join(_public(cell) for cell in original.cells)
    everything = "\n".join(_texts(json.loads(json.dumps(released))))
    for word in _WORDS:
        if word in everything:
            yield f"the words {word!r}"
    for cell in original.cells:
        for piece in _pieces(cell):
            if piece not in shown and piece in everything:
                yield f"{masters.grade_id(cell)}: {piece!r}"
    for cell in released.cells:
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            yield f"an output of cell {masters.grade_id(cell)}"


def _texts(value: Any) -> Iterator[str]:
    """Every string in a notebook, keys included; the lines of a source in one piece."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield "".join(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)


def _public(cell: Any) -> str:
    """The part of a master's cell that the student may see."""
    if masters.part(cell) in ("written", "plot"):
        return ""
    source = masters.without(cell.source, masters.BEGIN_SOLUTION, masters.END_SOLUTION)
    return masters.without(source, masters.BEGIN_HIDDEN, masters.END_HIDDEN)


def _pieces(cell: Any) -> Iterator[str]:
    """Lines of a cell's solution or hidden test, sentences of its model answer: those of more than 12 characters."""
    kind = masters.part(cell)
    if kind == "written":
        yield from (s.strip() for s in re.split(r"(?<=[.:;])\s+|\n", cell.source) if len(s.strip()) > 12)
        return
    private = set(cell.source.splitlines()) - set(_public(cell).splitlines())
    for line in private:
        code = line.split("  #")[0].strip()
        if len(code) > 12 and not code.startswith("###"):
            yield code


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    whole = argparse.ArgumentParser(
        prog="python -m svit_course build", description="Build the course: student version, solutions, grading, guide."
    )
    whole.add_argument("--out", type=Path, default=OUT, help="default: build/course")
    whole.add_argument("--repository", help="owner/name that student/ will be pushed to, for its links")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Build the course; the exit status."""
    options = parser().parse_args(argv)
    repository = stamp.named_repository(parser(), options.repository)
    try:
        out = build(options.out, repository)
    except RuntimeError as error:
        print(f"make course: {error}", file=sys.stderr)
        return 1
    print(f"{len(masters.masters())} assignments in {out}: student/ to hand out, solutions/, grading/, lecturer/")
    return 0
