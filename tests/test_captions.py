"Captioned pictures: shards, folders, damage, and which nouns sentences name."

import io, json, pickle, subprocess, sys, tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovss_nb.training.captions import CaptionSet, caption_nouns, held_back, noun_counts, noun_targets
from ovss_nb.benchmarks.datasets import DatasetError
from ovss_nb.core.images import ImageError

SHARED = Path(__file__).parents[2] / "shared/data/flickr8k-224"


def png(grey):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), grey, np.uint8)).save(file, "png")
    return file.getvalue()


def shard(path, contents):
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def captions(root, names):
    (root / "captions.json").write_text(
        json.dumps({name: [f"Picture {name} .", "A dog ."] for name in names}), encoding="utf-8"
    )


def shards(root):
    "Two shards, six pictures, and what else lies in real archives: folders, notes, a Mac's shadow files."
    root.mkdir(parents=True, exist_ok=True)
    shard(
        root / "b.tar",
        {f"{n}.png": png(10 * n) for n in (5, 0, 3)} | {"._0.png": b"shadow", "notes.txt": b"hello"},
    )
    shard(root / "a.tar", {f"./deep/{n}.png": png(10 * n) for n in (1, 4)} | {"2.PNG": png(20)})
    captions(root, ["0.png", "deep/1.png", "2.PNG", "3.png", "deep/4.png", "5.png"])
    return root


def test_shards(tmp_path):
    pictures = CaptionSet.open(str(shards(tmp_path)))
    assert (
        pictures.names == ["0.png", "2.PNG", "3.png", "5.png", "deep/1.png", "deep/4.png"]
        and len(pictures) == 6
    )
    pictures = pickle.loads(pickle.dumps(pictures))
    for i in (5, 0, 3, 1, 4, 2, -1):
        assert pictures.image(i).shape == (4, 6, 3) and pictures.image(i)[0, 0, 0] == 10 * int(
            Path(pictures.names[i]).stem
        )
        assert pictures.captions(i) == [f"Picture {pictures.names[i]} .", "A dog ."]
    with pytest.raises(IndexError):
        pictures.image(6)
    pictures.captions(0).clear()
    assert pictures.captions(0)


def test_folder_equals_shards(tmp_path):
    shards(tmp_path / "tar")
    (tmp_path / "plain/images/deep").mkdir(parents=True)
    for path in (tmp_path / "tar").glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "plain/images")
    (tmp_path / "plain/captions.json").write_bytes((tmp_path / "tar/captions.json").read_bytes())
    one, other = CaptionSet.open(tmp_path / "tar"), CaptionSet.open(tmp_path / "plain")
    assert one.names == other.names and all(np.array_equal(one.image(i), other.image(i)) for i in range(6))


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda r: (r / "a.tar").write_bytes((r / "a.tar").read_bytes()[:700]), r"a\.tar is damaged"),
        (lambda r: (r / "a.tar").write_bytes(b"x" * 3000), r"a\.tar is damaged.*download it again"),
        (lambda r: (r / "a.tar").write_bytes(b""), r"a\.tar is damaged"),
        (lambda r: (r / "a.tar").unlink(), r"describes 2\.PNG, but no shard or images/ has it"),
        (lambda r: shard(r / "c.tar", {"5.png": png(1)}), r"5\.png is in b\.tar and again in .*c\.tar"),
        (lambda r: shard(r / "c.tar", {"9.png": png(1)}), r"9\.png in .* has no captions. Add them"),
        (lambda r: (r / "captions.json").unlink(), "has no captions.json"),
        (lambda r: (r / "captions.json").write_text('{"a'), "captions.json is not readable JSON"),
        (lambda r: (r / "captions.json").write_bytes(b'{"\xff": []}'), "captions.json is not readable JSON"),
        (lambda r: (r / "captions.json").write_text("[]"), "must hold an object"),
        (
            lambda r: (r / "captions.json").write_text('{"0.png": "A dog ."}'),
            r"captions of '0\.png' must be a list of sentences",
        ),
        (lambda r: (r / "captions.json").write_text('{"0.png": ["A dog .", " "]}'), r"captions of '0\.png'"),
        (lambda r: (r / "captions.json").write_text('{"0.png": []}'), r"captions of '0\.png'"),
    ],
    ids=[
        "cut",
        "garbage",
        "empty",
        "gone",
        "twice",
        "uncaptioned",
        "no captions",
        "half",
        "not UTF-8",
        "list",
        "string",
        "blank",
        "none",
    ],
)
def test_damaged_sets_are_refused(tmp_path, damage, match):
    damage(shards(tmp_path))
    with pytest.raises(DatasetError, match=match):
        CaptionSet.open(tmp_path)


def test_a_shard_cut_at_any_length_is_noticed(tmp_path):
    whole = (shards(tmp_path) / "a.tar").read_bytes()
    intact = CaptionSet.open(tmp_path)
    needed = max(offset + size for path, offset, size in intact._located if path.name == "a.tar")
    for length in range(0, needed, 137):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(DatasetError):
            CaptionSet.open(tmp_path)


def test_damaged_pictures_name_their_shard(tmp_path):
    shard(tmp_path / "a.tar", {"0.png": png(7)[:40], "1.png": b"no picture", "2.png": png(20)})
    captions(tmp_path, ["0.png", "1.png", "2.png"])
    pictures = CaptionSet.open(tmp_path)
    for i in (0, 1):
        with pytest.raises(ImageError, match=rf"a\.tar: {i}\.png"):
            pictures.image(i)
    assert pictures.image(2)[0, 0, 0] == 20
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DatasetError, match=r"a\.tar cannot be read any more"):
        pictures.image(2)


def test_held_back():
    mask = held_back(3, 10)
    assert (
        mask.dtype == bool
        and np.flatnonzero(mask).tolist() == [4, 5, 6]
        and np.flatnonzero(held_back(2, 10, 0.8)).tolist() == [8, 9]
    )
    assert not held_back(0, 10).any() and held_back(10, 10, 0).all()
    for arguments in ((7, 10), (-1, 10), (1, 0), (1, 10, 1.0), (1, 10, -0.2)):
        with pytest.raises(DatasetError, match="cannot be kept back"):
            held_back(*arguments)


# ---- nouns


def test_noun_table_has_no_leftovers():
    table = caption_nouns()
    nouns, same, up = table["nouns"], table["same"], table["up"]
    assert len(set(nouns)) == len(nouns) and all(
        noun == noun.strip().lower() and noun.replace(" ", "").replace("-", "").isalpha() for noun in nouns
    )
    assert (
        set(same.values()) <= set(nouns)
        and not set(same) & set(nouns)
        and not any(" " in word for word in same)
    )
    for word, noun in same.items():
        assert noun_counts([word])[noun] == 1
    for noun in nouns:
        assert noun_counts([f"A {noun} ."])[noun] == 1, noun  # each of them can be found
    for general, special in up.items():
        # one step up is enough
        assert len(set(special)) == len(special) and general not in special and not set(special) & set(up)
        for noun in special:
            assert noun_counts([noun])[general] == 1


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("A black dog and two cats .", "dog cat"),
        ("DOGS, running!", "dog"),
        ("", ""),
        ("hotdog doghouse", ""),
        ("two puppies on benches", "puppy dog bench"),
        ("a lady in glasses with a glass", "woman person glasses glass"),
        ("tennis balls", "tennis ball|ball"),
        ("a ball on the tennis court", "ball|tennis court"),
        ("ice cream on ice", "ice cream|ice"),
        ("swimming pools", "swimming pool|water"),
        ("a t-shirt", "t-shirt"),
        ("The kids' toys", "child person toy"),
        ("a police officer rides a motorbike", "police officer|person|motorcycle"),
        ("snowy mountains", "snow mountain"),
        ("a cyclist", "cyclist person bicycle"),
    ],
)
def test_noun_counts(sentence, expected):
    assert set(noun_counts([sentence])) == {
        noun for noun in expected.split("|" if "|" in expected else " ") if noun
    }


def test_captions_are_counted_not_words():
    assert noun_counts(["A dog chases a dog .", "A puppy .", "Nothing here ."]) == {"dog": 2, "puppy": 1}
    assert noun_counts([]) == Counter()


def test_noun_targets():
    counts = [Counter(dog=1, cat=5), Counter(dog=2), Counter(), Counter(dog=4, tree=1)]
    nouns, targets, frequency = noun_targets(counts, 1)
    assert (
        set(nouns) == {"dog", "cat", "tree"}
        and nouns == [noun for noun in caption_nouns()["nouns"] if noun in nouns]
        and targets.dtype == np.float32
    )
    assert dict(zip(nouns, frequency.tolist())) == {"dog": 3, "cat": 1, "tree": 1}
    assert [dict(zip(nouns, row.tolist())) for row in targets] == [
        dict(dog=0.75, cat=1, tree=0),
        dict(dog=1, cat=0, tree=0),
        dict(dog=0, cat=0, tree=0),
        dict(dog=1, cat=0, tree=0.75),
    ]
    assert (
        noun_targets(counts, 2)[0] == ["dog"]
        and noun_targets(counts)[1].shape == (4, 0)
        and noun_targets([])[1].shape == (0, 0)
    )


def test_no_torch():
    assert (
        subprocess.run(
            [sys.executable, "-c", "import sys, ovss_nb.training.captions; print('torch' in sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        == "False"
    )


def test_flickr():
    "The project's own captioned pictures: how many, and what their sentences name."
    if not (SHARED / "captions.json").is_file():
        pytest.skip("no ../shared/data here")
    pictures = CaptionSet.open(SHARED)
    assert (len(pictures), sum(len(pictures.captions(i)) for i in range(len(pictures)))) == (7261, 36305)
    assert all(pictures.image(i).shape == (224, 224, 3) for i in range(0, 7261, 700))
    nouns, targets, frequency = noun_targets(
        [noun_counts(pictures.captions(i)) for i in range(len(pictures))]
    )
    assert (
        targets.shape == (7261, 390)
        and frequency.min() >= 5
        and {"person", "sky", "road", "tree", "dog"} <= set(nouns)
    )
    assert frequency[nouns.index("person")] > 5000 and 6 < (targets > 0).sum(1).mean() < 7
