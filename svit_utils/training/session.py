"""What a training run consists of: made from the start or from a checkpoint, and written to one."""

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from svit_utils.training import checkpoints
from svit_utils.training.config import TrainConfig
from svit_utils.training.evaluation import warn_of_empty_rows
from svit_utils.training.fingerprint import fingerprint, sample, sample_difference
from svit_utils.training.metrics import Metrics
from svit_utils.training.order import DataOrder
from svit_utils.training.outputs import locked, writing
from svit_utils.training.processes import by_main, start
from svit_utils.training.recipe import Loss, LossFunction, distinct_thresholds, param_groups, set_tau_share
from svit_utils.training.sharding import check_mean, is_sharded, local, spread_like, whole
from svit_utils.weights import save_weights, state_difference


class NonFiniteLossError(RuntimeError):
    """The loss or a weight became NaN or infinite; the message names the step and the last good checkpoint."""


@dataclass
class Progress:
    """How far a run is: plain numbers, kept in its checkpoint. The tail is the last tenth of the steps."""

    step: int = 0
    tail_sum: float = 0.0
    tail_count: int = 0
    seconds: float = 0.0
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None

    def check(self, steps: int) -> None:
        """Raise ValueError for what no run of so many steps can have written."""
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = int if field.default == 0 and isinstance(field.default, int) else (int, float)
            optional = value is None and field.default is None
            if not optional and (isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value)):
                raise ValueError(f"its {field.name} is {value!r}")
        if not 0 <= self.step <= steps or not 0 <= self.tail_count <= steps:
            raise ValueError(f"it says step {self.step} of a run of {steps}")


class Session:
    """Model, optimiser, data and curves of one run, ready for its next step.

    Args and errors are those of `svit_utils.training.train`; ``stack`` keeps the folder's lock until the run ends.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: Dataset,
        val_set: Dataset | None,
        config: TrainConfig,
        folder: Path | None,
        resume: bool,
        stack: ExitStack,
        loss: LossFunction | None = None,
    ) -> None:
        accelerator = self.accelerator = start()
        self.is_main = accelerator.is_main_process  # the process that writes
        self.model, self.config, self.progress, self.folder = model, config, Progress(), folder
        if folder is not None:
            by_main(accelerator, lambda: stack.enter_context(locked(folder)))
        order = DataOrder(len(train_set), config, accelerator.process_index, accelerator.num_processes)  # type: ignore[arg-type]
        self.sharded = is_sharded(model)
        if self.sharded and config.ema_decay is not None:
            raise ValueError("ema_decay does not go with fully_shard, which allows no copy of the model")
        if self.sharded:
            check_mean(model)
        else:
            model.to(accelerator.device)
        self.thresholds = distinct_thresholds(model)
        set_tau_share(self.thresholds, 1.0)  # before the copy that becomes the average
        if self.is_main and not self.sharded:  # a sharded model runs in all processes at once
            warn_of_empty_rows(model, train_set, config.precision)
        _seed_everything(config.seed + accelerator.process_index)

        self.optimiser = torch.optim.AdamW(param_groups(model, config), lr=config.lr, weight_decay=config.weight_decay)
        self.peak_lrs = [group["lr"] for group in self.optimiser.param_groups]
        # With timm's warm-up of the decay, else the average of a short run would be mostly its start.
        self.ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
        self.prepared = model if self.sharded else accelerator.prepare_model(model)
        self.prepared_optimiser = accelerator.prepare_optimizer(self.optimiser)
        self.forward = torch.compile(self.prepared) if config.compile else self.prepared
        self.loss = Loss(model, config) if loss is None else loss

        # Taken once all processes share the start, and before a checkpoint changes it.
        about = None if loss is None else repr(loss)
        self.fingerprint = fingerprint(model, config, order.images, order.processes, train_set, val_set, about)
        self.sample: dict[str, Tensor] | None = None
        randoms = self._load(resume, order, train_set)
        order = replace(order, start=self.progress.step * config.grad_accumulation)
        self.batches: Iterator[Any] = iter(order.loader(train_set))
        if randoms is not None:  # last, since building the model and the loader may draw random numbers
            checkpoints.set_random_state(randoms[accelerator.process_index])
        self.metrics = Metrics(folder if self.is_main else None, keep_until=self.progress.step)

    def _load(self, resume: bool, order: DataOrder, train_set: Dataset) -> list | None:
        """Go on from the checkpoint, if there is one; returns the random states of its processes."""
        if self.folder is None:
            return None
        folder = self.folder
        if self.is_main:
            checkpoints.remove_partial(folder)
            if not resume:
                checkpoints.remove_run(folder)
        if not resume:
            return None
        checked: list[dict[str, Any] | None] = []  # stays in the first process: too large to send
        by_main(self.accelerator, lambda: checked.append(self._checked(folder, order, train_set)))
        state = checked[0] if self.is_main else checkpoints.load_checkpoint(folder, self.fingerprint)
        found = gather_object([None if state is None else state["run"]["step"]])
        if len(set(found)) > 1:
            raise checkpoints.CheckpointError(
                f"the processes do not see the same checkpoint in {folder}: it must lie on a disk that all share"
            )
        if state is None:
            return None
        with checkpoints.refusing(folder / checkpoints.CHECKPOINT):
            parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
            moments = {
                index: {name: spread_like(value, parameters[index]) for name, value in values.items()}
                for index, values in sorted(state["optimiser"]["state"].items())
            }
            groups = self.optimiser.state_dict()["param_groups"]  # the recipe's, not the file's
            self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            own = self.model.state_dict()
            self.model.load_state_dict({name: spread_like(state["model"][name], own[name]) for name in own})
        self.progress, self.sample = Progress(**state["run"]), state["sample"]
        return state["random"]

    def _checked(self, folder: Path, order: DataOrder, train_set: Dataset) -> dict[str, Any] | None:
        """The checkpoint in ``folder`` once everything in it is known to fit; nothing of the run is changed."""
        state = checkpoints.load_checkpoint(folder, self.fingerprint)
        if state is None:
            return None
        path = folder / checkpoints.CHECKPOINT
        with checkpoints.refusing(path):
            if missing := asdict(Progress()).keys() - state["run"].keys():
                raise ValueError(f"it does not say {min(missing)}")
            Progress(**state["run"]).check(self.config.steps)
            own = {"model": self.model, **({} if self.ema is None else {"ema": self.ema.module})}
            for name, module in own.items():
                prefixed = {k.removeprefix("module.") if name == "ema" else k: v for k, v in state[name].items()}
                own_state = module.state_dict()
                if differs := state_difference(own_state, prefixed):
                    raise ValueError(f"tensors of its {name}: {differs}")
                if other := [key for key, value in own_state.items() if prefixed[key].dtype != value.dtype]:
                    raise ValueError(f"{other[0]} of its {name} is {prefixed[other[0]].dtype}")
            parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
            checkpoints.check_optimiser(state["optimiser"], self.optimiser.state_dict(), parameters)
            if len(state["random"]) != self.accelerator.num_processes:
                raise ValueError(f"it holds the random states of {len(state['random'])} process(es)")
            here = checkpoints.random_state()
            for each in state["random"]:
                checkpoints.set_random_state(each)
            checkpoints.set_random_state(here)
        first = next(iter(replace(order, config=replace(self.config, num_workers=0)).loader(train_set)))
        with checkpoints.refusing(path):  # with workers, each has random numbers of its own: then the labels must do
            differs = sample_difference(state["sample"], sample(*first), values=self.config.num_workers == 0)
        if differs:
            raise checkpoints.CheckpointError(
                f"the checkpoint {path} belongs to another run: {differs}. Choose another out_dir, or pass "
                "resume=False to start again"
            )
        return state

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next images and labels of this process, on its device."""
        images, labels = next(self.batches)
        if self.sample is None:
            self.sample = sample(images, labels)
        device = self.accelerator.device
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def keep(self, model: nn.Module, name: str) -> None:
        """Write a model's weights into the folder, if there is one; raises `OutputError`, as on a full disk."""
        if self.folder is not None and (self.is_main or self.sharded):
            state = whole(model.state_dict())
            if self.is_main:
                with writing(self.folder / name):
                    save_weights(state, self.folder / name)

    def save(self) -> None:
        """Write a checkpoint, if there is a folder.

        Raises:
            NonFiniteLossError: a weight is NaN or infinite; the last checkpoint stays.
            OutputError: it cannot be written; the last checkpoint stays.
        """
        finite = all(bool(torch.isfinite(local(p)).all()) for p in self.model.parameters())
        if not all(gather_object([finite])):
            raise self.non_finite("the weights are not finite")
        randoms = gather_object([checkpoints.random_state()])
        if self.folder is None or not (self.is_main or self.sharded):
            return
        model, optimiser = whole(self.model.state_dict()), whole(self.optimiser.state_dict())
        if self.is_main:
            content = {
                "fingerprint": self.fingerprint,
                "model": model,
                "optimiser": optimiser,
                "ema": None if self.ema is None else self.ema.state_dict(),
                "run": asdict(self.progress),
                "random": randoms,
                "sample": self.sample,
            }
            checkpoints.save_checkpoint(content, self.folder)

    def where(self) -> str:
        """From where a run that stops now can go on, as the end of a sentence."""
        if self.folder is None:
            return "nothing is kept, since there is no out_dir"
        step = checkpoints.checkpoint_step(self.folder)
        if step is None:
            return f"there is no checkpoint in {self.folder}, so the same call starts again"
        return f"the same call goes on from the checkpoint of step {step} in {self.folder}"

    def non_finite(self, what: str) -> NonFiniteLossError:
        """The error to raise; its message says what is not finite, at which step, and what to try."""
        kept = self.folder is not None and (self.folder / checkpoints.CHECKPOINT).exists()
        where = f" The last good checkpoint is kept in {self.folder}." if kept else ""
        return NonFiniteLossError(
            f"{what} at step {self.progress.step}; training stopped.{where} Lower lr, lengthen warmup_steps, or look "
            "at the images of that step"
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's Mixup draws from the global generator
    torch.manual_seed(seed)
