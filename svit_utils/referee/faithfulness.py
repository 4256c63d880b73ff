"""Does a map say what the model used? Scores without labels or masks: disturb the image, or the map, and watch.

Deletion and insertion (`curves`), `road` and `infidelity` ask the model about pictures that it was not trained on, and
a model may answer an unusual picture in its own way: compare maps under one score, on the same model and images, and
with `random_maps`; do not read a score on its own. `max_sensitivity` and `sparseness` describe the map and are not
evidence that it is right.

Each score has a file of its own. All are float64 on the CPU, one per image, and do not depend on `batch_size`; the
model runs in evaluation mode, and its flags, its gradients and the global random generator come back as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svit_utils.explain.model_state import Targets, evaluating
from svit_utils.referee.curves import curve_area, deletion_curve, insertion_curve
from svit_utils.referee.infidelity import infidelity
from svit_utils.referee.inputs import check_maps, explained_classes
from svit_utils.referee.road import road
from svit_utils.referee.sparseness import sparseness


@torch.no_grad()
def faithfulness_scores(
    model: nn.Module, x: Tensor, maps: Tensor, targets: Targets = None, *, seed: int = 0, batch_size: int = 64
) -> dict[str, Tensor]:
    """All scores that need only a map, with default settings: name -> [B].

    `deletion` (lower is better), `insertion` (higher), `road` (higher), `infidelity` (lower), and `sparseness`, which
    is no measure of quality. About 60 forward passes per image. Arguments and errors as in the functions themselves.
    """
    check_maps(maps, x)
    with evaluating(model):
        classes = explained_classes(model, x, targets, batch_size)
    arguments, options = (model, x, maps, classes), {"seed": seed, "batch_size": batch_size}
    return {
        "deletion": curve_area(deletion_curve(*arguments, **options)),
        "insertion": curve_area(insertion_curve(*arguments, **options)),
        "road": road(*arguments, **options),
        "infidelity": infidelity(*arguments, **options),
        "sparseness": sparseness(maps),
    }
