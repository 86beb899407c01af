"""Outliers and their repair against loops, and against the numbers of SC-CLIP, SFP and RF-CLIP."""

import math

import pytest
import torch
from doubles import close, recipe_encoder, recipes_golden, same, small_clip
from ovss_nb.encoders.dense_reading import DenseReading, run_tower
from ovss_nb.encoders.token_repair import (
    channel_outliers,
    known_channels,
    lof_outliers,
    lof_scores,
    norm_outliers,
    repair,
    smooth,
    som_outliers,
)


def tokens(batch=2, count=15, width=6, seed=0):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


class Outliers(torch.nn.Module):
    def forward(self, x):
        return lof_outliers(x)


def plain_lof(points, k):
    "Local outlier factors with squared distances and a point's own reach."
    distance = [[sum((a - b) ** 2 for a, b in zip(p, q)) for q in points] for p in points]
    near = [
        sorted((j for j in range(len(points)) if j != i), key=lambda j: distance[i][j])[:k]
        for i in range(len(points))
    ]
    density = []
    for i, friends in enumerate(near):
        reach = [max(distance[i][j], distance[i][friends[-1]]) for j in friends]
        density.append(k / sum(reach))
    return [sum(density[j] for j in friends) / k / density[i] for i, friends in enumerate(near)]


def test_lof_by_hand():
    x = tokens()
    for one, scores in zip(x.tolist(), lof_scores(x, 4)):
        close(scores, torch.tensor(plain_lof(one, 4)), 1e-4)
    few = tokens(1, 9)  # not more than 30, so half are neighbors
    close(lof_scores(few)[0], torch.tensor(plain_lof(few[0].tolist(), 4)), 1e-4)


def test_lof_writes_into_nothing_so_that_it_can_be_a_graph():
    program = torch.export.export(Outliers(), (tokens(1, 40),))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any("fill_." in name or "copy_." in name for name in names)
    x = tokens(1, 40, seed=3)
    assert torch.equal(program.module()(x), lof_outliers(x))


def test_lof_takes_the_highest_share():
    x = tokens(3, 200)
    bad, scores = lof_outliers(x), lof_scores(x)
    assert bad.sum(1).tolist() == [10, 10, 10]
    assert all(scores[i][bad[i]].min() > scores[i][~bad[i]].max() for i in range(3))
    close(lof_outliers(x[1:2]).int(), bad[1:2].int(), 0)
    assert not lof_outliers(tokens(1, 2)).any()


@pytest.mark.parametrize("size", ["64x64", "56x56"])
def test_lof_and_repair_give_the_authors_numbers(size):
    tensors, model = recipes_golden("scclip")
    encoder = recipe_encoder(tensors, model, size)
    tower = run_tower(encoder, tensors[f"input.image.{size}"], DenseReading())
    patches = tower.last[:, 1:]
    same(lof_scores(patches)[0], tensors[f"expect.lof.{size}"])
    bad = lof_outliers(patches)
    assert bad[0].nonzero()[:, 0].tolist() == tensors[f"expect.outliers.{size}"].tolist()
    mended = repair(patches, bad, tower.grid).mT.unflatten(-1, tower.grid)
    same(mended, tensors[f"expect.repaired.{size}"])


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_channels_give_the_authors_numbers(size):
    tensors, model = recipes_golden("rfclip")
    encoder = recipe_encoder(tensors, model, size)
    image = tensors[f"input.image.{size}"]
    x = encoder.blocks[0](encoder.embed(image))
    bad = channel_outliers(x[:, 1:], [1, 5, 11, 20, 26], 1.9)
    mended = torch.cat([x[:, :1], smooth(x[:, 1:], bad, encoder.grid(image))], 1)
    same(mended, tensors[f"expect.denoised_block1.{size}"])


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 15)])
def test_repair_by_hand(grid):
    x, (height, width) = tokens(1), grid
    bad = torch.rand(1, 15, generator=torch.Generator().manual_seed(1)) > 0.5
    mended, mixed = repair(x, bad, grid)[0], smooth(x, bad, grid, 0.4)[0]
    for i in range(15):
        good, around = [], torch.zeros(6)
        for row in range(i // width - 1, i // width + 2):
            for column in range(i % width - 1, i % width + 2):
                if 0 <= row < height and 0 <= column < width:
                    around += x[0, row * width + column]
                    if not bad[0, row * width + column]:
                        good.append(x[0, row * width + column])
        keep = not bad[0, i]
        close(mended[i], x[0, i] if keep or not good else sum(good) / len(good), 1e-5)
        close(mixed[i], x[0, i] if keep else 0.6 * x[0, i] + 0.4 * around / 9, 1e-5)


def test_som_by_hand():
    encoder = small_clip()
    torch.manual_seed(2)
    x, block = torch.randn(1, 17, 32), encoder.blocks[2]
    normed = block.ln_1(x)
    weights = block.attn(normed, normed, normed, average_attn_weights=True)[1][0]
    suspects = [i for i in range(1, 17) if 1.5 * weights[0, i] > weights[i, i]]
    best = sorted(suspects, key=lambda i: -weights[0, i])[:3]
    assert [1 + i for i in som_outliers(block, x, most=3)[0].nonzero()[:, 0].tolist()] == sorted(best)


def test_norm_and_channels_by_hand():
    x = tokens(1)
    lengths = [math.sqrt(sum(v * v for v in row)) for row in x[0].tolist()]
    longest = sorted(range(15), key=lambda i: -lengths[i])[:4]
    assert norm_outliers(x, 4)[0].nonzero()[:, 0].tolist() == sorted(longest)
    for i, row in enumerate(x[0].tolist()):
        raised = [v - min(row) for v in row]
        expected = any(raised[c] / sum(raised) > 1.8 / 6 for c in (0, 4))
        assert channel_outliers(x, (0, 4), 1.8)[0, i] == expected


def test_channels_that_are_not_known():
    assert len(known_channels((), 1024)) == 8
    with pytest.raises(ValueError, match="no outlier channels are known for tokens of 32"):
        known_channels((), 32)
    with pytest.raises(ValueError, match="the last channel of these tokens, 31"):
        known_channels((40,), 32)
