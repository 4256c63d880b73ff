"""The head of every notebook: links that lead somewhere or none, and a set-up cell that acts on Colab alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from svit_course import stamp
from svit_utils import colab
from tools import book, links


def test_every_file_is_stamped_for_one_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert links.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://github.com/owner/some-name", "owner/some-name"),
        ("https://github.com/owner/some.name.git", "owner/some.name"),
        ("git@github.com:owner/name.git", "owner/name"),
        ("owner/name", "owner/name"),
        ("/srv/git/main.git", None),
        ("https://example.org/owner/name", None),
        ("name", None),
    ],
)
def test_owner_name(url: str, expected: str | None) -> None:
    assert stamp.owner_name(url) == expected


def test_the_setting_is_looked_for_in_order(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/a/b"\n')
    assert links.from_pyproject(tmp_path) == "a/b"
    (tmp_path / "pyproject.toml").write_text('[project.urls]\n# Repository = "https://github.com/a/b"\n')
    assert links.from_pyproject(tmp_path) is None
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    assert links.from_git(tmp_path) is None
    subprocess.run([*git, "remote", "add", "origin", str(tmp_path)], check=True)
    assert links.from_git(tmp_path) is None  # a clone of a folder has no home on the web
    subprocess.run([*git, "remote", "set-url", "origin", "git@github.com:c/d.git"], check=True)
    assert links.from_git(tmp_path) == "c/d"


def notebook():
    return new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1 + 1")])


HERE = links.Place("a/b", "trunk", "c0ffee")


def test_stamping_is_idempotent_and_follows_the_setting() -> None:
    page, path = notebook(), Path("01_x.ipynb")
    assert links.stamp_notebook(page, path, HERE)
    assert not links.stamp_notebook(page, path, HERE)
    assert page.cells[0].get("id") == stamp.LINKS_ID
    assert [cell.cell_type for cell in page.cells] == ["markdown", "markdown", "code", "code"]
    assert "colab.research.google.com/github/a/b/blob/trunk/notebooks/01_x.ipynb" in page.cells[0].source
    assert '"selectivevit @ git+https://github.com/a/b@c0ffee"' in page.cells[2].source
    assert links.stamp_notebook(page, path, None)
    assert "http" not in page.cells[0].source  # no dead link
    assert [cell.source for cell in page.cells[1::2]] == ["# Title", "1 + 1"]


def test_readme_without_a_setting_says_how_to_open_a_notebook() -> None:
    text = f"before\n{links.BEGIN}\nold\n{links.END}\nafter"
    bare = links.stamp_readme(text, None, [Path("01_x.ipynb")])
    assert bare == f"before\n{links.BEGIN}\n{links.NOT_YET}{links.END}\nafter"
    assert "http" not in bare and "Upload notebook" in bare
    assert links.stamp_readme(bare, HERE, [Path("01_x.ipynb")]).count("github/a/b") == 1


def test_a_branch_with_a_slash_is_one_part_of_binders_address() -> None:
    assert "/gh/a/b/feature%2Fx?" in stamp.binder("a/b", "notebooks/x.ipynb", "feature/x")


WORKFLOW = yaml.safe_load((links.notebooks.ROOT / ".github" / "workflows" / "links.yml").read_text(encoding="utf-8"))


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def on_github(tmp_path: Path) -> Path:
    """A clone as `actions/checkout` leaves it, of this working tree, with a bare repository as its origin."""
    tree, origin, clone = tmp_path / "tree", tmp_path / "origin.git", tmp_path / "clone"
    names = git(links.notebooks.ROOT, "ls-files", "-z").split("\0")
    for name in filter(None, names):
        if (links.notebooks.ROOT / name).is_file() and not name.startswith(("results/", "data/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(links.notebooks.ROOT / name, tree / name)
    git(tmp_path, "init", "-q", "-b", "main", "tree")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    git(tree, "add", "--all")
    git(tree, *identity, "commit", "-q", "-m", "All of it")
    git(tmp_path, "clone", "-q", "--bare", "tree", "origin.git")
    git(tmp_path, "clone", "-q", str(origin), "clone")
    return clone


def run_workflow(clone: Path, repository: str) -> None:
    """What the job does after its packages are there, in the environment that GitHub provides."""
    (job,) = WORKFLOW["jobs"].values()
    steps = {step.get("name"): step["run"] for step in job["steps"] if "run" in step}
    own = Path(sys.executable).parent
    environment = os.environ | {
        "GITHUB_REPOSITORY": repository,
        "BRANCH": "main",
        "PATH": f"{own}:{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    for name in ("Stamp", "Commit"):
        subprocess.run(["bash", "-e", "-c", steps[name]], cwd=clone, env=environment, check=True, capture_output=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the workflow runs on Linux")
@pytest.mark.skipif(not (links.notebooks.ROOT / ".git").exists(), reason="not a git checkout")
def test_the_workflow_stamps_the_repository_it_runs_in_once_and_then_does_nothing(on_github: Path) -> None:
    package = git(on_github, "log", "-1", "--format=%H", "--", "svit_utils")
    for repository in ("owner/own", "someone/fork"):  # the fork starts from what its origin was stamped for
        run_workflow(on_github, repository)
        assert git(on_github, "log", "-1", "--format=%s") == f"Links for {repository}"
        assert git(on_github, "rev-parse", "HEAD") == git(on_github, "rev-parse", "origin/main")
        assert links.stamped(on_github) == links.Place(repository, "main", package)
        readme = (on_github / "README.md").read_text(encoding="utf-8")
        chapters = sorted((on_github / "notebooks").glob("*.ipynb"))
        assert readme.count(f"/github/{repository}/blob/main/") == len(chapters)
        for path in chapters:
            text = path.read_text(encoding="utf-8")
            assert f"colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}" in text
            assert f"git+https://github.com/{repository}@{package}" in text
        before = git(on_github, "rev-parse", "HEAD")
        run_workflow(on_github, repository)
        assert git(on_github, "rev-parse", "HEAD") == before, "a second run commits nothing"
        check = [sys.executable, "-m", "tools.links", "--check"]
        done = subprocess.run(check, cwd=on_github, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    run_workflow(on_github, "")  # no address: no link
    assert links.stamped(on_github) is None


REPOSITORY = links.Place("owner/name", commit="c0ffee").package


@pytest.mark.parametrize("package", [None, REPOSITORY])
def test_setup_cell_is_short_and_leaves_torch_alone(package: str | None) -> None:
    source = stamp.setup_source(package)
    assert len(source.splitlines()) < 12
    assert max(map(len, source.splitlines())) <= 120
    assert not {"torch", "torchvision", "numpy"} & set(colab.NEEDED.values())
    assert "--no-deps" in source


PRETENDED = """
import subprocess, sys, types
if COLAB: sys.modules["google.colab"] = types.ModuleType("google.colab")
called = []
def run(command, check):
    assert command[:6] == [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    called.append(command[6:])
    return subprocess.CompletedProcess(command, STATUS)
subprocess.run = run
subprocess.call = lambda command: run(command, False).returncode
import importlib.machinery, importlib.util
there = importlib.util.find_spec
def find_spec(name, package=None):
    if name in GONE: return None
    return there(name, package) if name == "svit_utils" else importlib.machinery.ModuleSpec(name, None)
importlib.util.find_spec = find_spec
"""


def run_setup_cell(
    folder: Path, package: str | None, gone: set[str], *, on_colab: bool, status: int = 0
) -> tuple[list[str], str]:
    """Run the cell in an empty process whose machine lacks the modules ``gone``: (lines it prints, its error)."""
    start = f"COLAB, GONE, STATUS = {on_colab}, {gone!r}, {status}"
    program = f"{start}\n{PRETENDED}\nexec({stamp.setup_source(package)!r})\nprint(called)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("package", [None, REPOSITORY])
def test_setup_cell_does_nothing_elsewhere(tmp_path: Path, package: str | None) -> None:
    printed, error = run_setup_cell(tmp_path, package, {"svit_utils", "captum"}, on_colab=False)
    assert (printed, error) == (["[]"], "")


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        (set(), []),
        ({"captum"}, [["captum"]]),
        ({"svit_utils", "ttach"}, [[REPOSITORY], ["ttach"]]),
        ({"svit_utils", "timm", "captum", "pytorch_grad_cam"}, [[REPOSITORY], ["timm", "captum", "grad-cam"]]),
    ],
)
def test_setup_cell_installs_only_what_is_missing(tmp_path: Path, gone: set[str], expected: list[list[str]]) -> None:
    (said, called), error = run_setup_cell(tmp_path, REPOSITORY, gone, on_colab=True)
    assert (called, error) == (repr(expected), "")
    assert said.startswith("Ready: ")
    assert ", ".join(expected[-1] if expected else ["nothing was missing"]) in said


def test_setup_cell_takes_the_wheel_beside_the_notebook(tmp_path: Path) -> None:
    (tmp_path / "selectivevit-0.1.0-py3-none-any.whl").touch()
    (_, called), error = run_setup_cell(tmp_path, None, {"svit_utils"}, on_colab=True)
    assert (called, error) == ("[['selectivevit-0.1.0-py3-none-any.whl']]", "")


def test_setup_cell_says_what_to_do_without_a_wheel(tmp_path: Path) -> None:
    printed, error = run_setup_cell(tmp_path, None, {"svit_utils"}, on_colab=True)
    assert printed == []
    assert "FileNotFoundError: Upload selectivevit-….whl" in error


def test_setup_cell_says_when_the_package_itself_cannot_be_had(tmp_path: Path) -> None:
    _, error = run_setup_cell(tmp_path, REPOSITORY, {"svit_utils"}, on_colab=True, status=1)
    assert "RuntimeError: pip could not install the book's package, and says why above" in error.splitlines()[-1]


def test_setup_cell_says_when_a_package_cannot_be_had(tmp_path: Path) -> None:
    _, error = run_setup_cell(tmp_path, REPOSITORY, {"captum"}, on_colab=True, status=1)
    assert "RuntimeError: pip could not install captum, and says why above" in error.splitlines()[-1]


def test_a_colab_with_an_old_torch_is_said_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colab.metadata, "version", lambda package: "2.6.0+cu124" if package == "torch" else "2.0.2")
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be installed"))
    with pytest.raises(RuntimeError, match=r"torch 2\.6\.0\+cu124 is older than 2\.7: choose a newer runtime"):
        colab.prepare()


def test_the_oldest_versions_on_colab_are_those_of_pyproject() -> None:
    text = (links.notebooks.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, oldest in colab.KEPT.items():
        assert f'"{package}>={".".join(map(str, oldest))}"' in text


def test_the_book_is_published_with_buttons_that_lead_to_its_own_repository() -> None:
    """The command and the folder of the workflow are those of `make site`; on a fork without Pages nothing fails."""
    text = (links.notebooks.ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)["jobs"]["publish"]
    assert "github.event.repository.has_pages" in job["if"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == ["make environment TORCH=cpu", 'make site REPO="$GITHUB_REPOSITORY"']
    [folder] = [step["with"]["path"] for step in job["steps"] if "upload-pages-artifact" in step.get("uses", "")]
    assert links.notebooks.ROOT / folder == book.SITE
    dry = ["bash", "-c", runs[1].replace("make ", "make -n -o .venv/.made ", 1)]
    environment = os.environ | {"GITHUB_REPOSITORY": "someone/fork"}
    done = subprocess.run(dry, cwd=links.notebooks.ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["-m", "tools.book", "--repository", "someone/fork"]
