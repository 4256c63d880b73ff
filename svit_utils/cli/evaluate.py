"""`python -m svit_utils evaluate`: accuracy and sparsity of a checkpoint, as it was trained or at another tau."""

import argparse
import json
from typing import Any

from svit_utils.cli import options as shared

EXAMPLES = """examples:
  python -m svit_utils evaluate                         the profile's start, dense
  python -m svit_utils evaluate --threshold 0.01        the same weights, cut without training
  python -m svit_utils evaluate --weights runs/latest/model.safetensors
                                                        a run of `train`, with the tau it was trained with"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command. Where the help names no default, the profile's value is used."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    shared.add_profile_arguments(parser)
    shared.add_threshold_arguments(
        parser.add_argument_group("the cut (default: as the checkpoint was trained, else none)")
    )
    shared.add_picture_arguments(parser.add_argument_group("the pictures of a folder"))
    how = parser.add_argument_group("how")
    how.add_argument("--split", choices=("val", "test"), default="test", help="which images (default: %(default)s)")
    how.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    how.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    how.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    tracked = "images the sparsity is measured on (default: %(default)s)"
    how.add_argument("--tracked", type=int, default=100, help=tracked)
    shared.add_threads_argument(how)
    how.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(options: argparse.Namespace) -> int:
    """Evaluate; 0, or 2 after a message where the input is at fault."""
    return shared.exit_status(_run, options)


def _run(options: argparse.Namespace) -> None:
    import torch

    from svit_utils.attention import TokenSparsityTracker
    from svit_utils.training import evaluate

    if options.batch_size < 1 or options.tracked < 0:
        raise ValueError("--batch-size must be at least 1 and --tracked at least 0")
    shared.set_threads(options)
    profile, model, data = _opened(options)
    images = data.val if options.split == "val" else data.test
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    result = evaluate(
        model, images, batch_size=options.batch_size, precision=options.precision, limit=options.limit, progress=True
    )
    threshold, empty_rows = shared.describe_attention(model)
    numbers = {name: getattr(profile, name) for name in ("model", "start", "data")}
    numbers |= {"split": options.split, "images": result.n, "threshold": threshold, "empty_rows": empty_rows}
    numbers |= {"accuracy": result.accuracy, "loss": result.loss}
    summary = None
    if threshold is not None and options.tracked > 0:
        with TokenSparsityTracker(model) as tracker:
            evaluate(model, images, batch_size=options.batch_size, limit=min(options.tracked, result.n))
        summary = tracker.summary()
        names = ("cut_sparsity", "applied_sparsity", "empty_rate", "kept_mass", "effective_support")
        numbers |= {name: getattr(summary, name) for name in names}
    if options.json:
        print(json.dumps(numbers, indent=2))
        return
    how = shared.as_sentence(threshold) + ("" if empty_rows is None else f", empty rows {empty_rows!r}")
    print(f"{profile.model} from {profile.start}, {how}")
    accuracy = f"{result.accuracy:.2%} of {result.n} images, cross-entropy {result.loss:.4f}"
    print(f"{profile.data}, {options.split}: {accuracy}")
    if summary is not None:
        print(summary)


def _opened(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(profile, model, data): the model as it was trained, or as the profile and the options say."""
    from svit_utils.data import preprocessing
    from svit_utils.models import pretrained_config
    from svit_utils.training import build_data, build_model

    profile = shared.chosen_profile(options)
    trained = shared.open_trained(profile.start, options)
    asked = shared.picture_options(options)
    if trained is None:
        asked |= {"img_size": profile.img_size, "normalise": options.normalise or profile.normalise}
        data = build_data(profile, preprocessing(pretrained_config(profile.model), **asked))
        classes = len(getattr(data.train, "classes", range(10)))
        cut = options.threshold is not None or options.normaliser is not None
        if options.empty_rows is not None and not cut:
            raise ValueError("--empty-rows needs a cut: give --threshold, too")
        return profile, build_model(profile, sparse=cut, num_classes=classes), data
    model, card = trained
    profile = _as_trained(profile, card, options)
    data = build_data(profile, preprocessing(model, card, **asked))
    classes = len(getattr(data.train, "classes", range(10)))
    if classes != model.num_classes:
        raise ValueError(f"{profile.start} has {model.num_classes} classes, but {profile.data} has {classes}")
    return profile, model, data


def _as_trained(profile: Any, card: dict[str, Any], options: argparse.Namespace) -> Any:
    """The profile with the data, model and image size of the checkpoint, unless an option differs."""
    from dataclasses import replace

    size = card.get("input_size", [card.get("img_size")])[-1]
    changes = {
        "model": card.get("model", card.get("architecture")),
        "data": options.data or card.get("data"),
        "img_size": options.img_size or (size and int(size)),
    }
    return replace(profile, **{name: value for name, value in changes.items() if value})
