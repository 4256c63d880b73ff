"""Models whose parameters are spread over the processes by torch's ``fully_shard`` (FSDP2): whole tensors, and back.

Each function is called by all processes, in the same order, since the processes exchange parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def check_mean(model: nn.Module) -> None:
    """Try out whether gradients become the mean over the processes: a layer whose gradient is 1 in each of them.

    With torch 2.7 on CPUs they become the sum, since gloo, which joins the processes there, has no mean; nothing says
    so.

    Raises:
        ValueError: they do not.
    """
    from torch.distributed.fsdp import fully_shard

    own = next(p for p in model.parameters() if hasattr(p, "full_tensor"))
    layer = nn.Linear(1, 1, bias=False, device=own.device)
    fully_shard(layer, mesh=own.device_mesh)
    layer(torch.ones(1, 1, device=own.device)).sum().backward()
    found = whole(layer.weight.grad).item()
    if abs(found - 1) > 1e-3:
        raise ValueError(
            f"fully_shard in torch {torch.__version__} on {own.device.type} makes the gradient {found:g} times too "
            "large: take a newer torch, a GPU, or train without fully_shard"
        )


def whole(value: Any) -> Any:
    """The same tensors, or nested dicts and lists of them, with those that are spread put together."""
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(each) for each in value)
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def spread_like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor spread as ``own`` is; as it is where ``own`` is not spread, or has another shape."""
    if not hasattr(own, "full_tensor") or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def local(value: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
