"""One reader for every command: orientation, depth, transparency, modes; hidden entries and loops; errors by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL
import pytest
from packaging.version import Version
from PIL import Image

from svit_utils.data import DamagedDataError, DataNotFoundError, image_folder
from svit_utils.data.pictures import FORMATS, read_picture

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(orientation: int, ending: str, tmp_path: Path) -> None:
    """The picture is shown as a viewer shows it."""
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :8, 0] = 255  # red in the upper left corner
    undo = {1: (), 2: (Image.Transpose.FLIP_LEFT_RIGHT,), 3: (Image.Transpose.ROTATE_180,)}
    undo |= {4: (Image.Transpose.FLIP_TOP_BOTTOM,), 5: (Image.Transpose.TRANSPOSE,), 6: (Image.Transpose.ROTATE_90,)}
    undo |= {7: (Image.Transpose.TRANSVERSE,), 8: (Image.Transpose.ROTATE_270,)}
    stored = Image.fromarray(upright)
    for step in undo[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    lossless = {"lossless": True} if ending == "webp" else {"quality": 95} if ending == "jpg" else {}
    stored.save(path, exif=exif.tobytes(), **lossless)  # type: ignore[arg-type]
    found = pixels(read_picture(path))
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_keep_their_greys(ending: str, tmp_path: Path) -> None:
    """convert("RGB") turns 16-bit greys white."""
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert (pixels(read_picture(path)) == RAMP[..., None]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP / np.float32(255), RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) * 257, RAMP),
        (RAMP.astype(np.float32) - 1000, RAMP),
        (RAMP.astype(np.float32) * 1e6, RAMP),
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),
        (np.full((4, 4), np.float32(0.5)), np.full((4, 4), 128)),
        (np.full((4, 4), np.float32(-7)), np.zeros((4, 4))),
        (np.where(RAMP == 3, np.nan, RAMP / 255).astype(np.float32), np.where(RAMP == 3, 0, RAMP)),
    ],
)
def test_floats_and_wide_integers_by_their_range(values: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert (pixels(read_picture(tmp_path / "a.tif")) == expected[..., None]).all()


def transparent(mode: str, tmp_path: Path) -> Path:
    """Left half opaque dark grey (60), right half transparent over hidden black."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :4] = 255
    grey = np.where(alpha > 0, 60, 0).astype(np.uint8)
    path = tmp_path / "a.png"
    if mode == "LA":
        Image.fromarray(np.stack([grey, alpha], -1), "LA").save(path)
    elif mode == "RGBA":
        Image.fromarray(np.dstack([grey, grey, grey, alpha]), "RGBA").save(path)
    elif mode == "P":
        picture = Image.fromarray((grey > 0).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 60, 60, 60])
        picture.save(path, transparency=0)
    else:
        picture = Image.fromarray(grey).convert(mode)
        picture.save(path, transparency=0 if mode == "L" else (0, 0, 0))
    return path


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_parts_are_white(mode: str, tmp_path: Path) -> None:
    """convert("RGB") shows the colour hidden under the transparency."""
    found = pixels(read_picture(transparent(mode, tmp_path)))
    assert (found[:, :4] == 60).all() and (found[:, 4:] == 255).all()


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert np.abs(pixels(read_picture(tmp_path / "a.webp")).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "1", "L", "P"])
def test_other_modes(mode: str, tmp_path: Path) -> None:
    colour = Image.new("RGB", (8, 8), (255, 255, 255))
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    colour.convert(mode).save(path)
    if mode == "YCbCr" and Version(PIL.__version__) < Version("12.3"):  # cannot read what it has written
        with pytest.raises(DamagedDataError, match=r"a\.tif"):
            read_picture(path)
        return
    assert (pixels(read_picture(path)) >= 254).all()
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    if mode in ("CMYK", "P"):
        red.convert(mode).save(path)
        assert (pixels(read_picture(path)) == (255, 0, 0)).all()


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(read_picture(tmp_path / "a.jpg")).astype(int) - (200, 30, 30)).max() < 6


def test_the_first_of_several(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.tif", "a.webp"):
        extra = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **extra)
        assert (pixels(read_picture(tmp_path / name))[0, 0] == (255, 0, 0)).all()


@pytest.mark.parametrize("fault", ["empty", "text", "truncated", "damaged", "eps"])
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_a_broken_picture_is_named(fault: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"broken.{ending}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    whole = path.read_bytes()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    contents = {"empty": b"", "text": b"no picture", "truncated": whole[: len(whole) // 2], "eps": eps}
    path.write_bytes(contents.get(fault, whole[:20] + bytes(len(whole) - 40) + whole[-20:]))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    with pytest.raises(DamagedDataError, match="cannot read the picture") as error:
        read_picture(path)
    assert str(path) in str(error.value)
    if fault == "eps":
        assert all(name in str(error.value) for name in FORMATS)


def test_a_damaged_exif_block_does_not_lose_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff")
    assert read_picture(tmp_path / "a.jpg").size == (8, 6)


def test_a_folder_or_nothing_where_a_picture_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="is a folder, and a picture file is expected"):
        read_picture(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"no such picture: .*absent\.png"):
        read_picture(tmp_path / "absent.png")
    os.mkfifo(tmp_path / "pipe.png")  # would hang, were it opened
    with pytest.raises(DataNotFoundError, match=r"no such picture: .*pipe\.png"):
        read_picture(tmp_path / "pipe.png")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataNotFoundError, match="is a file, not a folder of pictures"):
        image_folder(tmp_path / "a.png")


HIDDEN = [".ipynb_checkpoints", "__MACOSX", ".git", ".cache", "@eaDir"]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_entries_are_neither_classes_nor_samples(hidden: str, tmp_path: Path) -> None:
    """.ipynb_checkpoints becomes class 0 and shifts every label."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    for place in (tmp_path / "train" / hidden, tmp_path / "train" / "cat" / hidden):
        place.mkdir()
        Image.new("RGB", (8, 8)).save(place / "1-checkpoint.png")
    (tmp_path / "train" / "cat" / "._1.png").write_bytes(b"macOS")
    for split in ("train", "val"):
        data = image_folder(tmp_path, split)
        assert data.classes == ["cat", "dog"] and data.targets == [0, 1]
        assert [Path(path).name for path, _ in data.source.samples] == ["1.png"] * 2


def test_directory_loops(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("cat", "dog"):
        (root / name / "deep").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "deep" / "1.png")
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "cat" / "deep" / "up").symlink_to(root)
    (root / "dog" / "twice").symlink_to(root / "dog" / "deep")
    (root / "loop").symlink_to(root)
    (root / "parent").symlink_to(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "1.png")
    (root / "linked").symlink_to(elsewhere)  # no loop: a class kept somewhere else
    data = image_folder(root)
    assert data.classes == ["cat", "dog", "linked"] and data.targets == [0, 1, 2]
