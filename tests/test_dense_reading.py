"""Dense readings against the numbers of the authors' own modules, and against loops written here."""

import math, re
from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import randomize, recipe_encoder, recipes_golden, same, small_clip_model
from torch.nn import functional as F
from ovss_nb.components.class_probabilities import adapt_texts
from ovss_nb.core.options import OptionError
from ovss_nb.encoders.base import ImageFeatures
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.encoders.dense_reading import (
    READINGS,
    DenseReading,
    Source,
    attention_regions,
    block_at,
    dbscan,
    encode_dense,
    filter_features,
    read_dense,
    self_correlation,
)

# ---- the authors' numbers


def golden_dense(tensors, model, size, reading, image=None, **given):
    "Dense features of a golden image, 1 x N x d."
    encoder = recipe_encoder(tensors, model, size)
    features = read_dense(encoder, tensors[image or f"input.image.{size}"], reading, **given)
    return features.dense.flatten(2).mT


def golden_names(tensors, size):
    return [name for name in tensors if name.startswith("expect.dense.") and name.endswith(size)]


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_clearclips_family(size):
    tensors, model = recipes_golden("clearclip_family")
    plain = dict(vanilla=("qk",), MaskCLIP=("identity",), SCLIP=("qq", "kk"), ClearCLIP=("qq",))
    rest = dict(none={}, residual_ffn=dict(residual="token", ffn=True))
    for name in golden_names(tensors, size):
        _, _, terms, way, _ = name.split(".")
        reading = DenseReading(plain[terms], "sum", **rest[way])
        same(golden_dense(tensors, model, size, reading), tensors[name])


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_sclip(size):
    tensors, model = recipes_golden("sclip")
    dense = golden_dense(tensors, model, size, "sclip")
    same(dense, tensors[f"expect.dense.csa.{size}"][:, 1:])
    same(golden_dense(tensors, model, size, "tokens"), tensors[f"expect.dense.qk.{size}"][:, 1:])
    cosines = (F.normalize(dense, dim=-1) @ tensors["input.text"].T).mT
    same(cosines, tensors[f"expect.logits.csa.{size}"].flatten(2))


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_naclip(size):
    tensors, model = recipes_golden("naclip")
    terms = dict(kk=("kk",), naclip=("kk",), vanilla=("qk",), csa=("qq", "kk"), nonly=("position",))
    for name in golden_names(tensors, size):
        way, kind, sigma = re.fullmatch(rf"expect.dense.(\w+)\.(\w+)\.std(.+)\.{size}", name).groups()
        options = dict(residual="token", ffn=True) if way == "vanilla" else {}
        prior = float(sigma) if kind in ("naclip", "nonly") else None
        reading = DenseReading(terms[kind], "sum", prior, **options)
        same(golden_dense(tensors, model, size, reading), tensors[name][:, 1:])


@pytest.mark.parametrize("size", ["64x64", "56x56"])
def test_scclip(size):
    tensors, model = recipes_golden("scclip")
    other = replace(
        READINGS["scclip"], middle=7, before=7, after=2, residual=0.1, sources=(Source(), Source(4, 8))
    )
    for name, reading in (("base", "scclip"), ("other", other)):
        same(golden_dense(tensors, model, size, reading), tensors[f"expect.dense.{name}.{size}"])


@pytest.mark.parametrize("size", ["64x64", "56x56"])
def test_sfp(size):
    tensors, model = recipes_golden("sfp")
    for name, repair in (("SOM", "som"), ("L2", "norm"), ("LOF", "lof")):
        reading = replace(READINGS["sfp"], repair=repair)
        same(golden_dense(tensors, model, size, reading), tensors[f"expect.dense.{name}.{size}"])


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_rfclip(size):
    tensors, model = recipes_golden("rfclip")
    reading = replace(READINGS["rfclip"], channels=(1, 5, 11, 20, 26), channel_share=1.9)
    features = read_dense(recipe_encoder(tensors, model, size), tensors[f"input.image.{size}"], reading)
    same(features.dense.flatten(2).mT, tensors[f"expect.dense.{size}"])
    same(features.pooled, tensors[f"expect.class.{size}"])
    if size == "64x64":
        texts, patches = tensors["input.text"], features.patches()[0]
        adapted = adapt_texts(texts, features.pooled[0], patches, 0.9, 0.05, 2)
        same(adapted, tensors["expect.adjusted_text"])
        whole = F.normalize(features.pooled[0], dim=-1) @ texts.T
        cosines = 0.7 * (patches @ adapted.T) + 0.3 * whole
        same(cosines.T.view(1, 6, 8, 8), tensors["expect.logits.64x64"])


def test_texts_bend_by_hand():
    texts, patches = (np.array([unit(row) for row in np.random.RandomState(i).randn(6, 4)]) for i in (0, 1))
    whole = unit(patches.sum(0))
    clusters = [[i] for i in range(6)]  # complete linkage: join the two whose farthest members are nearest
    while True:
        pairs = [
            (max(1 - texts[i] @ texts[j] for i in a for j in b), a, b)
            for n, a in enumerate(clusters)
            for b in clusters[n + 1 :]
        ]
        apart, a, b = min(pairs)
        if apart > 0.9:
            break
        clusters = [c for c in clusters if c not in (a, b)] + [a + b]
    expected = texts.copy()
    for members in clusters:
        best = max(members, key=lambda i: texts[i] @ whole)
        nearest = sorted(patches, key=lambda patch: -(patch @ texts[best]))[:2]
        expected[best] = unit(0.95 * texts[best] + 0.05 * unit(sum(nearest)))
    assert 1 < len(clusters) < 6
    given = (torch.from_numpy(x).float() for x in (texts, whole, patches))
    same(adapt_texts(*given, 0.9), torch.from_numpy(expected).float())


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_gem(size):
    tensors, model = recipes_golden("gem")
    for name in golden_names(tensors, size):
        depth, rounds, fixed = re.search(r"depth(\d+)\.iter(\d+)\.temp(None|[\d.]+)\.", name).groups()
        temperature = None if fixed == "None" else float(fixed)
        options = dict(side_blocks=int(depth) - 1, rounds=int(rounds), temperature=temperature, depth=6)
        reading = DenseReading(("vv", "kk", "qq"), **options)
        same(golden_dense(tensors, model, size, reading), tensors[name][:, 1:])


@pytest.mark.parametrize("size", ["64x64", "48x64"])
def test_cliptrase(size):
    tensors, model = recipes_golden("cliptrase")
    same(golden_dense(tensors, model, size, "cliptrase"), tensors[f"expect.dense.{size}"][:, 1:])
    encoder, image = recipe_encoder(tensors, model, size), tensors[f"input.image.{size}"]
    tokens = encoder.embed(image)
    for block in encoder.blocks[:10]:
        tokens = block(tokens)
    same(self_correlation(encoder.blocks[10], tokens), tensors[f"expect.denoised.{size}"][None])
    for radius, least in ((0.7, 3), (1.1, 7)):
        labels = attention_regions(encoder, image, radius, least)
        assert labels.flatten().equal(1 + tensors[f"expect.cluster.eps{radius}_min{least}.{size}"])


def test_proxyclip():
    tensors, model = recipes_golden("proxyclip")
    for name in golden_names(tensors, ""):
        beta, gamma, case = re.fullmatch(r"expect.dense.beta(.+)_gamma([\d.]+)\.(\d+x\d+\..+)", name).groups()
        reading = replace(READINGS["proxyclip"], proxy_rule=f"shift:{beta}:{gamma}:batch")
        size, given = case.split(".")[0], dict(proxy=tensors[f"input.proxy.{case}"])
        dense = golden_dense(tensors, model, size, reading, f"input.image.{case}", **given)
        same(dense, tensors[name])
        if "batch2" in case:  # by image, company does not matter
            reading = replace(reading, proxy_rule=f"shift:{beta}:{gamma}")
            both = golden_dense(tensors, model, size, reading, f"input.image.{case}", **given)
            assert not both.allclose(dense, atol=1e-4)


# ---- loops, in double precision, over one image of a tiny random ViT


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def unit(x):
    return x / np.sqrt((x**2).sum())


class Plain:
    "A ViT's tokens on their way, and a block's attention, by loops over heads and patches."

    def __init__(self, encoder, image):
        self.w = {k: v.double().numpy() for k, v in encoder.visual.state_dict().items()}
        self.heads, self.depth, self.grid = encoder.heads, len(encoder.blocks), encoder.grid(image)
        self.enter = [encoder.embed(image)[0].double().numpy()]
        for i in range(self.depth):
            self.enter.append(self.step(i, self.enter[-1]))

    def step(self, i, x):
        return self.mlp(i, x + self.read(i, x, self.attention(i, x, "qk")))

    def leave(self, i):
        return self.enter[i + 1]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def mlp(self, i, x):
        block = f"transformer.resblocks.{i}"
        h = self.norm(x, f"{block}.ln_2") @ self.w[f"{block}.mlp.c_fc.weight"].T
        h = h + self.w[f"{block}.mlp.c_fc.bias"]
        h = h / (1 + np.exp(-1.702 * h))
        return x + h @ self.w[f"{block}.mlp.c_proj.weight"].T + self.w[f"{block}.mlp.c_proj.bias"]

    def parts(self, i, x):
        "Queries, keys and values: lists over heads of N x C/heads."
        block = f"transformer.resblocks.{i}"
        x = self.norm(x, f"{block}.ln_1") @ self.w[f"{block}.attn.in_proj_weight"].T
        x = x + self.w[f"{block}.attn.in_proj_bias"]
        return {name: np.split(part, self.heads, -1) for name, part in zip("qkv", np.split(x, 3, -1))}

    def attention(self, i, x, term, added=None):
        "Per head a table of weights, row by row."
        parts, tables = self.parts(i, x), []
        for asked, asking in zip(parts[term[0]], parts[term[1]]):
            rows = []
            for n, vector in enumerate(asked):
                scores = np.array([vector @ other for other in asking]) / math.sqrt(len(vector))
                rows.append(softmax(scores if added is None else scores + added[n]))
            tables.append(np.array(rows))
        return tables

    def read(self, i, x, tables):
        block, heads = f"transformer.resblocks.{i}.attn.out_proj", []
        for table, values in zip(tables, self.parts(i, x)["v"]):
            heads.append([sum(a * v for a, v in zip(row, values)) for row in table])
        return np.concatenate(heads, -1) @ self.w[f"{block}.weight"].T + self.w[f"{block}.bias"]

    def finish(self, x):
        return self.norm(x, "ln_post") @ self.w["proj"]


def cosines(x):
    x = [unit(row) for row in x]
    return np.array([[a @ b for b in x] for a in x])


def shifted(similarity, beta, gamma, mean=None):
    "ProxyCLIP's weights, row by row."
    mean, rows = similarity.mean() if mean is None else mean, []
    for row in similarity:
        logits = [(s - beta * mean) * gamma for s in row]
        kept = [math.exp(x) if x >= 0 else 0.0 for x in logits]
        rows.append([x / sum(kept) for x in kept])
    return np.array(rows)


def cut(similarity, x, divide=True):
    "SC-CLIP's aggregation of vectors."
    out = []
    for row in similarity:
        row = [s if s >= 0.4 else 0.0 for s in row]
        total = sum(row) + 1e-6 if divide else 1.0
        out.append(sum(s / total * vector for s, vector in zip(row, x)))
    return np.array(out)


def around(i, grid):
    "The up to nine patches around one, itself included."
    row, column = divmod(i, grid[1])
    rows = [r for r in (row - 1, row, row + 1) if 0 <= r < grid[0]]
    columns = [c for c in (column - 1, column, column + 1) if 0 <= c < grid[1]]
    return [r * grid[1] + c for r in rows for c in columns]


def mended(x, bad, grid):
    good = [[x[j] for j in around(i, grid) if j not in bad] for i in range(len(x))]
    return np.array([sum(g) / len(g) if i in bad and g else x[i] for i, g in enumerate(good)])


def plain_maskclip(plain):
    x = plain.enter[-2]
    return plain.finish(plain.read(plain.depth - 1, x, [np.eye(len(x))] * plain.heads))[1:]


def plain_clearclip(plain):
    x, last = plain.enter[-2], plain.depth - 1
    return plain.finish(plain.read(last, x, plain.attention(last, x, "qq")))[1:]


def plain_sclip(plain):
    x, last = plain.enter[-2], plain.depth - 1
    both = zip(plain.attention(last, x, "qq"), plain.attention(last, x, "kk"))
    return plain.finish(plain.mlp(last, x + plain.read(last, x, [a + b for a, b in both])))[1:]


def plain_cliptrase(plain):
    x, last = plain.enter[-2], plain.depth - 1
    all_three = zip(*(plain.attention(last, x, term) for term in ("qq", "kk", "vv")))
    return plain.finish(plain.mlp(last, x + plain.read(last, x, [sum(abc) for abc in all_three])))[1:]


def plain_naclip(plain):
    x, last, count = plain.enter[-2], plain.depth - 1, plain.grid[0] * plain.grid[1]
    added = np.zeros((1 + count, 1 + count))
    for i in range(count):
        for j in range(count):
            (r, c), (s, d) = divmod(i, plain.grid[1]), divmod(j, plain.grid[1])
            added[1 + i, 1 + j] = math.exp(-((r - s) ** 2 + (c - d) ** 2) / (2 * 5**2))
    return plain.finish(plain.read(last, x, plain.attention(last, x, "kk", added)))[1:]


def lonely(x, grid):
    "SC-CLIP's outliers: the highest 5 % of local outlier factors."
    distance = [[((a - b) ** 2).sum() for b in x] for a in x]
    count = len(x)
    k = 30 if count > 30 else count // 2
    near = [sorted(range(count), key=lambda j: (j == i, distance[i][j]))[:k] for i in range(count)]
    density = [len(n) / sum(max(distance[i][j], distance[i][n[-1]]) for j in n) for i, n in enumerate(near)]
    score = [np.mean([density[j] for j in n]) / density[i] for i, n in enumerate(near)]
    return [i for i in range(count) if score[i] > np.quantile(score, 0.95)]


def preferred(plain):
    "SFP's outliers: whom the class token of the last block but one likes better than they do themselves."
    i = plain.depth - 2
    table = sum(plain.attention(i, plain.enter[i], "qk")) / plain.heads
    suspects = [n for n in range(1, len(table)) if 1.5 * table[0, n] > table[n, n]]
    return [n - 1 for n in sorted(suspects, key=lambda n: -table[0, n])[:10]]


def plain_scclip(plain, sfp=False):
    grid, last, heads = plain.grid, plain.depth - 1, plain.heads
    x, cls = plain.leave(10)[1:], plain.leave(10)[0]
    bad = preferred(plain) if sfp else lonely(x, grid)
    middle, low = cosines(mended(plain.leave(8)[1:], bad, grid)), cosines(plain.leave(3)[1:])
    among = shifted(np.where(middle >= 0.4, middle, 0) if sfp else middle, 1, 3)

    def one(z, cls, terms):
        tables = [plain.attention(last, z, term) for term in terms] + [[among] * heads]
        mean = [sum(several) / len(several) for several in zip(*tables)]
        return cut(low, plain.read(last, z, mean) + 0.3 * cls)

    summed = sum(plain.leave(i) for i in range(3, 10))
    first = one(cut(middle, mended(x, bad, grid)), cls, ("qq", "kk") if sfp else ("kk",))
    return plain.finish(first + one(summed[1:], summed[0], () if sfp else ("kk",)))


def plain_sfp(plain):
    return plain_scclip(plain, sfp=True)


CHANNELS, CHANNEL_SHARE = (1, 7, 20), 1.9


def plain_rfclip(plain):
    "The tower is gone through once more, since tokens are mended after every block."
    grid, last, x = plain.grid, plain.depth - 1, plain.enter[0]
    enter = [x]
    for i in range(plain.depth):
        x = plain.step(i, x)
        raised = [row - row.min() for row in x[1:]]
        bad = [
            n for n, r in enumerate(raised) if max(r[c] for c in CHANNELS) / r.sum() > CHANNEL_SHARE / len(r)
        ]
        mean = {n: sum(x[1 + j] for j in around(n, grid)) / 9 for n in bad}
        x = np.stack([x[0], *(0.6 * v + 0.4 * mean[n] if n in bad else v for n, v in enumerate(x[1:]))])
        enter.append(x)
    guide = sum(enter[1:]) / plain.depth
    similarity = cosines(guide[1:])
    earlier = [plain.attention(i, enter[i], "kk") for i in range(last)]
    said = 0
    for z in (enter[last], guide):
        z = np.concatenate([z[:1], cut(similarity, z[1:], divide=False)])
        tables = [*earlier, plain.attention(last, z, "kk")]
        mean = [sum(tables[i][h] for i in range(plain.depth)) / plain.depth for h in range(plain.heads)]
        said = said + 0.5 * plain.read(last, z[1:], [table[1:, 1:] for table in mean])
    return plain.finish(said)


def plain_gem(plain):
    said = plain.enter[6]
    for i in range(6, 12):
        x, total = plain.enter[i], None
        lengths = [math.sqrt((row**2).sum()) for row in plain.norm(x, f"transformer.resblocks.{i}.ln_1")]
        tau = np.mean(lengths) / math.sqrt(x.shape[1] / plain.heads)
        for h in range(plain.heads):
            for name in "vkq":
                r = np.array([unit(row) for row in plain.parts(i, x)[name][h]])
                r = np.array([unit(sum(a * v for a, v in zip(softmax(tau * r @ row), r))) for row in r])
                table = np.array([softmax(tau * r @ row) for row in r]) / 3
                total = {} if total is None else total
                total[h] = total.get(h, 0) + table
        said = said + plain.read(i, x, [total[h] for h in range(plain.heads)])
    return plain.finish(said)[1:]


def tiny(layers=12, **options):
    "An encoder whose every parameter is random: width 32, 2 heads, patch 8."
    model = randomize(small_clip_model(patch=8, layers=layers, vocab_size=16), scale=0.8)
    return CLIPEncoder(model, device="cpu", **options)


def pictures(height, width, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


NAMES = ("maskclip", "clearclip", "sclip", "cliptrase", "naclip", "scclip", "sfp", "rfclip", "gem")
OPTIONS = dict(rfclip=dict(channels=CHANNELS, channel_share=CHANNEL_SHARE))


def reading_of(name):
    return replace(READINGS[name], **OPTIONS.get(name, {}))


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("name", NAMES)
def test_readings_by_hand(name, size):
    encoder, image = tiny(), pictures(*size)
    dense = read_dense(encoder, image, reading_of(name)).dense
    assert dense.shape[-2:] == (size[0] // 8, size[1] // 8)
    expected = globals()[f"plain_{name}"](Plain(encoder, image))
    same(dense[0].flatten(1).T, torch.from_numpy(expected).float(), 2e-5)


def bilinear(x, old, new):
    "Vectors of a grid on another one, by hand."
    x, out = x.reshape(*old, -1), []
    for r in range(new[0]):
        for c in range(new[1]):
            places = [(n + 0.5) * o / m - 0.5 for n, o, m in zip((r, c), old, new)]
            total = 0
            for dr in (0, 1):
                for dc in (0, 1):
                    low = [math.floor(p) for p in places]
                    share = [p - f if d else 1 - p + f for p, f, d in zip(places, low, (dr, dc))]
                    row, column = (min(max(f + d, 0), o - 1) for f, d, o in zip(low, (dr, dc), old))
                    total = total + share[0] * share[1] * x[row, column]
            out.append(total)
    return np.array(out)


@pytest.mark.parametrize("size, grid", [((32, 32), (4, 4)), ((24, 48), (5, 7)), ((24, 48), (6, 12))])
def test_proxyclip_by_hand(size, grid):
    encoder, image = tiny(3), pictures(*size)
    proxy = torch.randn(1, 9, *grid, generator=torch.Generator().manual_seed(3))
    dense = read_dense(encoder, image, "proxyclip", proxy).dense
    plain = Plain(encoder, image)
    patches = plain.enter[-2][1:]
    values = plain.read(plain.depth - 1, patches, [np.eye(len(patches))] * plain.heads)
    similarity = cosines(proxy[0].flatten(1).T.double().numpy())
    said = shifted(similarity, 1.2, 3) @ bilinear(values, plain.grid, grid)
    same(dense[0].flatten(1).T, torch.from_numpy(plain.finish(said)).float(), 2e-5)


# ---- what must hold for all


@pytest.mark.parametrize("name", [name for name in READINGS if "regions" not in READINGS[name].needs])
def test_batch_is_single_images_and_half_precision_agrees(name):
    encoder, half, images = tiny(), tiny(precision="bf16"), pictures(24, 48, 3)
    given, reading = {}, reading_of(name)
    if reading.needs:
        given = dict(proxy=torch.randn(3, 9, 5, 7, generator=torch.Generator().manual_seed(3)))
    together = read_dense(encoder, images, reading, **given)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in given.items()}
        alone = read_dense(encoder, images[i : i + 1], reading, **one)
        same(together.dense[i : i + 1], alone.dense)
        same(together.pooled[i : i + 1], alone.pooled)
    if name != "rfclip":  # which mends the tower itself
        same(together.pooled, encoder.encode(images).pooled)
    rough = read_dense(half, images, reading, **given).dense
    assert rough.dtype == torch.float32
    words = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    labels, others = ((words @ F.normalize(x, dim=1).flatten(2)).argmax(1) for x in (together.dense, rough))
    assert (labels == others).float().mean() >= 0.85, (labels == others).float().mean()


def test_modes_and_readings_agree():
    "`tokens`, `value` and `vv` are written twice; both ways to them meet."
    image = pictures(24, 48)
    for mode in ("tokens", "value", "vv"):
        encoder = tiny(dense_mode=mode)
        same(read_dense(encoder, image, mode).dense, encoder.dense(image), 2e-5)
    for name in ("scclip", DenseReading(("qq",), residual=0.1)):
        encoder = tiny(dense_mode=name)
        assert encoder.dense(image).equal(read_dense(encoder, image, name).dense)
    assert tiny(dense_mode="clearclip").fingerprint == tiny(dense_mode=DenseReading(("qq",))).fingerprint
    assert tiny(dense_mode="clearclip").fingerprint != tiny(dense_mode="naclip").fingerprint


def test_blocks_of_other_towers():
    assert [block_at(block, 24, 24) for block in (16, 6, 23)] == [16, 6, 23]
    assert [block_at(block, 12, 24) for block in (8, 3, 9)] == [16, 6, 18]
    assert [block_at(block, 12, 4) for block in (0, 3, 8, 10, 11)] == [0, 1, 2, 2, 3]
    for layers in (1, 2, 3):
        for name in ("scclip", "gem", "vv"):
            assert read_dense(tiny(layers), pictures(24, 32), name).dense.isfinite().all()
    with pytest.raises(ValueError, match="repair='som' asks the last but one"):
        read_dense(tiny(1), pictures(24, 32), "sfp")


def test_small_grids():
    for size in ((8, 8), (8, 16), (16, 8)):
        for name in NAMES:
            assert read_dense(tiny(), pictures(*size), reading_of(name)).dense.isfinite().all()


def test_finished_features_are_filtered():
    torch.manual_seed(0)
    features, proxy = ImageFeatures(torch.randn(2, 5, 3, 4), torch.randn(2, 5)), torch.randn(2, 7, 3, 4)
    filtered = filter_features(features, "proxyclip", proxy)
    for i in range(2):
        weights = shifted(cosines(proxy[i].flatten(1).T.double().numpy()), 1.2, 3)
        expected = torch.from_numpy(weights @ features.dense[i].flatten(1).T.double().numpy()).float()
        same(filtered.dense[i].flatten(1).T, expected)
    assert filtered.pooled is features.pooled
    assert filter_features(features, "maskclip").dense is features.dense
    assert filter_features(features, "proxyclip", torch.randn(2, 7, 6, 6)).dense.shape == (2, 5, 6, 6)
    half = filter_features(features, DenseReading(("proxy", "identity")), proxy).dense
    same(half, (features.dense + filtered.dense) / 2)
    with pytest.raises(ValueError, match="takes a ViT's blocks apart"):
        filter_features(features, "clearclip")


def test_any_encoder_is_read():
    class Colors(torch.nn.Module):
        name = "colors"

        def encode(self, images):
            return ImageFeatures(F.avg_pool2d(images, 8), images.mean((2, 3)))

    image, proxy = pictures(24, 48), torch.randn(1, 4, 3, 6)
    assert encode_dense(Colors(), image, "proxyclip", proxy).dense.shape == (1, 3, 3, 6)
    with pytest.raises(ValueError, match="colors has no transformer blocks"):
        encode_dense(Colors(), image, "naclip")
    encoder = tiny()
    same(encode_dense(encoder, image, "maskclip").dense, read_dense(encoder, image, "maskclip").dense)


def test_clusters_by_hand():
    points = torch.tensor([0.0, 0.4, 0.8, 3.0, 5.0, 5.4, 5.8, 6.2, 2.0])[:, None]
    assert dbscan(points, 0.5, 3).tolist() == [1, 1, 1, 0, 2, 2, 2, 2, 0]
    assert dbscan(points, 0.5, 1).tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 4]
    between = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.8, 1.9, 2.0])[:, None]  # the one between goes to the first
    assert dbscan(between, 0.85, 4).tolist() == [1, 1, 1, 1, 2, 2, 2]
    regions = attention_regions(tiny(), pictures(24, 48, 2))
    assert regions.shape == (2, 3, 6) and regions.dtype == torch.int64
    assert regions[1:].equal(attention_regions(tiny(), pictures(24, 48, 2)[1:]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prior=5), "prior=5 and terms=.'identity',. disagree"),
        (dict(terms=("position",)), "prior=None and terms"),
        (dict(terms=("kk",), scope="nearest:5"), "scope='nearest:5' and terms"),
        (dict(terms=("kk",), grid="proxy"), "grid='proxy' and terms=.'kk',. disagree"),
        (dict(terms=("proxy",), grid="proxy", residual="token"), "grid='proxy' and residual='token'"),
        (dict(terms=("proxy",), grid="proxy", after=3), "grid='proxy' and after=3"),
        (dict(terms=("kk",), ffn=True, sum_at="after"), "ffn=True and sum_at='after'"),
        (dict(average_blocks=True), "average_blocks=True and terms"),
        (dict(channels=(3,)), "channels=.3,. and repair=None"),
        (dict(terms=("kk",), rounds=1), "rounds=1 and side_blocks=0"),
        (dict(terms=("kk",), side_blocks=3, residual="token"), "side_blocks=3 and residual='token'"),
        (dict(terms=("proxy",), side_blocks=3), "side_blocks=3 and terms"),
        (dict(terms=("qk",), side_blocks=3, rounds=1), "rounds=1 and terms"),
        (dict(terms=("vv",), side_blocks=3, residual_mix=(2.0, 0.3)), "side_blocks=3 and residual_mix"),
        (dict(terms=("vv",), side_blocks=3, feedback=(2.0, 0.3)), "side_blocks=3 and feedback"),
        (dict(terms=("vv",), side_blocks=3, temperature=2.0), "temperature=2 and rounds=None"),
        (dict(terms=("vv",), side_blocks=3, rounds=1, combine="sum"), "rounds=1 and combine='sum'"),
        (dict(terms=("kk",), after=12), "after=12 and depth=12 disagree"),
        (dict(terms=("middle",), depth=4), "middle=8 and depth=4 disagree"),
        (dict(terms=("vv",), side_blocks=13), "side_blocks=13 and depth=12 disagree"),
        (dict(sources=(Source(), Source(3, 12))), "depth=12 disagree"),
        (dict(terms=()), "terms must name at least one"),
        (dict(terms=("kq",)), "terms must be"),
        (dict(residual="class"), "residual must be"),
        (dict(proxy_rule="shfit"), "did you mean 'shift'"),
        (dict(scope="near"), "scope must be"),
        (dict(sources=()), "sources must name at least one"),
        (dict(feedback_line="start"), "feedback_line='start' and feedback=None disagree"),
        (dict(residual_blocks=(4, 6)), "residual_blocks=.4, 6. and residual_mix=None disagree"),
        (dict(channel_share=4.0), "channel_share=4.0 and repair=None disagree"),
    ],
)
def test_options_that_disagree_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DenseReading(**options)


def test_what_does_not_fit_is_said():
    encoder, image = tiny(2), pictures(24, 48)
    for options in (dict(pool="mean"), dict(filtered=True), dict(regions=True, pool="mean")):
        with pytest.raises(OptionError, match="and first=None of a source disagree"):
            Source(**options)
    with pytest.raises(ValueError, match="give what create_encoder"):
        read_dense("lite", image, "maskclip")
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_dense(encoder, image, "proxyclip", torch.full((1, 4, 3, 6), torch.nan))
    with pytest.raises(ValueError, match="did you mean 'clearclip'"):
        read_dense(encoder, image, "clearklip")
    with pytest.raises(ValueError, match="needs proxy"):
        read_dense(encoder, image, "proxyclip")
    for proxy in (torch.randn(2, 4, 3, 3), torch.randn(4, 3, 3), torch.randn(1, 4, 0, 3)):
        with pytest.raises(ValueError, match="proxy must be B x C x h x w with B=1"):
            read_dense(encoder, image, "proxyclip", proxy)
    with pytest.raises(ValueError, match="multiples of 8"):
        read_dense(encoder, pictures(4, 32), "maskclip")  # a window smaller than a patch
    with pytest.raises(OptionError, match="needs proxy and regions beside the image"):
        tiny(2, dense_mode="corrclip")
    with pytest.raises(OptionError, match="'vv' or 'loda', or a reading .maskclip"):
        tiny(2, dense_mode="maskklip")
    assert Source(3, 9) == Source(first=3, last=9)
    with pytest.raises(OptionError, match="last=3 of a source needs first"):
        Source(last=3)
