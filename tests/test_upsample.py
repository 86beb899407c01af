"""Labels of enlarged maps equal the naive ones; no memory for all enlarged maps."""

import weakref

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ovss_nb.components import upsample
from ovss_nb.components.upsample import upsample_argmax


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
    if upsample._mixing_rule("cpu") is not None:
        assert upsample.upsample_argmax(scores, (320, 320)).unique().numel() == 12
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
    calls, plain = [], upsample._argmax_in_groups
    monkeypatch.setattr(
        upsample,
        "_argmax_in_groups",
        lambda scores, size: (calls.append(len(scores)), plain(scores, size))[1],
    )
    upsample_argmax(smooth_maps(50, 20, 20, 2), (320, 320))
    assert not calls
    upsample_argmax(torch.randn(50, 20, 20), (320, 320))
    assert calls == [50]
    monkeypatch.setattr(upsample, "_mixing_rule", lambda device: None)
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
