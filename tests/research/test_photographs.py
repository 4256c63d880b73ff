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

from research.photographs import finetuned, maps, measured, pictures, run, tables, thresholds, throughput
from research.rows import write_csvs
from svit_utils import sparsify
from svit_utils.data import CocoPicture, image_folder, preprocessing
from svit_utils.explain import explain
from svit_utils.files import read_rows, write_rows
from svit_utils.paths import results_dir
from svit_utils.records import pack, unpack
from svit_utils.referee import average_precision

WNIDS = {"n01440764": 0, "n02102040": 217}  # tench, English springer


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeiT-Tiny's place taken by a model of two blocks at 32 px."""

    def build(*_args: object, **_options: object) -> torch.nn.Module:
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2).eval()

    for module in (thresholds, finetuned, maps, throughput):
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
    assert measured.attention_shares(model, data, thresholds.TRACKED_EVERY)["empty_rate"] == float(
        rows[1]["empty_rate"]
    )
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


def pictures_with_masks(count: int = 5) -> list[CocoPicture]:
    """Noise of 32 px, each with a square of 16 px and, but for the first, a smaller one; the last has no object."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(count):
        masks = torch.zeros(2, 32, 32, dtype=torch.bool)
        masks[0, 4:20, 4 + 2 * k : 20 + 2 * k] = True
        masks[1, 24:28, 24:28] = True
        kept = masks[: 0 if k == count - 1 else 1 + (k > 0)]
        crowd = torch.zeros(32, 32, dtype=torch.bool)
        crowd[:, 0] = k == 1
        labels = torch.zeros(len(kept), dtype=torch.long)
        found.append(CocoPicture(torch.randn(3, 32, 32, generator=generator), kept, labels, crowd, k))
    return found


def test_a_scene_holds_the_largest_and_everything() -> None:
    seen = maps.scene(pictures_with_masks())
    assert len(seen.images) == 4 and [int(mask.sum()) for mask in seen.masks["largest"]] == [256] * 4
    assert [int(mask.sum()) for mask in seen.masks["all"]] == [256, 256 + 16 + 32, 272, 272]
    middle = torch.zeros(3, 32, 32, dtype=torch.bool)
    middle[0, 8:24, 8:24] = middle[1, :8, 8:24] = middle[2, -1, -1] = True
    expected = [0, 12 / 32, 2**0.5 * 15.5 / 32]
    assert maps.distance(middle).tolist() == pytest.approx(expected, abs=1e-9)
    about = seen.about()
    assert about["largest:share"].tolist() == [0.25] * 4 and set(about["all:off_centre"]) <= {0.0, 1.0}


def test_model_scores_by_hand(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from svit_utils.explain import attention_maps, displayed

    monkeypatch.setattr(maps, "CHUNK", 3)
    seen, model = maps.scene(pictures_with_masks()), small_model()
    scores = maps.model_scores(model, seen, (0.05,))
    own = {name: explain(model, seen.images, name) for name in ("attention", "grad_cam")}
    for name, each in own.items():
        wanted = average_precision(each, seen.masks["all"]).tolist()
        assert scores[f"all:{name}:average_precision"].tolist() == pytest.approx(wanted, abs=1e-6)
    last = list(attention_maps(model, seen.images).values())[-1]
    drawn = displayed(last, 0.05)[:, :, 0, 1:].mean(dim=1).unflatten(-1, (4, 4))
    wanted = average_precision(drawn, seen.masks["largest"]).tolist()
    assert scores["largest:attention_drawn0.05:average_precision"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert {key.split(":")[1] for key in scores} == {
        "attention",
        "rollout",
        "grad_cam",
        "attention_drawn0.05",
        "rollout_drawn0.05",
    }


def test_maps_are_written_once(small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed(list):  # what `coco` gives
        pass

    monkeypatch.setattr(maps, "coco", lambda *_args, **_options: Listed(pictures_with_masks()))
    monkeypatch.setattr(maps.finetuned, "finetuned_model", lambda *_args: None)
    path = maps.write_maps(tmp_path)
    rows = read_rows(path)
    assert [row["model"] for row in rows] == ["baselines", "dense", "tau0.0025", "tau0.005", "tau0.01"]
    assert {(row["pictures"], row["listed"]) for row in rows} == {("4", "5")}
    before = path.read_bytes()
    assert maps.write_maps(tmp_path).read_bytes() == before
    table = tables.map_table(tmp_path).set_index(["model", "map", "mask", "subset"])
    centre = table.loc[("baselines", "centre", "largest", "every")]
    assert np.isnan(centre["minus_centre"]) and centre["pictures"] == 4
    row = table.loc[("tau0.005", "attention", "all", "every")]
    dense = table.loc[("dense", "attention", "all", "every")]
    drawn = table.loc[("dense", "attention_drawn0.005", "all", "every")]
    for label, other in (("dense", dense), ("drawn", drawn)):
        expected = row["average_precision"] - other["average_precision"]
        assert row[f"minus_{label}"] == pytest.approx(expected, abs=2e-4)
    assert np.isnan(table.loc[("tau0.005", "grad_cam", "all", "every")]["minus_drawn"])


def made_up(folder: Path) -> None:
    """Rows of thresholds, three seeds of two settings, and rates."""
    right_at = {0.0: 80, 0.01: 40}
    shares = dict.fromkeys(tables.SHARES, 0.5)
    rows = []
    for tau, count in right_at.items():
        bits = pack(np.arange(100) < count)
        row = {"tau": tau, "images": 100, "accuracy_of_ten": 0.9, "correct": bits, "probe_correct": bits, **shares}
        rows.append(row)
    write_rows(folder / "thresholds.csv", rows[0], rows)
    rows = []
    for seed in range(3):
        for setting, count in (("dense", 90), ("tau0.01", 70 + seed)):
            row = {"setting": setting, "seed": seed, "images": 100, "correct": pack(np.arange(100) < count), **shares}
            rows.append(row)
    write_rows(folder / "finetuned.csv", rows[0], rows)
    names = [("read from shards", "", ""), ("training", "dense", "bf16"), ("training", "cut", "bf16")]
    rows = [dict(zip(("what", "attention", "precision"), name)) | {"per_core_second": 10.0} for name in names]
    write_rows(folder / "throughput.csv", rows[0], rows)


def test_tables_of_made_up_rows(tmp_path: Path) -> None:
    made_up(tmp_path)
    found = tables.tables(tmp_path)
    assert sorted(found) == ["finetuned", "imagenet", "thresholds"]
    cut = found["thresholds"].set_index("tau").loc[0.01]
    assert (cut["accuracy"], cut["minus_dense"], cut["probe_minus_dense"]) == pytest.approx((0.4, -0.4, -0.4))
    assert cut["minus_dense_low"] < -0.4 < cut["minus_dense_high"] < -0.25 and cut["tau_times_n"] == pytest.approx(1.97)
    trained = found["finetuned"].set_index("setting").loc["tau0.01"]
    assert trained["minus_dense"] == pytest.approx(-0.19) and trained["seeds"] == 3
    assert trained["minus_dense_low"] < -0.19 < trained["minus_dense_high"]
    hours = found["imagenet"].set_index(["schedule", "attention"])["training_core_hours"]
    assert hours["one epoch", "cut"] == pytest.approx(1_281_167 / 10 / 3600)
    assert hours["DeiT's own schedule", "dense"] == pytest.approx(300 * hours["one epoch", "cut"])
    first = {path.name: path.read_bytes() for path in tables.write_tables(tmp_path).iterdir()}
    assert {path.name: path.read_bytes() for path in tables.write_tables(tmp_path).iterdir()} == first


def test_rates_are_of_everything(photographs: Path, small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "BATCH", 5)
    monkeypatch.setattr(throughput, "REPEATS", 1)
    found = throughput.rates(photographs / pictures.IMAGENETTE)
    assert all(rate > 0 for rate in found.values()) and len(found) == 2 + 2 * 2 * 2


def test_recorded_tables_are_those_of_the_recorded_rows(tmp_path: Path) -> None:
    """`python -m research photographs --parts tables` gives the committed files, byte for byte."""
    recorded = results_dir() / "photographs"
    expected = {path.name: path.read_bytes() for path in (recorded / "tables").glob("*.csv")}
    assert set(expected) >= {"thresholds.csv", "finetuned.csv", "maps.csv", "imagenet.csv"}
    write_csvs(tables.tables(recorded), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


def test_recorded_rows_say_where_they_come_from() -> None:
    for name in ("thresholds", "finetuned", "maps", "throughput"):
        rows = read_rows(results_dir() / "photographs" / f"{name}.csv")
        assert rows, name
        for row in rows:
            assert all(row[key] != "" for key in ("command", "torch", "timm", "device", "threads", "commit", "date")), (
                name
            )
            assert "/" not in row["command"] and row["dirty"] == "False", name
