"""The maps that the study scores, by name: [B, h, w] each on the token grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svit_utils.explain import attention_maps, displayed, displayed_top, grad_cam, readout_rows, rollout_matrix
from svit_utils.explain.grid import TokenGrid, token_grid
from svit_utils.referee import centre_maps, edge_maps, random_maps, uniform_maps

CHUNK = 50  # images at a time: the maps of all layers of 50 images take some 100 MB

MODEL_MAPS = ("attention", "rollout", "grad_cam")
DISPLAYED = {"attention": "attention_displayed", "rollout": "rollout_displayed"}
MATCHED = "attention_matched"
BASELINE_MAPS = ("random", "centre", "edge", "uniform")


def class_rows(model: nn.Module, grid: TokenGrid, weights: Tensor) -> Tensor:
    """The classifier's row of a layer's weights [B, H, N, N], prefix included: [B, H, N]."""
    return weights[:, :, readout_rows(model, grid).to(weights.device)].mean(dim=2)


def on_grid(rows: Tensor, grid: TokenGrid) -> Tensor:
    """[..., N] to [..., h, w]: the patches of a row."""
    return rows[..., grid.num_prefix :].unflatten(-1, grid.size)


def attention_views(
    model: nn.Module, x: Tensor, tau: float | None, partner: nn.Module | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Attention and rollout of the images ``x`` [B, 3, H, W].

    Args:
        model: dense or sparse.
        x: images; at most `CHUNK` at a time, for their maps' memory.
        tau: for a dense model, the threshold that its attention is also displayed through; None for no such view.
        partner: a sparse model; of the dense one's last class row, as many of the largest keys as the partner keeps are
            then shown as well, head by head and image by image.

    Returns:
        The maps by name, and the class token's rows by layer and head [B, L, H, h, w].
    """
    grid = token_grid(model, x)
    layers = list(attention_maps(model, x).values())  # L of [B, H, N, N]
    rows = torch.stack([class_rows(model, grid, weights) for weights in layers], dim=1)  # [B, L, H, N]

    def rolled(maps: list[Tensor]) -> Tensor:
        return on_grid(class_rows(model, grid, rollout_matrix(maps)[:, None]).squeeze(1), grid)

    last = rows[:, -1]  # [B, H, N]
    views = {"attention": on_grid(last, grid).mean(dim=1), "rollout": rolled(layers)}
    if tau is not None:
        shown = [displayed(weights, tau) for weights in layers]
        views["attention_displayed"] = on_grid(class_rows(model, grid, shown[-1]), grid).mean(dim=1)
        views["rollout_displayed"] = rolled(shown)
    if partner is not None:
        (theirs,) = attention_maps(partner, x, layers=-1).values()
        kept = (class_rows(partner, grid, theirs) > 0).sum(dim=-1)  # [B, H]
        views[MATCHED] = on_grid(displayed_top(last, kept), grid).mean(dim=1)
    return views, on_grid(rows, grid)


def model_maps(model: nn.Module, x: Tensor, tau: float | None = None) -> dict[str, Tensor]:
    """All maps of `MODEL_MAPS`, and for a dense model the displayed ones: name to [B, h, w]; Grad-CAM of the
    predicted class."""
    parts = []
    for chunk in x.split(CHUNK):
        parts.append({**attention_views(model, chunk, tau)[0], "grad_cam": grad_cam(model, chunk)})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def baseline_maps(x: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """The maps of `BASELINE_MAPS`, which know no model, on a grid of ``size`` cells: name to [B, h, w]."""
    return {
        "random": random_maps(len(x), size),
        "centre": centre_maps(len(x), size),
        "edge": edge_maps(x, size),
        "uniform": uniform_maps(len(x), size),
    }
