"""The fast ways to compute thresholded attention, each tested against `svit_utils.attention.formula`."""
