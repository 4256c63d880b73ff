"""What JupyterLab is started with: by root, with and without nbgrader's menus, and what happens before a save."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from svit_course.notebooks import KERNEL, ROOT
from tools import lab

EVERYONE = ROOT / "tools" / "jupyter" / "everyone"
NBGRADER = Path(sys.prefix, "etc", "jupyter", "jupyter_server_config.d", "nbgrader.json")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments that JupyterLab was started with, instead of a start."""
    calls: list[list[str]] = []
    app = SimpleNamespace(LabApp=SimpleNamespace(launch_instance=calls.append))
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", app)
    monkeypatch.setitem(sys.modules, "jupyterlab", SimpleNamespace(labapp=app))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "")
    return calls


@pytest.mark.parametrize(
    ("user", "container", "arguments", "starts_with"),
    [
        (1000, False, [], []),
        (1000, True, [], []),
        (1000, False, ["--root"], []),
        (0, True, [], ["--allow-root"]),
        (0, False, ["--root"], ["--allow-root"]),
        (0, False, [], None),
    ],
)
def test_root_starts_it_in_a_container_or_by_saying_so(
    started, monkeypatch: pytest.MonkeyPatch, capsys, user: int, container: bool, arguments: list[str], starts_with
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    monkeypatch.setattr(lab, "in_container", lambda: container)
    if starts_with is None:
        with pytest.raises(SystemExit, match=r"does not start as root.*make lab ROOT=yes"):
            lab.main(arguments)
        assert started == []
        return
    lab.main(["03", *arguments, "--no-browser"])
    [(*options, chapter)] = started
    assert options == [*starts_with, "--no-browser"]
    assert Path(chapter).resolve().name == "03_fine_tuning.ipynb"
    assert ("as root" in capsys.readouterr().err) == bool(starts_with)


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        ([], {}, False),
        (["docker"], {}, True),
        (["podman"], {}, True),
        ([], {"container": "lxc"}, True),
        ([], {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
    ],
)
def test_what_is_a_container(monkeypatch, tmp_path: Path, files: list[str], variables: dict, expected: bool) -> None:
    monkeypatch.setattr(lab, "CONTAINER_FILES", [str(tmp_path / name) for name in ("docker", "podman")])
    for name in ("container", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name in files:
        (tmp_path / name).touch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert lab.in_container() is expected


def test_a_chapter_that_is_not_there(started, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no chapter '17'; there are: 01_"):
        lab.main(["17"])
    assert started == []


def server_extensions(*folders: Path) -> dict[str, bool]:
    """Whether each extension is on, as Jupyter Server reads its settings; the first folder is the strongest."""
    manager = pytest.importorskip("jupyter_server.services.config.manager").ConfigManager
    return manager(read_config_path=[str(folder) for folder in folders]).get("jupyter_server_config")["ServerApp"][
        "jpserver_extensions"
    ]


@pytest.mark.skipif(not NBGRADER.is_file(), reason="nbgrader is not installed")
def test_nbgrader_is_off_for_learners_and_on_for_lecturers(tmp_path: Path) -> None:
    shutil.copytree(EVERYONE, tmp_path, dirs_exist_ok=True)
    shutil.copy(NBGRADER, tmp_path / "jupyter_server_config.d")
    installed = json.loads(NBGRADER.read_text(encoding="utf-8"))["ServerApp"]["jpserver_extensions"]
    assert server_extensions(tmp_path) == dict.fromkeys(installed, False)
    assert server_extensions(lab.LECTURER, tmp_path) == dict.fromkeys(installed, True)
    for folder, off in ((EVERYONE, True), (lab.LECTURER, False)):
        page = json.loads((folder / "labconfig" / "page_config.json").read_text(encoding="utf-8"))
        [(name, value)] = page["disabledExtensions"].items()
        assert value is off and Path(sys.prefix, "share", "jupyter", "labextensions", name).is_dir()


@pytest.mark.parametrize("nbgrader", [False, True])
def test_the_lecturer_asks_for_the_menus(started, monkeypatch: pytest.MonkeyPatch, nbgrader: bool) -> None:
    monkeypatch.setattr(lab, "root_options", lambda allowed: [])
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "mine")
    lab.main(["--nbgrader"] if nbgrader else [])
    assert os.environ["JUPYTER_CONFIG_PATH"].split(os.pathsep) == [str(lab.LECTURER)] * nbgrader + ["mine"]
    assert len(started) == 1


def test_the_environment_gets_the_settings() -> None:
    recipe = re.search(r"^\$\(STAMP\):.*?(?=^\.PHONY)", (ROOT / "Makefile").read_text(), flags=re.M | re.S)
    assert recipe and "cp -R tools/jupyter/everyone/. $(VENV)/etc/jupyter/" in recipe.group()


@pytest.fixture
def keep_kernel():
    """What Jupyter Server calls before a save, as it finds it in its settings."""
    loader = pytest.importorskip("traitlets.config.loader").PyFileConfigLoader
    return loader("jupyter_server_config.py", path=[str(EVERYONE)]).load_config().ContentsManager.pre_save_hook


def metadata(kernel: str, version: str) -> dict:
    info = {**KERNEL["language_info"], "version": version}
    return {"kernelspec": {**KERNEL["kernelspec"], "name": kernel}, "language_info": info, "x": version}


@pytest.mark.parametrize(
    ("stored", "opened", "version", "kernel"),
    [
        (metadata("python3", "3.11.7"), metadata("python3", "3.13.0"), "3.11.7", "python3"),
        (metadata("python3", "3.11.7"), metadata("other", "3.13.0"), "3.13.0", "other"),  # the reader's choice
        ({"language_info": {"version": "3"}}, metadata("python3", "3.13.0"), "3.13.0", "python3"),
    ],
)
def test_saving_keeps_what_the_file_says_of_the_kernel(
    tmp_path, keep_kernel, stored, opened, version: str, kernel: str
) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x.ipynb").write_text(json.dumps({"metadata": stored}), encoding="utf-8")
    model = {"type": "notebook", "content": {"metadata": opened}}
    keep_kernel(model=model, path="/a b/x.ipynb", contents_manager=SimpleNamespace(root_dir=str(tmp_path)))
    got = model["content"]["metadata"]
    assert (got["language_info"]["version"], got["kernelspec"]["name"]) == (version, kernel)
    assert got["x"] == "3.13.0"  # other metadata are the reader's


@pytest.mark.parametrize("kind", ["notebook", "file", "directory"])
def test_new_files_and_other_kinds_are_left_alone(tmp_path: Path, keep_kernel, kind: str) -> None:
    (tmp_path / "x.txt").write_text("text", encoding="utf-8")
    model = {"type": kind, "content": {"metadata": metadata("python3", "3.13.0")} if kind == "notebook" else None}
    before = json.dumps(model)
    keep_kernel(
        model=model,
        path="new.ipynb" if kind == "notebook" else "x.txt",
        contents_manager=SimpleNamespace(root_dir=str(tmp_path)),
    )
    assert json.dumps(model) == before
