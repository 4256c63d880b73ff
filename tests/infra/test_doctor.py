"""The doctor is tried with modules that cannot be imported, which stand first on PYTHONPATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from svit_utils import paths
from svit_utils.cli import doctor

MISMATCH = "raise RuntimeError('operator torchvision::nms does not exist')"


def run_doctor(folder: Path, **fakes: str) -> subprocess.CompletedProcess[str]:
    for name, source in fakes.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    repository = str(Path(paths.__file__).parent.parent)
    path = os.pathsep.join([str(folder), repository])
    # Packages that are slow to import are replaced, too: what they are does not matter here.
    for name in set(doctor.NEEDED) | set(doctor.FOR_NOTEBOOKS):
        file = folder / f"{name}.py"
        if not file.exists():
            file.write_text("__version__ = '1.2.3'\n", encoding="utf-8")
    if "torch" not in fakes:
        (folder / "torch.py").write_text(
            "class cuda:\n    is_available = staticmethod(lambda: False)\n"
            "class backends:\n    mps = None\ndef get_num_threads():\n    return 7\n",
            encoding="utf-8",
        )
    command = [sys.executable, "-m", "svit_utils", "doctor"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_healthy(tmp_path: Path) -> None:
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All is well." in done.stdout
    assert "device       cpu, 7 threads" in done.stdout
    for word in ("PlantedShapes", "CIFAR-10", "local weights", "embedded checkpoints", "recorded results"):
        assert word in done.stdout


def test_mismatch_is_named_with_its_cure(tmp_path: Path) -> None:
    done = run_doctor(tmp_path, torchvision=MISMATCH, timm=MISMATCH)
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 1  # timm fails for the same reason, and is not a problem of its own
    assert "torch" in problems[0] and "do not match" in problems[0]
    assert "operator torchvision::nms does not exist" in problems[0]
    assert "pip install --no-cache-dir 'torch==" in problems[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_mismatch_behind_timm_only(tmp_path: Path) -> None:
    done = run_doctor(tmp_path, timm=MISMATCH)
    assert "do not match" in done.stdout


@pytest.mark.parametrize("fault", ["raise ImportError('broken on purpose')", "import os; os._exit(11)"])
def test_what_cannot_be_imported_is_a_line_of_the_report(tmp_path: Path, fault: str) -> None:
    done = run_doctor(tmp_path, timm=fault)
    assert done.returncode == 1
    assert "timm" in done.stdout and "CANNOT BE IMPORTED" in done.stdout
    assert "exit status 11" in done.stdout or "broken on purpose" in done.stdout
    assert "captum" in done.stdout and "do not match" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_what_is_missing_is_named_with_the_command() -> None:
    missing = doctor.Import("pytorch_grad_cam", "grad-cam", None, "ModuleNotFoundError: No module named ...")
    assert doctor.advice([missing]) == ["grad-cam is not installed: pip install 'grad-cam'"]


def test_the_pinned_cure_is_the_tested_pair() -> None:
    pins = (Path(paths.__file__).parent.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    broken = doctor.Import("torchvision", "torchvision", "0", "RuntimeError: operator torchvision::nms does not exist")
    [cure] = doctor.advice([broken])
    for name in ("torch", "torchvision"):
        [pin] = [line for line in pins if line.startswith(f"{name}==")]
        assert f"'{pin}'" in cure


def test_reports_the_folders_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    (tmp_path / "some_vit.safetensors").touch()
    monkeypatch.setenv("SVIT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))
    text = "\n".join(doctor.data_lines())
    assert f"CIFAR-10: found, {tmp_path}" in text
    assert f"local weights: 1 (some_vit), {tmp_path}" in text
