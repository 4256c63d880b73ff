"""Attention rows to work on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from svit_course.question import Case


def draw_rows(case: Case, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Rows of attention that sum to 1 over the last axis; ``std`` says how uneven they are."""
    exp = np.exp(case.get("std", 1.5) * rng.standard_normal(shape))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))


def double(array: np.ndarray) -> Tensor:
    """A float64 tensor, so that what is expected is more exact than what is judged."""
    return torch.from_numpy(array.astype(np.float64))
