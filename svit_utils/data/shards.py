"""Pictures in shards: tar files of some thousand pictures each, read one after the other (webdataset's format).

Millions of small files are slow on disks and over networks; shards are read in one go. Every process, and every worker
of its loader, reads shards of its own, and a run that was stopped goes on with the very next batch.
"""

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from svit_utils.data.errors import DamagedDataError, DataNotFoundError
from svit_utils.data.folders import image_folder
from svit_utils.data.pictures import ENDINGS, decode_picture
from svit_utils.data.transforms import Preprocessing, preprocessing
from svit_utils.files import write_file

INDEX = "shards.json"


def write_shards(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | None = None,
    *,
    per_shard: int = 1000,
    seed: int = 0,
) -> Path:
    """Write a folder of pictures, as `image_folder` reads it, as ``<out>/00000.tar``, ... and an index ``shards.json``.

    The pictures' files are copied as they are, in an order drawn with ``seed``, so that a shard holds all classes.

    Args:
        root, split: as for `image_folder`.
        out: folder of the shards; it must not hold any yet.
        per_shard: pictures a shard.
        seed: of the order.

    Returns:
        The index.

    Raises:
        ValueError: ``per_shard`` below 1, or shards in ``out`` already. Else as `image_folder`.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1 picture, got {per_shard}")
    source: Any = image_folder(root, split).source
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")) or (folder / INDEX).exists():
        raise ValueError(f"{folder} holds shards already: give another folder, or remove them")
    order, counts = list(range(len(source.samples))), {}
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), per_shard):
        name = f"{start // per_shard:05d}.tar"
        with _webdataset().TarWriter(str(folder / name), encoder=False, mtime=0) as shard:
            for number in order[start : start + per_shard]:
                path, label = Path(source.samples[number][0]), source.samples[number][1]
                picture = {path.suffix[1:].lower(): path.read_bytes(), "cls": str(label).encode()}
                shown = path.relative_to(source.root).as_posix()
                shard.write({"__key__": f"{number:09d}", **picture, "txt": shown.encode()})
        counts[name] = len(order[start : start + per_shard])
    return write_file(folder / INDEX, json.dumps({"classes": source.classes, "shards": counts}, indent=1) + "\n")


class ShardStream:
    """Batches (images float32 [B, 3, H, W], labels int64 [B]) from shards, an epoch at each iteration.

    In each epoch the shards are put into another order and dealt out to all workers of all processes; each worker
    mixes its pictures in a buffer. All processes get the same number of full batches; pictures beyond those are left
    out, others in each epoch. Order, crops and flips follow from ``seed``, whatever was drawn before.

    `state_dict` says which batch comes next, counted as batches are handed out and not as they are prepared. With the
    same arguments, `load_state_dict` makes the next iteration go on with that batch; the epoch's pictures before it
    are read, but not decoded.

    Args:
        folder: what `write_shards` wrote.
        batch_size: pictures a batch.
        prepare: a model's `preprocessing`; by default timm's, 224 px.
        augment: random crop and flip, see `Preprocessing.transform`.
        seed: of the order and of what is drawn.
        rank, processes: which process this is, and of how many.
        workers: processes that this one starts to read; 0 reads in this one.
        buffer: how many undecoded pictures a worker mixes; 1 for the order of the shards.

    Raises:
        DataNotFoundError: no index, or shards that it names are missing.
        DamagedDataError: an index or, on reading, a shard or picture that cannot be read; names it.
        ValueError: an impossible option, or fewer shards, or batches, than there are readers.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        batch_size: int = 64,
        prepare: Preprocessing | None = None,
        augment: bool = False,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        buffer: int = 1000,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.classes, self.counts = _read_index(self.folder)
        least = {
            "batch_size": (batch_size, 1),
            "processes": (processes, 1),
            "workers": (workers, 0),
            "buffer": (buffer, 1),
        }
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if not 0 <= rank < processes:
            raise ValueError(f"rank must lie in 0 to {processes - 1}, got {rank}")
        self.batch_size, self.seed, self.rank, self.processes = batch_size, seed, rank, processes
        self.workers, self.buffer = workers, buffer
        self.prepare = prepare or preprocessing()
        self.transform: Callable[[Any], Tensor] = self.prepare.transform(augment)
        self.readers = processes * max(workers, 1)
        if len(self.counts) < self.readers:
            raise ValueError(
                f"{self.folder} has {len(self.counts)} shards, fewer than the {self.readers} readers ({processes} "
                f"processes of {max(workers, 1)}): write smaller shards, or use fewer workers"
            )
        self.epoch = self.batch = 0
        self.batches(0)  # raises where there is no full batch for each

    def plan(self, epoch: int) -> list[list[str]]:
        """Which shards each reader reads in an epoch, in order; reader r is worker r % W of process r // W."""
        names = sorted(self.counts)
        random.Random(f"{self.seed} {epoch}").shuffle(names)
        return [names[reader :: self.readers] for reader in range(self.readers)]

    def batches(self, epoch: int) -> int:
        """Full batches that each process gets in an epoch."""
        pictures = [sum(self.counts[name] for name in names) for names in self.plan(epoch)]
        each = min(pictures) // self.batch_size
        if not each:
            raise ValueError(f"a reader has {min(pictures)} pictures, fewer than a batch of {self.batch_size}")
        return each * max(self.workers, 1)

    def __len__(self) -> int:
        """Batches of the epoch that comes next, or is under way."""
        return self.batches(self.epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch."""
        if self.batch == self.batches(self.epoch):
            self.epoch, self.batch = self.epoch + 1, 0
        part = _Readers(self, self.epoch, self.batch)
        # Without a generator of its own, making the loader's iterator would advance the global one.
        own = torch.Generator().manual_seed(self.seed)
        for images, labels in DataLoader(part, batch_size=None, num_workers=self.workers, generator=own):
            self.batch += 1
            yield images, labels

    def state_dict(self) -> dict[str, int]:
        """``epoch``, ``batch`` (of this process, the next one) and what they depend on; numbers only."""
        names = ("epoch", "batch", "batch_size", "seed", "processes", "workers", "buffer")
        return {name: getattr(self, name) for name in names} | {"shards": len(self.counts)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken; ValueError if it belongs to other arguments, for which it means nothing."""
        own = self.state_dict()
        other = [name for name in own if name not in ("epoch", "batch") and state.get(name) != own[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"the position belongs to a stream with {name} = {state.get(name)}, and this has {own[name]}"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]


class _Readers(IterableDataset):
    """What the workers of one process read of an epoch, from a batch on.

    The loader asks its workers in turn, beginning with the first. So that the batches keep their order, worker w takes
    the part of the one whose turn it is w batches after the first.
    """

    def __init__(self, stream: ShardStream, epoch: int, start: int) -> None:
        self.stream, self.epoch, self.start = stream, epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        stream, info = self.stream, get_worker_info()
        workers = max(stream.workers, 1)
        first = self.start + (0 if info is None else info.id)  # this worker's first batch
        worker, done = first % workers, first // workers
        reader = stream.rank * workers + worker
        raw = self._pictures(stream.plan(self.epoch)[reader], reader)
        for _ in range(done * stream.batch_size):
            next(raw)
        for _ in range(done, stream.batches(self.epoch) // workers):
            batch = [self._decoded(next(raw)) for _ in range(stream.batch_size)]
            yield torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])

    def _pictures(self, names: list[str], reader: int) -> Iterator[dict[str, Any]]:
        """The undecoded pictures of these shards, mixed."""
        from webdataset.filters import shuffle

        rng = random.Random(f"{self.stream.seed} {self.epoch} {reader}")
        each = (sample for name in names for sample in _samples(self.stream.folder / name, self.stream.counts[name]))
        size = self.stream.buffer
        return iter(each if size == 1 else shuffle(size, initial=size, rng=rng)(each))

    def _decoded(self, sample: dict[str, Any]) -> tuple[Tensor, int]:
        name = f"{sample['txt'].decode()} in {sample['__url__']}"
        picture = decode_picture(io.BytesIO(sample[_ending(sample)]), name)
        with torch.random.fork_rng(devices=[]):
            own = random.Random(f"{self.stream.seed} {self.epoch} {sample['__key__']}")
            torch.default_generator.manual_seed(own.getrandbits(63))
            return self.stream.transform(picture), int(sample["cls"])


def _ending(sample: dict[str, Any]) -> str:
    """Under which name an entry holds its picture: the ending of the file; "" if there is none."""
    return next((name for name in sample if f".{name}" in ENDINGS), "")


def _samples(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """The entries of one shard; DamagedDataError unless there are ``count``, whole."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    seen = 0
    try:
        with path.open("rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": path.name, "stream": file}])):
                if not ({"cls", "txt"} <= sample.keys() and _ending(sample)):
                    break
                seen += 1
                yield sample
    except Exception as error:
        raise DamagedDataError(f"the shard {path} cannot be read: {error or type(error).__name__}") from error
    if seen != count:
        raise DamagedDataError(f"the shard {path} holds {seen} pictures, and the index says {count}: write it again")


def _read_index(folder: Path) -> tuple[list[str], dict[str, int]]:
    """(classes, pictures by shard) of the index in ``folder``."""
    _webdataset()
    path = folder / INDEX
    if not path.is_file():
        raise DataNotFoundError(f"{folder} has no {INDEX}: write shards with svit_utils.data.write_shards(root, out)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes, counts = list(content["classes"]), {str(name): int(n) for name, n in content["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedDataError(f"{path} is not an index of shards: {error!r}") from error
    if missing := [name for name in counts if not (folder / name).is_file()]:
        raise DataNotFoundError(f"{len(missing)} of the {len(counts)} shards are not in {folder}, first {missing[0]}")
    return classes, counts


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("shards need the package webdataset: pip install webdataset") from error
    return webdataset
