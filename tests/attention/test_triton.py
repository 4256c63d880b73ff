"""The Triton backend against the reference; in Triton's interpreter (tests/conftest.py), or on a GPU if there is one.

The interpreter computes in NumPy what each program does, in turn: it shows that the numbers are right. That the kernels
compile, and fit on the chip, is tested without a GPU as well; how fast they are is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from svit_utils.attention import (
    EMPTY_ROWS,
    AttentionRows,
    FixedThreshold,
    LearnableThreshold,
    attention_record,
    attention_rows,
    backend_for,
    thresholded_attention,
)
from svit_utils.attention.backends import triton as backend
from svit_utils.attention.backends.triton import Blocks
from svit_utils.attention.call import Call
from svit_utils.paths import repo_root
from tests.attention.test_tiled import MASKS, TAUS, derivatives, masking, poisoned_memory, threshold
from tests.attention.test_tiled import inputs as cpu_inputs

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dq", "dk", "dv", "dtau")


def inputs(shape, seed, dtype=torch.float32, strided=False):
    return [x.detach().to(DEVICE).requires_grad_() for x in cpu_inputs(shape, seed, dtype, strided)]


def moved(settings: dict[str, Any]) -> dict[str, Any]:
    mask = settings.get("attn_mask")
    if mask is None:
        return settings
    return {"attn_mask": (mask if mask.dtype == torch.bool else mask.float()).to(DEVICE)}


@contextlib.contextmanager
def blocks_of(queries: int, keys: int, single: bool = False):
    """Small tiles, so that small inputs are cut into many."""
    before = backend.forward_blocks, backend.query_blocks, backend.key_blocks
    backend.forward_blocks = lambda *_: Blocks(queries, keys, 4, single=single)
    backend.query_blocks = backend.key_blocks = lambda *_: Blocks(queries, keys, 4)
    try:
        yield
    finally:
        backend.forward_blocks, backend.query_blocks, backend.key_blocks = before


@settings(max_examples=60)
@given(
    shape=st.tuples(
        st.integers(1, 2),
        st.integers(1, 2),
        *(st.integers(1, 40) for _ in range(2)),
        *(st.integers(1, 20) for _ in range(2)),
    ),
    mask=st.sampled_from(MASKS),
    tau=st.sampled_from(TAUS),
    mode=st.sampled_from(EMPTY_ROWS),
    blocks=st.sampled_from([(16, 16, False), (32, 16, False), (16, 32, False), (16, 64, True)]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_agrees_with_the_reference(shape, mask, tau, mode, blocks, strided, seed):
    q, k, v = inputs(shape, seed, strided=strided)
    masked = moved(masking(mask, shape, seed))
    tau = threshold(tau, q, k, v, masked)
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact_tau = tau.detach().double().requires_grad_() if isinstance(tau, torch.Tensor) else tau
    exact = derivatives(*exact_inputs, exact_tau, empty_rows=mode, backend="reference", **masked)
    plain = derivatives(q, k, v, tau, empty_rows=mode, backend="reference", **masked)
    with blocks_of(*blocks):
        got = derivatives(q, k, v, tau, empty_rows=mode, backend="triton", **masked)
    # A row that barely keeps a key divides by a small Z, and rounding is multiplied by 1 / Z, in the reference too; but
    # where its rounding happens to cancel (a single key), its own error says nothing of that.
    record = attention_record(*(x.detach() for x in exact_inputs), tau, empty_rows=mode, **masked)
    z = (record.probs - record.tau).relu().sum(dim=-1)
    worst = 1 / float(z[z > 0].min()) if bool((z > 0).any()) else 0.0
    rounding = 8 * torch.finfo(torch.float32).eps * worst * q.shape[2]  # dk and dv add up N such rows
    for name, a, p, e in zip(NAMES, got, plain, exact, strict=False):
        room = 20 * float((p - e).abs().max()) + (2e-5 + rounding) * max(1.0, float(e.abs().max()))
        assert float((a - e).abs().max()) <= room, name


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("mask", MASKS)
def test_statistics_are_those_of_the_map(mode, mask):
    shape = (2, 2, 21, 37, 8, 6)
    q, k, v = inputs(shape, seed=3)
    masked = moved(masking(mask, shape, 3))
    for tau in (0.0, 0.04, 0.3):
        with blocks_of(16, 16):
            out, rows = attention_rows(q, k, v, tau, empty_rows=mode, backend="triton", **masked)
        wanted = AttentionRows.from_record(attention_record(q, k, v, tau, empty_rows=mode, **masked))
        for field in AttentionRows.__dataclass_fields__:
            a, b = getattr(rows, field), getattr(wanted, field)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, check_dtype=False, msg=field)
        assert out.requires_grad


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("width", [32, 64, 80, 128])
def test_no_less_exact_than_the_reference(mode, width):
    """float32, head sizes in use: the error against float64 is at most twice that of the reference.

    Judged by the 99th percentile: where a row barely keeps a key, gradients are multiplied by 1 / Z, and the largest
    error is one entry's luck in rounding.
    """
    errors: dict[str, list[list[torch.Tensor]]] = {name: [[], []] for name in NAMES}
    for seed in range(3):
        q, k, v = inputs((1, 1, 70, 70, width, width), seed=seed)
        q = (q.detach() / width**0.5 * 2).requires_grad_()
        exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
        t = torch.tensor(0.03, requires_grad=True, device=DEVICE)
        exact = derivatives(*exact_inputs, t.detach().double().requires_grad_(), empty_rows=mode, backend="reference")
        for which, name in enumerate(("triton", "reference")):
            got = derivatives(q, k, v, t, empty_rows=mode, backend=name)
            for quantity, a, e in zip(NAMES, got, exact, strict=True):
                errors[quantity][which].append(((a - e).abs() / e.abs().max().clamp(min=1e-9)).flatten())
    for quantity, (fast, plain) in errors.items():
        high = [float(torch.cat(part).quantile(0.99)) for part in (fast, plain)]
        floor = 5e-6 if quantity == "dtau" else 1e-8  # a single number, whose error can be near 0 by luck
        assert high[0] <= 2 * high[1] + floor, quantity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dense", "cap"])
def test_half_precision_is_cut_in_float32(dtype, mode):
    q, k, v = inputs((1, 2, 40, 40, 16, 16), seed=3, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    with blocks_of(16, 32):
        got = derivatives(q, k, v, 0.02, empty_rows=mode, backend="triton")
        rows = attention_rows(q, k, v, 0.02, empty_rows=mode, backend="triton")[1]
    wanted = derivatives(*wide, 0.02, empty_rows=mode, backend="reference")
    assert all(x.dtype == dtype for x in got)
    for name, a, b in zip(NAMES, got, wanted, strict=False):
        room = 4 * torch.finfo(dtype).eps * float(b.abs().max())  # weights and gradients are rounded before products
        assert float((a.float() - b).abs().max()) <= room, name
    same = AttentionRows.from_record(attention_record(q, k, v, 0.02, empty_rows=mode))
    assert torch.equal(rows.kept, same.kept)


def test_tiles_without_survivors_are_skipped_and_nothing_changes(monkeypatch):
    """Two groups of tokens that do not look at each other: half of the tiles are empty."""
    group = torch.arange(64, device=DEVICE) // 32
    offset = 12.0 * torch.nn.functional.one_hot(group, 4).float()
    q, k, v = (x.detach() for x in inputs((1, 1, 64, 64, 4, 8), seed=0))
    q, k = q / 4 + offset, k / 4 + offset
    tau = torch.tensor(0.02, device=DEVICE)
    blocks = Blocks(16, 16, 4)
    for mode in EMPTY_ROWS:
        call = Call(tau, 0.5, empty_rows=mode)
        out, saved, alive = backend.forward(q, k, v, call, backend.GRADIENTS, blocks)
        assert alive.tolist() == [[[0b0011, 0b0011, 0b1100, 0b1100]]]
        assert backend.groups_visited(alive).tolist() == [[[2, 2, 2, 2]]]  # of 4 each
        monkeypatch.setattr(backend, "SKIP_TILES", False)
        every = backend.forward(q, k, v, call, backend.GRADIENTS, blocks)
        monkeypatch.setattr(backend, "SKIP_TILES", True)
        assert backend.groups_visited(every[2]).tolist() == [[[4, 4, 4, 4]]]
        for a, b in zip((out, saved), every, strict=False):
            assert torch.equal(a, b)


def test_a_row_at_random_lets_nothing_be_skipped():
    q, k, v = (x.detach() for x in inputs((1, 1, 64, 64, 8, 8), seed=0))
    call = Call(torch.tensor(0.02, device=DEVICE), 0.3)
    alive = backend.forward(q, k, v, call, blocks=Blocks(16, 16, 4))[2]
    assert backend.groups_visited(alive).tolist() == [[[4, 4, 4, 4]]]


@pytest.mark.parametrize("masked", [False, True])
def test_more_tiles_than_groups(masked, monkeypatch):
    """13 tiles in groups of 4, the last of them with one tile of 3 keys; tokens look at those in their group only."""
    monkeypatch.setattr(backend, "GROUPS", 4)
    n = 64 * 3 + 3
    cluster = torch.arange(n, device=DEVICE) // 64
    offset = 12.0 * torch.nn.functional.one_hot(cluster, 8).float()
    q, k, v = (x.detach() for x in inputs((1, 1, n, n, 8, 8), seed=0))
    q, k, v = (x.requires_grad_() for x in (q / 4 + offset, k / 4 + offset, v))
    options = {"attn_mask": torch.arange(n, device=DEVICE) % 7 != 0} if masked else {"is_causal": True}
    with blocks_of(64, 16):
        got = derivatives(q, k, v, 0.01, empty_rows="zero", backend="triton", **options)
        alive = backend.forward(q, k, v, Call(torch.tensor(0.01, device=DEVICE), 8**-0.5, **options))[2]
    wanted = derivatives(q, k, v, 0.01, empty_rows="zero", backend="reference", **options)
    for name, a, b in zip(NAMES, got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert alive.tolist() == [[[0b0001, 0b0010, 0b0100, 0b1000]]]


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_number_is_written(mode, mask, monkeypatch):
    """With uninitialised memory filled with NaN nothing changes."""
    shape = (1, 2, 19, 21, 4, 3)
    q, k, v = inputs(shape, seed=5)
    masked = moved(masking(mask, shape, 5))
    with blocks_of(16, 16):
        wanted = derivatives(q, k, v, 0.1, empty_rows=mode, backend="triton", **masked)
        with poisoned_memory(monkeypatch):
            got = derivatives(q, k, v, 0.1, empty_rows=mode, backend="triton", **masked)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (1, 1)])
def test_nothing_to_attend_to_or_with(n, m):
    q, k, v = inputs((2, 1, n, m, 4, 3), seed=0)
    got = derivatives(q, k, v, 0.1, backend="triton")
    wanted = derivatives(q, k, v, 0.1, backend="reference") if m else [torch.zeros_like(x) for x in got]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_nan_spreads_as_in_the_reference(mode, which):
    tensors = inputs((1, 2, 20, 20, 4, 3), seed=6)
    with torch.no_grad():
        tensors[which][0, 1, 2, 0] = float("nan")
    with blocks_of(16, 32):
        got = thresholded_attention(*tensors, 0.01, empty_rows=mode, backend="triton")
    wanted = thresholded_attention(*tensors, 0.01, empty_rows=mode, backend="reference")
    assert torch.equal(got.isnan(), wanted.isnan())
    assert got.isnan().any()
    assert not got.isnan().all()


@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("mask", [None, "boolean"])
def test_opcheck(mode, mask):
    q, k, v = (x.detach() for x in inputs((2, 2, 5, 7, 4, 3), seed=1))
    tau = torch.tensor([[[0.1]], [[0.3]]], device=DEVICE)
    allowed = (torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.3).to(DEVICE) if mask else None
    settings = (tau, allowed, 0.5, False, 0.0, None, mode)
    for need in (0, backend.STATISTICS, backend.GRADIENTS, backend.STATISTICS + backend.GRADIENTS):
        torch.library.opcheck(backend.triton_attention, (q, k, v, *settings, need))
    out, saved, alive = backend.triton_attention(q, k, v, *settings, backend.GRADIENTS)
    arguments = (torch.ones_like(out), out, saved, alive, q, k, v, *settings)
    torch.library.opcheck(backend.triton_attention_backward, arguments)


def test_transforms_of_torch_func_and_second_derivatives():
    q, k, v = (x.detach() for x in inputs((2, 1, 5, 6, 3, 2), seed=4))
    tau = torch.tensor(0.1, device=DEVICE)

    def loss(q, k, v, tau, name):
        return thresholded_attention(q, k, v, tau, backend=name).square().sum()

    def single(q, k, v, name):
        return thresholded_attention(q[None], k[None], v[None], tau, backend=name).square().sum()

    for transform in (
        lambda b: torch.func.grad(loss, (0, 1, 2, 3))(q, k, v, tau, b),
        lambda b: torch.func.vmap(torch.func.grad(lambda *x: single(*x, b), (0, 1, 2)))(q, k, v),
        lambda b: [torch.func.vmap(lambda x: single(x, k[0], v[0], b))(q)],
        lambda b: [torch.func.grad(lambda x: torch.func.vmap(lambda y: single(y, k[0], v[0], b))(x).sum())(q)],
        lambda b: [torch.func.jacrev(torch.func.grad(lambda x: single(x, k[0], v[0], b)))(q[0])],
    ):
        for a, b in zip(transform("triton"), transform("reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compiles_as_one_graph():
    q, k, v = inputs((1, 2, 20, 20, 4, 4), seed=1)
    tau = torch.tensor([0.02, 0.05], requires_grad=True, device=DEVICE)
    compiled = torch.compile(
        lambda q, k, v, tau: thresholded_attention(q, k, v, tau, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    out = compiled(q, k, v, tau)
    wanted = derivatives(q, k, v, tau, backend="triton")
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
    for a, b in zip((out, *torch.autograd.grad(out, (q, k, v, tau), direction)), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_kernels_alone():
    q, k, v = inputs((1, 1, 20, 20, 8, 8), seed=3)
    wanted = thresholded_attention(q, k, v, 0.02, backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(thresholded_attention(q, k, v, 0.02, backend="triton"), wanted)
        mixed = thresholded_attention(q, k.bfloat16(), v.bfloat16(), 0.02, backend="triton")
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), wanted, rtol=0.05, atol=0.05)


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tau", ["number", "fixed", "fixed per head", "learnable", "learnable per head"])
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_waits_for_the_gpu_or_is_copied_there(mask, tau, monkeypatch):
    """Forward and backward are launches of kernels and of operators that stay on the device, as in a CUDA graph.

    Kernels are left out: the interpreter copies.
    """
    from svit_utils.attention.backends import kernels

    for name in ("forward_kernel", "query_kernel", "key_kernel"):
        monkeypatch.setattr(kernels, name, Launches())
    shape = (2, 2, 5, 7, 4, 3)
    q, k, v = inputs(shape, seed=0)
    options = moved(masking(mask, shape, 0))
    taus = {
        "number": 0.1,
        "fixed": FixedThreshold(0.1),
        "fixed per head": FixedThreshold([0.1, 0.2]),
        "learnable": LearnableThreshold(0.1),
        "learnable per head": LearnableThreshold(0.1, per="head").for_heads(2),
    }
    threshold = taus[tau].to(DEVICE) if isinstance(taus[tau], torch.nn.Module) else taus[tau]
    grad = torch.ones(2, 2, 5, 3, device=DEVICE)
    with Operators() as seen:
        thresholded_attention(q, k, v, threshold, backend="triton", **options).backward(grad)
    waiting = {"_local_scalar_dense", "item", "nonzero", "index", "masked_select", "is_nonzero", "unique"}
    copying = {"_to_copy", "copy_", "lift_fresh", "clone"}
    assert "new_empty" in seen.names
    assert not seen.names & (waiting | copying), seen.names


class Launches:
    """In place of a kernel: launched, it does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def test_what_it_cannot_do_is_said(monkeypatch):
    q, k, v = inputs((1, 1, 4, 4, 3, 3), seed=0)
    for change, message in (
        ({"return_weights": True}, "never holds the weights"),
        ({"attn_mask": torch.zeros(4, 4, requires_grad=True, device=DEVICE)}, "no gradient for attn_mask"),
        ({"dropout_p": 0.1}, "backend 'triton' has no dropout: set dropout_p=0, or use backend='auto'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            thresholded_attention(q, k, v, 0.1, backend="triton", **change)
    with pytest.raises(ValueError, match=r"takes float16, bfloat16 and float32, but q is torch.float64"):
        thresholded_attention(q.double(), k.double(), v.double(), 0.1, backend="triton")
    with pytest.raises(ValueError, match=r"heads up to 256 wide, got q 300"):
        thresholded_attention(*(torch.zeros(1, 1, 2, 300, device=DEVICE) for _ in range(3)), 0.1, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = [x.cpu() for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"on cpu: it runs on CUDA devices.*use backend='auto'"):
        thresholded_attention(*on_cpu, 0.1, backend="triton")
    monkeypatch.setattr(backend, "INSTALLED", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        thresholded_attention(q, k, v, 0.1, backend="triton")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.slow
def test_the_kernels_compile_and_fit_on_the_chip(tmp_path):
    """For GPUs from compute capability 8.0 on, by Triton's compiler, which needs none."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.attention.compile_triton", "80", "90"]
    done = subprocess.run(command, env=environment, cwd=repo_root(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {(row["kernel"], row["capability"]) for row in compiled} == {
        (kernel, capability) for kernel in ("forward_kernel", "query_kernel", "key_kernel") for capability in (80, 90)
    }
    for row in compiled:
        assert row["shared"] <= 99 * 1024, row  # what a program gets on the smaller cards of 8.6 and 8.9
        assert row["registers"] * 32 * row["warps"] <= 65536, row
    for row in compiled:  # what the targets are measured with: several programs on a multiprocessor, little spilled
        if row["capability"] == 90 and row["head"] == "64/64" and row["dtype"] == "bfloat16":
            assert 2 * row["registers"] * 32 * row["warps"] <= 65536, row
            assert 2 * row["shared"] <= 227 * 1024, row
            assert row["spilled"] <= 512, row


def test_auto_on_a_gpu(monkeypatch):
    """What "auto" would choose there, asked of stand-ins that say they are on CUDA."""

    class OnCuda:
        def __init__(self, *shape, dtype=torch.bfloat16):
            self.shape, self.dtype, self.device, self.requires_grad = shape, dtype, torch.device("cuda"), False

    monkeypatch.setattr(backend, "unavailable", lambda device: "")
    q = OnCuda(1, 2, 8, 64)
    assert backend_for(q, q, q) == "triton"
    assert backend_for(q, q, q, dropout_p=0.1) == "reference"
    assert backend_for(q, q, q, return_weights=True) == "reference"
    wide = OnCuda(1, 2, 8, 64, dtype=torch.float64)
    assert backend_for(wide, wide, wide) == "reference"
    long = OnCuda(1, 2, 8, 512)
    assert backend_for(long, long, long) == "reference"
    monkeypatch.setattr(backend, "unavailable", lambda device: "triton is not installed")
    assert backend_for(q, q, q) == "reference"
