"""Windows over an image: where they lie, cutting and merging, weights. By loops and by construction."""

import numpy as np
import pytest
import torch

from ovss_nb.components.sliding_window import (
    cut_windows,
    even_offsets,
    merge_windows,
    stride_offsets,
    window_corners,
    window_offsets,
    window_weights,
)

# length, window, overlap, step
GRIDS = (
    (1000, 100, 0.3, 16),
    (1000, 999, 0.5, 1),
    (100, 7, 0.9, 1),
    (513, 512, 0.0, 32),
    (5000, 448, 0.25, 32),
)


@pytest.mark.parametrize("length", [1, 2, 7, 20, 37, 40, 53, 60])
def test_even_windows_cover_a_length(length):
    for window in range(1, length + 1):
        offsets = even_offsets(length, window)
        assert offsets[0] == 0 and offsets[-1] + window == length and len(offsets) == -(-length // window)
        steps = [b - a for a, b in zip(offsets, offsets[1:])]
        assert all(0 < step <= window for step in steps) and (not steps or max(steps) - min(steps) <= 1)
        if length % window == 0:
            assert set(steps) <= {window}  # they do not overlap


def test_windows_with_an_overlap_cover_a_length():
    for length in range(1, 60):
        for window in range(1, length + 1):
            for overlap in (0, 0.2, 0.333, 0.5, 0.9):
                offsets = window_offsets(length, window, overlap)
                steps = [b - a for a, b in zip(offsets, offsets[1:])]
                assert offsets[0] == 0 and offsets[-1] + window == length
                assert all(0 < step <= max(1, window * (1 - overlap)) for step in steps)
                assert len(set(steps[:-1])) <= 1  # all but the last are equally far apart


def test_the_overlap_is_that_of_catseg():
    "Truncated as the released code does, unless there is a step: 100 * (1 - 0.9) is 9.999999999999998."
    assert window_offsets(640, 384, 0.333) == [0, 256] and window_offsets(640, 336, 0.333) == [0, 224, 304]
    assert window_offsets(120, 100, 0.9) == [0, 9, 18, 20]
    assert window_offsets(120, 100, 0.9, 1) == [0, 10, 20]


@pytest.mark.parametrize("length, window, overlap, step", GRIDS)
def test_weights_add_up(length, window, overlap, step):
    offsets, total = window_offsets(length, window, overlap, step), np.zeros(length)
    for start, weights in zip(offsets, window_weights(length, offsets, window)):
        assert (weights >= 0).all()
        total[start : start + window] += weights
    assert np.allclose(total, 1)
    assert offsets == sorted(set(offsets)) and all(start % step == 0 for start in offsets[:-1])


@pytest.mark.parametrize("window, stride", [(1, 1), (4, 1), (4, 3), (4, 4), (9, 2)])
def test_published_windows_are_those_of_the_rule(window, stride):
    "rows = max(H - c + t - 1, 0) // t + 1; a window ends at the edge at the latest, and starts at 0."
    for length in range(1, 40):
        expected = []
        for i in range(max(length - window + stride - 1, 0) // stride + 1):
            end = min(i * stride + window, length)
            expected.append(max(end - window, 0))
        assert stride_offsets(length, window, stride) == expected
        covered = {x for start in expected for x in range(start, min(start + window, length))}
        assert covered == set(range(length)) and len(set(expected)) == len(expected)


def test_merging_averages_where_windows_overlap():
    image = torch.arange(2 * 7 * 9.0).view(2, 7, 9)
    corners = window_corners(window_offsets(7, 4, 0.5), even_offsets(9, 4))
    assert torch.allclose(merge_windows(cut_windows(image, corners, 4), corners, (7, 9)), image)
    maps = torch.rand(len(corners), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    merged = merge_windows(iter(maps), corners, (7, 9))
    for y in range(7):
        for x in range(9):
            seen = [
                m[:, y - a, x - b] for m, (a, b) in zip(maps, corners) if 0 <= y - a < 4 and 0 <= x - b < 4
            ]
            assert torch.allclose(merged[:, y, x], torch.stack(seen).mean(0))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: window_offsets(10, 11, 0.1), "does not fit"),
        (lambda: window_offsets(10, 0, 0.1), "does not fit"),
        (lambda: even_offsets(3, 0), "does not fit"),
        (lambda: stride_offsets(9, 3, 4), "leaves gaps"),
        (lambda: stride_offsets(9, 3, 0), "leaves gaps"),
        (lambda: window_offsets(10, 5, 1), "overlap"),
        (lambda: window_offsets(10, 5, -0.1), "overlap"),
        (lambda: window_offsets(10, 5, float("nan")), "overlap"),
        (lambda: window_weights(10, [0, 4], 6, 2), "would leave gaps"),
    ],
)
def test_impossible_windows_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
