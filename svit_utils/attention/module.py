"""timm's attention modules with the cut after the softmax: same parameters, same names, same projections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partialmethod
from typing import Any, cast

import torch
from timm.layers import register_notrace_module
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.attention.call import check_shapes
from svit_utils.attention.functional import attention_rows, check_backend, thresholded_attention
from svit_utils.attention.normalisers import Normaliser, ThresholdedSoftmax, as_normaliser
from svit_utils.attention.record import AttentionRecord, attend
from svit_utils.attention.rows import AttentionRows
from svit_utils.attention.thresholds import Threshold, ThresholdLike

Observer = Callable[["SparseAttentionMixin", AttentionRecord], None]
RowObserver = Callable[["SparseAttentionMixin", AttentionRows], None]
InputObserver = Callable[["SparseAttentionMixin", Tensor, Tensor, Tensor | None, bool], None]


class SparseAttentionMixin(nn.Module):
    """What the three timm modules below share: a normaliser, and observers that see every call.

    As in timm, ``fused_attn`` says how attention is computed. Fused, the fast backends never form the weights. Unfused
    (``timm.layers.set_fused_attn(False)`` before the model is made, or ``module.fused_attn = False``), the weights that
    are multiplied with V pass through ``self.attn_drop``, where hooks and timm's ``AttentionExtract`` look for them.

    Attributes:
        normaliser: makes weights of scores, see `svit_utils.attention.normalisers`.
        threshold: the normaliser's `Threshold`, or None; as a child module it follows the model's device.
        backend: ``"auto"`` or a name from `svit_utils.attention.functional.backends`; used where attention is fused.
        observers: callables ``f(module, record)`` called with the `AttentionRecord` of each forward pass. A record
            holds whole maps, so it is computed unfused, and the output with it.
        row_observers: callables ``f(module, rows)`` called with `AttentionRows`, which every backend provides.
        input_observers: callables ``f(module, q, k, attn_mask, is_causal)`` called before each call is computed, with q
            and k [B, H, N, D] as they are multiplied (normed and rotated).
    """

    dense_class: type[nn.Module]  # the class this one stands in for: timm's, or a subclass of it
    normaliser: Normaliser
    threshold: Threshold | None
    backend: str
    observers: list[Observer]
    row_observers: list[RowObserver]
    input_observers: list[InputObserver]

    @property
    def empty_rows(self) -> str:
        """What a query gets when no key survives, see `thresholded_softmax`."""
        return self.normaliser.empty_rows

    def set_normaliser(self, normaliser: Normaliser, backend: str = "auto") -> None:
        """Use ``normaliser`` from now on; the module gets its own copy, with a threshold that all layers may share.

        Raises:
            ValueError: an unknown backend, or a threshold per head with another number of heads.
        """
        check_backend(backend)
        own = normaliser.for_heads(cast(int, self.num_heads))
        parameter = next(self.parameters(), None)
        if parameter is not None and own.threshold is not None:
            own.threshold.to(parameter.device)
        self.own_children()
        self.normaliser, self.threshold, self.backend = own, own.threshold, backend
        if "observers" not in self.__dict__:
            self.observers, self.row_observers, self.input_observers = [], [], []

    def own_children(self) -> None:
        """Stop sharing the dictionary of children, as a module and its shallow copies do: theirs stay as they are."""
        self.__dict__["_modules"] = self._modules.copy()

    def __getstate__(self) -> dict[str, Any]:
        # Observers watch this module, not its copies: without this, deepcopy and pickle would take them along.
        return {**self.__dict__, "observers": [], "row_observers": [], "input_observers": []}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "made_here" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        return _blank, (self.dense_class,), self.__getstate__()  # the class has no address to be pickled by

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """[B, H, N, D] each to [B, H, N, D]: what stands in the place of timm's softmax(Q K^T) V."""
        if self.threshold is not None and self.threshold.warmup.is_meta and not q.is_meta:
            self.threshold.leave_meta(q.device)
        for watch in self.input_observers:
            watch(self, q, k, attn_mask, is_causal)
        masks = {"attn_mask": attn_mask, "is_causal": is_causal}
        if self.fused_attn and not self.observers and type(self.normaliser) is ThresholdedSoftmax:
            return self._attend_fused(q, k, v, masks)
        check_shapes(q, k, v, attn_mask, is_causal)
        dropout = cast(nn.Module, self.attn_drop)
        normaliser = self.normaliser
        if normaliser.threshold is not self.threshold:  # in a replica of DataParallel, or given by hand
            normaliser = copy.copy(normaliser)
            normaliser.threshold = self.threshold
        record = attend(q, k, v, normaliser, scale=cast(float, self.scale), dropout=dropout, **masks)  # type: ignore[arg-type]
        for observer in self.observers:
            observer(self, record)
        if self.row_observers:
            with torch.no_grad():
                self._show(AttentionRows.from_record(record))
        return record.out

    def _attend_fused(self, q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Any]) -> Tensor:
        options = {
            "scale": self.scale,
            "dropout_p": getattr(self.attn_drop, "p", 0.0) if self.training else 0.0,
            "empty_rows": self.empty_rows,
            "backend": self.backend,
            **masks,
        }
        if not self.row_observers:
            return cast(Tensor, thresholded_attention(q, k, v, cast(Threshold, self.threshold), **options))
        out, rows = attention_rows(q, k, v, cast(Threshold, self.threshold), **options)
        self._show(rows)
        return out

    def _show(self, rows: AttentionRows) -> None:
        for observer in self.row_observers:
            observer(self, rows)

    def _output(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """[B, H, N, D] to [B, N, C]: join the heads, norm, gate, project."""
        x = self.norm(x.transpose(1, 2).flatten(2))  # [B, N, H * D]
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))  # [B, N, C]

    def _gate(self, x: Tensor) -> Tensor | None:
        """The factor [B, N, H * D] of timm's gated attention; None for most models."""
        gate = getattr(self, "gate", None)  # absent from older timm
        return None if gate is None else gate(x).sigmoid()

    def extra_repr(self) -> str:
        return f"normaliser={self.normaliser!r}, backend={self.backend!r}"


class SparseAttention(SparseAttentionMixin, Attention):
    """`timm.layers.Attention` with thresholded attention; usable as ``attn_layer`` of timm's VisionTransformer.

    Args:
        dim: width of the tokens.
        num_heads: number of heads.
        threshold: tau in [0, 1), a tensor [H], or a threshold object.
        empty_rows: what a query gets when no key survives, see `thresholded_softmax`.
        backend: see `thresholded_attention`.
        normaliser: a name or object in place of the thresholded softmax, see `sparsify`.
        **kwargs: those of timm's ``Attention``.

    Raises:
        ValueError: a setting out of range, see `thresholded_softmax`.
    """

    dense_class = Attention

    @classmethod
    def using(cls, **settings: Any) -> type[SparseAttention]:
        """This class with other defaults, for ``attn_layer=SparseAttention.using(threshold=0.02)``.

        timm asks for a class there and refuses a ``functools.partial``.
        """
        own = {"__init__": partialmethod(cls.__init__, **settings), "__module__": cls.__module__, "made_here": True}
        return type(cls.__name__, (cls,), own)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        threshold: ThresholdLike = 0.01,
        empty_rows: str = "dense",
        backend: str = "auto",
        normaliser: str | object = "thresholded",
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.set_normaliser(as_normaliser(normaliser, threshold, empty_rows), backend)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] to [B, N, C]; masks as in `thresholded_attention`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, N, D]
        q, k, v = qkv.unbind(0)  # [B, H, N, D] each
        q, k = self.q_norm(q), self.k_norm(k)
        return self._output(self.attend(q, k, v, attn_mask, is_causal), self._gate(x))


class _RotaryMixin(SparseAttentionMixin):
    """What timm's two attention modules with rotary position embeddings have in common."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] to [B, N, C]; ``rope`` as in timm, masks as in `thresholded_attention`."""
        q, k, v = self._project(x)  # [B, H, N, D] each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        groups = cast(int, getattr(self, "num_kv_groups", 1))
        if groups > 1:  # grouped-query attention: head h reads key-value head h // groups
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self._output(self.attend(q, k, v, attn_mask, is_causal), self._gate(x))

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
        prefix, half = cast(int, self.num_prefix_tokens), bool(getattr(self, "rotate_half", False))
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)


class SparseAttentionRope(_RotaryMixin, AttentionRope):
    """`timm.layers.AttentionRope` with thresholded attention. Made by `sparsify`."""

    dense_class = AttentionRope


class SparseEvaAttention(_RotaryMixin, EvaAttention):
    """`timm.models.eva.EvaAttention` with thresholded attention. Made by `sparsify`."""

    dense_class = EvaAttention

    def _fused_qkv(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # EVA has no learned bias on the keys
        if self.qkv_bias_separate:
            return self.qkv(x) + bias
        return F.linear(x, self.qkv.weight, bias)


SPARSE_CLASSES: dict[type[nn.Module], type[SparseAttentionMixin]] = {
    cls.dense_class: cls for cls in (SparseAttention, SparseAttentionRope, SparseEvaAttention)
}

for _cls in SPARSE_CLASSES.values():
    register_notrace_module(_cls)  # timm's feature extraction by torch.fx looks at attention from outside
_TWINS = dict(SPARSE_CLASSES)  # with those of subclasses, as they come


def sparse_class(cls: type[nn.Module]) -> type[SparseAttentionMixin] | None:
    """The sparse twin of a timm attention class, or of a subclass that keeps timm's forward; None for another class.

    The twin of a subclass derives from it too, and has all that the subclass adds, such as parametrizations.
    """
    for dense, sparse in SPARSE_CLASSES.items():
        if cls not in _TWINS and issubclass(cls, dense) and cls.forward is dense.forward:
            own = {"dense_class": cls, "__module__": cls.__module__, "made_here": True}
            _TWINS.setdefault(cls, type(f"Sparse{cls.__name__}", (sparse, cls), own))
    return _TWINS.get(cls)


def _blank(dense_class: type[nn.Module]) -> SparseAttentionMixin:
    """A module of the sparse twin's class without anything in it, as pickle fills it."""
    cls = cast(type[SparseAttentionMixin], sparse_class(dense_class))
    return cls.__new__(cls)
