"""Two ipywidgets, each a thin wrap of the functions in `explorers`: sliders in, PNG bytes out."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets
from PIL import Image

from svit_utils.show.explorers import (
    AttentionData,
    ThresholdData,
    attention_lines,
    attention_picture,
    threshold_lines,
    threshold_picture,
)
from svit_utils.show.style import image_png

__all__ = ["AttentionExplorer", "ThresholdExplorer"]

_LAYOUT = {"width": "520px"}
_STYLE = {"description_width": "70px"}


def _slider(name: str, count: int, css: str) -> widgets.IntSlider:
    slider = widgets.IntSlider(value=0, min=0, max=count - 1, description=name, layout=_LAYOUT, style=_STYLE)
    slider.add_class(css)
    return slider


def _explorer(
    css: str,
    controls: dict[str, Any],
    draw: Callable[..., Image.Image],
    describe: Callable[..., list[str]],
) -> widgets.VBox:
    """Sliders over one picture; the text below it says the same in words and is announced to screen readers."""
    picture = widgets.Image(format="png")
    picture.add_class(f"{css}-image")
    caption = widgets.HTML()
    caption.add_class(f"{css}-caption")

    def update(_change: Any = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        picture.value = image_png(draw(**values))
        caption.value = f'<span aria-live="polite">{escape("; ".join(describe(**values)))}</span>'

    for control in controls.values():
        control.observe(update, names="value")
    update()
    box = widgets.VBox([*controls.values(), picture, caption])
    box.add_class(css)
    return box


def ThresholdExplorer(data: ThresholdData, *, tau: float = 0.01) -> widgets.VBox:
    """Any token's survivors at any tau. CSS classes: `svit-threshold-explorer`, and on its parts `-image`, `-caption`,
    `-tau`, `-layer`, `-head`, `-token`."""
    css = "svit-threshold-explorer"
    layers, heads, tokens, _ = data.probabilities.shape
    slider = widgets.FloatLogSlider(
        value=tau,
        base=10,
        min=-4,
        max=-0.3,
        step=0.02,
        description="τ",
        readout_format=".4f",
        layout=_LAYOUT,
        style=_STYLE,
    )
    slider.add_class(f"{css}-tau")
    controls = {
        "tau": slider,
        "layer": _slider("layer", layers, f"{css}-layer"),
        "head": _slider("head", heads, f"{css}-head"),
        "token": _slider("token", tokens, f"{css}-token"),
    }
    return _explorer(css, controls, lambda **v: threshold_picture(data, **v), lambda **v: threshold_lines(data, **v))


def AttentionExplorer(data: AttentionData) -> widgets.VBox:
    """Dense beside sparse attention. CSS classes: `svit-attention-explorer`, and on its parts `-image`, `-caption`,
    `-sample`, `-layer`, `-head`, `-token`."""
    css = "svit-attention-explorer"
    images, layers, heads, tokens, _ = data.dense.shape
    controls = {
        "image": _slider("image", images, f"{css}-sample"),
        "layer": _slider("layer", layers, f"{css}-layer"),
        "head": _slider("head", heads, f"{css}-head"),
        "token": _slider("token", tokens, f"{css}-token"),
    }
    return _explorer(css, controls, lambda **v: attention_picture(data, **v), lambda **v: attention_lines(data, **v))
