"""The explorer's data: what is packed leads back to the rows, and which keys survive stays exact."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from svit_course import notebooks
from svit_utils import sparsified, sparsify
from svit_utils.explain import attention_maps
from svit_utils.show.explorer import SCRIPT, ExplorerData, edges, explorer_data, explorer_html, middles, outline
from svit_utils.show.pictures import example_mask, example_picture

X = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(sharp_vit: Callable[[int], VisionTransformer]) -> VisionTransformer:
    return sharp_vit(3)


@pytest.fixture(scope="module")
def data(model: VisionTransformer) -> ExplorerData:
    masks = torch.zeros(2, 32, 48, dtype=torch.bool)
    masks[:, 8:20, 12:30] = True
    return explorer_data(model, X, masks=masks, threshold=0.02)


def unpacked(data: ExplorerData) -> tuple[dict, np.ndarray, np.ndarray]:
    """The levels as the page reads them, dense and of the layers whose rows differ in the cut model."""
    header, rows = data.packed()
    assert json.loads(json.dumps(header)) == header
    levels = np.frombuffer(zlib.decompress(rows), dtype=np.uint8)
    own = data.dense[:, header["sparse_layers"]]
    return header, levels[: data.dense.size].reshape(data.dense.shape), levels[data.dense.size :].reshape(own.shape)


@pytest.mark.parametrize("tokens", [2, 50, 65, 197, 577, 12_000])
def test_the_thresholds_of_the_chapters_are_stops(tokens: int) -> None:
    bounds = edges(tokens)
    assert len(bounds) <= 256 and (np.diff(bounds) > 0).all()
    for tau in (1e-3, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, max(1 / tokens, 1e-4)):
        assert np.isclose(bounds, tau, rtol=1e-6).any(), tau
    values = middles(bounds)
    assert (values[1:] > bounds[:-1]).all() and (values < bounds).all()


def test_survivors_are_exact_at_every_stop_and_weights_nearly(data: ExplorerData) -> None:
    header, levels, own = unpacked(data)
    assert header["sparse_layers"] == [1, 2] and header["threshold"] == pytest.approx(0.02)
    for packed, rows in ((levels, data.dense), (own, data.sparse[:, 1:])):
        values = np.asarray(header["values"])[packed]
        for edge, told in zip(edges(97)[:-1], header["edges"]):
            np.testing.assert_array_equal(values > told, rows > edge)
        seen = rows > header["edges"][0]
        errors = np.abs(values[seen] / rows[seen] - 1)
        for above, allowed, at_most in zip((1e-3, 1e-4), header["errors"], (0.03, 0.13)):
            found = errors[rows[seen] > above]
            assert allowed / 2 < found.max() <= allowed * 1.001 < at_most
            assert found.size > 0.2 * rows.size


def test_the_second_pass_is_the_cut_models(model: VisionTransformer, data: ExplorerData) -> None:
    with sparsified(model, 0.02):
        maps = attention_maps(model, X)
    for layer, weights in enumerate(maps.values()):
        for token in (0, 40, 96):
            found = data.weights(1, layer, 2, token, 0.02, sparse=True)
            np.testing.assert_allclose(found, weights[1, 2, token].numpy(), atol=2e-6)
    np.testing.assert_array_equal(data.dense, torch.stack(list(attention_maps(model, X).values()), 1).numpy())
    assert not any(module.observers for module in model.modules() if hasattr(module, "observers"))


def test_a_sparse_model_of_its_own_and_some_layers(model: VisionTransformer) -> None:
    import copy

    other = sparsified_copy = copy.deepcopy(model)
    sparsify(sparsified_copy, {0: 0.01, 1: 0.03, 2: 0.03})
    data = explorer_data(model, X, other, layers=[0, -1], names=["one", "two"])
    assert data.layers == ["blocks.0.attn", "blocks.2.attn"] and data.threshold is None
    header, _, own = unpacked(data)
    assert header["sparse_layers"] == [1] and own.shape[1] == 1
    assert [picture["name"] for picture in header["pictures"]] == ["one", "two"]


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (8, 3)])
def test_an_outline_is_the_border_between_pixels(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.5
    mask[0, 0] = True
    padded = np.pad(mask, 1).astype(int)
    border = sum(int(np.abs(np.diff(padded, axis=axis)).sum()) for axis in (0, 1))
    lines = outline(mask)
    assert sum(abs(x2 - x1) + abs(y2 - y1) for x1, y1, x2, y2 in lines) == border
    for x1, y1, x2, y2 in lines:
        assert 0 <= x1 <= x2 <= shape[1] and 0 <= y1 <= y2 <= shape[0] and (x1 == x2) != (y1 == y2)


def test_an_outline_of_one_pixel() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 2] = True
    assert sorted(outline(mask)) == [[2, 1, 2, 2], [2, 1, 3, 1], [2, 2, 3, 2], [3, 1, 3, 2]]


def test_a_page_holds_all_that_it_needs(data: ExplorerData) -> None:
    page = explorer_html(*data.packed())
    assert page.count("<script") == page.count("</script>") == 1
    assert not re.findall(r"https?://|import\(|fetch\(", page)
    assert page == explorer_html(*data.packed())  # nothing random: stored outputs stay as they are
    assert "export default" in page and "new Worker" not in page


def test_chapter_1s_explorer_fits_a_page() -> None:
    """Every row of two pictures, with 197 tokens, four layers and three heads: under 1.5 MB with the script."""
    from svit_utils.models import load_embedded

    pictures = [np.asarray(example_picture(name).resize((56, 56))) / np.float32(255) for name in ("cat", "fox")]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    data = explorer_data(load_embedded("vit56_cifar10_dense"), (images - 0.5) / 0.25, masks=[None, example_mask("fox")])
    page = explorer_html(*data.packed(layer=2, head=2))
    assert 1_000_000 < len(page.encode()) < 1_400_000
    assert [len(picture["outline"]) > 20 for picture in data.packed()[0]["pictures"]] == [False, True]


def test_the_example_with_an_outline() -> None:
    mask, fox = example_mask("fox"), np.asarray(example_picture("fox")).astype(int)
    orange = fox[..., 0] - fox[..., 2] > 100
    assert mask.shape == orange.shape and 0.2 < mask.mean() < 0.4
    assert orange[mask].mean() > 0.5 and orange[~mask].mean() < 0.02
    with pytest.raises(ValueError, match="'fox' has an outline, got 'cat'"):
        example_mask("cat")


def test_bad_input(model: VisionTransformer, data: ExplorerData) -> None:
    with pytest.raises(ValueError, match="token must lie in 0 to 96, got 97"):
        data.packed(token=97)
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\), got 1.0"):
        data.packed(tau=1.0)
    with pytest.raises(ValueError, match="starts at picture, layer, head, token, tau, empty_rows, got image"):
        data.packed(image=1)
    with pytest.raises(ValueError, match="empty_rows"):
        data.packed(empty_rows="none")
    with pytest.raises(ValueError, match="names must be one for each of the 2 images, got 1"):
        explorer_data(model, X, names=["one"])
    with pytest.raises(ValueError, match="masks must be one for each of the 2 images, got 3"):
        explorer_data(model, X, masks=torch.zeros(3, 32, 48, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer"):
        explorer_data(model, X, layers=[9])


def test_the_widget_carries_its_page(data: ExplorerData) -> None:
    pytest.importorskip("anywidget")
    from svit_utils.show.widgets import Explorer

    widget = Explorer(data, layer=1, token=5, tau=0.0101, empty_rows="cap")
    assert (widget.layer, widget.token, widget.tau, widget.empty_rows) == (1, 5, 0.01, "cap")
    shown, _ = widget._repr_mimebundle_()
    assert shown["text/html"] == explorer_html(*data.packed(layer=1, token=5, tau=0.01, empty_rows="cap"))
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert "export default" in widget._esm


def test_chapter_1_stores_the_explorer_as_it_is() -> None:
    """A changed explorer.js asks for `make stored CHAPTER=01`; the view of a widget without its state shows nothing."""
    [chapter] = notebooks.chapters(["01"])
    shown = [
        output.get("data", {}) for cell in notebooks.code_cells(notebooks.read(chapter)) for output in cell.outputs
    ]
    [page] = [data["text/html"] for data in shown if "data-explorer" in data.get("text/html", "")]
    assert SCRIPT.read_text(encoding="utf-8") in page
    assert not any("application/vnd.jupyter.widget-view+json" in data for data in shown)
