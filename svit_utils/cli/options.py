"""What the commands share: groups of options, and what the options do to a model."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Which profile, data and model."""
    what = parser.add_argument_group("what")
    sets = "data, model, start, recipe and budget (default: $SVIT_PROFILE, else gpu with CUDA and cpu without)"
    what.add_argument("--profile", choices=("smoke", "cpu", "gpu", "paper"), help=sets)
    what.add_argument("--data", help="planted (generated), cifar10, or a folder with train/, val/ (and test/) inside")
    model = "small_vit, or a timm name such as deit_tiny_patch16_224: at its own size, from its pretrained weights"
    what.add_argument("--model", help=model)
    what.add_argument("--img-size", type=int, metavar="PIXELS", help="side of the images")
    starts = "pretrained, scratch, a shipped checkpoint's name, or a .safetensors file"
    what.add_argument("--weights", metavar="START", help=starts)


def add_threshold_arguments(group: Any) -> None:
    """Dense or sparse, and with which threshold."""
    group.add_argument("--threshold", type=float, metavar="TAU", help="cut attention weights up to this, in [0, 1)")
    group.add_argument("--dense", action="store_true", help="do not cut at all")
    rules = "what a query gets when no key survives: nothing, its uncut weights, its largest key, or a lower tau"
    group.add_argument("--empty-rows", choices=("zero", "dense", "top1", "cap"), help=rules)


def add_picture_arguments(group: Any) -> None:
    """How picture files are prepared, where it differs from what the model's configuration or card says."""
    statistics = "pixel statistics: imagenet, cifar10, half or none (default: the model's)"
    group.add_argument("--normalise", metavar="NAME", help=statistics)
    group.add_argument("--crop-pct", type=float, metavar="SHARE", help="share of the side that the centre crop keeps")
    group.add_argument("--interpolation", metavar="NAME", help="bicubic, bilinear, ... (default: the model's)")


def picture_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_picture_arguments` that were given, and the image size, as `preprocessing` takes them."""
    return {name: getattr(options, name) for name in ("img_size", "normalise", "crop_pct", "interpolation")}


def add_threads_argument(group: Any) -> None:
    """How many processor threads."""
    count = "processor threads (default: all; with 1, runs repeat bit for bit)"
    group.add_argument("--threads", type=int, metavar="N", help=count)


def set_threads(options: argparse.Namespace) -> None:
    """Put ``--threads`` into force. Raises ValueError for fewer than one."""
    if options.threads is None:
        return
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    import torch

    torch.set_num_threads(options.threads)


def chosen_profile(options: argparse.Namespace) -> Any:
    """The `Profile` with the options for data, model and threshold put in; ValueError if they do not go together."""
    from dataclasses import replace

    from svit_utils.models import pretrained_config
    from svit_utils.training import get_profile

    if options.dense and (options.threshold is not None or getattr(options, "learnable", None)):
        raise ValueError("--dense goes neither with --threshold nor with --learnable")
    profile, changes = get_profile(options.profile), {}
    if options.model not in (None, profile.model):  # that model's own size and start, not those of the profile
        about = pretrained_config(options.model)
        if not about:
            raise ValueError(f"unknown model {options.model!r}: use small_vit or a timm name")
        changes = {
            "img_size": about["input_size"][-1],
            "start": "pretrained" if about.get("has_weights") else "scratch",
        }
    names = ("data", "model", "img_size", "threshold", "empty_rows")
    given = {name: getattr(options, name) for name in names} | {"start": options.weights}
    return replace(profile, **changes | {k: v for k, v in given.items() if v is not None})


def open_trained(name: str | None, options: argparse.Namespace) -> tuple[Any, dict[str, Any]] | None:
    """(model, card) of the saved model called ``name``, changed as ``--img-size``, ``--threshold`` and so on say.

    ``name`` is a file or folder of `save_trained`, or a shipped checkpoint. For everything else, such as weights
    without a card or the start ``pretrained``, the answer is None. Raises ValueError for a missing or damaged file, or
    an option that does not go with the model.
    """
    from svit_utils.models import load_trained, read_card, resize
    from svit_utils.paths import checkpoints_dir

    path = checkpoints_dir() / f"{name}.safetensors"
    if not path.is_file():
        path = Path(name or "")
        if path.suffix != ".safetensors" and not (name and path.is_dir()):
            return None
    if not read_card(path).keys() & {"architecture", "model"}:
        return None
    model, card = load_trained(path)
    names = [card[key] for key in ("model", "architecture") if key in card]
    if options.model is not None and options.model not in names:
        raise ValueError(f"{path.name} holds a {names[0]}, which --model {options.model} does not fit")
    if options.img_size is not None and hasattr(model, "set_input_size"):
        resize(model, options.img_size)
    change_attention(model, options, card.get("empty_rows", "dense"))
    return model, card


def change_attention(model: Any, options: argparse.Namespace, empty_rows: str = "dense") -> None:
    """Apply ``--dense``, ``--threshold`` and ``--empty-rows`` in place; which layers are sparse stays as it was.

    A dense model that gets a threshold is made sparse in every layer, with ``empty_rows`` where no option names it.
    Raises ValueError where a learned tau would be lost, or the model's normaliser takes no ``--empty-rows``.
    """
    from svit_utils.attention import densify, learnable_thresholds, sparse_modules, sparsify

    sparse = sparse_modules(model)
    if learnable_thresholds(model) and (options.dense or options.threshold is not None):
        raise ValueError("this checkpoint has a learned tau of its own; it goes neither with --dense nor --threshold")
    if options.dense:
        densify(model)
    elif options.threshold is not None:
        mode = options.empty_rows or next((module.empty_rows for module in sparse.values()), empty_rows)
        sparsify(model, options.threshold, layers=list(sparse) or None, empty_rows=mode)
    elif options.empty_rows is not None:
        for module in sparse.values():
            if "empty_rows" not in module.normaliser.settings():
                raise ValueError(f"--empty-rows does not go with {module.normaliser!r}")
            module.normaliser.empty_rows = options.empty_rows


def describe_attention(model: Any) -> tuple[float | str | None, str | None]:
    """(threshold, empty_rows) for a report: tau if it is one fixed number, else a description; None if dense."""
    from svit_utils.attention import sparse_modules
    from svit_utils.attention.normalisers import ThresholdedSoftmax

    used = [module.normaliser for module in sparse_modules(model).values()]
    if not used:
        return None, None
    shown = list(dict.fromkeys(repr(n.threshold if type(n) is ThresholdedSoftmax else n) for n in used))
    tau = getattr(used[0].threshold, "tau", None)
    threshold = tau if isinstance(tau, float) and len(shown) == 1 else ", ".join(shown)
    return threshold, ", ".join(dict.fromkeys(normaliser.empty_rows for normaliser in used))


def as_sentence(threshold: float | str | None) -> str:
    """``dense``, or how the attention is cut."""
    if threshold is None:
        return "dense"
    return f"cut at tau = {threshold:g}" if isinstance(threshold, float) else f"cut by {threshold}"


def exit_status(command: Callable[..., None], options: argparse.Namespace, errors: Any = (ValueError, OSError)) -> int:
    """Run a command: 0, or 2 after one line on standard error for an exception of the classes ``errors``.

    What the library warns of (a new head, resampled positions, a mirror that failed) is printed as a line, too.
    """
    log, notes = logging.getLogger("svit_utils"), _Notes()
    log.addHandler(notes)
    try:
        command(options)
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        log.removeHandler(notes)
    return 0


class _Notes(logging.Handler):
    """Prints warnings on standard error, as it is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            print(f"note: {record.getMessage()}", file=sys.stderr)
