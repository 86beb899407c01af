"Names to classes, thresholds, areas and windows: against SCLIP's own numbers, and against plain loops."

import math

import numpy as np
import pytest
import torch
from doubles import recipes_golden
from ovss_nb.components.class_probabilities import (
    best_probability,
    class_labels,
    class_maximum,
    class_probabilities,
    enlarged_strips,
    large_classes,
    with_class_prior,
)
from ovss_nb.components.sliding_window import merge_windows, stride_offsets, window_corners
from torch.nn import functional as F

RULES = {
    "plain": dict(logit_scale=40),
    "thd": dict(logit_scale=40, threshold=0.8),
    "area": dict(logit_scale=65, threshold=0.3, min_area=0.15),
}


def near(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def published():
    return recipes_golden("windows_and_background")[0]


@pytest.mark.parametrize("crop, stride", [(64, 32), (64, 24), (48, 48), (128, 64)])
def test_windows_are_merged_as_published(published, crop, stride):
    image, matrix = published["input.image"], published["input.matrix"]
    offsets = [stride_offsets(length, crop, stride) for length in image.shape[-2:]]
    corners, maps = window_corners(*offsets), []
    for top, left in corners:
        window = image[..., top : top + crop, left : left + crop]
        scores = torch.einsum("kc,bchw->bkhw", matrix, F.avg_pool2d(window, 8))
        maps.append(F.interpolate(scores, window.shape[-2:], mode="bilinear"))
    merged = F.interpolate(merge_windows(maps, corners, image.shape[-2:]), (90, 130), mode="bilinear")
    expected = published[f"expect.slide.crop{crop}_stride{stride}"]
    near(merged[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("rule", RULES)
def test_labels_are_those_published(published, rule):
    scores, owners = published["expect.slide.crop64_stride32"][0], published["input.query_index"]
    labels = class_labels(scores, (90, 130), owners, background=0, **RULES[rule])
    assert torch.equal(labels, published[f"expect.post.{rule}.pred"][0].long())
    probabilities = class_probabilities(scores, owners, RULES[rule]["logit_scale"])
    if min_area := RULES[rule].get("min_area"):
        probabilities[~large_classes(probabilities.argmax(0), 4, min_area, 0)] = 0
    near(probabilities[:, ::3, ::3], published[f"expect.post.{rule}.probs"])


def by_loops(scores, size, owners, scale, background, threshold, min_area):
    "The published rules pixel by pixel, in double precision."
    height, width = size
    classes = max(owners) + 1
    enlarged = F.interpolate(scores[None].double(), size, mode="bilinear")[0].numpy()
    chances, labels = np.zeros((classes, height, width)), np.zeros(size, int)
    for y in range(height):
        for x in range(width):
            total = sum(math.exp(scale * value) for value in enlarged[:, y, x])
            for q, k in enumerate(owners):
                chances[k, y, x] = max(chances[k, y, x], math.exp(scale * enlarged[q, y, x]) / total)
            labels[y, x] = chances[:, y, x].argmax()
    if min_area:
        counts = [int((labels == k).sum()) * (k != background) for k in range(classes)]
        for k in range(classes):
            if k != background and counts[k] <= min_area * sum(counts):
                chances[k] = 0
        labels = chances.argmax(0)
    if threshold:
        labels[chances.max(0) < threshold] = background
    return labels


@pytest.mark.parametrize(
    "shape, size", [((5, 5), (20, 20)), ((4, 7), (19, 25)), ((9, 6), (5, 4)), ((1, 1), (3, 2))]
)
@pytest.mark.parametrize("background, threshold, min_area", [(0, None, 0.0), (2, 0.4, 0.0), (1, 0.3, 0.2)])
def test_labels_by_loops(shape, size, background, threshold, min_area):
    scores = torch.rand(6, *shape, generator=torch.Generator().manual_seed(sum(shape))) / 4
    owners = torch.tensor([0, 1, 1, 2, 3, 3])
    expected = by_loops(scores, size, owners.tolist(), 30, background, threshold, min_area)
    for limit in (1, 2**22):
        labels = class_labels(scores, size, owners, 30, background, threshold, min_area, limit)
        assert labels.tolist() == expected.tolist()


def test_scores_that_are_probabilities_stay_so():
    scores = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1))
    size = (13, 17)
    whole = F.interpolate(scores[None], size, mode="bilinear")[0]
    assert torch.equal(class_probabilities(scores), scores)
    assert torch.allclose(best_probability(scores, size), whole.amax(0), atol=1e-6)
    labels = class_labels(scores, size, None, None, background=1, threshold=0.6)
    expected = whole.argmax(0)
    expected[whole.amax(0) < 0.6] = 1
    assert torch.equal(labels, expected)
    # half precision is computed in float32
    assert next(enlarged_strips(scores.bfloat16(), size)).dtype == torch.float32


def test_one_class_and_a_thousand():
    one = torch.rand(1, 3, 3)
    assert class_labels(one, (8, 8), None, 40, 0, 0.9, 0.5).unique().tolist() == [0]
    assert class_labels(one, (8, 8), None, 40, None, 0.9, 0.5).unique().tolist() == [0]
    many = torch.rand(1000, 3, 5, generator=torch.Generator().manual_seed(2))
    owners = torch.arange(1000) // 2
    labels = class_labels(many, (64, 48), owners, 40, 499, 0.02, 0.001)
    whole = class_probabilities(F.interpolate(many[None], (64, 48), mode="bilinear")[0], owners, 40)
    whole[~large_classes(whole.argmax(0), 500, 0.001, 499)] = 0
    expected = torch.where(whole.amax(0) < 0.02, 499, whole.argmax(0))
    assert (labels == expected).float().mean() > 0.999
    assert max(strip.numel() for strip in enlarged_strips(many, (640, 640), 2**20)) <= 2**20


def test_prior_and_maximum():
    cosines, whole = torch.rand(4, 2, 3), torch.rand(4)
    mixed = with_class_prior(cosines, whole, 0.4)
    assert torch.allclose(mixed[2, 1, 1], 0.6 * cosines[2, 1, 1] + 0.4 * whole[2])
    assert class_maximum(torch.tensor([3.0, -1, 2]), torch.tensor([1, 0, 1])).tolist() == [-1, 3]
    with pytest.raises(ValueError, match="3 rows of values, but 2 texts"):
        class_maximum(torch.rand(3), torch.tensor([0, 1]))
