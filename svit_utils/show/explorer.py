"""The explorer: rows of attention of some pictures, packed for a page that cuts them at any threshold without a kernel.

The page is drawn by explorer.js beside this file: in a notebook as a widget (`svit_utils.show.widgets.Explorer`), on a
static page by `explorer_html`. Weights travel as one byte each, which counts the edges of a logarithmic scale that lie
below the weight. The threshold stops at these edges only, so which keys survive is exact; a weight is the middle of its
bin, with the relative error that `ExplorerData.packed` states.
"""

import base64
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from svit_utils.attention import sparse_modules, sparsified
from svit_utils.attention.formula import cut_and_renormalise
from svit_utils.attention.thresholds import check_empty_rows
from svit_utils.exclusive import exclusively
from svit_utils.explain.grid import TokenGrid
from svit_utils.explain.layers import Layer, find_layer
from svit_utils.explain.maps import maps_on_grid
from svit_utils.referee.inputs import check_tau
from svit_utils.show.explorers import check_indices, dense_maps, stacked
from svit_utils.show.pictures import as_array, colour_map, to_rgb

FINE = 1e-3
SCRIPT = Path(__file__).with_suffix(".js")
# Thresholds that the chapters use, whether or not they lie on the logarithmic scale.
_NAMED = (0.0025, 0.005, 0.02, 0.05, 0.2, 0.5)
_START: dict[str, Any] = {"picture": 0, "layer": 0, "head": 0, "token": 0, "tau": 0.01, "empty_rows": "dense"}


def edges(tokens: int) -> np.ndarray:
    """The edges of the bins, float32: 10 from 1e-4 to `FINE`, then 40 a decade to 1, with the chapters' taus and 1/N.

    N is `tokens`. Half of all weights lie below `FINE`, where no threshold of use lies.
    """
    scale = np.concatenate([np.geomspace(1e-4, FINE, 10, endpoint=False), np.geomspace(FINE, 1, 121)])
    extra = [tau for tau in (*_NAMED, 1 / tokens) if tau >= 1e-4]
    near = np.abs(np.log(scale[:, None] / np.asarray(extra))) < 1e-3  # an edge so near would only make an empty bin
    return np.unique(np.concatenate([scale[~near.any(axis=1)], extra])).astype(np.float32)


def middles(bounds: np.ndarray) -> np.ndarray:
    """What stands for the weights of each bin: half of the first edge below it, then the geometric middle of two."""
    return np.concatenate([[bounds[0] / 2], np.sqrt(bounds[:-1].astype(float) * bounds[1:])])


@dataclass(frozen=True)
class ExplorerData:
    """Softmax rows of some pictures, in a pass with dense attention and in one that cuts every layer.

    The reference of what the page shows: `weights` computes it from the rows as they were, before they were packed.
    """

    rgb: list[np.ndarray]  # uint8 [H, W, 3] per picture
    dense: np.ndarray  # float32 [B, L, heads, N, N]
    sparse: np.ndarray  # the same: the softmax rows before the cut, of the pass that cuts every layer
    layers: list[str]
    grid: TokenGrid
    threshold: float | None  # of the pass that cuts every layer; None where its layers have several
    names: list[str]  # of the pictures
    masks: list[np.ndarray | None]  # bool [H, W] per picture, True on the object; None: no outline is drawn

    def weights(
        self,
        picture: int,
        layer: int,
        head: int,
        token: int,
        tau: float,
        empty_rows: str = "dense",
        *,
        sparse: bool = False,
    ) -> np.ndarray:
        """The weights [N] of one query, cut at `tau`; ValueError for an index out of range or tau outside [0, 1)."""
        rows = self.sparse if sparse else self.dense
        check_indices(rows.shape, picture=picture, layer=layer, head=head, token=token)
        check_tau(tau)
        check_empty_rows(empty_rows)
        return cut_and_renormalise(torch.from_numpy(rows[picture, layer, head, token]), tau, empty_rows).numpy()

    def packed(self, **start: Any) -> tuple[dict[str, Any], bytes]:
        """What explorer.js takes: a description that JSON can hold, and the rows as zlib-compressed bytes.

        `start` is where it opens: `picture`, `layer`, `head`, `token`, `tau`, `empty_rows`. Layers whose rows are the
        same in both passes are sent once. ``errors`` in the description are the largest relative errors of a weight:
        above `FINE`, and between the first edge and there.
        """
        bounds = edges(self.grid.num_tokens)
        first = {**_START, **start}
        if unknown := set(first) - set(_START):
            raise ValueError(f"the explorer starts at {', '.join(_START)}, got {', '.join(sorted(unknown))}")
        self.weights(**first)  # or ValueError
        tau = first["tau"]
        first["tau"] = float(f"{bounds[np.abs(np.log(bounds / max(tau, 1e-9))).argmin()]:.7g}")
        # How many edges lie below each weight; the last, 1, never does.
        levels, second = (np.searchsorted(bounds[:-1], rows).astype(np.uint8) for rows in (self.dense, self.sparse))
        own = [layer for layer in range(len(self.layers)) if (levels[:, layer] != second[:, layer]).any()]
        errors = np.sqrt(bounds[1:] / bounds[:-1]) - 1
        header = {
            "grid": [self.grid.num_prefix, self.grid.height, self.grid.width],
            "layers": self.layers,
            "heads": self.dense.shape[2],
            "threshold": self.threshold,
            "sparse_layers": own,
            "edges": [float(f"{edge:.7g}") for edge in bounds],
            "values": [float(f"{value:.6g}") for value in middles(bounds)],
            "fine": FINE,
            "errors": [float(errors[bounds[:-1] >= FINE].max()), float(errors.max())],
            "colours": _base64(colour_map(np.linspace(0, 1, 64)).tobytes()),
            "pictures": [self._picture(index) for index in range(len(self.rgb))],
            "start": first,
        }
        return header, zlib.compress(levels.tobytes() + second[:, own].tobytes(), 9)

    def _picture(self, index: int) -> dict[str, Any]:
        buffer, mask = io.BytesIO(), self.masks[index]
        kind = "PNG" if max(self.rgb[index].shape) < 128 else "JPEG"  # a photograph as PNG would outweigh its rows
        Image.fromarray(self.rgb[index]).save(buffer, format=kind, quality=85)
        return {
            "name": self.names[index],
            "source": f"data:image/{kind.lower()};base64,{_base64(buffer.getvalue())}",
            "size": list(self.rgb[index].shape[:2] if mask is None else mask.shape),
            "outline": [] if mask is None else outline(mask),
        }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def outline(mask: np.ndarray) -> list[list[int]]:
    """Where a bool mask [H, W] ends: lines [x1, y1, x2, y2] along the edges of its pixels, as long as they can be."""
    lines: list[list[int]] = []
    for transposed in (False, True):
        area = np.pad(mask.T if transposed else mask, 1)
        for y, row in enumerate(np.diff(area.astype(np.int8), axis=0) != 0):
            ends = np.flatnonzero(np.diff(row.astype(np.int8)))  # where a line along this border starts and stops
            for x1, x2 in ends.reshape(-1, 2).tolist():
                lines.append([y, x1, y, x2] if transposed else [x1, y, x2, y])
    return lines


@exclusively
def explorer_data(
    model: nn.Module,
    images: Tensor,
    sparse_model: nn.Module | None = None,
    *,
    display: Any = None,
    masks: Any = None,
    names: Sequence[str] | None = None,
    layers: Sequence[Layer] | None = None,
    **as_sparsify: Any,
) -> ExplorerData:
    """Two forward passes of `images` [B, 3, H, W]: with dense attention, and cut in every layer.

    Args:
        model: a timm ViT whose attention can be read (else ValueError), dense or sparse.
        sparse_model: what is run for the second pass. Without it, `model` is made sparse for this one pass:
            `sparsify(model, **as_sparsify)`.
        display: the images in [0, 1], for showing; without it normalised images are stretched to their range.
        masks: [H, W] boolean per image, True on the object whose outline is drawn; None for an image without.
        names: a text per picture.
        layers: which of the model's layers to keep, by index or name, so that a page stays small; None for all.

    Raises:
        ValueError: an unknown layer, another number of names or masks than of images, models with different layers.
    """
    for what, given in (("display", display), ("masks", masks), ("names", names)):
        if given is not None and len(given) != len(images):
            raise ValueError(f"{what} must be one for each of the {len(images)} images, got {len(given)}")
    dense, grid = dense_maps(model, images)
    with sparsified(model, **as_sparsify) if sparse_model is None else nullcontext():
        sparse, threshold = _uncut_maps(model if sparse_model is None else sparse_model, images)
    if list(sparse) != list(dense):
        raise ValueError(f"the sparse model has other layers, {list(sparse)}, than the dense one, {list(dense)}")
    kept = list(dense) if layers is None else [list(dense)[find_layer(layer, list(dense))] for layer in layers]
    rows = (stacked({name: maps[name] for name in kept}) for maps in (dense, sparse))
    return ExplorerData(
        rgb=[to_rgb(image) for image in (images if display is None else display)],
        dense=next(rows),
        sparse=next(rows),
        layers=kept,
        grid=grid,
        threshold=threshold,
        names=list(names) if names is not None else [f"picture {index + 1}" for index in range(len(images))],
        masks=[None if m is None else as_array(m, bool) for m in ([None] * len(images) if masks is None else masks)],
    )


def _uncut_maps(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], float | None]:
    """The softmax rows of each layer before the cut, while every layer is cut; and tau, if it is the same for all."""
    found: dict[nn.Module, list[Tensor]] = {}
    taus: set[float] = set()

    def watch(module: Any, record: Any) -> None:
        found.setdefault(module, []).append(record.probs.detach())
        taus.update(torch.as_tensor(record.tau).unique().tolist())

    modules = list(dict.fromkeys(sparse_modules(model).values()))
    for module in modules:
        module.observers.append(watch)
    try:
        maps, _ = maps_on_grid(model, images)
    finally:
        for module in modules:
            module.observers.remove(watch)
    calls = {module: iter(rows) for module, rows in found.items()}
    uncut = {}
    for name, weights in maps.items():
        module = model.get_submodule(name)
        uncut[name] = next(calls[module]) if module in calls else weights  # what is not cut
    return uncut, taus.pop() if len(taus) == 1 else None


def explorer_html(header: dict[str, Any], rows: bytes) -> str:
    """The explorer for a static page, from `ExplorerData.packed`: one element with all it needs; nothing is fetched.

    Where scripts do not run, a sentence stands in its place.
    """
    # A tag inside a string would end the script.
    description = json.dumps(header, separators=(",", ":")).replace("<", "\\u003c")
    packed = _base64(rows)
    mark = hashlib.sha256((description + packed).encode()).hexdigest()[:12]
    # The book's theme puts what is HTML on a light ground; the explorer brings its own.
    return f"""<style>.text_html:has(.svit-explorer) {{ background: none !important; padding: 0 !important; }}</style>
<div class="svit-explorer" data-explorer="{mark}">
<p>The explorer: run this cell, or open this page in the book, to choose a query and to move the threshold.</p></div>
<script type="module">
{SCRIPT.read_text(encoding="utf-8")}
for (const host of document.querySelectorAll('[data-explorer="{mark}"]'))
  if (!host.explorer) mount(host, {description}, "{packed}");
</script>
"""
