"""Multi-Res:
slices come back exactly, fusion and masks equal their formulas place by place, and proposals see the token
that their mask points at.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from doubles import small_clip_model
from ovss_nb.encoders.base import Encoder
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.encoders.lite import LiteEncoder
from ovss_nb.components.mask_classification import mlp
from ovss_nb.encoders.attention import multi_grained_attention
from ovss_nb.components.sliding_window import even_offsets
from ovss_nb.components.multi_resolution import (
    AttentionMasks,
    MaskPyramid,
    MultiResAdapter,
    MultiResFusion,
    Views,
    cut_slices,
    resize,
    merge_slices,
    encode_views,
    separable,
    small_grid,
)


def small_clip(patch=16, quick_gelu=True):
    model = small_clip_model(patch, quick_gelu=quick_gelu, vocab_size=100)
    for parameter in model.visual.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # no bias is zero any more
    return CLIPEncoder(model, device="cpu")


@pytest.fixture(scope="module")
def clip():
    return small_clip()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- slices


@pytest.mark.parametrize(
    "grid, size",
    [
        ((40, 40), 20),
        ((40, 60), 20),
        ((60, 40), 20),
        ((40, 40), 30),
        ((40, 40), 25),
        ((40, 40), 10),
        ((37, 53), 16),
        ((20, 20), 20),
        ((5, 9), 1),
    ],
)
def test_restoring_is_the_inverse_of_cutting(grid, size):
    "The identity on a coordinate image, for two images at once."
    coordinates = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).float()
    images = torch.stack([coordinates, 100 - coordinates])
    assert torch.allclose(merge_slices(cut_slices(images, size), grid), images, atol=1e-4)


def test_overlaps_are_averaged():
    # 2 x 2 slices of 3 on 4 x 4 places
    maps = torch.stack([torch.full((1, 3, 3), float(k)) for k in range(4)])
    expected = torch.tensor([[0, 0.5, 0.5, 1], [1, 1.5, 1.5, 2], [1, 1.5, 1.5, 2], [2, 2.5, 2.5, 3]])
    assert torch.allclose(merge_slices(maps, (4, 4))[0, 0], expected)


def test_slices_start_at_whole_places():
    image = random(1, 3, 64, 112)
    slices = cut_slices(image, 48, 16)
    assert slices.shape == (2 * 3, 3, 48, 48) and torch.equal(slices[4], image[0, :, 16:64, 32:80])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: cut_slices(torch.zeros(1, 3, 64, 64), 40, 16),
        lambda: cut_slices(torch.zeros(1, 3, 60, 64), 32, 16),
        lambda: cut_slices(torch.zeros(1, 3, 32, 64), 48, 16),
        lambda: merge_slices(torch.zeros(3, 1, 2, 2), (4, 4)),
        lambda: merge_slices(torch.zeros(4, 1, 2, 3), (4, 4)),
    ],
)
def test_slices_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="slices|does not fit"):
        wrong()


@pytest.mark.parametrize("side", [(64, 64), (64, 96), (96, 128)])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_restored_tokens_are_those_of_each_slice(clip, side, size):
    "Against the encoder's own `layers`, slice by slice, also where they overlap."
    images = random(2, 3, *side)
    with torch.no_grad():
        views = encode_views(clip, images, size, [1, 4])
        for b in range(2):
            total, count = (
                torch.zeros(32, side[0] // 16, side[1] // 16),
                torch.zeros(side[0] // 16, side[1] // 16),
            )
            for top in even_offsets(side[0] // 16, size // 16):
                for left in even_offsets(side[1] // 16, size // 16):
                    place = slice(top, top + size // 16), slice(left, left + size // 16)
                    total[:, *place] += clip.layers(
                        images[b : b + 1, :, top * 16 : top * 16 + size, left * 16 : left * 16 + size], [3]
                    )[0][0]
                    count[place] += 1
            assert torch.allclose(views.high[4][b], total / count, atol=1e-4)


def test_small_view_and_class_token(clip):
    images = random(1, 3, 80, 112)  # 5 x 7 places: the small view has 3 x 4
    with torch.no_grad():
        views = encode_views(clip, images, None, [0, 3])
        small = F.interpolate(images, (48, 64), mode="bilinear", antialias=True)
        x = clip.embed(small)
        assert torch.allclose(views.low[0].flatten(2).mT, x[:, 1:], atol=1e-5) and torch.allclose(
            views.cls[0], x[:, 0], atol=1e-5
        )
        for block in clip.blocks[:3]:
            x = block(x)
    assert (
        views.low[3].shape == (1, 32, 3, 4)
        and torch.allclose(views.cls[3], x[:, 0], atol=1e-5)
        and views.high == {}
    )


@pytest.mark.parametrize("reduction", [1, 2, 3, 4])
def test_the_small_grid_is_what_a_strided_convolution_gives(reduction):
    for grid in ((1, 1), (5, 7), (20, 30), (15, 16)):
        assert separable(4, reduction)(torch.zeros(1, 4, *grid)).shape[-2:] == small_grid(grid, reduction)


@pytest.mark.parametrize("layers", [[], [5], [-1]])
def test_unknown_layers_are_refused(clip, layers):
    with pytest.raises(ValueError, match="layers"):
        encode_views(clip, torch.zeros(1, 3, 64, 64), 32, layers)


def test_an_encoder_without_blocks_is_refused():
    class Blockless(Encoder):
        name, stride = "blockless", 16

    with pytest.raises(ValueError, match="transformer blocks"):
        encode_views(Blockless(), torch.zeros(1, 3, 64, 64), 32, [0])


# ---- fusion


def test_fusion_is_its_formula():
    "MR-1 and MR-2 with all defaults, written out once more."
    torch.manual_seed(0)
    fusion, high, low = MultiResFusion(12, 8), random(2, 12, 7, 10), random(2, 12, 4, 5, seed=1)

    def enter(x):
        return F.linear(
            F.layer_norm(x.permute(0, 2, 3, 1), (12,)), fusion.project.weight, fusion.project.bias
        ).permute(0, 3, 1, 2)

    def conv(x, depth, point, stride):
        return F.conv2d(F.conv2d(x, depth.weight, depth.bias, stride, 1, groups=8), point.weight, point.bias)

    h, l = enter(high), enter(low)
    a = torch.sigmoid(
        F.conv2d(F.gelu(conv(h, *fusion.scale[0], 2)), fusion.scale[2].weight, fusion.scale[2].bias)
    )

    def up(x):
        return F.interpolate(x, (7, 10), mode="bilinear", align_corners=False)

    assert torch.allclose(
        fusion(high, low, (7, 10)), up(a) * conv(h, *fusion.detail, 1) + up((1 - a) * l), atol=1e-5
    )


@pytest.mark.parametrize("bias, which", [(200.0, "low"), (-200.0, "high")])
def test_full_trust_removes_the_other_view(bias, which):
    torch.manual_seed(0)
    fusion, views = MultiResFusion(8, 8), dict(high=random(1, 8, 6, 6), low=random(1, 8, 3, 3))
    nn.init.constant_(fusion.scale[-1].bias, bias)
    other = views | {which: views[which].flip(1) + 3 * random(*views[which].shape, seed=2)}
    assert torch.equal(fusion(**views, grid=(6, 6)), fusion(**other, grid=(6, 6)))
    nn.init.zeros_(fusion.scale[-1].bias)
    assert not torch.allclose(fusion(**views, grid=(6, 6)), fusion(**other, grid=(6, 6)), atol=1e-3)


@pytest.mark.parametrize("kind", ["scale", "add", "concat", "low"])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_kind_of_fusion_learns(kind, normalize):
    fusion = MultiResFusion(8, 12, kind=kind, normalize=normalize)
    (fusion(random(1, 8, 4, 6), random(1, 8, 2, 3), (4, 6)) * random(1, 12, 4, 6)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fusion.parameters())


# ---- adapter

SIZES = dict(num_fused=3, width=16, depth=4, heads=2, queries=5, grid=4)


def layers(batch=1, seed=0):
    return [random(batch, 32, 4, 6, seed=seed + i) for i in range(3)], [
        random(batch, 32, 2, 3, seed=seed + 10 + i) for i in range(3)
    ]


@pytest.mark.parametrize("positions", ["every", "once"])
def test_adapter_step_by_step(positions):
    torch.manual_seed(0)
    adapter, (high, low) = MultiResAdapter(32, inject=(0, 2, 2), positions=positions, **SIZES), layers()
    fused = [fusion(h, l, (4, 6)) for fusion, h, l in zip(adapter.fusions, high, low)]
    places = F.interpolate(adapter.positions, (4, 6), mode="bicubic").flatten(2).mT[0]
    added = torch.cat([adapter.query_positions, places])
    stem = random(1, 32, 4, 6, seed=20)
    x = torch.cat([adapter.queries, adapter.stem(stem.flatten(2).mT)[0]])[None] + added
    expected = []
    for i, block in enumerate(adapter.blocks):
        if i and positions == "every":
            x = x + added
        for k in {0: [0], 2: [1, 2]}.get(i, []):
            x = x + torch.cat([torch.zeros(5, 16), fused[k].flatten(2).mT[0]])
        x = block(x)
        expected.append(F.layer_norm(x, (16,)))
    outputs, seen = adapter(stem, high, low, (4, 6), every=True)
    assert len(outputs) == 2 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused, seen))
    for (queries, tokens), one in zip(outputs, expected[-2:]):
        assert torch.allclose(queries, one[:, :5], atol=1e-4) and torch.allclose(
            tokens.flatten(2).mT, one[:, 5:], atol=1e-4
        )
    (last,), _ = adapter(stem, high, low, (4, 6))
    assert torch.allclose(last[0], outputs[-1][0], atol=1e-5)


def test_a_batch_is_its_images():
    torch.manual_seed(0)
    adapter, (high, low) = MultiResAdapter(32, **SIZES), layers(3)
    stem = random(3, 32, 4, 6, seed=20)
    ((queries, tokens),) = adapter(stem, high, low, (4, 6))[0]
    for b in range(3):
        ((q, t),) = adapter(
            stem[b : b + 1], [value[b : b + 1] for value in high], [value[b : b + 1] for value in low], (4, 6)
        )[0]
        assert torch.allclose(queries[b : b + 1], q, atol=1e-5) and torch.allclose(
            tokens[b : b + 1], t, atol=1e-5
        )


def test_single_resolution_needs_no_slices():
    adapter = MultiResAdapter(32, fusion="low", **SIZES)
    stem = random(1, 32, 2, 3, seed=20)
    ((queries, tokens),) = adapter(stem, None, layers()[1], (4, 6))[0]
    assert queries.shape == (1, 5, 16) and tokens.shape == (1, 16, 4, 6)
    assert sum(parameter.numel() for parameter in adapter.parameters()) < sum(
        parameter.numel() for parameter in MultiResAdapter(32, **SIZES).parameters()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        dict(inject=(0, 1)),
        dict(inject=(0, 1, 4)),
        dict(positions="never"),
        dict(supervised=0),
        dict(supervised=5),
        dict(width=15),
        dict(fusion="max"),
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError):
        MultiResAdapter(32, **(SIZES | wrong))


# ---- masks


def test_pyramid_step_by_step():
    torch.manual_seed(0)
    pyramid, queries, tokens = MaskPyramid(16, 8), random(2, 5, 8), random(2, 16, 3, 4)
    fused = [random(2, 16, 3, 4, seed=i) for i in range(1, 4)]

    def side(i, factor):
        return (
            F.interpolate(
                F.conv2d(fused[i], pyramid.reduce[i].weight, pyramid.reduce[i].bias),
                scale_factor=factor,
                mode="bilinear",
            )
            if factor > 1
            else pyramid.reduce[i](fused[i])
        )

    x = torch.cat([tokens, side(0, 1)], 1)
    x = torch.cat([F.gelu(F.conv_transpose2d(x, pyramid.up[0].weight, pyramid.up[0].bias, 2)), side(1, 2)], 1)
    x = torch.cat([F.gelu(F.conv_transpose2d(x, pyramid.up[1].weight, pyramid.up[1].bias, 2)), side(2, 4)], 1)
    logits = pyramid(queries, tokens, fused)
    assert logits.shape == (2, 5, 12, 16)
    for row, column in ((0, 0), (5, 11), (11, 15)):
        assert torch.allclose(
            logits[:, :, row, column],
            (queries * pyramid.pixels(x[:, :, row, column])[:, None]).sum(-1),
            atol=1e-5,
        )


def test_masks_without_a_pyramid_have_the_tokens_grid():
    pyramid = MaskPyramid(16, 8, hierarchical=False)
    assert pyramid(random(1, 5, 8), random(1, 16, 3, 4), []).shape == (1, 5, 3, 4) and not hasattr(
        pyramid, "up"
    )


def test_attention_masks_are_plain_products():
    "MR-7 and MR-8, with all features of all heads made first; the gradients agree too."
    torch.manual_seed(0)
    masks, queries, tokens = (
        AttentionMasks(16, 3, 8),
        random(2, 5, 8).requires_grad_(),
        random(2, 16, 5, 7, seed=1),
    )
    masks.scale.data, masks.shift.data = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -0.5])

    def plain(head, x):
        return torch.einsum("bnc,bphc->bhnp", queries, head(x.flatten(2).mT).unflatten(-1, (3, 8)))

    expected = torch.cat(
        [
            2 * plain(masks.coarse, F.adaptive_max_pool2d(tokens, (3, 4))) + 0.5,
            3 * plain(masks.fine, tokens) - 0.5,
        ],
        -1,
    )
    found = masks(queries, tokens, (3, 4))
    assert found.shape == (2, 3, 5, 12 + 35) and torch.allclose(found, expected, atol=1e-5)
    weight = random(*found.shape, seed=2)
    parameters = [queries, *masks.fine.parameters(), *masks.coarse.parameters()]
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
    ):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_masks_of_the_small_view_alone():
    masks = AttentionMasks(16, 3, 8, local=False)
    assert masks(random(1, 5, 8), random(1, 16, 4, 6), (2, 3)).shape == (1, 3, 5, 6) and not hasattr(
        masks, "fine"
    )


def test_three_layers():
    head = mlp(4, 8, 2)
    x = random(5, 4)
    for i in (0, 2, 4):
        x = (
            x @ head[i].weight.T + head[i].bias
            if i == 0
            else x.clamp(min=0) @ head[i].weight.T + head[i].bias
        )
    assert torch.allclose(head(random(5, 4)), x, atol=1e-6)


# ---- multi-grained attention

ENCODERS = dict(
    clip=small_clip,
    gelu=lambda: small_clip(quick_gelu=False),
    lite=lambda: LiteEncoder("random", device="cpu"),
)


@pytest.fixture(scope="module", params=ENCODERS)
def seen(request):
    "An encoder, two pictures of 4 x 6 places, and views of its last two blocks; slices of 2 x 2 places."
    encoder = ENCODERS[request.param]()
    images = random(2, 3, 4 * encoder.stride, 6 * encoder.stride)
    with torch.no_grad():
        return encoder, images, encode_views(encoder, images, 2 * encoder.stride, [2, 3])


def attend(encoder, views, masks, positions):
    with torch.no_grad():
        return multi_grained_attention(
            list(encoder.blocks)[2:], [views.tokens(2), views.tokens(3)], views.cls[2], positions, masks
        )


def test_without_masks_proposals_differ_by_their_position_alone(seen):
    encoder, _, views = seen
    width, heads = views.cls[2].shape[-1], encoder.blocks[0].attn.num_heads
    masks, positions = torch.zeros(2, heads, 5, 30), random(5, width)
    same = attend(encoder, views, masks, torch.zeros(5, width))
    assert torch.allclose(same, same[:, :1].expand_as(same), atol=1e-4) and not torch.allclose(
        same[0], same[1], atol=1e-3
    )
    apart = attend(encoder, views, masks, positions)
    assert not torch.allclose(apart[:, 0], apart[:, 1], atol=1e-3)
    assert torch.allclose(attend(encoder, views, masks, positions.flip(0)), apart.flip(1), atol=1e-4)
    # nobody sees anybody
    assert torch.allclose(attend(encoder, views, masks[:, :, :1], positions[2:3]), apart[:, 2:3], atol=1e-4)


def test_equals_attention_over_concatenated_tokens(seen):
    "MR-9 by torch's own attention, softmax over both views at once."
    encoder, _, views = seen
    width, heads = views.cls[2].shape[-1], encoder.blocks[0].attn.num_heads
    masks, positions = 3 * random(2, heads, 5, 30), random(5, width)
    x = views.cls[2][:, None] + positions
    with torch.no_grad():
        for layer in (2, 3):
            block = encoder.blocks[layer]
            keys = torch.cat([views.low[layer].flatten(2), views.high[layer].flatten(2)], 2).mT
            x = x + block.ls_1(
                block.attn(
                    block.ln_1(x),
                    block.ln_1(keys),
                    block.ln_1(keys),
                    attn_mask=masks.flatten(0, 1),
                    need_weights=False,
                )[0]
            )
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
    assert torch.allclose(attend(encoder, views, masks, positions), x, atol=1e-3)


@pytest.mark.parametrize("row, column", [(0, 0), (1, 4), (2, 1), (3, 5)])
def test_a_delta_mask_finds_its_token(seen, row, column):
    """The order of high-resolution tokens:
    the mask is drawn on the picture's raster, the expected token comes from its slice alone.
    """
    encoder, images, views = seen
    stride, heads, width = encoder.stride, encoder.blocks[0].attn.num_heads, views.cls[2].shape[-1]
    raster = torch.full((2, heads, 1, 4, 6), -1e4)
    raster[..., row, column] = 0
    found = attend(
        encoder,
        views,
        torch.cat([torch.full((2, heads, 1, 6), -1e4), raster.flatten(3)], -1),
        torch.zeros(1, width),
    )
    top, left = row // 2 * 2, column // 2 * 2
    with torch.no_grad():
        alone = encoder.layers(
            images[..., top * stride : (top + 2) * stride, left * stride : (left + 2) * stride], [1, 2]
        )
        x = views.cls[2][:, None]
        for block, tokens in zip(list(encoder.blocks)[2:], alone):
            token = block.ln_1(tokens[:, :, row - top, column - left][:, None])
            # attention to one token is its value
            x = x + block.ls_1(block.attn(token, token, token, need_weights=False)[0])
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
    assert torch.allclose(found, x, atol=1e-3)


def test_a_delta_mask_finds_its_token_in_the_small_view(seen):
    encoder, images, views = seen
    heads, width = encoder.blocks[0].attn.num_heads, views.cls[2].shape[-1]
    masks = torch.full((2, heads, 1, 30), -1e4)
    masks[..., 3 + 2] = 0  # row 1, column 2 of 2 x 3
    other = Views({i: tensor.flip(1) for i, tensor in views.high.items()}, views.low, views.cls)
    found = attend(encoder, views, masks, torch.zeros(1, width))
    assert torch.allclose(found, attend(encoder, other, masks, torch.zeros(1, width)), atol=1e-4)
    with torch.no_grad():
        x = views.cls[2][:, None]
        for layer in (2, 3):
            block, token = encoder.blocks[layer], views.low[layer][:, None, :, 1, 2]
            token = block.ln_1(token)
            x = x + block.ls_1(block.attn(token, token, token, need_weights=False)[0])
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
    assert torch.allclose(found, x, atol=1e-3)


def test_masks_are_learned_through_frozen_blocks(seen):
    encoder, _, views = seen
    masks = torch.zeros(2, encoder.blocks[0].attn.num_heads, 5, 30, requires_grad=True)
    positions = torch.zeros(5, views.cls[2].shape[-1], requires_grad=True)
    x = multi_grained_attention(
        list(encoder.blocks)[2:], [views.tokens(2), views.tokens(3)], views.cls[2], positions, masks
    )
    (encoder.project(x) * random(*encoder.project(x).shape)).sum().backward()
    assert (
        masks.grad.abs().sum() > 0
        and positions.grad.abs().sum() > 0
        and all(parameter.grad is None for parameter in encoder.parameters())
    )


def test_tokens_for_every_block(seen):
    encoder, _, views = seen
    with pytest.raises(ValueError, match="2 blocks"):
        multi_grained_attention(
            list(encoder.blocks)[2:],
            [views.tokens(3)],
            views.cls[3],
            torch.zeros(1, views.cls[3].shape[-1]),
            torch.zeros(2, 1, 1, 30),
        )


def test_resize_of_the_same_grid_costs_nothing():
    x = random(1, 2, 3, 4)
    assert resize(x, (3, 4)) is x and torch.allclose(
        resize(x, (6, 8)), F.interpolate(x, scale_factor=2, mode="bilinear")
    )
