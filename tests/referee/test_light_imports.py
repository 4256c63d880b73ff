"""What is slow to import, and not needed by every function, is imported by the functions that need it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = ("matplotlib", "pandas", "scipy", "statsmodels", "captum", "pytorch_grad_cam")


@pytest.mark.parametrize("package", ["svit_utils.attention", "svit_utils.explain", "svit_utils.referee"])
def test_slow_libraries_are_not_imported_with_the_package(package: str) -> None:
    code = f"import sys, {package}; print(*[name for name in {SLOW} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
