"""`python -m svit_utils explain` from the shell's side."""

from __future__ import annotations

import argparse
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from svit_utils.cli import explain as command

pytest.importorskip("svit_utils.models")


def invoke(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    torch.manual_seed(0)
    return command.run(parser.parse_args(arguments))


def read(path):
    """(maps, metadata) of an npz file."""
    with np.load(path, allow_pickle=False) as data:
        maps = {name: data[name] for name in data.files if name != "metadata_json"}
        return maps, json.loads(str(data["metadata_json"]))


def test_planted_shapes_to_files(tmp_path, capsys):
    out = tmp_path / "maps.npz"
    assert invoke("--threshold", "0.002", "--empty-rows", "cap", "--indices", "4", "7", "--out", str(out)) == 0
    maps, note = read(out)
    assert {name: tuple(value.shape) for name, value in maps.items()} == dict.fromkeys(
        ("attention", "rollout", "grad_cam", "layer_grad_cam"), (2, 14, 14)
    )
    assert note["threshold"] == 0.002 and note["empty_rows"] == "cap" and note["images"]["indices"] == [4, 7]
    assert note["targets"] == note["predicted"]
    assert len(list((tmp_path / "maps").glob("*.png"))) == 8
    assert (tmp_path / "maps_overview.png").stat().st_size > 10_000
    assert "4 maps of 2 images" in capsys.readouterr().out


def test_picture_files(tmp_path):
    picture = tmp_path / "cat.png"
    Image.new("RGB", (90, 70), (200, 30, 30)).save(picture)
    out = tmp_path / "m.safetensors"
    assert invoke("--images", str(picture), "--methods", "rollout", "--out", str(out), "--no-overlays") == 0
    assert tuple(load_file(out)["rollout"].shape) == (1, 14, 14)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "maps.pkl"], "--out must end in .safetensors or .npz, got 'maps.pkl'"),
        (["--images", "absent.png"], "no such picture: absent.png"),
        (["--threshold", "1.5"], "1.5"),
        (["--images", __file__, "--normalise", "mine"], "normalise must be one of"),
    ],
)
def test_bad_input_is_one_line_and_status_two(arguments, message, capsys):
    assert invoke(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_checkpoint_is_shown_as_it_was_trained(tmp_path, capsys):
    notes = {}
    for name, options in {
        "cut": [],
        "dense": ["--dense"],
        "other": ["--threshold", "0.1", "--empty-rows", "zero"],
    }.items():
        out = tmp_path / f"{name}.npz"
        arguments = (
            "--checkpoint",
            "planted_sparse_seed0",
            "--methods",
            "attention",
            "--no-overlays",
            "--indices",
            "0",
        )
        assert invoke(*arguments, "--out", str(out), *options) == 0
        maps, notes[name] = read(out)
        notes[name]["zeros"] = int((maps["attention"] == 0).sum())
    assert (notes["cut"]["threshold"], notes["cut"]["empty_rows"]) == (0.01, "dense")
    assert (notes["dense"]["threshold"], notes["dense"]["empty_rows"]) == (None, None)
    assert (notes["other"]["threshold"], notes["other"]["empty_rows"]) == (0.1, "zero")
    printed = capsys.readouterr().out
    assert "cut at tau = 0.01" in printed and "dense; 1 maps" in printed and "cut at tau = 0.1;" in printed
    assert notes["dense"]["zeros"] == 0 < notes["cut"]["zeros"] < notes["other"]["zeros"]


def test_a_trained_file_with_a_learned_tau_comes_back_as_it_was(tmp_path):
    from svit_utils.attention import LearnableThreshold, sparsify
    from svit_utils.models import create_model, save_weights

    model = create_model("small_vit", num_classes=7)
    sparsify(model, LearnableThreshold(0.003, per="layer"), empty_rows="cap")
    card = {"model": "small_vit", "num_classes": "7", "threshold": "0.003", "learnable": "layer", "empty_rows": "cap"}
    path = save_weights(model, tmp_path / "model.safetensors", card)
    out = tmp_path / "maps.npz"
    assert invoke("--checkpoint", str(path), "--methods", "attention", "--no-overlays", "--out", str(out)) == 0
    assert read(out)[1]["empty_rows"] == "cap"
    assert invoke("--checkpoint", str(path), "--dense", "--out", str(out)) == 2


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """timm's small model for tests with weights of its own, found where local weights are looked for."""
    import timm

    torch.manual_seed(3)
    model = timm.create_model("test_vit").eval()
    with torch.no_grad():
        model.head.weight.normal_()
    save_file(model.state_dict(), tmp_path / "test_vit.safetensors")
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))
    return model


def photo(folder, mode="RGB"):
    Image.effect_noise((300, 200), 90).convert(mode).save(folder / "p.png")
    return str(folder / "p.png")


@pytest.mark.parametrize("options", [[], ["--pretrained"]])
def test_a_pretrained_model_keeps_its_head_and_sees_what_timm_shows_it(options, pretrained, tmp_path, capsys):
    from timm.data import ImageNetInfo, create_transform, resolve_data_config

    out = tmp_path / "m.npz"
    picture = photo(tmp_path)
    arguments = ["--model", "test_vit", "--images", picture, "--methods", "attention", "--out", str(out)]
    assert invoke(*arguments, *options) == 0
    prepared = create_transform(**resolve_data_config(model=pretrained))(Image.open(picture).convert("RGB"))
    with torch.no_grad():
        chances = pretrained(prepared[None]).softmax(-1)[0]
    best = int(chances.argmax())
    note, printed = read(out)[1], capsys.readouterr()
    assert note["predicted"] == [best] and note["probabilities"][0] == pytest.approx(float(chances[best]), rel=1e-4)
    name = ImageNetInfo().index_to_description(best).split(",")[0]
    assert f"{name} ({float(chances[best]):.1%})" in printed.out and "test_vit, pretrained, 1000 classes" in printed.out
    assert printed.err == ""
    with Image.open(tmp_path / "m" / "0000_attention.png") as overlay:
        assert overlay.width == overlay.height  # the crop, not the squashed picture


def test_a_new_head_and_resampled_positions_are_said(pretrained, tmp_path, capsys):
    arguments = ["--model", "test_vit", "--num-classes", "7", "--img-size", "96", "--images", photo(tmp_path)]
    assert invoke(*arguments, "--methods", "attention", "--out", str(tmp_path / "m.npz")) == 0
    printed = capsys.readouterr()
    assert "test_vit: the head of 7 classes is new (random); the pretrained one has 1000" in printed.err
    assert "position embeddings resampled from 101 tokens to 37" in printed.err and "class " in printed.out
    assert (
        invoke("--model", "test_vit", "--no-pretrained", "--methods", "attention", "--out", str(tmp_path / "n.npz"))
        == 0
    )
    assert "new: random weights" in capsys.readouterr().out


def test_names_come_from_the_card(tmp_path, capsys):
    from svit_utils.models import create_model, save_trained

    names = ["ant", "bee", "cow"]
    card = {"label_names": names, "mean": [0.1] * 3, "std": [0.3] * 3, "crop_pct": 0.5}
    path = save_trained(create_model("small_vit", 3), tmp_path / "model.safetensors", card)
    picture = tmp_path / "p.png"
    plain = Image.new("RGB", (112, 112), "blue")
    plain.paste((255, 0, 0), (28, 28, 84, 84))  # all that a crop of one half leaves
    plain.save(picture)
    out = tmp_path / "m.npz"
    assert invoke("--checkpoint", str(path), "--images", str(picture), "--methods", "attention", "--out", str(out)) == 0
    assert any(f"p.png: {name} (" in capsys.readouterr().out for name in [names[read(out)[1]["predicted"][0]]])
    assert (
        invoke("--checkpoint", "planted_dense_seed0", "--methods", "attention", "--out", str(out), "--target", "1") == 0
    )
    assert "explained: " in (printed := capsys.readouterr().out) and "disc" in printed


def test_a_second_run_removes_the_overlays_of_the_first_and_nothing_else(tmp_path):
    out, folder = tmp_path / "maps.npz", tmp_path / "maps"
    assert invoke("--methods", "attention", "rollout", "--out", str(out)) == 0
    assert len(list(folder.iterdir())) == 6
    for name in ("0007_attention.png", "mine.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(folder / name, format="PNG")
    assert invoke("--methods", "attention", "--indices", "0", "--out", str(out)) == 0
    kept = ["0007_attention.png", "mine.png", "notes.txt"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(["0000_attention.png", *kept])
    assert invoke("--methods", "attention", "--no-overlays", "--out", str(out)) == 0
    assert sorted(p.name for p in folder.iterdir()) == kept


def test_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        for name in ("m.safetensors", "m.npz"):
            assert invoke("--methods", "attention", "--indices", "0", "--out", str(tmp_path / name)) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 and {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_the_methods_are_those_of_the_library():
    from svit_utils.explain import METHODS

    assert tuple(METHODS) == command.METHODS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "resnet18", "--no-pretrained"], "no token grid can be established for ResNet"),
        (["--model", "nope"], "unknown model 'nope'"),
        (["--images", "."], "is a folder, and a picture file is expected"),
        (["--images", __file__], __file__),
        (["--target", "10"], "--target must lie in 0 to 9, got 10"),
        (["--target", "-1"], "--target must lie in 0 to 9, got -1"),
        (["--img-size", "57"], "multiple of 4"),
        (["--num-classes", "-3"], "num_classes must be at least 0"),
        (["--crop-pct", "2", "--images", "x.png"], "crop_pct must lie in"),
        (["--checkpoint", "planted_dense_seed0", "--pretrained"], "--pretrained goes with --model"),
        (["--indices", "999999"], "index outside"),
    ],
)
def test_impossible_combinations(arguments, message, tmp_path, capsys):
    assert invoke(*arguments, "--out", str(tmp_path / "m.npz")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("method", ["gradient_attention", "gradient_rollout", "relevance", "integrated_gradients"])
def test_one_method_by_its_name(method, tmp_path, capsys):
    out = tmp_path / "m.npz"
    assert invoke("--method", method, "--indices", "0", "--target", "3", "--no-overlays", "--out", str(out)) == 0
    maps, note = read(out)
    assert list(maps) == [method] and maps[method].shape == (1, 14, 14) and np.ptp(maps[method]) > 0
    assert note["targets"] == [3] and "1 maps of 1 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        invoke("--method", "lime")
    assert "relevance" in capsys.readouterr().err
