"""Grading, seen from outside: whatever a submission does ends as marks and messages, and the others' marks stand."""

from __future__ import annotations

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell

from svit_course import Question, Wrong, notebooks
from svit_course import masters as m
from svit_course.grading import command, hand, reading, reports, runs, submissions, tables, totals
from svit_course.question import decide
from svit_course.sandbox import wire
from tests.course.handed_in import MASTER, Change, answers, deletes, sandboxed, submission


def tampers(notebook: Any) -> None:
    """Its own given cell, tests that assert nothing, marks of its own, and a magic."""
    for cell in notebook.cells:
        if cell.get("id") == "given-imports":
            cell.source = "import numpy as np\nimport torch\ncheck = hint = lambda *a, **k: None"
        if cell.get("id", "").endswith(("-visible", "-hidden")):
            cell.source = "pass"
            cell.metadata["nbgrader"]["points"] = 100
    answers("a3", "def attention(q, k, v, tau):\n    return v")(notebook)
    notebook.cells.append(new_code_cell("%time 1 + 1\n!echo hello"))


def helped(notebook: Any) -> None:
    """A helper in a cell of one's own, and a scratch cell that fails."""
    place = next(i for i, cell in enumerate(notebook.cells) if cell.get("id") == "a1")
    notebook.cells.insert(place, new_code_cell("def exponentials(s):\n    return np.exp(s - s.max(-1, keepdims=True))"))
    notebook.cells.append(new_code_cell("1 / 0"))
    answers("a1", "def softmax(s):\n    e = exponentials(s)\n    return e / e.sum(-1, keepdims=True)")(notebook)


def copied(notebook: Any) -> None:
    answers("a4", "def attention_torch(q, k, v, tau):\n    from svit_utils import thresholded_attention\n"
                  "    return thresholded_attention(q, k, v, tau, return_weights=True)")(notebook)  # fmt: skip


def in_a2(body: str, before: str = "") -> Change:
    return answers("a2", f"{before}\ndef cut(p, tau):\n    {body}\n")


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(submissions, grades): eleven students, one of whom did nothing strange."""
    if not sandboxed():
        pytest.skip("no sandbox here: grading is refused, as the guide says")
    folder, out = tmp_path_factory.mktemp("submissions"), tmp_path_factory.mktemp("grades")
    submission(folder, "ada")
    submission(folder, "ben", in_a2("while True: pass"))
    submission(folder, "cai", in_a2("hoard = []\n    while True: hoard.append(np.ones(10**7))"))
    submission(folder, "dee", deletes("a3", "a6", "given-imports"))
    submission(folder, "eli", answers("a2", "def cut_it(p, tau):\n    return p"))
    submission(folder, "fay", in_a2(f"return eval(open({str(MASTER)!r}).read())"))
    submission(folder, "gus", in_a2(f"open({str(folder / 'ada' / 'note.txt')!r}, 'w').write('hello'); return p"))
    submission(folder, "hal", in_a2("os._exit(0)", "import os"))
    submission(folder, "ivy", tampers)
    submission(folder, "jan", helped)
    submission(folder, "kim", copied)
    submission(folder, "lou", answers("a4", "import torch\nwhile True: pass"))
    (folder / "max").mkdir()
    (folder / "max" / MASTER.name).write_text("{ not a notebook")
    done = command.main(
        [str(folder), "--out", str(out), "--jobs", "1", "--seconds", "8", "--cell", "15", "--memory", "1.5"]
    )
    assert done == 0
    return folder, out


@pytest.fixture(scope="module")
def whole_course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grades of one who solved everything and of one who touched nothing."""
    if not sandboxed():
        pytest.skip("no sandbox here: grading is refused, as the guide says")
    folder, out = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("course-grades")
    for path in m.masters():
        notebook = notebooks.read(path)
        for cell in notebook.cells:
            cell.source = m.without(cell.source, m.BEGIN_HIDDEN, m.END_HIDDEN)
        for student in ("solver", "stub"):
            (folder / student).mkdir(exist_ok=True)
            notebooks.write(notebook, folder / student / path.name)
            for cell in notebook.cells:
                stub = "# YOUR CODE HERE\nraise NotImplementedError()"
                cell.source = m.without(cell.source, m.BEGIN_SOLUTION, m.END_SOLUTION, stub)
    assert command.main([str(folder), "--out", str(out), "--jobs", "1", "--seconds", "60"]) == 0
    return out


@pytest.mark.slow
def test_solutions_get_every_mark_and_stubs_none(whole_course: Path) -> None:
    totals = {(row["student"], row["assignment"]): row["by_tests"] for row in rows(whole_course / "totals.csv")}
    for path in m.masters():
        best = sum(cell.points for cell in m.read_cells(path) if cell.part in ("visible", "hidden"))
        assert totals["solver", path.stem] == f"{best:g}"
        assert totals["stub", path.stem] == "0"
    untouched = [
        row for row in rows(whole_course / "marks.csv") if row["student"] == "stub" and row["test"] != "by hand"
    ]
    assert {row["status"] for row in untouched} == {"wrong"}
    assert all("not written yet" in row["message"] for row in untouched)
    # Every plot of the solutions was drawn inside the sandbox.
    pages = list((whole_course / "feedback" / "solver").glob("*.html"))
    assert len(pages) == len(m.masters())
    assert all("data:image/png;base64," in page.read_text(encoding="utf-8") for page in pages)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def marks(graded: tuple[Path, Path], student: str) -> dict[str, tuple[float, str, str]]:
    """Question and test -> (marks, status, message)."""
    found = {}
    for row in rows(graded[1] / "marks.csv"):
        if row["student"] == student:
            found[f"{row['question']} {row['test']}"] = (float(row["marks"] or "nan"), row["status"], row["message"])
    return found


def test_a_solution_gets_every_mark_by_tests(graded: tuple[Path, Path]) -> None:
    (total,) = [row for row in rows(graded[1] / "totals.csv") if row["student"] == "ada"]
    assert (total["by_tests"], total["by_hand"], total["out_of"]) == ("13", "", "20")
    assert total["total"] == "13 (not final)" and total["note"] == "not final, to mark by hand: a5, a6"


@pytest.mark.parametrize(
    ("student", "test", "status", "message"),
    [
        ("ben", "a2 visible", "time", "endless loop"),
        ("cai", "a2 visible", "memory", "1.5 GiB"),
        ("dee", "a3 visible", "missing", "the cell a3 is not there: was it deleted"),
        ("dee", "a6 by hand", "missing", "was it deleted"),
        ("eli", "a2 visible", "missing", "no cut: was it renamed? The cell defines cut_it"),
        ("fay", "a2 visible", "wrong", "FileNotFoundError"),
        ("gus", "a2 visible", "wrong", "FileNotFoundError"),
        ("hal", "a2 visible", "crash", "ended itself"),
        ("ivy", "a3 visible", "wrong", "the output"),
        ("kim", "a4 visible", "refused", "to be written, not imported"),
        ("lou", "a4 visible", "time", "endless loop"),
        ("max", "a1 visible", "missing", "no code"),
    ],
)
def test_what_goes_wrong_ends_as_a_mark_and_a_message(
    graded: tuple[Path, Path], student: str, test: str, status: str, message: str
) -> None:
    mark = marks(graded, student)[test]
    assert mark[:2] == (0.0, status)
    assert message in mark[2]


@pytest.mark.parametrize(
    ("student", "lost"),
    [
        # a3 calls cut, and is judged with the master's.
        ("ben", {"a2"}),
        ("cai", {"a2"}),
        ("dee", {"a3", "a6"}),
        ("eli", {"a2"}),
        ("fay", {"a2"}),
        ("gus", {"a2"}),
        ("hal", {"a2"}),
        ("ivy", {"a3"}),
        ("jan", set()),
        ("kim", {"a4"}),
        ("lou", {"a4"}),
    ],
)
def test_the_other_marks_stand(graded: tuple[Path, Path], student: str, lost: set[str]) -> None:
    assert {test.split()[0] for test, mark in marks(graded, student).items() if mark[0] == 0} == lost


def test_nothing_was_written_beside_the_submissions(graded: tuple[Path, Path]) -> None:
    assert sorted(path.name for path in graded[0].rglob("*") if path.is_file()) == [MASTER.name] * 13


def test_marks_by_hand_are_kept_and_counted(graded: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = graded
    table = rows(out / "by_hand.csv")
    for row in table:
        if row["student"] == "ada" and row["question"] == "a6":
            row["marks"], row["comment"] = "3.5", "=HYPERLINK(1)"
    tables.write_table(out / "by_hand.csv", hand.BY_HAND, table)
    assert totals.main(["--out", str(out)]) == 0  # without the submissions, and nothing is graded again
    (total,) = [row for row in rows(out / "totals.csv") if row["student"] == "ada"]
    assert (total["by_tests"], total["by_hand"], total["total"]) == ("13", "3.5", "16.5 (not final)")
    assert marks(graded, "ada")["a6 by hand"] == (3.5, "marked", "'=HYPERLINK(1)")
    # Lines of students who are not graded this time stay, too.
    assert len(rows(out / "by_hand.csv")) == len(table)
    assert len(rows(out / "totals.csv")) == 13
    page = (out / "feedback" / "ada" / f"{MASTER.stem}.html").read_text(encoding="utf-8")
    assert "16.5 of 20 marks" in page
    assert "data:image/png;base64," in page

    table[0]["marks"] = "99"
    tables.write_table(out / "by_hand.csv", hand.BY_HAND, table)
    assert totals.main(["--out", str(out)]) == 2
    assert "marks are a number from 0 to" in capsys.readouterr().err


def test_feedback_shows_the_message_and_no_solution(graded: tuple[Path, Path]) -> None:
    page = (graded[1] / "feedback" / "eli" / f"{MASTER.stem}.html").read_text(encoding="utf-8")
    assert "was it renamed?" in page and "chapter 1, sections 1.2 and 1.5" in page
    assert "np.where(z &gt; 0, z, 1)" not in page and "seed" not in page


# ------------------------------------------------------------------------------------------------ the parts


def test_bad_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.fence, "bubblewrap", tuple)
    assert command.main([str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "diary.ipynb").write_text("{}")
    assert command.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "nothing to grade" in said and "diary.ipynb: not the name of an assignment" in said


def test_flat_folders_and_two_versions(tmp_path: Path) -> None:
    submission(tmp_path, ".", name=f"ada_{MASTER.name}")
    submission(tmp_path, "ben", name=f"old/{MASTER.name}")
    newer = submission(tmp_path, "ben")
    os.utime(newer, (2e9, 2e9))
    found, strange = submissions.find(tmp_path)
    assert [(s.student, s.path.name) for s in found] == [("ada", f"ada_{MASTER.name}"), ("ben", MASTER.name)]
    assert found[1].path == newer and "2 notebooks" in strange[0]
    assert "graded is the newest" in found[1].note


@pytest.mark.parametrize(
    "suffix", [" (1)", "-Copy1", " copy", " copy 2", " - Copy (2)", "_copy", " (1) (1)", " - Kopie"]
)
def test_a_copys_name_is_recognised(tmp_path: Path, suffix: str) -> None:
    """As a browser names the second download, JupyterLab a duplicate, and file managers a copy."""
    submission(tmp_path, "ada", name=f"{MASTER.stem}{suffix}.ipynb")
    submission(tmp_path, ".", name=f"ben_{MASTER.stem}{suffix}.ipynb")
    found, strange = submissions.find(tmp_path)
    assert [(s.student, s.assignment) for s in found] == [("ada", MASTER.stem), ("ben", MASTER.stem)] and not strange


def test_what_is_left_out_has_a_line_in_the_totals(tmp_path: Path) -> None:
    few = deletes(*(f"a{n}{part}" for n in range(1, 5) for part in ("", "-visible")))  # two of six questions
    submission(tmp_path / "in", "ada", few, "final version.ipynb")
    submission(tmp_path / "in", ".", name="loose.ipynb")
    good = runs.not_graded(submissions.Submission("ben", MASTER.stem, tmp_path / "none"), "a test")
    for _ in range(2):
        reports.write_left_out(submissions.left_out(tmp_path / "in"), tmp_path)
        reports.write_reports([good], tmp_path)
    table = rows(tmp_path / "totals.csv")
    assert [(row["student"], row["assignment"]) for row in table] == [
        ("ada", "ada/final version.ipynb"),
        ("ben", MASTER.stem),
        ("loose", "loose.ipynb"),
    ]
    assert "not the name of an assignment" in table[0]["note"] and "whose it is" in table[2]["note"]
    assert not table[0]["total"] and not table[2]["total"]
    (tmp_path / "in" / "loose.ipynb").unlink()
    reports.write_left_out(submissions.left_out(tmp_path / "in"), tmp_path)
    assert len(rows(tmp_path / "totals.csv")) == 2


@pytest.mark.parametrize("name", ["homework1_final(2).ipynb", "deep/Untitled.ipynb", "b_the_backward_pass2.ipynb"])
def test_a_renamed_notebook_is_recognised_by_its_cells(tmp_path: Path, name: str) -> None:
    path = submission(tmp_path, "ada", name=name)
    (found,), strange = submissions.find(tmp_path)
    assert (found.student, found.assignment, found.path) == ("ada", MASTER.stem, path) and not strange
    assert f"{path.name} is taken for {MASTER.stem}" in found.note
    assert submissions.left_out(tmp_path) == []


def test_of_several_notebooks_the_one_changed_last_counts_and_else_the_last_by_name(tmp_path: Path) -> None:
    """Archives and learning platforms give all files of a hand-in one time."""
    names = [f"{MASTER.stem}{end}.ipynb" for end in ("", " (2)", " (10)", " (9)")] + ["early.ipynb"]
    for number, name in enumerate(names):
        path = submission(tmp_path, "ada", name=name)
        os.utime(path, (1e9 if name == "early.ipynb" else 2e9 + number % 2,) * 2)
    (found,), strange = submissions.find(tmp_path)
    assert found.path.name == names[2] and "5 notebooks" in found.note and names[2] in strange[0]
    os.utime(tmp_path / "ada" / "early.ipynb", (2.1e9, 2.1e9))
    (found,), _ = submissions.find(tmp_path)
    assert found.path.name == "early.ipynb" and "is taken for" in found.note


def test_what_is_no_notebook_is_named_and_no_total_is_made_of_it(tmp_path: Path) -> None:
    there = {
        "ada": (MASTER.name, "notes.pdf", "b_the_backward_pass.html"),
        "ben": ("a.html", "b.html"),
        "cai": (),
        "__MACOSX": ("._x.ipynb",),
        ".git": ("x",),
    }
    for student, files in there.items():
        (tmp_path / student).mkdir()
        for file in files:
            (tmp_path / student / file).write_text("x")
    submission(tmp_path, "ada")
    (tmp_path / "README.txt").write_text("x")
    (tmp_path / f"dee_{MASTER.stem}.html").write_text("x")
    found = {(student, file): why for student, file, why in submissions.left_out(tmp_path)}
    assert set(found) == {
        ("ada", "ada/b_the_backward_pass.html"),
        ("ben", "ben/a.html"),
        ("cai", ""),
        ("dee", f"dee_{MASTER.stem}.html"),
    }
    assert "ask for the .ipynb" in found["ben", "ben/a.html"] and found["cai", ""] == "the folder is empty"


def test_given_cells_come_from_the_master() -> None:
    original = m.read_cells(MASTER)
    mine = [reading.Found(c.id, "code", "tampered", n) for n, c in enumerate(original, 1) if c.id != "given-imports"]
    cells = reading.plan(mine, original)
    assert cells[0] == next(cell for cell in original if cell.id == "given-imports")
    assert {cell.part for cell in cells} <= {"given", "answer", "plot", "own"}


def test_judges_of_two_submissions_do_not_share_the_random_numbers() -> None:
    """Two submissions are judged in two threads, and torch has one global generator, which makes the judges' models."""
    case = {"what": "drawn", "seed": 1}

    def draw() -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return torch.stack([torch.randn(()) for _ in range(2000)])

    expected = draw()

    def judge(_case: Any, _seen: Any) -> None:
        if not torch.equal(draw(), expected):
            raise Wrong("another thread has drawn in between")

    drawn = Question("x1", (), (case,), probe=lambda _case: {}, judge=judge, hints=(), section="")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: decide(drawn, case, {}), range(20)))


def test_the_wire_carries_arrays_and_no_objects() -> None:
    sent = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True]), "c": np.array(["x"]), "d": object(), "e": np.nan}
    got = wire.decode(wire.encode(sent))
    np.testing.assert_array_equal(got["a"], sent["a"])
    assert got["a"].dtype == np.float64 and got["b"].dtype == bool
    assert got["c"] == "<array of <U1>" and got["d"] == "<object>" and np.isnan(got["e"])
    with pytest.raises(ValueError):
        wire.decode('{"__array__": ["|O", [1], ""]}')


def test_hidden_tests_are_read_and_not_run() -> None:
    cell = m.Cell("a1-hidden", "hidden", f"{m.BEGIN_HIDDEN}\ncheck('a1', f, cases=[{{'seed': 1}}])\n{m.END_HIDDEN}")
    assert m.hidden_cases(cell) == [{"seed": 1}]
    for bad in ("check('a1', f)", "check('a1', f, cases=[__import__('os').getcwd()])"):
        with pytest.raises(ValueError):
            m.hidden_cases(m.Cell("a1-hidden", "hidden", bad))


def test_a_notebook_without_metadata_is_still_graded() -> None:
    """Some editors drop nbgrader's metadata: the cells are then the student's own, and the given ones come first."""
    notebook = notebooks.read(MASTER)
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader", None)
        cell.pop("id")
    notebook.cells.append(new_markdown_cell("Thanks."))
    cells, _ = reading.read(nbformat.writes(notebook, version=nbformat.NO_CONVERT).encode(), notebooks.read(MASTER))
    assert cells[0].part == "given" and sum("def cut" in cell.source for cell in cells) == 1
