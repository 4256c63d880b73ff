"""Make a release: ``make release`` builds wheel and sdist into dist/ and checks them; it uploads nothing.

With ``VERSION=0.2.0`` the version is first written wherever it stands, and the changelog from the fragments in
changes/. The wheel is built from the sdist, so that neither can lack what the other needs. Checked are the metadata
(twine), the wheel in an environment with nothing else in it, and each chapter alone beside the wheel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from svit_course.notebooks import ROOT

DIST = "dist"
# Where the version stands, and what is around it. The first is what the package and its metadata are made from.
PLACES = (
    ("svit_utils/__init__.py", r'(?<=^__version__ = ")[^"]+'),
    ("CITATION.cff", r"(?<=^version: )\S+"),
    ("README.md", r"(?<=selectivevit-)\S+(?=-py3-none-any\.whl)"),
)
FIRST_STEPS = """
import svit_utils, torch
out = svit_utils.thresholded_attention(*torch.randn(3, 1, 2, 5, 4), threshold=0.1)
assert out.shape == (1, 2, 5, 4)
from svit_utils.models import load_embedded
load_embedded("planted_dense_start")
print(svit_utils.__version__)
"""


def versions(root: Path = ROOT) -> dict[str, set[str]]:
    """The versions that each file names."""
    texts = {name: (root / name).read_text(encoding="utf-8") for name, _ in PLACES}
    return {name: set(re.findall(pattern, texts[name], flags=re.MULTILINE)) for name, pattern in PLACES}


def current(root: Path = ROOT) -> str:
    """The one version that all files name.

    Raises:
        SystemExit: they differ; the message says how.
    """
    found = versions(root)
    if len(set.union(*found.values())) != 1 or not all(found.values()):
        raise SystemExit(f"the version is not the same everywhere: {found}")
    return found[PLACES[0][0]].pop()


def write_version(version: str, root: Path = ROOT) -> None:
    """Write a version wherever it stands.

    Raises:
        SystemExit: it is no version such as 0.2.0 or 0.2.0rc1.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise SystemExit(f"a version is three numbers, such as 0.2.0 or 0.2.0rc1, not {version!r}")
    for name, pattern in PLACES:
        text = (root / name).read_text(encoding="utf-8")
        changed = re.sub(pattern, version, text, flags=re.MULTILINE)
        (root / name).write_text(changed, encoding="utf-8", newline="\n")


def write_changelog(version: str, root: Path = ROOT) -> None:
    """Collect the fragments in CHANGELOG.md, under a heading of the version and today's date."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    _run("towncrier", "build", "--yes", "--version", version, "--date", date, root=root)


def build(root: Path = ROOT, out: Path | None = None) -> list[Path]:
    """Build the sdist, and the wheel from it; both paths. The folder is emptied first."""
    out = out or root / DIST
    shutil.rmtree(out, ignore_errors=True)
    _run("build", "--no-isolation", "--outdir", str(out), root=root)
    return sorted(out.iterdir())


def check_metadata(made: Sequence[Path]) -> None:
    """What the index would refuse, by twine."""
    _run("twine", "check", "--strict", *map(str, made))


def check_in_empty_environment(wheel: Path, *, packages: Path | None = None) -> str:
    """Install the wheel where nothing else is, take first steps there, and return the version that it names.

    Args:
        wheel: the file.
        packages: a folder of installed packages to use instead of installing what the wheel needs; for tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder, "venv")
        _run("venv", str(venv))
        python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = ["uv", "pip", "install", "--quiet", "--python", str(python)]
        _run(*install, *(["--no-deps"] if packages else []), str(wheel))
        extra = {"PYTHONPATH": str(packages)} if packages else {}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | extra
        command = [str(python), "-c", FIRST_STEPS]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise SystemExit(f"{wheel.name} does not work in an environment of its own:\n{done.stderr[-3000:]}")
        return done.stdout.strip()


def check_chapters() -> None:
    """Each chapter alone in an empty folder, beside the wheel; takes as long as the chapters do."""
    tests = ("-q", "tests/infra/test_wheel.py")
    _run("pytest", *tests, environment={"SVIT_ALONE": "1", "OMP_NUM_THREADS": "1"})


def _run(module: str, *words: str, root: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
    """Run a module of this environment.

    Raises:
        SystemExit: it fails.
    """
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=root, env={**os.environ, **(environment or {})}, check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(words)} failed, see above")


def main(argv: Sequence[str] | None = None) -> int:
    """Make a release and check it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description="Build and check a release.")
    parser.add_argument("--version", help="write this version and the changelog first")
    parser.add_argument("--without-chapters", action="store_true", help="leave the longest check out")
    options = parser.parse_args(argv)
    if options.version:
        write_version(options.version)
        write_changelog(options.version)
    version = current()
    made = build()
    check_metadata(made)
    [wheel] = [path for path in made if path.suffix == ".whl"]
    if (named := check_in_empty_environment(wheel)) != version:
        raise SystemExit(f"{wheel.name} says that it is {named}, not {version}")
    if not options.without_chapters:
        check_chapters()
    print(f"{version}: {', '.join(path.name for path in made)} in {DIST}/ are ready; nothing was uploaded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
