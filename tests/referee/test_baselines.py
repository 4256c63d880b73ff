"""Baselines: what they know and what they do not."""

from __future__ import annotations

import pytest
import torch
from scipy import ndimage

from svit_utils.referee.baselines import centre_maps, edge_maps, random_maps, uniform_maps
from svit_utils.referee.localisation import energy_in_mask


def test_centre_baseline_peaks_at_the_centre_on_any_size():
    maps = centre_maps(2, (21, 31))
    assert maps.shape == (2, 21, 31)
    assert maps[0].argmax().item() == 10 * 31 + 15
    torch.testing.assert_close(maps, maps.flip(1, 2))
    middle = torch.zeros(1, 20, 20, dtype=torch.bool)
    middle[0, 6:14, 6:14] = True
    corner = torch.zeros(1, 20, 20, dtype=torch.bool)
    corner[0, :8, :8] = True
    assert energy_in_mask(centre_maps(1, (20, 20)), middle) > 2 * energy_in_mask(centre_maps(1, (20, 20)), corner)
    with pytest.raises(ValueError, match="sigma must be positive"):
        centre_maps(1, (4, 4), sigma=0)


def test_random_maps_are_seeded():
    assert torch.equal(random_maps(2, (4, 5), seed=1), random_maps(2, (4, 5), seed=1))
    assert not torch.equal(random_maps(2, (4, 5), seed=1), random_maps(2, (4, 5), seed=2))
    assert torch.equal(uniform_maps(2, (4, 5)), torch.ones(2, 4, 5))


@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, -2.3])
def test_a_constant_image_has_no_edge(level):
    images = torch.full((2, 3, 7, 9), level)
    images[:, 1] += 0.7  # a colour is no edge either
    assert torch.equal(edge_maps(images), torch.zeros(2, 7, 9))


def test_a_step_gives_half_its_height_on_the_two_pixels_beside_it():
    images = torch.zeros(1, 3, 6, 8)
    images[..., 5:] = 3.0
    expected = torch.zeros(1, 6, 8)
    expected[..., 4:6] = 1.5
    assert torch.equal(edge_maps(images), expected)
    assert torch.equal(edge_maps(images.mT), expected.mT)
    assert torch.equal(edge_maps(-images), expected)  # a magnitude: dark to light or light to dark


def test_a_ramp_gives_its_slope_whatever_its_direction():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    got = edge_maps((3 * x + 4 * y).expand(1, 3, 9, 11))
    torch.testing.assert_close(got[:, 1:-1, 1:-1], torch.full((1, 7, 9), 5.0))
    # Reflected at the border, so that the slope across it is 0 and only the slope along it is left.
    torch.testing.assert_close(got[0, 0, 1:-1], torch.full((9,), 3.0))
    torch.testing.assert_close(got[0, 1:-1, 0], torch.full((7,), 4.0))
    assert got[0, 0, 0] == got[0, -1, -1] == 0


def test_edges_are_those_of_scipy():
    images = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(2))
    grey = images.mean(dim=1).double().numpy()
    # scipy calls reflection without repeating the border pixel "mirror", and its kernel sums to 8.
    wanted = [torch.from_numpy(ndimage.generic_gradient_magnitude(g, ndimage.sobel, mode="mirror")) / 8 for g in grey]
    torch.testing.assert_close(edge_maps(images), torch.stack(wanted).float())


def test_edges_of_single_channels_count_by_a_third():
    images = torch.zeros(1, 3, 4, 4)
    images[:, 2, :, 2:] = 6.0
    assert edge_maps(images)[0, 1].tolist() == [0.0, 1.0, 1.0, 0.0]
    opposed = images.clone()
    opposed[:, 0, :, 2:] = -6.0  # a change of colour that leaves the grey as it was is not seen
    assert edge_maps(opposed).max() == 0


@pytest.mark.parametrize(("size", "cell"), [((14, 14), (4, 4)), ((7, 28), (8, 2)), ((56, 56), (1, 1))])
def test_edges_on_a_grid_are_the_mean_of_each_cell(size, cell):
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    cells = edge_maps(images).unfold(1, cell[0], cell[0]).unfold(2, cell[1], cell[1])  # [3, h, w, *cell]
    torch.testing.assert_close(edge_maps(images, size), cells.mean(dim=(-1, -2)))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 1, 8)])
def test_edges_of_what_is_no_image(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\] with H, W of at least 2 pixels, got \("):
        edge_maps(torch.zeros(shape))
