"""The photographs of the study, with the labels that DeiT's own head has for them."""

from __future__ import annotations

from pathlib import Path

from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset

from svit_utils.data import PictureSet, Preprocessing, image_folder
from svit_utils.paths import data_dir

MODEL = "deit_tiny_patch16_224"
IMAGENETTE = Path("photos", "imagenette224")  # under the data directory
COCO = Path("photos", "coco128")


class ImageNetLabels(Dataset):
    """A folder of pictures whose classes are named by ImageNet's synsets, as (image [3, H, W], index of 1,000).

    Attributes:
        targets: the indices in order.
        ten: the indices of the folder's classes, in the folder's order.

    Raises:
        ValueError: a folder is not named by a synset of ImageNet-1k, such as n01440764.
    """

    def __init__(self, pictures: PictureSet) -> None:
        info = ImageNetInfo()
        index = {info.index_to_label_name(i): i for i in range(info.num_classes())}
        if unknown := [name for name in pictures.classes if name not in index]:
            raise ValueError(f"the folder {unknown[0]!r} is not named by a synset of ImageNet-1k, such as n01440764")
        self.pictures = pictures
        self.ten = [index[name] for name in pictures.classes]
        self.targets = [self.ten[label] for label in pictures.targets]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.pictures[place][0], self.targets[place]


def imagenette(split: str, prepare: Preprocessing) -> ImageNetLabels:
    """Imagenette's ``"train"`` or ``"val"`` as the model wants it; DataNotFoundError where it does not lie there."""
    return ImageNetLabels(image_folder(data_dir() / IMAGENETTE, split, prepare=prepare))
