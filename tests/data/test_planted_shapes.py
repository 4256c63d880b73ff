"""PlantedShapes: the same picture every time, exact masks, and the class in the shape alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from svit_utils.data import DIFFICULTIES, Difficulty, PlantedShapes

STANDARD = DIFFICULTIES["standard"]

# Of the first twenty test pictures: pixels in the mask, and mean value.
AREAS = [779, 692, 762, 762, 791, 533, 645, 752, 766, 805, 642, 850, 901, 856, 808, 531, 795, 622, 667, 513]
MEANS = [
    0.57086,
    0.3203,
    -0.33313,
    0.27828,
    -0.58778,
    -0.54337,
    0.34693,
    -0.20577,
    0.32991,
    0.64298,
    0.80021,
    0.5186,
    -0.51003,
    0.3934,
    -0.22378,
    -0.54807,
    0.58313,
    -0.50231,
    0.7636,
    0.383,
]


# ---------------------------------------------------------------------------------------------- the same every time


def test_a_picture_is_the_same_in_any_batch_and_order() -> None:
    data = PlantedShapes("train", 1000, seed=3, distractors=3, rho=0.5)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled, whole = data.batch(order), data.batch(200)
    for field, again in zip(whole, shuffled, strict=True):
        assert torch.equal(field[order], again)
    for i in (0, 7, 63, 64, 199):
        image, label = data[i]
        assert torch.equal(image, whole.images[i])
        assert label == int(whole.labels[i]) and isinstance(label, int)
    again = PlantedShapes("train", 500, seed=3, distractors=3, rho=0.5)  # nor does the size matter
    assert torch.equal(again.batch([499]).images, data.batch([499]).images)
    assert torch.equal(data[-1][0], data[999][0])


def test_workers_and_batched_fetching_change_nothing() -> None:
    data = PlantedShapes("val", 24)
    images, labels = next(iter(DataLoader(data, batch_size=24)))
    assert torch.equal(images, data.batch(24).images) and torch.equal(labels, data.batch(24).labels)
    parts = list(DataLoader(data, batch_size=10, num_workers=1))
    assert torch.equal(torch.cat([x for x, _ in parts]), images)


def test_items_are_what_a_model_takes() -> None:
    batch = PlantedShapes("train").batch(400)
    assert batch.images.shape == (400, 3, 56, 56) and batch.images.dtype == torch.float32
    assert batch.masks.shape == (400, 56, 56) and batch.masks.dtype == torch.bool
    assert batch.labels.dtype == torch.int64 and torch.equal(batch.labels.bincount(), torch.full((10,), 40))
    assert abs(batch.images.mean().item()) < 0.1 and 0.8 < batch.images.std().item() < 1.2
    assert len(PlantedShapes.classes) == 10
    for size in (32, 96):
        assert PlantedShapes("train", img_size=size)[0][0].shape == (3, size, size)


def test_seeds_and_splits_share_no_picture() -> None:
    """Not only different at the same index: no picture of one set lies in another (compared by their corner)."""
    sets = [PlantedShapes(split, 2000, seed=seed) for split in ("train", "val", "test") for seed in (0, 1)]
    corners = torch.cat([data.batch(400).images[:, :, :4, :4].flatten(1) for data in sets])
    assert len(torch.unique(corners, dim=0)) == len(corners) == 2400


def test_the_pictures_have_not_changed() -> None:
    """The shipped checkpoints were trained on these; rounding may differ between processors, hence the tolerance."""
    batch = PlantedShapes("test").batch(20)
    area = batch.masks.float().sum((1, 2))
    assert [round(v) for v in area.tolist()] == AREAS
    assert batch.images.double().mean((1, 2, 3)).tolist() == pytest.approx(MEANS, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ exact masks


@pytest.mark.parametrize("difficulty", ["easy", "standard", "hard"])
@pytest.mark.parametrize("distractors", [0, 8])
def test_the_mask_is_where_the_object_shows(difficulty: str, distractors: int) -> None:
    """Every pixel of the mask differs from the picture without the object; every other pixel that differs is one the
    outline runs through or just touches (0 < coverage < 1/2), and lies beside the mask."""
    options = {"difficulty": difficulty, "distractors": distractors}
    there, erased = (PlantedShapes("test", 500, erase_object=e, **options).batch(500) for e in (False, True))
    differs = (there.images != erased.images).any(1)
    assert torch.equal(there.masks, there.coverage >= 0.5)
    assert differs[there.masks].all()
    assert torch.equal(differs & ~there.masks, (there.coverage > 0) & ~there.masks)
    beside = torch.nn.functional.max_pool2d(there.masks.float(), 3, 1, 1).bool()
    band = differs & ~there.masks
    assert (band & beside).sum() > 0.98 * band.sum()  # the rest: the points of stars and hearts, thinner than a pixel
    # Inside, away from the outline, nothing of the background shines through; and the object stands out clearly.
    contrast = ((there.images - erased.images).mean(1).abs() * 0.25)[there.masks]
    assert contrast.min() > 0.01
    # Erasing changes nothing but the picture.
    for name in ("labels", "masks", "coverage", "backgrounds"):
        assert torch.equal(getattr(there, name), getattr(erased, name))


def test_masks_cover_what_was_asked_and_lie_inside() -> None:
    batch = PlantedShapes("test", 2000).batch(2000)
    low, high = STANDARD.area
    area = batch.masks.float().mean((1, 2))
    assert low - 0.01 < area.min() and area.max() < high + 0.01
    for c in range(10):  # the same area, whatever the class
        assert area[batch.labels == c].mean().item() == pytest.approx((low + high) / 2, abs=0.012)
    ring = torch.ones(56, 56, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    assert not batch.masks[:, ring].any()
    # Objects are all over the place: the middle of the mask moves, and the commonest pixel is far from always covered.
    assert batch.masks.float().mean(0).max() < 0.8


def test_distractors_leave_the_object_and_the_mask_alone() -> None:
    plain, busy = (PlantedShapes("test", distractors=n).batch(200) for n in (0, 6))
    assert torch.equal(plain.masks, busy.masks) and torch.equal(plain.coverage, busy.coverage)
    inside = (plain.coverage == 1)[:, None].expand_as(plain.images)
    assert torch.allclose(plain.images[inside], busy.images[inside], atol=1e-5)  # drawn below the object
    changed = (plain.images != busy.images).any(1) & (plain.coverage == 0)
    share = changed.float().mean((1, 2))
    assert 0.01 < share.mean() < 0.15 and (share > 0).all()


# ------------------------------------------------------------------- the class, in the shape and nowhere else


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Best test accuracy of a linear classifier (ridge regression on one-hot labels), over several penalties.

    The penalty is chosen on the test set: that favours the probe, so staying low is the harder claim.
    """
    (x, y), (xt, yt) = train, test
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, xt = ((x - mean) / std).double(), ((xt - mean) / std).double()
    target = torch.nn.functional.one_hot(y, 10).double() - 0.1
    gram, cross = x.T @ x, x.T @ target
    accuracies = []
    for penalty in (1e-2, 1.0, 10.0):
        weights = torch.linalg.solve(gram + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype), cross)
        accuracies.append(((xt @ weights).argmax(1) == yt).double().mean().item())
    return max(accuracies)


def pixels(images: Tensor) -> Tensor:
    """Colour pixels at a quarter of the side: what a linear reader of these objects needs, and no noise to overfit."""
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1)


def lightness(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


def histogram(images: Tensor) -> Tensor:
    """Sixteen bins for each channel, and for lightness."""
    level = torch.cat([images, images.mean(1, keepdim=True)], 1).mul(0.25).add(0.5).clamp(0, 0.999).mul(16).long()
    return torch.stack([(level == k).float().mean((2, 3)) for k in range(16)], 2).flatten(1)


def probe_set(n: int, n_test: int, **options: object) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    train = PlantedShapes("train", **options).batch(n)  # type: ignore[arg-type]
    test = PlantedShapes("test", **options).batch(n_test)  # type: ignore[arg-type]
    return (train.images, train.labels), (test.images, test.labels)


def run_probe(feature, sets) -> float:  # type: ignore[no-untyped-def]
    (x, y), (xt, yt) = sets
    return probe((feature(x), y), (feature(xt), yt))


@pytest.fixture(scope="module")
def standard_sets() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return probe_set(4000, 2000)


@pytest.mark.parametrize("feature", [pixels, lightness, histogram])
def test_linear_probes_do_not_find_the_class(feature, standard_sets) -> None:  # type: ignore[no-untyped-def]
    assert run_probe(feature, standard_sets) < 0.30


def test_the_pixel_probe_can_read_shapes_where_they_are_readable() -> None:
    """Bright objects that stay near the middle: the same probe reads them, so its failure above is the data's doing."""
    readable = replace(STANDARD, brighter=1.0, shift=0.05)
    assert run_probe(lightness, probe_set(4000, 1000, difficulty=readable)) > 0.6


def test_the_colour_probe_reads_the_background_when_it_is_tied_to_the_class() -> None:
    tied, loose = (run_probe(histogram, probe_set(2000, 1000, rho=rho)) for rho in (1.0, 0.0))
    assert tied > 0.5 and loose < 0.2


def test_the_mask_alone_tells_the_class_and_the_erased_picture_does_not() -> None:
    """The shape is enough for a nearest-neighbour on centred masks; the erased picture gives no probe anything."""

    def centred(batch) -> Tensor:  # type: ignore[no-untyped-def]
        out = []
        for mask in batch.masks:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float()
            out.append(torch.nn.functional.interpolate(box[None, None], (16, 16), mode="bilinear")[0, 0].flatten())
        return torch.stack(out)

    train, test = PlantedShapes("train").batch(600), PlantedShapes("test").batch(200)
    nearest = torch.cdist(centred(test), centred(train)).argmin(1)
    assert (train.labels[nearest] == test.labels).float().mean() > 0.9
    erased = probe_set(3000, 2000, erase_object=True)
    assert run_probe(histogram, erased) < 0.15 and run_probe(pixels, erased) < 0.15


# ------------------------------------------------------------------------------------------------------ background


def test_rho_is_the_share_of_backgrounds_tied_to_the_class() -> None:
    n = 4000
    for rho in (0.0, 0.5, 1.0):
        batch = PlantedShapes("train", rho=rho).batch(n)
        agree = (batch.backgrounds == batch.labels).float().mean().item()
        assert agree == pytest.approx(rho + (1 - rho) / 10, abs=0.03)
    counts = PlantedShapes("train").batch(n).backgrounds.bincount(minlength=10)
    assert counts.min() > 0.8 * n / 10


def test_swapping_the_background_takes_another_class_and_leaves_the_object() -> None:
    plain, swapped = (PlantedShapes("test", rho=1.0, swap_background=s).batch(1000) for s in (False, True))
    assert torch.equal(plain.backgrounds, plain.labels)
    assert (swapped.backgrounds != swapped.labels).all()
    offsets = ((swapped.backgrounds - swapped.labels) % 10).bincount(minlength=10)
    assert offsets[0] == 0 and offsets[1:].min() > 70  # all nine others
    assert torch.equal(plain.masks, swapped.masks) and torch.equal(plain.labels, swapped.labels)
    inside = (plain.coverage == 1)[:, None].expand_as(plain.images)
    assert torch.allclose(plain.images[inside], swapped.images[inside], atol=1e-5)
    outside = plain.coverage == 0
    assert (plain.images != swapped.images).any(1)[outside].float().mean() > 0.99


def test_colours_come_back_for_display() -> None:
    data = PlantedShapes("val")
    images = data.denormalise(data.batch(50).images)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.allclose(images.sub(0.5).mul(4), data.batch(50).images, atol=1e-5)  # nothing was clipped


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split must be one of .*'train'.* got 'dev'"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"img_size": 8}, "img_size must be at least 16"),
        ({"distractors": -1}, "distractors must be at least 0, got -1"),
        ({"rho": 1.5}, r"rho must lie in \[0, 1\], got 1.5"),
        ({"rho": float("nan")}, r"rho must lie in \[0, 1\], got nan"),
        ({"difficulty": "brutal"}, "difficulty must be one of .*'standard'.* got 'brutal'"),
        ({"difficulty": Difficulty(area=(0.3, 0.6))}, "does not fit the picture"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlantedShapes(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": (0.3, 0.2)}, "area must be"),
        ({"rotation": 4.0}, "rotation must lie in"),
        ({"shift": 0.6}, "shift must lie in"),
        ({"brighter": 1.1}, "brighter must lie in"),
        ({"clutter": -0.1}, "must not be negative"),
        ({"contrast": (0.1, 0.5)}, "smallest contrast must exceed"),
        ({"contrast": (0.4, 0.8)}, "must not exceed 0.5"),
    ],
)
def test_difficulties_that_break_a_promise_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Difficulty(**options)  # type: ignore[arg-type]


def test_an_index_outside_the_set_is_an_error() -> None:
    data = PlantedShapes("val", 10)
    for index in (10, -11):
        with pytest.raises(IndexError, match="outside the 10 pictures"):
            data[index]
    with pytest.raises(ValueError, match="at least one index"):
        data.batch([])
