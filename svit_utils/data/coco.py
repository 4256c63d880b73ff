"""Photographs with object masks in COCO's format (Lin et al. 2014, arXiv:1405.0312), as a model sees them.

torchvision reads the list and pycocotools draws the masks. Pictures and masks go through the same resizing and
cropping: a model's own `preprocessing`.
"""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from svit_utils.data.errors import DamagedDataError, DataNotFoundError
from svit_utils.data.pictures import read_picture
from svit_utils.data.transforms import Preprocessing, preprocessing


@dataclass(frozen=True)
class CocoPicture:
    """One picture as the model sees it, with what is left of its objects after the crop.

    Attributes:
        image: float32 [3, H, W], normalised.
        masks: bool [n, H, W], a mask for each object, in the file's order; n is 0 where there is none.
        labels: int64 [n], places in the set's ``classes``.
        crowd: bool [H, W], True on regions where COCO drew a crowd as one ("iscrowd").
        number: the picture's id in the file.
    """

    image: Tensor
    masks: Tensor
    labels: Tensor
    crowd: Tensor
    number: int

    def largest(self) -> Tensor:
        """The mask [H, W] of the object with most pixels, the first of equals; ValueError without an object."""
        if not len(self.masks):
            raise ValueError(f"picture {self.number} has no object (left after the crop)")
        return self.masks[self.masks.sum(dim=(1, 2)).argmax()]

    def everything(self) -> Tensor:
        """All objects and crowd regions together: bool [H, W], all False where there is none."""
        return self.masks.any(dim=0) | self.crowd


class CocoPictures(Dataset):
    """The pictures of a COCO file, as `CocoPicture`; see `coco`.

    Attributes:
        classes: names of the categories, in the order of their ids.
        files: the pictures' paths, in the order of their ids.
    """

    def __init__(self, annotations: Path, pictures: Path, prepare: Preprocessing) -> None:
        self._source = _open(annotations, pictures)
        self._annotations, self._coco, self.prepare = annotations, self._source.coco, prepare
        categories = sorted(self._coco.cats.values(), key=lambda category: category["id"])
        self.classes: list[str] = [category["name"] for category in categories]
        self._label = {category["id"]: place for place, category in enumerate(categories)}
        self.files = [pictures / self._coco.imgs[number]["file_name"] for number in self._source.ids]
        present = {
            folder: set(os.listdir(folder)) for folder in {file.parent for file in self.files} if folder.is_dir()
        }
        missing = [file for file in self.files if file.name not in present.get(file.parent, ())]
        if missing:
            raise DataNotFoundError(
                f"{len(missing)} of the {len(self.files)} pictures that {annotations} lists are not there, the first: "
                f"{missing[0]}. Give the folder that they lie in as `pictures`"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> CocoPicture:
        number, file = self._source.ids[index], self.files[index]
        picture, about = read_picture(file), self._coco.imgs[number]
        if picture.size != (about["width"], about["height"]):
            size, listed = " x ".join(map(str, picture.size)), f"{about['width']} x {about['height']}"
            raise DamagedDataError(
                f"{file} has {size} pixels, but {self._annotations.name} says {listed}: its masks belong to another "
                "version of the picture"
            )
        masks, labels, crowd = [], [], torch.zeros(self.prepare.size, dtype=torch.bool)
        for entry in self._coco.loadAnns(self._coco.getAnnIds(number)):
            mask = self.prepare.on_mask(self._drawn(entry))
            if entry.get("iscrowd"):
                crowd |= mask
            elif bool(mask.any()):
                masks.append(mask)
                labels.append(self._label[entry["category_id"]])
        found = torch.stack(masks) if masks else torch.zeros(0, *self.prepare.size, dtype=torch.bool)
        image = self.prepare.transform()(picture)
        return CocoPicture(image, found, torch.tensor(labels, dtype=torch.long), crowd, number)

    def _drawn(self, entry: dict[str, Any]) -> Any:
        """An entry's mask [H, W] on the whole picture."""
        try:
            return self._coco.annToMask(entry)
        except Exception as error:  # pycocotools raises whatever a wrong polygon leads to
            what = f"the object {entry.get('id')} of picture {entry.get('image_id')} in {self._annotations}"
            raise DamagedDataError(f"{what} has no mask that can be drawn (segmentation): {error!r}") from error

    def find(self, files: Sequence[str | os.PathLike[str]]) -> list[int]:
        """The places of pictures, known by their file names; DataNotFoundError for a name that is not listed."""
        place = {file.name: index for index, file in enumerate(self.files)}
        for file in files:
            if Path(file).name not in place:
                raise DataNotFoundError(f"{self._annotations} does not list the picture {Path(file).name}")
        return [place[Path(file).name] for file in files]

    def denormalise(self, images: Tensor) -> Tensor:
        """Back to colours in [0, 1], for display."""
        return self.prepare.denormalise(images)


def coco(
    path: str | os.PathLike[str],
    pictures: str | os.PathLike[str] | None = None,
    *,
    prepare: Preprocessing | None = None,
) -> CocoPictures:
    """Pictures with instance masks from a file in COCO's format.

    Grey pictures become RGB; crowd regions are kept apart from objects; pictures without objects have no mask.

    Args:
        path: the JSON file, or a folder with one ``annotations/instances_<name>.json``.
        pictures: their folder; by default ``<name>/`` or ``images/`` beside ``annotations/``, else the file's folder.
        prepare: the `preprocessing` of the model; by default timm's, 224 px.

    Raises:
        DataNotFoundError: no such file or folder, or listed pictures that are not there; says how many.
        DamagedDataError: not a COCO file of instances; on reading, a picture or mask that is not as listed.
        ImportError: pycocotools is not installed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(path.glob("annotations/instances_*.json"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise DataNotFoundError(f"{path} should hold one annotations/instances_<name>.json, found {names}: name it")
        path = found[0]
    if not path.is_file():
        raise DataNotFoundError(f"no such file of annotations: {path}")
    if pictures is None:
        above, name = path.parent.parent, path.stem.removeprefix("instances_")
        folder = next((above / each for each in (name, "images") if (above / each).is_dir()), path.parent)
    else:
        folder = Path(pictures).expanduser()
    return CocoPictures(path, folder, prepare or preprocessing())


def patch_shares(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of each patch a mask covers: bool [..., H, W] to float32 [..., h, w] in [0, 1].

    Raises:
        ValueError: H is not a multiple of h, or W not of w.
    """
    height, width = masks.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"a mask of {height} x {width} pixels does not divide into {grid[0]} x {grid[1]} patches")
    shares = F.avg_pool2d(masks.float().reshape(-1, 1, height, width), (height // grid[0], width // grid[1]))
    return shares.reshape(*masks.shape[:-2], *grid)


def _open(annotations: Path, pictures: Path) -> Any:
    """torchvision's CocoDetection of a file that is one."""
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise ImportError("COCO's annotations need the package pycocotools: pip install pycocotools") from error
    from torchvision.datasets import CocoDetection

    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    except (ValueError, AttributeError) as error:
        raise DamagedDataError(f"{annotations} is not a file of COCO annotations: {error}") from error
    if missing:
        raise DamagedDataError(f"{annotations} is not a file of COCO instances: it has no list of {missing[0]}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says how long it took
            return CocoDetection(str(pictures), str(annotations))
    except KeyError as error:
        raise DamagedDataError(f"{annotations} is not a file of COCO instances: an entry has no {error}") from error
