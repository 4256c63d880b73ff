"""The four profiles: one name selects data, model, start, recipe and budget.

``SVIT_PROFILE`` names the one in force; without it, ``gpu`` where CUDA is available and ``cpu`` elsewhere.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from svit_utils.attention import NORMALISERS, LearnableThreshold, sparsify
from svit_utils.data import PlantedShapes, cifar10, image_folder, preprocessing
from svit_utils.data.transforms import Preprocessing
from svit_utils.models import SMALL_VIT, create_model, load_embedded, load_weights, pretrained_config
from svit_utils.training.config import TrainConfig

log = logging.getLogger(__name__)

CIFAR10_TRAIN = 45_000  # images, see `svit_utils.data.cifar10`


class DataSplits(NamedTuple):
    """Train to fit, val to choose, test to report."""

    train: Dataset
    val: Dataset
    test: Dataset


@dataclass(frozen=True)
class Profile:
    """What is trained on what, from where, and how.

    Attributes:
        name: of the profile.
        summary: in one line.
        data: ``"planted"``, ``"cifar10"``, or a folder with the sub-folders train, val (and test) of class folders.
        model: name for `svit_utils.models.create_model`.
        img_size: pixels along a side.
        start: ``"scratch"``, ``"pretrained"`` (timm's weights, local or downloaded), a shipped checkpoint, or a
            ``.safetensors`` file.
        config: the recipe.
        threshold, empty_rows, normaliser: of the sparse model, see `svit_utils.sparsify`.
        augment: crop and flip the training images (PlantedShapes needs none: every picture is new).
        normalise: pixel statistics, as for `svit_utils.data.cifar10`; None for those that the model was pretrained
            with. PlantedShapes has statistics of its own.
        rho: PlantedShapes only: how often a picture's background belongs to its class, in training and validation. Test
            pictures always have rho = 0.
        val_images, test_images: how many are used, the first ones; None for all.
        takes: what has to be fetched and how long a run takes, where that is more than a few minutes.
    """

    name: str
    summary: str
    data: str
    model: str
    img_size: int
    start: str
    config: TrainConfig
    threshold: float = 0.01
    empty_rows: str = "dense"
    normaliser: str = "thresholded"
    augment: bool = False
    normalise: str | None = None
    rho: float = 0.0
    val_images: int | None = None
    test_images: int | None = None
    takes: str = ""

    def with_steps(self, steps: int) -> Profile:
        """The same recipe over another number of steps; the warm-ups keep their share of the run."""
        share = steps / self.config.steps
        warmups = {name: round(getattr(self.config, name) * share) for name in ("warmup_steps", "tau_warmup_steps")}
        return replace(self, config=replace(self.config, steps=steps, **warmups))

    def __str__(self) -> str:
        c = self.config
        cut = f"tau {self.threshold:g} raised over {c.tau_warmup_steps} steps, empty rows {self.empty_rows!r}"
        if self.normaliser != "thresholded":
            cut = f"{self.normaliser}, {cut}" if "threshold" in self.taken else self.normaliser
        return (
            f"profile {self.name}: {self.summary}\n"
            f"  data {self.data}, model {self.model} at {self.img_size} px, start {self.start}\n"
            f"  {c.steps} steps of {c.batch_size * c.grad_accumulation} images, AdamW {c.lr:g} {c.schedule}, "
            f"{cut}" + (f"\n  takes {self.takes}" if self.takes else "")
        )

    @property
    def taken(self) -> set[str]:
        """Which of ``threshold`` and ``empty_rows`` the profile's normaliser takes."""
        return {"threshold", "empty_rows"} & set(inspect.signature(NORMALISERS[self.normaliser]).parameters)


CPU = Profile(
    "cpu",
    "embedded data and checkpoint, a minute or two on a laptop",
    data="planted",
    model=SMALL_VIT,
    img_size=56,
    start="planted_dense_start",
    config=TrainConfig(steps=60, batch_size=32, lr=5e-4, warmup_steps=3, tau_warmup_steps=30, log_every=5),
    val_images=500,
    test_images=1000,
)
SMOKE = replace(
    CPU,
    name="smoke",
    summary="seconds, for tests",
    start="scratch",
    config=TrainConfig(steps=4, batch_size=8, lr=1e-3, warmup_steps=1, tau_warmup_steps=2, log_every=1),
    val_images=32,
    test_images=32,
)
GPU_EPOCH = CIFAR10_TRAIN // 64  # steps
GPU = Profile(
    "gpu",
    "CIFAR-10 at 224 px, a pretrained ViT-Base, three epochs of the usual fine-tuning recipe",
    data="cifar10",
    model="vit_base_patch16_224",
    img_size=224,
    start="pretrained",
    config=TrainConfig(
        steps=3 * GPU_EPOCH,
        batch_size=64,
        lr=5e-5,
        warmup_steps=100,
        tau_warmup_steps=3 * GPU_EPOCH // 2,
        precision="bf16",
        num_workers=8,
        eval_every=GPU_EPOCH,
        checkpoint_every=GPU_EPOCH,
        log_every=50,
    ),
    augment=True,
    # 135,000 images forward and backward, at 3 x 35 billion operations each
    takes="CIFAR-10 (170 MB) and timm's weights (346 MB) from the network, once; 1.4e16 operations a run: estimated at "
    "minutes on an A100 or H100 and an hour or more on Colab's T4. SVIT_PROFILE=cpu takes a minute or two",
)
PAPER_EPOCH = CIFAR10_TRAIN // 16  # steps
# What the card leaves open is left at torch's defaults: weight decay 0.01, no clipping, no augmentation, no warm-up of
# either kind. Validation images are held out of the card's 50,000.
PAPER = replace(
    GPU,
    name="paper",
    summary="the published card's recipe to the letter: ViT-Base, 70 epochs of CIFAR-10 at 224 px",
    config=TrainConfig(
        steps=70 * PAPER_EPOCH,
        batch_size=16,
        lr=3e-4,
        weight_decay=0.01,
        schedule="cosine",
        clip_grad=None,
        num_workers=8,
        eval_every=10 * PAPER_EPOCH,
        checkpoint_every=PAPER_EPOCH,
        log_every=100,
    ),
    augment=False,
    takes="CIFAR-10 (170 MB) and timm's weights (346 MB) from the network, once; 3.3e17 operations a run: an hour or "
    "more on an A100 or H100, a day or more on smaller GPUs",
)
PROFILES = {profile.name: profile for profile in (SMOKE, CPU, GPU, PAPER)}


def get_profile(name: str | None = None) -> Profile:
    """The profile of that name; by default ``$SVIT_PROFILE``, else ``gpu`` with CUDA and ``cpu`` without.

    Raises:
        ValueError: unknown name.
    """
    source = "profile"
    if name is None:
        source = "SVIT_PROFILE"
        name = os.environ.get("SVIT_PROFILE") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in PROFILES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, PROFILES))}, got {name!r}")
    return PROFILES[name]


def build_data(profile: Profile, prepare: Preprocessing | None = None) -> DataSplits:
    """The profile's data, prepared as ``prepare`` says, by default as its model expects.

    Of CIFAR-10's small pictures nothing is cropped away: they are resized whole.

    Raises:
        DataNotFoundError, DamagedDataError: see `svit_utils.data`.
    """
    size = profile.img_size
    if profile.data == "planted":
        return DataSplits(
            PlantedShapes("train", img_size=size, rho=profile.rho),
            PlantedShapes("val", profile.val_images, img_size=size, rho=profile.rho),
            PlantedShapes("test", profile.test_images, img_size=size),
        )
    prepare = prepare or preprocessing(pretrained_config(profile.model), img_size=size, normalise=profile.normalise)
    source: Any = partial(image_folder, profile.data, prepare=prepare)
    if profile.data == "cifar10":
        source = partial(cifar10, img_size=prepare.size[0], normalise=(prepare.mean, prepare.std))
    train, val = source("train", augment=profile.augment), source("val")
    if profile.data == "cifar10" or (Path(profile.data) / "test").is_dir():
        test = source("test")
    else:
        log.warning("%s has no test/ folder: what is reported is on val/, which also chooses", profile.data)
        test = val
    return DataSplits(train, _first(val, profile.val_images), _first(test, profile.test_images))


def build_model(
    profile: Profile,
    *,
    sparse: bool = False,
    num_classes: int = 10,
    learnable: str | None = None,
    layers: list[int] | None = None,
    seed: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The profile's model at its start, dense or sparse.

    Args:
        profile: which model, start and threshold.
        sparse: put the profile's sparse attention in.
        num_classes: outputs.
        learnable: with ``sparse``, train tau ``"model"``-, ``"layer"``- or ``"head"``-wise from the profile's value.
        layers: with ``sparse``, only these blocks.
        seed: of new weights (the head at least); the recipe's by default.
        model_args: further arguments of `create_model`; not with a shipped checkpoint.

    Raises:
        WeightsError: the start is missing, damaged, or of another model.
    """
    torch.manual_seed(profile.config.seed if seed is None else seed)
    if profile.start in ("scratch", "pretrained") or profile.start.endswith(".safetensors"):
        size = None if profile.start == "pretrained" and profile.img_size == 224 else profile.img_size
        pretrained = profile.start == "pretrained"
        args = dict(model_args or {})
        model = create_model(profile.model, num_classes=num_classes, img_size=size, pretrained=pretrained, **args)
        if profile.start.endswith(".safetensors"):
            load_weights(model, profile.start)
    elif (profile.model, num_classes) == (SMALL_VIT, 10) and not model_args:
        model = load_embedded(profile.start)
    else:
        raise ValueError(
            f"the start {profile.start!r} is a {SMALL_VIT} with 10 classes, but the model is {profile.model} with "
            f"{num_classes}: use 'pretrained', 'scratch' or a .safetensors file"
        )
    if sparse:
        threshold = profile.threshold if learnable is None else LearnableThreshold(profile.threshold, per=learnable)
        sparsify(model, threshold, layers=layers, empty_rows=profile.empty_rows, normaliser=profile.normaliser)
    return model


def _first(dataset: Any, count: int | None) -> Dataset:
    return dataset if count is None or count >= len(dataset) else Subset(dataset, range(count))
