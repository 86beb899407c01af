"Class selection: one contract for four backends, and a vision model behind a real server that errs."

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from chat_server import ChatServer, completion, reply
from ovss_nb.components.class_selection import (
    ClipClasses,
    LLMClasses,
    Selection,
    check_selection,
    class_selector,
    selection_question,
)
from ovss_nb.text.language_model import LanguageModel, LanguageModelError
from ovss_nb.core.vocabulary import Vocabulary, load_vocabulary

COLORS = Vocabulary.of(["background", "red", "green", "blue"])
PLAIN = {
    name: np.full((40, 60, 3), 255 * np.eye(3, dtype=int)[k], np.uint8)
    for k, name in enumerate(COLORS.names[1:])
}


class Painter(nn.Module):
    "An encoder whose space is color: a picture is its mean color, a word one of three axes."

    fingerprint, device, dtype = "painter", torch.device("cpu"), torch.float32

    def text(self, prompts):
        return torch.stack(
            [
                torch.eye(3)[next((k for k, name in enumerate(COLORS.names[1:]) if name in prompt), 0)]
                for prompt in prompts
            ]
        )

    def preprocess(self, image):
        return torch.from_numpy(image).permute(2, 0, 1)[None] / 255

    def encode(self, images):
        return type("Features", (), {"pooled": images.mean((2, 3))})


def seen(messages):
    "A vision model that sees pure colors; for a grey picture it is sure of nothing."
    photo = (
        np.asarray(
            Image.open(
                io.BytesIO(base64.b64decode(messages[0]["content"][1]["image_url"]["url"].split(",")[1]))
            )
        )
        .reshape(-1, 3)
        .mean(0)
    )
    sure = 95 if photo.max() > 3 * photo.min() + 60 else 30
    k = int(photo.argmax()) + 1
    return json.dumps(
        {
            "classes": [f"{k}: {COLORS.names[k]}", f"{k % 3 + 1}: {COLORS.names[k % 3 + 1]}"],
            "percentages": [sure, 10],
        }
    )


def test_all_backends_keep_one_contract(tmp_path):
    labels = np.where(np.arange(60) < 30, 2, 0)[None].repeat(40, 0)
    with ChatServer(seen, faults=0.3) as server:
        model = LanguageModel(
            "eyes", server.url, timeout=0.4, backoff=0.01, journal=tmp_path / "journal.jsonl"
        )
        for selector, image in (
            (class_selector("all"), PLAIN["green"]),
            (class_selector("oracle"), labels),
            (class_selector("clip", Painter()), PLAIN["green"]),
            (class_selector("llm", model), PLAIN["green"]),
        ):
            chosen = selector.select(image, COLORS)
            assert (
                isinstance(chosen, Selection)
                and chosen.indices.dtype.kind == "i"
                and chosen.probabilities.shape == chosen.indices.shape
            )
            assert {0, 2} <= set(chosen.indices.tolist()) and (np.diff(chosen.indices) > 0).all()
            assert ((0 <= chosen.probabilities) & (chosen.probabilities <= 1)).all()


def test_many_pictures_are_asked_at_once_and_never_twice(tmp_path):
    images = {
        f"{name}{level}": (image * (level / 255)).astype(np.uint8)
        for name, image in PLAIN.items()
        for level in range(105, 255, 10)
    }
    with ChatServer(
        seen, faults=0.3, spoil=lambda text: json.dumps(json.loads(text) | {"percentages": [50]})
    ) as server:
        for _ in range(2):
            found = LLMClasses(
                LanguageModel(
                    "eyes", server.url, timeout=0.4, backoff=0.01, journal=tmp_path / "journal.jsonl"
                )
            ).select_all(images, COLORS)
            assert {key: COLORS.names[chosen.indices[1]] for key, chosen in found.items()} == {
                key: key.rstrip("0123456789") for key in images
            }
        assert max(server.answered.values()) == 1 and server.faults["rules"]


def test_the_rules_of_the_published_code(tmp_path):
    with ChatServer(seen) as server:
        model = LanguageModel("eyes", server.url, journal=tmp_path / "journal.jsonl")
        grey = np.full((40, 60, 3), (120, 130, 120), np.uint8)
        # nothing above 70: the first class
        assert LLMClasses(model).select(grey, COLORS).indices.tolist() == [0, 1]
        assert LLMClasses(model).select(grey, COLORS).probabilities.tolist() == [1, 0]
        assert LLMClasses(model, fallback="blue").select(grey, COLORS).indices.tolist() == [0, 3]
        assert LLMClasses(model, threshold=9).select(PLAIN["red"], COLORS).indices.tolist() == [0, 1, 2]
        # above, not at
        assert LLMClasses(model, threshold=10).select(PLAIN["red"], COLORS).indices.tolist() == [0, 1]
        with pytest.raises(ValueError, match="none of the names"):
            LLMClasses(model, fallback="pink").select(grey, COLORS)


def test_a_declined_picture_is_empty_but_a_failing_service_is_an_error(tmp_path):
    with ChatServer(seen) as server:
        model = LanguageModel(
            "eyes", server.url, attempts=2, backoff=0.01, journal=tmp_path / "journal.jsonl"
        )
        LLMClasses(model).select(PLAIN["red"], COLORS)
        server.handle = lambda request, asked: reply(request, 200, completion("", "content_filter"))
        assert LLMClasses(model).select(PLAIN["blue"], COLORS).indices.tolist() == [0, 1]
        server.handle = lambda request, asked: reply(request, 500, {"error": {"message": "broken"}})
        with pytest.raises(LanguageModelError, match="No classes for image.*status 500"):
            LLMClasses(model).select(PLAIN["blue"], COLORS)


def test_the_question_names_synonyms_and_sends_a_small_picture():
    question = selection_question(np.zeros((3000, 4000, 3), np.uint8), load_vocabulary("ADE-150"))
    text, picture = question.messages[0]["content"]
    assert "at most 25" in text["text"] and "0: wall" in text["text"] and text["text"].count("\n") > 150
    with Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].split(",")[1]))) as photo:
        assert max(photo.size) == 1024
    sofa = load_vocabulary("VOC-21").with_words({"sofa": ["sofa", "couch"]})
    assert "18: sofa, couch" in selection_question(PLAIN["red"], sofa).messages[0]["content"][0]["text"]
    assert check_selection({"classes": ["18: couch"], "percentages": [90]}, sofa) is None
    assert "is 'sofa'" in check_selection({"classes": ["18: train"], "percentages": [90]}, sofa)


def test_temperature_and_threshold_of_clip():
    mixed = np.full((40, 60, 3), (255, 230, 0), np.uint8)
    assert ClipClasses(Painter(), threshold=0.3, temperature=1).select(mixed, COLORS).indices.tolist() == [
        0,
        1,
        2,
    ]
    assert ClipClasses(Painter(), threshold=0.3, temperature=0.01).select(mixed, COLORS).indices.tolist() == [
        0,
        1,
    ]
    # at least the best
    assert ClipClasses(Painter(), threshold=0.99, temperature=1).select(mixed, COLORS).indices.tolist() == [
        0,
        1,
    ]
    with pytest.raises(ValueError, match="temperature must be above 0"):
        ClipClasses(Painter(), temperature=0)
    assert ClipClasses(Painter()).select(mixed, Vocabulary.of(["background"])).indices.tolist() == [0]
