"""The book as pages: ``make site`` writes build/site/, ``make pdf`` prints it to build/selectivevit.pdf.

Sphinx builds it from the stored outputs, which the tests compare, with nothing fetched: formulas are set by a MathJax
that lies beside the pages. ``make walkthrough`` ends with the same book of what it has just run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svit_course import notebooks, stamp
from tools import book_pages

SITE = notebooks.ROOT / "build" / "site"
PDF = notebooks.ROOT / "build" / "selectivevit.pdf"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
STRICT = ("-n", "-W", "--keep-going")


def build(
    out: Path,
    executed: Mapping[str, Any] | None = None,
    run: str = "",
    *,
    builder: str = "html",
    strict: bool = True,
    repository: str | None = None,
) -> None:
    """Build the book.

    Args:
        out: folder of the pages. Sphinx's own files go into a folder beside it, ``<name>-sphinx``.
        executed: notebooks to show in place of the stored ones, by file name.
        run: Markdown of a page about the run that executed them.
        builder: Sphinx's; ``"singlehtml"`` for one long page.
        strict: warnings are errors, and so is every name that cannot be found.
        repository: ``owner/name`` for the launch buttons, where neither pyproject.toml nor the git remote says it.

    Raises:
        RuntimeError: Sphinx failed; the message has its warnings.
    """
    work = out.with_name(out.name + "-sphinx")
    book_pages.lay_out(work / "pages", executed or {}, run)
    command = [sys.executable, "-m", "sphinx", "-q", "-b", builder, "-c", str(book_pages.BOOK)]
    command += ["-d", str(work / f"doctrees-{builder}"), *(STRICT if strict else ()), str(work / "pages"), str(out)]
    environment = os.environ | ({"SVIT_REPOSITORY": repository} if repository else {})
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"the book cannot be built:\n{done.stderr[-8000:]}")
    for name in ("notebooks", "reference", "commands"):  # pages of files that have gone, or have another name now
        for page in (out / name).rglob("*.html"):
            source = work / "pages" / page.relative_to(out)
            if not any(source.with_suffix(suffix).is_file() for suffix in (".ipynb", ".md")):
                page.unlink()


def find_chromium() -> str:
    """Where Chromium is: ``$CHROMIUM``, or what the PATH has.

    Raises:
        RuntimeError: there is none.
    """
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if not found:
        raise RuntimeError("Chromium is not installed: `apt install chromium`, or name it: CHROMIUM=/path/to/chromium")
    return found


def print_pdf(page: Path, pdf: Path) -> None:
    """Print a page by Chromium, with formulas set and answers unfolded; code that the pages fold stays folded.

    Raises:
        RuntimeError: there is no Chromium, or no Playwright to drive it.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise RuntimeError("Playwright is not installed: pip install -e '.[browser]'") from None
    chromium = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        sheet = browser.new_page(color_scheme="light")
        sheet.set_default_timeout(300_000)
        sheet.goto(page.resolve().as_uri())
        sheet.evaluate("MathJax.startup.promise.then(() => {})")
        sheet.evaluate("document.querySelectorAll('details:not(.above-input)').forEach(each => each.open = true)")
        sheet.pdf(path=pdf, format="A4", outline=True, tagged=True, margin={"top": "15mm", "bottom": "15mm"})
        browser.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Build the book, or print it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.book", description="Build the book from the stored outputs.")
    parser.add_argument("--pdf", action="store_true", help="print the whole to build/selectivevit.pdf instead")
    parser.add_argument("--out", type=Path, default=SITE, help="default: build/site")
    parser.add_argument("--repository", help="owner/name, where pyproject.toml and the git remote do not say")
    options = parser.parse_args(argv)
    named = stamp.named_repository(parser, options.repository)
    start, made = time.monotonic(), PDF if options.pdf else options.out
    try:
        if options.pdf:
            sheet = PDF.with_name("site-sphinx") / "whole"
            build(sheet, builder="singlehtml")
            print_pdf(sheet / "index.html", PDF)
        else:
            build(options.out, repository=named)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in [made, *made.rglob("*")] if path.is_file()) / 2**20
    print(f"{made if options.pdf else made / 'index.html'}: {time.monotonic() - start:.0f} s, {size:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
