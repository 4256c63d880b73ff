"""Stamp the Colab and Binder links, and the first code cell, into the README and the notebooks: ``make links``.

One setting says where the repository lives: ``[project.urls] Repository`` in pyproject.toml, else the git remote
``origin`` when it is on GitHub, else ``REPO=owner/name``. Without any of them no link is written, and the set-up cell
looks for the package's wheel beside the notebook instead. ``--check`` changes nothing and fails where a file differs
from what it was stamped for, or from pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from nbformat.v4 import new_code_cell, new_markdown_cell

import nbtools

README = nbtools.ROOT / "README.md"
BEGIN = "<!-- links: begin (written by `make links`) -->"
END = "<!-- links: end -->"
_GITHUB = re.compile(r"github\.com[:/]+([\w.-]+)/([\w.-]+?)(?:\.git)?/?$")

# What Colab may lack besides the package itself. Never torch, torchvision or numpy: replacing those breaks the machine.
LIGHT = {"timm": "timm", "captum": "captum", "pytorch_grad_cam": "grad-cam", "ttach": "ttach"}


def owner_name(url: str) -> str | None:
    """``owner/name`` of a GitHub address, or of ``owner/name`` itself; None for anything else."""
    if found := _GITHUB.search(url):
        return f"{found.group(1)}/{found.group(2)}"
    return url if re.fullmatch(r"[\w.-]+/[\w.-]+", url) else None


def from_pyproject(root: Path = nbtools.ROOT) -> str | None:
    # By a pattern and not by tomllib, which Python 3.10 does not have.
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository\s*=\s*"([^"]+)"', text, flags=re.MULTILINE)
    return owner_name(found.group(1)) if found else None


def from_git(root: Path = nbtools.ROOT) -> str | None:
    done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True, check=False)
    found = _GITHUB.search(done.stdout.strip())
    return f"{found.group(1)}/{found.group(2)}" if found else None


def stamped(readme: Path = README) -> str | None:
    """The repository that the README's links name; None when it has no links."""
    found = re.search(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/", readme.read_text(encoding="utf-8"))
    return found.group(1) if found else None


def colab(repository: str, path: str) -> str:
    return f"https://colab.research.google.com/github/{repository}/blob/main/{path}"


def binder(repository: str, path: str) -> str:
    return f"https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/{path}"


def readme_block(repository: str | None, paths: list[Path]) -> str:
    if repository is None:
        return f"{BEGIN}\n{END}"
    links = []
    for path in paths:
        name = f"notebooks/{path.name}"
        links.append(f"{path.stem[:2]} [Colab]({colab(repository, name)}) [Binder]({binder(repository, name)})")
    return f"{BEGIN}\nIn the browser: " + " ·\n".join(links) + f"\n{END}"


MASTER = (
    "*A master: it holds the solutions and the hidden tests. `make course` makes the version to hand out, "
    "in `build/course/student/`.*"
)


def notebook_links(repository: str | None, path: Path) -> str:
    if path.parent.name == "assignments":
        return MASTER
    if repository is None:
        return "*Run it with `make lab`, all chapters with `make walkthrough`; `make help` lists the rest.*"
    name = f"notebooks/{path.name}"
    return (
        f"[Open in Colab]({colab(repository, name)}) · [Open in Binder]({binder(repository, name)}) · "
        f"[The repository](https://github.com/{repository})"
    )


def setup_source(repository: str | None, wheel: str | None = None) -> str:
    """The first code cell: at most five lines; on Colab it installs what is missing, elsewhere it does nothing.

    ``wheel``: the address of one, to be installed instead of the repository.
    """
    if wheel:
        package = f'"{wheel}"'
    elif repository:
        package = f'"selectivevit @ git+https://github.com/{repository}"'
    else:  # the wheel, uploaded beside the notebook
        package = 'next(iter(__import__("glob").glob("selectivevit-*.whl")), "./selectivevit.whl")'
    needed = ", ".join(f'"{module}": "{name}"' for module, name in LIGHT.items())
    return "\n".join(
        [
            "import importlib.util, subprocess, sys  # on Colab: installs what is missing, never torch or numpy",
            f"package = {package}",
            f'needed = {{"svit_utils": package, {needed}}}',
            'missing = [needed[m] for m in needed if "google.colab" in sys.modules '
            "and not importlib.util.find_spec(m)]",
            'if missing: subprocess.run([sys.executable, *"-m pip install -q --no-deps".split(), '
            "*missing], check=True)",
        ]
    )


def stamp_notebook(notebook: object, path: Path, repository: str | None) -> bool:
    """Put the two cells at the head of the notebook, replacing those that are there. True when something changed."""
    return stamp_cells(notebook, notebook_links(repository, path), setup_source(repository))


def stamp_cells(notebook: object, text: str, setup_code: str) -> bool:
    """`stamp_notebook` with the sources of the two cells."""
    cells = notebook.cells  # type: ignore[attr-defined]
    before = [(cell.get("id"), cell.cell_type, cell.source) for cell in cells]
    links = _take(cells, nbtools.LINKS_ID) or new_markdown_cell(id=nbtools.LINKS_ID)
    setup = _take(cells, nbtools.SETUP_ID) or new_code_cell(id=nbtools.SETUP_ID)
    links.source, setup.source = text, setup_code
    cells.insert(0, links)
    first_code = next((index for index, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    cells.insert(first_code, setup)
    return before != [(cell.get("id"), cell.cell_type, cell.source) for cell in cells]


def _take(cells: list, identity: str):
    for index, cell in enumerate(cells):
        if cell.get("id") == identity:
            return cells.pop(index)
    return None


def stamp_readme(text: str, repository: str | None, paths: list[Path]) -> str:
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md has lost its markers {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    return head + readme_block(repository, paths) + rest.split(END, 1)[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Stamp the links and the set-up cell into README and notebooks.")
    parser.add_argument("--repository", help="owner/name, where pyproject.toml and the git remote do not say")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a file differs")
    options = parser.parse_args(argv)
    if options.repository and not owner_name(options.repository):
        parser.error(f"--repository is owner/name or a GitHub address, not {options.repository!r}")
    if options.check:
        # Not the remote: a clone of a fork is not wrong.
        repository = from_pyproject() or stamped()
    else:
        repository = from_pyproject() or from_git() or (owner_name(options.repository) if options.repository else None)

    paths, different = nbtools.chapters(), []
    readme = README.read_text(encoding="utf-8")
    if (new := stamp_readme(readme, repository, paths)) != readme:
        different.append("README.md")
        if not options.check:
            README.write_text(new, encoding="utf-8")
    for path in [*paths, *sorted((nbtools.NOTEBOOKS / "assignments").glob("*.ipynb"))]:
        notebook = nbtools.read(path)
        if stamp_notebook(notebook, path, repository):
            different.append(path.relative_to(nbtools.ROOT).as_posix())
            if not options.check:
                nbtools.write(notebook, path)
    if options.check and different:
        print(f"The links for {repository or 'no repository'} differ in {', '.join(different)}: run `make links`.")
        return 1
    print(f"repository: {repository or 'not set, no links'}; changed: {', '.join(different) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
