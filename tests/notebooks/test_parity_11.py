"""Chapter 11: masks on patches, the middle of a mask, the probe and the dealing of shards are the library's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from research.photographs.maps import distance
from research.photographs.measured import probe
from svit_utils.data import ShardStream, patch_shares, preprocessing, write_shards
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "11_photographs"


def masks(seed: int) -> torch.Tensor:
    return torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(seed)) > 0.6


@pytest.mark.parametrize("side", [1, 7, 14])
def test_shares_of_patches(side: int) -> None:
    on_patches = extract_function(CHAPTER, "on_patches")
    for mask in masks(side):
        torch.testing.assert_close(on_patches(mask, side), patch_shares(mask, (side, side)))


def test_the_middle_of_a_mask() -> None:
    off_centre = extract_function(CHAPTER, "off_centre", {"torch": torch})
    torch.testing.assert_close(off_centre(masks(0)), distance(masks(0)))


def test_the_probe() -> None:
    fit_probe = extract_function(CHAPTER, "fit_probe", {"torch": torch, "F": F})
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    train, test = (torch.randn(80, 6, generator=generator) + 2 * F.one_hot(labels, 6) for _ in range(2))
    mean, spread = train.mean(0), train.std(0)
    weights, offsets = fit_probe((train - mean) / spread, labels, 4)
    ours = F.linear((test - mean) / spread, weights, offsets).argmax(dim=1)
    assert torch.equal(ours, probe(train, labels, test, 4)) and (ours == labels).float().mean() > 0.6


@pytest.mark.parametrize("processes, workers", [(1, 1), (2, 2)])
def test_shards_are_dealt_as_the_stream_deals_them(processes: int, workers: int, tmp_path: Path) -> None:
    deal = extract_function(CHAPTER, "deal", {"random": random})
    for k in range(18):
        path = tmp_path / "in" / "cat" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    folder = write_shards(tmp_path / "in", tmp_path / "out", per_shard=2).parent
    options = {"batch_size": 2, "prepare": preprocessing(img_size=8), "processes": processes, "workers": workers}
    stream = ShardStream(folder, **options)  # type: ignore[arg-type]
    for epoch in range(3):
        assert deal(stream.counts, epoch, processes * workers) == stream.plan(epoch)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_position_is_the_order_of_torchs_loader(workers: int) -> None:
    """Torch asks its workers in turn: batch b is the (b // W)-th of worker b % W."""
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Named(IterableDataset):
        def __iter__(self):
            info = get_worker_info()
            return iter([(info.id, k) for k in range(4)])

    position = extract_function(CHAPTER, "Position")
    seen = [(int(w), int(k)) for w, k in DataLoader(Named(), batch_size=None, num_workers=workers)]
    assert seen == [pair for pair, _ in zip(position(workers).next_of(), range(4 * workers))]
