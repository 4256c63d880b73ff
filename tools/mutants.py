"""Does a chapter notice a broken operator? ``make mutants``.

Each chapter is run under ``pytest --nbval`` with the operator replaced by plain softmax, with tau doubled and with the
renormalisation left out (tools/mutant_site). It has to fail each time, and to pass unbroken; a mutant that no cell
notices survives, and then this program fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from svit_course import notebooks
from svit_utils.files import read_rows
from tools.mutant_site.sitecustomize import MUTANTS

SITE = Path(__file__).resolve().parent / "mutant_site"
UNBROKEN = "unbroken"
QUICK = 2


@dataclass(frozen=True)
class Verdict:
    """One run of one chapter: whether it went as it has to, and a line that says how."""

    chapter: str
    mutant: str
    good: bool
    says: str
    seconds: float


def judge(chapter: Path, mutant: str) -> Verdict:
    """Run one chapter with one fault (or none) and say whether that went as it has to."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "called"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("SVIT_MUTANT", None)
        if mutant != UNBROKEN:
            old = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
            environment["PYTHONPATH"] = os.pathsep.join([str(SITE), *old])
            environment |= {"SVIT_MUTANT": mutant, "SVIT_MUTANT_LOG": str(log)}
        command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-x", "-p", "no:cacheprovider", str(chapter)]
        done = subprocess.run(
            command, cwd=notebooks.ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
        )
        called = log.is_file()
    seconds = time.monotonic() - start
    cell = re.search(r"::Cell (\d+)", done.stdout[done.stdout.rfind("short test summary") :])
    where = f"code cell {int(cell.group(1)) + 1}" if cell else "?"
    if done.returncode not in (0, 1):
        says, good = f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}", False
    elif mutant == UNBROKEN:
        good = done.returncode == 0
        says = "passes" if good else f"FAILS in {where} without any fault"
    elif done.returncode == 0:
        good = False
        says = "SURVIVES" if called else "SURVIVES (the chapter never calls the operator)"
    else:
        # A failure before the operator is called has another reason, and shows nothing.
        good = called
        says = f"noticed in {where}" if called else f"fails in {where} before the operator is called"
    return Verdict(chapter.stem, mutant, good, says, seconds)


def quickest(paths: list[Path], count: int) -> list[Path]:
    """The chapters with the fewest minutes in results/walkthrough.csv; the first ones where it does not say."""
    recorded = read_rows(notebooks.ROOT / "results" / "walkthrough.csv")
    minutes = {row["chapter"]: float(row["minutes"]) for row in recorded}
    return sorted(sorted(paths, key=lambda path: minutes.get(path.stem, 1e9))[:count])


def main(argv: list[str] | None = None) -> int:
    """Run the chapters with each fault and print a line for each run; 1 if one did not go as it has to."""
    parser = argparse.ArgumentParser(description="Run the chapters with a broken operator; each has to fail.")
    parser.add_argument("chapters", nargs="*", help="beginnings of file names, such as 01 (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help=f"only the {QUICK} quickest chapters, and not once more unbroken"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    options = parser.parse_args(argv)
    paths = notebooks.chapters(options.chapters)
    if options.quick:
        paths = quickest(paths, QUICK)
    if not paths:
        print("There are no chapters in notebooks/ yet.")
        return 1
    faults = list(MUTANTS) if options.quick else [UNBROKEN, *MUTANTS]
    tasks = [(path, fault) for path in paths for fault in faults]
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = []
        width = max(len(path.stem) for path in paths)
        for verdict in pool.map(lambda task: judge(*task), tasks):
            verdicts.append(verdict)
            print(
                f"{verdict.chapter:<{width}}  {verdict.mutant:<8}  {verdict.says}  ({verdict.seconds:.0f} s)",
                flush=True,
            )
    bad = [verdict for verdict in verdicts if not verdict.good]
    print(f"{len(verdicts) - len(bad)} of {len(verdicts)} runs went as they have to.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
