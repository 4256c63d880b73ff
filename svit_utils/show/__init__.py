"""Pictures: charts, maps over images, and the explorers. `show.widgets` needs ipywidgets and is imported by name."""

from svit_utils.show.charts import CARD_TABLE, accuracy_vs_sparsity, card_comparison, sparsity_heatmaps, training_curves
from svit_utils.show.display import alt_of, figure_png, figure_with_alt, image_with_alt, with_alt
from svit_utils.show.explorers import (
    attention_explorer_data,
    attention_picture,
    threshold_explorer_data,
    threshold_picture,
)
from svit_utils.show.export import export_maps
from svit_utils.show.map_plots import dense_beside_sparse, explanation_grid
from svit_utils.show.pictures import overlay, to_rgb
from svit_utils.show.style import styled

__all__ = ["CARD_TABLE", "accuracy_vs_sparsity", "card_comparison", "sparsity_heatmaps", "training_curves"]
__all__ += ["alt_of", "figure_png", "figure_with_alt", "image_with_alt", "with_alt"]
__all__ += ["attention_explorer_data", "attention_picture", "threshold_explorer_data", "threshold_picture"]
__all__ += ["dense_beside_sparse", "explanation_grid", "export_maps", "overlay", "styled", "to_rgb"]
