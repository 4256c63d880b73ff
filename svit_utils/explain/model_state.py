"""How a model is used for an explanation and left as it was found; which class is explained."""

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from reprlib import repr as shortly
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from svit_utils.exclusive import evaluating, exclusive

# A class for all images, a class for each, or None for what the model predicts.
Targets: TypeAlias = int | Sequence[int] | Tensor | np.ndarray | None

_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and their like, which all share its weights."""
    while (inner := getattr(model, "_orig_mod", None)) is not None or isinstance(model, _WRAPPERS):
        model = model.module if inner is None else inner
    return model


@contextmanager
def traceable(model: nn.Module, x: Any) -> Iterator[None]:
    """`uncompiled`; where timm refuses the size of the images `x`, its AssertionError becomes a ValueError."""
    with uncompiled():
        try:
            yield
        except AssertionError as error:
            raise ValueError(f"{type(model).__name__} refuses images of shape {tuple(x.shape)}: {error}") from error


@contextmanager
def uncompiled() -> Iterator[None]:
    """For the body of the `with`, nothing runs compiled: compiled code does not see hooks that are added later."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # where nothing imported the compiler, nothing is compiled
            stack.enter_context(exclusive(torch.compiler))  # the next line sets it for all threads
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def check_differentiable(model: nn.Module) -> None:
    """Raises ValueError where gradients cannot pass through the model, or would be wrong."""
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        raise ValueError(
            f"{type(model).__name__} was made or loaded under torch.inference_mode(), so no gradient passes through "
            f"it: make it outside, or under torch.no_grad()"
        )
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise ValueError(
                f"no gradient passes through {name}, which is quantised: explain the model as it was before, or use "
                f"attention and rollout, which need no gradient"
            )


@contextmanager
def only_input_gradients(model: nn.Module) -> Iterator[None]:
    """`evaluating`, with gradients on and parameters frozen; flags and accumulated gradients come back afterwards.

    pytorch-grad-cam calls `model.eval()`, `zero_grad()` and `backward()` and undoes none of it, which would do harm in
    the middle of a training run.
    """
    with torch.inference_mode(False), evaluating(model), torch.enable_grad():
        saved = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        try:
            for parameter, _, _ in saved:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for parameter, requires_grad, grad in saved:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def check_images(x: Any) -> None:
    """Raises ValueError unless `x` is a floating-point tensor [B, C, H, W]."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"images must be [B, C, H, W], a floating-point tensor, got {got}")


def in_precision_of(model: nn.Module, x: Tensor) -> Tensor:
    """The images in the dtype of what they meet first: the patch embedding, where there is one.

    Raises ValueError where that is on another device.
    """
    first: Any = getattr(model, "patch_embed", model)
    met = next((parameter for parameter in first.parameters() if parameter.is_floating_point()), x)
    if met.device != x.device and met.device.type != "meta":  # weights that are brought when they are needed
        raise ValueError(
            f"the images are on {x.device}, but the model is on {met.device}: use images.to({met.device.type!r})"
        )
    return x.to(met.dtype)


def at_least_single(x: Tensor) -> Tensor:
    """In float32, where `x` is in half precision: sums over many tokens need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def whole_number(value: object) -> int | None:
    """A Python or NumPy integer, or an integer tensor without dimensions, as an int; None for all else."""
    booleans = (bool, np.bool_)  # which NumPy before 2.0 takes for an index
    if isinstance(value, booleans) or getattr(value, "ndim", 0) != 0 or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def explained_scores(logits: Any, targets: Targets, images: int) -> Tensor:
    """The logit [B] of each image's class, see `explained_classes`."""
    return logits[range(images), explained_classes(logits, targets, images)]


def unreached(place: object) -> ValueError:
    """The error for a place in the model that no gradient reaches."""
    return ValueError(
        f"no gradient reaches {place}: it runs under torch.no_grad(), or in gradient checkpointing, which keeps "
        f"gradients with use_reentrant=False"
    )


def explained_classes(logits: Any, targets: Targets, images: int) -> list[int]:
    """The class explained for each of the `images`, of which the model made `logits` [B, classes].

    Raises ValueError for other outputs, targets that are no whole numbers, another number of them than images, or a
    class that the model does not have.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != images:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits [B, classes] of {images} images, got {got}")
    if targets is None:
        return logits.argmax(dim=-1).tolist()
    one = whole_number(targets)
    several = targets.tolist() if isinstance(targets, (Tensor, np.ndarray)) else targets
    if one is not None:
        chosen: list[int | None] = [one] * images
    elif isinstance(several, Iterable) and not isinstance(several, (str, bytes, Mapping)):
        chosen = [whole_number(target) for target in several]
    else:
        chosen = [None]
    allowed = f"one class, or one for each of the {images} images"
    if None in chosen:
        raise ValueError(f"targets must be whole numbers, {allowed}, got {shortly(targets)}")
    if len(chosen) != images:
        raise ValueError(f"targets must be {allowed}, got {len(chosen)}")
    classes, known = [target for target in chosen if target is not None], logits.shape[-1]
    if unknown := sorted({target for target in classes if not 0 <= target < known}):
        raise ValueError(f"targets must lie in 0 to {known - 1}, the model's classes, got {unknown}")
    return classes
