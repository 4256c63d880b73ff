"""The pages in a browser: formulas are typeset, pictures are there, and nothing is fetched from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from svit_course import notebooks

pytest.importorskip("nbclient")
pytest.importorskip("playwright")

from tools import outputs, walkthrough

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("chapter", notebooks.chapters(), ids=lambda path: path.stem)
def test_a_page_stands_alone(chapter: Path, page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walkthrough, "BUILD", tmp_path)
    walkthrough.bring_mathjax()
    notebook = notebooks.read(chapter)  # with the stored outputs: nothing is run here
    walkthrough.to_html(notebook, chapter.stem)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / f"{chapter.stem}.html").as_uri())
    page.wait_for_function("window.MathJax && MathJax.isReady && MathJax.Hub.queue.running === 0", timeout=60_000)
    page.wait_for_timeout(1000)

    # MathJax lists a font format that this copy does not have as about:blank; everything else is a file or inline.
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
    formulas = sum(cell.source.count("$$") // 2 for cell in notebook.cells if cell.cell_type == "markdown")
    assert page.locator(".MathJax_Display").count() >= formulas
    assert page.locator(".MathJax_Error, .merror").count() == 0
    assert "$$" not in page.locator("main").inner_text()
    pictures = sum(1 for cell in notebooks.code_cells(notebook) for _ in outputs.pictures(cell))
    images = page.locator("main img")
    assert images.count() >= pictures
    for index in range(images.count()):
        assert images.nth(index).evaluate("image => image.complete && image.naturalWidth > 0")
        assert len(images.nth(index).get_attribute("alt") or "") > 10
    walkthrough_shots = notebooks.ROOT / "build" / "browser"
    walkthrough_shots.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=walkthrough_shots / f"page-{chapter.stem}.png", full_page=True)
