"""Block diagrams and the example pictures."""

from __future__ import annotations

import base64
import io
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from svit_utils import show
from svit_utils.show.pictures import EXAMPLES

BOXES = {"tokens": (0.0, 0.0, "grey"), "q k v": (2.5, 0.0, "blue"), "weights\n[N, N]": (5.0, 1.0, "orange")}


def test_a_diagram_shows_every_box_and_arrow() -> None:
    arrows = [("tokens", "q k v"), ("q k v", "weights\n[N, N]", "softmax")]
    figure = show.block_diagram(BOXES, arrows, "Tokens become queries, keys and values.", widths={"tokens": 1.0})
    (axis,) = figure.axes
    assert {text.get_text() for text in axis.texts} - {""} == {*BOXES, "softmax"}
    assert len(axis.patches) == 3 and show.alt_of(figure).startswith("Tokens")
    (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
    assert x0 < -0.5 and x1 > 5.85 and y0 < -0.28 and y1 > 1.4  # nothing is cut off
    first = axis.patches[0].get_bbox()
    assert first.width == pytest.approx(1.0)


def test_an_arrow_to_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="names a box that is not there: 'values'"):
        show.block_diagram(BOXES, [("tokens", "values")], "text")


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example_pictures_come_with_the_package(name: str) -> None:
    picture = show.example_picture(name)
    assert picture.size == (224, 224) and picture.mode == "RGB" and np.asarray(picture).std() > 20


def test_an_unknown_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="no example picture 'dog'; there are: cat, fox"):
        show.example_picture("dog")


def test_a_figure_is_shown_with_two_pixels_for_each_of_the_page() -> None:
    figure = show.block_diagram(BOXES, [], "Three boxes.")
    with patch("IPython.display.display") as display:
        show.figure_with_alt(figure)
    data, metadata = display.call_args_list[0].args[0], display.call_args_list[0].kwargs["metadata"]
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as png:
        assert png.width == pytest.approx(2 * metadata["image/png"]["width"], abs=2)
