"""Filters against loops over rows, and what a rule does at its limits."""

import math

import pytest
import torch
from doubles import close
from ovss_nb.encoders.filters import (
    apply_filter,
    cosine,
    cut,
    nearest_pairs,
    neighbor_pairs,
    neighbor_prior,
    power,
    read_rule,
    same_region,
    sharp,
    shift,
    uniform,
)


def features(batch=2, count=7, width=5, seed=0):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def rows_of(similarity, weight):
    "A table of weights from a function of a row, its item and the allowed columns."
    return torch.stack([torch.tensor([weight(item, row) for row in item]) for item in similarity.tolist()])


def softmax(logits):
    "Of a list in which None takes no part."
    largest = max(x for x in logits if x is not None)
    exponents = [0.0 if x is None else math.exp(x - largest) for x in logits]
    return [x / sum(exponents) for x in exponents]


def mean(rows):
    return sum(map(sum, rows)) / sum(map(len, rows))


def test_cosine_by_hand():
    x = features()
    ours = cosine(x)
    for i in range(7):
        for j in range(7):
            a, b = x[1, i].tolist(), x[1, j].tolist()
            dot = sum(p * q for p, q in zip(a, b))
            expected = dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
            assert abs(ours[1, i, j] - expected) < 1e-6


@pytest.mark.parametrize("per", ["image", "batch", "row"])
def test_shift_by_hand(per):
    similarity = cosine(features())
    whole = mean([row for item in similarity.tolist() for row in item])

    def weight(item, row):
        average = {"image": mean(item), "batch": whole, "row": mean([row])}[per]
        logits = [(x - 1.2 * average) * 3 for x in row]
        return softmax([x if x >= 0 else None for x in logits])

    close(shift(similarity, per=per), rows_of(similarity, weight), 1e-6)


def test_shift_with_small_ones_at_zero_by_hand():
    similarity = cosine(features())

    def weight(item, row):
        item, row = ([[x if x >= 0.4 else 0 for x in r] for r in rows] for rows in (item, [row]))
        logits = [(x - mean(item)) * 3 for x in row[0]]
        return softmax([x if x >= 0 else None for x in logits])

    close(shift(similarity, 1, 3, zero_below=0.4), rows_of(similarity, weight), 1e-6)


def test_cut_power_and_sharp_by_hand():
    similarity = cosine(features())

    def kept(item, row):
        row = [x if x >= 0.4 else 0.0 for x in row]
        return [x / (sum(row) + 1e-6) for x in row]

    def cubes(item, row):
        row = [max(x, 0) ** 3 for x in row]
        return [x / sum(row) for x in row]

    close(cut(similarity), rows_of(similarity, kept), 1e-6)
    close(power(similarity), rows_of(similarity, cubes), 1e-6)
    close(sharp(similarity), rows_of(similarity, lambda item, row: softmax([4 * x for x in row])), 1e-6)
    close(cut(similarity, 0.4, False), similarity * (similarity >= 0.4), 0)


@pytest.mark.parametrize("rule", [shift, cut, sharp, power, uniform])
def test_scopes_shut_out(rule):
    similarity = cosine(features())
    allowed = same_region(torch.tensor([[1, 1, 2, 2, 2, 0, 1], [3, 0, 3, 0, 1, 1, 1]]))
    weights = rule(similarity, allowed=allowed)
    assert weights[~allowed].abs().max() == 0
    close(weights.sum(-1), torch.ones(2, 7), 1e-5)


def test_a_row_without_friends_looks_at_itself():
    far = torch.eye(4)[None] * 0.1
    close(shift(far, beta=50), torch.eye(4)[None], 0)


def test_batch_is_single_images():
    similarity = cosine(features(3))
    for text in ("shift", "cut:0.2", "sharp:9", "power:2", "uniform", "shift:0.8:5:row"):
        together = read_rule(text)(similarity)
        close(together, torch.cat([read_rule(text)(one[None]) for one in similarity]), 1e-6)


def test_scopes_by_hand():
    grid, similarity = (3, 4), cosine(features(1, 12))
    near, best = neighbor_pairs(grid, 1), nearest_pairs(similarity, 3)[0]
    for i in range(12):
        for j in range(12):
            rows, columns = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
            assert near[i, j] == (rows <= 1 and columns <= 1)
            assert best[i, j] == (sorted(similarity[0, i].tolist())[-3] <= similarity[0, i, j])
    assert nearest_pairs(similarity, 99).all()


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_prior_by_hand(grid):
    prior, count = neighbor_prior(grid, 1.5, class_token=True), grid[0] * grid[1]
    for i in range(count):
        for j in range(count):
            rows, columns = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
            assert abs(prior[1 + i, 1 + j] - math.exp(-(rows**2 + columns**2) / (2 * 1.5**2))) < 1e-6
    assert prior[0].abs().sum() == prior[:, 0].abs().sum() == 0
    with torch.inference_mode():
        kept = neighbor_prior((grid[0], 7), 1.5)
    assert not kept.is_inference()  # it may be asked for in training next


def test_half_precision_keeps_decisions():
    x = features(1, 50, 64)
    apart = (cosine(x) - cosine(x.bfloat16())).abs().max()
    assert apart < 0.01
    assert apply_filter(cut(cosine(x)), x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text, message",
    [
        ("shfit", "did you mean 'shift'"),
        ("shift:a", "looks like"),
        ("shift:1:2:3:4:5:6", "looks like"),
        ("shift:1.2:nan", "looks like"),
        ("shift:per=window", "looks like"),
        ("cut:normalize=maybe", "looks like"),
        ("sharp:tow=3", "looks like"),
        ("sharp:-4", "looks like"),
        ("shift:1:gamma=-3", "looks like"),
        ("shift:1:beta=2", "looks like"),
    ],
)
def test_rules_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        read_rule(text)
