"""Pictures in folders, one folder for each class: ImageNet as it is usually unpacked, or pictures of one's own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svit_utils.data.errors import DataNotFoundError
from svit_utils.data.pictures import ClassFolders, class_folders
from svit_utils.data.transforms import Normalisation, PictureSet, Preprocessing, check_options, preprocessing

# The names that a split's folder may have.
SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}


def image_folder(
    root: str | os.PathLike[str],
    split: str | None = None,
    *,
    img_size: int = 224,
    augment: bool = False,
    transform: Callable[[Any], Any] | None = None,
    normalise: Normalisation = "imagenet",
    crop_pct: float = 0.875,
    prepare: Preprocessing | None = None,
) -> PictureSet:
    """A data set of (float32 [3, img_size, img_size], label) from ``root/<class>/<picture>``.

    With ``split``, a key of ``SPLIT_FOLDERS``, it is ``root/<split>/<class>/<picture>``. Labels number the classes in
    alphabetical order; the result's ``source.samples`` lists (path, label).

    Args:
        augment: random resized crop and flip; else resize and crop the centre, ``crop_pct`` in (0, 1] of the side.
        transform: applied to the PIL image in place of all that.
        normalise: "imagenet", "cifar10", "half", "none", or (mean, std).
        prepare: a model's `preprocessing`, in place of ``img_size``, ``normalise`` and ``crop_pct``.

    Raises:
        ValueError: for an unknown option, a split that is needed and not given, or classes that differ between splits.
        DataNotFoundError: no such folder, or no pictures where they are expected.
        DamagedDataError: on reading a picture that cannot be read; names it.
    """
    if split is not None and split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be one of {list(SPLIT_FOLDERS)} or None, got {split!r}")
    normalise = check_options(transform, img_size, augment, normalise)
    prepare = prepare or preprocessing(img_size=img_size, normalise=normalise, crop_pct=crop_pct)
    if transform is None:
        transform, normalise = prepare.transform(augment), (prepare.mean, prepare.std)
    base = Path(root).expanduser()
    if not base.is_dir():
        missing = not base.exists()
        raise DataNotFoundError(f"no such folder: {base}" if missing else f"{base} is a file, not a folder of pictures")
    folder = _split_folder(base, split)
    return PictureSet(ClassFolders(folder, transform), normalise)


def _split_folder(base: Path, split: str | None) -> Path:
    """The folder that holds the class folders of ``split``."""
    present = {
        name: base / alias
        for name, aliases in SPLIT_FOLDERS.items()
        for alias in reversed(aliases)
        if (base / alias).is_dir()
    }
    if split is None:
        if "train" in present and len(present) > 1:
            raise ValueError(f"{base} has folders for splits: choose split from {sorted(present)}")
        return base
    if split not in present:
        wanted = " or ".join(f"{alias}/" for alias in SPLIT_FOLDERS[split])
        names = sorted(entry.name for entry in base.iterdir())
        found = ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "nothing"
        raise DataNotFoundError(
            f"{base} has no folder {wanted}; found: {found}. With the class folders directly in it, leave split=None."
        )
    if split != "train" and "train" in present:
        # The labels are places in the list of folders, so two different lists would give one class two labels.
        folders = (present[split], present["train"])
        here, there = (set(class_folders(folder)) for folder in folders)
        if here != there:
            raise ValueError(
                f"the classes of {folders[0]} and {folders[1]} differ, so their labels would not agree: "
                f"{sorted(here ^ there)[:5]} in one only"
            )
    return present[split]
