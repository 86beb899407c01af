"""Dense CRF against an exact mean field."""

import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage import data

from ovss_nb.components.crf import CRFConfig, binary_crf, crf_available, dense_crf, surviving_classes
from ovss_nb.core.optional import MissingExtra

needs_crf = pytest.mark.skipif(not crf_available(), reason="the extra `crf` (pydensecrf2) is not installed")


def exact_mean_field(image, probabilities, config):
    "Dense CRF by the full N x N kernels, Potts, symmetrically normalized as in Krähenbühl's code."
    k, h, w = probabilities.shape
    y, x = np.mgrid[:h, :w].reshape(2, -1)
    place, color = np.stack([x, y], 1).astype(float), image.reshape(-1, 3).astype(float)
    near = lambda *parts: np.exp(-0.5 * sum(((p[:, None] - p[None]) ** 2).sum(2) / s**2 for p, s in parts))
    kernels = [
        (near((place, config.gaussian_sxy)), config.gaussian_compat),
        (near((place, config.bilateral_sxy), (color, config.bilateral_srgb)), config.bilateral_compat),
    ]
    unary = -np.log(probabilities.reshape(k, -1) + 1e-8)
    q = np.exp(-unary)
    q /= q.sum(0)
    for _ in range(config.iterations):
        energy = -unary
        for kernel, weight in kernels:
            norm = 1 / np.sqrt(kernel.sum(1) + 1e-20)
            energy = energy + weight * ((q * norm) @ kernel) * norm
        q = np.exp(energy - energy.max(0))
        q /= q.sum(0)
    return q.reshape(k, h, w)


def small_scene():
    image = np.ascontiguousarray(data.coffee()[100:340:8, 180:420:8])
    bright = gaussian_filter(image.mean(2) / 255, 2)
    return image, np.clip(np.stack([bright, 1 - bright, np.full_like(bright, 0.3)]) / 1.3, 0.01, 1).astype(
        np.float32
    )


@needs_crf
@pytest.mark.parametrize("config", [CRFConfig(3, 3, 40, 13, 10, 3), CRFConfig(3, 7, 50, 30, 10, 10)])
def test_crf_against_the_exact_mean_field(config):
    image, probabilities = small_scene()
    ours, exact = (
        dense_crf(image, probabilities, config, top=None),
        exact_mean_field(image, probabilities, config),
    )
    assert (exact.argmax(0) != probabilities.argmax(0)).mean() > 0.02  # the CRF has something to do here
    # the permutohedral lattice only approximates the kernels
    assert (ours.argmax(0) == exact.argmax(0)).mean() > 0.95


@needs_crf
def test_crf_binary_is_joint_with_two_labels_and_deterministic():
    image, probabilities = small_scene()
    p = probabilities[0]
    config = CRFConfig(3, 3, 40, 13, 10, 3)
    mask = binary_crf(image, p)
    assert np.array_equal(mask, dense_crf(image, np.stack([1 - p, p]), config).argmax(0) == 1)
    assert np.array_equal(mask, binary_crf(image[:, :, ::-1].copy()[:, :, ::-1], np.asfortranarray(p)))
    assert np.array_equal(mask, binary_crf(image, p))


@needs_crf
def test_crf_without_the_classes_that_never_win():
    image, probabilities = small_scene()
    weak = np.concatenate([probabilities, np.full((4, *probabilities.shape[1:]), 1e-3, np.float32)])
    kept = surviving_classes(weak)
    assert set(kept) <= {0, 1, 2}
    assert np.array_equal(dense_crf(image, weak).argmax(0), dense_crf(image, probabilities).argmax(0))
    assert np.array_equal(dense_crf(image, weak)[kept], dense_crf(image, weak[kept], top=None))
    alone = dense_crf(image, np.stack([np.full(image.shape[:2], 0.9), np.full(image.shape[:2], 0.1)]))
    assert (alone[0] == 1).all() and not alone[1].any()


@needs_crf
def test_crf_refuses():
    image, probabilities = small_scene()
    for pixels, p in (
        (image / 255.0, probabilities),
        (image[..., 0], probabilities),
        (image, probabilities[:, 1:]),
        (image, probabilities * 3),
        (image, probabilities * np.nan),
        (image, torch.tensor(probabilities)),
    ):
        with pytest.raises(ValueError, match="CRF needs"):
            dense_crf(pixels, p)
    with pytest.raises(ValueError):
        binary_crf(image, probabilities)
    with pytest.raises(ValueError):
        dense_crf(image, probabilities[0])


def test_missing_extra_names_the_command(monkeypatch):
    image, probabilities = small_scene()
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert not crf_available()
    with pytest.raises(MissingExtra, match=r"ovss_nb\[crf\]"):
        dense_crf(image, probabilities)
    with pytest.raises(MissingExtra, match=r"ovss_nb\[crf\]"):
        binary_crf(image, probabilities[0])
