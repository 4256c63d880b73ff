"""Run a study, cell by cell. A cell is one part of `PARTS` for one run; what is recorded already is not done again.

The parent process writes, so a study that is stopped at any moment loses at most the cells that were in the making.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from research.plans import MAIN_KINDS, Run
from research.rows import origin
from research.study.scores import PARTS, Scores, Trained, baselines
from research.study.store import record_cell
from research.study.studies import Study, get_study
from research.study.tables import write_tables
from research.training import is_recorded, run_experiment, trained_model
from svit_utils.files import read_rows
from svit_utils.training import build_data

BASELINE_CELL = "baselines"  # stands for a run's name where maps are scored that know no model


def belongs(part: str, run: Run) -> bool:
    """Whether the plan asks for this part of this run."""
    if part == "faithfulness":
        return run.profile.rho == 0 and run.kind in MAIN_KINDS
    if run.profile.data != "planted":
        return False  # everything else needs masks
    # One seed is enough for a check that a map passes or fails by a wide margin.
    return part != "sanity" or run.profile.config.seed == 0


def sparse_partner(run: Run, runs: Iterable[Run]) -> Run | None:
    """The sparse run with the same data and seed as a dense one, which its maps are matched to; None without one."""
    if run.kind != "dense":
        return None

    def pair(run: Run) -> tuple[float, int]:
        return run.profile.rho, run.profile.config.seed

    return next((other for other in runs if other.kind == "sparse" and pair(other) == pair(run)), None)


def run_study(
    study: Study, *, jobs: int = 1, parts: Iterable[str] | None = None, runs: Iterable[str] | None = None
) -> Path:
    """Train what is not trained, score what is not scored, and write the tables.

    Args:
        study: see `get_study`.
        jobs: processes, each with one thread.
        parts: only these parts; all by default. ``"train"`` alone only trains.
        runs: score only these runs, by name; all by default.

    Returns:
        The folder of the results.

    Raises:
        ValueError: unknown part or run, or fewer than one job.
    """
    wanted = ["train", *PARTS] if parts is None else list(parts)
    if unknown := set(wanted) - {"train", *PARTS}:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: allowed are train, {', '.join(PARTS)}")
    planned = study.experiment.runs
    names = [run.name for run in planned]
    chosen = set(names if runs is None else runs)
    if strangers := chosen - set(names):
        raise ValueError(f"unknown run {', '.join(sorted(strangers))}: allowed are {', '.join(names)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    study.out.mkdir(parents=True, exist_ok=True)
    train_missing(study, jobs)  # first: a dense model's maps are matched to those of the sparse one with its seed
    cells = [
        (part, run.name)
        for run in planned
        for part in PARTS
        if run.name in chosen and part in wanted and belongs(part, run)
    ]
    if any(part == "localisation" for part, _ in cells):
        cells.insert(0, ("localisation", BASELINE_CELL))
    done = {row["cell"] for row in read_rows(study.out / "cells.csv")}
    missing = [(study.name, part, name) for part, name in cells if f"{part}/{name}" not in done]
    in_processes(score_one, missing, jobs, "score", partial(record_cell, study))
    write_tables(study)
    return study.out


def train_missing(study: Study, jobs: int) -> None:
    """Train every run of the study that is not recorded, in their order."""
    rows = study.out.parent / f"{study.experiment.name}.csv"
    untrained = [(study.name, run.name) for run in study.experiment.runs if not is_recorded(rows, run.name, "full")]
    in_processes(train_one, untrained, jobs, "train")


def in_processes(
    work: Callable[..., Any],
    tasks: Sequence[tuple[str, ...]],
    jobs: int,
    what: str,
    record: Callable[..., None] | None = None,
) -> None:
    """Do the tasks in processes of their own; ``record`` is given what each returns, here, as it ends."""
    if not tasks:
        print(f"{what}: nothing left to do")
        return
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, *task): task for task in tasks}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                result = future.result()
                if record is not None:
                    record(*result)
                print(f"{what} {count}/{len(tasks)}: {' '.join(futures[future][1:])}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train_one(study_name: str, name: str) -> None:
    """Train and record the run of that name, with one thread."""
    torch.set_num_threads(1)
    study = get_study(study_name)
    run_experiment(study.experiment, only=[name], out=study.out.parent)


def score_one(study_name: str, part: str, name: str) -> tuple[dict[str, Any], Scores]:
    """One cell, with one thread: its row for cells.csv, and its scores."""
    torch.set_num_threads(1)
    study, started = get_study(study_name), time.time()
    about: dict[str, Any] = {"kind": BASELINE_CELL, "rho": "", "seed": "", "empty_rows": ""}
    if name == BASELINE_CELL:
        scores = baselines(study)
    else:
        runs = study.experiment.runs
        run = next(run for run in runs if run.name == name)
        partner = sparse_partner(run, runs)
        trained = Trained(
            run.kind,
            trained_model(study.experiment, run),
            build_data(run.profile).test,
            None if partner is None else trained_model(study.experiment, partner),
        )
        scores = PARTS[part](trained, study)
        profile = run.profile
        about = {"kind": run.kind, "rho": profile.rho, "seed": profile.config.seed, "empty_rows": profile.empty_rows}
    # Seeds of the scores themselves are fixed in their functions; `seed` is the run's.
    cell = {"cell": f"{part}/{name}", **about, "part": part, "seconds": round(time.time() - started, 1), **origin()}
    return cell, scores
