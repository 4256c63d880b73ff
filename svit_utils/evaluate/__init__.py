"""Scores of explanations against known answers, baselines, intervals and sanity checks."""

from __future__ import annotations

from svit_utils.evaluate.baselines import centre_maps, random_maps, uniform_maps
from svit_utils.evaluate.localisation import energy_in_mask, iou_at_mask_area, localisation_scores, pointing_game
from svit_utils.evaluate.randomisation import RandomisationCheck, randomise_weights, weight_randomisation
from svit_utils.evaluate.statistics import Interval, mean_interval, paired_bootstrap

__all__ = [
    "Interval",
    "RandomisationCheck",
    "centre_maps",
    "energy_in_mask",
    "iou_at_mask_area",
    "localisation_scores",
    "mean_interval",
    "paired_bootstrap",
    "pointing_game",
    "random_maps",
    "randomise_weights",
    "uniform_maps",
    "weight_randomisation",
]
