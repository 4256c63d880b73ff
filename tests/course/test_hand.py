"""Marks that people give: by several of them, in place of the tests', and what is still missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from svit_course import masters as m
from svit_course.grading import hand, reports, runs, submissions, tables, totals
from svit_course.grading.runs import Graded, Mark

STEM = m.master("a").stem
HEAD = "student,assignment,question,marks,out_of,comment"


def graded(student: str = "ada") -> Graded:
    marks = [
        Mark("a1", "visible", 1.0, 1.0, "ok"),
        Mark("a1", "hidden", 0.0, 1.0, "wrong", "a1, a stack: no"),
        Mark("a5", "by hand", None, 3.0, "by hand"),
        Mark("a6", "by hand", None, 4.0, "by hand"),
    ]
    return Graded(submissions.Submission(student, STEM, Path("gone")), marks)


def entered(folder: Path, name: str, *lines: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def total(folder: Path, student: str = "ada") -> dict[str, str]:
    (row,) = [row for row in tables.read_table(folder / "totals.csv")[1] if row["student"] == student]
    return row


def run_totals(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = totals.main(["--out", str(folder), *options])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.fixture
def out(tmp_path: Path) -> Path:
    reports.write_reports([graded("ada"), graded("ben")], tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------ several markers


def test_files_of_several_markers_are_joined(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered(out, "by_hand_kim.csv", HEAD, f"ada,{STEM},a5,2,3,axes")
    entered(out, "by_hand/lee.csv", f"{HEAD},marker", "ada,a,a6,3.5,4,,Lee Ann", f"ben,{STEM},a5,0,3,")
    for _ in range(2):  # and again: what was joined is not entered a second time
        code, said = run_totals(out, capsys)
        assert code == 0 and "ada" not in said and f"ben, {STEM}: to mark by hand: a6" in said
        assert (total(out)["by_hand"], total(out)["total"]) == ("5.5", "6.5")
        assert total(out, "ben")["total"] == "1 (not final)"
    lines = {
        (r["student"], r["question"]): r for r in tables.read_table(out / "marks.csv")[1] if r["test"] == "by hand"
    }
    assert [lines["ada", q]["marker"] for q in ("a5", "a6")] == ["kim", "Lee Ann"] and lines["ben", "a5"][
        "marker"
    ] == "lee"
    # What is left in by_hand.csv is what nobody has marked; the markers' own files stay as they are.
    assert [(r["student"], r["question"]) for r in tables.read_table(out / "by_hand.csv")[1]] == [("ben", "a6")]
    assert (out / "by_hand_kim.csv").read_text(encoding="utf-8") == f"{HEAD}\nada,{STEM},a5,2,3,axes\n"
    assert "marked by hand by kim: axes" in (out / "feedback" / "ada" / f"{STEM}.html").read_text(encoding="utf-8")
    # A marker who takes a mark back gets the row again.
    entered(out, "by_hand_kim.csv", HEAD)
    run_totals(out, capsys)
    assert ("ada", "a5") in [(r["student"], r["question"]) for r in tables.read_table(out / "by_hand.csv")[1]]
    assert total(out)["total"] == "4.5 (not final)"


def test_two_marks_for_one_answer_are_an_error_that_names_both_files(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / "totals.csv").read_text(encoding="utf-8")
    one = entered(out, "by_hand_kim.csv", HEAD, f"ada,{STEM},a5,2,3,")
    other = entered(out, "by_hand_lee.csv", HEAD, f"ada,{STEM},a6,1,4,", f"ada,{STEM},a5,2.5,3,")
    code, said = run_totals(out, capsys)
    assert code == 2 and f"2 in {one}, line 2 and 2.5 in {other}, line 3" in said and "ada" in said
    assert (out / "totals.csv").read_text(encoding="utf-8") == before
    entered(out, "by_hand_lee.csv", HEAD, f"ada,{STEM},a5,2.0,3,fine", f"ada,{STEM},a6,,4,not mine")  # the same mark
    assert run_totals(out, capsys)[0] == 0 and total(out)["by_hand"] == "2"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_what_a_spreadsheet_saves_is_read(out: Path, encoding: str, separator: str) -> None:
    """Excel in German writes semicolons and decimal commas, in the code page of Windows or with a byte-order mark."""
    mark = "2.5" if separator == "," else "2,5"
    rows = [HEAD, f"Zoë,{STEM},a5,MARK,3,schön"]
    entered(out, "by_hand_kim.csv", *(r.replace(",", separator).replace("MARK", mark) for r in rows), encoding=encoding)
    row = hand.marks_by_hand(out / "by_hand.csv").joined["Zoë", STEM, "a5"]
    assert (row["marks"], row["comment"], row["marker"]) == ("2.5", "schön", "kim")


def test_the_line_that_excel_alone_reads_is_left_out(out: Path) -> None:
    entered(out, "by_hand_kim.csv", "sep=;", HEAD.replace(",", ";"), f"ada;{STEM};a5;2;3;")
    assert hand.marks_by_hand(out / "by_hand.csv").joined["ada", STEM, "a5"]["marks"] == "2"


# ------------------------------------------------------------------------------------------------ instead of the tests'


@pytest.mark.parametrize(("mark", "difference"), [("2", "+1"), ("0", "-1"), ("1.5", "+0.5")])
def test_a_mark_of_the_tests_is_changed_with_a_reason(
    out: Path, capsys: pytest.CaptureFixture[str], mark: str, difference: str
) -> None:
    entered(out, "by_hand_kim.csv", HEAD, f"ada,a,a1,{mark},,the prompt was unclear", "ada,a,a5,3,3,", "ada,a,a6,4,4,")
    for _ in range(2):
        assert run_totals(out, capsys)[0] == 0
    reason = f"{mark} of 2 in place of 1: the prompt was unclear"
    row = total(out)
    assert (row["by_tests"], row["by_hand"], row["overridden"]) == (mark, "7", f"a1: {reason}")
    assert row["total"] == f"{float(mark) + 7:g}"
    lines = [r for r in tables.read_table(out / "marks.csv")[1] if (r["student"], r["question"]) == ("ada", "a1")]
    assert [(r["test"], r["status"]) for r in lines] == [
        ("visible", "ok"),
        ("hidden", "wrong"),
        ("override", "overridden"),
    ]
    assert sum(float(r["marks"]) for r in lines) == float(mark) and lines[2]["marker"] == "kim"
    page = (out / "feedback" / "ada" / f"{STEM}.html").read_text(encoding="utf-8")
    assert f"changed by hand by kim: {reason}" in page and f"{difference}</td>" in page
    assert f"{float(mark) + 7:g} of 9 marks" in page


def test_grading_again_keeps_the_change(out: Path) -> None:
    entered(out, "by_hand_kim.csv", HEAD, "ada,a,a1,2,,as agreed")
    reports.write_reports([graded("ada")], out)
    assert total(out)["by_tests"] == "2" and total(out, "ben")["by_tests"] == "1"


# ------------------------------------------------------------------------------------------------ what is final


def test_totals_say_what_is_missing_and_call_nothing_final_without_a_roster(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{who},a,{q},1,{best}," for who in ("ada", "ben") for q, best in (("a5", 3), ("a6", 4))]
    code, said = run_totals(out, capsys)
    assert f"  ada, {STEM}: to mark by hand: a5, a6" in said and "Final" not in said and "Without a roster" in said
    entered(out, "by_hand_kim.csv", HEAD, *rows, "zoe,a,a5,1,3,")
    code, said = run_totals(out, capsys)
    assert "Final" not in said and "Without a roster" in said and "line 6: zoe" in said
    entered(out, "by_hand_kim.csv", HEAD, *rows)
    names = entered(out, "names.csv", "\ufeffnumber;student", "1;ada", "2;ben")
    code, said = run_totals(out, capsys, "--roster", str(names))
    assert (code, said.splitlines()[1:]) == (0, ["Final: everybody has handed in, and every answer has its mark."])
    entered(out, "names.csv", "student", "ada", "ben", "cai")
    for _ in range(2):
        code, said = run_totals(out, capsys, "--roster", str(names))
        assert said.splitlines()[1:] == ["Not final:", f"  cai, {STEM}: nothing was handed in"]
        assert (total(out, "cai")["total"], total(out, "cai")["note"]) == ("", "nothing was handed in")
    code, said = run_totals(out, capsys)  # the lines of an earlier roster go with it
    assert "cai" not in said and "cai" not in (out / "totals.csv").read_text(encoding="utf-8")


def test_what_could_not_be_read_or_was_left_out_is_not_final(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Mark("a1", "visible", 0.0, 1.0, "missing", runs.NO_CODE)
    gone = Mark("a6", "by hand", 0.0, 4.0, "missing", "the cell a6 is not there: was it deleted?")
    reports.write_reports([Graded(submissions.Submission("max", STEM, Path("gone")), [broken, gone])], out)
    reports.write_left_out([("kim", "kim/a.html", "left out: no notebook")], out)
    assert total(out, "max")["total"] == "0 (not final)"
    names = entered(out, "names.csv", "student", "ada", "ben", "max")
    _, said = run_totals(out, capsys, "--roster", str(names))
    assert (
        f"  max, {STEM}: nothing of it could be graded" in said and "  kim, kim/a.html: left out: no notebook" in said
    )
    assert "Final:" not in said


@pytest.mark.parametrize("lines", [(), ("name", "ada"), ("student", "")])
def test_a_roster_that_names_nobody_is_refused(
    out: Path, capsys: pytest.CaptureFixture[str], lines: tuple[str]
) -> None:
    path = entered(out, "names.csv", *lines) if lines else out / "nowhere.csv"
    code, said = run_totals(out, capsys, "--roster", str(path))
    assert code == 2 and str(path) in said and "student" in said
