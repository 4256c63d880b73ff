"""`python -m svit_utils explain`: maps of a checkpoint for some images, as numbers, overlays and an overview."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_METHODS = ("attention", "attention_heads", "rollout", "grad_cam", "layer_grad_cam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; defaults explain three PlantedShapes test images."""
    model = parser.add_argument_group("which model")
    model.add_argument("--checkpoint", help="a shipped checkpoint's name, or a .safetensors file; none: random weights")
    model.add_argument(
        "--model", default="small_vit", help="small_vit or a timm name; used with a file or no checkpoint"
    )
    model.add_argument("--num-classes", type=int, default=10, help="classes of the head (default: %(default)s)")
    model.add_argument("--img-size", type=int, help="side of the input in pixels (default: the model's own)")
    model.add_argument("--pretrained", action="store_true", help="start from local pretrained weights of --model")
    model.add_argument("--threshold", type=float, help="cut the attention at this tau; none: the model as it is loaded")
    model.add_argument(
        "--empty-rows",
        default="dense",
        choices=("zero", "dense", "top1", "cap"),
        help="with --threshold: what a query without any key left gets (default: %(default)s)",
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


def _load_model(options: argparse.Namespace) -> Any:
    from svit_utils import models

    if options.checkpoint and not options.checkpoint.endswith(".safetensors"):
        return models.load_embedded(options.checkpoint)
    model = models.create_model(
        options.model, num_classes=options.num_classes, img_size=options.img_size, pretrained=options.pretrained
    )
    if options.checkpoint:
        models.load_weights(model, Path(options.checkpoint))
    return model


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
    except (ValueError, IndexError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    import torch

    from svit_utils.attention import sparsify
    from svit_utils.explain import explain_batch, export_maps
    from svit_utils.show import explanation_grid, figure_png

    if options.out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out must end in .safetensors or .npz, got {options.out.name!r}")
    model = _load_model(options).eval()
    if options.threshold is not None:
        sparsify(model, options.threshold, empty_rows=options.empty_rows)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or options.img_size or 224
    side = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    images, shown, masks, labels = _load_images(options, side)
    with torch.no_grad():
        predicted = model(images).argmax(dim=-1).tolist()
    targets = predicted if options.target is None else [options.target] * len(images)
    maps = explain_batch(model, images, methods=options.methods, targets=targets)
    metadata = {
        "checkpoint": options.checkpoint,
        "model": options.model,
        "threshold": options.threshold,
        "empty_rows": options.empty_rows if options.threshold is not None else None,
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
    print(f"{len(maps)} maps of {len(images)} images: {options.out}")
    print(
        f"overview: {overview}"
        + (f"; {len(written) - 1} overlays: {options.out.with_suffix('')}/" if written[1:] else "")
    )
    return 0
