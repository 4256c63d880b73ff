"""`save_trained` here, `load_trained` in another process: the same model, for every threshold and normaliser."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import svit_utils
from svit_utils.attention import (
    EMPTY_ROWS,
    FixedThreshold,
    LearnableThreshold,
    RelativeThreshold,
    SparseAttention,
    densify,
    learnable_thresholds,
    sparse_modules,
    sparsified,
    sparsify,
)
from svit_utils.attention.normalisers import NORMALISERS, TopK
from svit_utils.attention.surgery import describe_sparsity
from svit_utils.models import WeightsError, create_model, load_trained, read_card, save_trained, save_weights
from svit_utils.paths import checkpoints_dir

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
VIT = "vit_tiny_patch16_224"
THRESHOLDS: dict[str, Callable[[], Any]] = {
    "fixed": lambda: 0.03,
    "per head": lambda: FixedThreshold([0.0, 0.03, 0.1]),
    "relative": lambda: RelativeThreshold(0.7),
    "learnable per model": lambda: LearnableThreshold(0.03, per="model"),
    "learnable per layer": lambda: LearnableThreshold(0.03, per="layer"),
    "learnable per head": lambda: LearnableThreshold(0.03, per="head"),
}


def build(name: str = VIT, **arguments: Any) -> nn.Module:
    """A small random model whose attention is sharp enough for the thresholds above to cut a part of the keys."""
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, **arguments}) if name != "small_vit" else create_model(name, 5, 32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight")):
                parameter[: 2 * parameter.shape[0] // 3 if "qkv" in key else None] *= 12
            elif "gamma" in key.rpartition(".")[2]:
                parameter.fill_(1.0)  # layer scale starts near 0 and would hide the attention
        heads = model.get_classifier()  # type: ignore[operator]
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.weight.normal_(std=0.2)
    return model


def trained(model: nn.Module) -> nn.Module:
    """The model with every learned tau moved away from its start, as training would."""
    with torch.no_grad():
        for threshold in learnable_thresholds(model).values():
            threshold.logit += torch.linspace(0.1, 0.5, threshold.logit.numel()).view_as(threshold.logit)
    return model


def sparse(model: nn.Module, threshold: Any = 0.03, **settings: Any) -> nn.Module:
    sparsify(model, threshold, **settings)
    return trained(model)


def warming_up() -> nn.Module:
    model = sparse(build(), LearnableThreshold(0.1, per="model"), empty_rows="cap")
    for module in sparse_modules(model).values():
        module.threshold.set_warmup(0.25)
    return model


def one_after_the_other() -> nn.Module:
    """A layer of each kind, and one dense."""
    model = build(depth=4)
    sparsify(model, FixedThreshold([0.0, 0.03, 0.1]).set_warmup(0.5), layers=[0], normaliser="hard_cut")
    sparsify(model, LearnableThreshold(0.02, per="head"), layers=[1], empty_rows="top1", backend="tiled")
    sparsify(model, layers=[3], normaliser=TopK(k=5))
    return trained(model)


@dataclass
class Case:
    make: Callable[[], nn.Module]
    folder: bool = False
    needs: str = "torch"


CASES: dict[str, Case] = {}
for kind, threshold in THRESHOLDS.items():
    for normaliser in ("thresholded", "hard_cut"):
        for mode in EMPTY_ROWS:
            CASES[f"{normaliser}, {kind}, {mode}"] = Case(
                lambda t=threshold, n=normaliser, m=mode: sparse(build(), t(), normaliser=n, empty_rows=m)
            )
    CASES[f"clipped, {kind}"] = Case(lambda t=threshold: sparse(build(), t(), normaliser="clipped"))
    CASES[f"folder, {kind}"] = Case(lambda t=threshold: sparse(build(), t(), empty_rows="cap"), folder=True)
CASES["topk"] = Case(lambda: sparse(build(), 0.01, normaliser=TopK(k=5)))
CASES["entmax15"] = Case(lambda: sparse(build(), 0.01, normaliser="entmax15"), needs="entmax")
CASES["sparsemax"] = Case(lambda: sparse(build(), 0.01, normaliser="sparsemax"), needs="entmax")
CASES["dense"] = Case(build)
CASES["dense folder"] = Case(build, folder=True)
CASES["small_vit"] = Case(lambda: sparse(build("small_vit")))
CASES["a threshold for each of two layers"] = Case(lambda: sparse(build(), {0: 0.05, "blocks.2": RelativeThreshold(1)}))
CASES["only the last layer"] = Case(lambda: sparse(build(), LearnableThreshold(0.05, per="head"), layers=[-1]))
CASES["one kind after the other"] = Case(one_after_the_other, folder=True)
CASES["warming up"] = Case(warming_up)
CASES["distilled"] = Case(lambda: sparse(build("deit_tiny_distilled_patch16_224")), folder=True)
CASES["registers"] = Case(lambda: sparse(build("vit_small_patch14_reg4_dinov2"), LearnableThreshold(0.03)), folder=True)
CASES["EVA with rope"] = Case(lambda: sparse(build("eva02_tiny_patch14_224"), LearnableThreshold(0.03, per="model")))
CASES["rope"] = Case(lambda: sparse(build("vit_small_patch16_rope_224"), RelativeThreshold(0.7)), folder=True)
CASES["other arguments"] = Case(
    lambda: sparse(build(qk_norm=True, class_token=False, global_pool="avg", act_layer="relu"))
)
CASES["drop rates"] = Case(lambda: sparse(build(drop_rate=0.1, drop_path_rate=0.1, attn_drop_rate=0.1)))
CASES["bfloat16"] = Case(lambda: sparse(build("eva02_tiny_patch14_224"), LearnableThreshold(0.03)).bfloat16())
CASES["two dtypes"] = Case(lambda: mixed_dtypes())
CASES = {name: case for name, case in CASES.items() if importlib.util.find_spec(case.needs)}


def mixed_dtypes() -> nn.Module:
    model = sparse(build())
    model.norm.double()
    model.head.double()
    model.norm.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return model


LOADER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from svit_utils import load_trained
from svit_utils.attention.surgery import describe_sparsity

torch.set_num_threads(1)
x, outputs, found = load_file(sys.argv[1])["x"], {}, {}
for name, path in json.loads(open(sys.argv[2]).read()).items():
    model, card = load_trained(path)
    if name == "two dtypes":
        model.norm.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    with torch.no_grad():
        outputs[name] = model(x.to(next(model.parameters()).dtype))
    found[name] = {"card": card, "attention": describe_sparsity(model), "training": model.training}
save_file(outputs, sys.argv[3])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Every case saved here and loaded in one other process: (what it says of each, its outputs, the input)."""
    folder = tmp_path_factory.mktemp("trained")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    paths = {}
    for number, (name, case) in enumerate(CASES.items()):
        path = folder / (f"{number}" if case.folder else f"{number}.safetensors")
        paths[name] = str(save_trained(case.make(), path, {"steps": number}))
    save_file({"x": x}, folder / "x")
    (folder / "paths").write_text(json.dumps(paths))
    command = [sys.executable, "-c", LOADER, str(folder / "x"), str(folder / "paths"), str(folder / "outputs")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(svit_utils.__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), load_file(folder / "outputs"), x


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x.to(next(model.parameters()).dtype))


@pytest.mark.parametrize("name", CASES)
def test_a_model_comes_back_in_another_process(name: str, elsewhere: tuple[Any, Any, Tensor]) -> None:
    found, outputs, x = elsewhere
    model = CASES[name].make()
    assert torch.equal(outputs[name], run(model, x))
    description = describe_sparsity(model)
    assert found[name]["attention"] == description == found[name]["card"]["attention"]
    assert found[name]["card"]["steps"] == list(CASES).index(name) and not found[name]["training"]
    if "dense" not in (name, name.removesuffix(" folder")):
        assert not torch.equal(outputs[name], run(densify(copy.deepcopy(model)), x)), "the cut has to matter here"


def test_all_kinds_are_among_the_cases() -> None:
    described = json.dumps([describe_sparsity(case.make()) for case in CASES.values()])
    optional = {"entmax15", "sparsemax"} - set(CASES)
    missing = [name for name in NORMALISERS if f'"name": "{name}"' not in described and name not in optional]
    assert not missing, f"CASES has no model with the normaliser {missing}"


def test_a_shared_threshold_is_still_shared(tmp_path: Path) -> None:
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        save_trained(sparse(build(), LearnableThreshold(0.03, per="model")), path)
        model, _ = load_trained(path)
        assert len(learnable_thresholds(model)) == 1 and len({m.threshold for m in sparse_modules(model).values()}) == 1


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.folder])
def test_timm_loads_the_folder(case: str, tmp_path: Path) -> None:
    """Dense, since timm knows no thresholds."""
    model = CASES[case].make()
    folder = save_trained(model, tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
    assert torch.equal(loaded, run(densify(model), x))


def test_the_card(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "elk"]
    given = {"steps": 7, "accuracy": 0.5, "note": None, "label_names": names, "mean": [0.5] * 3, "std": [0.25] * 3}
    model = sparse(build())
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        save_trained(model, path, given | {"crop_pct": 0.8, "interpolation": "bilinear", "architecture": "ignored"})
        loaded, card = load_trained(path)
        assert card.items() >= given.items() and card == read_card(path)
        assert (card["crop_pct"], card["interpolation"], card["crop_mode"]) == (0.8, "bilinear", "center")
        assert (card["architecture"], card["num_classes"], card["input_size"]) == (VIT, 5, [3, 32, 32])
        assert card["model_args"]["embed_dim"] == 24
        data = timm.data.resolve_data_config(model=loaded)  # what timm's transforms are made from
        assert list(data["mean"]) == [0.5] * 3 and data["crop_pct"] == 0.8
        assert list(loaded.pretrained_cfg["label_names"]) == names
        again = save_trained(loaded, tmp_path / "again.safetensors", card)
        assert read_card(again) == card
        assert read_card(save_trained(loaded, again))["label_names"] == names


def test_the_old_file_stays_where_saving_fails(tmp_path: Path) -> None:
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        save_trained(build(), path, {"steps": 1})
        with pytest.raises(ValueError, match="'where' of card cannot be written as JSON"):
            save_trained(build(), path, {"where": Path("x")})
        assert read_card(path)["steps"] == 1
        save_trained(build(), path, {"steps": 2})
        assert read_card(path)["steps"] == 2
    assert not list(tmp_path.rglob("*partial*"))


def test_neither_saving_nor_loading_draws_random_numbers(tmp_path: Path) -> None:
    model = sparse(build())
    before = torch.get_rng_state()
    load_trained(save_trained(model, tmp_path / "a.safetensors"))
    assert torch.equal(torch.get_rng_state(), before)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    model = sparse(build(), LearnableThreshold(0.03))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model), ModelEmaV3(model)):
        loaded, _ = load_trained(save_trained(wrapped, tmp_path / "a.safetensors"))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert describe_sparsity(loaded) == describe_sparsity(model)


def test_a_resized_model_and_a_new_head(tmp_path: Path) -> None:
    model = sparse(build())
    model.set_input_size(img_size=48)
    model.reset_classifier(3)
    loaded, card = load_trained(save_trained(model, tmp_path / "a.safetensors"))
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(run(loaded, x), run(model, x))
    assert card["num_classes"] == 3 and card["input_size"] == [3, 48, 48]


def bare() -> nn.Module:
    return VisionTransformer(**SMALL)


def with_another_head() -> nn.Module:
    model = build()
    model.head = nn.Linear(24, 7)
    return model


def with_another_activation() -> nn.Module:
    model = build()
    model.blocks[1].mlp.act = nn.ReLU()
    return model


def with_a_class_as_argument() -> nn.Module:
    return build(act_layer=nn.ReLU)


class Own:
    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=-1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (bare, {}, "VisionTransformer does not say which timm model it is .* pass architecture='<timm name>'"),
        (bare, {"architecture": "vit_bse"}, "'vit_bse'"),
        (bare, {"architecture": VIT}, "another model than this one: .*Pass the architecture and the model_args"),
        (with_another_head, {}, r"head.weight, \(7, 24\) for \(5, 24\)"),
        (with_another_activation, {}, r"blocks.1.mlp.act is a ReLU"),
        (with_a_class_as_argument, {}, "'act_layer' of model_args cannot be written as JSON"),
        (build, {"card": {"label_names": ["a"]}}, "label_names has 1 names, but the model has 5 classes"),
        (lambda: sparse(build(), 0.01, normaliser=Own()), {}, "cannot be saved by name"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_trained(make(), tmp_path / "a.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_architecture_and_arguments_can_be_given(tmp_path: Path) -> None:
    model = bare()
    path = save_trained(model, tmp_path / "a.safetensors", architecture=VIT, model_args=SMALL)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(run(load_trained(path)[0], x), run(model, x))
    model = with_a_class_as_argument()
    path = save_trained(model, path, model_args={"act_layer": "relu"})
    assert torch.equal(run(load_trained(path)[0], x), run(model, x))
    model = build(attn_layer=SparseAttention)  # None leaves it out: the card's attention says the same
    path = save_trained(model, path, model_args={"attn_layer": None})
    assert torch.equal(run(load_trained(path)[0], x), run(model, x))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("something else")
    with pytest.raises(
        ValueError, match=r"model is a file: give a name ending in .safetensors, or the name of a folder"
    ):
        save_trained(build(), tmp_path / "model")


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The card of a file or folder with a change."""
    file = path / "config.json"
    if path.is_dir():
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))
    else:
        state = load_file(path)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as opened:
            config = json.loads(opened.metadata()["card"])
        change(config)
        save_file(state, path, {"card": json.dumps(config)})


@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_what_cannot_be_loaded_says_why(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(WeightsError, match=f"no model can be read from .*{name}: .*[Nn]o such file"):
        load_trained(path)

    def refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
        save_trained(sparse(build()), path)
        rewritten(path, change)
        with pytest.raises(WeightsError, match=message):
            load_trained(path)

    newer = r"was written by a newer svit_utils \(card format 2, known here up to 1\): update it"
    refused(lambda config: config["svit_utils"].update(format=2), newer)
    refused(lambda config: config.pop("svit_utils"), "has no card, and a plain state dict has no thresholds")
    refused(lambda config: config.update(svit_utils=3), "no model can be read from")
    refused(lambda config: config.pop("architecture"), r"cannot be rebuilt .*KeyError: 'architecture'")
    refused(lambda config: config.update(architecture="vit_of_2030"), "cannot be rebuilt .*vit_of_2030")
    refused(
        lambda config: config["model_args"].update(depth=4), "are not those of the model in its card: tensors .*miss"
    )

    def another(config: dict[str, Any]) -> None:
        layer = config["svit_utils"]["attention"]["layers"]["blocks.0.attn"]
        layer["normaliser"]["name"] = "softermax"

    refused(another, "cannot be rebuilt .*softermax")
    save_trained(build(), path)
    weights = path / "model.safetensors" if path.is_dir() else path
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(WeightsError, match=r"is damaged|no model can be read"):
        load_trained(path)


def test_weights_alone_are_refused(tmp_path: Path) -> None:
    path = save_weights(sparse(build()), tmp_path / "w.safetensors", {"steps": "7"})
    with pytest.raises(
        WeightsError, match=r"a plain state dict has no thresholds: build the model .* sparsify it yourself"
    ):
        load_trained(path)
    assert read_card(path) == {"steps": "7"}


@pytest.mark.parametrize("name", ["planted_dense_seed0", "planted_sparse_seed0"])
def test_shipped_checkpoints_come_back_as_they_were_trained(name: str) -> None:
    model, card = load_trained(checkpoints_dir() / f"{name}.safetensors")
    assert card["data"] == "planted" and not model.training
    expected = svit_utils.models.load_embedded(name)
    x = torch.randn(1, 3, 56, 56)
    assert len(sparse_modules(model)) == (4 if "sparse" in name else 0)
    with sparsified(expected, 0.01 if "sparse" in name else 0.0):
        assert torch.allclose(run(model, x), run(expected, x), atol=1e-5)
