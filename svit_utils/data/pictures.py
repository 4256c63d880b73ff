"""Picture files: the one reader of every command, and the pictures below a folder with one folder for each class."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from svit_utils.data.errors import DamagedDataError, DataNotFoundError

# What may be opened, as Pillow names it. EPS and the like are left out: Pillow hands them to another program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # in folders, as torchvision's
BACKGROUND = (255, 255, 255)  # what shows through where a picture is transparent
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def read_picture(path: str | os.PathLike[str]) -> Any:
    """The picture as a PIL image in RGB, 8 bits a channel, turned as its EXIF orientation says; of several the first.

    Greyscale of more than 8 bits is scaled from its own range (see `_to_bytes`); transparent parts show `BACKGROUND`.

    Raises:
        DataNotFoundError: no such file, or a folder.
        DamagedDataError: not a picture in one of `FORMATS`, or a broken one; the message names the file.
    """
    if os.path.isdir(path):
        raise DataNotFoundError(f"{path} is a folder, and a picture file is expected")
    if not os.path.isfile(path):
        raise DataNotFoundError(f"no such picture: {path}")
    return decode_picture(path, path)


def decode_picture(source: Any, name: object) -> Any:
    """`read_picture` from a file name or an open binary file; ``name`` is what a DamagedDataError calls it."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source, formats=FORMATS) as picture:
            picture.load()
            upright: Image.Image = picture
            with suppress(Exception):  # a picture with a damaged EXIF block has no orientation
                upright = ImageOps.exif_transpose(picture)
            return _rgb(upright)
    except UnidentifiedImageError as error:
        raise DamagedDataError(
            f"cannot read the picture {name}: it is damaged, or none of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # a broken file makes Pillow raise almost anything
        raise DamagedDataError(f"cannot read the picture {name}: {error or type(error).__name__}") from error


def _rgb(picture: Any) -> Any:
    """Any mode of PIL to RGB."""
    from PIL import Image

    if picture.mode == "F" or picture.mode.startswith("I"):  # 16 or 32 bits a pixel
        picture = Image.fromarray(_to_bytes(np.asarray(picture), picture.mode))
    elif picture.mode in _TRANSPARENT or "transparency" in picture.info:
        below = Image.new("RGBA", picture.size, (*BACKGROUND, 255))
        picture = Image.alpha_composite(below, picture.convert("RGBA"))
    return picture.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values [H, W] of more than 8 bits as uint8.

    The range is 0 to 65535 for 16 bits. Wider integers and floats do not say theirs: it is the first of [0, 1] (floats
    only), [0, 255] and [0, 65535] that holds all values, else from the smallest to the largest. What is not finite
    becomes 0.
    """
    grey = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = 0.0, 65535.0
    if not mode.startswith("I;16"):
        tops = [top for top in (1.0, 255.0, 65535.0) if top > 1 or mode == "F"]
        low, high = float(grey.min()), float(grey.max())
        if low >= 0 and high <= tops[-1]:
            low, high = 0.0, next(top for top in tops if high <= top)
    return np.rint((grey - low) / max(high - low, 1e-300) * 255).astype(np.uint8)


def class_folders(root: Path) -> list[str]:
    """Names of the folders in ``root`` that stand for classes, sorted; hidden and system folders and loops do not."""
    above = {root.resolve(), *root.resolve().parents}
    return sorted(e.name for e in root.iterdir() if _counts(e.name) and e.is_dir() and e.resolve() not in above)


def _counts(name: str) -> bool:
    """Whether a file or folder of this name belongs to the data."""
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def _pictures(folder: Path, above: set[Path]) -> list[str]:
    """The picture files in and below ``folder``, folder by folder; each folder once, though links lead to it again."""
    seen, found = set(above), []
    for here, folders, files in os.walk(folder, followlinks=True):
        place = Path(here).resolve()
        folders[:] = [] if place in seen else [name for name in folders if _counts(name)]
        if place not in seen:
            found.append((here, sorted(n for n in files if _counts(n) and n.lower().endswith(ENDINGS))))
        seen.add(place)
    return [os.path.join(here, name) for here, names in sorted(found) for name in names]


class ClassFolders(Dataset):
    """(picture, label) for each picture file below ``root/<class>``, as torchvision's ImageFolder gives them.

    Attributes:
        samples: (path, label) in order.
        targets: the labels in order.
        classes: names by label.

    Raises:
        DataNotFoundError: no folder of a class, or one without pictures.
    """

    def __init__(self, root: Path, transform: Callable[[Any], Any]) -> None:
        self.root, self.transform = root, transform
        self.classes = class_folders(root)
        above = {root.resolve(), *root.resolve().parents}
        found = [list(_pictures(root / name, above)) for name in self.classes]
        empty = [name for name, paths in zip(self.classes, found, strict=True) if not paths]
        if empty or not found:
            which = f"nothing in {', '.join(empty)}" if empty else "no such folder"
            raise DataNotFoundError(
                f"no pictures to load in {root}: expected one folder for each class with pictures in it "
                f"({root}/<class>/<picture>.jpg), found {which}. Files may end in {', '.join(ENDINGS)}"
            )
        self.samples = [(path, label) for label, paths in enumerate(found) for path in paths]
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_picture(path)), label
