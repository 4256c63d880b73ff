"""Maps of a batch and their files."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from svit_utils.explain import METHODS, explain_batch, export_maps, load_maps


def test_every_method_gives_a_map_per_image(family, images):
    maps = explain_batch(family("vit"), images, methods=list(METHODS), targets=[0, 1])
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "attention": (2, 4, 6),
        "attention_heads": (2, 3, 4, 6),
        "rollout": (2, 4, 6),
        "grad_cam": (2, 4, 6),
        "layer_grad_cam": (2, 4, 6),
    }
    torch.testing.assert_close(maps["attention"], maps["attention_heads"].mean(1))
    with pytest.raises(ValueError, match="unknown method 'lime': allowed are attention"):
        explain_batch(family("vit"), images, methods=["lime"])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_round_trip_and_overlays(tmp_path, suffix, family, images):
    maps = explain_batch(family("vit"), images, methods=["attention_heads", "rollout"])
    written = export_maps(
        tmp_path / f"maps{suffix}", maps, images=torch.rand(2, 3, 32, 48), metadata={"seed": 0, "classes": [1, 2]}
    )
    back, metadata = load_maps(written[0])
    assert metadata == {"seed": 0, "classes": [1, 2]}
    assert back.keys() == maps.keys() and all(torch.equal(back[name], maps[name]) for name in maps)
    assert [p.name for p in written[1:]] == [
        "0000_attention_heads.png",
        "0001_attention_heads.png",
        "0000_rollout.png",
        "0001_rollout.png",
    ]
    with Image.open(written[1]) as picture:
        assert picture.size == (48 * 4, 32 * 4)
    assert not list(tmp_path.glob(".*"))  # no temporary file left


def test_bad_export(tmp_path, images):
    with pytest.raises(ValueError, match=r"written as .safetensors or .npz, got 'maps.pkl'"):
        export_maps(tmp_path / "maps.pkl", {"a": torch.zeros(1, 2, 2)})
    with pytest.raises(ValueError, match="no maps"):
        export_maps(tmp_path / "maps.npz", {})
    with pytest.raises(ValueError, match="a holds 1 maps for 2 images"):
        export_maps(tmp_path / "maps.npz", {"a": torch.zeros(1, 2, 2)}, images=torch.zeros(2, 3, 8, 8))
