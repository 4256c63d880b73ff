"""The explorer as a widget, and a smaller one of sliders over `explorers.attention_picture`."""

from collections.abc import Callable
from html import escape
from typing import Any

from PIL import Image

from svit_utils.show import explorers
from svit_utils.show.display import image_png
from svit_utils.show.explorer import SCRIPT, ExplorerData, explorer_html

try:
    import ipywidgets as widgets
    import traitlets
    from anywidget import AnyWidget
except ImportError as error:
    name = error.name or "anywidget"
    raise ImportError(f"the explorers need the package {name}: pip install {name}") from error

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


def AttentionExplorer(data: explorers.AttentionData) -> widgets.VBox:
    """Dense beside sparse attention.

    CSS classes: `svit-attention-explorer`, and on its parts that with `-image`, `-caption`, `-sample`, `-layer`,
    `-head` or `-token`.
    """
    controls = _sliders(data.dense.shape, "image", "layer", "head", "token")
    return _explorer("svit-attention-explorer", controls, data, explorers.attention_picture, explorers.attention_lines)


class Explorer(AnyWidget):
    """The explorer of `data`: dense attention, the same drawn cut, and that of the model that is cut in every layer.

    The browser computes everything, so it goes on without a kernel. What is stored with the notebook is the static
    page's form of it, `svit_utils.show.explorer.explorer_html`. Where it stands is told by its traits, which can be
    set too: `picture`, `layer`, `head`, `token`, `tau` (moves to the nearest stop of the slider) and `empty_rows`.
    """

    _esm = SCRIPT
    header = traitlets.Dict().tag(sync=True)
    rows = traitlets.Bytes().tag(sync=True)
    picture = traitlets.Int(min=0).tag(sync=True)
    layer = traitlets.Int(min=0).tag(sync=True)
    head = traitlets.Int(min=0).tag(sync=True)
    token = traitlets.Int(min=0).tag(sync=True)
    tau = traitlets.Float(min=0).tag(sync=True)
    empty_rows = traitlets.Enum(("dense", "zero", "top1", "cap")).tag(sync=True)

    def __init__(self, data: ExplorerData, **start: Any) -> None:
        """Show `data`, from where `start` says: see `ExplorerData.packed`, which raises ValueError."""
        header, rows = data.packed(**start)
        super().__init__(header=header, rows=rows, **header["start"])
        self._page = explorer_html(header, rows)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and for readers without a kernel the page."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**data, "text/html": self._page, "text/plain": "[The explorer]"}, metadata
