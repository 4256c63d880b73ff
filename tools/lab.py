"""Open JupyterLab on a chapter: ``python -m tools.lab 03``, which is what `make lab` runs.

Two folders of Jupyter settings lie in `tools/jupyter/`. `make environment` copies `everyone` into the environment: no
menus of nbgrader, which comes with the environment for the lecturer's sake, and notebooks that keep what they say of
their kernel when they are saved. `lecturer` brings the menus back.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from svit_course import notebooks

LECTURER = notebooks.ROOT / "tools" / "jupyter" / "lecturer"
CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")  # Docker's and Podman's


def in_container() -> bool:
    """Whether this is a container, as far as Docker, Podman, systemd and Kubernetes say so."""
    named = "container" in os.environ or "KUBERNETES_SERVICE_HOST" in os.environ
    return named or any(Path(name).exists() for name in CONTAINER_FILES)


def root_options(allowed: bool) -> list[str]:
    """What JupyterLab has to be told where root starts it; nothing for anybody else.

    Args:
        allowed: the reader has said that they want this.

    Raises:
        SystemExit: it is root, outside a container, and has not said so.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return []
    if not allowed and not in_container():
        raise SystemExit(
            "JupyterLab does not start as root, because every cell could then change the whole system: "
            "use another account, or, if you want it all the same, `make lab ROOT=yes`"
        )
    print("JupyterLab runs as root here: every cell may change the whole system or container.", file=sys.stderr)
    return ["--allow-root"]


def main(argv: list[str] | None = None) -> None:
    """Start JupyterLab and stay until it ends."""
    parser = argparse.ArgumentParser(description="Open JupyterLab on a chapter.")
    parser.add_argument("chapter", nargs="?", default="01", help="the beginning of its name, such as 03")
    parser.add_argument("--root", action="store_true", help="start although this is root")
    parser.add_argument("--nbgrader", action="store_true", help="with nbgrader's menus, for lecturers")
    options, others = parser.parse_known_args(argv)  # the others are JupyterLab's own, such as --no-browser
    chapter = notebooks.chapters([options.chapter])[0]
    arguments = [*root_options(options.root), *others, os.path.relpath(chapter)]
    if options.nbgrader:
        earlier = os.environ.get("JUPYTER_CONFIG_PATH")
        os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, (str(LECTURER), earlier)))
    from jupyterlab.labapp import LabApp  # reads the settings' paths when it is imported

    LabApp.launch_instance(arguments)


if __name__ == "__main__":
    main()
