"""What ``make`` does, where there is no make: ``python tools/do.py walkthrough``, also on Windows.

Settings follow as for make: ``python tools/do.py lab CHAPTER=03``. Needs Python 3.10 or newer and nothing else; what a
target needs is installed into ``.venv`` first, once, and again when the pins change. The recipes are those of the
Makefile (tests/infra/test_do.py compares the two).
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(".venv")
STAMP = VENV / ".made"
SETTINGS = {"JOBS": "2"}  # those that have a value unless another is given
USAGE = "usage: python tools/do.py TARGET [NAME=value ...], for example: python tools/do.py lab CHAPTER=03"
ONE_THREAD = "OMP_NUM_THREADS=1 MKL_NUM_THREADS=1"

# A line for each command. {NAME} is a setting, {NAME:x} is x without it; [NAME? words] stands only where it is given.
RECIPES: dict[str, str] = {
    "environment": "",
    "walkthrough": "python -m tools.walkthrough",
    "site": "python -m tools.book [REPO? --repository {REPO}]",
    "pdf": "python -m tools.book --pdf",
    "lab": "python -m tools.lab {CHAPTER:01} [ROOT? --root] [NBGRADER? --nbgrader]",
    "doctor": "python -m svit_utils doctor",
    "test-unit": f"{ONE_THREAD} python -m pytest -q tests -n {{JOBS}} --dist loadfile",
    "test-notebooks": f"{ONE_THREAD} python -m pytest -q --nbval notebooks -n {{JOBS}} --dist loadfile",
    "test-alone": f"SVIT_ALONE=1 {ONE_THREAD} python -m pytest -q tests/infra/test_wheel.py -n {{JOBS}}",
    "test-mutants": "python -m tools.mutants --quick --jobs {JOBS}",
    "mutants": "python -m tools.mutants --jobs {JOBS}",
    "test-grader": f"{ONE_THREAD} python -m pytest -q tests/grader -m grader -n {{JOBS}} --dist loadfile",
    "test-browser": "python -m pytest -q tests/browser -m browser",
    "stored": "python -m tools.walkthrough --store {CHAPTER}",
    "links": "python -m tools.links [REPO? --repository {REPO}]",
    "checkpoints": "python -m tools.make_checkpoints",
    "results": "python -m tools.readme_results",
    "study": f"{ONE_THREAD} python -m research study --profile {{PROFILE:full}} --jobs {{JOBS}}",
    "study-tables": f"{ONE_THREAD} python -m research study --tables",
    "bench": "python -m benchmarks",
    "gpu": "PARTS={PARTS} DEVICE={DEVICE} MINUTES={MINUTES} python -m benchmarks.gpu",
    "check-results": "python -m tools.check_results",
    "course": "python -m svit_course build [REPO? --repository {REPO}]",
    "grade": "python -m svit_course grade {SUBMISSIONS!} --jobs {JOBS} [ASSIGNMENT? --assignment {ASSIGNMENT}]"
    " [SECONDS? --seconds {SECONDS}] [CELL? --cell {CELL}] [TOTAL? --total {TOTAL}] [MEMORY? --memory {MEMORY}]"
    " [TRUST? --trust]",
    "totals": "python -m svit_course totals [ROSTER? --roster {ROSTER}]",
    "test-course": f"{ONE_THREAD} python -m pytest -q tests/course -n {{JOBS}} --dist loadfile",
    "lint": "python -m ruff check .\n"
    "python -m ruff format --check svit_utils svit_course research tests tools benchmarks conftest.py\n"
    "python -m mypy\n"
    "lint-imports --no-cache\n"
    "python -m tools.lint_notebooks notebooks/*.ipynb notebooks/assignments/*.ipynb",
    "pins": "python -m tools.pins",
    "release": "python -m tools.release [VERSION? --version {VERSION}]",
}
TOGETHER = {"test": ("test-unit", "test-notebooks", "test-mutants")}


def scripts(windows: bool = os.name == "nt") -> Path:
    """The folder of the environment's programs."""
    return VENV / ("Scripts" if windows else "bin")


def fill(recipe: str, settings: Mapping[str, str]) -> str:
    """A recipe's line with the settings in it, quoted where a shell would need it.

    Raises:
        SystemExit: a setting that the recipe cannot do without is missing.
    """

    def value(found: re.Match[str]) -> str:
        name, kind, default = found.groups()
        given = settings.get(name, "") or default
        if kind == "!" and not given:
            raise SystemExit(f"{name} is missing: add {name}=… to the line")
        return shlex.quote(given) if given else ""

    line = re.sub(r"\[(\w+)\? ([^]]*)\]", lambda found: found[2] if settings.get(found[1]) else "", recipe)
    return re.sub(r"\{(\w+)([:!]?)([^}]*)\}", value, line)


def commands(target: str, settings: Mapping[str, str]) -> list[tuple[dict[str, str], list[str]]]:
    """What a target runs: for each command, what it adds to the environment, and its words."""
    found = []
    for line in RECIPES[target].splitlines():
        words, added = shlex.split(fill(line, {**SETTINGS, **settings})), {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, added[name] = words.pop(0).partition("=")
        program = scripts() / words[0]
        found.append((added, [str(program), *words[1:]]))
    return found


def run(words: Sequence[str], added: Mapping[str, str] | None = None) -> None:
    """Run a command in the repository, with UTF-8 everywhere; a shell's patterns of file names are written out.

    Raises:
        SystemExit: it fails; its exit status is this program's.
    """
    expanded = [word for each in words for word in (sorted(glob.glob(each)) if "*" in each else [each])]
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONNOUSERSITE": "1", **(added or {})}
    environment.setdefault("UV_HTTP_TIMEOUT", "300")
    if status := subprocess.run(expanded, env=environment, check=False).returncode:
        raise SystemExit(status)


def is_made() -> bool:
    """Whether the environment is there and newer than what it was made from."""
    jupyter = [path for path in Path("tools/jupyter/everyone").rglob("*") if path.is_file()]
    sources = [Path("requirements.txt"), Path("pyproject.toml"), *jupyter]
    return STAMP.is_file() and all(path.stat().st_mtime <= STAMP.stat().st_mtime for path in sources)


def make_environment(settings: Mapping[str, str]) -> None:
    """Make ``.venv`` with the tested set of packages."""
    print(f"Making the environment in {VENV} (once; a few minutes, mostly downloads)", flush=True)
    python = str(scripts() / "python")
    if not list(scripts().glob("python*")):
        run([sys.executable, "-m", "venv", str(VENV)])
    backend = [f"--torch-backend={settings['TORCH']}"] if settings.get("TORCH") else []
    uv = [python, "-m", "uv", "pip", "install", "--python", python]
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv>=0.5"])
    run([*uv, *backend, "-r", "requirements.txt"])
    run([*uv, "--no-deps", "-e", "."])
    shutil.copytree("tools/jupyter/everyone", VENV / "etc" / "jupyter", dirs_exist_ok=True)
    run([python, "-m", "svit_utils", "doctor"])
    STAMP.touch()


def clean() -> None:
    """Remove build/, caches and .venv; data and results stay."""
    for name in ("build", "dist", VENV, ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"):
        shutil.rmtree(name, ignore_errors=True)
    for folder in Path().rglob("__pycache__"):
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Do the targets that are named; the exit status."""
    os.chdir(ROOT)
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    targets = [word for word in arguments if "=" not in word]
    known = [*RECIPES, *TOGETHER, "clean"]
    if not targets or not set(targets) <= set(known):
        print(f"{USAGE}\ntargets: {', '.join(sorted(known))}")
        return 2 if targets and targets != ["help"] else 0
    if sys.version_info < (3, 10):  # noqa: UP036 - this file is what an older one is asked to run
        raise SystemExit(f"Python 3.10 or newer is needed, and this is {sys.version.split()[0]}")
    for target in [part for name in targets for part in TOGETHER.get(name, (name,))]:
        if target == "clean":
            clean()
            continue
        todo = commands(target, settings)  # what is missing is said before an environment is made
        if not is_made():
            make_environment(settings)
        for added, words in todo:
            run(words, added)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
