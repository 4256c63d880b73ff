"""For lecturers: ``python -m svit_course build`` makes the course, ``... grade`` grades what students hand in."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from svit_utils.paths import repo_root

COMMANDS = {
    "build": "svit_course.build",
    "grade": "svit_course.grading.command",
    "totals": "svit_course.grading.totals",
}
# What a command needs beyond the library's own packages: the extra `course` in pyproject.toml.
NEEDED = {
    "build": ("nbformat", "nbgrader", "hatchling"),
    "grade": ("nbformat", "IPython", "jinja2", "pygments", "psutil", "markdown_it", "mdit_py_plugins"),
    "totals": ("nbformat", "jinja2", "pygments", "psutil", "markdown_it", "mdit_py_plugins"),
}
USAGE = """\
usage: python -m svit_course build|grade|totals ...

  build   write what to hand out, the solutions and an nbgrader course to build/course/
  grade   grade a folder of submissions, or one notebook: marks as CSV, feedback as HTML
  totals  take the marks that people gave (by_hand.csv) into the totals and the feedback, without grading again

`python -m svit_course build --help` and `... grade --help` say more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        wanted_help = arguments[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if wanted_help else sys.stderr)
        return 0 if wanted_help else 2
    if repo_root() is None:
        print("The assignments' masters are in the repository: run this there, not from a wheel.", file=sys.stderr)
        return 2
    if missing := [name for name in NEEDED[arguments[0]] if importlib.util.find_spec(name) is None]:
        needs = f"{arguments[0]} needs {', '.join(missing)}, which is not installed"
        print(f"python -m svit_course {needs}: pip install -e '.[course]'", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
