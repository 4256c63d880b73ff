"""Where a model's patch tokens lie: how many prefix tokens come first, and the grid of patches that follows them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svit_utils.explain.model_state import check_images, unwrap

_SUPPORTED = (
    "supported are timm models whose tokens are `num_prefix_tokens` prefix tokens followed by one row-major grid of "
    "patches (ViT, DeiT, distilled DeiT, DINOv2 and DINOv3, SigLIP, EVA02)"
)


@dataclass(frozen=True)
class TokenGrid:
    """`num_prefix` tokens (class, distillation, registers), then `height * width` patch tokens, row by row."""

    num_prefix: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the patch grid."""
        return self.height, self.width

    @property
    def num_tokens(self) -> int:
        """Prefix and patch tokens together, the N of the attention matrix."""
        return self.num_prefix + self.height * self.width


def token_grid(model: nn.Module, x: Tensor) -> TokenGrid:
    """The token grid of `model` for the images `x` [B, 3, H, W].

    The number of prefix tokens is the model's own `num_prefix_tokens` (1 for ViT, 2 for distilled DeiT, 5 for DINOv2
    with registers, 0 for SigLIP). The patch embedding tells the grid for this image size, non-square or dynamic. Raises
    ValueError where there is no single grid (NaFlexViT with variable sequences, MobileViT, hierarchical models).
    """
    model = unwrap(model)
    check_images(x)
    patch_embed, prefix = getattr(model, "patch_embed", None), getattr(model, "num_prefix_tokens", None)
    refused = f"no token grid can be established for {type(model).__name__}"
    if patch_embed is None or not isinstance(prefix, int):
        missing = "patch_embed" if patch_embed is None else "num_prefix_tokens"
        raise ValueError(f"{refused}: it has no `{missing}`; {_SUPPORTED}")
    if hasattr(patch_embed, "dynamic_feat_size"):
        height, width = patch_embed.dynamic_feat_size((int(x.shape[-2]), int(x.shape[-1])))
    elif getattr(patch_embed, "grid_size", None) is not None:
        height, width = patch_embed.grid_size
    else:
        raise ValueError(f"{refused}: its {type(patch_embed).__name__} tells no grid; {_SUPPORTED}")
    return TokenGrid(prefix, int(height), int(width))


def tokens_to_grid(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """[B, N, C] tokens, with the grid's N (else ValueError) -> [B, C, h, w], prefix tokens left out."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] != grid.num_tokens:
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"expected tokens [B, {grid.num_tokens}, C] ({grid.num_prefix} prefix + {grid.height} x {grid.width} "
            f"patches), got {got}; {_SUPPORTED}"
        )
    return tokens[:, grid.num_prefix :].transpose(1, 2).unflatten(2, grid.size)  # [B, C, h, w]


def readout_rows(model: nn.Module, grid: TokenGrid) -> Tensor:
    """Indices of the tokens that the classifier reads: the queries that an explanation by attention starts from.

    Class-token heads: token 0, and for a distilled DeiT token 1 as well, whose head it averages with. Heads that take
    the mean or pool by attention: every patch token, and with timm's `pool_include_prefix` the prefix tokens too.
    Raises ValueError where the head is not timm's, pools nothing, or takes maxima, a token for each channel.
    """
    model = unwrap(model)
    pool, attends = getattr(model, "global_pool", None), getattr(model, "attn_pool", None) is not None
    head = [getattr(model, name, None) for name in ("forward_head", "pool")]
    own = head[0] is None or any(method is not None and "timm." not in method.__module__ for method in head)
    if own or not (attends or pool in ("token", "avg")):
        raise ValueError(
            f"{type(model).__name__} (global_pool={pool!r}{', a head of its own' if own else ''}) gives its tokens no "
            f"weights that are known: take the rows that you mean from `attention_maps` or `rollout_matrix`, or use "
            f"Grad-CAM, which follows the score through any head"
        )
    if pool == "token" and not attends:
        return torch.arange(2 if getattr(model, "dist_token", None) is not None else 1)
    # Eva has no such setting: its mean leaves the prefix tokens out, its attention pooling does not.
    whole = getattr(model, "pool_include_prefix", attends)
    return torch.arange(0 if whole else grid.num_prefix, grid.num_tokens)


def read_out(weights: Tensor, model: nn.Module, grid: TokenGrid, shares: Tensor | None = None) -> Tensor:
    """What the classifier's tokens take from each patch: [..., N, N] weights (rows are queries) -> [..., h, w].

    It is the mean over the R `readout_rows`, or where the head pools by attention their sum with the weights `shares`
    [B, R], one row for each entry of the first dimension of `weights`; what comes from prefix tokens is left out.
    Raises ValueError for such a head without its `shares`.
    """
    rows = weights[..., readout_rows(model, grid).to(weights.device), :]  # [..., R, N]
    if shares is not None:
        shares = shares.to(rows).reshape(-1, *[1] * (rows.ndim - 3), shares.shape[-1], 1)  # [B, 1, ..., R, 1]
        rows = (shares * rows).sum(dim=-2)
    elif getattr(unwrap(model), "attn_pool", None) is not None:
        raise ValueError(f"{type(unwrap(model)).__name__} pools by attention: give the weights of its pooling")
    else:
        rows = rows.mean(dim=-2)  # [..., N]
    return rows[..., grid.num_prefix :].unflatten(-1, grid.size)  # [..., h, w]
