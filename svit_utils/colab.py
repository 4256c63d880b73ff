"""What Google Colab lacks. The first code cell of every notebook calls `prepare` there; standard library only."""

import importlib
import importlib.util
import subprocess
import sys

# Module to package. Never torch, torchvision or numpy: Colab's own fit its machine, and replacing them breaks it.
NEEDED = {"timm": "timm", "captum": "captum", "pytorch_grad_cam": "grad-cam", "ttach": "ttach"}
NEEDED |= {"anywidget": "anywidget", "psygnal": "psygnal"}


def prepare() -> None:
    """Install what is missing of `NEEDED` and print what was done.

    pip is told not to touch dependencies (``--no-deps``), because these would bring another torch.

    Raises:
        subprocess.CalledProcessError: pip fails; its own message stands above.
    """
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing], check=True)
        importlib.invalidate_caches()  # or this process would not see them
    done = f"installed {', '.join(missing)}" if missing else "nothing was missing"
    print(f"Ready: svit_utils is here, {done}; torch and numpy are as Colab has them.")
