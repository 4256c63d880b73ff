"""Stamp links into the README, and links and set-up cell into the notebooks: ``make links``.

Where the repository lives is said by ``REPO=owner/name``, else by ``[project.urls] Repository`` in pyproject.toml, else
by the git remote ``origin`` when it is on GitHub. On GitHub the workflow ``.github/workflows/links.yml`` stamps at each
push, so that a fork's links lead to the fork. Without any of them no link is written, and the set-up cell looks for the
package's wheel beside the notebook instead. ``--check`` changes nothing and fails where a file differs from what it was
stamped for, or from pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svit_course import notebooks, stamp
from svit_utils.files import write_file

README = notebooks.ROOT / "README.md"
BEGIN = "<!-- links: begin (written by `make links`) -->"
END = "<!-- links: end -->"
NOT_YET = (
    "In the browser: links to Colab and Binder stand here as soon as the repository, or a fork with its workflows\n"
    "turned on, is on GitHub. Until then: in Colab *File → Upload notebook*, on Binder the repository's address;\n"
    "the first code cell says what else is needed.\n"
)
# What is installed from the repository; other commits leave the notebooks as they are.
PACKAGE = ("svit_utils", "svit_course", "pyproject.toml")
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
    done = subprocess.run(
        ["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, encoding="utf-8", check=False
    )
    address = done.stdout.strip()
    return stamp.owner_name(address) if stamp.GITHUB.search(address) else None


def repository(named: str | None = None) -> str | None:
    """``owner/name``: as named, else as pyproject.toml gives it, else the git remote; None without any of them."""
    return named or from_pyproject() or from_git()


def last_change(root: Path = notebooks.ROOT) -> str | None:
    """The commit that last changed the package, which the notebooks install on Colab; None outside of git."""
    command = ["git", "log", "-1", "--format=%H", "--", *PACKAGE]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


@dataclass(frozen=True)
class Place:
    """Where the repository lives: ``owner/name``, the branch of its links, and the package's commit if it is known."""

    repository: str
    branch: str = "main"
    commit: str | None = None

    @property
    def package(self) -> str:
        """What pip installs: the package as it was when the notebooks were stamped."""
        return f"selectivevit @ git+https://github.com/{self.repository}" + (f"@{self.commit}" if self.commit else "")


def stamped(root: Path = notebooks.ROOT) -> Place | None:
    """What the README and the set-up cell of the first chapter were stamped for; None when there are no links."""
    address = r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/(\S+?)/notebooks/"
    found = re.search(address, (root / "README.md").read_text(encoding="utf-8"))
    if found is None:
        return None
    chapter = min((root / "notebooks").glob("*.ipynb")).read_text(encoding="utf-8")
    commit = re.search(r"selectivevit @ git\+https://[\w./-]+@(\w+)", chapter)
    return Place(found.group(1), found.group(2), commit.group(1) if commit else None)


def stamp_notebook(notebook: Any, path: Path, place: Place | None) -> bool:
    """Put links and set-up cell at the head of a chapter or a master. True when something changed."""
    setup = stamp.setup_source(place.package if place else None)
    return stamp.stamp_cells(notebook, notebook_links(place, path), setup)


def notebook_links(place: Place | None, path: Path) -> str:
    """The Markdown of a notebook's first cell."""
    if path.parent.name == "assignments":
        return MASTER
    if place is None:
        return "*Run it in JupyterLab or Colab (in the repository: `make lab`).*"
    where = (place.repository, f"notebooks/{path.name}", place.branch)
    return (
        f"[Open in Colab]({stamp.colab(*where)}) · [Open in Binder]({stamp.binder(*where)}) · "
        f"[The repository](https://github.com/{place.repository})"
    )


def stamp_readme(text: str, place: Place | None, paths: list[Path]) -> str:
    """The README's text with the links of the chapters ``paths`` between its markers.

    Raises:
        SystemExit: the markers are not there.
    """
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md has lost its markers {BEGIN} and {END}")
    block = NOT_YET
    if place is not None:
        links = []
        for path in paths:
            where = (place.repository, f"notebooks/{path.name}", place.branch)
            links.append(f"{path.stem[:2]} [Colab]({stamp.colab(*where)}) [Binder]({stamp.binder(*where)})")
        block = "In the browser: " + " ·\n".join(links) + "\n"
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{block}{END}{rest.split(END, 1)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Stamp every file, or with ``--check`` compare; the exit status."""
    parser = argparse.ArgumentParser(description="Stamp the links and the set-up cell into README and notebooks.")
    parser.add_argument("--repository", help="owner/name, where pyproject.toml and the git remote do not say it right")
    parser.add_argument("--branch", default="main", help="that the links lead to (default: main)")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a file differs")
    options = parser.parse_args(argv)
    named = stamp.named_repository(parser, options.repository)
    if options.check:
        # Not the remote: a clone of a fork is not wrong.
        place, declared = stamped(), from_pyproject()
        if declared and (place is None or place.repository != declared):
            place = Place(declared)
    else:
        home = repository(named)
        place = Place(home, options.branch, last_change()) if home else None
    home = place.repository if place else None

    paths, different = notebooks.chapters(), []
    readme = README.read_text(encoding="utf-8")
    if (new := stamp_readme(readme, place, paths)) != readme:
        different.append("README.md")
        if not options.check:
            write_file(README, new)
    for path in [*paths, *sorted((notebooks.NOTEBOOKS / "assignments").glob("*.ipynb"))]:
        notebook = notebooks.read(path)
        if stamp_notebook(notebook, path, place):
            different.append(path.relative_to(notebooks.ROOT).as_posix())
            if not options.check:
                notebooks.write(notebook, path)
    if options.check and different:
        print(f"The links for {home or 'no repository'} differ in {', '.join(different)}: run `make links`.")
        return 1
    print(f"repository: {home or 'not set, no links'}; changed: {', '.join(different) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
