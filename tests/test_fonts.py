"""Names of every script are drawn with glyphs, in legends, in the viewer's pictures and in plots, with
nothing but what pip has installed.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ovss_nb.core import fonts
from ovss_nb.core.fonts import characters, draw_text, font_files, plot_families, text_length, text_parts
from ovss_nb.core.segmentation import Segmentation

NAMES = dict(
    latin="žluťoučký kůň ơ ß",
    cyrillic="кошка їжак",
    greek="γάτα",
    arabic="قطة کبیر",
    hebrew="חתול",
    devanagari="बिल्ली",
    thai="แมวน้ำ",
    simplified="猫与狗",
    traditional="貓與狗",
    japanese="ねこ カフェ 猫",
    korean="고양이",
    amharic="ድመት",
    tamil="பூனை",
    bengali="বিড়াল",
    georgian="კატა",
    armenian="կատու",
    vietnamese="con mèo ở",
    mixed="cat 猫 قطة",
)


@pytest.fixture
def only_pip(monkeypatch):
    "A system without fonts of its own."
    monkeypatch.setattr(fonts, "_system_folders", list)
    monkeypatch.setattr(fonts, "_named", set())
    font_files.cache_clear()
    yield
    font_files.cache_clear()


def shape(font, text):
    mask = font.getmask(text)
    return mask.size, bytes(mask)


@pytest.mark.parametrize("script", NAMES)
def test_no_character_is_a_box(only_pip, script):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = text_parts(NAMES[script])
    assert "".join(part for part, _ in parts) == NAMES[script]
    for part, path in parts:
        font = ImageFont.load_default(40) if path is None else ImageFont.truetype(str(path), 40)
        box = shape(font, "\U0010fffd")  # a character that is in no font: its .notdef
        for sign in part:
            if not sign.isspace():
                assert ord(sign) in characters(path) and shape(font, sign) != box, sign


@pytest.mark.parametrize("script", NAMES)
def test_legends_show_the_names(only_pip, script):
    "The legend of a name is what its fonts draw, and not what Pillow's own font makes of it."
    result = Segmentation(np.zeros((60, 400), int), [NAMES[script], "other"])
    strip = np.asarray(result.overlay())[60:]
    size = max(400 // 38, 12)
    drawn = Image.new("RGB", (strip.shape[1], strip.shape[0]), "white")
    draw_text(ImageDraw.Draw(drawn), (6 + size + 6, 6 + size / 2), NAMES[script], size, (30, 30, 30))
    area = np.asarray(drawn) < 200
    assert area.any() and (strip[area] < 220).mean() > 0.95


def test_english_looks_as_before():
    assert text_parts("cat, dog - 12 %") == [("cat, dog - 12 %", None)]
    assert text_length("cat", 20) == ImageFont.load_default(20).getlength("cat")


def test_decomposed_accents_are_one_letter(only_pip):
    assert text_parts("cafe\u0301") == text_parts("café") and len(text_parts("café")) == 1


@pytest.mark.parametrize("mark", ["\u200b", "\u202e", "\u2066", "\x07"])
def test_marks_without_a_shape_are_no_boxes(only_pip, mark):
    assert text_length(f"{mark}cat", 20) == text_length("cat", 20) and text_length(
        "big\tcat", 20
    ) == text_length("big cat", 20)


def test_what_no_font_has_is_named_once(only_pip, monkeypatch):
    with pytest.warns(UserWarning, match=r"U\+10FFFD.*boxes.*install one on this system"):
        text_parts("cat \U0010fffd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_parts("dog \U0010fffd")
    monkeypatch.setattr(fonts, "find_spec", lambda package: None)  # nothing but Pillow
    font_files.cache_clear()
    with pytest.warns(UserWarning, match="猫.*pip install weblate-fonts"):
        assert text_parts("猫") == [("猫", None)]


def test_a_damaged_font_is_left_out(only_pip, monkeypatch, tmp_path):
    (tmp_path / "broken-Regular.ttf").write_bytes(b"no font at all")
    (tmp_path / "empty.ttf").write_bytes(b"")
    monkeypatch.setattr(fonts, "_system_folders", lambda: [tmp_path, tmp_path / "absent"])
    font_files.cache_clear()
    assert Path(tmp_path / "empty.ttf") in font_files() and not characters(tmp_path / "empty.ttf")
    with pytest.warns(UserWarning):
        text_parts("\U0010fffc")


def test_plots_get_the_families(only_pip):
    from matplotlib.figure import Figure

    families = plot_families(NAMES.values())
    figure = Figure(figsize=(6, 6))
    axis = figure.subplots()
    axis.set_yticks(range(len(NAMES)), list(NAMES.values()), family=families)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every glyph that it does not find
        (
            figure.canvas.draw()
            if hasattr(figure.canvas, "renderer")
            else figure.savefig(Path("/dev/null"), format="png")
        )
