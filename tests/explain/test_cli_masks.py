"""`python -m svit_utils explain --masks`: maps scored against objects, from the shell's side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svit_utils.cli import explain as command
from svit_utils.cli import masks as module
from svit_utils.data import PlantedShapes
from svit_utils.files import read_rows

SHAPES = PlantedShapes("test")


def invoke(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--checkpoint", "planted_dense_seed0", *arguments]))


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Five generated shapes as PNG files with a COCO file; the last has no object, and the second a crowd."""
    batch = SHAPES.batch(5)
    shown = (SHAPES.denormalise(batch.images) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    objects = []
    for k, mask in enumerate(batch.masks[:4]):
        Image.fromarray(shown[k]).save(tmp_path / f"{k}.png")
        runs = np.flatnonzero(np.diff(np.r_[False, mask.T.flatten().numpy(), True].astype(int)) != 0)
        counts = np.diff(np.r_[0, runs, mask.numel()]).tolist()  # column by column, as COCO counts
        about = {"id": k, "image_id": k, "category_id": 1, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
        objects.append(about | {"segmentation": {"size": [56, 56], "counts": counts}})
    Image.fromarray(shown[4]).save(tmp_path / "4.png")
    crowd = {"segmentation": {"size": [56, 56], "counts": [0, 56, 56 * 55]}, "iscrowd": 1, "id": 9, "image_id": 1}
    pictures = [{"id": k, "file_name": f"{k}.png", "width": 56, "height": 56} for k in range(5)]
    path = tmp_path / "instances_shapes.json"
    content = {
        "images": pictures,
        "annotations": [*objects, objects[0] | crowd],
        "categories": [{"id": 1, "name": "s"}],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_scores_are_those_of_the_masks(annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from svit_utils.explain import explain
    from svit_utils.models import load_embedded
    from svit_utils.referee import average_precision

    out = tmp_path / "maps.npz"
    assert invoke("--masks", str(annotations), "--out", str(out), "--methods", "attention", "rollout") == 0
    rows = read_rows(tmp_path / "maps_scores.csv")
    assert len(rows) == 4 * 2 * 5 and {row["map"] for row in rows} == {"attention", "rollout", *module.BASELINES}
    from svit_utils.data import coco, preprocessing
    from svit_utils.models import load_trained
    from svit_utils.paths import checkpoints_dir

    _, card = load_trained(checkpoints_dir() / "planted_dense_seed0.safetensors")
    model = load_embedded("planted_dense_seed0")
    data = coco(annotations, prepare=preprocessing(model, card))
    images = torch.stack([data[k].image for k in range(4)])
    maps = explain(model, images, "attention")
    for what, masks in {
        "largest": SHAPES.batch(4).masks,
        "all": torch.stack([data[k].everything() for k in range(4)]),
    }.items():
        found = [float(r["average_precision"]) for r in rows if (r["map"], r["mask"]) == ("attention", what)]
        assert found == pytest.approx(average_precision(maps, masks).tolist(), abs=1e-4)
    assert data[1].crowd[:, 0].all() and not torch.equal(data[1].everything(), data[1].largest())
    printed = capsys.readouterr().out
    assert "4 pictures scored, 1 without an object left out" in printed
    assert "average precision, largest object:" in printed and "minus centre" in printed
    assert (tmp_path / "maps_overview.png").stat().st_size > 10_000 and not (tmp_path / "maps").exists()
    with np.load(out) as written:
        assert written["attention"].shape == (4, 14, 14)


def test_only_the_pictures_named(annotations: Path, tmp_path: Path) -> None:
    out, pictures = str(tmp_path / "m.npz"), [str(tmp_path / f"{k}.png") for k in (3, 0)]
    assert invoke("--masks", str(annotations), "--out", out, "--methods", "rollout", "--images", *pictures) == 0
    assert [r["picture"] for r in read_rows(tmp_path / "m_scores.csv")][:2] == ["3.png", "0.png"]


def test_the_size_of_a_chunk_changes_nothing(
    annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (2, 16):
        monkeypatch.setattr(module, "CHUNK", size)
        out = tmp_path / f"{size}.npz"
        assert invoke("--masks", str(annotations), "--out", str(out), "--methods", "rollout") == 0
    two, one = ({tuple(r.values())[:3]: r for r in read_rows(tmp_path / f"{n}_scores.csv")} for n in (2, 16))
    assert two.keys() == one.keys() and len(one) == 4 * 2 * 4
    for key, row in one.items():  # the size of a batch changes the last bits of a map, and so which of two is higher
        assert float(two[key]["average_precision"]) == pytest.approx(float(row["average_precision"]), abs=0.02), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "none.json"], "no such file of annotations: none.json"),
        (["--masks", "{file}", "--images", "{folder}/other.png"], "does not list the picture other.png"),
        (["--masks", "{file}", "--images", "{folder}/4.png"], "no picture has an object"),
    ],
)
def test_bad_input_is_one_line(
    annotations: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(file=annotations, folder=annotations.parent) for argument in arguments]
    assert invoke(*given, "--out", str(annotations.parent / "m.npz")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_the_package(
    annotations: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert invoke("--masks", str(annotations), "--out", str(annotations.parent / "m.npz")) == 2
    assert "need the package pycocotools" in capsys.readouterr().err
