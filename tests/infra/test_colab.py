"""A machine like Colab's: torch and numpy of its own, no package of ours, `google.colab` importable.

Not Colab itself, which cannot be had here: an environment that sees the packages of this one but the book's own, with
nothing faked in pip. With SVIT_ALONE=1 it also lacks timm, captum and grad-cam, which pip then fetches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from svit_course import notebooks, stamp
from svit_course.build import build_wheel

ROOT = notebooks.ROOT
OURS = ("svit", "selectivevit", "_selectivevit", "__editable__")
ONLINE = bool(os.environ.get("SVIT_ALONE"))
LACKING = ("timm", "captum", "pytorch_grad_cam", "grad_cam", "ttach") if ONLINE else ()
IN_A_CHAPTER = """
import ast, json, os, sys
import google.colab, importlib.metadata, importlib.util
os.environ["MPLBACKEND"] = "agg"
before = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "torchvision")}
assert importlib.util.find_spec("svit_utils") is None
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        cells = [cell for cell in json.load(file)["cells"] if cell["cell_type"] == "code"]
    scope = {"__name__": "__main__"}
    for cell in cells:
        source = "".join(cell["source"])
        if cell.get("id") == "svit-setup":
            exec(source, scope)
            print("set up:", os.path.basename(path), flush=True)
        elif not source.lstrip().startswith("%"):
            # what a cell imports at its own level; the rest of it is the chapter's business, and tested as that
            imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            exec(compile(ast.Module(imports, []), path, "exec"), scope)
import svit_utils
assert before == {name: importlib.metadata.version(name) for name in before}
print("from:", svit_utils.__file__)
from svit_utils import paths
assert paths.repo_root() is None and paths.checkpoints_dir().is_dir()
"""


@pytest.fixture(scope="module")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has everything but the package."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("colab")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    here, seen = Path(sysconfig.get_paths()["purelib"]), folder / "packages"
    seen.mkdir()
    left_out = (*OURS, *LACKING, "pip", "distutils-precedence")
    for entry in here.iterdir():
        if not entry.name.lower().startswith(left_out) and entry.suffix != ".pth":
            (seen / entry.name).symlink_to(entry)
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    own = Path(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip())
    (own / "colab.pth").write_text(f"{seen}\n", encoding="utf-8")
    (own / "google" / "colab").mkdir(parents=True)
    (own / "google" / "colab" / "__init__.py").touch()
    return python


def in_chapters(python: Path, folder: Path, chapters: list[Path], **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("SVIT_")}
    command = [str(python), "-c", IN_A_CHAPTER, *map(str, chapters)]
    done = subprocess.run(
        command, cwd=folder, env=kept | environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Colab is a Linux; this makes links")
@pytest.mark.parametrize("source", ["wheel", "repository"])
def test_every_chapter_sets_itself_up(source: str, colab: Path, tmp_path: Path) -> None:
    """From the wheel that a reader uploads, and from the address and commit that a notebook is stamped with."""
    uninstall = [str(colab), "-m", "pip", "uninstall", "--quiet", "--yes", "selectivevit"]
    subprocess.run(uninstall, check=True, capture_output=True)
    package, environment = None, {}
    if source == "wheel":
        build_wheel(tmp_path)
    else:
        # GitHub is not at hand: git is told to look for it in this repository
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", check=False
        )
        if commit.returncode:
            pytest.skip("not a git checkout")
        package = f"selectivevit @ git+https://github.com/owner/name@{commit.stdout.strip()}"
        environment = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://github.com/owner/name",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as "no isolation": hatchling is the one that is here
        }
    chapters = []
    for path in notebooks.chapters():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        [cell] = [cell for cell in notebook["cells"] if cell.get("id") == stamp.SETUP_ID]
        cell["source"] = stamp.setup_source(package)
        chapters.append(tmp_path / path.name)
        chapters[-1].write_text(json.dumps(notebook), encoding="utf-8")
    said = in_chapters(colab, tmp_path, chapters, **environment)
    assert [line.removeprefix("set up: ") for line in said if line.startswith("set up: ")] == [p.name for p in chapters]
    ready = [line for line in said if line.startswith("Ready: svit_utils is here")]
    assert len(ready) == len(chapters) and ("installed timm, captum, grad-cam" in ready[0]) == (
        ONLINE and source == "wheel"  # the second finds what the first has installed
    )
    assert all("nothing was missing" in line for line in ready[1:])
    assert said[-1] == f"from: {colab.parent.parent / said[-1].partition('/venv/')[2]}" and "site-packages" in said[-1]
