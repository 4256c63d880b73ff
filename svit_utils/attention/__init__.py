"""Thresholded attention: the operator, its thresholds, the timm modules, the surgery that puts them in, the tracker."""

from svit_utils.attention.formula import thresholded_softmax
from svit_utils.attention.functional import (
    attention_record,
    attention_rows,
    backend_for,
    backends,
    thresholded_attention,
)
from svit_utils.attention.module import SparseAttention, SparseAttentionMixin, SparseAttentionRope, SparseEvaAttention
from svit_utils.attention.normalisers import NORMALISERS, Normaliser
from svit_utils.attention.record import AttentionRecord
from svit_utils.attention.rows import AttentionRows
from svit_utils.attention.surgery import (
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
from svit_utils.attention.thresholds import (
    EMPTY_ROWS,
    FixedThreshold,
    LearnableThreshold,
    RelativeThreshold,
    Threshold,
    ThresholdLike,
)
from svit_utils.attention.tracker import TokenSparsityTracker, TrackerSummary

__all__ = [
    "EMPTY_ROWS",
    "NORMALISERS",
    "AttentionRecord",
    "AttentionRows",
    "FixedThreshold",
    "LayerReport",
    "LearnableThreshold",
    "Normaliser",
    "RelativeThreshold",
    "SparseAttention",
    "SparseAttentionMixin",
    "SparseAttentionRope",
    "SparseEvaAttention",
    "SparsifyReport",
    "Threshold",
    "ThresholdLike",
    "TokenSparsityTracker",
    "TrackerSummary",
    "attention_record",
    "attention_rows",
    "backend_for",
    "backends",
    "densify",
    "describe_sparsity",
    "learnable_thresholds",
    "restore_sparsity",
    "sparse_modules",
    "sparsified",
    "sparsify",
    "thresholded_attention",
    "thresholded_softmax",
]
