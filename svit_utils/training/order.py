"""Which images each batch holds. The order follows from the seed and the step, so a run can go on from any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from svit_utils.training.config import TrainConfig


class DataOrder:
    """The batches of one process: a new permutation of the images in each epoch, dealt out to the processes in turn.

    Attributes:
        images: how many the training set has.
        processes: how many share each step.

    Raises:
        ValueError: too few images for one batch in each process.
    """

    def __init__(self, images: int, config: TrainConfig, rank: int = 0, processes: int = 1) -> None:
        self.images, self.config = images, config
        self.rank, self.processes = rank, processes
        self.per_epoch = images // (config.batch_size * processes)
        if self.per_epoch == 0:
            raise ValueError(
                f"the training set has {images} images, fewer than one batch of {config.batch_size} in each of "
                f"{processes} process(es)"
            )

    def batches(self, start: int = 0) -> Iterator[list[int]]:
        """Indices of each batch, from batch ``start`` to the end of the run; images that fill no batch are left out.

        With ``grad_accumulation`` a step takes several of these batches.
        """
        size = self.config.batch_size
        epoch, permutation = -1, torch.empty(0)
        for position in range(start, self.config.steps * self.config.grad_accumulation):
            at, within = divmod(position, self.per_epoch)
            if at != epoch:
                epoch = at
                generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
                permutation = torch.randperm(self.images, generator=generator)
            first = (within * self.processes + self.rank) * size
            yield permutation[first : first + size].tolist()

    def loader(self, dataset: Dataset, start: int = 0) -> DataLoader:
        """A loader of (images [B, 3, H, W], labels [B]) from batch ``start`` on."""
        sampler: Any = _BatchesFrom(self, start)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.config.num_workers,
            # Without a generator of its own, making the iterator would advance the global one.
            generator=torch.Generator().manual_seed(self.config.seed),
            pin_memory=torch.cuda.is_available(),
        )


class _BatchesFrom:
    """`DataOrder.batches` as the iterable that DataLoader asks for."""

    def __init__(self, order: DataOrder, start: int) -> None:
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.batches(self.start)
