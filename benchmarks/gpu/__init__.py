"""On a GPU, for real: ``python -m benchmarks.gpu`` proves the kernels, measures what they cost, and trains with them.

Three parts, each with a time budget that it keeps, each writing CSV as it goes (``results/gpu/``):

- `prove`: every Triton kernel, forward and backward, against the formula in float64 on the CPU;
- `measure`: attention and whole models against dense ones, peak memory, tiles skipped; then the table of targets;
- `train`: DeiT-Tiny on CIFAR-10 and the small ViT on PlantedShapes, from pictures kept on the GPU.

``DEVICE=cpu`` does the same at small size under Triton's interpreter, into ``build/gpu-cpu/``: that it runs, not what
it takes. README.md beside this file says how to run it, and what to take along to a machine without a network.
"""
