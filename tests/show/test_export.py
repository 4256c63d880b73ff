"""Maps written to a file of numbers and to overlay pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from svit_utils.show import export_maps


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(maps, metadata), as another program would read them."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            maps = {name: torch.from_numpy(data[name]) for name in data.files if name != "metadata_json"}
            return maps, json.loads(str(data["metadata_json"]))
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, json.loads(file.metadata()["metadata_json"])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_round_trip_and_overlays(tmp_path, suffix):
    maps = {"attention_heads": torch.rand(2, 3, 4, 6), "rollout": torch.rand(2, 4, 6)}
    written = export_maps(
        tmp_path / f"maps{suffix}", maps, images=torch.rand(2, 3, 32, 48), metadata={"seed": 0, "classes": [1, 2]}
    )
    back, metadata = read(written[0])
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


def test_bad_export(tmp_path):
    with pytest.raises(ValueError, match=r"written as .safetensors or .npz, got 'maps.pkl'"):
        export_maps(tmp_path / "maps.pkl", {"a": torch.zeros(1, 2, 2)})
    with pytest.raises(ValueError, match="no maps"):
        export_maps(tmp_path / "maps.npz", {})
    with pytest.raises(ValueError, match="a holds 1 maps for 2 images"):
        export_maps(tmp_path / "maps.npz", {"a": torch.zeros(1, 2, 2)}, images=torch.zeros(2, 3, 8, 8))
