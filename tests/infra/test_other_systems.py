"""What Windows and macOS do otherwise, simulated: neither is at hand here, the workflow systems.yml runs on both.

No fork, no links, no signals but three; files that are open cannot be replaced or removed; processes start anew instead
of as a copy; text that is not said to be UTF-8 is not; names differ by more than their case; folders have blanks.
"""

from __future__ import annotations

import ast
import errno
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from svit_course.notebooks import ROOT
from svit_utils import files
from svit_utils.data.transforms import small_picture_transform
from svit_utils.models import create_model, load_trained, save_trained
from svit_utils.training import outputs, stops
from tests import conftest

PACKAGES = ("svit_utils", "svit_course", "research", "benchmarks", "tools")


def tracked() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-sz"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [line for line in done.stdout.split("\0") if line]


def test_names_are_those_that_every_system_can_have() -> None:
    entries = tracked()
    assert not [line for line in entries if line.startswith("120000")], "no symbolic links"
    names = [line.split("\t", 1)[1] for line in entries]
    assert len({name.lower() for name in names}) == len(names), "no two that differ only in their case"
    reserved = r"(?i)(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[<>:\"|?*\\]|[ .](/|$)"
    assert not [name for name in names if re.search(reserved, name)]
    assert max(map(len, names)) <= 120, "Windows stops at 260 characters, of which the folder takes some"
    assert all(name.isascii() for name in names)


def test_line_ends_are_the_same_everywhere() -> None:
    assert "* text=auto eol=lf\n" in (ROOT / ".gitattributes").read_text(encoding="utf-8")


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_what_other_programs_print_is_read_as_utf8() -> None:
    """`text=True` alone is cp1252 on Windows: a name with an umlaut in git's answer ended the program."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                names = {word.arg for word in node.keywords}
                if names & {"text", "universal_newlines"} and "encoding" not in names:
                    found.append(f"{path.relative_to(ROOT).as_posix()}:{node.lineno}")
    assert [line for line in found if not line.startswith(("svit_course/sandbox", "svit_course/grading"))] == []


REFUSED = PermissionError(errno.EACCES, "Access is denied")


@pytest.mark.parametrize("times", [1, 3])
def test_a_file_that_somebody_reads_is_replaced_when_they_have_done(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, waited = os.replace, []

    def refusing(source: Any, target: Any) -> None:
        if len(waited) < times:
            raise REFUSED
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(time, "sleep", waited.append)
    files.write_file(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new" and len(waited) == times


def test_a_file_that_stays_open_keeps_what_it_held_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.write_file(tmp_path / "a.txt", "old")

    def refusing(source: Any, target: Any) -> None:
        raise REFUSED

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError, match=r"a program has the file open.*a\.txt"):
        files.write_file(path, "new")
    with pytest.raises(outputs.OutputError, match=r"cannot write .*a\.txt: Access is denied"), outputs.writing(path):
        files.write_file(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_lock_that_cannot_be_removed_while_it_is_open_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(self: Path, missing_ok: bool = False) -> None:
        raise REFUSED

    monkeypatch.setattr(Path, "unlink", refusing)
    with outputs.locked(tmp_path):
        pass
    assert (tmp_path / outputs.LOCK).read_bytes() == b""
    with outputs.locked(tmp_path):
        assert b'"pid"' in (tmp_path / outputs.LOCK).read_bytes()


def test_a_folder_with_blanks_and_umlauts_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "Jörgs Läufe (neu)" / ("lang " * 12).strip() / "модель"
    model = create_model("test_vit", num_classes=3)
    save_trained(model, folder)
    back, _ = load_trained(folder)
    for old, new in zip(model.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(old, new)


def test_what_goes_to_a_worker_can_be_sent_there() -> None:
    """Where processes do not start as copies (Windows, macOS), a DataLoader pickles what its workers need."""
    for thing in (small_picture_transform(32, 64, True, "imagenet"), stops.outlast_signals):
        pickle.loads(pickle.dumps(thing))


WITHOUT = """
import os, signal, sys
import accelerate, pandas, psutil, timm, torch, torchvision  # these have a build of their own for each system
assert not sys.flags.utf8_mode and "svit_utils" not in sys.modules
for name in ("fork", "register_at_fork", "geteuid", "getuid", "sched_getaffinity", "killpg", "getpgrp", "mkfifo",
             "uname", "nice", "getloadavg", "setsid", "sysconf"):
    if hasattr(os, name):
        delattr(os, name)
for name in [each for each in dir(signal) if each.startswith("SIG") and each not in (
        "SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIG_DFL", "SIG_IGN", "Signals")]:
    delattr(signal, name)
for name in ("alarm", "setitimer", "pthread_sigmask", "sigwait"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[name] = None
def refused(*args, **kwargs):
    raise OSError(1314, "A required privilege is not held by the client")
os.symlink = refused

from torch.utils.data import TensorDataset
from svit_utils.models import create_model
from svit_utils.training import TrainConfig, train
from svit_utils.training.stops import outlast_signals
from svit_utils.__main__ import main
from tools import lab, links, mutants, do

outlast_signals(0)
signal.signal(signal.SIGINT, signal.default_int_handler)
assert lab.root_options(False) == []
assert "no repository" not in str(links.from_git())
print("\\u03c4 \\u2192 \\u4e2d") if main(["doctor"]) in (0, 1) else None
data = TensorDataset(torch.randn(8, 3, 160, 160), torch.arange(8) % 4)
for _ in range(2):
    model = create_model("test_vit", num_classes=4)
    train(model, data, data, TrainConfig(steps=2, batch_size=4), out_dir=sys.argv[1], resume=False)
print(sorted(os.listdir(sys.argv[1])))
"""


@pytest.mark.slow
def test_doctor_and_training_do_without_what_windows_has_not(tmp_path: Path) -> None:
    """A console without τ, too: `svit doctor > file` of a Windows with cp1252 would end at the first Greek letter."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "ein Lauf")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="cp1252", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "? ? ?" in done.stdout and "last.safetensors" in done.stdout


def test_tests_that_need_posix_are_left_out_on_windows() -> None:
    """There `os.kill(pid, SIGTERM)` ends the process, pytest itself, at once."""
    pattern = re.compile(r"\bos\.(kill|killpg|fork|mkfifo)\(|signal\.SIGKILL")
    using = {
        path.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if pattern.search(path.read_text(encoding="utf-8")) and path != Path(__file__)
    }
    assert using <= set(conftest.POSIX_ONLY), using - set(conftest.POSIX_ONLY)
    assert all((ROOT / "tests" / name).is_file() for name in conftest.POSIX_ONLY)


def test_the_workflow_names_three_systems_and_every_python() -> None:
    text = (ROOT / ".github" / "workflows" / "systems.yml").read_text(encoding="utf-8")
    [job] = yaml.safe_load(text)["jobs"].values()
    assert job["strategy"]["matrix"]["system"] == ["ubuntu-latest", "windows-latest", "macos-latest"]
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert job["strategy"]["matrix"]["python"] == classifiers
    assert "schedule" in text
