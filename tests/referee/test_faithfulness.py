"""Faithfulness scores on models whose answer to every disturbance can be written down, and against other libraries."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from svit_utils.data.planted_shapes import PlantedShapes
from svit_utils.models import load_embedded
from svit_utils.referee import (
    curve_area,
    deletion_curve,
    faithfulness_scores,
    infidelity,
    insertion_curve,
    max_sensitivity,
    random_maps,
    road,
    sparseness,
)
from svit_utils.referee.curves import blurred
from svit_utils.referee.infidelity import random_squares

GRID, IMAGE = (2, 3), (4, 6)  # cells of 2 x 2 pixels
WEIGHTS = torch.tensor([[2.0, -1.5, 0.25], [1.0, 0.5, -0.75]], dtype=torch.float64)


class Counting(nn.Module):
    """Two classes: logit 0, and the sum over cells of the cell's weight times the mean of its pixels and channels."""

    def __init__(self, weights: Tensor = WEIGHTS) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.adaptive_avg_pool2d(x.double().mean(1), tuple(self.weights.shape))  # [B, h, w]
        logit = (cells * self.weights).sum((1, 2))
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


def ones(batch=1, size=IMAGE):
    return torch.ones(batch, 3, *size)


def pictures(batch, size, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def all_orders():
    """Every order of the six cells: maps [720, 2, 3] whose highest cell goes first, and the cells in that order."""
    orders = torch.tensor(list(itertools.permutations(range(6))))  # [720, 6]
    return (5 - orders.argsort(dim=1)).view(-1, *GRID), orders


def curve_by_hand(orders, insertion=False):
    """sigmoid of the weights that are in the picture after 0, 1, ..., 6 cells: [n, 7]."""
    taken = nn.functional.pad(WEIGHTS.flatten()[orders].cumsum(dim=1), (1, 0))  # [n, 7]
    return torch.sigmoid(taken if insertion else WEIGHTS.sum() - taken)


# --------------------------------------------------------------------------------------------- deletion and insertion


@pytest.mark.parametrize("insertion", [False, True])
def test_curves_of_every_order_are_those_computed_by_hand(insertion):
    maps, orders = all_orders()
    curve = partial(insertion_curve, start="fill") if insertion else deletion_curve
    curves = curve(Counting(), ones(720), maps, 1, steps=6)
    torch.testing.assert_close(curves, curve_by_hand(orders, insertion), rtol=0, atol=1e-7)


def test_the_models_own_weights_are_the_best_order_and_the_reverse_the_worst():
    maps, _ = all_orders()
    model = Counting()

    def areas(of):
        deletion = curve_area(deletion_curve(model, ones(len(of)), of, 1, steps=6))
        return deletion, curve_area(insertion_curve(model, ones(len(of)), of, 1, steps=6, start="fill"))

    deletion, insertion = areas(maps)
    (best_deletion, worst_deletion), (best_insertion, worst_insertion) = areas(torch.stack([WEIGHTS, -WEIGHTS]))
    assert best_deletion == deletion.min() and worst_deletion == deletion.max()
    assert best_insertion == insertion.max() and worst_insertion == insertion.min()
    assert best_deletion < worst_deletion - 0.3 and best_insertion > worst_insertion + 0.3
    # Deleting in one order is inserting in the other, read backwards.
    assert best_insertion.item() == pytest.approx(worst_deletion.item())


@pytest.mark.parametrize("blank", [False, True])
def test_maps_that_know_nothing_get_the_mean_over_all_orders(blank):
    """Blank maps by their broken ties, random maps by what they are: within four standard errors of the exact mean."""
    exact = curve_area(curve_by_hand(all_orders()[1]))  # [720]
    count = 2000
    maps = torch.zeros(count, *GRID) if blank else random_maps(count, GRID, seed=5)
    areas = curve_area(deletion_curve(Counting(), ones(count), maps, 1, steps=6))
    margin = 4 * (exact.var(correction=0) / count).sqrt()
    assert abs(areas.mean() - exact.mean()) < margin < 0.02
    gradient = curve_area(deletion_curve(Counting(), ones(), WEIGHTS[None], 1, steps=6))
    assert gradient < exact.mean() - 5 * margin


def test_ties_are_broken_by_the_seed_and_only_there():
    maps = torch.tensor([[[5.0, 0.0, 0.0], [0.0, 0.0, 4.0]]]).expand(400, -1, -1)
    curves = deletion_curve(Counting(), ones(400), maps, 1, steps=6, seed=1)
    known = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64).sigmoid()  # whole, without 2, without 2 and -0.75
    torch.testing.assert_close(curves[:, :3], known.expand(400, -1))
    # 0.25 less one of the four cells that are left (-1.5, 0.25, 1, 0.5), each about as often as any other.
    values, counts = curves[:, 3].round(decimals=9).unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([-0.75, -0.25, 0.0, 1.75], dtype=torch.float64).sigmoid())
    assert (counts - 100).abs().max() < 4 * (400 * 0.25 * 0.75) ** 0.5
    again, other = (deletion_curve(Counting(), ones(400), maps, 1, steps=6, seed=seed) for seed in (1, 2))
    assert torch.equal(curves, again) and not torch.equal(curves, other)


def test_shares_fill_and_the_shape_of_a_cell():
    """Steps that do not divide the cells, a fill other than grey, cells that are not square, maps by pixel."""
    size = (2, 12)
    maps = torch.arange(6, 0, -1).view(1, 1, 6)  # cells of 2 x 2 pixels, from left to right
    model = Counting(torch.ones(1, 12, dtype=torch.float64))
    curve = deletion_curve(model, ones(size=size), maps, 1, steps=4, fill=0.5)
    taken = torch.tensor([0, 2, 3, 4, 6], dtype=torch.float64)  # 1.5 and 4.5 cells, rounded to even
    torch.testing.assert_close(curve[0], (12 - taken).sigmoid())  # two columns of weight 1 halved per cell
    by_pixel = torch.arange(24, 0, -1).view(1, 2, 12)  # first the whole upper row
    curve = deletion_curve(model, ones(size=size), by_pixel, 1, steps=4)
    torch.testing.assert_close(curve[0], torch.tensor([12.0, 9.0, 6.0, 3.0, 0.0], dtype=torch.float64).sigmoid())


def test_insertion_starts_from_a_picture_that_is_blurred():
    x = pictures(3, (16, 24))
    model = Counting(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).double())
    curve = insertion_curve(model, x, random_maps(3, (4, 6)), 1)
    start = blurred(x)
    torch.testing.assert_close(curve[:, 0], model(start).softmax(1)[:, 1].detach())
    torch.testing.assert_close(curve[:, -1], model(x).softmax(1)[:, 1].detach())
    assert start.std() < 0.25 * x.std() and abs(start.mean() - x.mean()) < 0.05
    flat = torch.full_like(x, 0.3)
    torch.testing.assert_close(blurred(flat), flat)


def test_area_under_a_straight_line_and_a_step():
    line = torch.linspace(1, 0, 15)[None]
    step = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]])
    assert curve_area(line).item() == pytest.approx(0.5)
    assert curve_area(step).item() == pytest.approx(1.5 / 4)
    assert curve_area(line).dtype == torch.float64
    with pytest.raises(ValueError, match=r"curves must be \[B, steps \+ 1\]"):
        curve_area(torch.ones(5))


def test_deletion_agrees_with_pixel_flipping_in_quantus():
    quantus = pytest.importorskip("quantus")
    x, classes = pictures(4, (6, 6)), torch.tensor([1, 0, 1, 1])
    weights = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).double()
    model = Counting(5 * weights).eval()
    maps = random_maps(4, (6, 6), seed=3)
    curve = deletion_curve(model, x, maps, classes, steps=12)
    metric = quantus.PixelFlipping(
        features_in_step=9,  # three pixels of three channels: 36 pixels in twelve steps
        normalise=False,
        perturb_baseline=0.0,
        disable_warnings=True,
    )
    # Channels of a pixel are tied in its map, and leave together.
    theirs = metric(
        model=model, x_batch=x.numpy(), y_batch=classes.numpy(), a_batch=maps[:, None].numpy(), softmax=True
    )
    # Theirs begins after the first step.
    torch.testing.assert_close(curve[:, 1:], torch.tensor(np.array(theirs)).double(), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------- ROAD


def vit(image=(24, 32), patch=4):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=image, patch_size=patch, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("by_pixel", [False, True])
def test_road_agrees_with_the_librarys_own_on_maps_without_ties(by_pixel):
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    model, x, classes = vit(), pictures(5, (24, 32)), [0, 4, 2, 2, 1]
    maps = random_maps(5, (24, 32) if by_pixel else (6, 8), seed=1)
    ours = road(model, x, maps, classes, percentiles=(20, 50, 80), seed=9, batch_size=3)
    cams = maps.numpy() if by_pixel else maps.numpy().repeat(4, axis=1).repeat(4, axis=2)
    torch.manual_seed(9)  # the noise of the imputation
    theirs = ROADCombined(percentiles=[20, 50, 80])(x, cams, [ClassifierOutputSoftmaxTarget(c) for c in classes], model)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-6)
    assert ours.abs().max() > 1e-3


def test_road_knows_the_cells_that_matter_and_gives_a_blank_map_nothing():
    """One bright cell of 36 decides: it leaves first, or stays to the last."""
    count = 64
    where = torch.arange(36).repeat(2)[:count]
    lit = nn.functional.one_hot(where, 36).view(count, 6, 6).double()
    x = 4 * lit.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1).float()
    model = Counting(torch.ones(6, 6).double())
    clean = torch.tensor(4.0).sigmoid()
    exact, reverse, blank = (road(model, x, maps, 1) for maps in (lit, -lit, torch.zeros_like(lit)))
    # With the bright cell kept p_c = sigmoid(4) or more (its light is spread over its neighbours), without it 1/2.
    assert (exact >= (clean - 0.5) / 2 - 1e-3).all()
    torch.testing.assert_close(exact, -reverse, rtol=0, atol=0.15)
    # Per image, any tie-breaking lies between the two; the mean is 0 within four standard errors.
    assert abs(blank.mean()) < 4 * blank.std() / count**0.5 < 0.1
    assert exact.mean() > blank.mean() + 0.2


@pytest.mark.parametrize("kind", ["zeros", "spike", "nine tenths zero"])
def test_road_removes_the_stated_share_of_a_tied_map(kind, monkeypatch):
    from pytorch_grad_cam.metrics import road as library

    maps = torch.zeros(3, 6, 8)
    if kind == "spike":
        maps[:, 2, 3] = 1.0
    elif kind == "nine tenths zero":
        maps[:, 0, :5] = torch.rand(5, generator=torch.Generator().manual_seed(0))
    kept = []

    class Watched(library.NoisyLinearImputer):
        def __call__(self, image, mask):
            kept.append(float(mask.mean()))
            return super().__call__(image, mask)

    monkeypatch.setattr(library, "NoisyLinearImputer", Watched)
    scores = road(vit(), pictures(3, (24, 32)), maps, 0, percentiles=(25, 75))
    assert torch.isfinite(scores).all()
    # Three images, twice for each order: to within one cell of 48.
    assert kept == pytest.approx([0.25] * 3 + [0.75] * 3 + [0.25] * 3 + [0.75] * 3, abs=1 / 48 + 1e-6)


# --------------------------------------------------------------------------------------------- infidelity


def contributions(x):
    """What each cell of the counting model adds to the logit: weight times mean, [B, 2, 3]."""
    return WEIGHTS * nn.functional.adaptive_avg_pool2d(x.double().mean(1), GRID)


def test_exact_maps_of_a_linear_model_have_no_infidelity_and_wrong_ones_have():
    model, x = Counting(), pictures(6, IMAGE)
    gradient = WEIGHTS.expand(6, -1, -1)
    changes = infidelity(model, x, torch.zeros(6, *GRID), 1)  # the mean squared change: no map does worse
    for maps, by_inputs in ((contributions(x), True), (gradient, False)):
        exact, scaled, negative, wrong = (
            infidelity(model, x, m, 1, multiply_by_inputs=by_inputs)
            for m in (maps, 1e-12 * maps, -3 * maps, maps.flip(2))
        )
        assert (exact < 1e-12 * changes).all()
        assert (scaled < 1e-12 * changes).all() and (negative < 1e-12 * changes).all()
        assert (wrong > 1e-3 * changes).all() and (wrong <= changes * (1 + 1e-9)).all()


def test_infidelity_by_hand_on_every_removal_that_can_be_drawn():
    """A grid of 2 x 3 allows only squares of one cell: removing cell j of a white picture costs exactly its weight."""
    draws = 6000
    maps = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]], dtype=torch.float64)
    # The best beta is the mean weight where the map is 1: (2 + 0.5 - 0.75) / 3; elsewhere the whole change remains.
    residual = WEIGHTS - maps[0] * (2 + 0.5 - 0.75) / 3
    expected = (residual**2).mean()
    got = infidelity(Counting(), ones(), maps, 1, perturbations=draws)
    assert abs(got.item() - expected) < 4 * (residual**2).std() / draws**0.5


def test_infidelity_is_captums_with_the_same_perturbations():
    from captum.metrics import infidelity as captum_infidelity

    model, x, classes, perturbations = vit(), pictures(4, (24, 32)), torch.tensor([0, 3, 3, 1]), 12
    maps = random_maps(4, (6, 8), seed=2)
    generator = torch.Generator().manual_seed(7)
    draws = torch.rand(4, perturbations, 3, generator=generator, dtype=torch.float64)
    squares = random_squares(draws.flatten(0, 1), (6, 8)).float()
    squares = nn.functional.interpolate(squares[:, None], scale_factor=4, mode="nearest").expand(-1, 3, -1, -1)
    attribution = nn.functional.interpolate(maps[:, None], scale_factor=4, mode="nearest").expand(-1, 3, -1, -1)

    for by_inputs in (True, False):

        def perturb(images, by_inputs=by_inputs):
            perturbed = images * (1 - squares)
            return (squares if by_inputs else images - perturbed), perturbed

        theirs = captum_infidelity(
            model, perturb, x, attribution, target=classes, n_perturb_samples=perturbations, normalize=True
        )
        ours = infidelity(
            model, x, maps, classes, perturbations=perturbations, multiply_by_inputs=by_inputs, seed=7, batch_size=30
        )
        torch.testing.assert_close(ours, theirs.double().detach(), rtol=1e-3, atol=1e-6)


def test_squares_have_every_side_and_reach_every_cell():
    draws = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = random_squares(draws, (6, 8))
    area, rows, columns = squares.sum((1, 2)), squares.any(2).sum(1), squares.any(1).sum(1)
    assert torch.equal(rows, columns) and torch.equal(area, rows * columns)  # solid squares, inside the grid
    assert rows.unique().tolist() == [1, 2, 3]
    for side in (1, 2, 3):
        assert abs((rows == side).double().mean() - 1 / 3) < 4 * (2 / 9 / 4000) ** 0.5
    assert (squares.sum(0) > 0).all()


# --------------------------------------------------------------------------------------------- max-sensitivity


def test_a_constant_explanation_has_no_sensitivity():
    x = pictures(5, IMAGE)
    maps = torch.ones(5, *GRID)
    assert torch.equal(max_sensitivity(Counting(), x, lambda m, x, t: maps[:1].expand(len(x), -1, -1)), torch.zeros(5))


def test_classes_go_with_the_noisy_copies_even_where_the_prediction_flips():
    """The map is a constant of the class alone: it changes if, and only if, a copy is explained for another class."""
    x = pictures(7, IMAGE)
    x = x - contributions(x).sum((1, 2))[:, None, None, None].float() / float(WEIGHTS.sum()) * torch.ones_like(x)
    table = random_maps(2, GRID, seed=1)
    asked, flips = [], []

    def explain(model, images, classes):
        asked.append(classes)
        if len(images) > 7:
            flips.append(bool((model(images).argmax(1) != classes).any()))
        return table[classes]

    predicted = Counting()(x).argmax(1)
    for targets, wanted in ((None, predicted), ([0, 1, 1, 0, 1, 0, 0], None), (1, torch.ones(7, dtype=torch.long))):
        wanted = torch.tensor(targets) if wanted is None else wanted
        got = max_sensitivity(Counting(), x, explain, targets, radius=0.5, batch_size=1000)
        assert torch.equal(got, torch.zeros(7, dtype=torch.float64))
        clean, noisy = asked[-2:]
        assert torch.equal(clean, wanted) and torch.equal(noisy, wanted.repeat_interleave(10))
    assert len(flips) == 3 and all(flips)


def test_an_image_on_its_own_goes_with_its_class():
    """A batch of one image: Captum would hand its class over once for all of the noisy copies."""

    def explain(model, images, classes):
        assert len(classes) == len(images)
        return images[:, 0] * (1 + classes[:, None, None])

    x = pictures(3, IMAGE)
    together, alone = (max_sensitivity(Counting(), x, explain, [0, 1, 1], batch_size=size) for size in (1000, 10))
    torch.testing.assert_close(together, alone)


def test_sensitivity_of_a_linear_explanation():
    """map = a channel of the image: ||noise|| / ||map||, the noise uniform, so radius * sqrt(n / 3) for large n."""
    x = pictures(4, (32, 32))
    explain = lambda model, images, classes: images[:, 0]  # noqa: E731
    model = Counting(torch.ones(32, 32).double())
    small, large = (max_sensitivity(model, x, explain, 1, radius=r, samples=5) for r in (0.01, 0.02))
    torch.testing.assert_close(large, 2 * small, rtol=1e-4, atol=0)
    expected = 0.02 * (1024 / 3) ** 0.5 / x[:, 0].double().flatten(1).norm(dim=1)
    # Squares of the noise have relative deviation sqrt(4/5), their root over 1024 values half of that / 32: 1.4 %.
    assert ((large / expected - 1).abs() < 0.06).all()
    again, other = (max_sensitivity(model, x, explain, 1, samples=5, seed=s, batch_size=7) for s in (0, 1))
    assert torch.equal(large, again) and not torch.equal(large, other)


def test_sensitivity_lets_the_explanation_differentiate():
    def gradient(model, images, classes):
        images = images.requires_grad_(True)
        score = model(images).gather(1, classes[:, None]).sum()
        return torch.autograd.grad(score, images)[0].sum(1)

    assert torch.equal(max_sensitivity(Counting(), pictures(3, IMAGE), gradient, 1), torch.zeros(3))  # linear model
    curved = max_sensitivity(vit(), pictures(3, (24, 32)), gradient)
    assert (curved > 0).all() and (curved < 1).all()


# --------------------------------------------------------------------------------------------- sparseness


def test_gini_index_by_hand():
    maps = torch.tensor([[[1.0, 1, 1, 1]], [[0, 0, 0, 7]], [[0, 0, 0, 0]], [[0, 0, 1, 1]], [[-1, 2, -3, 4]]])
    expected = torch.tensor([0, 3 / 4, 0, 1 / 2, (-3 * 1 - 1 * 2 + 1 * 3 + 3 * 4) / (4 * 10)], dtype=torch.float64)
    torch.testing.assert_close(sparseness(maps), expected)
    # Uniform noise: 1/3 (the mean absolute difference, 1/3, over twice the mean, 1).
    assert abs(sparseness(random_maps(1, (300, 300))).item() - 1 / 3) < 0.005
    patches = maps.repeat_interleave(3, 1).repeat_interleave(5, 2)
    torch.testing.assert_close(sparseness(patches), expected)


def test_sparseness_agrees_with_quantus():
    quantus = pytest.importorskip("quantus")
    maps = torch.randn(6, 7, 8, generator=torch.Generator().manual_seed(0))
    maps[1] = maps[1].clamp_min(0)
    maps[2] = maps[2] ** 3
    metric = quantus.Sparseness(abs=True, normalise=False, disable_warnings=True)
    theirs = metric(
        model=nn.Identity(),
        x_batch=np.zeros((6, 3, 7, 8), dtype=np.float32),
        y_batch=np.zeros(6, dtype=int),
        a_batch=maps.double().numpy()[:, None],
    )
    torch.testing.assert_close(sparseness(maps), torch.tensor(np.array(theirs)), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------- what holds for all

SCORES = {
    "deletion": lambda *args, **kw: curve_area(deletion_curve(*args, **kw)),
    "insertion": lambda *args, **kw: curve_area(insertion_curve(*args, **kw)),
    "road": road,
    "infidelity": infidelity,
}


def gradient_maps(model, x, classes):
    """A map that makes its own graph, and leaves gradients on the parameters if it is let."""
    images = x.detach().clone().requires_grad_(True)
    model(images).gather(1, classes[:, None]).sum().backward()
    return images.grad.abs().sum(1)


def test_invariances():
    model, x = vit(), pictures(3, (24, 32))
    maps = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(4)).double()
    for name, score in SCORES.items():
        torch.testing.assert_close(score(model, x, 1e-3 * maps), score(model, x, maps), rtol=1e-9, atol=1e-12)
        if name == "infidelity":  # a forecast: the order of the cells is not enough
            assert not torch.allclose(score(model, x, maps.exp()), score(model, x, maps), rtol=1e-3)
        else:
            assert torch.equal(score(model, x, maps.exp() - 5), score(model, x, maps))
            assert not torch.equal(score(model, x, -maps), score(model, x, maps))
    torch.testing.assert_close(sparseness(-1e9 * maps), sparseness(maps))


def test_results_do_not_depend_on_the_batch_size():
    model, x, maps = vit(), pictures(5, (24, 32)), torch.zeros(5, 6, 8)
    maps[:, :2] = random_maps(5, (2, 8))
    whole, parts = (faithfulness_scores(model, x, maps, batch_size=size) for size in (1000, 7))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)
    explain = lambda m, images, t: images.mean(1)  # noqa: E731
    torch.testing.assert_close(
        max_sensitivity(model, x, explain, batch_size=1000), max_sensitivity(model, x, explain, batch_size=7)
    )


def test_everything_at_once_is_each_on_its_own():
    model, x, maps = vit(), pictures(3, (24, 32)), random_maps(3, (6, 8))
    scores = faithfulness_scores(model, x, maps, seed=3)
    assert list(scores) == ["deletion", "insertion", "road", "infidelity", "sparseness"]
    predicted = model(x).argmax(1)
    for name, score in SCORES.items():
        assert scores[name].dtype == torch.float64 and scores[name].shape == (3,)
        torch.testing.assert_close(scores[name], score(model, x, maps, predicted.tolist(), seed=3))
    assert torch.equal(scores["sparseness"], sparseness(maps))
    other = faithfulness_scores(model, x, maps, (predicted + 1) % 5, seed=3)
    assert not torch.allclose(other["deletion"], scores["deletion"])


def test_the_planted_object_explains_a_trained_model_and_a_random_map_does_not():
    """Taking away the object, and putting it back: the known answer, against a map that looks at nothing."""
    batch = PlantedShapes("test", 12).batch(12)
    model = load_embedded("planted_dense_seed0")
    inside = nn.functional.avg_pool2d(batch.masks.float()[:, None], 4)[:, 0]  # [B, 14, 14], share of each patch
    scores = {
        "deletion": lambda *args: curve_area(deletion_curve(*args, steps=7)),
        "insertion": lambda *args: curve_area(insertion_curve(*args, steps=7)),
        "road": partial(road, percentiles=(25, 75)),
    }
    planted, drawn = (
        {name: score(model, batch.images, maps, batch.labels).mean().item() for name, score in scores.items()}
        for maps in (inside, random_maps(12, (14, 14), seed=1))
    )
    assert planted["deletion"] < drawn["deletion"] - 0.1
    assert planted["insertion"] > drawn["insertion"] + 0.1
    assert planted["road"] > drawn["road"] + 0.1 and abs(drawn["road"]) < 0.1
    start = insertion_curve(model, batch.images, inside, batch.labels, steps=1)[:, 0]
    assert start.mean() < 0.2  # blurred, the shape is gone: chance is 0.1


def test_model_gradients_and_random_state_are_left_as_they_were():
    model, x, maps = vit(), pictures(2, (24, 32)), random_maps(2, (6, 8))
    model.train()
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    model.head.weight.grad = torch.full_like(model.head.weight, 3.0)
    model.head.bias.requires_grad_(False)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002

    faithfulness_scores(model, x, maps)
    drawn = max_sensitivity(model, x, lambda m, x, t: gradient_maps(m, x, t) + torch.rand(len(x), 24, 32), samples=2)
    # ... whatever the state it finds: what an explanation draws is seeded too.
    torch.rand(3)
    again = max_sensitivity(model, x, lambda m, x, t: gradient_maps(m, x, t) + torch.rand(len(x), 24, 32), samples=2)
    assert torch.equal(drawn, again)
    torch.set_rng_state(state)
    faithfulness_scores(model, x, maps)
    max_sensitivity(model, x, gradient_maps, samples=2)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state()))  # noqa: NPY002
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert torch.equal(model.head.weight.grad, torch.full_like(model.head.weight, 3.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")


@pytest.mark.parametrize("score", [deletion_curve, insertion_curve, road, infidelity, faithfulness_scores])
def test_bad_input(score):
    model, x, maps = Counting(), ones(2), torch.zeros(2, *GRID)
    for bad in (torch.zeros(2, 3, 3), torch.zeros(3, 2, 3), torch.zeros(2, 2, 4), torch.zeros(2, 8, 12)):
        with pytest.raises(ValueError, match=r"h dividing H and w dividing W .* got maps \(\d, \d, \d+\) for images"):
            score(model, x, bad)
    with pytest.raises(ValueError, match=r"maps must be \[B, h, w\], got shape \(2, 1, 2, 3\)"):
        score(model, x, maps[:, None])
    with pytest.raises(ValueError, match=r"images must be .* got torch.float32 \(3, 4, 6\)"):
        score(model, x[0], maps)
    with pytest.raises(ValueError, match=r"images must be .* got torch.int64"):
        score(model, x.long(), maps)
    with pytest.raises(ValueError, match="maps must be finite"):
        score(model, x, maps * float("nan"))
    with pytest.raises(ValueError, match=r"targets must lie in 0 to 1, the model's classes, got \[2\]"):
        score(model, x, maps, 2)
    with pytest.raises(ValueError, match="one for each of the 2 images, got 3"):
        score(model, x, maps, [0, 1, 1])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        score(model, x, maps, batch_size=0)


def test_bad_settings():
    model, x, maps = Counting(), ones(2), torch.zeros(2, *GRID)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        deletion_curve(model, x, maps, steps=0)
    with pytest.raises(ValueError, match="fill must be a finite value"):
        deletion_curve(model, x, maps, fill=float("nan"))
    with pytest.raises(ValueError, match="unknown start 'noise': allowed are 'blur', 'fill'"):
        insertion_curve(model, x, maps, start="noise")
    for bad in ((), (100,), (10, 50)):  # a tenth of six cells keeps none
        with pytest.raises(ValueError, match=r"percentiles must be .* in \[16.6667, 100\) for maps of 6 cells"):
            road(model, x, maps, percentiles=bad)
    with pytest.raises(ValueError, match="perturbations must be a whole number of at least 1, got 0"):
        infidelity(model, x, maps, perturbations=0)
    explain = lambda m, images, t: images.mean(1)  # noqa: E731
    with pytest.raises(ValueError, match="radius must be positive and finite, got 0"):
        max_sensitivity(model, x, explain, radius=0)
    with pytest.raises(ValueError, match="samples must be"):
        max_sensitivity(model, x, explain, samples=0)
    with pytest.raises(ValueError, match=r"maps must be \[B, h, w\], got shape \(2, 3, 4, 6\)"):
        max_sensitivity(model, x, lambda m, images, t: images)
    with pytest.raises(ValueError, match="one map for each of 2 images"):
        max_sensitivity(model, x, lambda m, images, t: images[:1, 0])
    with pytest.raises(ValueError, match=r"maps must be \[B, h, w\]"):
        sparseness(torch.zeros(3, 3))
