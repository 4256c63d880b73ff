"""environment.yml, pyproject.toml and requirements.txt name the same packages."""

from __future__ import annotations

import re

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from svit_course.notebooks import ROOT

CONDA_NAMES = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
# In environment.yml and not in pyproject.toml: the interpreter, pip, and what grad-cam needs of conda's packages.
CONDA_ONLY = {"python", "pip", "scikit-learn"}


def _string_lists(text: str, name: str) -> list[str]:
    """The strings of ``name = [...]`` in pyproject.toml (Python 3.10 has no tomllib)."""
    found = re.search(rf"^{name}\s*=\s*\[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    assert found, name
    return re.findall(r'"([^"]+)"', found.group(1))


def pyproject() -> dict[str, SpecifierSet]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = [Requirement(item) for name in ("dependencies", "notebooks") for item in _string_lists(text, name)]
    return {canonicalize_name(item.name): item.specifier for item in wanted}


def conda() -> tuple[dict[str, SpecifierSet], list[str]]:
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    listed = [item for item in content["dependencies"] if isinstance(item, str)]
    [from_pip] = [item["pip"] for item in content["dependencies"] if isinstance(item, dict)]
    # conda's `python=3.12` means what pip's `python==3.12.*` does
    listed = [re.sub(r"(?<=\w)=([\d.]+)$", r"==\1.*", item) for item in listed]
    wanted = [Requirement(item) for item in listed + [item for item in from_pip if not item.startswith("-")]]
    named = {CONDA_NAMES.get(item.name, canonicalize_name(item.name)): item.specifier for item in wanted}
    return named, [item for item in from_pip if item.startswith("-")]


def test_same_packages_and_ranges() -> None:
    in_conda, options = conda()
    assert {name: spec for name, spec in in_conda.items() if name not in CONDA_ONLY} == pyproject()
    assert options == ["-e ."]


def test_python_range_fits() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = re.search(r'requires-python = ">=(3\.\d+)"', text)
    assert lowest is not None
    [named] = conda()[0]["python"]
    assert named.version.removesuffix(".*") in SpecifierSet(f">={lowest.group(1)}")


def test_pins_fit_the_ranges_and_name_no_address() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert "://" not in text and "--hash" not in text and "@" not in text
    pins: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            item = Requirement(line)
            [exact] = item.specifier
            assert exact.operator == "=="
            pins.setdefault(canonicalize_name(item.name), []).append(exact.version)
    for name, allowed in pyproject().items():
        assert name in pins, f"{name} is not pinned"
        assert all(version in allowed for version in pins[name]), f"{name} {pins[name]} is not {allowed}"


def test_doctor_looks_for_the_same_packages() -> None:
    from svit_utils.cli import doctor

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = {canonicalize_name(Requirement(item).name) for item in _string_lists(text, "dependencies")}
    assert {canonicalize_name(name) for name in doctor.NEEDED.values()} == wanted
