"Image loading: every mode and kind of source, limits, and damaged files."

import random, struct, subprocess, sys, threading, warnings, zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, features

from ovss_nb.core.images import MAX_PIXELS, ImageError, image_size, load_image, open_image

PHOTOS = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="module")
def cat():
    return Image.open(PHOTOS / "chelsea.png").convert("RGB").resize((60, 40))


def saved(image, format, **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width, height):
    "A PNG that announces a size and holds almost nothing."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(cat, orientation):
    # how a scene must be stored so that the tag turns it back: the inverse of each of the eight turns
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
    exif = Image.Exif()
    exif[274] = orientation
    stored = cat.transpose(inverse[orientation]) if orientation > 1 else cat
    assert (load_image(saved(stored, "PNG", exif=exif)) == np.asarray(cat)).all()


def test_damaged_exif_keeps_the_picture(cat):
    exif = Image.Exif()
    exif[274] = 6
    data = saved(cat, "WEBP", exif=exif, lossless=True)
    at = data.index(b"EXIF") + 8 + 6 * (b"Exif\0\0" in data)
    with pytest.warns(UserWarning, match="orientation not applied"):
        got = load_image(data[:at] + b"XX" + data[at + 2 :])
    assert (got == np.asarray(cat)).all()


def test_alpha_on_white(cat):
    clear = cat.copy()
    clear.putalpha(0)
    half = cat.copy()
    half.putalpha(128)
    assert (load_image(saved(clear, "PNG")) == 255).all()
    want = np.asarray(cat) * (128 / 255) + 255 * (127 / 255)
    for image in (saved(half, "PNG"), half, np.asarray(half)):
        assert abs(load_image(image) - want).max() <= 1
    la = cat.convert("L").convert("LA")
    la.putalpha(0)
    assert (load_image(saved(la, "PNG")) == 255).all() and (load_image(la.convert("La")) == 255).all()


def test_palette(cat):
    p = cat.quantize(16)
    assert (load_image(saved(p, "PNG")) == np.asarray(p.convert("RGB"))).all()
    index = np.asarray(p)
    # one entry clear; and one alpha per entry (tRNS chunk as bytes)
    for transparency in (3, bytes([255] * 3 + [0] + [255] * 12)):
        got = load_image(saved(p, "PNG", transparency=transparency))
        assert (got[index == 3] == 255).all() and (
            got[index != 3] == np.asarray(p.convert("RGB"))[index != 3]
        ).all()
    assert (load_image(p.convert("PA")) == np.asarray(p.convert("RGB"))).all()


def test_transparent_color_of_grey_and_rgb(cat):
    grey = cat.convert("L")
    level = int(np.asarray(grey)[0, 0])
    got = load_image(saved(grey, "PNG", transparency=level))
    want = np.where(np.asarray(grey) == level, 255, np.asarray(grey))
    assert (got == want[:, :, None]).all()
    color = tuple(int(c) for c in np.asarray(cat)[0, 0])
    assert (load_image(saved(cat, "PNG", transparency=color))[0, 0] == 255).all()


def test_sixteen_bits(cat):
    grey = np.asarray(cat.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    want = np.repeat(grey[:, :, None], 3, 2)
    for source in (
        deep,
        saved(deep, "PNG"),
        saved(deep, "TIFF"),
        np.asarray(deep),
        Image.fromarray(np.asarray(deep).astype(np.int32)),
    ):
        assert (load_image(source) == want).all()
    level = int(np.asarray(deep)[0, 0])
    clear = load_image(saved(deep, "PNG", transparency=level))
    assert (clear[np.asarray(deep) == level] == 255).all() and (
        clear[np.asarray(deep) != level] == want[np.asarray(deep) != level]
    ).all()
    with pytest.raises(ImageError, match="32-bit"):
        load_image(Image.fromarray(np.full((4, 4), 70_000, np.int32)))
    assert (load_image(Image.fromarray((grey / 255).astype(np.float32))) == want).all()


def test_cmyk_one_bit_and_others(cat):
    for mode in ("CMYK", "1", "L", "YCbCr", "HSV"):
        image = cat.convert(mode)
        assert (load_image(image) == np.asarray(image.convert("RGB"))).all()
    cmyk = cat.convert("CMYK")
    assert (load_image(saved(cmyk, "TIFF")) == np.asarray(cmyk.convert("RGB"))).all()


def test_animation_gives_first_frame(cat):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for format in ("GIF", "PNG", "TIFF", *(["WEBP"] if features.check("webp") else [])):
        got = load_image(
            saved(
                frames[0],
                format,
                save_all=True,
                append_images=frames[1:],
                **({"lossless": True} if format == "WEBP" else {}),
            )
        )
        assert (got == [255, 0, 0]).all(), format


def test_arrays(cat):
    pixels = np.asarray(cat)
    for array in (
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float16),
        pixels.astype(np.uint16) * 257,
        pixels[::-1, ::-1][::-1, ::-1],
    ):
        got = load_image(array)
        assert (
            got.dtype == np.uint8
            and got.flags.writeable
            and (got == pixels).all()
            and not np.shares_memory(got, pixels)
        )
    grey = pixels[:, :, 0]
    assert (load_image(grey) == grey[:, :, None]).all() and (
        load_image(grey[:, :, None]) == grey[:, :, None]
    ).all()
    assert (load_image(grey > 128) == np.where(grey > 128, 255, 0)[:, :, None]).all()
    assert (load_image(np.full((2, 2), 1.0005)) == 255).all()
    assert (load_image(pixels.astype(">u2") * 257) == pixels).all()


@pytest.mark.parametrize(
    "array, words",
    [
        (np.full((4, 4, 3), 200.0), "0..1"),
        (np.full((4, 4), -1.0), "0..1"),
        (np.full((4, 4), np.nan), "0..1"),
        (np.zeros((4, 4), np.int64), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros(7, np.uint8), "shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape"),
        (np.array([["a", "b"]]), "type"),
        (np.zeros((4, 4), complex), "type"),
    ],
)
def test_unsuitable_arrays(array, words):
    with pytest.raises(ImageError, match=words):
        load_image(array)


def test_tensors(cat):
    pixels = np.asarray(cat)
    t = torch.from_numpy(pixels.copy())
    for tensor in (t, t.permute(2, 0, 1), t / 255, (t / 255).double().requires_grad_()):
        assert (load_image(tensor) == pixels).all()
    assert (load_image(t[None, :, :, 0]) == pixels[:, :, :1]).all()
    # 3 x H x 3 can be read both ways: the channel-first way of PyTorch wins
    both = torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 5, 3)
    assert load_image(both).shape == (5, 3, 3) and (load_image(both) == [0, 1, 2]).all()
    assert abs(load_image((t / 255).bfloat16()).astype(int) - pixels).max() <= 1
    with pytest.raises(ImageError, match="shape"):
        load_image(t.permute(2, 0, 1)[None])


def test_pixel_limit_comes_from_the_header(cat):
    # decoding would need 30 GB, so only a check before decoding can answer
    with pytest.raises(ImageError, match="max_pixels"):
        load_image(png_header(100_000, 100_000))
    with pytest.raises(ImageError, match="max_pixels=2,399"):
        load_image(saved(cat, "PNG"), max_pixels=2399)
    for source in (cat, np.asarray(cat)):
        with pytest.raises(ImageError, match="max_pixels"):
            load_image(source, max_pixels=2399)
    assert load_image(saved(cat, "PNG"), max_pixels=2400).shape == (40, 60, 3)


def test_raised_limit_overrules_pillow(monkeypatch):
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    # a tiny limit of Pillow's stands in for a huge picture
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = saved(Image.new("RGB", (50, 50), "red"), "PNG")
    with pytest.raises(ImageError, match="max_pixels"):
        load_image(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data, max_pixels=MAX_PIXELS + 1).shape == (50, 50, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    faults = []

    def work():
        try:
            load_image(data, max_pixels=MAX_PIXELS + 1)
        except ImageError as e:
            faults.append(e)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and Image.MAX_IMAGE_PIXELS == 100


def test_wrong_sources(tmp_path, cat):
    text = tmp_path / "note.txt"
    text.write_text("no picture")
    for source, words in [
        ("http://example.org/a.png", "Download"),
        ("file:///a.png", "Download"),
        (tmp_path / "gone.png", "does not exist"),
        (tmp_path, "folder"),
        (text, "note.txt"),
        (b"", "not an image"),
        ("a\0b.png", "cannot be opened"),
        (None, "NoneType"),
        (3, "int"),
        ([1, 2], "list"),
    ]:
        with pytest.raises(ImageError, match=words):
            load_image(source)
    with open(text) as file, pytest.raises(ImageError, match="'rb'"):
        load_image(file)
    closed = BytesIO(saved(cat, "PNG"))
    closed.close()
    with pytest.raises(ImageError, match="closed"):
        load_image(closed)
    (tmp_path / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EndProlog\nshowpage\n"
    )
    with pytest.raises(ImageError, match="known format"):
        load_image(tmp_path / "program.png")


def test_source_is_left_alone(cat, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "a.png").write_bytes(saved(cat, "PNG", exif=exif))
    with Image.open(tmp_path / "a.png") as image, open(tmp_path / "a.png", "rb") as file:
        load_image(image)
        assert image.size == cat.size and image.getexif()[274] == 6
        assert load_image(file).shape == (60, 40, 3) and not file.closed


def test_damaged_files_raise_only_image_error(cat, tmp_path):
    "500 random truncations and bit flips over six formats."
    exif = Image.Exif()
    exif[274] = 6
    whole = [
        saved(cat, "PNG", exif=exif),
        saved(cat.quantize(16), "PNG", transparency=3),
        saved(cat, "JPEG", exif=exif),
        saved(cat, "JPEG", progressive=True),
        saved(cat.convert("CMYK"), "JPEG"),
        saved(cat, "GIF"),
        saved(cat, "TIFF"),
        saved(cat, "TIFF", compression="tiff_lzw"),
        saved(cat, "BMP"),
        saved(cat.quantize(16), "BMP"),
        saved(cat, "WEBP", exif=exif),
        saved(cat, "WEBP", lossless=True),
    ]
    rng, refused = random.Random(0), 0
    for _ in range(500):
        data = bytearray(rng.choice(whole))
        if rng.random() < 0.4:
            del data[rng.randrange(len(data)) :]
        if data and rng.random() < 0.8:
            # headers are where decoders trip, so half of the flips go there
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(min(len(data), rng.choice([64, 10**9])))] ^= 1 << rng.randrange(8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata as well
            try:
                got = load_image(bytes(data), max_pixels=1_000_000)
                assert got.dtype == np.uint8 and got.ndim == 3
            except ImageError:
                refused += 1
    assert 100 < refused < 500


# Deep pixels: what is black and what is white


@pytest.fixture(scope="module")
def photo(cat):
    return np.asarray(cat)


def write_raster(path, a, **options):
    "A file by rasterio; `a` is H x W or H x W x C."
    rasterio = pytest.importorskip("rasterio", reason="needs the extra `geo`")
    a = a[..., None] if a.ndim == 2 else a
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        driver = options.pop("driver", "GTiff")
        with rasterio.open(
            path,
            "w",
            driver=driver,
            height=a.shape[0],
            width=a.shape[1],
            count=a.shape[2],
            dtype=a.dtype,
            **options,
        ) as file:
            file.write(a.transpose(2, 0, 1))
    return path


def at_both_doors(path, **reading):
    "The image by `load_image`, which must be what `open_image` gives by windows."
    whole = load_image(path, **reading)
    with open_image(path, **reading) as picture:
        top, left = picture.size[0] // 3, picture.size[1] // 4
        part = picture.read(top, left, 11, 13)
        assert picture.size == whole.shape[:2] and (part == whole[top : top + 11, left : left + 13]).all()
    return whole


def netpbm(kind, most, a):
    return f"{kind}\n{a.shape[1]} {a.shape[0]}\n{most}\n".encode() + a.astype(">u2").tobytes()


DEEP_FILES = {  # every way in which 16 bits lie in a file
    "rgb.png": dict(driver="PNG"),
    "grey.png": dict(driver="PNG"),
    "plain.tif": {},
    "rgb.tif": dict(photometric="RGB"),
    "lzw.tif": dict(photometric="RGB", compress="lzw", predictor=2),
    "planar.tif": dict(photometric="RGB", interleave="band"),
    "big-endian.tif": dict(photometric="RGB", ENDIANNESS="BIG"),
    "tiled.tif": dict(compress="deflate", tiled=True, blockxsize=16, blockysize=16),
    "bigtiff.tif": dict(photometric="RGB", BIGTIFF="YES"),
    "grey.tif": {},
    "color.jp2": dict(driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES"),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_deep_files_are_right_or_ask(name, photo, tmp_path):
    """A file that uses its 16 bits is scaled as ever;
    one with twelve of them is refused, and shown right with limits, by path and as bytes.
    """
    deep, wanted = photo.astype(np.uint16), photo
    if "grey" in name:
        deep, wanted = deep[..., 1], np.repeat(photo[..., 1:2], 3, 2)
    if name == "color.jp2":
        deep, wanted = (
            np.kron(deep, np.ones((2, 2, 1), np.uint16)),
            np.kron(photo, np.ones((2, 2, 1), np.uint8)),
        )
    path = write_raster(tmp_path / name, deep * 257, **DEEP_FILES[name])
    assert (at_both_doors(path) == wanted).all() and (load_image(path.read_bytes()) == wanted).all()
    path = write_raster(tmp_path / name, deep * 16, **DEEP_FILES[name])
    for source in path, path.read_bytes():
        with pytest.raises(ImageError, match=r"of 0\.\.65535.*limits=\(0, 4095\)") as error:
            load_image(source)
        assert "--limits 0 4095" in error.value.shell and "limits=" not in error.value.shell
        assert (load_image(source, limits=(0, 4080)) == wanted).all()
    assert (at_both_doors(path, limits=(0, 4080)) == wanted).all()
    stretched = at_both_doors(path, limits="stretch")
    assert stretched.min() == 0 and stretched.max() == 255 and abs(stretched.mean() - 128) < 50


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("most", [4095, 1023, 65535])
def test_netpbm_counts_to_its_own_white(most, channels, photo, tmp_path):
    grey = photo if channels == 3 else np.repeat(photo[..., 1:2], 3, 2)
    deep = np.rint(grey[..., :channels] * (most / 255)).astype(np.uint16)
    path = tmp_path / "a.ppm"
    path.write_bytes(netpbm("P6" if channels == 3 else "P5", most, deep))
    assert abs(at_both_doors(path).astype(int) - grey).max() <= 1
    assert (load_image(path, limits=(0, most)) == load_image(path)).all()
    path.write_bytes(netpbm("P6" if channels == 3 else "P5", 65535, np.where(deep > most // 3, 300, 3)))
    with pytest.raises(ImageError, match=r"3\.\.300.*limits=\(0, 511\)"):
        load_image(path)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", ["MINISBLACK", "MINISWHITE"])
def test_few_bits_reach_from_black_to_white(bits, photometric, photo, tmp_path):
    few = photo[..., 1] >> (8 - bits)
    path = write_raster(tmp_path / "a.tif", few, NBITS=bits, photometric=photometric)
    wanted = few.astype(int) * (255 // (2**bits - 1))
    assert (
        at_both_doors(path)
        == np.repeat((wanted if photometric == "MINISBLACK" else 255 - wanted)[..., None], 3, 2)
    ).all()


@pytest.mark.parametrize("bits, channels", [(10, 3), (12, 1), (12, 3), (14, 3)])
def test_packed_bits_say_what_is_white(bits, channels, photo, tmp_path):
    deep = photo[..., :channels].astype(np.uint16) << (bits - 8)
    path = write_raster(
        tmp_path / "a.tif", deep, NBITS=bits, photometric="RGB" if channels == 3 else "MINISBLACK"
    )
    assert abs(at_both_doors(path).astype(int) - photo[..., :channels]).max() <= 1


def test_sixteen_bits_that_begin_with_white(photo, tmp_path):
    path = write_raster(tmp_path / "a.tif", photo[..., 1].astype(np.uint16) * 257, photometric="MINISWHITE")
    assert (at_both_doors(path) == 255 - photo[..., 1:2]).all()


@pytest.mark.parametrize(
    "most, said",
    [
        (4095, "error"),
        (10000, "error"),
        (16383, "error"),
        (300, "error"),
        (20000, "warning"),
        (32767, "warning"),
        (33000, ""),
        (65535, ""),
    ],
)
def test_how_little_is_too_little(most, said, photo, tmp_path):
    """Below a quarter of white it is asked, below a half it is said;
    the same from arrays, tensors, Pillow and files.
    """
    deep = np.rint(photo[..., 1] * (most / photo[..., 1].max())).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    for source in (
        deep,
        torch.from_numpy(deep.astype(np.int32)),
        Image.fromarray(deep),
        tmp_path / "a.png",
        deep.astype(">u2"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if said == "error":
                with pytest.raises(ImageError, match="nearly black"):
                    load_image(source)
            else:
                assert abs(load_image(source)[..., 0].astype(int) - deep / 257).max() <= 0.5
        assert len(caught) == (said == "warning") and all(
            "--limits 0 32767" in str(warning.message) for warning in caught
        )


def test_black_and_flat_images_pass():
    for source in (
        np.zeros((9, 9), np.uint16),
        np.full((9, 9), 65535, np.uint16),
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(np.unique(load_image(source))) == 1
    with pytest.warns(UserWarning, match="30000..31000 are few"):
        load_image(np.linspace(30000, 31000, 81).reshape(9, 9).astype(np.uint16))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_a_mask_for_a_photo_is_said(suffix, photo, tmp_path):
    for name, labels in (("mask", photo[..., 1] > 128), ("labels", photo[..., 1] // 13)):
        path = tmp_path / f"{name}.{suffix}"
        Image.fromarray(labels.astype(np.uint8)).save(path)
        with pytest.warns(UserWarning, match=f"{name}.{suffix}: .*mask or a label map"):
            load_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / f"labels.{suffix}", limits=(0, 20)).max() > 100
        load_image(photo // 100)  # an array is taken at its word: it may be a dark part of an image


@pytest.mark.parametrize(
    "limits",
    [(3, 3), (5, 2), (1,), (1, 2, 3), ("a", "b"), "auto", "12", 7, (0, float("nan")), (0, float("inf"))],
)
def test_limits_that_mean_nothing(limits, photo):
    for door in load_image, lambda *a, **kw: open_image(*a, **kw).__enter__():
        with pytest.raises(ImageError, match="black and white"):
            door(photo, limits=limits)


def test_float_and_signed_files(photo, tmp_path):
    part = (photo / 255).astype(np.float32)
    hole = np.where(np.arange(40)[:, None, None] < 10, 255, photo)
    assert (at_both_doors(write_raster(tmp_path / "a.tif", part)) == photo).all()
    assert (
        at_both_doors(write_raster(tmp_path / "b.tif", part[..., 1].astype(float))) == photo[..., 1:2]
    ).all()
    for empty in np.nan, -9999:
        holed = np.where(np.arange(40)[:, None, None] < 10, np.float32(empty), part)
        path = write_raster(tmp_path / "c.tif", holed, **({} if np.isnan(empty) else dict(nodata=empty)))
        assert (at_both_doors(path) == hole).all() and at_both_doors(path, limits="stretch")[10:].min() == 0
        with open_image(path) as picture:
            assert (picture.holes(8, 0, 4, 1)[:, 0] == [0, 0, 255, 255]).all()
    for name, a, limits in (
        ("f255.tif", part * 255, (0, 255)),
        ("i16.tif", photo.astype(np.int16) * 100 - 500, (-500, 25000)),
        ("i8.tif", (photo // 2).astype(np.int8), (0, 127)),
        ("u32.tif", photo.astype(np.uint32) << 20, (0, 255 << 20)),
        ("i64.tif", photo.astype(np.int64), (0, 255)),
    ):
        path = write_raster(tmp_path / name, a)
        with pytest.raises(ImageError, match=f"{name}: .*limits="):
            load_image(path)
        assert abs(at_both_doors(path, limits=limits).astype(int) - photo).max() <= 2
    # 32 bits wide, 16 used
    assert (at_both_doors(write_raster(tmp_path / "u32.tif", photo.astype(np.uint32) * 257)) == photo).all()
    with pytest.raises(ImageError, match="no brightness"):
        load_image(write_raster(tmp_path / "c.tif", photo.astype(np.complex64)), limits=(0, 1))


# Bands


def test_bands_of_arrays_and_pictures(photo):
    turned = photo[..., ::-1]
    five = np.dstack([turned, photo[..., :2]])
    for source in (
        five,
        torch.from_numpy(five.copy()).permute(2, 0, 1),
        saved(Image.fromarray(turned.copy()), "PNG"),
        Image.fromarray(turned.copy()),
        np.dstack([turned, 0 * photo[..., 0]]),
    ):
        assert (load_image(source, bands=(3, 2, 1)) == photo).all()
        assert (load_image(source, bands=2) == photo[..., 1:2]).all()
    with pytest.raises(ImageError, match=r"bands=\(3, 2, 1\)"):
        load_image(five)
    for bands in ((0, 1, 2), (1, 2), (), "321", 1.5, (1, 2, "b"), -1):
        with pytest.raises(ImageError, match="counted from 1"):
            load_image(photo, bands=bands)
    with pytest.raises(ImageError, match="3 bands"):
        load_image(photo, bands=(1, 2, 4))


def test_bands_of_files(photo, tmp_path):
    "Only what the file calls so is red, green, blue or transparent; else it is asked."
    from rasterio.enums import ColorInterp as Kind

    rasterio = pytest.importorskip("rasterio", reason="needs the extra `geo`")
    infrared = photo[..., 1:2]
    path = write_raster(tmp_path / "bgr.tif", photo[..., ::-1])
    assert (at_both_doors(path, bands=(3, 2, 1)) == photo).all() and (
        load_image(path.read_bytes(), bands=(3, 2, 1)) == photo
    ).all()
    assert image_size(path) == (40, 60)
    path = write_raster(
        tmp_path / "said.tif", np.dstack([photo[..., ::-1], infrared]), photometric="minisblack"
    )
    for name in "two", "four", "five":
        bands = dict(
            two=photo[..., :2], four=np.dstack([photo, infrared]), five=np.dstack([photo, photo[..., :2]])
        )[name]
        asked = write_raster(tmp_path / f"{name}.tif", bands, photometric="minisblack")
        with pytest.raises(ImageError, match="does not say which are red") as error:
            load_image(asked)
        assert "--bands 3,2,1" in error.value.shell and "bands=" not in error.value.shell
        assert image_size(asked) == (40, 60)  # without Pillow's help
        assert (at_both_doors(asked, bands=(1, 2, 1)) == photo[..., [0, 1, 0]]).all()
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [Kind.blue, Kind.green, Kind.red, Kind.undefined]
    assert (at_both_doors(path) == photo).all()
    path = write_raster(
        tmp_path / "named.tif", np.dstack([photo[..., ::-1], infrared]), photometric="minisblack"
    )
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("Blue", "Green", "Red", "NIR")
    assert (at_both_doors(path) == photo).all()
    with pytest.raises(ImageError, match="4 bands: .*number 9"):
        load_image(path, bands=(9, 1, 2))


def test_a_fourth_band_is_no_transparency(photo, tmp_path):
    infrared = np.dstack([photo, photo[..., 1:2]])
    assert (
        at_both_doors(write_raster(tmp_path / "a.tif", infrared, photometric="RGB", alpha="unspecified"))
        == photo
    ).all()
    # GDAL calls the fourth of four bytes alpha unless told otherwise, and Pillow believes it.
    path = write_raster(tmp_path / "b.tif", infrared)
    with pytest.warns(UserWarning, match="near infrared"):
        shown = at_both_doors(path)
    assert (
        (shown == photo).all()
        and (load_image(path, bands=(1, 2, 3)) == photo).all()
        and (load_image(path, bands=(4, 4, 4)) == photo[..., 1:2]).all()
    )
    # a fourth band without a word: its tag 338 becomes 337
    data = bytearray(saved(Image.fromarray(np.dstack([photo, 0 * photo[..., :1]])), "TIFF"))
    at = struct.unpack_from("<I", data, 4)[0] + 2
    while struct.unpack_from("<H", data, at)[0] != 338:
        at += 12
    struct.pack_into("<HH", data, at, 337, 2)
    assert (load_image(bytes(data)) == photo).all()
    clear = np.where(np.arange(40)[:, None, None] < 10, 0, 255).astype(np.uint8) * np.ones(
        (1, 60, 1), np.uint8
    )
    wanted = np.where(clear == 0, 255, photo)
    assert (at_both_doors(write_raster(tmp_path / "c.tif", np.dstack([photo, clear]))) == wanted).all()
    assert (
        at_both_doors(
            write_raster(
                tmp_path / "d.tif",
                np.dstack([photo, clear]).astype(np.uint16) * 257,
                photometric="RGB",
                alpha="yes",
            )
        )
        == wanted
    ).all()


def test_no_data_and_masks_are_white_at_both_doors(photo, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs the extra `geo`")
    top = np.arange(40)[:, None] < 10
    wanted = np.where(top[..., None], 255, photo)
    assert (
        at_both_doors(
            write_raster(
                tmp_path / "a.tif",
                np.where(top[..., None], 7, photo + (photo == 7)).astype(np.uint8),
                nodata=7,
            )
        )
        == np.where(top[..., None], 255, photo + (photo == 7))
    ).all()
    path = write_raster(tmp_path / "b.tif", photo)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(~np.repeat(top, 60, 1))
    assert (at_both_doors(path) == wanted).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "P", "L", "1", "LA", "RGBA"])
def test_plain_tiff_is_the_same_at_both_doors(mode, cat, tmp_path):
    cat.convert(mode).save(tmp_path / "a.tif")
    with open_image(tmp_path / "a.tif") as picture:
        assert abs(picture.read(0, 0, *picture.size).astype(int) - load_image(tmp_path / "a.tif")).max() <= 1
    assert (load_image(tmp_path / "a.tif") == np.asarray(cat.convert(mode).convert("RGB"))).all()


def test_pillow_images_of_deep_files(photo, tmp_path):
    "Pillow shortens 16-bit colors to 8; a file that it has only opened is read again."
    for name, options in (("a.png", dict(driver="PNG")), ("a.tif", dict(photometric="RGB"))):
        path = write_raster(tmp_path / name, photo.astype(np.uint16) * 16, **options)
        with Image.open(path) as image:
            with pytest.raises(ImageError, match="limits"):
                load_image(image)
            # and still works
            assert (load_image(image, limits=(0, 4080)) == photo).all() and np.asarray(image).max() < 17


def test_without_rasterio(photo, tmp_path):
    "What only rasterio reads rightly names the extra; what Pillow reads rightly works."
    write_raster(tmp_path / "five.tif", np.dstack([photo, photo[..., :2]]))
    write_raster(tmp_path / "deep.tif", photo.astype(np.uint16) * 257, photometric="RGB")
    Image.fromarray((photo[..., 1] / 255).astype(np.float32)).save(tmp_path / "float.tif")
    code = """import sys; sys.modules["rasterio"] = None
from ovss_nb.core.images import ImageError, load_image
for name in "deep.tif", "float.tif": print(load_image(name).mean())
try: load_image("five.tif", bands=(1, 2, 3))
except ImageError as e: print(e)"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert (
        abs(float(out[0]) - photo.mean()) < 1e-9
        and abs(float(out[1]) - photo[..., 1].mean()) < 1e-9
        and "pip install 'ovss_nb[geo]'" in out[2]
    )


def test_too_large_in_the_words_of_the_door(tmp_path):
    (tmp_path / "a b.png").write_bytes(png_header(100_000, 100_000))
    large = write_raster(tmp_path / "a.tif", np.zeros((4, 4, 3), np.uint16))
    for path, words, most in (
        (tmp_path / "a b.png", ["rio convert '", "ovss-nb tiles large.tif"], MAX_PIXELS),
        (large, [f"ovss-nb tiles {large}"], 15),
    ):
        with pytest.raises(ImageError, match="segment_tiles.*max_pixels") as error:
            load_image(path, max_pixels=most)
        assert "max_pixels" not in error.value.shell and all(word in error.value.shell for word in words)


def test_hot_pixels_and_limits_of_another_image(photo, tmp_path):
    """One bright pixel hides nothing, and limits that do not fit are said;
    arrays may be dark parts of an image.
    """
    hot = photo.astype(np.uint16) * 16
    hot[3, 4] = 65535
    path = write_raster(tmp_path / "hot.png", hot, driver="PNG")
    with pytest.warns(UserWarning, match="99 % of the values lie below .*--limits stretch"):
        load_image(path)
    with pytest.warns(UserWarning, match="99 % of the values"):
        load_image(write_raster(tmp_path / "hot.tif", hot, photometric="RGB"))
    Image.fromarray(photo).save(tmp_path / "plain.png")
    for limits, shown in (((0, 4095), "black"), ((-9, -1), "white"), ((40000, 65535), "black")):
        with pytest.warns(UserWarning, match=f"nearly all {shown}.*another image"):
            load_image(tmp_path / "plain.png", limits=limits)
    with warnings.catch_warnings(action="error"):
        (
            load_image(photo, limits=(0, 4095)),
            load_image(path, limits=(0, 4095)),
            load_image(tmp_path / "plain.png", limits=(0, 255)),
        )
        load_image((photo.astype(np.uint16) * 257))
    with pytest.warns(UserWarning, match=r"limits=\(28\d+, 29\d+\)"):
        load_image(28000 + photo.astype(np.uint16) * 9 // 1)
    with pytest.raises(ImageError, match="NaN or infinite.*limits="):
        load_image(np.where(photo > 9, photo / 255, np.nan))


def test_names_of_bands_at_both_doors(photo, tmp_path):
    """Bands called blue, green and red are those also where GDAL thinks otherwise;
    a satellite's numbers are said.
    """
    rasterio = pytest.importorskip("rasterio", reason="needs the extra `geo`")
    path = write_raster(tmp_path / "bgr.tif", photo[..., ::-1])
    for names in ("blue", "green", "red"), ("B", "G", "R"):
        with rasterio.open(path, "r+") as file:
            file.descriptions = names
        assert (at_both_doors(path) == photo).all()
        assert (load_image(path.read_bytes()) == photo).all() and (
            load_image(path, bands=(1, 2, 3)) == photo[..., ::-1]
        ).all()
    for names in ("B02", "B03", "B04"), ("Band 2", "Band 3", "Band 4"):
        with rasterio.open(path, "r+") as file:
            file.descriptions = names
        with pytest.warns(UserWarning, match="--bands 3,2,1"):
            load_image(path)
        with warnings.catch_warnings(action="error"):
            assert (load_image(path, bands=(3, 2, 1)) == photo).all()
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("Band 1", "Band 2", "Band 3")
    with warnings.catch_warnings(action="error"):
        load_image(path)


def test_pages_of_a_tiff_are_said(photo, tmp_path):
    pages = [Image.fromarray(photo[..., k]) for k in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "thumb.tif", save_all=True, append_images=[pages[0].resize((6, 4))])
    with pytest.warns(UserWarning, match="3 pages of one size, of which the first"):
        assert (load_image(tmp_path / "stack.tif")[..., 0] == photo[..., 0]).all()
    with warnings.catch_warnings(action="error"):
        load_image(tmp_path / "thumb.tif")
