"""Other ways to be sparse, as controls: hard cut, top-k, entmax15 and sparsemax in place of the thresholded softmax.

If the thresholded softmax is good for something, it has to be better than these at it. Each is a function from the
logits [..., N, M] to weights whose rows sum to 1, and `use_alternative` puts one into a timm model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.attention.formula import AttentionRecord, no_autocast, statistics_dtype
from svit_utils.attention.module import SPARSE_CLASSES, SparseAttention
from svit_utils.attention.rows import AttentionRows
from svit_utils.attention.surgery import Layer, SparsifyReport, sparse_modules, sparsify
from svit_utils.attention.thresholds import ThresholdLike

__all__ = ["ALTERNATIVES", "AlternativeAttention", "entmax15", "hard_cut", "sparsemax", "top_k", "use_alternative"]

# Sorting all 197 keys of a row would be most of the work; a row with more survivors than this is sorted whole.
_SORTED_KEYS = 64


def hard_cut(scores: Tensor, tau: float | Tensor = 0.01) -> Tensor:
    """p 1[p > tau] / sum: the survivors keep their ratios, where the thresholded softmax takes tau from each.

    A row in which no key exceeds tau keeps its plain softmax (``empty_rows="dense"``).
    """
    probs = scores.softmax(dim=-1)
    kept = probs * (probs > tau)
    total = kept.sum(dim=-1, keepdim=True)
    empty = total == 0
    return torch.where(empty, probs, kept / total.masked_fill(empty, 1.0))


def top_k(scores: Tensor, k: int) -> Tensor:
    """Softmax over the ``k`` largest scores of each row, whatever they are."""
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must lie in 1 to the number of keys, {scores.shape[-1]}, got {k}")
    values, index = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, index, values.softmax(dim=-1))


def entmax15(scores: Tensor) -> Tensor:
    """1.5-entmax (Peters, Niculae and Martins 2019, arXiv:1905.05702), by the authors' package ``entmax``."""
    return _entmax().entmax15(scores, dim=-1, k=min(_SORTED_KEYS, scores.shape[-1]))


def sparsemax(scores: Tensor) -> Tensor:
    """The Euclidean projection onto the simplex (Martins and Astudillo 2016, arXiv:1602.02068), by ``entmax``."""
    return _entmax().sparsemax(scores, dim=-1, k=min(_SORTED_KEYS, scores.shape[-1]))


def _entmax():  # type: ignore[no-untyped-def]
    try:
        import entmax
    except ImportError as error:
        raise ImportError("entmax15 and sparsemax need the package entmax: pip install entmax") from error
    return entmax


# Name -> the setting it takes (None: it has none) and its default.
ALTERNATIVES: dict[str, tuple[str | None, float | None]] = {
    "hard_cut": ("tau", 0.01),
    "top_k": ("k", 21),
    "entmax15": (None, None),
    "sparsemax": (None, None),
}


class AlternativeAttention(SparseAttention):
    """`timm.layers.Attention` with another normaliser of the logits. Made by `use_alternative`.

    Observers see the same `AttentionRecord` as under the thresholded softmax. All of `ALTERNATIVES` keep a row's
    largest keys, so the record's ``tau`` is the largest probability that got no weight.
    """

    normaliser: str
    setting: float | None

    def set_sparsity(self, threshold: ThresholdLike, empty_rows: str = "dense", backend: str = "auto") -> None:
        """What `sparsify` calls: the thresholded softmax again."""
        self.__class__ = SparseAttention  # type: ignore[assignment]
        del self.normaliser, self.setting
        self.set_sparsity(threshold, empty_rows, backend)

    def weights(self, scores: Tensor) -> Tensor:
        """Logits [..., N, M] to weights [..., N, M]."""
        if self.normaliser == "hard_cut":
            return hard_cut(scores, self.threshold(scores.shape[-1]))  # tau may be warming up
        if self.normaliser == "top_k":
            return top_k(scores, int(self.setting or 0))
        return {"entmax15": entmax15, "sparsemax": sparsemax}[self.normaliser](scores)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("the alternatives to the thresholded softmax take no mask")
        with no_autocast(q.device.type):
            dtype = statistics_dtype(q)
            scores = (q.to(dtype) * self.scale) @ k.to(dtype).transpose(-2, -1)  # [B, H, N, M]
            weights = F.dropout(self.weights(scores), self.attn_drop.p if self.training else 0.0)  # type: ignore[arg-type]
            out = (weights @ v.to(dtype)).to(v.dtype)  # [B, H, N, D]
        if self.observers or self.row_observers:
            with torch.no_grad():
                probs = scores.softmax(dim=-1)
                record = AttentionRecord(out, weights, probs, self._cut_at(probs, weights), None, v)
                for observer in self.observers:
                    observer(self, record)
                if self.row_observers:
                    self._show(AttentionRows.of(record))
        return out

    def _cut_at(self, probs: Tensor, weights: Tensor) -> Tensor:
        """The probability that each row was cut at, broadcastable to [B, H, N, 1]."""
        if self.normaliser == "hard_cut":
            return self.threshold(probs.shape[-1])  # a row without a survivor fell back: no weight of it is zero
        return probs.masked_fill(weights != 0, 0.0).amax(dim=-1, keepdim=True)

    def extra_repr(self) -> str:
        return f"normaliser={self.normaliser!r}, setting={self.setting!r}"


def use_alternative(
    model: nn.Module,
    name: str,
    *,
    tau: ThresholdLike | None = None,
    k: int | None = None,
    layers: Iterable[Layer] | None = None,
) -> SparsifyReport:
    """Convert the model's self-attention to one of `ALTERNATIVES`, in place; `densify` undoes it.

    Args:
        model: a timm model using ``timm.layers.Attention``.
        name: ``"hard_cut"``, ``"top_k"``, ``"entmax15"`` or ``"sparsemax"``.
        tau: for ``"hard_cut"``, 0.01 by default.
        k: for ``"top_k"``, 21 by default: the share of 197 keys that tau = 0.01 leaves in a fine-tuned model.
        layers: as in `sparsify`.

    Returns:
        The report of `sparsify`.

    Raises:
        ValueError: unknown name, a setting that the alternative does not have or out of range, unsupported attention.
    """
    if name not in ALTERNATIVES:
        raise ValueError(f"unknown alternative {name!r}: allowed are {', '.join(map(repr, ALTERNATIVES))}")
    takes, default = ALTERNATIVES[name]
    for option, value in (("tau", tau), ("k", k)):
        if value is not None and option != takes:
            raise ValueError(f"{name} takes no {option}")
    if k is not None and (isinstance(k, bool) or int(k) != k or k < 1):
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    threshold: ThresholdLike = (tau if tau is not None else float(default or 0)) if takes == "tau" else 0.0
    if name in ("entmax15", "sparsemax"):
        _entmax()
    for module_name, module in model.named_modules():
        if isinstance(module, tuple(SPARSE_CLASSES)) and not isinstance(module, Attention):
            raise ValueError(f"{module_name} is a {type(module).__name__}: alternatives replace timm's Attention only")
    report = sparsify(model, threshold, layers=layers)
    modules = sparse_modules(model)
    for module_name in report.converted:
        module = modules[module_name]
        module.__class__ = AlternativeAttention
        module.normaliser, module.setting = name, (k if k is not None else default) if takes == "k" else None
    return report
