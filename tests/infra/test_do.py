"""`python tools/do.py` does what the Makefile does: the same targets, commands, settings and order."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from svit_course.notebooks import ROOT
from tools import do

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = [name for name in re.findall(r"^\.PHONY: ([\w-]+)$", MAKEFILE, flags=re.MULTILINE) if name != "help"]
# Not a list of commands in one of the two: compared by the tests below.
OWN_WAY = ("environment", "clean")
SETTINGS = {
    name: f"the {name.lower()}"  # with a blank, which has to be quoted in both
    for name in re.findall(r"\{([A-Z]+)", "".join(do.RECIPES.values()))
}
make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def by_make(target: str, settings: dict[str, str]) -> list[list[str]]:
    """The words of the commands that make would run, of which the check of a missing setting is left out."""
    given = [f"{name}={value}" for name, value in settings.items()]
    command = ["make", "-n", "-o", ".venv/.made", target, *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line)) and words[0] != "test"]


def by_do(target: str, settings: dict[str, str]) -> list[list[str]]:
    parts = do.TOGETHER.get(target, (target,))
    found = [each for part in parts for each in do.commands(part, settings)]
    return [[f"{name}={value}" for name, value in added.items()] + words for added, words in found]


def test_both_have_the_same_targets() -> None:
    assert sorted(TARGETS) == sorted([*do.RECIPES, *do.TOGETHER, "clean"])


@make
@pytest.mark.parametrize("target", [name for name in TARGETS if name not in OWN_WAY])
def test_a_target_runs_the_same_commands(target: str) -> None:
    needed = {"SUBMISSIONS": "a folder"}
    for settings in (needed, {name: value.replace("the ", "the-") for name, value in SETTINGS.items()} | needed):
        assert by_do(target, settings) == by_make(target, settings)


@make
def test_the_environment_is_made_by_the_same_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tools" / "jupyter", tmp_path / "tools" / "jupyter")
    monkeypatch.setattr(do, "run", lambda words, added=None: ran.append(list(words)))
    do.make_environment({"TORCH": "cpu"})
    assert (tmp_path / ".venv" / "etc" / "jupyter").is_dir() and (tmp_path / ".venv" / ".made").is_file()
    recipe = MAKEFILE.split("$(STAMP): requirements.txt", 1)[1].split("\n\n", 1)[0]
    shown = recipe.replace("$(if $(TORCH),--torch-backend=$(TORCH))", "--torch-backend=cpu").replace("$(PY)", "PY")
    expected = [shlex.split(line) for line in shown.splitlines() if line.startswith("\tPY ")]
    python = str(do.scripts() / "python")
    assert [["PY" if word == python else word for word in words] for words in ran if words[1:3] != ["-m", "venv"]] == (
        expected
    )


def test_windows_has_its_own_folder_of_programs() -> None:
    assert do.scripts(windows=True) == Path(".venv/Scripts") and do.scripts(windows=False) == Path(".venv/bin")


def test_a_value_with_blanks_and_umlauts_stays_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Abgaben von Jörg"
    [(_, words)] = do.commands("grade", {"SUBMISSIONS": str(folder)})
    assert str(folder) in words
    monkeypatch.setattr(sys, "argv", ["do.py"])
    code = "import os, sys; print(sys.argv[1], os.environ['PYTHONUTF8'], os.environ['A'])"
    out = tmp_path / "out.txt"
    do.run([sys.executable, "-c", f"{code}; open({str(out)!r}, 'w').write(sys.argv[1])", str(folder)], {"A": "1"})
    assert out.read_text(encoding="utf-8") == str(folder)


def test_patterns_are_written_out_since_windows_has_no_shell_that_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.ipynb", "a.ipynb"):
        (tmp_path / name).touch()
    do.run([sys.executable, "-c", "import sys; print(sys.argv[1:])", "*.ipynb"])
    assert capfd.readouterr().out.strip() == "['a.ipynb', 'b.ipynb']"


def test_a_command_that_fails_ends_it_with_its_status() -> None:
    with pytest.raises(SystemExit) as ended:
        do.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 3


def test_unknown_targets_and_missing_settings_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert do.main(["wlakthrough"]) == 2 and "walkthrough" in capsys.readouterr().out
    assert do.main([]) == 0 and "usage" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="SUBMISSIONS is missing"):
        do.commands("grade", {})


def test_it_needs_nothing_but_python() -> None:
    """`-I -S`: no packages, no settings."""
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "do.py"), "help"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and "walkthrough" in done.stdout, done.stderr
