"""Shards: every picture once in an epoch, each reader its own, and a stopped run goes on with the very next batch."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svit_utils.data import DamagedDataError, DataNotFoundError, ShardStream, image_folder, preprocessing, write_shards
from svit_utils.data import shards as module

PREPARE = preprocessing(img_size=8, crop_pct=1.0, normalise="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of two classes, each of one grey of its own, so that a picture is known by its value."""
    root = tmp_path_factory.mktemp("pictures")
    for k in range(40):
        path = root / ("cat", "dog")[k % 2] / f"{k:02d}.{('png', 'bmp')[k % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (10, 12), (k, k, k)).save(path)
    return root


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(folder, tmp_path_factory.mktemp("shards"), per_shard=5).parent


def stream(shards: Path, **options: object) -> ShardStream:
    return ShardStream(shards, **{"batch_size": 5, "prepare": PREPARE, "buffer": 7, **options})  # type: ignore[arg-type]


def greys(batches: object) -> list[list[int]]:
    """The pictures of each batch, by their grey."""
    return [(images[:, 0, 0, 0] * 255).round().int().tolist() for images, _ in batches]  # type: ignore[attr-defined]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def test_a_shard_holds_the_files_as_they_are(folder: Path, shards: Path, tmp_path: Path) -> None:
    import webdataset

    index = json.loads((shards / module.INDEX).read_text(encoding="utf-8"))
    assert index["classes"] == ["cat", "dog"] and list(index["shards"].values()) == [5] * 8
    first = next(iter(webdataset.WebDataset(str(shards / "00000.tar"), shardshuffle=False)))
    path = folder / first["txt"].decode()
    assert first[path.suffix[1:]] == path.read_bytes() and path.parent.name == index["classes"][int(first["cls"])]
    again = write_shards(folder, tmp_path / "again", per_shard=5).parent
    for name in index["shards"]:
        assert (again / name).read_bytes() == (shards / name).read_bytes()


def test_what_comes_out_is_what_the_folder_gives(folder: Path, shards: Path) -> None:
    data = image_folder(folder, prepare=PREPARE)
    wanted = {round(float(image[0, 0, 0]) * 255): (image, label) for image, label in data}
    seen = 0
    for images, labels in stream(shards):
        for image, label in zip(images, labels):
            expected, own = wanted[round(float(image[0, 0, 0]) * 255)]
            assert torch.equal(image, expected) and int(label) == own
            seen += 1
    assert seen == 40


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (1, 2), (2, 2), (4, 2)])
def test_readers_share_nothing_and_miss_nothing(shards: Path, processes: int, workers: int) -> None:
    streams = [stream(shards, rank=rank, processes=processes, workers=workers) for rank in range(processes)]
    for epoch in range(2):
        dealt = [name for names in streams[0].plan(epoch) for name in names]
        assert sorted(dealt) == sorted(streams[0].counts)
        seen = [flat(greys(each)) for each in streams]
        assert sorted(flat(seen)) == list(range(40)), f"epoch {epoch}"
        assert len({len(part) for part in seen}) == 1


def test_the_order_changes_by_epoch_and_seed_and_by_nothing_else(shards: Path) -> None:
    one = stream(shards)
    first, second = greys(one), greys(one)
    assert first != second and sorted(flat(first)) == sorted(flat(second))
    torch.rand(3)
    random.seed(5)
    assert greys(stream(shards)) == first
    assert greys(stream(shards, seed=1)) != first


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_stopped_run_goes_on_with_the_next_batch(shards: Path, workers: int, stop: int) -> None:
    options = {"workers": workers, "batch_size": 3, "augment": True}
    whole = stream(shards, **options)
    torch.manual_seed(0)
    expected = list(whole)
    following = next(iter(whole))

    stopped = stream(shards, **options)
    for _ in zip(range(stop), stopped):
        pass
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["batch"] == stop
    torch.manual_seed(99)
    goes_on = stream(shards, **options)
    goes_on.load_state_dict(state)
    rest = list(goes_on)
    assert len(rest) == len(expected) - stop > 0
    for (images, labels), (images_then, labels_then) in zip(rest, expected[stop:]):
        assert torch.equal(images, images_then) and torch.equal(labels, labels_then)
    assert torch.equal(next(iter(goes_on))[0], following[0]), "and the next epoch is the same one"


def test_between_epochs(shards: Path) -> None:
    one = stream(shards)
    greys(one)
    state = one.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 8)
    other = stream(shards)
    other.load_state_dict(state)
    assert greys(other) == greys(one) and other.epoch == 1


def test_uneven_shards_give_all_processes_as_many_batches(folder: Path, tmp_path: Path) -> None:
    uneven = write_shards(folder, tmp_path / "uneven", per_shard=7).parent  # 5 x 7 + 5
    lengths, seen = [], []
    for rank in range(2):
        each = stream(uneven, rank=rank, processes=2, batch_size=4)
        lengths.append(len(each))
        batches = greys(each)
        assert len(batches) == lengths[-1] and all(len(batch) == 4 for batch in batches)
        seen += flat(batches)
    assert lengths[0] == lengths[1] == 4 and len(set(seen)) == len(seen) == 32


def test_drawing_leaves_the_callers_random_numbers_alone(shards: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    batches = iter(stream(shards, augment=True))
    next(batches)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 3, "workers": 3}, r"has 8 shards, fewer than the 9 readers \(3 processes of 3\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 64}, "a reader has 40 pictures, fewer than a batch of 64"),
        ({"rank": 2, "processes": 2}, "rank must lie in 0 to 1, got 2"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ],
)
def test_bad_options(shards: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(shards, **options)


def test_a_position_of_another_stream_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="belongs to a stream with workers = 0, and this has 2"):
        stream(shards, workers=2).load_state_dict(stream(shards).state_dict())


def test_what_is_wrong_with_shards_is_said(folder: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds shards already"):
        write_shards(folder, shards)
    with pytest.raises(ValueError, match="per_shard must be at least 1"):
        write_shards(folder, tmp_path / "none", per_shard=0)
    with pytest.raises(DataNotFoundError, match=r"has no shards\.json"):
        ShardStream(tmp_path)
    broken = write_shards(folder, tmp_path / "broken", per_shard=20).parent
    content = (broken / "00001.tar").read_bytes()
    (broken / "00001.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedDataError, match=r"the shard .*00001\.tar"):
        list(stream(broken))
    (broken / "00001.tar").unlink()
    with pytest.raises(DataNotFoundError, match=r"1 of the 2 shards are not in .*, first 00001\.tar"):
        stream(broken)
    (broken / module.INDEX).write_text("[]", encoding="utf-8")
    with pytest.raises(DamagedDataError, match="is not an index of shards"):
        stream(broken)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = tmp_path / "in" / "cat" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    path.write_bytes(b"no picture")
    with pytest.raises(DamagedDataError, match=r"cannot read the picture cat/b\.png in 00000\.tar"):
        list(stream(write_shards(tmp_path / "in", tmp_path / "out").parent, batch_size=2))


def test_a_folder_of_10000_pictures_is_streamed(tmp_path: Path) -> None:
    """Pictures are read when their turn comes: memory stays far below what all of them take (10,000 x 48 KB)."""
    first = tmp_path / "all" / "cat" / "00000.png"
    first.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(first)
    for k in range(1, 10_000):
        (first.parent / f"{k:05d}.png").write_bytes(first.read_bytes())
    write_shards(tmp_path / "all", tmp_path / "shards", per_shard=500)
    program = f"""
import psutil, sys, torch
from torchvision.transforms.functional import pil_to_tensor
from torch.utils.data import DataLoader
from svit_utils.data import ShardStream, image_folder, preprocessing
rss = lambda: psutil.Process().memory_info().rss / 1e6
def read(batches):
    n = 0
    for images, _ in batches:
        n += len(images)
    return n
small = lambda picture: pil_to_tensor(picture.resize((64, 64))).float()
data = image_folder({str(tmp_path / "all")!r}, transform=small)
read([data[0]]), next(iter(DataLoader(data, 100)))
before = rss()
assert read(DataLoader(data, 100)) == 10_000
folder = rss() - before
shards = ShardStream({str(tmp_path / "shards")!r}, batch_size=100, prepare=preprocessing(img_size=64))
shards.transform = small
before = rss()
assert read(shards) == 10_000
print(folder, rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    folder, shard = map(float, done.stdout.split())
    assert folder < 60 and shard < 60, "MB; all pictures at once would be 490"


def test_without_the_package(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"^shards need the package webdataset: pip install webdataset$"):
        ShardStream(shards)


def test_greys_are_told_apart(shards: Path) -> None:
    """The tests above know pictures by their grey: two equal ones would hide a picture that is read twice."""
    assert len(set(flat(greys(stream(shards))))) == 40
