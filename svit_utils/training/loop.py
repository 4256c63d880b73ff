"""The training loop: Hugging Face Accelerate for devices and processes, timm for the recipe, nothing hidden."""

import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from svit_utils.exclusive import exclusive
from svit_utils.models import load_weights
from svit_utils.training.config import TrainConfig
from svit_utils.training.evaluation import autocast, evaluate_together
from svit_utils.training.outputs import OutputError
from svit_utils.training.progress import Reporter
from svit_utils.training.recipe import LossFunction, set_tau_share
from svit_utils.training.schedules import lr_factor, tau_factor
from svit_utils.training.session import NonFiniteLossError, Session
from svit_utils.training.stops import Stopped, StopRequest


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
    loss: LossFunction | None = None,
) -> TrainResult:
    """Train ``model`` in place; dense or sparse is decided before, by `svit_utils.sparsify`.

    With ``out_dir``, writes there ``metrics.csv``, ``checkpoint.pt``, ``last.safetensors`` and ``best.safetensors``:
    the weights (with ``ema_decay``, the averaged ones) that were best on validation, judged at the full tau. A run that
    was killed goes on from its checkpoint; Ctrl-C and SIGTERM let the step end and write one. With one thread on a CPU
    it ends with the same weights, bit for bit, as one in one go. A finished run is loaded, not repeated. The model is
    left in eval mode with its last weights. Started by torchrun or Accelerate, all processes call this alike,
    with a model of their own or one spread by torch's ``fully_shard``.

    A model in eval mode is put into training mode as a whole. In one that is in training mode, parts in eval mode stay
    so: a frozen part keeps its batch statistics, and drops nothing. Other threads may explain the model between steps.

    Args:
        model: images [B, 3, H, W] to logits [B, classes].
        train_set: of (image, label).
        val_set: of (image, label), for choosing; None to do without.
        config: the recipe.
        out_dir: folder for what the run leaves; None keeps everything in memory.
        resume: go on from a checkpoint in ``out_dir``; False starts again and replaces it.
        progress: show a progress bar, or, where there is no terminal, a line now and then (standard error).
        loss: (forward, images, labels) to the scalar to minimise, where ``forward`` is the model; by default the
            recipe's cross-entropy. A checkpoint fits only a loss with the same ``repr``.

    Raises:
        Stopped: a KeyboardInterrupt, after Ctrl-C or SIGTERM; its message says from where the run can go on.
        NonFiniteLossError: the loss or a weight became NaN or infinite. The last good checkpoint is kept.
        OutputError: ``out_dir`` cannot be written to, or another run is writing there; later, the disk is full.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        ValueError: the training set is smaller than one batch.
    """
    with contextlib.ExitStack() as stack:  # holds the folder's lock
        folder = None if out_dir is None else Path(out_dir)
        with exclusive(model):  # it is copied, and what is frozen noted: not while another thread explains it
            run = Session(model, train_set, val_set, config, folder, resume, stack, loss)
            if not model.training:  # else its parts keep their own modes: one that is frozen may be in eval mode
                model.train()
        _run(run, val_set, progress and run.is_main)
        run.keep(model, "last.safetensors")
        run.accelerator.wait_for_everyone()
    model.eval()
    at = run.progress
    return TrainResult(
        steps=at.step,
        final_loss=at.tail_sum / max(at.tail_count, 1),
        history=run.metrics.rows,
        val_accuracy=at.val_accuracy,
        best_val_accuracy=at.best_val_accuracy,
        ema=None if run.ema is None else run.ema.module,
    )


def _run(run: Session, val_set: Dataset | None, progress: bool) -> None:
    """All steps that are left."""
    config, at = run.config, run.progress
    said = Reporter(at.step, config.steps, progress, "" if at.step == 0 else f"the checkpoint in {run.folder}")
    started = time.monotonic() - at.seconds
    with StopRequest() as stop:
        try:
            while at.step < config.steps:
                with exclusive(run.model):  # another thread may be explaining it, for which it is changed
                    row, signalled = _step(run, stop)
                at.seconds = time.monotonic() - started
                said.step(row["loss"])
                row = row | {"seconds": round(at.seconds, 3)} if _due(run, config.log_every) else {}
                if val_set is not None and _due(run, config.eval_every):
                    row |= _validate(run, val_set)
                if row:
                    run.metrics.add({"step": at.step, **row})
                if signalled or _due(run, config.checkpoint_every):
                    run.save()
                if signalled:
                    raise _stopped(run, stop)
        except (RuntimeError, OSError) as error:  # another process, or a worker, may have ended on the same signal
            if stop.number is None or isinstance(error, (NonFiniteLossError, OutputError)):
                raise
            raise _stopped(run, stop) from error
        finally:  # also when it is interrupted: the model is left with the full tau
            said.close()
            run.batches = iter(())  # ends the loader's workers
            set_tau_share(run.thresholds, 1.0)


def _stopped(run: Session, stop: StopRequest) -> Stopped:
    number = stop.number or signal.SIGTERM  # of this process, or of another one
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    return Stopped(f"stopped by {name} after step {run.progress.step} of {run.config.steps}; {run.where()}", number)


def _step(run: Session, stop: StopRequest) -> tuple[dict[str, float], bool]:
    """One optimiser step; returns (loss, learning rate and share of tau; whether any process was asked to stop)."""
    config, at, accelerator = run.config, run.progress, run.accelerator
    factor = lr_factor(at.step, config.steps, config.warmup_steps, config.schedule)
    for group, lr in zip(run.optimiser.param_groups, run.peak_lrs, strict=True):
        group["lr"] = lr * factor
    share = tau_factor(at.step, config.tau_warmup_steps) if run.thresholds else 1.0
    set_tau_share(run.thresholds, share)

    loss, signalled = 0.0, False
    for micro in range(config.grad_accumulation):
        images, labels = run.next_batch()
        last = micro == config.grad_accumulation - 1  # with it, processes average the gradients of the step
        averaging = contextlib.nullcontext() if last else accelerator.no_sync(run.prepared)
        with averaging, autocast(accelerator.device.type, config.precision):
            micro_loss = run.loss(run.forward, images, labels) / config.grad_accumulation
        # The mean over the processes is one number in all of them, so that all stop when it is not finite, and all
        # hear of a signal that one of them got.
        own = torch.stack([micro_loss.detach(), micro_loss.new_tensor(float(stop.number is not None))])
        shared, asked = accelerator.reduce(own, reduction="mean").tolist()
        loss, signalled = loss + shared, signalled or asked > 0
        if not math.isfinite(loss):
            raise run.non_finite(f"the loss is {loss}")
        accelerator.backward(micro_loss)
    if config.clip_grad is not None:
        accelerator.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    run.prepared_optimiser.step()
    run.prepared_optimiser.zero_grad()

    at.step += 1
    if run.ema is not None:
        run.ema.update(run.model, step=at.step)
    if at.step > 0.9 * config.steps:
        at.tail_sum += loss
        at.tail_count += 1
    return {"loss": loss, "lr": config.lr * factor, "tau_factor": share}, signalled


def _validate(run: Session, val_set: Dataset) -> dict[str, float]:
    """Accuracy and loss on the validation set; the weights are kept if they are the best so far."""
    config, at = run.config, run.progress
    set_tau_share(run.thresholds, 1.0)  # else the best weights would be early ones, judged at a lower tau
    judged = run.model if run.ema is None else run.ema.module
    found = evaluate_together(run.accelerator, judged, val_set, config.batch_size, config.precision, config.num_workers)
    at.val_accuracy = found.accuracy
    if at.best_val_accuracy is None or found.accuracy > at.best_val_accuracy:
        at.best_val_accuracy = found.accuracy
        run.keep(judged, "best.safetensors")
    return {"val_accuracy": found.accuracy, "val_loss": found.loss}


def _due(run: Session, every: int) -> bool:
    """Whether it is time for what is done ``every`` so many steps and at the end (0: only at the end)."""
    step = run.progress.step
    return step == run.config.steps or (every > 0 and step % every == 0)


def load_best(model: nn.Module, out_dir: str | os.PathLike[str]) -> nn.Module:
    """Load the weights that were best on validation into ``model`` and return it; raises as `load_weights`."""
    load_weights(model, Path(out_dir) / "best.safetensors")
    return model
