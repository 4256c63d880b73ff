"""What must be the same for a run to go on, found by changing it: each change is refused, and named.

Resuming into one folder with other blocks frozen or other drop rates used to return the old run as finished; the
situation is that of reports from users of timm and accelerate who changed a script and kept its output folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from svit_utils.attention import LearnableThreshold, sparsify
from svit_utils.data import PlantedShapes, image_folder
from svit_utils.training import CheckpointError, Evaluation, TrainConfig, evaluate, train
from svit_utils.training.fingerprint import about_data, fingerprint

CONFIG = TrainConfig(steps=4, batch_size=4, lr=1e-2, checkpoint_every=2, log_every=1)


def micro_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(3)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(**options | kwargs)


def frozen(*prefixes: str, **kwargs: Any) -> VisionTransformer:
    model = micro_vit(**kwargs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(prefixes)
    return model


def sparse(threshold: Any, **settings: Any) -> VisionTransformer:
    model = micro_vit()
    sparsify(model, threshold, **settings)
    return model


def images(seed: int = 5, n: int = 24, scale: float = 1.0, shift: float = 0.0) -> TensorDataset:
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x * scale + shift, torch.arange(n) % 4)


def relabelled(*places: int) -> TensorDataset:
    x, labels = images().tensors
    labels = labels.clone()
    labels[list(places)] = (labels[list(places)] + 1) % 4
    return TensorDataset(x, labels)


def run(folder: Path, model: nn.Module, data: Any = None, config: TrainConfig = CONFIG, val: Any = None) -> Any:
    return train(model, data or images(), val, config, out_dir=folder, progress=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "another block frozen": (
        lambda: frozen("blocks.0"),
        lambda: frozen("blocks.1"),
        "frozen was blocks.0 and is blocks.1",
    ),
    "a block less frozen": (lambda: frozen("blocks"), lambda: frozen("blocks.0"), "frozen was blocks and is blocks.0"),
    "nothing frozen": (lambda: frozen("pos_embed"), micro_vit, "frozen was pos_embed and is nothing"),
    "frozen now": (
        micro_vit,
        lambda: frozen("patch_embed", "cls_token"),
        "frozen was nothing and is patch_embed, cls_token",
    ),
    "only the head": (
        lambda: frozen("blocks", "norm"),
        lambda: frozen("blocks"),
        "frozen was blocks, norm and is blocks",
    ),
    "one bias": (lambda: frozen("head.bias"), micro_vit, "frozen was head.bias and is nothing"),
    "drop rate": (micro_vit, lambda: micro_vit(drop_rate=0.1), "drop rates was none and is .*Dropout.p=0.1"),
    "other drop rate": (
        lambda: micro_vit(drop_rate=0.2),
        lambda: micro_vit(drop_rate=0.1),
        "drop rates was .*0.2 and is",
    ),
    "attention dropout": (micro_vit, lambda: micro_vit(attn_drop_rate=0.1), "drop rates was none"),
    "projection dropout": (micro_vit, lambda: micro_vit(proj_drop_rate=0.1), "drop rates was none"),
    "patch dropout": (micro_vit, lambda: micro_vit(patch_drop_rate=0.5), "drop rates was none"),
    "drop path": (
        micro_vit,
        lambda: micro_vit(drop_path_rate=0.1),
        "drop rates was none and is .*DropPath.drop_prob=0.1",
    ),
    "a fine drop path": (
        lambda: micro_vit(drop_path_rate=0.1),
        lambda: micro_vit(drop_path_rate=0.1001),
        "drop_prob=0.1 and is .*0.1001",
    ),
    "heads": (micro_vit, lambda: micro_vit(num_heads=4), "modules was"),
    "activation": (micro_vit, lambda: micro_vit(act_layer=nn.ReLU), "modules was"),
    "epsilon": (micro_vit, lambda: with_epsilon(1e-3), "modules was"),
    "tau": (lambda: sparse(0.1), lambda: sparse(0.2), "model was"),
    "learned tau": (lambda: sparse(0.1), lambda: sparse(LearnableThreshold(0.1)), "model was"),
    "empty rows": (lambda: sparse(0.1), lambda: sparse(0.1, empty_rows="top1"), "model was"),
    "layers": (lambda: sparse(0.1), lambda: sparse(0.1, layers=[1]), "model was"),
    "normaliser": (lambda: sparse(0.1), lambda: sparse(0.1, normaliser="hard_cut"), "model was"),
}


def with_epsilon(eps: float) -> nn.Module:
    model = micro_vit()
    model.norm.eps = eps
    return model


@pytest.mark.parametrize("case", MODELS)
def test_another_model_is_refused_and_named(tmp_path: Path, case: str) -> None:
    first, second, message = MODELS[case]
    run(tmp_path, first())
    with pytest.raises(CheckpointError, match=f"belongs to another run: .*{message}"):
        run(tmp_path, second())
    assert run(tmp_path, first()).steps == CONFIG.steps


class Looked(Dataset):
    """A data set around another one, without anything of its own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class Computed(Dataset):
    """Nothing is kept: images and labels are made when they are asked for."""

    def __init__(self, seed: int, classes: int = 4) -> None:
        self.seed, self.classes = seed, classes

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(self.seed * 100 + index))
        return image, index % self.classes


class Augmented(Computed):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + torch.rand(()) + float(np.random.rand()), label  # noqa: NPY002


DATA: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "other images": (images, lambda: images(seed=6), "the images of the first batch are others"),
    "other normalisation": (images, lambda: images(scale=1.1), "the images of the first batch are others"),
    "other mean": (images, lambda: images(shift=0.2), "the images of the first batch are others"),
    "one label": (images, lambda: relabelled(23), "labels was"),
    "all labels": (images, lambda: relabelled(*range(24)), "labels was"),
    "fewer": (images, lambda: images(n=20), "images was 24 and is 20"),
    "another part": (
        lambda: Subset(images(n=48), range(24)),
        lambda: Subset(images(n=48), range(23, 47)),
        "labels was",
    ),
    "another part, labels alike": (
        lambda: Subset(images(n=48), range(24)),
        lambda: Subset(images(n=48), range(24, 48)),
        "the images of the first batch",
    ),
    "looked through": (lambda: Looked(images()), lambda: Looked(relabelled(3)), "labels was"),
    "computed": (lambda: Computed(1), lambda: Computed(2), "the images of the first batch"),
    "computed labels": (lambda: Computed(1), lambda: Computed(1, classes=3), "the labels of the first batch"),
    "augmented": (lambda: Computed(1), lambda: Augmented(1), "the images of the first batch"),
    "augmented otherwise": (lambda: Augmented(1), lambda: Augmented(2), "the images of the first batch"),
    "joined": (
        lambda: ConcatDataset([images(n=12), images(6, n=12)]),
        lambda: ConcatDataset([images(n=12), images(7, n=12)]),
        "the images of the first batch",
    ),
    "planted, other backgrounds": (
        lambda: PlantedShapes("train", 24, img_size=16),
        lambda: PlantedShapes("train", 24, img_size=16, rho=0.9),
        "data settings was .*rho=0.0.* and is .*rho=0.9",
    ),
    "planted, other seed": (
        lambda: PlantedShapes("train", 24, img_size=16),
        lambda: PlantedShapes("train", 24, img_size=16, seed=1),
        "data settings was .*seed=0.* and is .*seed=1",
    ),
}


def fitting(data: Any) -> nn.Module:
    return micro_vit(img_size=16, num_classes=10) if isinstance(data, PlantedShapes) else micro_vit()


@pytest.mark.parametrize("case", DATA)
def test_other_data_are_refused_and_named(tmp_path: Path, case: str) -> None:
    first, second, message = DATA[case]
    run(tmp_path, fitting(first()), first())
    with pytest.raises(CheckpointError, match=f"belongs to another run: .*{message}"):
        run(tmp_path, fitting(second()), second())
    assert run(tmp_path, fitting(first()), first()).steps == CONFIG.steps


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two folders with the same names and other pictures, and the first one again elsewhere, coded otherwise."""
    base = tmp_path_factory.mktemp("pictures")
    for name, seed, quality in (("a", 0, 95), ("b", 1, 95), ("moved", 0, 94)):
        generator = np.random.default_rng(seed)
        for number in range(24):
            small = Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8))
            path = base / name / "train" / f"class{number % 4}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small.resize((24, 24), Image.Resampling.BICUBIC).save(path, quality=quality)
    return base / "a", base / "b", base / "moved"


FOLDERS: dict[str, tuple[int, dict[str, Any], str]] = {
    "pictures": (1, {}, "the images of the first batch"),
    "augmentation": (0, {"augment": True}, "data settings was .*CenterCrop.* and is .*RandomResizedCrop"),
    "normalisation": (0, {"normalise": "half"}, "data settings was .*0.485.* and is .*0.5"),
    "own normalisation": (0, {"normalise": ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))}, "data settings was"),
    "crop": (0, {"crop_pct": 1.0}, "data settings was"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_other_pictures_in_folders_are_refused(tmp_path: Path, folders: Any, case: str) -> None:
    which, options, message = FOLDERS[case]
    run(tmp_path, micro_vit(), image_folder(folders[0], "train", img_size=8))
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, micro_vit(), image_folder(folders[which], "train", img_size=8, **options))


def test_the_same_pictures_elsewhere_are_the_same(tmp_path: Path, folders: Any) -> None:
    """Another folder, and decoders that differ in the last bits, do not make another data set."""
    run(tmp_path, micro_vit(), image_folder(folders[0], "train", img_size=8))
    run(tmp_path, micro_vit(), image_folder(folders[2], "train", img_size=8))


@pytest.mark.parametrize(
    "data", [images, lambda: Looked(images()), lambda: Augmented(1), lambda: Subset(images(), range(24))]
)
def test_the_same_data_go_on(tmp_path: Path, data: Callable[[], Any]) -> None:
    whole, parts = micro_vit(), micro_vit()
    run(tmp_path / "whole", whole, data())
    run(tmp_path / "parts", micro_vit(), Stops(data()))
    run(tmp_path / "parts", parts, data())
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))


class Stops(Looked):
    """Nothing: looked through."""


def test_nothing_more_is_read_at_a_fresh_start(tmp_path: Path) -> None:
    """A data set may be slow, or count: the identity costs a fresh run no image."""
    read: list[int] = []

    class Counting(Looked):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    run(tmp_path, micro_vit(), Counting(images()))
    assert len(read) == CONFIG.steps * CONFIG.batch_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bf16"}, "precision was fp32 and is bf16"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"mixup": 0.2}, "mixup was 0.0 and is 0.2"),
        ({"ema_decay": 0.9}, "ema_decay was None and is 0.9"),
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"steps": 8}, "steps was 4 and is 8"),
    ],
)
def test_another_recipe_is_refused_and_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run(tmp_path, micro_vit())
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, micro_vit(), config=replace(CONFIG, **change))


@pytest.mark.parametrize("change", [{"checkpoint_every": 1}, {"log_every": 4}, {"num_workers": 1}])
def test_what_does_not_change_the_result_may_change(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path, micro_vit())
    assert run(tmp_path, micro_vit(), config=replace(CONFIG, **change)).steps == CONFIG.steps


def test_another_validation_set_is_refused(tmp_path: Path) -> None:
    run(tmp_path, micro_vit(), val=images(n=8))
    with pytest.raises(CheckpointError, match=r"validation was \[8, .* and is \[12"):
        run(tmp_path, micro_vit(), val=images(n=12))


def test_an_older_checkpoint_says_so(tmp_path: Path) -> None:
    """One that was written before drop rates, frozen parameters and labels were noted."""
    run(tmp_path, micro_vit())
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    new = ("frozen", "drop rates", "modules", "labels", "data settings", "validation")
    state["fingerprint"] = json.dumps({k: v for k, v in json.loads(state["fingerprint"]).items() if k not in new})
    del state["sample"]
    torch.save(state, path)
    with pytest.raises(
        CheckpointError, match=r"an older version wrote it, which did not note drop rates, frozen, labels\. "
    ):
        run(tmp_path, micro_vit())
    with pytest.raises(CheckpointError, match=r"older version .*, and lr differ.* resume=False"):
        run(tmp_path, micro_vit(), config=replace(CONFIG, lr=1.0))


def test_the_fingerprint_is_the_same_in_each_process() -> None:
    """No addresses, no order of a set: only then can another process find it equal."""
    texts = {fingerprint(frozen("blocks.0", drop_rate=0.1), CONFIG, 24, 1, images(), images(n=8)) for _ in range(3)}
    assert len(texts) == 1 and "0x" not in texts.pop()
    assert about_data(Computed(1)) == {"labels": None, "data settings": None}


class Half(nn.Module):
    """A frozen half that stays in eval mode, and one that is trained."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4))
        self.fails = fails
        self.body.eval()

    def forward(self, x: Any) -> Any:
        assert not any(module.training for module in self.modules())
        if self.fails:
            raise ZeroDivisionError
        return self.head(self.body(x))


@pytest.mark.parametrize("fails", [False, True])
def test_evaluate_gives_each_module_its_mode_back(fails: bool) -> None:
    model = Half(fails)
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    if fails:
        with pytest.raises(ZeroDivisionError):
            evaluate(model, images())
    else:
        assert isinstance(evaluate(model, images()), Evaluation)
    assert [module.training for module in model.modules()] == before
