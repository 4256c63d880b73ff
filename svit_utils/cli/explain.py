"""`python -m svit_utils explain`: maps of a checkpoint for some images, as numbers, overlays and an overview."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from svit_utils.cli import options as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; defaults explain three PlantedShapes test images."""
    from svit_utils.explain import METHODS

    model = parser.add_argument_group("which model")
    model.add_argument("--checkpoint", help="a shipped checkpoint, or a saved file or folder (default: random weights)")
    model.add_argument("--model", help="small_vit or a timm name (default: as the card says, else small_vit)")
    model.add_argument("--num-classes", type=int, help="classes of the head (default: as the card says, else 10)")
    model.add_argument("--img-size", type=int, help="side of the input in pixels (default: as the card or model says)")
    model.add_argument("--pretrained", action="store_true", help="start from local pretrained weights of --model")
    shared.add_threshold_arguments(parser.add_argument_group("the cut (default: as it was trained, else none)"))
    images = parser.add_argument_group("which images")
    images.add_argument("--images", nargs="+", type=Path, metavar="FILE", help="picture files; else PlantedShapes")
    statistics = "for files: imagenet, cifar10, half or none (default: as the card says, else imagenet)"
    images.add_argument("--normalise", help=statistics)
    images.add_argument(
        "--indices", nargs="+", type=int, default=[0, 1, 2], help="PlantedShapes images (default: 0 1 2)"
    )
    images.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="PlantedShapes images (default: %(default)s)"
    )
    usual = [name for name in METHODS if name != "attention_heads"]
    parser.add_argument("--methods", nargs="+", default=usual, choices=METHODS, help=f"(default: {' '.join(usual)})")
    parser.add_argument("--target", type=int, help="the class Grad-CAM explains (default: the predicted one)")
    out = Path("maps.safetensors")
    parser.add_argument("--out", type=Path, default=out, help=".safetensors or .npz (default: %(default)s)")
    parser.add_argument("--no-overlays", action="store_true", help="write no picture per image and method")


def _load_model(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(model, card): as it was trained, or as the options say; the card is empty for weights without one."""
    from svit_utils import models

    if options.dense and options.threshold is not None:
        raise ValueError("--dense does not go with --threshold")
    trained = shared.open_trained(options.checkpoint, options)
    if trained is not None:
        if options.num_classes not in (None, found := trained[0].num_classes):
            raise ValueError(f"the checkpoint has {found} classes, but --num-classes is {options.num_classes}")
        return trained
    if options.checkpoint and not options.checkpoint.endswith(".safetensors"):
        return models.load_embedded(options.checkpoint), {}  # says which there are
    name, classes = options.model or models.SMALL_VIT, options.num_classes or 10
    model = models.create_model(name, classes, options.img_size, options.pretrained)
    if options.checkpoint:
        models.load_weights(model, options.checkpoint)
    shared.change_attention(model, options)
    return model, {}


def _load_images(
    options: argparse.Namespace, side: tuple[int, int], card: dict[str, Any]
) -> tuple[Any, Any, Any, list[str]]:
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

    own = (card["mean"], card["std"]) if "mean" in card else "imagenet"
    mean, std = normalisation(options.normalise or own)
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
    return shared.exit_status(_run, options, (ValueError, OSError, IndexError))  # the last: --indices out of range


def _run(options: argparse.Namespace) -> None:
    import torch

    from svit_utils.explain import explain_batch
    from svit_utils.show import explanation_grid, export_maps, figure_png

    if options.out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out must end in .safetensors or .npz, got {options.out.name!r}")
    model, card = _load_model(options)
    model.eval()
    threshold, empty_rows = shared.describe_attention(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or options.img_size
    size = size or card.get("input_size", [224])[-1]
    side = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    images, shown, masks, labels = _load_images(options, side, card)
    with torch.no_grad():
        predicted = model(images).argmax(dim=-1).tolist()
    targets = predicted if options.target is None else [options.target] * len(images)
    maps = explain_batch(model, images, methods=options.methods, targets=targets)
    metadata = {
        "checkpoint": options.checkpoint,
        "model": type(model).__name__ if options.model is None else options.model,
        "threshold": threshold,
        "empty_rows": empty_rows,
        "images": list(map(str, options.images or [])) or {"split": options.split, "indices": options.indices},
        "predicted": predicted,
        "targets": targets,
    }
    written = export_maps(options.out, maps, None if options.no_overlays else shown, metadata)
    grid = {name: value.mean(dim=1) if value.ndim == 4 else value for name, value in maps.items()}
    overview = options.out.with_name(options.out.stem + "_overview.png")
    overview.write_bytes(figure_png(explanation_grid(shown, grid, labels=labels, masks=masks)))
    print(f"{shared.as_sentence(threshold)}; {len(maps)} maps of {len(images)} images: {options.out}")
    overlays = f"; {len(written) - 1} overlays: {options.out.with_suffix('')}/" if written[1:] else ""
    print(f"overview: {overview}{overlays}")
