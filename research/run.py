"""Run the arms of a design and record each as one row of ``results/<design>.csv``, with provenance.

An interrupted run resumes from its checkpoint under ``build/experiments``; an arm whose row is there is skipped.
Beside the rows, ``<design>_correct.csv`` keeps which test image each arm got right, as hexadecimal bits, so that arms
can be compared image by image afterwards.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from research.arms import CURRICULUM, Arm, Design
from svit_utils.attention import TokenSparsityTracker, sparse_modules, sparsify, use_alternative
from svit_utils.data import PlantedShapes, cifar10
from svit_utils.files import read_rows, write_file, write_rows
from svit_utils.models import create_model, load_embedded, load_weights, save_weights
from svit_utils.paths import checkpoints_dir, repo_root, results_dir
from svit_utils.provenance import provenance
from svit_utils.records import pack
from svit_utils.training import TrainConfig, evaluate, train

TRACKED_IMAGES = 200
# What a shipped checkpoint says of itself, in its safetensors metadata.
CARD = (
    *("data", "model", "start", "threshold", "tau_warmup", "empty_rows", "curriculum", "steps", "batch_size", "lr"),
    *("seed", "val_accuracy", "val_images", "test_accuracy", "test_images", "commit", "torch", "timm"),
)


def run_design(design: Design, *, out: Path | None = None, only: list[str] | None = None, anew: bool = False) -> Path:
    """Run every arm of ``design`` that is not recorded yet, and the small row that `check` compares with.

    Args:
        design: what to run.
        out: folder of the results files; ``results/`` of the repository by default.
        only: names of arms to run; all by default.
        anew: run again what is recorded, from the first step.

    Returns:
        The CSV file.

    Raises:
        ValueError: ``only`` names an arm the design does not have.
    """
    unknown = set(only or ()) - {arm.name for arm in design.arms}
    if unknown:
        known = ", ".join(arm.name for arm in design.arms)
        raise ValueError(f"{design.name} has no arm {', '.join(sorted(unknown))}; it has {known}")
    path = (results_dir() if out is None else out) / f"{design.name}.csv"
    for arm in design.arms:
        if only is not None and arm.name not in only:
            continue
        for size in ("full", "small") if arm is design.arms[0] else ("full",):
            if not anew and is_recorded(path, arm.name, size):
                print(f"{design.name}/{arm.name} ({size}): recorded already")
                continue
            row, correct = run_arm(design, arm, size=size, resume=not anew)
            _record(design, path, row, correct)
            took = f"in {row['seconds']:.0f} s"
            print(f"{design.name}/{arm.name} ({size}): test accuracy {row['test_accuracy']:.4f} {took}", flush=True)
    return path


def run_arm(design: Design, arm: Arm, *, size: str = "full", resume: bool = True) -> tuple[dict[str, Any], np.ndarray]:
    """Train and evaluate one arm.

    Args:
        design: the design the arm belongs to.
        arm: the arm.
        size: ``"full"``, or ``"small"`` for the few steps that a check reruns.
        resume: go on from the checkpoint of an interrupted run.

    Returns:
        The row to record, and which test images were right (bool array).
    """
    arm = arm if size == "full" else arm.small()
    started = time.time()
    model = start_model(arm)
    cut(model, arm)
    val, test = dataset(arm, "val"), dataset(arm, "test")
    work = _work(design) / arm.name if size == "full" else None
    loss = float("nan")
    for stage, (steps, train_set) in enumerate(_stages(arm)):
        out_dir = None if work is None else work / f"stage{stage}"
        loss = train(model, train_set, None, _config(arm, steps), out_dir=out_dir, resume=resume).final_loss
    judged: nn.Module = torch.compile(model) if arm.compile else model  # type: ignore[assignment]
    validation = evaluate(judged, val, batch_size=50, precision=arm.precision)
    reported = evaluate(judged, test, batch_size=50, precision=arm.precision)
    row = {
        "experiment": design.name,
        "size": size,
        **asdict(arm),
        "train_loss": round(loss, 4),
        "val_accuracy": round(validation.accuracy, 4),
        "test_accuracy": round(reported.accuracy, 4),
        "test_loss": round(reported.loss, 4),
        **_sparsity(model, test),
        "seconds": round(time.time() - started, 1),
        **{k: v for k, v in provenance().items() if k != "seed"},
    }
    if arm.save_as is not None:
        card = {key: str(row[key]) for key in CARD}
        save_weights(model, checkpoints_dir() / f"{arm.save_as}.safetensors", card)
    return row, reported.correct


def trained_model(design: Design, arm: Arm) -> nn.Module:
    """The arm's model as it was trained, in eval mode; trained again where its weights are no longer there."""
    weights = _work(design) / arm.name / f"stage{len(arm.curriculum)}" / "last.safetensors"
    if not weights.is_file():
        run_arm(design, arm)
    model = start_model(arm)
    cut(model, arm)
    load_weights(model, weights)
    return model.eval()


def start_model(arm: Arm) -> nn.Module:
    """The dense model the arm starts from, its new parts drawn from the arm's seed."""
    torch.manual_seed(arm.seed)
    if arm.start == "pretrained":
        return create_model(arm.model, pretrained=True)
    if arm.start == "scratch":
        return create_model(arm.model, img_size=arm.img_size)
    return load_embedded(arm.start)


def cut(model: nn.Module, arm: Arm) -> None:
    """Put the arm's attention into a dense model, in place."""
    if arm.alternative is not None:
        use_alternative(model, arm.alternative)
    elif arm.threshold is not None:
        sparsify(model, arm.threshold, empty_rows=arm.empty_rows)


def dataset(arm: Arm, split: str) -> Dataset:
    """The arm's data: all of the training split, the first images of the others."""
    if arm.data == "planted":
        size = {"train": None, "val": arm.val_images, "test": arm.test_images}[split]
        return PlantedShapes(split, size, rho=0.0 if split == "test" else arm.rho)
    whole = cifar10(split, img_size=arm.img_size, augment=arm.augment and split == "train")
    count = {"train": len(whole), "val": arm.val_images, "test": arm.test_images}[split]
    return whole if count >= len(whole) else Subset(whole, range(count))


def is_recorded(path: Path, arm: str, size: str) -> bool:
    """Whether ``path`` has a row of that arm and size."""
    return any(row["name"] == arm and row["size"] == size for row in read_rows(path))


def _stages(arm: Arm) -> list[tuple[int, Dataset]]:
    """Steps and data of each part of the run: the curriculum of a cold start, then the real data."""
    stages: list[tuple[int, Dataset]] = []
    for steps, difficulty in zip(arm.curriculum, CURRICULUM, strict=False):
        stages.append((steps, PlantedShapes("train", difficulty=difficulty)))
    return [*stages, (arm.steps, dataset(arm, "train"))]


def _config(arm: Arm, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=arm.batch_size,
        lr=arm.lr,
        weight_decay=arm.weight_decay,
        warmup_steps=min(arm.warmup, steps),
        schedule=arm.schedule if steps == arm.steps else "constant",
        tau_warmup_steps=round(arm.tau_warmup * steps),
        precision=arm.precision,
        compile=arm.compile,
        seed=arm.seed,
        checkpoint_every=100,
    )


def _sparsity(model: nn.Module, data: Dataset) -> dict[str, float | str]:
    """The tracker's summary on the first test images; empty for a dense model."""
    names = ("cut_sparsity", "applied_sparsity", "empty_rate", "kept_mass", "effective_support")
    if not sparse_modules(model):
        return dict.fromkeys(names, "")
    with TokenSparsityTracker(model) as tracker:
        evaluate(model, data, batch_size=50, limit=TRACKED_IMAGES)
    summary = tracker.summary()
    return {name: round(getattr(summary, name), 4) for name in names}


def _record(design: Design, path: Path, row: dict[str, Any], correct: np.ndarray) -> None:
    """Add a row to the design's two files, in the order of its arms.

    Each row is first written to a file of its own, so that two processes may run arms of one design at a time.
    """
    folder = _work(design) / "rows"
    bits = {"name": row["name"], "size": row["size"], "n": len(correct), "correct": pack(correct)}
    write_file(folder / f"{row['name']}-{row['size']}.json", json.dumps({"row": row, "bits": bits}))
    finished = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    order = [arm.name for arm in design.arms]
    for target, part in ((path, "row"), (path.with_name(f"{path.stem}_correct.csv"), "bits")):
        rows = {(r["name"], r["size"]): r for r in [*read_rows(target), *(f[part] for f in finished)]}
        # A row of an arm that the design no longer has, or with a column of its own, is kept: it was measured.
        ordered = sorted(
            rows.values(),
            key=lambda r: (order.index(r["name"]) if r["name"] in order else len(order), r["name"], r["size"]),
        )
        columns = dict.fromkeys([*(row if part == "row" else bits), *(column for r in ordered for column in r)])
        write_rows(target, columns, ordered)


def _work(design: Design) -> Path:
    return (repo_root() or Path.cwd()) / "build" / "experiments" / design.name
