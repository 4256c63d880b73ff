"""Trained models as files that bring their attention, classes and normalisation back with them."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import to_2tuple
from timm.models import filter_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import nn

from svit_utils.attention import LearnableThreshold, sparsify
from svit_utils.attention.surgery import describe_sparsity, restore_sparsity
from svit_utils.building import SMALL_VIT, build, create_model, pretrained_config, resize
from svit_utils.exclusive import exclusively
from svit_utils.files import replacing
from svit_utils.paths import checkpoints_dir
from svit_utils.weights import (
    SPARSE_NOTE,
    WeightsError,
    load_weights,
    read_state,
    save_weights,
    sparse_note,
    state_difference,
    unwrap,
)

__all__ = ["SMALL_VIT", "WeightsError", "create_model", "load_embedded", "load_trained", "load_weights"]
__all__ += ["pretrained_config", "read_card", "resize", "save_trained", "save_weights"]

FORMAT = 1  # of the cards; to be raised when a card is written that the `load_trained` of today could not read
_WEIGHTS, _CONFIG, _OURS = "model.safetensors", "config.json", "svit_utils"  # the last: our part of timm's config
_INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # as in timm's pretrained_cfg
_FROM_MODEL = ("architecture", "model_args", "num_classes", "attention")  # in a card, but nobody has to give them


def load_embedded(name: str) -> nn.Module:
    """One of the shipped checkpoints as a dense `small_vit`, in eval mode; see data/README.md for the list.

    Raises:
        WeightsError: no such checkpoint, or a damaged one.
    """
    path = checkpoints_dir() / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in checkpoints_dir().glob("*.safetensors"))) or "none"
        raise WeightsError(f"no shipped checkpoint {name!r}; there are: {known}")
    model = create_model(SMALL_VIT)
    load_weights(model, path)
    return model.eval()


@exclusively
def save_trained(
    model: nn.Module,
    path: str | os.PathLike[str],
    card: Mapping[str, Any] | None = None,
    *,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model, dense or sparse, so that `load_trained` gives the same model back in another process.

    Saved are the weights, the timm name and arguments, which attention modules are sparse and how (threshold, warm-up,
    normaliser, ``empty_rows``, backend), class names and normalisation. Not saved, as in timm: drop rates, and
    switches of the process such as ``timm.layers.set_fused_attn``.

    Args:
        model: a timm model or `small_vit`; wrappers of ``torch.compile`` and DistributedDataParallel are taken off.
        path: a name ending in ``.safetensors`` for one file with the card in its header; any other name for a folder
            with ``model.safetensors`` and ``config.json``. timm reads the folder too, but builds the model dense:
            ``timm.create_model("local-dir:<folder>", pretrained=True)``.
        card: what else to keep, anything that JSON can hold. ``label_names`` (a name per class), ``input_size``,
            ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode`` replace what the model's
            ``pretrained_cfg`` says. ``architecture``, ``model_args``, ``num_classes`` and ``attention`` come from the
            model, whatever the card says.
        architecture: timm name of a model without one in its ``pretrained_cfg``.
        model_args: arguments of ``timm.create_model`` to add or replace (None leaves one out), where the model does not
            know its own or holds one that is not JSON.

    Returns:
        The path. Existing files are replaced whole or not at all.

    Raises:
        ValueError: the timm name is unknown, timm would build another model, or a value cannot be written as JSON.
    """
    path = Path(path)
    model = unwrap(model)
    config, learned = _describe(model, dict(card or {}), architecture, dict(model_args or {}))
    if path.suffix == ".safetensors" and not path.is_dir():
        return save_weights(model, path, {"format": "pt", "card": json.dumps(config)})
    if path.is_file():
        raise ValueError(f"{path} is a file: give a name ending in .safetensors, or the name of a folder")
    state = model.state_dict()
    # timm loads strictly and does not know learned thresholds, so these stand in config.json.
    config[_OURS]["learned"] = {name: state.pop(name).tolist() for name in learned}
    with replacing(path / _CONFIG) as text:
        text.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_weights(state, path / _WEIGHTS, {"format": "pt", **sparse_note(model)})
    return path


def load_trained(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild what `save_trained` saved, or a checkpoint that this repository ships.

    Args:
        path: the ``.safetensors`` file or the folder.

    Returns:
        The model, in eval mode on the CPU, and its card. That is what `save_trained` was given, with ``architecture``,
        ``model_args``, ``num_classes``, ``label_names`` (or None), ``input_size``, ``mean``, ``std``,
        ``interpolation``, ``crop_pct``, ``crop_mode`` and ``attention`` (see `describe_sparsity`).
        A shipped checkpoint's card holds text only: data, steps, seed, accuracy.

    Raises:
        WeightsError: missing or damaged, without a card, or written by a newer version.
    """
    path = Path(path)
    config = _read_config(path)
    if _OURS not in config:
        if "model" not in config:
            raise WeightsError(
                f"{path} has no card, and a plain state dict has no thresholds: build the model with create_model, "
                "sparsify it yourself and use load_weights"
            )
        return _load_flat(path, config), config
    try:
        about = config["pretrained_cfg"] | {k: config[k] for k in ("num_classes", "label_names") if k in config}
        with torch.random.fork_rng(devices=[]):  # the new model's random weights leave no trace in the caller's numbers
            model = build(config["architecture"], pretrained_cfg=about, **config["model_args"])
        restore_sparsity(model, config[_OURS]["attention"])
        learned = {name: torch.tensor(v, dtype=torch.float32) for name, v in config[_OURS].get("learned", {}).items()}
        card = _card(config)
    except Exception as error:  # timm raises whatever an argument that it does not know leads to
        raise WeightsError(
            f"{path} cannot be rebuilt with timm {timm.__version__}; it was saved with timm "
            f"{config[_OURS].get('timm')} ({type(error).__name__}: {error})"
        ) from error
    state = read_state(path / _WEIGHTS if path.is_dir() else path) | learned
    if difference := state_difference(model.state_dict(), state):
        raise WeightsError(f"the weights in {path} are not those of the model in its card: tensors {difference}")
    model.to(state[next(name for name, _ in model.named_parameters())].dtype)  # buffers that are not saved follow
    mixed = any(state[name].dtype != value.dtype for name, value in model.state_dict().items())
    model.load_state_dict(state, assign=mixed)
    return model.eval(), card


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a saved model as `load_trained` returns it, without building the model; {} where there is none.

    Raises:
        WeightsError: missing or damaged, or written by a newer version.
    """
    config = _read_config(Path(path))
    return _card(config) if _OURS in config else config


def _arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments with which timm builds this model."""
    try:
        from timm.models import get_model_args
    except ImportError:  # older timm: what `_build` kept, and what the model says of itself
        kept = getattr(model, "_model_args", {})
        found = {k: v for k, v in kept.items() if "drop" not in k and not k.startswith("pretrained")}
        found |= {name: getattr(model, name, None) for name in ("num_classes", "in_chans", "global_pool")}
        return found | {"img_size": getattr(getattr(model, "patch_embed", None), "img_size", None)}
    return get_model_args(model)


def _describe(
    model: nn.Module, card: dict[str, Any], architecture: str | None, model_args: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """(timm's config.json with our part in it, names of the learned thresholds in the state_dict)."""
    about = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    architecture = architecture or about.get("architecture")
    if architecture is None or not timm.is_model(architecture):
        raise ValueError(
            f"{type(model).__name__} does not say which timm model it is (model.pretrained_cfg['architecture'] is "
            f"{architecture!r}): pass architecture='<timm name>', and model_args if it was built with arguments"
        )
    arguments = _as_json({k: v for k, v in (_arguments(model) | model_args).items() if v is not None}, "model_args")
    about = filter_pretrained_cfg(about or timm.get_pretrained_cfg(architecture).to_dict(), remove_source=True)
    about |= {k: card[k] for k in _INPUT if card.get(k) is not None} | {"custom_load": False, "state_dict": None}
    about["num_classes"] = model.num_classes  # older timm leaves the number of the weights that it began with
    if "img_size" in arguments:
        about["input_size"] = (arguments.get("in_chans", 3), *to_2tuple(arguments["img_size"]))
    names = card.get("label_names")
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"label_names has {len(names)} names, but the model has {model.num_classes} classes")
    kept = _as_json({k: v for k, v in card.items() if k not in (*_INPUT, *_FROM_MODEL, "label_names")}, "card")
    ours = {"format": FORMAT, "timm": timm.__version__, "attention": describe_sparsity(model), "card": kept}
    with torch.device("meta"):  # shapes without numbers
        twin = build(architecture, pretrained_cfg=about, **arguments)
    dense = twin.state_dict().keys()
    restore_sparsity(twin, ours["attention"])
    if difference := state_difference(twin.state_dict(), model.state_dict()) or _other_module(model, twin):
        raise ValueError(
            f"timm's {architecture!r} with {arguments} is another model than this one: {difference}. Pass the "
            "architecture and the model_args that build it"
        )
    with tempfile.TemporaryDirectory() as folder:
        extra = {"pretrained_cfg": about, "label_names": names, _OURS: ours}
        save_config_for_hf(twin, Path(folder, _CONFIG), extra, arguments)
        config = json.loads(Path(folder, _CONFIG).read_text(encoding="utf-8"))
    return config, [name for name in model.state_dict() if name not in dense]


def _other_module(model: nn.Module, twin: nn.Module) -> str:
    """The first module that is of another class in ``twin``; "" if none. What does nothing in eval mode is skipped."""
    own, other = ({name: type(module).__name__ for name, module in of.named_modules()} for of in (model, twin))
    for name in own | other:
        pair = own.get(name, "Identity"), other.get(name, "Identity")
        if pair[0] != pair[1] and not all(kind == "Identity" or "Drop" in kind for kind in pair):
            return f"{name or 'the model'} is a {pair[0]} and not a {pair[1]}"
    return ""


def _as_json(entries: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The entries as they come back from JSON."""
    for name, value in entries.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the entry {name!r} of {what} cannot be written as JSON: {error}") from error
    return json.loads(json.dumps(entries))


def _read_config(path: Path) -> dict[str, Any]:
    """What stands beside the weights: timm's config with our part, the flat text of older files, or {}."""
    try:
        if path.is_dir():
            text = (path / _CONFIG).read_text(encoding="utf-8")
        else:
            with safe_open(path, framework="pt") as file:
                flat = dict(file.metadata() or {})
            if "card" not in flat:
                return {k: v for k, v in flat.items() if k not in ("format", SPARSE_NOTE)}
            text = flat["card"]
        config = json.loads(text)
        version = config[_OURS]["format"] if _OURS in config else FORMAT
        newer = version > FORMAT
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"no model can be read from {path}: {error}") from error
    if newer:
        raise WeightsError(
            f"{path} was written by a newer svit_utils (card format {version}, known here up to {FORMAT}): update it"
        )
    return config


def _card(config: Mapping[str, Any]) -> dict[str, Any]:
    """The card as users see it, in one level."""
    about, ours = config["pretrained_cfg"], config[_OURS]
    found = {name: config[name] for name in ("architecture", "model_args", "num_classes")}
    found |= {"label_names": config.get("label_names", about.get("label_names")), "attention": ours["attention"]}
    return ours["card"] | found | {name: about[name] for name in _INPUT}


def _load_flat(path: Path, card: Mapping[str, str]) -> nn.Module:
    """A model from the older kind of card, text by name, that the shipped checkpoints carry."""
    said = {name: value for name, value in card.items() if value not in ("", "None")}
    size = int(said["img_size"]) if "img_size" in said else None
    model = create_model(said["model"], int(said.get("num_classes", 10)), size)
    if "threshold" in said:
        tau = float(said["threshold"])
        threshold = LearnableThreshold(tau, per=said["learnable"]) if "learnable" in said else tau
        layers = json.loads(said["layers"]) if "layers" in said else None
        sparsify(model, threshold, layers=layers, empty_rows=said.get("empty_rows", "dense"))
    load_weights(model, path)
    return model.eval()
