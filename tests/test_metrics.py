"""Counts, averages, borders and intervals against the field's formulas, each written down once more in the
plainest way.
"""

import itertools, json, pickle, subprocess, sys
import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
from ovss_nb.benchmarks.metrics import (
    STATISTICS,
    Confusion,
    bootstrap_interval,
    boundary_band,
    boundary_counts,
    boundary_iou,
    class_accuracy,
    class_iou,
    frequency_weighted_iou,
    harmonic_mean,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)


def case(seed, classes, absent=0.3, ignored=0.1, shape=(3, 37, 41)):
    """Random maps in which some classes are never true, others never predicted, some neither;
    every fourth prediction is right.
    """
    rng = np.random.default_rng(seed)
    ignore = 255 if classes <= 255 else 65535
    true = rng.choice(
        np.flatnonzero(rng.random(classes) >= absent) if classes > 3 else np.arange(classes), shape
    )
    labels = np.where(
        rng.random(shape) < 0.25,
        true,
        rng.choice(
            np.flatnonzero(rng.random(classes) >= absent) if classes > 3 else np.arange(classes), shape
        ),
    )
    true[rng.random(shape) < ignored] = ignore
    kind = np.uint8 if classes <= 255 else np.uint16
    return true.astype(kind), labels.astype(kind), ignore


CASES = [
    pytest.param(*case, id=f"{case[1]}-classes-seed-{case[0]}")
    for case in itertools.product(range(3), (1, 2, 9, 21, 150, 255, 256, 847, 1000))
]


def per_class(truth, labels, classes, ignore):
    "One class at a time, with boolean masks."
    scored, rows = truth != ignore, []
    for k in range(classes):
        true, predicted = (truth == k) & scored, (labels == k) & scored
        rows.append(
            (
                int((true & predicted).sum()),
                int(true.sum()),
                int(predicted.sum()),
                int((true | predicted).sum()),
            )
        )
    return np.array(rows).T


@pytest.mark.parametrize("seed, classes", CASES)
def test_equals_one_class_at_a_time(seed, classes):
    truth, labels, ignore = case(seed, classes)
    confusion = Confusion(classes).add(truth, labels)
    hits, true, predicted, union = per_class(truth, labels, classes, ignore)
    assert confusion.ignore == ignore and confusion.counts.dtype == np.int64
    for ours, theirs in zip(confusion.totals(), (hits, true, predicted)):
        assert (ours == theirs).all()
    iou = [i / u if u else np.nan for i, u in zip(hits, union)]
    accuracy = [i / t if t else np.nan for i, t in zip(hits, true)]
    assert np.allclose(confusion.iou(), iou, rtol=0, atol=1e-12, equal_nan=True)
    assert np.allclose(confusion.accuracy(), accuracy, rtol=0, atol=1e-12, equal_nan=True)
    present, seen = [k for k in range(classes) if true[k]], [k for k in range(classes) if union[k]]
    close = lambda a, b: abs(a - b) <= 1e-12
    assert close(confusion.miou(), sum(iou[k] for k in present) / len(present))
    assert close(confusion.miou("seen"), sum(iou[k] for k in seen) / len(seen))
    assert close(confusion.pixel_accuracy(), sum(hits) / sum(true)) and close(
        confusion.mean_accuracy(), sum(accuracy[k] for k in present) / len(present)
    )
    assert close(confusion.frequency_weighted_iou(), sum(true[k] / sum(true) * iou[k] for k in present))


# torchmetrics asks for two classes at least
@pytest.mark.parametrize("seed, classes", [parameters for parameters in CASES if parameters.values[1] > 1])
def test_equals_torchmetrics(seed, classes):
    truth, labels, ignore = case(seed, classes)
    confusion = Confusion(classes).add(truth, labels)
    tensors = torch.tensor(labels.astype(int)), torch.tensor(truth.astype(int))
    matrix = MulticlassConfusionMatrix(classes, ignore_index=ignore)(*tensors)
    assert torch.equal(matrix, torch.tensor(confusion.counts))
    # Its Jaccard index is float32 inside, and zero where we say NaN; its formula in float64 must agree to
    # 1e-9.
    jaccard = MulticlassJaccardIndex(classes, ignore_index=ignore, average="none")(*tensors).numpy()
    assert np.allclose(np.nan_to_num(confusion.iou()), jaccard, rtol=0, atol=1e-6)
    assert (
        abs(confusion.miou("seen") - float(MulticlassJaccardIndex(classes, ignore_index=ignore)(*tensors)))
        <= 1e-6
    )
    matrix = matrix.double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    assert abs(confusion.miou("seen") - float((matrix.diag() / union)[union > 0].mean())) <= 1e-9


def detectron2(truth, labels, classes, ignore, older):
    """The formulas of its SemSegEvaluator:
    a matrix with one row and column more for ignored pixels, averaged in the newer or the older way.
    """
    truth = np.where(truth == ignore, classes, truth).astype(np.int64)
    matrix = np.bincount(
        ((classes + 1) * labels.astype(np.int64) + truth).ravel(), minlength=(classes + 1) ** 2
    ).reshape(classes + 1, classes + 1)
    hits = matrix.diagonal()[:-1].astype(float)
    true, predicted = matrix[:-1, :-1].sum(0).astype(float), matrix[:-1, :-1].sum(1).astype(float)
    occurs, union = true > 0, true + predicted - hits
    iou = hits[occurs] / union[occurs]
    return {
        "miou": iou.sum() / ((true + predicted > 0).sum() if older else (occurs & (union > 0)).sum()),
        "frequency_weighted_iou": (iou * true[occurs] / true.sum()).sum(),
        "mean_accuracy": (hits[occurs] / true[occurs]).mean(),
        "pixel_accuracy": hits.sum() / true.sum(),
    }


def mmseg(truth, labels, classes, ignore):
    "The formulas of its IoUMetric: areas from histograms of the scored pixels, then the mean without NaN."
    labels, truth = labels[truth != ignore], truth[truth != ignore]
    count = lambda values: (
        np.histogram(values, bins=classes, range=(0, classes - 1))[0].astype(float)
        if classes > 1
        else np.array([len(values)], float)
    )
    hits, predicted, true = count(labels[labels == truth]), count(labels), count(truth)
    with np.errstate(invalid="ignore"):
        return {
            "miou": np.nanmean(hits / (predicted + true - hits)),
            "mean_accuracy": np.nanmean(hits / true),
            "pixel_accuracy": hits.sum() / true.sum(),
        }


@pytest.mark.parametrize("seed, classes", CASES)
def test_equals_detectron2_and_mmseg(seed, classes):
    "Each under its own convention."
    truth, labels, ignore = case(seed, classes)
    confusion = Confusion(classes).add(truth, labels)
    summary = confusion.summary()
    new, old, other = (
        detectron2(truth, labels, classes, ignore, False),
        detectron2(truth, labels, classes, ignore, True),
        mmseg(truth, labels, classes, ignore),
    )
    for theirs, convention in (new, "miou_present"), (old, "miou_seen"), (other, "miou_seen"):
        for name, value in theirs.items():
            assert abs(summary[convention if name == "miou" else name] - value) <= 1e-9, name


def test_conventions_differ_by_the_absent_classes():
    "PC-459: 345 classes occur, the others are only predicted."
    rows = [[k, k, 10 + k] for k in range(345)] + [[k, 345 + k % 114, 3] for k in range(345)]
    confusion = Confusion.from_pairs(459, rows)
    assert confusion.ignore == 65535
    assert (
        abs(confusion.miou() * 345 / 459 - confusion.miou("seen")) < 1e-12
        and confusion.summary()["classes_seen"] == 459
    )


@pytest.mark.parametrize("kind", ["u1", "i1", "<u2", ">u2", "i2", "i4", ">i4", "i8", "u8"])
def test_any_integer_type(kind):
    truth, labels, _ = case(1, 100)
    want = Confusion(100).add(truth, labels).counts
    ignore = -1 if "i" in kind else 255
    true = np.where(truth == 255, ignore, truth.astype(int)).astype(kind)
    assert (Confusion(100, ignore).add(true, labels.astype(kind)).counts == want).all()
    turned = Confusion(100, ignore).add(true.T, np.asfortranarray(labels).T)  # other memory layouts
    assert (turned.counts == want).all()
    assert (Confusion(100, ignore).add(true.tolist(), labels.tolist()).counts == want).all()


@pytest.mark.parametrize(
    "shape", [(), (0,), (5, 0), (7,), (1, 1), (14_999,), (15_000,), (15_001,), (2, 3, 4, 5)], ids=str
)
def test_any_shape(shape):
    rng = np.random.default_rng(0)
    truth, labels = rng.integers(0, 3, (2, *shape))
    counts = Confusion(3).add(truth, labels).counts
    assert counts.sum() == truth.size and all(
        counts[t, p] == ((truth == t) & (labels == p)).sum() for t in range(3) for p in range(3)
    )


@pytest.mark.parametrize("ignore", [0, 3, 7, 459, -1])
def test_ignore_may_be_any_value(ignore):
    "0 and 3 are classes that are then never true; what is predicted at ignored pixels is not looked at."
    rng = np.random.default_rng(0)
    truth, labels = rng.integers(0, 7, (2, 20, 30))
    ignored = rng.random(truth.shape) < 0.2
    truth[ignored], labels[ignored] = ignore, 1000
    truth, labels = truth.astype(np.int16), labels.astype(np.int16)
    labels[truth == ignore] = -5
    confusion, scored = Confusion(7, ignore).add(truth, labels), truth != ignore
    assert (
        confusion.counts.sum() == scored.sum()
        and (confusion.counts == Confusion(7).add(truth[scored], labels[scored]).counts).all()
    )
    plain = np.where(scored, truth, 255), np.where(scored, labels, 0)
    assert (boundary_counts(truth, labels, 7, ignore) == boundary_counts(*plain, 7)).all()


@pytest.mark.parametrize(
    "truth, labels, message",
    [
        ([[0, 1]], [[0], [1]], "resize the prediction"),
        ([0, 3], [0, 1], "label 3, but the classes are 0..2 and 255 is ignored"),
        ([0, -1], [0, 1], "label -1"),
        ([0, 1], [0, 3], "prediction holds label 3"),
        ([0, 1], [-1, 1], "prediction holds label -1"),
        ([0, 1], [255, 1], "label 255"),
        ([0.0, 1.0], [0, 1], "integers"),
        ([0, 1], [True, False], "integers"),
        ([0, 65535], [0, 1], "65535"),
        (["a"], [0], "integers"),
        ([0, 2**63], [0, 1], "9223372036854775808"),
        ([0, -(2**63)], [0, 1], "-9223372036854775808"),
    ],
)
def test_wrong_maps_are_refused_and_nothing_is_counted(truth, labels, message):
    confusion = Confusion(3).add([2], [1])
    truth = np.array(truth, np.uint64) if 2**63 in truth else np.array(truth)
    with pytest.raises(ValueError, match=message):
        confusion.add(truth, labels)
    with pytest.raises(ValueError, match=message):
        boundary_counts(truth, labels, 3)
    assert confusion.pairs() == [[2, 1, 1]]


def test_wrong_uses_are_refused():
    with pytest.raises(ValueError, match="at least one class"):
        Confusion(0)
    with pytest.raises(ValueError, match="cannot add 4 classes to 3"):
        Confusion(3) + Confusion(4)
    with pytest.raises(ValueError, match="one part ignores 0"):
        Confusion(3, 0) + Confusion(3)
    with pytest.raises(TypeError):
        Confusion(3) + 1
    with pytest.raises(ValueError, match="'present' or 'seen'"):
        Confusion(3).miou("all")
    with pytest.raises(ValueError, match="0..2"):
        Confusion(3).miou(classes=[3])
    for rows in (
        [[0, 1]],
        [[0, 3, 1]],
        [[0, -1, 1]],
        [[0, 1, -1]],
        [[0, 1, 1.5]],
        [0, 1, 1],
        [["a", "b", "c"]],
    ):
        with pytest.raises(ValueError, match="record consists of rows"):
            Confusion.from_pairs(3, rows)


def test_merging_in_any_order_gives_the_same_counts():
    parts = [Confusion(30).add(*case(seed, 30)[:2]) for seed in range(5)]
    whole = Confusion(30)
    for seed in range(5):
        assert whole.add(*case(seed, 30)[:2]) is whole
    for order in itertools.permutations(parts):
        left, right = sum(order, Confusion(30)), order[0] + (order[1] + ((order[2] + order[3]) + order[4]))
        assert (left.counts == whole.counts).all() and (right.counts == whole.counts).all()
    # adding does not change its parts
    assert all(part.counts.sum() < whole.counts.sum() for part in parts)


def test_counts_beyond_what_floats_hold():
    "float32 rounds above 2^24, float64 above 2^53."
    big = Confusion.from_pairs(2, [[0, 0, 2**60 + 1], [1, 1, 2**53 + 1]]).add([0, 1], [0, 1])
    assert (
        big.pairs() == [[0, 0, 2**60 + 2], [1, 1, 2**53 + 2]]
        and Confusion.from_pairs(2, big.pairs()).pairs() == big.pairs()
    )


@pytest.mark.parametrize("classes", [2, 150, 1000])
def test_records(classes):
    truth, labels, ignore = case(2, classes)
    confusion = Confusion(classes).add(truth, labels)
    record = json.loads(json.dumps(confusion.pairs()))
    assert record == sorted(record) and all(len(row) == 3 and row[2] > 0 for row in record)
    assert (Confusion.from_pairs(classes, record).counts == confusion.counts).all()
    twice = Confusion.from_pairs(classes, record + record[::-1])
    assert (twice.counts == 2 * confusion.counts).all()
    assert Confusion(classes).pairs() == [] and not Confusion.from_pairs(classes, []).counts.any()
    copy = pickle.loads(pickle.dumps(confusion)).add(truth, labels)
    assert (copy.counts == twice.counts).all() and copy.ignore == ignore


def test_summary_and_nothing_counted():
    empty = Confusion(3).add(np.full((4, 4), 255), np.zeros((4, 4), int))
    assert np.isnan(
        [
            empty.miou(),
            empty.miou("seen"),
            empty.pixel_accuracy(),
            empty.mean_accuracy(),
            empty.frequency_weighted_iou(),
            empty.harmonic_mean([0]),
        ]
    ).all()
    assert json.loads(json.dumps(empty.summary(seen=[0]), allow_nan=False)) == dict.fromkeys(
        [*STATISTICS, "harmonic_mean"]
    ) | {
        "pixels": 0,
        "classes": 3,
        "classes_present": 0,
        "classes_seen": 0,
        "iou": [None] * 3,
        "accuracy": [None] * 3,
    }
    some = Confusion(4).add([0, 0, 0, 1], [0, 0, 2, 1])
    summary = some.summary(seen=[0])
    assert summary["iou"] == [2 / 3, 1, 0, None] and summary["accuracy"] == [2 / 3, 1, None, None]
    assert (summary["pixels"], summary["classes_present"], summary["classes_seen"]) == (4, 2, 3)
    assert summary["harmonic_mean"] == some.harmonic_mean([0]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert (
        some.harmonic_mean([0], "seen") == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
        and "harmonic_mean" not in some.summary()
    )
    assert "4 pixels" in repr(some) and f"{5 / 6:.4f} present" in repr(some)


def test_harmonic_mean():
    assert (
        harmonic_mean(0.5, 0.5) == 0.5
        and harmonic_mean(0, 0) == harmonic_mean(0, 1) == 0
        and np.isnan(harmonic_mean(0, np.nan))
    )


def test_scores_work_on_many_sets_at_once():
    "The bootstrap scores all draws together."
    parts = [Confusion(9).add(*case(seed, 9)[:2]) for seed in range(4)] + [Confusion(9)]
    together = np.stack([part.totals() for part in parts], 1)
    for f in (
        class_iou,
        class_accuracy,
        mean_iou,
        pixel_accuracy,
        mean_accuracy,
        frequency_weighted_iou,
        *STATISTICS.values(),
    ):
        assert np.array_equal(f(*together), np.stack([f(*part.totals()) for part in parts]), equal_nan=True)


def eroded_band(mask, distance, neutral):
    "A mask without itself eroded as in the paper's code; `neutral` pixels never erode anything."
    return mask & ~ndimage.binary_erosion(
        mask | neutral, np.ones((3, 3)), iterations=distance, border_value=0
    )


@pytest.mark.parametrize("ignored", ["nothing", "specks", "rims", "half", "all"])
@pytest.mark.parametrize("width", [0.02, 0.1])
@pytest.mark.parametrize("classes", [2, 12, 300])
def test_boundary_equals_erosion_of_each_class(classes, width, ignored):
    rng = np.random.default_rng(classes)
    smooth = lambda: ndimage.gaussian_filter(rng.normal(size=(classes, 48, 62)), (0, 6, 6)).argmax(0)
    truth, ignore = smooth(), 255 if classes <= 255 else 65535
    labels = np.where(rng.random(truth.shape) < 0.003, smooth(), np.roll(truth, 2, 0))
    hidden = {
        "nothing": np.zeros(truth.shape, bool),
        "specks": rng.random(truth.shape) < 0.1,
        "half": np.arange(62) < np.full((48, 1), 30),
        "all": np.ones(truth.shape, bool),
        "rims": ndimage.maximum_filter(truth, 3) != ndimage.minimum_filter(truth, 3),
    }[ignored]
    truth, distance = np.where(hidden, ignore, truth), max(1, round(width * (48**2 + 62**2) ** 0.5))
    want = np.zeros((classes, 3), int)
    for k in range(classes):
        true, predicted = (
            eroded_band((values == k) & ~hidden, distance, hidden) for values in (truth, labels)
        )
        want[k] = (true & predicted).sum(), true.sum(), predicted.sum()
    got = boundary_counts(truth, labels, classes, width=width)
    assert got.dtype == np.int64 and (got == want).all()
    assert np.allclose(
        boundary_iou(got), [i / (t + p - i) if t + p else np.nan for i, t, p in want.tolist()], equal_nan=True
    )
    assert got.any() == (ignored != "all")


def test_boundary_of_a_known_case():
    "Two squares of 40 x 40, one shifted by 3 pixels; d = 2 % of the diagonal of 300 x 400 = 10 pixels."
    truth, labels = np.zeros((2, 300, 400), np.uint8)
    truth[100:140, 100:140] = labels[100:140, 103:143] = 1
    ring = 40 * 40 - 20 * 20
    # The bands are 10 wide. Shifted by 3, both have 37 columns of height 40 in common; of these, the true
    # hole covers 20 x 20 and the predicted one 3 x 20 more.
    common = 37 * 40 - 23 * 20
    counts = boundary_counts(truth, labels, 2)
    assert counts[1].tolist() == [common, ring, ring]
    assert (
        boundary_iou(counts)[1]
        == common / (2 * ring - common)
        < Confusion(2).add(truth, labels).iou()[1]
        == 37 * 40 / (2 * 1600 - 37 * 40)
    )


def test_boundary_counts_the_frame_and_nothing_else_in_a_uniform_image():
    flat = np.zeros((100, 200), np.uint8)
    d = round(0.02 * np.hypot(100, 200))
    assert boundary_counts(flat, flat, 3).tolist() == [
        [100 * 200 - (100 - 2 * d) * (200 - 2 * d)] * 3,
        [0] * 3,
        [0] * 3,
    ]
    assert (
        boundary_counts(flat[:1, :1], flat[:1, :1], 3)[0].tolist() == [1, 1, 1]
        and boundary_band(flat[:3, :3], 5).all()
    )
    assert boundary_counts(flat[:0], flat[:0], 3).tolist() == [[0] * 3] * 3


def test_boundary_refuses():
    flat = np.zeros((2, 10, 10), np.uint8)
    with pytest.raises(ValueError, match="one image at a time"):
        boundary_counts(flat, flat, 2)
    for width in (0, 1, -0.1):
        with pytest.raises(ValueError, match="share of the diagonal"):
            boundary_counts(flat[0], flat[0], 2, width=width)


def test_bootstrap_equals_scoring_each_draw_by_itself():
    parts = [Confusion(9).add(*case(seed, 9, shape=(20, 20))[:2]) for seed in range(7)]
    rng = np.random.default_rng(5)
    draws = rng.multinomial(7, np.full(7, 1 / 7), size=50)
    scores = []
    for draw in draws:
        drawn = Confusion(9)
        for part, times in zip(parts, draw):
            for _ in range(times):
                drawn = drawn + part
        scores.append(drawn.summary())
    for name in STATISTICS:
        want = np.quantile([draw[name] for draw in scores], [0.05, 0.95])
        for records in (
            parts,
            [part.pairs() for part in parts],
            [np.stack(part.totals(), 1) for part in parts],
        ):
            assert np.allclose(
                bootstrap_interval(records, 9, name, samples=50, confidence=0.9, seed=5),
                want,
                rtol=0,
                atol=1e-12,
            )


def test_bootstrap():
    parts = [Confusion(300).add(*case(seed, 300)[:2]) for seed in range(10)]
    low, high = bootstrap_interval(parts, 300)
    assert type(low) is float and 0 < low < high < 1
    assert bootstrap_interval(parts, 300) == (low, high) != bootstrap_interval(parts, 300, seed=1)
    # equal images: nothing can vary
    assert bootstrap_interval(parts[:1] * 5, 300, "pixel_accuracy") == (parts[0].pixel_accuracy(),) * 2
    wide = bootstrap_interval(parts, 300, "pixel_accuracy", confidence=0.99)
    narrow = bootstrap_interval(parts, 300, "pixel_accuracy", confidence=0.5)
    assert wide[0] < narrow[0] < sum(parts, Confusion(300)).pixel_accuracy() < narrow[1] < wide[1]
    error = lambda hits, truth, predicted: 1 - pixel_accuracy(hits, truth)
    assert np.allclose(bootstrap_interval(parts, 300, error, confidence=0.5), [1 - narrow[1], 1 - narrow[0]])
    records = [boundary_counts(*(maps[0] for maps in case(seed, 4, ignored=0)[:2]), 4) for seed in range(4)]
    assert bootstrap_interval(records, 4, samples=20)[0] < bootstrap_interval(records, 4, samples=20)[1]


def test_bootstrap_draws_in_parts_of_bounded_size():
    "Many images: the draws do not fit into one part, and the result must not show it."
    records = [[[0, 0, n % 7], [0, 1, 1], [1, 1, n % 5]] for n in range(20_000)]
    low, high = bootstrap_interval(records, 2, "pixel_accuracy", samples=1000)
    accuracy = np.array([[n % 7 + n % 5, n % 7 + n % 5 + 1] for n in range(20_000)])
    spread = accuracy[:, 0] - accuracy[:, 1] * accuracy[:, 0].sum() / accuracy[:, 1].sum()
    error = spread.std() * 20_000**0.5 / accuracy[:, 1].sum()  # of a ratio estimate, to first order
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_bootstrap_refuses():
    one = [Confusion(2).add([0], [1])]
    with pytest.raises(ValueError, match="no images"):
        bootstrap_interval([], 2)
    with pytest.raises(ValueError, match="miou_present"):
        bootstrap_interval(one, 2, "miou")
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval(one, 2, confidence=95)
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval(one, 3)
    with pytest.raises(ValueError, match="record consists"):
        bootstrap_interval([[[0, 2, 1]]], 2)


def test_metrics_load_without_torch_and_scipy():
    code = (
        "import sys, ovss_nb.benchmarks.metrics; print(sorted({'torch', 'scipy', 'nbdev', 'matplotlib'} &"
        " sys.modules.keys()))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
