"""What `benchmarks.gpu.prove` proves beside numbers: the kernels inside everything that PyTorch does with a function.

Each function here takes a device and returns what it saw as a sentence; it raises AssertionError where something is
wrong, and `DoesNotApply` where the device has no such thing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.plan import Row
from svit_utils.attention import (
    FixedThreshold,
    LearnableThreshold,
    learnable_thresholds,
    sparse_modules,
    sparsify,
    thresholded_attention,
)
from svit_utils.models import create_model

PICTURES = 2


class DoesNotApply(Exception):
    """The device has nothing of the kind; the message says what."""


def run(name: str, device: str) -> Row:
    """One of `NAMES` as a row of ``prove.csv``; ``passed`` is None where it does not apply."""
    torch.manual_seed(0)
    try:
        return {"case": name, "passed": True, "detail": _ALL[name](device)}
    except DoesNotApply as reason:
        return {"case": name, "passed": None, "detail": str(reason)}
    except AssertionError as error:
        return {"case": name, "passed": False, "error": str(error)[:300]}


def inputs(device: str, n: int = 197, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """q, k, v [2, 3, n, 64] (smaller where they are interpreted), with gradients."""
    g = torch.Generator().manual_seed(seed)
    n, d = (n, 64) if device != "cpu" else (min(n, 21), 16)
    x = torch.randn(3, 2, 3, n, d, generator=g)
    x[0] *= 2
    return [y.to(device, dtype).requires_grad_() for y in x]


def attention(q: Tensor, k: Tensor, v: Tensor, tau: Any) -> Tensor:
    """The kernels."""
    out = thresholded_attention(q, k, v, tau, backend="triton")
    assert isinstance(out, Tensor)
    return out


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], tau: Any) -> list[Tensor]:
    """Output and gradients of q, k, v."""
    q, k, v = tensors
    out = function(q, k, v, tau)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def same(a: list[Tensor], b: list[Tensor], what: str) -> None:
    """Bit for bit."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), a, b, strict=True):
        difference = float((x.detach().float() - y.detach().float()).abs().max())
        assert torch.equal(x, y), f"{what}: {name} differs by up to {difference:.2e}"


def on_gpu(device: str) -> None:
    """Raise `DoesNotApply` elsewhere."""
    if not device.startswith("cuda"):
        raise DoesNotApply("only on a GPU")


def compiled(device: str) -> str:
    """``torch.compile``, one graph without breaks, gives the bits of the eager call, a learned tau's gradient too."""
    tau = torch.tensor([0.005, 0.01, 0.02], device=device, requires_grad=True)
    tensors = inputs(device)
    name = "inductor" if device != "cpu" else "aot_eager"  # the CPU's compiler would take longer than the rest
    torch._dynamo.reset()
    function = torch.compile(attention, fullgraph=True, backend=name)
    q, k, v = tensors
    out = [f(q, k, v, tau) for f in (attention, function)]
    found = [torch.autograd.grad(x, [*tensors, tau], torch.ones_like(x)) for x in out]
    same([out[0], *found[0][:3]], [out[1], *found[1][:3]], "compiled against eager")
    torch.testing.assert_close(found[0][3], found[1][3])
    return f"one graph, backend {name}"


def model(device: str) -> nn.Module:
    """The small ViT with its 14 x 14 tokens, or two blocks of it on few tokens where kernels are interpreted."""
    if device == "cpu":
        return create_model("small_vit", img_size=16, depth=2)
    return create_model("small_vit").to(device)


def images(device: str) -> Tensor:
    """Pictures for `model`."""
    side = 16 if device == "cpu" else 56
    return torch.randn(PICTURES, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def sharpened(device: str) -> nn.Module:
    """A model whose attention is spread as in trained ones, so that tau cuts, and does not empty, the rows."""
    made = model(device)
    for name, parameter in made.named_parameters():
        if name.endswith("qkv.weight"):
            with torch.no_grad():
                parameter[: 2 * parameter.shape[0] // 3].mul_(4)
    return made


def autocast(device: str) -> str:
    """A sparse model under autocast: the same gradients on kernels and formula, to some of bfloat16's roundings."""
    found = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        made = sharpened(device)
        sparsify(made, 0.01, backend=backend)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            loss = F.cross_entropy(made(images(device)).float(), torch.arange(PICTURES, device=device))
        loss.backward()
        found[backend] = torch.cat([p.grad.flatten().float() for p in made.parameters() if p.grad is not None])
    a, b = found["triton"], found["reference"]
    difference = float((a - b).norm() / b.norm())
    assert difference < 0.1, f"gradients of the whole model differ by {difference:.3f} of their norm"
    return f"gradients differ by {difference:.4f} of their norm"


def learned(device: str) -> str:
    """tau's gradient in a model, one tau for the model, a layer or a head, on kernels and formula, in float32."""
    worst = 0.0
    for per in ("model", "layer", "head"):
        found = {}
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            made = sharpened(device)
            sparsify(made, LearnableThreshold(0.01, per=per), backend=backend)
            F.cross_entropy(made(images(device)), torch.arange(PICTURES, device=device)).backward()
            found[backend] = torch.cat([t.logit.grad.flatten() for t in learnable_thresholds(made).values()])
        a, b = found["triton"], found["reference"]
        worst = max(worst, float((a - b).norm() / b.norm()))
        assert worst < 1e-2, f"per {per}: the gradient of tau differs by {worst:.4f} of its norm"
    return f"differs by at most {worst:.1e} of its norm"


def cuda_graph(device: str) -> str:
    """Forward and backward captured in a CUDA graph and replayed on other numbers: the bits of the eager call."""
    on_gpu(device)
    tau = FixedThreshold(0.01).to(device)
    static, other = inputs(device), inputs(device, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(attention, static, tau)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(attention, static, tau)
    for share in (1.0, 0.5):  # tau's warm-up is a buffer, so it moves without a new capture
        tau.set_warmup(share)
        with torch.no_grad():
            for x, y in zip(static, other, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        same(captured, gradients(attention, other, tau), f"replayed against eager at {share} tau")
    return "replayed with other inputs and another tau"


def two_streams(device: str) -> str:
    """Two problems on two streams at once, twenty times: the bits of one after the other."""
    on_gpu(device)
    tau = FixedThreshold(0.01).to(device)
    problems = [inputs(device, n=577, seed=seed) for seed in (0, 1)]
    wanted = [gradients(attention, tensors, tau) for tensors in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, tensors in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                got.append(gradients(attention, tensors, tau))
        torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            same(a, b, "on two streams against one")
    return "20 rounds"


def second_device(device: str) -> str:
    """On the second GPU while the first is current."""
    on_gpu(device)
    if torch.cuda.device_count() < 2:
        raise DoesNotApply("there is one GPU")
    with torch.cuda.device(0):
        wanted = gradients(attention, inputs("cuda:0"), FixedThreshold(0.01).to("cuda:0"))
        got = gradients(attention, inputs("cuda:1"), FixedThreshold(0.01).to("cuda:1"))
    same([x.cpu() for x in got], [x.cpu() for x in wanted], "second GPU against first")
    return "the same bits as on the first"


def far_offsets(device: str) -> str:
    """Pictures 2 ** 31 elements apart: offsets that 32 bits do not hold."""
    on_gpu(device)
    apart, near = 2**31 + 64, inputs(device)
    if torch.cuda.mem_get_info()[0] < 3 * 2 * (apart + near[0].numel()) + 2**31:
        raise DoesNotApply("too little free memory")
    tau, far = FixedThreshold(0.01).to(device), []
    for x in near:
        storage = torch.empty(apart + x[0].numel(), dtype=x.dtype, device=device)
        y = storage.as_strided(x.shape, (apart, *x.stride()[1:]))
        far.append(y.copy_(x.detach()).requires_grad_())
    same(gradients(attention, far, tau), gradients(attention, near, tau), "far apart against side by side")
    return f"strides of {apart:,} elements"


def not_a_number(device: str) -> str:
    """A NaN spreads as it does in the formula, and no further."""
    tensors = [x.detach() for x in inputs(device, dtype=torch.float32)]
    for which in range(3):
        given = [x.clone() for x in tensors]
        given[which][0, 1, 2, 0] = float("nan")
        q, k, v = given
        a, b = (thresholded_attention(q, k, v, 0.01, backend=name) for name in ("triton", "reference"))
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        assert torch.equal(a.isnan(), b.isnan()) and bool(a.isnan().any()), f"NaN in input {which}"
    return "in q, k and v"


def copies(device: str) -> str:
    """A sparse model's copy, and one that went to the CPU and back, give the model's bits."""
    made = sharpened(device)
    sparsify(made, 0.01, backend="triton")
    assert len(sparse_modules(made)) == len(made.blocks)  # type: ignore[arg-type]
    twin = copy.deepcopy(made).cpu().to(device)
    with torch.no_grad():
        assert torch.equal(made(images(device)), twin(images(device))), "the copy gives other logits"
    return "deepcopy, to the CPU and back"


_ALL: dict[str, Callable[[str], str]] = {
    function.__name__: function
    for function in (
        compiled,
        autocast,
        learned,
        cuda_graph,
        two_streams,
        second_device,
        far_offsets,
        not_a_number,
        copies,
    )
}
NAMES = tuple(_ALL)
