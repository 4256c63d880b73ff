"""Accuracy, image by image, so that two models can be compared on the same pictures."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from svit_utils.attention import TokenSparsityTracker, sparse_modules
from svit_utils.exclusive import evaluating, exclusively
from svit_utils.training.sharding import is_sharded
from svit_utils.training.stops import outlast_signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a data set.

    Attributes:
        accuracy: share of right answers, in [0, 1].
        loss: mean cross-entropy, in nats.
        correct: bool [n], in the data set's order.
        predictions: int64 [n].
    """

    accuracy: float
    loss: float
    correct: np.ndarray
    predictions: np.ndarray

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.correct)


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    limit: int | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Evaluate ``model`` in eval mode on its own device; each module's mode is put back afterwards.

    Args:
        model: images [B, 3, H, W] to logits [B, classes].
        dataset: of (image, label).
        batch_size: images at a time.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        limit: only the first so many images.
        num_workers: processes that load images.
        progress: show a progress bar.

    Raises:
        ValueError: an empty data set or an unknown precision.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    n = len(dataset) if limit is None else min(limit, len(dataset))  # type: ignore[arg-type]
    if n == 0:
        raise ValueError("the data set to evaluate on is empty")
    part = dataset if limit is None else Subset(dataset, range(n))
    loss, predicted, truth = _answers(model, part, batch_size, precision, num_workers, progress)
    correct = (predicted == truth).numpy()
    return Evaluation(float(correct.mean()), loss / n, correct, predicted.numpy())


def evaluate_together(
    accelerator: Accelerator, model: nn.Module, dataset: Dataset, batch_size: int, precision: str, num_workers: int
) -> Evaluation:
    """`evaluate` by all processes of a run, each image in one of them; the same answer in all."""
    processes, n = accelerator.num_processes, len(dataset)  # type: ignore[arg-type]
    if processes == 1 or n == 0:
        return evaluate(model, dataset, batch_size=batch_size, precision=precision, num_workers=num_workers)
    own = range(accelerator.process_index, n, processes)
    loss, predicted, truth = 0.0, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    if len(own):
        loss, predicted, truth = _answers(model, Subset(dataset, own), batch_size, precision, num_workers, False)
    if is_sharded(model) and math.ceil(len(own) / batch_size) < math.ceil(math.ceil(n / processes) / batch_size):
        _answers(model, Subset(dataset, [0]), 1, precision, 0, False)  # a sharded model runs in all processes at once
    found = gather_object([(loss, predicted, truth)])
    merged = torch.empty(2, n, dtype=torch.long)
    for rank, (_, *answers) in enumerate(found):
        for row, values in zip(merged, answers, strict=True):
            row[rank::processes] = values
    correct = (merged[0] == merged[1]).numpy()
    return Evaluation(float(correct.mean()), sum(loss for loss, *_ in found) / n, correct, merged[0].numpy())


def _answers(
    model: nn.Module, dataset: Dataset, batch_size: int, precision: str, num_workers: int, progress: bool
) -> tuple[float, Tensor, Tensor]:
    """(summed cross-entropy, predictions [n], labels [n]) in eval mode; every module's own mode comes back."""
    device = next(model.parameters()).device
    # A generator of its own: making the iterator must not advance the global one, which training depends on.
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=outlast_signals,
    )
    losses, predictions, labels = [], [], []
    with evaluating(model), torch.no_grad(), autocast(device.type, precision):
        for images, target in tqdm(loader, disable=None if progress else True, desc="evaluate", leave=False):
            logits = model(images.to(device, non_blocking=True)).float().cpu()
            losses.append(F.cross_entropy(logits, target, reduction="sum").item())
            predictions.append(logits.argmax(dim=1))
            labels.append(target)
    return sum(losses), torch.cat(predictions), torch.cat(labels)


def autocast(device_type: str, precision: str) -> torch.autocast:
    """The autocast context of a precision: ``"fp32"`` (off) or ``"bf16"``.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16")


@exclusively
def warn_of_empty_rows(model: nn.Module, dataset: Dataset, precision: str = "fp32") -> None:
    """Log the tracker's warning where most attention rows lose every key: the fallback then decides what is trained.

    Looks at the first eight images; says nothing about a dense model.
    """
    if not sparse_modules(model):
        return
    images = torch.stack([dataset[i][0] for i in range(min(8, len(dataset)))])  # type: ignore[arg-type]
    device = next(model.parameters()).device
    cast = autocast(device.type, precision)
    with evaluating(model), TokenSparsityTracker(model) as tracker, torch.no_grad(), cast:
        model(images.to(device))
    if warning := tracker.summary().warning:
        log.warning(warning)
