"""What tau is: a number, a number relative to the count of keys, or a learned one.

tau is kept in float32 whatever the model's dtype: in bf16 an update of a learned tau near 0.01 is rounded away.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

EMPTY_ROWS = ("zero", "dense", "top1", "cap")


class Threshold(nn.Module):
    """Base of the threshold objects: ``forward(keys)`` gives tau, times the warm-up factor of `set_warmup`.

    A new kind is a subclass with `forward` and `settings`, and one line in `THRESHOLDS`.
    """

    warmup: Tensor
    # Whether tau depends on the number of keys; where it does not, nobody has to count them.
    counts_keys = True

    def __init__(self) -> None:
        super().__init__()
        # The numbers are kept as Python values too: a module that is built on the meta device, emptied onto another one
        # and given a state_dict would otherwise compute with whatever lay in memory.
        self._numbers: dict[str, Any] = {"warmup": 1.0}
        self.register_buffer("warmup", torch.ones((), dtype=torch.float32), persistent=False)

    def forward(self, keys: int | Tensor) -> Tensor:
        """Tau, broadcastable to [B, H, N, 1], for queries that may attend to ``keys`` keys (int or tensor)."""
        raise NotImplementedError

    def for_heads(self, num_heads: int) -> Threshold:
        """The object a layer of ``num_heads`` heads holds: a copy, unless it is shared between layers."""
        return copy.deepcopy(self, cast(Any, {_QUIET: True}))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON takes them; the value of a learned tau lies in the state_dict."""
        raise NotImplementedError

    def set_warmup(self, fraction: float) -> Threshold:
        """Multiply tau by ``fraction`` in [0, 1] from now on: training raises it from 0 to 1 to introduce the cut.

        A copy of the model, such as an average of its weights, has a factor of its own: make it at the full tau, as
        `svit_utils.training.train` does, or set its factor too.

        Raises:
            ValueError: a fraction outside [0, 1].
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"the warm-up factor of tau must lie in [0, 1], got {fraction}")
        self._numbers["warmup"] = float(fraction)
        self.warmup.fill_(fraction)
        return self

    @property
    def share(self) -> float:
        """The factor of `set_warmup` that is in force."""
        return self._numbers["warmup"] if self.warmup.is_meta else float(self.warmup)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Threshold:
        if self.share < 1 and not memo.setdefault(_QUIET, False):
            memo[_QUIET] = True  # one message for a model
            log.warning(
                "a copy is made of a model whose tau stands at %.3g of its value, and stays there when that of the "
                "original rises, unless it is set too: module.threshold.set_warmup(1.0) for each of sparse_modules",
                self.share,
            )
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follow the model to another device, but stay in float32 when the model is cast."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        before = {name: getattr(self, name).detach() for name in self._numbers}
        applied = super()._apply(keep_dtype, recurse)
        for name, old in before.items():  # `to_empty` leaves nothing but memory, and comes once for each layer
            new = getattr(self, name).detach()
            if old.is_meta and not new.is_meta:
                new.copy_(self._number(name)) if name in self._buffers else new.fill_(self._numbers[name][0])
            elif type(new) is Tensor and not new.is_meta and not torch.equal(new.cpu(), old.cpu()):
                new.copy_(old)
        return applied

    def leave_meta(self, device: torch.device) -> None:
        """Bring to ``device`` what an assigned state_dict has left on the meta device, since it does not hold it."""
        for name, tensor in self._buffers.items():
            if tensor is not None and tensor.is_meta:
                self._buffers[name] = self._number(name).to(device)

    def _number(self, name: str) -> Tensor:
        return torch.tensor(self._numbers[name], dtype=torch.float32, device="cpu")


class FixedThreshold(Threshold):
    """The card's threshold: one number, or one per head.

    Args:
        tau: float in [0, 1), or a sequence or tensor [H] of such.
    """

    value: Tensor
    counts_keys = False

    def __init__(self, tau: float | Tensor | Sequence[float]) -> None:
        super().__init__()
        try:
            where = None if isinstance(tau, Tensor) else "cpu"  # whatever torch.device is in force
            value = torch.as_tensor(tau, dtype=torch.float32, device=where).detach().clone()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"tau must be a number or have shape [H], got {tau!r}") from None
        if value.ndim > 1 or value.is_meta:
            found = "a tensor without values, on the meta device" if value.is_meta else f"shape {tuple(value.shape)}"
            raise ValueError(f"tau must be a number or have shape [H], got {found}")
        _check_range(value, tau)
        self._numbers["value"] = value.tolist()
        self.register_buffer("value", value, persistent=False)

    @property
    def tau(self) -> float | Tensor:
        """Tau now in force, a float or a tensor [H]."""
        tau = self.value * self.warmup
        return tau if tau.ndim else float(f"{float(tau):.7g}")  # 0.01, not float32's 0.009999999776

    def forward(self, keys: int | Tensor) -> Tensor:
        return _over_rows(self.value * self.warmup)

    def for_heads(self, num_heads: int) -> Threshold:
        _check_entries(self.value, num_heads)
        return super().for_heads(num_heads)

    def settings(self) -> dict[str, Any]:
        return {"tau": [_rounded(tau) for tau in self.value] if self.value.ndim else _rounded(self.value)}

    def extra_repr(self) -> str:
        return "tau=... (meta)" if self.value.is_meta else f"tau={self.tau}"


class RelativeThreshold(Threshold):
    """Tau as a multiple of the uniform weight: tau = alpha / (number of keys the query may attend to).

    tau = 0.01 at N = 197 keys is alpha = 1.97; with alpha fixed, the cut means the same at any image size.
    A tau that comes out at 1 or more (alpha at least the number of keys) raises ValueError when it is used.

    Args:
        alpha: float >= 0.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        if not (alpha >= 0.0 and alpha < float("inf")):
            raise ValueError(f"alpha must be a finite number >= 0, got {alpha}")
        self.alpha = float(alpha)

    def forward(self, keys: int | Tensor) -> Tensor:
        if _may_look_at(keys):
            fewest = _fewest_keys(keys, self.alpha)
            if fewest is not None:
                raise ValueError(
                    f"RelativeThreshold(alpha={self.alpha}) gives tau = {self.alpha / fewest:.4g} for a query with "
                    f"{fewest} keys; tau must stay below 1, so alpha must be smaller than the number of keys"
                )
        if isinstance(keys, Tensor):
            keys = keys.clamp(min=1).to(torch.float32)  # a query without any key has nothing to cut
        return self.warmup * self.alpha / keys

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class LearnableThreshold(Threshold):
    """A trained tau, stored as its logit so that it stays in (0, 1): tau = sigmoid(logit).

    Adds float32 parameters under ``<attention>.threshold.logit``: the one exception to "the state_dict stays
    that of the dense model". With at most one dimension they fall out of weight decay by timm's usual rule.

    Args:
        init: float in (0, 1), where tau starts.
        per: ``"model"`` one object shared by all layers, ``"layer"`` one per layer, ``"head"`` one number per head.
    """

    counts_keys = False

    def __init__(self, init: float = 0.01, per: str = "layer") -> None:
        super().__init__()
        if per not in ("model", "layer", "head"):
            raise ValueError(f"per must be 'model', 'layer' or 'head', got {per!r}")
        if not 0.0 < init < 1.0:
            raise ValueError(f"init must lie in (0, 1), got {init}")
        self.init, self.per = float(init), per
        # One number has shape [1]: FSDP2 refuses parameters without a dimension.
        self._numbers["logit"] = [math.log(init / (1 - init))]
        self.logit = nn.Parameter(torch.tensor(self._numbers["logit"], dtype=torch.float32))

    @property
    def tau(self) -> Tensor:
        """Tau now in force with its graph, [], or [H] with ``per="head"``."""
        tau = torch.sigmoid(self.logit) * self.warmup
        return tau if self.per == "head" else tau[0]

    def forward(self, keys: int | Tensor) -> Tensor:
        return _over_rows(self.tau)

    def for_heads(self, num_heads: int) -> Threshold:
        if self.per == "model":
            return self
        own: Any = super().for_heads(num_heads)
        if self.per == "head":
            if own.logit.numel() > 1:
                _check_entries(own.logit, num_heads)
            own.logit = nn.Parameter(self.logit.detach().expand(num_heads).clone())
        return own

    def settings(self) -> dict[str, Any]:
        return {"init": self.init, "per": self.per}

    def extra_repr(self) -> str:
        return f"per={self.per!r}"


_QUIET = "svit_utils: said, or need not be said"  # in the memo of a deepcopy

THRESHOLDS: dict[str, type[Threshold]] = {"fixed": FixedThreshold, "relative": RelativeThreshold}
THRESHOLDS["learnable"] = LearnableThreshold
ThresholdLike: TypeAlias = float | Tensor | Threshold


def check_empty_rows(mode: str) -> None:
    """Raise ValueError unless ``mode`` is one of `EMPTY_ROWS`."""
    if mode not in EMPTY_ROWS:
        raise ValueError(f"empty_rows must be one of {', '.join(map(repr, EMPTY_ROWS))}, got {mode!r}")


def as_threshold(threshold: ThresholdLike) -> Threshold:
    """A threshold object from what users pass: itself, or `FixedThreshold` of a number or tensor [H]."""
    return threshold if isinstance(threshold, Threshold) else FixedThreshold(threshold)


def resolve_threshold(
    threshold: ThresholdLike, keys: int | Tensor, heads: int | None, dtype: torch.dtype
) -> Tensor | float:
    """Tau broadcastable to [..., N, 1]; checks its range and shape.

    A tensor's values are looked at, which waits for a GPU at each call (a `FixedThreshold` is checked once, when it is
    made); not while ``torch.compile`` or ``torch.export`` traces, or a CUDA graph is captured.

    Args:
        threshold: what the user gave.
        keys: how many keys a query may attend to, int or tensor broadcastable to [..., N, 1].
        heads: H where the scores are [..., H, N, M]; None where they have no such dimension.
        dtype: of the statistics, which a tensor tau takes.
    """
    if isinstance(threshold, Threshold):
        tau = threshold(keys)
        _check_heads(tau, heads)
        return tau
    if isinstance(threshold, Tensor):
        if threshold.ndim > 1:
            raise ValueError(f"threshold must be a number or a tensor [H], got shape {tuple(threshold.shape)}")
        if _may_look_at(threshold):
            _check_range(threshold, threshold)
        tau = _over_rows(threshold).to(dtype)
        _check_heads(tau, heads)
        return tau
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise ValueError(f"threshold must be a number, a tensor [H] or a threshold object, got {threshold!r}")
    if not 0.0 <= threshold < 1.0:  # False for NaN too
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    return float(threshold)


def _over_rows(tau: Tensor) -> Tensor:
    """Tau [] as it is, [H] as [H, 1, 1]."""
    return tau[:, None, None] if tau.ndim else tau


def _rounded(tau: Tensor) -> float:
    """The shortest number that this float32 was made from: 0.01, not 0.009999999776."""
    short = float(f"{float(tau):.7g}")
    return short if torch.tensor(short, dtype=tau.dtype) == tau else float(tau)


def _check_entries(values: Tensor, num_heads: int) -> None:
    if values.ndim and values.shape[0] != num_heads:
        raise ValueError(f"tau has {values.shape[0]} entries, but the layer has {num_heads} heads")


def _check_heads(tau: Tensor, heads: int | None) -> None:
    if tau.ndim >= 3 and tau.shape[-3] not in (1, heads):
        found = "no dimension of heads" if heads is None else f"{heads} heads"
        raise ValueError(f"threshold has {tau.shape[-3]} entries, but the scores have {found}")


def _may_look_at(values: int | Tensor) -> bool:
    """Whether numbers can be read now, also those in a tensor."""
    on_gpu = isinstance(values, Tensor) and values.is_cuda
    return not (torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing()))


def _check_range(values: Tensor, given: object) -> None:
    if not bool(((values >= 0) & (values < 1)).all()):
        raise ValueError(f"threshold must lie in [0, 1), got {given}")


def _fewest_keys(keys: int | Tensor, alpha: float) -> int | None:
    """The smallest positive number of keys for which alpha / keys >= 1, or None when there is none."""
    if isinstance(keys, Tensor):
        too_few = keys[(keys > 0) & (keys <= alpha)]
        return int(too_few.min()) if too_few.numel() else None
    return keys if alpha >= keys else None
