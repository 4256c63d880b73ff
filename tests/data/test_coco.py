"""COCO's pictures and masks: both go through one preprocessing, and what is wrong is said by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from svit_utils.data import DamagedDataError, DataNotFoundError, coco, patch_shares, preprocessing

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def listed(**changes: Any) -> dict[str, Any]:
    """Four pictures of 80 x 60: two squares and a crowd; a corner; nothing; grey."""
    pictures = [{"id": k, "file_name": f"{k}.png", "width": 80, "height": 60} for k in (7, 3, 5, 9)]
    objects: list[dict[str, Any]] = [
        {"id": 1, "image_id": 3, "category_id": 20, "segmentation": [[40, 20, 60, 20, 60, 40, 40, 40]]},
        {"id": 2, "image_id": 3, "category_id": 10, "segmentation": [[20, 20, 30, 20, 30, 30, 20, 30]]},
        {"id": 3, "image_id": 3, "category_id": 10, "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 20, "segmentation": [[0, 0, 6, 0, 6, 60, 0, 60]]},
        {"id": 5, "image_id": 9, "category_id": 10, "segmentation": [SQUARE]},
    ]
    objects[2]["segmentation"] = {"size": [60, 80], "counts": [40, 10, 60 * 80 - 50]}  # down the first column
    for each in objects:
        each |= {"area": 1, "bbox": [0, 0, 1, 1], "iscrowd": each.get("iscrowd", 0)}
    categories = [{"id": 20, "name": "zebra"}, {"id": 10, "name": "cat"}]
    return {"images": pictures, "annotations": objects, "categories": categories, **changes}


def write(root: Path, content: dict[str, Any]) -> Path:
    path = root / "annotations" / "instances_few.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    (root / "few").mkdir(exist_ok=True)
    for about in content["images"]:
        grey = about["id"] == 9
        picture = Image.new("L" if grey else "RGB", (80, 60))
        picture.paste(255 if grey else (255, 255, 255), (10, 10, 30, 30))
        picture.save(root / "few" / about["file_name"])
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, listed())
    return tmp_path


def whole(size: int = 60) -> Any:
    return preprocessing(img_size=size, crop_pct=1.0, normalise="none")


def test_masks_objects_and_crowds(root: Path) -> None:
    data = coco(root, prepare=whole())
    assert data.classes == ["cat", "zebra"] and [file.name for file in data.files] == [
        "3.png",
        "5.png",
        "7.png",
        "9.png",
    ]
    first = data[0]  # 60 x 60 of the middle of 80 x 60: 10 columns go on either side
    assert first.number == 3 and first.labels.tolist() == [1, 0] and first.masks.dtype == torch.bool
    expected = torch.zeros(60, 60, dtype=torch.bool)
    expected[20:40, 30:50] = True
    assert torch.equal(first.masks[0], expected) and torch.equal(first.largest(), expected)
    assert int(first.masks[1].sum()) == 100 and not first.crowd.any()  # the crowd was in the first column, cropped away
    assert torch.equal(first.everything(), first.masks[0] | first.masks[1])
    wide = coco(root, prepare=preprocessing(img_size=(60, 80), crop_pct=1.0))[0]
    assert wide.crowd.nonzero().tolist() == [[row, 0] for row in range(40, 50)]
    assert torch.equal(wide.everything(), wide.masks.any(dim=0) | wide.crowd) and int(wide.everything().sum()) == 510


def test_pictures_without_objects(root: Path) -> None:
    data = coco(root, prepare=whole())
    for place in (1, 2):  # one has none, the other's is cropped away
        found = data[place]
        assert found.masks.shape == (0, 60, 60) and found.labels.shape == (0,) and not found.everything().any()
        with pytest.raises(ValueError, match=f"picture {found.number} has no object"):
            found.largest()


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_a_mask_goes_where_its_picture_goes(root: Path, mode: str, crop_pct: float) -> None:
    """The grey picture is white exactly where its object is."""
    from dataclasses import replace

    prepare = replace(whole(48), crop_mode=mode, crop_pct=crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = coco(root, prepare=prepare)[3]
    assert found.image.shape == (3, 48, 48) and torch.equal(found.image[0], found.image[2])
    assert torch.equal(found.masks[0], found.image[0] > 0.499) and 50 < int(found.masks[0].sum()) < 600


def test_missing_pictures_are_counted(root: Path) -> None:
    (root / "few" / "5.png").unlink()
    (root / "few" / "9.png").unlink()
    with pytest.raises(DataNotFoundError, match=r"2 of the 4 pictures that .*instances_few\.json lists .*5\.png"):
        coco(root)
    with pytest.raises(DataNotFoundError, match="4 of the 4 pictures"):
        coco(root / "annotations" / "instances_few.json", root / "nowhere")


def test_files_that_are_not_coco(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="no such file of annotations"):
        coco(tmp_path / "none.json")
    with pytest.raises(DataNotFoundError, match="should hold one annotations/instances_"):
        coco(root / "few")
    for text, message in (
        ("{", "not a file of COCO annotations"),
        ("[1]", "not a file of COCO"),
        ("{}", "no list of images"),
    ):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        with pytest.raises(DamagedDataError, match=message):
            coco(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(listed(annotations=[{"id": 1}])), encoding="utf-8")
    with pytest.raises(DamagedDataError, match="an entry has no 'image_id'"):
        coco(tmp_path / "a.json")


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2]], {"counts": "%%", "size": [1]}])
def test_objects_without_a_mask_are_named(tmp_path: Path, segmentation: Any) -> None:
    content = listed()
    content["annotations"][0]["segmentation"] = segmentation
    write(tmp_path, content)
    with pytest.raises(DamagedDataError, match=r"the object 1 of picture 3 in .* has no mask that can be drawn"):
        coco(tmp_path)[0]


def test_a_picture_of_another_size(root: Path) -> None:
    Image.new("RGB", (40, 30)).save(root / "few" / "3.png")
    with pytest.raises(DamagedDataError, match=r"3\.png has 40 x 30 pixels, but instances_few\.json says 80 x 60"):
        coco(root)[0]


def test_found_by_name(root: Path) -> None:
    data = coco(root)
    assert data.find(["elsewhere/7.png", "3.png"]) == [2, 0]
    with pytest.raises(DataNotFoundError, match=r"does not list the picture cat\.png"):
        data.find(["cat.png"])


def test_shares_of_patches() -> None:
    masks = torch.zeros(2, 1, 8, 12, dtype=torch.bool)
    masks[0, 0, :2, :3] = True
    masks[1] = True
    shares = patch_shares(masks, (2, 3))
    assert shares.shape == (2, 1, 2, 3) and shares[0, 0].tolist() == [[6 / 16, 0, 0], [0, 0, 0]]
    assert bool((shares[1] == 1).all())
    with pytest.raises(ValueError, match="8 x 12 pixels does not divide into 3 x 3 patches"):
        patch_shares(masks, (3, 3))


def test_without_the_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(
        ImportError, match=r"^COCO's annotations need the package pycocotools: pip install pycocotools$"
    ):
        coco(root)
