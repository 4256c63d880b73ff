"""Weight randomisation: Adebayo et al., "Sanity Checks for Saliency Maps", 2018, arXiv:1810.03292.

A map that stays the same when the weights are destroyed did not explain what the model has learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svit_utils.exclusive import exclusively

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RandomisationCheck:
    """`correlation` [S, B]: Spearman rank correlation of each image's map with its map after each of the S stages."""

    stages: list[str]
    correlation: Tensor

    def table(self) -> pd.DataFrame:
        """One row per stage and image: `stage`, `image`, `rank_correlation`."""
        import pandas as pd

        return pd.DataFrame(
            {"stage": stage, "image": image, "rank_correlation": value}
            for stage, values in zip(self.stages, self.correlation.tolist(), strict=True)
            for image, value in enumerate(values)
        )


def _stages(model: nn.Module) -> dict[str, list[Tensor]]:
    """Parameters by stage, from the head down to the embedding; learnable thresholds are left out."""
    parameters = {name: p.data for name, p in model.named_parameters() if ".threshold." not in f".{name}."}
    names = list(parameters)
    stages = {"head": [n for n in names if n.split(".")[0] in ("head", "head_dist", "fc_norm", "norm", "attn_pool")]}
    for index in reversed(range(len(getattr(model, "blocks", ())))):
        stages[f"blocks.{index}"] = [n for n in names if n.startswith(f"blocks.{index}.")]
    taken = {n for stage in stages.values() for n in stage}
    stages["embedding"] = [n for n in names if n not in taken]
    return {stage: [parameters[n] for n in members] for stage, members in stages.items() if members}


def _rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman correlation per image of [B, ...] maps: [B] float64; 0 where a map is constant, which orders nothing."""
    from scipy import stats

    values = []
    for pair in zip(a.detach().flatten(1).double().cpu(), b.detach().flatten(1).double().cpu(), strict=True):
        constant = any(bool(v.max() == v.min()) for v in pair)
        values.append(0.0 if constant else float(stats.spearmanr(*(v.numpy() for v in pair)).statistic))
    return torch.tensor(values, dtype=torch.float64)


@exclusively
def weight_randomisation(
    model: nn.Module, x: Tensor, explain: Callable[[nn.Module, Tensor], Tensor], *, mode: str = "full", seed: int = 0
) -> RandomisationCheck:
    """Rank correlation between the maps of `model` and those of a copy in which each parameter's values are shuffled.

    Near 0 is what a faithful map gives; near 1, the map did not depend on the weights. Shuffling keeps the values and
    their scale and destroys what was learnt. A new initialisation would also make attention flat, and under a threshold
    every row empty: the map would change for another reason.

    Args:
        explain: (model, x) -> maps [B, h, w]. Fix the class in it (`lambda m, x: grad_cam(m, x, targets)`): left to
            the prediction, it changes with the weights.
        mode: "full" shuffles all weights at once; "cascading" (for models with `blocks`, else ValueError) from the head
            downwards, a stage per block, each on top of the last.
    """
    if mode not in ("full", "cascading"):
        raise ValueError(f"unknown mode {mode!r}: allowed are 'full', 'cascading'")
    if mode == "cascading" and not len(getattr(model, "blocks", ())):
        raise ValueError(f"cascading goes block by block and {type(model).__name__} has no `blocks`: use mode='full'")
    original, found = explain(model, x), {}
    randomised, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    stages = _stages(randomised)
    if mode == "full":
        stages = {"all": [values for members in stages.values() for values in members]}
    for stage, members in stages.items():
        for values in members:
            order = torch.randperm(values.numel(), generator=generator).to(values.device)
            values.copy_(values.flatten()[order].view_as(values))
        found[stage] = _rank_correlation(original, explain(randomised, x))
    return RandomisationCheck(list(found), torch.stack(list(found.values())))
