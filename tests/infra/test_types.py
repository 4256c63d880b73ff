"""What mypy tells somebody who uses the installed wheel: the names are there, right calls pass, wrong ones do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from svit_course.build import build_wheel

pytestmark = pytest.mark.slow

HEAD = """\
import svit_utils
from svit_utils import FixedThreshold, LearnableThreshold, RelativeThreshold, SparseAttention, TokenSparsityTracker
from svit_utils import densify, load_trained, save_trained, sparsified, sparsify
from svit_utils import thresholded_attention, thresholded_softmax
from torch import Tensor, nn

def use(model: nn.Module, q: Tensor, flag: bool) -> None:
"""
RIGHT = [
    "sparsify(model)",
    "sparsify(model, 0.01, layers=[0, 'blocks.1'], empty_rows='cap', backend='auto', normaliser='topk')",
    "sparsify(model, {0: 0.01, 'blocks.1': RelativeThreshold(2.0)})",
    "sparsify(model, LearnableThreshold(0.01, per='head')).layers[0].name.upper()",
    "densify(model).eval()",
    "with sparsified(model, threshold=0.005, layers=[0]) as report: str(report)",
    "thresholded_attention(q, q, q, 0.01, is_causal=True).mean()",
    "out, weights = thresholded_attention(q, q, q, return_weights=True)",
    "result: Tensor | tuple[Tensor, Tensor] = thresholded_attention(q, q, q, return_weights=flag)",
    "thresholded_softmax(q, FixedThreshold(0.1), empty_rows='zero').sum(-1)",
    "with TokenSparsityTracker(model) as tracker: tracker.table(); tracker.summary()",
    "save_trained(model, 'x.safetensors')",
    "load_trained('x.safetensors')[0].eval()",
]
WRONG = [
    "sparsify(123, threshold='x', nonsense=4)",
    "sparsify(model, nonsense=4)",
    "sparsify(model, layers=3)",
    "sparsify(model, empty_rows=3)",
    "sparsify(model).nonsense",
    "sparsified(model, nonsense=4)",
    "sparsified(model, threshold='x')",
    "densify('model')",
    "FixedThreshold('x')",
    "LearnableThreshold(0.1, per=3)",
    "TokenSparsityTracker(3)",
    "with TokenSparsityTracker(model) as tracker: tracker.nonsense()",
    "thresholded_softmax(3)",
    "thresholded_attention(q, q)",
    "thresholded_attention(q, q, q, tau=0.1)",
    "thresholded_attention(q, q, q).nonsense",
    "save_trained(model)",
    "load_trained('x')[0].eval(3, 4)",
    "svit_utils.nonsense",
    "from svit_utils import nonsense",
]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """mypy's complaint about each line, in an environment that has the wheel among its packages."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv", with_pip=False)
    wheel = build_wheel(folder)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    with zipfile.ZipFile(folder / wheel) as archive:
        archive.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")  # PyTorch and others
    lines = RIGHT + WRONG
    (folder / "user.py").write_text(HEAD + "".join(f"    {line}\n" for line in lines), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--config-file=", "user.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert re.search(r"Found \d+ errors in 1 file", done.stdout), done.stdout + done.stderr
    found: dict[str, str] = {}
    for number, text in re.findall(r"^user\.py:(\d+): error: (.*)$", done.stdout, flags=re.M):
        index = int(number) - HEAD.count("\n") - 1
        found[lines[index] if index >= 0 else f"head, line {number}"] = text
    return found


def test_every_name_is_there(complaints: dict[str, str]) -> None:
    assert not [line for line in complaints if line.startswith("head")], complaints


@pytest.mark.parametrize("line", RIGHT)
def test_right_calls_pass(complaints: dict[str, str], line: str) -> None:
    assert line not in complaints, complaints[line]


@pytest.mark.parametrize("line", WRONG)
def test_wrong_calls_do_not(complaints: dict[str, str], line: str) -> None:
    assert line in complaints
