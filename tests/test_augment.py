"""Pictures and labels move together, chance comes from one place, several vocabularies become one, and a
killed run goes on with the same pictures.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from ovss_nb.training.augment import (
    Augmentation,
    SetBatches,
    TrainingSets,
    choose_classes,
    merge_vocabularies,
)
from ovss_nb.training.feature_cache import TrainingError
from ovss_nb.training.fit import fit, step_generator
from ovss_nb.core.vocabulary import Vocabulary, list_vocabularies, load_vocabulary

PLAIN = dict(brightness=0, contrast=0, saturation=0, hue=0)


class Colored:
    "Pictures whose red is their label, times ten."

    ignore = 255

    def __init__(self, words, count, seed=0):
        generator, self.vocabulary = np.random.default_rng(seed), Vocabulary.of(words)
        self.maps = [
            np.kron(generator.integers(0, len(self.vocabulary), (4, 5)), np.ones((10, 12), int)).astype(
                np.uint8
            )
            for _ in range(count)
        ]

    def __len__(self):
        return len(self.maps)

    def labels(self, i):
        return self.maps[i]

    def image(self, i):
        return np.stack([10 * self.maps[i], np.zeros_like(self.maps[i]), np.zeros_like(self.maps[i])], -1)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (300, 40)])
@pytest.mark.parametrize(
    "options",
    [
        dict(shortest=(40, 200), crop=64),
        dict(shortest=(30, 30), crop=64),
        dict(shortest=(64, 64), longest=80, crop=64),
    ],
)
def test_every_pixel_keeps_its_label(shape, options):
    """A slope from left to right and top to bottom:
    after any resizing, cut and mirroring the picture is the label still.
    """
    slope = (np.linspace(0, 1, shape[0])[:, None] * 120 + np.linspace(0, 1, shape[1]) * 120).astype(np.uint8)
    mirrored = set()
    for n in range(12):
        picture, labels = Augmentation(**options, **PLAIN)(
            np.stack([slope] * 3, -1), slope, step_generator(0, n)
        )
        assert (
            picture.shape == (3, 64, 64)
            and picture.dtype == torch.uint8
            and labels.shape == (64, 64)
            and labels.dtype == torch.int64
            and not isinstance(picture, tv_tensors.TVTensor)
        )
        inside = labels != 255
        assert (picture[0].int() - labels).abs()[inside].max() <= 12 and (picture[:, ~inside] == 128).all()
        row = labels[:, inside.any(0)][0]
        mirrored.add(bool(row[0] > row[-1]))
    assert mirrored == {True, False}


def test_no_label_is_made_up():
    labels = np.random.default_rng(0).choice([0, 7, 200], (60, 90))
    for n in range(12):
        found = Augmentation(shortest=(30, 150), crop=64)(
            np.zeros((60, 90, 3), np.uint8), labels, step_generator(0, n)
        )[1]
        assert set(found.unique().tolist()) <= {0, 7, 200, 255}


def test_colors_change_the_picture_alone():
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    labels = np.arange(64 * 64).reshape(64, 64) % 7
    for option in ("brightness", "contrast", "saturation", "hue"):
        change = Augmentation(shortest=(64, 64), crop=64, flip=0, jitter=1, **PLAIN | {option: 0.4})
        picture, same = change(photo, labels, step_generator(0, 1))
        assert (picture.permute(1, 2, 0).numpy() != photo).mean() > 0.5 and (same.numpy() == labels).all(), (
            option
        )


COLORS = ("brightness", "contrast", "saturation", "hue")


def recolored(photo, n, **options):
    change = Augmentation(shortest=(16, 16), crop=16, flip=0, **options)
    return (
        change(photo, np.zeros(photo.shape[:2], np.uint8), step_generator(0, n))[0].permute(1, 2, 0).numpy()
    )


@pytest.mark.parametrize(
    "jitter, low, high", [(0.5, 0.42, 0.58), (0.0, 0, 0), (1.0, 0.97, 1), (0.2, 0.13, 0.27)]
)
def test_each_color_changes_with_a_chance_of_its_own(jitter, low, high):
    """SSD's distortion:
    each of the four in half of the pictures, whatever the others do; one picture in sixteen keeps its
    colors.
    """
    photo = np.random.default_rng(0).integers(30, 200, (16, 16, 3), dtype=np.uint8)
    changed = {
        option: np.array(
            [
                (
                    recolored(
                        photo,
                        n,
                        **({"jitter": jitter} if jitter != 0.5 else {}),
                        **{color: 0 for color in COLORS if color != option},
                    )
                    != photo
                ).any()
                for n in range(300)
            ]
        )
        for option in COLORS
    }
    assert all(low <= value.mean() <= high for value in changed.values()), {
        option: value.mean() for option, value in changed.items()
    }
    if jitter == 0.5:
        assert all(
            0.15 < (changed[a] & changed[b]).mean() < 0.35 for i, a in enumerate(COLORS) for b in COLORS[:i]
        )
        kept = np.mean([(recolored(photo, n) == photo).all() for n in range(300)])
        # a option at 0 draws like any other
        assert 0.02 < kept < 0.12 and kept == np.mean(~np.any(list(changed.values()), 0))


def test_contrast_comes_before_or_after_saturation_and_hue():
    """Where white is cut off the order shows:
    red at full saturation, twice as bright, is white only if colors are taken out first.
    """
    photo = np.full((16, 16, 3), (200, 120, 120), np.uint8)
    found = {
        tuple(recolored(photo, n, jitter=1, brightness=0, hue=0, contrast=1, saturation=1)[0, 0])
        for n in range(40)
    }

    def contrast(x, f):
        return np.clip(np.round(np.array(x) * f), 0, 255)

    def saturate(x, f):
        return np.clip(
            np.round(max(x) - (max(x) - np.array(x)) * min(f, max(x) / max(1, max(x) - min(x)))), 0, 255
        )

    orders = set()
    for n in range(40):
        generator = step_generator(0, n)
        torch.rand((), generator=generator)  # the size
        draws = [torch.rand((), generator=generator).item() for _ in range(9)]
        factors = {name: 1 + 2 * draws[2 * i + 1] - 1 for i, name in enumerate(COLORS)}
        steps = [lambda x: contrast(x, factors["contrast"]), lambda x: saturate(x, factors["saturation"])]
        x = (200, 120, 120)
        for step in steps if draws[8] < 0.5 else steps[::-1]:
            x = step(x)
        assert (
            np.abs(
                recolored(photo, n, jitter=1, brightness=0, hue=0, contrast=1, saturation=1)[0, 0] - x
            ).max()
            <= 1
        )
        orders.add(draws[8] < 0.5)
    assert orders == {True, False} and len(found) > 20


def test_colors_change_as_in_ssd():
    """Brightness adds at most 32 of 255, contrast multiplies, saturation and hue leave the other two of HSV
    alone (against the standard library's HSV).
    """
    import colorsys

    photo = np.random.default_rng(1).integers(60, 170, (16, 16, 3), dtype=np.uint8)

    def hsv(x):
        return np.array([colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3) / 255])

    for n in range(20):
        change = recolored(photo, n, jitter=1, contrast=0, saturation=0, hue=0).astype(int) - photo
        assert np.ptp(change) == 0 and abs(change[0, 0, 0]) <= 32
        factor = recolored(photo, n, jitter=1, brightness=0, saturation=0, hue=0) / photo
        assert np.ptp(factor) < 0.02 and 0.49 < factor.mean() < 1.51
        before, after = hsv(photo), hsv(recolored(photo, n, jitter=1, brightness=0, contrast=0, hue=0))
        ratio = (after[:, 1] / before[:, 1])[(before[:, 1] > 0.2) & (after[:, 1] < 0.95)]
        assert (
            np.abs(before[:, 2] - after[:, 2]).max() < 0.01
            and np.ptp(ratio) < 0.1
            and 0.45 < ratio.mean() < 1.55
        )
        after = hsv(recolored(photo, n, jitter=1, brightness=0, contrast=0, saturation=0))
        turn = ((after - before)[:, 0] + 0.5) % 1 - 0.5
        assert np.abs(before - after)[:, 1:].max() < 0.03 and np.abs(turn[before[:, 1] > 0.2]).max() < 0.12


def test_black_and_white_have_no_color_to_change():
    for value in (0, 255):
        photo = np.full((16, 16, 3), value, np.uint8)
        for n in range(5):
            assert (recolored(photo, n, jitter=1, brightness=0, contrast=0) == photo).all()


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (20, 200)])
def test_a_scale_is_of_the_picture_itself(shape):
    """Every picture from half to twice its own size, whatever that is:
    seen in how much of a slope one crop shows.
    """
    slope = np.tile(np.arange(shape[1], dtype=np.uint8), (shape[0], 1))
    factors = []
    for n in range(60):
        picture, labels = Augmentation(scale=(0.5, 2), crop=16, flip=0, jitter=0)(
            np.stack([slope] * 3, -1), slope, step_generator(0, n)
        )
        row = labels[0][labels[0] != 255].float()
        factors.append(float((len(row) - 1) / max(1, row[-1] - row[0])))
    assert 0.4 < min(factors) < 0.7 and 1.6 < max(factors) < 2.6


def test_sizes_lie_so_many_pixels_apart():
    "SAN's eleven sizes from 320 to 960, here a tenth of them; both ends are among them."
    slope, sizes = np.zeros((10, 10), np.uint8), set()
    for n in range(300):
        sizes.add(
            int(
                (
                    Augmentation(shortest=(32, 96), step=6, crop=100, jitter=0)(
                        np.zeros((10, 10, 3), np.uint8), slope, step_generator(0, n)
                    )[1]
                    != 255
                )
                .any(0)
                .sum()
            )
        )
    assert sizes == set(range(32, 97, 6))
    found = {
        int(
            (
                Augmentation(shortest=(4, 7), crop=9, jitter=0)(
                    np.zeros((10, 10, 3), np.uint8), slope, step_generator(0, n)
                )[1]
                != 255
            )
            .any(0)
            .sum()
        )
        for n in range(60)
    }
    assert found == {4, 5, 6, 7}


@pytest.mark.parametrize(
    "wrong",
    [
        dict(scale=(0, 2)),
        dict(scale=(2, 1)),
        dict(scale=(1,)),
        dict(jitter=1.5),
        dict(step=0),
        dict(brightness=-0.1),
    ],
)
def test_senseless_changes_are_refused(wrong):
    with pytest.raises(ValueError):
        Augmentation(**wrong)


def test_global_chance_is_left_alone():
    photo, labels = np.zeros((50, 50, 3), np.uint8), np.zeros((50, 50), np.uint8)
    before = torch.get_rng_state()
    Augmentation(crop=32)(photo, labels, step_generator(0, 0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("first", list_vocabularies())
def test_unions_of_shipped_vocabularies(first):
    """Every name has one place, two names of one vocabulary two, and each place knows the words of all who
    share it.
    """
    own = load_vocabulary(first)
    for second in ("VOC-21", "COCO-Stuff-171"):
        other = load_vocabulary(second)
        union, places = merge_vocabularies([own, other])
        for vocabulary, place in zip((own, other), places):
            real = place[place >= 0]
            assert len(set(real)) == len(real) == len(vocabulary) - len(vocabulary.background)
            assert all(
                set(words) <= set(union.words[k]) for k, words in zip(place, vocabulary.words) if k >= 0
            )
        assert max(len(own) - len(own.background), len(other) - len(other.background)) <= len(union)
    assert len(merge_vocabularies([own, own])[0]) == len(own) - len(own.background)


def test_an_unseen_class_is_in_no_label():
    sets = TrainingSets(
        [
            Colored(["background", "cat", "sofa"], 6),
            Colored({"couch": ["couch", "sofa"], "car": "car"}, 5, 1),
        ],
        unseen=["couch"],
    )
    hidden = sets.vocabulary.names.index("sofa")
    assert sets.unseen == [hidden]
    for n in range(len(sets)):
        assert hidden not in sets.labels(n) and set(np.unique(sets.labels(n))) <= {
            *sets.classes[sets.items[n][0]],
            255,
        }


def test_batches_are_of_one_set_and_do_not_depend_on_those_before():
    groups = [np.arange(10), np.arange(10, 37), np.arange(37, 40)]
    batches = SetBatches(groups, 3, seed=1)
    drawn = [batches[i] for i in range(3 * len(batches))]
    for epoch in range(3):
        part = drawn[epoch * len(batches) : (epoch + 1) * len(batches)]
        for s, group in enumerate(groups):
            rows = np.concatenate([rows for k, rows in part if k == s])
            assert len(rows) == len(set(rows)) == len(group) // 3 * 3 and set(rows) <= set(group)
    again = SetBatches(groups, 3, seed=1)
    for i in (25, 3, 14):
        assert again[i][0] == drawn[i][0] and (again[i][1] == drawn[i][1]).all()
    with pytest.raises(TrainingError, match="cannot be drawn"):
        SetBatches(groups, 4)


def test_chosen_classes_hold_what_occurs():
    for n in range(20):
        labels = torch.randint(0, 6, (3, 3), generator=step_generator(1, n))
        chosen, numbered = choose_classes(labels, np.arange(30), 12, step_generator(0, n))
        assert len(set(chosen)) == 12 and (torch.from_numpy(chosen)[numbered] == labels).all()


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_with_the_same_pictures(tmp_path):
    sets, change = (
        TrainingSets([Colored(["cat", "dog", "car"], 9), Colored(["sky", "cat"], 7, 1)]),
        Augmentation(shortest=(20, 50), crop=32),
    )
    numbers = SetBatches(sets.groups, 2)

    def run(folder, stop=None):
        torch.manual_seed(0)
        model = nn.Conv2d(3, len(sets.vocabulary), 1)

        def batches(index, generator):
            if index == stop:
                raise Stopped
            return tuple(map(torch.stack, zip(*(change(*sets[n], generator) for n in numbers[index][1]))))

        def step(model, batch):
            return nn.functional.cross_entropy(model(batch[0] / 255), batch[1], ignore_index=255), {}

        return fit(model, step, batches, folder, steps=12, save_every=5, log_every=1, progress=False)

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "part", stop=8)
    assert run(tmp_path / "part") == whole
