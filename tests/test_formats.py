"Label maps through files of other tools, read by those tools' own libraries where there are any."
import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from ovss_nb.formats import FORMATS, load_coco, load_geojson, load_labelme, load_panoptic, load_scores, polygons, save_as, save_coco, save_geojson, save_labelme, save_panoptic, save_scores
from ovss_nb.segmentation import Segmentation, SegmentationError

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


MAPS = [nested(0), *map(noise, range(6)), Segmentation(np.ones((5, 7), int), NAMES), Segmentation(np.array([[2]]), NAMES)]


def same(a, b): assert (a.labels == b.labels).all() and a.names == b.names and (a.palette == b.palette).all()


@pytest.mark.parametrize("number", range(len(MAPS)))
def test_every_format_gives_the_map_back(number, tmp_path):
    result = MAPS[number]
    readers = dict(png=Segmentation.from_png, geojson=load_geojson, labelme=load_labelme, safetensors=load_scores, npz=load_scores,
                   coco=lambda o: load_coco(o)["a.jpg"], panoptic=lambda o: load_panoptic(o)["a.jpg"])
    assert set(readers) == set(FORMATS)
    for name, read in readers.items(): same(read(save_as(result, tmp_path/"a", name, "a.jpg")), result)


def test_pycocotools_reads_all_pictures(tmp_path):
    from pycocotools.coco import COCO
    results = {f"{i}.png": o for i, o in enumerate(MAPS)}
    save_coco(results, tmp_path/"coco.json")
    with contextlib.redirect_stdout(io.StringIO()): coco = COCO(tmp_path/"coco.json")
    assert len(coco.imgs) == len(MAPS) and [o["name"] for o in coco.loadCats(coco.getCatIds())] == NAMES
    for number, result in enumerate(MAPS, 1):
        labels = np.full(result.labels.shape, -1)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[number])):
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.sum() == annotation["area"] and (labels[mask] == -1).all()
            labels[mask] = annotation["category_id"] - 1
        assert (labels == result.labels).all()


def test_panoptic_as_the_specification_says(tmp_path):
    "Numbers by R + 256 G + 65536 B, one record for each, with area and box; many classes need the second byte."
    names = ["background", *(f"class {i}" for i in range(600))]
    many = Segmentation(np.random.default_rng(0).integers(0, 601, (40, 50)), names)
    save_panoptic({"photo.jpg": many}, tmp_path/"panoptic.json")
    stored = json.loads((tmp_path/"panoptic.json").read_text())
    annotation, = stored["annotations"]
    rgb = np.asarray(Image.open(tmp_path/"panoptic"/annotation["file_name"])).astype(int)
    ids = rgb[..., 0] + 256*rgb[..., 1] + 256**2*rgb[..., 2]
    categories = {o["id"]: o["name"] for o in stored["categories"]}
    assert {o["id"] for o in annotation["segments_info"]} == set(np.unique(ids)) and 0 not in ids
    for o in annotation["segments_info"]:
        rows, columns = np.nonzero(ids == o["id"])
        assert o["area"] == len(rows) and o["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert (many.labels[rows, columns] == names.index(categories[o["category_id"]])).all()
    same(load_panoptic(tmp_path/"panoptic.json")["photo.jpg"], many)


def test_panoptic_of_others(tmp_path):
    "Instances become their class, 0 becomes background, and what has no category is refused."
    (tmp_path/"p").mkdir()
    rgb = np.zeros((4, 6, 3), np.uint8); rgb[:, 2:4, 1] = 7; rgb[:, 4:, 2] = 9
    Image.fromarray(rgb).save(tmp_path/"p/x.png")
    stored = dict(images=[dict(id=5, file_name="x.jpg", width=6, height=4)], categories=[dict(id=17, name="cat", isthing=1), dict(id=3, name="background")],
        annotations=[dict(image_id=5, file_name="x.png", segments_info=[dict(id=7*256, category_id=17), dict(id=9*65536, category_id=17)])])
    (tmp_path/"p.json").write_text(json.dumps(stored))
    found = load_panoptic(tmp_path/"p.json")["x.jpg"]
    assert found.names == ("background", "cat") and found.mask("cat").sum() == 16
    stored["annotations"][0]["segments_info"].pop()
    (tmp_path/"p.json").write_text(json.dumps(stored))
    with pytest.raises(SegmentationError, match="has no category"): load_panoptic(tmp_path/"p.json")


@pytest.mark.parametrize("number", range(len(MAPS)))
def test_shapely_and_geojson_accept_the_polygons(number, tmp_path):
    "Every geometry is valid, covers as many pixels as its class has, and the centres of its pixels alone."
    geojson, shapely = pytest.importorskip("geojson", reason="needs geojson"), pytest.importorskip("shapely", reason="needs shapely")
    result = MAPS[number]
    save_geojson(result, tmp_path/"a.geojson")
    collection = geojson.loads((tmp_path/"a.geojson").read_text())
    assert collection.is_valid, collection.errors()
    y, x = (o.ravel() + 0.5 for o in np.indices(result.labels.shape))
    for feature in collection["features"]:
        shape, k = shapely.geometry.shape(feature["geometry"]), feature["properties"]["class"]
        assert shape.is_valid and shape.area == (result.labels == k).sum() == feature["properties"]["pixels"]
        assert (shapely.contains_xy(shape, x, y).reshape(result.labels.shape) == (result.labels == k)).all()


def test_geojson_lies_where_it_should(tmp_path):
    pytest.importorskip("rasterio", reason="needs the extra `geo`")
    from rasterio.transform import from_origin
    place = from_origin(513000, 5402000, 0.2, 0.2)
    save_geojson(MAPS[0], tmp_path/"a.geojson", place, "EPSG:32632")
    stored = json.loads((tmp_path/"a.geojson").read_text())
    points = np.array(stored["features"][0]["geometry"]["coordinates"][0][0])
    assert np.allclose(points.min(0), [513000, 5402000 - 31*0.2]) and np.allclose(points.max(0), [513000 + 43*0.2, 5402000])
    same(load_geojson(tmp_path/"a.geojson"), MAPS[0])
    stored["features"] = stored["features"][1:]   # whoever deletes the background gets it back
    (tmp_path/"a.geojson").write_text(json.dumps(stored))
    same(load_geojson(tmp_path/"a.geojson"), MAPS[0])
    stored["features"][0]["properties"]["name"] = "cow"
    (tmp_path/"a.geojson").write_text(json.dumps(stored))
    with pytest.raises(SegmentationError, match="no class 'cow'"): load_geojson(tmp_path/"a.geojson")


def test_labelme_paints_the_same_map(tmp_path):
    "By labelme's own function; it needs a graphical toolkit, so it is no part of the development environment."
    labelme = pytest.importorskip("labelme.utils", reason="labelme is not installed: pip install labelme")
    from labelme import LabelFile
    for result in MAPS:
        Image.fromarray(np.zeros((*result.labels.shape, 3), np.uint8)).save(tmp_path/"a.png")
        save_labelme(result, tmp_path/"a.json", "a.png")
        shapes = LabelFile(str(tmp_path/"a.json")).shapes
        found, _ = labelme.shapes_to_label(result.labels.shape, shapes, {name: k for k, name in enumerate(NAMES)})
        assert (found == result.labels).all()


def test_polygons_keep_holes_and_parts():
    parts = polygons(MAPS[0])
    assert sum(k == 1 for k, _ in parts) == 3 and sorted(len(rings) for k, rings in parts if k == 1) == [1, 2, 2]


@pytest.mark.parametrize("read, content, message", [
    (load_coco, '{"images": []}', "no 'annotations'"), (load_coco, "nonsense", "not a readable COCO"), (load_panoptic, "[]", "no 'images'"),
    (load_geojson, '{"features": []}', "no 'ovss_nb'"), (load_labelme, '{"shapes": [], "imageHeight": 2}', "no 'imageWidth'"),
    (load_labelme, '{"shapes": [{"label": "a", "shape_type": "circle", "points": [[0, 0], [1, 1]]}], "imageHeight": 2, "imageWidth": 2}', "polygon or a rectangle"),
    (load_scores, "nonsense", "holds no scores")])
def test_faulty_files_get_one_message(read, content, message, tmp_path):
    (tmp_path/"x.json").write_text(content)
    with pytest.raises(SegmentationError, match=message): read(tmp_path/"x.json")


def test_scores_keep_their_precision(tmp_path):
    scores = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float16)
    result = Segmentation(MAPS[0].labels, NAMES, scores=scores)
    from safetensors.numpy import load_file
    save_scores(result, tmp_path/"a.safetensors"); save_scores(result, tmp_path/"a.npz")
    assert (load_file(tmp_path/"a.safetensors")["scores"] == scores).all() and (np.load(tmp_path/"a.npz")["scores"] == scores).all()
    for suffix in ("npz", "safetensors"): assert load_scores(tmp_path/f"a.{suffix}").scores.dtype == np.float16
    with pytest.raises(SegmentationError, match="safetensors or .npz"): save_scores(result, tmp_path/"a.txt")


@pytest.mark.parametrize("name", ["_background_", "Background", "bg"])
def test_what_nothing_covers_is_the_background_however_it_is_spelt(name, tmp_path):
    "In COCO, panoptic PNG, labelme and GeoJSON; and accents are equal however they were typed."
    names = ("cafe\u0301", name)
    result = Segmentation(np.array([[0, 0, 1], [0, 0, 1]]), names)
    covered = [o for o in result.to_coco() if o["category_id"] == 1]
    assert (Segmentation.from_coco(covered, [*names]).labels == result.labels).all() and (Segmentation.from_coco(covered, ["café", name]).labels == result.labels).all()
    shape = dict(label="cafe\u0301", points=[[0, 0], [1, 0], [1, 1], [0, 1]], shape_type="polygon", flags={}, group_id=None)
    stored = dict(version="5.5.0", flags={}, shapes=[shape], imagePath="", imageData=None, imageHeight=2, imageWidth=3)
    (tmp_path/"one.json").write_text(json.dumps(stored))
    read = load_labelme(tmp_path/"one.json", ["café", name])
    assert (read.labels == result.labels).all() and read.mask("cafe\u0301").sum() == 4
    (tmp_path/"two.json").write_text(json.dumps(stored | dict(shapes=[shape | dict(label=name, points=[[0, 0], [2, 0], [2, 1], [0, 1]]), shape])))
    assert load_labelme(tmp_path/"two.json").names == (name, "café")   # labelme's own background is the one
    save_panoptic({"a.png": result}, tmp_path/"p.json")
    panoptic = json.loads((tmp_path/"p.json").read_text())
    pixels = np.array(Image.open(tmp_path/"p/a.png")); pixels[:, 2] = 0
    Image.fromarray(pixels).save(tmp_path/"p/a.png")
    assert (load_panoptic(tmp_path/"p.json")["a.png"].labels == result.labels).all() and len(panoptic["categories"]) == 2
