"""The book in a browser: formulas are set, search finds, everybody can read it, no other host is asked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from svit_course import notebooks

pytest.importorskip("playwright")
pytest.importorskip("sphinx_book_theme")
pytest.importorskip("axe_playwright_python")


pytestmark = pytest.mark.browser

SHOTS = notebooks.ROOT / "build" / "browser"
CHAPTERS = [f"notebooks/{path.stem}" for path in notebooks.chapters()]
KINDS = [
    "index",
    CHAPTERS[0],
    "notebooks/glossary",
    "references",
    "notebooks/assignments/a_softmax_to_thresholded_attention",
]
KINDS += ["results/README", "reference/attention", "commands/svit_utils_train", "search"]


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """A server of this machine: axe, and the excerpts that a search shows, read files as only servers give them."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/favicon.ico":  # browsers ask every server for it
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def opened(page, home: str, name: str, asked: str = "") -> None:
    """Open a page, and wait until its formulas are set."""
    page.goto(f"{home}/{name}.html{asked}")
    page.wait_for_load_state("load")
    page.evaluate("window.MathJax && MathJax.startup.promise.then(() => {})")


def sideways(page) -> int:
    """By how many pixels the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_stands_alone(name: str, page, site: Path) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    opened(page, site.as_uri(), name)
    for picture in page.locator("article img").all():
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")
        assert len(picture.get_attribute("alt") or "") > 10
    formulas = page.locator("article .math, article .amsmath").count()
    assert formulas == 0 or page.locator("article mjx-container").count() >= formulas
    assert page.locator("mjx-merror, .problematic").count() == 0
    for width in (390, 1100):
        page.set_viewport_size({"width": width, "height": 1000})
        assert sideways(page) == 0
        page.screenshot(path=made(SHOTS) / f"{Path(name).name}-{width}.png")
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.problems == []


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_axe_finds_no_serious_fault(name: str, page, address: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    opened(page, address, name)
    assert page.problems == []  # before axe, which reads style sheets in its own way
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
        # Colours glide from one scheme to the other; on the way their contrast is that of neither.
        page.wait_for_function("document.getAnimations().every(each => each.playState !== 'running')")
        page.screenshot(path=made(SHOTS) / f"{name.replace('/', '-')}-{scheme}.png")
        # What MathJax draws is not the book's, and takes minutes to go through.
        found = Axe().run(page, context={"exclude": [["mjx-container"]]}).response["violations"]
        serious = [
            (fault["id"], [node["target"] for node in fault["nodes"]][:5])
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]
        assert serious == [], scheme


def test_search_finds_the_empty_row(page, address: str) -> None:
    opened(page, address, "search", "?q=empty+row")
    page.locator("#search-results li a").first.wait_for(timeout=30_000)
    found = page.locator("#search-results li a").all_inner_texts()
    assert any("Attention theory" in title for title in found) and any("empty row" in title.lower() for title in found)
    page.locator("#search-results li a").first.click()
    page.wait_for_load_state("load")
    assert "empty row" in page.locator("article").inner_text().lower()
    assert page.problems == []


def test_previous_next_and_the_list_of_chapters(page, site: Path) -> None:
    opened(page, site.as_uri(), CHAPTERS[1])
    page.locator("a.right-next").click()
    page.wait_for_url(f"**/{CHAPTERS[2]}.html")
    page.locator("a.left-prev").click()
    page.wait_for_url(f"**/{CHAPTERS[1]}.html")
    listed = [link.get_attribute("href") for link in page.locator(".bd-sidebar-primary nav a").all()]
    assert [f"{Path(name).name}.html" for name in CHAPTERS if name != CHAPTERS[1]] == [
        address for address in listed if address and address[:2].isdigit()
    ]
