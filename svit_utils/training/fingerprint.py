"""What must be the same for a checkpoint to fit: model, thresholds, what is trained, drop rates, data and recipe."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from svit_utils.attention import Normaliser, sparse_modules
from svit_utils.attention.normalisers import ThresholdedSoftmax
from svit_utils.training.config import TrainConfig
from svit_utils.training.sharding import whole

UNSURE = ("labels", "data settings", "validation")  # null where nothing can be said
FREE = ("checkpoint_every", "log_every", "num_workers")  # these may change between two halves of a run


def fingerprint(
    model: nn.Module,
    config: TrainConfig,
    images: int,
    processes: int,
    data: Dataset | None = None,
    val: Any = None,
    loss: str | None = None,
) -> str:
    """What must be the same for a checkpoint to fit, as JSON: an entry for each thing, to be named where it differs.

    Args:
        model: as it starts, before the first step.
        config: its recipe; what does not change the result (how often to log, say) is left out.
        images: in the training set.
        processes: that share each step.
        data, val: the training and validation sets, of which nothing is read here.
        loss: what is minimised instead of the recipe's loss, described.
    """
    recipe = {k: v for k, v in asdict(config).items() if k not in FREE}
    state = model.state_dict()
    shapes = "".join(f"{name}{tuple(p.shape)}" for name, p in state.items())
    sparse = {name: _attention(module.normaliser) for name, module in sparse_modules(model).items()}
    numbers = {name: _numbers(module) for name, module in model.named_modules()}
    drops = Counter(
        f"{type(module).__name__}.{key}={value:.6g}"
        for name, module in model.named_modules()
        for key, value in numbers[name].items()
        if value and ("drop" in key or (key in ("p", "prob") and "Drop" in type(module).__name__))
    )
    kinds = {name: [type(module).__name__, numbers[name]] for name, module in model.named_modules()}
    content = {
        "model": f"{type(model).__name__}-{_digest(shapes + json.dumps(sparse))}",
        "start": f"weights-{_digest(*(_bytes(value) for value in state.values()))}",
        "frozen": _frozen(model),
        "drop rates": ", ".join(f"{count} x {rate}" for rate, count in sorted(drops.items())) or "none",
        "modules": f"modules-{_digest(json.dumps(kinds))}",
        **_evaluating(model),
        "images": images,
        "labels": None,
        "data settings": None,
        **({} if data is None else about_data(data)),
        "validation": None if val is None else [len(val), *about_data(val).values()],
        "processes": processes,
        **({} if loss is None else {"loss": loss}),
        **recipe,
    }
    return json.dumps(content, sort_keys=True)


def difference(recorded: str, expected: str) -> str:
    """Which entries differ between two fingerprints, as a sentence; empty when none does.

    What nothing could be said of differs from nothing.
    """
    old, new = json.loads(recorded), json.loads(expected)
    names = sorted(old.keys() | new.keys(), key=lambda name: (name not in ("model", "start"), name))
    if lacking := [name for name in ("drop rates", "frozen", "labels") if name not in old]:
        also = [name for name in names if name in old and old[name] != new.get(name)]
        changed = f", and {', '.join(also)} differ" if also else ""
        return f"an older version wrote it, which did not note {', '.join(lacking)}{changed}"
    pairs = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in names}
    return ", ".join(
        f"{name} was {a} and is {b}"
        for name, (a, b) in pairs.items()
        if a != b and not (name in UNSURE and None in (a, b))
    )


def _attention(normaliser: Normaliser) -> str:
    """Which attention a module has; of the thresholded softmax only its settings."""
    if isinstance(normaliser, ThresholdedSoftmax):
        return f"{normaliser.empty_rows} {normaliser.threshold.extra_repr()}"
    return repr(normaliser)


def _numbers(module: nn.Module) -> dict[str, float]:
    """The numbers that a module was built with, such as its drop rates, which no state_dict holds."""
    found = {k: v for k, v in vars(module).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {k: v for k, v in found.items() if not k.startswith("_")}


def _frozen(model: nn.Module) -> str:
    """Which parameters are not trained: the names of modules that are frozen as a whole, and of other parameters."""
    left = {name for name, p in model.named_parameters() if not p.requires_grad}
    found = []
    for prefix in [name for name, _ in model.named_modules() if name]:
        own = {name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")}
        if own and own <= left:
            found.append(prefix)
            left -= own
    return ", ".join([*found, *sorted(left)]) or "nothing"


def _evaluating(model: nn.Module) -> dict[str, str]:
    """Which parts stay in eval mode while the model is trained; no entry where none does."""
    found = [name for name, module in model.named_modules() if model.training and not module.training]
    return {"in eval mode": ", ".join(found)} if found else {}


def about_data(dataset: Any) -> dict[str, Any]:
    """What can be said of a data set without reading an image: a digest of its labels, and its transform or settings.

    Data sets around other ones are looked through. What cannot be found is None.
    """
    chain, settings = [dataset], None
    while (inner := _inner(chain[-1])) is not None:
        chain.append(inner)
    transform = next((t for each in chain if (t := getattr(each, "transform", None)) is not None), None)
    if transform is not None:
        settings = repr(transform)
    elif type(chain[-1]).__module__.startswith("svit_utils"):
        settings = repr(chain[-1])
    if settings is not None:
        settings = re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-fA-F]+", "", settings))
    return {"labels": _labels(dataset), "data settings": settings}


def _inner(dataset: Any) -> Any:
    """The data set that this one is made from; None where there is none."""
    return next((value for value in vars(dataset).values() if isinstance(value, Dataset)), None)


def _labels(dataset: Any) -> str | None:
    """A digest of all labels where the data set keeps them together; None where it does not."""
    array = _label_array(dataset)
    return None if array is None else _digest(array.tobytes())


def _label_array(dataset: Any) -> np.ndarray | None:
    values = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if values is None and getattr(dataset, "tensors", None):
        values = dataset.tensors[-1]
    indices = getattr(dataset, "indices", None)
    if values is None:
        inner = _inner(dataset)
        values = None if inner is None else _label_array(inner)
        if values is not None and indices is not None:
            values = values[np.asarray(indices, dtype=np.int64)]
    if not isinstance(values, (Tensor, np.ndarray, list, tuple)) or len(values) != len(dataset):
        return None
    try:
        return np.asarray(values).astype(np.int64)
    except (TypeError, ValueError):
        return None


def sample(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A few numbers of the first batch of a run, by which its data are known again.

    Args:
        images: [B, ...], of which 64 numbers from each of the first eight are kept.
        labels: [B], all kept.
    """
    few = images[:8].detach().float().cpu().flatten(1)
    places = torch.linspace(0, few.shape[1] - 1, 64).long()
    return {
        "shape": torch.tensor(images.shape[1:]),
        "labels": labels.detach().cpu().clone(),
        "values": few[:, places].clone(),
    }


def sample_difference(old: dict[str, Tensor], new: dict[str, Tensor], values: bool = True) -> str:
    """How the first batches of two runs differ; empty where they agree.

    Values may differ by 4 % of their mean size, as decoders of pictures do from version to version.

    Args:
        values: compare the images too, and not only their shape and labels.
    """
    if not torch.equal(old["shape"], new["shape"]):
        return f"images were {old['shape'].tolist()} and are {new['shape'].tolist()}"
    if old["labels"].shape != new["labels"].shape or not torch.equal(old["labels"], new["labels"]):
        return "the labels of the first batch are others"
    gap = float((old["values"] - new["values"]).abs().mean())
    if values and not gap <= 0.04 * float(old["values"].abs().mean()):
        return "the images of the first batch are others (other pictures, augmentation or normalisation)"
    return ""


def _bytes(value: Tensor) -> bytes:
    return whole(value.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()[:12]
