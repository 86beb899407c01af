"""Deformable attention against plain loops and the numbers of EBSeg's public code;
pixel decoder, transformer decoder and head against its numbers; and their promises.
"""

import doubles
from doubles import close, thinned
import pytest
import torch
from torch.nn import functional as F
from ovss_nb.components.mask_decoder import (
    DeformableAttention,
    MaskDecoder,
    MaskHead,
    PixelDecoder,
    cell_centers,
    sample_levels,
)


# ---- plain loops


def bilinear(value, x, y):
    """The value C of a map C x h x w at a point in places, where 0.5 is the center of the first;
    nothing outside.
    """
    c, h, w = value.shape
    left, top, found = int(torch.floor(x - 0.5)), int(torch.floor(y - 0.5)), torch.zeros(c, dtype=value.dtype)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < h and 0 <= column < w:
                found += (1 - (y - 0.5 - row).abs()) * (1 - (x - 0.5 - column).abs()) * value[:, row, column]
    return found


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_sampling_equals_loops(kind):
    kind, generator = getattr(torch, kind), torch.Generator().manual_seed(0)
    shapes = [(3, 5), (6, 10)]
    values = [torch.randn(2, 3, 4, *shape, generator=generator).to(kind) for shape in shapes]
    places = (1.6 * torch.rand(2, 3, 7, 2, 4, 2, generator=generator) - 0.3).to(kind)  # some outside
    weights = torch.rand(2, 3, 7, 2, 4, generator=generator).to(kind)
    expected = torch.zeros(2, 3, 7, 4, dtype=kind)
    for b in range(2):
        for head in range(3):
            for q in range(7):
                for level, (h, w) in enumerate(shapes):
                    for point in range(4):
                        x, y = places[b, head, q, level, point]
                        expected[b, head, q] += weights[b, head, q, level, point] * bilinear(
                            values[level][b, head], x * w, y * h
                        )
    close(sample_levels(values, places, weights), expected, 1e-5 if kind == torch.float32 else 1e-12)


# ---- published code; their names and ours, by hand


@pytest.fixture(scope="module")
def golden():
    return {name: doubles.golden(name) for name in ("msdeform", "ebseg_decoder", "ebseg_pixel_decoder")}


DEFORMABLE = dict(
    sampling_offsets="offsets", attention_weights="weights", value_proj="value", output_proj="output"
)


def fill(module, tensors, prefix, names, whole=()):
    "Load `prefix` + theirs of the golden tensors as ours: layers with weight and bias, and whole tensors."
    state = {
        f"{ours}.{kind}": tensors[f"{prefix}{theirs}.{kind}"]
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
        if f"{prefix}{theirs}.{kind}" in tensors
    }
    module.load_state_dict(state | {ours: tensors[f"{prefix}{theirs}"] for theirs, ours in whole})
    return module.eval().requires_grad_(False)


def deformable(golden):
    return fill(DeformableAttention(32, heads=4), golden["msdeform"], "w.", DEFORMABLE)


def test_deformable_attention(golden):
    g, module = golden["msdeform"], deformable(golden)
    shapes = [tuple(shape) for shape in g["in.spatial_shapes"].tolist()]
    close(module(g["in.query"], g["in.reference_points"], g["in.value"], shapes), g["out.output"], 1e-5)
    close(
        module(g["in.query"], g["in.reference_points"], g["in.value"], shapes, g["in.padding_mask"]),
        g["out.output_with_padding_mask"],
        1e-5,
    )
    close(
        module(g["in.query"], g["in.reference_boxes"], g["in.value"], shapes),
        g["out.output_reference_boxes"],
        1e-5,
    )


def test_deformable_attention_equals_loops(golden):
    "The whole module by loops: projection, joint softmax, offsets in places of each level."
    g, module = golden["msdeform"], deformable(golden)
    shapes, value = g["in.spatial_shapes"].tolist(), module.value(g["in.value"])
    expected = torch.zeros(2, 10, 32)
    for b in range(2):
        for q in range(10):
            offsets, weights = (
                module.offsets(g["in.query"][b, q]).view(4, 3, 4, 2),
                module.weights(g["in.query"][b, q]).view(4, 12).softmax(-1).view(4, 3, 4),
            )
            for head in range(4):
                start = 0
                for level, (h, w) in enumerate(shapes):
                    part = value[b, start : start + h * w, 8 * head : 8 * head + 8].T.reshape(8, h, w)
                    x, y = g["in.reference_points"][b, q, level]
                    for point in range(4):
                        dx, dy = offsets[head, level, point]
                        expected[b, q, 8 * head : 8 * head + 8] += weights[head, level, point] * bilinear(
                            part, x * w + dx, y * h + dy
                        )
                    start += h * w
    expected = module.output(expected)
    close(expected, g["out.output"], 1e-5)
    close(
        module(g["in.query"], g["in.reference_points"], g["in.value"], [tuple(shape) for shape in shapes]),
        expected,
        1e-5,
    )


def decoder_names(layers):
    names = {
        "decoder_norm": "head.norm",
        "pool_proj.0": "head.pooled.0",
        "pool_proj.1": "head.pooled.1",
        "bias_scaling": "head.bias_scale",
    }
    names |= {
        f"{a}.layers.{i}": f"head.{b}.{2 * i}"
        for i in range(3)
        for a, b in {"mask_embed": "mask", "mask_embed1": "embed", "attn_proj": "attend"}.items()
    }
    for i in range(layers):
        names |= {
            f"transformer_cross_attention_layers.{i}.norm": f"layers.{i}.norm1",
            f"transformer_self_attention_layers.{i}.norm": f"layers.{i}.norm2",
            f"transformer_ffn_layers.{i}.norm": f"layers.{i}.norm3",
            f"transformer_ffn_layers.{i}.linear1": f"layers.{i}.mlp.0",
            f"transformer_ffn_layers.{i}.linear2": f"layers.{i}.mlp.2",
            f"transformer_cross_attention_layers.{i}.multihead_attn.out_proj": f"layers.{i}.cross.out_proj",
            f"transformer_self_attention_layers.{i}.self_attn.out_proj": f"layers.{i}.mutual.out_proj",
        }
    whole = {
        "logit_scale": "head.scale",
        "query_feat.weight": "queries",
        "query_embed.weight": "query_positions",
        "level_embed.weight": "level_positions",
    }
    whole |= {
        f"transformer_{a}_attention_layers.{i}.{b}.in_proj_{kind}": f"layers.{i}.{c}.in_proj_{kind}"
        for i in range(layers)
        for kind in ("weight", "bias")
        for a, b, c in (("cross", "multihead_attn", "cross"), ("self", "self_attn", "mutual"))
    }
    return names, whole.items()


def decoder(tensors, prefix, width, hidden):
    module = MaskDecoder(
        MaskHead(width, width, dim=24, bias_heads=12), width, queries=6, layers=3, heads=4, hidden=hidden
    )
    return fill(module, tensors, prefix, *decoder_names(3))


def watch(module):
    "Every mask of blocked places that the head gives out, in order."
    seen, plain = [], module.head.blocked
    module.head.blocked = lambda *inputs: seen.append(plain(*inputs)) or seen[-1]
    return seen


def test_decoder(golden):
    g = golden["ebseg_decoder"]
    module, levels = decoder(g, "w.", 32, 64), [g[f"in.multi_scale_{i}"] for i in range(3)]
    blocked = watch(module)
    answers = module(levels, g["in.mask_features"], every=True)
    for i, answer in enumerate(answers):
        close(thinned(answer.masks), g[f"out.pred_masks_{i}_stride2"])
        close(answer.embeddings, g[f"out.mask_embeds_A_{i}"])
        close(thinned(answer.bias), g[f"out.attn_bias_{i}_stride2"])
        ours = (
            blocked[i]
            if i < 3
            else F.interpolate(answer.masks, (2, 3), mode="bilinear", align_corners=False).flatten(2) < 0
        )
        assert torch.equal(ours.repeat_interleave(4, 0), g[f"out.attn_mask_{i}"])
    (last,) = module(levels, g["in.mask_features"])
    close(thinned(last.masks), g["out.pred_masks_3_stride2"])
    close(last.embeddings, g["out.mask_embeds_A_3"])
    close(thinned(last.bias), g["out.attn_bias_3_stride2"])


def test_decoder_opens_blocked_rows(golden):
    "The second input, in which some queries have no mask at all."
    g = golden["ebseg_decoder"]
    module, levels = decoder(g, "w.", 32, 64), [g[f"in.multi_scale_{i}"] for i in range(3)]
    blocked = watch(module)
    (last,) = module(levels, g["in.shifted.mask_features"])
    for i in range(3):
        assert torch.equal(blocked[i].repeat_interleave(4, 0), g[f"out.shifted.attn_mask_{i}"])
    assert blocked[0].all(-1).any() and blocked[1].all(-1).any() and not blocked[0].all()
    close(thinned(last.masks), g["out.shifted.pred_masks_3_stride2"])
    close(last.embeddings, g["out.shifted.mask_embeds_A_3"])
    close(thinned(last.bias), g["out.shifted.attn_bias_3_stride2"])


def test_pixel_decoder(golden):
    "From fused maps to the last answer. The fusion itself belongs to systems/ebseg: test_ebseg.py."
    g, prefix = golden["ebseg_pixel_decoder"], "w.pixel_decoder."
    names = {
        "mask_features": "mask_features",
        "adapter_1": "lateral.0",
        "adapter_1.norm": "lateral.1",
        "layer_1": "smooth.0",
        "layer_1.norm": "smooth.1",
    }
    names |= {f"input_proj.{i}.{k}": f"project.{i}.{k}" for i in range(3) for k in range(2)}
    for i in range(2):
        theirs, ours = f"transformer.encoder.layers.{i}", f"layers.{i}"
        names |= {
            f"{theirs}.linear1": f"{ours}.mlp.0",
            f"{theirs}.linear2": f"{ours}.mlp.2",
            f"{theirs}.norm1": f"{ours}.norm1",
            f"{theirs}.norm2": f"{ours}.norm2",
        }
        names |= {f"{theirs}.self_attn.{a}": f"{ours}.attention.{b}" for a, b in DEFORMABLE.items()}
    module = fill(
        PixelDecoder((16, 24, 32, 40), 64, layers=2, heads=4, hidden=96),
        g,
        prefix,
        names,
        [("transformer.level_embed", "level_positions")],
    )
    levels, features = module([g["in.res2"], *(g[f"out.fused_res{i}"] for i in (3, 4, 5))])
    for i in range(3):
        close(levels[i], g[f"out.multi_scale_{i}"])
    close(thinned(features), g["out.mask_features_stride2"])
    (last,) = decoder(g, "w.predictor.", 64, 96)(levels, features)
    close(thinned(last.masks), g["out.pred_masks_stride2"])
    close(last.embeddings, g["out.mask_embeds_A"])
    close(thinned(last.bias), g["out.attn_bias_stride2"])


# ---- promises


def test_sampling_has_gradients():
    "Gradients of values, places and weights equal finite differences."
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(1, 2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)]
    places = (
        0.1 + 0.8 * torch.rand(1, 2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    ).requires_grad_()
    weights = torch.rand(1, 2, 3, 1, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, p, w: sample_levels([v], p, w), (*values, places, weights))


def test_no_padding_is_padding_nowhere():
    torch.manual_seed(0)
    module, x, shapes = DeformableAttention(16, 4, 2, 2), torch.randn(2, 26, 16), [(2, 3), (4, 5)]
    torch.nn.init.normal_(module.offsets.weight)
    centers = cell_centers(shapes)
    close(
        module(x, centers, x, shapes),
        module(x, centers.expand(2, 26, 2, 2), x, shapes, torch.zeros(2, 26, dtype=torch.bool)),
        1e-6,
    )


@pytest.mark.parametrize("grid", [(8, 8), (8, 5), (3, 10), (1, 1)])
def test_any_size_and_any_batch(grid):
    torch.manual_seed(0)
    pixels = (
        PixelDecoder((6, 8, 10), 16, mask_width=12, layers=1, heads=2, hidden=16, groups=4)
        .eval()
        .requires_grad_(False)
    )
    module = (
        MaskDecoder(
            MaskHead(16, 12, dim=7, bias_heads=3), 16, queries=5, layers=3, heads=2, hidden=16, levels=2
        )
        .eval()
        .requires_grad_(False)
    )
    maps = [torch.randn(3, c, scale * grid[0], scale * grid[1]) for c, scale in ((6, 4), (8, 2), (10, 1))]
    together = module(*pixels(maps), every=True)
    assert (
        [tuple(image.masks.shape) for image in together] == [(3, 5, 4 * grid[0], 4 * grid[1])] * 4
        and together[0].embeddings.shape == (3, 5, 7)
        and together[-1].bias.shape[:3] == (3, 3, 5)
    )
    for i in range(3):
        alone = module(*pixels([one[i : i + 1] for one in maps]))[-1]
        close(alone.masks[0], together[-1].masks[i])
        close(alone.embeddings[0], together[-1].embeddings[i])
        close(alone.bias[0], together[-1].bias[i])


def test_permuting_queries_permutes_answers():
    torch.manual_seed(0)
    module = (
        MaskDecoder(MaskHead(16, 16, dim=7), 16, queries=5, layers=2, heads=2, hidden=16, levels=2)
        .eval()
        .requires_grad_(False)
    )
    levels, features, order = (
        [torch.randn(1, 16, 4, 4), torch.randn(1, 16, 8, 8)],
        torch.randn(1, 16, 16, 16),
        torch.randperm(5),
    )
    (before,) = module(levels, features)
    module.queries.copy_(module.queries[order].clone())
    module.query_positions.copy_(module.query_positions[order].clone())
    (after,) = module(levels, features)
    close(after.masks, before.masks[:, order])
    close(after.embeddings, before.embeddings[:, order])


def test_training_gives_all_answers_and_bias_a_gradient():
    torch.manual_seed(0)
    module = MaskDecoder(
        MaskHead(16, 16, dim=7, bias_heads=2), 16, queries=5, layers=2, heads=2, hidden=16, levels=1
    ).train()
    answers = module([torch.randn(2, 16, 4, 4)], torch.randn(2, 16, 8, 8))
    assert len(answers) == 3
    sum(
        value.masks.square().mean() + value.embeddings[..., 0].mean() + value.bias.square().mean()
        for value in answers
    ).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_half_precision_around_the_pixel_decoder_changes_nothing():
    torch.manual_seed(0)
    module, maps = (
        PixelDecoder((6, 8), 16, layers=1, heads=2, hidden=16, groups=4).eval().requires_grad_(False),
        [torch.randn(1, 6, 8, 8), torch.randn(1, 8, 4, 4)],
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = module(maps)[1]
    assert half.dtype == torch.float32
    close(half, module(maps)[1], 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DeformableAttention(10, heads=4),
        lambda: DeformableAttention(8, 2, 1, 2)(
            torch.zeros(1, 3, 8), torch.zeros(1, 3, 1, 2), torch.zeros(1, 7, 8), [(2, 3)]
        ),
        lambda: DeformableAttention(8, 2, 1, 2)(
            torch.zeros(1, 6, 8), torch.zeros(1, 6, 1, 3), torch.zeros(1, 6, 8), [(2, 3)]
        ),
        lambda: PixelDecoder((8,), 16),
        lambda: PixelDecoder((8, 8), 16, groups=32),
        lambda: PixelDecoder((8, 8), 16, layers=1, heads=2, groups=4)([torch.zeros(1, 8, 4, 4)] * 3),
        lambda: MaskDecoder(MaskHead(16, 16), 16, 3, 1, 2, 16)(
            [torch.zeros(1, 16, 2, 2)], torch.zeros(1, 16, 4, 4)
        ),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match="must|needs at least|reads|multiple"):
        wrong()
