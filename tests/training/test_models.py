"""Models by name, their weights on the disk, profiles, provenance, and the two commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from svit_utils.__main__ import main
from svit_utils.attention import RelativeThreshold, sparse_modules, sparsify
from svit_utils.models import (
    WeightsError,
    create_model,
    load_embedded,
    load_trained,
    load_weights,
    read_card,
    save_trained,
    save_weights,
)
from svit_utils.provenance import provenance
from svit_utils.training import PROFILES, build_data, build_model, get_profile

TINY = "test_vit"  # timm's own model for tests


def test_small_vit_has_the_geometry_of_vit_base() -> None:
    model = create_model("small_vit")
    tokens = model.forward_features(torch.zeros(1, 3, 56, 56))
    assert tokens.shape == (1, 197, 96)
    assert model(torch.zeros(2, 3, 56, 56)).shape == (2, 10)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'vit_bse': use 'small_vit' or a timm name"):
        create_model("vit_bse")
    with pytest.raises(ValueError, match="small_vit has no pretrained weights"):
        create_model("small_vit", pretrained=True)
    with pytest.raises(ValueError, match="img_size must be a multiple of 4, got 57"):
        create_model("small_vit", img_size=57)


def test_local_weights_are_loaded_and_the_head_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model(TINY)
    save_file(source.state_dict(), tmp_path / f"{TINY}.safetensors")
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))
    whole = create_model(TINY, num_classes=1000, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), source.state_dict().values()))
    torch.manual_seed(1)
    one = create_model(TINY, num_classes=10, pretrained=True)
    torch.manual_seed(1)
    two = create_model(TINY, num_classes=10, pretrained=True)
    torch.manual_seed(2)
    three = create_model(TINY, num_classes=10, pretrained=True)
    assert one.get_classifier().weight.shape[0] == 10
    assert torch.equal(one.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert torch.equal(one.get_classifier().weight, two.get_classifier().weight)
    assert not torch.equal(one.get_classifier().weight, three.get_classifier().weight)


def test_local_weights_at_another_image_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The position embeddings are resampled, as they are for weights that timm downloads."""
    source = timm.create_model(TINY)
    save_file(source.state_dict(), tmp_path / f"{TINY}.safetensors")
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))
    model = create_model(TINY, pretrained=True, img_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000), "its own head"
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.pos_embed.shape[1] == 1 + (96 // 16) ** 2
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_missing_weights_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(
        WeightsError, match=rf"Put {TINY}\.safetensors, .* into a folder and set SVIT_WEIGHTS_DIR to it"
    ):
        create_model(TINY, pretrained=True)


def test_weights_round_trip_with_their_card(tmp_path: Path) -> None:
    model = create_model("small_vit")
    path = save_weights(model, tmp_path / "deep" / "w.safetensors", {"steps": "7"})
    assert read_card(path) == {"steps": "7"}
    assert sorted(p.name for p in path.parent.iterdir()) == ["w.safetensors"]
    other = create_model("small_vit")
    assert not torch.equal(other.head.weight, model.head.weight)
    load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
    sparsify(other, 0.01)
    load_weights(other, path)  # the keys are those of the dense model


def test_damaged_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    path = save_weights(create_model("small_vit"), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"another model than VisionTransformer: .*of another shape \(first: head"):
        load_weights(create_model("small_vit", num_classes=7), path)
    with pytest.raises(WeightsError, match=r"missing \(first: .*unknown \(first: "):
        load_weights(timm.create_model("test_convnext"), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"w\.safetensors is damaged"):
        load_weights(create_model("small_vit"), path)
    with pytest.raises(WeightsError, match="no weights at"):
        load_weights(create_model("small_vit"), tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match="no shipped checkpoint 'absent'; there are: "):
        load_embedded("absent")


def test_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PROFILES) == {"smoke", "cpu", "gpu", "paper"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_profile().name == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert get_profile().name == "gpu"
    monkeypatch.setenv("SVIT_PROFILE", "smoke")
    assert get_profile().name == "smoke"
    assert get_profile("cpu").name == "cpu"
    monkeypatch.setenv("SVIT_PROFILE", "fast")
    with pytest.raises(ValueError, match=r"SVIT_PROFILE must be one of 'smoke', 'cpu', 'gpu', 'paper', got 'fast'"):
        get_profile()


def test_the_paper_profile_is_the_cards() -> None:
    paper = get_profile("paper")
    c = paper.config
    assert (paper.data, paper.model, paper.img_size, paper.start) == (
        "cifar10",
        "vit_base_patch16_224",
        224,
        "pretrained",
    )
    assert (c.lr, c.schedule, c.batch_size, c.steps) == (3e-4, "cosine", 16, 70 * (45_000 // 16))
    assert (paper.threshold, c.label_smoothing, c.mixup, c.tau_warmup_steps, c.warmup_steps) == (0.01, 0.0, 0.0, 0, 0)


def test_warm_ups_keep_their_share() -> None:
    profile = get_profile("cpu")
    longer = profile.with_steps(2 * profile.config.steps)
    assert longer.config.tau_warmup_steps == 2 * profile.config.tau_warmup_steps
    assert longer.config.warmup_steps == 2 * profile.config.warmup_steps


def test_build(tmp_path: Path) -> None:
    profile = get_profile("smoke")
    data = build_data(profile)
    assert len(data.val) == profile.val_images and data.train[0][0].shape == (3, 56, 56)
    dense, cut = build_model(profile), build_model(profile, sparse=True)
    assert not sparse_modules(dense) and len(sparse_modules(cut)) == 4
    assert torch.equal(dense.head.weight, cut.head.weight), "the same start"
    assert not torch.equal(dense.head.weight, build_model(profile, seed=1).head.weight)
    with pytest.raises(ValueError, match="'planted_dense_start' is a small_vit with 10 classes"):
        build_model(replace(profile, start="planted_dense_start"), num_classes=3)


def test_provenance() -> None:
    found = provenance(seed=3, note="x")
    assert list(found)[:2] == ["command", "seed"] and found["seed"] == 3 and found["note"] == "x"
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["timm"] == timm.__version__
    assert set(found) >= {"python", "torchvision", "device", "threads", "commit", "dirty", "date"}
    assert found["threads"] == torch.get_num_threads() and isinstance(found["dirty"], bool)


def test_the_recorded_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["/home/ann/svit_utils/__main__.py", "train", "--out", "/home/ann/runs/a", "--data=/mnt/b c", "--lr", "1"]
    monkeypatch.setattr("sys.argv", given)
    assert provenance()["command"] == "python -m svit_utils train --out a '--data=b c' --lr 1"
    monkeypatch.setattr("sys.argv", ["/usr/bin/svit", "train", "--out", "runs/a"])
    assert provenance()["command"] == "svit train --out runs/a"


def test_train_and_evaluate_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "--profile", "smoke", "--steps", "2", "--threshold", "0.0052", "--empty-rows", "zero", "--out"]
    assert main([*command, str(out)]) == 0
    report = json.loads((out / "run.json").read_text())
    assert report["threshold"] == 0.0052 and report["steps"] == 2 and report["seed"] == 0
    capsys.readouterr()
    assert main(["evaluate", "--profile", "smoke", "--weights", str(out / "model.safetensors"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["threshold"] == 0.0052 and numbers["empty_rows"] == "zero", "as it was trained"
    assert numbers["accuracy"] == report["test_accuracy"] and numbers["images"] == 32
    assert numbers["applied_sparsity"] > 0
    assert (
        main(["evaluate", "--profile", "smoke", "--weights", str(out / "model.safetensors"), "--dense", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["threshold"] is None


def test_a_learned_tau_goes_from_command_to_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, maps = tmp_path / "run", tmp_path / "maps.npz"
    command = ["train", "--profile", "smoke", "--steps", "2", "--learnable", "head", "--layers", "0", "2"]
    assert main([*command, "--empty-rows", "cap", "--ema", "0.9", "--out", str(out)]) == 0
    model, card = load_trained(out / "model.safetensors")
    assert list(sparse_modules(model)) == ["blocks.0.attn", "blocks.2.attn"]
    assert card["mean"] == [0.5] * 3 and card["std"] == [0.25] * 3 and card["label_names"][0] == "disc"
    evaluate = ["evaluate", "--profile", "smoke", "--weights", str(out / "model.safetensors"), "--json"]
    for more, expected in ([], "cap"), (["--empty-rows", "zero"], "zero"):
        capsys.readouterr()
        assert main([*evaluate, *more]) == 0
        numbers = json.loads(capsys.readouterr().out)
        assert (numbers["threshold"], numbers["empty_rows"]) == ("LearnableThreshold(per='head')", expected)
        assert more or numbers["accuracy"] == card["test_accuracy"]
    assert main([*evaluate, "--threshold", "0.1"]) == main([*evaluate, "--dense"]) == 2
    folder = str(save_trained(model, tmp_path / "folder", card))
    explain = ["explain", "--methods", "attention", "--no-overlays", "--indices", "0", "--out", str(maps)]
    assert main([*explain, "--checkpoint", folder]) == 0
    assert json.loads(str(np.load(maps)["metadata_json"]))["empty_rows"] == "cap"
    assert main([*explain, "--checkpoint", folder, "--num-classes", "7"]) == 2
    assert "the checkpoint has 10 classes" in capsys.readouterr().err


def test_a_trained_model_at_another_image_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_model("small_vit", img_size=48)
    sparsify(model, RelativeThreshold(1.97), layers=[1])
    path = str(save_trained(model, tmp_path / "m.safetensors", {"data": "planted"}))
    for size in ([], ["--img-size", "64"]):
        assert main(["evaluate", "--profile", "smoke", "--weights", path, "--limit", "4", *size]) == 0
        assert "cut by RelativeThreshold(alpha=1.97), empty rows 'dense'" in capsys.readouterr().out
    assert main(["evaluate", "--profile", "smoke", "--weights", path, "--threshold", "0.1", "--limit", "4"]) == 0
    assert "1 layers, 3 heads" in capsys.readouterr().out, "the other layers stay dense"
    assert main(["evaluate", "--profile", "smoke", "--weights", path, "--model", "deit_tiny_patch16_224"]) == 2
    assert "m.safetensors holds a vit_tiny_patch16_224" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--profile", "smoke", "--threshold", "1.5"], "threshold must lie in"),
        (["train", "--profile", "smoke", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train", "--profile", "smoke", "--dense", "--threshold", "0.1"], "--dense goes neither with --threshold"),
        (["train", "--profile", "smoke", "--layers", "9"], "unknown layer 9"),
        (["train", "--profile", "smoke", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["train", "--profile", "smoke", "--seed", "-1"], "seed must lie in"),
        (["evaluate", "--profile", "smoke", "--weights", "absent"], "no shipped checkpoint 'absent'"),
        (["evaluate", "--profile", "smoke", "--weights", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_bad_options_end_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "train":
        arguments = [*arguments, "--out", str(tmp_path)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "examples:" in capsys.readouterr().out
