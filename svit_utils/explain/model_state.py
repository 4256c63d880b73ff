"""How a model is used for an explanation and left as it was found; which class is explained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating

# A class for all images, a class for each, or None for what the model predicts.
Targets: TypeAlias = int | Sequence[int] | Tensor | None


def unwrap(model: nn.Module) -> nn.Module:
    """The eager module behind `torch.compile`; any other model as it is."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def only_input_gradients(model: nn.Module) -> Iterator[None]:
    """`evaluating`, with gradients on and parameters frozen; flags and accumulated gradients come back afterwards.

    pytorch-grad-cam calls `model.eval()`, `zero_grad()` and `backward()` and undoes none of it, which would do harm in
    the middle of a training run.
    """
    with evaluating(model), torch.enable_grad():
        saved = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        try:
            for parameter, _, _ in saved:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for parameter, requires_grad, grad in saved:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def target_classes(model: nn.Module, x: Tensor, targets: Targets) -> list[int]:
    """The class explained for each image of `x` [B, 3, H, W]; ValueError for another number of targets than images."""
    if targets is None:
        with torch.no_grad():
            return model(x).argmax(dim=-1).tolist()
    if isinstance(targets, int):
        return [targets] * len(x)
    chosen = [int(target) for target in targets]
    if len(chosen) != len(x):
        raise ValueError(f"targets must be one class, or one for each of the {len(x)} images, got {len(chosen)}")
    return chosen
