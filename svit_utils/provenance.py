"""Where a number came from: command, seed, versions, device, commit. Written beside every recorded result."""

import datetime
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from svit_utils.paths import repo_root


def provenance(*, seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """A flat dict: command, seed, python, torch, timm, torchvision, device, threads, commit, dirty, date, ``extra``.

    ``commit`` is empty outside a git checkout; ``dirty`` says whether tracked files differed from that commit.
    """
    import torch

    return {
        "command": _command(),
        "seed": seed,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "timm", "torchvision")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "svit_utils", "research")),
        "date": datetime.date.today().isoformat(),
        **extra,
    }


def _command() -> str:
    """The command line without the folders of this machine: of an absolute path only the last part is kept."""
    program, arguments = Path(sys.argv[0]), map(_without_folders, sys.argv[1:])
    called = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*called, *arguments])


def _without_folders(argument: str) -> str:
    """``--out=/home/ann/runs/a`` becomes ``--out=a``."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def _git(*arguments: str) -> str:
    """What git prints for the repository; empty without a repository, without git, or where git fails."""
    if root := repo_root():
        command = ["git", "-C", str(root), *arguments]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout.strip()
    return ""
