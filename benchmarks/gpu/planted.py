"""The small ViT on PlantedShapes, longer than a CPU allows, and its maps scored against the masks by the referee.

Pictures are made on the machine's own cores and kept on the device as uint8: a level is 1/255 of the range, an
eightieth of the faintest object's contrast. All runs start from the shipped dense model, as the recorded study's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.engine import Engine, eager
from benchmarks.gpu.pictures import Pictures
from benchmarks.gpu.plan import Clock, Plan, Row, Table
from benchmarks.gpu.runs import Data, Engines, Kind, beside_training, fits, follow, record, state_of
from benchmarks.gpu.workers import each
from svit_utils.data import PlantedShapes
from svit_utils.explain import attention_maps, displayed, rollout_matrix, token_grid
from svit_utils.explain.grid import read_out
from svit_utils.models import SMALL_VIT, load_embedded
from svit_utils.referee import localisation_scores
from svit_utils.training.config import TrainConfig

STEPS, BATCH, RATE, SEEDS = 4000, 64, 5e-4, (0, 1, 2, 3, 4)
CURVE_EVERY = 500
SCORED = 500  # test pictures whose maps are scored
KEYS = 197
TAU = 0.01
MEAN, STD = (0.5,) * 3, (0.25,) * 3
CHUNK = 500  # pictures that a process makes at a time
KINDS = (Kind("dense"), Kind("tau0.01", TAU), Kind("tau0.005", 0.005))


@dataclass
class Planted(Data):
    """With the test pictures' masks, bool [n, 56, 56]."""

    masks: Tensor


def make(item: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures ``first`` to ``stop`` of a split, as uint8 levels, with labels, and masks for the test pictures."""
    split, first, stop = item
    shapes = PlantedShapes(split)
    batch = shapes.batch(range(first, stop))
    levels = (shapes.denormalise(batch.images) * 255).round().to(torch.uint8)
    return levels.numpy(), batch.labels.numpy(), batch.masks.numpy() if split == "test" else np.zeros(0, bool)


def made(plan: Plan, clock: Clock) -> Planted | None:
    """All pictures; None where the budget ends first.

    Raises:
        RuntimeError: a process that makes them failed.
    """
    counts = {"test": 40, "val": 40, "train": 64} if plan.small else {"test": 2000, "val": 2000, "train": 100_000}
    items = [(s, i, min(i + CHUNK, n)) for s, n in counts.items() for i in range(0, n, CHUNK)]
    found = {}
    for outcome in each(make, items, plan.processes, clock):
        if outcome.error:
            raise RuntimeError(outcome.error)
        found[outcome.item] = outcome.result
    if len(found) < len(items):
        return None
    parts = {s: [np.concatenate(x) for x in zip(*(found[i] for i in items if i[0] == s), strict=True)] for s in counts}

    def pictures(split: str) -> Pictures:
        images, labels = (torch.from_numpy(x).to(plan.device) for x in parts[split][:2])
        return Pictures(images, labels, images.shape[-1], MEAN, STD)

    masks = torch.from_numpy(parts["test"][2])
    return Planted(pictures("train"), pictures("val"), pictures("test"), "PlantedShapes, uint8", masks)


def planned(plan: Plan, table: Table) -> Iterator[tuple[Kind, int]]:
    """Kinds and seeds in order; top-k keeps as many keys as tau = 0.01 left, which the rows before it say."""
    seeds = SEEDS[:1] if plan.small else SEEDS
    for kind in KINDS:
        yield from ((kind, seed) for seed in seeds)
    used = [float(r["applied_sparsity"]) for r in table.rows if (r["experiment"], r["kind"]) == ("planted", "tau0.01")]
    if used:
        k = max(1, round(KEYS * (1 - sum(used) / len(used))))
        yield from ((Kind("top-k", k=k), seed) for seed in seeds)


def model(kind: Kind) -> nn.Module:
    """The shipped dense start with the kind's attention."""
    return kind.put_into(load_embedded("planted_dense_start"))


def recipe(plan: Plan, kind: Kind, seed: int) -> TrainConfig:
    """The study's, over more steps: cosine from 5e-4 after 10 steps; tau rises over the first half."""
    steps = 4 if plan.small else STEPS
    return TrainConfig(
        steps=steps,
        batch_size=8 if plan.small else BATCH,
        lr=RATE,
        warmup_steps=min(10, steps),
        tau_warmup_steps=0 if kind.tau is None else steps // 2,
        seed=seed,
        precision="fp32" if plan.small else "bf16",
    )


def maps(engine: Engine, x: Tensor, dense: bool) -> dict[str, Tensor]:
    """Attention of the last layer (mean over heads) and rollout, [B, h, w]; of a dense model also drawn cut at tau."""
    grid = token_grid(engine.model, x)
    layers = list(attention_maps(engine.model, x).values())
    rolled = rollout_matrix(layers)
    found = {
        "attention": read_out(layers[-1], engine.model, grid).mean(dim=1),
        "rollout": read_out(rolled, engine.model, grid),
    }
    if dense:
        found["attention_displayed"] = read_out(displayed(layers[-1], TAU), engine.model, grid).mean(dim=1)
    return found


def scores(engine: Engine, data: Planted, dense: bool) -> Row:
    """The referee's localisation scores of each map, means over the first test pictures."""
    parts: dict[str, list[Tensor]] = {}
    scored = torch.arange(min(SCORED, len(data.test)), device=engine.device)
    with eager(engine.model):
        for index in scored.split(50):
            x, mask = data.test.batch(index)[0], data.masks[index.cpu()]
            for name, values in maps(engine, x, dense).items():
                for metric, score in localisation_scores(values.float(), mask).items():
                    parts.setdefault(f"{name}_{metric}", []).append(score)
    return {name: round(float(torch.cat(found).mean()), 4) for name, found in parts.items()}


def run(plan: Plan, clock: Clock) -> None:
    """The runs that are not recorded yet and fit; rows go to ``train.csv`` and ``curves.csv``."""
    table, curves = Table(plan.out / "train.csv", plan), Table(plan.out / "curves.csv", plan)
    data = made(plan, clock) if clock.allows(1.0 if plan.small else 25.0) else None
    if data is None:
        print("no time is left for PlantedShapes")
        return
    print(f"{len(data.train):,} pictures of PlantedShapes made, {clock.left():.0f} s left", flush=True)
    engines, evaluating = Engines(plan), 0.0
    for kind, seed in planned(plan, table):
        name = f"planted-{kind.name}-seed{seed}"
        if table.has(name=name, train_images=len(data.train)):
            print(f"{name}: recorded already")
            continue
        if not clock.allows(1.0 if plan.small else 8.0):
            print(f"{name}: no time is left")
            break
        config, start = recipe(plan, kind, seed), model(kind)
        state = state_of(start)
        engine = engines.get(kind, start, data.train.size, config)
        if not fits(engine, data, config, clock, name, evaluating):
            break
        engine.restart(state)
        every = max(1, config.steps // 2) if plan.small else CURVE_EVERY
        found, curve = follow(engine, data, config, name, set(range(every, config.steps + 1, every)))
        row: Row = {"experiment": "planted", "name": name, "model": SMALL_VIT, "kind": kind.name}
        row |= {"tau": kind.tau or "", "k": kind.k or "", "start": "planted_dense_start", **found}
        row |= scores(engine, data, kind.family == "dense")
        record(row, curve, table, curves)
        evaluating = max(evaluating, beside_training(row))
        print(
            f"{name:28s} test {row['test_accuracy']:.4f} cut {row['cut_sparsity']} attention AP "
            f"{row['attention_average_precision']} ({row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s)",
            flush=True,
        )
    engines.close()
