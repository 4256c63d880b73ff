"""Put the cut into a timm model, and take it out again, without touching a weight.

A converted module is the same object with another class: its parameters, buffers, hooks and place in the model
stay what they were, so the state_dict keeps its keys and `densify` has nothing to copy back.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from svit_utils.attention.functional import check_backend
from svit_utils.attention.module import SPARSE_CLASSES, SparseAttentionMixin, sparse_class
from svit_utils.attention.normalisers import Normaliser, ThresholdedSoftmax, as_normaliser, describe, from_description
from svit_utils.attention.thresholds import LearnableThreshold, ThresholdLike
from svit_utils.exclusive import exclusive, exclusively

Layer = int | str

_SUPPORTED = ", ".join(f"{cls.__module__}.{cls.__name__}" for cls in SPARSE_CLASSES)
_FAMILIES = "ViT, DeiT, DINOv2, SigLIP, EVA02, DINOv3, NaFlexViT and hybrids such as MobileViT"
_ATTENTION_NAME = re.compile(r"att(entio)?n|parallelscaling|^xca$", re.IGNORECASE)
_POOLING_NAME = re.compile(r"pool", re.IGNORECASE)
# What a sparse module has and its dense twin has not.
_OBSERVERS = ("observers", "row_observers", "input_observers")
_SPARSE_ATTRIBUTES = ("normaliser", "threshold", "backend", *_OBSERVERS)


@dataclass(frozen=True)
class LayerReport:
    """One attention module: its name, class, whether it was converted, and its normaliser or why it was left."""

    name: str
    class_name: str
    converted: bool
    detail: str


@dataclass(frozen=True)
class SparsifyReport:
    """What `sparsify` did, one `LayerReport` per attention module in the model's order."""

    layers: tuple[LayerReport, ...]

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the modules now sparse."""
        return tuple(layer.name for layer in self.layers if layer.converted)

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules left dense, each with the reason."""
        return {layer.name: layer.detail for layer in self.layers if not layer.converted}

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} of {len(self.layers)} attention modules are sparse"]
        for layer in self.layers:
            what = "sparse" if layer.converted else "dense "
            lines.append(f"  {what}  {layer.name} ({layer.class_name}): {layer.detail}")
        return "\n".join(lines)


@exclusively
def sparsify(
    model: nn.Module,
    threshold: ThresholdLike | Mapping[Layer, ThresholdLike] = 0.01,
    *,
    layers: Iterable[Layer] | None = None,
    empty_rows: str = "dense",
    backend: str = "auto",
    normaliser: str | object = "thresholded",
) -> SparsifyReport:
    """Convert the model's self-attention to thresholded attention, in place.

    Where timm's attention is not fused (``timm.layers.set_fused_attn(False)`` before the model is made), the weights
    that are multiplied with V pass through each module's ``attn_drop``, as in a dense timm model: forward hooks,
    backward hooks, timm's ``AttentionExtract(method="hook")`` and tools built on them see the sparse weights.

    Args:
        model: a timm model using ``Attention``, ``AttentionRope`` or ``EvaAttention`` (ViT, DeiT, DINOv2, SigLIP,
            EVA02, DINOv3, NaFlexViT, hybrids such as MobileViT). Modules that are already sparse get the new settings.
        threshold: tau in [0, 1), a tensor [H], a threshold object, or a dict from layer to one of these; with a
            dict and no ``layers``, the layers it names are converted.
        layers: block indices (negative ones count from the end) or module names (``"blocks.3"`` or
            ``"blocks.3.attn"``); all if None.
        empty_rows: what a query gets when no key survives, see `thresholded_softmax`.
        backend: see `thresholded_attention`.
        normaliser: what makes weights of scores: ``"thresholded"``, or one to compare it with: ``"hard_cut"``,
            ``"clipped"``, ``"topk"``, ``"entmax15"``, ``"sparsemax"``, or an object with a method ``weights(scores)``
            such as ``svit_utils.attention.normalisers.TopK(k=32)``. Those
            that have no threshold take none, and no fast ``backend`` computes them.

    Returns:
        A report of every attention module, which says whether it was converted, or left dense and why.

    Raises:
        ValueError: no supported attention in the model, a subclass with a forward of its own, an unknown layer,
            or a setting out of range. The model is then unchanged.
        ImportError: entmax15 or sparsemax without the package entmax.
    """
    check_backend(backend)
    if normaliser != "thresholded" and backend not in ("auto", "reference"):
        raise ValueError(f"backend {backend!r} computes the thresholded softmax only: leave it out with {normaliser!r}")
    if isinstance(layers, (str, int)):
        raise ValueError(f"layers must be a list of block indices or module names, got {layers!r}; write [{layers!r}]")
    supported = _supported_modules(model)
    names = list(supported)
    chosen = None if layers is None else {_find_layer(layer, names) for layer in layers}
    if isinstance(threshold, Mapping):
        per_layer = {
            _find_layer(layer, names): as_normaliser(normaliser, value, empty_rows)
            for layer, value in threshold.items()
        }
        why_left = "not named in the threshold dict" if chosen is None else "not among the chosen layers"
        chosen = set(per_layer) if chosen is None else chosen
        if missing := chosen - set(per_layer):
            raise ValueError(f"the threshold dict gives no value for {', '.join(sorted(missing))}")
    else:
        why_left = "not among the chosen layers"
        chosen = set(names) if chosen is None else chosen
        per_layer = dict.fromkeys(chosen, as_normaliser(normaliser, threshold, empty_rows))
    # Everything that can fail fails before the first module is changed.
    for name in chosen:
        per_layer[name].for_heads(supported[name].num_heads)  # type: ignore[arg-type]

    reports = []
    for name, module in _attention_modules(model, supported):
        if name in chosen:
            _convert(module, per_layer[name], backend)
            detail = _said(module)
        elif isinstance(module, SparseAttentionMixin):  # sparse from an earlier call, not chosen now
            reports.append(LayerReport(name, type(module).__name__, True, f"unchanged: {_said(module)}"))
            continue
        elif name in supported:
            detail = why_left
        elif _POOLING_NAME.search(type(module).__name__):
            detail = "pooling attention, not self-attention between tokens"
        else:
            detail = f"not one of {_SUPPORTED}"
        reports.append(LayerReport(name, type(module).__name__, name in chosen, detail))
    return SparsifyReport(tuple(reports))


@exclusively
def densify(model: nn.Module) -> nn.Module:
    """Undo `sparsify` in place and return the model; weights are not touched, so outputs come back bit for bit.

    Raises:
        ValueError: an attention module was parametrized after it became sparse.
    """
    modules = sparse_modules(model)
    for name, module in modules.items():
        if is_parametrized(module) and "dense_class" not in vars(type(module)):
            raise ValueError(
                f"{name} was parametrized after it became sparse, and would lose that: remove the parametrizations "
                "first (torch.nn.utils.parametrize.remove_parametrizations), or parametrize before sparsify"
            )
    for module in modules.values():
        _restore(module)
    return model


@contextmanager
def sparsified(
    model: nn.Module,
    threshold: ThresholdLike | Mapping[Layer, ThresholdLike] = 0.01,
    *,
    layers: Iterable[Layer] | None = None,
    empty_rows: str = "dense",
    backend: str = "auto",
    normaliser: str | object = "thresholded",
) -> Iterator[SparsifyReport]:
    """`sparsify` for the length of a ``with`` block; afterwards every module is as it was before, sparse or dense.

    The block has the model alone, see `svit_utils.exclusive`: other threads that explain or evaluate it wait.

    Yields:
        The report of `sparsify`.

    Raises:
        RuntimeError: on leaving, where another such block was entered inside (by a generator or an asyncio task, say)
            and is still open. That one keeps its settings, and brings the model back when it ends.
    """
    with exclusive(model, block=True):
        block = _Block({module: _state(module) for module in _supported_modules(model).values()})
        _blocks.append(block)
        overlapping = False
        try:
            yield sparsify(
                model, threshold, layers=layers, empty_rows=empty_rows, backend=backend, normaliser=normaliser
            )
        finally:
            blocks = list(_blocks)
            _blocks.remove(block)
            overlapping = _put_back(model, block, blocks[blocks.index(block) + 1 :])
        if overlapping:
            raise RuntimeError("a `sparsified` block was left before one that was entered inside it")


@dataclass(eq=False)
class _Block:
    """The state in which a block of `sparsified` found each module that can be sparse, to which it goes back."""

    found: dict[nn.Module, tuple[type[nn.Module], dict[str, Any]]]


_blocks: list[_Block] = []  # the open ones, in the order in which they were entered


def _put_back(model: nn.Module, block: _Block, later: list[_Block]) -> bool:
    """Bring each module to what ``block`` found, or leave that to a later block; whether there was a later one."""
    overlapping = False
    for module, state in block.found.items():
        if heir := next((other for other in later if module in other.found), None):
            heir.found[module], overlapping = state, True
        else:
            _bring_to(module, *state)
    for module in sparse_modules(model).values():
        if module not in block.found:  # it came into the model inside the block
            _restore(module)
    return overlapping


def sparse_modules(model: nn.Module) -> dict[str, SparseAttentionMixin]:
    """The model's sparse attention modules by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseAttentionMixin)}


def describe_sparsity(model: nn.Module) -> dict[str, Any]:
    """What `restore_sparsity` needs to make a dense copy of ``model`` sparse again, as JSON takes it.

    Returns:
        ``{}`` for a dense model; else ``{"layers": {name: {"normaliser": ..., "backend": ..., "shares": ...}}}``, where
        layers with the same number under ``shares`` have one threshold between them.

    Raises:
        ValueError: a normaliser or threshold of a class that is in no registry.
    """
    modules = sparse_modules(model)
    ids = [id(module.threshold) for module in modules.values()]
    layers: dict[str, Any] = {}
    for name, module in modules.items():
        layers[name] = {"normaliser": describe(module.normaliser), "backend": module.backend}
        if module.threshold is not None and ids.count(id(module.threshold)) > 1:
            layers[name]["shares"] = ids.index(id(module.threshold))
    return {"layers": layers} if layers else {}


def restore_sparsity(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Make a dense model sparse as `describe_sparsity` says; learned thresholds start where they once started.

    Raises:
        ValueError: a layer that the model does not have, or an unknown normaliser or setting.
    """
    layers = description.get("layers", {})
    if not layers:
        return
    supported = _supported_modules(model)
    if unknown := set(layers) - set(supported):
        raise ValueError(f"the model has no attention {', '.join(sorted(unknown))}; it has {', '.join(supported)}")
    shared: dict[int, Normaliser] = {}
    for name, layer in layers.items():
        normaliser = from_description(layer["normaliser"])
        if "shares" in layer:
            normaliser = shared.setdefault(layer["shares"], normaliser)
        _convert(supported[name], normaliser, layer["backend"])


def _said(module: SparseAttentionMixin) -> str:
    """What the report says of a sparse module: its threshold where it is the method itself, else its normaliser."""
    return repr(module.threshold if type(module.normaliser) is ThresholdedSoftmax else module.normaliser)


def _convert(module: nn.Module, normaliser: Normaliser, backend: str) -> None:
    if not isinstance(module, SparseAttentionMixin):
        module.__class__ = sparse_class(type(module))
    module.set_normaliser(normaliser, backend)  # type: ignore[operator]


def _restore(module: nn.Module) -> None:
    _bring_to(module, type(module).dense_class, {})  # type: ignore[attr-defined]


def _state(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of a module, and what a sparse one has besides what is in its dense twin."""
    kept = {name: getattr(module, name) for name in _SPARSE_ATTRIBUTES if hasattr(module, name)}
    return type(module), kept


def _bring_to(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Back to a `_state`."""
    if isinstance(module, SparseAttentionMixin):
        module.own_children()
    for name in _SPARSE_ATTRIBUTES:
        if name in module.__dict__ or name in module._modules:
            delattr(module, name)
    module.__class__ = cls
    for name, value in attributes.items():
        setattr(module, name, value)
    parameter = next(module.parameters(), None)
    if parameter is not None and attributes.get("threshold") is not None:  # it may have gone to another device
        attributes["threshold"].to(parameter.device)


def _supported_modules(model: nn.Module) -> dict[str, nn.Module]:
    supported = {}
    unsupported = set()
    for name, module in model.named_modules():
        cls = type(module)
        if isinstance(module, SparseAttentionMixin) or sparse_class(cls) is not None:
            supported[name] = module
        elif isinstance(module, tuple(SPARSE_CLASSES)):
            raise ValueError(
                f"{name} is a {cls.__module__}.{cls.__name__}, a subclass of timm's attention with a forward of its "
                f"own, which sparsify cannot convert; supported are {_SUPPORTED} and subclasses that keep their forward"
            )
        elif _is_attention(module) and not _holds_attention(module):
            unsupported.add(f"{cls.__module__}.{cls.__name__}")
    if not supported:
        found = f"its attention is {', '.join(sorted(unsupported))}" if unsupported else "it has no attention module"
        what = f"{type(model).__name__} has no attention that sparsify can convert"
        raise ValueError(f"{what}: {found}; supported are {_SUPPORTED}, as in {_FAMILIES}")
    return supported


def _attention_modules(model: nn.Module, supported: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every attention module of the model, supported or not; a block that holds another one is not counted itself."""
    for name, module in model.named_modules():
        if name in supported or (_is_attention(module) and not _holds_attention(module)):
            yield name, module


def _is_attention(module: nn.Module) -> bool:
    """Attention by its class name, and with weights, so that a helper without any is not taken for one."""
    return bool(_ATTENTION_NAME.search(type(module).__name__)) and any(True for _ in module.parameters())


def _holds_attention(module: nn.Module) -> bool:
    return any(_is_attention(inner) for inner in module.modules() if inner is not module)


def mixes_tokens(module: nn.Module) -> bool:
    """Attention between tokens, by its class name; not the kind that pools them."""
    return _is_attention(module) and not _POOLING_NAME.search(type(module).__name__)


def _find_layer(layer: Layer, names: list[str]) -> str:
    if isinstance(layer, int) and not isinstance(layer, bool) and -len(names) <= layer < len(names):
        return names[layer]
    if isinstance(layer, str):
        for name in names:
            if name == layer or name.rpartition(".")[0] == layer:
                return name
    raise ValueError(f"unknown layer {layer!r}: allowed are 0 to {len(names) - 1} or one of {', '.join(names)}")


def learnable_thresholds(model: nn.Module) -> dict[str, LearnableThreshold]:
    """The model's learnable thresholds by module name; one shared by all layers appears once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LearnableThreshold)}
