"""The versions that are named: oldest ones that are tried, and the same Pythons wherever Pythons are listed."""

from __future__ import annotations

import itertools
import re
import sys
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from svit_course.notebooks import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def requirements() -> list[Requirement]:
    """Every requirement of the library and its extras."""
    found = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    return [item for item in map(Requirement, found) if item.name != PROJECT["name"]]  # not an extra that names others


def pythons() -> list[tuple[int, int]]:
    """The Pythons of the classifiers."""
    names = [name.removeprefix("Programming Language :: Python :: ") for name in PROJECT["classifiers"]]
    return [_version(name) for name in names if name.startswith("3.")]


def jobs(workflow: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8"))["jobs"]


def python_of(job: dict[str, Any]) -> tuple[int, int]:
    [version] = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    return _version(version)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_package_has_an_oldest_version(requirement: Requirement) -> None:
    """Without one, `uv --resolution lowest-direct` takes the first release there ever was."""
    [bound] = requirement.specifier
    assert bound.operator == ">="


def test_the_pythons_are_the_same_everywhere() -> None:
    listed = pythons()
    oldest, newest = listed[0], listed[-1]
    assert listed == [(3, minor) for minor in range(oldest[1], newest[1] + 1)]
    assert PROJECT["requires-python"] == f">=3.{oldest[1]}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{oldest[1]}"
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    [one] = re.findall(r"^  - python=(3\.\d+)(?: #.*)?$", conda, flags=re.MULTILINE)
    assert _version(one) in listed
    for file in ("README.md", "Makefile"):
        assert f"Python 3.{oldest[1]} or newer" in (ROOT / file).read_text(encoding="utf-8"), file
    assert all(oldest <= _version(text) <= newest for text in jobs("ci.yml")["test"]["strategy"]["matrix"]["python"])
    assert python_of(jobs("versions.yml")["lowest"]) == oldest
    assert python_of(jobs("versions.yml")["newest"]) == newest


@pytest.mark.parametrize(("name", "option"), [("lowest", "--resolution lowest-direct"), ("newest", "--upgrade")])
def test_the_jobs_install_and_test(name: str, option: str) -> None:
    commands = [step["run"] for step in jobs("versions.yml")[name]["steps"] if "run" in step]
    [install] = [command for command in commands if command.startswith("uv pip install")]
    assert option in install and install.endswith('-e ".[dev]"')
    assert commands.index(install) < len(commands) - 1 and "pytest -q tests" in commands[-1]
