"""What a training run consists of: made from the start or from a checkpoint, and written to one."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset

from svit_utils.training import checkpoints
from svit_utils.training.config import TrainConfig
from svit_utils.training.evaluation import warn_of_empty_rows
from svit_utils.training.metrics import Metrics
from svit_utils.training.order import DataOrder
from svit_utils.training.recipe import Loss, distinct_thresholds, param_groups, set_tau_share


class NonFiniteLossError(RuntimeError):
    """The loss or a weight became NaN or infinite; the message names the step and the last good checkpoint."""


class OutputError(OSError):
    """The output folder cannot be written to."""


@dataclass
class Progress:
    """How far a run is: plain numbers, kept in its checkpoint. The tail is the last tenth of the steps."""

    step: int = 0
    tail_sum: float = 0.0
    tail_count: int = 0
    seconds: float = 0.0
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None


class Session:
    """Model, optimiser, data and curves of one run, ready for its next step.

    Args and errors are those of `svit_utils.training.train`.
    """

    def __init__(
        self, model: nn.Module, train_set: Dataset, config: TrainConfig, folder: Path | None, resume: bool
    ) -> None:
        # Precision is config.precision's business: torch's autocast around the forward pass.
        accelerator = self.accelerator = Accelerator(mixed_precision="no")
        self.is_main = accelerator.is_main_process  # the process that writes
        self.model, self.config, self.progress = model, config, Progress()
        self.folder = None if folder is None else _prepared(folder)
        order = DataOrder(len(train_set), config, accelerator.process_index, accelerator.num_processes)  # type: ignore[arg-type]
        model.to(accelerator.device)
        self.thresholds = distinct_thresholds(model)
        set_tau_share(self.thresholds, 1.0)
        if self.is_main:
            warn_of_empty_rows(model, train_set, config.precision)
        _seed_everything(config.seed + accelerator.process_index)

        self.optimiser = torch.optim.AdamW(param_groups(model, config), lr=config.lr, weight_decay=config.weight_decay)
        self.peak_lrs = [group["lr"] for group in self.optimiser.param_groups]
        # With timm's warm-up of the decay, else the average of a short run would be mostly its start.
        self.ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
        self.prepared = accelerator.prepare_model(model)
        self.prepared_optimiser = accelerator.prepare_optimizer(self.optimiser)
        self.forward = torch.compile(self.prepared) if config.compile else self.prepared
        self.loss = Loss(model, config)

        # Taken once all processes share the start, and before a checkpoint changes it.
        self.fingerprint = checkpoints.fingerprint(model, config, order.images, order.processes)
        randoms = self._load(resume)
        order = replace(order, start=self.progress.step * config.grad_accumulation)
        self.batches = iter(order.loader(train_set))
        if randoms is not None:  # last, since building the model and the loader may draw random numbers
            checkpoints.set_random_state(randoms[accelerator.process_index])
        self.metrics = Metrics(self.folder if self.is_main else None, keep_until=self.progress.step)

    def _load(self, resume: bool) -> list | None:
        """Go on from the checkpoint, if there is one; returns the random states of its processes."""
        if self.folder is None:
            return None
        if self.is_main:
            checkpoints.remove_partial(self.folder)
            if not resume:
                checkpoints.remove_run(self.folder)
        state = checkpoints.load_checkpoint(self.folder, self.fingerprint) if resume else None
        if state is None:
            return None
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.progress = Progress(**state["run"])
        return state["random"]

    def save(self) -> None:
        """Write a checkpoint, if there is a folder.

        Raises:
            NonFiniteLossError: a weight is NaN or infinite; the last checkpoint stays.
        """
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise self.non_finite("the weights are not finite")
        randoms = gather_object([checkpoints.random_state()])
        if self.folder is not None and self.is_main:
            content = {
                "fingerprint": self.fingerprint,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "run": asdict(self.progress),
                "random": randoms,
            }
            checkpoints.save_checkpoint(content, self.folder)

    def non_finite(self, what: str) -> NonFiniteLossError:
        """The error to raise; its message says what is not finite, at which step, and what to try."""
        kept = self.folder is not None and (self.folder / checkpoints.CHECKPOINT).exists()
        where = f" The last good checkpoint is kept in {self.folder}." if kept else ""
        return NonFiniteLossError(
            f"{what} at step {self.progress.step}; training stopped.{where} Lower lr, lengthen warmup_steps, or look "
            "at the images of that step"
        )


def _prepared(folder: Path) -> Path:
    """The output folder, made if it is missing; raises `OutputError` before hours of training are lost to it."""
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
