"""The wheel carries what a chapter needs away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from svit_course import notebooks
from svit_course.build import build_wheel
from svit_course.notebooks import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    return folder / build_wheel(folder)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files as pip lays them out, in a folder that stands first on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_away(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SVIT_")}
    environment["PYTHONPATH"] = str(site)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_carries_the_checkpoints_and_the_results(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside, suffixes in [
        ("data/checkpoints", "checkpoints", {".safetensors", ".json", ".md"}),
        ("results", "results", {".csv", ".json", ".md"}),
    ]:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in suffixes:
                assert f"svit_utils/_embedded/{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "svit_utils/py.typed" in names
    assert "svit_utils/_embedded/results/README.md" in names
    # Nothing but the two packages and their metadata: a top-level `tools` or `tests` would get in everybody's way.
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"svit_utils", "svit_course"}


def test_paths_point_into_the_wheel(site: Path, tmp_path: Path) -> None:
    program = (
        "import svit_utils; from svit_utils import paths; "
        "print(svit_utils.__file__); print(paths.repo_root()); print(paths.checkpoints_dir()); "
        "print(paths.results_dir()); print(paths.data_dir()); print(paths.weights_dir())"
    )
    done = run_away(site, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    package = site / "svit_utils"
    assert done.stdout.split() == [
        str(package / "__init__.py"),
        "None",
        str(package / "_embedded" / "checkpoints"),
        str(package / "_embedded" / "results"),
        str(tmp_path / "data"),
        "None",
    ]


def test_students_need_nothing_of_the_lecturers(site: Path, tmp_path: Path) -> None:
    """Checks and hints of every assignment, without the packages that building and grading use."""
    program = (
        "import sys\n"
        "for name in ('nbgrader', 'nbformat', 'jinja2', 'pygments', 'psutil'): sys.modules[name] = None\n"
        "from svit_course import ASSIGNMENTS, check, hint, questions\n"
        f"assert sys.modules['svit_course'].__file__.startswith({str(site)!r})\n"
        "for assignment in ASSIGNMENTS:\n"
        "    for question in questions(assignment): hint(question.name)\n"
        "from scipy.special import softmax\n"
        "check('a1', lambda scores: softmax(scores, axis=-1))\n"
    )
    done = run_away(site, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Hint 1 of ") == 24 and "a1: 4 of 4 cases hold" in done.stdout


def test_building_and_grading_say_that_they_need_the_repository(site: Path, tmp_path: Path) -> None:
    done = run_away(site, tmp_path, "-m", "svit_course", "build")
    assert done.returncode == 2 and "in the repository" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chapter", notebooks.chapters(), ids=lambda path: path.stem)
def test_a_chapter_alone_runs_to_its_end(site: Path, tmp_path: Path, chapter: Path) -> None:
    """One notebook file, an empty folder, the installed wheel: the stored outputs come out again."""
    if not os.environ.get("SVIT_ALONE"):
        pytest.skip("as long as the chapters themselves; set SVIT_ALONE=1 (make test-alone)")
    (tmp_path / chapter.name).write_bytes(chapter.read_bytes())
    done = run_away(site, tmp_path, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", chapter.name)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_the_assignments_run_beside_the_wheel(site: Path, tmp_path: Path) -> None:
    """As a student has them: given cells, answers and visible checks, in a folder of their own, without nbgrader."""
    program = (
        "import os, sys; sys.modules['nbgrader'] = None; os.environ['MPLBACKEND'] = 'Agg'\n"
        "import svit_utils, nbformat\n"
        f"assert svit_utils.__file__.startswith({str(site)!r})\n"
        "for path in sys.argv[1:]:\n"
        "    scope = {'__name__': '__main__'}\n"
        "    for cell in nbformat.read(path, as_version=4).cells:\n"
        "        about = cell.metadata.get('nbgrader', {})\n"
        "        left_out = about.get('grade') and about.get('solution')\n"
        "        left_out = left_out or 'not-at-grading' in cell.metadata.get('tags', [])\n"
        "        if cell.cell_type == 'code' and not left_out:\n"
        "            exec(compile(cell.source, cell.id, 'exec'), scope)\n"
    )
    masters = sorted((ROOT / "notebooks" / "assignments").glob("*.ipynb"))
    done = run_away(site, tmp_path, "-c", program, *map(str, masters))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cases hold") >= 2 * 3 * len(masters)
