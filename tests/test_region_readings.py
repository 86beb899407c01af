"""Readings that look at regions: CorrCLIP and ResCLIP against the authors' numbers and plain loops."""

import math
from dataclasses import replace

import pytest
import torch
from doubles import close, recipe_encoder, recipes_golden, same, small_clip, small_clip_model
from ovss_nb.core.options import OptionError
from ovss_nb.encoders import dense_reading
from ovss_nb.encoders.dense_reading import (
    READINGS,
    DenseReading,
    Source,
    filter_features,
    read_dense,
    residual_filters,
)
from ovss_nb.encoders.base import ImageFeatures
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.encoders.regions import label_affinity


@pytest.mark.parametrize("tag", ["64x64.grid8x8", "64x64.grid16x16", "48x64.grid12x16"])
def test_corrclip_gives_the_authors_numbers(tag):
    tensors, model = recipes_golden("corrclip")
    size, grid = tag.split(".grid")
    grid = tuple(map(int, grid.split("x")))
    encoder = recipe_encoder(tensors, model, size)
    proxy = tensors[f"input.proxy.{tag}"].mT.unflatten(-1, grid)
    regions = tensors[f"input.regions.{tag}"][None]
    features = read_dense(encoder, tensors[f"input.image.{tag}"], "corrclip", proxy, regions).dense
    same(features.flatten(2).mT, tensors[f"expect.dense.{tag}"])
    unit = torch.nn.functional.normalize(features, dim=1)
    logits = torch.tensordot(unit, tensors["input.text"], ([1], [1])).movedim(-1, 1)
    same(logits, tensors[f"expect.logits.{tag}"])


@pytest.mark.parametrize("size", ["64x64", "48x64"])
@pytest.mark.parametrize("base", ["clearclip", "sclip", "resclip"])
def test_residual_attention_gives_the_authors_numbers(size, base):
    tensors, model = recipes_golden("resclip")
    encoder = recipe_encoder(tensors, model, size)
    reading = replace(READINGS[base], residual_mix=(2.0, 0.3))
    features = read_dense(encoder, tensors[f"input.image.{size}"], reading).dense.flatten(2).mT
    same(features, tensors[f"expect.dense.{base}.rcs1_sfr0_del1.{size}"][:, 1:])


def rounded_filters(*arguments):
    "As in the authors' code: the affinity, and its product with the share of 0.7, in half precision."
    filters = residual_filters(*arguments)
    return filters | dict(feedback=(0.7 * filters["feedback"].half()).float() / 0.7)


@pytest.mark.parametrize("size", ["64x64", "48x64"])
@pytest.mark.parametrize("line", ["start", "free"])
def test_label_feedback_gives_the_authors_numbers(size, line, monkeypatch):
    "With their rounding to half precision to 1e-5, without it to 1e-4."
    tensors, model = recipes_golden("resclip")
    encoder, image = recipe_encoder(tensors, model, size), tensors[f"input.image.{size}"]
    reading, labels = replace(READINGS["resclip"], feedback_line=line), tensors[f"expect.patch_labels.{size}"]
    theirs = tensors[f"expect.dense.resclip.rcs1_sfr1_del{int(line == 'start')}.{size}"][:, 1:]
    same(read_dense(encoder, image, reading, labels=labels[None]).dense.flatten(2).mT, theirs, 1e-4)
    monkeypatch.setattr(dense_reading, "residual_filters", rounded_filters)
    same(read_dense(encoder, image, reading, labels=labels[None]).dense.flatten(2).mT, theirs)


def tower(encoder, image):
    "Outputs of open_clip's own blocks for one image, and what enters the first."
    x = encoder.embed(image)
    outputs = [x]
    for block in encoder.visual.transformer.resblocks:
        outputs.append(block(outputs[-1]))
    return [output[0] for output in outputs]


def row_of_values(block, token):
    "Value of one token, through the output projection, without bias of the latter."
    attention, width = block.attn, len(token)
    x = block.ln_1(token)
    return attention.in_proj_weight[2 * width :] @ x + attention.in_proj_bias[2 * width :]


def plain_corrclip(encoder, image, proxy, regions, merge):
    "CorrCLIP's two spatial sources for one image with the proxy's grid equal to CLIP's: place by place."
    outputs, block = tower(encoder, image), encoder.visual.transformer.resblocks[-1]
    channels, height, width = proxy.shape
    unit = [proxy[:, i, j] / proxy[:, i, j].norm() for i in range(height) for j in range(width)]
    count = height * width
    cosines = [[float(unit[i] @ unit[j]) for j in range(count)] for i in range(count)]
    number = [
        int(regions[i * regions.shape[0] // height, j * regions.shape[1] // width])
        for i in range(height)
        for j in range(width)
    ]
    names = sorted(set(number) - {0})
    means = {name: sum(unit[i] for i in range(count) if number[i] == name) for name in names}
    means = {name: mean / mean.norm() for name, mean in means.items()}
    groups = {0: 0}
    for name in names:
        reach = [name]
        for a in reach:  # grows as it goes
            reach += [b for b in names if b not in reach and means[a] @ means[b] >= 0.8]
        groups[name] = min(reach) if merge else name
    number = [groups[name] for name in number]
    average = sum(map(sum, cosines)) / count**2
    layers = len(encoder.visual.transformer.resblocks)
    first, last = 5 * layers // 12, min(9 * layers // 12, layers - 2)
    middle = sum(outputs[i + 1] for i in range(first, last + 1)) / (last - first + 1)
    total = 0
    for source in (outputs[layers - 1], middle):
        values = [row_of_values(block, source[1 + i]) for i in range(count)]
        rows = []
        for i in range(count):
            weights = []
            for j in range(count):
                scoped = number[i] == number[j] != 0 or i == j
                free = 0 in (number[i], number[j]) and cosines[i][j] > average
                weights.append(math.exp(4 * cosines[i][j]) if scoped or free else 0.0)
            mixed = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
            rows.append(block.attn.out_proj.weight @ mixed + block.attn.out_proj.bias)
        total = total + encoder.project(torch.stack(rows))
    return total.T.unflatten(-1, (height, width))


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
@pytest.mark.parametrize("layers, merge", [(4, None), (12, 0.2)])
def test_corrclip_by_hand(grid, layers, merge):
    encoder = small_clip(layers=layers, quick_gelu=False)
    torch.manual_seed(3)
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    regions = torch.randint(0, 5, (2, 11, 17))
    proxy = torch.randn(2, 6, *grid) / 2 + torch.randn(2, 6, 1, 1)
    sources = READINGS["corrclip"].sources[:2]  # the third is that of regions, see their own tests
    reading = replace(READINGS["corrclip"], sources=sources, merge=merge)
    ours = read_dense(encoder, images, reading, proxy, regions).dense
    for item in range(2):
        theirs = plain_corrclip(encoder, images[item : item + 1], proxy[item], regions[item], merge)
        same(ours[item], theirs)


def plain_resclip(encoder, image, labels):
    "ResCLIP's second pass for one image, pair by pair; `labels` is the affinity, divided by its maximum."
    outputs, blocks = tower(encoder, image), encoder.visual.transformer.resblocks
    heads, width = encoder.heads, encoder.width
    size = width // heads
    height, columns = (side // 16 for side in image.shape[2:])

    def parts(block, tokens):
        x = block.attn.in_proj_weight @ block.ln_1(tokens).T + block.attn.in_proj_bias[:, None]
        return x[:width].T, x[width : 2 * width].T, x[2 * width :].T

    def softmax(scores):
        exponents = [math.exp(score) for score in scores]
        return [exponent / sum(exponents) for exponent in exponents]

    count, layers = height * columns + 1, len(blocks)
    chosen = range(5 * layers // 12, 8 * layers // 12 + 1)
    _, k, v = parts(blocks[-1], outputs[layers - 1])
    said = []
    for i in range(count):
        row = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = []
            for j in range(count):
                score, near = 2.1 * 0.3 * float(k[i, part] @ k[j, part]) / size**0.5, 0.0
                if i and j:
                    (a, b), (c, d) = divmod(i - 1, columns), divmod(j - 1, columns)
                    near = math.exp(-((a - c) ** 2 + (b - d) ** 2) / 50)
                    score += 2.1 * 0.7 * float(labels[i - 1, j - 1])
                scores.append(score + near)
            weights = softmax(scores)
            for block in chosen:
                q, other, _ = parts(blocks[block], outputs[block])
                plain = softmax([float(q[i, part] @ other[j, part]) / size**0.5 for j in range(count)])
                weights = [w + 0.3 / 0.7 * p / len(chosen) for w, p in zip(weights, plain)]
            row.append(sum(2 * 0.7 * weight * v[j, part] for j, weight in enumerate(weights)))
        said.append(torch.cat(row))
    block = blocks[-1]
    tokens = torch.stack(said) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    return encoder.project(tokens)[1:].T.unflatten(-1, (height, columns))


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_resclip_by_hand(grid):
    encoder = small_clip(layers=4)
    torch.manual_seed(4)
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    labels = torch.randint(0, 3, (2, *grid))
    ours = read_dense(
        encoder, images, replace(READINGS["resclip"], feedback_line="whole"), labels=labels
    ).dense
    for item in range(2):
        affinity = label_affinity(labels[item : item + 1])[0]
        same(ours[item], plain_resclip(encoder, images[item : item + 1], affinity / affinity.max()))


@pytest.mark.parametrize("name", ["corrclip", "resclip"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_batch_is_single_images_and_half_precision_agrees(name, size):
    torch.manual_seed(5)
    images = torch.randn(3, 3, *size)
    given = dict(proxy=torch.randn(3, 8, 7, 9), regions=torch.randint(0, 6, (3, 31, 20)))
    if name == "resclip":
        given = dict(labels=torch.randint(0, 3, (3, size[0] // 16, size[1] // 16)))
    encoder = small_clip()
    together = read_dense(encoder, images, name, **given)
    for item in range(3):
        one = {key: value[item : item + 1] for key, value in given.items()}
        same(together.dense[item : item + 1], read_dense(encoder, images[item : item + 1], name, **one).dense)
    half = CLIPEncoder(small_clip_model(), precision="bf16", device="cpu")
    rough = read_dense(half, images, name, **given).dense.float()
    words = torch.randn(5, 24)
    labels, others = (torch.einsum("kd,bdhw->bkhw", words, x).argmax(1) for x in (together.dense, rough))
    assert (labels == others).float().mean() > 0.9


def test_regions_limit_the_filter_of_finished_features_too():
    torch.manual_seed(6)
    features = ImageFeatures(torch.randn(1, 5, 4, 6), torch.randn(1, 5))
    regions = torch.zeros(1, 4, 6, dtype=torch.int32)
    regions[:, :, :3], regions[:, :, 3:] = 1, 2
    proxy = torch.randn(1, 8, 4, 6)
    changed = features.dense.clone()
    changed[..., 3:] += 1
    reading = replace(READINGS["corrclip"], merge=None)
    before, after = (
        filter_features(ImageFeatures(dense, features.pooled), reading, proxy, regions).dense
        for dense in (features.dense, changed)
    )
    close(before[..., :3], after[..., :3], 1e-6)
    close(before[..., 3:] + 1, after[..., 3:], 1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(terms=("proxy",), merge=0.2), "merge.*scope='all'"),
        (dict(terms=("middle",), scope="regions", merge=0.2), "merge=0.2 and terms=.*the proxy says"),
        (dict(sources=(Source(), Source(regions=True))), "source of regions.*scope='regions'"),
        (dict(residual_mix=(2.0, 0.3)), "residual_mix.*terms=.'identity',."),
        (dict(terms=("proxy",), feedback=(2.0, 0.3)), "feedback.*terms=.'proxy',."),
        (dict(terms=("kk",), feedback=(2.0, 1.3)), "share from 0 to 1"),
        (dict(terms=("kk",), residual_mix=(2.0, 0.3), residual_blocks=(8, 5)), "before they begin"),
    ],
)
def test_options_that_disagree_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        DenseReading(**options)


def test_missing_or_unfit_regions_are_said():
    encoder, images, proxy = small_clip(), torch.randn(1, 3, 64, 64), torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="needs regions"):
        read_dense(encoder, images, "corrclip", proxy)
    with pytest.raises(ValueError, match="B x H x W"):
        read_dense(encoder, images, "corrclip", proxy, torch.zeros(64, 64, dtype=int))
    with pytest.raises(ValueError, match="integers from 0"):
        read_dense(encoder, images, "corrclip", proxy, torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="labels.*feedback"):
        read_dense(encoder, images, "clearclip", labels=torch.ones(1, 4, 4, dtype=int))
    with pytest.raises(ValueError, match="one map for each of 1"):
        read_dense(encoder, images, "resclip", labels=torch.ones(2, 4, 4, dtype=int))
    everywhere = torch.ones(1, 64, 64, dtype=torch.uint8)  # one region is no region too many
    assert read_dense(encoder, images, "corrclip", proxy, everywhere).dense.isfinite().all()
    nowhere = torch.zeros(1, 5, 3, dtype=torch.uint16)
    assert read_dense(encoder, images, "corrclip", proxy, nowhere).dense.isfinite().all()
