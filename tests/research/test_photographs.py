"""The study on photographs, on made-up pictures: labels, probe, rows that are not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from research.photographs import finetuned, measured, pictures, run, thresholds
from svit_utils import sparsify
from svit_utils.data import image_folder, preprocessing
from svit_utils.files import read_rows
from svit_utils.records import unpack

WNIDS = {"n01440764": 0, "n02102040": 217}  # tench, English springer


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeiT-Tiny's place taken by a model of two blocks at 32 px."""

    def build(*_args: object, **_options: object) -> torch.nn.Module:
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2).eval()

    for module in (thresholds, finetuned):
        monkeypatch.setattr(module, "create_model", build)
    return build


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in WNIDS:
            folder = tmp_path / pictures.IMAGENETTE / split / name
            folder.mkdir(parents=True)
            for k in range(5):
                Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    monkeypatch.setenv("SVIT_DATA_DIR", str(tmp_path))
    return tmp_path


def test_labels_are_those_of_the_models_head(photographs: Path, small_model: Any) -> None:
    data = pictures.imagenette("val", preprocessing(small_model()))
    assert data.ten == list(WNIDS.values()) and data.targets == [0] * 5 + [217] * 5
    assert data[7][1] == 217 and data[7][0].shape == (3, 32, 32)
    other = photographs / "mine" / "cat"
    other.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(other / "a.png")
    with pytest.raises(ValueError, match="the folder 'cat' is not named by a synset"):
        pictures.ImageNetLabels(image_folder(other.parent))


def test_the_probe_is_at_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) + 3 * F.one_hot(labels, 5)
    assert (measured.probe(features, labels, features, 3) == labels).float().mean() > 0.9
    swapped = measured.probe(features * 100 + 7, labels, features * 100 + 7, 3)  # units do not matter
    assert torch.equal(swapped, measured.probe(features, labels, features, 3))


def test_a_row_for_each_tau_once(photographs: Path, small_model: Any, tmp_path: Path) -> None:
    path = thresholds.write_thresholds(tmp_path, (0.0, 0.1))
    rows = read_rows(path)
    assert [float(row["tau"]) for row in rows] == [0.0, 0.1]
    model = small_model()
    data = pictures.imagenette("val", preprocessing(model))
    for row in rows:
        right = unpack(row["correct"], int(row["images"]))
        assert right.mean() == pytest.approx(float(row["accuracy"]), abs=1e-4) and len(right) == 10
    assert (rows[0]["applied_sparsity"], rows[0]["empty_rate"]) == ("0.0", "0.0") and rows[0]["probe_accuracy"] != ""
    assert rows[1]["probe_accuracy"] == "" and float(rows[1]["cut_sparsity"]) > 0.9  # 17 keys, all near 1 / 17
    sparsify(model, 0.1)
    assert measured.attention_shares(model, data)["empty_rate"] == float(rows[1]["empty_rate"])
    before = path.read_bytes()
    assert thresholds.write_thresholds(tmp_path, (0.0, 0.1)).read_bytes() == before


def test_finetuned_rows(photographs: Path, small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuned, "work_folder", lambda setting, seed: tmp_path / f"{setting.name}-{seed}")
    monkeypatch.setattr(finetuned, "BATCH", 5)
    monkeypatch.setattr(finetuned, "STEPS", 4)
    monkeypatch.setattr(finetuned.recipe, "__defaults__", (4,))
    assert finetuned.finetuned_model(finetuned.SETTINGS[0], 0) is None
    path = finetuned.write_finetuned(tmp_path, (0,))
    rows = read_rows(path)
    assert [row["setting"] for row in rows] == [setting.name for setting in finetuned.SETTINGS]
    assert (rows[0]["tau"], rows[0]["applied_sparsity"]) == ("", "") and rows[2]["tau_warmup"] == "0.5"
    model = finetuned.finetuned_model(finetuned.SETTINGS[2], 0)
    assert model is not None
    data = pictures.imagenette("val", preprocessing(model))
    assert measured.attention_shares(model, data)["sink_mean"] == float(rows[2]["sink_mean"])
    before = path.read_bytes()
    assert finetuned.write_finetuned(tmp_path, (0,)).read_bytes() == before


def test_the_recipe_is_the_plans() -> None:
    config = finetuned.recipe(finetuned.SETTINGS[2], 1)
    assert (config.steps, config.batch_size, config.lr, config.tau_warmup_steps, config.seed) == (100, 10, 1e-4, 50, 1)
    assert [(s.tau, s.warmup) for s in finetuned.SETTINGS] == [(None, 0), (0.01, 0), (0.01, 0.5), (0.005, 0.5)]


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match="unknown part 'map': the study has thresholds, finetuned"):
        run.write_parts(["map"])
