"""Two ipywidgets over the functions in `explorers`: sliders in, a PNG and a caption out."""

from collections.abc import Callable
from html import escape
from typing import Any

from PIL import Image

from svit_utils.show import explorers
from svit_utils.show.display import image_png

try:
    import ipywidgets as widgets
except ImportError as error:
    raise ImportError("the explorers need the package ipywidgets: pip install ipywidgets") from error

_LOOK = {"layout": {"width": "520px"}, "style": {"description_width": "70px"}}


def _sliders(shape: tuple[int, ...], *names: str) -> dict[str, widgets.IntSlider]:
    """A slider for each name over 0 to the size of that axis, less one."""
    return {n: widgets.IntSlider(min=0, max=size - 1, description=n, **_LOOK) for n, size in zip(names, shape)}


def _explorer(
    css: str, controls: dict[str, Any], data: Any, draw: Callable[..., Image.Image], describe: Callable[..., list[str]]
) -> widgets.VBox:
    """Controls over one picture; the text below it says what the picture shows and is announced to screen readers."""
    picture, caption = widgets.Image(format="png"), widgets.HTML()

    def update(_change: Any = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        picture.value = image_png(draw(data, **values))
        caption.value = f'<span aria-live="polite">{escape("; ".join(describe(data, **values)))}</span>'

    for name, control in controls.items():
        control.add_class(f"{css}-{'sample' if name == 'image' else name}")  # `-image` is the picture
        control.observe(update, names="value")
    picture.add_class(f"{css}-image")
    caption.add_class(f"{css}-caption")
    update()
    box = widgets.VBox([*controls.values(), picture, caption])
    box.add_class(css)
    return box


def ThresholdExplorer(data: explorers.ThresholdData, *, tau: float = 0.01) -> widgets.VBox:
    """Any token's survivors at any tau, which starts at `tau`.

    CSS classes: `svit-threshold-explorer`, with `-image`, `-caption`, `-tau`, `-layer`, `-head`, `-token` on its parts.
    """
    scale = {"base": 10, "min": -4, "max": -0.3, "step": 0.02, "readout_format": ".4f"}
    slider = widgets.FloatLogSlider(value=tau, description="τ", **scale, **_LOOK)
    controls = {"tau": slider, **_sliders(data.probabilities.shape, "layer", "head", "token")}
    return _explorer("svit-threshold-explorer", controls, data, explorers.threshold_picture, explorers.threshold_lines)


def AttentionExplorer(data: explorers.AttentionData) -> widgets.VBox:
    """Dense beside sparse attention.

    CSS classes: `svit-attention-explorer`, with the parts of `ThresholdExplorer`, but `-sample` in place of `-tau`.
    """
    controls = _sliders(data.dense.shape, "image", "layer", "head", "token")
    return _explorer("svit-attention-explorer", controls, data, explorers.attention_picture, explorers.attention_lines)
