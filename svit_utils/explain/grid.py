"""Where a model's patch tokens lie: how many prefix tokens come first, and the grid of patches that follows them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svit_utils.explain.model_state import unwrap

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
        """Prefix and patch tokens together: the N of the attention matrix."""
        return self.num_prefix + self.height * self.width


def token_grid(model: nn.Module, x: Tensor) -> TokenGrid:
    """The token grid of `model` for the images `x` [B, 3, H, W].

    The number of prefix tokens is the model's own `num_prefix_tokens` (1 for ViT, 2 for distilled DeiT, 5 for DINOv2
    with registers, 0 for SigLIP). The patch embedding tells the grid for this image size, non-square or dynamic. Raises
    ValueError where there is no single grid (NaFlexViT with variable sequences, MobileViT, hierarchical models).
    """
    model = unwrap(model)
    if x.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got shape {tuple(x.shape)}")
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
    if tokens.ndim != 3 or tokens.shape[1] != grid.num_tokens:
        raise ValueError(
            f"expected tokens [B, {grid.num_tokens}, C] ({grid.num_prefix} prefix + {grid.height} x {grid.width} "
            f"patches), got shape {tuple(tokens.shape)}; {_SUPPORTED}"
        )
    return tokens[:, grid.num_prefix :].transpose(1, 2).unflatten(2, grid.size)  # [B, C, h, w]


def readout_rows(model: nn.Module, grid: TokenGrid) -> Tensor:
    """Indices of the tokens that the classifier reads: the queries that an explanation by attention starts from.

    Class-token heads: token 0, and for a distilled DeiT token 1 as well, whose head it averages with. Mean-pooled and
    attention-pooled heads: every patch token, all counted alike.
    """
    model = unwrap(model)
    if getattr(model, "global_pool", None) == "token" and grid.num_prefix > 0:
        return torch.arange(2 if getattr(model, "dist_token", None) is not None else 1)
    return torch.arange(grid.num_prefix, grid.num_tokens)


def read_out(weights: Tensor, model: nn.Module, grid: TokenGrid) -> Tensor:
    """What the classifier's tokens take from each patch: [..., N, N] weights (rows are queries) -> [..., h, w].

    It is the mean over `readout_rows`; what comes from prefix tokens is left out.
    """
    rows = weights[..., readout_rows(model, grid).to(weights.device), :].mean(dim=-2)  # [..., N]
    return rows[..., grid.num_prefix :].unflatten(-1, grid.size)  # [..., h, w]
