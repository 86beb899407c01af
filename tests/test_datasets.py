"Layouts on disk, and the plain folder: what is found, what is paired, what is refused."

import json, pickle, unicodedata, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ovss_nb.benchmarks.datasets import (
    DatasetError,
    FolderDataset,
    Layout,
    LayoutDataset,
    folder_facts,
    is_folder,
)
from ovss_nb.core.images import ImageError
from ovss_nb.benchmarks.label_files import coco_instance_labels
from ovss_nb.benchmarks.label_maps import LabelMap
from ovss_nb.core.vocabulary import Vocabulary

SHARED = Path(__file__).parents[2] / "shared/data"
RULES = SimpleNamespace(
    name="two", vocabulary=Vocabulary(["cat", "dog"]), label_map=LabelMap("two", 2, {0: 255, 1: 0, 2: 1})
)
FLAT = Layout("flat", ("photos/{stem}.jpg",), "maps/{stem}.png")


def picture(path, height=4, width=6, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path, **options)


def mask(path, values, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, dtype), (4, 6))).save(path)


def plain(root, names=("cat", "dog"), values=(0, 1, 255), dtype=np.uint8, stems=("a", "b")):
    for stem in stems:
        picture(root / f"images/{stem}.jpg")
        mask(root / f"masks/{stem}.png", values, dtype)
    (root / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    return root


def test_pairs(tmp_path):
    "Only stems with both count; the rest is told by kind. Hidden and foreign files are not seen."
    for stem in "abc":
        picture(tmp_path / f"photos/{stem}.jpg")
    for stem in "bcd":
        mask(tmp_path / f"maps/{stem}.png", [0, 1, 2])
    for name in ("photos/.e.jpg", "maps/.e.png", "photos/f.jpg.part", "maps/f.txt", "photos/deep/g.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    dataset = LayoutDataset(tmp_path, FLAT, RULES)
    assert (
        dataset.stems == ["b", "c"]
        and dataset.without_image == ["d"]
        and dataset.without_labels == ["a"]
        and not dataset.without_either
    )
    assert [path.name for path in dataset.label_paths] == ["b.png", "c.png"] and [
        path.name for path in dataset.image_paths
    ] == ["b.jpg", "c.jpg"]
    stem, image, labels = dataset[-1]
    assert (
        stem == "c"
        and image.shape == (4, 6, 3)
        and labels[0].tolist() == [255, 0, 1, 255, 0, 1]
        and labels.dtype == np.uint8
    )
    with pytest.raises(IndexError):
        dataset[2]
    assert not LayoutDataset(
        tmp_path, Layout("flat", FLAT.images, FLAT.labels, shared=True), RULES
    ).without_labels


def test_split(tmp_path):
    """The list decides what counts and in which order;
    SegNet's pairs of absolute paths, Windows line ends and a byte-order mark are understood.
    """
    for stem in "abc":
        picture(tmp_path / f"photos/{stem}.jpg")
        mask(tmp_path / f"maps/{stem}.png", [1])
    layout = Layout("flat", FLAT.images, FLAT.labels, splits=("sets/val.txt", "val.txt"))
    with pytest.raises(DatasetError, match=r"no split file sets/val\.txt or val\.txt"):
        LayoutDataset(tmp_path, layout, RULES)
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbf/x/photos/c.jpg /x/maps/c.png\r\n\r\na\r\nz\r\na\r\n")
    dataset = LayoutDataset(tmp_path, layout, RULES)
    assert dataset.stems == ["c", "a"] and dataset.without_either == ["z"] and not dataset.without_labels
    (tmp_path / "val.txt").write_bytes(b"\n")
    with pytest.raises(DatasetError, match="lists no image"):
        LayoutDataset(tmp_path, layout, RULES)
    (tmp_path / "val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="cannot be read as a list"):
        LayoutDataset(tmp_path, layout, RULES)
    (tmp_path / "val.txt").write_text("2007_000033\n")
    with pytest.raises(DatasetError, match="none of the 1 listed stems"):
        LayoutDataset(tmp_path, layout, RULES)


def test_stems(tmp_path):
    "Stems with slashes, and stems of digits only."
    picture(tmp_path / "photos/ulm/f_1.jpg")
    mask(tmp_path / "maps/ulm/f_1_ids.png", [1])
    mask(tmp_path / "maps/ulm/f_1_color.png", [1])
    towns = LayoutDataset(
        tmp_path, Layout("towns", FLAT.images, "maps/{stem}_ids.png", stem="[^/]+/[^/]+"), RULES
    )
    assert towns.stems == ["ulm/f_1"]
    picture(tmp_path / "n/12.jpg")
    mask(tmp_path / "m/12.png", [1])
    mask(tmp_path / "m/12_labelTrainIds.png", [2])
    picture(tmp_path / "n/12_x.jpg")
    digits = LayoutDataset(
        tmp_path,
        Layout("digits", ("elsewhere/{stem}.jpg", "n/{stem}.jpg"), "m/{stem}.png", stem=r"\d+"),
        RULES,
    )
    assert digits.stems == ["12"] and not digits.without_labels and digits.labels(0).max() == 0


def test_find(tmp_path):
    "The root of a layout is found from three heights; what is missing is said."
    layout = Layout("flat", FLAT.images, FLAT.labels, ("box/inner", "other"))
    assert layout.find(tmp_path) is None and layout.missing(tmp_path) == ["photos/", "maps" + "/"]
    root = tmp_path / "box/inner"
    (root / "photos").mkdir(parents=True)
    (root / "maps").mkdir()
    assert layout.find(tmp_path) is None and layout.missing(root) == ["files maps/*.png"]
    mask(root / "maps/a.png", [1])
    assert layout.find(tmp_path) == layout.find(tmp_path / "box") == layout.find(root) == root
    with pytest.raises(DatasetError, match="no image that has labels: 0 in photos"):
        LayoutDataset(root, layout, RULES)
    with pytest.raises(DatasetError, match="has no photos/, no maps/"):
        LayoutDataset(tmp_path, layout, RULES)
    linked = tmp_path / "link"
    linked.symlink_to(root)
    assert layout.find(linked) == linked


def test_one_file_for_all(tmp_path):
    "COCO's JSON: a photograph it does not know is an error of that item, not of the set."
    things = LabelMap("two", 2, {0: 255, 1: 0, 2: 1})
    layout = Layout(
        "json", ("photos/{stem}.jpg",), "all.json", stem=r"\d+", map=things, reader=coco_instance_labels
    )
    picture(tmp_path / "photos/000000000007.jpg")
    picture(tmp_path / "photos/000000000008.jpg")
    assert layout.missing(tmp_path) == ["all.json"]
    box = dict(
        id=1,
        image_id=7,
        category_id=2,
        iscrowd=0,
        segmentation=[[0, 0, 3, 0, 3, 4, 0, 4]],
        area=12,
        bbox=[0, 0, 3, 4],
    )
    (tmp_path / "all.json").write_text(
        json.dumps(
            dict(
                images=[dict(id=7, height=4, width=6, file_name="000000000007.jpg")],
                annotations=[box],
                categories=[dict(id=1, name="person"), dict(id=2, name="bicycle")],
            )
        )
    )
    dataset = pickle.loads(pickle.dumps(LayoutDataset(tmp_path, layout, RULES)))
    assert dataset[0][2][0].tolist() == [1, 1, 1, 255, 255, 255]
    with pytest.raises(DatasetError, match="8"):
        dataset.labels(1)


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda p: mask(p, [0, 3]), "unknown label value 3"),
        (lambda p: mask(p, [0, 700], np.uint16), "unknown label value 700"),
        (lambda p: picture(p), "a.png"),
        (lambda p: p.write_bytes(p.read_bytes()[:-20]), "a.png"),
        (lambda p: p.write_bytes(b""), "a.png"),
        (lambda p: (p.unlink(), p.mkdir()), "a.png"),
    ],
)
def test_bad_labels(tmp_path, damage, match):
    """Values outside the map, colors, a cut file, an empty file, a file gone since:
    one error that names the file.
    """
    picture(tmp_path / "photos/a.jpg")
    mask(tmp_path / "maps/a.png", [0, 1])
    dataset = LayoutDataset(tmp_path, FLAT, RULES)
    damage(tmp_path / "maps/a.png")
    with pytest.raises(DatasetError, match=match) as e:
        dataset.labels(0)
    assert "a.png" in str(e.value)


def test_bad_images(tmp_path):
    picture(tmp_path / "photos/a.jpg")
    mask(tmp_path / "maps/a.png", [0, 1])
    dataset = LayoutDataset(tmp_path, FLAT, RULES)
    picture(tmp_path / "photos/a.jpg", height=6, width=4)
    with pytest.raises(DatasetError, match=r"is \(4, 6\) but its image .* is \(6, 4\)"):
        dataset[0]
    sideways = Image.Exif()
    sideways[274] = 6  # the camera's note "turn me" brings it back to 4 x 6
    picture(tmp_path / "photos/a.jpg", height=6, width=4, exif=sideways)
    assert dataset[0][1].shape == (4, 6, 3)
    (tmp_path / "photos/a.jpg").write_bytes((tmp_path / "photos/a.jpg").read_bytes()[:200])
    with pytest.raises(ImageError, match="a.jpg"):
        dataset.image(0)
    assert dataset.labels(0).shape == (4, 6)


def test_folder(tmp_path):
    root = plain(tmp_path / "pets")
    dataset = FolderDataset.open(root)
    assert (
        is_folder(root)
        and dataset.names == ["cat", "dog"]
        and (dataset.classes, dataset.ignore, len(dataset)) == (2, 255, 2)
    )
    assert dataset.labels(0)[0].tolist() == [0, 1, 255, 0, 1, 255] and "pets" in repr(dataset)
    facts = json.loads(json.dumps(dataset.describe()))
    assert (
        facts["images"] == 2
        and facts["classes"] == 2
        and facts["background"] == "none"
        and facts["protocol"] is None
    )
    with pytest.raises(DatasetError, match="value 255"):
        FolderDataset(root, ignore=None).labels(0)
    with pytest.raises(DatasetError, match="value 0"):
        FolderDataset(root, first_label=1).labels(0)
    again = pickle.loads(pickle.dumps(dataset))
    assert (again[1][2] == dataset[1][2]).all() and again.describe() == dataset.describe()


def test_folder_background(tmp_path):
    root = plain(tmp_path / "pets", ("background", "cat", "dog"), (0, 1, 2, 255))
    assert FolderDataset(root).describe()["background"] == "class 0"
    bare = FolderDataset(root, background=False)
    assert (
        bare.names == ["cat", "dog"]
        and bare.classes == 2
        and bare.labels(0).ravel()[:4].tolist() == [255, 0, 1, 255]
    )
    from_one = FolderDataset(
        plain(tmp_path / "one", ("background", "cat"), (1, 2, 0)), ignore=0, first_label=1, background=False
    )
    assert from_one.labels(0).ravel()[:3].tolist() == [255, 0, 255]


def test_folder_facts(tmp_path):
    "`dataset.json` inside wins over `sets.json` beside; damaged files are named."
    root = plain(tmp_path / "pets", values=(0, 1, 2))
    (tmp_path / "sets.json").write_text(
        json.dumps({"pets": {"ignore": 0, "first_label": 1, "classes": 2}, "other": {}})
    )
    assert FolderDataset.open(root).labels(0).ravel()[:3].tolist() == [255, 0, 1]
    assert folder_facts(root)["first_label"] == 1 and folder_facts(tmp_path / "elsewhere") == {}
    (root / "dataset.json").write_text(json.dumps({"ignore": 2, "classes": 2}))
    assert FolderDataset.open(root).labels(0).ravel()[:3].tolist() == [0, 1, 255]
    for text, match in (
        ("{", "not readable JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"classes": 3}', "names 2 classes, but 3"),
        ('{"classes": 0}', "but 0 are"),
    ):
        (root / "dataset.json").write_text(text)
        with pytest.raises(DatasetError, match=match):
            FolderDataset.open(root)
    (root / "dataset.json").unlink()
    (tmp_path / "sets.json").write_text('{"pets": 3}')
    with pytest.raises(DatasetError, match="must hold an object for 'pets'"):
        FolderDataset.open(root)


def test_folder_of_many_classes(tmp_path):
    "More than 255 classes: 16-bit masks, 65535 = ignore, and 255 is a class like any other."
    root = plain(tmp_path / "many", [f"c{k}" for k in range(300)], (0, 255, 299, 65535), np.uint16)
    dataset = FolderDataset.open(root)
    assert (
        dataset.ignore == 65535
        and dataset.labels(0).dtype == np.uint16
        and dataset.labels(0).ravel()[:4].tolist() == [0, 255, 299, 65535]
    )


def test_folder_refuses(tmp_path):
    with pytest.raises(DatasetError, match="has no images"):
        FolderDataset(tmp_path)
    root = plain(tmp_path / "pets")
    (root / "images/b.jpg").unlink()
    with pytest.raises(DatasetError, match="1 masks have no image, the first is b.png"):
        FolderDataset(root)
    (root / "masks/b.png").unlink()
    (root / "images/b.jpg").touch()
    assert len(FolderDataset(root)) == 1  # a photograph nobody has labelled
    for text, match in (
        ("cat\ncat\n", "named already"),
        ("", "names no class"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ):
        (root / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DatasetError, match=match):
            FolderDataset(root)
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "masks/a.png").unlink()
    with pytest.raises(DatasetError, match="no labels in picture files.*, in masks/:"):
        FolderDataset(root)
    (root / "masks/a.npy").touch()
    with pytest.raises(DatasetError, match="such as .png or .tif, in masks/, where a.npy lies"):
        FolderDataset(root)


def binary(root, values, names=("background", "cat"), facts=None, dtype=np.uint8):
    "A folder whose masks hold these values, the first of them in every mask."
    for k, value in enumerate(values[1:] or values):
        picture(root / f"images/{k}.jpg")
        mask(root / f"masks/{k}.png", [values[0], value], dtype)
    (root / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    if facts:
        (root / "dataset.json").write_text(json.dumps(facts))
    return root


@pytest.mark.parametrize(
    "values, names, dtype, match",
    [
        (
            (0, 255),
            ("background", "cat"),
            np.uint8,
            (
                r"class 1, 'cat', is in no mask.*\{\"values\": \{\"0\": 0, \"255\": 1\}\} reads 255 as 'cat';"
                r" \{\"ignore\": 255\} leaves it out"
            ),
        ),
        ((255,), ("background", "cat"), np.uint8, "2 of 2 classes are in no mask"),
        # the score would be that of one class
        ((1, 255), ("background", "cat"), np.uint8, "class 0, 'background', is in no mask"),
        ((0, 255), ("crack",), np.uint8, "names 'crack' only"),
        (
            (0, 255),
            ("background", "cat", "dog"),
            np.uint8,
            "2 of 3 classes are in no mask, the first is 'cat'",
        ),
        ((0, 65535), [f"c{k}" for k in range(300)], np.uint16, "the value 65535 is in 1 masks"),
    ],
)
def test_black_and_white_masks_are_asked_back(tmp_path, values, names, dtype, match):
    """0 and 255:
    nobody said whether 255 is the object or not to be scored, and read as the latter a system that finds
    nothing scores 1.0.
    """
    root = binary(tmp_path / "set", values, names, dtype=dtype)
    for make in (FolderDataset.open, FolderDataset):
        with pytest.raises(DatasetError, match=match):
            make(root)
    void = max(values)
    assert FolderDataset(root, ignore=void).ignore == void
    (root / "dataset.json").write_text(json.dumps({"ignore": void}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderDataset.open(root).labels(0).max() == void  # said: nothing is left to ask


def test_what_the_question_offers_is_read(tmp_path):
    root = binary(tmp_path / "set", (0, 255), facts={"values": {"0": 0, "255": 1}})
    assert FolderDataset.open(root).labels(0)[0].tolist() == [0, 1] * 3
    grey = binary(tmp_path / "grey", (0, 128, 255), ("background", "cat", "dog"))
    with pytest.raises(DatasetError, match=r"value 128.*\"values\""):
        FolderDataset.open(grey).labels(0)
    three = FolderDataset(grey, values={0: 0, 128: 1, 255: 2})
    assert three.labels(0)[0].tolist() == [0, 1] * 3 and three.labels(1)[0].tolist() == [0, 2] * 3
    assert json.loads(json.dumps(three.describe()))["stored"]["values"] == {"0": 0, "128": 1, "255": 2}
    border = FolderDataset(grey, values={0: 0, 128: None, 255: 1}, classes=2, background=False)
    assert (
        border.names == ["cat", "dog"]
        and border.labels(0)[0].tolist() == [255] * 6
        and border.labels(1)[0].tolist() == [255, 0] * 3
    )


@pytest.mark.parametrize(
    "values, names",
    [
        ((0, 1), ("background", "cat")),
        ((0, 1, 255), ("background", "cat")),
        ((1, 0), ("cat", "dog", "cow")),
        ((0,), ("background", "cat")),
    ],
)
def test_usual_masks_are_not_asked_about(tmp_path, values, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(FolderDataset.open(binary(tmp_path / "set", values, names))) == max(1, len(values) - 1)
        FolderDataset(binary(tmp_path / "borders", (0, 1, 255)), background=False)


def test_one_object_with_a_border_is_only_warned_about(tmp_path):
    """A mask of VOC may hold one object and its border:
    most classes are absent, and 255 is just what it seems.
    """
    root = binary(tmp_path / "set", (2, 255), ("background", "cat", "dog"))
    with pytest.warns(UserWarning, match="255"):
        assert FolderDataset.open(root).ignore == 255


def test_one_class_of_several_is_absent(tmp_path):
    "With others there, it is a warning, once for a set."
    root = binary(tmp_path / "set", (0, 1, 255), ("background", "cat", "dog"))
    with pytest.warns(UserWarning, match="class 2, 'dog', is in no mask") as told:
        FolderDataset.open(root)
    assert len(told) == 1


@pytest.mark.parametrize(
    "facts, match",
    [
        ({"ignore": 1}, "also the mask value of class 1, 'cat'"),
        ({"ignore": "none"}, "`ignore` must be a whole number"),
        ({"ignore": True}, "`ignore` must be"),
        ({"first_label": None}, "`first_label` must be"),
        ({"first_label": 0.5}, "`first_label` must be"),
        ({"classes": "two"}, "`classes` must be"),
        ({"values": [0, 255]}, "`values` must be an object"),
        ({"values": {"0": 0, "255": 2}}, r"names class 2, but classes.txt has 0\.\.1"),
        ({"values": {"white": 1}}, "`values` must be a whole number"),
        ({"values": {"0": 0}, "first_label": 1}, "without `first_label`"),
        ({"values": {"0": 0, "255": 1}, "ignore": 255}, "also the mask value of class 1"),
    ],
)
def test_facts_that_cannot_be(tmp_path, facts, match):
    with pytest.raises(DatasetError, match=match):
        FolderDataset.open(binary(tmp_path / "set", (0, 1), facts=facts))


@pytest.mark.parametrize(
    "image, label",
    [
        ("a.JPG", "a.png"),
        ("a.jpg", "a.PNG"),
        ("a.Jpeg", "a.tif"),
        ("a.png", "a.TIFF"),
        ("a.TIF", "a.bmp"),
        ("a.webp", "a.Tif"),
        ("a.gif", "a.png"),
        ("a.b.jpg", "a.b.png"),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "é.png")),
    ],
)
def test_suffixes_in_any_case(tmp_path, image, label):
    "Cameras write .JPG, tools write .tif masks; what a system leaves in folders is no image and no mask."
    picture(tmp_path / "images" / image)
    mask(tmp_path / "masks" / label, [0, 1])
    for junk in ("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "readme.txt"):
        for part in ("images", "masks"):
            (tmp_path / part / junk).write_bytes(b"x")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    dataset = FolderDataset.open(tmp_path)
    assert (
        len(dataset) == 1
        and not dataset.without_labels
        and not dataset.without_image
        and dataset[0][2][0].tolist() == [0, 1] * 3
    )


def test_benchmarks_in_any_case(tmp_path):
    picture(tmp_path / "photos/a.JPG")
    mask(tmp_path / "maps/a.PNG", [1, 2])
    assert LayoutDataset(tmp_path, FLAT, RULES).stems == ["a"]


@pytest.mark.parametrize(
    "name, other",
    [("images/a.jpg", "images/a.png"), ("images/a.jpg", "images/a.JPG"), ("masks/a.png", "masks/a.tif")],
)
def test_two_files_of_one_name_are_asked_back(tmp_path, name, other):
    root = plain(tmp_path / "pets", stems=("a",))
    (picture if name.startswith("images") else lambda p: mask(p, [0, 1]))(root / other)
    with pytest.raises(DatasetError, match="have one name without the suffix") as e:
        FolderDataset.open(root)
    assert Path(name).name in str(e.value) and Path(other).name in str(e.value)


@pytest.mark.parametrize(
    "name",
    [
        "a_mask.png",
        "a_seg.png",
        "a-labelIds.png",
        "a_gtFine_labelIds.png",
        "A.png",
        "mask_a.png",
        "a.jpg.png",
    ],
)
def test_a_mask_of_another_name_is_hinted_at(tmp_path, name):
    picture(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks" / name, [0, 1])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DatasetError, match=r"looks like the mask of a\.jpg.*here a\.png") as e:
        FolderDataset.open(tmp_path)
    assert name in str(e.value)


@pytest.mark.parametrize(
    "name, match",
    [("a.jpg", "other formats change or renumber"), ("a.webp", "other formats"), ("a.gif", "other formats")],
)
def test_masks_in_formats_that_change_numbers(tmp_path, name, match):
    picture(tmp_path / "images/a.png")
    mask(tmp_path / "masks" / name, [0, 1])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DatasetError, match=match):
        FolderDataset.open(tmp_path).labels(0)


def test_shared_sets():
    """Every labelled set of the project's own data opens, with the number of pairs and classes that its table
    gives.
    """
    if not (SHARED / "sets.json").is_file():
        pytest.skip("no ../shared/data here")
    for name, facts in json.loads((SHARED / "sets.json").read_text()).items():
        if facts["kind"] != "masks":
            continue
        dataset = FolderDataset.open(SHARED / name)
        assert (len(dataset), dataset.classes) == (facts["pairs"], facts["classes"]), name
        stem, image, labels = dataset[0]
        assert image.shape[:2] == labels.shape and set(np.unique(labels)) <= {
            *range(dataset.classes),
            dataset.ignore,
        }
