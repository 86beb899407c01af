"Image loading: every mode and kind of source, limits, and damaged files."
import random, struct, threading, warnings, zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, features

from ovss_nb.images import MAX_PIXELS, ImageError, load_image

PHOTOS = Path(skimage.__file__).parent/"data"

@pytest.fixture(scope="module")
def cat(): return Image.open(PHOTOS/"chelsea.png").convert("RGB").resize((60, 40))

def saved(image, format, **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()

def png_header(width, height):
    "A PNG that announces a size and holds almost nothing."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))

@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(cat, orientation):
    # how a scene must be stored so that the tag turns it back: the inverse of each of the eight turns
    T = Image.Transpose
    inverse = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    exif = Image.Exif()
    exif[274] = orientation
    stored = cat.transpose(inverse[orientation]) if orientation > 1 else cat
    assert (load_image(saved(stored, "PNG", exif=exif)) == np.asarray(cat)).all()

def test_damaged_exif_keeps_the_picture(cat):
    exif = Image.Exif()
    exif[274] = 6
    data = saved(cat, "WEBP", exif=exif, lossless=True)
    at = data.index(b"EXIF") + 8 + 6 * (b"Exif\0\0" in data)
    with pytest.warns(UserWarning, match="orientation not applied"): got = load_image(data[:at] + b"XX" + data[at + 2:])
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
        assert (got[index == 3] == 255).all() and (got[index != 3] == np.asarray(p.convert("RGB"))[index != 3]).all()
    assert (load_image(p.convert("PA")) == np.asarray(p.convert("RGB"))).all()

def test_transparent_colour_of_grey_and_rgb(cat):
    grey = cat.convert("L")
    level = int(np.asarray(grey)[0, 0])
    got = load_image(saved(grey, "PNG", transparency=level))
    want = np.where(np.asarray(grey) == level, 255, np.asarray(grey))
    assert (got == want[:, :, None]).all()
    colour = tuple(int(c) for c in np.asarray(cat)[0, 0])
    assert (load_image(saved(cat, "PNG", transparency=colour))[0, 0] == 255).all()

def test_sixteen_bits(cat):
    grey = np.asarray(cat.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    want = np.repeat(grey[:, :, None], 3, 2)
    for source in (deep, saved(deep, "PNG"), saved(deep, "TIFF"), np.asarray(deep), Image.fromarray(np.asarray(deep).astype(np.int32))):
        assert (load_image(source) == want).all()
    level = int(np.asarray(deep)[0, 0])
    clear = load_image(saved(deep, "PNG", transparency=level))
    assert (clear[np.asarray(deep) == level] == 255).all() and (clear[np.asarray(deep) != level] == want[np.asarray(deep) != level]).all()
    with pytest.raises(ImageError, match="32-bit"): load_image(Image.fromarray(np.full((4, 4), 70_000, np.int32)))
    assert (load_image(Image.fromarray((grey / 255).astype(np.float32))) == want).all()

def test_cmyk_one_bit_and_others(cat):
    for mode in ("CMYK", "1", "L", "YCbCr", "HSV"):
        image = cat.convert(mode)
        assert (load_image(image) == np.asarray(image.convert("RGB"))).all()
    cmyk = cat.convert("CMYK")
    assert (load_image(saved(cmyk, "TIFF")) == np.asarray(cmyk.convert("RGB"))).all()

def test_animation_gives_first_frame(cat):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "TIFF", *(["WEBP"] if features.check("webp") else [])):
        got = load_image(saved(frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})))
        assert (got == [255, 0, 0]).all(), format

def test_arrays(cat):
    pixels = np.asarray(cat)
    for array in (pixels, pixels / 255, (pixels / 255).astype(np.float16), pixels.astype(np.uint16) * 257, pixels[::-1, ::-1][::-1, ::-1]):
        got = load_image(array)
        assert got.dtype == np.uint8 and got.flags.writeable and (got == pixels).all() and not np.shares_memory(got, pixels)
    grey = pixels[:, :, 0]
    assert (load_image(grey) == grey[:, :, None]).all() and (load_image(grey[:, :, None]) == grey[:, :, None]).all()
    assert (load_image(grey > 128) == np.where(grey > 128, 255, 0)[:, :, None]).all()
    assert (load_image(np.full((2, 2), 1.0005)) == 255).all()
    assert (load_image(pixels.astype(">u2") * 257) == pixels).all()

@pytest.mark.parametrize("array, words", [
    (np.full((4, 4, 3), 200.), "0..1"), (np.full((4, 4), -1.), "0..1"), (np.full((4, 4), np.nan), "0..1"), (np.zeros((4, 4), np.int64), "uint8"),
    (np.zeros((0, 4, 3), np.uint8), "empty"), (np.zeros((4, 4, 2), np.uint8), "shape"), (np.zeros(7, np.uint8), "shape"),
    (np.zeros((2, 4, 4, 3), np.uint8), "shape"), (np.array([["a", "b"]]), "type"), (np.zeros((4, 4), complex), "type")])
def test_unsuitable_arrays(array, words):
    with pytest.raises(ImageError, match=words): load_image(array)

def test_tensors(cat):
    pixels = np.asarray(cat)
    t = torch.from_numpy(pixels.copy())
    for tensor in (t, t.permute(2, 0, 1), t / 255, (t / 255).double().requires_grad_()): assert (load_image(tensor) == pixels).all()
    assert (load_image(t[None, :, :, 0]) == pixels[:, :, :1]).all()
    # 3 x H x 3 can be read both ways: the channel-first way of PyTorch wins
    both = torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 5, 3)
    assert load_image(both).shape == (5, 3, 3) and (load_image(both) == [0, 1, 2]).all()
    assert abs(load_image((t / 255).bfloat16()).astype(int) - pixels).max() <= 1
    with pytest.raises(ImageError, match="shape"): load_image(t.permute(2, 0, 1)[None])

def test_pixel_limit_comes_from_the_header(cat):
    # decoding would need 30 GB, so only a check before decoding can answer
    with pytest.raises(ImageError, match="max_pixels"): load_image(png_header(100_000, 100_000))
    with pytest.raises(ImageError, match="max_pixels=2,399"): load_image(saved(cat, "PNG"), max_pixels=2399)
    for source in (cat, np.asarray(cat)):
        with pytest.raises(ImageError, match="max_pixels"): load_image(source, max_pixels=2399)
    assert load_image(saved(cat, "PNG"), max_pixels=2400).shape == (40, 60, 3)

def test_raised_limit_overrules_pillow(monkeypatch):
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    # a tiny limit of Pillow's stands in for a huge picture
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = saved(Image.new("RGB", (50, 50), "red"), "PNG")
    with pytest.raises(ImageError, match="max_pixels"): load_image(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data, max_pixels=MAX_PIXELS + 1).shape == (50, 50, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    faults = []
    def work():
        try: load_image(data, max_pixels=MAX_PIXELS + 1)
        except ImageError as e: faults.append(e)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not faults and Image.MAX_IMAGE_PIXELS == 100

def test_wrong_sources(tmp_path, cat):
    text = tmp_path/"note.txt"
    text.write_text("no picture")
    for source, words in [("http://example.org/a.png", "Download"), ("file:///a.png", "Download"), (tmp_path/"gone.png", "does not exist"),
                          (tmp_path, "folder"), (text, "note.txt"), (b"", "not an image"), ("a\0b.png", "cannot be opened"),
                          (None, "NoneType"), (3, "int"), ([1, 2], "list")]:
        with pytest.raises(ImageError, match=words): load_image(source)
    with open(text) as file, pytest.raises(ImageError, match="'rb'"): load_image(file)
    closed = BytesIO(saved(cat, "PNG"))
    closed.close()
    with pytest.raises(ImageError, match="closed"): load_image(closed)
    (tmp_path/"program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EndProlog\nshowpage\n")
    with pytest.raises(ImageError, match="known format"): load_image(tmp_path/"program.png")

def test_source_is_left_alone(cat, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path/"a.png").write_bytes(saved(cat, "PNG", exif=exif))
    with Image.open(tmp_path/"a.png") as image, open(tmp_path/"a.png", "rb") as file:
        load_image(image)
        assert image.size == cat.size and image.getexif()[274] == 6
        assert load_image(file).shape == (60, 40, 3) and not file.closed

def test_damaged_files_raise_only_image_error(cat, tmp_path):
    "500 random truncations and bit flips over six formats."
    exif = Image.Exif()
    exif[274] = 6
    whole = [saved(cat, "PNG", exif=exif), saved(cat.quantize(16), "PNG", transparency=3), saved(cat, "JPEG", exif=exif), saved(cat, "JPEG", progressive=True),
             saved(cat.convert("CMYK"), "JPEG"), saved(cat, "GIF"), saved(cat, "TIFF"), saved(cat, "TIFF", compression="tiff_lzw"),
             saved(cat, "BMP"), saved(cat.quantize(16), "BMP"), saved(cat, "WEBP", exif=exif), saved(cat, "WEBP", lossless=True)]
    rng, refused = random.Random(0), 0
    for _ in range(500):
        data = bytearray(rng.choice(whole))
        if rng.random() < .4: del data[rng.randrange(len(data)):]
        if data and rng.random() < .8:
            # headers are where decoders trip, so half of the flips go there
            for _ in range(rng.choice([1, 3, 20])): data[rng.randrange(min(len(data), rng.choice([64, 10**9])))] ^= 1 << rng.randrange(8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore") # Pillow warns of damaged metadata as well
            try:
                got = load_image(bytes(data), max_pixels=1_000_000)
                assert got.dtype == np.uint8 and got.ndim == 3
            except ImageError: refused += 1
    assert 100 < refused < 500
