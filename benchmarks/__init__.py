"""What the cut costs. ``python -m benchmarks`` measures everything in one run; ``make bench`` is the same.

Each module has one question and a function ``rows(plan)`` that answers it with a row per measurement:

- `attention`: time and memory of one attention call, against fused dense attention (SDPA) and other ways to be sparse;
- `parts`: which operations the time of the fast backend goes into;
- `vit`: a whole Vision Transformer, training step and inference;
- `accuracy`: the error of each backend and dtype against float64;
- `tiles`: how many 64 x 64 tiles of the map have no survivor;
- `tracker`: what watching costs.

`targets` compares what was measured with what was aimed at. Nothing else should run meanwhile.
"""
