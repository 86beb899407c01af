"""Evaluation:
kills, damaged files, many workers, stored predictions. The systems here are small; the processes and signals
are real.
"""

import io, json, os, random, shutil, signal, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovss_nb.benchmarks.datasets import FolderDataset
from ovss_nb.benchmarks.evaluate import EvaluationError, StoredPredictions, evaluate, read_records
from ovss_nb.core.segmentation import Segmentation

NAMES = ["left", "right", "middle"]


class Stripes:
    "Labels by brightness, says which image it was asked for, and may take its time or die."

    def __init__(self, log=None, seconds=0.0, fatal=None):
        self.log, self.seconds, self.fatal = log, seconds, fatal

    def encode_image(self, image):
        return image

    def describe(self):
        return dict(system="Stripes")

    def segment(self, image, words):
        number = int(image[0, 0, 2])  # the images of `stripes` carry their number in the corner
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{number}\n")
        if self.fatal and number == 5 and not Path(self.fatal).exists():
            Path(self.fatal).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return Segmentation(np.digitize(image[..., 0], [80, 160]), NAMES)


def stripes(root, count=12):
    "A labelled set of noisy stripes, so that predictions are neither perfect nor constant."
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for n in range(count):
        truth = np.broadcast_to(np.repeat([0, 1, 2], 20), (40, 60)).astype(np.uint8)
        image = np.clip(truth[..., None] * 80 + 40 + rng.normal(0, 30, (40, 60, 3)), 0, 255).astype(np.uint8)
        image[0, 0] = n
        truth = np.where(rng.random(truth.shape) < 0.1, 255, truth)
        Image.fromarray(image).save(root / f"images/{n:03}.png")
        Image.fromarray(truth.astype(np.uint8)).save(root / f"masks/{n:03}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return FolderDataset.open(root)


@pytest.fixture
def dataset(tmp_path):
    return stripes(tmp_path / "set")


# Imports once and forks a process for every run it is asked for, so that fifty kills do not pay for fifty
# starts of Python.
NURSERY = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_evaluate import FolderDataset, Stripes, evaluate
dataset = FolderDataset.open(sys.argv[2])
evaluate(Stripes(), dataset, boundary=True, progress=False)
for line in sys.stdin:
    run, log, seconds, readers = line.split()
    child = os.fork()
    if not child:
        options = dict(run_dir=run, readers=int(readers), boundary=True, progress=False)
        try:
            evaluate(Stripes(log=log, seconds=float(seconds)), dataset, **options)
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    def __init__(self, dataset):
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(Path(__file__).parent), str(dataset.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, run, log, seconds=0.02, readers=0):
        self.process.stdin.write(f"{run} {log} {seconds} {readers}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    # exit code of the last run, negative for a signal
    def end(self):
        return int(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False  # the nursery has collected it
    return True


def test_killed_at_fifty_moments(tmp_path, dataset):
    """kill -9 at 50 random moments:
    at most one image is done again per kill, and metrics.json has the bytes of an undisturbed run.
    """
    evaluate(Stripes(), dataset, run_dir=tmp_path / "calm", boundary=True, progress=False)
    wanted, chance, kills, finished = (
        (tmp_path / "calm/metrics.json").read_bytes(),
        random.Random(0),
        [0, 0],
        0,
    )
    with Nursery(dataset) as nursery:
        while min(kills) < 25:
            readers = int(kills[0] >= 25)
            run, log, here = tmp_path / f"run{finished}", tmp_path / f"log{finished}", 0
            log.touch()
            while True:
                before, child = log.stat().st_size, nursery.start(run, log, readers=readers)
                # which take a second to start: wait until the model is asked, or the run ends
                if readers:
                    while log.stat().st_size == before and alive(child):
                        time.sleep(0.002)
                time.sleep(chance.random() * 0.2)
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                code = nursery.end()
                if code == 0:
                    break
                assert code == -signal.SIGKILL
                here += 1
            kills[readers] += here
            finished += 1
            asked = log.read_text().split()
            assert (run / "metrics.json").read_bytes() == wanted and not (run / "pending").exists()
            assert set(asked) == {str(n) for n in range(12)} and len(asked) <= 12 + here
    assert sum(kills) >= 50 and finished >= 4


def counts(evaluation):
    return evaluation.confusion.counts.tolist()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_counts_the_same(tmp_path, dataset, workers):
    alone = evaluate(Stripes(), dataset, run_dir=tmp_path / "alone", boundary=True, progress=False)
    shared = evaluate(
        Stripes, dataset, workers=workers, run_dir=tmp_path / "shared", boundary=True, progress=False
    )
    assert (
        counts(alone) == counts(shared)
        and (tmp_path / "alone/metrics.json").read_bytes() == (tmp_path / "shared/metrics.json").read_bytes()
    )
    assert read_records(tmp_path / "alone") == read_records(tmp_path / "shared")


@pytest.mark.parametrize("ray", [None, "local"])
def test_killed_worker_is_replaced(tmp_path, monkeypatch, dataset, ray):
    "A worker that dies over an image is replaced, and that image is counted exactly once."
    if ray:
        pytest.importorskip("ray", reason="needs the extra `ray`")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's processes must find `Stripes`
    log, fatal = tmp_path / "log", tmp_path / "died"
    found = evaluate(
        partial(Stripes, str(log), fatal=str(fatal)),
        dataset,
        workers=2,
        ray=ray,
        run_dir=tmp_path / "run",
        progress=False,
    )
    assert fatal.exists() and counts(found) == counts(evaluate(Stripes(), dataset, progress=False))
    asked = log.read_text().split()
    assert asked.count("5") == 2 and sorted(record["i"] for record in read_records(tmp_path / "run")) == list(
        range(12)
    )


def test_workers_go_on_where_a_run_stopped(tmp_path, dataset):
    log = tmp_path / "log"
    whole = evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    journal = tmp_path / "run/images.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:8]))
    again = evaluate(partial(Stripes, str(log)), dataset, workers=2, run_dir=tmp_path / "run", progress=False)
    assert counts(again) == counts(whole) and len(log.read_text().split()) == 12 - 7
    assert counts(
        evaluate(partial(Stripes, str(log)), dataset, workers=2, run_dir=tmp_path / "run", progress=False)
    ) == counts(whole)
    assert len(log.read_text().split()) == 12 - 7  # a finished run asks nothing more


class Other(Stripes):
    def describe(self):
        return dict(system="Stripes", threshold=0.3)


@pytest.mark.parametrize("workers", [0, 1])
def test_another_run_is_refused(tmp_path, dataset, workers):
    "Also when the first is finished, which would otherwise be returned as the second."
    evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    before = (tmp_path / "run/metrics.json").read_bytes()
    with pytest.raises(EvaluationError, match="system.threshold: None is now 0.3"):
        evaluate(
            Other if workers else Other(), dataset, workers=workers, run_dir=tmp_path / "run", progress=False
        )
    with pytest.raises(EvaluationError, match="images: 12 is now 5"):
        evaluate(
            Stripes if workers else Stripes(),
            dataset,
            workers=workers,
            limit=5,
            run_dir=tmp_path / "run",
            progress=False,
        )
    assert (tmp_path / "run/metrics.json").read_bytes() == before


def test_one_process_at_a_time(tmp_path, dataset):
    with Nursery(dataset) as nursery:
        child = nursery.start(tmp_path / "run", tmp_path / "log", seconds=30)
        while not (tmp_path / "log").exists():
            time.sleep(0.01)
        with pytest.raises(EvaluationError, match="in use"):
            evaluate(Stripes(), dataset, run_dir=tmp_path / "run", boundary=True, progress=False)
        os.kill(child, signal.SIGKILL)
        assert nursery.end() == -signal.SIGKILL


def damaged(rng, image):
    """A file that should have been an image:
    bytes flipped, cut short, of another kind, or a bomb. With its name's extension.
    """
    buffer, form = io.BytesIO(), rng.choice(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
    image.save(buffer, form)
    data, kind = bytearray(buffer.getvalue()), rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randrange(1, 60)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == 1:
        del data[rng.randrange(len(data)) :]
    if kind == 2:
        data = bytearray(rng.randbytes(rng.randrange(2000)))
    if kind == 3:  # a PNG that claims 60,000 x 60,000 pixels, with a correct checksum
        import struct, zlib

        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        data = bytearray(
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + b"IHDR"
            + header
            + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        )
    # kind 4: only the extension may be wrong
    return bytes(data), rng.choice([".png", ".jpg", ".webp", f".{form.lower()}"])


def test_a_thousand_damaged_files(tmp_path):
    """No crash and no hang:
    each is counted, or named as bad, also through a reader process. Some survive the damage, most must not.
    """
    chance, root, photo = (
        random.Random(0),
        tmp_path / "set",
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)),
    )
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    mask = io.BytesIO()
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(mask, "PNG")
    for n in range(1000):
        data, extension = damaged(chance, photo)
        broken_mask = n % 4 == 0
        (root / f"images/{n:04}{extension}").write_bytes(data)
        (root / f"masks/{n:04}.png").write_bytes(
            damaged(chance, Image.fromarray(np.zeros((24, 32), np.uint8)))[0]
            if broken_mask
            else mask.getvalue()
        )
    (root / "classes.txt").write_text("\n".join(NAMES))
    dataset = FolderDataset.open(root)
    found = evaluate(Stripes(), dataset, run_dir=tmp_path / "run", readers=1, max_bad=1, progress=False)
    assert found.images + len(found.bad) == 1000 and len(found.bad) > 400 and found.images > 100
    assert all(bad["reason"] and bad["stem"] == dataset.stems[i] for i, bad in found.bad.items())
    assert json.loads((tmp_path / "run/metrics.json").read_text())["bad_images"] == len(found.bad)
    assert found.confusion.counts.sum() <= found.images * 24 * 32


def test_too_many_bad_files_stop_the_run_and_nothing_is_lost(tmp_path, dataset):
    shutil.copy(
        dataset.masks[0] if hasattr(dataset, "masks") else dataset.root / "masks/000.png",
        tmp_path / "whole.png",
    )
    (dataset.root / "masks/000.png").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match="1 of 12 items are bad.*000"):
        evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    # the same run, going on
    found = evaluate(Stripes(), dataset, run_dir=tmp_path / "run", max_bad=0.1, progress=False)
    assert found.images == 11 and [bad["stem"] for bad in found.bad.values()] == ["000"]


def test_predictions_are_judged_again_without_the_model(tmp_path, dataset):
    first = evaluate(
        Stripes(),
        dataset,
        run_dir=tmp_path / "run",
        save_predictions=True,
        readers=1,
        boundary=True,
        progress=False,
    )
    again = evaluate(
        StoredPredictions(tmp_path / "run/predictions"),
        dataset,
        run_dir=tmp_path / "again",
        boundary=True,
        progress=False,
    )
    assert counts(first) == counts(again) and (first.boundary == again.boundary).all()
    (tmp_path / "run/predictions/003.png").unlink()
    (tmp_path / "run/predictions/004.png").write_bytes(b"")
    found = evaluate(StoredPredictions(tmp_path / "run/predictions"), dataset, max_bad=0.5, progress=False)
    assert [bad["stem"] for bad in found.bad.values()] == ["003", "004"]
    with pytest.raises(EvaluationError, match="no folder of predictions"):
        StoredPredictions(tmp_path / "nowhere")


class Pascal:
    "Three names, of which two are scored: every later one counts as the last class, as in PAS-20b."

    names, stems, classes, ignore = ["cat", "background", "sky"], ["a"], 2, 255

    def __len__(self):
        return 1

    def image(self, i):
        return np.zeros((2, 3, 3), np.uint8)

    def labels(self, i):
        return np.array([[0, 0, 1], [1, 255, 1]], np.uint8)


class Says:
    def __init__(self, labels):
        self.labels = np.array(labels)

    def encode_image(self, image):
        return image

    def segment(self, image, words):
        return Segmentation(self.labels, list(words.names))


def test_names_beyond_the_scored_classes_count_as_the_last():
    found = evaluate(Says([[0, 2, 2], [1, 0, 0]]), Pascal(), progress=False)
    assert counts(found) == [[1, 1], [1, 2]] and found.names == ["cat", "background"]


def test_a_score_over_one_class_is_warned_about(tmp_path):
    """A system that finds nothing is right wherever nothing is:
    1.0, but of one class in two, and the score says so.
    """

    class Blind(Stripes):
        def segment(self, image, words):
            return Segmentation(np.zeros(image.shape[:2], int), words.names)

    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(tmp_path / "images/a.png")
    Image.fromarray(np.resize(np.array([0, 255], np.uint8), (4, 6))).save(tmp_path / "masks/a.png")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    with pytest.raises(ValueError, match="nobody said"):
        evaluate(Blind(), FolderDataset.open(tmp_path), progress=False)
    with pytest.warns(UserWarning, match="of 2 classes only 'background' occurs"):
        found = evaluate(Blind(), FolderDataset(tmp_path, ignore=255), progress=False)
    assert found.metrics()["classes_present"] == 1 and "1 of 2 classes occur" in repr(found.confusion)
    assert (
        evaluate(Blind(), FolderDataset(tmp_path, values={0: 0, 255: 1}), progress=False).confusion.miou()
        == 0.25
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(vocabulary=["a", "b"]), "2 names, the data set 3"),
        (dict(save_predictions=True), "run_dir"),
        (dict(workers=2), "callable"),
    ],
)
def test_what_cannot_start(dataset, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(Stripes(), dataset, progress=False, **arguments)


def test_what_is_no_system(dataset):
    with pytest.raises(EvaluationError, match="not 3"):
        evaluate(3, dataset, progress=False)


def test_limit_is_spread_over_the_set(tmp_path, dataset):
    evaluate(Stripes(), dataset, limit=3, run_dir=tmp_path / "run", progress=False)
    assert [record["i"] for record in read_records(tmp_path / "run")] == [0, 6, 11]


class Many:
    "Large images made as they are asked for."

    names = NAMES

    def __init__(self, count):
        self.stems = [str(n) for n in range(count)]

    def __len__(self):
        return len(self.stems)

    def image(self, i):
        return np.full((1000, 1000, 3), i % 256, np.uint8)

    def labels(self, i):
        return np.zeros((1000, 1000), np.uint8)


@pytest.mark.parametrize("readers", [0, 1])
def test_memory_does_not_grow_with_the_set(monkeypatch, readers):
    "Ten times the images, the same peak: three megabytes each, so that holding on to them would show."
    import tracemalloc

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    peaks = []
    for count in (6, 60):
        tracemalloc.start()
        evaluate(Stripes(), Many(count), readers=readers, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 10_000_000


class Mortal(Stripes):
    "Dies over one image, however often."

    def segment(self, image, words):
        if image[0, 0, 2] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().segment(image, words)


def test_an_image_that_kills_every_worker_is_named_and_stays_so(tmp_path, monkeypatch, dataset):
    """Even if it is the first, before any worker has answered:
    the journal keeps it, and going on does not try it again.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found = evaluate(Mortal, dataset, workers=1, run_dir=tmp_path / "run", max_bad=0.1, progress=False)
    assert (
        found.images == 11
        and [bad["stem"] for bad in found.bad.values()] == ["000"]
        and "died" in found.bad[0]["reason"]
    )
    again = evaluate(Stripes, dataset, workers=1, run_dir=tmp_path / "run", max_bad=0.1, progress=False)
    assert counts(again) == counts(found) and again.bad == found.bad


class Thresholded:
    "What `create(..., background_threshold=0.2)` says of itself."

    def __init__(self, system):
        self.system = system

    def encode_image(self, image):
        return image

    def segment(self, image, words):
        return self.system.segment(image, words)

    def describe(self):
        return dict(system="Stripes", config=dict(background_threshold=0.2))


def test_background_threshold_is_printed_and_must_be_the_protocols(monkeypatch, dataset):
    facts = dataset.describe()
    monkeypatch.setattr(dataset, "describe", lambda: facts | dict(background=dict(threshold=0.2)))
    assert evaluate(Thresholded(Stripes()), dataset, progress=False).metrics()["background_threshold"] == 0.2
    with pytest.raises(EvaluationError, match="threshold of 0.2, the system by None"):
        evaluate(Stripes(), dataset, progress=False)


# ---- what has changed is judged again


def changed(path, **kw):
    "Other pixels under the same name, size and time: what `cp -p` of an edited file may leave."
    times, image = path.stat(), np.array(Image.open(path))
    for level in range(10):
        Image.fromarray(
            255 - image if image.ndim == 3 else np.where(image == 255, 255, 2 - image).astype(np.uint8)
        ).save(path, compress_level=level)
        if path.stat().st_size >= times.st_size:
            break
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("how", ["alone", "readers", "workers"])
@pytest.mark.parametrize("what", ["masks", "images"])
def test_a_changed_file_is_judged_again(tmp_path, dataset, what, how):
    "Only that one, and the score is that of an undisturbed run of the files as they are now."
    options = dict(run_dir=tmp_path / "run", boundary=True, progress=False)
    before, log = evaluate(Stripes(), dataset, **options), tmp_path / "log"
    log.touch()
    changed(dataset.root / f"{what}/004.png")
    system = partial(Stripes, str(log)) if how == "workers" else Stripes(str(log))
    with pytest.warns(UserWarning, match="1 items .* judged again"):
        again = evaluate(
            system, dataset, **options, readers=int(how == "readers"), workers=2 * (how == "workers")
        )
    fresh = evaluate(Stripes(), dataset, **options | dict(run_dir=tmp_path / "fresh"))
    assert counts(again) == counts(fresh) != counts(before) and len(log.read_text().split()) == 1
    assert (tmp_path / "run/metrics.json").read_bytes() == (tmp_path / "fresh/metrics.json").read_bytes()
    assert read_records(tmp_path / "run") == read_records(tmp_path / "fresh")
    evaluate(Stripes(str(log)), dataset, **options)
    assert len(log.read_text().split()) == 1


def test_a_set_may_be_moved(tmp_path, dataset):
    "Content counts, not the place."
    whole, log = evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False), tmp_path / "log"
    log.touch()
    shutil.copytree(dataset.root, tmp_path / "copy/set")
    found = evaluate(
        Stripes(str(log)), FolderDataset.open(tmp_path / "copy/set"), run_dir=tmp_path / "run", progress=False
    )
    assert counts(found) == counts(whole) and not log.read_text()


def test_a_mended_file_is_no_longer_bad(tmp_path, dataset):
    whole = (dataset.root / "images/003.png").read_bytes()
    (dataset.root / "images/003.png").write_bytes(b"no image")
    assert len(evaluate(Stripes(), dataset, run_dir=tmp_path / "run", max_bad=0.1, progress=False).bad) == 1
    (dataset.root / "images/003.png").write_bytes(whole)
    with pytest.warns(UserWarning, match="1 items"):
        found = evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    assert not found.bad and counts(found) == counts(evaluate(Stripes(), dataset, progress=False))


def test_a_label_map_that_waits_is_of_the_image_as_it_was(tmp_path, dataset):
    "Labelled before a kill, not yet counted, and then the image was replaced."
    evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    journal, log = tmp_path / "run/images.jsonl", tmp_path / "log"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:5]))
    (tmp_path / "run/pending").mkdir()
    from ovss_nb.benchmarks.evaluate import _Count
    from ovss_nb.core.vocabulary import Vocabulary

    count = _Count(dataset, Vocabulary.of(NAMES), False, tmp_path / "run/pending", None, digests=True)
    for i in (6, 7):
        count.keep(i, np.zeros((40, 60), int), -1)
    changed(dataset.root / "images/007.png")
    evaluate(Stripes(str(log)), dataset, run_dir=tmp_path / "run", progress=False)
    assert "6" not in log.read_text().split() and len(log.read_text().split()) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_prediction_is_judged_again(tmp_path, dataset, workers):
    evaluate(Stripes(), dataset, run_dir=tmp_path / "run", save_predictions=True, progress=False)
    stored = partial(StoredPredictions, tmp_path / "run/predictions")
    options = dict(run_dir=tmp_path / "again", workers=workers, progress=False)
    first = evaluate(stored if workers else stored(), dataset, **options)
    Segmentation(np.ones((40, 60), int), NAMES).save_png(tmp_path / "run/predictions/003.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = evaluate(stored if workers else stored(), dataset, **options)
    assert counts(second) == counts(evaluate(stored(), dataset, progress=False)) != counts(first)


def test_predictions_that_are_asked_for_later_are_written(tmp_path, dataset):
    evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    with pytest.warns(UserWarning, match="12 items"):
        evaluate(Stripes(), dataset, run_dir=tmp_path / "run", save_predictions=True, progress=False)
    assert len(list((tmp_path / "run/predictions").glob("*.png"))) == 12


@pytest.mark.parametrize("readers", [0, 1])
def test_a_saved_prediction_that_was_damaged_is_made_again(tmp_path, dataset, readers):
    options = dict(run_dir=tmp_path / "run", save_predictions=True, readers=readers, progress=False)
    evaluate(Stripes(), dataset, **options)
    path = tmp_path / "run/predictions/003.png"
    whole, other = path.read_bytes(), (tmp_path / "run/predictions/002.png").stat().st_mtime_ns
    path.write_bytes(whole[:50])
    with pytest.warns(UserWarning, match="1 items"):
        evaluate(Stripes(), dataset, **options)
    assert path.read_bytes() == whole and (tmp_path / "run/predictions/002.png").stat().st_mtime_ns == other
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(Stripes(), dataset, **options)


def test_another_class_list_is_refused(tmp_path, dataset):
    "Also if only the words behind a name, or what is background, differ."
    evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    for lines in (["left", "right", "center"], ["left, sinister", "right", "middle"]):
        (dataset.root / "classes.txt").write_text("\n".join(lines))
        with pytest.raises(EvaluationError, match="another evaluation"):
            evaluate(Stripes(), FolderDataset.open(dataset.root), run_dir=tmp_path / "run", progress=False)


def test_labels_in_one_file_for_all(tmp_path):
    "COCO's: a changed JSON file changes the labels of every image, in a session that has read it before."
    from ovss_nb.benchmarks.datasets import Layout, LayoutDataset, _FolderRules
    from ovss_nb.benchmarks.label_files import coco_instance_labels
    from ovss_nb.benchmarks.label_maps import LabelMap
    from ovss_nb.core.vocabulary import Vocabulary

    (tmp_path / "images").mkdir()
    for n in range(3):
        Image.fromarray(np.full((40, 60, 3), 20 + n, np.uint8)).save(tmp_path / f"images/{n}.png")

    def write(category):
        square = [[0, 0, 30, 0, 30, 40, 0, 40]]
        (tmp_path / "all.json").write_text(
            json.dumps(
                dict(
                    images=[dict(id=n, height=40, width=60, file_name=f"{n}.png") for n in range(3)],
                    annotations=[
                        dict(id=n, image_id=n, category_id=category, segmentation=square, iscrowd=0)
                        for n in range(3)
                    ],
                    categories=[],
                )
            )
        )

    write(1)
    times = (tmp_path / "all.json").stat()
    words = Vocabulary.of(NAMES)
    layout = Layout("one file", ("images/{stem}.*",), "all.json", reader=coco_instance_labels)
    dataset = LayoutDataset(
        tmp_path, layout, _FolderRules("one", words, LabelMap("one", 3, {0: 0, 1: 1, 2: 2}, 255), {})
    )
    first = evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    write(2)
    os.utime(tmp_path / "all.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.warns(UserWarning, match="3 items"):
        second = evaluate(Stripes(), dataset, run_dir=tmp_path / "run", progress=False)
    assert counts(first) != counts(second) and sum(map(sum, counts(second))) == 3 * 40 * 60


def test_the_set_is_no_place_for_a_run(dataset):
    before = sorted(path.relative_to(dataset.root) for path in dataset.root.rglob("*"))
    for run in (dataset.root, dataset.root / "images", dataset.root / "masks/../masks"):
        with pytest.raises(ValueError, match="another place"):
            evaluate(Stripes(), dataset, run_dir=run, progress=False)
    assert sorted(path.relative_to(dataset.root) for path in dataset.root.rglob("*")) == before
