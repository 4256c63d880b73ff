"""What is measured of a model on photographs: sparsity, sinks, and a linear probe of its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from research.second.sinks import sink_table
from svit_utils.attention import TokenSparsityTracker, sparse_modules
from svit_utils.training.evaluation import autocast

CHUNK = 25  # pictures at a time
SHARES = ("applied_sparsity", "cut_sparsity", "empty_rate", "kept_mass", "effective_support")
PENALTY = 0.005  # of the probe, times the squared weights


def stacked(data: Dataset, places: range) -> Tensor:
    """The pictures at these places [B, 3, H, W]."""
    return torch.stack([data[place][0] for place in places])


def attention_shares(model: nn.Module, data: Dataset, every: int = 5) -> dict[str, Any]:
    """Sparsity and the heaviest column's share of all attention mass.

    Args:
        model: dense or sparse; of a dense one only the sinks are measured.
        data: of (image, label).
        every: which pictures: every so many.

    Returns:
        ``applied_sparsity``, ``cut_sparsity``, ``empty_rate``, ``kept_mass``, ``effective_support`` (empty for a dense
        model), ``sink_mean`` and ``sink_max`` (over the layers), and ``tracked``, the number of pictures.
    """
    places = range(0, len(data), every)  # type: ignore[arg-type]
    found: dict[str, Any] = dict.fromkeys(SHARES, "")
    images = stacked(data, places)
    if sparse_modules(model):
        with TokenSparsityTracker(model) as tracker, torch.no_grad():
            for x in images.split(CHUNK):
                model(x)
        summary = tracker.summary()
        found = {name: round(getattr(summary, name), 4) for name in SHARES}
    sinks = sink_table(model, images)["share"].to_numpy()
    return found | {
        "sink_mean": round(float(sinks.mean()), 4),
        "sink_max": round(float(sinks.max()), 4),
        "tracked": len(places),
    }


@torch.no_grad()
def answers(model: nn.Module, data: Dataset) -> tuple[Tensor, Tensor]:
    """(features [n, C] that the classifier reads, logits [n, classes]) of all pictures; bf16, the cut in float32."""
    features, logits = [], []
    for start in range(0, len(data), CHUNK):  # type: ignore[arg-type]
        x = stacked(data, range(start, min(start + CHUNK, len(data))))  # type: ignore[arg-type]
        with autocast("cpu", "bf16"):
            pooled = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
        features.append(pooled.float())
        logits.append(model.get_classifier()(pooled.float()))  # type: ignore[operator]
    return torch.cat(features), torch.cat(logits)


def probe(train: Tensor, train_labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Multinomial logistic regression on frozen features: fitted on ``train``, its answers for ``test`` [n].

    The features are standardised with ``train``'s mean and deviation. What is minimised is the mean cross-entropy plus
    ``PENALTY`` times the squared weights (not the offsets), which has one minimum; L-BFGS finds it from zero.

    Args:
        train: features [m, C].
        train_labels: [m], in 0 to ``classes`` - 1.
        test: features [n, C].
        classes: how many.
    """
    mean, deviation = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    x, y = ((part - mean) / deviation for part in (train, test))
    weights = torch.zeros(classes, x.shape[1], requires_grad=True)
    offsets = torch.zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS([weights, offsets], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(F.linear(x, weights, offsets), train_labels) + PENALTY * weights.square().sum()
        value.backward()
        return value

    search.step(loss)  # type: ignore[arg-type]
    return F.linear(y, weights, offsets).argmax(dim=1).detach()
