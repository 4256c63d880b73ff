"""Explanations of a prediction as maps over the image: `explain(model, images, method=...)`, and what stands behind it.

Threads may share a model: they take turns, and it comes back as it was, see `svit_utils.exclusive`.
"""

from .displayed import displayed, displayed_top
from .gradcam import default_layer, grad_cam, layer_grad_cam
from .gradients import attention_gradients
from .grid import TokenGrid, readout_rows, token_grid, tokens_to_grid
from .interventions import ablate_head, cut_edge, patch_activation
from .layers import attention_layers
from .maps import attention_maps, class_attention, upsample
from .methods import CLASS_FREE, METHODS, explain
from .paths import Path, rollout_graphs, strongest_paths
from .perturbation import integrated_gradients, occlusion
from .relevance import gradient_attention, gradient_rollout, relevance, relevance_matrix
from .rollout import attention_rollout, rollout_matrix

__all__ = ["CLASS_FREE", "METHODS", "explain"]
__all__ += ["TokenGrid", "attention_layers", "attention_maps", "attention_rollout", "class_attention"]
__all__ += ["default_layer", "displayed", "displayed_top", "grad_cam", "layer_grad_cam"]
__all__ += ["attention_gradients", "gradient_attention", "gradient_rollout", "relevance", "relevance_matrix"]
__all__ += ["integrated_gradients", "occlusion"]
__all__ += ["Path", "rollout_graphs", "strongest_paths"]
__all__ += ["ablate_head", "cut_edge", "patch_activation"]
__all__ += ["readout_rows", "rollout_matrix", "token_grid", "tokens_to_grid", "upsample"]
