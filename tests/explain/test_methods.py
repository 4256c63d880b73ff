"""The explanations by name, for a whole batch."""

from __future__ import annotations

import pytest
import torch

from svit_utils.explain import METHODS, explain_batch


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
