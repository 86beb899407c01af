"""Regions on the grid of a ViT: clusters and region tokens of CorrCLIP, label affinity of ResCLIP; the
authors' numbers, and plain loops."""

import math

import pytest
import torch
from doubles import close, randomize, recipe_encoder, recipes_golden, same
from open_clip.transformer import VisionTransformer
from ovss_nb.encoders.attention import add_mlp, attend, qkv_heads
from ovss_nb.encoders.regions import (
    allowed_pairs,
    label_affinity,
    merge_regions,
    patch_labels,
    region_tokens,
    regions_on_grid,
)
from torch.nn import functional as F

CASES = {"64x64": [(8, 8), (16, 16)], "48x64": [(12, 16)]}


@pytest.mark.parametrize("size, grid", [(size, grid) for size in CASES for grid in CASES[size]])
def test_merged_regions_are_corrclips(size, grid):
    tensors, _ = recipes_golden("corrclip")
    tag = f"{size}.grid{grid[0]}x{grid[1]}"
    regions = regions_on_grid(tensors[f"input.regions.{tag}"][None], grid)
    merged = merge_regions(regions, tensors[f"input.proxy.{tag}"].mT.unflatten(-1, grid))
    clusters = tensors[f"check.cluster.{tag}"]  # of regions 1.. in increasing order
    for number, cluster in enumerate(clusters.tolist(), 1):
        assert (merged[regions == number] == cluster + 1).all()
    assert (merged[regions == 0] == 0).all()


def small_tower(layers=3):
    tower = VisionTransformer(64, 16, 16, layers, 2, mlp_ratio=2.0, output_dim=8)
    return list(randomize(tower).transformer.resblocks)


def block_inputs(blocks, x):
    inputs = []
    for block in blocks:
        inputs.append(x)
        x = block(x)
    return inputs


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_region_tokens_are_those_of_one_masked_sequence(grid):
    "As the paper tells it: copies in front of the tokens of one image, and a mask over all of them."
    blocks, count = small_tower(), grid[0] * grid[1]
    torch.manual_seed(1)
    x = torch.randn(2, 1 + count, 16)
    regions = torch.randint(0, 4, (2, *grid))
    ours = region_tokens(blocks, block_inputs(blocks, x), regions)
    for item in range(2):
        numbers = regions[item].unique().tolist()
        tokens = torch.cat([x[item, :1]] * len(numbers) + [x[item]])[None]
        seen = torch.zeros(len(tokens[0]), len(tokens[0]), dtype=torch.bool)
        for i in range(len(tokens[0])):
            for j in range(len(numbers), len(tokens[0])):
                patch = j - len(numbers) - 1
                if i >= len(numbers) or patch < 0:
                    seen[i, j] = True
                else:
                    seen[i, j] = regions[item].flatten()[patch] == numbers[i]
        bias = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, -math.inf)
        for block in blocks:
            tokens = add_mlp(block, tokens + attend(block, *qkv_heads(block, tokens), bias))
        for row in range(grid[0]):
            for column in range(grid[1]):
                copy = tokens[0, numbers.index(int(regions[item, row, column]))]
                close(ours[item, :, row, column], copy, 1e-5)


def test_allowed_pairs_by_hand():
    torch.manual_seed(2)
    regions = torch.tensor([[[0, 1, 1], [2, 0, 1]], [[1, 1, 1], [1, 1, 3]]])
    similarity = torch.rand(2, 6, 6)
    similarity = (similarity + similarity.mT) / 2
    ours = allowed_pairs(similarity, regions)
    for item in range(2):
        flat = regions[item].flatten().tolist()
        for i in range(6):
            for j in range(6):
                expected = i == j or flat[i] == flat[j] != 0
                if 0 in (flat[i], flat[j]):
                    expected = expected or bool(similarity[item, i, j] > similarity[item].mean())
                assert bool(ours[item, i, j]) == expected


@pytest.mark.parametrize("shape", [(37, 50), (3, 2), (8, 8)])
def test_regions_of_any_size_come_to_the_grid(shape):
    regions = torch.arange(shape[0] * shape[1]).view(1, *shape).to(torch.int32)
    ours = regions_on_grid(regions, (4, 6))
    for row in range(4):
        for column in range(6):
            assert ours[0, row, column] == regions[0, row * shape[0] // 4, column * shape[1] // 6]


@pytest.mark.parametrize("size", ["64x64", "48x64"])
@pytest.mark.parametrize("line", ["start", "free"])
def test_label_affinity_is_resclips(size, line):
    tensors, _ = recipes_golden("resclip")
    ours = label_affinity(tensors[f"expect.patch_labels.{size}"][None], line=line)[0]
    theirs = tensors[f"expect.sfr.del{int(line == 'start')}.{size}"]
    same(ours, theirs[1:, 1:])
    assert not theirs[0].any() and not theirs[:, 0].any()


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (1, 5)])
@pytest.mark.parametrize("line", ["whole", "start", "free"])
def test_label_affinity_by_hand(shape, line):
    "Every pair of patches by itself; the row is smoothed along the flattened index, with zeros beyond."
    torch.manual_seed(3)
    labels = torch.randint(0, 2, (2, *shape))
    ours = label_affinity(labels, 1.0, line)
    height, width = shape
    count, last = height * width, max(shape) - 1
    for item in range(2):
        raw = [[0.0] * count for _ in range(count)]
        for i in range(count):
            for j in range(count):
                (a, b), (c, d) = divmod(i, width), divmod(j, width)
                if labels[item, a, b] != labels[item, c, d]:
                    continue
                distance = max(abs(a - c), abs(b - d))
                raw[i][j] = 1.0
                for step in range(last + 1 if line == "whole" else distance + 1):
                    share = torch.linspace(0, 1, last + 1)[step]
                    row, column = (round(float(p * (1 - share) + q * share)) for p, q in ((a, c), (b, d)))
                    if labels[item, row, column] != labels[item, a, b] and line != "free":
                        raw[i][j] = math.exp(-distance / last)
        radius = (min(count, 7) // 2 * 2 + 1) // 2
        for i in range(count):
            row = [
                sum(
                    raw[i][j + k] * math.exp(-(k**2) / 2)
                    for k in range(-radius, radius + 1)
                    if 0 <= j + k < count
                )
                for j in range(count)
            ]
            close(ours[item, i], torch.tensor(row) / sum(row), 1e-5)


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_first_answer_gives_resclips_labels(size):
    "With PAMR in plain steps, since refinement lies above the encoders."
    tensors, model = recipes_golden("resclip")
    encoder = recipe_encoder(tensors, model, size)
    image, grid = tensors[f"input.image.{size}"], tuple(side // 8 for side in map(int, size.split("x")))
    blocks = list(encoder.blocks)
    inputs = block_inputs(blocks, encoder.embed(image))
    residual = 0
    for block, tokens in zip(blocks[5:9], inputs[5:9]):
        q, k = qkv_heads(block, tokens, "qk")
        residual = residual + (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) / 4
    _, k, v = qkv_heads(blocks[-1], inputs[-1])
    row, column = (x.flatten().float() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    near = (-((row[:, None] - row) ** 2 + (column[:, None] - column) ** 2) / 50).exp()
    weights = (k @ k.mT * k.shape[-1] ** -0.5 + F.pad(near, (1, 0, 1, 0))).softmax(-1)
    mixed = 2 * (0.7 * weights + 0.3 * residual) @ v
    tokens = encoder.project(blocks[-1].attn.out_proj(mixed.transpose(1, 2).flatten(2)))[:, 1:]
    cosines = (F.normalize(tokens, dim=-1) @ tensors["input.text"].T).mT.unflatten(-1, grid)
    maps = F.interpolate(cosines, image.shape[2:], mode="bilinear", align_corners=False)
    probabilities = (40 * plain_pamr(image, maps, 10, (8, 16))).softmax(1)
    labels = patch_labels(probabilities, grid, 0.55)
    assert labels[0].equal(tensors[f"expect.patch_labels.{size}"])


def plain_pamr(image, maps, iterations, dilations):
    "Pixel-adaptive refinement (Araslanov and Roth 2020): weights from colors, centers left out."

    def neighbors(x, center):
        shifted = []
        for dilation in dilations:
            padded = F.pad(x, (dilation,) * 4, mode="replicate")
            for down in (0, dilation, 2 * dilation):
                for right in (0, dilation, 2 * dilation):
                    if center or (down, right) != (dilation, dilation):
                        shifted.append(padded[..., down : down + x.shape[2], right : right + x.shape[3]])
        return torch.stack(shifted, 2)

    deviation = neighbors(image, True).std(2, keepdim=True)
    distance = (neighbors(image, False) - image[:, :, None]).abs() / (1e-8 + 0.1 * deviation)
    weights = (-distance.mean(1, keepdim=True)).softmax(2)
    for _ in range(iterations):
        maps = (weights * neighbors(maps, False)).sum(2)
    return maps
