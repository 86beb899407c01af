"""SimSeg and its subclasses against numbers recorded from the authors' code, and against the equations
written out by hand.
"""

import math
import os
from unittest.mock import patch
import numpy as np
import doubles
from doubles import close, golden_weights, thinned
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="needs the extra `lite`")
from ovss_nb.encoders.simseg import PREFIXES, SimSegEncoder
from ovss_nb.components.maps import dilate, erode, min_max
from ovss_nb.components.subclass_ensemble import (
    ensemble,
    loda_pool,
    merge_masks,
    select_classes,
    selection_threshold,
    subclass_maps,
    subclass_weights,
    superclass_scores,
)

# of the recorded model; the default of 64 channels per head fits the published ones
HEADS = dict(image_heads=2, text_heads=3)


@pytest.fixture(scope="module")
def golden():
    return doubles.golden("simseg_patch")


@pytest.fixture(scope="module")
def weights(golden):
    return golden_weights(golden)


@pytest.fixture(scope="module")
def encoder(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("simseg") / "tiny.pth"
    torch.save({"state_dict": weights, "epoch": 19}, path)
    return SimSegEncoder.from_checkpoint(path, **HEADS)


def test_image_side(encoder, golden):
    close(encoder.patch_tokens(golden["in.image"]), golden["out.patch_tokens"])
    features = encoder.encode(golden["in.image"])
    close(features.dense.flatten(2).mT, golden["out.patch_projected"])
    close(features.patches(), golden["out.patch_projected_unit"])
    close(features.pooled, golden["out.image_pooled_raw"])
    close(features.pooled / (features.pooled.norm() + 1e-8), golden["out.image_pooled"])


def test_normalization_is_the_recorded_one(encoder, golden):
    close(
        encoder.preprocess(golden["in.image_uint8"].permute(1, 2, 0).contiguous().numpy(), 96),
        golden["in.image"],
    )


def class_embeddings(encoder, golden):
    """N x 3 x d prompt embeddings, as `text` makes them, but from the recorded word pieces:
    their tokenizer was not kept.
    """
    ids, mask = golden["in.input_ids"].flatten(0, 1), golden["in.attention_mask"].flatten(0, 1).bool()
    with patch.object(SimSegEncoder, "tokenize", lambda self, prompts: (ids[prompts], mask[prompts])):
        return encoder.text(list(range(len(ids)))).unflatten(0, (-1, 3))


def test_text_side(encoder, golden):
    ids, mask = golden["in.input_ids"], golden["in.attention_mask"].bool()
    for k in (0, 1):
        close(
            encoder.language(input_ids=ids[k], attention_mask=mask[k].long()).last_hidden_state,
            golden[f"mid.text_tokens_class{k}"],
        )
    close(loda_pool(encoder.token_features(ids[1], mask[1]), 1, mask[1]), golden["out.text_pooled_k1_class1"])
    texts = class_embeddings(encoder, golden)
    close(texts, golden["mid.text_embeddings"])
    close(F.normalize(texts.mean(1), dim=-1), golden["out.class_embeddings"])


def test_pooling_unit(golden):
    close(loda_pool(golden["in.topk_x"], 5), golden["out.topk5"], 1e-6)
    close(loda_pool(golden["in.topk_x"], 5, golden["in.topk_mask"]), golden["out.topk5_masked"], 1e-6)
    close(loda_pool(golden["in.topk_x"], 1, golden["in.topk_mask"]), golden["out.topk1_masked"], 1e-6)


def test_end_to_end_labels_are_the_recorded_ones(encoder, golden):
    """Image and word pieces to the label map, every stage checked;
    the CRF is replaced by value > 0.5, as in the recording.
    """
    features = encoder.encode(golden["in.image"])
    classes = F.normalize(class_embeddings(encoder, golden).mean(1), dim=-1)
    scores = superclass_scores(features.pooled[0], classes)
    close(scores, golden["mid.scores"])
    assert abs(selection_threshold(scores) - golden["out.threshold"].item()) < 1e-5
    selected = select_classes(scores, background_index=0)
    assert selected == golden["out.selected_classes"].tolist()
    for method in ("paper", "repo", "mean", "max"):  # a single subclass that is the class: plain SimSeg
        maps = subclass_maps(features.patches()[0], classes[:, None], None, features.pooled[0], method)
        close(maps.unflatten(1, (6, 6)), golden["mid.similarity_6x6"])
    big = min_max(
        F.interpolate(maps[selected].unflatten(1, (6, 6))[None], scale_factor=16, mode="nearest")[0]
    )
    close(thinned(big, 4), golden["out.selected_maps_minmax_stride4"], 2e-5)
    masks = np.stack([erode(dilate(each > 0.5)) for each in big.numpy()])
    masks = F.interpolate(torch.from_numpy(masks)[None].float(), (70, 110), mode="nearest")[0].bool().numpy()
    labels = merge_masks(masks, selected, scores[selected], background=0)
    assert np.array_equal(labels, golden["out.pred_after_fake_crf"].numpy())
    # both classes and background: the comparison has something to compare
    assert len(np.unique(labels)) == 3


def test_systems_equal_the_recorded_segmentation(encoder, golden):
    """The whole of `SimSeg.labels`, and LLM supervision with each class as its own subclass, on the recorded
    image, texts and stand-in CRF.
    """
    from ovss_nb.systems.base import EncodedImage
    from ovss_nb.systems.llm_supervised import LLMSupervised, SubclassText
    from ovss_nb.systems.simseg import SimSeg
    from ovss_nb.text.text_bank import TextBank
    from ovss_nb.core.vocabulary import Vocabulary

    names = ["background", *(f"class {k}" for k in range(1, 14))]
    vocabulary = Vocabulary(names)
    bank = TextBank(
        golden["out.class_embeddings"][:, None],
        torch.ones(14, 1, dtype=torch.bool),
        vocabulary.names,
        vocabulary.words,
        ("{}",),
        vocabulary.background,
    )
    image = EncodedImage(np.zeros((70, 110, 3), np.uint8), encoder.encode(golden["in.image"]))
    with patch("ovss_nb.systems.simseg.binary_crf", lambda image, probability: probability > 0.5):
        for system, text in (
            (SimSeg(encoder), bank),
            *(
                (LLMSupervised(encoder, ensemble=kind), SubclassText(bank, bank))
                for kind in ("paper", "repo", "mean", "max")
            ),
        ):
            scores = system.scores(image, text)
            close(scores, golden["mid.similarity_6x6"])
            close(system.class_scores(image, text), golden["mid.scores"])
            assert np.array_equal(
                system.labels(image, text, scores, vocabulary), golden["out.pred_after_fake_crf"].numpy()
            )


def checkpoint(encoder):
    return {
        next(v + k[len(p) :] for p, v in PREFIXES.items() if k.startswith(p)): t.contiguous()
        for k, t in encoder.state_dict().items()
    }


def test_sizes_and_heads_come_from_the_file(tmp_path):
    torch.manual_seed(0)
    vision = VisionTransformer(
        img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2, mlp_ratio=3, num_classes=0
    )
    words = transformers.BertConfig(
        vocab_size=200,
        hidden_size=192,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=100,
        max_position_embeddings=40,
    )
    made = SimSegEncoder(vision, words, dim=24)
    save_file(checkpoint(made), tmp_path / "made.safetensors")
    read = SimSegEncoder.from_checkpoint(tmp_path / "made.safetensors")
    x, ids = torch.randn(1, 3, 288, 288), torch.randint(5, 200, (2, 25))
    assert read.dense(x).shape == (1, 24, 18, 18)
    assert torch.equal(read.dense(x), made.dense(x))
    assert torch.equal(
        read.token_features(ids, torch.ones(2, 25)), made.token_features(ids, torch.ones(2, 25))
    )
    assert (
        read.fingerprint == made.fingerprint
        and not read.training
        and not any(p.requires_grad for p in read.parameters())
    )


@pytest.mark.parametrize("size", [(96, 96), (64, 64), (32, 160), (288, 288)])
def test_any_multiple_of_sixteen(encoder, size):
    features = encoder.encode(torch.randn(2, 3, *size))
    assert (
        features.dense.shape == (2, 32, size[0] // 16, size[1] // 16)
        and torch.isfinite(features.pooled).all()
    )


def test_sizes_off_the_grid_are_refused(encoder):
    with pytest.raises(ValueError, match="multiples of 16"):
        encoder.dense(torch.randn(1, 3, 100, 96))


def test_half_precision(encoder, weights, golden, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / "tiny.pth")
    half = SimSegEncoder.from_checkpoint(tmp_path / "tiny.pth", **HEADS).bfloat16()
    dense = half.dense(golden["in.image"].bfloat16())
    assert dense.dtype == torch.bfloat16
    assert F.cosine_similarity(dense.float(), encoder.dense(golden["in.image"]), dim=1).min() > 0.99


def test_wrong_weights_are_listed(weights, tmp_path):
    wrong = {k: v for k, v in weights.items() if not k.endswith("layer.1.output.dense.bias")} | {
        "head.weight": torch.zeros(2)
    }
    torch.save({"state_dict": wrong}, tmp_path / "wrong.pth")
    with pytest.raises(
        ValueError,
        match=r"1 missing \(text_encoder.*layer\.1\.output\.dense\.bias\); 1 unexpected \(head\.weight\)",
    ):
        SimSegEncoder.from_checkpoint(tmp_path / "wrong.pth", **HEADS)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["OVSS_TEST_PAYLOAD"],)


def test_a_checkpoint_cannot_run_code(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("OVSS_TEST_PAYLOAD", str(tmp_path / "ran"))
    torch.save({"state_dict": weights, "meta": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="code beside tensors"):
        SimSegEncoder.from_checkpoint(tmp_path / "evil.pth", **HEADS)
    assert not (tmp_path / "ran").exists()


def test_missing_vocabulary_and_long_prompt(encoder, weights, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="No BERT vocabulary"):
        SimSegEncoder.from_checkpoint(tmp_path / "tiny.pth", tokenizer=tmp_path, **HEADS)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                "cat",
                "dog",
                *(f"[unused{i}]" for i in range(113)),
            ]
        )
    )
    options = dict(tokenizer=tmp_path / "vocab.txt", **HEADS)
    strict, cut = (
        SimSegEncoder.from_checkpoint(tmp_path / "tiny.pth", truncate=each, **options)
        for each in (False, True)
    )
    fits, long = " ".join(["cat"] * 23), " ".join(["cat"] * 23 + ["dog"])
    assert torch.equal(strict.text([fits]), cut.text([long]))  # 23 words, [CLS] and [SEP]
    with pytest.raises(ValueError, match="has 26: 'cat cat.*dog'"):
        strict.text([fits, long])
    for empty in ([], "cat"):
        with pytest.raises(ValueError, match="a list"):
            strict.text(empty)


@pytest.fixture
def bank():
    "Four classes with up to five subclasses, an image vector, and patches."
    random = torch.Generator().manual_seed(1)
    text = F.normalize(torch.randn(4, 5, 16, generator=random), dim=-1)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool
    )
    text[~mask] = 0
    return (
        text,
        mask,
        torch.randn(16, generator=random),
        F.normalize(torch.randn(30, 16, generator=random), dim=-1),
    )


@pytest.mark.parametrize("method", ["paper", "repo", "mean", "max"])
def test_equations_by_hand(bank, method):
    "Class by class and number by number in plain Python."
    text, mask, pooled, patches = bank
    image = (pooled.double() / pooled.double().norm()).tolist()
    maps = subclass_maps(patches, text, mask, pooled, method, temperature=0.3)
    for k in range(4):
        rows = [t.double().tolist() for t, real in zip(text[k], mask[k]) if real]
        dots = [
            [sum(a * b for a, b in zip(row, patch)) for patch in patches.double().tolist()] for row in rows
        ]
        if method == "max":
            expected = [max(column) for column in zip(*dots)]
        else:
            scores = {
                "paper": [max(a * b for a, b in zip(row, image)) for row in rows],
                "repo": [sum(a * b for a, b in zip(row, image)) for row in rows],
                "mean": [0.0] * len(rows),
            }[method]
            parts = [math.exp(score / 0.3) for score in scores]
            expected = [sum(p * d for p, d in zip(parts, column)) / sum(parts) for column in zip(*dots)]
        close(maps[k], torch.tensor(expected), 1e-5)


@pytest.mark.parametrize("method", ["paper", "repo", "mean", "max"])
def test_order_of_subclasses_is_irrelevant(bank, method):
    text, mask, pooled, patches = bank
    order = torch.tensor([3, 0, 4, 1, 2])
    close(
        subclass_maps(patches, text[:, order], mask[:, order], pooled, method),
        subclass_maps(patches, text, mask, pooled, method),
        1e-6,
    )


@pytest.mark.parametrize("method", ["paper", "repo"])
def test_temperature_limits(bank, method):
    text, mask, pooled, _ = bank
    scores = (text[0] * pooled).amax(-1) if method == "paper" else text[0] @ pooled
    close(ensemble(text[0], pooled, method, 1e-6), text[0, scores.argmax()], 1e-6)
    close(ensemble(text[0], pooled, method, 1e8), text[0].mean(0), 1e-6)
    assert torch.equal(ensemble(text[0, :1], pooled, method), text[0, 0])  # n = 1
    assert (subclass_weights(text, pooled, mask, method)[~mask] == 0).all()


def test_length_of_the_class_vector_is_irrelevant(bank):
    text, _, pooled, patches = bank
    vector = ensemble(text[0], pooled)
    close(min_max((patches @ (23 * vector)).view(5, 6)), min_max((patches @ vector).view(5, 6)), 1e-5)


def test_paper_and_repository_differ(bank):
    text, mask, pooled, _ = bank
    weights = {kind: subclass_weights(text, pooled, mask, kind, 0.1) for kind in ("paper", "repo")}
    assert (weights["paper"] - weights["repo"]).abs().max() > 0.05
    for weight in weights.values():
        close(weight.sum(1), torch.ones(4), 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(patches=torch.zeros(30, 15)), "d = 15"),
        (dict(patches=torch.zeros(1, 30, 16)), "m x d"),
        (dict(pooled=torch.zeros(1, 16)), "pooled must be d"),
        (dict(mask=torch.ones(5, 4)), "K x P"),
        (dict(mask=torch.zeros(4, 5)), "needs a subclass"),
        (dict(method="best"), "paper, repo or mean"),
        (dict(temperature=-1.0), "above 0"),
        (dict(temperature=math.nan), "above 0"),
    ],
)
def test_wrong_input_is_named(bank, change, message):
    text, mask, pooled, patches = bank
    with pytest.raises(ValueError, match=message):
        subclass_maps(**dict(patches=patches, embeddings=text, mask=mask, pooled=pooled) | change)


def test_selection_rules():
    scores = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.1, 0.1, 0.1])
    assert select_classes(scores) == [0, 1]
    assert select_classes(scores, background_index=0) == [1]
    assert select_classes(scores, 0, walk=1) == [] and select_classes(scores, walk=1) == [0]
    assert select_classes(scores, threshold=0.3) == [0, 1, 2]
    assert select_classes(scores, threshold=None) == [0, 1, 2, 3, 4] and select_classes(
        scores, threshold=None, top=2
    ) == [0, 1]
    assert selection_threshold(scores, 3) == pytest.approx(
        np.mean([0.9, 0.8, 0.3]) + np.std([0.9, 0.8, 0.3], ddof=1)
    )
    assert select_classes(torch.tensor([0.2])) == [0]
    with pytest.raises(ValueError, match="at least one score"):
        selection_threshold(torch.zeros(0))
