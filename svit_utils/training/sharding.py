"""Models whose parameters are spread over the processes by torch's ``fully_shard`` (FSDP2): whole tensors, and back.

Each function is called by all processes, in the same order, since the processes exchange parts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


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
