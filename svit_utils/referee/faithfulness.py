"""Does a map say what the model used? Scores that need neither labels nor masks, a file for each.

Deletion and insertion (`curves`), `road` and `infidelity` change the image and ask the model again, about pictures
unlike those it was trained on: compare maps under one score, on the same model and images, and with `random_maps`.
`max_sensitivity` and `sparseness` describe the map and are no evidence that it is right. All are float64 on the CPU,
one per image, and do not depend on `batch_size`. The model runs in evaluation mode; its flags, its gradients and the
global random generator come back as they were.
"""

from typing import Any

import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating
from svit_utils.explain.model_state import Targets
from svit_utils.referee.curves import curve_area, deletion_curve, insertion_curve
from svit_utils.referee.infidelity import infidelity
from svit_utils.referee.inputs import check_maps, explained_classes
from svit_utils.referee.road import road
from svit_utils.referee.sparseness import sparseness


@torch.no_grad()
def faithfulness_scores(
    model: nn.Module, x: Tensor, maps: Tensor, targets: Targets = None, *, seed: int = 0, batch_size: int = 64
) -> dict[str, Tensor]:
    """The scores of finished maps, with default settings: name -> [B]; about 60 forward passes per image.

    `deletion` (lower is better), `insertion` (higher), `road` (higher), `infidelity` (lower), and `sparseness`, which
    is no measure of quality. `max_sensitivity` is not among them, which has to compute the map
    again, nor is `saco`: the recorded studies were scored with these.
    """
    check_maps(maps, x)
    with evaluating(model):
        classes = explained_classes(model, x, targets, batch_size)
    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    return {
        "deletion": curve_area(deletion_curve(model, x, maps, classes, **shared)),
        "insertion": curve_area(insertion_curve(model, x, maps, classes, **shared)),
        "road": road(model, x, maps, classes, **shared),
        "infidelity": infidelity(model, x, maps, classes, **shared),
        "sparseness": sparseness(maps),
    }
