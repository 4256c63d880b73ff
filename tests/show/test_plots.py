"""Pictures say what the numbers say: with a text, on an opaque background, and with the right bars and colours."""

from __future__ import annotations

import base64
import io

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from svit_utils import show
from svit_utils.referee import Interval
from svit_utils.show.pictures import colour_map, normalised
from svit_utils.show.style import COLOURS

MASKS = torch.zeros(2, 32, 48, dtype=torch.bool)
MASKS[:, 8:20, 10:30] = True


def tracker_table() -> pd.DataFrame:
    rows = [
        {
            "layer": f"blocks.{i}.attn",
            "head": h,
            "queries": q,
            "cut_sparsity": 0.1 * i,
            "applied_sparsity": 0.05 * h,
            "empty_rate": 0.0,
        }
        for i in range(11)
        for h in range(2)
        for q in ("all", "class")
    ]
    return pd.DataFrame(rows)


POINTS = pd.DataFrame(
    {
        "sparsity": [0.8, 0.2],
        "accuracy": [0.7, 0.9],
        "low": [0.6, 0.85],
        "high": [0.75, 0.95],
        "label": ["0.01", "0.0025"],
    }
)
OURS = pd.DataFrame({"epoch": [1, 2], "accuracy": [70.0, 80.0], "series": ["tiny", "tiny"]})
CURVE = pd.DataFrame({"step": [0, 10, 20], "loss": [2.0, 1.0, 0.5], "accuracy": [np.nan, 0.5, np.nan]})


INTERVALS = {"seed 0": Interval(-0.05, -0.08, -0.02, 3), "pooled": Interval(-0.05, -0.12, 0.02, 3)}


def figures() -> dict[str, Figure]:
    torch.manual_seed(0)
    return {
        "grid": show.explanation_grid(
            torch.rand(2, 3, 32, 48), {"rollout": torch.rand(2, 4, 6)}, labels=["a", "b"], masks=MASKS
        ),
        "grid beside": show.explanation_grid(
            torch.rand(2, 3, 32, 48),
            {"rollout": torch.rand(2, 4, 6), "painted": torch.rand(2, 3, 32, 48)},
            masks=MASKS,
            beside=True,
        ),
        "rows": show.attention_rows(
            torch.rand(3, 32, 48),
            {"dense": torch.rand(3, 4, 6), "drawn": torch.rand(3, 4, 6).round(), "sparse": torch.zeros(3, 4, 6)},
            mask=MASKS[0],
        ),
        "beside": show.dense_beside_sparse(torch.rand(3, 32, 48), torch.rand(3, 4, 6), torch.rand(3, 4, 6).round()),
        "heatmaps": show.sparsity_heatmaps(tracker_table()),
        "points": show.accuracy_vs_sparsity(POINTS, dense=0.95),
        "card": show.card_comparison(),
        "card_ours": show.card_comparison(OURS),
        "curves": show.training_curves({"dense": CURVE}),
        "forest": show.forest(INTERVALS, xlabel="sparse minus dense (points)"),
    }


def test_every_figure_has_a_text_labels_and_an_opaque_light_background():
    for name, figure in figures().items():
        assert len(show.alt_of(figure)) > 40, name
        with Image.open(io.BytesIO(show.figure_png(figure, dpi=50))) as png:
            assert png.format == "PNG"
            corner = png.convert("RGBA").getpixel((0, 0))
        assert corner[3] == 255 and min(corner[:3]) > 240, name
        for axes in figure.axes:
            if len(axes.get_xticks()) and not axes.images and name not in ("grid", "grid beside", "rows", "beside"):
                assert axes.get_xlabel() or axes.get_ylabel() or figure.legends[0].get_title().get_text(), name


def test_card_is_said_to_be_the_cards_and_ours_not_tested_until_it_is():
    assert show.CARD_TABLE["SelectiveViT"].tolist() == [81.77, 86.02, 87.89, 89.11]
    assert show.CARD_TABLE["ViT-Base"].tolist() == [80.65, 83.01, 84.62, 85.47]
    texts = [t.get_text() for t in show.card_comparison().axes[0].texts]
    assert texts == ["ours: not tested"]
    assert not show.card_comparison(OURS).axes[0].texts
    legend = [t.get_text() for t in show.card_comparison(OURS).axes[0].get_legend().get_texts()]
    assert legend == ["card: ViT-Base", "card: SelectiveViT", "ours: tiny"]


def test_heatmap_keeps_the_order_of_layers_and_the_chosen_queries():
    axes = show.sparsity_heatmaps(tracker_table(), ["cut_sparsity"], queries="class").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        f"blocks.{i}" for i in range(11)
    ]  # 10 after 9, not after 1
    np.testing.assert_allclose(axes.images[0].get_array()[:, 0], 0.1 * np.arange(11))
    with pytest.raises(ValueError, match="no column 'kept'"):
        show.sparsity_heatmaps(tracker_table(), ["kept"])
    with pytest.raises(ValueError, match="no rows for queries='patch': it has all, class"):
        show.sparsity_heatmaps(tracker_table(), queries="patch")


def test_points_are_in_per_cent_with_their_intervals():
    axes = show.accuracy_vs_sparsity(POINTS).axes[0]
    line = axes.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [20, 80])
    np.testing.assert_allclose(line.get_ydata(), [90, 70])
    (bars,) = axes.collections
    np.testing.assert_allclose(bars.get_paths()[1].vertices[:, 1], [60, 75])


def test_rows_of_attention_share_one_colour_scale():
    dense, sparse = torch.full((2, 4, 6), 0.01), torch.zeros(2, 4, 6)
    sparse[:, 1, 2] = 0.9
    figure = show.attention_rows(torch.rand(3, 32, 48), {"dense": dense, "sparse": sparse}, mask=MASKS[0])
    maps = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (4, 6)]
    assert len(maps) == 4 and len({(m.norm.vmin, m.norm.vmax) for m in maps}) == 1
    assert maps[0].norm.vmax == pytest.approx(0.9)
    assert "dense 0%, sparse 96%" in show.alt_of(figure)
    crosses = [axes.collections[0].get_offsets() for axes in figure.axes[4:6]]  # head 0 of the sparse row
    assert max(map(len, crosses)) == 23
    for rows in ({}, {"dense": dense, "sparse": sparse[0]}, {"dense": dense[0], "sparse": sparse[0]}):
        with pytest.raises(ValueError, match=r"must be \[heads, h, w\] of one shape"):
            show.attention_rows(torch.rand(3, 32, 48), rows)


def test_maps_beside_the_picture_show_nothing_of_it():
    """On a black and on a white picture the map beside it is the same; laid over it, it is not."""
    heat = {"rollout": torch.rand(1, 4, 6)}
    drawn = {
        (beside, shade): show.explanation_grid(torch.full((1, 3, 32, 48), shade), heat, beside=beside).axes[1].images[0]
        for beside in (True, False)
        for shade in (0.0, 1.0)
    }
    arrays = {key: np.asarray(image.get_array()) for key, image in drawn.items()}
    assert np.array_equal(arrays[True, 0.0], arrays[True, 1.0]) and arrays[True, 0.0].shape == (4, 6)
    assert not np.array_equal(arrays[False, 0.0], arrays[False, 1.0])


def test_forest_marks_the_intervals_that_exclude_zero():
    figure = show.forest(INTERVALS, xlabel="difference (points)")
    bars = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
    np.testing.assert_allclose([bar.get_xdata() for bar in bars], [[-8, -2], [-12, 2]])
    assert [bar.get_color() for bar in bars] == [COLOURS["vermilion"], COLOURS["blue"]]
    assert "seed 0 -5.0 [-8.0, -2.0]; pooled -5.0 [-12.0, +2.0]" in show.alt_of(figure)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(INTERVALS)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["excludes 0", "contains 0"]
    with pytest.raises(ValueError, match="at least one interval"):
        show.forest({}, xlabel="difference")


COMPARISONS = pd.DataFrame(
    [
        ("attention", "AP", "sparse", -0.05, -0.08, -0.02, "lower"),
        ("attention", "AP", "warmup", -0.04, -0.07, -0.01, "open"),  # excludes 0, and is open
        ("rollout", "AP", "sparse", 0.01, -0.01, 0.03, "incomplete"),
    ],
    columns=["group", "label", "series", "mean", "low", "high", "result"],
)


def test_comparison_forest_fills_what_is_decided():
    """Not what excludes 0: of forty comparisons, some intervals do by chance, and Holm's correction decides."""
    figure = show.comparison_forest(COMPARISONS, xlabel="difference (hundredths)", margin=-1.0)
    [axis] = figure.axes
    bars = [line for line in axis.lines if line.get_linewidth() == 1.6]
    np.testing.assert_allclose([bar.get_xdata() for bar in bars], [[-8, -2], [-7, -1], [-1, 3]])
    heights = [bar.get_ydata()[0] for bar in bars]
    assert heights[0] < heights[1] < heights[2]  # from top to bottom, none over another
    marks = [line for line in axis.lines if line.get_marker() != "None" and len(line.get_xdata()) == 1]
    assert [mark.get_markerfacecolor() != "white" for mark in marks] == [True, False, False]
    assert [mark.get_marker() for mark in marks] == ["o", "s", "o"]  # series are told apart by more than colour
    assert [text.get_text() for text in axis.texts] == ["attention", "rollout"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["AP", "AP"]
    assert any(line.get_linestyle() == "--" and set(line.get_xdata()) == {-1.0} for line in axis.lines)
    alt = show.alt_of(figure)
    assert "attention: AP, sparse -5.0 [-8.0, -2.0] lower; AP, warmup -4.0 [-7.0, -1.0] open;" in alt
    assert "rollout: AP, sparse +1.0 [-1.0, +3.0] open;" in alt


def test_comparison_forest_asks_for_its_columns():
    with pytest.raises(ValueError, match="no column 'result'"):
        show.comparison_forest(COMPARISONS.drop(columns="result"), xlabel="difference")
    with pytest.raises(ValueError, match="at least one comparison"):
        show.comparison_forest(COMPARISONS[:0], xlabel="difference")


def test_forest_has_room_for_long_labels():
    """Long names on the left leave the axes narrow; the words below are still inside the picture."""
    long = {f"{name}: class attention minus the dense model's, drawn cut": i for name, i in INTERVALS.items()}
    figure = show.forest(long, xlabel="sparse minus the other, IoU at the mask's area (hundredths), wider interval")
    figure.draw_without_rendering()
    bounds = figure.get_window_extent()
    (key,) = figure.legends
    assert key.get_title().get_text().startswith("sparse minus the other")
    for text in (key.get_title(), *figure.axes[0].get_yticklabels(), *key.get_texts()):
        box = text.get_window_extent()
        assert box.x0 >= bounds.x0 and box.x1 <= bounds.x1 and box.y0 >= bounds.y0, text.get_text()


def test_overlay_colours_follow_the_map():
    heat = torch.zeros(2, 2)
    heat[0, 1] = 3.0
    picture = np.asarray(show.overlay(np.zeros((20, 20, 3), np.uint8), heat, alpha=1.0))
    low, high = colour_map(np.array([0.0, 1.0]))
    assert (picture[1, 18] == high).all() and (picture[18, 1] == low).all()
    assert normalised(torch.full((2, 2), 5.0)).max() == 0


def test_to_rgb_takes_both_layouts():
    image = torch.rand(3, 5, 7)
    assert np.array_equal(show.to_rgb(image), show.to_rgb(image.permute(1, 2, 0)))
    assert show.to_rgb(image * 6 - 3).max() == 255
    with pytest.raises(ValueError, match=r"\[3, H, W\] or \[H, W, 3\]"):
        show.to_rgb(torch.rand(5, 7))


def test_display_is_one_png_with_its_text(monkeypatch):
    pytest.importorskip("IPython")
    sent = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: sent.append((data, kwargs)))
    show.figure_with_alt(show.card_comparison(), 'two "dotted" curves')
    (data, kwargs), (hidden, _) = sent
    assert set(data) == {"image/png", "text/plain"}
    about = kwargs["metadata"]["image/png"]
    assert about["alt"] == 'two "dotted" curves'
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as png:
        assert png.width == 2 * about["width"] == 1280  # sharp on screens with two pixels for one
    assert "two &quot;dotted&quot; curves" in hidden["text/html"]
    with pytest.raises(ValueError, match="needs a text"):
        show.figure_with_alt(Figure())
