"""The data sets of MESS:
every folder as its scripts leave it, labels read back, foreign labels refused, look-alikes kept apart.
"""

import json, pickle, subprocess, sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ovss_nb.app.cli import main
from ovss_nb.benchmarks.datasets import DatasetError
from ovss_nb.benchmarks.mess import mess_means, mess_records, mess_sets
from ovss_nb.systems.registry import resize_rule
from ovss_nb.benchmarks.prepare import prepare
from ovss_nb.benchmarks.protocols import check, list_protocols, open_dataset, protocol
from ovss_nb.core.vocabulary import Vocabulary

# Written by hand: name, photograph, label file ({} numbers the images), classes, images, background, first
# and last name.
IMAGES, LABELS = "images_detectron2/", "annotations_detectron2/"
SETS = [
    (
        "BDD100K",
        "bdd100k/images/10k/val/7d0{}.jpg",
        f"bdd100k/{LABELS}val/7d0{{}}.png",
        19,
        1000,
        None,
        "road",
        "bicycle",
    ),
    (
        "Dark-Zurich",
        "Dark_Zurich/rgb_anon/val/night/GOPR0356/GOPR0356_frame_00032{}_rgb_anon.png",
        f"Dark_Zurich/{LABELS}val/GOPR0356_frame_00032{{}}_gt_labelIds.png",
        20,
        50,
        0,
        "unlabeled",
        "bicycle",
    ),
    (
        "MHP-v1",
        f"LV-MHP-v1/{IMAGES}test/000{{}}.jpg",
        f"LV-MHP-v1/{LABELS}test/000{{}}.png",
        19,
        980,
        0,
        "others",
        "torso skin",
    ),
    (
        "FoodSeg103",
        "FoodSeg103/Images/img_dir/test/0000004{}.jpg",
        "FoodSeg103/Images/ann_dir/test/0000004{}.png",
        104,
        2125,
        0,
        "background",
        "other ingredients",
    ),
    (
        "ATLANTIS",
        f"atlantis/{IMAGES}test/90{{}}.jpg",
        f"atlantis/{LABELS}test/90{{}}.png",
        56,
        1295,
        None,
        "bicycle",
        "wetland",
    ),
    (
        "DRAM",
        f"DRAM_processed/{IMAGES}test/cezanne_{{}}.jpg",
        f"DRAM_processed/{LABELS}test/cezanne_{{}}.png",
        12,
        718,
        11,
        "bird",
        "background",
    ),
    (
        "iSAID",
        f"isaid/{IMAGES}val/P0003_{{}}.png",
        f"isaid/{LABELS}val/P0003_{{}}.png",
        16,
        4055,
        0,
        "others",
        "pier",
    ),
    (
        "ISPRS-Potsdam",
        f"ISPRS_Potsdam/{IMAGES}test/irrg/top_potsdam_2_13_{{}}.png",
        f"ISPRS_Potsdam/{LABELS}test/top_potsdam_2_13_{{}}.png",
        6,
        504,
        5,
        "road",
        "others",
    ),
    (
        "WorldFloods",
        f"WorldFloods/{IMAGES}test/irrg/EMSR_{{}}.png",
        f"WorldFloods/{LABELS}test/EMSR_{{}}.png",
        3,
        160,
        0,
        "land",
        "cloud",
    ),
    (
        "FloodNet",
        f"FloodNet-Supervised_v1.0/{IMAGES}test/6336_{{}}.jpg",
        f"FloodNet-Supervised_v1.0/{LABELS}test/6336_{{}}.png",
        10,
        5571,
        0,
        "background",
        "grass",
    ),
    (
        "UAVid",
        f"uavid_v1.5/{IMAGES}val/seq16_000000_{{}}.png",
        f"uavid_v1.5/{LABELS}val/seq16_000000_{{}}.png",
        8,
        840,
        0,
        "others",
        "humans",
    ),
    (
        "Kvasir-Instrument",
        f"kvasir-instrument/{IMAGES}test/ckcu{{}}.png",
        f"kvasir-instrument/{LABELS}test/ckcu{{}}.png",
        2,
        118,
        0,
        "others",
        "tool",
    ),
    (
        "CHASE-DB1",
        f"CHASEDB1/{IMAGES}test/Image_0{{}}L.jpg",
        f"CHASEDB1/{LABELS}test/Image_0{{}}L.png",
        2,
        20,
        0,
        "others",
        "blood vessels",
    ),
    (
        "CryoNuSeg",
        f"CryoNuSeg/{IMAGES}Human_Skin_{{}}.png",
        f"CryoNuSeg/{LABELS}Human_Skin_{{}}.png",
        2,
        30,
        0,
        "others",
        "nuclei in cells",
    ),
    (
        "PAXRay-Lungs",
        f"paxray_dataset/{IMAGES}test/r{{}}.png",
        f"paxray_dataset/{LABELS}test/lungs/r{{}}.png",
        2,
        180,
        0,
        "others",
        "lung",
    ),
    (
        "PAXRay-Bones",
        f"paxray_dataset/{IMAGES}test/r{{}}.png",
        f"paxray_dataset/{LABELS}test/bones/r{{}}.png",
        2,
        180,
        0,
        "others",
        "bones",
    ),
    (
        "PAXRay-Mediastinum",
        f"paxray_dataset/{IMAGES}test/r{{}}.png",
        f"paxray_dataset/{LABELS}test/mediastinum/r{{}}.png",
        2,
        180,
        0,
        "others",
        "mediastinum",
    ),
    (
        "PAXRay-Diaphragm",
        f"paxray_dataset/{IMAGES}test/r{{}}.png",
        f"paxray_dataset/{LABELS}test/diaphragm/r{{}}.png",
        2,
        180,
        0,
        "others",
        "diaphragm",
    ),
    (
        "Corrosion-CS",
        "Corrosion Condition State Classification/original/Test/images/{}.jpeg",
        "Corrosion Condition State Classification/original/Test/masks/{}.png",
        4,
        44,
        0,
        "others",
        "steel with severe corrosion",
    ),
    (
        "DeepCrack",
        "DeepCrack/test_img/IMG_651{}.jpg",
        f"DeepCrack/{LABELS}test/IMG_651{{}}.png",
        2,
        237,
        0,
        "concrete or asphalt",
        "crack",
    ),
    (
        "PST900",
        "PST900_RGBT_Dataset/test/thermal/10_bag21_{}.png",
        "PST900_RGBT_Dataset/test/labels/10_bag21_{}.png",
        5,
        288,
        0,
        "background",
        "human",
    ),
    (
        "ZeroWaste-f",
        "zerowaste-f/splits_final_deblurred/test/data/05_frame_00{}.PNG",
        "zerowaste-f/splits_final_deblurred/test/sem_seg/05_frame_00{}.PNG",
        5,
        929,
        0,
        "background or trash",
        "soft plastic",
    ),
    (
        "SUIM",
        "SUIM/TEST/images/d_r_12{}_.jpg",
        f"SUIM/{LABELS}test/d_r_12{{}}_.png",
        8,
        110,
        0,
        "background (waterbody)",
        "sea-floor and rocks",
    ),
    (
        "CUB-200",
        f"CUB_200_2011/{IMAGES}test/Black_Footed_Albatross_000{{}}.jpg",
        f"CUB_200_2011/{LABELS}test/Black_Footed_Albatross_000{{}}.png",
        201,
        5794,
        0,
        "background",
        "Common Yellowthroat",
    ),
    (
        "CWFID",
        "cwfid/images/00{}_image.png",
        f"cwfid/{LABELS}test/00{{}}_annotation.png",
        3,
        21,
        0,
        "ground",
        "weed",
    ),
]
every = pytest.mark.parametrize("row", SETS, ids=lambda row: row[0])


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def build(root, row, values=None, images=3):
    """Photographs and masks;
    each mask holds the first, the last and one other class, and what is ignored where there are more than
    two.
    """
    values = values or [0, row[3] - 1, row[3] // 2] + [255] * (row[3] > 2)
    for n in range(1, images + 1):
        grey = row[0] == "PST900"
        save(
            root / row[1].format(n),
            Image.new("L" if grey else "RGB", (2 * len(values), 4), 90 if grey else (90, 120, 60)),
        )
        save(
            root / row[2].format(n),
            Image.fromarray(np.tile(np.repeat(np.array(values, np.uint8), 2), (4, 1))),
        )
    return np.tile(np.repeat(values, 2), (4, 1))


@every
def test_layout(tmp_path, row):
    """The labels come back as stored, from the folder of the data set and from the one above;
    `check` finds nothing wrong.
    """
    name, home = "MESS-" + row[0], row[1].split("/")[0]
    expected = build(tmp_path, row)
    # a training picture lies there too
    if row[0] == "CWFID":
        save(tmp_path / row[1].format(9), Image.new("RGB", (2, 2)))
    dataset = open_dataset(tmp_path, name)
    stem, image, labels = dataset[2]
    assert (
        len(dataset) == 3
        and image.shape == (*expected.shape, 3)
        and (labels == expected).all()
        and labels.dtype == np.uint8
        and dataset.ignore == 255
    )
    assert (dataset.names[0], dataset.names[-1], len(dataset.names), dataset.classes) == (
        *row[6:],
        row[3],
        row[3],
    )
    assert (
        open_dataset(tmp_path / home, name).stems == dataset.stems
        and (pickle.loads(pickle.dumps(dataset)).labels(0) == expected).all()
    )
    report = check(tmp_path, name, decode=True, progress=False)
    assert (
        report.ok
        and not report.complete
        and report.counts["pairs"] == 3
        and report.counts["without_labels"] == 0
    ), str(report)
    assert f"a subset of the expected {row[4]:,}" in str(report) and report.layout == f"{home}/ (MESS)"
    assert check(tmp_path, replace(protocol(name), expected=(3,)), progress=False).complete


@every
def test_foreign_labels(tmp_path, row):
    """One past the last class is refused by name;
    so is 255 where there are two classes: such a mask was not converted.
    """
    for value in (row[3], 254) + (255,) * (row[3] == 2):
        build(tmp_path, row, [0, value])
        with pytest.raises(DatasetError, match=f"unknown label value {value}"):
            open_dataset(tmp_path, "MESS-" + row[0]).labels(1)
        report = check(tmp_path, "MESS-" + row[0], progress=False)
        assert (
            not report.ok
            and f"label value {value}, which MESS-{row[0]} does not know: 3" in report.problems[0]
            and report.problems[0].endswith(row[2].format(1).split("/")[-1])
        )


def test_colors_are_refused(tmp_path):
    "SUIM as downloaded has colors; its converter was not run."
    row = next(row for row in SETS if row[0] == "SUIM")
    build(tmp_path, row)
    save(tmp_path / row[2].format(1), Image.new("RGB", (8, 4), (0, 0, 255)))
    assert "holds colors" in check(tmp_path, "MESS-SUIM", progress=False).problems[0]


@every
def test_records(row):
    p = protocol("MESS-" + row[0])
    assert (p.family, p.classes, p.expected[0], p.background, p.ignore, p.threshold) == (
        "mess",
        row[3],
        row[4],
        row[5],
        255,
        None,
    )
    assert set(p.label_map.mapping) == set(range(row[3])) | (
        {255} if row[3] > 2 else set()
    ) and p.expected == ((2125, 2135) if row[0] == "FoodSeg103" else (row[4],))
    assert p.words == (() if row[5] is None else (p.vocabulary.names[row[5]],)) and all(
        resize_rule(rule) for rule in (p.resize, *p.other_resizes.values())
    )
    facts = json.loads(json.dumps(p.describe()))
    assert (
        facts["background"]["scored"] == (row[5] is not None)
        and facts["source"].startswith("http")
        and facts["note"].startswith("Domain: ")
    )
    assert (
        pickle.loads(pickle.dumps(p)) == p
        and Vocabulary.of(list(p.vocabulary.names)).names == p.vocabulary.names
    )


def test_all_are_here():
    assert list_protocols("mess") == ["MESS-" + row[0] for row in SETS] == list(mess_records())
    assert list_protocols()[14:] == list_protocols("mess") and set(list_protocols()[:14]) == set(
        list_protocols("trained") + list_protocols("training-free")
    )
    with pytest.raises(DatasetError, match="unknown family 'messy': say trained, training-free, mess"):
        list_protocols("messy")


@pytest.mark.parametrize(
    "name, position, word",
    [
        ("Dark-Zurich", 13, "rider"),
        ("MHP-v1", 9, "left shoe"),
        ("FoodSeg103", 96, "French beans"),
        ("FoodSeg103", 52, "sauce"),
        ("ATLANTIS", 31, "puddle"),
        ("DRAM", 9, "potted-plant"),
        ("iSAID", 8, "truck or bus"),
        ("ISPRS-Potsdam", 2, "grass"),
        ("WorldFloods", 1, "water and flood"),
        ("FloodNet", 3, "road-flooded"),
        ("UAVid", 6, "parked car"),
        ("PST900", 3, "drill"),
        ("ZeroWaste-f", 2, "cardboard"),
        ("SUIM", 4, "robots (auvs/rovs/instruments)"),
        ("CUB-200", 1, "Black-footed Albatross"),
        ("CUB-200", 141, "Artic Tern"),
        ("CWFID", 1, "crop seedling"),
        ("Corrosion-CS", 2, "steel with poor corrosion"),
    ],
)
def test_order_of_classes(name, position, word):
    assert protocol("MESS-" + name).vocabulary.names[position] == word


def test_background_words():
    "Vocabularies mark the names that say nothing but `none of the others`."
    marked = {row[0] for row in SETS if protocol("MESS-" + row[0]).vocabulary.background}
    assert {row[0] for row in SETS if row[5] is not None} - marked == {
        "WorldFloods",
        "DeepCrack",
        "ZeroWaste-f",
        "SUIM",
        "CWFID",
    } and not {"BDD100K", "ATLANTIS"} & marked


def test_names():
    assert (
        protocol("mess_foodseg103").name == protocol("foodseg103_sem_seg_test").name == "MESS-FoodSeg103"
        and protocol("MESS CHASE DB1").classes == 2
    )
    # without MESS in front it may be another way to score
    with pytest.raises(DatasetError, match="did you mean 'MESS-FoodSeg103'"):
        protocol("FoodSeg103")
    with pytest.raises(
        DatasetError,
        match="say MESS-PAXRay-Lungs, MESS-PAXRay-Bones, MESS-PAXRay-Mediastinum or MESS-PAXRay-Diaphragm",
    ):
        protocol("MESS-PAXRay-4")
    with pytest.raises(DatasetError, match="mean over its 22 data sets"):
        protocol("mess")


def test_look_alikes(tmp_path):
    "All data sets in one folder: each is found in its own place, and never in another's."
    for k, row in enumerate(SETS):
        build(tmp_path, row, images=1 + k % 3)
    for k, row in enumerate(SETS):
        dataset = open_dataset(tmp_path, "MESS-" + row[0])
        assert len(dataset) == 1 + k % 3 or row[0].startswith("PAXRay")
        assert str(dataset.label_paths[0]) == str(tmp_path / row[2].format(1))
    assert open_dataset(tmp_path / "atlantis").protocol.name == "MESS-ATLANTIS"
    for wrong in ("MESS-DRAM", "MESS-CUB-200", "MESS-MHP-v1"):
        with pytest.raises(DatasetError, match="What lies there can be read as MESS-ATLANTIS.") as e:
            open_dataset(tmp_path / "atlantis", wrong)
        assert f"holds no {wrong}" in str(e.value) and "(MESS): no images_detectron2/test/" in str(e.value)
    (tmp_path / "atlantis").rename(tmp_path / "other")
    with pytest.raises(DatasetError, match="atlantis/ .MESS.: no images_detectron2/test/"):
        open_dataset(tmp_path / "other", "MESS-ATLANTIS")


def test_relative_path(tmp_path, monkeypatch):
    build(tmp_path, SETS[4])
    monkeypatch.chdir(tmp_path / "atlantis")
    assert len(open_dataset(".", "MESS-ATLANTIS")) == len(open_dataset("../atlantis", "MESS-ATLANTIS")) == 3
    monkeypatch.chdir(tmp_path / "atlantis/images_detectron2")
    assert len(open_dataset("..", "MESS-ATLANTIS")) == 3


@pytest.mark.parametrize("name", ["FoodSeg103", "CUB-200", "DRAM", "CWFID", "Kvasir-Instrument"])
def test_prepared_folder(tmp_path, name):
    "Converted to a plain folder, a set opens again by itself, with the same labels."
    row = next(row for row in SETS if row[0] == name)
    expected = build(tmp_path / "download", row)
    done = prepare(open_dataset(tmp_path / "download", "MESS-" + name), tmp_path / "plain", progress=False)
    assert done["written"] == 3 and not done["skipped"]
    again = open_dataset(tmp_path / "plain")
    assert (
        again.protocol == protocol("MESS-" + name)
        and (again.labels(0) == expected).all()
        and check(tmp_path / "plain", "MESS-" + name, progress=False).ok
    )


def test_two_names_are_two(tmp_path):
    "`others, tool` is not `others, nuclei in cells`, though half of the names agree."
    build(tmp_path / "download", next(row for row in SETS if row[0] == "Kvasir-Instrument"))
    prepare(open_dataset(tmp_path / "download", "MESS-Kvasir-Instrument"), tmp_path / "plain", progress=False)
    with pytest.raises(DatasetError, match="does not fit MESS-CryoNuSeg"):
        open_dataset(tmp_path / "plain", "MESS-CryoNuSeg")


def test_means():
    "PAXRay's four parts count as one of the medical data sets, and each of the 22 as much as any other."
    scores = dict.fromkeys(mess_records(), 0.0)
    assert set(mess_means(scores).values()) == {0}
    parts = {name: 88.0 for name in scores if name.startswith("MESS-PAXRay-")}
    means = mess_means(scores | parts)
    assert (
        means["medical sciences"] == 22
        and means["mean"] == pytest.approx(4)
        and sum(means.values()) == pytest.approx(26)
    )
    assert (
        mess_means(scores | {"MESS-PAXRay-Bones": 88.0})["mean"] == pytest.approx(1)
        and mess_means(scores | {"MESS-CWFID": 66.0})["agriculture and biology"] == 22
    )
    assert list(means) == [
        "general",
        "earth monitoring",
        "medical sciences",
        "engineering",
        "agriculture and biology",
        "mean",
    ]
    del scores["MESS-PAXRay-Bones"]
    with pytest.raises(ValueError, match="no score for MESS-PAXRay-Bones"):
        mess_means(scores)


def test_list_shows_them(capsys):
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in list_protocols("mess"))


@pytest.mark.parametrize("first", ["mess", "protocols"])
def test_imports(first):
    "Neither module needs the other to have been imported, nor torch."
    code = (
        f"import sys, ovss_nb.benchmarks.{first}; from ovss_nb.benchmarks.protocols import protocol;"
        " print(protocol('MESS-SUIM').classes, 'torch' in sys.modules)"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split() == ["8", "False"]


def test_sources_are_complete():
    keys = {
        "name",
        "registered",
        "domain",
        "images",
        "background",
        "home",
        "photographs",
        "labels",
        "source",
        "note",
        "classes",
    }
    assert (
        all(set(record) == keys for record in mess_sets())
        and len({record["registered"] for record in mess_sets()}) == 25
    )
