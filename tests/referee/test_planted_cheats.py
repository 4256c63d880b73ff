"""The referee catches cheats: a model that reads the background, maps that ignore the model, maps that are blank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.distractors import distractor_mass, distractor_share
from svit_utils import sparsify
from svit_utils.data import PlantedShapes
from svit_utils.explain import class_attention, grad_cam
from svit_utils.models import load_embedded
from svit_utils.referee import (
    centre_maps,
    localisation_scores,
    paired_bootstrap,
    random_maps,
    uniform_maps,
    weight_randomisation,
)
from svit_utils.referee.background import background_accuracy, background_mass
from svit_utils.referee.baselines import edge_maps

IMAGES = 150
SIZE = (56, 56)
BATCH = PlantedShapes("test").batch(40)
AREA = BATCH.masks.flatten(1).double().mean(dim=1)  # [40], what chance scores


class BorderReader(nn.Module):
    """Answers with the class whose backgrounds have the hue of the picture's frame; sees nothing of the object.

    The frame is 2 pixels wide. Its mean colour less its lightness (the mean over channels) is a direction; the score of
    a class is the cosine with that class's mean direction, fitted in closed form to pictures without any object.
    """

    def __init__(self, images: Tensor, families: Tensor) -> None:
        super().__init__()
        frame = torch.zeros(images.shape[-2:])
        frame[:2], frame[-2:], frame[:, :2], frame[:, -2:] = 1, 1, 1, 1
        self.register_buffer("frame", frame / frame.sum())
        hues = self.hue(images)
        means = torch.stack([hues[families == family].mean(dim=0) for family in range(10)])
        self.centroids = nn.Parameter(F.normalize(means, dim=1))  # [10, 3]

    def hue(self, x: Tensor) -> Tensor:
        colour = (x * self.frame).sum(dim=(2, 3))  # [B, 3]
        return F.normalize(colour - colour.mean(dim=1, keepdim=True), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.hue(x) @ self.centroids.T


@pytest.fixture(scope="module")
def cheat():
    backgrounds = PlantedShapes("train", rho=1.0, erase_object=True).batch(300)
    return BorderReader(backgrounds.images, backgrounds.backgrounds).eval()


@pytest.fixture(scope="module")
def honest():
    return load_embedded("planted_dense_seed0")


def pixel_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """|d score of the label / d pixel|, summed over channels: [B, H, W]."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, labels[:, None]).sum(), x)[0].abs().sum(dim=1)


# -------------------------------------------------------------------------------- (a) a model that reads the background


def test_a_model_that_reads_the_background_is_caught_and_one_that_reads_shapes_is_not(cheat, honest):
    found, innocent = (background_accuracy(model, images=IMAGES) for model in (cheat, honest))
    for name in ("aligned", "erased"):  # it never looks at the object: its presence changes nothing
        assert found[name].mean() > 0.95
    assert found["own"].mean() < 0.25 and found["distractors"].mean() < 0.25
    assert found["swapped"].mean() < 0.05, "below chance: it says the class that the background belongs to"
    for name in ("own", "aligned", "swapped", "distractors"):
        assert innocent[name].mean() > 0.85
    assert innocent["erased"].mean() < 0.25
    # The verdict in one number each, on the same objects: what another background costs.
    assert paired_bootstrap(found["aligned"], found["swapped"]).low > 0.9
    assert abs(paired_bootstrap(innocent["aligned"], innocent["swapped"]).mean) < 0.1


def test_its_honest_explanation_lies_on_the_background(cheat, honest):
    uniform = background_mass(uniform_maps(40, SIZE), BATCH.masks)  # 1 - AREA
    of_cheat = background_mass(pixel_gradient(cheat, BATCH.images, BATCH.labels), BATCH.masks)
    assert (of_cheat > uniform).all() and of_cheat.mean() > 0.99
    of_honest = background_mass(pixel_gradient(honest, BATCH.images, BATCH.labels), BATCH.masks)
    assert paired_bootstrap(of_honest, uniform).high < 0


def test_a_map_of_the_distractors_is_caught_though_it_is_crisp():
    cluttered = PlantedShapes("test", distractors=4).batch(40)
    pictures = (cluttered.images, BATCH.images, BATCH.masks)
    share = distractor_share(*pictures)
    seen = ~share.isnan()
    blobs = (cluttered.images - BATCH.images).abs().sum(dim=1)
    assert distractor_mass(blobs, *pictures)[seen].min() > 0.9 > 0.2 > share[seen].max()
    assert distractor_mass(BATCH.masks.float(), *pictures)[seen].max() == 0


# --------------------------------------------------------------------------------- (b) an explanation without the model

FEW, LABELS = BATCH.images[:8], BATCH.labels[:8].tolist()
WITHOUT_MODEL = {
    "centre": lambda model, x: centre_maps(len(x), SIZE),
    "random": lambda model, x: random_maps(len(x), SIZE),
    "edges": lambda model, x: edge_maps(x),
}


@pytest.mark.parametrize("name", WITHOUT_MODEL)
@pytest.mark.parametrize("mode", ["full", "cascading"])
def test_maps_that_ignore_the_model_outlive_its_weights(honest, name, mode):
    check = weight_randomisation(honest, FEW, WITHOUT_MODEL[name], mode=mode)
    torch.testing.assert_close(check.correlation, torch.ones_like(check.correlation))


@pytest.mark.parametrize("mode", ["full", "cascading"])
def test_grad_cam_does_not(honest, mode):
    check = weight_randomisation(honest, FEW, lambda model, x: grad_cam(model, x, LABELS), mode=mode)
    assert (check.correlation.mean(dim=1) < 0.5).all(), "gone with the first part that is shuffled, the head"


def test_localisation_alone_would_not_have_caught_them():
    uniform = localisation_scores(uniform_maps(40, SIZE), BATCH.masks)
    for name, scores in (("centre", tuple(uniform)), ("edges", ("pointing_game", "energy_in_mask"))):
        found = localisation_scores(WITHOUT_MODEL[name](None, BATCH.images), BATCH.masks)
        for score in scores:
            assert paired_bootstrap(found[score], uniform[score]).low > 0, f"{name} beats the uniform map in {score}"


# ------------------------------------------------------------------------------------- (c) maps that only look the part


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_a_blank_map_is_never_above_chance(value):
    scores = localisation_scores(torch.full((40, *SIZE), value), BATCH.masks)
    for name, found in scores.items():
        chance = AREA / (2 - AREA) if name == "iou_at_mask_area" else AREA
        assert (found <= chance + 1e-12).all(), name


def test_a_shuffled_sparse_map_is_as_tidy_and_localises_by_chance():
    sparse = load_embedded("planted_sparse_seed0")
    sparsify(sparse, 0.01)
    maps = class_attention(sparse, BATCH.images).mean(dim=1)  # [40, 14, 14]

    def scores(grid: Tensor) -> dict[str, Tensor]:
        return localisation_scores(grid, BATCH.masks)

    generator = torch.Generator().manual_seed(0)
    shuffles = []
    for _ in range(20):
        order = torch.rand(40, 196, generator=generator).argsort(dim=1)
        shuffled = maps.flatten(1).gather(1, order)
        assert torch.equal(shuffled.sort(dim=1).values, maps.flatten(1).sort(dim=1).values)  # as many zeros, as bright
        shuffles.append(scores(shuffled.view_as(maps)))
    own = scores(maps)
    assert (maps == 0).double().mean() > 0.5
    for name, original in own.items():
        chance = torch.stack([shuffle[name] for shuffle in shuffles]).mean(dim=0)  # [40]
        assert paired_bootstrap(original, chance).low > 0, name
        if name in ("pointing_game", "energy_in_mask"):  # a patch anywhere: on average exactly the object's share
            assert abs(float((chance - AREA).mean())) < 0.03, name
