"""The explanations by name, for a whole batch."""

from __future__ import annotations

import pytest
import torch

from svit_utils.explain import METHODS, explain
from svit_utils.models import load_embedded


def test_every_method_gives_a_map_per_image(family, images):
    maps = {method: explain(family("vit"), images, method, [0, 1]) for method in METHODS}
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "attention": (2, 4, 6),
        "attention_heads": (2, 3, 4, 6),
        "rollout": (2, 4, 6),
        "grad_cam": (2, 4, 6),
        "layer_grad_cam": (2, 4, 6),
        "gradient_attention": (2, 4, 6),
        "gradient_rollout": (2, 4, 6),
        "relevance": (2, 4, 6),
        "occlusion": (2, 4, 6),
        "integrated_gradients": (2, 4, 6),
    }
    torch.testing.assert_close(maps["attention"], maps["attention_heads"].mean(1))
    torch.testing.assert_close(explain(family("vit"), images, targets=[0, 1]), maps["relevance"])
    with pytest.raises(ValueError, match="unknown method 'lime': allowed are attention"):
        explain(family("vit"), images, "lime")


@pytest.mark.parametrize("method", METHODS)
def test_images_on_another_device_than_the_model(method: str) -> None:
    """PyTorch says "Expected all tensors to be on the same device" from somewhere inside."""
    model = load_embedded("planted_dense_start")
    with pytest.raises(ValueError, match=r"the images are on meta, but the model is on cpu: use images.to\('cpu'\)"):
        explain(model, torch.zeros(2, 3, 56, 56, device="meta"), method)
