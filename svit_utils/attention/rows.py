"""Statistics of one attention call, a few numbers per query: all that a tracker needs, without the N x M map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svit_utils.attention.record import AttentionRecord, effective_support


@dataclass(frozen=True)
class AttentionRows:
    """Per-query statistics [B, H, N]; ``valid`` marks queries with at least one allowed key."""

    kept: Tensor  # number of survivors
    keys: Tensor  # number of allowed keys
    zeros: Tensor  # number of allowed keys whose weight is exactly 0
    mass: Tensor  # sum of the probabilities of the survivors
    support: Tensor  # 1 / sum(A^2), 0 for a zero row
    valid: Tensor

    @classmethod
    def from_record(cls, record: AttentionRecord) -> AttentionRows:
        """Reduce an `AttentionRecord` over its keys."""
        survives = record.probs > record.tau  # [B, H, N, M]
        zero = record.weights == 0
        if record.allowed is None:
            keys = torch.full(zero.shape[:-1], zero.shape[-1], device=zero.device)
        else:
            allowed = record.allowed.expand_as(zero)
            survives, zero = survives & allowed, zero & allowed
            keys = allowed.sum(dim=-1)
        mass = (record.probs * survives).sum(dim=-1)
        support = effective_support(record.weights)
        return cls(survives.sum(dim=-1), keys, zero.sum(dim=-1), mass, support, keys > 0)

    @classmethod
    def from_statistics(cls, statistics: Tensor, keys: int | Tensor) -> AttentionRows:
        """From what a fast backend reports of each row, [B, H, N, 4]: survivors, their mass, non-zero weights, support.

        ``keys``: the number of allowed keys, broadcastable to [B, H, N, 1].
        """
        kept, mass, nonzero, support = statistics.unbind(-1)
        kept, nonzero = kept.long(), nonzero.long()
        if not isinstance(keys, Tensor):
            keys = torch.full((), keys, device=kept.device)  # made there: nothing is copied to a GPU
        keys = (keys if keys.ndim == 0 else keys[..., 0]).expand_as(kept)
        return cls(kept, keys, keys - nonzero, mass, support, keys > 0)

    def first(self) -> AttentionRows:
        """The statistics of the first query alone, the class token in models that have one."""
        return AttentionRows(*(getattr(self, f)[:, :, :1] for f in self.__dataclass_fields__))
