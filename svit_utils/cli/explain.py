"""`python -m svit_utils explain`: maps of a checkpoint for some images, as numbers, overlays and an overview."""

import argparse
from pathlib import Path
from typing import Any

from svit_utils.cli import options as shared

USUAL = ("attention", "rollout", "grad_cam", "layer_grad_cam")
METHODS = (  # those of `svit_utils.explain`, which would take seconds to import
    "attention",
    "attention_heads",
    "rollout",
    "grad_cam",
    "layer_grad_cam",
    "gradient_attention",
    "gradient_rollout",
    "relevance",
    "occlusion",
    "integrated_gradients",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; defaults explain three PlantedShapes test images."""
    model = parser.add_argument_group("which model")
    model.add_argument("--checkpoint", help="a shipped checkpoint, or a saved file or folder")
    model.add_argument("--model", help="small_vit or a timm name (default: as the card says, else small_vit)")
    model.add_argument("--num-classes", type=int, help="classes of the head (default: as the card or model says)")
    model.add_argument("--img-size", type=int, help="side of the input in pixels (default: as the card or model says)")
    start = "start from pretrained weights of --model (default: where there are any, and no --checkpoint)"
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help=start)
    shared.add_threshold_arguments(parser.add_argument_group("the cut (default: as it was trained, else none)"))
    images = parser.add_argument_group("which images")
    files = "picture files (transparent parts become white); else PlantedShapes"
    images.add_argument("--images", nargs="+", type=Path, metavar="FILE", help=files)
    masks = "score the maps against the objects of a file in COCO's format: of --images, else of all that it lists"
    images.add_argument("--masks", metavar="ANNOTATIONS", help=f"{masks} (no overlays are written then)")
    shared.add_picture_arguments(images)
    images.add_argument(
        "--indices", nargs="+", type=int, default=[0, 1, 2], help="PlantedShapes images (default: 0 1 2)"
    )
    images.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="PlantedShapes images (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", default=USUAL, choices=METHODS, help=f"(default: {' '.join(USUAL)})")
    parser.add_argument(
        "--target",
        type=int,
        help="the class to explain (default: the predicted one); attention and rollout are the same for every class",
    )
    out = Path("maps.safetensors")
    parser.add_argument("--out", type=Path, default=out, help=".safetensors or .npz (default: %(default)s)")
    parser.add_argument("--no-overlays", action="store_true", help="write no picture per image and method")


def _load_model(options: argparse.Namespace) -> tuple[Any, dict[str, Any], str]:
    """(model, card, description): as it was trained, or as the options say; the card is empty for weights without."""
    from svit_utils import models

    if options.dense and options.threshold is not None:
        raise ValueError("--dense does not go with --threshold")
    if options.checkpoint and options.pretrained:
        raise ValueError("--pretrained goes with --model, not with --checkpoint")
    trained = shared.open_trained(options.checkpoint, options)
    if trained is not None:
        if options.num_classes not in (None, found := trained[0].num_classes):
            raise ValueError(f"the checkpoint has {found} classes, but --num-classes is {options.num_classes}")
        return *trained, options.checkpoint
    if options.checkpoint and not options.checkpoint.endswith(".safetensors"):
        return models.load_embedded(options.checkpoint), {}, options.checkpoint  # says which there are
    name, pretrained = options.model or models.SMALL_VIT, options.pretrained
    if pretrained is None:
        pretrained = not options.checkpoint and bool(models.pretrained_config(name).get("has_weights"))
    model = models.create_model(name, options.num_classes, options.img_size, pretrained)
    if options.checkpoint:
        models.load_weights(model, options.checkpoint)
    shared.change_attention(model, options)
    return model, {}, f"{name}, {options.checkpoint or ('pretrained' if pretrained else 'new: random weights')}"


def _load_images(options: argparse.Namespace, prepare: Any) -> tuple[Any, Any, Any, list[str]]:
    """(normalised images, the same in [0, 1], masks or None, a label per image)."""
    import torch

    if not options.images:
        from svit_utils.data import PlantedShapes

        data = PlantedShapes(options.split, img_size=prepare.size[0])
        batch = data.batch(options.indices)
        return batch.images, data.denormalise(batch.images), batch.masks, [data.classes[i] for i in batch.labels]
    from svit_utils.data.pictures import read_picture

    transform = prepare.transform()
    images = torch.stack([transform(read_picture(path)) for path in options.images])
    return images, prepare.denormalise(images), None, [path.stem[:16] for path in options.images]


def _class_names(model: Any, card: dict[str, Any]) -> list[str]:
    """A name per class: the card's, ImageNet's for timm's models with that many classes, else the numbers."""
    names = card.get("label_names")
    if names is None and card.get("data") == "planted":
        from svit_utils.data import PlantedShapes

        names = PlantedShapes("test", 1).classes
    if names is None and model.num_classes == 1000 == (getattr(model, "pretrained_cfg", None) or {}).get("num_classes"):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        names = [info.index_to_description(i).split(",")[0] for i in range(info.num_classes())]
    return [f"class {i}" for i in range(model.num_classes)] if names is None else list(names)


def run(options: argparse.Namespace) -> int:
    """Write the maps; 0, or 2 after a message where the input is at fault."""
    # IndexError: --indices out of range; ImportError: --masks without pycocotools
    return shared.exit_status(_run, options, (ValueError, OSError, IndexError, ImportError))


def _run(options: argparse.Namespace) -> None:
    import torch

    from svit_utils.data import preprocessing
    from svit_utils.explain import explain
    from svit_utils.show import explanation_grid, export_maps, figure_png

    if options.out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out must end in .safetensors or .npz, got {options.out.name!r}")
    model, card, described = _load_model(options)
    model.eval()
    if not 0 <= (options.target or 0) < model.num_classes:
        raise ValueError(f"--target must lie in 0 to {model.num_classes - 1}, got {options.target}")
    threshold, empty_rows = shared.describe_attention(model)
    if options.masks is not None:
        from svit_utils.cli.masks import score_masks

        prepare = preprocessing(model, card, **shared.picture_options(options))
        maps, lines = score_masks(options, model, prepare)
        print(f"{described}, {model.num_classes} classes", *lines, sep="\n")
        print(f"{shared.as_sentence(threshold)}; {len(maps)} maps: {options.out}")
        return
    images, shown, masks, labels = _load_images(options, preprocessing(model, card, **shared.picture_options(options)))
    with torch.no_grad():
        chances = model(images).float().softmax(dim=-1)
    predicted = chances.argmax(dim=-1).tolist()
    targets = predicted if options.target is None else [options.target] * len(images)
    maps = {method: explain(model, images, method, targets) for method in options.methods}
    names = _class_names(model, card)
    metadata = {
        "checkpoint": options.checkpoint,
        "model": type(model).__name__ if options.model is None else options.model,
        "threshold": threshold,
        "empty_rows": empty_rows,
        "images": list(map(str, options.images or [])) or {"split": options.split, "indices": options.indices},
        "predicted": predicted,
        "predicted_names": [names[k] for k in predicted],
        "probabilities": chances.amax(dim=-1).tolist(),
        "targets": targets,
    }
    written = export_maps(options.out, maps, None if options.no_overlays else shown, metadata)
    grid = {name: value.mean(dim=1) if value.ndim == 4 else value for name, value in maps.items()}
    overview = options.out.with_name(options.out.stem + "_overview.png")
    overview.write_bytes(figure_png(explanation_grid(shown, grid, labels=labels, masks=masks)))
    print(f"{described}, {model.num_classes} classes")
    for place, label in enumerate(
        options.images or [f"{options.split} {i} ({n})" for i, n in zip(options.indices, labels)]
    ):
        chance, other = chances[place, targets[place]], targets[place] != predicted[place]
        explained = f"; explained: {names[targets[place]]} ({chance:.1%})" if other else ""
        print(f"{label}: {names[predicted[place]]} ({chances[place].max():.1%}){explained}")
    print(f"{shared.as_sentence(threshold)}; {len(maps)} maps of {len(images)} images: {options.out}")
    overlays = f"; {len(written) - 1} overlays: {options.out.with_suffix('')}/" if written[1:] else ""
    print(f"overview: {overview}{overlays}")
