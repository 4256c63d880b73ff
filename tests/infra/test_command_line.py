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
    [block] = [node for node in tree.body if isinstance(node, ast.If)]  # if TYPE_CHECKING
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(homes) == svit_utils.__all__
    for name, home in homes.items():
        assert getattr(svit_utils, name) is getattr(sys.modules[home], name)
