"""Words:
one grammar at three doors, what is asked back, backgrounds however they are spelt, and names that are equal
to Unicode.
"""

import json
import os
import shlex
import unicodedata
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from ovss_nb.app.cli import parse_classes
from ovss_nb.text.prompt_bank import PromptBank
from ovss_nb.core.segmentation import Segmentation, default_palette
from ovss_nb.core.vocabulary import (
    Vocabulary,
    VocabularyError,
    VocabularyWarning,
    find_background,
    is_background,
    list_vocabularies,
    load_vocabulary,
    read_lines,
    read_vocabulary,
    tidy_name,
    write_lines,
)

ACCENT = "cafe\u0301"  # é of two characters
BACKGROUNDS = [
    "background",
    "Background",
    "BACKGROUND",
    "_background_",
    "__background__",
    "__Background__",
    "bg",
    "BG",
    "else",
    "Else",
    "back-ground",
    " background ",
]


def from_file(text, folder, name="list.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return read_vocabulary(folder / name)


def words_of(vocabulary):
    return dict(zip(vocabulary.names, vocabulary.words))


# --- round trip


def is_text(text):
    return bool(tidy_name(text)) and not any(unicodedata.category(c) in ("Cc", "Cs") for c in tidy_name(text))


signs = st.text(st.sampled_from(list(",:|#\"';. \tabcC1230/\\[]{}-，、é")), min_size=1, max_size=8)
texts = st.one_of(
    signs,
    st.text(min_size=1, max_size=8),
    st.sampled_from(
        [
            "C#",
            "12:30",
            "else",
            "VOC-21",
            "coco",
            "name",
            "id",
            "a.csv",
            "- cat",
            "0",
            "1 cat",
            "7",
            "1) cat",
            "1.cat",
            "n02123045 tabby",
            "/m/01yrx",
            "__ignore__",
            "(cat",
            "x = [a]",
            "cat. dog",
            '"',
            ACCENT,
        ]
    ),
).filter(is_text)
rows = st.dictionaries(
    texts,
    st.lists(texts, min_size=1, max_size=3, unique_by=lambda word: tidy_name(word).casefold()) | st.none(),
    min_size=1,
    max_size=4,
)


@given(rows)
@example({"C#": None, "12:30": ["12:30", "noon"], "animal": ["cat, small", "dog"]})
@settings(max_examples=400, deadline=None)
def test_what_is_written_is_read_at_every_door(tmp_path_factory, rows):
    try:
        vocabulary = Vocabulary(list(rows), [words or [name] for name, words in rows.items()])
    except VocabularyError:
        return  # doubles by case or composition, or two backgrounds
    text = write_lines(vocabulary)
    assert (
        read_lines(text)
        == parse_classes(text)
        == from_file(text, tmp_path_factory.getbasetemp())
        == vocabulary
    )


@pytest.mark.parametrize("title", list_vocabularies())
def test_shipped_lists_are_read_as_ever(title, tmp_path):
    "By the plain rule that they were written with: commas, and remarks at the start of a line."
    lines = (
        files("ovss_nb.data").joinpath(f"vocabularies/{title}.txt").read_text(encoding="utf-8").splitlines()
    )
    rows = [
        [part.strip() for part in line.split(",")]
        for line in lines
        if line.strip() and not line.startswith("#")
    ]
    vocabulary = load_vocabulary(title)
    assert (
        vocabulary.words == tuple(map(tuple, rows))
        and vocabulary.names == tuple(row[0] for row in rows)
        and vocabulary.title == title
    )
    again = read_lines(write_lines(vocabulary))
    assert (again.names, again.words, again.background) == (
        vocabulary.names,
        vocabulary.words,
        vocabulary.background,
    )


# --- one grammar


@pytest.mark.parametrize(
    "text, words",
    [
        ("animal: cat, dog\nsky", {"animal": ("cat", "dog"), "sky": ("sky",)}),
        ("animal: cat | dog\nsky", {"animal": ("cat", "dog"), "sky": ("sky",)}),
        ("animal:cat|dog,background", {"animal": ("cat", "dog"), "background": ("background",)}),
        ("C#\n12:30\n16:9: wide", {"C#": ("C#",), "12:30": ("12:30",), "16:9": ("wide",)}),
        ('"Paris, Texas"\n"a ""b""": "x: y", z', {"Paris, Texas": ("Paris, Texas",), 'a "b"': ("x: y", "z")}),
        ("# all\ncat # the small one\n\ndog", {"cat": ("cat",), "dog": ("dog",)}),
        ("cat\r\nElse: wall, floor\r\n", {"cat": ("cat",), "background": ("wall", "floor")}),
        ('["cat", "dog"]', {"cat": ("cat",), "dog": ("dog",)}),
        ('{"animal": ["cat", "dog"], "sky": "blue sky"}', {"animal": ("cat", "dog"), "sky": ("blue sky",)}),
        (f"\ufeff{ACCENT}\u200b\nthe", {"café": ("café",), "the": ("the",)}),
    ],
)
def test_the_same_text_means_the_same(text, words, tmp_path):
    assert (
        words_of(read_lines(text))
        == words_of(parse_classes(text))
        == words_of(from_file(text, tmp_path))
        == words
    )


def test_where_the_doors_differ(tmp_path):
    "Commas without a colon; and what could mean two things is asked back."
    assert read_lines("sofa, couch").names == parse_classes("sofa, couch").names == ("sofa", "couch")
    assert words_of(from_file("sofa, couch\nsky", tmp_path)) == {"sofa": ("sofa", "couch"), "sky": ("sky",)}
    with pytest.raises(VocabularyError, match="one class or 2"):
        from_file("sofa, couch", tmp_path)
    with pytest.raises(VocabularyError, match=r"--classes: .*one class or 2\? Write 'animal: cat \| dog'"):
        parse_classes("animal: cat, dog")
    with pytest.raises(VocabularyError, match="begins a remark"):
        parse_classes("cat, #1, dog")
    assert read_lines("animal: cat, dog").words == (("cat", "dog"),)


# --- asked back


@pytest.mark.parametrize(
    "text, advice",
    [
        *(
            (text, "cat, dog")
            for text in (
                "cat; dog",
                "cat;dog",
                "cat，dog",
                "cat、dog",
                "cat；dog",
                "cat،dog",
                "cat . dog .",
                "cat . dog",
                "cat. dog.",
                "cat.dog.",
                "cat\tdog",
                "cat|dog",
                "'cat, dog'",
                "“cat, dog”",
            )
        ),
        ("voc-21", "'VOC-21'"),
        ("VOC21", "'VOC-21'"),
        ("VOC-21,cat", "'VOC-21'"),
        ("cat,ade-150", "'ADE-150'"),
        ("coco", "COCO-Object-81"),
        ("ADE20K", "ADE-150"),
        ("Cityscapes", "Cityscapes-19"),
        ("pascal voc 2012", "VOC-21"),
        ("imagenet", "The lists that ship"),
        ("VOC-12", "did you mean 'VOC-21'"),
        ("my_classes.csv", "No such file"),
        ("classes/my", "No such file"),
        ("cat,my_classes.txt", "No such file"),
        ("~/nowhere.yaml", "No such file"),
        ("cat, a.txt, dog", "looks like a file"),
        ("['cat', 'dog']", "not JSON"),
        ('["cat", 1]', "JSON list"),
        ('{"0": "cat"}', "JSON list"),
        ('{"cat": 0}', "JSON list"),
        ('{"a": "b", "a": "c"}', "occurs twice"),
        ("[[", "not JSON"),
        ("names: [cat, dog]", "looks like code"),
        ("name\ncat\ndog", "head of a table"),
        ("id,name\n0,cat", "head of a table"),
        ("Class\ncat", "head of a table"),
        ("0: cat\n1: dog", "e.g. 'cat'"),
        ("1 cat\n2 dog", "e.g. 'cat'"),
        ("1. cat\n2. dog", "e.g. 'cat'"),
        ("- cat\n- dog", "e.g. 'cat'"),
        ("('cat', 'dog')", "code"),
        ("names = ['cat']", "code"),
        ("cat [small, dog", "code"),
        ("cat,0\ndog,1", "a table"),
        ("7,road\n8,sidewalk", "a table"),
        ("/m/01yrx,Cat\n/m/0bt9lr,Dog", "a table"),
        ("n02123045 tabby\nn02099601 retriever", "e.g. 'tabby'"),
        ("1.cat\n2.dog", "e.g. 'cat'"),
        ("a) cat\nb) dog", "e.g. 'cat'"),
        ("nc: 2\nnames:\n- cat\n- dog", "e.g. 'cat'"),
        ("train: a\nnames:\n  0: cat\n  1: dog", "a table"),
        ("#1", "is a remark"),
        ("'cat', 'dog'", "without them"),
        ('cat, "dog', "not closed"),
        ("cat:a:b", "one colon"),
        ("cat,,dog", "empty"),
        ("cat, dog, Cat", "named already"),
        (f"café,{ACCENT}", "named already"),
        ("bg,cat,Background", "keep one"),
        ("", "names no class"),
        (",", "empty"),
        ("# cat", "names no class"),
        ("cat\0", "no character"),
        ("cat\udcff,dog", "no character"),
        ("\0.txt", "no file"),
        ("x" * 5000 + ".txt", "too long"),
    ],
)
@pytest.mark.parametrize("door", [read_lines, parse_classes])
def test_what_was_meant_otherwise_is_asked_back(door, text, advice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VocabularyError, match=advice):
        door(text)


@pytest.mark.parametrize(
    "text",
    [
        "id,name\n0,cat\n1,dog",
        "0,cat\n1,dog",
        "0: cat\n1: dog",
        "cat; kitten\ndog",
        "cat\nVOC-21",
        "a.jpg\nb.jpg",
        "name\ncat",
        "cat\tkitten",
        "'cat'\n'dog'",
        "- cat\n- dog",
        "nc: 2\nnames: ['cat', 'dog']",
        "cat, dog",
        "cat|dog\nsky",
        "cat . dog .",
        '{"cat": 0}',
        "",
    ],
)
def test_a_file_of_another_tool_is_asked_back(text, tmp_path):
    with pytest.raises(VocabularyError, match="list.csv"):
        from_file(text, tmp_path, "list.csv")


def test_lists_in_python_are_asked_back_too():
    for wrong, advice in (
        (["cat, dog"], r"\['cat', 'dog'\]"),
        (["cat; dog"], "'cat, dog'"),
        (["VOC-21"], "class list"),
        (["coco", "cat"], "class list"),
        (["cat\ndog"], "'cat, dog'"),
        (["cat . dog ."], "'cat, dog'"),
        (["animal: cat"], "as a dict"),
        (["cat|dog"], "as a dict"),
        (["words.txt"], "looks like a file"),
        (("cat，dog",), "'cat, dog'"),
        (["cat\0"], "no character"),
        ([""], "empty"),
    ):
        with pytest.raises(VocabularyError, match=advice):
            Vocabulary.of(wrong)
        with pytest.raises(VocabularyError, match=advice):
            Vocabulary(wrong)
        # who says the words too means it
        if len(wrong) == 1 and advice not in ("no character", "empty"):
            assert Vocabulary.of({wrong[0]: wrong}).names == (tidy_name(wrong[0]),)
    for wrong, advice in (
        ("cat, dog", r"pass a list: \['cat', 'dog'\]"),
        ("cat; dog", "'cat, dog'"),
        ("my.csv", "No such file"),
        ("voc21", "did you mean 'VOC-21'"),
    ):
        with pytest.raises(VocabularyError, match=advice):
            Vocabulary.of(wrong)
    assert (
        Vocabulary.of(
            [
                "St. Bernard",
                "U.S. flag",
                "AC/DC",
                "12:30",
                "C#",
                "K-17",
                "A4",
                "cat (small)",
                "set {x}",
                "3 dogs",
            ]
        ).names[0]
        == "St. Bernard"
    )


ORDINARY = [
    "St. Bernard",
    "TV/monitor",
    "Dr. Pepper",
    "traffic light (red)",
    "COCO beans",
    "ice-cream",
    "e-bike",
    "dog's bowl",
    "boys'",
    "rock 'n' roll",
    "'65 Mustang",
    "U.S. flag",
    "U.S.A.",
    "p.m.",
    "3D printer",
    "n/a",
    "bread & butter",
    "T-shirt",
    "misc. items",
    "approx. 5",
    "sq. ft.",
    "dept. store",
    "Brassica oleracea var. italica",
    "Larus sp. juv.",
    "Quercus spp. L.",
    "No. 5",
    "ver. 2",
    "1.5",
    "v1.0",
    "C++",
    "C#",
    ".NET",
    "Node.js",
    "cat [small]",
    "set {x}",
    "bow_(weapon)",
    "dog (e.g. poodle)",
    "cat.",
    "a cat.",
    "50 % off",
    "$1 bill",
    "Ford F-150",
    "PC",
    "coconut",
    "Elvis",
    "cityscape",
    "vocal cords",
    "name tag",
    "label maker",
    "12:30",
    "16:9",
    "7-Eleven",
    "4 door car",
    "10",
    "猫",
    "แมว",
    "🐱",
    "naïve",
    "cat – dog",
    "dog?",
    "@",
    "—",
    "null",
]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_are_taken_at_every_door(name, tmp_path):
    for vocabulary in (
        Vocabulary.of([name, "zebra"]),
        read_lines(f"{name}\nzebra"),
        parse_classes(f"{name},zebra"),
        from_file(f"{name}\nzebra", tmp_path),
    ):
        assert vocabulary.names == (name, "zebra") and vocabulary.words == ((name,), ("zebra",))


@pytest.mark.parametrize(
    "text, names",
    [
        ("\ufeffcat\r\ndog\r\n", ["cat", "dog"]),
        ("cat,\ndog,\n", ["cat", "dog"]),
        ("cat,,\ndog,puppy,pup\n", ["cat", "dog"]),
        ('"cat",\n"dog",', ["cat", "dog"]),
        ("0\n1\n2", ["0", "1", "2"]),
        ("1 euro coin\n2 euro coin", ["1 euro coin", "2 euro coin"]),
        ("30 km/h sign\n50 km/h sign", ["30 km/h sign", "50 km/h sign"]),
        ("unlabeled\nroad\nsky", ["unlabeled", "road", "sky"]),
    ],
)
def test_files_as_people_have_them(text, names, tmp_path):
    assert from_file(text, tmp_path).names == tuple(names)


def test_lists_of_labelme(tmp_path):
    "They begin with a mark for what does not count; its masks count without it."
    for read in (lambda text: from_file(text, tmp_path), read_lines, parse_classes):
        with pytest.warns(VocabularyWarning, match="left out"):
            vocabulary = read("__ignore__\n_background_\nperson\n")
        assert vocabulary.names == ("_background_", "person") and vocabulary.background_index == 0
        assert read('"__ignore__"\nperson').names[0] == "__ignore__"
    with pytest.raises(VocabularyError, match="leave it out"):
        Vocabulary.of(["__ignore__", "_background_", "person"])
    with pytest.raises(VocabularyError, match="leave it out"):
        parse_classes("__ignore__,person")


def test_a_way_to_say_it_is_given():
    "What a message tells to write is taken."
    for text in (
        "coco,cat",
        "a.txt,cat",
        "cat;dog,sky",
        "cat (a, b),sky",
        "'cat',sky",
        '"big" cat,dog',
        "my list.csv",
        "road/street",
        "VOC-12",
        "'cat, dog'",
        "c=[cat],dog",
    ):
        with pytest.raises(VocabularyError) as found:
            parse_classes(text)
        (written,) = shlex.split(str(found.value).rpartition("write ")[2].rpartition(", with the outer")[0])
        assert written[0] == written[-1] == '"' and parse_classes(written + ",zebra").names[1] == "zebra", (
            text
        )
    for given, name in ((["coco"], "coco"), (["cat;dog"], "cat;dog"), (["[cat"], "[cat")):
        with pytest.raises(VocabularyError, match="give its words too"):
            Vocabulary.of(given)
        assert Vocabulary.of({name: [name]}).names == (name,)


def test_dicts_of_numbers_and_other_containers_are_told_what_to_pass():
    for wrong, advice in (
        ({0: "cat", 1: "dog"}, r"as a list: \['cat', 'dog'\]"),
        ({"cat": 0, "dog": 1}, r"as a list: \['cat', 'dog'\]"),
        ([["cat", "kitten"]], "words go in a dict"),
        (np.array(["cat"]), "list of names"),
        (dict(cat=1).keys(), "list of names"),
        ("TV/monitor", r"\{'TV/monitor': \['TV/monitor'\]\}"),
    ):
        with pytest.raises(VocabularyError, match=advice):
            Vocabulary.of(wrong)


def test_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    (tmp_path / "mine").write_text("cat\ndog\n")
    (tmp_path / "table.CSV").write_text("cat\ndog\n")
    (tmp_path / "list.json").write_text(json.dumps({"animal": ["cat", "dog"]}))
    assert (
        parse_classes("mine")
        == parse_classes("table.CSV")
        == read_lines(str(tmp_path / "mine"))
        == Vocabulary(["cat", "dog"])
    )
    assert parse_classes("list.json").words == (("cat", "dog"),)
    for folder in ("pets", "pets/", str(tmp_path / "pets")):
        with pytest.raises(VocabularyError, match="is a folder"):
            parse_classes(folder)
    with pytest.raises(VocabularyError, match="is a folder"):
        Vocabulary.of(tmp_path)
    assert parse_classes('"pets"').names == ("pets",) and parse_classes('"road/street"').names == (
        "road/street",
    )
    many = ",".join(f"class number {i}" for i in range(40))
    assert len(parse_classes(many)) == 40 and len(parse_classes(",".join(["x" * 300, "dog"]))) == 2
    read, write = os.pipe()  # what <(...) gives
    os.write(write, b"cat\ndog\n")
    os.close(write)
    assert parse_classes(f"/dev/fd/{read}").names == ("cat", "dog")


# --- backgrounds


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_spelling_is_the_background(name, tmp_path):
    assert is_background(name)
    doors = [
        Vocabulary.of(["cat", name]),
        Vocabulary.of({"cat": "cat", name: name}),
        from_file(f"cat\n{name}\n", tmp_path),
        read_lines(f"cat\n{name}"),
        parse_classes(f"cat,{name}"),
    ]
    for vocabulary in doors:
        assert (
            vocabulary.background_index == 1
            and vocabulary.background == vocabulary.names[1:]
            and vocabulary.words[1] == ("background",)
        )
    assert doors[0].names[1] == tidy_name(name) and (default_palette(doors[0].names)[1] == 0).all()
    assert Vocabulary.of({"cat": "cat", name: ["wall", "floor"]}).words[1] == ("wall", "floor")


def test_what_is_no_background():
    assert not any(
        map(
            is_background,
            [
                "other",
                "others",
                "void",
                "unlabeled",
                "elsewhere",
                "backgrounds",
                "sky background",
                "",
                "b",
                "ground",
            ],
        )
    )
    assert Vocabulary(["cat", "bg"], background=()).background == () and Vocabulary(
        ["cat", "bg"], background=()
    ).words[1] == ("bg",)
    assert find_background(["cat", "dog"]) is None and find_background(["cat", "_Background_"]) == 1
    with pytest.raises(VocabularyError, match="'bg' and 'Else' both mean everything else"):
        Vocabulary(["bg", "Else"])
    assert Vocabulary(["bg", "background"], [["bg"], ["wall"]], background=["background"]).background == (
        "background",
    )


# --- Unicode


def test_names_are_composed_where_they_enter_and_where_they_are_looked_up(tmp_path):
    vocabulary = Vocabulary.of([ACCENT, "dog"])
    assert vocabulary.names[0] == "café" == tidy_name(f" {ACCENT}\u200b ") and vocabulary == Vocabulary.of(
        ["café", "dog"]
    )
    assert vocabulary.with_words({ACCENT: [f"{ACCENT} table"]}).words[0] == ("café table",)
    assert Vocabulary([ACCENT, "dog"], background=[ACCENT]).background == ("café",)
    with pytest.raises(VocabularyError, match="named already"):
        Vocabulary.of(["café", ACCENT])
    result = Segmentation(np.array([[0, 1]]), [ACCENT, "dog"])
    assert result.names[0] == "café" and result.mask(ACCENT).sum() == result.mask("café").sum() == 1
    bank = PromptBank.new(vocabulary, "subclasses")
    bank.fill(vocabulary, {ACCENT: ["bistro"]})
    bank.save(tmp_path / "bank.json")
    (tmp_path / "bank.json").write_text(unicodedata.normalize("NFD", (tmp_path / "bank.json").read_text()))
    assert PromptBank.open(tmp_path / "bank.json").texts(Vocabulary.of(["café", "dog"])) == {
        "café": ["bistro"]
    }
