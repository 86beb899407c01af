"""Blur against scipy and whole matrices, morphology against a loop."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from ovss_nb.components import maps
from ovss_nb.components.maps import dilate, erode, gaussian_blur


def slow_dilate(mask, size):
    r, grown = size // 2, np.zeros_like(mask)
    for y, x in zip(*mask.nonzero()):
        grown[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1] = True
    return grown


@pytest.mark.parametrize("size,iterations", [(1, 1), (3, 1), (7, 1), (5, 3), (41, 1)])
def test_morphology(size, iterations):
    mask = np.random.default_rng(0).random((30, 37)) < 0.03
    grown = mask
    for _ in range(iterations):
        grown = slow_dilate(grown, size)
    assert np.array_equal(dilate(mask, size, iterations), grown)
    assert np.array_equal(erode(~mask, size, iterations), ~grown)  # duality: nothing outside decides
    assert np.array_equal(dilate(mask[::-1].T, size, iterations), grown[::-1].T)


def test_morphology_refuses():
    with pytest.raises(ValueError, match="boolean"):
        dilate(np.ones((4, 4)))
    with pytest.raises(ValueError, match="odd"):
        erode(np.ones((4, 4), bool), 4)


# ---- blur without a matrix of pixels x pixels


def blurred_by_whole_matrices(maps, sigma):
    "As it was: the blurred identity matrix of each axis."
    down, across = (
        torch.as_tensor(scipy.ndimage.gaussian_filter1d(np.eye(n), sigma, axis=0)).to(maps)
        for n in maps.shape[-2:]
    )
    return down @ maps @ across.mT


@pytest.mark.parametrize(
    "shape, sigma",
    [
        ((5, 375, 500), 25.0),
        ((3, 480, 640), 32.0),
        ((2, 21, 21), 1.05),
        ((2, 300, 300), 300.0),
        ((2, 1, 700), 35.0),
        ((2, 700, 1), 35.0),
        ((2, 2, 600), 30.0),
        ((1, 257, 256), 0.1),
        ((2, 513, 40), 20.0),
    ],
)
def test_blur_equals_whole_matrices(shape, sigma):
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    # where nothing reaches, nothing may appear: ties there go to the first class
    maps[..., : shape[1] // 2, :] = 0
    blurred, expected = gaussian_blur(maps, sigma), blurred_by_whole_matrices(maps, sigma)
    assert torch.allclose(blurred, expected, atol=1e-6) and torch.equal(blurred == 0, expected == 0)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2, 3000), (3000, 2)])
def test_blur_of_a_strip_holds_no_square(shape, monkeypatch):
    "No band of weights has more than its 256 rows, and none is as large as the square of the long side."
    sizes, band = [], maps._band

    def counted(*arguments):
        first, weights = band(*arguments)
        sizes.append(weights.shape)
        return first, weights

    monkeypatch.setattr(maps, "_band", counted)
    scores = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    sigma = 0.05 * max(shape)
    blurred = gaussian_blur(scores, sigma)
    assert max(rows for rows, _ in sizes) <= 256 and max(rows * seen for rows, seen in sizes) <= 256 * (
        256 + 8 * sigma + 1
    )
    assert np.allclose(blurred, scipy.ndimage.gaussian_filter(scores.numpy(), (0, sigma, sigma)), atol=1e-6)
