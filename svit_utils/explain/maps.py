"""The attention weights that multiply V, of dense, sparse and mixed models, fused or not."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.exclusive import exclusively
from svit_utils.explain.grid import TokenGrid, read_out, token_grid
from svit_utils.explain.layers import Layer, attention_places, check_one_stack
from svit_utils.explain.model_state import at_least_single, unwrap, whole_number
from svit_utils.explain.passing import Layers, one_pass
from svit_utils.explain.pooling import pooling_weights


@exclusively
@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor, layers: Layers = None) -> dict[str, Tensor]:
    """One forward pass of `x` [B, 3, H, W]: layer name -> the weights [B, H, N, N] that multiply V in that layer.

    For a sparse layer these are the weights after the cut, the renormalisation and the empty-row fallback. A zero
    among them says that the value of that key does not reach the query; its score still changes the denominator of the
    softmax, and with it the weights of the keys that stay.

    `layers` are names, indices into the model's attention modules, or None for all that this pass calls. A module that
    stands in several places has a map, a name and an index for each. The maps come in the order of the calls.

    Raises ValueError for a model without readable attention, an unknown layer, one that is not called or whose
    attention cannot be read, and a module that is called more often than it has places. With `layers` None one such
    module is enough: none is left out.
    """
    with one_pass(unwrap(model), x, layers) as (maps, _):
        return {name: weights.detach() for name, weights in maps.items()}


def maps_on_grid(model: nn.Module, x: Tensor, layers: Layers = None) -> tuple[dict[str, Tensor], TokenGrid]:
    """`attention_maps`, checked to be over the tokens of the model's grid (else ValueError), and that grid."""
    grid = token_grid(model, x)
    maps = attention_maps(model, x, layers)
    check_on_grid(maps, grid)
    return maps, grid


def check_on_grid(maps: dict[str, Tensor], grid: TokenGrid) -> None:
    """Raises ValueError unless the maps [B, H, N, N] are over the tokens of the grid."""
    for name, weights in maps.items():
        if (tokens := weights.shape[-1]) != grid.num_tokens:
            raise ValueError(f"layer {name} attends over {tokens} tokens, the model's grid has {grid.num_tokens}")


def class_attention(model: nn.Module, x: Tensor, layer: Layer = -1) -> Tensor:
    """Attention of the classifier's token to every patch, per head: [B, H, h, w], in single precision or wider.

    The mean over the tokens that the classifier reads, `readout_rows`; where it reads them by an attention of its own
    (SigLIP), with the weights of that, mean over its heads. Mass on prefix tokens is left out: a map sums to at most 1.
    Errors as for `maps_on_grid` and `readout_rows`.
    """
    if layer is None or (not isinstance(layer, str) and whole_number(layer) is None and isinstance(layer, Iterable)):
        raise ValueError(f"class_attention shows one layer, by index or name, got {layer!r}")
    with pooling_weights(model) as pooled:
        maps, grid = maps_on_grid(model, x, layer)
    check_one_stack(unwrap(model), [place.name for place in attention_places(model).values() if place.index == 0])
    (weights,) = maps.values()  # [B, H, N, N]
    return read_out(at_least_single(weights), model, grid, *pooled)


def upsample(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """[..., h, w] maps on the token grid (else ValueError) -> [..., H, W] on the image.

    `nearest` keeps the patches visible; `bilinear` (default) is what Grad-CAM figures usually show.
    """
    if maps.ndim < 2:
        raise ValueError(f"maps must be [..., h, w], got shape {tuple(maps.shape)}")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    kwargs = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(flat, size=size, mode=mode, **kwargs).reshape(*maps.shape[:-2], *size)
