"""What the commands share: groups of options, and what the options do to a model."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The normalisers of `svit_utils.attention`, and which other options of the cut each takes.
_TAU = ("threshold", "learnable", "tau_warmup")
NORMALISERS: dict[str, tuple[str, ...]] = {"thresholded": (*_TAU, "empty_rows"), "hard_cut": (*_TAU, "empty_rows")}
NORMALISERS |= {"clipped": _TAU, "topk": (), "entmax15": (), "sparsemax": ()}


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
    """Dense or sparse, and how it is cut."""
    group.add_argument("--threshold", type=float, metavar="TAU", help="cut attention weights up to this, in [0, 1)")
    group.add_argument("--dense", action="store_true", help="do not cut at all")
    rules = "what a query gets when no key survives: nothing, its uncut weights, its largest key, or a lower tau"
    group.add_argument("--empty-rows", choices=("zero", "dense", "top1", "cap"), help=rules)
    kinds = "what makes weights of scores: the method, or one to compare it with (default: thresholded)"
    group.add_argument("--normaliser", choices=tuple(NORMALISERS), help=kinds)


def check_cut(options: argparse.Namespace) -> None:
    """Raise ValueError where the options that say how attention is cut exclude each other, or lack a package."""
    names = (*_TAU, "empty_rows", "layers", "normaliser")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if given.get("tau_warmup") == 0:
        del given["tau_warmup"]  # the full tau at once: nothing to raise
    if options.dense and given:
        raise ValueError(f"--dense goes neither with --threshold nor with other options of the cut: {_flags(given)}")
    if (kind := given.get("normaliser")) is not None:
        if refused := given.keys() - {*NORMALISERS[kind], "layers", "normaliser"}:
            raise ValueError(f"--normaliser {kind} does not go with {_flags(sorted(refused))}")
        if kind in ("entmax15", "sparsemax") and find_spec("entmax") is None:
            raise ValueError(f"--normaliser {kind} needs the package entmax: pip install entmax")


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


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

    check_cut(options)
    profile, changes = get_profile(options.profile), {}
    if options.model not in (None, profile.model):  # that model's own size and start, not those of the profile
        about = pretrained_config(options.model)
        if not about:
            raise ValueError(f"unknown model {options.model!r}: use small_vit or a timm name")
        changes = {
            "img_size": about["input_size"][-1],
            "start": "pretrained" if about.get("has_weights") else "scratch",
        }
    names = ("data", "model", "img_size", "threshold", "empty_rows", "normaliser")
    given = {name: getattr(options, name, None) for name in names} | {"start": options.weights}
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
    change_attention(model, options, card.get("empty_rows") or "dense")
    return model, card


def change_attention(model: Any, options: argparse.Namespace, empty_rows: str = "dense") -> None:
    """Apply ``--dense``, ``--threshold``, ``--normaliser`` and ``--empty-rows`` in place.

    What no option names stays as it was: which layers are sparse, their normaliser, tau and ``empty_rows``. A dense
    model that gets a cut is made sparse in every layer, with ``empty_rows``. Raises ValueError where a learned tau
    would be lost, or an option does not go with the model's normaliser or with the others.
    """
    from svit_utils.attention import densify, learnable_thresholds, sparse_modules, sparsify

    check_cut(options)
    sparse = sparse_modules(model)
    cut = options.threshold is not None or options.normaliser is not None
    if learnable_thresholds(model) and (options.dense or cut):
        others = "--dense, --threshold or --normaliser"
        raise ValueError(f"this checkpoint has a learned tau of its own, which does not go with {others}")
    if options.empty_rows is not None and not cut and not sparse:
        raise ValueError("--empty-rows needs a cut: give --threshold, too")
    if options.dense:
        densify(model)
    elif cut:
        found = {name: _changed(module.normaliser, options, empty_rows) for name, module in sparse.items()}
        for name, normaliser in found.items():
            sparsify(model, layers=[name], normaliser=normaliser)
        if not sparse:
            sparsify(model, normaliser=_changed(None, options, empty_rows))
    elif options.empty_rows is not None:
        for module in sparse.values():
            if "empty_rows" not in module.normaliser.settings():
                raise ValueError(f"--empty-rows does not go with {module.normaliser!r}")
            module.normaliser.empty_rows = options.empty_rows


def _changed(old: Any, options: argparse.Namespace, empty_rows: str) -> Any:
    """The normaliser that a layer with ``old`` (None for a dense one) gets by the options."""
    from svit_utils.attention.normalisers import describe, from_description

    settings = {} if old is None else describe(old)
    if old is None or options.normaliser not in (None, settings["name"]):
        name = options.normaliser or "thresholded"
        usual = {"threshold": {"kind": "fixed", "tau": 0.01}, "empty_rows": empty_rows} | settings
        settings = {"name": name, **{key: usual[key] for key in usual if key in NORMALISERS[name]}}
    tau = None if options.threshold is None else {"kind": "fixed", "tau": options.threshold}
    for option, key, value in ("--threshold", "threshold", tau), ("--empty-rows", "empty_rows", options.empty_rows):
        if value is not None:
            if key not in settings:
                raise ValueError(f"{option} does not go with {old!r}: give --normaliser, too")
            settings[key] = value
    return from_description(settings)


def describe_attention(model: Any) -> tuple[float | str | None, str | None]:
    """(threshold, empty_rows) for a report: tau if that is all there is to say, else a description; None if dense."""
    from svit_utils.attention import sparse_modules
    from svit_utils.attention.normalisers import ThresholdedSoftmax

    used = [module.normaliser for module in sparse_modules(model).values()]
    if not used:
        return None, None
    shown = list(dict.fromkeys(repr(n.threshold if type(n) is ThresholdedSoftmax else n) for n in used))
    tau = getattr(used[0].threshold, "tau", None) if type(used[0]) is ThresholdedSoftmax else None
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
