"""The referee: scores of explanations against known answers, baselines, sanity checks, nulls, intervals."""

from .background import background_accuracy, background_mass
from .baselines import centre_maps, edge_maps, random_maps, uniform_maps
from .curves import curve_area, deletion_curve, insertion_curve
from .faithfulness import faithfulness_scores
from .infidelity import infidelity
from .localisation import average_precision, energy_in_mask, iou_at_mask_area, localisation_scores, pointing_game
from .max_sensitivity import max_sensitivity
from .nulls import sparsity_floor
from .randomisation import RandomisationCheck, weight_randomisation
from .road import road
from .saco import saco
from .sparseness import sparseness
from .statistics import Comparison, Interval, compare, holm, mean_interval, paired_bootstrap, student_interval

__all__ = ["Comparison", "Interval", "RandomisationCheck"]
__all__ += ["background_accuracy", "background_mass"]
__all__ += ["centre_maps", "edge_maps", "random_maps", "uniform_maps"]
__all__ += ["curve_area", "deletion_curve", "faithfulness_scores", "infidelity", "insertion_curve", "max_sensitivity"]
__all__ += ["average_precision", "energy_in_mask", "iou_at_mask_area", "localisation_scores", "pointing_game"]
__all__ += ["road", "saco", "sparseness", "weight_randomisation"]
__all__ += ["sparsity_floor"]
__all__ += ["compare", "holm", "mean_interval", "paired_bootstrap", "student_interval"]
