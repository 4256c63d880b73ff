"""Which images each batch holds. The order follows from the seed and the step, so a run can go on from any step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from svit_utils.training.config import TrainConfig
from svit_utils.training.stops import outlast_signals


@dataclass(frozen=True)
class DataOrder:
    """The batches of one process, as lists of indices: a new permutation of the images in each epoch.

    The processes take the batches of an epoch in turn; images that fill no batch are left out. A step takes
    ``config.grad_accumulation`` batches.

    Attributes:
        images: how many the training set has.
        config: the recipe.
        rank, processes: which process this is, and of how many.
        start: the first batch; those before it were done before the run was interrupted.

    Raises:
        ValueError: too few images for one batch in each process.
    """

    images: int
    config: TrainConfig
    rank: int = 0
    processes: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.images < self.config.batch_size * self.processes:
            raise ValueError(
                f"the training set has {self.images} images, fewer than one batch of {self.config.batch_size} in each "
                f"of {self.processes} process(es)"
            )

    def __iter__(self) -> Iterator[list[int]]:
        size = self.config.batch_size
        per_epoch = self.images // (size * self.processes)
        epoch, permutation = -1, torch.empty(0)
        for position in range(self.start, self.config.steps * self.config.grad_accumulation):
            at, within = divmod(position, per_epoch)
            if at != epoch:
                epoch = at
                generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
                permutation = torch.randperm(self.images, generator=generator)
            first = (within * self.processes + self.rank) * size
            yield permutation[first : first + size].tolist()

    def loader(self, dataset: Dataset) -> DataLoader:
        """A loader of (images [B, 3, H, W], labels [B]) in this order."""
        batches: Any = self
        # Without a generator of its own, making the loader's iterator would advance the global one.
        generator = torch.Generator().manual_seed(self.config.seed)
        workers, pin = self.config.num_workers, torch.cuda.is_available()
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            generator=generator,
            pin_memory=pin,
            worker_init_fn=outlast_signals,
        )
