"""`make release`: one version everywhere, the changelog from its fragments, wheel and sdist that work alone."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from svit_course.notebooks import ROOT
from svit_utils import __version__
from tools import release


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs the extra `release`: {', '.join(missing)}")


def test_the_version_is_the_same_everywhere_and_comes_from_the_package() -> None:
    assert release.current() == __version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and not re.search(r"^version = ", project, flags=re.MULTILINE)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """The files that a release changes."""
    for name in ("svit_utils/__init__.py", "CITATION.cff", "README.md", "CHANGELOG.md", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "changes", tmp_path / "changes")
    return tmp_path


def test_a_version_is_written_wherever_it_stands(scratch: Path) -> None:
    release.write_version("7.8.9rc1", scratch)
    assert release.current(scratch) == "7.8.9rc1"
    citation = (scratch / "CITATION.cff").read_text(encoding="utf-8")
    assert "cff-version: 1.2.0" in citation and "\nversion: 7.8.9rc1\n" in citation
    assert "selectivevit-7.8.9rc1-py3-none-any.whl" in (scratch / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", ["1.2", "v1.2.3", "1.2.3 ", "", "newest"])
def test_what_is_no_version_is_refused(wrong: str, scratch: Path) -> None:
    with pytest.raises(SystemExit, match="three numbers"):
        release.write_version(wrong, scratch)
    assert release.current(scratch) == __version__


def test_a_version_that_differs_somewhere_is_refused(scratch: Path) -> None:
    path = scratch / "CITATION.cff"
    path.write_text(path.read_text(encoding="utf-8").replace(__version__, "9.9.9"), encoding="utf-8")
    with pytest.raises(SystemExit, match="not the same everywhere"):
        release.current(scratch)


@needs("towncrier")
def test_fragments_become_a_section_that_looks_like_the_rest(scratch: Path) -> None:
    for path in (scratch / "changes").glob("*.*.md"):
        path.unlink()
    before = (scratch / "CHANGELOG.md").read_text(encoding="utf-8")
    (scratch / "changes" / "one.added.md").write_text("A thing: `thing(x)`.\n", encoding="utf-8")
    (scratch / "changes" / "two.added.md").write_text("Another,\nin two lines.\n", encoding="utf-8")
    (scratch / "changes" / "three.fixed.md").write_text("What was wrong.\n", encoding="utf-8")
    release.write_changelog("7.8.9", scratch)
    after = (scratch / "CHANGELOG.md").read_text(encoding="utf-8")
    head, rest = before.split("## [Unreleased]\n", 1)
    assert after.startswith(head + "## [Unreleased]\n") and after.endswith(rest.lstrip("\n"))
    new = after.removeprefix(head + "## [Unreleased]\n").removesuffix(rest.lstrip("\n"))
    assert re.fullmatch(
        r"\n## \[7\.8\.9\] - \d{4}-\d\d-\d\d\n\n### Added\n\n- A thing: `thing\(x\)`\.\n"
        r"- Another,\n  in two lines\.\n\n### Fixed\n\n- What was wrong\.\n\n",
        new,
    ), new
    assert sorted(path.name for path in (scratch / "changes").iterdir()) == ["README.md", "template.md"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    for module in ("build", "hatchling"):
        pytest.importorskip(module)
    return release.build(out=tmp_path_factory.mktemp("dist") / "made")


def test_wheel_and_sdist_carry_the_version(made: list[Path]) -> None:
    assert [path.name for path in made] == [
        f"selectivevit-{__version__}-py3-none-any.whl",
        f"selectivevit-{__version__}.tar.gz",
    ]
    names = zipfile.ZipFile(made[0]).namelist()
    assert any(name.startswith("svit_utils/_embedded/checkpoints/") for name in names), "built from the sdist"
    with tarfile.open(made[1]) as archive:
        assert not [name for name in archive.getnames() if "/tests/" in name or "/notebooks/" in name]


@needs("twine")
def test_the_metadata_is_accepted(made: list[Path]) -> None:
    release.check_metadata(made)


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_is(made: list[Path]) -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    assert release.check_in_empty_environment(made[0], packages=packages) == __version__


def test_the_workflow_checks_before_it_uploads_and_keeps_no_password() -> None:
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["needs"] == "build" and jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "make release" in [step.get("run") for step in jobs["build"]["steps"]]
    assert "secrets." not in text and "password:" not in text and "repository-url" not in text
