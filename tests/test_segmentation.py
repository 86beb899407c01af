"The result type: checks of its parts, round trips through PNG and COCO, and the overlay."

import json, os, subprocess, sys, warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco_mask

from ovss_nb.core.segmentation import Segmentation, SegmentationError, default_palette

PHOTOS = Path(skimage.__file__).parent / "data"


def random_segmentation(count, height=23, width=31, seed=0, names=None):
    rng = np.random.default_rng(seed)
    return Segmentation(
        rng.integers(0, count, (height, width)), names or [f"class {k}" for k in range(count)]
    )


@pytest.mark.parametrize(
    "labels, names, words",
    [
        ([[0, 2]], ["a", "b"], "span 0..2, but 2 names"),
        ([[-1, 0]], ["a", "b"], "span -1..0"),
        ([[0.0, 1.0]], ["a", "b"], "astype"),
        ([[True]], ["a", "b"], "integers"),
        ([0, 1], ["a", "b"], "H x W"),
        (np.zeros((0, 4), int), ["a"], "non-empty"),
        ([[0]], [], "at least one"),
        ([[0]], ["a", " "], "not a name"),
        ([[0]], ["a", 3], "not a name"),
        ([[0]], ["a", "b", "a"], "'a' occurs 2 times"),
        ([[0]], "cat", "list of names"),
    ],
)
def test_unfit_labels_and_names(labels, names, words):
    with pytest.raises(SegmentationError, match=words):
        Segmentation(np.asarray(labels), names)


def test_unfit_palette_scores_image():
    labels, names = np.array([[0, 1]]), ["a", "b"]
    for palette in (
        np.zeros((3, 3), int),
        np.full((2, 3), 256),
        np.full((2, 3), -1),
        np.zeros((2, 3)),
        [1, 2, 3],
    ):
        with pytest.raises(SegmentationError, match="palette must be 2 x 3"):
            Segmentation(labels, names, palette=palette)
    for scores in (np.zeros((3, 4, 4)), np.zeros((2, 4))):
        with pytest.raises(SegmentationError, match="K = 2"):
            Segmentation(labels, names, scores=scores)
    with pytest.raises(SegmentationError, match="resize"):
        Segmentation(labels, names, image=np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(SegmentationError, match="resize"):
        Segmentation(labels, names).overlay(PHOTOS / "chelsea.png")


def test_parts_are_kept():
    scores = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    seg = Segmentation(
        np.array([[0, 1]], np.uint8),
        ["b", "a"],
        palette=[[1, 2, 3], [4, 5, 6]],
        scores=scores,
        image=np.zeros((1, 2), np.uint8),
    )
    assert (
        seg.labels.dtype == np.int32
        and seg.names == ("b", "a")
        and seg.palette.tolist() == [[1, 2, 3], [4, 5, 6]]
        and seg.scores is scores
    )
    assert seg.image.shape == (1, 2, 3)
    tensor = Segmentation(torch.tensor([[0, 1]]), ["b", "a"], scores=torch.zeros(2, 4, 4, requires_grad=True))
    assert (tensor.labels == seg.labels).all() and isinstance(tensor.scores, np.ndarray)


def test_mask_areas_repr():
    seg = Segmentation([[0, 0, 0, 2]], ["sky", "Tree", "cow"])
    assert seg.mask("cow").tolist() == [[False, False, False, True]] and not seg.mask("Tree").any()
    assert seg.areas() == {"sky": 0.75, "Tree": 0.0, "cow": 0.25}
    with pytest.raises(ValueError, match="did you mean 'Tree'"):
        seg.mask("Trees")
    with pytest.raises(ValueError, match="sky, Tree, cow"):
        seg.mask("qqqqq")
    assert repr(seg) == "Segmentation(1 x 4: sky 75 %, cow 25 %)"
    assert repr(random_segmentation(300)).endswith("more)") and len(repr(random_segmentation(300))) < 150


def test_default_palette():
    names = [f"class {k}" for k in range(847)]
    palette = default_palette(names)
    assert len(np.unique(palette, axis=0)) == 847 and (palette.sum(1) > 0).all()
    # a prefix: colors do not depend on how many names follow
    assert (default_palette(names[:20]) == palette[:20]).all()
    with_ground = default_palette(["background", *names[:20]])
    assert (with_ground[0] == 0).all() and (with_ground[1:] == palette[:20]).all()
    # the same in another process, whatever its hash seed
    code = (
        "from ovss_nb.core.segmentation import default_palette;"
        " print(default_palette(list('abcdefgh')).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    ).stdout
    assert json.loads(out) == palette[:8].tolist()
    assert default_palette(names * 4).shape == (4 * 847, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 255, 256, 257, 847])
def test_png_round_trip(tmp_path, count):
    names = [f"class {k}" for k in range(count - 1)] + ['q"ü,\n猫']
    seg = random_segmentation(count, names=names)
    seg.palette = np.random.default_rng(1).integers(0, 256, (count, 3)).astype(np.uint8)
    seg.save_png(tmp_path / "labels.png")
    got = Segmentation.from_png(tmp_path / "labels.png")
    assert (got.labels == seg.labels).all() and got.names == seg.names and (got.palette == seg.palette).all()
    with Image.open(tmp_path / "labels.png") as image:  # and it is what other programs expect
        assert image.mode == "P" if count <= 256 else image.mode.startswith("I")
        assert (np.asarray(image) == seg.labels).all()
        if count <= 256:
            assert (np.asarray(image.convert("RGB")) == seg.palette[seg.labels]).all()
    assert len(list(tmp_path.iterdir())) == 1


def test_png_with_unused_last_classes(tmp_path):
    seg = Segmentation(np.zeros((2, 2), int), [f"class {k}" for k in range(200)])
    seg.save_png(tmp_path / "a.png")
    assert Segmentation.from_png(tmp_path / "a.png").names == seg.names


def test_png_refusals(tmp_path):
    with pytest.raises(SegmentationError, match="not a readable PNG"):
        Segmentation.from_png(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(SegmentationError, match="not a readable PNG"):
        Segmentation.from_png(tmp_path / "text.png")
    with pytest.raises(SegmentationError, match="not a label map"):
        Segmentation.from_png(PHOTOS / "coffee.png")
    random_segmentation(5).save_png(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    with pytest.raises(SegmentationError):
        Segmentation.from_png(tmp_path / "cut.png")
    for text in (
        "{",
        "[]",
        '{"names": ["a"]}',
        '{"names": ["a"], "palette": [[0, 0, 0]]}',
        '{"names": 3, "palette": 3}',
    ):
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text("ovss_nb", text)
        image = Image.fromarray(np.array([[0, 1]], np.uint8))
        image.putpalette([0] * 6)
        image.save(tmp_path / "odd.png", pnginfo=chunk)
        with pytest.raises(SegmentationError, match="do not fit"):
            Segmentation.from_png(tmp_path / "odd.png")
    many = Segmentation(np.zeros((1, 1), int), [str(k) for k in range(65537)])
    with pytest.raises(SegmentationError, match="65536"):
        many.save_png(tmp_path / "many.png")


@pytest.mark.parametrize("count", [1, 2, 30])
def test_coco_round_trip(count):
    seg = random_segmentation(count)
    annotations = json.loads(json.dumps(seg.to_coco(image_id=42)))
    assert (Segmentation.from_coco(annotations, seg.names).labels == seg.labels).all()
    for annotation in annotations:
        mask, name = seg.mask(annotation["category_name"]), annotation["category_name"]
        ys, xs = np.nonzero(mask)
        assert annotation["category_id"] == seg.names.index(name) + 1 and annotation["image_id"] == 42
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert isinstance(annotation["segmentation"]["counts"], str) and annotation["segmentation"][
            "size"
        ] == [23, 31]
        assert (coco_mask.decode(annotation["segmentation"]) == mask).all()
    ids_only = [{k: v for k, v in a.items() if k != "category_name"} for a in annotations]
    assert (Segmentation.from_coco(ids_only, seg.names).labels == seg.labels).all()


def test_coco_only_present_classes_and_background():
    seg = Segmentation([[0, 2], [2, 2]], ["cat", "dog", "background"])
    annotations = seg.to_coco()
    assert [a["category_name"] for a in annotations] == ["cat", "background"]
    assert (Segmentation.from_coco(annotations[:1], seg.names).labels == seg.labels).all()
    with pytest.raises(SegmentationError, match="3 pixels have no annotation"):
        Segmentation.from_coco(annotations[:1], ["cat", "dog"])
    # later annotations lie on top
    everything = Segmentation([[1, 1], [1, 1]], seg.names).to_coco()
    assert Segmentation.from_coco(everything + annotations[:1], seg.names).labels.tolist() == [[0, 1], [1, 1]]


def test_coco_refusals():
    names, (good,) = ["a", "b"], Segmentation([[0, 0, 0]], ["a"]).to_coco()
    rle = good["segmentation"]
    for change, words in [
        ({"category_name": "c"}, "'c' is not among"),
        ({"category_name": None, "category_id": 9}, "9 is not among"),
        ({"segmentation": [[0, 0, 1, 1, 2, 2]]}, "polygons"),
        ({"segmentation": rle | {"counts": [0, 2]}}, "broken"),
        ({"category_id": None, "category_name": None}, "None is not among"),
        ({"segmentation": None}, "no RLE"),
        ({"segmentation": rle | {"size": None}}, "broken"),
        ({"segmentation": rle | {"counts": None}}, "broken"),
        ({"category_id": "1", "category_name": None}, "'1' is not among"),
        ({"segmentation": rle | {"counts": "zzzzzzz"}}, "broken"),
        ({"segmentation": rle | {"counts": ""}}, "broken"),
        ({"segmentation": rle | {"size": [50, 50]}}, "broken"),
        ({"segmentation": rle | {"counts": "é"}}, "broken"),
        ({"segmentation": {"counts": "0"}}, "broken"),
    ]:
        with pytest.raises(SegmentationError, match=words):
            Segmentation.from_coco([good | change], names)
    with pytest.raises(SegmentationError, match="at least one"):
        Segmentation.from_coco([], names)
    with pytest.raises(SegmentationError, match="not an object"):
        Segmentation.from_coco([None], names)
    # a list of counts, as crowds have it, or what pycocotools has in memory
    for same in ({"counts": [0, 3]}, {"counts": rle["counts"].encode()}, {"size": [1.0, 3]}):
        assert (
            Segmentation.from_coco([good | {"segmentation": rle | same, "category_id": 1.0}], names).labels
            == 0
        ).all()
    with pytest.raises(SegmentationError, match="one image at a time"):
        Segmentation.from_coco([good, *Segmentation([[0]], ["a"]).to_coco()], names)


def test_overlay_blend_and_outline():
    photo = np.full((6, 8, 3), 100, np.uint8)
    labels = np.zeros((6, 8), int)
    labels[:, 4:] = 1
    seg = Segmentation(labels, ["a", "b"], palette=[[200, 0, 0], [0, 50, 100]], image=photo)
    plain = np.asarray(seg.overlay(outline=False, legend=False))
    assert (plain[:, :4] == [150, 50, 50]).all() and (plain[:, 4:] == [50, 75, 100]).all()
    lined = np.asarray(seg.overlay(legend=False))
    assert (lined[:, 4] == 255).all() and (np.delete(lined, 4, 1) == np.delete(plain, 4, 1)).all()
    assert (np.asarray(seg.overlay(opacity=0.25, outline=False, legend=False))[0, 0] == [125, 75, 75]).all()
    other = Segmentation(labels, ["a", "b"], palette=seg.palette).overlay(photo, outline=False, legend=False)
    assert (np.asarray(other) == plain).all()
    assert (
        np.asarray(Segmentation(labels, ["a", "b"], palette=seg.palette).overlay(outline=False, legend=False))
        == seg.palette[labels]
    ).all()
    assert (seg.image == 100).all()  # the photo itself is not drawn on
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(SegmentationError, match="opacity"):
            seg.overlay(opacity=opacity)


def test_legend_shows_only_what_is_there():
    labels = np.zeros((40, 400), int)
    labels[:, 100:] = 2
    seg = Segmentation(labels, ["a", "b", "c"])
    strip = np.asarray(seg.overlay())[40:].reshape(-1, 3)
    shown = [(strip == color).all(1).sum() for color in seg.palette]
    assert shown[0] > 50 and shown[2] > 50 and shown[1] == 0
    # names too long, too many, of several lines, and of letters that the font lacks
    for names in (["x" * 200], [f"class number {k}" for k in range(150)], ["two\nlines", "猫"]):
        picture = random_segmentation(len(names), names=names).overlay()
        assert picture.width >= 31 and picture.height > 23


def test_repr_is_small_and_complete():
    seg = random_segmentation(4, 3000, 2000)
    with Image.open(BytesIO(seg._repr_jpeg_())) as image:
        assert image.format == "JPEG" and image.width <= 1024 and image.height < 1200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Image.open(BytesIO(random_segmentation(4)._repr_jpeg_())).width >= 31


def test_ground_floor_has_no_torch():
    code = (
        "import sys, ovss_nb.core.images, ovss_nb.core.cache, ovss_nb.core.segmentation; assert not {'torch',"
        " 'nbdev', 'matplotlib', 'skimage'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("how", ["path", "opened", "by a system"])
def test_a_photo_is_never_written_over(tmp_path, how):
    "By the file, a link to it, or an image that was opened; labels may replace labels."
    from doubles import Colors
    from ovss_nb.core.files import OverwriteError
    from ovss_nb.systems.maskclip import MaskCLIP

    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(60, 250, (48, 48, 3), np.uint8)).save(path)
    (tmp_path / "link.png").symlink_to(path)
    before = path.read_bytes()
    if how == "by a system":
        result = MaskCLIP(Colors(), size=48).segment(path, ["red", "green"])
    else:
        result = Segmentation(
            np.zeros((48, 48), int), ["red", "green"], image=path if how == "path" else Image.open(path)
        )
    for out in (path, tmp_path / "link.png", str(tmp_path / "." / "photo.png")):
        with pytest.raises(OverwriteError):
            result.save_png(out)
    from ovss_nb.core.formats import save_coco, save_panoptic, save_scores

    with pytest.raises(OverwriteError):
        save_coco({"photo.png": result}, path)
    # whose folder is that of the photo
    with pytest.raises(OverwriteError):
        save_panoptic({"photo.png": result}, tmp_path.with_suffix(".json"))
    os.link(path, tmp_path / "photo.npz")
    with pytest.raises(OverwriteError):
        save_scores(result, tmp_path / "photo.npz")
    assert path.read_bytes() == before and not tmp_path.with_suffix(".json").exists()
    result.save_png(tmp_path / "labels.png")
    Segmentation.from_png(tmp_path / "labels.png").save_png(tmp_path / "labels.png")
