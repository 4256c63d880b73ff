"""Pictures on the device are those that Pillow and torchvision make one by one; packs give back what was put in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import pack
from benchmarks.gpu.pictures import Pictures, crop_and_flip, indices
from svit_utils.data import normalisation
from svit_utils.data.transforms import small_picture_transform

MEAN, STD = normalisation("imagenet")


def drawn(n: int = 12) -> np.ndarray:
    """Pictures uint8 [n, 32, 32, 3], smooth in parts and noisy in others, with black and white."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (n, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    coarse[:, :8] = random.integers(0, 256, (n, 8, 32, 3))
    return coarse.astype(np.uint8)


def pictures(size: int, augment: bool = False) -> Pictures:
    return Pictures(*pack.as_split(drawn(), np.arange(12)), size, MEAN, STD, augment)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_resized_as_pillow_does(size):
    wanted = torch.stack([small_picture_transform(32, size, False, "imagenet")(Image.fromarray(x)) for x in drawn()])
    got, labels = pictures(size).batch(torch.arange(12))
    levels = (got - wanted).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    assert float(levels.max()) < 1.01  # Pillow's coefficients are rounded: a level at most, and rarely
    assert float((levels > 0.5).float().mean()) < 0.01
    assert labels.tolist() == list(range(12))


def test_crops_and_flips_are_cut_from_the_padded_picture():
    x = torch.from_numpy(drawn(200 // 10).transpose(0, 3, 1, 2).copy()).repeat(10, 1, 1, 1)
    got = crop_and_flip(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for picture, whole in zip(got, padded):
        windows = {
            (dy, dx, mirrored): whole[:, dy : dy + 32, dx : dx + 32]
            for dy in range(9)
            for dx in range(9)
            for mirrored in (False, True)
        }
        found = [key for key, w in windows.items() if torch.equal(picture, w.flip(-1) if key[2] else w)]
        assert len(found) == 1
        seen.add(found[0])
    assert {dy for dy, _, _ in seen} == set(range(9)) == {dx for _, dx, _ in seen}
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_only_training_pictures_with_a_generator_are_augmented():
    plain, g = pictures(32).batch(torch.arange(12))[0], torch.Generator().manual_seed(0)
    assert torch.equal(pictures(32, augment=True).batch(torch.arange(12))[0], plain)
    assert torch.equal(pictures(32).batch(torch.arange(12), g)[0], plain)
    assert not torch.equal(
        pictures(32, augment=True).batch(torch.arange(12), torch.Generator().manual_seed(0))[0], plain
    )


def test_every_picture_once_an_epoch():
    order = indices(10, 4, 5, seed=3)
    assert order.shape == (5, 4)
    assert sorted(order.flatten()[:10].tolist()) == sorted(order.flatten()[10:].tolist()) == list(range(10))
    assert not torch.equal(order, indices(10, 4, 5, seed=4))


def test_a_pack_gives_back_what_was_put_in(tmp_path):
    given = {name: drawn(n) for name, n in (("train_00", 7), ("val_00", 3), ("train_01", 5))}
    first, second = tmp_path / "first" / pack.PICTURES, tmp_path / "second" / pack.PICTURES
    mosaics = {name: pack.Mosaic(name, x, np.arange(len(x), dtype=np.uint8)) for name, x in given.items()}
    pack.write_pictures(first, [mosaics["train_00"], mosaics["val_00"]])
    pack.write_pictures(second, [mosaics["train_01"]])
    found = pack.read_pictures((first.parent, second.parent, tmp_path / "none"))
    assert {split: len(of.labels) for split, of in found.items()} == {"train": 12, "val": 3}
    both = np.concatenate([given["train_00"], given["train_01"]])
    assert torch.equal(found["train"].images, torch.from_numpy(both.transpose(0, 3, 1, 2).copy()))
    assert found["train"].labels.tolist() == [*range(7), *range(5)]
    assert pack.read_pictures((tmp_path,)) == {}


def test_a_damaged_pack_is_refused(tmp_path):
    path = tmp_path / pack.PICTURES
    pack.write_pictures(path, [pack.Mosaic("val_00", drawn(3), np.zeros(3, np.uint8))])
    with np.load(path) as data:
        arrays = dict(data)
    np.savez(path, **{**arrays, "val_00": pack.encode(drawn(3)[::-1])})
    with pytest.raises(ValueError, match="val_00 is damaged"):
        pack.read_pictures((tmp_path,))
