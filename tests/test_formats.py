"Label maps through files of other tools, read by those tools' own libraries where there are any."

import base64
import contextlib
import copy
import io
import json
import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from ovss_nb.core.formats import (
    FORMATS,
    load_coco,
    load_geojson,
    load_labelme,
    load_panoptic,
    load_scores,
    polygons,
    save_as,
    save_coco,
    save_geojson,
    save_labelme,
    save_panoptic,
    save_scores,
)
from ovss_nb.core.segmentation import Segmentation, SegmentationError

NAMES = ["background", "cat", "dog", "Käse"]


def nested(seed):
    "Squares within squares, two parts of one class, and one pixel alone."
    labels = np.zeros((31, 43), int)
    labels[2:29, 3:30] = 1
    labels[6:24, 8:25] = 2
    labels[10:20, 12:20] = 1
    labels[13:16, 14:18] = 3
    labels[3:9, 33:41] = 1
    labels[30, 42] = 3
    return Segmentation(labels, NAMES)


def noise(seed):
    "Where everything touches everything by corners; coarser for odd seeds."
    labels = np.random.default_rng(seed).integers(0, 4, (23, 31))
    return Segmentation(np.kron(labels, np.ones((2, 3), int)) if seed % 2 else labels, NAMES)


MAPS = [
    nested(0),
    *map(noise, range(6)),
    Segmentation(np.ones((5, 7), int), NAMES),
    Segmentation(np.array([[2]]), NAMES),
]


def same(a, b):
    assert (a.labels == b.labels).all() and a.names == b.names and (a.palette == b.palette).all()


@pytest.mark.parametrize("number", range(len(MAPS)))
def test_every_format_gives_the_map_back(number, tmp_path):
    result = MAPS[number]
    readers = dict(
        png=Segmentation.from_png,
        geojson=load_geojson,
        labelme=load_labelme,
        safetensors=load_scores,
        npz=load_scores,
        coco=lambda path: load_coco(path)["a.jpg"],
        panoptic=lambda path: load_panoptic(path)["a.jpg"],
    )
    assert set(readers) == set(FORMATS)
    for name, read in readers.items():
        same(read(save_as(result, tmp_path / "a", name, "a.jpg")), result)


def test_pycocotools_reads_all_pictures(tmp_path):
    from pycocotools.coco import COCO

    results = {f"{i}.png": result for i, result in enumerate(MAPS)}
    save_coco(results, tmp_path / "coco.json")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "coco.json")
    assert (
        len(coco.imgs) == len(MAPS)
        and [category["name"] for category in coco.loadCats(coco.getCatIds())] == NAMES
    )
    for number, result in enumerate(MAPS, 1):
        labels = np.full(result.labels.shape, -1)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[number])):
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.sum() == annotation["area"] and (labels[mask] == -1).all()
            labels[mask] = annotation["category_id"] - 1
        assert (labels == result.labels).all()


def test_panoptic_as_the_specification_says(tmp_path):
    """Numbers by R + 256 G + 65536 B, one record for each, with area and box;
    many classes need the second byte.
    """
    names = ["background", *(f"class {i}" for i in range(600))]
    many = Segmentation(np.random.default_rng(0).integers(0, 601, (40, 50)), names)
    save_panoptic({"photo.jpg": many}, tmp_path / "panoptic.json")
    stored = json.loads((tmp_path / "panoptic.json").read_text())
    (annotation,) = stored["annotations"]
    rgb = np.asarray(Image.open(tmp_path / "panoptic" / annotation["file_name"])).astype(int)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
    categories = {category["id"]: category["name"] for category in stored["categories"]}
    assert {segment["id"] for segment in annotation["segments_info"]} == set(np.unique(ids)) and 0 not in ids
    for segment in annotation["segments_info"]:
        rows, columns = np.nonzero(ids == segment["id"])
        assert segment["area"] == len(rows) and segment["bbox"] == [
            columns.min(),
            rows.min(),
            np.ptp(columns) + 1,
            np.ptp(rows) + 1,
        ]
        assert (many.labels[rows, columns] == names.index(categories[segment["category_id"]])).all()
    same(load_panoptic(tmp_path / "panoptic.json")["photo.jpg"], many)


def test_panoptic_of_others(tmp_path):
    "Instances become their class, 0 becomes background, and what has no category is refused."
    (tmp_path / "p").mkdir()
    rgb = np.zeros((4, 6, 3), np.uint8)
    rgb[:, 2:4, 1] = 7
    rgb[:, 4:, 2] = 9
    Image.fromarray(rgb).save(tmp_path / "p/x.png")
    stored = dict(
        images=[dict(id=5, file_name="x.jpg", width=6, height=4)],
        categories=[dict(id=17, name="cat", isthing=1), dict(id=3, name="background")],
        annotations=[
            dict(
                image_id=5,
                file_name="x.png",
                segments_info=[dict(id=7 * 256, category_id=17), dict(id=9 * 65536, category_id=17)],
            )
        ],
    )
    (tmp_path / "p.json").write_text(json.dumps(stored))
    found = load_panoptic(tmp_path / "p.json")["x.jpg"]
    assert found.names == ("background", "cat") and found.mask("cat").sum() == 16
    stored["annotations"][0]["segments_info"].pop()
    (tmp_path / "p.json").write_text(json.dumps(stored))
    with pytest.raises(SegmentationError, match="has no category"):
        load_panoptic(tmp_path / "p.json")


@pytest.mark.parametrize("number", range(len(MAPS)))
def test_shapely_and_geojson_accept_the_polygons(number, tmp_path):
    "Every geometry is valid, covers as many pixels as its class has, and the centers of its pixels alone."
    geojson, shapely = (
        pytest.importorskip("geojson", reason="needs geojson"),
        pytest.importorskip("shapely", reason="needs shapely"),
    )
    result = MAPS[number]
    save_geojson(result, tmp_path / "a.geojson")
    collection = geojson.loads((tmp_path / "a.geojson").read_text())
    assert collection.is_valid, collection.errors()
    y, x = (axis.ravel() + 0.5 for axis in np.indices(result.labels.shape))
    for feature in collection["features"]:
        shape, k = shapely.geometry.shape(feature["geometry"]), feature["properties"]["class"]
        assert shape.is_valid and shape.area == (result.labels == k).sum() == feature["properties"]["pixels"]
        assert (shapely.contains_xy(shape, x, y).reshape(result.labels.shape) == (result.labels == k)).all()


def test_geojson_lies_where_it_should(tmp_path):
    pytest.importorskip("rasterio", reason="needs the extra `geo`")
    from rasterio.transform import from_origin

    place = from_origin(513000, 5402000, 0.2, 0.2)
    save_geojson(MAPS[0], tmp_path / "a.geojson", place, "EPSG:32632")
    stored = json.loads((tmp_path / "a.geojson").read_text())
    points = np.array(stored["features"][0]["geometry"]["coordinates"][0][0])
    assert np.allclose(points.min(0), [513000, 5402000 - 31 * 0.2]) and np.allclose(
        points.max(0), [513000 + 43 * 0.2, 5402000]
    )
    same(load_geojson(tmp_path / "a.geojson"), MAPS[0])
    stored["features"] = stored["features"][1:]  # whoever deletes the background gets it back
    (tmp_path / "a.geojson").write_text(json.dumps(stored))
    same(load_geojson(tmp_path / "a.geojson"), MAPS[0])
    stored["features"][0]["properties"]["name"] = "cow"
    (tmp_path / "a.geojson").write_text(json.dumps(stored))
    with pytest.raises(SegmentationError, match="no class 'cow'"):
        load_geojson(tmp_path / "a.geojson")


def test_labelme_paints_the_same_map(tmp_path):
    """By labelme's own function;
    it needs a graphical toolkit, so it is no part of the development environment.
    """
    labelme = pytest.importorskip("labelme.utils", reason="labelme is not installed: pip install labelme")
    from labelme import LabelFile

    for result in MAPS:
        Image.fromarray(np.zeros((*result.labels.shape, 3), np.uint8)).save(tmp_path / "a.png")
        save_labelme(result, tmp_path / "a.json", "a.png")
        shapes = LabelFile(str(tmp_path / "a.json")).shapes
        found, _ = labelme.shapes_to_label(
            result.labels.shape, shapes, {name: k for k, name in enumerate(NAMES)}
        )
        assert (found == result.labels).all()


def test_polygons_keep_holes_and_parts():
    parts = polygons(MAPS[0])
    assert sum(k == 1 for k, _ in parts) == 3 and sorted(len(rings) for k, rings in parts if k == 1) == [
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(
    "read, content, message",
    [
        (load_coco, '{"images": []}', "no 'annotations'"),
        (load_coco, "nonsense", "not a readable COCO"),
        (load_panoptic, "[]", "it holds no object"),
        (load_geojson, '{"features": []}', "no 'ovss_nb'"),
        (load_labelme, '{"shapes": [], "imageHeight": 2}', "no 'imageWidth'"),
        (
            load_labelme,
            (
                '{"shapes": [{"label": "a", "shape_type": "circle", "points": [[0, 0], [1, 1]]}],'
                ' "imageHeight": 2, "imageWidth": 2}'
            ),
            "polygon or a rectangle",
        ),
        (load_scores, "nonsense", "holds no scores"),
    ],
)
def test_faulty_files_get_one_message(read, content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SegmentationError, match=message):
        read(tmp_path / "x.json")


def test_scores_keep_their_precision(tmp_path):
    scores = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float16)
    result = Segmentation(MAPS[0].labels, NAMES, scores=scores)
    from safetensors.numpy import load_file

    save_scores(result, tmp_path / "a.safetensors")
    save_scores(result, tmp_path / "a.npz")
    assert (load_file(tmp_path / "a.safetensors")["scores"] == scores).all() and (
        np.load(tmp_path / "a.npz")["scores"] == scores
    ).all()
    for suffix in ("npz", "safetensors"):
        assert load_scores(tmp_path / f"a.{suffix}").scores.dtype == np.float16
    with pytest.raises(SegmentationError, match="safetensors or .npz"):
        save_scores(result, tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["_background_", "Background", "bg"])
def test_what_nothing_covers_is_the_background_however_it_is_spelt(name, tmp_path):
    "In COCO, panoptic PNG, labelme and GeoJSON; and accents are equal however they were typed."
    names = ("cafe\u0301", name)
    result = Segmentation(np.array([[0, 0, 1], [0, 0, 1]]), names)
    covered = [annotation for annotation in result.to_coco() if annotation["category_id"] == 1]
    assert (Segmentation.from_coco(covered, [*names]).labels == result.labels).all() and (
        Segmentation.from_coco(covered, ["café", name]).labels == result.labels
    ).all()
    shape = dict(
        label="cafe\u0301",
        points=[[0, 0], [1, 0], [1, 1], [0, 1]],
        shape_type="polygon",
        flags={},
        group_id=None,
    )
    stored = dict(
        version="5.5.0", flags={}, shapes=[shape], imagePath="", imageData=None, imageHeight=2, imageWidth=3
    )
    (tmp_path / "one.json").write_text(json.dumps(stored))
    read = load_labelme(tmp_path / "one.json", ["café", name])
    assert (read.labels == result.labels).all() and read.mask("cafe\u0301").sum() == 4
    (tmp_path / "two.json").write_text(
        json.dumps(
            stored | dict(shapes=[shape | dict(label=name, points=[[0, 0], [2, 0], [2, 1], [0, 1]]), shape])
        )
    )
    # labelme's own background is the one
    assert load_labelme(tmp_path / "two.json").names == (name, "café")
    save_panoptic({"a.png": result}, tmp_path / "p.json")
    panoptic = json.loads((tmp_path / "p.json").read_text())
    pixels = np.array(Image.open(tmp_path / "p/a.png"))
    pixels[:, 2] = 0
    Image.fromarray(pixels).save(tmp_path / "p/a.png")
    assert (load_panoptic(tmp_path / "p.json")["a.png"].labels == result.labels).all() and len(
        panoptic["categories"]
    ) == 2


# What other tools write: entries left out, nulls, ids as text, and what contradicts itself.


def coco_file(**changes):
    """Two pictures of 4 x 6 and three annotations:
    a polygon, compressed and uncompressed run lengths; ids have gaps, and nothing is called background.
    """
    whole = dict(
        images=[
            dict(id=3, file_name="a/x.jpg", height=4, width=6),
            dict(id=9, file_name="b/x.jpg", height=4, width=6),
        ],
        categories=[dict(id=17, name="cat"), dict(id=4, name="dog")],
        annotations=[
            dict(id=1, image_id=3, category_id=17, iscrowd=0, segmentation=[[1, 1, 4, 1, 4, 3, 1, 3]]),
            dict(
                id=2, image_id=9, category_id=4, iscrowd=0, segmentation=dict(size=[4, 6], counts=[4, 4, 16])
            ),
            dict(
                id=5,
                image_id=9,
                category_id=17,
                iscrowd=1,
                segmentation=dict(size=[4, 6], counts=[0, 12, 12]),
            ),
        ],
    )
    return copy.deepcopy(whole | changes)


def stored(path, content):
    path.write_bytes(json.dumps(content).encode())
    return path


def test_coco_from_elsewhere(tmp_path):
    """Polygons, both kinds of run lengths, gaps in the ids;
    a crowd lies under single objects, and background is added at the end.
    """
    found = load_coco(stored(tmp_path / "x.json", coco_file()))
    assert list(found) == ["a/x.jpg", "b/x.jpg"] and found["a/x.jpg"].names == ("dog", "cat", "background")
    assert found["a/x.jpg"].mask("cat").sum() == 6 and found["a/x.jpg"].mask("background").sum() == 18
    assert [found["b/x.jpg"].mask(name).sum() for name in ("dog", "cat", "background")] == [4, 8, 12]
    save_coco(found, tmp_path / "again.json")
    for name, result in load_coco(tmp_path / "again.json").items():
        same(result, found[name])


def change(key, n, **values):
    whole = coco_file()
    whole[key][n] |= values
    return whole


@pytest.mark.parametrize(
    "content, pixels",
    [
        # a picture without annotations is background (label-studio-converter #171)
        (coco_file(annotations=coco_file()["annotations"][:1]), [6, 0]),
        (coco_file(annotations=[]), [0, 0]),
        (change("annotations", 0, image_id=3.0, category_id=17.0), [6, 8]),
        (change("images", 1, height=None, width=None), [6, 8]),  # the run lengths say it
        (change("annotations", 1, iscrowd=None, area=None, bbox=None), [6, 8]),
        (change("annotations", 1, segmentation={"size": [4.0, 6.0], "counts": [4.0, 4.0, 16.0]}), [6, 8]),
        (change("categories", 0, color="#ff0000"), [6, 8]),
    ],
)
def test_coco_with_gaps(content, pixels, tmp_path):
    found = load_coco(stored(tmp_path / "x.json", content))
    assert [result.mask("cat").sum() for result in found.values()] == pixels and [
        result.labels.shape for result in found.values()
    ] == [(4, 6)] * 2


def test_coco_in_other_encodings(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "x.json").write_bytes(json.dumps(coco_file(), ensure_ascii=False).encode(encoding))
        assert len(load_coco(tmp_path / "x.json")) == 2


@pytest.mark.parametrize("segmentation", [[], None, [[]]])
def test_coco_annotations_without_a_mask(segmentation, tmp_path):
    "Left out with one warning; a file that has boxes only is none for label maps."
    content = change("annotations", 0, segmentation=segmentation, bbox=[1, 1, 3, 2])
    with pytest.warns(UserWarning, match="annotation 1 has no mask") as told:
        found = load_coco(stored(tmp_path / "x.json", content))
    assert len(told) == 1 and [result.mask("cat").sum() for result in found.values()] == [0, 8]
    for annotation in content["annotations"]:
        annotation.pop("segmentation")
    with pytest.raises(SegmentationError, match="boxes only"):
        load_coco(stored(tmp_path / "x.json", content))


@pytest.mark.parametrize(
    "content, message",
    [
        # cvat #2046: one of them was dropped
        (change("images", 1, file_name="a/x.jpg"), "image 1 is named 'a/x.jpg' as image 0 is"),
        (change("images", 1, id=3), "the id 3, which another image has too"),
        (
            change("images", 1, height=5),
            "annotation [25]: its mask has 4 x 6 pixels, but its image has 5 x 6",
        ),
        (change("images", 0, height=None), "image a/x.jpg has no 'height' and 'width'"),
        (change("images", 0, height=-4), "image 0: 'height' is '-4', not a size in pixels"),
        (change("images", 0, height="4"), "'height' is '4'"),
        (change("images", 0, height=10**6, width=10**6), "more than 178,956,970"),
        (change("images", 0, file_name=None), "image 0 has no 'file_name'"),
        (change("images", 0, id=[3]), "image 0: 'id'"),
        (change("annotations", 0, image_id=None), "annotation 1 has no 'image_id'"),
        (change("annotations", 0, image_id=4), "belongs to image 4, which the file does not list"),
        (change("annotations", 0, category_id=5), "has category 5"),
        (change("annotations", 0, category_id=None), "annotation 1 has no 'category_id'"),
        (change("annotations", 0, segmentation=[[1, 1, 4, 1]]), "annotation 1: broken mask.*three points"),
        (change("annotations", 0, segmentation=[[1, 1, 4, 1, 4, float("nan")]]), "annotation 1: broken mask"),
        (change("annotations", 0, segmentation=7), "annotation 1: broken mask"),
        (change("annotations", 0, segmentation={"size": [4, 6]}), "annotation 1: broken mask"),
        (change("annotations", 0, segmentation={"counts": [24]}), "annotation 1: broken mask"),
        (
            change("annotations", 1, segmentation={"size": [4, 6], "counts": [4, 4]}),
            "annotation 2: broken mask",
        ),
        (change("annotations", 1, segmentation={"size": [4, 6], "counts": "zz"}), "broken mask"),
        (change("categories", 0, name="dog"), "two categories have the name 'dog'"),
        (change("categories", 0, id=4), "two categories have the id 4"),
        (change("categories", 0, name=None), "category 1 has no 'name'|category 0 has no 'name'"),
        (change("categories", 0, name=" "), "'name' is ' ', not a name"),
        (coco_file(categories=None), "no 'categories'"),
        (coco_file(images={}), "'images' is not a list"),
        (coco_file(annotations={}), "'annotations' is not a list"),
        (coco_file(annotations=[None]), "annotation 0 is 'None', not an object"),
        (coco_file()["annotations"], "it holds no object"),
    ],
)
def test_coco_contradictions_are_named(content, message, tmp_path):
    with pytest.raises(SegmentationError, match=message) as e:
        load_coco(stored(tmp_path / "x.json", content))
    assert "x.json" in str(e.value)


@pytest.mark.parametrize(
    "geometry, message",
    [
        (dict(type="LineString", coordinates=[[0, 0], [1, 1]]), "is a LineString: redraw"),
        (dict(type="Polygon", coordinates=[[[0, 0], [1, 0], [1, 1]]]), "four"),
        (dict(type="Polygon", coordinates=[[[0, 0], [1], [1, 1], [0, 0]]]), "not lists of numbers"),
        (dict(type="Polygon", coordinates=[[[0, 0], [1, float("nan")], [1, 1], [0, 0]]]), "four"),
        (dict(type="Polygon"), "no 'coordinates'"),
        (dict(coordinates=[]), "no 'type'"),
        (7, "'geometry' is '7'"),
    ],
)
def test_geojson_geometries_are_read_or_named(geometry, message, tmp_path):
    "GDAL leaves out what it cannot read, and the pixels would silently become background."
    pytest.importorskip("rasterio", reason="needs the extra `geo`")
    save_geojson(MAPS[0], tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    content["features"][1]["geometry"] = geometry
    with pytest.raises(SegmentationError, match=f"x.json: feature 1.*{message}"):
        load_geojson(stored(tmp_path / "x.json", content))
    content["features"][1]["geometry"] = None  # which the standard allows
    assert load_geojson(stored(tmp_path / "x.json", content)).mask("cat").sum() == 0


def panoptic_file(folder, **changes):
    (folder / "p").mkdir(exist_ok=True)
    Image.fromarray(
        np.repeat(np.array([[0, 7, 7, 9]], np.uint8), 3, 0)[..., None] * np.array([1, 0, 0], np.uint8)
    ).save(folder / "p/x.png")
    whole = dict(
        images=[
            dict(id=5, file_name="x.jpg", width=4, height=3),
            dict(id=6, file_name="y.jpg", width=2, height=2),
        ],
        categories=[dict(id=17, name="cat"), dict(id=3, name="dog")],
        annotations=[
            dict(
                image_id=5,
                file_name="x.png",
                segments_info=[dict(id=7, category_id=17), dict(id=9, category_id=3)],
            )
        ],
    )
    return stored(folder / "p.json", whole | changes)


def test_panoptic_with_gaps(tmp_path):
    """0 is what has no label, and a picture without an annotation is all of it;
    neither has a category in COCO's own files.
    """
    found = load_panoptic(panoptic_file(tmp_path))
    assert (
        found["x.jpg"].names == ("dog", "cat", "background")
        and found["x.jpg"].labels[0].tolist() == [2, 1, 1, 0]
        and (found["y.jpg"].labels == 2).all()
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(images=[dict(id=5, file_name="x.jpg", width=4, height=4)]),
            r"x\.png has 3 x 4 pixels, but its image has 4 x 4",
        ),
        (dict(images=[dict(id=1, file_name="x.jpg")]), "annotation 0 belongs to image 5, which"),
        (
            dict(
                annotations=[dict(image_id=5, file_name="x.png", segments_info=[dict(id=7, category_id=17)])]
            ),
            "segment 9 has no category",
        ),
        (
            dict(
                annotations=[dict(image_id=5, file_name="x.png", segments_info=[dict(id=7, category_id=99)])]
            ),
            "segment 0 has category 99",
        ),
        (
            dict(annotations=[dict(image_id=5, file_name="x.png", segments_info=None)]),
            "annotation 0 has no 'segments_info'",
        ),
        (
            dict(annotations=[dict(image_id=5, file_name=None, segments_info=[])]),
            "annotation 0 has no 'file_name'",
        ),
        (
            dict(annotations=[dict(image_id=5, file_name="none.png", segments_info=[])]),
            "none.png is not a readable PNG",
        ),
        (
            dict(
                annotations=[
                    dict(
                        image_id=5,
                        file_name="x.png",
                        segments_info=[dict(id=7, category_id=17), dict(id=9, category_id=3)],
                    )
                ]
                * 2
            ),
            "annotation 1 is the second one",
        ),
        (dict(annotations=[3]), "annotation 0 is '3', not an object"),
    ],
)
def test_panoptic_contradictions_are_named(changes, message, tmp_path):
    with pytest.raises(SegmentationError, match=message):
        load_panoptic(panoptic_file(tmp_path, **changes))


# labelme. Its reader joins `imagePath` to the folder of the JSON file, wants `imageData` or that picture, and
# since version 6 refuses sizes that differ.


def opens_in_labelme(path):
    "What labelme 5 and 6 demand of a file, and the picture that they will show."
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert {
        "version",
        "flags",
        "shapes",
        "imagePath",
        "imageData",
        "imageHeight",
        "imageWidth",
    } <= whole.keys() and "\\" not in whole["imagePath"]
    for shape in whole["shapes"]:
        assert (
            isinstance(shape["label"], str)
            and isinstance(shape["shape_type"], str)
            and isinstance(shape["flags"], dict)
            and shape["group_id"] is None
        )
        assert len(shape["points"]) > 2 and all(
            len(p) == 2 and all(isinstance(v, float) for v in p) for p in shape["points"]
        )
    picture = (
        io.BytesIO(base64.b64decode(whole["imageData"]))
        if whole["imageData"]
        else path.parent / whole["imagePath"]
    )
    with Image.open(picture) as image:
        assert image.size == (whole["imageWidth"], whole["imageHeight"])
    return whole


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((31, 43, 3), 90, np.uint8)).save(tmp_path / "photos/ä b.jpg")
    return tmp_path / "photos/ä b.jpg"


@pytest.mark.parametrize("place", ["photos", "out", "out/deep", "link"])
def test_labelme_files_open_wherever_they_lie(place, photo, tmp_path, monkeypatch):
    (tmp_path / "elsewhere/far").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/far")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for image in (photo, photo.relative_to(tmp_path), str(photo)):
        path = save_as(MAPS[0], tmp_path / place / "ä b", "labelme", image)
        whole = opens_in_labelme(path)
        assert (
            path.name == "ä b.json"
            and whole["imageData"] is None
            and os.path.samefile(path.parent / whole["imagePath"], photo)
        )
        same(load_labelme(path), MAPS[0])


def test_labelme_takes_the_picture_along(photo, tmp_path):
    "A picture that is no file, or is to be sent with its labels."
    result = Segmentation(MAPS[0].labels, NAMES, image=photo)
    save_labelme(result, tmp_path / "a.json")
    assert opens_in_labelme(tmp_path / "a.json")["imagePath"] == "a.jpg"
    save_labelme(result, tmp_path / "b.json", photo, embed=True)
    assert opens_in_labelme(tmp_path / "b.json")["imagePath"] == "photos/ä b.jpg"
    save_labelme(result, tmp_path / "c.json", "gone.jpg")
    assert opens_in_labelme(tmp_path / "c.json")["imagePath"] == "gone.jpg"
    same(load_labelme(tmp_path / "c.json"), MAPS[0])
    with pytest.raises(SegmentationError, match="no image to put inside"):
        save_labelme(MAPS[0], tmp_path / "d.json", photo, embed=True)


def test_labelme_files_drawn_by_hand_stay(photo, tmp_path):
    "`x.json` is also where labelme keeps what a person drew."
    own = tmp_path / "photos/ä b.json"
    own.write_text(
        json.dumps(
            dict(shapes=[dict(label="mine", points=[[0, 0], [1, 0], [1, 1]])], imageHeight=31, imageWidth=43)
        )
    )
    before = own.read_bytes()
    with pytest.raises(SegmentationError, match="not written here, or were edited"):
        save_as(MAPS[0], own.with_suffix(""), "labelme", photo)
    assert own.read_bytes() == before
    save_labelme(MAPS[0], tmp_path / "x.json", photo)
    save_labelme(MAPS[0], tmp_path / "x.json", photo)
    edited = json.loads((tmp_path / "x.json").read_text())
    edited["shapes"][0]["label"] = "dog"
    (tmp_path / "x.json").write_text(json.dumps(edited))
    with pytest.raises(SegmentationError, match="edited since"):
        save_labelme(MAPS[0], tmp_path / "x.json", photo)


def labelme_file(shapes=(), **changes):
    return (
        dict(
            version="5.5.0",
            flags={},
            shapes=list(shapes),
            imagePath="x.jpg",
            imageData=None,
            imageHeight=6,
            imageWidth=8,
        )
        | changes
    )


SQUARE = dict(label="cat", points=[[1, 1], [3, 1], [3, 3], [1, 3]])


@pytest.mark.parametrize(
    "shape, pixels",
    [
        (SQUARE, 9),
        (SQUARE | dict(shape_type=None, group_id=None, flags=None), 9),
        (SQUARE | dict(shape_type="polygon"), 9),
        (dict(label="cat", shape_type="rectangle", points=[[3, 3], [1, 1]]), 9),
        (SQUARE | dict(shape_type="oriented_rectangle"), 9),
        (SQUARE | dict(shape_type="rectangle"), 9),  # with four corners, as X-AnyLabeling writes it
        (SQUARE | dict(points=[[-9, 1], [3, 1], [3, 3], [-9, 3]]), 12),
    ],
)
def test_labelme_shapes(shape, pixels, tmp_path):
    "Without `shape_type` it is a polygon, as labelme has it; what reaches out of the picture is cut."
    found = load_labelme(stored(tmp_path / "x.json", labelme_file([shape])))
    assert found.names == ("background", "cat") and found.mask("cat").sum() == pixels
    assert load_labelme(stored(tmp_path / "x.json", labelme_file())).names == ("background",)


def test_labelme_masks(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.array([[1, 0], [1, 1], [0, 1]], bool)).save(file, "PNG")
    shape = dict(
        label="cat",
        shape_type="mask",
        points=[[5, 2], [6, 4]],
        mask=base64.b64encode(file.getvalue()).decode(),
    )
    found = load_labelme(stored(tmp_path / "x.json", labelme_file([shape]))).mask("cat")
    assert found[2:5, 5:7].tolist() == [[True, False], [True, True], [False, True]] and found.sum() == 4
    for wrong in (None, "!", "aaaa", 7):
        with pytest.raises(SegmentationError, match="shape 0"):
            load_labelme(stored(tmp_path / "x.json", labelme_file([shape | dict(mask=wrong)])))


def test_labelme_with_an_empty_picture(tmp_path):
    "labelme takes an empty text for none; what is no image is named without Python's words."
    assert (
        load_labelme(stored(tmp_path / "x.json", labelme_file([SQUARE], imageData=""))).mask("cat").sum() == 9
    )
    with pytest.raises(SegmentationError, match="'imageData' is no image") as e:
        load_labelme(stored(tmp_path / "x.json", labelme_file([SQUARE], imageData="aaaa")))
    assert "BytesIO" not in str(e.value)


def test_labelme_without_a_size_looks_at_the_picture(photo, tmp_path):
    "Also with a path of Windows, and with a picture inside; a size that is not the picture's is refused."
    for changes in (
        dict(imagePath="photos\\ä b.jpg"),
        dict(imageData=base64.b64encode(photo.read_bytes()).decode()),
        dict(imagePath="photos/ä b.jpg", imageHeight=31, imageWidth=43),
    ):
        content = labelme_file([SQUARE], imageHeight=None, imageWidth=None) | changes
        assert load_labelme(stored(tmp_path / "x.json", content)).labels.shape == (31, 43)
        with pytest.raises(SegmentationError, match="its image has 31 x 43"):
            load_labelme(stored(tmp_path / "x.json", content | dict(imageHeight=6, imageWidth=8)))
    with pytest.raises(SegmentationError, match="no 'imageHeight', and its image is not there"):
        load_labelme(stored(tmp_path / "x.json", labelme_file([SQUARE], imageHeight=None)))


@pytest.mark.parametrize(
    "content, message",
    [
        (labelme_file([SQUARE | dict(label=None)]), "shape 0 has no 'label'"),
        (labelme_file([SQUARE | dict(label=3)]), "shape 0: 'label' is '3'"),
        (labelme_file([SQUARE | dict(points=None)]), "shape 0 has no 'points'"),
        (labelme_file([SQUARE | dict(points=[[1, 1], [2, None], [3, 3]])]), "points"),
        (labelme_file([SQUARE | dict(points=[[1, 1], [2], [3, 3]])]), "not a list of"),
        (labelme_file([SQUARE | dict(points=[[1, 1], [2, 2]])]), "a polygon of 2 points"),
        (labelme_file([SQUARE | dict(points=[[1, 1], [2e9, 2], [3, 3]])]), "far outside"),
        (labelme_file([SQUARE | dict(points=[])]), "a polygon of 0 points"),
        (labelme_file([SQUARE | dict(shape_type="circle")]), "a circle of 4 points is not read"),
        (labelme_file([SQUARE | dict(shape_type=5)]), "'shape_type' is '5'"),
        (labelme_file([None]), "shape 0 is 'None', not an object"),
        (labelme_file(shapes=[], imageHeight="6"), "'imageHeight' is '6'"),
        (labelme_file(imageData="%%%"), "x.json"),
        (labelme_file() | dict(shapes=None), "no 'shapes'"),
        (labelme_file([SQUARE], ovss_nb=dict(names=None)), "'ovss_nb' has no 'names'"),
    ],
)
def test_labelme_contradictions_are_named(content, message, tmp_path):
    with pytest.raises(SegmentationError, match=message) as e:
        load_labelme(stored(tmp_path / "x.json", content))
    assert "x.json" in str(e.value)


def test_background_of_labelme(tmp_path):
    "labelme's own exporter calls it `_background_`."
    shapes = [dict(label="_background_", points=[[0, 0], [1, 0], [1, 1]]), SQUARE]
    found = load_labelme(stored(tmp_path / "x.json", labelme_file(shapes)))
    assert found.names == ("_background_", "cat") and found.mask("_background_").sum() == 48 - 9


# Any valid file with something missing, nulled or of another kind is either read or refused by name.

WEIRD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1.5,
        3.0,
        1e308,
        float("nan"),
        float("inf"),
        10**30,
        "",
        "x",
        "7",
        [],
        [None],
        [[]],
        [[1, 2]],
        {},
        {"id": 1},
        {"size": [4, 6], "counts": [24]},
    ]
)


def places(content, path=()):
    "The ways to all entries of a JSON value."
    if path:
        yield path
    for key, value in (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    ):
        yield from places(value, (*path, key))


@st.composite
def spoilt(draw, content):
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        ways = list(places(content))
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        holder = content
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["drop", "change", "double"]))
        if action == "drop":
            del holder[last]
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[last] = copy.deepcopy(draw(WEIRD))
    return content


def read_or_refuse(read, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read(path)
        except SegmentationError as e:
            assert path.name in str(e) or path.with_suffix("").name in str(e)
            return
    for result in found.values() if isinstance(found, dict) else [found]:
        assert isinstance(result, Segmentation)


@pytest.mark.parametrize("name", ["coco", "own coco", "panoptic", "labelme", "own labelme", "geojson"])
def test_spoilt_files_are_read_or_refused(name, tmp_path):
    small = Segmentation(np.array([[0, 1, 1], [0, 2, 1]]), ["background", "cat", "dog"])
    if "labelme" in name or name == "geojson":
        pytest.importorskip("rasterio", reason="needs the extra `geo`")
    path, read = (
        tmp_path / "x.json",
        dict(panoptic=load_panoptic, geojson=load_geojson).get(
            name, load_labelme if "labelme" in name else load_coco
        ),
    )
    if name == "own coco":
        save_coco({"a.jpg": small}, path)
    elif name == "own labelme":
        save_labelme(small, path, "a.jpg")
    elif name == "geojson":
        save_geojson(small, path)
    elif name == "panoptic":
        path = panoptic_file(tmp_path)
    content = (
        json.loads(path.read_text())
        if path.exists()
        else (
            coco_file()
            if name == "coco"
            else labelme_file([SQUARE, SQUARE | dict(shape_type="rectangle", points=[[1, 1], [2, 2]])])
        )
    )

    @settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(spoilt(content))
    def check(changed):
        read_or_refuse(read, stored(path, changed))

    check()


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_spoilt_scores_are_refused(suffix, tmp_path):
    "Flipped and cut bytes; and an archive that holds other things."
    path = tmp_path / f"x.{suffix}"
    save_scores(Segmentation(MAPS[0].labels, NAMES, scores=np.zeros((4, 3, 5), np.float16)), path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for n in range(150):
        data = bytearray(whole)
        if n % 3 == 0:
            del data[int(rng.integers(len(data))) :]
        else:
            data[int(rng.integers(min(len(data), 400)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        read_or_refuse(load_scores, path)
    for names in ("null", "[1, 2]", "{}", "[]", '"a"', "["):
        np.savez(
            tmp_path / "y.npz",
            names=np.array(names),
            labels=np.zeros((2, 2), int),
            palette=np.zeros((2, 3), int),
        )
        with pytest.raises(SegmentationError, match="y.npz"):
            load_scores(tmp_path / "y.npz")
