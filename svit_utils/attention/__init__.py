"""Thresholded attention: the operator, its thresholds, the timm modules, the surgery that puts them in, the tracker."""

from .formula import thresholded_softmax
from .functional import attention_record, attention_rows, backend_for, backends, thresholded_attention
from .module import SparseAttention, SparseAttentionMixin, SparseAttentionRope, SparseEvaAttention
from .normalisers import NORMALISERS, Normaliser
from .record import AttentionRecord
from .rows import AttentionRows
from .surgery import (
    LayerReport,
    SparsifyReport,
    densify,
    describe_sparsity,
    learnable_thresholds,
    restore_sparsity,
    sparse_modules,
    sparsified,
    sparsify,
)
from .thresholds import EMPTY_ROWS, FixedThreshold, LearnableThreshold, RelativeThreshold, Threshold, ThresholdLike
from .tracker import TokenSparsityTracker, TrackerSummary

# ruff: noqa: RUF022 - in the order in which the reference shows them: what one looks for first comes first
__all__ = ["sparsify", "densify", "sparsified", "SparsifyReport", "LayerReport"]
__all__ += ["TokenSparsityTracker", "TrackerSummary"]
__all__ += ["FixedThreshold", "RelativeThreshold", "LearnableThreshold", "Threshold", "ThresholdLike", "EMPTY_ROWS"]
__all__ += ["thresholded_softmax", "thresholded_attention", "backends", "backend_for"]
__all__ += ["sparse_modules", "learnable_thresholds", "describe_sparsity", "restore_sparsity"]
__all__ += ["NORMALISERS", "Normaliser", "AttentionRows", "attention_rows", "AttentionRecord", "attention_record"]
__all__ += ["SparseAttention", "SparseAttentionRope", "SparseEvaAttention", "SparseAttentionMixin"]
