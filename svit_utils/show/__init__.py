"""Pictures: static plots, and the explorers that widgets wrap. `widgets` itself needs ipywidgets and is imported by
name."""

from __future__ import annotations

from svit_utils.show.explorers import (
    attention_explorer_data,
    attention_picture,
    threshold_explorer_data,
    threshold_picture,
)
from svit_utils.show.plots import (
    CARD_TABLE,
    accuracy_vs_sparsity,
    card_comparison,
    dense_beside_sparse,
    explanation_grid,
    row_threshold,
    sparsity_heatmaps,
    training_curves,
)
from svit_utils.show.style import alt_of, figure_png, figure_with_alt, image_with_alt, overlay, styled, to_rgb, with_alt

__all__ = [
    "CARD_TABLE",
    "accuracy_vs_sparsity",
    "alt_of",
    "attention_explorer_data",
    "attention_picture",
    "card_comparison",
    "dense_beside_sparse",
    "explanation_grid",
    "figure_png",
    "figure_with_alt",
    "image_with_alt",
    "overlay",
    "row_threshold",
    "sparsity_heatmaps",
    "styled",
    "threshold_explorer_data",
    "threshold_picture",
    "to_rgb",
    "training_curves",
    "with_alt",
]
