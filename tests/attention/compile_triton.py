"""Compile the Triton kernels for GPUs that need not be there: ``python -m tests.attention.compile_triton``.

Prints a JSON line per kernel, with the shared memory that a program takes. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svit_utils.attention import EMPTY_ROWS
from svit_utils.attention.backends import kernels
from svit_utils.attention.backends import triton as backend
from svit_utils.attention.call import Call

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
OF_INPUTS = ("Q", "K", "V", "OUT", "DO", "DQ", "DK", "DV_PTR")
IN_FLOAT32 = ("TAU", "SAVED_ROWS", "U", "GRADIENTS")
# capability, dtype, head size, keys, empty_rows (0 zero to 3 cap), causal, mask (0 none, 1 boolean, 2 additive)
CASES = (
    (80, torch.bfloat16, 64, 197, 1, False, 0),
    (80, torch.float16, 128, 577, 2, True, 0),
    (80, torch.float32, 80, 577, 3, False, 2),
    (90, torch.bfloat16, 256, 577, 0, False, 1),
    (90, torch.float32, 32, 50, 3, False, 0),
)


def compiled(kernel: Any, dtype: torch.dtype, capability: int, blocks: backend.Blocks, values: dict[str, Any]) -> Any:
    """The kernel as the backend would launch it, for a GPU of that capability."""
    signature = {}
    for name in kernel.arg_names:
        if name in OF_INPUTS:
            signature[name] = "*" + TYPES[dtype]
        elif name in IN_FLOAT32:
            signature[name] = "*fp32"
        elif name == "MASK_PTR":
            signature[name] = {0: "*" + TYPES[dtype], 1: "*u8", 2: "*fp32"}[values["MASK"]]
        elif name == "VISITED":
            signature[name] = "*i32"
        elif name in values:
            signature[name] = "constexpr"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": blocks.warps, "num_stages": backend.STAGES}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    """Compile every case."""
    for capability, dtype, d, m, mode, causal, mask in CASES:
        for kernel in (kernels.forward_kernel, kernels.query_kernel, kernels.key_kernel):
            forward = kernel is kernels.forward_kernel
            blocks = backend.forward_blocks(m, d, dtype) if forward else backend.backward_blocks(d, dtype)
            values = backend.constants(
                d, d, blocks, Call(0.01, 1.0, is_causal=causal, empty_rows=EMPTY_ROWS[mode]), mask
            )
            values = {name: value for name, value in values.items() if name.isupper()}  # without Triton's own options
            values |= {"SINGLE": blocks.single, "GRAD": True, "SKIP": True}
            result = compiled(kernel, dtype, capability, blocks, values)
            row = {
                "kernel": kernel.fn.__name__,
                "capability": capability,
                "dtype": TYPES[dtype],
                "head size": d,
                "keys": m,
            }
            print(
                json.dumps({**row, "shared": result.metadata.shared, "bytes of PTX": len(result.asm["ptx"])}),
                flush=True,
            )


if __name__ == "__main__":
    main()
