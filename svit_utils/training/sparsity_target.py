"""A loss that lets learnable thresholds share out a given sparsity among layers and heads.

Cross-entropy alone would let every tau fall to 0, since a cut can only take something away. So the share that is cut is
fixed, and training decides where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svit_utils.attention import LearnableThreshold, sparse_modules
from svit_utils.attention.formula import no_autocast
from svit_utils.training.config import TrainConfig
from svit_utils.training.recipe import Loss

EACH = ("model", "layer")


class SparsityTarget:
    """Cross-entropy plus a penalty that keeps the share of keys that are cut at a target; `train` takes it as ``loss``.

    With p a row's softmax, tau its threshold at full strength (whatever the warm-up), and s the share of its keys with
    p_j <= tau:

        penalty = weight (mean s - target)^2 + guard mean max(0, log tau - log max_j p_j)

    s is counted, and differentiated as if key j were kept with probability sigmoid((log p_j - log tau) / temperature),
    the soft mask of Kim et al. 2022 (Learned Token Pruning, arXiv:2107.00910). The second term pulls tau down where a
    row has no survivor. Such a row falls back, so the share of exact zeros is smaller than s. That share would be no
    target: it falls where tau is too high, which would push tau higher still. Only tau gets a gradient from the
    penalty: the weights of the model are trained by the cross-entropy.

    Args:
        model: sparsified with a `LearnableThreshold`.
        config: the recipe, for its cross-entropy.
        target: share of the keys in (0, 1) that are cut, the mean over images, layers, heads and rows.
        each: ``"model"`` holds the mean over all layers at the target; ``"layer"`` holds every layer at it.
        weight, guard: factors of the two terms, at least 0.
        temperature: of the sigmoid, above 0, in units of log p.
        images: how many of each batch the shares are taken on.

    Raises:
        ValueError: a setting out of range, or a sparse module whose threshold is not learnable.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        target: float,
        *,
        each: str = "model",
        weight: float = 10.0,
        guard: float = 1.0,
        temperature: float = 0.5,
        images: int = 4,
    ) -> None:
        if not 0 < target < 1:
            raise ValueError(f"target must lie in (0, 1), got {target}")
        if each not in EACH:
            raise ValueError(f"each must be one of {', '.join(map(repr, EACH))}, got {each!r}")
        if not (weight >= 0 and guard >= 0 and temperature > 0 and images >= 1):
            raise ValueError(
                "weight and guard must be at least 0, temperature above 0 and images at least 1, got "
                f"{weight}, {guard}, {temperature} and {images}"
            )
        self.modules = sparse_modules(model)
        wrong = [n for n, m in self.modules.items() if not isinstance(m.threshold, LearnableThreshold)]
        if wrong or not self.modules:
            name = wrong[0] if wrong else "the model"
            raise ValueError(
                f"{name} has no learnable threshold: sparsify(model, LearnableThreshold(0.005, per='head'))"
            )
        self.target, self.each, self.weight, self.guard = target, each, weight, guard
        self.temperature, self.images = temperature, images
        self.cross_entropy = Loss(model, config)

    def __repr__(self) -> str:
        names = ("target", "each", "weight", "guard", "temperature", "images")
        return f"SparsityTarget({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar, of ``images`` [B, 3, H, W] with ``labels`` [B]."""
        found: list[tuple[Tensor, Tensor]] = []
        with self._watching(found):
            loss = self.cross_entropy(forward, images, labels)
        if not found:
            raise ValueError("no sparse attention was called: the loss was made for another model than is trained")
        cut = torch.stack([share for share, _ in found])  # [L]
        distance = torch.stack([below for _, below in found]).mean()
        missed = (cut.mean() if self.each == "model" else cut) - self.target
        return loss + self.weight * missed.square().mean() + self.guard * distance

    @contextmanager
    def _watching(self, found: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Append each call's share of keys that are cut, and mean distance of rows below tau, to ``found``."""

        def watch(module: nn.Module, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
            if attn_mask is not None or is_causal:
                raise ValueError("SparsityTarget counts the keys of whole rows: it takes no attention mask")
            q, k = q[: self.images].detach().float(), k[: self.images].detach().float()
            with no_autocast(q.device.type):
                scores = (q * module.scale) @ k.transpose(-2, -1)  # type: ignore[operator]  # [b, H, N, M]
                found.append(self._share(scores, module.threshold))  # type: ignore[arg-type]

        for module in self.modules.values():
            module.input_observers.append(watch)
        try:
            yield
        finally:
            for module in self.modules.values():
                module.input_observers.remove(watch)

    def _share(self, scores: Tensor, threshold: LearnableThreshold) -> tuple[Tensor, Tensor]:
        """Share of the scores [b, H, N, M] that are cut, and how far rows lie below tau in log p, two scalars."""
        log_p = scores.log_softmax(dim=-1)
        log_tau = nn.functional.logsigmoid(threshold.logit)  # [1] or [H]
        log_tau = log_tau[:, None, None] if threshold.per == "head" else log_tau[0]
        cut = (log_p <= log_tau).float()
        softly = torch.sigmoid((log_tau - log_p) / self.temperature)
        share = (cut + softly - softly.detach()).mean()  # the value of the count, the gradient of the soft mask
        below = (log_tau - log_p.amax(dim=-1, keepdim=True)).clamp_min(0.0)
        return share, below.mean()
