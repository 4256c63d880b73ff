"""Compile the Triton kernels for GPUs that need not be there: ``python -m tests.attention.compile_triton 80 86 90``.

Calls of the backend run up to the launch, on CPU tensors, with a stand-in for Triton's driver, so that what is compiled
is what would be launched: alignment, strides and constants included. Prints a JSON line per kernel: the shared memory
that a program takes, and what ptxas says of its registers. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from svit_utils.attention import FixedThreshold, attention_rows, thresholded_attention
from svit_utils.attention.backends import triton as backend

# dtype, width of q and k, of v, queries and keys, mask, empty_rows. The first two are what the targets are measured at.
CASES: tuple[tuple[torch.dtype, int, int, int, str, str], ...] = (
    (torch.bfloat16, 64, 64, 197, "none", "dense"),
    (torch.bfloat16, 64, 64, 577, "none", "dense"),
    (torch.float16, 80, 80, 577, "causal", "top1"),
    (torch.float16, 48, 24, 65, "additive", "cap"),
    (torch.bfloat16, 128, 128, 100, "boolean", "cap"),
    (torch.bfloat16, 256, 256, 577, "boolean", "zero"),
    (torch.float32, 64, 64, 197, "none", "dense"),
    (torch.float32, 256, 256, 577, "additive", "cap"),
)


class Driver:
    """What Triton asks of a card's driver before a launch."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        """Asked for, and not used without a launch."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target


def recorded(found: list[tuple[str, Any, float]]) -> Any:
    """In place of a launch: compile, and put name, kernel and seconds into ``found``."""
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before = time.monotonic()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel, time.monotonic() - before))
        return kernel

    return run


def call(dtype: torch.dtype, d: int, dv: int, n: int, mask: str, mode: str, grad: bool) -> None:
    """One call, and its backward pass, of tensors that lie as a Vision Transformer's projection leaves them."""
    q, k, v = (torch.zeros(2, n, 3, width, dtype=dtype).transpose(1, 2) for width in (d, d, dv))
    q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
    options: dict[str, Any] = {"empty_rows": mode, "backend": "triton"}
    if mask == "causal":
        options["is_causal"] = True
    elif mask != "none":
        options["attn_mask"] = torch.ones(n, n, dtype=torch.bool if mask == "boolean" else dtype)
    if grad:
        out = thresholded_attention(q, k, v, FixedThreshold(0.01), **options)
        assert isinstance(out, torch.Tensor)
        out.backward(torch.zeros_like(out))
    else:
        thresholded_attention(q, k, v, FixedThreshold(0.01), **options)
        attention_rows(q, k, v, FixedThreshold(0.01), **options)


def registers(ptx: str, capability: int) -> dict[str, int]:
    """Registers of a thread, and bytes of them that do not fit and are spilled, as ptxas says."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [str(ptxas), "-v", "--fmad=false", f"--gpu-name={name}", str(source), "-o", f"{source}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.search(r"Used (\d+) registers", said)
    assert spilled and used, said
    return {"registers": int(used[1]), "spilled": int(spilled[1]) + int(spilled[2])}


def main(capabilities: list[int]) -> None:
    """Compile every case for every capability."""
    backend.unavailable = lambda device: ""  # type: ignore[assignment]
    found: list[tuple[str, Any, float]] = []
    JITFunction.run = recorded(found)  # type: ignore[method-assign]
    for capability in capabilities:
        backend.limits_registers = lambda device, hopper=capability == 90: hopper  # type: ignore[misc,assignment]
        triton.runtime.driver.set_active(Driver(capability))  # type: ignore[arg-type]
        for dtype, d, dv, n, mask, mode in CASES:
            for grad in (False, True):
                found.clear()
                call(dtype, d, dv, n, mask, mode, grad)
                for name, kernel, seconds in found:
                    row = {"kernel": name, "capability": capability, "dtype": str(dtype).removeprefix("torch.")}
                    row |= {"head": f"{d}/{dv}", "keys": n, "mask": mask, "mode": mode, "grad": grad}
                    row |= {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
                    row |= {"seconds": round(seconds, 1)}
                    print(json.dumps(row | registers(kernel.asm["ptx"], capability)), flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or [80, 90])
