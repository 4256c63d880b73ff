"""What turns attention scores into attention weights: the thresholded softmax, and the controls it is compared with.

If the thresholded softmax is good for something, it has to be better than these at it. Each is a function of the scores
[..., N, M], and a class beside it that holds the settings. To add one, write a subclass of `Normaliser` with `weights`
and one line in `NORMALISERS`: then `sparsify`, the tracker, the explanations, saving and loading know it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from svit_utils.attention.formula import cut_and_renormalise, effective_tau, level_of_cut, renormalise
from svit_utils.attention.thresholds import THRESHOLDS, Threshold, ThresholdLike, as_threshold, check_empty_rows

# Sorting all 197 keys of a row would be most of the work; a row with more survivors than this is sorted whole.
_SORTED_KEYS = 64
# A masked key's distance below its row's largest score, far enough for entmax15 and sparsemax to give it 0, and finite.
_MASKED = 16.0


def hard_cut(scores: Tensor, tau: Tensor | float = 0.01, empty_rows: str = "dense") -> Tensor:
    """p 1[p > tau] / sum: the survivors keep their ratios, where the thresholded softmax takes tau from each."""
    probs = scores.softmax(dim=-1)
    return renormalise(probs * (probs > effective_tau(probs, tau, empty_rows)), probs, empty_rows)


def clipped_softmax(scores: Tensor, tau: Tensor | float = 0.01) -> Tensor:
    """ReLU(p - tau) / (1 - tau): clipped softmax (Bondarenko et al. 2023, arXiv:2306.12929, equation 4).

    It is clip((zeta - gamma) p + gamma, 0, 1) with zeta = 1 and gamma = -tau / (1 - tau), which cuts exactly the keys
    that the thresholded softmax cuts, and does not renormalise: a row sums to less than 1, an empty row to 0.
    """
    return (scores.softmax(dim=-1) - tau).relu() / (1 - tau)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Softmax over the ``k`` largest scores of each row, whatever they are (as in KVT, arXiv:2106.00515)."""
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must lie in 1 to the number of keys, {scores.shape[-1]}, got {k}")
    values, index = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, index, values.softmax(dim=-1))


def entmax15(scores: Tensor) -> Tensor:
    """1.5-entmax (Peters, Niculae and Martins 2019, arXiv:1905.05702), by the authors' package ``entmax``."""
    return _entmax().entmax15(_finite(scores), dim=-1, k=min(_SORTED_KEYS, scores.shape[-1]))


def sparsemax(scores: Tensor) -> Tensor:
    """The Euclidean projection onto the simplex (Martins and Astudillo 2016, arXiv:1602.02068), by ``entmax``."""
    return _entmax().sparsemax(_finite(scores), dim=-1, k=min(_SORTED_KEYS, scores.shape[-1]))


def _entmax() -> Any:
    try:
        import entmax
    except ImportError as error:
        raise ImportError("entmax15 and sparsemax need the package entmax: pip install entmax") from error
    return entmax


def _finite(scores: Tensor) -> Tensor:
    """Masked keys at -inf brought to a finite score, which is still too low to get any weight."""
    lowest = scores.detach().amax(dim=-1, keepdim=True) - _MASKED
    return torch.where(scores == -torch.inf, lowest, scores)


class Normaliser:
    """Base of the normalisers: `weights` of scores.

    A subclass keeps each argument of its constructor as an attribute of the same name: that is how it is saved. One
    with an argument ``threshold`` or ``empty_rows`` gets what `sparsify` was given. One with parameters to train
    derives from ``nn.Module`` too.
    """

    threshold: Threshold | None = None
    # What the tracker and the command line say of rows without a survivor; it does nothing by itself.
    empty_rows = "dense"

    def weights(self, scores: Tensor) -> Tensor:
        """Scores [B, H, N, M] to attention weights of the same shape; masked keys are at -inf, but not all of a row."""
        raise NotImplementedError

    def cut_at(self, scores: Tensor, weights: Tensor) -> Tensor | float:
        """Where the tracker puts the cut: a key counts as a survivor where its softmax probability p is larger.

        Args:
            scores: [B, H, N, M]; a fully masked row gives NaN here, and is not looked at.
            weights: what `weights` made of them, before dropout.

        Returns:
            Broadcastable to [B, H, N, 1]. By default the largest p that got no weight, which is right where a row keeps
            its largest keys and always has a survivor. A normaliser whose rows can fall back to something else has to
            override this, or such rows count as not cut.
        """
        return scores.softmax(dim=-1).masked_fill(weights != 0, 0.0).amax(dim=-1, keepdim=True)

    def for_heads(self, num_heads: int) -> Normaliser:
        """What a layer of ``num_heads`` heads holds: a copy, whose threshold is a copy unless all layers share it.

        Raises:
            ValueError: a threshold per head with another number of heads.
        """
        if self.threshold is None:
            return copy.deepcopy(self)
        return copy.deepcopy(self, {id(self.threshold): self.threshold.for_heads(num_heads)})

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments besides the threshold, read from the attributes of the same names.

        Raises:
            ValueError: there is no attribute of an argument's name.
        """
        names = [name for name in inspect.signature(type(self)).parameters if name != "threshold"]
        if missing := [name for name in names if not hasattr(self, name)]:
            raise ValueError(
                f"{type(self).__name__} must keep its argument {', '.join(missing)} as an attribute of the same name, "
                "or it could not be saved"
            )
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        parts = [] if self.threshold is None else [repr(self.threshold)]
        parts += [f"{name}={value!r}" for name, value in self.settings().items()]
        return f"{type(self).__name__}({', '.join(parts)})"


class _Cutting(Normaliser):
    """A normaliser that cuts at tau.

    Args:
        threshold: tau in [0, 1), a tensor [H], or a threshold object.
        empty_rows: see `svit_utils.attention.formula.thresholded_softmax`.
    """

    threshold: Threshold

    def __init__(self, threshold: ThresholdLike = 0.01, empty_rows: str = "dense") -> None:
        check_empty_rows(empty_rows)
        self.threshold, self.empty_rows = as_threshold(threshold), empty_rows

    def tau(self, scores: Tensor) -> Tensor:
        """Tau for scores [B, H, N, M], broadcastable to [B, H, N, 1]."""
        if not self.threshold.counts_keys:
            return self.threshold(scores.shape[-1])
        return self.threshold((scores != -torch.inf).sum(dim=-1, keepdim=True))

    def cut_at(self, scores: Tensor, weights: Tensor) -> Tensor | float:
        return level_of_cut(scores, self.tau(scores), self.empty_rows)


class ThresholdedSoftmax(_Cutting):
    """R / sum(R) with R = ReLU(softmax(scores) - tau): the method itself, and the only one with fast backends."""

    def weights(self, scores: Tensor) -> Tensor:
        return cut_and_renormalise(scores.softmax(dim=-1), self.tau(scores), self.empty_rows)


class HardCut(_Cutting):
    """`hard_cut` as a normaliser."""

    def weights(self, scores: Tensor) -> Tensor:
        return hard_cut(scores, self.tau(scores), self.empty_rows)


class ClippedSoftmax(_Cutting):
    """`clipped_softmax` as a normaliser; ``threshold`` as in `ThresholdedSoftmax`."""

    def __init__(self, threshold: ThresholdLike = 0.01) -> None:
        super().__init__(threshold, "zero")  # it does not renormalise: an empty row is 0 by the formula

    def weights(self, scores: Tensor) -> Tensor:
        return clipped_softmax(scores, self.tau(scores))


class TopK(Normaliser):
    """`top_k` as a normaliser.

    Args:
        k: keys kept per query; 21 by default, the share of 197 keys that tau = 0.01 leaves in a fine-tuned model.

    Raises:
        ValueError: k is not a whole number of at least 1.
    """

    def __init__(self, k: int = 21) -> None:
        if isinstance(k, bool) or int(k) != k or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
        self.k = int(k)

    def weights(self, scores: Tensor) -> Tensor:
        return top_k(scores, self.k)


class Entmax15(Normaliser):
    """`entmax15` as a normaliser. Raises ImportError where the package ``entmax`` is missing."""

    def __init__(self) -> None:
        _entmax()

    def weights(self, scores: Tensor) -> Tensor:
        return entmax15(scores)


class Sparsemax(Normaliser):
    """`sparsemax` as a normaliser. Raises ImportError where the package ``entmax`` is missing."""

    def __init__(self) -> None:
        _entmax()

    def weights(self, scores: Tensor) -> Tensor:
        return sparsemax(scores)


# Name -> class; the names that ``sparsify(model, normaliser=...)`` takes.
NORMALISERS: dict[str, type[Normaliser]] = {
    "thresholded": ThresholdedSoftmax,
    "hard_cut": HardCut,
    "clipped": ClippedSoftmax,
    "topk": TopK,
    "entmax15": Entmax15,
    "sparsemax": Sparsemax,
}


def as_normaliser(normaliser: str | object, threshold: ThresholdLike = 0.01, empty_rows: str = "dense") -> Normaliser:
    """The normaliser that `sparsify` was asked for.

    Args:
        normaliser: a name in `NORMALISERS`, or an object with a method ``weights(scores)``.
        threshold, empty_rows: given to a named normaliser whose constructor has arguments of these names; otherwise
            they must be left at their defaults.

    Raises:
        ValueError: unknown name, an object without ``weights``, a setting out of range or that is not taken.
    """
    check_empty_rows(empty_rows)
    given: dict[str, Any] = {"threshold": as_threshold(threshold), "empty_rows": empty_rows}
    usual = {"threshold": isinstance(threshold, float) and threshold == 0.01, "empty_rows": empty_rows == "dense"}
    if isinstance(normaliser, str):
        cls = _named(normaliser, NORMALISERS, "normaliser")
        takes = [name for name in given if name in inspect.signature(cls).parameters]
        found, label = cls(**{name: given[name] for name in takes}), f"normaliser {normaliser!r}"
    elif callable(getattr(normaliser, "weights", None)):
        takes, label = [], "a normaliser object"
        found = normaliser if isinstance(normaliser, Normaliser) else _Given(normaliser)
    else:
        raise ValueError(
            f"normaliser must be one of {', '.join(map(repr, NORMALISERS))} or an object with weights(scores), "
            f"got {normaliser!r}"
        )
    for name, is_usual in usual.items():
        if name not in takes and not is_usual:
            raise ValueError(f"{label} takes no {name} from sparsify: leave it out")
    return found


class _Given(Normaliser):
    """Any object with ``weights(scores)``, as a normaliser."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def weights(self, scores: Tensor) -> Tensor:
        return self.given.weights(scores)

    def __repr__(self) -> str:
        return repr(self.given)


def describe(normaliser: Normaliser) -> dict[str, Any]:
    """Name, settings and threshold as JSON takes them; `from_description` makes the normaliser again.

    Raises:
        ValueError: its class, or its threshold's, is in no registry, so that nobody could make it again.
    """
    found: dict[str, Any] = {"name": _name_of(normaliser, NORMALISERS, "NORMALISERS"), **normaliser.settings()}
    if (threshold := normaliser.threshold) is not None:
        kind = _name_of(threshold, THRESHOLDS, "THRESHOLDS")
        found["threshold"] = {"kind": kind, **threshold.settings(), "warmup": threshold.share}
    return found


def from_description(description: Mapping[str, Any]) -> Normaliser:
    """The normaliser that `describe` described; a learned tau gets its start value, which a state_dict replaces.

    Raises:
        ValueError: an unknown name or kind, or a setting out of range.
    """
    settings = dict(description)
    name, threshold = settings.pop("name"), settings.pop("threshold", None)
    if threshold is not None:
        values = dict(threshold)
        kind, warmup = values.pop("kind"), values.pop("warmup", 1.0)
        settings["threshold"] = _named(kind, THRESHOLDS, "kind of threshold")(**values).set_warmup(warmup)
    return _named(name, NORMALISERS, "normaliser")(**settings)


def _named(name: str, registry: Mapping[str, type], what: str) -> Any:
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}: allowed are {', '.join(map(repr, registry))}")
    return registry[name]


def _name_of(thing: object, registry: Mapping[str, type], registry_name: str) -> str:
    for name, cls in registry.items():
        if type(thing) is cls:
            return name
    raise ValueError(f"{type(thing).__name__} is not in {registry_name}, so it cannot be saved by name: add it there")
