"""The public model trained on the 500 training photographs: how much of what the cut takes comes back?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from research.photographs.measured import attention_shares
from research.photographs.pictures import MODEL, imagenette
from research.rows import replace_rows
from svit_utils.attention import sparsify
from svit_utils.building import create_model
from svit_utils.data import preprocessing
from svit_utils.files import read_rows
from svit_utils.models import load_weights
from svit_utils.paths import repo_root
from svit_utils.provenance import provenance
from svit_utils.records import pack
from svit_utils.training import TrainConfig, evaluate, train

STEPS, BATCH, SEEDS = 100, 10, (0, 1, 2)  # two epochs of 500 photographs


@dataclass(frozen=True)
class Setting:
    """One way of training: ``tau`` (None: dense), and the share of the steps over which it rises from 0."""

    name: str
    tau: float | None = None
    warmup: float = 0.0


SETTINGS: tuple[Setting, ...] = (
    Setting("dense"),
    Setting("tau0.01", 0.01),
    Setting("tau0.01-warmed", 0.01, 0.5),
    Setting("tau0.005-warmed", 0.005, 0.5),
)


def recipe(setting: Setting, seed: int, steps: int = STEPS) -> TrainConfig:
    """The plan's recipe."""
    return TrainConfig(
        steps=steps,
        batch_size=BATCH,
        lr=1e-4,
        warmup_steps=steps // 10,
        tau_warmup_steps=round(setting.warmup * steps),
        precision="bf16",
        seed=seed,
        checkpoint_every=steps // 4,
    )


def start(setting: Setting) -> nn.Module:
    """DeiT-Tiny with its own head, dense or cut as the setting says; WeightsError without its weights."""
    model = create_model(MODEL, pretrained=True)
    if setting.tau is not None:
        sparsify(model, setting.tau)
    return model


def work_folder(setting: Setting, seed: int) -> Path:
    """Where a run keeps its checkpoints and weights, which are not shipped."""
    return (repo_root() or Path.cwd()) / "build" / "photographs" / f"{setting.name}-seed{seed}"


def finetuned_model(setting: Setting, seed: int) -> nn.Module | None:
    """The trained model in eval mode; None where its weights are not here."""
    weights = work_folder(setting, seed) / "last.safetensors"
    if not weights.is_file():
        return None
    model = start(setting)
    load_weights(model, weights)
    return model.eval()


def write_finetuned(out: Path, seeds: Sequence[int] = SEEDS) -> Path:
    """Do the runs that are missing in ``finetuned.csv`` in ``out``, all settings of a seed before the next seed.

    An interrupted run goes on from its checkpoint. Raises as `research.photographs.thresholds.write_thresholds`.
    """
    path = out / "finetuned.csv"
    order = {
        (s.name, str(seed)): place for place, (seed, s) in enumerate((seed, s) for seed in SEEDS for s in SETTINGS)
    }
    recorded = {(row["setting"], row["seed"]) for row in read_rows(path)}
    for seed in seeds:
        for setting in SETTINGS:
            if (setting.name, str(seed)) in recorded:
                continue
            row = _trained_row(setting, seed)
            replace_rows(
                path,
                [row],
                key=("setting", "seed"),
                order=lambda row: order[row["setting"], str(row["seed"])],
                columns=row,
            )
            print(f"{setting.name}, seed {seed}: {row['accuracy']:.1%} right, {row['seconds']:.0f} s", flush=True)
    return path


def _trained_row(setting: Setting, seed: int) -> dict[str, Any]:
    started, config = time.time(), recipe(setting, seed)
    model = start(setting)
    prepare = preprocessing(model)
    result = train(model, imagenette("train", prepare), None, config, out_dir=work_folder(setting, seed))
    val = imagenette("val", prepare)
    judged = evaluate(model, val, batch_size=25, precision=config.precision)
    row = {"setting": setting.name, "tau": "" if setting.tau is None else setting.tau, "tau_warmup": setting.warmup}
    row |= {"steps": config.steps, "batch_size": config.batch_size, "lr": config.lr, "images": judged.n}
    row |= {
        "train_loss": round(result.final_loss, 4),
        "accuracy": round(judged.accuracy, 4),
        **attention_shares(model, val),
    }
    row |= {"correct": pack(judged.correct), "seconds": round(time.time() - started, 1)}
    return row | provenance(seed=seed)
