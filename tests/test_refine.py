"""Refine:
labels equal to the naive way, memory, dense CRF against an exact mean field, morphology against a loop.
"""

import sys
import weakref
import numpy as np
import pytest
import scipy.ndimage
import torch
from scipy.ndimage import gaussian_filter
from skimage import data
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ovss_nb.components import maps, upsample as refine
from ovss_nb.core.optional import MissingExtra
from ovss_nb.components.crf import CRFConfig, binary_crf, crf_available, dense_crf, surviving_classes
from ovss_nb.components.maps import add_background, dilate, erode, gaussian_blur
from ovss_nb.components.upsample import upsample_argmax

needs_crf = pytest.mark.skipif(not crf_available(), reason="the extra `crf` (pydensecrf2) is not installed")


def smooth_maps(classes, h, w, sigma, seed=0, channels=48):
    "Cosine scores of smoothed random features with random class vectors."
    random = np.random.default_rng(seed)
    features = gaussian_filter(random.standard_normal((channels, h, w)), (0, sigma, sigma))
    vectors = random.standard_normal((classes, channels))
    features, vectors = (
        features / np.linalg.norm(features, axis=0),
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
    )
    return torch.tensor(np.einsum("kd,dhw->khw", vectors, features), dtype=torch.float32)


def naive(scores, size):
    "The naive values and labels, and where the two best naive values differ."
    values = F.interpolate(
        scores[None].float().contiguous(), size=size, mode="bilinear", align_corners=False
    )[0]
    best = values.topk(min(2, len(values)), dim=0).values
    return values.argmax(0), best[0] != best[-1] if len(values) > 1 else torch.ones(size, dtype=torch.bool)


def assert_same(scores, size):
    labels, (expected, clear) = upsample_argmax(scores, size), naive(scores, size)
    assert labels.shape == tuple(size) and labels.dtype == torch.int16
    assert torch.equal(labels.long()[clear], expected[clear])


SIZES = [
    ((30, 40), (480, 640)),
    ((17, 23), (301, 407)),
    ((24, 24), (336, 336)),
    ((32, 32), (500, 375)),
    ((9, 13), (100, 111)),
    ((5, 1), (90, 200)),
    ((1, 7), (99, 64)),
    ((1, 1), (100, 100)),
    ((2, 2), (513, 300)),
    ((30, 40), (75, 90)),
    ((60, 80), (120, 160)),
    ((30, 40), (60, 68)),
    ((40, 40), (20, 31)),
    ((8, 8), (8, 8)),
    ((3, 3), (1, 1)),
]


@pytest.mark.parametrize("places,size", SIZES)
@pytest.mark.parametrize("kind", ["smooth", "rough", "noise"])
def test_labels_equal_the_naive_ones(places, size, kind):
    for classes, seed in ((1, 0), (2, 1), (3, 3), (4, 4), (37, 2)):
        sigma = {"smooth": 2.5, "rough": 0.8}.get(kind)
        scores = (
            smooth_maps(classes, *places, sigma, seed)
            if sigma
            else torch.randn(classes, *places, generator=torch.Generator().manual_seed(seed))
        )
        assert_same(scores, size)


def test_many_random_maps():
    for seed in range(40):
        random = np.random.default_rng(seed)
        h, w, classes = random.integers(2, 28), random.integers(2, 28), random.integers(2, 80)
        assert_same(
            smooth_maps(classes, h, w, random.uniform(0.3, 3), seed) * random.choice([1e-6, 1, 1e4]),
            (int(h * random.uniform(2, 20)) + 100, int(w * random.uniform(2, 20)) + 100),
        )


def test_close_classes_need_the_exact_arithmetic():
    "Classes a few units in the last place apart: only the same rounding gives the same labels."
    base = smooth_maps(1, 20, 20, 2) + 1
    nudges = torch.randint(-3, 4, (12, 20, 20), generator=torch.Generator().manual_seed(0))
    scores = base * (1 + nudges * torch.finfo(torch.float32).eps)
    if refine._mixing_rule("cpu") is not None:
        assert refine.upsample_argmax(scores, (320, 320)).unique().numel() == 12
    assert_same(scores, (320, 320))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    "Torch interpolates three channels differently in one thread; no share of the classes may notice."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for classes in 3, 7, 19, 35, 83:
            for seed in range(3):
                assert_same(
                    torch.randn(classes, 30, 40, generator=torch.Generator().manual_seed(seed)), (480, 640)
                )
            assert_same(smooth_maps(classes, 30, 40, 2), (480, 640))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_large_vocabulary_and_wide_labels():
    assert_same(smooth_maps(847, 30, 40, 2), (480, 640))
    scores = torch.zeros(2**15 + 1, 2, 2)
    scores[-1] = 1
    labels = upsample_argmax(scores, (70, 70))
    assert labels.dtype == torch.int32 and (labels == 2**15).all()


def test_both_ways_are_taken(monkeypatch):
    "Smooth maps never reach the plain way; noise does; and without an exact rule everything does."
    calls, plain = [], refine._argmax_in_groups
    monkeypatch.setattr(
        refine, "_argmax_in_groups", lambda scores, size: (calls.append(len(scores)), plain(scores, size))[1]
    )
    upsample_argmax(smooth_maps(50, 20, 20, 2), (320, 320))
    assert not calls
    upsample_argmax(torch.randn(50, 20, 20), (320, 320))
    assert calls == [50]
    monkeypatch.setattr(refine, "_mixing_rule", lambda device: None)
    assert_same(smooth_maps(50, 20, 20, 2), (320, 320))
    assert calls == [50, 50]


def test_ties_and_flat_maps():
    assert not upsample_argmax(torch.zeros(5, 10, 10), (160, 160)).any()
    relu = smooth_maps(20, 15, 15, 2).clamp(min=0.2)
    labels, (expected, clear) = upsample_argmax(relu, (240, 240)), naive(relu, (240, 240))
    assert torch.equal(labels.long()[clear], expected[clear])


def test_types_layouts_and_switched_off_classes():
    scores, size = smooth_maps(30, 15, 20, 1), (240, 320)
    expected = upsample_argmax(scores, size)
    assert torch.equal(upsample_argmax(scores.double(), size), expected)
    assert torch.equal(upsample_argmax(scores.permute(1, 2, 0).contiguous().permute(2, 0, 1), size), expected)
    assert torch.equal(upsample_argmax(scores.clone().requires_grad_(), size), expected)
    for dtype in torch.float16, torch.bfloat16:
        assert_same(scores.to(dtype), size)
    off = scores.clone()
    off[::2] = -torch.inf
    assert torch.equal(upsample_argmax(off, size), upsample_argmax(scores[1::2], size) * 2 + 1)
    assert torch.equal(upsample_argmax(off[:, :, :], (40, 40)) % 2, torch.ones(40, 40, dtype=torch.int16))
    assert not upsample_argmax(torch.full((4, 5, 5), -torch.inf), (100, 100)).any()


@pytest.mark.parametrize(
    "scores,size",
    [
        (torch.zeros(3, 4), (9, 9)),
        (torch.zeros(0, 4, 4), (9, 9)),
        (torch.zeros(2, 4, 4), (0, 9)),
        (torch.full((2, 4, 4), torch.nan), (200, 200)),
        (torch.full((2, 4, 4), torch.inf), (200, 200)),
    ],
)
def test_bad_scores(scores, size):
    with pytest.raises(ValueError):
        upsample_argmax(scores, size)


def test_one_nan_is_found():
    scores = smooth_maps(50, 10, 10, 1)
    scores[31, 4, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        upsample_argmax(scores, (160, 160))


class LiveMemory(TorchDispatchMode):
    "Counts the bytes of all tensors made inside, and their peak."

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage._cdata in self.seen:
                continue
            self.seen[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, storage._cdata)
        return result

    def release(self, key):
        self.live -= self.seen.pop(key)


@pytest.mark.parametrize("classes,limit", [(150, 7), (847, 17)])
def test_memory(classes, limit):
    "Live tensor memory against the naive way, smooth maps and noise."
    for scores in smooth_maps(classes, 30, 40, 2), torch.randn(classes, 30, 40):
        with LiveMemory() as ours:
            upsample_argmax(scores, (480, 640))
        with LiveMemory() as theirs:
            F.interpolate(scores[None], size=(480, 640), mode="bilinear")[0].argmax(0)
        assert theirs.peak >= classes * 480 * 640 * 4
        assert ours.peak * limit <= theirs.peak


def test_background():
    scores = smooth_maps(6, 10, 10, 1)
    labels = upsample_argmax(add_background(scores, 0.1, 6), (160, 160))
    values = F.interpolate(scores[None], size=(160, 160), mode="bilinear")[0].amax(0)
    assert torch.equal(labels == 6, values < 0.1)
    with pytest.raises(ValueError):
        add_background(scores, 0, 7)


def slow_dilate(mask, size):
    r, out = size // 2, np.zeros_like(mask)
    for y, x in zip(*mask.nonzero()):
        out[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1] = True
    return out


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
    for picture, p in (
        (image / 255.0, probabilities),
        (image[..., 0], probabilities),
        (image, probabilities[:, 1:]),
        (image, probabilities * 3),
        (image, probabilities * np.nan),
        (image, torch.tensor(probabilities)),
    ):
        with pytest.raises(ValueError, match="CRF needs"):
            dense_crf(picture, p)
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
    found, expected = gaussian_blur(maps, sigma), blurred_by_whole_matrices(maps, sigma)
    assert torch.allclose(found, expected, atol=1e-6) and torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2, 3000), (3000, 2)])
def test_blur_of_a_strip_holds_no_square(shape, monkeypatch):
    "No band of weights has more than its 256 rows, and none is as large as the square of the long side."
    sizes, band = [], maps._band

    def counted(*arguments):
        low, weights = band(*arguments)
        sizes.append(weights.shape)
        return low, weights

    monkeypatch.setattr(maps, "_band", counted)
    maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    sigma = 0.05 * max(shape)
    found = gaussian_blur(maps, sigma)
    assert max(rows for rows, _ in sizes) <= 256 and max(rows * seen for rows, seen in sizes) <= 256 * (
        256 + 8 * sigma + 1
    )
    assert np.allclose(found, scipy.ndimage.gaussian_filter(maps.numpy(), (0, sigma, sigma)), atol=1e-6)
