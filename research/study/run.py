"""Run a study, cell by cell. A cell is one part of `PARTS` for one arm; what is recorded already is not run again.

``cells.csv`` has a line per finished cell, with its provenance; ``scores.csv`` every mean; ``images/`` the scores per
image that the comparisons need. The parent process writes, so a run that is stopped at any moment loses at most the
cells that were in the making.
"""

from __future__ import annotations

import csv
import gzip
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from research import Arm, run_design
from research.arms import STUDY_ARMS
from research.run import dataset, is_recorded, trained_model
from research.study.parts import PARTS, Scores, Trained, baselines
from research.study.profiles import StudyProfile, get_study
from svit_utils.files import read_rows, write_file, write_rows
from svit_utils.provenance import provenance

Task = tuple[str, ...]
BASELINES = "baselines"
CELL_COLUMNS = ("cell", "kind", "rho", "seed", "part", "empty_rows")
SCORE_COLUMNS = ("kind", "rho", "seed", "part", "map", "layer", "head", "metric", "value")


def arm_kind(arm: Arm) -> str:
    """``dense``, ``sparse``, ``warmup``, or the name of an alternative."""
    return arm.alternative or ("dense" if arm.threshold is None else "warmup" if arm.tau_warmup else "sparse")


def belongs(part: str, arm: Arm) -> bool:
    """Whether the plan asks for this part of this arm."""
    if part == "faithfulness":
        return arm.rho == 0 and arm_kind(arm) in STUDY_ARMS
    if arm.data != "planted":
        return False  # everything else needs masks
    # One seed is enough for a check that a map passes or fails by a wide margin.
    return part != "sanity" or arm.seed == 0


def run_study(
    profile: StudyProfile, *, jobs: int = 1, parts: Iterable[str] | None = None, arms: Iterable[str] | None = None
) -> Path:
    """Train what is not trained, score what is not scored, and write the tables.

    Args:
        profile: see `get_study`.
        jobs: processes, each with one thread.
        parts: only these parts; all by default. ``"train"`` alone only trains.
        arms: score only these arms, by name; all by default.

    Returns:
        The folder of the results.

    Raises:
        ValueError: unknown part or arm, or fewer than one job.
    """
    wanted = ["train", *PARTS] if parts is None else list(parts)
    unknown = set(wanted) - {"train", *PARTS}
    if unknown:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: allowed are train, {', '.join(PARTS)}")
    names = [arm.name for arm in profile.design.arms]
    chosen = set(names if arms is None else arms)
    if strangers := chosen - set(names):
        raise ValueError(f"unknown arm {', '.join(sorted(strangers))}: allowed are {', '.join(names)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    profile.out.mkdir(parents=True, exist_ok=True)
    arms_csv = profile.out.parent / f"{profile.design.name}.csv"
    # Training first: a dense arm's maps are matched to those of the sparse arm with its seed.
    untrained = [arm.name for arm in profile.design.arms if not is_recorded(arms_csv, arm.name, "full")]
    _each(_train, [(profile.name, name) for name in untrained], jobs, "train")
    scored = [arm for arm in profile.design.arms if arm.name in chosen]
    cells = [(part, arm.name) for arm in scored for part in PARTS if part in wanted and belongs(part, arm)]
    if any(part == "localisation" for part, _ in cells):
        cells.insert(0, ("localisation", BASELINES))
    done = {row["cell"] for row in read_rows(profile.out / "cells.csv")}
    missing = [(profile.name, part, name) for part, name in cells if f"{part}/{name}" not in done]
    _each(_score, missing, jobs, "score", profile)
    from research.study.tables import write_tables

    write_tables(profile)
    return profile.out


def _each(
    work: Any, tasks: Sequence[tuple[str, ...]], jobs: int, what: str, profile: StudyProfile | None = None
) -> None:
    """Run the tasks in processes of their own; the results of each are recorded as it ends."""
    if not tasks:
        print(f"{what}: nothing left to do")
        return
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, *task): task for task in tasks}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                result = future.result()
                if profile is not None:
                    _record(profile, *result)
                print(f"{what} {count}/{len(tasks)}: {' '.join(futures[future][1:])}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _train(study: str, name: str) -> None:
    torch.set_num_threads(1)
    profile = get_study(study)
    run_design(profile.design, only=[name], out=profile.out.parent)


def _score(study: str, part: str, name: str) -> tuple[dict[str, Any], Scores]:
    torch.set_num_threads(1)
    profile, started = get_study(study), time.time()
    about: dict[str, Any] = {"kind": BASELINES, "rho": "", "seed": "", "empty_rows": ""}
    if name == BASELINES:
        scores = baselines(profile)
    else:
        arms = {arm.name: arm for arm in profile.design.arms}
        arm = arms[name]
        kind = arm_kind(arm)
        partner = arms.get(name.replace("dense", "sparse", 1))
        trained = Trained(
            kind,
            trained_model(profile.design, arm),
            dataset(arm, "test"),
            trained_model(profile.design, partner) if kind == "dense" and partner is not None else None,
        )
        scores = PARTS[part](trained, profile)
        about = {"kind": kind, "rho": arm.rho, "seed": arm.seed, "empty_rows": arm.empty_rows}
    # Seeds of the scores themselves are fixed in their functions; `seed` is the arm's.
    origin = {key: value for key, value in provenance().items() if key != "seed"}
    cell = {"cell": f"{part}/{name}", **about, "part": part, "seconds": round(time.time() - started, 1), **origin}
    return cell, scores


def _record(profile: StudyProfile, cell: dict[str, Any], scores: Scores) -> None:
    """Add a cell: its images, then its means, and last its line, which says that the others are there."""
    if scores.images:
        name = cell["cell"].split("/")[1]
        write_images(profile.out / "images" / f"{name}-{cell['part']}.csv.gz", scores.images)
    rows = [
        {**{key: str(cell[key]) for key in ("kind", "rho", "seed", "part")}, **row, "value": f"{row['value']:.6g}"}
        for row in scores.summary
    ]
    place = ("kind", "rho", "seed", "part")
    kept = [
        row for row in read_rows(profile.out / "scores.csv") if any(str(row[key]) != str(cell[key]) for key in place)
    ]
    parts = list(PARTS)

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return parts.index(row["part"]), str(row["rho"]), str(row["kind"]), str(row["seed"])

    write_rows(profile.out / "scores.csv", SCORE_COLUMNS, sorted([*kept, *rows], key=order))
    cells = [row for row in read_rows(profile.out / "cells.csv") if row["cell"] != cell["cell"]]
    columns = (*CELL_COLUMNS, *(key for key in cell if key not in CELL_COLUMNS))
    write_rows(profile.out / "cells.csv", columns, sorted([*cells, cell], key=order))


def write_images(path: Path, images: dict[str, np.ndarray]) -> None:
    """Scores per image as a compressed CSV: a column per "map:metric", a row per image; the same bytes every time."""
    longest = max(len(values) for values in images.values())
    lines = [",".join(images)]
    for index in range(longest):
        row = (values[index] if index < len(values) else np.nan for values in images.values())
        lines.append(",".join("" if np.isnan(value) else f"{value:.4g}" for value in row))
    # mtime=0 and no file name: neither the hour nor the folder may change the bytes.
    write_file(path, gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


def read_images(path: Path) -> dict[str, np.ndarray]:
    """What `write_images` wrote: columns of [n], those of fewer images without their empty end."""
    rows = list(csv.reader(gzip.decompress(path.read_bytes()).decode().splitlines()))
    columns = {name: [row[index] for row in rows[1:]] for index, name in enumerate(rows[0])}
    found = {}
    for name, values in columns.items():
        last = max((index for index, value in enumerate(values) if value), default=-1)
        found[name] = np.array([float(value or "nan") for value in values[: last + 1]])
    return found
