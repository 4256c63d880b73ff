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

__all__ = ["attention_record", "attention_rows", "backend_for", "backends", "thresholded_attention"]
__all__ += ["SparseAttention", "SparseAttentionMixin", "SparseAttentionRope", "SparseEvaAttention"]
__all__ += ["NORMALISERS", "AttentionRecord", "AttentionRows", "Normaliser", "thresholded_softmax"]
__all__ += ["LayerReport", "SparsifyReport", "densify", "describe_sparsity", "learnable_thresholds"]
__all__ += ["restore_sparsity", "sparse_modules", "sparsified", "sparsify"]
__all__ += ["EMPTY_ROWS", "FixedThreshold", "LearnableThreshold", "RelativeThreshold", "Threshold", "ThresholdLike"]
__all__ += ["TokenSparsityTracker", "TrackerSummary"]
