"""What Google Colab lacks. The first code cell of every notebook calls `prepare` there; standard library only."""

import importlib
import importlib.util
import re
import subprocess
import sys
from importlib import metadata

# Module to package. Never torch, torchvision or numpy: Colab's own fit its machine, and replacing them breaks it.
NEEDED = {"timm": "timm", "captum": "captum", "pytorch_grad_cam": "grad-cam", "ttach": "ttach"}
KEPT = {"torch": (2, 7), "numpy": (1, 26)}  # the oldest that the package works with


def prepare() -> None:
    """Install what is missing of `NEEDED` and print what was done.

    pip is told not to touch dependencies (``--no-deps``), because these would bring another torch.

    Raises:
        RuntimeError: pip fails, and its own message stands above; or Colab's torch or numpy is too old.
    """
    for package, oldest in KEPT.items():
        there = metadata.version(package)
        if tuple(map(int, re.findall(r"\d+", there)[:2])) < oldest:
            wanted = ".".join(map(str, oldest))
            raise RuntimeError(
                f"{package} {there} is older than {wanted}: choose a newer runtime (Runtime, Change type)"
            )
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError(
                f"pip could not install {', '.join(missing)}, and says why above: run this cell again when the network "
                "is back"
            )
        importlib.invalidate_caches()  # or this process would not see them
    done = f"installed {', '.join(missing)}" if missing else "nothing was missing"
    print(f"Ready: svit_utils is here, {done}; torch and numpy are as Colab has them.")
