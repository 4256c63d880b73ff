"""Figures and pictures shown in a notebook together with a text for readers who do not see them."""

import base64
import io
from html import escape

from matplotlib.figure import Figure
from PIL import Image

from svit_utils.show.style import styled

# Read by screen readers, seen by nobody.
_HIDDEN = "position:absolute;width:1px;height:1px;margin:-1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap"


def with_alt(figure: Figure, alt: str) -> Figure:
    """Attach the text that stands for the figure (ValueError if empty); `figure_with_alt` shows both."""
    if not alt.strip():
        raise ValueError("a figure needs a text that says what it shows")
    figure.svit_alt = alt  # type: ignore[attr-defined]
    return figure


def alt_of(figure: Figure) -> str:
    """The text attached to a figure, or an empty one."""
    return getattr(figure, "svit_alt", "")


def figure_png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as PNG bytes, on its opaque background."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def image_png(image: Image.Image) -> bytes:
    """A PIL image as PNG bytes, packed quickly rather than tightly."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _display(png: bytes, alt: str, width: int | None = None) -> None:
    """Show PNG bytes as one `image/png` output, with ``alt`` (ValueError if empty) where the different readers look.

    `width` is how many CSS pixels it takes on the page at most; without it, as many as the PNG has.

    It stands in the output's metadata, which nbconvert's templates read; in `text/plain`, for terminals and diffs; and
    in a hidden paragraph for screen readers in JupyterLab, which gives an image output no text.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("a picture needs a text that says what it shows")
    metadata = {"alt": alt, "needs_background": "light"} | ({"width": width} if width else {})
    display(
        {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": f"[Figure: {alt}]"},
        raw=True,
        metadata={"image/png": metadata},
    )
    paragraph = f'<p class="svit-alt" style="{_HIDDEN}">Figure: {escape(alt)}</p>'
    display({"text/html": paragraph, "text/plain": ""}, raw=True)


def figure_with_alt(figure: Figure, alt: str | None = None) -> None:
    """Show a figure in a notebook as PNG with its text (`alt`, or the one attached; else ValueError), and close it."""
    import matplotlib.pyplot as plt

    _display(figure_png(figure), alt or alt_of(figure), width=round(100 * figure.get_figwidth()))
    plt.close(figure)


def image_with_alt(image: Image.Image, alt: str) -> None:
    """Show a PIL picture (what a widget would show) in a notebook as PNG with its text (ValueError if empty)."""
    _display(image_png(image), alt)
