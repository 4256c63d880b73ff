"""The layers of a model by place: one module may stand in several, and each call of it belongs to one of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from svit_utils.attention.module import SparseAttentionMixin
from svit_utils.attention.surgery import mixes_tokens
from svit_utils.explain.model_state import unwrap, whole_number

Layer: TypeAlias = int | str | np.integer | Tensor

READABLE = (Attention, AttentionRope, EvaAttention, ParallelScalingBlock)
SUPPORTED = f"timm's {', '.join(c.__name__ for c in READABLE)} with timm's own forward, and their sparse forms"


@dataclass(frozen=True)
class Place:
    """A module at one of the places where it stands, by their `names` in the model's order; None leaves open which."""

    module: nn.Module
    names: tuple[str, ...]
    index: int | None

    @property
    def name(self) -> str:
        return self.names[self.index or 0]

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    def call(self, calls: int) -> int:
        """Which of the module's `calls` in a forward pass belongs to this place, from 0; ValueError if none is sure to.

        As many calls as places belong to them in turn. To a single call all names belong, as where a part of the model
        has a second name.
        """
        if calls == 0:
            raise ValueError(f"{self.name} was not called in this forward pass: give a layer that was")
        if calls == 1:
            return 0
        if calls != len(self.names):
            raise ValueError(
                f"{self.name} was called {calls} times in one forward pass, but stands in {len(self.names)} place(s) "
                f"of the model, so there is no saying which call is meant: explain one pass of one model, and give "
                f"each call a place of its own, as nn.Sequential(*[block] * {calls}) does"
            )
        if self.index is None:
            raise ValueError(f"the layer stands in several places: give a name of it, of {', '.join(self.names)}")
        return self.index


def places(model: nn.Module) -> dict[str, Place]:
    """Every module by the name of its place, in the model's order. A compiled part goes by what was compiled."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{type(model).__name__} is TorchScript, which takes no hooks: explain what it was made from")
    named: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "_orig_mod", None) is None:
            named[".".join(part for part in name.split(".") if part != "_orig_mod")] = module
    of: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in named.items():
        of[module] = (*of.get(module, ()), name)
    return {name: Place(module, of[module], of[module].index(name)) for name, module in named.items()}


def called_places(found: Mapping[str, Place], calls: Mapping[nn.Module, int]) -> dict[str, int]:
    """Name -> which call of its module, for all calls of a forward pass; a module called once has its first name.

    Raises ValueError as `Place.call`.
    """
    called = {name: place for name, place in found.items() if calls[place.module]}
    return {n: p.call(calls[p.module]) for n, p in called.items() if p.index == 0 or calls[p.module] > 1}


def is_readable(module: nn.Module) -> bool:
    """Sparse, or of a timm class, with timm's own forward: another one may multiply other weights with V."""
    return isinstance(module, SparseAttentionMixin) or any(type(module).forward is c.forward for c in READABLE)


def attention_places(model: nn.Module) -> dict[str, Place]:
    """The places of attention between tokens, readable or not, in the model's order.

    What cannot be read is known by its class name; a part of the model's `blocks` that has weights, and no attention
    known by name, is taken for attention as well.
    """
    found = places(unwrap(model))

    def within(name: str, names: list[str]) -> bool:
        return any(other != name and other.startswith(f"{name}." if name else "") for other in names)

    readable = [name for name, place in found.items() if is_readable(place.module)]
    kind = {name for name, place in found.items() if isinstance(place.module, READABLE) or mixes_tokens(place.module)}
    named = [name for name in kind if not within(name, readable)]
    attention = {*readable, *(name for name in named if not within(name, named))}
    for name, place in found.items():
        is_block = name.rpartition(".")[0] == "blocks" and any(True for _ in place.module.parameters())
        if is_block and name not in attention and not within(name, list(attention)):
            attention.add(name)
    return {name: place for name, place in found.items() if name in attention}


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every self-attention module whose map can be read, by the name of its place, in the model's order.

    These are the sparse ones, and timm's `Attention`, `AttentionRope`, `EvaAttention` and `ParallelScalingBlock` with
    timm's own forward. A subclass with another forward is left out: the weights read from it might not be those that it
    multiplies with V. A module that stands in several places is named once for each.
    """
    return {name: place.module for name, place in attention_places(model).items() if is_readable(place.module)}


def block_of(name: str) -> str:
    """The name up to its first number: "blocks.3" of "blocks.3.attn"."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def check_one_stack(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError unless the layers of these names are in one list of blocks, as those of one tower are."""
    stacks = list(dict.fromkeys(block_of(name).rpartition(".")[0] for name in names))
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} has attention in {' and '.join(stacks)}, and not in layers that follow one after "
            f"another up to one head: explain each of these models by itself, or use `attention_maps`"
        )


def find_layer(layer: object, names: list[str], what: str = "attention layer") -> int:
    """The index in `names` of a layer given by index, name, or name of the block that holds it (else ValueError)."""
    index = whole_number(layer)
    if index is not None and -len(names) <= index < len(names):
        return index % len(names)
    if isinstance(layer, str) and layer:
        for candidates in (names, [name.rpartition(".")[0] for name in names]):
            if layer in candidates:
                return candidates.index(layer)
    shown = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
    allowed = f"indices {-len(names)} to {len(names) - 1} and the names {', '.join(names)}"
    raise ValueError(f"unknown {what} {shown}: allowed are {allowed}")
