"""Interventions: what the model would have said if one thing inside had been otherwise.

A map claims which parts of the computation mattered; changing a part and asking again tests it. Each function here is a
context manager. For the body of its `with` the model computes with the change, whoever calls it in this thread, in
whatever mode it is; afterwards it is as it was before, also after an error. They may be nested. The body has the model
alone, see `svit_utils.exclusive`; other threads' predictions are not changed.

    with cut_edge(model, layer=-1, query=0, key=17):
        changed = model(images)

Attention is computed unfused meanwhile, and nothing runs compiled: outputs differ by rounding even where the change is
none. A `layer` given by index is counted as in `attention_maps`. Raises ValueError for an unknown layer and one whose
attention cannot be read; and, when the model is called, for tokens or heads that it does not have, and for a module
that is called more or less often than it has places.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating, exclusive, in_this_thread
from svit_utils.explain.gradcam import Layer as AnyLayer
from svit_utils.explain.gradcam import layer_place
from svit_utils.explain.layers import Layer, Place, find_layer, places
from svit_utils.explain.model_state import check_images, in_precision_of, uncompiled, unwrap, whole_number
from svit_utils.explain.passing import in_backward, readable_places, weights_passing

Numbers: TypeAlias = int | Sequence[int] | Tensor | np.ndarray


@contextmanager
def cut_edge(
    model: nn.Module,
    layer: Layer,
    query: Numbers,
    key: Numbers,
    *,
    head: Numbers | None = None,
    renormalise: bool = False,
) -> Iterator[None]:
    """The weight A_ij of queries i on keys j is 0 in one layer, after the cut: the values of j do not reach i there.

        A_ij <- 0;   with `renormalise` also A_i <- A_i / sum_j A_ij, where something is left

    Without `renormalise` all other weights stay as they are, and the query gets less in sum; with it, what was cut goes
    to the keys that are left. Neither asks what the softmax would have made of a missing key. Where the weight is 0
    already, as for a key that the threshold cut, nothing changes.

    Args:
        query, key: token numbers, prefix tokens first; of several, all pairs are cut.
        head: those heads; None for all.
    """
    queries, keys, heads = _numbers("query", query), _numbers("key", key), _heads(head)

    def edit(weights: Tensor) -> Tensor:
        chosen = range(weights.shape[1]) if heads is None else _below("head", heads, weights.shape[1])
        gone = torch.zeros(weights.shape[1:], dtype=torch.bool, device=weights.device)  # [H, N, N]
        rows, columns = _below("query", queries, weights.shape[2]), _below("key", keys, weights.shape[3])
        gone[np.ix_(list(chosen), rows, columns)] = True
        left = weights.masked_fill(gone, 0.0)
        if not renormalise:
            return left
        total = left.sum(dim=-1, keepdim=True)  # [B, H, N, 1]
        whole = gone.any(dim=-1, keepdim=True) & (total > 0)
        return torch.where(whole, left / torch.where(total > 0, total, 1.0), left)

    with _weights_edited(model, layer, edit):
        yield


@contextmanager
def ablate_head(model: nn.Module, layer: Layer, head: Numbers) -> Iterator[None]:
    """Heads of one layer give 0 for every token (before the output projection, whose bias stays).

    Michel et al. 2019, "Are Sixteen Heads Really Better than One?", arXiv:1905.10650, section 2.3: xi_h = 0.
    """
    heads = _numbers("head", head)

    def edit(weights: Tensor) -> Tensor:
        gone = torch.zeros(weights.shape[1], dtype=torch.bool, device=weights.device)
        gone[_below("head", heads, weights.shape[1])] = True
        return weights.masked_fill(gone[:, None, None], 0.0)

    with _weights_edited(model, layer, edit):
        yield


@contextmanager
def patch_activation(model: nn.Module, layer: AnyLayer, tokens: Numbers, source: Tensor) -> Iterator[None]:
    """The outputs of a layer at some tokens are those that it has for other images.

    Activation patching, or interchange intervention: Vig et al. 2020, arXiv:2004.12265; how to read it, Heimersheim and
    Nanda 2024, arXiv:2404.15255. Patching all tokens of a block's output makes the model say what it says of `source`.

    Args:
        layer: what has an output [B, N, C]: the index of a block, for what leaves it; a name; or a module.
        tokens: token numbers, prefix tokens first.
        source: images [B, 3, H, W], or [1, 3, H, W] for all images alike, seen by the model in evaluation mode as the
            `with` begins; or activations [B, N, C] themselves (zeros, a mean).
    """
    model, numbers = unwrap(model), _numbers("tokens", tokens)
    index = whole_number(layer)
    blocks = [name for name in places(model) if name.rpartition(".")[0] == "blocks"]
    place = layer_place(model, layer if index is None else blocks[find_layer(index, blocks, "layer")])
    with exclusive(model, block=True), uncompiled():
        put = source.detach() if isinstance(source, Tensor) and source.ndim == 3 else _recorded(model, place, source)

        def edit(out: Any) -> Tensor:
            if not isinstance(out, Tensor) or out.ndim != 3:
                got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(f"{place} has no output [B, N, C], got {got}: give a block or a norm of one")
            if put.shape[1:] != out.shape[1:] or len(put) not in (1, len(out)):
                fits = f"1 or {len(out)} images with activations {tuple(out.shape[1:])}"
                raise ValueError(f"source must be {fits}, got activations of shape {tuple(put.shape)}")
            at = torch.zeros(out.shape[1], 1, dtype=torch.bool, device=out.device)
            at[_below("tokens", numbers, out.shape[1])] = True
            return torch.where(at, put.to(out), out)

        with ExitStack() as stack:
            its_turn = stack.enter_context(_turns(model, place))

            def replace(_module: nn.Module, _args: object, out: Any) -> Any:
                return edit(out) if its_turn() else None

            # First of the hooks: the one that counts the calls must come after it.
            stack.callback(place.module.register_forward_hook(in_this_thread(replace), prepend=True).remove)
            yield


def _recorded(model: nn.Module, place: Place, images: Any) -> Tensor:
    """What `place` gives for the images [B, 3, H, W]."""
    check_images(images)
    seen: list[Tensor] = []
    handle = place.module.register_forward_hook(in_this_thread(lambda _module, _args, out: seen.append(out)))
    try:
        with evaluating(model), torch.no_grad():
            model(in_precision_of(model, images))
    finally:
        handle.remove()
    return seen[place.call(len(seen))]


@contextmanager
def _weights_edited(model: nn.Module, layer: Layer, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    model = unwrap(model)
    found, (name,) = readable_places(model, [layer])  # type: ignore[misc]
    place = found[name]
    with exclusive(model, block=True), uncompiled(), _turns(model, place) as its_turn:

        def visit(_module: nn.Module, weights: Tensor) -> Tensor | None:
            return edit(weights) if its_turn() else None

        with weights_passing([place.module], visit):
            yield


@contextmanager
def _turns(model: nn.Module, place: Place) -> Iterator[Callable[[], bool]]:
    """A function that says whether the call of `place.module` that is running is the one that belongs to the place.

    At the end of every forward pass of the model, ValueError where there is no saying which call that was.
    """
    wanted, calls = place.call(len(place.names)), 0

    def begin(_module: nn.Module, _args: object) -> None:
        nonlocal calls
        calls = 0

    def count(_module: nn.Module, _args: object, _out: object) -> None:
        nonlocal calls
        calls += not in_backward()

    def end(_module: nn.Module, _args: object, _out: object) -> None:
        if not in_backward() and place.call(calls) != wanted:
            raise ValueError(f"{place} was called {calls} time(s) in one forward pass: give its name {place.names[0]}")

    def its_turn() -> bool:
        if len(place.names) == 1:
            return True
        if in_backward():
            raise ValueError(
                f"{place} stands in several places, and gradient checkpointing repeats its calls: turn it off"
            )
        return calls % len(place.names) == wanted

    with ExitStack() as stack:
        stack.callback(place.module.register_forward_hook(in_this_thread(count)).remove)
        stack.callback(model.register_forward_pre_hook(in_this_thread(begin)).remove)
        stack.callback(model.register_forward_hook(in_this_thread(end)).remove)
        yield its_turn


def _heads(head: Numbers | None) -> list[int] | None:
    return None if head is None else _numbers("head", head)


def _numbers(what: str, given: Any) -> list[int]:
    """One or several whole numbers of at least 0, as a list; ValueError for others."""
    one = whole_number(given)
    several = [one] if one is not None else given
    if isinstance(several, (Tensor, np.ndarray)):
        several = several.tolist()
    try:
        found = [whole_number(value) for value in several]
    except TypeError:
        found = [None]
    if not found or any(value is None or value < 0 for value in found):
        raise ValueError(f"{what} must be one or several whole numbers of at least 0, got {given!r}")
    return [value for value in found if value is not None]


def _below(what: str, numbers: list[int], size: int) -> list[int]:
    if max(numbers) >= size:
        raise ValueError(f"{what} must lie in 0 to {size - 1} here, got {max(numbers)}")
    return numbers
