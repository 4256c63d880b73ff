from __future__ import annotations

import subprocess
import sys

import pytest

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
