"""Attention weighted by the gradient of a class's score: what these maps know of the class comes from the gradient.

With A_l the weights [H, N, N] that multiply V in layer l (after the cut, in a sparse layer), y the score of the class,
and E_h the mean over heads (Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability", arXiv:2103.15679,
eq. 5, section 3.1):

    Abar_l = E_h[(dy/dA_l * A_l)^+]

* `gradient_attention` reads Abar of one layer;
* `relevance` is their rule for self-attention (eq. 6), from R = I: R <- R + Abar_l R, so (I + Abar_L) ... (I + Abar_1);
* `gradient_rollout` divides each row of I + Abar_l by its sum, as attention rollout does.

The product of `relevance` is also eqs. 13 and 14 of their earlier paper (arXiv:2012.09838) with A in the place of its
layer-wise relevance: the two papers' rules differ in what they multiply the gradient with. Weights that are zero after
the cut stay zero in all three, whatever their gradient.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn

from svit_utils.attention.formula import no_autocast
from svit_utils.explain.gradients import attention_gradients
from svit_utils.explain.grid import read_out, readout_rows, token_grid
from svit_utils.explain.layers import Layer, attention_places, check_one_stack, find_layer
from svit_utils.explain.maps import check_on_grid
from svit_utils.explain.model_state import Targets, at_least_single, unwrap
from svit_utils.explain.passing import Layers
from svit_utils.explain.pooling import pooling_weights
from svit_utils.explain.rollout import layer_steps, rollout_matrix


def relevance_matrix(weighted: list[Tensor]) -> Tensor:
    """R = (I + Abar_L) ... (I + Abar_1) [B, N, N] of maps (dy/dA * A)^+ [B, H, N, N], first layer first.

    Chefer et al. 2021, arXiv:2103.15679, eq. 6, begun with the identity. Row i says how much each token of the image
    counts for token i after the last layer. Raises ValueError for no maps.
    """
    if not weighted:
        raise ValueError("relevance needs the weighted map of at least one layer")
    identity = torch.eye(weighted[0].shape[-1], dtype=weighted[0].dtype, device=weighted[0].device)
    with no_autocast(weighted[0].device.type):
        start = identity.expand(len(weighted[0]), -1, -1)
        return reduce(lambda rolled, step: rolled + step.mean(dim=1) @ rolled, weighted, start)


def gradient_attention(model: nn.Module, x: Tensor, targets: Targets = None, *, layer: Layer = -1) -> Tensor:
    """Gradient x attention of one layer: Abar = E_h[(dy/dA * A)^+], as the classifier reads it: [B, h, w], 0 or more.

    The mean of the rows that the classifier reads, `readout_rows`, or with the weights of a head that pools by
    attention, in units of the logit; what comes from prefix tokens is left out. `targets` as for `grad_cam`, `layer` as
    for `class_attention`. Source and errors: this file's head, `attention_gradients`, `readout_rows`.
    """

    def averaged(found: dict[str, Tensor]) -> Tensor:
        check_one_stack(unwrap(model), [place.name for place in attention_places(model).values() if place.index == 0])
        return next(iter(found.values())).mean(dim=1)

    return _read_out(model, x, targets, averaged, [layer])


def gradient_rollout(
    model: nn.Module, x: Tensor, targets: Targets = None, *, residual: float = 0.5, start_layer: Layer = 0
) -> Tensor:
    """Attention rollout of (dy/dA * A)^+ in the place of A: [B, h, w], a map sums to at most 1.

    `rollout_matrix` (arXiv:2005.00928) with the weights of arXiv:2103.15679, eq. 5: each row of
    (1 - residual) Abar_l + residual I is divided by its sum. It is the rollout that vit-explain computes with the
    gradient, with the positive part taken head by head as in the paper, all rows divided by their own sum, and nothing
    discarded. Without the division it is `relevance`. Layers, read-out and errors as for `attention_rollout` and
    `attention_gradients`; `targets` as for `grad_cam`.
    """

    def rolled(found: dict[str, Tensor]) -> Tensor:
        return rollout_matrix(_from(model, found, start_layer), residual=residual)

    return _read_out(model, x, targets, rolled)


def relevance(model: nn.Module, x: Tensor, targets: Targets = None, *, start_layer: Layer = 0) -> Tensor:
    """Chefer's generic relevance for self-attention, arXiv:2103.15679, eqs. 5 and 6: [B, h, w], 0 or more.

    The rows of `relevance_matrix` that the classifier reads, as for `attention_rollout`: the class token's, as in the
    paper; of several tokens the mean, where the identity in R adds the same to every patch that is read. Attention that
    runs side by side is one attention with the heads of all. A head that pools by attention weights the tokens by its
    own attention, without a gradient. `targets` as for `grad_cam`; errors as for `attention_rollout` and
    `attention_gradients`.
    """
    return _read_out(model, x, targets, lambda found: relevance_matrix(_from(model, found, start_layer)))


def _from(model: nn.Module, found: dict[str, Tensor], start_layer: Layer) -> list[Tensor]:
    """The weights of the steps from `start_layer` on, see `layer_steps`."""
    steps = layer_steps(unwrap(model), found)
    return list(steps.values())[find_layer(start_layer, list(steps)) :]


def _read_out(
    model: nn.Module,
    x: Tensor,
    targets: Targets,
    combined: Callable[[dict[str, Tensor]], Tensor],
    layers: Layers = None,
) -> Tensor:
    """What the classifier reads from `combined` [B, N, N] of layer name -> (dy/dA * A)^+ [B, H, N, N]: [B, h, w]."""
    grid = token_grid(model, x)
    readout_rows(model, grid)  # refuses a head without known rows before anything is computed
    if not len(x):
        return torch.zeros(0, *grid.size, dtype=at_least_single(x).dtype, device=x.device)
    with pooling_weights(model) as pooled:
        found = attention_gradients(model, x, targets, layers)
    products = {name: weights * gradient for name, (weights, gradient) in found.items()}
    if not any(bool(product.any()) for product in products.values()):
        raise ValueError(
            f"gradient x attention is zero throughout in {', '.join(found)}, so a map of it says nothing: under "
            f"empty_rows='zero' all rows that the classifier reads may be empty"
        )
    weighted = {name: product.relu() for name, product in products.items()}
    check_on_grid(weighted, grid)
    return read_out(combined(weighted), model, grid, *pooled)
