"""The viewer without a browser:
what JavaScript would set is set, and what it would be sent is looked at. A picture of three colors stands
for a photo, so that every label is known.
"""

import base64
import contextlib
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from doubles import Colors
from IPython.core.formatters import DisplayFormatter
from PIL import Image
from pycocotools.coco import COCO

import ovss_nb.app.viewer as viewer_module
from ovss_nb.app.viewer import REFINED, Viewer, app_notebook, read_lines, score_at, serve, write_lines
from ovss_nb.core.optional import MissingExtra
from ovss_nb.core.formats import load_coco
from ovss_nb.components.crf import crf_available
from ovss_nb.core.segmentation import Segmentation
from ovss_nb.core.vocabulary import Vocabulary, VocabularyWarning

pytest.importorskip("anywidget", reason="needs the extra `jupyter`")
WORDS = ["red", "green", "blue"]


class Counting(Colors):
    def __init__(self, name="colors"):
        super().__init__()
        self.name, self.calls = name, 0

    def encode(self, images):
        self.calls += 1
        return super().encode(images)


def stripes(height=60, width=90):
    "Three stripes: red, green, blue."
    return (
        np.eye(3, dtype=np.uint8)[np.minimum(np.arange(width) * 3 // width, 2)][None].repeat(height, 0) * 255
    )


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OVSS_NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def viewer():
    return Viewer(
        stripes(),
        WORDS,
        system="maskclip",
        encoder=Counting(),
        systems=dict(
            simseg=dict(templates="single", size=96), llm_supervised=dict(templates="single", size=96)
        ),
        encoders=(),
        size=96,
    )


def labels(canvas):
    return np.frombuffer(zlib.decompress(canvas.labels), "<u2").reshape(canvas.shape)


def test_the_image_is_encoded_once(viewer, monkeypatch):
    """Words, stages and systems that see alike share the encoded image;
    another encoder and another photo do not.
    """
    encoder, form, other = viewer.systems.encoders["colors"], viewer.form, Counting("others")
    form.classes.value = "red\nrest: green, blue"
    form.apply.click()
    form.system.value = "simseg"
    form.system.value = "llm_supervised"
    form.system.value = "maskclip"
    form.stage.value = "scores"
    form.canvas.point = [5, 5]
    form.canvas.selected_class = "rest"
    assert encoder.calls == 1 and form.canvas.message == "" and viewer.system == "maskclip"
    monkeypatch.setattr(viewer_module, "create_encoder", lambda spec: other)
    viewer.change(encoder="others")
    viewer.change(encoder="colors")
    viewer.change(encoder="others")
    assert (encoder.calls, other.calls) == (1, 1)
    viewer.change(image=stripes(30, 40))
    assert (encoder.calls, other.calls) == (1, 2) and viewer.result.labels.shape == (30, 40)


def test_what_the_browser_gets(viewer):
    canvas = viewer.form.canvas
    assert (labels(canvas) == viewer.result.labels).all() and [
        labels(canvas)[30, x] for x in (15, 45, 75)
    ] == [0, 1, 2]
    assert [(entry["name"], round(entry["share"], 1)) for entry in canvas.classes] == [
        ("red", 0.3),
        ("green", 0.3),
        ("blue", 0.3),
    ]
    assert [tuple(entry["color"]) for entry in canvas.classes] == [
        tuple(color) for color in viewer.result.palette.tolist()
    ]
    photo = np.asarray(Image.open(viewer_module.BytesIO(canvas.image)))
    assert photo.shape == (60, 90, 3) and abs(photo[30, (15, 45, 75)].astype(int) - 255 * np.eye(3)).max() < 8
    shown = np.frombuffer(zlib.decompress(canvas.scores), "<f2").reshape(60, 90)
    assert np.allclose(
        shown,
        [
            [score_at(viewer.result.scores, (60, 90), y, x)[labels(canvas)[y, x]] for x in range(90)]
            for y in range(60)
        ],
        rtol=1e-3,
    )


def test_a_click_is_answered_and_answered_again_after_an_edit(viewer):
    form, canvas = viewer.form, viewer.form.canvas
    canvas.point = [75, 30]
    assert [entry[0] for entry in canvas.explanation["top_scores"]][0] == canvas.explanation[
        "mapped_class"
    ] == "blue" and canvas.explanation["top_scores"][0][2] == 1
    canvas.selected_class = "red"
    assert canvas.explanation["mapped_class"] == "red"
    heat = np.asarray(Image.open(viewer_module.BytesIO(canvas.score_map)))
    assert (
        heat.shape == (60, 90, 3)
        and (heat[30, 2] == viewer_module._RAMP[-1]).all()
        and (heat[30, 87] == viewer_module._RAMP[0]).all()
    )
    canvas.point = [15, 30]
    assert canvas.explanation["mapped_class"] == "red" == canvas.explanation["top_scores"][0][0]
    form.classes.value = "grass: green\nsky: blue"
    form.apply.click()
    assert (
        {entry[0] for entry in canvas.explanation["top_scores"]} == {"grass", "sky"}
        and canvas.explanation["mapped_class"] in ("grass", "sky")
        and canvas.explanation["point"] == [15, 30]
    )
    viewer.change(image=stripes(30, 30))
    assert canvas.explanation == {} and canvas.point == []  # the point belonged to another photo
    with pytest.raises(ValueError, match="outside the photo"):
        viewer.top_scores(30, 0)


def test_classes_stay_hidden_while_words_change(viewer):
    form, canvas = viewer.form, viewer.form.canvas
    canvas.hidden, canvas.opacity = ["blue"], 1.0
    form.classes.value = "sea: blue\nblue\nred"
    form.apply.click()
    assert canvas.hidden == ["blue"] and viewer.hidden == {"blue"}
    shown = np.asarray(viewer.show())[:60, -90:]
    hidden = viewer.result.mask("blue") if viewer.result.areas()["blue"] else viewer.result.labels < 0
    assert (shown[hidden] == viewer.image[hidden]).all() and (shown[30, 2] == viewer.result.palette[2]).all()


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda form: setattr(form.image, "value", "nowhere.jpg"), "nowhere.jpg does not exist"),
        (lambda form: (setattr(form.classes, "value", " \n "), form.apply.click()), "at least one class"),
        (lambda form: (setattr(form.classes, "value", "cat\ncat"), form.apply.click()), "named already"),
        (
            lambda form: (setattr(form.classes, "value", "nowhere.txt"), form.apply.click()),
            "cannot read the vocabulary file",
        ),
        (lambda form: setattr(form.system, "value", "catseg"), "no weights"),
        (lambda form: setattr(form.encoder, "value", "clip"), "say which clip"),
        (lambda form: setattr(form.crf, "value", True), "pip install 'ovss_nb[crf]'"),
    ],
    ids=["photo", "no class", "twice", "no file", "no weights", "no encoder", "missing extra"],
)
def test_an_error_is_one_message_and_nothing_is_lost(act, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    viewer = Viewer(
        stripes(), WORDS, "maskclip", Counting(), systems=dict(catseg={}), encoders=("clip",), size=96
    )
    form, canvas = viewer.form, viewer.form.canvas
    canvas.point, canvas.hidden = [15, 30], ["green"]
    form.stage.value = "scores"
    before = {
        name: getattr(canvas, name)
        for name in ("image", "labels", "classes", "explanation", "score_map", "point", "hidden", "code")
    }
    state = {
        name: vars(viewer)[name] for name in ("image", "vocabulary", "system", "encoder", "crf", "stage")
    }
    act(form)
    typed = form.classes.value, form.image.value
    assert message in canvas.message and "\n" not in canvas.message and not canvas.busy
    assert {name: getattr(canvas, name) for name in before} == before and all(
        vars(viewer)[name] is value for name, value in state.items()
    )
    assert (form.system.value, form.encoder.value, form.crf.value, form.stage.value) == (
        "maskclip",
        "colors",
        False,
        "scores",
    )
    form.stage.value = REFINED
    assert (form.classes.value, form.image.value) == typed and canvas.message == ""  # to be mended
    form.classes.value = "blue\nred"
    form.apply.click()
    assert canvas.message == "" and [entry["name"] for entry in canvas.classes] == ["blue", "red"]


def test_stages_are_shown_as_labels(viewer, monkeypatch):
    monkeypatch.setattr(
        type(viewer.systems.get("maskclip", "colors", False)),
        "stages",
        lambda self, image, text: {
            "upside down": -self.scores(image, text),
            "scores": self.scores(image, text),
        },
    )
    form = viewer.form
    viewer.change(words=["red", "blue"])
    assert form.stage.options == ("upside down", "scores", REFINED) and form.stage.value == REFINED
    right = labels(form.canvas).copy()
    form.stage.value = "upside down"
    assert (
        labels(form.canvas)[30, (5, 85)] == 1 - right[30, (5, 85)]
    ).all() and "upside down" in form.canvas.code
    form.system.value = "simseg"  # which has no such stage
    assert form.stage.value == viewer.stage == REFINED
    with pytest.raises(ValueError, match="no stage 'upside down'"):
        viewer.choose_stage("upside down")


@pytest.mark.skipif(not crf_available(), reason="needs the extra `crf`")
def test_the_crf_is_switched_on_and_off(viewer):
    form, encoder = viewer.form, viewer.systems.encoders["colors"]
    form.crf.value = True
    assert (
        viewer.crf and "refine='crf'" in form.canvas.code and form.canvas.message == "" and encoder.calls == 1
    )
    form.crf.value = False
    assert "refine" not in form.canvas.code


def test_more_than_256_classes(viewer):
    names = [f"red {k}" for k in range(300)] + ["green", "blue"]
    viewer.form.classes.value = "\n".join(names)
    viewer.form.apply.click()
    assert [labels(viewer.form.canvas)[30, x] for x in (45, 75)] == [300, 301] and len(
        viewer.form.canvas.classes
    ) == 302


def test_a_large_image_is_drawn_smaller_and_counted_whole():
    viewer = Viewer(stripes(100, 2500), WORDS, encoder=Counting(), size=96)
    canvas = viewer.form.canvas
    assert (
        canvas.step == 3
        and canvas.shape == [34, 834]
        and labels(canvas).shape == (34, 834)
        and viewer.result.labels.shape == (100, 2500)
    )
    assert (labels(canvas) == viewer.result.labels[::3, ::3]).all() and abs(
        sum(entry["share"] for entry in canvas.classes) - 1
    ) < 1e-9
    canvas.point = [2400, 99]
    assert canvas.explanation["mapped_class"] == "blue" and canvas.explanation["size"] == [2500, 100]


def test_a_class_that_is_switched_off_leaves_no_nan():
    scores = np.array([[[0.5, 1.0]], [[-np.inf, -np.inf]]], np.float32)
    assert np.isfinite(score_at(scores, (4, 9), np.arange(4)[:, None], np.arange(9))).all()
    viewer = Viewer(stripes(), ["red", "blue"], encoder=Counting(), size=96)
    viewer.stages["scores"][1] = -np.inf
    viewer.form.canvas.point = [2, 2]
    json.dumps(viewer.form.canvas.explanation, allow_nan=False)


def test_files_for_the_browser(viewer, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        type(viewer.form.canvas),
        "send",
        lambda self, content, buffers=None: sent.append((content, buffers[0])),
        raising=False,
    )
    viewer.form.png.click()
    viewer.form.coco.click()
    (png, data), (coco, text) = sent
    (tmp_path / png["file"]).write_bytes(data)
    again = Segmentation.from_png(tmp_path / "photo.labels.png")
    assert (again.labels == viewer.result.labels).all() and again.names == viewer.result.names
    assert coco["file"] == "photo.coco.json" and json.loads(text).keys() >= {
        "info",
        "images",
        "annotations",
        "categories",
    }
    (tmp_path / coco["file"]).write_bytes(text)
    assert (load_coco(tmp_path / coco["file"])["photo.png"].labels == viewer.result.labels).all()
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(tmp_path / coco["file"])
    assert [category["name"] for category in theirs.loadCats(theirs.getCatIds())] == WORDS and theirs.imgs[1][
        "width"
    ] == 90
    Image.fromarray(stripes()).save(tmp_path / "a b.jpg")
    viewer.change(image=tmp_path / "a b.jpg")
    viewer.form.coco.click()
    assert (
        sent[-1][0]["file"] == "a b.coco.json"
        and json.loads(sent[-1][1])["images"][0]["file_name"] == "a b.jpg"
    )


def test_an_image_of_twelve_megapixels_stays_small_in_a_notebook(monkeypatch):
    """What is saved with the cell:
    the picture for those without a kernel, and the state of the widgets. Files and clicks are of the whole
    photo.
    """
    rng = np.random.default_rng(0)
    # noise, as a camera has, is what does not compress
    noisy = (stripes(3000, 4000) * 0.8 + rng.normal(0, 8, (3000, 4000, 1))).clip(0, 255).astype(np.uint8)
    viewer = Viewer(noisy, WORDS, encoder=Counting(), encoders=(), size=96)
    form, canvas, sent = viewer.form, viewer.form.canvas, []
    bundle = viewer._repr_mimebundle_()
    canvas.point = [3999, 2999]
    state = sum(
        len(value) for value in (getattr(canvas, name) for name in canvas.keys) if isinstance(value, bytes)
    )
    assert (
        sum(len(value) for value in bundle.values() if isinstance(value, str)) < 1_000_000
        and state < 2_000_000
    ), (
        state,
        {key: len(value) for key, value in bundle.items()},
    )
    assert (
        "image/png" not in bundle
        and Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"]))).width <= 1200
    )
    assert (
        canvas.shape == [750, 1000]
        and canvas.step == 4
        and canvas.explanation["point"] == [3999, 2999]
        and canvas.explanation["top_scores"][0][0] == "blue"
    )
    monkeypatch.setattr(
        type(canvas), "send", lambda self, content, buffers=None: sent.append(buffers[0]), raising=False
    )
    form.png.click()
    assert Image.open(io.BytesIO(sent[0])).size == (4000, 3000) and viewer.show().width == 4000
    # whole, but small where a notebook shows them
    for shown in viewer.show(), viewer.show_map("blue"), viewer.show_point(9, 9), viewer.result.overlay():
        data, _ = DisplayFormatter().format(shown)
        assert "image/png" not in data and len(data["image/jpeg"]) < 1_000_000 and shown.width == 4000


def test_the_code_makes_what_is_shown(viewer, tmp_path):
    Image.fromarray(stripes()).save(tmp_path / "a photo's.png")
    viewer.change(image=tmp_path / "a photo's.png", words={"warm": ["red"], "background": ["blue", "green"]})
    for stage in (REFINED, "scores"):
        viewer.choose_stage(stage)
        done = dict(encoder=viewer.systems.encoders["colors"])
        exec(viewer.code(), done)
        assert (
            np.asarray(done["result"].labels if stage == REFINED else done["labels"]) == viewer.result.labels
        ).all()
    viewer.change(image=stripes(), words=Vocabulary(["red", "rest"], [["red"], ["green", "blue"]], ["rest"]))
    viewer.choose_stage(REFINED)
    done = dict(encoder=viewer.systems.encoders["colors"], photo=stripes())
    exec(viewer.code(), done)
    assert (done["result"].labels == viewer.result.labels).all()


def test_a_shipped_list_keeps_its_title_until_it_is_edited(viewer):
    form = viewer.form
    form.classes.value = "VOC-21"
    form.apply.click()
    assert viewer.vocabulary.title == "VOC-21" and "'VOC-21'" in viewer.code()
    form.classes.value = write_lines(viewer.vocabulary)
    form.apply.click()
    assert viewer.vocabulary.title == "VOC-21"
    assert form.classes.value == write_lines(viewer.vocabulary)  # to be edited
    form.classes.value += "\nunicorn"
    form.apply.click()
    assert (
        viewer.vocabulary.title == ""
        and len(viewer.vocabulary) == 22
        and viewer.vocabulary.background == ("background",)
    )


@pytest.mark.parametrize(
    "text, names",
    [
        ("cat, sofa", ("cat", "sofa")),
        ("cat,\n\n dog ,", ("cat", "dog")),
        ("cat: kitten,\nElse", ("cat", "background")),
        ("Sky:", ("Sky",)),
    ],
)
def test_lines_are_read_kindly(text, names):
    assert read_lines(text).names == names


@pytest.mark.filterwarnings("ignore::ovss_nb.core.vocabulary.VocabularyWarning")
def test_one_name_is_noted_as_long_as_it_is_alone(viewer):
    form = viewer.form
    form.classes.value = "blue"
    form.apply.click()
    assert "'blue' is the only name" in form.canvas.message
    form.stage.value = "scores"
    form.apply.click()
    assert "'blue' is the only name" in form.canvas.message
    form.classes.value = "blue\nelse"
    form.apply.click()
    assert form.canvas.message == "" and viewer.vocabulary.background == ("background",)
    form.classes.value = "blue"
    form.apply.click()
    assert "'blue' is the only name" in form.canvas.message  # said by the system before, shown again
    with pytest.warns(VocabularyWarning, match="only name"):
        first = Viewer(stripes(), ["green"], encoder=Counting(), size=96)
    assert "'green' is the only name" in first.form.canvas.message


def test_a_background_of_another_name_outlives_an_edit(viewer):
    viewer.change(words=Vocabulary(["red", "rest"], [["red"], ["green", "blue"]], ["rest"]))
    form = viewer.form
    form.classes.value += "\nsky"
    form.apply.click()
    assert viewer.vocabulary.background == ("rest",) and viewer.vocabulary.names == ("red", "rest", "sky")


def test_without_widgets_the_pictures_are_left(viewer, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    viewer_module._canvas_class.cache_clear()
    assert (
        viewer.show().size[0] >= 90
        and viewer.show_point(5, 5).size[0] == 90
        and viewer.show_map("blue").size == (90, 60)
    )
    with pytest.raises(MissingExtra, match=r"ovss_nb\[jupyter\]"):
        viewer.form
    monkeypatch.undo()
    assert "image/jpeg" in viewer._repr_mimebundle_()


def test_the_application_is_checked_before_it_starts(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        viewer_module.subprocess,
        "run",
        lambda command: (
            started.append((command, json.loads(Path(command[3]).read_text())))
            or subprocess.CompletedProcess(command, 0)
        ),
    )
    monkeypatch.setitem(sys.modules, "voila", type(sys)("voila"))
    Image.fromarray(stripes()).save(tmp_path / "stripes.png")
    with pytest.raises(ValueError, match="nowhere.jpg does not exist"):
        serve("nowhere.jpg", WORDS)
    assert started == []
    assert (
        serve(tmp_path / "stripes.png", {"red": ["red", "crimson"]}, 9999, False, system="maskclip", size=96)
        == 0
    )
    ((command, notebook),) = started
    assert "--port=9999" in command and command[-1] == "--no-browser" and not Path(command[3]).exists()
    assert notebook == json.loads(
        json.dumps(
            app_notebook(tmp_path / "stripes.png", {"red": ["red", "crimson"]}, system="maskclip", size=96)
        )
    )
    assert (
        "'red': ['red', 'crimson']" in notebook["cells"][0]["source"][-1]
        and "size=96" in notebook["cells"][0]["source"][-1]
    )
    monkeypatch.setitem(sys.modules, "voila", None)
    with pytest.raises(MissingExtra, match=r"ovss_nb\[app\]"):
        serve(tmp_path / "stripes.png", WORDS)


def test_limits_and_bands_of_a_deep_image(tmp_path):
    "Twelve bits, blue first: refused as it is, shown right when said, and the code says it too."
    path, deep = tmp_path / "deep.ppm", (stripes()[..., ::-1].astype(">u2") // 255 * 4095)
    path.write_bytes(b"P6\n90 60\n65535\n" + deep.astype(">u2").tobytes())
    options = dict(encoder=Counting(), encoders=(), size=96)
    with pytest.raises(ValueError, match="limits="):
        Viewer(path, WORDS, **options)
    shown = Viewer(path, WORDS, limits=(0, 4095), bands=(3, 2, 1), **options)
    assert (shown.image == stripes()).all()
    done = {"encoder": Counting()}
    exec(shown.code(), done)
    assert (done["result"].labels == shown.result.labels).all() and "load_image(" in shown.code()
    cell = "".join(app_notebook(path, WORDS, limits=(0, 4095), bands=(3, 2, 1))["cells"][0]["source"])
    assert "limits=(0, 4095), bands=(3, 2, 1)" in cell
