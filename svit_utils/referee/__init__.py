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
from svit_utils.referee.nulls import row_statistics, sparsity_against_nulls, sparsity_floor
from svit_utils.referee.randomisation import RandomisationCheck, randomise_weights, weight_randomisation
from svit_utils.referee.road import road
from svit_utils.referee.sparseness import sparseness
from svit_utils.referee.statistics import (
    Comparison,
    Interval,
    compare,
    crossed_bootstrap,
    holm,
    mean_interval,
    paired_bootstrap,
    student_interval,
)
from svit_utils.referee.zeros import normaliser_effect, reachability, reachability_table, value_path_certificate

__all__ = [
    "Comparison",
    "Interval",
    "RandomisationCheck",
    "average_precision",
    "background_accuracy",
    "background_mass",
    "centre_maps",
    "compare",
    "crossed_bootstrap",
    "curve_area",
    "deletion_curve",
    "distractor_mass",
    "distractor_share",
    "edge_maps",
    "energy_in_mask",
    "faithfulness_scores",
    "holm",
    "infidelity",
    "insertion_curve",
    "iou_at_mask_area",
    "localisation_scores",
    "max_sensitivity",
    "mean_interval",
    "normaliser_effect",
    "paired_bootstrap",
    "pointing_game",
    "random_maps",
    "randomise_weights",
    "reachability",
    "reachability_table",
    "road",
    "row_statistics",
    "sparseness",
    "sparsity_against_nulls",
    "sparsity_floor",
    "student_interval",
    "uniform_maps",
    "value_path_certificate",
    "weight_randomisation",
]
