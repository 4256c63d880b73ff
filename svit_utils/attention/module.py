"""timm's attention modules with the cut after the softmax: same parameters, same names, same projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.attention.formula import AttentionRecord
from svit_utils.attention.functional import attention_record, attention_rows, check_backend, thresholded_attention
from svit_utils.attention.rows import AttentionRows
from svit_utils.attention.thresholds import Threshold, ThresholdLike, as_threshold, check_empty_rows

Observer = Callable[["SparseAttentionMixin", AttentionRecord], None]
RowObserver = Callable[["SparseAttentionMixin", AttentionRows], None]


class SparseAttentionMixin(nn.Module):
    """What the three timm modules below share: the cut, its settings, and observers that see every call.

    Attributes:
        threshold: `Threshold`; as a child module it follows the model's device.
        empty_rows: what a query gets when no key survives, see `thresholded_softmax`.
        backend: ``"auto"`` or a name from `svit_utils.attention.functional.backends`.
        observers: callables ``f(module, record)`` called with the `AttentionRecord` of each forward pass. A record
            holds whole maps, so the reference computes it, and the output with it.
        row_observers: callables ``f(module, rows)`` called with `AttentionRows`, which every backend provides.
    """

    dense_class: type[nn.Module]  # the timm class this one stands in for
    threshold: Threshold
    empty_rows: str
    backend: str
    observers: list[Observer]
    row_observers: list[RowObserver]

    def set_sparsity(self, threshold: ThresholdLike, empty_rows: str = "dense", backend: str = "auto") -> None:
        """Set the three settings, checked; the module gets its own copy of ``threshold`` unless that is shared."""
        check_empty_rows(empty_rows)
        check_backend(backend)
        self.threshold = as_threshold(threshold).for_heads(cast(int, self.num_heads))
        parameter = next(self.parameters(), None)
        if parameter is not None:
            self.threshold.to(parameter.device)
        self.empty_rows, self.backend = empty_rows, backend
        if "observers" not in self.__dict__:
            self.observers, self.row_observers = [], []

    def __getstate__(self) -> dict[str, Any]:
        # Observers watch this module, not its copies: without this, deepcopy and pickle would take them along.
        return {**self.__dict__, "observers": [], "row_observers": []}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """[B, H, N, D] each to [B, H, N, D]: the one line in which this module differs from timm's."""
        settings: dict[str, Any] = {
            "scale": self.scale,
            "attn_mask": attn_mask,
            "is_causal": is_causal,
            "dropout_p": cast(nn.Dropout, self.attn_drop).p if self.training else 0.0,
            "empty_rows": self.empty_rows,
        }
        if self.observers:
            record = attention_record(q, k, v, self.threshold, **settings)
            for observer in self.observers:
                observer(self, record)
            if self.row_observers:
                with torch.no_grad():
                    self._show(AttentionRows.of(record))
            return record.out
        settings["backend"] = self.backend
        if self.row_observers:
            out, rows = attention_rows(q, k, v, self.threshold, **settings)
            self._show(rows)
            return out
        return cast(Tensor, thresholded_attention(q, k, v, self.threshold, **settings))

    def _show(self, rows: AttentionRows) -> None:
        for observer in self.row_observers:
            observer(self, rows)

    def _sparse_forward(self, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        gate = getattr(self, "gate", None)  # absent from older timm
        gate = gate(x).sigmoid() if gate is not None else None  # [B, N, H * D]
        q, k, v = self._project(x)  # [B, H, N, D] each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        groups = cast(int, getattr(self, "num_kv_groups", 1))
        if groups > 1:  # grouped-query attention: head h reads key-value head h // groups
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        x = self._attend(q, k, v, attn_mask, is_causal)  # [B, H, N, D]
        x = self.norm(x.transpose(1, 2).flatten(2))  # [B, N, H * D]
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))  # [B, N, C]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] to q, k, v of [B, H, N, D], from one fused or three separate projections."""
        if self.qkv is None:
            head_dim = cast(nn.Linear, self.q_proj).out_features // cast(int, self.num_heads)
            projections = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (p(x).unflatten(-1, (-1, head_dim)).transpose(1, 2) for p in projections)
            return q, k, v
        qkv = self._fused_qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _fused_qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary embedding on the patch tokens of [B, H, N, D]; prefix tokens have no position."""
        prefix = cast(int, self.num_prefix_tokens)
        half = bool(getattr(self, "rotate_half", False))
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)

    def extra_repr(self) -> str:
        return f"empty_rows={self.empty_rows!r}, backend={self.backend!r}"


class SparseAttention(SparseAttentionMixin, Attention):
    """`timm.layers.Attention` with thresholded attention; usable as ``attn_layer`` of timm's VisionTransformer.

    Args:
        dim: width of the tokens.
        num_heads: number of heads.
        threshold: tau in [0, 1), a tensor [H], or a threshold object.
        empty_rows: what a query gets when no key survives, see `thresholded_softmax`.
        backend: see `thresholded_attention`.
        **kwargs: those of timm's ``Attention``.

    Raises:
        ValueError: a setting out of range, see `thresholded_softmax`.
    """

    dense_class = Attention

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        threshold: ThresholdLike = 0.01,
        empty_rows: str = "dense",
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.set_sparsity(threshold, empty_rows, backend)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] to [B, N, C]; masks as in `thresholded_attention`."""
        return self._sparse_forward(x, None, attn_mask, is_causal)


class SparseAttentionRope(SparseAttentionMixin, AttentionRope):
    """`timm.layers.AttentionRope` with thresholded attention. Made by `sparsify`."""

    dense_class = AttentionRope

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] to [B, N, C]; ``rope`` as in timm."""
        return self._sparse_forward(x, rope, attn_mask, is_causal)


class SparseEvaAttention(SparseAttentionMixin, EvaAttention):
    """`timm.models.eva.EvaAttention` with thresholded attention. Made by `sparsify`."""

    dense_class = EvaAttention

    def _fused_qkv(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # EVA has no learned bias on the keys
        if self.qkv_bias_separate:
            return self.qkv(x) + bias
        return F.linear(x, self.qkv.weight, bias)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] to [B, N, C]; ``rope`` as in timm."""
        return self._sparse_forward(x, rope, attn_mask, is_causal)


SPARSE_CLASSES: dict[type[nn.Module], type[SparseAttentionMixin]] = {
    cls.dense_class: cls for cls in (SparseAttention, SparseAttentionRope, SparseEvaAttention)
}
