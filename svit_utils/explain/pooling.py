"""The weights with which a head that pools by attention reads the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.layers.attention_pool import AttentionPoolLatent, AttentionPoolPrr
from torch import Tensor, nn

from svit_utils.exclusive import exclusive, in_this_thread
from svit_utils.explain.model_state import at_least_single, unwrap


def latent_weights(pool: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """[B, N, C] tokens -> [B, H, L, N]: softmax(q k^T) of the learned queries (SigLIP)."""
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed.to(tokens.dtype)
    q = pool.q(pool.latent.expand(len(tokens), -1, -1)).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
    k = pool.kv(tokens).unflatten(-1, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2)  # [B, H, N, D]
    return _softmax(pool.q_norm(q), pool.k_norm(k), pool.scale)


def refinement_weights(pool: AttentionPoolPrr, tokens: Tensor) -> Tensor:
    """[B, N, C] tokens -> [B, H, N, N]: attention of the tokens to themselves, without projections (PRR)."""
    heads = pool.pre_norm(tokens).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)  # [B, H, N, D]
    return _softmax(heads, heads, pool.scale)


def _softmax(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (at_least_single(q) * scale @ at_least_single(k).transpose(-2, -1)).softmax(dim=-1)


_KINDS: dict[Any, Any] = {
    AttentionPoolLatent.forward: latent_weights,
    AttentionPoolPrr.forward: refinement_weights,
}


@contextmanager
def pooling_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """While the body of the `with` runs the model: the weights [B, R] of the R tokens that its `attn_pool` reads.

    The list stays empty for a model with another head. With several outputs of the pooling, it is the weights of the
    one that timm takes, or their mean where timm takes the mean. Raises ValueError for a pooling of another class.
    """
    model, found = unwrap(model), list[Tensor]()
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        yield found
        return
    weights_of = _KINDS.get(type(pool).forward)
    if weights_of is None:
        raise ValueError(f"{type(model).__name__} pools by {type(pool).__name__}, whose weights cannot be read")

    def read(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        weights = weights_of(pool, args[0].detach()).mean(dim=1)  # [B, L, R]
        found.append(weights[:, 0] if pool.pool == "token" else weights.mean(dim=1))

    with exclusive(model):
        handle = pool.register_forward_pre_hook(in_this_thread(read))
        try:
            yield found
        finally:
            handle.remove()
