"""The training loop: Hugging Face Accelerate for devices and processes, timm for the recipe, nothing hidden."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from svit_utils.attention import Threshold, TokenSparsityTracker, sparse_modules
from svit_utils.models import load_weights, save_weights
from svit_utils.training.checkpoints import (
    CHECKPOINT,
    load_checkpoint,
    random_state,
    remove_checkpoint,
    save_checkpoint,
    set_random_state,
)
from svit_utils.training.evaluation import autocast, evaluate
from svit_utils.training.schedules import SCHEDULES, lr_factor, tau_factor

log = logging.getLogger(__name__)

_EMBEDDINGS = ("pos_embed", "cls_token", "dist_token", "reg_token")  # no weight decay, whether the model says so or not


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the last good checkpoint."""


class OutputError(OSError):
    """The output folder cannot be written to."""


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Steps are optimiser steps; ``batch_size`` is per process and micro-batch.

    Attributes:
        steps: length of the run.
        batch_size: images per process and forward pass.
        lr: peak learning rate of AdamW.
        weight_decay: on matrices only; not on norms, biases, position and class tokens, thresholds.
        warmup_steps: linear warm-up of the learning rate.
        schedule: ``"cosine"``, ``"onecycle"`` or ``"constant"``, see `lr_factor`.
        layer_decay: factor on the learning rate from each layer to the one below (timm's), or None.
        tau_warmup_steps: steps over which tau rises linearly from 0.
        label_smoothing: in [0, 1).
        mixup, cutmix: alpha of timm's Mixup, 0 for none.
        ema_decay: decay of an exponential moving average of the weights, or None.
        grad_accumulation: micro-batches per step.
        clip_grad: largest gradient norm, or None.
        precision: ``"fp32"`` or ``"bf16"`` (autocast; the cut stays in float32).
        compile: run the model through ``torch.compile``.
        seed: of the data order and the random generators.
        num_workers: processes that load data; resuming is exact only with 0.
        eval_every: steps between evaluations on the validation set (0: only at the end).
        checkpoint_every: steps between checkpoints (0: only at the end). They are written only with ``out_dir``.
        log_every: steps between rows of metrics.csv.
    """

    steps: int
    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup_steps: int = 0
    schedule: str = "cosine"
    layer_decay: float | None = None
    tau_warmup_steps: int = 0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    grad_accumulation: int = 1
    clip_grad: float | None = 1.0
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    num_workers: int = 0
    eval_every: int = 0
    checkpoint_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "mixup", "cutmix", "num_workers", "eval_every", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("ema_decay", "layer_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1) or be None, got {value}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be positive or None, got {self.clip_grad}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in [0, 2**31), got {self.seed}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {self.schedule!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must lie in [0, steps = {self.steps}], got {self.warmup_steps}")
        if not 0 <= self.tau_warmup_steps <= self.steps:
            raise ValueError(f"tau_warmup_steps must lie in [0, steps = {self.steps}], got {self.tau_warmup_steps}")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")


@dataclass
class TrainResult:
    """What a run left.

    Attributes:
        steps: steps done.
        final_loss: mean training loss over the last tenth of the run.
        history: the rows of metrics.csv.
        val_accuracy: at the end, None without a validation set.
        best_val_accuracy: the best seen, None likewise; its weights are in ``best.safetensors``.
        ema: the averaged model, if asked for.
    """

    steps: int
    final_loss: float
    history: list[dict[str, float]] = field(default_factory=list)
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None
    ema: nn.Module | None = None


def train(
    model: nn.Module,
    train_set: Dataset,
    val_set: Dataset | None,
    config: TrainConfig,
    *,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place; dense or sparse is decided before, by `svit_utils.sparsify`.

    With ``out_dir``, writes there ``metrics.csv``, ``checkpoint.pt``, ``last.safetensors`` and ``best.safetensors``:
    the weights that were best on validation, judged at the whole tau, the averaged ones with ``ema_decay``. A run that
    was killed goes on from its checkpoint: with one thread on a CPU it ends with the same weights, bit for bit, as one
    that was not. A finished run is loaded, not repeated. The model is left in eval mode with its last weights.

    Args:
        model: images [B, 3, H, W] to logits [B, classes].
        train_set: of (image, label).
        val_set: of (image, label), for choosing; None to do without.
        config: the recipe.
        out_dir: folder for what the run leaves; None keeps everything in memory.
        resume: go on from a checkpoint in ``out_dir``; False starts again and replaces it.
        progress: show a progress bar.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite. The last good checkpoint is kept.
        OutputError: ``out_dir`` cannot be written to; raised before training.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        ValueError: the training set is smaller than one batch.
    """
    accelerator = Accelerator(mixed_precision="no")  # config.precision governs, by torch's autocast around the forward
    folder = None if out_dir is None else _prepare_folder(Path(out_dir))
    order = _DataOrder(len(train_set), config, accelerator)  # type: ignore[arg-type]
    model.to(accelerator.device)
    thresholds = _thresholds(model)
    _full_tau(thresholds)
    if accelerator.is_main_process:
        _warn_if_empty(model, train_set, config)
    _seed_everything(config.seed + accelerator.process_index)

    optimiser = torch.optim.AdamW(_param_groups(model, config), lr=config.lr, weight_decay=config.weight_decay)
    base_lrs = [group["lr"] for group in optimiser.param_groups]
    # With timm's warm-up of the decay, else the average of a short run would be mostly its start.
    ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    prepared = accelerator.prepare_model(model)
    optimiser_ = accelerator.prepare_optimizer(optimiser)
    forward = torch.compile(prepared) if config.compile else prepared
    loss_of = _Loss(model, config)

    fingerprint = _fingerprint(model, config, order)  # of the start: after processes share it, before it changes
    run = _Run()
    if folder is not None and not resume and accelerator.is_main_process:
        remove_checkpoint(folder)
    state = load_checkpoint(folder, fingerprint) if folder is not None and resume else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        run = _Run(**state["run"])
    batches = iter(order.loader(train_set, start=run.step * config.grad_accumulation))
    if state is not None:  # last, since building the model and the loader may draw random numbers
        set_random_state(state["random"][accelerator.process_index])
    metrics = _Metrics(folder if accelerator.is_main_process else None, keep_until=run.step)

    def checkpoint() -> None:
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise NonFiniteLossError(_non_finite("the weights are not finite", run.step, folder))
        randoms = gather_object([random_state()])
        if folder is not None and accelerator.is_main_process:
            content = {
                "fingerprint": fingerprint,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "ema": None if ema is None else ema.state_dict(),
                "run": asdict(run),
                "random": randoms,
            }
            save_checkpoint(content, folder)

    bar = tqdm(
        total=config.steps,
        initial=run.step,
        desc="train",
        disable=None if progress and accelerator.is_main_process else True,
    )
    model.train()
    started = time.monotonic() - run.seconds
    try:
        while run.step < config.steps:
            factor = lr_factor(run.step, config.steps, config.warmup_steps, config.schedule)
            for group, lr in zip(optimiser.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
            for threshold in thresholds:
                threshold.scale_(tau_factor(run.step, config.tau_warmup_steps))
            loss = 0.0
            for micro in range(config.grad_accumulation):
                images, labels = (t.to(accelerator.device, non_blocking=True) for t in next(batches))
                last = micro == config.grad_accumulation - 1
                with _no_sync_unless(last, accelerator, prepared), autocast(accelerator.device.type, config.precision):
                    micro_loss = loss_of(forward, images, labels) / config.grad_accumulation
                loss += _mean_over_processes(micro_loss.detach(), accelerator)
                if not np.isfinite(loss):
                    raise NonFiniteLossError(_non_finite(f"the loss is {loss}", run.step, folder))
                accelerator.backward(micro_loss)
            if config.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimiser_.step()
            optimiser_.zero_grad()
            if ema is not None:
                ema.update(model, step=run.step + 1)
            run.step += 1
            run.add_loss(loss, config.steps)
            run.seconds = time.monotonic() - started
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

            row: dict[str, float] = {}
            if run.step % config.log_every == 0 or run.step == config.steps:
                tau_share = tau_factor(run.step - 1, config.tau_warmup_steps) if thresholds else 1.0
                row = {
                    "loss": loss,
                    "lr": config.lr * factor,
                    "tau_factor": tau_share,
                    "seconds": round(run.seconds, 3),
                }
            ended = run.step == config.steps
            if val_set is not None and (ended or (config.eval_every and run.step % config.eval_every == 0)):
                _full_tau(thresholds)  # else the best weights would be early ones, judged at a lower tau
                judged = model if ema is None else ema.module
                result = evaluate(
                    judged,
                    val_set,
                    batch_size=config.batch_size,
                    precision=config.precision,
                    num_workers=config.num_workers,
                )
                row |= {"val_accuracy": result.accuracy, "val_loss": result.loss}
                run.val_accuracy = result.accuracy
                if run.best_val_accuracy is None or result.accuracy > run.best_val_accuracy:
                    run.best_val_accuracy = result.accuracy
                    if folder is not None and accelerator.is_main_process:
                        save_weights(judged, folder / "best.safetensors")
            if row:
                metrics.add({"step": run.step, **row})
            if ended or (config.checkpoint_every and run.step % config.checkpoint_every == 0):
                checkpoint()
    finally:  # also when it is interrupted: the model is left with the whole tau
        bar.close()
        _full_tau(thresholds)
    if folder is not None and accelerator.is_main_process:
        save_weights(model, folder / "last.safetensors")
    accelerator.wait_for_everyone()
    model.eval()
    return TrainResult(
        steps=run.step,
        final_loss=run.final_loss,
        history=metrics.rows,
        val_accuracy=run.val_accuracy,
        best_val_accuracy=run.best_val_accuracy,
        ema=None if ema is None else ema.module,
    )


def load_best(model: nn.Module, out_dir: str | os.PathLike[str]) -> nn.Module:
    """Load the weights that were best on validation into ``model`` and return it; raises as `load_weights`."""
    load_weights(model, Path(out_dir) / "best.safetensors")
    return model


@dataclass
class _Run:
    """The part of the state that is plain numbers."""

    step: int = 0
    tail_sum: float = 0.0
    tail_count: int = 0
    seconds: float = 0.0
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None

    def add_loss(self, loss: float, steps: int) -> None:
        if self.step > 0.9 * steps:
            self.tail_sum += loss
            self.tail_count += 1

    @property
    def final_loss(self) -> float:
        return self.tail_sum / max(self.tail_count, 1)


class _DataOrder:
    """Which images each micro-batch holds: a function of seed and position, so a run can go on from any step."""

    def __init__(self, n: int, config: TrainConfig, accelerator: Accelerator) -> None:
        self.n, self.config = n, config
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.per_epoch = n // (config.batch_size * self.processes)
        if self.per_epoch == 0:
            raise ValueError(
                f"the training set has {n} images, fewer than one batch of {config.batch_size} in each of "
                f"{self.processes} process(es)"
            )

    def batches(self, start: int) -> Iterator[list[int]]:
        """Indices of this process, from micro-batch ``start`` to the end of the run. The last short one is dropped."""
        size = self.config.batch_size
        epoch, permutation = -1, torch.empty(0)
        for position in range(start, self.config.steps * self.config.grad_accumulation):
            at, within = divmod(position, self.per_epoch)
            if at != epoch:
                epoch = at
                generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
                permutation = torch.randperm(self.n, generator=generator)
            first = (within * self.processes + self.rank) * size
            yield permutation[first : first + size].tolist()

    def loader(self, dataset: Dataset, start: int) -> DataLoader:
        # A generator of its own: otherwise making the iterator would advance the global one.
        generator = torch.Generator().manual_seed(self.config.seed)
        workers = self.config.num_workers
        sampler: Any = _Restartable(self, start)
        pin = torch.cuda.is_available()
        return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, generator=generator, pin_memory=pin)


class _Restartable:
    """An iterable for DataLoader over the batches from ``start`` on."""

    def __init__(self, order: _DataOrder, start: int) -> None:
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.batches(self.start)


class _Loss:
    """Cross-entropy with label smoothing, or with timm's mixup and cutmix."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.smoothing = config.label_smoothing
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=int(model.num_classes),  # type: ignore[arg-type]
            )

    def __call__(self, forward: Any, images: Tensor, labels: Tensor) -> Tensor:
        if self.mixup is None:
            return F.cross_entropy(forward(images).float(), labels, label_smoothing=self.smoothing)
        images, soft = self.mixup(images, labels)
        return F.cross_entropy(forward(images).float(), soft)


class _Metrics:
    """metrics.csv: a row at a time, each flushed; rows beyond the checkpoint are dropped on resuming."""

    COLUMNS = ("step", "loss", "lr", "tau_factor", "val_accuracy", "val_loss", "seconds")

    def __init__(self, folder: Path | None, keep_until: int) -> None:
        self.path = None if folder is None else folder / "metrics.csv"
        self.rows: list[dict[str, float]] = []
        if self.path is None:
            return
        if keep_until and self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                whole = [line for line in file if line.endswith("\n")]  # a kill can leave half a line at the end
            for row in csv.DictReader(whole):
                if int(row["step"]) <= keep_until:
                    self.rows.append({k: float(v) for k, v in row.items() if v} | {"step": int(row["step"])})
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)

    def _writer(self, file: Any) -> csv.DictWriter:
        return csv.DictWriter(file, self.COLUMNS, lineterminator="\n")

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                self._writer(file).writerow(row)


def _prepare_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of the same run may have been here first
    except OSError as error:
        raise OutputError(
            f"cannot write to the output folder {folder}: {error.strerror}; choose another out_dir"
        ) from error
    return folder


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's Mixup draws from the global generator
    torch.manual_seed(seed)


def _thresholds(model: nn.Module) -> list[Threshold]:
    """Every threshold object once, also when layers share it."""
    return list({id(m.threshold): m.threshold for m in sparse_modules(model).values()}.values())


def _full_tau(thresholds: list[Threshold]) -> None:
    for threshold in thresholds:
        threshold.scale_(1.0)


def _param_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """timm's groups: no weight decay on vectors and on what the model names; layer-wise learning rates if asked for."""
    named = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    named |= {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in _EMBEDDINGS}
    learned = {id(p) for threshold in _thresholds(model) for p in threshold.parameters()}
    named |= {name for name, p in model.named_parameters() if id(p) in learned}
    exempt = tuple(sorted(named))
    if config.layer_decay is None:
        return param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    groups = param_groups_layer_decay(
        model, config.weight_decay, no_weight_decay_list=exempt, layer_decay=config.layer_decay
    )
    return [{**group, "lr": config.lr * group["lr_scale"]} for group in groups]


def _mean_over_processes(loss: Tensor, accelerator: Accelerator) -> float:
    """The same number in every process, so that all of them stop when it is not finite."""
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(loss, reduction="mean")
    return float(loss)


def _no_sync_unless(last: bool, accelerator: Accelerator, model: nn.Module) -> Any:
    """Between processes gradients are averaged once per step, with the last micro-batch."""
    import contextlib

    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def _warn_if_empty(model: nn.Module, dataset: Dataset, config: TrainConfig) -> None:
    """Say so when most rows lose every key: the fallback then decides what is trained."""
    modules = sparse_modules(model)
    if not modules:
        return
    images = torch.stack([dataset[i][0] for i in range(min(8, len(dataset)))])  # type: ignore[arg-type]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with TokenSparsityTracker(model) as tracker, torch.no_grad(), autocast(device.type, config.precision):
        model(images.to(device))
    model.train(was_training)
    if warning := tracker.summary().warning:
        log.warning(warning)


def _fingerprint(model: nn.Module, config: TrainConfig, order: _DataOrder) -> str:
    """What must be the same for a checkpoint to fit: model, thresholds, start, recipe, size of the data, processes."""
    recipe = {k: v for k, v in asdict(config).items() if k not in ("checkpoint_every", "log_every", "num_workers")}
    shapes = "".join(f"{name}{tuple(p.shape)}" for name, p in model.state_dict().items())
    sparse = {name: f"{m.empty_rows} {m.threshold.extra_repr()}" for name, m in sparse_modules(model).items()}
    digest = hashlib.sha256((shapes + json.dumps(sparse)).encode()).hexdigest()[:12]
    start = hashlib.sha256()
    for value in model.state_dict().values():
        start.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    content = {
        "model": f"{type(model).__name__}-{digest}",
        "start": f"weights-{start.hexdigest()[:12]}",
        "images": order.n,
        "processes": order.processes,
        **recipe,
    }
    return json.dumps(content, sort_keys=True)


def _non_finite(what: str, step: int, folder: Path | None) -> str:
    kept = folder is not None and (folder / CHECKPOINT).exists()
    where = f" The last good checkpoint is kept in {folder}." if kept else ""
    return (
        f"{what} at step {step}; training stopped.{where} Lower lr, lengthen warmup_steps, or look at the images of "
        "that step"
    )
