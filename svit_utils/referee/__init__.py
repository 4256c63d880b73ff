"""The referee: scores of explanations against known answers, baselines, sanity checks, nulls, intervals."""

from svit_utils.referee.background import background_accuracy, background_mass, distractor_mass, distractor_share
from svit_utils.referee.baselines import centre_maps, edge_maps, random_maps, uniform_maps
from svit_utils.referee.curves import curve_area, deletion_curve, insertion_curve
from svit_utils.referee.faithfulness import faithfulness_scores
from svit_utils.referee.infidelity import infidelity
from svit_utils.referee.localisation import (
    average_precision,
    energy_in_mask,
    iou_at_mask_area,
    localisation_scores,
    pointing_game,
)
from svit_utils.referee.max_sensitivity import max_sensitivity
from svit_utils.referee.nulls import sparsity_against_nulls, sparsity_floor
from svit_utils.referee.randomisation import RandomisationCheck, weight_randomisation
from svit_utils.referee.road import road
from svit_utils.referee.sparseness import sparseness
from svit_utils.referee.statistics import (
    Comparison,
    Interval,
    compare,
    holm,
    mean_interval,
    paired_bootstrap,
    student_interval,
)

__all__ = ["Comparison", "Interval", "RandomisationCheck"]
__all__ += ["background_accuracy", "background_mass", "distractor_mass", "distractor_share"]
__all__ += ["centre_maps", "edge_maps", "random_maps", "uniform_maps"]
__all__ += ["curve_area", "deletion_curve", "faithfulness_scores", "infidelity", "insertion_curve", "max_sensitivity"]
__all__ += ["average_precision", "energy_in_mask", "iou_at_mask_area", "localisation_scores", "pointing_game"]
__all__ += ["road", "sparseness", "weight_randomisation"]
__all__ += ["sparsity_against_nulls", "sparsity_floor"]
__all__ += ["compare", "holm", "mean_interval", "paired_bootstrap", "student_interval"]
