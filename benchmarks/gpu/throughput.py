"""How fast pictures come, and how fast they are learned from: Pillow beside the device, eager beside compiled steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.gpu import card, targets
from benchmarks.gpu.engine import Engine, Mode, build
from benchmarks.gpu.models import forward_flops
from benchmarks.gpu.pictures import Pictures, indices
from benchmarks.gpu.plan import Clock, Plan, Row, Table
from benchmarks.gpu.timing import reason
from svit_utils.attention import sparsify
from svit_utils.data.transforms import small_picture_transform
from svit_utils.files import read_rows
from svit_utils.models import create_model
from svit_utils.training.config import TrainConfig

BASE = "vit_base_patch16_224"
RECIPE = TrainConfig(steps=1000, batch_size=16, lr=3e-4, precision="bf16")


class WithPillow(Dataset):
    """The pictures as `svit_utils.data.cifar10` gives them, one by one on the processor."""

    def __init__(self, images: Tensor, size: int) -> None:
        self.pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = small_picture_transform(images.shape[-1], size, True, "imagenet")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        return self.transform(Image.fromarray(self.pictures[index]))


def loader_rate(images: Tensor, size: int, workers: int, seconds: float) -> float:
    """Images a second of a DataLoader with so many processes, after its first batch."""
    count = min(64, len(images) // 4)
    loader: DataLoader[Any] = DataLoader(WithPillow(images, size), batch_size=count, num_workers=workers, shuffle=True)
    seen, started = 0, 0.0
    while True:
        for batch in loader:
            if not started:
                started = time.perf_counter()
                continue
            seen += len(batch)
            if time.perf_counter() - started > seconds:
                return seen / (time.perf_counter() - started)


def rate(work: Callable[[int], None], images: int, seconds: float, device: str) -> tuple[float, int]:
    """Images a second of ``work(step)``, each with so many images, and how many steps were timed."""
    for step in range(2):
        work(step)
    _wait(device)
    started, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - started < seconds:
        for _ in range(1 if device == "cpu" else 5):
            work(steps)
            steps += 1
        _wait(device)
    return steps * images / (time.perf_counter() - started), steps


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def of_device(plan: Plan, pictures: Pictures, batch: int, seconds: float) -> float:
    """Images a second of crops, flips, resizing and normalisation on the device."""
    order = indices(len(pictures), batch, 64, 0).to(plan.device)
    generator = torch.Generator(plan.device).manual_seed(0)
    return rate(lambda step: void(pictures.batch(order[step % 64], generator)), batch, seconds, plan.device)[0]


def void(_: object) -> None:
    """Forget a value."""


def steps_of(engine: Engine, pictures: Pictures, config: TrainConfig, batch: int) -> Callable[[int], None]:
    """Training steps on augmented pictures, as in a run."""
    order = indices(len(pictures), batch, 64, 0).to(engine.device)
    generator = torch.Generator(engine.device).manual_seed(0)

    def work(step: int) -> None:
        engine.step(*pictures.batch(order[step % 64], generator), step % config.steps, config)

    return work


def training_row(
    plan: Plan, name: str, variant: str, pictures: Pictures, batch: int, mode: Mode, seconds: float
) -> Row:
    """Images a second and memory of training from random weights, data included."""
    model = create_model(name, num_classes=10, img_size=pictures.size if plan.small else None).to(plan.device)
    flops = forward_flops(model, torch.zeros(1, 3, pictures.size, pictures.size, device=plan.device))
    if variant != "dense":
        sparsify(model, 0.01)
    if plan.device == "cuda":
        torch._dynamo.reset()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    config = RECIPE if plan.device == "cuda" else TrainConfig(steps=1000, batch_size=batch)
    engine = build(model, (batch, 3, pictures.size, pictures.size), config, mode)
    prepared = time.perf_counter() - started
    images, steps = rate(steps_of(engine, pictures, config, batch), batch, seconds, plan.device)
    peak = card.peak_tflops(list(read_rows(plan.out / "card.csv")), plan.size)
    tflops = 3 * flops * images / 1e12
    row: Row = {"what": "training step", "model": name, "variant": variant, "img_size": pictures.size, "batch": batch}
    row |= {"mode": str(engine.mode), "images_per_second": round(images, 1), "steps": steps}
    row |= {"epochs": round(steps * batch / len(pictures), 3), "seconds_to_prepare": round(prepared, 1)}
    row |= {"dense_tflops": round(tflops, 2), "share_of_peak": round(tflops / peak, 3) if peak else ""}
    row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20) if plan.device == "cuda" else ""
    engine.close()
    return row


def run(plan: Plan, pictures: Pictures, clock: Clock) -> None:
    """Begin ``throughput.csv`` anew: pictures from Pillow and on the device, DeiT-Tiny eager and captured."""
    table = Table(plan.out / "throughput.csv", plan)
    table.keep(lambda row: row.get("size") != plan.size)
    seconds = 2.0 if not plan.small else 0.1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    images = pictures.images.cpu()
    for workers in (0,) if plan.small else (0, cores):
        found = loader_rate(images, pictures.size, workers, 1.5 * seconds)
        table.add({"what": f"pictures, Pillow, {max(1, workers)} processes", "images_per_second": round(found, 1)})
        print(f"{table.rows[-1]['what']}: {found:.0f} images/s", flush=True)
    found = of_device(plan, pictures, 256 if not plan.small else 4, seconds)
    table.add({"what": "pictures, on the device", "images_per_second": round(found, 1)})
    print(f"{table.rows[-1]['what']}: {found:.0f} images/s", flush=True)
    full, plain = Mode(compile=True, graph=True), Mode(compile=False, graph=False)
    for mode in (plain,) if plan.small else (plain, full):
        for variant in ("dense", "sparse"):
            if clock.allows(30.0 if mode == full else 5.0):
                add_training(plan, table, targets.DEIT, variant, pictures, 4 if plan.small else 256, mode, seconds)


def base(plan: Plan, pictures: Pictures, clock: Clock) -> None:
    """ViT-Base from random weights, for an epoch or for as long as a share of the budget: rate and memory only."""
    table = Table(plan.out / "throughput.csv", plan)
    for variant in ("dense", "sparse") if not plan.small else ():
        seconds = min(60.0, 0.04 * plan.train_seconds)
        if clock.allows(30.0 + seconds):
            add_training(plan, table, BASE, variant, pictures, 128, Mode(compile=True, graph=True), seconds)


def add_training(
    plan: Plan, table: Table, name: str, variant: str, pictures: Pictures, batch: int, mode: Mode, seconds: float
) -> None:
    """Measure, write and print `training_row`, or that there is not memory enough."""
    try:
        row = training_row(plan, name, variant, pictures, batch, mode, seconds)
    except torch.cuda.OutOfMemoryError as error:
        row = {"what": "training step", "model": name, "variant": variant, "batch": batch, "note": reason(error)}
    table.add(row)
    print(
        f"{name} {variant:6s} batch {batch}, {row.get('mode')}: {row.get('images_per_second', row.get('note'))} "
        f"images/s, peak {row.get('peak_mib')} MiB, prepared in {row.get('seconds_to_prepare')} s",
        flush=True,
    )
