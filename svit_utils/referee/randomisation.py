"""Weight randomisation: Adebayo et al., "Sanity Checks for Saliency Maps", 2018, arXiv:1810.03292.

A map that stays the same when the weights are destroyed did not explain what the model has learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

__all__ = ["RandomisationCheck", "randomise_weights", "weight_randomisation"]


@dataclass(frozen=True)
class RandomisationCheck:
    """`correlation` [S, B]: Spearman rank correlation of each image's map with its map after each of the S stages."""

    stages: list[str]
    correlation: Tensor

    def table(self) -> pd.DataFrame:
        """One row per stage and image: `stage`, `image`, `rank_correlation`."""
        rows = [
            {"stage": stage, "image": image, "rank_correlation": float(value)}
            for stage, values in zip(self.stages, self.correlation, strict=True)
            for image, value in enumerate(values)
        ]
        return pd.DataFrame(rows)


def _groups(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names by part, from the head down to the patch embedding; thresholds are left alone."""
    names = [name for name, _ in model.named_parameters() if ".threshold." not in f".{name}."]
    depth = len(getattr(model, "blocks", ()))
    groups: dict[str, list[str]] = {}
    above = [n for n in names if n.split(".")[0] in ("head", "head_dist", "fc_norm", "norm", "attn_pool")]
    groups["head"] = above
    for index in reversed(range(depth)):
        groups[f"blocks.{index}"] = [n for n in names if n.startswith(f"blocks.{index}.")]
    taken = {n for group in groups.values() for n in group}
    groups["embedding"] = [n for n in names if n not in taken]
    return {stage: group for stage, group in groups.items() if group}


@torch.no_grad()
def _shuffle(model: nn.Module, names: list[str], generator: torch.Generator) -> None:
    parameters = dict(model.named_parameters())
    for name in names:
        values = parameters[name].data
        order = torch.randperm(values.numel(), generator=generator).to(values.device)
        values.copy_(values.flatten()[order].view_as(values))


def randomise_weights(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of `model` whose parameter tensors are each shuffled.

    Shuffling keeps the values and their scale and destroys what was learnt. Fresh initialisation would also make
    attention flat, and under a threshold every row empty: a change of map for another reason.
    """
    randomised = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for names in _groups(randomised).values():
        _shuffle(randomised, names, generator)
    return randomised


def _rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman correlation per image of [B, ...] maps: [B]; 0 where a map is constant, which orders nothing."""
    values = []
    for first, second in zip(a.detach().flatten(1).double().cpu(), b.detach().flatten(1).double().cpu(), strict=True):
        if first.max() == first.min() or second.max() == second.min():
            values.append(0.0)
        else:
            values.append(float(stats.spearmanr(first.numpy(), second.numpy()).statistic))
    return torch.tensor(values, dtype=torch.float64)


def weight_randomisation(
    model: nn.Module,
    x: Tensor,
    explain: Callable[[nn.Module, Tensor], Tensor],
    *,
    mode: str = "full",
    seed: int = 0,
) -> RandomisationCheck:
    """Rank correlation between the maps of `model` and those of the same model with weights shuffled.

    Args:
        explain: (model, x) -> maps [B, h, w]. Fix the class in it (`lambda m, x: grad_cam(m, x, targets)`): left to
            the prediction, it changes with the weights.
        mode: "full" shuffles all weights at once; "cascading" from the head downwards, a stage per block, each on top
            of the last.

    Returns:
        The correlations per stage and image; near 0 is what a faithful map gives, near 1 says the map did not depend
        on the weights. `model` itself is left as it is.
    """
    if mode not in ("full", "cascading"):
        raise ValueError(f"unknown mode {mode!r}: allowed are 'full', 'cascading'")
    original = explain(model, x)
    if mode == "full":
        return RandomisationCheck(
            ["all"], _rank_correlation(original, explain(randomise_weights(model, seed=seed), x))[None]
        )
    if not len(getattr(model, "blocks", ())):
        raise ValueError(
            f"cascading randomisation goes block by block and {type(model).__name__} has no `blocks`: use mode='full'"
        )
    randomised = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    stages, rows = [], []
    for stage, names in _groups(randomised).items():
        _shuffle(randomised, names, generator)
        stages.append(stage)
        rows.append(_rank_correlation(original, explain(randomised, x)))
    return RandomisationCheck(stages, torch.stack(rows))
