"MROVSeg: pictures of every shape, batches, classes in any order, every switch, files, and that it learns."

import itertools
import json
from pathlib import Path
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from doubles import Colors, small_clip
from ovss_nb.encoders.lite import LiteEncoder
from ovss_nb.systems.mrovseg import MROVSeg, MROVSegConfig
from ovss_nb.text.text_bank import TextBank


TINY = dict(
    weights="random", width=32, depth=5, heads=4, queries=6, channels=16, templates="plain", loss_points=256
)
WORDS = ["red", "green", "blue", "grey"]


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def system(clip):
    return MROVSeg(clip, size=64, **TINY)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def close(a, b, tolerance=1e-4):
    assert a.shape == b.shape and torch.allclose(a, b, atol=tolerance), float((a - b).abs().max())


# ---- sizes


@pytest.mark.parametrize(
    "height, width, resized, padded",
    [
        (64, 64, (64, 64), (64, 64)),
        (60, 90, (64, 96), (64, 96)),
        (97, 50, (124, 64), (128, 64)),
        (50, 1000, (13, 256), (32, 256)),
        (1, 1, (64, 64), (64, 64)),
        (300, 451, (64, 96), (64, 96)),
    ],
)
def test_every_picture_has_its_sizes(system, height, width, resized, padded):
    image = system.encode_image(picture(height, width))
    assert (image.resized_size, image.padded_size) == (resized, padded)
    grid = padded[0] // 16, padded[1] // 16
    assert (
        image.views.high[3].shape == (1, 32, *grid)
        and image.views.low[3].shape == (1, 32, -(-grid[0] // 2), -(-grid[1] // 2))
        and list(image.views.cls) == [3]
    )
    assert system.scores(image, system.encode_text(WORDS)).shape == (4, *resized)
    ((embeddings, masks, attention),) = system.outputs([image])
    assert (
        embeddings.shape == (1, 6, 24)
        and masks.shape == (1, 6, 4 * grid[0], 4 * grid[1])
        and attention.shape == (1, 2, 6, grid[0] * grid[1] + image.views.low[3][0, 0].numel())
    )
    close(embeddings.norm(dim=-1), torch.ones(1, 6))


@pytest.mark.parametrize(
    "ratio, side, padded",
    [(0.5, 32, (64, 96)), (0.75, 48, (64, 96)), (1.0, 64, (64, 128)), (0.25, 16, (64, 80))],
)
def test_slice_ratios(clip, ratio, side, padded):
    system = MROVSeg(clip, size=64, slice_ratio=ratio, **TINY)
    image = system.encode_image(picture(64, 80))
    assert (
        system.slice == side
        and image.padded_size == padded
        and system.scores(image, system.encode_text(WORDS)).shape == (4, 64, 80)
    )


def test_filling_up_is_grey_and_at_the_bottom_and_right(system):
    shown, _ = system.preprocess(picture(64, 80))
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (system.encoder.mean, system.encoder.std)
    )
    pixels = (shown * deviation + mean) * 255
    close(pixels[..., 80:], torch.full((1, 3, 64, 16), 128.0), 1e-2)
    close(pixels[..., :80], torch.from_numpy(picture(64, 80)).permute(2, 0, 1)[None].float(), 1e-2)


def test_a_picture_smaller_than_a_slice_is_filled_up_to_one(clip):
    system = MROVSeg(clip, size=64, longest=80, slice_ratio=0.75, **TINY)
    assert system.encode_image(picture(10, 80)).padded_size == (48, 96)


@pytest.mark.parametrize(
    "blocks, layers, start, kept",
    [
        (4, (0, 1, 2, 3, 4), 3, [0, 1, 2, 3, 4]),
        (12, (0, 3, 6, 9, 12), 9, [0, 3, 6, 9, 10, 11, 12]),
        (24, (0, 6, 12, 18), 18, [0, 6, 12, 18, 19, 20, 21, 22, 23]),
    ],
)
def test_layers_of_the_paper(blocks, layers, start, kept):
    system = MROVSeg(small_clip(layers=blocks), size=64, **TINY)
    assert (system.fused_layers, system.proposal_start, system.kept) == (layers, start, kept)
    assert system.segment(picture(40, 64), WORDS).labels.shape == (40, 64)


def test_patches_of_14_at_672():
    "L/14: 672 pixels, slices of 336, 24 x 24 places each."
    system = MROVSeg(small_clip(patch=14), size=672, **TINY)
    image = system.encode_image(picture(672, 700))
    assert (
        system.slice == 336
        and image.padded_size == (672, 1008)
        and image.views.high[0].shape[-2:] == (48, 72)
        and image.views.low[0].shape[-2:] == (24, 36)
    )
    with pytest.raises(ValueError, match="take 630 or 644"):
        MROVSeg(small_clip(patch=14), size=640, **TINY)


@pytest.mark.parametrize(
    "wrong, match",
    [
        (dict(slice_pixels=40), "multiple of 16"),
        (dict(slice_pixels=80), "at most size"),
        (dict(pad_to=24), "stride"),
        (dict(fused_layers=(0, 5, 1)), "from 0 to 4"),
        (dict(proposal_start=4), "proposal_start=4"),
        (dict(pyramid=(0, 1, 5)), "fused layers"),
        (dict(inject=(0, 1)), "inject"),
    ],
)
def test_wrong_sizes_are_refused(clip, wrong, match):
    with pytest.raises(ValueError, match=match):
        MROVSeg(clip, size=64, **(TINY | wrong))


def test_an_encoder_without_blocks_and_a_foreign_image_are_refused(system):
    with pytest.raises(ValueError, match="transformer blocks"):
        MROVSeg(Colors(), size=64, **TINY)
    from ovss_nb.systems.base import EncodedImage

    with pytest.raises(ValueError, match="in its own way"):
        system.scores(EncodedImage(picture(4, 4), None), system.encode_text(WORDS))


def test_weights_are_asked_for(clip):
    with pytest.raises(ValueError, match="weights"):
        MROVSeg(clip, size=64)


# ---- equivalences


def test_a_batch_is_its_images(system):
    images = [picture(64, 64), picture(64, 96, 1), picture(64, 64, 2), picture(60, 96, 3), picture(64, 90, 4)]
    alone = [system.encode_image(image) for image in images]
    together, text = system.encode_images(images), system.encode_text(WORDS)
    for a, b in zip(alone, together):
        close(a.views.tokens(3), b.views.tokens(3))
    for a, b in zip(alone, system.batch_scores(together, text)):
        close(system.scores(a, text), b)


def test_classes_in_another_order(system):
    image, text = system.encode_image(picture(64, 80)), system.encode_text(WORDS)
    order = [2, 0, 3, 1]
    close(system.scores(image, text.select(order)), system.scores(image, text)[order])
    assert (
        system.segment(image, [WORDS[name] for name in order]).labels
        == np.argsort(order)[system.segment(image, WORDS).labels]
    ).mean() > 0.999


def test_scores_by_hand(system):
    """MR-10 and MR-11 at one pixel:
    cosines with words and background, softmax, background dropped, masks' probabilities.
    """
    image, text = system.encode_image(picture(64, 80)), system.encode_text(WORDS)
    ((embeddings, masks, _),) = system.outputs([image])
    background = F.normalize(system.network.classifier.background, dim=0)
    cosines = embeddings[0] @ torch.cat([text.mean(), background[None]]).T
    chance = (float(system.encoder.model.logit_scale.exp()) * cosines).softmax(-1)[:, :-1]
    drawn = F.interpolate(masks, (64, 96), mode="bilinear")[0, :, 40, 70].sigmoid()
    close(system.scores(image, text)[:, 40, 70], (chance * drawn[:, None]).sum(0))


def test_the_best_of_several_texts(clip):
    """With one text per class the poolings agree;
    a class with a second text that equals another class's can only gain.
    """
    best = MROVSeg(clip, size=64, **(TINY | dict(pooling="max")))
    mean = MROVSeg(clip, size=64, **TINY)
    image, text = best.encode_image(picture(64, 64)), best.encode_text(WORDS)
    close(best.scores(image, text), mean.scores(image, text))
    ((embeddings, _, _),) = best.outputs([image])
    vectors, mask = torch.zeros(4, 2, 24), torch.tensor([[True, True]] + [[True, False]] * 3)
    vectors[:, 0], vectors[0, 1] = text.embeddings[:, 0], text.embeddings[1, 0]
    double = TextBank(
        vectors, mask, text.names, ((WORDS[0], WORDS[1]), *((name,) for name in WORDS[1:])), ("{}",)
    )
    single, both = best.class_logits(embeddings, text), best.class_logits(embeddings, double)
    close(both[..., 0], torch.maximum(single[..., 0], single[..., 1]))
    close(both[..., 1:], single[..., 1:])


def test_resolution_of_the_image(clip):
    "Masks enlarged to the input, cut, resized to the image, and only then combined."
    system = MROVSeg(clip, size=64, resolution="image", **TINY)
    image, text = system.encode_image(picture(100, 130)), system.encode_text(WORDS)
    ((embeddings, masks, _),) = system.outputs([image])
    own = F.interpolate(
        F.interpolate(masks, image.padded_size, mode="bilinear")[
            ..., : image.resized_size[0], : image.resized_size[1]
        ],
        (100, 130),
        mode="bilinear",
    )
    expected = torch.einsum(
        "nk,nhw->khw", system.class_logits(embeddings, text)[0].softmax(-1)[:, :-1], own[0].sigmoid()
    )
    close(system.scores(image, text), expected)


def test_resolution_of_the_masks(clip):
    """Without what was filled up:
    64 of 64 rows and 80 of 96 columns are 16 of 16 and 20 of 24 places (20 whole places: nothing is read
    between them).
    """
    system = MROVSeg(clip, size=64, resolution="masks", **TINY)
    image, text = system.encode_image(picture(64, 80)), system.encode_text(WORDS)
    ((embeddings, masks, _),) = system.outputs([image])
    chance = system.class_logits(embeddings, text)[0].softmax(-1)[:, :-1]
    assert image.padded_size == (64, 96) and masks.shape[-2:] == (16, 24)
    close(system.scores(image, text), torch.einsum("nk,nhw->khw", chance, masks[0, :, :, :20].sigmoid()))


@pytest.mark.parametrize("logit_scale", [None, 10.0])
def test_the_factor_of_the_cosines(clip, logit_scale):
    assert MROVSeg(clip, size=64, logit_scale=logit_scale, **TINY).network.classifier.scale == pytest.approx(
        logit_scale or float(clip.model.logit_scale.exp()), rel=1e-5
    )


# ---- switches

SWITCHES = [
    dict(zip(("multi_resolution", "hierarchical", "multi_grained"), value))
    for value in itertools.product((True, False), repeat=3)
]


@pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda switches: "".join("01"[v] for v in switches.values())
)
def test_every_switch(clip, switches):
    "Sizes, and what depends on what: without slices only the small view is seen, and every parameter learns."
    system = MROVSeg(clip, size=64, **(TINY | switches), keep_aspect=False)
    image, text = system.encode_image(picture(64, 64)), system.encode_text(WORDS)
    sliced = switches["multi_resolution"] or switches["multi_grained"]
    assert bool(image.views.high) == sliced
    ((_, masks, attention),) = system.outputs([image])
    assert masks.shape[-1] == (16 if switches["hierarchical"] else 4) and attention.shape[-1] == (
        4 + 16 if switches["multi_grained"] else 4
    )
    system.network.requires_grad_(True)
    labels = torch.randint(4, (1, 64, 64), generator=torch.Generator().manual_seed(0))
    loss, parts = system.loss(
        [system.from_cache(system.to_cache(image))], labels, text, torch.Generator().manual_seed(0)
    )
    loss.backward()
    idle = [
        name
        for name, parameter in system.network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert set(parts) == {"class", "mask", "dice"} and all(name.startswith("attention.s") for name in idle), (
        idle
    )


def test_high_and_low_both_count(system):
    text, image = system.encode_text(WORDS), system.encode_image(picture(64, 64))
    plain = system.scores(image, text)
    for table in (image.views.high, image.views.low, image.views.cls):
        kept = dict(table)
        for i in table:
            table[i] = table[i].flip(1)
        assert not torch.allclose(system.scores(image, text), plain, atol=1e-4)
        table.update(kept)


def test_san_style_proposals_see_the_small_view_alone(clip):
    """Proposals without multi-grained attention:
    the embeddings of `propose` with the global mask, and no word of slices.
    """
    from ovss_nb.encoders.attention import propose

    system = MROVSeg(clip, size=64, **(TINY | dict(multi_grained=False)))
    image = system.encode_image(picture(64, 64))
    ((embeddings, _, attention),) = system.outputs([image])
    tokens = torch.cat([image.views.cls[3][:, None], image.views.low[3].flatten(2).mT], 1)
    sos = propose(clip.blocks[3:], tokens, attention)[0]
    close(embeddings, F.normalize(clip.project(sos), dim=-1))


@pytest.mark.parametrize(
    "options",
    [
        dict(fusion="add"),
        dict(fusion="concat"),
        dict(positions="once"),
        dict(normalize=False),
        dict(inject=(0, 0, 1, 2, 4)),
        dict(fused_layers=(0, 2, 4), pyramid=(2, 1, 0)),
        dict(proposal_start=2),
        dict(reduction=1),
        dict(reduction=4),
        dict(supervised=1),
        dict(width=40),
    ],
)
def test_every_option(clip, options):
    system = MROVSeg(clip, size=64, **(TINY | options))
    found = system.segment(picture(50, 70), WORDS)
    assert found.labels.shape == (50, 70) and np.isfinite(found.scores).all()
    assert MROVSegConfig.from_dict(json.loads(json.dumps(system.config.to_dict()))) == system.config


# ---- what enters the adapter

STEMS = [
    dict(),
    dict(fused_layers=(0, 3, 6, 9, 12)),
    dict(fused_layers=(3, 6, 9)),
    dict(fused_layers=(3, 6, 9, 12)),
    dict(fused_layers=(9, 0, 3, 6)),
    dict(fused_layers=(3, 6, 9), multi_resolution=False),
    dict(fused_layers=(3, 6, 9), multi_resolution=False, multi_grained=False),
    dict(fused_layers=(6,), hierarchical=False),
    dict(fused_layers=(1, 3, 4), pyramid=(2, 1, 0), proposal_start=1),
]


@pytest.mark.parametrize("options", STEMS)
def test_the_stem_enters_the_adapter_whatever_is_fused(options):
    """MROVSeg's adapter:
    queries join the tokens of layer 0; the expected ones come from the encoder's own `embed`, slice by slice.
    """
    system = MROVSeg(small_clip(layers=12), size=64, **(TINY | options), keep_aspect=False)
    image, given = system.encode_image(picture(64, 64)), []
    handle = system.network.adapter.stem.register_forward_hook(
        lambda module, arguments, result: given.append(arguments[0])
    )
    with torch.no_grad():
        system.outputs([image])
    handle.remove()
    shown = system.preprocess(picture(64, 64))[0]
    with torch.no_grad():
        if system.config.multi_resolution:
            expected = torch.zeros(1, 32, 4, 4)
            for top, left in itertools.product((0, 32), (0, 32)):
                tokens = system.encoder.embed(shown[..., top : top + 32, left : left + 32])[:, 1:]
                expected[..., top // 16 : top // 16 + 2, left // 16 : left // 16 + 2] = tokens.mT.unflatten(
                    -1, (2, 2)
                )
        else:
            small = F.interpolate(shown, (32, 32), mode="bilinear", antialias=True)
            expected = F.interpolate(
                system.encoder.embed(small)[:, 1:].mT.unflatten(-1, (2, 2)), (4, 4), mode="bilinear"
            )
    close(given[0], expected.flatten(2).mT)
    close(
        system.scores(system.from_cache(system.to_cache(image)), system.encode_text(WORDS)),
        system.scores(image, system.encode_text(WORDS)),
    )


def test_the_stem_matters_though_it_is_not_fused(clip):
    system = MROVSeg(clip, size=64, **TINY, fused_layers=(1, 2, 3), keep_aspect=False)
    changed = system.from_cache(system.to_cache(system.encode_image(picture(64, 64))))
    text, before = system.encode_text(WORDS), system.scores(changed, system.encode_text(WORDS))
    for name in ("high", "low"):
        getattr(changed.views, name)[0] = getattr(changed.views, name)[0].flip(1)
    assert not torch.allclose(system.scores(changed, text), before, atol=1e-3)


@pytest.mark.parametrize(
    "layers, levels",
    [
        ((0, 3, 6, 9, 12), (3, 2, 1)),
        ((0, 3, 6, 9), (3, 2, 1)),
        ((3, 6, 9), (2, 1, 0)),
        ((3, 6, 9, 12), (2, 1, 0)),
        ((12, 9, 6, 3), (1, 2, 3)),
        ((0, 2, 4), (2, 1, 0)),
    ],
)
def test_levels_of_the_pyramid_skip_the_stem(layers, levels):
    "MROVSeg's fused layers: 9, 6 and 3, the deepest at the lowest level."
    assert MROVSeg(small_clip(layers=12), size=64, **TINY, fused_layers=layers).network.levels == levels


def test_two_layers_make_no_pyramid(clip):
    with pytest.raises(ValueError, match="hierarchical=False"):
        MROVSeg(clip, size=64, **TINY, fused_layers=(0, 3))
    assert MROVSeg(clip, size=64, **TINY, fused_layers=(0, 3), hierarchical=False).network.levels == ()


# ---- files


def test_weights_round_trip(clip, tmp_path):
    system = MROVSeg(clip, size=64, **TINY)
    for one in system.network.parameters():
        one.data += 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    system.save(path := str(tmp_path / "mrovseg.safetensors"))
    again = MROVSeg(clip, size=64, **(TINY | dict(weights=path)))
    image, text = system.encode_image(picture(64, 80)), system.encode_text(WORDS)
    close(again.scores(image, text), system.scores(image, text), 1e-6)
    assert (
        again.describe()["network"]
        == system.describe()["network"]
        != MROVSeg(clip, size=64, **TINY).describe()["network"]
    )
    with pytest.raises(ValueError, match="does not fit"):
        MROVSeg(clip, size=64, **(TINY | dict(weights=path, queries=7)))


# ---- training


def test_packed_is_unpacked(clip):
    system = MROVSeg(clip, size=64, **TINY, keep_aspect=False)
    image, text = system.encode_image(picture(64, 100)), system.encode_text(WORDS)
    packed = system.to_cache(image)
    assert {tensor: tuple(v.shape) for tensor, v in packed.items()} == {
        f"high{i}": (32, 4, 4) for i in range(5)
    } | {f"low{i}": (32, 2, 2) for i in range(5)} | {"cls3": (32,)}
    close(system.scores(system.from_cache(packed), text), system.scores(image, text))
    half = system.from_cache({name: tensor.half() for name, tensor in packed.items()})
    assert half.views.high[3].dtype == torch.float32
    close(system.scores(half, text), system.scores(image, text), 0.05)


def test_squares_are_never_filled_up(clip):
    """80 pixels are five places and slices of 32 pixels two, so that slices overlap;
    scores cover what was packed.
    """
    system = MROVSeg(clip, size=80, **TINY, keep_aspect=False)
    image, text = system.encode_image(picture(64, 100)), system.encode_text(WORDS)
    assert (
        system.slice == 32
        and image.resized_size == image.padded_size == (80, 80)
        and image.views.high[0].shape[-2:] == (5, 5)
        and image.views.low[0].shape[-2:] == (3, 3)
    )
    close(system.scores(system.from_cache(system.to_cache(image)), text), system.scores(image, text))


def test_the_best_of_several_texts_can_be_trained(clip):
    system = MROVSeg(clip, size=64, **(TINY | dict(pooling="max")), keep_aspect=False)
    system.network.requires_grad_(True)
    image = system.from_cache(system.to_cache(system.encode_image(picture(64, 64))))
    text = system.encode_text({"red": ["red", "crimson", "ruby"], "blue": ["blue"]})
    loss, _ = system.loss(
        [image], torch.zeros(1, 64, 64, dtype=torch.long), text, torch.Generator().manual_seed(0)
    )
    loss.backward()
    assert system.network.adapter.queries.grad.abs().sum() > 0


def test_pack_wants_squares(system):
    with pytest.raises(ValueError, match="keep_aspect=false"):
        system.to_cache(system.encode_image(picture(64, 64)))


def test_packed_by_names_what_matters(clip):
    def key(**options):
        return MROVSeg(clip, size=64, **(TINY | options)).cache_key()

    assert (
        key() == key(width=64, queries=3, loss_points=9)
        and key() != key(slice_ratio=1.0)
        and key() != key(fused_layers=(0, 1, 2, 3))
        and key() != key(reduction=1)
    )


def test_seen_crops_are_encoded_squares(clip):
    system = MROVSeg(clip, size=64, **TINY, keep_aspect=False)
    images = torch.from_numpy(np.stack([picture(64, 64), picture(64, 64, 1)])).permute(0, 3, 1, 2)
    for seen, i in zip(system.encode_batch(images), range(2)):
        close(
            seen.views.tokens(3),
            system.encode_image(images[i].permute(1, 2, 0).numpy()).views.tokens(3).clone(),
            1e-3,
        )
        assert np.array_equal(seen.image, images[i].permute(1, 2, 0).numpy())


def test_the_loss_is_reproducible_and_of_two_blocks(clip):
    system = MROVSeg(clip, size=64, **TINY, keep_aspect=False)
    images, text = (
        [system.from_cache(system.to_cache(system.encode_image(picture(64, 64, i)))) for i in range(2)],
        system.encode_text(WORDS),
    )
    labels = torch.randint(4, (2, 64, 64), generator=torch.Generator().manual_seed(0))

    def loss(seed, supervised=2):
        system.network.adapter.supervised = supervised
        with torch.no_grad():
            return float(system.loss(images, labels, text, torch.Generator().manual_seed(seed))[0])

    assert loss(0) == pytest.approx(loss(0), rel=1e-5) and loss(0) != loss(1) and loss(0) > 1.3 * loss(0, 1)


def test_pictures_without_a_class_can_be_trained_on(clip):
    system = MROVSeg(clip, size=64, **TINY, keep_aspect=False)
    system.network.requires_grad_(True)
    images = [system.from_cache(system.to_cache(system.encode_image(picture(64, 64, i)))) for i in range(2)]
    labels = torch.full((2, 64, 64), 255)
    loss, _ = system.loss(images, labels, system.encode_text(WORDS), torch.Generator().manual_seed(0))
    loss.backward()
    assert torch.isfinite(loss) and all(
        parameter.grad.isfinite().all()
        for parameter in system.network.parameters()
        if parameter.grad is not None
    )


def test_the_loss_falls(clip):
    "Two pictures of colored halves, a few steps; then the halves are found."
    system = MROVSeg(clip, size=64, logit_scale=25.0, **TINY, keep_aspect=False)
    system.network.train().requires_grad_(True)
    left = np.zeros((64, 64, 3), np.uint8)
    left[:, :32, 0] = 255
    left[:, 32:, 2] = 255
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[0, :, 32:] = 1
    labels[1, :, :32] = 1
    images = [
        system.from_cache(system.to_cache(system.encode_image(image)))
        for image in (left, left[:, ::-1].copy())
    ]
    text, generator = system.encode_text(["red", "blue"]), torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.AdamW(system.network.parameters(), lr=3e-3), []
    for _ in range(50):
        loss, _ = system.loss(images, labels, text, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(system.network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])


# ---- lite


def test_lite_end_to_end():
    "From a file to labels, with the shipped offline encoder, on a picture that is not square."
    from skimage import data

    system = MROVSeg(LiteEncoder(device="cpu"), size=256, **(TINY | dict(templates="vild14")))
    found = system.segment(
        Path(data.__file__).parent / "chelsea.png", {"cat": ["cat", "kitten"], "background": ["wall"]}
    )
    assert (
        found.labels.shape == (300, 451)
        and found.scores.shape == (2, 256, 385)
        and list(found.names) == ["cat", "background"]
    )
    assert (
        found.scores.min() >= 0
        and set(np.unique(found.labels)) <= {0, 1}
        and system.network.classifier.scale == 100
    )
