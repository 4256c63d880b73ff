"""Train the runs of an experiment and record each as one row of ``results/<experiment>.csv``, with its provenance.

An interrupted run goes on from its checkpoint under ``build/experiments``; a run whose row is there is skipped. Beside
the rows, ``<experiment>_correct.csv`` keeps which test images each run got right, as hexadecimal bits, so that runs can
be compared image by image afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from research.distillation import Distillation
from research.plans import CURRICULUM, Experiment, Run
from research.rows import origin, replace_rows
from svit_utils.attention import LearnableThreshold, TokenSparsityTracker, sparse_modules
from svit_utils.data import PlantedShapes
from svit_utils.files import read_rows, write_file
from svit_utils.models import load_weights, save_weights
from svit_utils.paths import checkpoints_dir, repo_root, results_dir
from svit_utils.records import pack
from svit_utils.training import SparsityTarget, TrainConfig, build_data, build_model, evaluate, train
from svit_utils.training.recipe import LossFunction

TRACKED_IMAGES = 200
CURVE_IMAGES = 500  # of the validation set, for accuracy along a run
TARGET_WEIGHT = 30.0  # of `SparsityTarget`
# What the tracker's summary says of a sparse model, as recorded.
SPARSITY = ("cut_sparsity", "applied_sparsity", "empty_rate", "kept_mass", "effective_support")
# What a shipped checkpoint says of itself, in its safetensors metadata.
CARD = (
    *("data", "model", "start", "threshold", "tau_warmup", "empty_rows", "curriculum", "steps", "batch_size", "lr"),
    *("seed", "val_accuracy", "val_images", "test_accuracy", "test_images", "commit", "torch", "timm"),
)


def run_experiment(
    experiment: Experiment, *, out: Path | None = None, only: list[str] | None = None, repeat: bool = False
) -> Path:
    """Do every run that is not recorded yet, and the small ones that `research.check` repeats.

    Args:
        experiment: what to run.
        out: folder of the results files; ``results/`` of the repository by default.
        only: names of runs; all by default.
        repeat: do what is recorded as well, from the first step.

    Returns:
        The CSV file.

    Raises:
        ValueError: ``only`` names a run that the experiment does not have.
    """
    names = [run.name for run in experiment.runs]
    if unknown := set(only or ()) - set(names):
        raise ValueError(f"{experiment.name} has no run {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    path = (results_dir() if out is None else out) / f"{experiment.name}.csv"
    for run in experiment.runs:
        if only is not None and run.name not in only:
            continue
        for size in ("full", "small") if run in experiment.repeated else ("full",):
            if not repeat and is_recorded(path, run.name, size):
                print(f"{experiment.name}/{run.name} ({size}): recorded already")
                continue
            row, correct = train_run(experiment, run, size=size, resume=not repeat)
            record_run(experiment, path, row, correct)
            took = f"in {row['seconds']:.0f} s"
            print(f"{experiment.name}/{run.name} ({size}): test accuracy {row['test_accuracy']:.4f} {took}", flush=True)
    return path


def is_recorded(path: Path, name: str, size: str) -> bool:
    """Whether ``path`` has a row of the run of that name and size."""
    return any(row["name"] == name and row["size"] == size for row in read_rows(path))


def train_run(
    experiment: Experiment, run: Run, *, size: str = "full", resume: bool = True
) -> tuple[dict[str, Any], np.ndarray]:
    """Train and evaluate one run.

    Args:
        experiment: the experiment that it belongs to.
        run: the run.
        size: ``"full"``, or ``"small"`` for the few steps that a check repeats.
        resume: go on from the checkpoint of an interrupted run.

    Returns:
        The row to record, and which test images were right, bool [n].
    """
    run = run if size == "full" else run.small()
    precision = run.profile.config.precision
    started = time.time()
    model = start_model(run)
    data = build_data(run.profile)
    work = work_folder(experiment, run) if size == "full" else None
    if run.test_seed:
        data = data._replace(test=PlantedShapes("test", run.profile.test_images, seed=run.test_seed))
    loss, curve = float("nan"), []
    for stage, (config, train_set) in enumerate(stages(run, data.train)):
        out_dir = None if work is None else work / f"stage{stage}"
        watched = _first(data.val, CURVE_IMAGES) if config.eval_every else None
        minimised = special_loss(experiment, run, model, config)
        result = train(model, train_set, watched, config, out_dir=out_dir, resume=resume, loss=minimised)
        loss = result.final_loss
        curve = [[row["step"], round(row["val_accuracy"], 4)] for row in result.history if "val_accuracy" in row]
    judged: nn.Module = torch.compile(model) if run.profile.config.compile else model  # type: ignore[assignment]
    validation = evaluate(judged, data.val, batch_size=50, precision=precision)
    reported = evaluate(judged, data.test, batch_size=50, precision=precision)
    row = {
        "experiment": experiment.name,
        "size": size,
        **run.columns(),
        "train_loss": round(loss, 4),
        "val_accuracy": round(validation.accuracy, 4),
        "test_accuracy": round(reported.accuracy, 4),
        "test_loss": round(reported.loss, 4),
        **measured_sparsity(model, data.test),
        **({"curve": json.dumps(curve), **on_validation(model, data.val)} if curve else {}),
        "seconds": round(time.time() - started, 1),
        **origin(),
    }
    if run.save_as is not None:
        card = {key: str(row[key]) for key in CARD}
        save_weights(model, checkpoints_dir() / f"{run.save_as}.safetensors", card)
    return row, reported.correct


def trained_model(experiment: Experiment, run: Run) -> nn.Module:
    """The run's model as it was trained, in eval mode; trained again where its weights are no longer there."""
    weights = work_folder(experiment, run) / f"stage{len(run.curriculum)}" / "last.safetensors"
    if not weights.is_file():
        train_run(experiment, run)
    model = start_model(run)
    load_weights(model, weights)
    return model.eval()


def start_model(run: Run) -> nn.Module:
    """The run's model before its first step, with the attention of the run's kind."""
    per = None if run.learned is None else run.learned.per
    return build_model(run.profile, sparse=run.kind != "dense", learnable=per, **_registers(run))


def _registers(run: Run) -> dict[str, Any]:
    return {"model_args": {"reg_tokens": run.registers}} if run.registers else {}


def special_loss(experiment: Experiment, run: Run, model: nn.Module, config: TrainConfig) -> LossFunction | None:
    """What the run minimises in place of the recipe's cross-entropy, if anything."""
    if run.learned is not None:
        return SparsityTarget(model, config, run.learned.target, each=run.learned.each, weight=TARGET_WEIGHT)
    if run.teacher is not None:
        teacher = next(other for other in experiment.runs if other.name == run.teacher)
        return Distillation(trained_model(experiment, teacher), run.teacher)
    return None


def stages(run: Run, train_set: Dataset) -> list[tuple[TrainConfig, Dataset]]:
    """Recipe and data of each part of the run: its curriculum, at a constant learning rate, and then its own."""
    recipe = run.profile.config
    easier = []
    for steps, difficulty in zip(run.curriculum, CURRICULUM, strict=False):
        config = replace(
            recipe,
            steps=steps,
            warmup_steps=min(recipe.warmup_steps, steps),
            schedule="constant",
            tau_warmup_steps=round(recipe.tau_warmup_steps / recipe.steps * steps),
        )
        easier.append((config, PlantedShapes("train", difficulty=difficulty)))
    return [*easier, (recipe, train_set)]


def on_validation(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """What the second study chooses by, beside the accuracy: sparsity on validation, and each layer's learned tau."""
    found: dict[str, Any] = {f"val_{name}": value for name, value in measured_sparsity(model, data).items()}
    thresholds = [module.threshold for module in sparse_modules(model).values()]
    taus = [each.tau.detach() for each in thresholds if isinstance(each, LearnableThreshold)]
    if taus:
        values = [[float(f"{value:.5g}") for value in tau.flatten().tolist()] for tau in taus]
        found["learned_tau"] = json.dumps(values)
    return found


def measured_sparsity(model: nn.Module, data: Dataset) -> dict[str, float | str]:
    """The tracker's summary on the first test images; empty for a dense model."""
    if not sparse_modules(model):
        return dict.fromkeys(SPARSITY, "")
    with TokenSparsityTracker(model) as tracker:
        evaluate(model, data, batch_size=50, limit=TRACKED_IMAGES)
    summary = tracker.summary()
    return {name: round(getattr(summary, name), 4) for name in SPARSITY}


def record_run(experiment: Experiment, path: Path, row: dict[str, Any], correct: np.ndarray) -> None:
    """Add a row to the experiment's two files, in the order of its runs.

    Each row is first written to a file of its own, so that two processes may do runs of one experiment at a time. A row
    of a run that is no longer planned is kept, at the end: it was measured.
    """
    folder = work_folder(experiment) / "rows"
    bits = {"name": row["name"], "size": row["size"], "n": len(correct), "correct": pack(correct)}
    write_file(folder / f"{row['name']}-{row['size']}.json", json.dumps({"row": row, "bits": bits}))
    finished = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    places = {run.name: index for index, run in enumerate(experiment.runs)}

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return places.get(row["name"], len(places)), row["name"], row["size"]

    key = ("name", "size")
    rows = {(older["name"], older["size"]): completed(experiment, older) for older in read_rows(path)}
    rows |= {(found["row"]["name"], found["row"]["size"]): found["row"] for found in finished}
    replace_rows(path, list(rows.values()), key=key, order=order, columns=row)
    correct_path = path.with_name(f"{path.stem}_correct.csv")
    replace_rows(correct_path, [found["bits"] for found in finished], key=key, order=order, columns=bits)


def completed(experiment: Experiment, row: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded row, with what the plan says of its run in the columns that came after it was written."""
    planned = {run.name: run if row["size"] == "full" else run.small() for run in experiment.runs}
    run = planned.get(row["name"])
    return dict(row) if run is None else {**run.columns(), **row}


def work_folder(experiment: Experiment, run: Run | None = None) -> Path:
    """Where an experiment, or one run of it, keeps its checkpoints and rows while it is done."""
    folder = (repo_root() or Path.cwd()) / "build" / "experiments" / experiment.name
    return folder if run is None else folder / run.name


def _first(data: Dataset, count: int) -> Dataset:
    return Subset(data, range(min(count, len(data))))  # type: ignore[arg-type]
