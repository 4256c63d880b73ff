"""Explorers compute what the operator computes, and their widgets show it."""

from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from svit_utils import sparsified, sparsify, thresholded_softmax
from svit_utils.explain import TokenGrid, attention_maps
from svit_utils.show import attention_explorer_data, attention_picture, threshold_explorer_data, threshold_picture
from svit_utils.show.explorers import AttentionData, ThresholdData, attention_lines, threshold_lines, token_name


@pytest.fixture(scope="module")
def model(sharp_vit):
    return sharp_vit(2)


X = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.01, 0.05, 0.2])
def test_survivors_are_the_operators(model, tau):
    data = threshold_explorer_data(model, X[0])
    p = torch.from_numpy(data.probabilities[1, 2])
    expected = thresholded_softmax(p.log(), tau, empty_rows="zero").numpy()
    for token in range(0, 97, 8):
        row = data.survivors(token, 1, 2, tau)
        np.testing.assert_allclose(row.weights, expected[token], atol=2e-6)
        assert row.count == int((p[token] > tau).sum())
        assert row.kept_mass == pytest.approx(float(p[token][p[token] > tau].sum()), abs=1e-6)
        assert row.empty == (row.count == 0)


def test_supports_are_nested(model):
    data = threshold_explorer_data(model, X[0])
    kept = [data.survivors(5, 0, 0, tau).kept for tau in (0.001, 0.004, 0.01, 0.05)]
    assert all((b <= a).all() for a, b in itertools.pairwise(kept))
    assert kept[0].sum() > kept[-1].sum()


def test_a_sparse_model_is_explored_dense_and_left_sparse(model):
    dense = threshold_explorer_data(model, X[0])
    with sparsified(model, 0.02):
        explored = threshold_explorer_data(model, X[0])
        assert float((attention_maps(model, X)["blocks.0.attn"] == 0).float().mean()) > 0.1
    np.testing.assert_allclose(explored.probabilities, dense.probabilities, atol=1e-6)


def test_attention_explorer_shows_both_models(model):
    other = copy.deepcopy(model)
    sparsify(other, 0.02)
    data = attention_explorer_data(model, X, other)
    same = attention_explorer_data(model, X, threshold=0.02)
    np.testing.assert_allclose(data.sparse, same.sparse, atol=1e-7)
    dense, sparse = data.rows(1, 0, 2, 40)
    maps, cut = attention_maps(model, X), attention_maps(other, X)
    np.testing.assert_array_equal(dense, maps["blocks.0.attn"][1, 2, 40].numpy())
    np.testing.assert_array_equal(sparse, cut["blocks.0.attn"][1, 2, 40].numpy())


def test_pictures_change_with_what_they_show(model):
    data = threshold_explorer_data(model, X[0])
    first = threshold_picture(data, 40, 0, 1, 0.01)
    assert first.mode == "RGB"
    for other in ((41, 0, 1, 0.01), (40, 1, 1, 0.01), (40, 0, 2, 0.01), (40, 0, 1, 0.03)):
        assert threshold_picture(data, *other).tobytes() != first.tobytes()
    both = attention_explorer_data(model, X, threshold=0.02)
    pictures = {
        attention_picture(both, *c).tobytes()
        for c in ((0, 0, 0, 9), (1, 0, 0, 9), (0, 1, 0, 9), (0, 0, 1, 9), (0, 0, 0, 10))
    }
    assert len(pictures) == 5


def on_grid(height: int, width: int, prefix: int) -> ThresholdData:
    """One head, one row for all queries: falling weights, the smallest below what the picture's axis shows."""
    grid = TokenGrid(prefix, height, width)
    row = np.geomspace(1, 1e-9, grid.num_tokens, dtype=np.float32)
    row[-1] = 0 if len(row) > 1 else 1
    # The same row for every query, without a matrix of them in memory.
    probabilities = np.broadcast_to(row / row.sum(), (1, 1, grid.num_tokens, grid.num_tokens))
    return ThresholdData(np.full((16, 16, 3), 90, dtype=np.uint8), probabilities, ["layer"], grid)


@pytest.mark.parametrize("side", range(1, 65))
def test_pictures_of_square_grids(side):
    """224 px in 14 px patches are 16 x 16: rounding put the smallest keys below the axis, which Pillow refuses."""
    data = on_grid(side, side, prefix=(0, 1, 5)[side % 3])
    picture = threshold_picture(data, data.grid.num_tokens - 1, 0, 0, 0.01)
    shown = {colour for _, colour in picture.getcolors(2**20)}
    assert picture.mode == "RGB" and (190, 190, 190) in shown  # the bars of keys that are cut


@pytest.mark.parametrize(
    "size", [(1, 2), (3, 1), (4, 6), (16, 9), (7, 31), (64, 1), (1, 64), (2, 300), (1, 500), (500, 1)]
)
def test_pictures_of_other_grids(size):
    data = on_grid(*size, prefix=1)
    for token in (0, 1, data.grid.num_tokens - 1):
        assert threshold_picture(data, token, 0, 0, 0.01).width > 3 * 240 // max(size)
    maps = data.probabilities[None]
    both = AttentionData([data.rgb], maps, np.where(maps > 0.01, maps, 0), ["layer"], data.grid)
    assert attention_picture(both, token=1).mode == "RGB"


def test_explorers_of_tokens_off_a_grid_and_of_half_precision(model):
    with pytest.raises(ValueError, match="no token grid can be established for"):
        threshold_explorer_data(torch.nn.Sequential(model), X[0])
    data = threshold_explorer_data(copy.deepcopy(model).bfloat16(), X[0])
    assert data.probabilities.dtype == np.float32 and threshold_picture(data, 40).mode == "RGB"


def test_words_name_the_query_and_an_empty_row(model):
    data = threshold_explorer_data(model, X[0])
    assert [token_name(t, data.grid) for t in (0, 1, 13)] == [
        "class token",
        "patch row 0, column 0",
        "patch row 1, column 0",
    ]
    assert threshold_lines(data, 0, 0, 0, 0.0)[1] == "97 of 97 keys survive, with 100.0% of the attention"
    assert threshold_lines(data, 0, 0, 0, 0.9)[1] == "no key of 97 survives: the formula reads 0/0, empty_rows decides"
    both = attention_explorer_data(model, X, threshold=0.02)
    count = int((both.sparse[1, 0, 2, 14] > 0).sum())
    assert attention_lines(both, 1, 0, 2, 14)[1] == f"{count} of 97 keys have a weight in the sparse model"


def test_bad_indices(model):
    data = threshold_explorer_data(model, X[0])
    with pytest.raises(ValueError, match="token must lie in 0 to 96, got 97"):
        data.survivors(97, 0, 0, 0.01)
    with pytest.raises(ValueError, match="head must lie in 0 to 2, got -1"):
        data.survivors(0, 0, -1, 0.01)
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\), got 1.0"):
        data.survivors(0, 0, 0, 1.0)
    with pytest.raises(ValueError, match="one image"):
        threshold_explorer_data(model, X)


def test_the_widget_redraws_on_every_control(model):
    pytest.importorskip("anywidget")
    from svit_utils.show.widgets import AttentionExplorer

    data = attention_explorer_data(model, X, threshold=0.02)
    box, css = AttentionExplorer(data), "svit-attention-explorer"
    *controls, picture, caption = box.children
    assert css in box._dom_classes and f"{css}-image" in picture._dom_classes
    with Image.open(io.BytesIO(picture.value)) as png:
        assert png.tobytes() == attention_picture(data).tobytes()  # the static twin
    for control in controls:
        before, words = picture.value, caption.value
        control.value += 1
        assert picture.value != before and caption.value != words, control.description
        with Image.open(io.BytesIO(picture.value)) as png:
            assert png.format == "PNG"
