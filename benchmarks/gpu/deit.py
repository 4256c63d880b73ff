"""DeiT-Tiny on CIFAR-10 at 224 px, dense and sparse, at two learning rates, three seeds each.

Does the gap between dense and sparse close with training, and is it a matter of the learning rate? Then the same with
tau = 0.005, and with a threshold learnt per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.gpu import pack, targets
from benchmarks.gpu.pictures import Pictures
from benchmarks.gpu.plan import Clock, Plan, Row, Table
from benchmarks.gpu.runs import Data, Engines, Kind, beside_training, fits, follow, record, state_of
from svit_utils.data import PlantedShapes, normalisation
from svit_utils.models import create_model
from svit_utils.training.config import TrainConfig

EPOCHS, BATCH, SEEDS, RATES = 4, 16, (0, 1, 2), (3e-4, 5e-5)
FIRST = (Kind("dense"), Kind("tau0.01", 0.01))
SECOND = (Kind("tau0.005", 0.005), Kind("learnt-per-layer", 0.01, learnable=True))


@dataclass(frozen=True)
class Run:
    """A kind of attention, a learning rate, a seed."""

    kind: Kind
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Unique among the runs."""
        return f"{self.kind.name}-lr{self.lr:.0e}-seed{self.seed}"


def planned(small: bool = False) -> list[Run]:
    """All runs in order: what decides first, seeds innermost."""
    rates, seeds = (RATES[:1], SEEDS[:1]) if small else (RATES, SEEDS)
    return [Run(kind, lr, seed) for some in (FIRST, SECOND) for lr in rates for kind in some for seed in seeds]


def load(plan: Plan) -> Data | None:
    """CIFAR-10 from the data directory, else from a pack; None where there is neither.

    A rehearsal takes PlantedShapes instead, whatever is there, and says so in every row.
    """
    if plan.small:
        shapes = {split: PlantedShapes(split, 48, img_size=32) for split in pack.SPLITS}
        batches = {split: of.batch(48) for split, of in shapes.items()}
        levels = {s: (shapes[s].denormalise(b.images) * 255).round().to(torch.uint8) for s, b in batches.items()}
        splits = {split: pack.Split(levels[split], batch.labels) for split, batch in batches.items()}
        source, size = "rehearsal: PlantedShapes at 32 px", 32
    else:
        splits, source, size = pack.whole_set(), "CIFAR-10", 224
        if not splits:
            splits, source = pack.read_pictures(plan.packs), "CIFAR-10, packed subset"
    if not splits:
        return None
    mean, std = normalisation("imagenet")

    def on_device(split: str, most: int | None) -> Pictures:
        images, labels = (x[:most].to(plan.device) for x in splits[split])
        return Pictures(images, labels, size, mean, std, augment=split == "train")

    return Data(on_device("train", plan.train_images), on_device("val", 2000), on_device("test", None), source)


def start(plan: Plan, run: Run, size: int) -> nn.Module:
    """DeiT-Tiny with a new head and the kind's attention, on the CPU."""
    torch.manual_seed(run.seed)
    img_size = size if plan.small else None
    return run.kind.put_into(create_model(targets.DEIT, 10, img_size, pretrained=not plan.small))


def recipe(plan: Plan, run: Run, images: int) -> TrainConfig:
    """As in ``results/deit_cifar10.csv``: AdamW and a cosine, lr rises over a twentieth of the run, tau over half."""
    batch = 8 if plan.small else BATCH
    steps = (1 if plan.small else EPOCHS) * (images // batch)
    return TrainConfig(
        steps=steps,
        batch_size=batch,
        lr=run.lr,
        warmup_steps=steps // 20,
        tau_warmup_steps=0 if run.kind.tau is None else steps // 2,
        seed=run.seed,
        precision="fp32" if plan.small else "bf16",
    )


def half_epochs(config: TrainConfig, images: int) -> set[int]:
    """The steps that end a half epoch, and the last one."""
    per_epoch = images // config.batch_size
    return {round(i * per_epoch / 2) for i in range(1, 2 * config.steps // per_epoch + 1)} | {config.steps}


def run(plan: Plan, data: Data, clock: Clock) -> None:
    """The runs that are not recorded yet and fit; rows go to ``train.csv`` and ``curves.csv``."""
    table, curves = Table(plan.out / "train.csv", plan), Table(plan.out / "curves.csv", plan)
    engines, evaluating = Engines(plan), 0.0
    for one in planned(plan.small):
        if table.has(name=one.name, train_images=len(data.train), data=data.source):
            print(f"{one.name}: recorded already")
            continue
        if not clock.allows(1.0 if plan.small else 10.0):
            print(f"{one.name}: no time is left")
            break
        config, model = recipe(plan, one, len(data.train)), start(plan, one, data.train.size)
        state = state_of(model)
        engine = engines.get(one.kind, model, data.train.size, config)
        if not fits(engine, data, config, clock, one.name, evaluating):
            break
        engine.restart(state)
        found, curve = follow(engine, data, config, one.name, half_epochs(config, len(data.train)))
        row: Row = {"experiment": "deit_cifar10", "name": one.name, "model": targets.DEIT, "kind": one.kind.name}
        row |= {"tau": one.kind.tau or "", "start": "scratch" if plan.small else "pretrained", **found}
        record(row, curve, table, curves)
        evaluating = max(evaluating, beside_training(row))
        print(
            f"{one.name:32s} val {row['val_accuracy']:.4f} test {row['test_accuracy']:.4f} cut {row['cut_sparsity']}  "
            f"{row['images_per_second']:.0f} images/s ({row['mode']}), {row['seconds']:.0f} s, "
            f"{clock.left():.0f} s left",
            flush=True,
        )
    engines.close()
