"""What the training runs share: kinds of attention, captured steps that serve several runs, a run and its row."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu import throughput
from benchmarks.gpu.engine import Engine, Mode, build, eager
from benchmarks.gpu.pictures import Pictures, indices
from benchmarks.gpu.plan import Clock, Plan, Row, Table
from svit_utils.attention import LearnableThreshold, TokenSparsityTracker, sparse_modules, sparsify
from svit_utils.attention.normalisers import TopK
from svit_utils.records import pack as pack_bits
from svit_utils.training.config import TrainConfig

TRACKED = 200  # test pictures whose attention is tracked
SPARSITY = ("cut_sparsity", "applied_sparsity", "empty_rate", "kept_mass", "effective_support")


@dataclass(frozen=True)
class Kind:
    """What stands in place of the softmax: nothing, a cut at a tau, given or learnt per layer, or top-k."""

    name: str
    tau: float | None = None
    learnable: bool = False
    k: int | None = None

    @property
    def family(self) -> str:
        """Kinds of one family differ in a number only, which can be changed in a captured step."""
        if self.k is not None:
            return f"top-{self.k}"
        return "dense" if self.tau is None else "learnable" if self.learnable else "fixed"

    def put_into(self, model: nn.Module) -> nn.Module:
        """Make the model sparse, in place, and return it."""
        if self.k is not None:
            sparsify(model, normaliser=TopK(self.k))
        elif self.tau is not None:
            sparsify(model, LearnableThreshold(self.tau, per="layer") if self.learnable else self.tau)
        return model

    def set(self, model: nn.Module) -> None:
        """Give a model of the same family this kind's tau, in place; a learnt one comes with the weights."""
        if self.family == "fixed":
            for module in sparse_modules(model).values():
                module.threshold.value.fill_(self.tau)  # type: ignore[union-attr,operator]


@dataclass
class Data:
    """Three splits on the device, and where they come from."""

    train: Pictures
    val: Pictures
    test: Pictures
    source: str


class Engines:
    """One captured step per family of kinds, made when it is first needed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.made = plan, dict[str, Engine]()

    def get(self, kind: Kind, start: nn.Module, size: int, config: TrainConfig) -> Engine:
        """The engine of the kind's family with the kind's tau; ``start`` becomes its model where there is none yet."""
        if kind.family not in self.made:
            on = self.plan.device == "cuda"
            if on:
                torch._dynamo.reset()  # what is captured needs its compiler no longer, and it counts what it compiles
            shape = (config.batch_size, 3, size, size)
            self.made[kind.family] = build(start.to(self.plan.device), shape, config, Mode(compile=on, graph=on))
        kind.set(self.made[kind.family].model)
        return self.made[kind.family]

    def close(self) -> None:
        """Free them all."""
        for engine in self.made.values():
            engine.close()
        self.made.clear()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's weights."""
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def evaluate(engine: Engine, pictures: Pictures, batch: int = 500) -> tuple[Tensor, float]:
    """Which pictures are right, bool [n] on the CPU, and the mean cross-entropy, at the full tau."""
    right, loss = [], torch.zeros((), device=engine.device)
    everything = torch.arange(len(pictures), device=engine.device)
    with eager(engine.model), engine.autocast():
        for index in everything.split(batch):
            images, labels = pictures.batch(index)
            logits = engine.model(images).float()
            right.append(logits.argmax(dim=1) == labels)
            loss += F.cross_entropy(logits, labels, reduction="sum")
    return torch.cat(right).cpu(), float(loss) / len(pictures)


def sparsity(engine: Engine, pictures: Pictures) -> Row:
    """The tracker's summary on the first pictures, and the learned taus; empty for a dense model."""
    if not sparse_modules(engine.model):
        return dict.fromkeys(SPARSITY, "")
    few = torch.arange(min(TRACKED, len(pictures)), device=engine.device)
    with TokenSparsityTracker(engine.model) as tracker, eager(engine.model), engine.autocast():
        for index in few.split(50):
            engine.model(pictures.batch(index)[0])
    summary = tracker.summary()
    row: Row = {name: round(getattr(summary, name), 4) for name in SPARSITY}
    learned = [t for t in engine.thresholds if isinstance(t, LearnableThreshold)]
    return row | ({"taus": " ".join(f"{float(t.tau.detach()):.5f}" for t in learned)} if learned else {})


def seconds_per_step(engine: Engine, data: Data, config: TrainConfig) -> float:
    """Of a few steps, whose effect is forgotten at the next `Engine.restart`."""
    work = throughput.steps_of(engine, data.train, replace(config, tau_warmup_steps=0), config.batch_size)
    found, _ = throughput.rate(work, config.batch_size, 0.2, engine.device.type)
    return config.batch_size / found


def fits(engine: Engine, data: Data, config: TrainConfig, clock: Clock, name: str, beside: float) -> bool:
    """Whether a run, and ``beside`` seconds of evaluating it, fits into what is left; says so where it does not."""
    needed = 1.1 * (config.steps * seconds_per_step(engine, data, config) + beside)
    if not clock.allows(needed):
        print(f"{name}: {needed:.0f} s do not fit into the {clock.left():.0f} s left")
    return clock.allows(needed)


def follow(engine: Engine, data: Data, config: TrainConfig, name: str, evaluated: set[int]) -> tuple[Row, list[Row]]:
    """One run from where `Engine.restart` put it: its row without its name and kind, and its curve.

    Args:
        engine: with the run's weights and tau.
        data: pictures; the training ones are taken in an order that depends on the seed alone.
        config: the run's recipe, steps and seed.
        name: in the curve's rows.
        evaluated: after which steps the validation pictures are evaluated; the last step is among them.
    """
    order = indices(len(data.train), config.batch_size, config.steps, config.seed).to(engine.device)
    generator = torch.Generator(engine.device).manual_seed(config.seed)
    curve: list[Row] = []
    busy, last = 0.0, 0
    began = before = time.perf_counter()
    for at in range(config.steps):
        engine.step(*data.train.batch(order[at], generator), at, config)
        if at + 1 in evaluated:
            loss = engine.mean_loss(at + 1 - last)  # waits for the device
            busy += time.perf_counter() - before
            right, val_loss = evaluate(engine, data.val)
            epoch = round((at + 1) * config.batch_size / len(data.train), 3)
            row: Row = {"name": name, "step": at + 1, "epoch": epoch, "train_loss": round(loss, 4)}
            row |= {"val_accuracy": round(float(right.float().mean()), 4), "val_loss": round(val_loss, 4)}
            curve.append(row | {"train_images": len(data.train), "data": data.source, "seed": config.seed})
            last, before = at + 1, time.perf_counter()
    right, test_loss = evaluate(engine, data.test)
    found = {
        "lr": config.lr, "seed": config.seed, "data": data.source, "img_size": data.train.size,
        "epochs": curve[-1]["epoch"], "steps": config.steps, "batch_size": config.batch_size,
        "tau_warmup_steps": config.tau_warmup_steps, "precision": config.precision, "train_images": len(data.train),
        "val_images": len(data.val), "test_images": len(data.test), "train_loss": curve[-1]["train_loss"],
        "val_accuracy": curve[-1]["val_accuracy"], "test_accuracy": round(float(right.float().mean()), 4),
        "test_loss": round(test_loss, 4), **sparsity(engine, data.test),
        "images_per_second": round(config.steps * config.batch_size / busy, 1), "mode": str(engine.mode),
        "seconds": round(time.perf_counter() - began, 1), "correct": pack_bits(right.numpy()),
    }  # fmt: skip
    return found, curve


def beside_training(row: Row) -> float:
    """Seconds of a recorded run that were not training."""
    return float(row["seconds"]) - int(row["steps"]) * int(row["batch_size"]) / float(row["images_per_second"])


def record(row: Row, curve: list[Row], table: Table, curves: Table) -> None:
    """Write a run's curve in place of an older one, then its row."""
    size = table.plan.size
    curves.keep(lambda old: (old["name"], old["size"]) != (row["name"], size))
    curves.extend(curve)
    table.add(row)
