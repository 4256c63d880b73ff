"""Explanations of a prediction as maps over the image: attention, rollout, Grad-CAM through its two libraries.

Threads may share a model: they take turns, and it comes back as it was, see `svit_utils.exclusive`.
"""

from .displayed import displayed, displayed_top
from .gradcam import default_layer, grad_cam, layer_grad_cam
from .grid import TokenGrid, readout_rows, token_grid, tokens_to_grid
from .layers import attention_layers
from .maps import attention_maps, class_attention, upsample
from .methods import METHODS, explain_batch
from .rollout import attention_rollout, rollout_matrix

__all__ = ["METHODS", "TokenGrid", "attention_layers", "attention_maps", "attention_rollout", "class_attention"]
__all__ += ["default_layer", "displayed", "displayed_top", "explain_batch", "grad_cam", "layer_grad_cam"]
__all__ += ["readout_rows", "rollout_matrix", "token_grid", "tokens_to_grid", "upsample"]
