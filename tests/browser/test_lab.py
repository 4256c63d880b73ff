"""JupyterLab itself: chapter 1 runs, its explorer moves, the console is quiet; what was only opened is not changed."""

from __future__ import annotations

import re
import time

import pytest

from svit_course import notebooks

pytest.importorskip("jupyterlab")
pytest.importorskip("playwright")
pytestmark = pytest.mark.browser

SHOTS = notebooks.ROOT / "build" / "browser"
EXPLORER = ".svit-explorer"


def busy_or_waiting(page) -> int:
    """Cells whose prompt is a star: running, or waiting for their turn."""
    return sum("*" in text for text in page.locator(".jp-InputPrompt").all_inner_texts())


def wait_until(page, true, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            page.screenshot(path=SHOTS / "timeout.png")
            pytest.fail(f"after {seconds:.0f} s: {what}; see build/browser/timeout.png; problems: {page.problems}")
        page.wait_for_timeout(250)


def run_all_cells(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile(r"^Run All Cells$")).click()


def open_notebook(lab: str, page, name: str) -> None:
    """Open ``notebooks/<name>`` and wait for its kernel."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    # A workspace of its own, so that no earlier session is restored; all cells are rendered, not only those in sight.
    page.goto(f"{lab}/lab/workspaces/test/tree/notebooks/{name}?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    wait_until(page, lambda: "Idle" in page.locator("body").inner_text(), 90, "the kernel is not idle")
    page.screenshot(path=SHOTS / "opened.png")


@pytest.mark.parametrize("name", ["02_implementing_sparse_attention", "assignments/b_the_backward_pass"])
def test_opened_and_saved_a_notebook_is_the_same_file(lab: str, page, name: str) -> None:
    open_notebook(lab, page, f"{name}.ipynb")
    address = f"{lab}/api/contents/notebooks/{name}.ipynb?type=file&format=text"

    def saved_at() -> str:
        return page.request.get(address).json()["last_modified"]

    before = saved_at()
    menus = page.locator(".lm-MenuBar-itemLabel").all_inner_texts()
    assert "Run" in menus and not [menu for menu in menus if "grader" in menu.lower()]
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Save Notebook")).first.click()
    wait_until(page, lambda: saved_at() != before, 30, "the notebook is not saved")
    assert page.request.get(address).json()["content"] == (notebooks.NOTEBOOKS / f"{name}.ipynb").read_text("utf-8")


def test_chapter_1_runs_and_its_explorer_moves(lab: str, page) -> None:
    [chapter] = notebooks.chapters(["01"])
    open_notebook(lab, page, chapter.name)

    run_all_cells(page)
    page.wait_for_timeout(1500)
    explorer = page.locator(EXPLORER).first
    wait_until(page, lambda: scroll_through(page) and explorer.count() == 1, 240, "the explorer is not shown")
    wait_until(page, lambda: busy_or_waiting(page) == 0, 240, "cells are still running")
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()

    explorer.scroll_into_view_if_needed()
    words = explorer.locator("[role=status]")
    wait_until(page, lambda: "Query: class token, blocks.2.attn, head 2" in words.inner_text(), 20, "it does not open")
    page.screenshot(path=SHOTS / "explorer-before.png")
    for name, key in (("threshold tau", "ArrowRight"), ("Query patch", "ArrowDown")):
        before = words.inner_text()
        explorer.get_by_role("slider", name=name).press(key)
        wait_until(page, lambda old=before: words.inner_text() != old, 20, f"{name} changes nothing")
    assert "patch row" in words.inner_text()
    page.screenshot(path=SHOTS / "explorer-after.png")
    assert page.problems == []


def scroll_through(page) -> bool:
    """JupyterLab renders a cell when it comes into sight: bring each into sight once."""
    page.evaluate(
        """() => {
            const window = document.querySelector('.jp-WindowedPanel-outer') || document.querySelector('.jp-Notebook');
            if (!window) return;
            const next = window.scrollTop + 600;
            window.scrollTop = next >= window.scrollHeight - window.clientHeight + 600 ? 0 : next;
        }"""
    )
    page.wait_for_timeout(300)
    return True
