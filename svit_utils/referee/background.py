"""Does a model, or its maps, look at the background? Measured on PlantedShapes, where the answer is known.

There the class lies in the object's outline alone, unless the background is tied to the label (`rho`): a model that
goes by the background is found by giving every object another one, or by leaving the object out.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from svit_utils.data import PlantedShapes
from svit_utils.referee.localisation import energy_in_mask

BACKGROUND_VARIANTS: dict[str, dict[str, Any]] = {
    "own": {},  # the background says nothing about the label
    "aligned": {"rho": 1.0},  # the background is of the label's own family
    "swapped": {"swap_background": True},  # the background is of another class's family
    "erased": {"erase_object": True, "rho": 1.0},  # no object; the background is of the label's own family
    "distractors": {"distractors": 4},  # small blobs and bars on the background
}


def background_accuracy(
    model: nn.Module, *, images: int = 1000, seed: int = 0, batch_size: int = 100
) -> dict[str, np.ndarray]:
    """Which of the first `images` test pictures the model gets right: bool [images] for each of `BACKGROUND_VARIANTS`.

    The variants show the same objects in the same order, so two of them can be compared in pairs (`paired_bootstrap`).
    Chance is 0.1. A model that reads shapes is as good on "swapped" as on "aligned", and at chance on "erased". One
    that reads the background is right on "aligned" and "erased", at chance on "own", and below chance on "swapped".
    """
    from svit_utils.training.evaluation import evaluate  # loads the training code, which no map needs

    return {
        name: evaluate(model, PlantedShapes("test", images, seed=seed, **options), batch_size=batch_size).correct
        for name, options in BACKGROUND_VARIANTS.items()
    }


def background_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive part that lies outside the object, 1 - `energy_in_mask`: [B] in [0, 1].

    From maps [B, h, w] on their own grid (not enlarged bilinearly) and masks bool [B, H, W]. A map without anything
    positive counts as uniform. Compare with the uniform map's: the background's share.
    """
    return 1 - energy_in_mask(maps, masks)
