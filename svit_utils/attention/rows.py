"""What one attention call did to each query, in a few numbers: all a tracker needs, and no map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svit_utils.attention.formula import AttentionRecord


@dataclass(frozen=True)
class AttentionRows:
    """Per-query statistics [B, H, N]; ``valid`` marks queries with at least one allowed key."""

    kept: Tensor  # survivors
    keys: Tensor  # allowed keys
    zeros: Tensor  # exact zeros among the applied weights of allowed keys
    mass: Tensor  # sum of p over the survivors
    support: Tensor  # 1 / sum(A^2), 0 for a zero row
    valid: Tensor

    @classmethod
    def of(cls, record: AttentionRecord) -> AttentionRows:
        """Reduce an `AttentionRecord` over its keys."""
        survives = record.probs > record.tau  # [B, H, N, M]
        zero = record.weights == 0
        if record.allowed is None:
            keys = torch.full(zero.shape[:-1], zero.shape[-1], device=zero.device)
        else:
            allowed = record.allowed.expand_as(zero)
            survives, zero = survives & allowed, zero & allowed
            keys = allowed.sum(dim=-1)
        squares = record.weights.square().sum(dim=-1)
        support = torch.where(squares > 0, 1 / squares, 0.0)
        kept = survives.sum(dim=-1)
        mass = (record.probs * survives).sum(dim=-1)
        return cls(kept, keys, zero.sum(dim=-1), mass, support, keys > 0)

    @classmethod
    def of_statistics(cls, statistics: Tensor, keys: int | Tensor) -> AttentionRows:
        """From the numbers [B, H, N, 4] of a fast backend and the allowed keys, broadcastable to [B, H, N, 1]."""
        kept, mass, nonzero, support = statistics.unbind(-1)
        kept, nonzero = kept.long(), nonzero.long()
        keys = torch.as_tensor(keys, device=kept.device)
        keys = (keys if keys.ndim == 0 else keys[..., 0]).expand_as(kept)
        return cls(kept, keys, keys - nonzero, mass, support, keys > 0)

    def first(self) -> AttentionRows:
        """The first query alone, where the class token stands."""
        return AttentionRows(*(getattr(self, f)[:, :, :1] for f in self.__dataclass_fields__))
