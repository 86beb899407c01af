"""The prompt banks:
what ships is whole and fit for CLIP, what a user makes is checked, and the command line does both.
"""

import json
import re
from functools import lru_cache

import pytest
from open_clip.tokenizer import SimpleTokenizer

from chat_server import ChatServer, describe
from ovss_nb.app.cli import main
from ovss_nb.text.prompt_bank import (
    KINDS,
    PromptBank,
    list_banks,
    list_subclasses,
    load_subclasses,
    vocabulary_hash,
)
from ovss_nb.text.prompt_checks import check_description, check_subclasses
from ovss_nb.text.prompt_checks import ATTRIBUTES, PromptError
from ovss_nb.text.prompt_writer import PROMPTS, filter_subclasses
from ovss_nb.core.vocabulary import Vocabulary, list_vocabularies, load_vocabulary

tokenizer = SimpleTokenizer()
tokenizer.encode = lru_cache(None)(tokenizer.encode)  # most texts belong to several vocabularies
SHIPPED = [(title, kind) for title in list_vocabularies() for kind in KINDS]


def count(text):
    return len(tokenizer.encode(text)) + 2


@pytest.mark.parametrize("title, kind", SHIPPED)
def test_every_vocabulary_ships_whole(title, kind):
    bank, vocabulary = PromptBank.open(title, kind), load_vocabulary(title)
    assert bank.missing(vocabulary) == [] and bank.vocabulary_hash == vocabulary_hash(vocabulary)
    assert set(bank.classes) == set(vocabulary.names) - (
        set(vocabulary.background) if kind == "descriptions" else set()
    )
    assert bank.problems(vocabulary, count) == {}
    assert (
        "Claude" in bank.model
        and re.fullmatch(r"\d{4}-\d\d-\d\d", bank.date)
        and bank.prompts["instructions"]
    )
    if kind == "subclasses":
        assert bank.prompts["P2"] == PROMPTS["P2"] and all(
            len(kinds) == 10 for kinds in bank.texts().values()
        )
    else:
        assert all(
            len(sentences) == 4 and max(map(count, sentences)) <= 60 for sentences in bank.texts().values()
        )


def test_shared_texts_are_written_once_and_used():
    for kind in KINDS:
        shared = PromptBank.open("ADE-150", kind).pool
        used = {
            entry
            for title in list_banks(kind)
            for entry in PromptBank.open(title, kind).classes.values()
            if isinstance(entry, str)
        }
        if kind == "descriptions":
            assert used == set(shared)  # no text without a class
        assert used <= set(shared) and len(used) > 1100
    # only names that never meet, such as sofa and couch, may have one list
    for title in list_subclasses():
        lists = [tuple(kinds) for kinds in load_subclasses(title).values()]
        assert len(set(lists)) == len(lists)
    sentences = [
        text for row in PromptBank.open("ADE-847", "descriptions").pool.values() for text in row.values()
    ]
    assert len(set(sentences)) == len(sentences) == 4 * 1180


def test_senses_are_those_of_the_data_sets():
    ade, context = PromptBank.open("ADE-847", "descriptions"), PromptBank.open("PC-459", "descriptions")
    for bank, name, word in (
        (ade, "crane", "steel"),
        (context, "mouse", "button"),
        (ade, "monitor", "screen"),
        (ade, "plant", "green"),
        (ade, "fan", "blade"),
        (context, "pot", "stove"),
        (ade, "pot", "plant"),
    ):
        assert word in " ".join(bank[name].values()).lower(), (name, bank[name])


def test_llm_supervised_lists_stay():
    assert list_subclasses() == list_vocabularies()
    assert (
        load_subclasses("VOC-21")["cat"][0] == "tabby cat"
        and load_subclasses("PC-60")["background"][0] == "bridge"
    )
    # PASCAL-Context has tables of its own
    assert load_subclasses("VOC-21")["diningtable"] != load_subclasses("PC-60")["diningtable"]


def bank_of(vocabulary, kind, classes):
    bank = PromptBank.new(vocabulary, kind, "test")
    bank.fill(vocabulary, classes)
    return bank


def test_saving_keeps_references_beside_the_shared_file_and_writes_them_out_elsewhere(tmp_path):
    bank = PromptBank.open("VOC-21", "descriptions")
    bank.save(tmp_path / "voc.json")
    plain = PromptBank.open(tmp_path / "voc.json")
    assert plain.shared is None and plain.texts() == bank.texts() and plain.fingerprint == bank.fingerprint
    (tmp_path / "descriptions.json").write_text(json.dumps({"classes": bank.pool}))
    bank.save(tmp_path / "voc2.json")
    again = PromptBank.open(tmp_path / "voc2.json")
    assert (
        again.shared == "descriptions.json"
        and again.classes["cat"] == "cat"
        and again.texts() == bank.texts()
    )
    text = (tmp_path / "voc2.json").read_text()
    again.fill("VOC-21", {"cat": bank["dog"]})
    again.save()
    changed = [
        (old, new)
        for old, new in zip(text.splitlines(), again.path.read_text().splitlines())
        if old != new and '"date"' not in old
    ]
    assert len(changed) == 1 and changed[0][0].strip() == '"cat": "cat",'  # one class, one line


def test_a_bank_for_other_words_is_refused_until_it_is_filled(capsys, tmp_path):
    old = Vocabulary.of({"cat": "cat", "sofa": "sofa"})
    words = tmp_path / "words.txt"
    words.write_text("cat, tabby\nsofa\ndog\n")
    bank = bank_of(old, "subclasses", {"cat": ["tabby", "siamese"], "sofa": ["settee"]})
    bank.save(tmp_path / "bank.json")
    with pytest.raises(PromptError, match="other classes or words.*ovss-nb prompts fill"):
        bank.texts(Vocabulary.of(str(words)))
    assert main(["prompts", "check", "--vocabulary", str(words), "--bank", str(tmp_path / "bank.json")]) == 2
    assert "prompts fill" in capsys.readouterr().err
    assert (
        main(
            [
                "prompts",
                "fill",
                "--vocabulary",
                str(words),
                "--kind",
                "subclasses",
                "--bank",
                str(tmp_path / "bank.json"),
            ]
        )
        == 0
    )
    filled = PromptBank.open(tmp_path / "bank.json")
    # tabby is a word of the class now
    assert filled.texts(Vocabulary.of(str(words)))["cat"] == ["siamese"]
    assert filled["dog"] == load_subclasses("VOC-21")["dog"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data.pop("model"), "'model' must be of type str"),
        (lambda data: data.update(extra=1), "unknown entry 'extra'"),
        (lambda data: data.update(kind="poems"), "holds 'poems'"),
        (lambda data: data["classes"].update(cat=[]), "'cat': subclasses are a list"),
        (lambda data: data["classes"].update(cat={"color": "x"}), "'cat': subclasses are a list"),
        (lambda data: data["classes"].update(cat="kitty"), "no entry 'kitty'"),
    ],
)
def test_a_damaged_bank_says_where(change, message, tmp_path):
    bank_of(Vocabulary.of(["cat"]), "subclasses", {"cat": ["tabby"]}).save(tmp_path / "bank.json")
    data = json.loads((tmp_path / "bank.json").read_text())
    change(data)
    (tmp_path / "bank.json").write_text(json.dumps(data))
    with pytest.raises(PromptError, match=message):
        PromptBank.open(tmp_path / "bank.json")


def test_unknown_names_and_kinds():
    for arguments, message in (
        (("VOC-21",), "kind must be"),
        (("VOC-21", "poems"), "kind must be"),
        (("no/such.json",), "cannot read the bank"),
    ):
        with pytest.raises(PromptError, match=message):
            PromptBank.open(*arguments)
    with pytest.raises(PromptError, match="kind must be"):
        PromptBank.new(["cat"], "poems")


def test_tokens_are_counted_not_cut():
    words = Vocabulary.of(["cat"])
    texts = dict.fromkeys(ATTRIBUTES) | {
        attribute: f"A cat is black, {attribute}." for attribute in ATTRIBUTES
    }
    assert check_description(texts, "cat", words, count) == []
    long = texts | {"summary": "A cat is black and " + "furry " * 60}
    (problem,) = check_description(long, "cat", words, count)
    assert problem.startswith("67 tokens, the limit is 60") and "furry" in problem
    assert check_subclasses(["striped " * 70], "cat", words, 1, count)[0].startswith("72 tokens")


def test_filters_do_what_the_repository_does():
    import numpy as np

    vectors = {
        "dog": [1, 0],
        "cat": [0, 1],
        "poodle": [0.96, 0.28],
        "wolfhound": [0.8, 0.6],
        "kitten-like dog": [0.1, 0.995],
        "tabby": [0.28, 0.96],
    }

    def embed(texts):
        return np.array([vectors[text] for text in texts]) / np.linalg.norm(
            [vectors[text] for text in texts], axis=1, keepdims=True
        )

    kinds = {"dog": ["poodle", "wolfhound", "kitten-like dog"], "cat": ["tabby"]}
    assert filter_subclasses(kinds, embed) == kinds
    # of the unlike pair the odd one goes
    assert filter_subclasses(kinds, embed, outlier=0.46)["dog"] == ["poodle", "wolfhound"]
    assert filter_subclasses(kinds, embed, rival=0.95) == {"dog": ["poodle", "wolfhound"], "cat": ["tabby"]}
    assert filter_subclasses({"dog": [], "cat": ["tabby"]}, embed, 0.46, 0.95) == {
        "dog": [],
        "cat": ["tabby"],
    }


def test_make_stops_at_the_budget_and_goes_on(tmp_path, capsys):
    with ChatServer(describe) as server:
        command = [
            "prompts",
            "make",
            "--vocabulary",
            "Cityscapes-19",
            "--bank",
            str(tmp_path / "city.json"),
            "--model",
            "test",
            "--base-url",
            server.url,
        ]
        assert main([*command, "--dry-run", "--prices", "1", "2"]) == 0 and not server.asked
        assert "20 calls for 20 questions" in capsys.readouterr().out
        assert main([*command, "--max-calls", "8", "--concurrency", "2"]) == 2
        assert (
            "The budget of 8 calls is spent" in capsys.readouterr().err
            and not (tmp_path / "city.json").exists()
        )
        assert main(command) == 0
        assert max(server.answered.values()) == 1 and sum(server.answered.values()) == 20
        assert "19 classes, 0 failed" in capsys.readouterr().out
        assert (
            main(["prompts", "check", "--vocabulary", "Cityscapes-19", "--bank", str(tmp_path / "city.json")])
            == 0
        )
        assert main(["prompts", "show", "--bank", str(tmp_path / "city.json"), "--class", "road"]) == 0
        assert "A road is mostly grey" in capsys.readouterr().out
        assert main(["prompts", "show", "--bank", str(tmp_path / "city.json"), "--class", "moon"]) == 2
    assert PromptBank.open(tmp_path / "city.json").prompts["guidance"].startswith("Name the class first")


def test_check_reports_what_is_wrong(tmp_path, capsys):
    bank = PromptBank.open("VOC-20", "descriptions")
    bank.classes["cat"] = bank["cat"] | {"color": "It has fur."}
    bank.save(tmp_path / "bank.json")
    assert main(["prompts", "check", "--bank", str(tmp_path / "bank.json")]) == 1
    assert "cat: color does not name cat; color names no color" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["descriptions", "subclasses"])
def test_a_bank_knows_its_kind_and_its_words(kind, tmp_path, capsys):
    bank = str(tmp_path / "own.json")
    assert main(["prompts", "fill", "--vocabulary", "cat,dog", "--kind", kind, "--bank", bank]) == 0
    for command in (
        ["check"],
        ["show"],
        ["check", "--vocabulary", "cat,dog"],
        ["fill", "--vocabulary", "cat,dog,sky"],
        ["check"],
        ["show", "--class", "sky"],
    ):
        assert main(["prompts", *command, "--bank", bank]) == 0, capsys.readouterr().err
    assert PromptBank.open(bank).kind == kind and len(PromptBank.open(bank)) == 3
    other = "descriptions" if kind == "subclasses" else "subclasses"
    capsys.readouterr()
    for command in (["check"], ["show"], ["fill", "--vocabulary", "cat"]):
        assert main(["prompts", *command, "--kind", other, "--bank", bank]) == 2
        assert f"holds '{kind}', not {other}" in capsys.readouterr().err


def test_a_bank_of_own_words_with_synonyms_asks_for_them(tmp_path, capsys):
    words, bank = "cat,couch:couch|sofa", str(tmp_path / "own.json")
    assert main(["prompts", "fill", "--vocabulary", words, "--bank", bank]) == 0
    assert main(["prompts", "check", "--bank", bank]) == 2 and "--vocabulary" in capsys.readouterr().err
    assert main(["prompts", "check", "--bank", bank, "--vocabulary", words]) == 0


def test_check_finds_junk_that_was_stored(tmp_path, capsys):
    bank = PromptBank.new(["dog"], "subclasses")
    bank.fill(["dog"], {"dog": ["labrador", "**poodle**: curly", "| beagle |"]})
    bank.save(tmp_path / "own.json")
    assert main(["prompts", "check", "--bank", str(tmp_path / "own.json")]) == 1
    said = capsys.readouterr().err
    assert "'**poodle**: curly'" in said and "'| beagle |'" in said and "labrador" not in said
