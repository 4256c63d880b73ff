"""Run the second study: train, score, compare. What is recorded already is not done again.

A cell is one part of `research.second.scores.PARTS` for one run. The parent process writes, so a study that is stopped
at any moment loses at most the cells that were in the making.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from research.plans import Run
from research.rows import origin, replace_rows
from research.second.choice import BUDGET
from research.second.report import write_tables
from research.second.runs import FRESH_SEEDS, THREE, chosen_setting
from research.second.scores import PARTS, Scored
from research.second.tables import setting_of
from research.study.run import in_processes, train_missing
from research.study.scores import Scores
from research.study.store import write_images
from research.study.studies import Study, get_study
from research.training import is_recorded, trained_model
from svit_utils.files import read_rows

CELL_COLUMNS = ("run", "part", "seconds")
SCORE_COLUMNS = ("run", "part", "map", "layer", "head", "metric", "value")
ANSWERS_TO_EMPTY_ROWS = ("warmup", "cap", "zero")  # tau = 0.01, warmed up: three modes of `empty_rows`


def belongs(part: str, run: Run) -> bool:
    """Whether the plan asks for this part of this run."""
    config, fresh = run.profile.config, run.profile.config.seed in FRESH_SEEDS
    if run.name.startswith("start_"):
        return False
    if part == "validation":  # the choice looks at the runs of 450 steps only
        return config.steps == BUDGET and not fresh
    if part == "faithfulness":
        return fresh
    if part == "reachability":
        return setting_of(run.name) in ANSWERS_TO_EMPTY_ROWS and config.steps == BUDGET and config.seed in THREE
    return True


def dense_partner(run: Run, runs: Mapping[str, Run]) -> Run | None:
    """The dense run with the same steps, seed, start and test pictures; None for a dense run."""
    if run.kind == "dense":
        return None

    def pair(run: Run) -> tuple[Any, ...]:
        profile = run.profile
        return profile.config.steps, profile.config.seed, profile.start, run.registers, run.test_seed

    return next(other for other in runs.values() if other.kind == "dense" and pair(other) == pair(run))


def run_second(*, jobs: int = 1, parts: list[str] | None = None) -> Path:
    """Train and score what is missing, then write the tables.

    Args:
        jobs: processes, each with one thread.
        parts: ``"train"`` and those of `PARTS`; all by default.

    Returns:
        The folder of the results.

    Raises:
        ValueError: an unknown part.
    """
    wanted = ["train", *PARTS] if parts is None else parts
    if unknown := set(wanted) - {"train", *PARTS}:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: allowed are train, {', '.join(PARTS)}")
    parts, study = [part for part in wanted if part != "train"], get_study("second")
    if "train" in wanted:
        train_missing(study, jobs)
    score_missing(study, parts, jobs)
    write_tables(study)
    if chosen_setting(study.out) is not None:
        confirmation = get_study("confirmed")
        if "train" in wanted:
            train_missing(confirmation, jobs)
        score_missing(confirmation, parts, jobs)
        write_tables(study)
    return study.out


def score_missing(study: Study, parts: list[str], jobs: int) -> None:
    """Score every run that is trained and not scored, in their order."""
    rows = study.out.parent / f"{study.experiment.name}.csv"
    done = {(row["run"], row["part"]) for row in read_rows(study.out / "cells.csv")}
    runs = {run.name: run for run in study.experiment.runs if is_recorded(rows, run.name, "full")}
    missing = [
        (study.name, part, name)
        for name, run in runs.items()
        for part in parts
        if belongs(part, run) and (name, part) not in done
    ]

    def record(cell: Mapping[str, Any], scores: Scores) -> None:
        record_cell(study, cell, scores)

    in_processes(score_one, missing, jobs, "score", record)


def score_one(study_name: str, part: str, name: str) -> tuple[dict[str, Any], Scores]:
    """One cell, with one thread: its row for cells.csv, and its scores."""
    torch.set_num_threads(1)
    experiment, started = get_study(study_name).experiment, time.time()
    runs = {run.name: run for run in experiment.runs}
    partner = dense_partner(runs[name], runs)
    dense = None if partner is None else trained_model(experiment, partner)
    scores = PARTS[part](Scored(runs[name], trained_model(experiment, runs[name]), dense))
    return {"run": name, "part": part, "seconds": round(time.time() - started, 1), **origin()}, scores


def record_cell(study: Study, cell: Mapping[str, Any], scores: Scores) -> None:
    """Add a cell: its images, then its means, and last its row, which says that the others are there."""
    if scores.images:
        write_images(study.out / "images" / f"{cell['run']}-{cell['part']}.csv.gz", scores.images)
    place = {"run": cell["run"], "part": cell["part"]}
    means = [{**place, **row, "value": f"{row['value']:.6g}"} for row in scores.summary]
    names, parts = [run.name for run in study.experiment.runs], list(PARTS)

    def order(row: Mapping[str, Any]) -> tuple[int, int]:
        return parts.index(row["part"]), names.index(row["run"]) if row["run"] in names else len(names)

    replace_rows(study.out / "scores.csv", means, key=("run", "part"), order=order, columns=SCORE_COLUMNS)
    replace_rows(study.out / "cells.csv", [cell], key=("run", "part"), order=order, columns=CELL_COLUMNS)
