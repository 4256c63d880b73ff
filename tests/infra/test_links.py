"""The head of every notebook: links that lead somewhere or none, and a set-up cell that acts on Colab alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from svit_course import stamp
from svit_utils import colab
from tools import links


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


def test_stamping_is_idempotent_and_follows_the_setting() -> None:
    page, path = notebook(), Path("01_x.ipynb")
    assert links.stamp_notebook(page, path, "a/b")
    assert not links.stamp_notebook(page, path, "a/b")
    assert page.cells[0].get("id") == stamp.LINKS_ID
    assert [cell.cell_type for cell in page.cells] == ["markdown", "markdown", "code", "code"]
    assert "colab.research.google.com/github/a/b/blob/main/notebooks/01_x.ipynb" in page.cells[0].source
    assert links.stamp_notebook(page, path, None)
    assert "http" not in page.cells[0].source  # no dead link
    assert [cell.source for cell in page.cells[1::2]] == ["# Title", "1 + 1"]


def test_readme_without_a_setting_has_no_link() -> None:
    text = f"before\n{links.BEGIN}\nold\n{links.END}\nafter"
    bare = links.stamp_readme(text, None, [Path("01_x.ipynb")])
    assert bare == f"before\n{links.BEGIN}\n{links.END}\nafter"
    assert links.stamp_readme(bare, "a/b", [Path("01_x.ipynb")]).count("github/a/b") == 1


REPOSITORY = "selectivevit @ git+https://github.com/owner/name"


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
    assert check and command[:6] == [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    called.append(command[6:])
subprocess.run = run
import importlib.machinery, importlib.util
there = importlib.util.find_spec
def find_spec(name, package=None):
    if name in GONE: return None
    return there(name, package) if name == "svit_utils" else importlib.machinery.ModuleSpec(name, None)
importlib.util.find_spec = find_spec
"""


def run_setup_cell(folder: Path, package: str | None, gone: set[str], *, on_colab: bool) -> tuple[list[str], str]:
    """Run the cell in an empty process whose machine lacks the modules ``gone``: (lines it prints, its error)."""
    program = f"COLAB, GONE = {on_colab}, {gone!r}\n{PRETENDED}\nexec({stamp.setup_source(package)!r})\nprint(called)"
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
