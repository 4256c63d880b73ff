"""What grading writes, and what it reads of what lecturers have written."""

from __future__ import annotations

import base64
import csv
import re
import time
from pathlib import Path

import pytest

from svit_course import masters as m
from svit_course import rule
from svit_course.grading import hand, reports, runs, submissions, tables, texts, totals


def test_only_small_pictures_reach_the_page() -> None:
    fine, text = b"\x89PNG\r\n\x1a\n...", b"no picture"
    large = fine + bytes(runs.PICTURE)
    lines = [base64.b64encode(data) for data in (text, large, fine)]
    assert list(runs.pngs(b"\n".join(lines))) == [fine]
    assert len(list(runs.pngs(b"\n".join([lines[-1]] * 1000)))) == 3
    assert list(runs.pngs(b"\xff\n\n" + b"x" * 10**6)) == []


def test_half_characters_and_formulas_cost_nobody_a_report(tmp_path: Path) -> None:
    submission = submissions.Submission("=cmd|x", m.master("a").stem, tmp_path / "none")
    bad = runs.Graded(
        submission, [runs.Mark("a1", "visible", 0.0, 1.0, "wrong", "\ud800" * 9 + "x" * 10**6)], ["\udfff"]
    )
    bad.sources["a1"] = "# \ud800" + "\n" * 30_000
    good = runs.not_graded(submissions.Submission("ada", m.master("a").stem, tmp_path / "none"), "not graded: a test")
    started = time.monotonic()
    reports.write_reports([bad, good], tmp_path)
    assert time.monotonic() - started < 20
    with (tmp_path / "totals.csv").open(newline="", encoding="utf-8") as file:
        assert [row["student"] for row in csv.DictReader(file)] == ["'=cmd|x", "ada"]
    assert len((tmp_path / "marks.csv").read_text(encoding="utf-8")) < 20_000
    assert len(list((tmp_path / "feedback").rglob("*.html"))) == 2
    # Again, so that what was written is read back: nothing doubles.
    reports.write_reports([bad, good], tmp_path)
    with (tmp_path / "totals.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("student:assignment:question:marks:out_of:comment\n", "no column student"),
        ("student;assignment;question;marks;out_of;comment\nada;a;a5;9,5;3;\n", "from 0 to 3"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a1,2,,\n", "needs a reason"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a1,2.5,3,copied\n", "from 0 to 2"),
        (
            "student,assignment,question,marks,out_of,comment\nada,a,a5,1,3,\nada,a,a5,2,3,\n",
            "two marks: 1 in .*line 2",
        ),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,9,3,\n", "from 0 to 3"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,two,3,\n", "from 0 to 3"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,1\n", "from 0 to"),
        ("student,assignment,question,marks,out_of,comment\nada,a,a5,nan,3,\n", "from 0 to 3"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_before_grading(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "by_hand.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        hand.marks_by_hand(tmp_path / "by_hand.csv")


def test_marks_by_hand_are_added_without_grading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Totals once asked for every submission to be graded again, and looked final before anything was marked."""
    assert totals.main(["--out", str(tmp_path)]) == 2
    assert "nothing was graded" in capsys.readouterr().err
    about = submissions.Submission("ada", m.master("a").stem, tmp_path / "gone")
    picture = b"\x89PNG\r\n\x1a\n..."
    marks = [runs.Mark("a1", "visible", 1.0, 1.0, "ok"), runs.Mark("a5", "by hand", None, 3.0, "by hand")]
    marks.append(runs.Mark("a6", "by hand", None, 4.0, "by hand"))
    graded = runs.Graded(about, marks, flags=["a4: exec"], pictures={"a5": [picture]}, sources={"a6": "Because."})
    reports.write_reports([graded], tmp_path)
    expected = {"": ("", "1 (not final)"), "a5": ("2", "3 (not final)"), "a6": ("4.5", "5.5")}
    given = {"": "", "a5": "2", "a6": "2.5"}
    for question, (by_hand, total) in expected.items():
        table = tables.read_table(tmp_path / "by_hand.csv")[1]
        for row in table:
            row["marks"] = given[question] if row["question"] == question else row["marks"]
        tables.write_table(tmp_path / "by_hand.csv", hand.BY_HAND, table)
        assert totals.main(["--out", str(tmp_path)]) == 0
        (line,) = tables.read_table(tmp_path / "totals.csv")[1]
        assert (line["by_tests"], line["by_hand"], line["total"], line["flags"]) == ("1", by_hand, total, "a4: exec")
    page = (tmp_path / "feedback" / "ada" / f"{about.assignment}.html").read_text(encoding="utf-8")
    assert "5.5 of 8 marks" in page and base64.b64encode(picture).decode() in page and "Because." in page


def test_a_written_answer_is_set_as_jupyterlab_shows_it() -> None:
    """The page once showed a text's source, with its asterisks and dollars."""
    page = texts.as_html("The *same* weights:\n\n- $\\tau$ and $\\tfrac12$\n\n$$\\frac{r}{z}$$\n\n1. 5$ and 6$")
    assert "<em>same</em>" in page and "<li>" in page and "5$ and 6$" in page
    assert page.count("data:image/svg+xml;base64,") == 2 and 'alt="\\tau"' in page
    assert r"<code>\tfrac12</code>" in page  # what matplotlib's TeX does not know stays as it was written


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "![a](http://example.org/x.png)",
        '$"><script>alert(1)</script>$',
        "[a](data:text/html,x)",
    ],
)
def test_nothing_of_a_text_is_run_or_loaded(text: str) -> None:
    page = texts.as_html(text)
    assert not re.search(r"<script|<img src=x|src=.http|href=.(javascript|data)", page)


@pytest.mark.parametrize(
    "piece", ["$" + "{" * 390 + "$", "*a **", "[", "`", "> ", "$x$ ", "|a", "$" + "x^{" * 130 + "$"]
)
def test_a_text_made_to_cost_costs_little(piece: str) -> None:
    started = time.monotonic()
    texts.as_html((piece * 20_000)[:20_000]), texts.as_html(piece * 20_000)
    assert time.monotonic() - started < 30


def test_a_short_line_without_marks_is_no_harm(tmp_path: Path) -> None:
    (tmp_path / "by_hand.csv").write_text(
        "student,assignment,question,marks,out_of,comment\nada,a,a5\n", encoding="utf-8"
    )
    (row,) = hand.marks_by_hand(tmp_path / "by_hand.csv").joined.values()
    assert (row["student"], row["assignment"], row["marks"]) == ("ada", m.master("a").stem, "")


@pytest.mark.parametrize("source", ["x=" + "-" * 20_000, "a" + ".b" * 20_000, "1" + "+1" * 100_000, "'\ud800'", "\x00"])
def test_code_made_to_break_a_parser_does_not(source: str) -> None:
    assert rule.rule_of("a", [source]).breach(source) == ""
