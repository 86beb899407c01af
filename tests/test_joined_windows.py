"""Windows of one image that see each other: Trident and GLA-CLIP, the authors' numbers and plain loops."""

import math

import pytest
import torch
from doubles import CLIPEncoder, close, recipes_golden, same, small_clip
from ovss_nb.components.sliding_window import merge_windows
from ovss_nb.core.options import OptionError
from ovss_nb.encoders.dense_reading import DenseReading, read_dense
from ovss_nb.encoders.joined_windows import (
    attention_filter,
    image_filter,
    proxy_anchors,
    read_windows,
    sam_heads,
    shared_filter,
    spread,
)
from ovss_nb.encoders.proxy import EncoderProxy
from ovss_nb.encoders.sam import SAMEncoder

SETTINGS = [(0.0, True), (1.2, False), (1.2, True), (3.0, False)]


def trident_canvas(tensors, encoder):
    "Features of the six windows, and spliced."
    corners = [(8 * top, 8 * left) for top, left, _, _ in tensors["input.window_coords"].tolist()]
    windows = torch.cat([tensors["input.image"][..., y : y + 64, x : x + 64] for y, x in corners])
    # the authors' mean goes over all windows of a batch
    reading = DenseReading(("proxy",), proxy_rule="shift:1.2:3:batch")
    features = read_dense(encoder, windows, reading, tensors["input.proxy"], project=False).dense
    return features, merge_windows(features[:, None], [(y // 8, x // 8) for y, x in corners], (12, 16))


@pytest.mark.parametrize("factor, keep", SETTINGS)
def test_trident_gives_the_authors_numbers(factor, keep):
    tensors, model = recipes_golden("trident")
    encoder = CLIPEncoder(model, device="cpu")
    features, canvas = trident_canvas(tensors, encoder)
    same(features.flatten(2).mT, tensors["expect.window_features"])
    values = tensors["input.sam_v"].flatten(2, 3)
    weights = attention_filter(values, tensors["input.sam_attention"], factor, keep)
    same(weights[0], tensors[f"expect.global_weights.cos{factor}_refine{int(keep)}"])
    dense = spread(encoder, canvas, weights, (6, 8))
    same(dense.flatten(2).mT, tensors[f"expect.dense.cos{factor}_refine{int(keep)}"])


@pytest.mark.parametrize("factor, keep", SETTINGS)
def test_attention_filter_by_hand(factor, keep):
    torch.manual_seed(0)
    heads, count = 3, 10
    values = torch.randn(2, heads, count, 4) + torch.randn(2, heads, 1, 4)
    attention = torch.randn(2, heads, count, count).softmax(-1)
    ours = attention_filter(values, attention, factor, keep)
    for item in range(2):
        cosines = [
            [[float(torch.cosine_similarity(a, b, dim=0)) for b in head] for a in head]
            for head in values[item]
        ]
        for i in range(count):
            threshold = factor * sum(sum(cosines[h][i]) for h in range(heads)) / (heads * count)
            if threshold < 0 and not keep:
                threshold = 0.6
            threshold, row = min(threshold, 0.9), []
            for j in range(count):
                passed = [
                    float(attention[item, h, i, j]) * (cosines[h][i][j] > threshold) for h in range(heads)
                ]
                row.append(sum(passed))
            close(ours[item, i], torch.tensor(row) / sum(row), 1e-5)


def plain_proxyclip(cosines, beta, gamma):
    "Weights of one image, pair by pair."
    count = len(cosines)
    mean = sum(map(sum, cosines)) / count**2
    rows = []
    for row in cosines:
        scores = [gamma * (cosine - beta * mean) for cosine in row]
        best = max(scores)
        exponents = [math.exp(score) if score >= 0 or score == best < 0 else 0.0 for score in scores]
        rows.append([exponent / sum(exponents) for exponent in exponents])
    return rows


def test_trident_by_hand_on_windows_that_are_not_square():
    "Two windows of 3 x 2 patches, spliced to 3 x 3, spread over a grid of 2 x 4."
    encoder = small_clip()
    torch.manual_seed(1)
    image, proxy = torch.randn(1, 3, 48, 48), torch.randn(2, 6, 3, 2)
    windows = torch.cat([image[..., :32], image[..., 16:]])
    values, attention = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 8).softmax(-1)
    features = read_dense(encoder, windows, "trident", proxy, project=False).dense
    canvas = merge_windows(features[:, None], [(0, 0), (0, 1)], (3, 3))
    weights = attention_filter(values, attention)
    ours = spread(encoder, canvas, weights, (2, 4))

    block, total = encoder.visual.transformer.resblocks[-1], {}
    for number in range(2):
        x = encoder.embed(windows[number : number + 1])
        for other in encoder.visual.transformer.resblocks[:-1]:
            x = other(x)
        width = x.shape[-1]
        unit = [proxy[number, :, i, j] / proxy[number, :, i, j].norm() for i in range(3) for j in range(2)]
        rows = plain_proxyclip([[float(a @ b) for b in unit] for a in unit], 1.2, 3.0)
        said = [
            block.attn.in_proj_weight[2 * width :] @ block.ln_1(token) + block.attn.in_proj_bias[2 * width :]
            for token in x[0, 1:]
        ]
        for i in range(3):
            for j in range(2):
                mixed = sum(weight * value for weight, value in zip(rows[2 * i + j], said))
                mixed = block.attn.out_proj.weight @ mixed + block.attn.out_proj.bias
                total.setdefault((i, j + number), []).append(mixed)
    spliced = torch.stack([sum(total[i, j]) / len(total[i, j]) for i in range(3) for j in range(3)])
    spliced = spliced.T.unflatten(-1, (3, 3))[None]
    resized = torch.nn.functional.interpolate(spliced, (2, 4), mode="bilinear")[0].flatten(1).T
    for i in range(8):
        mixed = sum(float(weights[0, i, j]) * resized[j] for j in range(8))
        close(ours[0, :, i // 4, i % 4], encoder.project(mixed), 1e-4)


def test_heads_are_those_of_sams_attention():
    modeling = pytest.importorskip("segment_anything.modeling")
    torch.manual_seed(2)
    network = modeling.ImageEncoderViT(
        128,
        16,
        embed_dim=24,
        depth=3,
        num_heads=3,
        out_chans=8,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(2,),
    )
    for table in (network.blocks[2].attn.rel_pos_h, network.blocks[2].attn.rel_pos_w):
        torch.nn.init.normal_(table)
    encoder = SAMEncoder(network, size=128, device="cpu")
    for size in ((128, 128), (64, 112)):  # the size of its tables, and another one
        images = torch.randn(2, 3, *size)
        grid = (size[0] // 16, size[1] // 16)
        values, attention = sam_heads(encoder, images)
        said = torch.cat([weights @ value for weights, value in zip(attention, values.unbind(1))], -1)
        x = encoder.embed(images)
        for block in encoder.blocks[:2]:
            x = block(x)
        last = encoder.blocks[2]
        close(last.attn.proj(said).unflatten(1, grid), last.attn(last.norm1(x)), 1e-4)


def test_filter_of_an_image_by_sam_is_that_of_its_heads():
    modeling = pytest.importorskip("segment_anything.modeling")
    torch.manual_seed(5)
    network = modeling.ImageEncoderViT(64, 16, embed_dim=24, depth=2, num_heads=3, out_chans=8)
    encoder = SAMEncoder(network, size=64, device="cpu")
    pixels = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    weights, grid = image_filter(EncoderProxy(encoder), pixels, factor=1.0)
    assert grid == (3, 4)
    images = encoder.scale_colors(pixels.float())
    close(weights, attention_filter(*sam_heads(encoder, images), 1.0), 1e-4)
    larger, _ = image_filter(EncoderProxy(encoder), pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert larger.shape == weights.shape  # the longer side has the encoder's size
    with pytest.raises(ValueError, match="pixels_of"):
        image_filter(EncoderProxy(encoder), images)


GLA = {
    "full": dict(),
    "anchor": dict(adaptive=False),
    "kv_only": dict(adaptive=False, rounds=0),
}


@pytest.mark.parametrize("name", GLA)
def test_gla_clip_gives_the_authors_numbers(name):
    tensors, model = recipes_golden("gla_clip")
    encoder, image = CLIPEncoder(model, device="cpu"), tensors["input.image"]
    windows = torch.cat([image[..., :64], image[..., 32:]])
    dense = read_windows(encoder, windows, tensors["input.proxy"], **GLA[name]).dense
    same(dense.flatten(2).mT, tensors[f"expect.dense.{name}"])


def test_gla_clip_alone_gives_the_authors_numbers():
    tensors, model = recipes_golden("gla_clip")
    encoder, image = CLIPEncoder(model, device="cpu"), tensors["input.image"]
    windows = torch.cat([image[..., :64], image[..., 32:]])
    dense = read_dense(encoder, windows, "proxyclip", tensors["input.proxy"]).dense
    same(dense.flatten(2).mT, tensors["expect.dense.local"])


@pytest.mark.parametrize("windows, grid", [(1, (3, 3)), (3, (2, 4))])
def test_shared_filter_by_hand(windows, grid):
    torch.manual_seed(3)
    proxy = torch.randn(windows, 4, *grid) + torch.randn(1, 4, 1, 1)
    ours = shared_filter(proxy)
    keys = [proxy[w, :, i, j] for w in range(windows) for i in range(grid[0]) for j in range(grid[1])]
    keys = [key / key.norm() for key in keys]
    for number, query in enumerate(keys):
        count = 0
        for _ in range(2):
            likes = [key for key in keys if query @ key > 0.55]
            count = len(likes)
            query = sum(likes) / sum(likes).norm()
        row = [float(query @ key) for key in keys]
        mean = max(0.0, sum(row) / len(row))
        scores = [(cosine - mean * (1 + 0.3 * math.log(1 + windows))) * (1 + 30 / count) for cosine in row]
        exponents = [math.exp(score) if score >= min(0, max(scores)) else 0.0 for score in scores]
        theirs = torch.tensor(exponents) / sum(exponents)
        close(ours.flatten(0, 1)[number], theirs, 1e-4)


def test_anchors_of_batches_and_odd_queries():
    torch.manual_seed(4)
    keys = torch.nn.functional.normalize(torch.randn(12, 5), dim=-1)
    together, counts = proxy_anchors(keys.view(3, 4, 5), keys)
    apart, count = proxy_anchors(keys[4:8], keys)
    close(together[1], apart, 1e-6)
    assert counts[1].equal(count) and (counts >= 1).all()


def test_what_does_not_fit_is_said():
    encoder, windows, proxy = small_clip(), torch.randn(2, 3, 64, 64), torch.randn(2, 4, 4, 4)
    with pytest.raises(ValueError, match="W=2"):
        read_windows(encoder, windows, proxy[:1])
    with pytest.raises(OptionError, match="threshold"):
        shared_filter(proxy, threshold=1.5)
    with pytest.raises(ValueError, match="project=False and sum_at"):
        regions = torch.ones(2, 8, 8, dtype=int)
        read_dense(encoder, windows, "corrclip", proxy, regions, project=False)
    with pytest.raises(ValueError, match="grid of"):
        spread(encoder, torch.randn(1, 32, 4, 4), torch.eye(6)[None], (2, 2))
