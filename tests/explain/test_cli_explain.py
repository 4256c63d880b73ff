"""`python -m svit_utils explain` from the shell's side."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

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
