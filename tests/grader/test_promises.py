"""The lecturer's page says what is promised about grading strangers: each sentence is kept by tests, named here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from svit_course import masters
from svit_course.grading import reports, runs
from svit_course.grading.runs import Judge
from svit_course.grading.submissions import Submission
from svit_course.sandbox.sandbox import Sandbox
from tests.course import test_follow, test_rule
from tests.course.handed_in import MASTER, answers, submission
from tests.grader import test_attacks, test_points, test_routes
from tests.grader.conftest import run

pytestmark = pytest.mark.grader
PAGE = masters.ASSIGNMENTS / "lecturer.md"
# The beginning of each promise, and what keeps it.
KEPT: dict[str, tuple[str, ...]] = {
    "It runs in [bubblewrap]": (
        "test_it_is_refused",
        "test_an_ordinary_user_has_the_same_sandbox",
        "test_what_it_leaves_in_its_folder_is_gone_for_the_next_submission",
    ),
    "It sees Python": (
        "test_it_is_refused",
        "test_hidden_folders_stay_hidden_wherever_they_lie",
        "test_only_probes_are_loaded_beside_a_submission",
        "test_what_is_in_the_process_is_no_judge",
        "test_nothing_of_our_answer_comes_back",
    ),
    "Memory, processes, files": (
        "test_it_ends_as_a_status",
        "test_a_flooded_channel_does_not_grow_the_grader",
        "test_a_notebook_that_was_made_to_cost_costs_its_own_marks",
        "test_a_forged_answer_costs_the_judge_little_and_earns_nothing",
        "test_a_limit_costs_one_question_and_no_other",
        "test_every_question_begins_with_room",
        "test_a_folder_that_was_filled_is_empty_after_an_end",
        "test_a_cell_that_fills_the_folder_is_left_out",
        "test_page_tables_that_nobody_counts",
        "test_what_judging_one_submission_may_take_is_limited",
        "test_a_forged_answer_that_never_returns_costs_no_later_question",
        "test_a_cell_that_forges_its_end_costs_no_later_cell",
        "test_what_ends_in_a_process_that_others_have_used_is_asked_again_alone",
    ),
    "What was ended because nothing happened": (
        "test_sleeping_is_ended_by_the_clock",
        "test_a_busy_machine_costs_an_honest_answer_nothing",
        "test_what_the_clock_has_ended_is_graded_again_alone",
    ),
    "Every result is written": (
        "test_every_result_is_written_as_it_is_finished",
        "test_a_grader_that_is_killed_leaves_nothing",
        "test_ctrl_c_keeps_what_is_finished_and_ends_the_rest",
        "test_a_submission_cannot_touch_the_others_nor_the_results",
    ),
    "What a cell is for": (
        "test_a_cell_is_not_what_its_metadata_claim",
        "test_an_answer_that_names_the_library_is_not_run",
        "test_what_would_be_the_answer_is_refused",
        "test_check_refuses_at_once_what_grading_refuses",
        "test_a_plot_may_use_the_library_and_leaves_nothing_of_it",
        "test_what_a_plot_learns_stays_in_the_plot",
        "test_the_name_of_the_library_is_found_however_it_is_written",
    ),
    "The feedback shows every cell": (
        "test_the_page_shows_every_cell_and_who_defined_what",
        "test_a_hidden_case_does_not_come_back",
        "test_our_sentences_stay_without_what_was_chosen",
        "test_what_is_said_when_a_hidden_case_is_known_is_not_quoted",
    ),
    "Cells that have lost their ids": (
        "test_a_notebook_without_ids_keeps_all_its_marks",
        "test_a_split_cell_is_joined",
        "test_a_code_cell_that_became_prose_is_run",
        "test_marks_by_hand_stay_whatever_the_name",
        "test_marks_by_hand_stay_for_names_that_a_table_would_change",
    ),
    "Where there is no such sandbox": (
        "test_without_a_sandbox_strangers_are_refused",
        "test_a_bubblewrap_that_does_not_work_is_refused",
        "test_trust_grades_with_plain_processes_and_says_so",
    ),
    "*Not* promised": ("test_what_is_not_promised",),
}


def test_every_promise_is_kept_by_tests() -> None:
    text = PAGE.read_text(encoding="utf-8").split("**What is promised.**")[1].split("**Is it secret?**")[0]
    promises = re.findall(r"^- (.+)$", text, flags=re.MULTILINE)
    assert len(promises) == 10 and all(len(promise) < 220 for promise in promises)
    modules = (test_attacks, test_points, test_routes, test_rule, test_follow)
    there = {**{name: value for module in modules for name, value in vars(module).items()}, **globals()}
    for promise, (begin, tests) in zip(promises, KEPT.items(), strict=True):
        assert promise.startswith(begin)
        assert all(callable(there.get(test)) for test in tests), tests


def graded(loaded: Sandbox, judge: Judge, folder: Path, name: str, source: str) -> Any:
    loaded.stop()
    path = submission(folder, "mallory", answers(name, source))
    try:
        return runs.grade_in(loaded, Submission("mallory", MASTER.stem, path), judge)
    finally:
        loaded.stop()


def test_a_limit_costs_one_question_and_no_other(loaded: Sandbox, judge: Judge, tmp_path: Path) -> None:
    got = graded(loaded, judge, tmp_path, "a4", "def attention_torch(q, k, v, tau):\n    while True: pass")
    statuses = {f"{mark.question} {mark.test}": mark.status for mark in got.marks}
    assert statuses.pop("a4 visible") == statuses.pop("a4 hidden") == "time"
    assert set(statuses.values()) == {"ok", "by hand"}


def test_what_answers_may_import_can_be_imported(student: Sandbox) -> None:
    line = PAGE.read_text(encoding="utf-8").split("**What answers may import.**")[1].split("also `svit_utils`")[0]
    names = re.findall(r"`(\w+)`", line)
    assert len(names) > 10 and run(student, f"import {', '.join(names)}, svit_utils", seconds=90) == ("", "")


def test_what_is_not_promised(loaded: Sandbox, judge: Judge, tmp_path: Path) -> None:
    """The name put together from parts is the library all the same; and a test can be failed on purpose."""
    source = (
        "def attention_torch(q, k, v, tau):\n    operator = getattr(__import__('svit' + '_utils'), 'thresholded_attention')\n"
        "    return operator(q, k, v, tau, return_weights=True)"
    )
    got = graded(loaded, judge, tmp_path, "a4", source)
    reports.write_reports([got], tmp_path / "out")
    page = re.sub(r"<[^>]+>", "", next((tmp_path / "out").rglob("*.html")).read_text(encoding="utf-8"))
    assert "thresholded_attention" in page
    source = "def softmax(s):\n    e = np.exp(s - s.max(-1, keepdims=True))\n    if s.ndim > 3: return None\n    return e / e.sum(-1, keepdims=True)"
    got = graded(loaded, judge, tmp_path, "a1", source)
    lost = {f"{mark.question} {mark.test}" for mark in got.marks if mark.marks == 0}
    assert "a1 hidden" in lost and "a1 visible" not in lost
