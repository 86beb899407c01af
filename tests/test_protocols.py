"""The fourteen protocols of the papers (MESS has tests of its own):
every layout with known labels, every way in which a download goes wrong, and the project's own data.
"""

import json, pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from ovss_nb.benchmarks.datasets import DatasetError, FolderDataset
from ovss_nb.systems.registry import resize_rule
from ovss_nb.benchmarks.protocols import (
    PROTOCOLS,
    check,
    find_layouts,
    list_protocols,
    open_dataset,
    protocol,
)
from ovss_nb.benchmarks.label_maps import label_map
from ovss_nb.core.vocabulary import load_vocabulary

SHARED = Path(__file__).parents[2] / "shared/data"
NAMES = [
    "VOC-20",
    "VOC-21",
    "PAS-20b",
    "PC-59",
    "PC-60",
    "PC-459",
    "ADE-150",
    "ADE-847",
    "ADE-150+unl",
    "COCO-171",
    "COCO-80+bg",
    "COCO-171+bg",
    "Cityscapes-19",
    "CamVid-11",
]
X, XX = 255, 65535

# Every file below is written by hand: (protocol, photograph, label file, {stored value: class}, split file).
# {} numbers the images.
VOC, VOC_LIST = "VOCdevkit/VOC2012/", "ImageSets/Segmentation/val.txt"
PC, PC_LIST = "VOCdevkit/VOC2010/", "ImageSets/SegmentationContext/val.txt"
ADE, FULL, COCO, STUFF, CITY = (
    "ADEChallengeData2016/",
    "ADE20K_2021_17_01/",
    "coco/",
    "coco_stuff164k/",
    "cityscapes/",
)
VAL, JPEG, DEEP = (
    "images/validation/ADE_val_0000000{}.jpg",
    "JPEGImages/2007_00000{}.jpg",
    "images/ADE/validation/home_or_hotel/bedroom/ADE_val_0000000{}",
)
LAYOUTS = [
    (
        "VOC-20",
        VOC + JPEG,
        VOC + "SegmentationClass/2007_00000{}.png",
        {0: X, 1: 0, 8: 7, 20: 19, 255: X},
        VOC_LIST,
    ),
    (
        "VOC-20",
        VOC + JPEG,
        VOC + "SegmentationClassAug/2007_00000{}.png",
        {0: X, 1: 0, 20: 19, 255: X},
        VOC_LIST,
    ),
    ("VOC-20", VOC + JPEG, VOC + "annotations_detectron2/val/2007_00000{}.png", {0: 0, 19: 19, 255: X}, None),
    (
        "VOC-20",
        "pascal_voc_d2/images/validation/2007_00000{}.jpg",
        "pascal_voc_d2/annotations_pascal20/validation/2007_00000{}.png",
        {0: 0, 19: 19, 255: X},
        None,
    ),
    (
        "VOC-21",
        VOC + JPEG,
        VOC + "SegmentationClass/2007_00000{}.png",
        {0: 0, 1: 1, 20: 20, 255: X},
        VOC_LIST,
    ),
    ("VOC-21", VOC + JPEG, VOC + "SegmentationClassAug/2007_00000{}.png", {0: 0, 20: 20, 255: X}, VOC_LIST),
    (
        "VOC-21",
        "pascal_voc_d2/images/validation/2007_00000{}.jpg",
        "pascal_voc_d2/annotations_pascal21/validation/2007_00000{}.png",
        {0: 0, 20: 20, 255: X},
        None,
    ),
    (
        "PAS-20b",
        VOC + JPEG,
        VOC + "SegmentationClass/2007_00000{}.png",
        {0: 20, 1: 0, 20: 19, 255: X},
        VOC_LIST,
    ),
    (
        "PAS-20b",
        VOC + JPEG,
        VOC + "SegmentationClassAug/2007_00000{}.png",
        {0: 20, 1: 0, 20: 19, 255: X},
        VOC_LIST,
    ),
    (
        "PAS-20b",
        VOC + JPEG,
        VOC + "annotations_detectron2_bg/val/2007_00000{}.png",
        {0: 0, 19: 19, 20: 20, 255: X},
        None,
    ),
    (
        "PAS-20b",
        "pascal_voc_d2/images/validation/2007_00000{}.jpg",
        "pascal_voc_d2/annotations_pascal21/validation/2007_00000{}.png",
        {0: 20, 20: 19, 255: X},
        None,
    ),
    ("PC-59", PC + JPEG, PC + "SegmentationClassContext/2007_00000{}.png", {0: X, 1: 0, 59: 58}, PC_LIST),
    (
        "PC-59",
        PC + JPEG,
        PC + "annotations_detectron2/pc59_val/2007_00000{}.png",
        {0: 0, 58: 58, 255: X},
        None,
    ),
    (
        "PC-59",
        "pcontext/val/image/2007_00000{}.jpg",
        "pcontext/val/label/2007_00000{}.png",
        {0: 0, 58: 58, 255: X},
        None,
    ),
    (
        "PC-59",
        "pascal_ctx_d2/images/validation/2007_00000{}.jpg",
        "pascal_ctx_d2/annotations_ctx59/validation/2007_00000{}.png",
        {0: 0, 58: 58, 255: X},
        None,
    ),
    ("PC-60", PC + JPEG, PC + "SegmentationClassContext/2007_00000{}.png", {0: 0, 1: 1, 59: 59}, PC_LIST),
    ("PC-459", PC + JPEG, PC + "trainval/2007_00000{}.mat", {0: XX, 1: 0, 256: 255, 459: 458}, PC_LIST),
    ("PC-459", PC + JPEG, PC + "trainval/2007_00000{}.mat", {1: 0, 459: 458}, "pascalcontext_val.txt"),
    (
        "PC-459",
        PC + JPEG,
        PC + "annotations_detectron2/pc459_val/2007_00000{}.tif",
        {0: 0, 255: 255, 458: 458, 459: XX, 65535: XX},
        None,
    ),
    (
        "PC-459",
        "pcontext_full/val/image/2007_00000{}.jpg",
        "pcontext_full/val/label/2007_00000{}.tif",
        {0: 0, 458: 458, 65535: XX},
        None,
    ),
    (
        "PC-459",
        "pascal_ctx_d2/images/validation/2007_00000{}.jpg",
        "pascal_ctx_d2/annotations_ctx459/validation/2007_00000{}.tif",
        {0: 0, 458: 458, 65535: XX},
        None,
    ),
    (
        "ADE-150",
        ADE + VAL,
        ADE + "annotations/validation/ADE_val_0000000{}.png",
        {0: X, 1: 0, 150: 149},
        None,
    ),
    (
        "ADE-150",
        ADE + VAL,
        ADE + "annotations_detectron2/validation/ADE_val_0000000{}.png",
        {0: 0, 149: 149, 255: X},
        None,
    ),
    (
        "ADE-847",
        FULL + "images_detectron2/validation/ADE_val_0000000{}.jpg",
        FULL + "annotations_detectron2/validation/ADE_val_0000000{}.tif",
        {0: 0, 255: 255, 846: 846, 65535: XX},
        None,
    ),
    ("ADE-847", FULL + DEEP + ".jpg", FULL + DEEP + "_seg.png", {0: XX, 2978: 0, 312: 1}, None),
    (
        "ADE-150+unl",
        ADE + VAL,
        ADE + "annotations/validation/ADE_val_0000000{}.png",
        {0: 0, 1: 1, 150: 150},
        None,
    ),
    (
        "ADE-150+unl",
        ADE + VAL,
        ADE + "annotations_detectron2/validation/ADE_val_0000000{}.png",
        {0: 1, 149: 150, 255: 0},
        None,
    ),
    (
        "COCO-171",
        COCO + "val2017/00000000000{}.jpg",
        COCO + "stuffthingmaps/val2017/00000000000{}.png",
        {0: 0, 16: 15, 181: 170, 255: X},
        None,
    ),
    (
        "COCO-171",
        COCO + "images/val2017/00000000000{}.jpg",
        COCO + "stuffthingmaps/val2017/00000000000{}.png",
        {0: 0, 181: 170, 255: X},
        None,
    ),
    (
        "COCO-171",
        COCO + "val2017/00000000000{}.jpg",
        COCO + "stuffthingmaps_detectron2/val2017/00000000000{}.png",
        {0: 0, 15: 15, 170: 170, 255: X},
        None,
    ),
    (
        "COCO-171",
        "coco-stuff/images/val2017/00000000000{}.jpg",
        "coco-stuff/annotations_detectron2/val2017/00000000000{}.png",
        {0: 0, 170: 170, 255: X},
        None,
    ),
    (
        "COCO-171",
        STUFF + "images/val2017/00000000000{}.jpg",
        STUFF + "annotations/val2017/00000000000{}.png",
        {0: 0, 181: 170, 255: X},
        None,
    ),
    (
        "COCO-171",
        STUFF + "images/val2017/00000000000{}.jpg",
        STUFF + "annotations/val2017/00000000000{}_labelTrainIds.png",
        {0: 0, 170: 170, 255: X},
        None,
    ),
    (
        "COCO-80+bg",
        COCO + "val2017/00000000000{}.jpg",
        COCO + "stuffthingmaps/val2017/00000000000{}.png",
        {0: 1, 16: 16, 89: 80, 91: 0, 181: 0, 255: 0},
        None,
    ),
    (
        "COCO-80+bg",
        COCO + "val2017/00000000000{}.jpg",
        COCO + "stuffthingmaps_detectron2/val2017/00000000000{}.png",
        {0: 1, 79: 80, 80: 0, 170: 0, 255: 0},
        None,
    ),
    (
        "COCO-80+bg",
        "coco-stuff/images/val2017/00000000000{}.jpg",
        "coco-stuff/annotations_detectron2/val2017/00000000000{}.png",
        {0: 1, 79: 80, 80: 0, 255: 0},
        None,
    ),
    (
        "COCO-80+bg",
        STUFF + "images/val2017/00000000000{}.jpg",
        STUFF + "annotations/val2017/00000000000{}.png",
        {0: 1, 89: 80, 181: 0, 255: 0},
        None,
    ),
    (
        "COCO-80+bg",
        STUFF + "images/val2017/00000000000{}.jpg",
        STUFF + "annotations/val2017/00000000000{}_instanceTrainIds.png",
        {0: 0, 1: 1, 80: 80},
        None,
    ),
    (
        "COCO-80+bg",
        STUFF + "images/val2017/00000000000{}.jpg",
        STUFF + "annotations/val2017/00000000000{}_labelTrainIds.png",
        {0: 0, 1: 1, 80: 80},
        None,
    ),
    (
        "COCO-80+bg",
        COCO + "val2017/00000000000{}.jpg",
        COCO + "annotations/instances_val2017.json",
        {1: 1, 18: 17, 90: 80, None: 0},
        None,
    ),
    (
        "COCO-171+bg",
        COCO + "val2017/00000000000{}.jpg",
        COCO + "stuffthingmaps/val2017/00000000000{}.png",
        {0: 1, 16: 16, 181: 171, 255: 0},
        None,
    ),
    (
        "COCO-171+bg",
        COCO + "val2017/00000000000{}.jpg",
        COCO + "stuffthingmaps_detectron2/val2017/00000000000{}.png",
        {0: 1, 170: 171, 255: 0},
        None,
    ),
    (
        "COCO-171+bg",
        "coco-stuff/images/val2017/00000000000{}.jpg",
        "coco-stuff/annotations_detectron2/val2017/00000000000{}.png",
        {0: 1, 170: 171, 255: 0},
        None,
    ),
    (
        "COCO-171+bg",
        STUFF + "images/val2017/00000000000{}.jpg",
        STUFF + "annotations/val2017/00000000000{}.png",
        {0: 1, 181: 171, 255: 0},
        None,
    ),
    (
        "COCO-171+bg",
        STUFF + "images/val2017/00000000000{}.jpg",
        STUFF + "annotations/val2017/00000000000{}_labelTrainIds.png",
        {0: 1, 170: 171, 255: 0},
        None,
    ),
    (
        "Cityscapes-19",
        CITY + "leftImg8bit/val/ulm/ulm_00000{}_000019_leftImg8bit.png",
        CITY + "gtFine/val/ulm/ulm_00000{}_000019_gtFine_labelIds.png",
        {0: X, 7: 0, 26: 13, 29: X, 33: 18},
        None,
    ),
    (
        "Cityscapes-19",
        CITY + "leftImg8bit/val/ulm/ulm_00000{}_000019_leftImg8bit.png",
        CITY + "gtFine/val/ulm/ulm_00000{}_000019_gtFine_labelTrainIds.png",
        {0: 0, 18: 18, 255: X},
        None,
    ),
    (
        "CamVid-11",
        "CamVid/test/0001TP_00855{}.png",
        "CamVid/testannot/0001TP_00855{}.png",
        {0: 0, 10: 10, 11: X, 255: X},
        None,
    ),
    (
        "CamVid-11",
        "CamVid/test/0001TP_00855{}.png",
        "CamVid/test_labels/0001TP_00855{}_L.png",
        {(128, 128, 128): 0, (64, 64, 0): 9, (0, 128, 192): 10, (0, 0, 0): X},
        None,
    ),
    (
        "CamVid-11",
        "CamVid/701_StillsRaw_full/0001TP_00855{}.png",
        "CamVid/LabeledApproved_full/0001TP_00855{}_L.png",
        {(128, 128, 128): 0, (64, 0, 128): 8, (0, 0, 0): X},
        "test.txt",
    ),
]


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_labels(path, values, repeat):
    "One column pair for each stored value, 4 rows."
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        things = [
            *range(1, 12),
            *range(13, 26),
            27,
            28,
            *range(31, 45),
            *range(46, 66),
            67,
            70,
            *range(72, 83),
            *range(84, 91),
        ]
        objects = [
            dict(
                id=10 * n + k,
                image_id=n,
                category_id=value,
                iscrowd=0,
                area=8,
                bbox=[2 * k, 0, 2, 4],
                segmentation=[[2 * k, 0, 2 * k + 2, 0, 2 * k + 2, 4, 2 * k, 4]],
            )
            for n in (1, 2, 3)
            for k, value in enumerate(values)
            if value
        ]
        path.write_text(
            json.dumps(
                dict(
                    images=[
                        dict(id=n, height=4, width=2 * len(values), file_name=f"{n:012}.jpg")
                        for n in (1, 2, 3)
                    ],
                    annotations=objects,
                    categories=[
                        dict(id=k, name=name)
                        for k, name in zip(things, load_vocabulary("COCO-Object-81").names[1:])
                    ],
                )
            )
        )
    elif isinstance(values[0], tuple):
        Image.fromarray(np.tile(np.repeat(np.array(values, np.uint8), 2, 0), (4, 1, 1))).save(path)
    elif path.name.endswith("_seg.png"):
        numbers = np.tile(np.repeat(values, 2), (4, 1))
        Image.fromarray(
            np.stack([numbers // 256 * 10, numbers % 256, np.ones_like(numbers)], -1).astype(np.uint8)
        ).save(path)
    else:
        wide = np.tile(np.repeat(values, 2), (4, 1)).astype(
            np.uint16 if path.suffix in (".tif", ".mat") else np.uint8
        )
        if path.suffix == ".mat":
            scipy.io.savemat(path, {"LabelMap": wide})
        else:
            Image.fromarray(wide).save(path)


def build(root, image, label, values, split=None, images=3):
    "Three photographs with the same labels; with a split file, a fourth pair that the list does not name."
    for n in range(1, images + 1 + bool(split)):
        save(root / image.format(n), Image.new("RGB", (2 * len(values), 4), (90, 120, 60)))
        write_labels(root / label.format(n), list(values), 2)
    if split:
        home = root / (VOC if image.startswith(VOC) else PC if image.startswith(PC) else "CamVid")
        (home / split).parent.mkdir(parents=True, exist_ok=True)
        (home / split).write_text("".join(f"{Path(image.format(n)).stem}\n" for n in range(1, images + 1)))
    return root


ADE_ROW = next(row for row in LAYOUTS if row[0] == "ADE-150")
VOC_ROW = next(row for row in LAYOUTS if row[0] == "VOC-21")


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: f"{row[0]} {row[2]}")
def test_layout(tmp_path, row):
    """Known labels come back as known classes, from the folder of the archive and from the one above;
    `check` finds nothing wrong.
    """
    name, image, label, values, split = row
    build(tmp_path, image, label, values, split)
    dataset = open_dataset(tmp_path, name)
    assert len(dataset) == 3 and dataset.names == list(protocol(name).vocabulary.names)
    stem, picture, labels = dataset[2]
    expected = np.tile(np.repeat(list(values.values()), 2), (4, 1))
    assert (
        picture.shape == (*expected.shape, 3)
        and (labels == expected).all()
        and (dataset.labels(0) == expected).all()
    )
    assert labels.dtype == (np.uint16 if dataset.ignore == 65535 else np.uint8)
    home = tmp_path / image.split("/")[0]
    assert (
        open_dataset(home, name).stems == dataset.stems
        and (pickle.loads(pickle.dumps(dataset)).labels(1) == expected).all()
    )
    report = check(tmp_path, name, decode=True, progress=False)
    assert (
        report.ok
        and not report.complete
        and report.counts["pairs"] == 3
        and report.layout == dataset.layout.name
    ), str(report)
    assert report.counts["classes_present"] == len(
        set(values.values()) - {dataset.ignore}
    ) and "a subset of the expected" in str(report)
    assert check(tmp_path, replace(protocol(name), expected=(3,)), progress=False).complete


def test_every_layout_is_tested():
    "No layout of any protocol without a row above; COCO's folders have two spellings."
    tested = {(name, label.split("/", 1)[1]) for name, _, label, *_ in LAYOUTS}
    for name in NAMES:
        p, rows = PROTOCOLS[name], [label for known, label in tested if known == name]
        for layout in p.layouts:
            folder, ending = (
                layout.labels.split("{stem}") if "{stem}" in layout.labels else (layout.labels, "")
            )
            assert any(folder in row and row.endswith(ending) for row in rows), (name, layout.name)


def test_records():
    assert sorted(list_protocols("trained") + list_protocols("training-free")) == sorted(NAMES) and set(
        NAMES
    ) < set(list_protocols()) == set(PROTOCOLS)
    assert [protocol(name).classes for name in NAMES] == [
        20,
        21,
        21,
        59,
        60,
        459,
        150,
        847,
        151,
        171,
        81,
        172,
        19,
        11,
    ]
    assert [protocol(name).background for name in NAMES] == [
        None,
        0,
        20,
        None,
        0,
        None,
        None,
        None,
        0,
        None,
        0,
        0,
        None,
        None,
    ]
    assert [protocol(name).expected[0] for name in NAMES] == [1449] * 3 + [5104] * 3 + [2000] * 3 + [
        5000
    ] * 3 + [
        500,
        233,
    ]
    for name in NAMES:
        p = PROTOCOLS[name]
        facts = json.loads(json.dumps(p.describe()))
        assert (
            facts["protocol"] == name
            and facts["names"] == list(p.vocabulary.names)
            and facts["source"].startswith("http")
        )
        assert facts["background"]["scored"] == (p.background is not None) and facts["background"]["decided"]
        if p.background == 0:
            assert p.vocabulary.names[0] == "background" == p.words[0] and p.vocabulary.background_index == 0
        assert len(p.vocabulary) == (59 if name == "PAS-20b" else p.classes)
        assert p.family in ("trained", "training-free") and (p.family == "trained") == (
            p.resize == "shortest:640:2560"
        )
        for rule in (p.resize, *p.other_resizes.values()):
            assert resize_rule(rule)[0]["size"] > 0
    tuned = replace(protocol("VOC-21"), threshold=0.4)
    assert (
        tuned.describe()["background"]["threshold"] == 0.4
        and "0.4" in tuned.decided
        and tuned != protocol("VOC-21")
    )
    assert pickle.loads(pickle.dumps(tuned)) == tuned


@pytest.mark.parametrize(
    "asked, name",
    [
        ("VOC-21", "VOC-21"),
        ("voc_21", "VOC-21"),
        ("V20", "VOC-20"),
        ("PAS-20", "VOC-20"),
        ("pas20b", "PAS-20b"),
        ("A-847", "ADE-847"),
        ("a150", "ADE-150"),
        ("COCO-Stuff-171", "COCO-171"),
        ("COCO-Object-81", "COCO-80+bg"),
        ("obj", "COCO-80+bg"),
        ("Cityscapes", "Cityscapes-19"),
        ("city", "Cityscapes-19"),
        ("Pascal Context 459", "PC-459"),
        ("coco-171+BG", "COCO-171+bg"),
        ("ade150+unl", "ADE-150+unl"),
        ("camvid", "CamVid-11"),
    ],
)
def test_aliases(asked, name):
    assert protocol(asked).name == name


@pytest.mark.parametrize(
    "asked, candidates",
    [
        ("VOC", ["VOC-20", "VOC-21", "PAS-20b"]),
        ("Pascal VOC", ["VOC-20"]),
        ("PC", ["PC-59", "PC-60", "PC-459"]),
        ("pascal-context", ["PC-60"]),
        ("COCO-Stuff", ["COCO-171", "COCO-80+bg", "COCO-171+bg"]),
        ("ADE", ["ADE-150", "ADE-847", "ADE-150+unl"]),
        ("ade20k", ["ADE-847"]),
    ],
)
def test_bare_names(asked, candidates):
    "A name that stands for several benchmarks is not guessed at."
    with pytest.raises(DatasetError, match="is not one benchmark") as e:
        protocol(asked)
    assert all(candidate in str(e.value) for candidate in candidates)


def test_unknown_names():
    with pytest.raises(DatasetError, match="did you mean 'Cityscapes'"):
        protocol("citiscapes")
    with pytest.raises(DatasetError, match="Known: VOC-20"):
        protocol("kitchen")
    with pytest.raises(DatasetError):
        check(".", "VOC", progress=False)


def test_no_protocol(tmp_path):
    "Opened without a protocol only where there is no choice."
    city = next(row for row in LAYOUTS if row[0] == "Cityscapes-19")
    assert open_dataset(build(tmp_path / "city", *city[1:4])).protocol.name == "Cityscapes-19"
    with pytest.raises(DatasetError, match=r"can be read as VOC-20, VOC-21, PAS-20b: say which"):
        open_dataset(build(tmp_path / "voc", *VOC_ROW[1:]))
    with pytest.raises(DatasetError, match="holds no known data set"):
        open_dataset(tmp_path / "voc/VOCdevkit/VOC2012/JPEGImages")
    with pytest.raises(DatasetError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")


def test_side_by_side(tmp_path):
    """The official layout is read first, another on request;
    two sources of different labels are never swapped silently.
    """
    for row in LAYOUTS[:4]:
        build(tmp_path, *row[1:])
    assert open_dataset(tmp_path, "VOC-20").layout.name == "VOC 2012"
    assert open_dataset(tmp_path, "VOC-20", "VOC 2012, annotations_detectron2").labels(0).max() == 255
    assert [layout.name for layout, _ in find_layouts(tmp_path, "VOC-20")][0] == "VOC 2012"
    assert "also there, not read: VOC 2012 with SBD, VOC 2012, annotations_detectron2" in str(
        check(tmp_path, "VOC-20", progress=False)
    )
    with pytest.raises(DatasetError, match="in layout 'x'; found: VOC 2012"):
        open_dataset(tmp_path, "VOC-20", "x")
    coco = [row for row in LAYOUTS if row[0] == "COCO-80+bg" and row[1].startswith(COCO + "val2017")]
    for row in (coco[0], coco[-1]):
        build(tmp_path, *row[1:])
    with pytest.raises(DatasetError, match="choose layout='COCO stuffthingmaps' or layout='COCO instances'"):
        open_dataset(tmp_path, "Obj")
    assert not check(tmp_path, "Obj", progress=False).ok
    assert open_dataset(tmp_path, "Obj", "COCO instances").labels(0)[0].tolist() == [
        1,
        1,
        17,
        17,
        80,
        80,
        0,
        0,
    ]


def test_converted_beside_raw(tmp_path):
    """mmsegmentation's converted maps beside the raw ones are not taken for raw, nor for SimSeg's, whose
    files have the same name.
    """
    raw, converted = (
        next(r for r in LAYOUTS if r[0] == "COCO-171" and r[2].endswith(end))
        for end in ("annotations/val2017/00000000000{}.png", "_labelTrainIds.png")
    )
    build(tmp_path, *converted[1:])
    assert open_dataset(tmp_path, "COCO-171").labels(0).max() == 255 and "SimSeg" in str(
        check(tmp_path, "COCO-171", progress=False)
    )
    report = check(tmp_path, "COCO-80+bg", progress=False)
    assert not report.ok and "files with label value 170, which COCO-80+bg does not know: 3" in str(report)
    build(tmp_path, *raw[1:])
    assert (
        open_dataset(tmp_path, "COCO-171").stems == [f"{n:012}" for n in (1, 2, 3)]
        and open_dataset(tmp_path, "COCO-171").layout.name == "COCO-Stuff 164k annotations"
    )


def problem(root, as_="ADE-150", **options):
    "The report on a download that has exactly one problem."
    report = check(root, as_, progress=False, **options)
    assert (
        not report.ok
        and not report.complete
        and len(report.problems) == 1
        and "get it from http" in str(report).lower()
    ), str(report)
    return report


def test_check_missing_split(tmp_path):
    build(tmp_path, *VOC_ROW[1:])
    (tmp_path / VOC / VOC_LIST).unlink()
    report = problem(tmp_path, "VOC-21")
    assert report.layout is None and "no split file ImageSets/Segmentation/val.txt" in str(report)


def test_check_stray_values(tmp_path):
    build(tmp_path, *ADE_ROW[1:])
    for n in (2, 3):
        write_labels(tmp_path / ADE_ROW[2].format(n), [1, 2, 151], 2)
    report = problem(tmp_path)
    assert (
        "files with label value 151, which ADE-150 does not know: 2, the first is" in report.problems[0]
        and "ADE_val_00000002.png" in report.problems[0]
    )
    for n, values in ((1, range(200, 230, 2)), (2, range(200, 206)), (3, [1])):
        write_labels(tmp_path / ADE_ROW[2].format(n), list(values), 2)
    report = check(tmp_path, "ADE-150", progress=False)
    assert report.counts["stray_values"] == 18 and "... and 8 more values" in str(report)


def test_check_sizes(tmp_path):
    build(tmp_path, *ADE_ROW[1:])
    save(tmp_path / ADE_ROW[1].format(2), Image.new("RGB", (7, 4)))
    assert (
        "pairs that differ in size: 1" in problem(tmp_path).problems[0]
        and "ADE_val_00000002.jpg is (4, 7)" in problem(tmp_path).problems[0]
    )
    sideways = Image.Exif()
    sideways[274] = 8
    # stored upright, marked as lying on its side
    Image.new("RGB", (4, 6)).save(tmp_path / ADE_ROW[1].format(2), exif=sideways)
    assert check(tmp_path, "ADE-150", progress=False).ok and open_dataset(tmp_path, "ADE-150")[1][
        1
    ].shape == (4, 6, 3)


def test_check_lonely(tmp_path):
    "A photograph without labels is a note, labels without their photograph are a problem; both are named."
    build(tmp_path, *ADE_ROW[1:])
    (tmp_path / ADE_ROW[2].format(1)).unlink()
    report = check(tmp_path, "ADE-150", progress=False)
    assert (
        report.ok
        and not report.complete
        and report.counts["without_labels"] == 1
        and "images without labels (not scored): 1, the first is ADE_val_00000001" in str(report)
    )
    (tmp_path / ADE_ROW[1].format(3)).unlink()
    assert "label files without an image: 1, the first is ADE_val_00000003" in problem(tmp_path).problems[0]
    build(tmp_path, *VOC_ROW[1:])
    for part in VOC_ROW[1:3]:
        (tmp_path / part.format(2)).unlink()
    report = check(tmp_path, "VOC-21", progress=False)
    assert (
        report.ok
        and report.counts["without_either"] == 1
        and "listed images that are not here at all: 1, the first is 2007_000002" in str(report)
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: Image.new("RGB", (6, 4)).save(path),
        lambda path: path.write_bytes(path.read_bytes()[:-15]),
        lambda path: path.write_bytes(b"<html>not found</html>"),
    ],
    ids=["RGB", "truncated", "HTML"],
)
def test_check_bad_labels(tmp_path, damage):
    build(tmp_path, *ADE_ROW[1:])
    damage(tmp_path / ADE_ROW[2].format(2))
    report = problem(tmp_path)
    assert (
        report.counts["unreadable"] == 1
        and "files that cannot be read: 1, the first:" in report.problems[0]
        and "ADE_val_00000002.png" in report.problems[0]
    )
    assert report.counts["pairs"] == 3 and report.counts["classes_present"] == 2  # the rest was read


def test_check_bad_images(tmp_path):
    build(tmp_path, *ADE_ROW[1:])
    path = tmp_path / ADE_ROW[1].format(2)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)).save(
        path, quality=100, subsampling=0
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])  # the header is whole: only decoding tells
    assert (
        check(tmp_path, "ADE-150", progress=False).ok
        and "ADE_val_00000002.jpg" in problem(tmp_path, decode=True).problems[0]
    )
    path.write_bytes(whole[:8])
    assert "ADE_val_00000002.jpg" in problem(tmp_path).problems[0]


def test_check_too_many(tmp_path):
    build(tmp_path, *ADE_ROW[1:])
    report = problem(tmp_path, replace(protocol("ADE-150"), expected=(2,)))
    assert "3 pairs, more than the expected 2" in report.problems[0]


def test_check_wrong_protocol(tmp_path):
    "What was looked for, what lies there instead, where to get it."
    build(tmp_path, *ADE_ROW[1:])
    report = problem(tmp_path, "Cityscapes")
    for part in (
        "Cityscapes-19: not usable",
        "no leftImg8bit/val/",
        "images/, masks/, classes.txt",
        "can be read as ADE-150, ADE-150+unl",
        "https://www.cityscapes-dataset.com",
    ):
        assert part in str(report), part


@pytest.mark.parametrize("name", NAMES)
def test_check_empty(tmp_path, name):
    assert problem(tmp_path, name).counts["pairs"] == 0
    for layout in protocol(name).layouts:  # the folders are there, with nothing in them
        for pattern in (*layout.images, layout.labels):
            if "{stem}" in pattern:
                (tmp_path / pattern.partition("{stem}")[0]).mkdir(parents=True, exist_ok=True)
    assert f"holds no {name}" in str(problem(tmp_path, name))
    assert "does not exist" in str(problem(tmp_path / "nowhere", name))


def folder(root, names, values, dtype=np.uint8, facts=None):
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    Image.new("RGB", (len(values), 4)).save(root / "images/a.jpg")
    Image.fromarray(np.tile(np.array(values, dtype), (4, 1))).save(root / "masks/a.png")
    (root / "classes.txt").write_text("\n".join(names))
    if facts:
        (root / "dataset.json").write_text(json.dumps(facts))
    return root


FOLDERS = [
    ("VOC-21", "VOC-21", {0: 0, 20: 20, 255: X}),
    ("VOC-20", "VOC-21", {0: X, 1: 0, 20: 19, 255: X}),
    ("VOC-20", "VOC-20", {0: 0, 19: 19, 255: X}),
    ("PAS-20b", "VOC-21", {0: 20, 1: 0, 20: 19, 255: X}),
    ("PAS-20b", "PAS-20b", {0: 0, 20: 20, 255: X}),
    ("PC-59", "PC-59", {0: 0, 58: 58, 255: X}),
    ("PC-59", "PC-60", {0: X, 1: 0, 59: 58}),
    ("PC-60", "PC-60", {0: 0, 59: 59, 255: X}),
    ("PC-459", "PC-459", {0: 0, 255: 255, 458: 458, 65535: XX}),
    ("ADE-150", "ADE-150", {0: 0, 149: 149, 255: X}),
    ("ADE-847", "ADE-847", {0: 0, 846: 846, 65535: XX}),
    ("ADE-150+unl", "ADE-150", {0: 1, 149: 150, 255: 0}),
    ("ADE-150+unl", "ADE-150+unl", {0: 0, 150: 150}),
    ("COCO-171", "COCO-171", {0: 0, 170: 170, 255: X}),
    ("COCO-80+bg", "COCO-80+bg", {0: 0, 80: 80, 255: X}),
    ("COCO-80+bg", "COCO-171", {0: 1, 79: 80, 80: 0, 255: 0}),
    ("COCO-171+bg", "COCO-171", {0: 1, 170: 171, 255: 0}),
    ("COCO-171+bg", "COCO-171+bg", {0: 0, 171: 171}),
    ("Cityscapes-19", "Cityscapes-19", {0: 0, 18: 18, 255: X}),
    ("CamVid-11", "CamVid-11", {0: 0, 10: 10, 255: X}),
]


@pytest.mark.parametrize("name, classes, values", FOLDERS, ids=[f"{row[1]} as {row[0]}" for row in FOLDERS])
def test_folder(tmp_path, name, classes, values):
    "A plain folder of indices under each protocol that can score it."
    root = folder(
        tmp_path / "set",
        protocol(classes).vocabulary.names,
        list(values),
        np.uint16 if max(values) > 255 else np.uint8,
    )
    dataset = open_dataset(root, name)
    assert (
        dataset.labels(0)[0].tolist() == list(values.values())
        and dataset.describe()["layout"] == "plain folder"
        and dataset.classes == protocol(name).classes
    )
    assert check(root, name, progress=False).ok


def test_folder_refused(tmp_path):
    voc, pas = (protocol(title).vocabulary.names for title in ("VOC-21", "PAS-20b"))
    root = folder(tmp_path / "voc", voc, [0, 20])
    for name in set(NAMES) - {"VOC-21", "VOC-20", "PAS-20b"}:
        with pytest.raises(DatasetError, match="has 21 names, the first 'background'"):
            open_dataset(root, name)
    assert "does not fit ADE-150" in str(check(root, "ADE-150", progress=False))
    assert type(open_dataset(root)) is FolderDataset and open_dataset(root).names == list(voc)
    # 59 names, the same first and last
    with pytest.raises(DatasetError, match="does not fit PC-59"):
        open_dataset(folder(tmp_path / "pas", pas, [0, 20]), "PC-59")
    with pytest.raises(DatasetError, match="does not fit VOC-21"):
        open_dataset(folder(tmp_path / "shuffled", [voc[0], *sorted(voc[1:], reverse=True)], [0]), "VOC-21")
    with pytest.raises(DatasetError, match="unknown label value 21"):
        open_dataset(folder(tmp_path / "wide", voc, [0, 21]), "VOC-20").labels(0)


def test_prepared_folder(tmp_path):
    "A folder that names its protocol needs no other word; 59 names, 21 classes."
    p = protocol("PAS-20b")
    root = folder(tmp_path / "set", p.vocabulary.names, [0, 20, 255], facts=p.describe())
    assert open_dataset(root).protocol == p and open_dataset(root).labels(0)[0].tolist() == [0, 20, 255]
    assert FolderDataset.open(root).classes == 21 and len(FolderDataset.open(root).names) == 59
    (root / "dataset.json").write_text('{"protocol": "VOC"}')
    with pytest.raises(DatasetError, match="is not one benchmark"):
        open_dataset(root)


@pytest.mark.parametrize(
    "name, as_, pairs, present",
    [
        ("voc2012-val-subset", "VOC-21", 239, 16),
        ("voc2012-val-subset", "VOC-20", 239, 15),
        ("voc2012-val-subset", "PAS-20b", 239, 16),
        ("coco-object-mini", "COCO-80+bg", 217, 81),
        ("camvid11", "CamVid-11", 101, 11),
        ("ade150-mini", "ADE-150", 5, 37),
        ("ade150-mini", "ADE-150+unl", 5, 38),
        ("cocostuff171-mini", "COCO-171", 13, 57),
        ("cocostuff171-mini", "COCO-171+bg", 13, 58),
    ],
)
def test_shared_sets(name, as_, pairs, present):
    "The project's own data under each protocol; the numbers are those of its notes."
    if not (SHARED / name).is_dir():
        pytest.skip("no ../shared/data here")
    report = check(SHARED / name, as_, progress=False)
    assert (
        report.ok
        and not report.complete
        and (report.counts["pairs"], report.counts["classes_present"]) == (pairs, present)
    )


def test_shared_ade_is_ade():
    """Landmarks of a known picture:
    the map of the folder, of the protocol and of the vocabulary agree on every pixel.
    """
    if not (SHARED / "ade150-mini").is_dir():
        pytest.skip("no ../shared/data here")
    dataset = open_dataset(SHARED / "ade150-mini", "ADE-150")
    for i, path in enumerate(dataset.label_paths):
        assert (dataset.labels(i) == label_map("ADE-150").apply(np.asarray(Image.open(path)))).all()
    with_unlabelled = open_dataset(SHARED / "ade150-mini", "ADE-150+unl")
    assert all(
        (with_unlabelled.labels(i) == np.asarray(Image.open(path))).all()
        for i, path in enumerate(dataset.label_paths)
    )


def own(root, masks=("0.png", "1.png"), values=(0, 255), names=("background", "cat"), facts=None):
    for k in range(2):
        save(root / f"images/{k}.JPG", Image.fromarray(np.full((4, 6 + k, 3), 90, np.uint8)))
    for k, name in enumerate(masks):
        save(root / "masks" / name, Image.fromarray(np.resize(np.array(values, np.uint8), (4, 6 + k))))
    (root / "classes.txt").write_text("\n".join(names))
    if facts:
        (root / "dataset.json").write_text(json.dumps(facts))
    return root


def test_check_of_ones_own_folder(tmp_path):
    """Without a protocol:
    counts, sizes, what each value is and how much of it there is, and the question about 255.
    """
    root = own(tmp_path / "cats")
    report = check(root, progress=False)
    assert (
        not report.ok
        and report.counts["pairs"] == 2
        and report.values == {0: 0.5, 255: 0.5}
        and "reads 255 as 'cat'" in report.problems[0]
    )
    assert "4 x 6 to 4 x 7, 2 sizes; 1 of 2 classes occur, 50.0 % of the pixels are not scored" in str(
        report
    ) and "class 0, background" in str(report)
    (root / "dataset.json").write_text('{"values": {"0": 0, "255": 1}}')
    report = check(root, progress=False)
    assert (
        report.ok
        and "2 of 2 classes occur, 0.0 %" in str(report)
        and "class 1, cat" in str(report)
        and report.protocol == "cats"
    )


def test_check_of_ones_own_folder_lists_what_is_wrong(tmp_path):
    root = own(tmp_path / "cats", ("0.png", "1_mask.png"), (0, 1, 7))
    report = check(root, progress=False)
    assert [report.counts[kind] for kind in ("pairs", "without_image", "without_labels", "stray_values")] == [
        1,
        1,
        1,
        1,
    ] and not report.ok
    assert (
        "label value 7" in str(report)
        and "1_mask.png looks like the mask of 1.JPG" in str(report)
        and '"values"' in str(report)
        and "no class" in str(report)
    )
    (root / "masks/0.png").write_bytes(b"")
    assert "cannot be read" in str(check(root, progress=False))
    (root / "classes.txt").write_bytes(b"\xff\xfe\x00")
    assert "not usable" in str(check(root, progress=False))


def test_check_without_a_protocol_elsewhere(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    report = check(tmp_path, progress=False)
    assert (
        not report.ok
        and "images/, masks/ and classes.txt; this one has images/, labels/" in str(report)
        and "--as ADE-150" in str(report)
    )
    assert "does not exist" in str(check(tmp_path / "nowhere", progress=False))


def test_a_protocol_says_what_255_means(tmp_path):
    "The first class and 255 only, as in a subset of VOC: no question."
    root = folder(tmp_path / "voc", protocol("VOC-21").vocabulary.names, [0, 255])
    assert open_dataset(root, "VOC-21").labels(0).max() == 255 and check(root, "VOC-21", progress=False).ok
    with pytest.raises(DatasetError, match="nobody said"):
        open_dataset(root)
