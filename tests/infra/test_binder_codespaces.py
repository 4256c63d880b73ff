"""Binder and Codespaces: what their own programs and files make of this repository. Neither is built here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from svit_course.notebooks import ROOT

READ_BY_BINDER = """
import json, logging, sys
from repo2docker.app import Repo2Docker

logging.disable(logging.INFO)
for pack in Repo2Docker().buildpacks:  # in repo2docker's own order: the first that detects itself is taken
    try:
        pack = pack("linux/amd64")
    except TypeError:
        pack = pack()
    if pack.detect():
        break
scripts = "".join(text for _, text in pack.get_assemble_scripts())
print(json.dumps({
    "pack": type(pack).__name__,
    "python": pack.python_version,
    "first_the_repository": not pack._should_preassemble_env,
    "updates": "env update" in scripts,
}))
"""


def named_python() -> str:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    [version] = re.findall(r"^  - python=([\d.]+)", text, flags=re.MULTILINE)
    return version


@pytest.mark.skipif(shutil.which("jupyter-repo2docker") is None, reason="needs repo2docker (pip) on the PATH")
def test_binder_takes_environment_yml_with_the_python_that_it_names() -> None:
    """A range, as in `python>=3.10`, is "unspecified" for repo2docker, which then takes a Python of its own choice."""
    python = Path(str(shutil.which("jupyter-repo2docker"))).resolve().with_name("python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-c", READ_BY_BINDER]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "pack": "CondaBuildPack",
        "python": named_python(),
        "first_the_repository": True,  # `-e .` needs it
        "updates": True,
    }
    assert "unspecified" not in done.stderr


def test_binder_has_one_place_to_look() -> None:
    """With a folder `binder` or `.binder`, or a Dockerfile, repo2docker would not read environment.yml."""
    for name in ("binder", ".binder", "Dockerfile", "Pipfile", "runtime.txt", "postBuild", "start", "apt.txt"):
        assert not (ROOT / name).exists(), name


def test_codespaces_makes_the_environment_that_make_makes() -> None:
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert re.fullmatch(rf"python:{re.escape(named_python())}-\w+", settings["image"])
    program, target, *rest = settings["postCreateCommand"].split()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert program == "make" and f"\n{target}:" in makefile
    assert rest == ["TORCH=cpu"], "a codespace has no GPU, and the CUDA build is five times as large"
    interpreter = settings["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == "${containerWorkspaceFolder}/.venv/bin/python"
