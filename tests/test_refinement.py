"What follows scores, on small random networks: names, priors, thresholds, steps; and what does not fit."

import numpy as np
import pytest
import torch
from doubles import Colors, small_clip
from ovss_nb.components.class_probabilities import class_labels
from ovss_nb.components.crf import crf_available
from ovss_nb.components.refinement import (
    LabelRules,
    Patches,
    crf_labels,
    pamr_scores,
    refine_labels,
    refine_steps,
    spread_scores,
)
from ovss_nb.components.region_vote import region_vote
from ovss_nb.core.options import OptionError
from ovss_nb.core.vocabulary import Vocabulary
from ovss_nb.encoders.lite import LiteEncoder
from ovss_nb.encoders.stem_filters import encode_filtered
from ovss_nb.systems.catseg import CATSeg
from ovss_nb.systems.ebseg import EBSeg
from ovss_nb.systems.filtered import Filtered
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.systems.pnp_ovss import PnPOVSS
from ovss_nb.systems.registry import create, resize_rule
from ovss_nb.systems.san import SAN
from ovss_nb.systems.simseg import SimSeg
from ovss_nb.systems.windows import SlidingWindows, StridedWindows
from torch.nn import functional as F

WORDS = {"background": ["red"], "grass": ["green", "green leaf"], "sky": ["blue"]}


def picture(height=60, width=75, seed=0):
    "Smooth random colors."
    small = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(small, (height, width), mode="bilinear")[0]
    return (255 * pixels).byte().movedim(0, -1).numpy()


def scores_of(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) / 4


def test_steps_that_cannot_be():
    for wrong in (("crf", "crf"), ("crf", "pamr"), ("vote", "lposs"), ("pamr", "lposs")):
        with pytest.raises(OptionError):
            refine_steps(wrong)
    assert refine_steps(["lposs", "pamr", "crf", "vote"]) == ("lposs", "pamr", "crf", "vote")


@pytest.mark.parametrize("size", [(40, 40), (30, 52)])
def test_each_step_is_its_component(size):
    image, scores, labels = picture(*size), scores_of(4, 5, 6), class_labels(scores_of(4, 5, 6), size)
    regions = np.arange(size[0] * size[1]).reshape(size) // 97
    voted = refine_labels(image, scores, steps=("vote",), regions=regions)
    assert np.array_equal(voted, region_vote(labels.numpy(), regions))
    refined, rules = pamr_scores(image, scores, LabelRules())
    smooth = refine_labels(image, scores, steps=("pamr",))
    assert np.array_equal(smooth, class_labels(refined, size, rules.owners).numpy())
    with pytest.raises(ValueError, match="do not fit an image"):
        refine_labels(image, scores, steps=("vote",), regions=regions[1:])


def test_texts_that_win_nowhere_still_count():
    """PAMR with and without the texts that never win: the probabilities of the winners are nearly the same.

    Nearly, since the logarithm of their sum is refined, and not each of them.
    """
    image, scores = picture(32, 32), scores_of(6, 4, 4)
    scores[3:] -= 0.3
    rules = LabelRules(torch.tensor([0, 1, 1, 2, 2, 0]), 20.0, 0, 0.4)
    refined, kept = pamr_scores(image, scores, rules)
    assert len(refined) == 4 and kept.owners.tolist() == [0, 1, 1, -1]
    everything = torch.cat([refined[:3], pamr_scores(image, scores[3:], LabelRules())[0]])
    exact = (20 * everything).softmax(0)[:3]
    ours = (20 * refined).softmax(0)[:3]
    assert (exact - ours).abs().max() < 1e-2


def test_one_class_and_a_thousand():
    image = picture(24, 24)
    assert refine_labels(image, scores_of(1, 3, 3), LabelRules(None, 40.0, 0, 0.9), ("pamr",)).max() == 0
    many = scores_of(1000, 3, 3)
    labels = refine_labels(image, many, LabelRules(None, 40.0, 0, 0.001), ("pamr",))
    assert labels.shape == (24, 24) and len(np.unique(labels)) > 1
    nothing = refine_labels(image, many, LabelRules(None, 40.0, 7, 0.9), ("pamr",))
    assert np.unique(nothing).tolist() == [7]


def test_patches_of_windows():
    "Two windows that cover the whole give the graph all of their patches; windows of two sizes are refused."
    scores, features = scores_of(3, 8, 12), scores_of(5, 2, 3, seed=1)
    windows = [Patches((0, 0), (8, 8), features[..., :2]), Patches((0, 4), (8, 8), features[..., 1:])]
    assert spread_scores(scores, windows).shape == (3, 8, 12)
    with pytest.raises(ValueError, match="one size"):
        spread_scores(scores, [windows[0], Patches((0, 4), (8, 8), features)])


@pytest.mark.skipif(not crf_available(), reason="needs the extra `crf`")
def test_crf_of_names_is_that_of_classes():
    image, scores = picture(30, 30), scores_of(3, 4, 4)
    labels = class_labels(scores, (30, 30)).numpy()
    plain = crf_labels(labels, (20 * scores).softmax(0), image)
    assert np.array_equal(plain, crf_labels(labels, scores, image, LabelRules(None, 20.0)))
    owned = LabelRules(torch.arange(3), 20.0)
    assert np.array_equal(plain, crf_labels(labels, scores, image, owned))


# ---- systems


def test_names_by_loops():
    "Pooling by names with a threshold, and the prior, pixel by pixel."
    image, scale, threshold, weight = picture(), 12.0, 0.42, 0.25
    system = MaskCLIP(
        Colors(),
        size=48,
        pooling="names",
        background_threshold=threshold,
        threshold_at="pixels",
        logit_scale=scale,
        class_prior=weight,
    )
    result = system.segment(image, WORDS)
    encoded = system.encode_image(image)
    dense, pooled = encoded.features.dense[0], encoded.features.pooled[0]
    texts = torch.eye(3)[torch.tensor([0, 1, 1, 2])]
    cosines = torch.einsum("qd,dhw->qhw", texts, F.normalize(dense, dim=0))
    cosines = (1 - weight) * cosines + weight * (texts @ F.normalize(pooled, dim=0))[:, None, None]
    enlarged = F.interpolate(cosines[None], image.shape[:2], mode="bilinear")[0]
    chances = (scale * enlarged).softmax(0)
    classes = torch.stack([chances[0], chances[1:3].amax(0), chances[3]])
    expected = torch.where(classes.amax(0) < threshold, 0, classes.argmax(0))
    assert np.array_equal(result.labels, expected.numpy()) and 0 < (result.labels == 0).mean() < 1
    assert np.allclose(result.scores[1], cosines[1:3].amax(0), atol=1e-5)


@pytest.mark.parametrize("height, width", [(48, 48), (40, 90)])
def test_published_windows_by_loops(height, width):
    image = picture(height, width)
    system = create("maskclip", Colors(), cache=None, resize="slide:48:32:16")
    assert isinstance(system, StridedWindows) and system.config.keep_aspect is False
    encoded = system.encode_image(image)
    high, wide = encoded.resolution
    assert min(high, wide) == 48
    total, count = np.zeros((3, high, wide)), np.zeros((high, wide))
    for top in [0, 16]:
        for left in sorted({min(x, wide - 32) for x in range(0, wide, 16)}):
            window = system.system.encode_window(
                shown(system, image)[top : top + 32, left : left + 32].copy()
            )
            vectors = F.normalize(window.features.dense[0], dim=0)
            maps = F.interpolate(vectors[None], (32, 32), mode="bilinear")[0].numpy()
            total[:, top : top + 32, left : left + 32] += maps
            count[top : top + 32, left : left + 32] += 1
    text = system.encode_text({"r": ["red"], "g": ["green"], "b": ["blue"]})
    assert np.allclose(system.scores(encoded, text), total / count, atol=1e-5)


def shown(system, image):
    from ovss_nb.systems.windows import shorter_side

    return shorter_side(image, system.resolution, resample=system.encoder.resample)


TINY_CATSEG = dict(
    weights="random", width=16, guidance=(8, 8), enlarged=(8, 8), decoder=(16, 16), decoder_guidance=(4, 4)
)
TINY_CATSEG |= dict(size=96, window=64, grid=4, attention_window=2, length=24, guidance_layers=(1, 2))
SYSTEMS = {
    "maskclip": lambda **options: MaskCLIP(small_clip(), size=64, **options),
    "catseg": lambda **options: CATSeg(small_clip(), **TINY_CATSEG, **options),
    "san": lambda **options: SAN(
        small_clip(),
        **dict(weights="random", keep_aspect=False, width=16, queries=5, heads=2, resolution="masks"),
        **dict(size=64, encoder_scale=1.0, depth=4, channels=8),
        **options,
    ),
}


@pytest.fixture(scope="module", params=SYSTEMS)
def make(request):
    return SYSTEMS[request.param]


@pytest.mark.parametrize(
    "options",
    [
        dict(pooling="names"),
        dict(background_threshold=0.3),
        dict(pooling="names", background_threshold=0.3, threshold_at="pixels", min_area=0.1),
        dict(refine="pamr", refine_pixels=900),
        dict(refine=("pamr", "vote"), regions="slic:9"),
    ],
    ids=str,
)
def test_every_system_has_the_options(make, options):
    system = make(**options)
    for image in (picture(48, 48), picture(40, 64)):
        result = system.segment(image, {"background": ["wall"], "pet": ["cat", "dog"], "cup": ["cup"]})
        assert result.labels.shape == image.shape[:2] and result.labels.max() < 3
        assert result.scores.shape[0] == 3 and np.isfinite(result.scores).all()


@pytest.mark.parametrize("name", ["maskclip", "catseg"])  # scores of mask queries may exceed 1
def test_a_threshold_of_one_leaves_only_background(name):
    for place in ("features", "pixels"):
        system = SYSTEMS[name](background_threshold=1.0, threshold_at=place)
        assert system.segment(picture(), ["background", "cat", "dog"]).labels.max() == 0


def test_lposs_needs_features(make):
    system = make(refine="lposs")
    try:
        result = system.segment(picture(), ["cat", "dog", "cup"])
    except ValueError as error:
        assert "keeps no features" in str(error)
    else:
        assert result.labels.shape == (60, 75)


def test_lposs_sees_windows():
    plain = MaskCLIP(small_clip(), size=64, refine="lposs")
    for system in (plain, StridedWindows(plain, 64, 32, 16), SlidingWindows(plain, 96, 64)):
        assert system.segment(picture(), ["cat", "dog", "cup"]).labels.shape == (60, 75)


def test_the_prior_of_windows_is_the_whole_image():
    plain = MaskCLIP(small_clip(), size=64, class_prior=0.5)
    encoded = StridedWindows(plain, 64, 32, 16).encode_image(picture())
    whole = encoded.features.pooled[0]
    assert all(window.whole.equal(whole) for _, _, window in encoded.windows)
    assert StridedWindows(MaskCLIP(small_clip()), 64, 32, 16).encode_image(picture()).features is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SimSeg(Colors(), background_threshold=0.2), "leave background_threshold at None"),
        (lambda: SimSeg(Colors(), refine="pamr"), "only 'vote' fits"),
        (lambda: PnPOVSS(None, class_prior=0.2), "leave class_prior at 0"),
        (lambda: EBSeg.config_class(class_prior=0.2), "leave class_prior at 0"),
        (lambda: MaskCLIP(Colors(), refine="vote"), "needs regions"),
        (lambda: MaskCLIP(Colors(), regions="slic"), "nothing here uses regions"),
        (lambda: MaskCLIP(Colors(), pooling="names", background_threshold=0.1), "threshold_at='pixels'"),
        (lambda: MaskCLIP(Colors(), min_area=0.1, background_threshold=0.1), "threshold_at='pixels'"),
        (lambda: MaskCLIP(Colors(), refine="pmar"), "refine must be"),
        (lambda: StridedWindows(MaskCLIP(Colors()), 64, 8, 8), "smaller than a patch"),
        (lambda: resize_rule("slide:336:112:224"), "leaves gaps"),
        (lambda: create("catseg", Colors(), weights="random", resize="slide:336:224:112"), "own windows"),
        (lambda: StridedWindows(SYSTEMS["san"](), 64, 32, 16), "resizes images in its own way"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_filtered_windows_are_filtered_each_by_itself():
    encoder, image = LiteEncoder(device="cpu"), picture(64, 96)
    system = Filtered(encoder)
    ((_, first), *_) = StridedWindows(system, 64, 64, 32).encode_image(image).parts()
    pixels = encoder.preprocess(first.image, first.size)
    wanted = encode_filtered(encoder, pixels, system.config.filters()).dense
    assert torch.equal(first.features.dense, wanted) and wanted.shape[-2:] == (4, 4)


def test_simseg_votes_at_the_end():
    system = SimSeg(Colors(), size=48, crf=False, refine="vote", regions="slic:6")
    plain = SimSeg(Colors(), size=48, crf=False)
    image, words = picture(), Vocabulary.of({"a": ["red"], "b": ["green"], "c": ["blue"]})
    regions = system.region_map(system.encode_image(image))
    assert np.array_equal(
        system.segment(image, words).labels, region_vote(plain.segment(image, words).labels, regions)
    )


def test_lposs_keeps_the_size_of_scores():
    "Where all agree nothing changes, so a threshold after LPOSS means what it means without."
    scores = torch.tensor([0.3, 0.1])[:, None, None].expand(2, 3, 4).clone()
    windows = [Patches((0, 0), (48, 64), torch.ones(5, 3, 4))]
    image = np.zeros((48, 64, 3), np.uint8)
    rules = LabelRules(background=1, threshold=0.5)
    assert float(spread_scores(scores, windows).max()) < 0.4
    assert (refine_labels(image, scores, rules, ("lposs",), windows=windows) == 1).all()
    assert (refine_labels(image, scores, LabelRules(), ("lposs",), windows=windows) == 0).all()
