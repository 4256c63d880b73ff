"""Stamp links into the README, and links and set-up cell into the notebooks: ``make links``.

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
from typing import Any

from svit_course import notebooks, stamp
from svit_utils.files import write_file

README = notebooks.ROOT / "README.md"
BEGIN = "<!-- links: begin (written by `make links`) -->"
END = "<!-- links: end -->"
MASTER = (
    "*A master: it holds the solutions and the hidden tests. `make course` makes the version to hand out, "
    "in `build/course/student/`.*"
)


def from_pyproject(root: Path = notebooks.ROOT) -> str | None:
    """``owner/name`` as pyproject.toml gives it; None where it gives none."""
    # By a pattern and not by tomllib, which Python 3.10 does not have.
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository\s*=\s*"([^"]+)"', text, flags=re.MULTILINE)
    return stamp.owner_name(found.group(1)) if found else None


def from_git(root: Path = notebooks.ROOT) -> str | None:
    """``owner/name`` of the git remote ``origin``; None where that is not on GitHub."""
    done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True, check=False)
    address = done.stdout.strip()
    return stamp.owner_name(address) if stamp.GITHUB.search(address) else None


def stamped(readme: Path = README) -> str | None:
    """The repository that the README's links name; None when it has no links."""
    found = re.search(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/", readme.read_text(encoding="utf-8"))
    return found.group(1) if found else None


def stamp_notebook(notebook: Any, path: Path, repository: str | None) -> bool:
    """Put links and set-up cell at the head of a chapter or a master. True when something changed."""
    package = f"selectivevit @ git+https://github.com/{repository}" if repository else None
    return stamp.stamp_cells(notebook, notebook_links(repository, path), stamp.setup_source(package))


def notebook_links(repository: str | None, path: Path) -> str:
    """The Markdown of a notebook's first cell."""
    if path.parent.name == "assignments":
        return MASTER
    if repository is None:
        return "*Run it with `make lab`, all chapters with `make walkthrough`; `make help` lists the rest.*"
    name = f"notebooks/{path.name}"
    return (
        f"[Open in Colab]({stamp.colab(repository, name)}) · [Open in Binder]({stamp.binder(repository, name)}) · "
        f"[The repository](https://github.com/{repository})"
    )


def stamp_readme(text: str, repository: str | None, paths: list[Path]) -> str:
    """The README's text with the links of the chapters ``paths`` between its markers.

    Raises:
        SystemExit: the markers are not there.
    """
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md has lost its markers {BEGIN} and {END}")
    block = ""
    if repository is not None:
        links = []
        for path in paths:
            name = f"notebooks/{path.name}"
            addresses = f"[Colab]({stamp.colab(repository, name)}) [Binder]({stamp.binder(repository, name)})"
            links.append(f"{path.stem[:2]} {addresses}")
        block = "In the browser: " + " ·\n".join(links) + "\n"
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{block}{END}{rest.split(END, 1)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Stamp every file, or with ``--check`` compare; the exit status."""
    parser = argparse.ArgumentParser(description="Stamp the links and the set-up cell into README and notebooks.")
    parser.add_argument("--repository", help="owner/name, where pyproject.toml and the git remote do not say")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a file differs")
    options = parser.parse_args(argv)
    named = stamp.owner_name(options.repository) if options.repository else None
    if options.repository and not named:
        parser.error(f"--repository is owner/name or a GitHub address, not {options.repository!r}")
    if options.check:
        # Not the remote: a clone of a fork is not wrong.
        repository = from_pyproject() or stamped()
    else:
        repository = from_pyproject() or from_git() or named

    paths, different = notebooks.chapters(), []
    readme = README.read_text(encoding="utf-8")
    if (new := stamp_readme(readme, repository, paths)) != readme:
        different.append("README.md")
        if not options.check:
            write_file(README, new)
    for path in [*paths, *sorted((notebooks.NOTEBOOKS / "assignments").glob("*.ipynb"))]:
        notebook = notebooks.read(path)
        if stamp_notebook(notebook, path, repository):
            different.append(path.relative_to(notebooks.ROOT).as_posix())
            if not options.check:
                notebooks.write(notebook, path)
    if options.check and different:
        print(f"The links for {repository or 'no repository'} differ in {', '.join(different)}: run `make links`.")
        return 1
    print(f"repository: {repository or 'not set, no links'}; changed: {', '.join(different) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
