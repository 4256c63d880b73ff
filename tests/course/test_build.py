"""What is handed out holds no answer, and nbgrader's own autograder gives the marks that ours gives."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from svit_course import build, notebooks
from svit_course import masters as m

STEMS = [path.stem for path in m.masters()]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(tmp_path_factory.mktemp("course"), repository="me/my-course")


def student_version(course: Path, stem: str) -> Path:
    return course / "student" / "notebooks" / "assignments" / f"{stem}.ipynb"


def private_lines(stem: str) -> set[str]:
    """Lines between the markers of the master, by another way than `build.leaks` goes."""
    found, shown, inside = set(), "", False
    for cell in notebooks.read(m.master(stem)).cells:
        for line in cell.source.splitlines():
            if re.search(r"### BEGIN (SOLUTION|HIDDEN TESTS)", line):
                inside = True
            elif re.search(r"### END (SOLUTION|HIDDEN TESTS)", line):
                inside = False
            elif inside:
                found.add(line.strip())
            elif m.part(cell) != "written":
                shown += line + "\n"
        assert not inside, "a region without an end"
        if m.part(cell) == "written":
            found |= {line.strip() for line in cell.source.splitlines()}
    # What the text or a given cell shows anyway is no secret.
    return {line for line in found if len(line) > 20 and line not in shown}


@pytest.mark.parametrize("stem", STEMS)
def test_the_students_version_holds_no_answer(course: Path, stem: str) -> None:
    path = student_version(course, stem)
    # As text, so that outputs and metadata are looked through as well as sources; JSON's escapes undone.
    raw = json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False)
    lines = private_lines(stem)
    assert len(lines) > 20
    assert not [line for line in lines if json.dumps(line, ensure_ascii=False)[1:-1] in raw]
    notebook = notebooks.read(path)
    assert not [cell for cell in notebooks.code_cells(notebook) if cell.outputs or cell.execution_count]
    stubs = [cell for cell in notebook.cells if m.part(cell) == "answer"]
    assert len(stubs) >= 3 and all("YOUR CODE HERE" in cell.source for cell in stubs)
    assert sum("YOUR ANSWER HERE" in cell.source for cell in notebook.cells) >= 1


@pytest.mark.parametrize("place", ["source", "output", "metadata", "written"])
def test_a_leak_is_noticed(course: Path, place: str) -> None:
    original = notebooks.read(m.master("a"))
    notebook: Any = copy.deepcopy(notebooks.read(student_version(course, STEMS[0])))
    assert not list(build.leaks(notebook, original))
    line = "return exp / exp.sum(axis=-1, keepdims=True)"
    if place == "source":
        notebook.cells[-1].source += f"\n{line}"
    elif place == "output":
        cell = notebooks.code_cells(notebook)[-1]
        cell.outputs = [{"output_type": "stream", "name": "stdout", "text": '{"seed": 11, "shape": [2, 3, 4, 5]}'}]
    elif place == "metadata":
        notebook.metadata["note"] = line
    else:
        notebook.cells[0].source += "(ii) The ratio grows from 2 to $0.3/0.05 = 6$: the cut also"
    assert list(build.leaks(notebook, original))


def test_what_is_handed_out_is_complete(course: Path) -> None:
    student = course / "student"
    names = {path.relative_to(student).as_posix() for path in student.rglob("*") if path.is_file()}
    wheel = next(name for name in names if name.endswith(".whl"))
    assert {"README.md", "environment.yml", "postBuild", "notebooks/glossary.md"} <= names
    assert wheel in (student / "postBuild").read_text() and wheel in (student / "README.md").read_text()
    assert "-e ." not in (student / "environment.yml").read_text()
    # Links between the notebooks, to the glossary and to pictures all lead somewhere.
    for path in (student / "notebooks").rglob("*.ipynb"):
        for cell in notebooks.read(path).cells:
            if cell.cell_type == "markdown":
                for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", cell.source):
                    if link.endswith((".ipynb", ".md", ".png")):
                        assert (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("stem", STEMS)
def test_it_opens_in_colab_and_binder(course: Path, stem: str) -> None:
    notebook = notebooks.read(student_version(course, stem))
    assert (
        f"colab.research.google.com/github/me/my-course/blob/main/notebooks/assignments/{stem}.ipynb"
        in notebook.cells[0].source
    )
    setup = notebooks.code_cells(notebook)[0].source
    assert "https://github.com/me/my-course/raw/main/selectivevit-" in setup
    # Nothing of nbgrader's is imported anywhere: students do not have it.
    assert not [cell for cell in notebooks.code_cells(notebook) if "nbgrader" in cell.source]


# ------------------------------------------------------------------------------------------------ the masters


@pytest.mark.parametrize("stem", STEMS)
def test_a_master_says_what_it_asks_for(stem: str) -> None:
    """20 marks; a visible and a hidden test for each coded question; one plot; written answers with a rubric."""
    from svit_course import questions
    from svit_course.grading.feedback import rubric

    cells = m.read_cells(m.master(stem))
    assert sum(cell.points for cell in cells) == 20
    asked = [q.name for q in questions(stem[0])]
    assert [cell.id for cell in cells if cell.part == "answer"] == asked
    assert [cell.question for cell in cells if cell.part == "visible"] == asked
    assert [cell.question for cell in cells if cell.part == "hidden"] == asked
    by_hand = [cell for cell in cells if cell.part in ("plot", "written")]
    assert sum(cell.part == "plot" for cell in by_hand) == 1
    assert sum(cell.part == "written" for cell in by_hand) >= 1
    for cell in by_hand:
        assert rubric()[cell.id], f"rubric.md has no section {cell.id}"
    title = next(cell.source for cell in notebooks.read(m.master(stem)).cells if cell.source.startswith("# Assignment"))
    for word in ("**Difficulty**", "**Importance**", "**Time**", "**Read first**"):
        assert word in title
    for cell in cells:
        if cell.points:
            assert f"| {cell.question} |" in title


def test_the_sidebar_shows_titles_and_ends_with_the_lecturers_pages() -> None:
    """A formula in a title is not set where the theme lists it; the rubric is no page to meet before an assignment."""
    for path in m.masters():
        assert "$" not in notebooks.title(notebooks.read(path), "")
    contents = (notebooks.ROOT / "book" / "contents.md").read_text(encoding="utf-8")
    *_, last = contents.split(":caption: ")
    assert last.startswith("For lecturers") and "rubric" in last and contents.count("rubric") == 1


def test_the_semester_reads_a_chapter_before_an_assignment_on_it_is_due() -> None:
    """e was handed out whole a week before the chapter that half of it leans on."""
    text = (m.ASSIGNMENTS / "semester.md").read_text(encoding="utf-8")
    weeks = re.findall(r"^\| (\d+) \| ([^|]*) \| [^|]* \| ([^|]*) \|$", text, flags=re.MULTILINE)
    assert [int(week) for week, *_ in weeks] == list(range(1, 13))
    for path in m.masters():
        letter = path.stem[0]
        first = next(cell.source for cell in notebooks.read(path).cells if "**Read first**" in cell.source)
        chapters = re.findall(r"\[chapter (\d)\]", first.split("**Read first**")[1].split("\n")[0])
        due = next(int(week) for week, _, home in weeks if f"**{letter}** due" in home)
        read = {c: min(int(week) for week, text, _ in weeks if f"chapter {c}" in text) for c in chapters}
        assert max(read.values()) <= due, (letter, read, due)
        out, home = next((int(week), home) for week, _, home in weeks if f"**{letter}** handed out" in home)
        if max(read.values()) > out:
            assert f"**{letter}** handed out: {letter}1" in home, f"{letter}: which questions need only what was read?"


def headings(chapter: str) -> tuple[set[str], set[str]]:
    """(numbers, titles) of a chapter's sections; "4.2" counts as "4.2"."""
    numbers, titles = set(), set()
    for cell in notebooks.read(notebooks.chapters([chapter.zfill(2)])[0]).cells:
        if cell.cell_type == "markdown":
            for line in re.findall(r"^##+ (.+?)(?: \*\(optional\)\*)?$", cell.source, re.MULTILINE):
                number = re.match(r"(\d+(?:\.\d+)?)\.? ", line)
                numbers |= {number.group(1)} if number else set()
                titles.add(line[number.end() :] if number else line)
    return numbers, titles


def test_what_an_assignment_refers_to_exists() -> None:
    """Every chapter and section named by a question, by its number or by its title."""
    from svit_course import questions

    checked = 0
    for question in (q for stem in STEMS for q in questions(stem[0])):
        for chapter, named in re.findall(r"chapter (\d)((?:(?!chapter \d).)*)", question.section):
            numbers, titles = headings(chapter)
            for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", named):
                assert number in numbers, f"{question.name}: chapter {chapter} has no section {number}"
                checked += 1
            for title in re.findall(r'"([^"]+)"', named):
                assert title in titles, f"{question.name}: chapter {chapter} has no section {title!r}"
                checked += 1
    assert checked > 25


def test_the_first_five_chapters_link_to_their_assignments() -> None:
    linked = {}
    for path in notebooks.chapters()[:5]:
        text = "\n".join(cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown")
        linked[path.stem[1]] = set(re.findall(r"\]\(assignments/([a-f])_\w+\.ipynb\)", text))
        assert "](glossary.md" in text
    assert linked == {"1": {"a", "b"}, "2": {"a", "b", "c", "f"}, "3": {"d"}, "4": {"d", "f"}, "5": {"e"}}
    # And back: what is to be read first is linked.
    for path in m.masters():
        text = "\n".join(cell.source for cell in notebooks.read(path).cells)
        assert set(re.findall(r"\]\(\.\./0(\d)_", text)) >= {
            n for n, found in linked.items() if path.stem[0] in found
        } - {"2"}


@pytest.mark.parametrize("stem", STEMS)
def test_every_question_has_a_ladder_of_hints(stem: str, capsys: pytest.CaptureFixture[str]) -> None:
    from svit_course import hint, questions

    for question in questions(stem[0]):
        hint(question.name, 3)
        said = capsys.readouterr().out
        assert said.startswith("Hint 1 of ") and question.section in said
        assert all(case.get("what") for case in question.cases)
        with pytest.raises(ValueError, match="has hints 1 to"):
            hint(question.name, 9)


# ------------------------------------------------------------------------------------------------ nbgrader, end to end


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_nbgrader_gives_the_same_marks(course: Path, stem: str) -> None:
    """A solution and an untouched notebook through `nbgrader autograde`: every mark by tests, and none."""
    grading = course / "grading"
    solved = notebooks.read(m.master(stem))
    for cell in solved.cells:
        cell.source = m.without(cell.source, m.BEGIN_HIDDEN, m.END_HIDDEN)
    untouched = notebooks.read(student_version(course, stem))
    for student, notebook in (("solver", solved), ("stub", untouched)):
        path = grading / "submitted" / student / stem / f"{stem}.ipynb"
        path.parent.mkdir(parents=True)
        # A training run that only makes the notebook interesting is not part of what is tested here.
        notebook.cells = [c for c in notebook.cells if m.NOT_AT_GRADING not in c.metadata.get("tags", ())]
        notebooks.write(notebook, path)
    build.nbgrader(grading, "autograde", stem, "--create")
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{grading / 'gradebook.db'}") as book:
        got = {
            student: {
                g.name: g.auto_score
                for g in book.find_submission_notebook(stem, stem, student).grades
                if g.cell.cell_type == "code"
            }
            for student in ("solver", "stub")
        }
    tests = {cell.id: cell.points for cell in m.read_cells(m.master(stem)) if cell.part in ("visible", "hidden")}
    assert {name: got["solver"][name] for name in tests} == tests
    assert {name: got["stub"][name] for name in tests} == dict.fromkeys(tests, 0)
    if stem == STEMS[0]:
        build.nbgrader(grading, "generate_feedback", stem)
        assert list((grading / "feedback" / "solver" / stem).glob("*.html"))
