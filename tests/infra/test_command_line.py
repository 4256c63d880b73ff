from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import svit_utils
from svit_utils.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: python -m svit_utils" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in COMMANDS)


def test_the_package_and_the_doctor_import_nothing_heavy() -> None:
    program = (
        "import sys, svit_utils, svit_utils.cli.doctor, svit_utils.__main__; "
        "print([name for name in ('torch', 'timm', 'numpy', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_type_checkers_see_every_name_of_the_package() -> None:
    tree = ast.parse(Path(svit_utils.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(homes) == svit_utils.__all__
    for name, home in homes.items():
        assert getattr(svit_utils, name) is getattr(sys.modules[home], name)


@pytest.mark.parametrize(
    "command", [*(f"svit_utils {name}" for name in COMMANDS), "research experiment", "research study"]
)
def test_help_waits_for_nothing_heavy(command: str) -> None:
    module, name = command.split()
    program = (
        "import runpy, sys; sys.argv = ['x', sys.argv[2], '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'timm', 'numpy', 'pandas', 'matplotlib', 'torchvision') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, module, name], capture_output=True, text=True, check=True)
    assert "usage: " in done.stdout and done.stdout.endswith("[]\n")


@pytest.mark.parametrize("module", ["svit_utils", "research"])
def test_version(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert svit_utils.__version__ in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["experiment", "nope"], ["experiment", "--runs", "x"], ["study", "--profile", "nope"], ["study", "--out", "x"]],
)
def test_research_refuses_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from research.__main__ import main as research

    assert research(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
