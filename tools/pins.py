"""Write requirements.txt: the tested set, resolved from pyproject.toml for every supported Python and system.

Usage: ``make pins``. Resolving anew moves to the newest releases that fit; run the whole of ``make test`` before
committing the result. Torch's own CUDA libraries are left out: each torch build brings the ones that it needs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# The tested set, written by `make pins` from pyproject.toml (extra `dev`), with markers for each Python from 3.10 on.
# The library itself asks for ranges only (pyproject.toml). `make` installs this file into .venv.
"""
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")


def main() -> int:
    """Resolve, and write the file; the exit status."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version", "3.10"]
    command += ["--fork-strategy", "requires-python", "--no-header", "--no-annotate", "--quiet"]
    # What pyproject.toml gives as ranges, narrowed where the pair has to match.
    command += ["--extra", "dev", *sys.argv[1:], "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith(LEFT_TO_TORCH)]
    lines = [line for line in lines if not line.startswith("selectivevit")]
    (ROOT / "requirements.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"requirements.txt: {len(lines)} pins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
