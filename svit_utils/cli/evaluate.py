"""`python -m svit_utils evaluate`: accuracy and sparsity of a checkpoint, as it is or cut at another tau."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from svit_utils.cli.train import (
    add_profile_arguments,
    add_threads_argument,
    add_threshold_arguments,
    chosen_profile,
    set_threads,
)

EXAMPLES = """examples:
  python -m svit_utils evaluate                         the profile's start, dense
  python -m svit_utils evaluate --threshold 0.01        the same weights, cut without training
  python -m svit_utils evaluate --weights runs/latest/model.safetensors
                                                        a run of `train`, with the tau it was trained with"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command. Where the help names no default, the profile's value is used."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add_profile_arguments(parser)
    add_threshold_arguments(parser.add_argument_group("the cut (default: as the checkpoint was trained, else none)"))
    how = parser.add_argument_group("how")
    how.add_argument("--split", choices=("val", "test"), default="test", help="which images (default: %(default)s)")
    how.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    how.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    how.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    how.add_argument(
        "--tracked", type=int, default=100, help="images the sparsity is measured on (default: %(default)s)"
    )
    add_threads_argument(how)
    how.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(options: argparse.Namespace) -> int:
    """Evaluate; 0, or 2 after a message where the input is at fault."""
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    from svit_utils.attention import TokenSparsityTracker, sparse_modules
    from svit_utils.models import read_card
    from svit_utils.paths import checkpoints_dir
    from svit_utils.training import build_data, build_model, evaluate

    set_threads(options)
    profile = chosen_profile(options)
    card: dict[str, str] = {}
    if profile.start.endswith(".safetensors"):
        card = read_card(profile.start)
    elif (
        profile.start not in ("scratch", "pretrained")
        and (path := checkpoints_dir() / f"{profile.start}.safetensors").is_file()
    ):
        card = read_card(path)
    profile = _as_trained(profile, card, options)
    data = build_data(profile)
    images = data.val if options.split == "val" else data.test
    classes = int(card.get("num_classes") or len(getattr(data.train, "classes", range(10))))
    trained_sparse = card.get("threshold", "None") not in ("", "None")
    sparse = not options.dense and (options.threshold is not None or trained_sparse)
    layers = json.loads(card["layers"]) if sparse and card.get("layers", "None") not in ("", "None") else None
    learnable = card.get("learnable", "None")
    learned = learnable != "None" and learnable != ""
    if learned and (options.dense or options.threshold is not None):
        raise ValueError("this checkpoint has a learned tau of its own; it goes neither with --dense nor --threshold")
    if learned:
        # The learned tau is among the weights, so the model is cut first and loaded then.
        from svit_utils.models import load_weights

        start = profile.start
        model = build_model(
            replace(profile, start="scratch"), sparse=True, num_classes=classes, learnable=learnable, layers=layers
        )
        load_weights(model, start)
    else:
        model = build_model(profile, sparse=sparse, num_classes=classes, layers=layers)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    result = evaluate(
        model, images, batch_size=options.batch_size, precision=options.precision, limit=options.limit, progress=True
    )
    numbers: dict[str, Any] = {
        "model": profile.model,
        "start": profile.start,
        "data": profile.data,
        "split": options.split,
        "images": result.n,
        "threshold": profile.threshold if sparse else None,
        "empty_rows": profile.empty_rows if sparse else None,
        "accuracy": result.accuracy,
        "loss": result.loss,
    }
    summary = None
    if sparse_modules(model) and options.tracked > 0:
        with TokenSparsityTracker(model) as tracker:
            evaluate(model, images, batch_size=options.batch_size, limit=min(options.tracked, result.n))
        summary = tracker.summary()
        names = ("cut_sparsity", "applied_sparsity", "empty_rate", "kept_mass", "effective_support")
        numbers |= {name: getattr(summary, name) for name in names}
    if options.json:
        print(json.dumps(numbers, indent=2))
        return 0
    how = f"cut at tau = {profile.threshold:g}, empty rows {profile.empty_rows!r}" if sparse else "dense"
    print(f"{profile.model} from {profile.start}, {how}")
    print(
        f"{profile.data}, {options.split}: {result.accuracy:.2%} of {result.n} images, cross-entropy {result.loss:.4f}"
    )
    if summary is not None:
        print(summary)
    return 0


def _as_trained(profile: Any, card: dict[str, str], options: argparse.Namespace) -> Any:
    """What the checkpoint's card says, where no option says otherwise."""
    from dataclasses import replace

    given = {
        "data": options.data,
        "model": options.model,
        "img_size": options.img_size,
        "threshold": options.threshold,
        "empty_rows": options.empty_rows,
    }
    kinds = {"img_size": int, "threshold": float}
    recorded = {
        name: kinds.get(name, str)(card[name])
        for name, value in given.items()
        if value is None and card.get(name, "None") not in ("", "None")
    }
    return replace(profile, **recorded)
