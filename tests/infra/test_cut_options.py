"""How attention is cut: the options mean the same in train, evaluate and explain, or are refused in one line."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svit_utils import load_trained, save_trained, sparsify
from svit_utils.__main__ import main
from svit_utils.attention import NORMALISERS, LearnableThreshold, densify, sparse_modules
from svit_utils.attention.normalisers import HardCut, TopK
from svit_utils.cli import options as shared
from svit_utils.models import create_model

TAKES = {"threshold", "empty_rows"}
NONE = {"dense": False, "threshold": None, "empty_rows": None, "normaliser": None}


def test_the_names_are_those_of_the_library() -> None:
    assert list(shared.NORMALISERS) == list(NORMALISERS)
    for name, cls in NORMALISERS.items():
        assert TAKES & set(shared.NORMALISERS[name]) == TAKES & set(inspect.signature(cls).parameters), name


def told(model: Any) -> list[str]:
    return sorted({repr(module.normaliser) for module in sparse_modules(model).values()})


def started(start: str) -> Any:
    """A model with 12 x 12 patches, of which the first three layers are cut."""
    model = create_model("small_vit", img_size=48)
    if start == "dense":
        return model
    arguments: dict[str, Any] = {
        "thresholded": {"threshold": 0.02, "empty_rows": "cap"},
        "hard_cut": {"normaliser": HardCut(0.02, "zero")},
        "clipped": {"threshold": 0.02, "normaliser": "clipped"},
        "topk": {"normaliser": TopK(5)},
        "learned": {"threshold": LearnableThreshold(0.02)},
    }[start]
    sparsify(model, layers=[0, 1, 2], **arguments)
    return model


THRESHOLDED = "ThresholdedSoftmax(FixedThreshold(tau={}), empty_rows='{}')"
HARD_CUT = "HardCut(FixedThreshold(tau={}), empty_rows='{}')"
CLIPPED = "ClippedSoftmax(FixedThreshold(tau={}))"
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("thresholded", {}, THRESHOLDED.format(0.02, "cap")),
    ("thresholded", {"threshold": 0.05}, THRESHOLDED.format(0.05, "cap")),
    ("thresholded", {"threshold": 0.0}, THRESHOLDED.format(0.0, "cap")),
    ("thresholded", {"empty_rows": "top1"}, THRESHOLDED.format(0.02, "top1")),
    ("thresholded", {"threshold": 0.05, "empty_rows": "zero"}, THRESHOLDED.format(0.05, "zero")),
    ("thresholded", {"normaliser": "hard_cut"}, HARD_CUT.format(0.02, "cap")),
    ("thresholded", {"normaliser": "hard_cut", "threshold": 0.03}, HARD_CUT.format(0.03, "cap")),
    ("thresholded", {"normaliser": "clipped"}, CLIPPED.format(0.02)),
    ("thresholded", {"normaliser": "topk"}, "TopK(k=21)"),
    ("hard_cut", {"threshold": 0.05}, HARD_CUT.format(0.05, "zero")),
    ("hard_cut", {"empty_rows": "cap"}, HARD_CUT.format(0.02, "cap")),
    ("hard_cut", {"normaliser": "thresholded"}, THRESHOLDED.format(0.02, "zero")),
    ("clipped", {"threshold": 0.05}, CLIPPED.format(0.05)),
    ("clipped", {"normaliser": "thresholded", "empty_rows": "top1"}, THRESHOLDED.format(0.02, "top1")),
    ("clipped", {"normaliser": "hard_cut"}, HARD_CUT.format(0.02, "dense")),
    ("topk", {}, "TopK(k=5)"),
    ("topk", {"normaliser": "topk"}, "TopK(k=5)"),
    ("topk", {"normaliser": "thresholded"}, THRESHOLDED.format(0.01, "dense")),
    ("topk", {"normaliser": "thresholded", "threshold": 0.04}, THRESHOLDED.format(0.04, "dense")),
    ("dense", {"threshold": 0.05}, THRESHOLDED.format(0.05, "dense")),
    ("dense", {"normaliser": "hard_cut"}, HARD_CUT.format(0.01, "dense")),
    ("dense", {"normaliser": "hard_cut", "threshold": 0.05, "empty_rows": "cap"}, HARD_CUT.format(0.05, "cap")),
    ("dense", {"normaliser": "topk"}, "TopK(k=21)"),
    ("learned", {"empty_rows": "top1"}, "ThresholdedSoftmax(LearnableThreshold(per='layer'), empty_rows='top1')"),
]


@pytest.mark.parametrize(("start", "asked", "expected"), CHANGES)
def test_what_is_not_asked_for_stays(start: str, asked: dict[str, Any], expected: str) -> None:
    model = started(start)
    shared.change_attention(model, argparse.Namespace(**{**NONE, **asked}))
    assert told(model) == [expected]
    assert len(sparse_modules(model)) == (4 if start == "dense" else 3)


@pytest.mark.parametrize("start", ["thresholded", "hard_cut", "clipped", "topk", "dense"])
def test_dense_is_dense(start: str) -> None:
    model = started(start)
    shared.change_attention(model, argparse.Namespace(**{**NONE, "dense": True}))
    assert not sparse_modules(model)


def test_layers_that_are_cut_in_different_ways_each_keep_theirs() -> None:
    model = create_model("small_vit")
    sparsify(model, {0: 0.02, 1: 0.03})
    sparsify(model, layers=[2], normaliser=HardCut(0.04, "top1"))
    shared.change_attention(model, argparse.Namespace(**{**NONE, "threshold": 0.05}))
    found = [repr(module.normaliser) for module in sparse_modules(model).values()]
    assert found == [THRESHOLDED.format(0.05, "dense")] * 2 + [HARD_CUT.format(0.05, "top1")]
    sparsify(model, layers=[3], normaliser="topk")
    before = told(model)
    with pytest.raises(ValueError, match=r"--threshold does not go with TopK\(k=21\): give --normaliser, too"):
        shared.change_attention(model, argparse.Namespace(**{**NONE, "threshold": 0.1}))
    assert told(model) == before, "refused as a whole"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("topk", {"threshold": 0.05}, r"--threshold does not go with TopK\(k=5\): give --normaliser"),
    ("topk", {"empty_rows": "cap"}, r"--empty-rows does not go with TopK\(k=5\)"),
    ("clipped", {"empty_rows": "cap"}, "--empty-rows does not go with ClippedSoftmax"),
    ("clipped", {"threshold": 0.1, "empty_rows": "cap"}, "--empty-rows does not go with ClippedSoftmax"),
    ("dense", {"empty_rows": "cap"}, "--empty-rows needs a cut: give --threshold"),
    ("dense", {"normaliser": "topk", "threshold": 0.01}, "--normaliser topk does not go with --threshold"),
    ("dense", {"normaliser": "topk", "empty_rows": "cap"}, "--normaliser topk does not go with --empty-rows"),
    ("dense", {"normaliser": "clipped", "empty_rows": "cap"}, "--normaliser clipped does not go with --empty-rows"),
    ("thresholded", {"threshold": 1.5}, r"threshold must lie in \[0, 1\), got 1.5"),
    ("thresholded", {"dense": True, "normaliser": "topk"}, "--dense goes neither with .*: --normaliser"),
    ("thresholded", {"dense": True, "empty_rows": "cap"}, "--dense goes neither with .*: --empty-rows"),
    ("learned", {"normaliser": "hard_cut"}, "a learned tau of its own, which does not go with"),
    ("learned", {"threshold": 0.1}, "a learned tau of its own, which does not go with"),
    ("learned", {"dense": True}, "a learned tau of its own, which does not go with"),
]


@pytest.mark.parametrize(("start", "asked", "message"), REFUSED)
def test_what_cannot_be_is_refused_and_nothing_changed(start: str, asked: dict[str, Any], message: str) -> None:
    model = started(start)
    before = told(model)
    with pytest.raises(ValueError, match=message):
        shared.change_attention(model, argparse.Namespace(**{**NONE, **asked}))
    assert told(model) == before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--normaliser entmax15 needs the package entmax: pip install entmax"):
        shared.check_cut(argparse.Namespace(**{**NONE, "normaliser": "entmax15"}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--normaliser", "topk", "--learnable", "head"], "--normaliser topk does not go with --learnable"),
        (["--normaliser", "topk", "--tau-warmup", "3"], "--normaliser topk does not go with --tau-warmup"),
        (["--normaliser", "topk", "--threshold", "0.01"], "--normaliser topk does not go with --threshold"),
        (["--normaliser", "sparsemax", "--empty-rows", "cap"], "--normaliser sparsemax does not go with --empty-rows"),
        (["--dense", "--normaliser", "hard_cut"], "--dense goes neither with --threshold nor with"),
        (["--dense", "--learnable", "head"], "--dense goes neither with --threshold nor with"),
        (["--dense", "--layers", "0"], "--dense goes neither with --threshold nor with"),
        (["--dense", "--tau-warmup", "2"], "--dense goes neither with --threshold nor with"),
        (["--normaliser", "softmax"], "invalid choice: 'softmax'"),
    ],
)
def test_training_refuses_in_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    command = ["train", "--profile", "smoke", "--out", str(tmp_path / "run"), *arguments]
    if "softmax" in arguments:
        with pytest.raises(SystemExit, match="2"):  # by argparse
            main(command)
    else:
        assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and "Traceback" not in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("normaliser", ["hard_cut", "clipped", "topk"])
def test_from_train_to_evaluate_to_explain(normaliser: str, tmp_path: Path, capsys: Any) -> None:
    """A trained normaliser comes back, keeps its kind at another tau, and gives way to the one that is asked for."""
    out = tmp_path / "run"
    tau = [] if normaliser == "topk" else ["--threshold", "0.004"]
    train = ["train", "--profile", "smoke", "--steps", "2", "--out", str(out), "--normaliser", normaliser, *tau]
    assert main(train) == 0
    assert normaliser in capsys.readouterr().out.splitlines()[2]
    model, card = load_trained(out / "model.safetensors")
    names = {"hard_cut": HARD_CUT.format(0.004, "dense"), "clipped": CLIPPED.format(0.004), "topk": "TopK(k=21)"}
    assert told(model) == [names[normaliser]]
    assert (card["normaliser"], card["threshold"]) == (normaliser, 0.004 if tau else None)

    def numbers(*options: str) -> Any:
        command = ["evaluate", "--profile", "smoke", "--weights", str(out / "model.safetensors"), "--json"]
        assert main([*command, "--tracked", "8", *options]) == 0
        return json.loads(capsys.readouterr().out)

    as_trained, other = numbers(), numbers("--normaliser", "thresholded", "--threshold", "0.005")
    assert as_trained["threshold"] == names[normaliser]
    assert (other["threshold"], other["empty_rows"]) == (0.005, "dense")
    maps = tmp_path / "maps.npz"
    explain = ["explain", "--methods", "attention", "--no-overlays", "--indices", "0", "--out", str(maps)]
    explain += ["--checkpoint", str(out / "model.safetensors")]
    if normaliser == "topk":
        assert main([*explain, "--threshold", "0.005"]) == 2
        assert "--threshold does not go with TopK(k=21)" in capsys.readouterr().err
    else:
        assert main([*explain, "--threshold", "0.005"]) == 0
        note = json.loads(str(np.load(maps)["metadata_json"]))
        assert note["threshold"] == names[normaliser].replace("0.004", "0.005")


def test_a_start_without_a_cut_gets_the_one_that_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    path = save_trained(densify(create_model("small_vit", img_size=56)), tmp_path / "dense.safetensors")
    for command in (["--weights", str(path)], ["--weights", "scratch"]):
        evaluate = ["evaluate", "--profile", "smoke", *command, "--json", "--limit", "8", "--tracked", "0"]
        assert main([*evaluate, "--normaliser", "topk"]) == 0
        assert json.loads(capsys.readouterr().out)["threshold"] == "TopK(k=21)"
        assert main([*evaluate, "--normaliser", "hard_cut", "--threshold", "0.02", "--empty-rows", "cap"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["threshold"], found["empty_rows"]) == (HARD_CUT.format(0.02, "cap"), "cap")
        assert main([*evaluate, "--empty-rows", "cap"]) == 2
        assert "--empty-rows needs a cut" in capsys.readouterr().err
