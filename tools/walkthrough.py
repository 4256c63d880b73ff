"""Run the chapters, one after the other, and show what came out.

Each chapter is executed in a fresh kernel at profile ``cpu`` while its minutes and the peak resident memory of its
kernel (child processes included) are measured. The results are

- ``build/walkthrough/``: the executed chapters as HTML with an index page. The pages fetch nothing: MathJax lies
  beside them, pictures are inside them, and widgets are shown by their static twins;
- ``build/walkthrough/summary.json`` and ``results/walkthrough.csv``: the measurements;
- a table: chapter, minutes, peak memory, headline (what the cell tagged ``headline`` prints).

``--store`` writes the outputs into the notebooks themselves instead, for authors.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from svit_course import notebooks, stamp
from svit_utils.files import write_rows
from tools import outputs

BUILD = notebooks.ROOT / "build" / "walkthrough"
RESULT = notebooks.ROOT / "results" / "walkthrough.csv"
TEMPLATES = Path(__file__).resolve().parent / "html_template"
MIB = 1024 * 1024


@dataclass
class Outcome:
    """What came of one chapter."""

    chapter: str
    title: str
    minutes: float
    peak_memory_mb: int
    headline: str
    error: str = ""


class PeakMemory:
    """The largest resident memory of a process and its children, polled in a thread (MiB)."""

    def __init__(self, every: float = 0.1) -> None:
        self.peak = 0
        self._every = every
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        self._thread = threading.Thread(target=self._poll, args=(psutil.Process(pid),), daemon=True)
        self._thread.start()

    def _poll(self, root: psutil.Process) -> None:
        while not self._stop.wait(self._every):
            try:
                total = sum(_resident(process) for process in [root, *root.children(recursive=True)])
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        return round(self.peak / MIB)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


class Progress:
    """``[1/5] 01_attention_theory: cell 7 of 23``: one line rewritten on a terminal, a line now and then in a log."""

    def __init__(self, prefix: str, total: int) -> None:
        self.prefix, self.total, self._said = prefix, total, 0.0
        self.live = sys.stdout.isatty()

    def at(self, number: int) -> None:
        text = f"{self.prefix}: cell {number} of {self.total}"
        if self.live:
            print(f"\r{text:<100}", end="", flush=True)
        elif number in (1, self.total) or time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            print(text, flush=True)

    def end(self, text: str) -> None:
        print(("\r" if self.live else "") + f"{self.prefix}: {text:<80}", flush=True)


def kernel_manager() -> AsyncKernelManager:
    """A kernel of the Python that runs this program, whatever kernels the reader has installed."""
    own = KernelSpecManager(kernel_dirs=[str(Path(sys.prefix) / "share" / "jupyter" / "kernels")])
    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own)


def execute(notebook: Any, folder: Path, progress: Progress, timeout: float) -> tuple[float, int, str]:
    """Run every cell in place. Returns seconds, peak MiB and the error, empty when there was none."""
    memory, error = PeakMemory(), ""
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    number = {index: position for position, index in enumerate(code, start=1)}

    def kernel_started(**_: Any) -> None:
        pid = getattr(getattr(client.km, "provisioner", None), "pid", None)
        if pid:
            memory.watch(pid)

    def cell_started(cell: Any, cell_index: int) -> None:
        if cell_index in number:
            progress.at(number[cell_index])

    client = NotebookClient(
        notebook,
        km=kernel_manager(),
        timeout=timeout,
        resources={"metadata": {"path": str(folder)}},
        on_notebook_start=kernel_started,
        on_cell_start=cell_started,
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=40"],  # without the remark that local TCP is not encrypted
    )
    start = time.monotonic()
    try:
        client.execute()
    except CellExecutionError as failed:
        error = str(failed)
    except (CellTimeoutError, DeadKernelError) as failed:
        error = f"{type(failed).__name__}: {failed}"
    return time.monotonic() - start, memory.stop(), error


def to_html(notebook: Any, name: str) -> None:
    """Write the executed chapter as a page of build/walkthrough/ that fetches nothing."""
    from nbconvert import HTMLExporter

    page = nbformat_copy(notebook)
    page.metadata.pop("widgets", None)
    page.cells = [cell for cell in page.cells if cell.get("id") != stamp.LINKS_ID]  # links to services elsewhere
    for cell in page.cells:
        if cell.cell_type == "markdown":  # the page lies in build/walkthrough/
            cell.source = re.sub(r"\]\((assignments/|glossary\.md)", r"](../../notebooks/\1", cell.source)
    for cell in notebooks.code_cells(page):
        outputs.drop_widgets(cell)
        for output in cell.outputs:
            if outputs.WIDGET in output.get("data", {}):
                del output.data[outputs.WIDGET]
                output.data["text/html"] = "<em>A widget: open the notebook in JupyterLab to move it.</em>"
    page.metadata["title"] = notebooks.title(notebook, name)
    exporter = HTMLExporter(
        template_name="walkthrough",
        extra_template_basedirs=[str(TEMPLATES)],
        mathjax_url="mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe",
    )
    text, _ = exporter.from_notebook_node(page, resources={"metadata": {"name": name}})
    (BUILD / f"{name}.html").write_text(text, encoding="utf-8")


def nbformat_copy(notebook: Any) -> Any:
    """A copy of the notebook that can be changed."""
    import nbformat

    return nbformat.reads(nbformat.writes(notebook), as_version=4)


def bring_mathjax() -> None:
    """Copy MathJax, as the package jupyter-server-mathjax carries it, beside the pages."""
    import jupyter_server_mathjax

    source = Path(jupyter_server_mathjax.__file__).parent / "static"
    if not (BUILD / "mathjax" / "MathJax.js").is_file():
        shutil.copytree(source, BUILD / "mathjax", dirs_exist_ok=True)


def write_index(outcomes: list[Outcome], about: dict[str, Any]) -> None:
    """Write index.html: a row for each chapter, and what was measured on."""
    rows = []
    for item in outcomes:
        name = f'<a href="{item.chapter}.html">{html.escape(item.title)}</a>'
        result = html.escape(item.headline) if not item.error else "<strong>failed</strong>"
        rows.append(
            f"<tr><td>{name}</td><td class=n>{item.minutes:.1f}</td><td class=n>{item.peak_memory_mb}</td>"
            f"<td>{result}</td></tr>"
        )
    machine = ", ".join(f"{key} {value}" for key, value in about.items())
    (BUILD / "index.html").write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SelectiveViT: the walkthrough</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }} th, td {{ text-align: left; padding: .5rem; vertical-align: top; }}
tr + tr {{ border-top: 1px solid #8888; }} .n {{ text-align: right; white-space: nowrap; }}
footer {{ opacity: .75; font-size: .875rem; margin-top: 2rem; }}
</style></head><body>
<h1>SelectiveViT: the walkthrough</h1>
<p>The chapters as they ran on this machine, in reading order.</p>
<table><thead><tr><th>chapter</th><th class=n>minutes</th><th class=n>peak memory, MB</th><th>headline</th></tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody></table>
<footer>{html.escape(machine)}</footer>
</body></html>
""",
        encoding="utf-8",
    )


def provenance() -> dict[str, Any]:
    """The columns that say where a measurement comes from."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=notebooks.ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "command": "make walkthrough",
        "profile": "cpu",
        "python": platform.python_version(),
        "torch": version("torch"),
        "timm": version("timm"),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "--short=12", "HEAD") or "none",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def write_results(outcomes: list[Outcome], about: dict[str, Any]) -> None:
    """Write results/walkthrough.csv: a row for each chapter, with its provenance."""
    rows: list[dict[str, Any]] = []
    for item in outcomes:
        row = asdict(item)
        row["minutes"] = f"{item.minutes:.2f}"
        del row["error"], row["title"]
        rows.append(row | about)
    write_rows(RESULT, rows[0], rows)


def print_table(outcomes: list[Outcome]) -> None:
    """Print a line for each chapter, and the sum."""
    width = max(len(item.chapter) for item in outcomes)
    print(f"\n{'chapter':<{width}}  minutes  peak MB  headline")
    for item in outcomes:
        text = item.headline or "-"
        if item.error:
            text = "FAILED: " + item.error.strip().splitlines()[-1]
        print(f"{item.chapter:<{width}}  {item.minutes:7.2f}  {item.peak_memory_mb:7d}  {text}")
    total = sum(item.minutes for item in outcomes)
    print(f"{'all':<{width}}  {total:7.2f}  {max(item.peak_memory_mb for item in outcomes):7d}")


def main(argv: list[str] | None = None) -> int:
    """Run the chapters and write what came out; 1 where one failed."""
    parser = argparse.ArgumentParser(description="Run the chapters and show what came out.")
    parser.add_argument("chapters", nargs="*", help="beginnings of file names, such as 01 (default: all)")
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks, and no HTML")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds a cell may take (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave results/walkthrough.csv as it is")
    options = parser.parse_args(argv)

    paths = notebooks.chapters(options.chapters)
    if not paths:
        print("There are no chapters in notebooks/ yet.")
        return 1
    os.environ.update(SVIT_PROFILE="cpu", HF_HUB_OFFLINE="1")
    if not options.store:
        BUILD.mkdir(parents=True, exist_ok=True)
        bring_mathjax()
    about, outcomes = provenance(), []
    for position, path in enumerate(paths, start=1):
        notebook = notebooks.read(path)
        progress = Progress(f"[{position}/{len(paths)}] {path.stem}", len(notebooks.code_cells(notebook)))
        for cell in notebooks.code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        seconds, peak, error = execute(notebook, path.parent, progress, options.timeout)
        headline = outputs.headline(notebook)
        outcomes.append(Outcome(path.stem, notebooks.title(notebook, path.stem), seconds / 60, peak, headline, error))
        progress.end(f"{'failed' if error else 'done'}, {seconds / 60:.1f} minutes, {peak} MB")
        if error:
            print(error, file=sys.stderr)
        if not options.store:
            to_html(notebook, path.stem)
        elif not error:
            store(notebook, path)
    if not options.store:
        write_index(outcomes, about)
        summary = {"about": about, "chapters": [asdict(item) for item in outcomes]}
        (BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        complete = not options.chapters and not any(item.error for item in outcomes)
        if complete and not options.no_record:
            write_results(outcomes, about)
        print(f"\nThe chapters as pages: {(BUILD / 'index.html').relative_to(notebooks.ROOT)}")
    print_table(outcomes)
    return 1 if any(item.error for item in outcomes) else 0


def store(notebook: Any, path: Path) -> None:
    """Write the executed notebook, without what differs from run to run and shows nothing."""
    notebook.metadata.pop("widgets", None)
    for cell in notebooks.code_cells(notebook):
        cell.metadata.pop("execution", None)
        outputs.drop_widgets(cell)
    notebooks.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main())
