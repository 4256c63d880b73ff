"""Folders of pictures: the usual layouts are recognised, and what is wrong is said by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from svit_utils.data import DamagedDataError, DataNotFoundError, image_folder


def plant(root: Path, *parts: str, mode: str = "RGB") -> Path:
    path = root.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (90, 60), 128 if mode == "L" else None).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            for k in range(2):
                plant(tmp_path, split, name, f"{k}.png")
    return tmp_path


def test_splits_are_recognised(tree: Path) -> None:
    train, val = image_folder(tree, "train", img_size=32, augment=True), image_folder(tree, "val", img_size=32)
    assert train.classes == val.classes == ["cat", "dog"] and len(train) == len(val) == 4
    image, label = val[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 1
    assert all("validation" in path for path, _ in val.source.samples) and val.targets == [0, 0, 1, 1]
    assert torch.allclose(val.denormalise(image), torch.zeros(3, 32, 32), atol=1e-6)  # black came in
    assert image_folder(tree, "train", transform=lambda image: image.size)[0][0] == (90, 60)


def test_class_folders_directly_and_any_colour_mode(tmp_path: Path) -> None:
    plant(tmp_path, "grey", "a.png", mode="L")
    plant(tmp_path, "clear", "b.png", mode="RGBA")
    data = image_folder(tmp_path, img_size=40, normalise="none")
    assert data.classes == ["clear", "grey"]
    assert torch.allclose(data[1][0], torch.full((3, 40, 40), 128 / 255))


def test_augmentation_follows_the_seed(tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    Image.effect_noise((80, 80), 90).save(tmp_path / "noise" / "a.png")
    data = image_folder(tmp_path, img_size=32, augment=True)
    torch.manual_seed(1)
    first, second = data[0][0], data[0][0]
    torch.manual_seed(1)
    assert torch.equal(data[0][0], first) and not torch.equal(first, second)


def test_an_unreadable_picture_is_named(tree: Path) -> None:
    broken = tree / "train" / "cat" / "0.png"
    for content in (b"no picture at all", broken.read_bytes()[:60]):
        broken.write_bytes(content)
        with pytest.raises(DamagedDataError, match="cannot read the picture") as error:
            image_folder(tree, "train")[0]
        assert str(broken) in str(error.value)


def test_labels_must_agree_between_splits(tree: Path) -> None:
    plant(tree, "train", "bird", "0.png")
    with pytest.raises(ValueError, match=r"classes of .* differ.*'bird'"):
        image_folder(tree, "val")
    assert image_folder(tree, "train").classes == ["bird", "cat", "dog"]


def test_what_is_missing_is_said(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choose split from \['train', 'val'\]"):
        image_folder(tree)
    with pytest.raises(DataNotFoundError, match=r"no folder test/; found: train, validation"):
        image_folder(tree, "test")
    with pytest.raises(DataNotFoundError, match=r"no such folder: .*nowhere"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataNotFoundError, match="one folder for each class"):
        image_folder(tree / "train" / "cat")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataNotFoundError, match="no pictures to load"):
        image_folder(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split must be one of .* got 'dev'"),
        ({"crop_pct": 0.0}, r"crop_pct must lie in \(0, 1\], got 0.0"),
        ({"img_size": 0}, "img_size must be at least 1 pixel"),
        ({"transform": str, "augment": True}, "either transform or augment"),
    ],
)
def test_bad_options(tree: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_folder(tree, **options)  # type: ignore[arg-type]
