"""One function decides how pictures are prepared, and every command uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from svit_utils.data import image_folder, preprocessing
from svit_utils.models import create_model, pretrained_config

NAMES = ["deit_tiny_patch16_224", "vit_base_patch16_224", "vit_tiny_patch16_384", "test_vit", "convnext_tiny"]
NAMES += [
    "vit_base_patch16_clip_224",
    "beit_base_patch16_224",
    "vit_small_patch14_dinov2",
    "swin_tiny_patch4_window7_224",
]


@pytest.fixture
def photo() -> Image.Image:
    torch.manual_seed(0)
    return Image.effect_noise((500, 333), 90).convert("RGB")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_as_timm_prepares(name: str, mode: str, photo: Image.Image) -> None:
    about = pretrained_config(name) | {"crop_mode": mode}
    expected = create_transform(**resolve_data_config(pretrained_cfg=about))(photo)
    prepare = preprocessing(about)
    assert torch.equal(prepare.transform()(photo), expected)
    shown = prepare.denormalise(expected)
    assert shown.shape == expected.shape and shown.min() >= 0 and shown.max() <= 1


def test_later_sources_replace_earlier_ones() -> None:
    model = timm.create_model("test_vit", img_size=96)
    assert preprocessing(model).size == (96, 96) and preprocessing(model).crop_pct == model.pretrained_cfg["crop_pct"]
    card = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.7, "interpolation": "bilinear"}
    found = preprocessing(model, card)
    assert (found.mean, found.crop_pct, found.interpolation) == ((0.1, 0.2, 0.3), 0.7, "bilinear")
    found = preprocessing(model, card, img_size=64, normalise="half", crop_pct=1.0, interpolation="nearest")
    assert (found.size, found.mean, found.crop_pct, found.interpolation) == ((64, 64), (0.5,) * 3, 1.0, "nearest")
    assert preprocessing(create_model("small_vit")).crop_pct == 1.0
    assert preprocessing(create_model("small_vit"), {"data": "planted"}).std == (0.25,) * 3


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"crop_pct": 0.0}, r"crop_pct must lie in \(0, 1\]"),
        ({"interpolation": "cubic"}, "interpolation must be one of .* got 'cubic'"),
        ({"img_size": 0}, "img_size must be at least 1"),
        ({"card": {"crop_mode": "corner"}}, "crop_mode must be one of"),
        ({"card": {"input_size": (1, 28, 28)}}, "images of 1 channels"),
        ({"normalise": "zca"}, "normalise must be one of"),
    ],
)
def test_impossible_values(sources: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessing(**sources)  # type: ignore[arg-type]


def test_a_folder_is_prepared_alike(photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    photo.save(tmp_path / "noise" / "a.png")
    prepare = preprocessing(pretrained_config("test_vit"))
    data = image_folder(tmp_path, prepare=prepare)
    assert torch.equal(data[0][0], prepare.transform()(photo))
    assert torch.equal(data.denormalise(data[0][0]), prepare.denormalise(data[0][0]))
    assert image_folder(tmp_path, prepare=prepare, augment=True)[0][0].shape == data[0][0].shape
