"""Pictures say what the numbers say: with a text, on an opaque background, and with the right bars and colours."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from svit_utils import show
from svit_utils.show.pictures import colour_map, normalised

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


def figures() -> dict[str, Figure]:
    torch.manual_seed(0)
    return {
        "grid": show.explanation_grid(
            torch.rand(2, 3, 32, 48), {"rollout": torch.rand(2, 4, 6)}, labels=["a", "b"], masks=MASKS
        ),
        "beside": show.dense_beside_sparse(torch.rand(3, 32, 48), torch.rand(3, 4, 6), torch.rand(3, 4, 6).round()),
        "heatmaps": show.sparsity_heatmaps(tracker_table()),
        "points": show.accuracy_vs_sparsity(POINTS, dense=0.95),
        "card": show.card_comparison(),
        "card_ours": show.card_comparison(OURS),
        "curves": show.training_curves({"dense": CURVE}),
    }


def test_every_figure_has_a_text_labels_and_an_opaque_light_background():
    for name, figure in figures().items():
        assert len(show.alt_of(figure)) > 40, name
        with Image.open(io.BytesIO(show.figure_png(figure, dpi=50))) as png:
            assert png.format == "PNG"
            corner = png.convert("RGBA").getpixel((0, 0))
        assert corner[3] == 255 and min(corner[:3]) > 240, name
        for axes in figure.axes:
            if len(axes.get_xticks()) and not axes.images and name not in ("grid", "beside"):
                assert axes.get_xlabel() or axes.get_ylabel(), name


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
    assert kwargs["metadata"]["image/png"]["alt"] == 'two "dotted" curves'
    assert "two &quot;dotted&quot; curves" in hidden["text/html"]
    with pytest.raises(ValueError, match="needs a text"):
        show.figure_with_alt(Figure())
