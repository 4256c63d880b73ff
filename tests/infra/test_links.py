from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import links
import nbtools


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
    assert links.owner_name(url) == expected


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
    assert page.cells[0].get("id") == nbtools.LINKS_ID
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


@pytest.mark.parametrize("repository", [None, "owner/name"])
def test_setup_cell_is_short_and_leaves_torch_alone(repository: str | None) -> None:
    source = links.setup_source(repository)
    assert len(source.splitlines()) <= 5
    assert max(map(len, source.splitlines())) <= 120
    assert not {"torch", "torchvision", "numpy"} & set(links.LIGHT.values())
    assert "--no-deps" in source


FAKE_COLAB = """
import subprocess, sys, types
if COLAB: sys.modules["google.colab"] = types.ModuleType("google.colab")
called = []
subprocess.run = lambda command, check: called.append(command)
import importlib.util
there = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in GONE else there(name)
"""


@pytest.mark.parametrize(
    ("colab", "gone", "expected"),
    [
        (False, {"svit_utils", "captum"}, []),
        (True, set(), []),
        (True, {"captum"}, ["captum"]),
        (True, {"svit_utils", "ttach"}, ["selectivevit @ git+https://github.com/owner/name", "ttach"]),
    ],
)
def test_setup_cell_installs_only_what_is_missing_and_only_on_colab(
    colab: bool, gone: set[str], expected: list[str]
) -> None:
    program = f"COLAB, GONE = {colab}, {gone!r}\n{FAKE_COLAB}\n{links.setup_source('owner/name')}\nprint(called)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *expected]
    assert done.stdout.strip() == repr([command] if expected else [])
