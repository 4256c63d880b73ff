"""Maps of photographs scored against the masks of COCO's objects, picture by picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from research.photographs import finetuned
from research.photographs.pictures import COCO, MODEL
from research.rows import origin, replace_rows
from research.study.maps import attention_views, baseline_maps
from research.study.store import write_images
from svit_utils.attention import sparsify
from svit_utils.building import create_model
from svit_utils.data import CocoPicture, coco, preprocessing
from svit_utils.explain import grad_cam
from svit_utils.explain.grid import token_grid
from svit_utils.files import read_rows
from svit_utils.paths import data_dir
from svit_utils.referee import localisation_scores

CHUNK = 16  # pictures at a time
CUT = (0.0025, 0.005, 0.01)
TRAINED = ("dense", "tau0.01-warmed", "tau0.005-warmed")  # settings of `finetuned`, seed 0
MASKS = ("largest", "all")
OFF_CENTRE = 0.25  # of the side: further away from the middle, a mask is off-centre
BASELINES = "baselines"


@dataclass(frozen=True)
class Scene:
    """Photographs [B, 3, H, W] with their masks, bool [B, H, W], by name."""

    images: Tensor
    masks: dict[str, Tensor]

    def about(self) -> dict[str, np.ndarray]:
        """By mask, [B] each: the share of the picture that it covers, and whether it is off-centre (0 or 1)."""
        found = {}
        for name, mask in self.masks.items():
            found[f"{name}:share"] = mask.double().mean(dim=(1, 2)).numpy()
            found[f"{name}:off_centre"] = (distance(mask) > OFF_CENTRE).double().numpy()
        return found


def distance(masks: Tensor) -> Tensor:
    """How far the centre of mass of each mask [B, H, W] is from the picture's middle, in sides: [B]."""
    height, width = masks.shape[-2:]
    weight = masks.double() / masks.sum(dim=(1, 2), keepdim=True)
    down = (weight.sum(dim=2) * ((torch.arange(height) + 0.5) / height - 0.5)).sum(dim=1)
    right = (weight.sum(dim=1) * ((torch.arange(width) + 0.5) / width - 0.5)).sum(dim=1)
    return torch.hypot(down, right)


def scene(pictures: Sequence[CocoPicture]) -> Scene:
    """Those of the pictures in which an object is left after the crop."""
    kept = [picture for picture in pictures if len(picture.masks)]
    masks = {"largest": [p.largest() for p in kept], "all": [p.everything() for p in kept]}
    return Scene(torch.stack([p.image for p in kept]), {name: torch.stack(each) for name, each in masks.items()})


def model_maps(model: nn.Module, x: Tensor, drawn: Sequence[float] = ()) -> dict[str, Tensor]:
    """Attention, rollout and Grad-CAM of the predicted class [B, h, w] by name.

    With ``drawn``, attention and rollout drawn through the cut at each of these tau as well.
    """
    found = {**attention_views(model, x, None)[0], "grad_cam": grad_cam(model, x)}
    for tau in drawn:
        views = attention_views(model, x, tau)[0]
        found |= {f"{name}_drawn{tau:g}": views[f"{name}_displayed"] for name in ("attention", "rollout")}
    return found


def scored(maps: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Every score of each map against each mask: ``mask:map:metric`` to [B]."""
    return {
        f"{what}:{name}:{metric}": values.numpy()
        for what, mask in masks.items()
        for name, each in maps.items()
        for metric, values in localisation_scores(each, mask).items()
    }


def model_scores(model: nn.Module, seen: Scene, drawn: Sequence[float] = ()) -> dict[str, np.ndarray]:
    """`scored` of `model_maps`, some pictures at a time."""
    parts = []
    for start in range(0, len(seen.images), CHUNK):
        window = slice(start, start + CHUNK)
        maps = model_maps(model, seen.images[window], drawn)
        parts.append(scored(maps, {name: mask[window] for name, mask in seen.masks.items()}))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def cut(tau: float) -> Callable[[], nn.Module]:
    """Builds DeiT-Tiny cut at ``tau`` without training."""

    def build() -> nn.Module:
        model = create_model(MODEL, pretrained=True).eval()
        sparsify(model, tau)
        return model

    return build


def models() -> dict[str, Callable[[], nn.Module | None]]:
    """Every model of the plan by name; None where it is trained and its weights are not here."""
    settings = {setting.name: setting for setting in finetuned.SETTINGS}
    found: dict[str, Callable[[], nn.Module | None]] = {"dense": lambda: create_model(MODEL, pretrained=True).eval()}
    for name in TRAINED:
        found[f"{name}-trained"] = lambda name=name: finetuned.finetuned_model(settings[name], 0)  # type: ignore[misc]
    return found | {f"tau{tau:g}": cut(tau) for tau in CUT}


def write_maps(out: Path) -> Path:
    """Score what is missing in ``maps.csv`` in ``out``: a row a model, its scores by picture in ``images/``.

    A model whose weights are not here is left out, and said. Raises as
    `research.photographs.thresholds.write_thresholds`; ImportError without pycocotools.
    """
    path = out / "maps.csv"
    names = [BASELINES, *models()]
    missing = [name for name in names if name not in {row["model"] for row in read_rows(path)}]
    if not missing:
        return path
    dense = create_model(MODEL, pretrained=True).eval()
    data = coco(data_dir() / COCO, prepare=preprocessing(dense))
    seen = scene([data[place] for place in range(len(data))])
    for name in missing:
        started = time.time()
        model = None if name == BASELINES else models()[name]()
        if name == BASELINES:
            size = token_grid(dense, seen.images[:1]).size
            scores = seen.about() | scored(baseline_maps(seen.images, size), seen.masks)
        elif model is None:
            print(f"{name}: not trained here, left out", flush=True)
            continue
        else:
            scores = model_scores(model, seen, CUT if name == "dense" else ())
        write_images(out / "images" / f"{name}.csv.gz", scores)
        row: dict[str, Any] = {"model": name, "pictures": len(seen.images), "listed": len(data)}
        row |= {"seconds": round(time.time() - started, 1), **origin()}
        replace_rows(path, [row], key=("model",), order=lambda row: names.index(row["model"]), columns=row)
        print(f"{name}: {len(seen.images)} pictures, {row['seconds']:.0f} s", flush=True)
    return path
