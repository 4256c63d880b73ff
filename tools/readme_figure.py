"""Draw the README's picture: dense against sparse attention on the same image, from the shipped checkpoints.

    python -m tools.readme_figure

writes notebooks/images/dense_vs_sparse.png (under 150 kB) and prints its alternative text. The picture shows the class
token's attention in the last layer, head by head; chapter 5 says what it does and does not mean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svit_course.notebooks import ROOT
from svit_utils import sparsify
from svit_utils.data import PlantedShapes
from svit_utils.explain import class_attention
from svit_utils.models import load_embedded
from svit_utils.show import dense_beside_sparse, figure_png

TARGET = ROOT / "notebooks" / "images" / "dense_vs_sparse.png"
LIMIT = 150_000  # bytes: the README has to load quickly


def main(argv: list[str] | None = None) -> int:
    """Draw, write and describe the picture; 1 if it is too large."""
    parser = argparse.ArgumentParser(description="Draw dense against sparse attention on one test image.")
    parser.add_argument("--image", type=int, default=28, help="index in the test split (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=-1, help="attention layer (default: %(default)s, the last)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pair of checkpoints (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args(argv)

    data = PlantedShapes("test")
    batch = data.batch([options.image])
    dense = load_embedded(f"planted_dense_seed{options.seed}")
    sparse = load_embedded(f"planted_sparse_seed{options.seed}")
    sparsify(sparse, 0.01)
    maps = [class_attention(model, batch.images, options.layer)[0] for model in (dense, sparse)]  # [heads, h, w] each
    figure = dense_beside_sparse(data.denormalise(batch.images)[0], *maps)

    png = figure_png(figure)
    if len(png) > LIMIT:
        print(f"the picture takes {len(png)} bytes, more than {LIMIT}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(png)
    name = data.classes[int(batch.labels[0])]
    zeros = [f"{float((weights == 0).float().mean()):.0%}" for weights in maps]
    print(
        f"{options.out.name}, {len(png) / 1000:.0f} kB. Alternative text:\n"
        f"The same image of a planted {name}, twice, each time followed by the class token's attention in the three "
        f"heads of the last layer. Upper row, dense model: every patch has some weight ({zeros[0]} zeros). Lower row, "
        f"sparse model: {zeros[1]} of the patches have a weight of exactly zero and are crossed out."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
