"""Block diagrams: boxes with a word in each, and arrows between them."""

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from svit_utils.show.display import with_alt
from svit_utils.show.style import COLOURS, styled_figure

PALE = {"grey": "#E9E9E9", "blue": "#CFE3F1", "orange": "#FBE7BF", "green": "#CDEBE1", "red": "#F7D9C7"}
HEIGHT = 0.56  # of a box of one line, in the units in which the boxes' places are given


def block_diagram(
    boxes: Mapping[str, tuple[float, float, str]],
    arrows: Iterable[tuple[str, str] | tuple[str, str, str]],
    alt: str,
    *,
    widths: Mapping[str, float] | None = None,
    unit: float = 0.85,
) -> Figure:
    """A diagram whose boxes stand where they are told to.

    Args:
        boxes: text of the box -> (x, y, colour): its middle, y pointing up, and one of `PALE`. A text may have lines.
        arrows: (from, to) or (from, to, text beside the arrow), named by the boxes' texts (else ValueError).
        alt: what the diagram shows, for readers who do not see it.
        widths: the boxes that are not 1.7 wide, each with its width.
        unit: inches for one unit of x or y.
    """
    wide = {text: (widths or {}).get(text, 1.7) for text in boxes}
    tall = {text: HEIGHT + 0.24 * text.count("\n") for text in boxes}
    left = min(x - wide[text] / 2 for text, (x, _, _) in boxes.items()) - 0.1
    right = max(x + wide[text] / 2 for text, (x, _, _) in boxes.items()) + 0.1
    low = min(y - tall[text] / 2 for text, (_, y, _) in boxes.items()) - 0.1
    high = max(y + tall[text] / 2 for text, (_, y, _) in boxes.items()) + 0.1
    with styled_figure(unit * (right - left), unit * (high - low)) as figure:
        axis = figure.subplots()
        axis.set(xlim=(left, right), ylim=(low, high), aspect="equal")
        axis.axis("off")
        patches = {}
        for text, (x, y, colour) in boxes.items():
            corner = (x - wide[text] / 2, y - tall[text] / 2)
            patches[text] = FancyBboxPatch(
                corner, wide[text], tall[text], boxstyle="round,pad=0,rounding_size=0.1", fc=PALE[colour], ec="#444444"
            )
            axis.add_patch(patches[text])
            axis.text(x, y, text, ha="center", va="center", fontsize=10)
        for start, end, *label in arrows:
            for name in (start, end):
                if name not in boxes:
                    raise ValueError(f"the arrow {start!r} to {end!r} names a box that is not there: {name!r}")
            ends = {"patchA": patches[start], "patchB": patches[end], "shrinkA": 0, "shrinkB": 1}
            style = {"arrowstyle": "-|>", "color": "#444444", **ends}
            (x0, y0, _), (x1, y1, _) = boxes[start], boxes[end]
            axis.annotate("", (x1, y1), (x0, y0), arrowprops=style)
            for words in label:
                middle = ((x0 + x1) / 2, (y0 + y1) / 2 + 0.14)
                axis.text(*middle, words, ha="center", va="bottom", fontsize=9, color=COLOURS["vermilion"])
    return with_alt(figure, alt)
