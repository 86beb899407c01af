"""CostAggregation against the numbers of CAT-Seg's public code, against plain loops written here, and its
promises: any number of words, in any order, in bounded memory.
"""

import subprocess, sys
import doubles
from doubles import close, thinned
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ovss_nb.components.cost_aggregation import (
    ClassStage,
    CostAggregation,
    WindowBlock,
    cost_map,
    window_mask,
)


# ---- published code

# The golden file's names and ours, written down by hand: independent of the loader in systems/catseg, which
# test_catseg.py tests.
NAMES = {
    "conv1": "embed",
    "guidance_projection.0": "appearance",
    "text_guidance_projection.0": "text",
    "head": "head",
}
for i in range(2):
    NAMES |= {
        f"decoder_guidance_projection.{i}.0": f"details.{i}",
        f"decoder{i + 1}.up": f"decoder.{i}.up",
        f"layers.{i}.swin_block.guidance_norm": f"spatial.{i}.guidance_norm",
    }
    NAMES |= {
        f"decoder{i + 1}.conv.double_conv.{k}": f"decoder.{i}.{name}"
        for k, name in {0: "conv1", 1: "norm1", 3: "conv2", 4: "norm2"}.items()
    }
    for j in range(2):
        theirs, ours = f"layers.{i}.swin_block.block_{j + 1}", f"spatial.{i}.blocks.{j}"
        NAMES |= {
            f"{theirs}.{a}": f"{ours}.{b}"
            for a, b in {
                "norm1": "norm1",
                "norm2": "norm2",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
                "attn.proj": "project",
                "attn.q": "attention.query",
                "attn.k": "attention.key",
                "attn.v": "attention.value",
            }.items()
        }
    theirs, ours = f"layers.{i}.attention", f"classes.{i}"
    NAMES |= {
        f"{theirs}.{a}": f"{ours}.{b}"
        for a, b in {
            "norm1": "norm1",
            "norm2": "norm2",
            "MLP.0": "mlp.fc1",
            "MLP.2": "mlp.fc2",
            "attention.q": "attention.query",
            "attention.k": "attention.key",
            "attention.v": "attention.value",
        }.items()
    }


@pytest.fixture(scope="module")
def golden():
    return doubles.golden("catseg_aggregator")


def released(golden, **options):
    network = (
        CostAggregation(
            32, (16, 8), width=32, guidance=(20, 24), decoder=(32, 16), decoder_guidance=(12, 6), **options
        )
        .eval()
        .requires_grad_(False)
    )
    weights = {}
    for key, value in golden.items():
        stem, _, kind = key.removeprefix("w.").rpartition(".")
        if not key.startswith("w.") or kind == "attn_mask":
            continue
        if kind.startswith("padding_"):
            weights[f"classes.{stem.split('.')[1]}.{'padding' if kind == 'padding_tokens' else kind}"] = (
                value[0, 0]
            )
        else:
            weights[f"{NAMES[stem]}.{kind}"] = value
    network.load_state_dict(weights)
    return network


def details(golden, items=slice(None)):
    return [golden[f"in.appearance_guidance_{i}"][items] for i in (1, 2)]


def test_catseg_step_by_step(golden):
    "Every stored intermediate, computed by our parts one after the other."
    network = released(golden)
    cost = cost_map(golden["in.img_feats"], golden["in.text_feats"])
    close(thinned(cost)[:1], golden["mid.correlation_stride2"])
    x = torch.stack([network.embed(cost[:, :, t]) for t in range(5)], 1)
    close(thinned(x[:1, :2].transpose(1, 2)), golden["mid.corr_embed_stride2"])
    appearance = F.relu(network.appearance(golden["in.appearance_guidance_0"]))
    close(thinned(appearance[:1]), golden["mid.guidance_projection_stride2"])
    text = F.relu(network.text(F.normalize(golden["in.text_feats"][:, :, 0], dim=-1)))
    close(text[:1], golden["mid.text_guidance_projection"])
    x, appearance = x.movedim(2, -1), appearance.movedim(1, -1)
    guidance = network.spatial[0].guidance_norm(appearance)[:, None]
    close(network.spatial[0].blocks[0](x, guidance)[0, :2].flatten(1, 2), golden["mid.layer0_swin_block1"])

    def theirs(x):
        return x[:1].permute(0, 4, 1, 2, 3)

    x = network.spatial[0](x, appearance)
    close(theirs(x)[..., ::2, ::2], golden["mid.layer0_after_swin_stride2"])
    x = network.classes[0](x, text)
    close(thinned(theirs(x)), golden["mid.layer0_out_stride2"], 5e-5)
    x = network.classes[1](network.spatial[1](x, appearance), text)
    close(thinned(theirs(x)), golden["mid.layer1_out_decoder_input_stride2"], 5e-5)
    close(
        network.enhance(
            cost, F.normalize(golden["in.text_feats"][:, :, 0], dim=-1), golden["in.appearance_guidance_0"]
        ),
        x,
        5e-5,
    )
    guides = [F.relu(project(guide)) for project, guide in zip(network.details, details(golden))]
    close(
        network.decoder[0](x.movedim(-1, 2), guides[0])[:1, 0, :, ::2, ::2],
        golden["mid.decoder1_out_first_class_stride2"],
        5e-5,
    )


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_catseg_whole(golden, chunk):
    network = released(golden, chunk=chunk)
    out = network(
        golden["in.img_feats"], golden["in.text_feats"], details(golden), golden["in.appearance_guidance_0"]
    )
    close(thinned(out, 4), golden["out.pool1_stride4"], 5e-5)


def test_catseg_pooled(golden):
    out = released(golden, pool=2)(
        golden["in.img_feats"][:1],
        golden["in.text_feats"][:1],
        details(golden, slice(1)),
        golden["in.appearance_guidance_0"][:1],
    )
    close(thinned(out, 4), golden["out.pool2_item0_stride4"], 5e-5)


@pytest.mark.parametrize("case,length", [("pad6_T9_stride2", 6), ("T260_stride12", 256)])
def test_catseg_keeps_the_topk_classes_words(golden, case, length):
    network, words, stride = (
        released(golden, length=length),
        9 if length == 6 else 260,
        int(case.rpartition("stride")[2]),
    )
    out = network(
        golden["in.img_feats"][:1],
        golden[f"in.text_feats_T{words}"],
        details(golden, slice(1)),
        golden["in.appearance_guidance_0"][:1],
    )
    kept = golden[f"out.{case.rpartition('_')[0]}_kept"].bool()
    assert (
        kept.sum() == length
        and torch.equal((out[0] != -100).all((1, 2)), kept)
        and (out[0, ~kept] == -100).all()
    )
    close(out[..., ::stride, ::stride], golden[f"out.{case}"], 5e-5)


def test_catsegs_window_mask(golden):
    "The mask that a checkpoint stores is the one that we make."
    stored = golden["w.layers.0.swin_block.block_2.attn_mask"].float()
    assert torch.equal(window_mask((24, 24), (12, 12), (6, 6)), stored)


def test_no_parameter_is_idle(golden):
    "Each of the golden file's parameters moves the result; a forgotten one would not."
    network = released(golden).requires_grad_(True)
    # Enough classes for the appearance, few enough for padding; a mask or a norm could hide a zero gradient
    # of a whole tensor only by chance.
    network(
        golden["in.img_feats"][:1],
        golden["in.text_feats"][:1],
        details(golden, slice(1)),
        golden["in.appearance_guidance_0"][:1],
    ).square().mean().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


# ---- plain loops


def test_window_attention_by_loops():
    "One place at a time: which places share its shifted window, what they say, softmax, projection."
    torch.manual_seed(0)
    size, window, shift, width, heads = 10, 4, 2, 8, 2  # 10 is no multiple of 4: filled up to 12
    block = WindowBlock(width, 3, heads, window, shift).double().eval()
    x, guide = torch.randn(1, 1, size, size, width).double(), torch.randn(1, 1, size, size, 3).double()
    filled = 12

    def region(place):  # window along an axis after the roll, and whether the place came around the edge
        rolled = (place - shift) % filled
        return rolled // window, place < shift

    normed = block.norm1(x)[0, 0]
    joined = torch.cat([normed, guide[0, 0]], -1)
    q, k, v = block.attention.query(joined), block.attention.key(joined), block.attention.value(normed)
    attended = torch.zeros_like(normed)
    for i in range(size):
        for j in range(size):
            near = [
                (a, b)
                for a in range(size)
                for b in range(size)
                if region(a) == region(i) and region(b) == region(j)
            ]
            for h in range(heads):
                c = slice(h * width // heads, (h + 1) * width // heads)
                weights = (
                    torch.stack([q[i, j, c] @ k[a, b, c] for a, b in near])
                    .div((width // heads) ** 0.5)
                    .softmax(0)
                )
                attended[i, j, c] = sum(w * v[a, b, c] for w, (a, b) in zip(weights, near))
    y = x[0, 0] + block.project(attended)
    y = y + block.mlp(block.norm2(y))
    assert torch.allclose(block(x, guide)[0, 0], y, atol=1e-9)


def test_class_attention_by_loops():
    torch.manual_seed(0)
    stage = ClassStage(8, 3, heads=2, length=7).double().eval()
    for parameter in (stage.padding, stage.padding_guidance):
        nn.init.normal_(parameter)
    x, guide = torch.randn(1, 4, 1, 1, 8).double(), torch.randn(1, 4, 3).double()
    words = torch.cat([x[0, :, 0, 0], stage.padding.expand(3, 8)])
    normed = stage.norm1(words)
    joined = torch.cat([normed, torch.cat([guide[0], stage.padding_guidance.expand(3, 3)])], -1)
    q, k, v = (
        F.elu(stage.attention.query(joined)) + 1,
        F.elu(stage.attention.key(joined)) + 1,
        stage.attention.value(normed),
    )
    y = words.clone()
    for n in range(7):
        for h in range(2):
            c = slice(4 * h, 4 * h + 4)
            weights = torch.stack([q[n, c] @ k[m, c] for m in range(7)])
            y[n, c] = y[n, c] + sum(w * v[m, c] for m, w in enumerate(weights)) / (weights.sum() + 1e-6)
    y = y + stage.mlp(stage.norm2(y))
    assert torch.allclose(stage(x, guide)[0, :, 0, 0], x[0, :, 0, 0] + y[:4], atol=1e-9)


# ---- promises


def small(**options):
    torch.manual_seed(1)
    sizes = dict(width=16, guidance=(8, 8), decoder=(16, 16), decoder_guidance=(4, 4), window=4, length=16)
    network = CostAggregation(12, (8, 8), **(sizes | options)).eval().requires_grad_(False)
    for stage in network.classes:
        if stage.length:
            nn.init.normal_(stage.padding)
            nn.init.normal_(stage.padding_guidance)
    return network


def inputs(words, batch=1, grid=(8, 8), prompts=1):
    generator = torch.Generator().manual_seed(words)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return (
        normal(batch, 12, *grid),
        normal(words, prompts, 12),
        [normal(batch, 8, s * grid[0], s * grid[1]) for s in (2, 4)],
    )


@pytest.mark.parametrize("words", [1, 5, 16, 30])
@pytest.mark.parametrize("length", [0, 16])
def test_permuting_words_permutes_the_result(words, length):
    network, (features, text, guides) = small(length=length), inputs(words)
    order = torch.randperm(words, generator=torch.Generator().manual_seed(0))
    close(network(features, text[order], guides), network(features, text, guides)[:, order], 1e-4)


def test_300_words_leave_44_at_minus_100():
    features, text, guides = inputs(300)
    out = small(length=256)(features, text, guides)
    assert (out == -100).all((2, 3)).sum() == 44
    assert (small(length=256, limit=False)(features, text, guides) != -100).all()


def test_each_image_keeps_its_own_words():
    features, text, guides = inputs(30, batch=3)
    network = small()
    out = network(features, text, guides)
    dropped = (out == -100).all((2, 3))
    assert (dropped.sum(1) == 14).all() and len(dropped.unique(dim=0)) == 3
    for i in range(3):
        close(network(features[i : i + 1], text, [guide[i : i + 1] for guide in guides])[0], out[i], 1e-4)


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (3, 10), (4, 4), (1, 1)])
def test_any_grid_any_chunk(grid):
    features, text, guides = inputs(7, batch=2, grid=grid)
    whole = small(chunk=1000)(features, text, guides)
    assert whole.shape == (2, 7, 4 * grid[0], 4 * grid[1])
    for chunk in (1, 5):
        close(small(chunk=chunk)(features, text, guides), whole, 1e-4)


def test_several_texts_per_word():
    features, text, guides = inputs(6, prompts=3)
    assert small(prompts=3)(features, text, guides).shape == (1, 6, 32, 32)
    best = cost_map(features, text, "max")
    assert torch.equal(best[:, 0], cost_map(features, text).amax(1))
    assert small()(features, text, guides, pooling="max").isfinite().all()
    with pytest.raises(ValueError, match="3 texts per word"):
        small()(features, text, guides)


@pytest.mark.parametrize(
    "change",
    [
        dict(pooling="sum"),
        dict(text=torch.randn(6, 1, 5)),
        dict(text=torch.randn(0, 1, 12)),
        dict(details=[]),
        dict(details=[torch.randn(1, 8, 16, 16)] * 2),
    ],
)
def test_bad_input_is_refused(change):
    features, text, guides = inputs(6)
    with pytest.raises(ValueError):
        small()(**(dict(features=features, text=text, details=guides) | change))


@pytest.mark.parametrize(
    "options", [dict(decoder=(20, 16)), dict(decoder=(16,)), dict(chunk=0), dict(heads=3)]
)
def test_bad_sizes_are_refused(options):
    with pytest.raises(ValueError):
        small(**options)


def test_gradients_do_not_depend_on_chunks():
    "Training may be chunked too; and with 2 x 2 pooling all parameters get a gradient."

    def gradients(chunk):
        network = small(chunk=chunk).requires_grad_(True).train()
        features, text, guides = inputs(5, batch=2)
        network(features, text, guides).square().mean().backward()
        return {name: p.grad for name, p in network.named_parameters()}

    whole, parts = gradients(100), gradients(2)
    for name, gradient in whole.items():
        assert gradient.any() and torch.allclose(gradient, parts[name], rtol=1e-3, atol=1e-6), name


def test_inference_then_training():
    "A mask made in inference mode must not spoil a later backward pass."
    window_mask.cache_clear()
    network, (features, text, guides) = small(), inputs(3)
    with torch.inference_mode():
        network(features, text, guides)
    network.requires_grad_(True)(features.clone(), text.clone(), guides).sum().backward()


MEMORY = """
import resource, torch
from ovss_nb.components.cost_aggregation import CostAggregation
torch.set_num_threads(1)
sizes = dict(width=32, guidance=(16, 16), decoder=(32, 16), decoder_guidance=(8, 8), window=12)
network = CostAggregation(32, (16, 8), **sizes, chunk=16, limit=False).eval()
guides = [torch.randn(1, 16, 48, 48), torch.randn(1, 8, 96, 96)]
for words in (20, 220):
    with torch.inference_mode():
        network(torch.randn(1, 32, 24, 24), torch.randn(words, 1, 32), guides)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_grows_by_the_maps_alone():
    """From 20 to 220 words, memory grows by little more than the maps of 32 x 24 x 24 and the logits of 96 x
    96 that must be held (a few copies each), not by the decoder's 32 x 96 x 96.
    """
    few, many = (
        1024 * int(line)
        for line in subprocess.run(
            [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
        ).stdout.split()
    )
    held = 200 * 4 * (32 * 24 * 24 + 96 * 96)
    assert many - few < 5 * held < 200 * 4 * 32 * 96 * 96
