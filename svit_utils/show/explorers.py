"""What the two explorers show, as pure functions: compute the maps once, then answer any question about them at once.

The widget and its stand-in on a printed page call the same function, so a cell can check what a slider would show.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from svit_utils.attention import sparse_modules, sparsified
from svit_utils.exclusive import exclusively
from svit_utils.explain.grid import TokenGrid
from svit_utils.explain.maps import maps_on_grid
from svit_utils.referee.inputs import check_tau
from svit_utils.show.panels import compose, image_panel, row_panel, weights_panel
from svit_utils.show.pictures import to_rgb


@dataclass(frozen=True)
class Survivors:
    """One row of attention under one threshold: the formula alone, before any fallback for empty rows."""

    kept: np.ndarray  # [N] bool: p > tau
    weights: np.ndarray  # [N] ReLU(p - tau) over its sum; all 0 in an empty row
    kept_mass: float  # sum of p over the survivors

    @property
    def count(self) -> int:
        return int(self.kept.sum())

    @property
    def empty(self) -> bool:
        """No key survives: the formula reads 0/0, and `empty_rows` decides."""
        return self.count == 0


@dataclass(frozen=True)
class ThresholdData:
    """Dense attention of one image for every layer, head and token. Any threshold can be applied to it afterwards."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    probabilities: np.ndarray  # float32 [L, heads, N, N]
    layers: list[str]
    grid: TokenGrid

    def survivors(self, token: int, layer: int, head: int, tau: float) -> Survivors:
        """The row of the query `token` cut at `tau`; ValueError for an index out of range, or tau outside [0, 1)."""
        check_indices(self.probabilities.shape, layer=layer, head=head, token=token)
        check_tau(tau)
        p = self.probabilities[layer, head, token]
        kept = p > tau
        remainder = np.where(kept, p - np.float32(tau), 0)
        total = remainder.sum()
        return Survivors(kept, remainder / total if total > 0 else remainder, float(p[kept].sum()))


@dataclass(frozen=True)
class AttentionData:
    """Dense and sparse attention of some images."""

    rgb: list[np.ndarray]  # uint8 [H, W, 3] per image
    dense: np.ndarray  # float32 [B, L, heads, N, N]
    sparse: np.ndarray  # the same, of the sparse model
    layers: list[str]
    grid: TokenGrid

    def rows(self, image: int, layer: int, head: int, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The weights [N] of one query, dense and sparse; ValueError for an index out of range."""
        check_indices(self.dense.shape, image=image, layer=layer, head=head, token=token)
        return self.dense[image, layer, head, token], self.sparse[image, layer, head, token]


def check_indices(shape: tuple[int, ...], **indices: int) -> None:
    """ValueError unless each index lies in its axis, from the first one on."""
    for size, (name, value) in zip(shape, indices.items()):
        if not 0 <= value < size:
            raise ValueError(f"{name} must lie in 0 to {size - 1}, got {value!r}")


def stacked(maps: dict[str, Tensor]) -> np.ndarray:
    """Layer name -> [B, heads, N, N] to one array [B, L, heads, N, N]."""
    return torch.stack(list(maps.values()), dim=1).float().cpu().numpy()


def dense_maps(model: nn.Module, batch: Tensor) -> tuple[dict[str, Tensor], TokenGrid]:
    """The maps of one forward pass with dense attention; a sparse model's thresholds are set to 0 for it."""
    with sparsified(model, 0.0) if sparse_modules(model) else nullcontext():
        return maps_on_grid(model, batch)


@exclusively
def threshold_explorer_data(model: nn.Module, image: Tensor, display: Any | None = None) -> ThresholdData:
    """One forward pass of `image` [3, H, W] (else ValueError) through the model with dense attention.

    `display` is the same image in [0, 1] for showing; without it a normalised image is stretched to its range.
    """
    if image.ndim != 3:
        raise ValueError(f"the explorer takes one image [3, H, W], got shape {tuple(image.shape)}")
    maps, grid = dense_maps(model, image[None])
    return ThresholdData(to_rgb(image if display is None else display), stacked(maps)[0], list(maps), grid)


@exclusively
def attention_explorer_data(
    model: nn.Module, images: Tensor, sparse_model: nn.Module | None = None, *, display: Any = None, **as_sparsify: Any
) -> AttentionData:
    """Dense maps of `model` beside those of `sparse_model`, for images [B, 3, H, W]; the same in [0, 1] as `display`.

    Without a `sparse_model`, `model` itself is made sparse for one pass: `sparsify(model, **as_sparsify)`.
    """
    dense, grid = dense_maps(model, images)
    with sparsified(model, **as_sparsify) if sparse_model is None else nullcontext():
        sparse, _ = maps_on_grid(model if sparse_model is None else sparse_model, images)
    shown = [to_rgb(image) for image in (images if display is None else display)]
    return AttentionData(shown, stacked(dense), stacked(sparse), list(dense), grid)


def token_name(token: int, grid: TokenGrid) -> str:
    """What a token is: "class token", "prefix token 1", or the row and column of its patch."""
    if token < grid.num_prefix:
        return "class token" if token == 0 else f"prefix token {token}"
    row, column = divmod(token - grid.num_prefix, grid.width)
    return f"patch row {row}, column {column}"


def threshold_lines(data: ThresholdData, token: int, layer: int, head: int, tau: float) -> list[str]:
    """What `threshold_picture` shows, as two sentences."""
    row = data.survivors(token, layer, head, tau)
    where = f"{token_name(token, data.grid)}, {data.layers[layer]}, head {head}, τ = {tau:.4g}"
    if row.empty:
        return [where, f"no key of {len(row.kept)} survives: the formula reads 0/0, empty_rows decides"]
    return [where, f"{row.count} of {len(row.kept)} keys survive, with {row.kept_mass:.1%} of the attention"]


def threshold_picture(
    data: ThresholdData, token: int = 0, layer: int = 0, head: int = 0, tau: float = 0.01
) -> Image.Image:
    """The threshold explorer's picture: the query in the image, its row against tau, the weights of the survivors."""
    weights = data.survivors(token, layer, head, tau).weights
    top = float(weights[data.grid.num_prefix :].max(initial=0))
    panels = {
        "image and query": image_panel(data.rgb, data.grid, token),
        "softmax row, log axis, and τ": row_panel(data.probabilities[layer, head, token], tau, data.grid),
        "weights after the cut": weights_panel(weights, data.grid, token, top),
    }
    return compose(panels, threshold_lines(data, token, layer, head, tau))


def attention_lines(data: AttentionData, image: int, layer: int, head: int, token: int) -> list[str]:
    """What `attention_picture` shows, as two sentences."""
    _, sparse = data.rows(image, layer, head, token)
    where = f"image {image}, {token_name(token, data.grid)}, {data.layers[layer]}, head {head}"
    return [where, f"{int((sparse > 0).sum())} of {len(sparse)} keys have a weight in the sparse model"]


def attention_picture(
    data: AttentionData, image: int = 0, layer: int = 0, head: int = 0, token: int = 0
) -> Image.Image:
    """The attention explorer's picture: the query in the image, its dense and sparse weights on one colour scale."""
    dense, sparse = data.rows(image, layer, head, token)
    top = float(max(row[data.grid.num_prefix :].max() for row in (dense, sparse)))
    panels = {
        "image and query": image_panel(data.rgb[image], data.grid, token),
        "dense": weights_panel(dense, data.grid, token, top),
        "sparse (struck: exactly 0)": weights_panel(sparse, data.grid, token, top),
    }
    return compose(panels, attention_lines(data, image, layer, head, token))
