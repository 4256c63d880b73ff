"""One look for all figures: colours that colour-blind readers can tell apart, readable on a dark page as well."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

CMAP = "cividis"  # perceptually uniform, and made for colour-vision deficiency

# Okabe and Ito's palette (2008), in the order in which its colours differ most.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}

_RC: dict[str, Any] = {
    # Opaque and light, so that dark text stays readable on a dark page.
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), "#FAFAFA"),
    "axes.facecolor": "#FFFFFF",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#111111"),
    "axes.edgecolor": "#444444",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "image.cmap": CMAP,
    "axes.prop_cycle": cycler(color=[c for name, c in COLOURS.items() if name != "yellow"]),
}


def styled() -> AbstractContextManager[None]:
    """matplotlib's settings for the body of the `with`; afterwards they are as they were."""
    return matplotlib.rc_context(_RC)  # type: ignore[arg-type]


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """`styled`, with a new figure of ``width`` by ``height`` inches that lays itself out."""
    with styled():
        yield Figure(figsize=(width, height), layout="constrained")
