"""Training sets: labels by their meaning, clean names, words kept back, nothing trained on that is scored.

The sets lie outside of the project: in the folders that OVSS_NB_TRAINING_DATA and OVSS_NB_DATA name, or in
../training-data and ../shared/data. Their tests skip where they are not; OVSS_NB_BIG=1 takes all images.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import Colors
from ovss_nb.benchmarks.datasets import DatasetError
from ovss_nb.core.images import load_image
from ovss_nb.core.vocabulary import load_vocabulary
from ovss_nb.encoders.base import ImageFeatures
from ovss_nb.training.captions import CaptionSet
from ovss_nb.training.recipes import open_part
from ovss_nb.training.training_sets import (
    IGNORE,
    REST,
    NameSet,
    _table,
    class_counts,
    clean_names,
    held_back_words,
    open_training_set,
    perceptual_hash,
    same_images,
    training_sets,
    words_top1,
)
from PIL import Image
from skimage import data

BESIDE = Path(__file__).parents[2]
TRAINING = Path(os.environ.get("OVSS_NB_TRAINING_DATA", BESIDE / "training-data"))
SCORED = Path(os.environ.get("OVSS_NB_DATA", BESIDE / "shared/data"))
EVALUATION = (
    "voc2012-val-subset coco-object-mini camvid11 cocostuff171-mini ccp59-subset ade150-mini nyu40-mini"
).split()
BIG = "OVSS_NB_BIG" in os.environ


def make_masks(root, name, *masks):
    "A folder of gray pictures with these masks."
    for part in ("images", "masks"):
        (root / name / part).mkdir(parents=True)
    for k, mask in enumerate(masks):
        mask = np.array(mask, np.uint8)
        Image.new("RGB", mask.shape[::-1]).save(root / name / f"images/{k}.png")
        Image.fromarray(mask).save(root / name / f"masks/{k}.png")


def make_names(root, name, labels):
    (root / name / "images").mkdir(parents=True)
    (root / name / "labels.json").write_text(json.dumps(labels))
    for k, file in enumerate(labels):
        Image.new("RGB", (40, 40), ("red", "lime", "blue")[k % 3]).save(root / name / "images" / file)


@pytest.mark.parametrize("name", training_sets())
def test_record_is_complete_and_disjoint(name):
    record = training_sets()[name]
    values = [value for own in record["classes"].values() for value in own["values"]]
    values += [int(value) for value in record.get("ignored", {})]
    values += [record["rest"]] if "rest" in record else []
    assert sorted(values) == list(range(len(values))), "each stored value has one meaning, none is left out"
    words = [word for k, own in record["classes"].items() for word in (k, *own.get("words", []))]
    assert len(words) == len(set(words))
    for word, own in record["classes"].items():
        assert not {word, *own.get("words", [])} & set(own.get("also", [])), word
    assert not {"background", "null", "unlabelled", "unlabeled"} & set(words)


def test_unlabelled_is_no_class(tmp_path):
    make_masks(tmp_path, "human-290", [[0, 1, 255]], [[0, 0, 0]])
    people = open_training_set(tmp_path, "human-290")
    assert (people.names, people.classes, people.ignore, people.rest) == (["person"], 1, IGNORE, REST)
    assert people.vocabulary.background == () and "woman" in people.also["person"]
    assert people.labels(0).tolist() == [[IGNORE, 0, IGNORE]]
    assert people.labels(0, rest=True).tolist() == [[REST, 0, IGNORE]]
    assert class_counts(people) == {"person": (1, 100.0)}
    assert people[0][2].tolist() == [[IGNORE, 0, IGNORE]]


def test_mixed_labels_are_ignored_and_words_are_plain(tmp_path):
    make_masks(tmp_path, "idd-lite7", [[0, 1, 2, 3, 4, 5, 6, 255]])
    make_masks(tmp_path, "facade10", [[*range(10), 255]])
    streets, houses = (open_training_set(tmp_path, name) for name in ("idd-lite7", "facade10"))
    labels = streets.labels(0)[0]
    assert [streets.names[k] if k != IGNORE else "" for k in labels] == (
        ["road", "", "person", "vehicle", "", "", "sky", ""]
    )
    labels = houses.labels(0)[0]
    assert [houses.names[k] if k != IGNORE else "" for k in labels] == (
        ["balcony", "car", "building", "fence", "", "shop", "road", "", "tree", "window", ""]
    )


def test_garments_are_a_person(tmp_path):
    make_masks(tmp_path, "ccp59-train", [[0, 1, 2, 58]])
    garments = open_training_set(tmp_path, "ccp59-train")
    assert garments.labels(0, rest=True).tolist() == [[REST, IGNORE, 0, 56]]
    assert "person" in garments.also["wedge shoes"]
    person = open_training_set(tmp_path, "ccp59-person")
    assert person.labels(0, rest=True).tolist() == [[REST, 0, 0, 0]]


def test_unknown_value_is_refused(tmp_path):
    make_masks(tmp_path, "weizmann-horse", [[0, 1, 2]])
    with pytest.raises(DatasetError, match="unknown label value 2"):
        open_training_set(tmp_path, "weizmann-horse").labels(0)


@pytest.mark.parametrize(
    "name, text",
    [
        ("camvid-train11", "no longer zero-shot"),
        ("bsds500-segments", "no names"),
        ("pacs-photo-names", "open it with NameSet"),
        ("weizmann-horses", "did you mean 'weizmann-horse'"),
    ],
)
def test_what_is_no_training_set_is_refused(tmp_path, name, text):
    with pytest.raises(ValueError, match=text):
        open_training_set(tmp_path, name)


def test_camvid_on_request(tmp_path):
    make_masks(tmp_path, "camvid-train11", [[0, 10, 255]])
    opened = open_training_set(tmp_path, "camvid-train11", camvid=True)
    assert opened.labels(0).tolist() == [[0, 10, IGNORE]]


def test_recipes_find_training_sets(tmp_path):
    make_masks(tmp_path / "more", "weizmann-horse", *[[[0, 1]]] * 8)
    dataset, rows = open_part(tmp_path, "weizmann-horse", "", "last quarter", training=tmp_path / "more")
    assert (dataset.names, rows.tolist()) == (["horse"], [3, 7])
    assert open_part(tmp_path / "more", "weizmann-horse", "", "all", most=3)[1].tolist() == [0, 4, 7]
    with pytest.raises(ValueError, match="protocol='VOC-20'"):
        open_part(tmp_path / "more", "weizmann-horse", "VOC-20", "all")
    with pytest.raises(ValueError, match="no longer zero-shot"):
        open_part(tmp_path, "camvid-train11", "", "all")


def test_names_are_plain_words():
    table = _table()["names"]
    for folder, own in table.items():
        words = [word for word in own.values() if word]
        assert clean_names(folder, own) == list(dict.fromkeys(words))
        # a cleaned name is not cleaned again into something else
        assert all(own.get(word, word) == word for word in words), folder
        assert not [word for word in words if set("/()_") & set(word)]


def test_sample_is_even_and_repeatable(tmp_path):
    labels = {f"{k}.png": ["car side"] for k in range(9)} | {"a.png": ["snoopy"], "b.png": ["cougar face"]}
    make_names(tmp_path, "caltech101-names", labels)
    names = NameSet(tmp_path, "caltech101-names")
    assert (len(names), names.counts) == (10, {"car": 9, "cougar": 1})
    first = names.sample(3)
    assert len(first) == 4 and first.tolist() == names.sample(3).tolist() == sorted(set(first))
    assert {word for i in first for word in names.names(i)} == {"car", "cougar"}
    assert any(first.tolist() != names.sample(3, seed).tolist() for seed in range(1, 5))
    assert len(names.sample(100)) == 10
    assert names.image(0).shape == (40, 40, 3) and len(names.image_digest(0)) == 64
    (tmp_path / "caltech101-names/labels.json").write_text("[]")
    with pytest.raises(DatasetError, match="an object of lists"):
        NameSet(tmp_path, "caltech101-names")


def test_held_back_words_are_nobody_elses():
    words = {word.casefold() for word in held_back_words()}
    assert len(words) == len(held_back_words()) == 50
    named = set()
    for record in training_sets().values():
        for name, own in record["classes"].items():
            named |= {name, *own.get("words", []), *own.get("also", []), *record.get("also", [])}
    for own in _table()["names"].values():
        named |= {word for word in own.values() if word}
    for title in ("VOC-20", "COCO-Object-81"):
        named |= {word for own in load_vocabulary(title).words for word in own}
    assert not words & {word.casefold() for word in named}
    assert {"missile", "espresso", "tabby"} <= words


class Words(Colors):
    "Takes the first color for one held-back word, in the pooled vector alone."

    def text(self, prompts):
        order = ["espresso", "tabby", "lemon"]
        return torch.eye(3)[[next(k for k, word in enumerate(order) if word in own) for own in prompts]]

    def encode(self, images):
        dense = torch.zeros(len(images), 3, 4, 4)
        dense[:, 2] = 1
        pooled = torch.eye(3)[images.mean((2, 3)).argmax(1)]
        return ImageFeatures(dense, pooled)


def test_words_that_nobody_trained(tmp_path):
    make_names(
        tmp_path, "imagenet1000-names", {"a.png": ["espresso"], "b.png": ["tabby"], "c.png": ["lemon"]}
    )
    measured = words_top1(Words(), tmp_path)
    assert (measured.pooled, measured.dense, measured.among) == (1, 0, 3)
    assert measured.answers == {"espresso": ("espresso", "lemon"), "tabby": ("tabby", "lemon")}
    assert "2 words among 3: 100 % by the pooled vector, 0 %" in str(measured)


def copies(image):
    "The image at other sizes, brighter, and as poor JPEGs."
    height, width = image.shape[:2]
    for side in (160, 320, 500):
        yield np.asarray(Image.fromarray(image).resize((side * width // height, side)))
    yield (image * 0.8 + 30).astype(np.uint8)
    for quality in (20, 60):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "jpeg", quality=quality)
        yield np.asarray(Image.open(stream))


def test_copies_are_found_and_other_images_are_not():
    images = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    images += [np.ascontiguousarray(image[:, ::-1]) for image in images]
    hashes = np.stack([perceptual_hash(image) for image in images])
    assert hashes.shape == (8, 16)
    for k, image in enumerate(images):
        for copy in copies(image):
            assert same_images(hashes, perceptual_hash(copy)[None]) == [(k, 0)]
    parts = np.stack([perceptual_hash(image[::-1]) for image in images])
    assert same_images(hashes, parts) == []


def test_both_hashes_must_be_near():
    first = np.zeros((1, 16), np.uint8)
    for p, d, near in ((8, 10, True), (9, 10, False), (8, 11, False), (0, 64, False), (64, 0, False)):
        other = np.packbits([1] * p + [0] * (64 - p) + [1] * d + [0] * (64 - d))[None]
        assert bool(same_images(first, other)) is near


def spread(count, most):
    return np.unique(np.linspace(0, count - 1, count if BIG else min(most, count)).astype(int))


def trained_images():
    "(Where it is from, image) of what is trained on: masks, segments, names, captions."
    for name in training_sets():
        if name not in ("camvid-train11", "ccp59-person"):  # refused; the same images again
            opened = open_training_set(TRAINING, name)
            for i in spread(len(opened), 8):
                yield str(opened.image_paths[i]), opened.image(i)
    for name in _table()["names"]:
        for held_back in (False, True) if name == "imagenet1000-names" else (False,):
            opened = NameSet(TRAINING, name, held_back)
            for i in spread(len(opened), 8):
                yield str(opened.image_paths[i]), opened.image(i)
    paths = sorted((TRAINING / "bsds500-segments/images").iterdir())
    for i in spread(len(paths), 8):
        yield str(paths[i]), load_image(paths[i])
    captioned = CaptionSet.open(SCORED / "flickr8k-224")
    for i in spread(len(captioned), 8):
        yield captioned.names[i], captioned.image(i)


@pytest.mark.skipif(not TRAINING.is_dir(), reason="needs the training sets: OVSS_NB_TRAINING_DATA")
@pytest.mark.skipif(not (SCORED / EVALUATION[0]).is_dir(), reason="needs the evaluation sets: OVSS_NB_DATA")
def test_nothing_trained_on_is_scored():
    paths = [path for name in EVALUATION for path in sorted((SCORED / name / "images").iterdir())]
    paths = [paths[i] for i in spread(len(paths), 60)]
    images = [load_image(path) for path in paths]
    scored = np.stack([perceptual_hash(image) for image in images])
    scored = np.concatenate([scored, np.stack([perceptual_hash(image[:, ::-1]) for image in images])])
    assert same_images(scored[: len(paths)], scored[:1])[0] == (0, 0)
    where, hashes = zip(*((name, perceptual_hash(image)) for name, image in trained_images()))
    pairs = same_images(np.stack(hashes), scored)
    assert not pairs, [(where[i], str(paths[k % len(paths)]), k >= len(paths)) for i, k in pairs[:20]]


def test_meanings_of_stored_labels(tmp_path):
    "A label that mixes several things means one of them; a set that is labelled as another has its classes."
    from ovss_nb.training.training_sets import training_sets

    known = training_sets()
    assert known["voc2012-sbd"]["classes"] == known["voc2012-aug-animals"]["classes"]
    assert known["voc2012-sbd"]["folder"] == "voc2012-sbd-extra"
    folder = tmp_path / "idd-lite7"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(folder / "images" / "a.jpg")
    Image.fromarray(np.full((8, 9), 5, np.uint8)).save(folder / "masks" / "a.png")
    dataset = open_training_set(tmp_path, "idd-lite7")
    assert {"building", "tree"} <= set(dataset.meanings[5]) and dataset.meanings[6] == ("sky",)
    assert (dataset.labels(0) == 255).all() and (dataset.stored(0) == 5).all()
    assert set(dataset.one_of) == {1, 2, 3, 4, 5} and dataset.stored_rest is None
