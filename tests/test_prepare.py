"Preparing data sets: every kind of source, refusals, damaged leftovers, and processes that are killed."

import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovss_nb.benchmarks.datasets import FolderDataset
from ovss_nb.core.images import ImageError, load_image
from ovss_nb.benchmarks.label_files import read_index_mask
from ovss_nb.benchmarks.prepare import PrepareError, prepare
from ovss_nb.benchmarks.protocols import open_dataset


class Arrays:
    "A data set without files: the bare interface."

    def __init__(self, count=5, classes=3, ignore=255, bad=()):
        self.names, self.classes, self.ignore, self.bad = (
            [f"class {k}" for k in range(classes)],
            classes,
            ignore,
            bad,
        )
        self.stems = [f"town/{i:03}" for i in range(count)]

    def __len__(self):
        return len(self.stems)

    def image(self, i):
        if i in self.bad:
            raise ImageError(f"{self.stems[i]} is torn")
        return np.random.default_rng(i).integers(0, 256, (24, 32, 3)).astype(np.uint8)

    def labels(self, i):
        labels = np.random.default_rng(i).integers(0, self.classes + 1, (24, 32))
        return np.where(labels == self.classes, self.ignore, labels).astype(
            np.uint8 if self.ignore == 255 else np.uint16
        )

    def __getitem__(self, i):
        return self.stems[i], self.image(i), self.labels(i)

    def describe(self):
        return dict(title="arrays", names=tuple(self.names))


def source(root, count=6):
    "A plain folder with labels from 1, as a stand-in for a download."
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    draw = np.random.default_rng(count)
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(root / f"images/{i:03}.jpg")
        Image.fromarray(draw.integers(0, 4, (40, 50)).astype(np.uint8)).save(root / f"masks/{i:03}.png")
    (root / "classes.txt").write_text("cat, kitten\ndog\nsofa, couch, settee\n")
    (root / "dataset.json").write_text(json.dumps(dict(ignore=0, first_label=1)))
    return FolderDataset.open(root)


def tree(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in Path(root).rglob("*")
        if path.is_file()
    }


def test_folder(tmp_path):
    data, target = source(tmp_path / "download"), tmp_path / "deep/prepared"
    assert prepare(data, target, progress=False) == dict(written=6, kept=0, skipped={})
    plain = FolderDataset.open(target)
    assert (
        plain.stems == data.stems and plain.names == data.names and (plain.classes, plain.ignore) == (3, 255)
    )
    for i in range(6):
        for a, b in zip(plain[i], data[i]):
            assert np.array_equal(a, b)
        assert os.path.samefile(target / f"images/{i:03}.jpg", tmp_path / f"download/images/{i:03}.jpg")
    # synonyms stay: they change predictions
    assert (target / "classes.txt").read_text() == "cat, kitten\ndog\nsofa, couch, settee\n"
    facts = json.loads((target / "dataset.json").read_text())
    assert (
        facts["first_label"] == 0
        and facts["ignore"] == 255
        and facts["prepared"] == dict(images=6, skipped={})
    )
    once = tree(target)
    assert (
        prepare(data, target, progress=False) == dict(written=0, kept=6, skipped={}) and tree(target) == once
    )


def test_copies_where_links_fail(tmp_path, monkeypatch):
    data = source(tmp_path / "download")
    prepare(data, tmp_path / "linked", progress=False)

    def refuse(*a, **k):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prepare(data, tmp_path / "copied", progress=False)
    assert tree(tmp_path / "copied") == tree(tmp_path / "linked")
    assert not os.path.samefile(tmp_path / "copied/images/000.jpg", tmp_path / "download/images/000.jpg")
    assert prepare(data, tmp_path / "copied", progress=False)["kept"] == 6


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")
def test_symbolic_links_are_followed(tmp_path):
    data = source(tmp_path / "download", 1)
    os.rename(tmp_path / "download/images/000.jpg", tmp_path / "photo.jpg")
    os.symlink("../../photo.jpg", tmp_path / "download/images/000.jpg")
    prepare(data, tmp_path / "prepared", progress=False)
    assert not (tmp_path / "prepared/images/000.jpg").is_symlink() and os.path.samefile(
        tmp_path / "prepared/images/000.jpg", tmp_path / "photo.jpg"
    )


@pytest.mark.parametrize(
    "classes,ignore,kind",
    [(3, 255, np.uint8), (255, 255, np.uint8), (400, 65535, np.uint16), (3, 65535, np.uint16)],
)
def test_bare_interface(tmp_path, classes, ignore, kind, capsys):
    data = Arrays(4, classes, ignore)
    assert prepare(data, tmp_path / "a")["written"] == 4
    assert "4/4" in capsys.readouterr().err  # the progress bar
    for i in range(4):
        mask = read_index_mask(tmp_path / f"a/masks/town__{i:03}.png")
        assert (mask == data.labels(i)).all() and mask.dtype == kind
        assert (load_image(tmp_path / f"a/images/town__{i:03}.png") == data.image(i)).all()
    assert prepare(data, tmp_path / "a", progress=False)["kept"] == 4
    if kind == np.uint8 or classes > 255:
        plain = FolderDataset.open(tmp_path / "a")
        assert (
            plain.ignore == ignore
            and (plain.labels(2) == data.labels(2)).all()
            and plain.stems[2] == "town__002"
        )


def test_protocol_survives(tmp_path):
    "A raw Cityscapes tree: stems with a slash, ids -> train ids; the prepared folder knows its protocol."
    for part, suffix, values in (
        ("leftImg8bit", "leftImg8bit", None),
        ("gtFine", "gtFine_labelIds", np.array([[7, 8, 0], [11, 33, 3]], np.uint8)),
    ):
        for city in ("frankfurt", "lindau"):
            path = tmp_path / f"raw/{part}/val/{city}/{city}_000000_000294_{suffix}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.zeros((2, 3, 3), np.uint8) if values is None else values).save(path)
    raw = open_dataset(tmp_path / "raw", "Cityscapes-19")
    assert prepare(raw, tmp_path / "plain", progress=False)["written"] == 2
    plain = open_dataset(tmp_path / "plain")
    assert plain.protocol.name == "Cityscapes-19" and plain.stems == [
        "frankfurt__frankfurt_000000_000294",
        "lindau__lindau_000000_000294",
    ]
    assert (
        (plain.labels(0) == raw.labels(0)).all()
        and raw.labels(0).tolist() == [[0, 1, 255], [2, 18, 255]]
        and plain.names == raw.names
    )


def test_fewer_classes_than_names(tmp_path):
    "PAS-20b scores 21 classes and has 59 names."
    data = Arrays(2, 21)
    data.names = [f"name {k}" for k in range(59)]
    prepare(data, tmp_path / "a", progress=False)
    plain = FolderDataset.open(tmp_path / "a")
    assert plain.classes == 21 and plain.names == data.names and (plain.labels(1) == data.labels(1)).all()


def test_bad_items(tmp_path):
    data = source(tmp_path / "download")
    whole = (tmp_path / "download/images/002.jpg").read_bytes()
    (tmp_path / "download/images/002.jpg").write_bytes(whole[:300])
    Image.fromarray(np.full((40, 50), 77, np.uint8)).save(tmp_path / "download/masks/004.png")
    result = prepare(data, tmp_path / "out", progress=False)
    assert result["written"] == 4 and list(result["skipped"]) == ["002", "004"]
    assert "002.jpg" in result["skipped"]["002"] and "77" in result["skipped"]["004"]
    assert FolderDataset.open(tmp_path / "out").stems == ["000", "001", "003", "005"]
    assert json.loads((tmp_path / "out/dataset.json").read_text())["prepared"] == dict(
        images=4, skipped=result["skipped"]
    )
    (tmp_path / "download/images/002.jpg").write_bytes(whole)  # mended
    again = prepare(data, tmp_path / "out", progress=False)
    assert again["written"] == 1 and again["kept"] == 4 and list(again["skipped"]) == ["004"]


def test_bad_labels_of_a_bare_data_set(tmp_path):
    data = Arrays(3)
    for wrong in (
        np.full((24, 32), 9),
        np.full((24, 32), -1),
        np.zeros((24, 32)),
        np.zeros((24, 32, 3), np.uint8),
    ):
        data.labels = lambda i, wrong=wrong: wrong if i == 1 else Arrays.labels(data, i)
        assert list(prepare(data, tmp_path / "a", progress=False)["skipped"]) == ["town/001"]
    with pytest.raises(PrepareError, match="none of the 3 items can be read: town/000 is torn"):
        prepare(Arrays(3, bad=range(3)), tmp_path / "b", progress=False)


def test_no_space(tmp_path, monkeypatch):
    "A full disk ends the call; it is not an item's fault."
    data = source(tmp_path / "download")

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("ovss_nb.benchmarks.prepare._write_mask", full)
        with pytest.raises(OSError, match="No space"):
            prepare(data, tmp_path / "out", progress=False)
    assert not (tmp_path / "out/classes.txt").exists()  # cannot be opened as a data set yet
    assert prepare(data, tmp_path / "out", progress=False)["written"] == 6


def test_damaged_leftovers(tmp_path):
    data, target = source(tmp_path / "download"), tmp_path / "out"
    prepare(data, target, progress=False)
    expected, draw = tree(target), random.Random(0)
    for turn in range(30):
        name = draw.choice([path for path in expected if "/" in path])
        content = bytearray(expected[name])
        if turn % 3 == 0:
            del content[draw.randrange(len(content)) :]
        elif turn % 3 == 1:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            content = draw.randbytes(50)
        (target / name).unlink()  # else the bytes would go through the hard link
        if turn % 10 != 9:
            (target / name).write_bytes(content)
        assert prepare(data, target, progress=False) == dict(written=1, kept=5, skipped={}), name
        assert tree(target) == expected
    # whole, but of the wrong depth
    Image.fromarray(np.zeros((40, 50), np.uint16)).save(target / "masks/003.png")
    assert prepare(data, target, progress=False)["written"] == 1 and tree(target) == expected


def test_refusals(tmp_path):
    data = source(tmp_path / "download")

    def refuse(match, dataset, target):
        before = tree(tmp_path)
        with pytest.raises(PrepareError, match=match):
            prepare(dataset, target, progress=False)
        assert tree(tmp_path) == before

    refuse("is read from", data, tmp_path / "download")
    refuse("is read from", data, tmp_path / "download/../download/images")
    os.symlink(tmp_path / "download", tmp_path / "other_name")
    refuse("is read from", data, tmp_path / "other_name")
    (tmp_path / "file").write_text("x")
    refuse("is a file", data, tmp_path / "file")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("x")
    refuse("not made by", data, tmp_path / "home")
    prepare(data, tmp_path / "out", progress=False)
    refuse("another data set.*differs in .*names", Arrays(), tmp_path / "out")
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == 3
    (tmp_path / "out/images/stranger.jpg").write_bytes(b"x")
    refuse("1 files of another data set, e.g. stranger.jpg", data, tmp_path / "out")
    (tmp_path / "out/images/stranger.jpg").unlink()
    for content in ("{", "[]"):
        (tmp_path / "out/dataset.json").write_text(content)
        refuse("dataset.json", data, tmp_path / "out")
    for names in (["a,b", "c", "d"], ["#1", "c", "d"], [" ", "c", "d"]):
        wrong = Arrays()
        wrong.names = names
        refuse("cannot stand in classes.txt", wrong, tmp_path / "new")
    for stems, match in ((["a/b", "a__b"], "both become a__b"), (["../b", "c"], "hidden")):
        wrong = Arrays(2)
        wrong.stems = stems
        refuse(match, wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_download_that_was_completed(tmp_path):
    source(tmp_path / "download", 4)
    shutil.copytree(tmp_path / "download", tmp_path / "part")
    for part in ("images/003.jpg", "masks/003.png"):
        (tmp_path / "part" / part).unlink()
    prepare(FolderDataset.open(tmp_path / "part"), tmp_path / "out", progress=False)
    for part in ("images/003.jpg", "masks/003.png"):
        shutil.copy(tmp_path / "download" / part, tmp_path / "part" / part)
    assert prepare(FolderDataset.open(tmp_path / "part"), tmp_path / "out", progress=False) == dict(
        written=1, kept=3, skipped={}
    )


# What the killed subprocesses run; a short rest per item spreads the kills over all steps.
CHILD = """
import sys, time
sys.path.insert(0, sys.argv[3])
import test_prepare as t
from ovss_nb.benchmarks.datasets import FolderDataset
from ovss_nb.benchmarks.prepare import prepare
data = FolderDataset.open(sys.argv[1]) if sys.argv[1] != "-" else t.Arrays(40)
class Slow(type(data)):
    def __getitem__(self, i):
        time.sleep(.005)
        return super().__getitem__(i)
data.__class__ = Slow
print("ready", flush=True)
prepare(data, sys.argv[2], progress=False)
print("done", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX signal")
@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_kill(tmp_path, kind):
    data = source(tmp_path / "download", 40) if kind == "files" else Arrays(40)
    prepare(data, tmp_path / "whole", progress=False)
    draw, killed, stages = random.Random(kind), 0, set()
    for turn in range(8):
        target = tmp_path / f"out{turn % 2}"  # two targets in turn: each is interrupted again and again
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                CHILD,
                str(tmp_path / "download") if kind == "files" else "-",
                str(target),
                str(Path(__file__).parent),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        masks = lambda: len(list((target / "masks").glob("[!.]*.png")))
        goal, deadline = masks() + turn % 5 * 3, time.monotonic() + 60
        while turn and masks() < goal and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        killed += child.communicate()[0] != "done\n"
        stages.add(masks())
    assert killed >= 6 and len(stages) >= 3
    for turn in range(2):
        target = tmp_path / f"out{turn}"
        (target / "masks").mkdir(parents=True, exist_ok=True)
        # as a kill inside `atomic_path` leaves it
        if (target / "unfinished.json").exists():
            (target / f"masks/.007-{'0' * 32}.png").write_bytes(b"half a mask")
        for i in (3, 20):  # and as a failing disk does
            path = target / "masks" / (f"{i:03}.png" if kind == "files" else f"town__{i:03}.png")
            if path.exists():
                path.write_bytes(path.read_bytes()[:60])
        result = prepare(data, target, progress=False)
        assert result["written"] + result["kept"] == 40 and not result["skipped"]
        assert tree(target) == tree(tmp_path / "whole")
    assert FolderDataset.open(tmp_path / "out0").stems == [stem.replace("/", "__") for stem in data.stems]


def killed_at(step, data, target):
    """A child process prepares `data` and kills itself just before its `step`-th operation on files of
    `target`; true if it got that far.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.link") and str(target) in str(
                arguments
            ):
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(hook)
        try:
            prepare(data, target, progress=False)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a POSIX call")
def test_kill_before_every_file_operation(tmp_path):
    data, step = source(tmp_path / "download", 2), 0
    prepare(data, tmp_path / "whole", progress=False)
    while killed_at(step, data, tmp_path / f"out{step}"):
        assert prepare(data, tmp_path / f"out{step}", progress=False)["skipped"] == {}
        assert tree(tmp_path / f"out{step}") == tree(tmp_path / "whole"), step
        step += 1
    assert step > 20 and tree(tmp_path / f"out{step}") == tree(tmp_path / "whole")


@pytest.mark.parametrize("what", ["labels", "image", "first label"])
def test_what_has_changed_in_the_source_is_written_again(tmp_path, what):
    "Also under the name, the size and the time of the old file; and the folder is that of a fresh call."
    data, target = source(tmp_path / "download"), tmp_path / "prepared"
    prepare(data, target, progress=False)
    path = tmp_path / "download" / ("images/002.jpg" if what == "image" else "masks/002.png")
    times = path.stat()
    if what == "labels":
        Image.fromarray((np.array(Image.open(path)) + 1) % 4).save(tmp_path / "new.png")
        os.replace(tmp_path / "new.png", path)
    elif what == "image":
        Image.fromarray(255 - np.array(Image.open(path))).save(tmp_path / "new.jpg")
        os.replace(tmp_path / "new.jpg", path)
    else:
        (tmp_path / "download/dataset.json").write_text(json.dumps(dict(ignore=9, first_label=0)))
        (tmp_path / "download/classes.txt").write_text("cat, kitten\ndog\nsofa, couch, settee\nelse\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    data = FolderDataset.open(tmp_path / "download")
    if what == "first label":
        with pytest.raises(PrepareError, match="another data set"):
            prepare(data, target, progress=False)
        return
    with pytest.warns(UserWarning, match="1 items .* written again"):
        assert prepare(data, target, progress=False) == dict(written=1, kept=5, skipped={})
    prepare(data, tmp_path / "fresh", progress=False)
    assert tree(target) == tree(tmp_path / "fresh")
    assert prepare(data, target, progress=False)["kept"] == 6


def test_arrays_that_change(tmp_path):
    "Without files, pixels are compared."
    data = Arrays(4)
    prepare(data, tmp_path / "a", progress=False)
    before = data.labels
    data.labels = lambda i: np.where(before(i) == 0, 1, before(i)).astype(np.uint8) if i == 2 else before(i)
    with pytest.warns(UserWarning, match="1 items"):
        assert prepare(data, tmp_path / "a", progress=False)["written"] == 1


def test_the_source_is_no_target(tmp_path):
    "By whatever link: the root, the folder of the images, or that of the labels."
    data = source(tmp_path / "download")
    before = tree(tmp_path / "download")
    (tmp_path / "link").symlink_to("download", target_is_directory=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/masks").symlink_to("../download/masks", target_is_directory=True)
    for target in ("download", "link", "download/../link/.", "download/images", "download/masks", "other"):
        with pytest.raises(PrepareError):
            prepare(data, tmp_path / target, progress=False)
    assert tree(tmp_path / "download") == before
