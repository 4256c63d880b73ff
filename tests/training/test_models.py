"""Models by name, their weights on the disk, profiles, provenance, and the two commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from svit_utils.__main__ import main
from svit_utils.attention import RelativeThreshold, sparse_modules, sparsify
from svit_utils.data import preprocessing
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


@pytest.mark.parametrize(
    "changes", [{"in_chans": 1}, {"in_chans": 4}, {"patch_size": 8}, {"in_chans": 2, "patch_size": 32}]
)
@pytest.mark.parametrize("size", [None, 96])
def test_local_weights_are_adapted_as_timm_does(
    changes: dict[str, int], size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = timm.create_model(TINY)
    save_file(source.state_dict(), tmp_path / f"{TINY}.safetensors")
    expected = timm.create_model(
        TINY, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / f"{TINY}.safetensors")}, **changes
    )
    if size is not None:
        expected.set_input_size(img_size=size)
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))
    model = create_model(TINY, pretrained=True, img_size=size, **changes)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    x = torch.randn(1, changes.get("in_chans", 3), *model.patch_embed.img_size)
    assert torch.equal(model.eval()(x), expected.eval()(x))
    save_trained(model, tmp_path / "again.safetensors")


def test_local_weights_of_another_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(timm.create_model("test_vit2").state_dict(), tmp_path / f"{TINY}.safetensors")
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))
    for changes in ({}, {"in_chans": 1}):
        with pytest.raises(WeightsError, match=rf"{TINY}\.safetensors holds another model than {TINY}"):
            create_model(TINY, pretrained=True, **changes)


PREFIXES = ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_of_wrapped_models_load(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model(TINY)
    state = source.state_dict()
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / f"{TINY}.safetensors")
    model = timm.create_model(TINY)
    load_weights(model, tmp_path / f"{TINY}.safetensors")
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", str(tmp_path))
    for loaded in (model, create_model(TINY, pretrained=True)):
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
    assert create_model(TINY, pretrained=True, in_chans=1).patch_embed.proj.weight.shape[1] == 1


def test_compiled_models_save_and_load_under_plain_names(tmp_path: Path) -> None:
    model, other = create_model("small_vit"), create_model("small_vit")
    compiled, wrapped = torch.compile(model), torch.nn.DataParallel(other)
    path = save_weights(compiled, tmp_path / "w.safetensors")
    load_weights(torch.compile(wrapped), path)
    assert torch.equal(other.head.weight, model.head.weight)
    model.blocks[1] = torch.compile(model.blocks[1])  # one block only
    save_file(model.state_dict(), tmp_path / "block.safetensors")
    fresh = create_model("small_vit")
    load_weights(fresh, tmp_path / "block.safetensors")
    assert torch.equal(fresh.blocks[1].attn.qkv.weight, other.blocks[1].attn.qkv.weight)
    fresh.blocks[2] = torch.compile(fresh.blocks[2])
    load_weights(fresh, path)
    assert torch.equal(fresh.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": "x"}, "timm cannot build swin_tiny_patch4_window7_224 with"),
        (TINY, {"nonsense": 4}, f"timm cannot build {TINY} with .*nonsense"),
        (TINY, {"img_size": 0}, "img_size must be at least 1, got 0"),
        (TINY, {"num_classes": -1}, "num_classes must be at least 0, got -1"),
    ],
)
def test_impossible_models_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)  # type: ignore[arg-type]
    assert create_model("resnet18", 10, 64)(torch.zeros(1, 3, 64, 64)).shape == (1, 10), "any size"


def test_a_model_by_name_has_its_own_size_and_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from svit_utils.cli.options import chosen_profile

    def chosen(**given: object) -> tuple[str, int, str]:
        names = ("data", "model", "img_size", "weights", "threshold", "empty_rows")
        options = argparse.Namespace(profile="cpu", dense=False, **dict.fromkeys(names) | given)
        found = chosen_profile(options)
        return found.model, found.img_size, found.start

    assert chosen() == ("small_vit", 56, "planted_dense_start") == chosen(model="small_vit")
    assert chosen(model="deit_tiny_patch16_224") == ("deit_tiny_patch16_224", 224, "pretrained")
    assert chosen(model="vit_tiny_patch16_384", img_size=96, weights="scratch")[1:] == (96, "scratch")
    with pytest.raises(ValueError, match="unknown model 'nope'"):
        chosen(model="nope")


def test_evaluate_prepares_pictures_as_explain_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red within the crop, blue around it: a model that tells the two apart sees red only."""
    for name in ("ant", "bee"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        picture = Image.new("RGB", (112, 112), "blue")
        picture.paste((255, 0, 0), (28, 28, 84, 84))
        picture.save(tmp_path / "data" / "val" / name / "1.png")
        picture.save(tmp_path / "data" / "val" / name / "2.png")
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "train")
    (tmp_path / "data" / "val").symlink_to(tmp_path / "data" / "train")
    card = {"label_names": ["ant", "bee"], "mean": [0.1] * 3, "std": [0.3] * 3, "crop_pct": 0.5}
    path = save_trained(create_model("small_vit", 2), tmp_path / "m.safetensors", card)
    losses = []
    for options in ([], ["--crop-pct", "1.0"], ["--normalise", "half"]):
        command = ["evaluate", "--profile", "smoke", "--weights", str(path), "--data", str(tmp_path / "data"), "--json"]
        assert main([*command, *options]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    model, read = load_trained(path)
    x = preprocessing(model, read).transform()(Image.open(tmp_path / "data/train/ant/1.png").convert("RGB"))[None]
    assert x[0, 2].max() < 0, "no blue"
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x).expand(2, 2), torch.tensor([0, 1]))
    assert losses[0] == pytest.approx(float(expected), rel=1e-5) and len({round(v, 6) for v in losses}) == 3
    (tmp_path / "data" / "train" / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / "cat" / "1.png")
    assert main(command) == 2 and "has 2 classes, but" in capsys.readouterr().err
    (tmp_path / "data" / "train" / "cat" / "1.png").write_bytes(b"broken")
    assert main(["evaluate", "--profile", "smoke", "--weights", "scratch", "--data", str(tmp_path / "data")]) == 2
    assert "cat/1.png" in capsys.readouterr().err


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
        (["train", "--profile", "smoke", "--model", "resnet18", "--weights", "scratch"], "ResNet"),
        (["train", "--profile", "smoke", "--model", "nope"], "unknown model 'nope'"),
        (["evaluate", "--profile", "smoke", "--model", "nope"], "unknown model 'nope'"),
        (["evaluate", "--profile", "smoke", "--model", "resnet18", "--weights", "planted_dense_seed0"], "resnet18"),
        (
            ["evaluate", "--profile", "smoke", "--threshold", "0.1", "--model", "resnet18", "--weights", "scratch"],
            "ResNet",
        ),
        (["evaluate", "--profile", "smoke", "--weights", "scratch", "--img-size", "57"], "multiple of 4"),
        (["evaluate", "--profile", "smoke", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["evaluate", "--profile", "smoke", "--limit", "0"], "limit must be at least 1"),
        (["evaluate", "--profile", "smoke", "--data", __file__], "is a file, not a folder of pictures"),
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


def test_a_gpu_runtime_gets_its_profile_by_itself_and_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVIT_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = str(get_profile())
    assert said.startswith("profile gpu") and "170 MB" in said and "346 MB" in said and "SVIT_PROFILE=cpu" in said
    parameters = sum(p.numel() for p in create_model("vit_base_patch16_224").parameters())
    assert round(4e-6 * parameters) == 346  # MB in float32
    operations = 6 * parameters * 197 * PROFILES["gpu"].config.steps * PROFILES["gpu"].config.batch_size
    assert operations == pytest.approx(1.4e16, rel=0.05)  # two a weight and token forward, four backward
    assert "takes" not in str(PROFILES["cpu"])  # what chapter 3 shows without a GPU stays as it was
