"Readers of label files: every format as stored, every refusal, and hundreds of damaged files."

import json, os, random, struct, zlib
from importlib.resources import files

import numpy as np
import pytest
import scipy.io
from PIL import Image
from pycocotools import mask as coco_mask

from ovss_nb.benchmarks.label_files import (
    CAMVID_CLASSES,
    CAMVID_COLORS,
    LabelFileError,
    coco_instance_labels,
    read_ade20k_full,
    read_camvid_colors,
    read_coco_instances,
    read_index_mask,
    read_matlab_labels,
)
from ovss_nb.core.vocabulary import load_vocabulary

rng = np.random.default_rng(0)
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools"),
]


def blocks(high, dtype=np.uint8):
    "Labels as they look in life: 30 x 40, in blocks, so that compression has something to do."
    return rng.integers(0, high, (6, 8)).repeat(5, axis=0).repeat(5, axis=1).astype(dtype)


def coco_file(path):
    "Three pictures with polygons, both kinds of run-length code, and nothing."
    crowd = np.zeros((30, 40), np.uint8)
    crowd[:, 20:] = 1
    code = coco_mask.encode(np.asfortranarray(crowd))
    objects = [
        dict(
            image_id=1, category_id=90, segmentation=[[0, 0, 15, 0, 15, 20, 0, 20], [30, 20, 39, 20, 39, 29]]
        ),
        dict(image_id=1, category_id=1, iscrowd=1, segmentation=dict(size=[30, 40], counts=[600, 600])),
        dict(
            image_id=2,
            category_id=15,
            iscrowd=1,
            segmentation=dict(size=[30, 40], counts=code["counts"].decode()),
        ),
    ]
    path.write_text(
        json.dumps(
            dict(
                images=[dict(id=i, file_name=f"{i:012}.jpg", height=30, width=40) for i in (1, 2, 3)],
                annotations=[dict(id=i, **fields) for i, fields in enumerate(objects)],
                categories=[dict(id=1, name="person"), dict(id=90, name="toothbrush")],
            )
        )
    )
    return path


def all_coco(path):
    return [coco_instance_labels(path, i) for i in (1, 2, 3)]


def write(path):
    "An undamaged file of labels whose format the name of `path` tells; also the reader."
    if path.name == "deep.png":
        Image.fromarray(blocks(847, np.uint16)).save(path)
    elif path.name == "lzw.tif":
        Image.fromarray(blocks(847, np.uint16)).save(path, compression="tiff_lzw")
    elif path.suffix in (".png", ".tif") and "_" not in path.stem:
        Image.fromarray(blocks(150)).save(path)
    elif path.name == "palette_.png":
        image = Image.fromarray(blocks(21))
        image.putpalette(rng.integers(0, 256, 768).tolist())
        image.save(path)
    elif path.suffix == ".mat":
        scipy.io.savemat(path, {"LabelMap": blocks(459, np.uint16) + 1}, do_compression=path.stem == "packed")
        return read_matlab_labels
    elif path.name.endswith("_seg.png"):
        numbers = blocks(3149, np.uint16)
        Image.fromarray(
            np.stack([numbers // 256 * 10, numbers % 256, numbers * 0], axis=2).astype(np.uint8)
        ).save(path)
        return read_ade20k_full
    elif path.name.endswith("_L.png"):
        Image.fromarray(np.array(list(CAMVID_COLORS.values()), np.uint8)[blocks(32)]).save(path)
        return read_camvid_colors
    else:
        return (coco_file(path), all_coco)[1]
    return read_index_mask


NAMES = [
    "plain.png",
    "deep.png",
    "palette_.png",
    "plain.tif",
    "lzw.tif",
    "plain.mat",
    "packed.mat",
    "ADE_1_seg.png",
    "0001_L.png",
    "instances.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_damage(tmp_path, name):
    "Torn and flipped files: the one error or a label image, and in formats with checksums always the error."
    read = write(tmp_path / name)
    whole, expected, refused = (tmp_path / name).read_bytes(), read(tmp_path / name), 0
    draw = random.Random(name)
    for turn in range(300):
        data = bytearray(whole)
        if turn % 3 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(1 + turn % 4):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if turn % 50 == 1:
            data = bytearray(draw.randbytes(draw.randrange(400)))
        (tmp_path / name).write_bytes(data)
        try:
            got = read(tmp_path / name)
        except LabelFileError as e:
            refused += 1
            assert name in str(e)
        else:
            assert not name.endswith(".png") or data == whole
            for labels in got if isinstance(got, list) else [got]:
                assert labels.ndim == 2 and labels.dtype in (np.uint8, np.uint16)
    assert refused >= (295 if name.endswith(".png") else 100)
    (tmp_path / name).write_bytes(whole)
    assert np.array_equal(read(tmp_path / name), expected)


def test_index_masks_as_stored(tmp_path):
    small, large = blocks(16), blocks(60000, np.uint16)
    image = Image.fromarray(small)
    image.putpalette(rng.integers(0, 256, 768).tolist())
    for bits in (8, 4):  # a palette of four bits is as good as one of eight
        image.save(tmp_path / "palette.PNG", bits=bits)
        assert (read_index_mask(str(tmp_path / "palette.PNG")) == small).all()
    assert (tmp_path / "palette.PNG").read_bytes()[24] == 4
    image.save(tmp_path / "transparent.png", transparency=0)
    assert (read_index_mask(tmp_path / "transparent.png") == small).all()
    image.save(tmp_path / "palette.BMP")
    Image.fromarray(small).save(tmp_path / "grey.bmp")
    assert all((read_index_mask(tmp_path / name) == small).all() for name in ("palette.BMP", "grey.bmp"))
    for suffix, options in (("png", {}), ("tif", {}), ("tiff", dict(compression="tiff_deflate"))):
        Image.fromarray(large).save(tmp_path / f"large.{suffix}", **options)
        got = read_index_mask(tmp_path / f"large.{suffix}")
        assert (got == large).all() and got.dtype == np.uint16
    tail = struct.pack(">HHHHHHHHHH", 1, 2, 3, 4, 5, 6, 7, 8, 9, 60000)  # big-endian TIFF, 5 x 2
    entries = [
        (256, 3, 5 << 16),
        (257, 3, 2 << 16),
        (258, 3, 16 << 16),
        (259, 3, 1 << 16),
        (262, 3, 1 << 16),
        (273, 4, 8),
        (277, 3, 1 << 16),
        (278, 3, 2 << 16),
        (279, 4, 20),
    ]
    body = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in entries)
    (tmp_path / "motorola.tif").write_bytes(
        b"MM\0*" + struct.pack(">I", 28) + tail + struct.pack(">H", 9) + body + bytes(4)
    )
    assert read_index_mask(tmp_path / "motorola.tif").tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 60000]]
    inverted = body.replace(
        struct.pack(">HHII", 258, 3, 1, 16 << 16), struct.pack(">HHII", 258, 3, 1, 8 << 16)
    ).replace(struct.pack(">HHII", 262, 3, 1, 1 << 16), struct.pack(">HHII", 262, 3, 1, 0))
    (tmp_path / "inverted.tif").write_bytes(
        b"MM\0*" + struct.pack(">I", 28) + tail + struct.pack(">H", 9) + inverted + bytes(4)
    )
    with pytest.raises(LabelFileError, match="white is zero"):
        read_index_mask(tmp_path / "inverted.tif")


def test_index_mask_refusals(tmp_path):
    small = blocks(5)

    def refuse(match, name, save):
        save(tmp_path / name)
        with pytest.raises(LabelFileError, match=match) as e:
            read_index_mask(tmp_path / name)
        assert name in str(e.value)

    for mode in ("RGB", "RGBA", "LA"):
        refuse(
            "colors .*all of them are grey: save one channel",
            f"{mode}.png",
            lambda p: Image.fromarray(small).convert(mode).save(p),
        )
    refuse("1-bit", "bits.png", lambda p: Image.fromarray(small > 2).save(p))
    refuse("fractions", "soft.tif", lambda p: Image.fromarray(small.astype(np.float32)).save(p))
    refuse("must lie in", "negative.tif", lambda p: Image.fromarray(small.astype(np.int32) - 9).save(p))
    refuse(
        "holds 2 pictures",
        "pages.tif",
        lambda p: Image.fromarray(small).save(p, save_all=True, append_images=[Image.fromarray(small)]),
    )
    refuse(
        "picture of the labels",
        "colored.png",
        lambda p: Image.fromarray(np.stack([small, small, 9 - small], -1)).save(p),
    )
    refuse(
        "does not end with .png.*Save the mask as PNG",
        "labels.webp",
        lambda p: Image.fromarray(small).save(p, lossless=True),
    )
    refuse("does not end with .png", "labels.jpg", lambda p: Image.fromarray(small).save(p))
    refuse("not a PNG or TIFF file", "renamed.png", lambda p: Image.fromarray(small).save(p, format="JPEG"))
    refuse(
        "rename it to end with .png", "renamed.tif", lambda p: Image.fromarray(small).save(p, format="PNG")
    )
    refuse("not a PNG or TIFF file", "page.png", lambda p: p.write_text("<!DOCTYPE html>"))
    refuse("not a PNG or TIFF file", "empty.png", lambda p: p.write_bytes(b""))
    refuse("not a file", "folder.png", lambda p: p.mkdir())
    with pytest.raises(LabelFileError, match="does not exist"):
        read_index_mask(tmp_path / "absent.png")
    with pytest.raises(LabelFileError, match="does not exist"):
        read_index_mask("a\0b.png")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_index_mask_of_four_bits(tmp_path):
    "Pillow stretches grey levels of 4 bits to 0..255: they are refused, not returned stretched."
    header = struct.pack(">IIBBBBB", 4, 2, 4, 0, 0, 0, 0)
    (tmp_path / "four.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0\x12\x34" * 2))
        + chunk(b"IEND", b"")
    )
    assert np.asarray(Image.open(tmp_path / "four.png")).max() == 4 * 17
    with pytest.raises(LabelFileError, match="4-bit"):
        read_index_mask(tmp_path / "four.png")


def test_bombs(tmp_path):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    before = Image.MAX_IMAGE_PIXELS
    for limit in (before, None):  # also where somebody has switched Pillow's own limit off
        Image.MAX_IMAGE_PIXELS = limit
        try:
            with pytest.raises(LabelFileError, match="bomb.png.*pixels"):
                read_index_mask(tmp_path / "bomb.png")
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(2**30 + 1)  # a hole: takes no space
    with pytest.raises(LabelFileError, match="1,073,741,824 bytes"):
        read_index_mask(tmp_path / "huge.png")
    pieces = zlib.compressobj()
    # 150 MB of zeros in 150 KB
    packed = b"".join(pieces.compress(bytes(2**24)) for _ in range(9)) + pieces.flush()
    (tmp_path / "bomb.mat").write_bytes(
        b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed
    )
    with pytest.raises(LabelFileError, match="too large"):
        read_matlab_labels(tmp_path / "bomb.mat")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are a POSIX thing")
def test_a_pipe_does_not_hang(tmp_path):
    for name, read in (
        ("a.png", read_index_mask),
        ("a.mat", read_matlab_labels),
        ("a.json", lambda path: coco_instance_labels(path, 1)),
    ):
        os.mkfifo(tmp_path / name)
        with pytest.raises(LabelFileError, match="not a file"):
            read(tmp_path / name)


def test_matlab(tmp_path):
    path, labels = tmp_path / "2008_000002.mat", blocks(459, np.uint16) + 1
    for kind in (
        np.uint8,
        np.int16,
        np.uint16,
        np.int32,
        np.uint32,
        np.float32,
        np.float64,
        np.int64,
        np.uint64,
    ):
        for compress in (False, True):
            values = labels % 200 if kind == np.uint8 else labels
            scipy.io.savemat(
                path,
                {"first": "text", "LabelMap": values.astype(kind), "last": {"a": 1}},
                do_compression=compress,
            )
            got = read_matlab_labels(path)
            assert (
                (got == scipy.io.loadmat(path)["LabelMap"]).all()
                and (got == values).all()
                and got.dtype == np.uint16
                and got.flags.c_contiguous
            )
    for tiny in ([[3]], [[1, 2]], [[1], [2]]):  # numbers that lie in the tag of their element
        scipy.io.savemat(path, {"LabelMap": np.array(tiny, np.uint8)})
        assert read_matlab_labels(path).tolist() == tiny

    def refuse(match, **variables):
        scipy.io.savemat(path, variables)
        with pytest.raises(LabelFileError, match=match):
            read_matlab_labels(path)

    refuse("no matrix LabelMap, only GTcls", GTcls=labels)
    refuse("no matrix LabelMap, only LabelMap", LabelMap="text")
    refuse("no matrix LabelMap", LabelMap=labels + 1j)
    refuse("no matrix LabelMap", LabelMap=np.zeros((2, 2, 2)))
    refuse("whole numbers", LabelMap=labels + 0.5)
    refuse("whole numbers", LabelMap=np.full((2, 2), np.nan))
    refuse("whole numbers", LabelMap=-labels.astype(int))
    scipy.io.savemat(path, {"LabelMap": labels}, format="4")
    with pytest.raises(LabelFileError, match="version 5"):
        read_matlab_labels(path)
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\x89HDF")
    with pytest.raises(LabelFileError, match="-v7"):
        read_matlab_labels(path)


def test_ade20k_full(tmp_path):
    lines = files("ovss_nb.data").joinpath("labels", "ADE-847.txt").read_text().splitlines()
    numbers = [int(word) for line in lines if line[0] != "#" for word in line.split()]
    names = load_vocabulary("ADE-847").names
    assert (
        len(numbers) == len(set(numbers)) == len(names) == 847 and 0 < min(numbers) and max(numbers) <= 3688
    )
    known = {
        "wall": 2978,
        "sky": 2420,
        "person": 1831,
        "streetlight": 2616,
        "traffic light": 2836,
        "central reservation": 461,
        "minibike": 1563,
    }
    # the last five as in a file that the authors publish as a sample
    assert {name: numbers[names.index(name)] for name in known} == known
    every = np.arange(3689).reshape(-1, 31)
    Image.fromarray(np.stack([every // 256 * 10, every % 256, every % 7], axis=2).astype(np.uint8)).save(
        tmp_path / "a_seg.png"
    )
    got = read_ade20k_full(tmp_path / "a_seg.png").ravel()
    assert (
        got.dtype == np.uint16
        and (got[numbers] == np.arange(847)).all()
        and (got == 65535).sum() == 3689 - 847
        and got[0] == 65535
    )
    with pytest.raises(LabelFileError, match="_seg.png"):
        read_ade20k_full(tmp_path / "a.png")
    Image.fromarray(blocks(3)).save(tmp_path / "b_seg.png")
    with pytest.raises(LabelFileError, match="read_index_mask"):
        read_ade20k_full(tmp_path / "b_seg.png")
    Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(tmp_path / "c_seg.png")
    with pytest.raises(LabelFileError, match="multiple of ten"):
        read_ade20k_full(tmp_path / "c_seg.png")


def test_camvid(tmp_path):
    assert list(CAMVID_CLASSES) == [
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "signsymbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ]
    names, which = list(CAMVID_COLORS), blocks(32)
    colors = np.array(list(CAMVID_COLORS.values()), np.uint8)[which]
    table = np.array(
        [next((k for k, group in enumerate(CAMVID_CLASSES.values()) if name in group), 255) for name in names]
    )
    colors[3, 4] = 128, 128, 77  # one blended pixel in 1,200
    Image.fromarray(colors).save(tmp_path / "a_L.png")
    expected = table[which]
    expected[3, 4] = 255
    got = read_camvid_colors(tmp_path / "a_L.png")
    assert (got == expected).all() and got.dtype == np.uint8
    Image.fromarray(colors).resize((35, 26), Image.Resampling.BILINEAR).save(tmp_path / "b_L.png")
    with pytest.raises(LabelFileError, match="neither recompressed nor resized"):
        read_camvid_colors(tmp_path / "b_L.png")
    Image.fromarray(blocks(11)).save(tmp_path / "c_L.png")
    with pytest.raises(LabelFileError, match="read_index_mask"):
        read_camvid_colors(tmp_path / "c_L.png")


def test_coco(tmp_path):
    path = coco_file(tmp_path / "instances_val2017.json")
    first, second, third = all_coco(path)
    assert first.dtype == np.uint8 and first.shape == (30, 40) and not third.any()
    # listed first, so it keeps what the crowd covers too
    assert first[10, 5] == 80 and first[27, 38] == 80 and first[2, 30] == 1 and first[27, 5] == 0
    assert (second[:, 20:] == 14).all() and not second[:, :20].any()
    pictures = read_coco_instances(path)
    assert (
        pictures[1]["file_name"] == "000000000001.jpg" and (coco_instance_labels(pictures, 1) == first).all()
    )
    with pytest.raises(LabelFileError, match="no picture has the id 4"):
        coco_instance_labels(path, 4)
    with pytest.raises(LabelFileError, match="complete the download"):
        coco_instance_labels(tmp_path / "absent.json", 4)
    whole = json.loads(path.read_text())

    def refuse(match, **changes):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(LabelFileError, match=match) as e:
            all_coco(path)
        assert "instances_val2017.json" in str(e.value)

    refuse("no lists", images=None)
    refuse("belongs to no image", images=[])
    refuse("sane size", images=[dict(id=1, height=10**6, width=10**6)])
    refuse("in COCO it is 'person'", categories=[dict(id=1, name="weed")])
    refuse("is no category", categories=[7])
    for number in (12, 92, "1", None, True):
        refuse("not one of the 80", annotations=[whole["annotations"][0] | dict(category_id=number)])
    for wrong in (
        None,
        [],
        {},
        "x",
        [[1, 2, 3]],
        [[1, 2, 3, 4, 5, "x"]],
        [[0, 0, 1e9, 0, 1e9, 9]],
        [[0, 0, 1, 1, 2, None]],
        dict(size=[30, 40], counts="\u20ac"),
        dict(size=[30, 40], counts="o" * 9),
        dict(size=[30, 40], counts=[1]),
        dict(size=[30, 40], counts=[-1, 1201]),
        dict(size=[30, 40], counts=[10**30]),
        dict(size=[3, 4], counts=[12]),
    ):
        refuse(
            "object 0 of picture 1 is damaged",
            annotations=[whole["annotations"][0] | dict(segmentation=wrong)],
        )
    path.write_text("[" * 100_000)
    with pytest.raises(LabelFileError, match="is damaged"):
        coco_instance_labels(path, 1)


def test_run_lengths_equal_pycocotools(tmp_path):
    from ovss_nb.benchmarks.label_files import _object_mask

    for density in (0.001, 0.1, 0.5, 0.9):
        for shape in ((1, 1), (7, 300), (480, 640)):
            mask = rng.random(shape) < density
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert (
                _object_mask(dict(size=list(shape), counts=code["counts"].decode()), *shape) == mask
            ).all()
