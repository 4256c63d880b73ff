"""Run the chapters, one after the other, and show what came out.

Each chapter is executed in a fresh kernel at profile ``cpu`` while its minutes and the peak resident memory of its
kernel (child processes included) are measured. The results are

- ``build/walkthrough/``: the book (tools/book.py) with the chapters of this run, and a page about the run;
- ``build/walkthrough/summary.json`` and ``results/walkthrough.csv``: the measurements;
- a table: chapter, minutes, peak memory, headline (what the cell tagged ``headline`` prints).

``--store`` writes the outputs into the notebooks themselves instead, for authors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

from svit_course import notebooks
from svit_utils.files import write_rows
from tools import book, outputs

BUILD = notebooks.ROOT / "build" / "walkthrough"
RESULT = notebooks.ROOT / "results" / "walkthrough.csv"
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


def run_page(outcomes: list[Outcome], about: dict[str, Any]) -> str:
    """The Markdown of the page about the run: a row for each chapter, and what was measured on."""
    rows = []
    for item in outcomes:
        result = item.headline.replace("|", "\\|") if not item.error else "**failed**"
        title = f"[{item.title}](notebooks/{item.chapter}.ipynb)"
        rows.append(f"| {title} | {item.minutes:.1f} | {item.peak_memory_mb} | {result} |")
    machine = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join(
        [
            "# This run\n",
            "The chapters below show what came out on this machine; any other shows what the repository stores.\n",
            "| chapter | minutes | peak memory, MB | headline |\n| --- | ---: | ---: | --- |",
            *rows,
            f"\n{machine}\n",
        ]
    )


def provenance() -> dict[str, Any]:
    """The columns that say where a measurement comes from."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=notebooks.ROOT, capture_output=True, encoding="utf-8", check=False
        )
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
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks, and no book")
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
    about, executed = provenance(), {}
    outcomes: list[Outcome] = []
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
        executed[path.name] = notebook
        if options.store and not error:
            store(notebook, path)
    if not options.store:
        summary = {"about": about, "chapters": [asdict(item) for item in outcomes]}
        (BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        complete = not options.chapters and not any(item.error for item in outcomes)
        if complete and not options.no_record:
            write_results(outcomes, about)
    print_table(outcomes)
    failed = any(item.error for item in outcomes)
    if not options.store:
        try:  # not strictly: what a chapter prints on this machine is nobody's mistake
            book.build(BUILD, executed, run_page(outcomes, about), strict=False)
            print(f"\nThe book of this run: {(BUILD / 'index.html').relative_to(notebooks.ROOT)}")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = True
    return 1 if failed else 0


def store(notebook: Any, path: Path) -> None:
    """Write the executed notebook, without what differs from run to run and shows nothing."""
    notebook.metadata.pop("widgets", None)
    for cell in notebooks.code_cells(notebook):
        cell.metadata.pop("execution", None)
        outputs.drop_widgets(cell)
    notebooks.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main())
