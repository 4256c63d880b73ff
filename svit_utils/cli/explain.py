"""`python -m svit_utils explain`: maps of a checkpoint for some images, as numbers, overlays and an overview."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_METHODS = ("attention", "attention_heads", "rollout", "grad_cam", "layer_grad_cam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; defaults explain three PlantedShapes test images."""
    model = parser.add_argument_group("which model")
    model.add_argument("--checkpoint", help="a shipped checkpoint's name, or a .safetensors file; none: random weights")
    model.add_argument(
        "--model", help="small_vit or a timm name (default: what the checkpoint's card says, else small_vit)"
    )
    model.add_argument("--num-classes", type=int, help="classes of the head (default: as the card says, else 10)")
    model.add_argument(
        "--img-size", type=int, help="side of the input in pixels (default: the card's, the model's own)"
    )
    model.add_argument("--pretrained", action="store_true", help="start from local pretrained weights of --model")
    model.add_argument(
        "--threshold", type=float, help="cut the attention at this tau (default: the one it was trained with, if any)"
    )
    model.add_argument(
        "--dense", action="store_true", help="do not cut, also where the checkpoint was trained with a cut"
    )
    model.add_argument(
        "--empty-rows",
        choices=("zero", "dense", "top1", "cap"),
        help="what a query without any key left gets (default: as trained, else dense)",
    )
    images = parser.add_argument_group("which images")
    images.add_argument("--images", nargs="+", type=Path, metavar="FILE", help="picture files; else PlantedShapes")
    images.add_argument("--normalise", default="imagenet", help="for files: imagenet, cifar10, half or none")
    images.add_argument("--indices", nargs="+", type=int, default=[0, 1, 2], help="of PlantedShapes (default: 0 1 2)")
    images.add_argument("--split", default="test", choices=("train", "val", "test"), help="of PlantedShapes")
    parser.add_argument(
        "--methods", nargs="+", default=["attention", "rollout", "grad_cam", "layer_grad_cam"], choices=_METHODS
    )
    parser.add_argument("--target", type=int, help="the class Grad-CAM explains (default: the predicted one)")
    parser.add_argument(
        "--out", type=Path, default=Path("maps.safetensors"), help=".safetensors or .npz (default: %(default)s)"
    )
    parser.add_argument("--no-overlays", action="store_true", help="write no picture per image and method")


def _load_model(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model as it was trained, or as the options say; and what cut it has."""
    from svit_utils import models
    from svit_utils.attention import LearnableThreshold, sparsify
    from svit_utils.paths import checkpoints_dir

    if options.dense and options.threshold is not None:
        raise ValueError("--dense does not go with --threshold")
    is_file = bool(options.checkpoint) and options.checkpoint.endswith(".safetensors")
    card: dict[str, str] = {}
    if is_file:
        card = models.read_card(options.checkpoint)
    elif options.checkpoint and (path := checkpoints_dir() / f"{options.checkpoint}.safetensors").is_file():
        card = models.read_card(path)
    card = {key: value for key, value in card.items() if value not in ("", "None")}
    threshold = options.threshold
    if threshold is None and not options.dense and "threshold" in card:
        threshold = float(card["threshold"])
    cut = {"threshold": threshold, "empty_rows": None}
    if threshold is not None:
        cut["empty_rows"] = options.empty_rows or card.get("empty_rows", "dense")
    learnable = card.get("learnable")
    if learnable and (options.dense or options.threshold is not None):
        raise ValueError("this checkpoint has a learned tau of its own; it goes neither with --dense nor --threshold")

    def cut_it(model: Any, tau: Any) -> None:
        layers = json.loads(card["layers"]) if "layers" in card and options.threshold is None else None
        sparsify(model, tau, layers=layers, empty_rows=cut["empty_rows"])

    if options.checkpoint and not is_file:
        model = models.load_embedded(options.checkpoint)
    else:
        size = options.img_size or (int(card["img_size"]) if "img_size" in card else None)
        model = models.create_model(
            options.model or card.get("model", models.SMALL_VIT),
            num_classes=options.num_classes or int(card.get("num_classes", 10)),
            img_size=size,
            pretrained=options.pretrained,
        )
        if learnable:  # the learned tau is among the weights
            cut_it(model, LearnableThreshold(threshold, per=learnable))
        if is_file:
            models.load_weights(model, Path(options.checkpoint))
    if threshold is not None and not learnable:
        cut_it(model, threshold)
    return model, cut


def _load_images(options: argparse.Namespace, side: tuple[int, int]) -> tuple[Any, Any, Any, list[str]]:
    """(normalised images, the same in [0, 1], masks or None, a label per image)."""
    import torch

    if not options.images:
        from svit_utils.data import PlantedShapes

        data = PlantedShapes(options.split, img_size=side[0])
        batch = data.batch(options.indices)
        return batch.images, data.denormalise(batch.images), batch.masks, [data.classes[i] for i in batch.labels]
    from PIL import Image
    from torchvision.transforms import functional as TF

    from svit_utils.data import normalisation

    mean, std = normalisation(options.normalise)
    pictures = []
    for path in options.images:
        if not path.is_file():
            raise ValueError(f"no such picture: {path}")
        with Image.open(path) as picture:
            pictures.append(TF.to_tensor(picture.convert("RGB").resize(side[::-1], Image.Resampling.BICUBIC)))
    shown = torch.stack(pictures)
    return TF.normalize(shown, list(mean), list(std)), shown, None, [path.stem[:16] for path in options.images]


def run(options: argparse.Namespace) -> int:
    """Write the maps; 0, or 2 after a message where the input is at fault."""
    try:
        return _run(options)
    except (ValueError, IndexError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    import torch

    from svit_utils.explain import explain_batch, export_maps
    from svit_utils.show import explanation_grid, figure_png

    if options.out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out must end in .safetensors or .npz, got {options.out.name!r}")
    model, cut = _load_model(options)
    model.eval()
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or options.img_size or 224
    side = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    images, shown, masks, labels = _load_images(options, side)
    with torch.no_grad():
        predicted = model(images).argmax(dim=-1).tolist()
    targets = predicted if options.target is None else [options.target] * len(images)
    maps = explain_batch(model, images, methods=options.methods, targets=targets)
    metadata = {
        "checkpoint": options.checkpoint,
        "model": type(model).__name__ if options.model is None else options.model,
        **cut,
        "images": [str(p) for p in options.images]
        if options.images
        else {"split": options.split, "indices": options.indices},
        "predicted": predicted,
        "targets": targets,
    }
    written = export_maps(options.out, maps, None if options.no_overlays else shown, metadata)
    grid = {name: value.mean(dim=1) if value.ndim == 4 else value for name, value in maps.items()}
    overview = options.out.with_name(options.out.stem + "_overview.png")
    overview.write_bytes(figure_png(explanation_grid(shown, grid, labels=labels, masks=masks)))
    how = "dense" if cut["threshold"] is None else f"cut at tau = {cut['threshold']:g}"
    print(f"{how}; {len(maps)} maps of {len(images)} images: {options.out}")
    print(
        f"overview: {overview}"
        + (f"; {len(written) - 1} overlays: {options.out.with_suffix('')}/" if written[1:] else "")
    )
    return 0
