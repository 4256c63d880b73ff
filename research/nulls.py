"""Sparsity beside that of three nulls: attention that has lost what makes it the attention of this image.

The nulls are keys whose coordinates are permuted over the tokens, keys of another image, and Gaussian logits of the
same spread; see `svit_utils.referee.nulls`.
"""

import pandas as pd
import torch
from torch import Tensor, nn

from svit_utils.attention.formula import thresholded_softmax
from svit_utils.attention.record import effective_support
from svit_utils.attention.tracker import has_class_token
from svit_utils.referee.inputs import check_tau
from svit_utils.referee.nulls import permute_coordinates, queries_and_keys, sparsity_floor


def row_statistics(scores: Tensor, tau: float) -> dict[str, Tensor]:
    """What a cut at `tau` does to each row of logits `scores` [..., N, M], before any fallback: each entry [..., N].

    With p the row's softmax, S = {j : p_j > tau} and A the row cut and renormalised (ValueError for tau not in [0, 1)):

    * `cut_sparsity`: share of the M keys with p_j <= tau,
    * `kept_mass`: sum of p over S,
    * `effective_support`: 1 / sum(A^2), as many keys with even weights would give the same; 0 where S is empty,
    * `empty`: boolean, S is empty.
    """
    check_tau(tau)
    probs = scores.softmax(dim=-1)  # [..., N, M]
    kept = probs > tau
    return {
        "cut_sparsity": 1 - kept.sum(dim=-1) / kept.shape[-1],
        "kept_mass": (probs * kept).sum(dim=-1),
        "effective_support": effective_support(thresholded_softmax(scores, tau, empty_rows="zero")),
        "empty": ~kept.any(dim=-1),
    }


def matched_gaussian(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Independent normal logits [..., N, M], each row as spread as that row of `scores`; softmax ignores its mean."""
    noise = torch.randn(scores.shape, generator=generator, dtype=scores.dtype).to(scores.device)
    return noise * scores.std(dim=-1, keepdim=True)


def sparsity_against_nulls(model: nn.Module, x: Tensor, tau: float = 0.01, *, seed: int = 0) -> pd.DataFrame:
    """Sparsity of the model's attention on the images `x` [B, 3, H, W] beside that of three nulls, cut at `tau`.

    The cut is applied to the logits, of sparse and of dense layers alike: for a dense model the numbers say what a cut
    *would* take, and in a sparse one an empty row counts as empty, whatever it falls back to.

    Returns a row per `layer`, `head`, `queries` ("all", and "class" for the class token's row alone, where there is
    one) and `source`: "observed", the model's own logits; "permuted_keys", see `permute_coordinates`; "other_image",
    queries of each image against the keys of the next one in the batch; "gaussian", see `matched_gaussian`. Columns:
    `cut_sparsity`, `kept_mass`, `effective_support` and `empty_rate`, means over images and queries as in
    `row_statistics`, and `floor`, see `sparsity_floor`.

    Raises ValueError for fewer than two images, tau outside [0, 1), or where `queries_and_keys` does.
    """
    check_tau(tau)
    if len(x) < 2:
        raise ValueError(f"x must hold at least 2 images (keys are swapped between them), got {len(x)}")
    generator = torch.Generator().manual_seed(seed)
    parts = {"all": slice(None), **({"class": slice(1)} if has_class_token(model) else {})}
    table = []
    for layer, (q, k) in queries_and_keys(model, x).items():
        sums: dict[tuple[str, str], Tensor] = {}  # (queries, source) -> [H, 4], summed over images
        for image in range(len(q)):  # one at a time: [B, H, N, N] several times over would not be small
            own, keys = q[image], k[image].transpose(-2, -1)  # [H, N, D], [H, D, N]
            scores = own @ keys  # [H, N, N]
            sources = {
                "observed": scores,
                "permuted_keys": own @ permute_coordinates(k[image], generator).transpose(-2, -1),
                "other_image": own @ k[(image + 1) % len(k)].transpose(-2, -1),
                "gaussian": matched_gaussian(scores, generator),
            }
            for source, logits in sources.items():
                rows = torch.stack([s.double() for s in row_statistics(logits, tau).values()], dim=-1)  # [H, N, 4]
                for queries, part in parts.items():
                    sums[queries, source] = sums.get((queries, source), 0) + rows[:, part].mean(dim=1).cpu()
        for (queries, source), total in sums.items():
            for head, means in enumerate((total / len(q)).tolist()):
                where = {"layer": layer, "head": head, "queries": queries, "source": source}
                columns = zip(("cut_sparsity", "kept_mass", "effective_support", "empty_rate"), means, strict=True)
                table.append({**where, **dict(columns), "floor": sparsity_floor(k.shape[-2], tau)})
    return pd.DataFrame(table)
