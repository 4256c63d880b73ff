"""A training step without Python in it: blocks compiled, the whole step captured in a CUDA graph and replayed.

One `Engine` serves all runs of a kind of model: weights, moments, learning rate and tau are changed in place, so that
nothing is compiled or captured again. On the CPU, and where something of this fails, the step is an ordinary one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.workers import one_line
from svit_utils.exclusive import evaluating
from svit_utils.training.config import TrainConfig
from svit_utils.training.recipe import distinct_thresholds, param_groups, set_tau_share
from svit_utils.training.schedules import lr_factor, tau_factor

WARM_UP = 3  # steps before a capture: they compile, and allocate the optimiser's moments


@dataclass(frozen=True)
class Mode:
    """How a step is run: with compiled blocks, from a CUDA graph."""

    compile: bool
    graph: bool

    def __str__(self) -> str:
        parts = (["compiled blocks"] if self.compile else []) + (["CUDA graph"] if self.graph else [])
        return " + ".join(parts) or "eager"


class Engine:
    """Forward, loss, backward, clipping and fused AdamW on a model, for batches of one shape.

    Args:
        model: on its device; images [B, 3, H, W] to logits.
        shape: of a batch of images.
        config: batch size aside, the recipe: weight decay, clipping, label smoothing, precision. Peak learning rate and
            schedule are given to `step`.
        mode: how to run a step.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int, int], config: TrainConfig, mode: Mode) -> None:
        self.model, self.config, self.mode = model, config, mode
        self.device = next(model.parameters()).device
        cuda = self.device.type == "cuda"
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32  # what the first layer rounds them to
        self.images = torch.zeros(shape, device=self.device, dtype=dtype)
        self.labels = torch.zeros(shape[0], device=self.device, dtype=torch.int64)
        self.loss_sum = torch.zeros((), device=self.device)
        self.thresholds = distinct_thresholds(model)
        self.lr = torch.zeros((), device=self.device)
        self.optimiser = torch.optim.AdamW(param_groups(model, config), lr=self.lr, fused=True, capturable=cuda)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        model.train()
        if mode.compile:
            for block in model.blocks:  # type: ignore[union-attr]
                block.compile(dynamic=False)
        self._graph = self._captured() if mode.graph else None

    def restart(self, state: Mapping[str, Tensor]) -> None:
        """Weights from ``state``, moments and step counts 0, in place."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(state[name])
            for moments in self.optimiser.state.values():
                for tensor in moments.values():
                    tensor.zero_()
            self.loss_sum.zero_()
        self.model.train()

    def step(self, images: Tensor, labels: Tensor, at: int, config: TrainConfig) -> None:
        """Step ``at`` (from 0) of a run with the learning rate, schedule and tau warm-up of ``config``."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.lr.fill_(config.lr * lr_factor(at, config.steps, config.warmup_steps, config.schedule))
        if config.tau_warmup_steps and at <= config.tau_warmup_steps + 1:
            set_tau_share(self.thresholds, tau_factor(at, config.tau_warmup_steps))
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def mean_loss(self, steps: int) -> float:
        """Mean training loss of the last ``steps`` steps; starts a new sum. Waits for the device."""
        loss = float(self.loss_sum) / max(steps, 1)
        self.loss_sum.zero_()
        return loss

    def close(self) -> None:
        """Give up the graph and its memory."""
        self._graph = None
        self.optimiser.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            loss = F.cross_entropy(
                self.model(self.images).float(), self.labels, label_smoothing=self.config.label_smoothing
            )
        loss.backward()
        if self.config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimiser.step()
        self.loss_sum += loss.detach()

    def autocast(self) -> torch.autocast:
        """bfloat16 where the recipe says so; weights are cast anew each time, as a graph must."""
        on = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    def _captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._step()
        return graph


def build(model: nn.Module, shape: tuple[int, int, int, int], config: TrainConfig, wanted: Mode) -> Engine:
    """An engine in the wanted mode, or in a simpler one where that fails: no compiler, or no graph of it."""
    simpler = [wanted, Mode(False, wanted.graph), Mode(wanted.compile, False), Mode(False, False)]
    for mode in dict.fromkeys(simpler):
        try:
            return Engine(model, shape, config, mode)
        except Exception as error:
            if mode == simpler[-1] or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            warnings.warn(f"a step as {mode} fails ({one_line(error)}); trying less", stacklevel=2)
            for block in model.blocks:  # type: ignore[union-attr]
                block._compiled_call_impl = None
    raise AssertionError("the last mode returns or raises")


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, blocks called as they are, tau in full: compiled for training, they would be compiled again."""
    stance: Any = getattr(torch.compiler, "set_stance", None)
    context: AbstractContextManager[Any] = stance("force_eager") if stance else nullcontext()
    set_tau_share(distinct_thresholds(model), 1.0)
    with evaluating(model), context, torch.no_grad():
        yield
