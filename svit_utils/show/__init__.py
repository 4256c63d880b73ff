"""Pictures: charts, maps over images, and the explorers. `show.widgets` needs anywidget and is imported by name."""

from .charts import (
    CARD_TABLE,
    accuracy_vs_sparsity,
    card_comparison,
    comparison_forest,
    forest,
    sparsity_heatmaps,
    training_curves,
)
from .diagrams import block_diagram
from .display import alt_of, figure_png, figure_with_alt, image_with_alt, with_alt
from .explorer import explorer_data, explorer_html
from .explorers import attention_explorer_data, attention_picture, threshold_explorer_data, threshold_picture
from .export import export_maps
from .map_plots import attention_rows, dense_beside_sparse, explanation_grid
from .pictures import example_mask, example_picture, overlay, to_rgb
from .style import styled

__all__ = ["CARD_TABLE", "accuracy_vs_sparsity", "card_comparison", "comparison_forest", "forest", "sparsity_heatmaps"]
__all__ += ["alt_of", "figure_png", "figure_with_alt", "image_with_alt", "with_alt"]
__all__ += ["attention_explorer_data", "attention_picture", "threshold_explorer_data", "threshold_picture"]
__all__ += ["attention_rows", "dense_beside_sparse", "explanation_grid", "export_maps", "overlay", "styled", "to_rgb"]
__all__ += ["training_curves"]
__all__ += ["block_diagram", "example_mask", "example_picture", "explorer_data", "explorer_html"]
