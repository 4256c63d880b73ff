"""What training needs on a machine without a network: ``python -m benchmarks.gpu pack`` puts it into files that fit.

Two folders, for two deliveries of at most ``--mib`` each, the repository's files included:

- ``build/gpu/pack``: DeiT-Tiny's weights, 2,000 validation pictures of CIFAR-10, test and training pictures. Enough.
- ``build/gpu/more``: further training pictures, used where they are there.

Pictures are packed without loss (WebP mosaics of 1,000, about 1,700 bytes a picture) and checked when they are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.plan import ABOUT, about_pack
from svit_utils.data import cifar10
from svit_utils.files import replacing, write_file
from svit_utils.paths import data_dir, repo_root, weights_dir
from svit_utils.provenance import provenance
from svit_utils.weights import read_state, save_weights

WEIGHTS = "deit_tiny_patch16_224"
PICTURES = "cifar10.npz"
MOSAIC, WIDE = 1000, 40  # pictures of a mosaic, and of its rows
VALIDATION = 2000
TEST_SHARE = 0.3  # of the test and training pictures of the first folder
SPLITS = ("train", "val", "test")


class Split(NamedTuple):
    """Pictures uint8 [n, 3, 32, 32] and labels int64 [n]."""

    images: torch.Tensor
    labels: torch.Tensor


def encode(pictures: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32, 3] as the bytes of one lossless WebP picture."""
    n, side = len(pictures), pictures.shape[1]
    rows = -(-n // WIDE)
    padded = np.concatenate([pictures, np.zeros((rows * WIDE - n, *pictures.shape[1:]), np.uint8)])
    mosaic = padded.reshape(rows, WIDE, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, WIDE * side, 3)
    file = io.BytesIO()
    Image.fromarray(mosaic).save(file, "WEBP", lossless=True, quality=75, method=4)
    return np.frombuffer(file.getvalue(), np.uint8)


def decode(packed: np.ndarray, n: int, side: int = 32) -> np.ndarray:
    """The pictures that `encode` packed."""
    mosaic = np.asarray(Image.open(io.BytesIO(packed.tobytes())).convert("RGB"))
    rows = mosaic.shape[0] // side
    pictures = mosaic.reshape(rows, side, WIDE, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * WIDE, side, side, 3)
    return pictures[:n]


@dataclass(frozen=True)
class Mosaic:
    """Up to a thousand pictures uint8 [n, 32, 32, 3] of a split, their labels uint8 [n], and a name to sort by."""

    name: str
    pictures: np.ndarray
    labels: np.ndarray

    @cached_property
    def packed(self) -> np.ndarray:
        """The pictures as bytes."""
        return encode(self.pictures)

    @property
    def nbytes(self) -> int:
        """What it takes in a file, about."""
        return len(self.packed) + len(self.labels) + 1024


def mosaics(split: str) -> list[Mosaic]:
    """All of CIFAR-10's split, in an order drawn once; raises as `svit_utils.data.cifar10`."""
    source = cifar10(split, transform=np.asarray)
    order = np.random.RandomState(0).permutation(len(source))  # its stream never changes between versions of NumPy
    pictures = np.stack([source[int(i)][0] for i in order])
    labels = np.asarray(source.targets, np.uint8)[order]
    starts = range(0, len(order), MOSAIC)
    return [Mosaic(f"{split}_{i // MOSAIC:02d}", pictures[i : i + MOSAIC], labels[i : i + MOSAIC]) for i in starts]


def write_pictures(path: Path, chosen: list[Mosaic]) -> None:
    """A pack of these mosaics with their labels and a digest of the pictures."""
    arrays: dict[str, np.ndarray] = {}
    for mosaic in chosen:
        arrays[mosaic.name] = mosaic.packed
        arrays[f"{mosaic.name}_labels"] = mosaic.labels
        arrays[f"{mosaic.name}_digest"] = np.array(hashlib.sha256(mosaic.pictures.tobytes()).hexdigest())
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_pictures(folders: tuple[Path, ...]) -> dict[str, Split]:
    """The splits in these folders' packs, each mosaic once, in their order; {} where there is no pack.

    Raises:
        ValueError: a mosaic is not what was packed.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path in (folder / PICTURES for folder in folders):
        if not path.is_file():
            continue
        with np.load(path, allow_pickle=False) as data:
            for name in (name for name in data.files if name.count("_") == 1):
                labels = data[f"{name}_labels"]
                pictures = decode(data[name], len(labels))
                if hashlib.sha256(pictures.tobytes()).hexdigest() != str(data[f"{name}_digest"]):
                    raise ValueError(f"{path}: {name} is damaged, or this Pillow reads it otherwise; pack it again")
                found[name] = (pictures, labels)
    splits = {}
    for split in SPLITS:
        parts = [found[name] for name in sorted(found) if name.startswith(f"{split}_")]
        if parts:
            splits[split] = as_split(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return splits


def as_split(pictures: np.ndarray, labels: np.ndarray) -> Split:
    """uint8 [n, 32, 32, 3] and labels as tensors."""
    images = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    return Split(images, torch.from_numpy(labels.astype(np.int64)))


def whole_set() -> dict[str, Split]:
    """All of CIFAR-10 where it lies in the data directory; nothing is downloaded, {} where it is not there."""
    if not (data_dir() / "cifar-10-batches-py").is_dir():
        return {}
    found = {split: mosaics(split) for split in SPLITS}
    return {
        split: as_split(np.concatenate([m.pictures for m in all_]), np.concatenate([m.labels for m in all_]))
        for split, all_ in found.items()
    }


def tree_bytes(root: Path) -> int:
    """Bytes of the repository's files, those that git ignores left out."""
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, encoding="utf-8", check=True).stdout.split("\0")
    return sum((root / name).stat().st_size for name in names if name and (root / name).is_file())


def run(folders: tuple[Path, ...], mib: float, margin_mib: float, weights_dtype: str) -> Mapping[str, Any]:
    """Write both folders and say what is in them.

    Raises:
        FileNotFoundError: DeiT-Tiny's weights are not in ``$SVIT_WEIGHTS_DIR``, or the data directory has no CIFAR-10.
        ValueError: not even the weights and the validation pictures fit.
    """
    root = repo_root() or Path.cwd()
    weights = (weights_dir() or data_dir()) / f"{WEIGHTS}.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"no {weights}: set SVIT_WEIGHTS_DIR to the folder that holds it")
    first, more = folders
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dtype = getattr(torch, weights_dtype)
    state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in read_state(weights).items()}
    save_weights(state, first / weights.name)
    wheels = sum(path.stat().st_size for path in (first.parent / "wheels").glob("*.whl"))
    room = 2**20 * (mib - margin_mib) - tree_bytes(root)
    validation, test, train = (mosaics(split) for split in ("val", "test", "train"))
    chosen = validation[: VALIDATION // MOSAIC]
    left = room - (first / weights.name).stat().st_size - sum(mosaic.nbytes for mosaic in chosen)
    counts = {"train": 0, "test": 0}
    while train:
        of_test = bool(test) and counts["test"] < TEST_SHARE * max(1, sum(counts.values()))
        queue = test if of_test else train
        left -= queue[0].nbytes
        if left < 0:
            break
        counts["test" if of_test else "train"] += len(queue[0].labels)
        chosen.append(queue.pop(0))
    if not counts["train"] or not counts["test"]:
        raise ValueError(f"{mib} MiB hold the repository and the weights, but no training and test pictures")
    write_pictures(first / PICTURES, chosen)
    further, left = [], room - wheels
    for mosaic in train:
        left -= mosaic.nbytes
        if left < 0:
            break
        further.append(mosaic)
    write_pictures(more / PICTURES, further)
    source = provenance()
    about = {"commit": source["commit"], "dirty": source["dirty"], "weights": weights_dtype}
    about |= {**counts, "val": VALIDATION, "more": sum(len(mosaic.labels) for mosaic in further)}
    about |= {"tree_bytes": tree_bytes(root)}
    for folder in folders:
        write_file(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    return about


def printed(folders: tuple[Path, ...]) -> str:
    """What the folders hold, in a few lines."""
    about = about_pack(folders[0])
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) / 2**20 for folder in folders]
    tree = about["tree_bytes"] / 2**20
    return (
        f"{folders[0]}: {sizes[0]:.1f} MiB: {about['train']:,} training, {about['val']:,} validation and "
        f"{about['test']:,} test pictures of CIFAR-10, DeiT-Tiny's weights in {about['weights']}\n"
        f"{folders[1]}: {sizes[1]:.1f} MiB: {about['more']:,} further training pictures\n"
        f"beside {tree:.1f} MiB of the repository: {sizes[0] + tree:.1f} and {sizes[1] + tree:.1f} MiB a delivery\n"
        f"commit {about['commit']}{' with uncommitted changes' if about['dirty'] else ''}"
    )
