"""Learning from a dense model while the attention is being cut: a cheaper cure than more training, perhaps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distillation:
    """Half cross-entropy, half the divergence from a teacher's softened prediction (Hinton et al. 2015, 1503.02531).

    loss = 1/2 CE(student, label) + 1/2 T^2 KL(softmax(teacher / T) || softmax(student / T)),   T = 2
    """

    temperature = 2.0

    def __init__(self, teacher: nn.Module, name: str) -> None:
        self.teacher, self.name = teacher, name

    def __repr__(self) -> str:
        return f"Distillation({self.name!r}, temperature={self.temperature})"

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(images).float()
        logits, t = forward(images).float(), self.temperature
        divergence = F.kl_div(F.log_softmax(logits / t, dim=-1), F.softmax(taught / t, dim=-1), reduction="batchmean")
        return (F.cross_entropy(logits, labels) + t**2 * divergence) / 2
