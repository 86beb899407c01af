"""Training:
exact resume after real kills at every file operation and at random moments, Ctrl-C, schedules, groups, cached
features.
"""

import csv, io, json, os, random, re, shutil, signal, subprocess, sys, tarfile, threading, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ovss_nb.training.captions import CaptionSet
from ovss_nb.benchmarks.datasets import FolderDataset
from ovss_nb.training.checkpoint import checkpoints, load_weights, save_checkpoint
from ovss_nb.training.feature_cache import TrainingError, cached_features
from ovss_nb.training.fit import Batches, _read_state, fit, step_generator
from ovss_nb.training.optimizer import parameter_groups, schedule_factor
from ovss_nb.training.recipes import stored_images

posix = pytest.mark.skipif(os.name != "posix", reason="kill -9 and fork are POSIX's")
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
Y = X @ torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
RECIPE = dict(steps=14, lr=0.01, warmup=3, log_every=2, save_every=3, progress=False)
SHORT = RECIPE | dict(steps=7)  # four checkpoints, two of which are deleted


class Small(nn.Module):
    "Dropout for the random numbers, a batch norm for buffers, a frozen part, one weight under two names."

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.frozen, self.first, self.norm, self.drop, self.last = (
                nn.Linear(8, 8).requires_grad_(False),
                nn.Linear(8, 8),
                nn.BatchNorm1d(8),
                nn.Dropout(0.5),
                nn.Linear(8, 3),
            )
        self.tied = self.first

    def forward(self, x):
        return self.last(self.drop(self.norm(self.tied(F.relu(self.first(self.frozen(x)))))))


ORDER = Batches(40, 8)


def batches(index, generator):
    chosen = torch.from_numpy(ORDER[index])
    return X[chosen] + 0.1 * torch.randn(8, 8, generator=generator), Y[chosen]


def step(model, batch):
    error = model(batch[0]) - batch[1]
    return error.square().mean(), dict(largest=error.abs().max())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


def read(run):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(run / "log.csv"))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "The last digit of a sum depends on the number of threads, and the processes forked below have one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "An undisturbed run: folder, log, weights."
    run, model = tmp_path_factory.mktemp("calm") / "run", Small()
    return run, fit(model, step, batches, run, **RECIPE), state(model)


# ---- killed

# Imports once and forks a process for every run, so that hundreds of kills do not pay for hundreds of starts
# of Python.
NURSERY = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch; torch.set_num_threads(1)
from test_fit import *
import tempfile
with tempfile.TemporaryDirectory() as warm:
    train_once(Path(warm), 0, SHORT)   # what torch imports on first use
real = {(torch, "save"): torch.save}
for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
    real[os, name] = getattr(os, name)
def dies(deadly):
    "Kill this process right before its file operation number `deadly`."
    count = [0]
    def counted(call):
        def wrapper(*a, **k):
            count[0] += 1
            if count[0] == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*a, **k)
        return wrapper
    for (module, name), call in real.items():
        setattr(module, name, counted(call))
for line in sys.stdin:
    kind, folder, deadly, seconds = line.split()
    child = os.fork()
    if not child:
        try:
            if int(deadly):
                dies(int(deadly))
            if kind == "features":
                features_once(Path(folder), float(seconds))
            else:
                train_once(Path(folder), float(seconds), SHORT if kind == "short" else RECIPE)
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def train_once(run, seconds, recipe):
    def slow(model, batch):
        time.sleep(seconds)
        return step(model, batch)

    fit(Small(), slow, batches, run, **recipe)


def features_once(folder, seconds):
    with open(folder.with_suffix(".asked"), "a") as log:

        def compute(rows):
            log.write(" ".join(map(str, rows)) + "\n")
            log.flush()
            time.sleep(seconds)
            return dict(
                square=np.array([[i * i, i] for i in rows], np.int32),
                half=np.array([i / 2 for i in rows], np.float16),
            )

        return cached_features(
            compute, [f"{i}.jpg" for i in range(23)], folder, ("encoder", 32), batch=4, progress=False
        )


class Nursery:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, kind, folder, deadly=0, seconds=0.0):
        self.process.stdin.write(f"{kind} {folder} {deadly} {seconds}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        return int(self.process.stdout.readline())  # exit code, negative for a signal

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


@posix
def test_killed_before_every_file_operation(tmp_path):
    """Whatever operation a kill precedes, every checkpoint in sight is whole, and the resumed run has the log
    and the weights of an undisturbed one.
    """
    undisturbed = Small()
    log = fit(undisturbed, step, batches, tmp_path / "calm", **SHORT)
    with Nursery() as nursery:
        deadly = code = 1
        while code:
            run = tmp_path / f"run{deadly}"
            nursery.start("short", run, deadly)
            code = nursery.end()
            assert code in (0, -signal.SIGKILL)
            for path in checkpoints(run):
                load_weights(Small(), path)
                assert torch.load(path / "state.pt", weights_only=True)["step"] == int(path.name[5:])
            # each fifth is resumed: the checkpoints of all have been looked at
            if deadly % 5 == 1 or not code:
                # other weights, unless the first checkpoint already holds the run's
                resumed = Small(seed=deadly)
                if checkpoints(run):
                    resumed.frozen.load_state_dict(Small().frozen.state_dict())
                else:
                    resumed = Small()
                assert fit(resumed, step, batches, run, **SHORT) == log and equal(
                    state(resumed), state(undisturbed)
                )
                assert (run / "log.csv").read_bytes() == (tmp_path / "calm/log.csv").read_bytes()
                assert len(checkpoints(run)) == 2 and not [path for path in (run / "checkpoints").glob(".*")]
            deadly += 1
    assert deadly > 40


@posix
def test_killed_at_random_moments(tmp_path, calm):
    chance, kills, finished = random.Random(0), 0, 0
    with Nursery() as nursery:
        while kills < 10 or finished < 2:
            run, finished, here = tmp_path / f"run{finished}", finished + 1, 0
            while True:
                child = nursery.start("train", run, seconds=0.01)
                # longer and longer: a busy machine shall come to an end too
                time.sleep(chance.random() * (0.2 + 0.1 * here))
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                if not (code := nursery.end()):
                    break
                assert code == -signal.SIGKILL
                kills, here = kills + 1, here + 1
            assert (run / "log.csv").read_bytes() == (calm[0] / "log.csv").read_bytes()
            model = Small()
            load_weights(model, run)
            assert equal(state(model), calm[2])


@posix
def test_features_killed_before_every_file_operation(tmp_path):
    "At most one batch is computed again per kill, and the arrays are those of an undisturbed run."
    wanted = features_once(tmp_path / "calm", 0)
    with Nursery() as nursery:
        deadly = code = 1
        while code:
            folder = tmp_path / f"f{deadly}"
            nursery.start("features", folder, deadly)
            code = nursery.end()
            assert code in (0, -signal.SIGKILL)
            found = features_once(folder, 0)
            assert all(
                np.array_equal(found[key], value) and found[key].dtype == value.dtype
                for key, value in wanted.items()
            )
            asked = [int(key) for key in folder.with_suffix(".asked").read_text().split()]
            assert set(asked) == set(range(23)) and len(asked) <= 23 + 4
            deadly += 1
    assert deadly > 12


@posix
def test_ctrl_c_finishes_the_step_and_saves(tmp_path, calm):
    "A real SIGINT to a process; the run is saved at the step that was under way."
    with Nursery() as nursery:
        child = nursery.start("train", tmp_path / "run", seconds=0.3)
        while not (tmp_path / "run/log.csv").exists():
            time.sleep(0.01)
        time.sleep(0.1)  # in the middle of a step, which has just begun to sleep
        os.kill(child, signal.SIGINT)
        assert nursery.end() == 1  # KeyboardInterrupt
    stopped = int(checkpoints(tmp_path / "run")[-1].name[5:])
    assert (
        2 < stopped < 14
        and torch.load(checkpoints(tmp_path / "run")[-1] / "state.pt", weights_only=True)["finished"] is False
    )
    model = Small()
    assert fit(model, step, batches, tmp_path / "run", **RECIPE) == calm[1] and equal(state(model), calm[2])


def test_interrupted_in_process(tmp_path, calm):
    "SIGINT at each step; the handler is as it was afterwards."
    before = signal.getsignal(signal.SIGINT)

    def interrupting(model, batch):
        signal.raise_signal(signal.SIGINT)
        return step(model, batch)

    for n in range(1, 14):
        with pytest.raises(KeyboardInterrupt, match=f"after step {n} and saved"):
            fit(Small(), interrupting, batches, tmp_path, **RECIPE)
        assert signal.getsignal(signal.SIGINT) is before and int(checkpoints(tmp_path)[-1].name[5:]) == n
    # the last step has nothing to interrupt
    assert fit(Small(), interrupting, batches, tmp_path, **RECIPE) == calm[1]


def test_a_thread_may_train(tmp_path, calm):
    logs = []
    thread = threading.Thread(target=lambda: logs.append(fit(Small(), step, batches, tmp_path, **RECIPE)))
    thread.start()
    thread.join()
    assert logs == [calm[1]]


# ---- what the loop does


def test_loop_equals_torch_written_out(tmp_path):
    "The same steps by hand: AdamW, schedule, clipping, accumulation of two batches."
    model, other = Small(), Small()
    log = fit(
        model,
        step,
        batches,
        tmp_path,
        **RECIPE | dict(schedule="poly", clip=0.05, accumulate=2, log_every=1, seed=5, weight_decay=0.1),
    )
    matrices = [other.first.weight, other.last.weight]
    vectors = [p for p in other.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for i in range(14):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 - i / 14) ** 0.9 * min(1, (i + 1) / 3)
            losses = [step(other, batches(n, step_generator(5, n)))[0] for n in (2 * i, 2 * i + 1)]
            optimizer.zero_grad()
            (sum(losses) / 2).backward()
            norm = nn.utils.clip_grad_norm_(matrices + vectors, 0.05)
            optimizer.step()
            assert (
                abs(log[i]["loss"] - float(sum(losses).detach()) / 2) < 1e-5
                and abs(log[i]["gradient"] - norm) < 1e-5
                and log[i]["lr"] == optimizer.param_groups[0]["lr"]
            )
    assert all(
        (tensor - p).abs().max() < 1e-6 for tensor, p in zip(state(model).values(), state(other).values())
    )


def test_log(calm):
    run, log, _ = calm
    assert (
        read(run) == log
        and [row["step"] for row in log] == list(range(2, 15, 2))
        and set(log[0]) == {"step", "lr", "loss", "gradient", "largest"}
    )
    assert {path.name for path in run.iterdir()} - {".lock"} == {"log.csv", "checkpoints"}


def test_it_learns(tmp_path):
    model = Small()

    def error():
        return float(F.mse_loss(model.eval()(X), Y).detach())

    before = error()
    model.train()
    fit(model, step, batches, tmp_path, **RECIPE | dict(steps=150, lr=0.03, log_every=50, save_every=150))
    assert error() < 0.5 * before


def test_rows_are_means_over_their_interval(tmp_path, calm):
    fine = fit(Small(), step, batches, tmp_path, **RECIPE | dict(log_every=1))
    for row, first, second in zip(calm[1], fine[::2], fine[1::2]):
        for name in ("loss", "gradient", "largest"):
            assert abs(row[name] - (first[name] + second[name]) / 2) < 1e-9


def test_the_callers_random_numbers_stay(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fit(Small(), step, batches, tmp_path / "a", **RECIPE)
    assert torch.rand(2).equal(expected)
    assert fit(Small(), step, batches, tmp_path / "b", **RECIPE | dict(seed=1)) != fit(
        Small(), step, batches, tmp_path / "a", **RECIPE
    )


def test_finished_runs_fill_the_model(tmp_path, calm):
    def never(*_):
        raise AssertionError("a finished run asks for nothing")

    model = Small(seed=9)
    model.frozen.load_state_dict(Small().frozen.state_dict())
    assert fit(model, never, never, calm[0], **RECIPE) == calm[1] and equal(state(model), calm[2])


def test_on_interval(tmp_path):
    "It may measure (in other modes), write into the row and stop the run; a stopped run is a finished one."
    model, modes = Small(), []
    model.drop.eval()

    def on_interval(done, row):
        modes.append((model.norm.training, model.drop.training))
        model.eval()
        if done == 4:
            row["score"] = 0.5
        return done == 6

    log = fit(model, step, batches, tmp_path, on_interval=on_interval, **RECIPE)
    assert (
        [row["step"] for row in log] == [2, 4, 6]
        and modes == [(True, False)] * 3
        and model.norm.training
        and not model.drop.training
    )
    table = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [row["score"] for row in table] == ["", "0.5", ""] and checkpoints(tmp_path)[
        -1
    ].name == "step-00000006"
    assert fit(model, step, batches, tmp_path, on_interval=on_interval, **RECIPE) == log and len(modes) == 3


def test_bf16(tmp_path, calm):
    seen = []

    def looked(model, batch):
        seen.append(model.first(batch[0]).dtype)
        return step(model, batch)

    log = fit(Small(), looked, batches, tmp_path / "a", **RECIPE | dict(precision="bf16"))
    assert (
        set(seen) == {torch.bfloat16}
        and all(abs(trial["loss"] / p["loss"] - 1) < 0.1 for trial, p in zip(log, calm[1]))
        and log != calm[1]
    )
    with pytest.raises(OSError):
        fit(
            Small(),
            lambda m, b: (_ for _ in ()).throw(OSError) if len(seen) == 19 else looked(m, b),
            batches,
            tmp_path / "b",
            **RECIPE | dict(precision="bf16"),
        )
    assert fit(Small(), looked, batches, tmp_path / "b", **RECIPE | dict(precision="bf16")) == log


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda loss: loss * float("nan"), "The loss is nan at step 5"),
        (lambda loss: loss / 0, "The loss is inf at step 5"),
        (
            lambda loss: loss + (loss * 0).sqrt(),
            "The gradient's norm is nan at step 5|The gradient's norm is inf at step 5",
        ),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_numbers_that_are_none(tmp_path, spoil, message):
    count = [0]

    def hopeless(model, batch):
        count[0] += 1
        loss, values = step(model, batch)
        return (spoil(loss) if count[0] == 5 else loss), values

    with pytest.raises(TrainingError, match=message) as e:
        fit(Small(), hopeless, batches, tmp_path, **RECIPE)
    assert "The checkpoint of step 3 is whole" in str(e.value)
    model = Small()
    load_weights(model, tmp_path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps must be"),
        (dict(accumulate=1.5), "accumulate must be"),
        (dict(keep=0), "keep must be"),
        (dict(save_every=True), "save_every"),
        (dict(precision="fp16"), "'fp32' or 'bf16'"),
        (dict(schedule="linear"), ".constant., .cosine. or .poly."),
        (dict(groups={"clip": 0.1}), r"name fits \['clip'\]"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(TrainingError, match=message):
        fit(Small(), step, batches, tmp_path / "run", **RECIPE | options)
    assert not checkpoints(tmp_path / "run")


def test_another_run_is_not_continued(tmp_path, calm):
    for name, value in dict(
        steps=20,
        lr=0.1,
        weight_decay=0.0,
        groups={"last": 0.1},
        schedule="poly",
        warmup=0,
        clip=None,
        accumulate=2,
        precision="bf16",
        seed=1,
        log_every=3,
    ).items():
        with pytest.raises(TrainingError, match=f"holds a run with {name}=.*Take another run_dir"):
            fit(Small(), step, batches, calm[0], **RECIPE | {name: value})
    other = Small()
    other.last = nn.Linear(8, 4)
    with pytest.raises(
        TrainingError, match=r"of another model \(2 tensors differ\): last.bias is \(3,\), expected \(4,\)"
    ):
        fit(other, step, batches, calm[0], **RECIPE)


def test_two_processes_do_not_share_a_folder(tmp_path):
    def nested(model, batch):
        with pytest.raises(TrainingError, match="Another process trains in"):
            fit(Small(), step, batches, tmp_path, **RECIPE)
        return step(model, batch)

    fit(Small(), nested, batches, tmp_path, **RECIPE | dict(steps=2))
    fit(Small(), step, batches, tmp_path, **RECIPE | dict(steps=2))  # the lock is gone


# ---- checkpoints


def test_checkpoints_hold_what_is_trained(calm):
    from safetensors.torch import load_file

    weights = load_file(checkpoints(calm[0])[-1] / "model.safetensors")
    assert set(weights) == {
        "first.weight",
        "first.bias",
        "last.weight",
        "last.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert [trial.name for trial in checkpoints(calm[0])] == ["step-00000012", "step-00000014"]


def test_keep(tmp_path):
    for n in range(5):
        save_checkpoint(Small(), tmp_path, n, {}, keep=3)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [2, 3, 4]


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("content", [b"", b"x" * 100, None], ids=["empty", "garbage", "cut"])
def test_damaged_checkpoints_are_named(tmp_path, calm, file, content):
    fit(Small(), step, batches, tmp_path, **RECIPE)
    path = checkpoints(tmp_path)[-1]
    (path / file).write_bytes((path / file).read_bytes()[:-30] if content is None else content)
    with pytest.raises(TrainingError, match="step-00000014 is damaged.*Delete it"):
        fit(Small(), step, batches, tmp_path, **RECIPE)
    for rest in path.iterdir():
        rest.unlink()
    path.rmdir()
    assert fit(Small(), step, batches, tmp_path, **RECIPE) == calm[1]  # from the one before


def test_load_weights_refuses(tmp_path):
    with pytest.raises(TrainingError, match="has no checkpoint"):
        load_weights(Small(), tmp_path)
    save_checkpoint(Small(), tmp_path, 0, {})
    thawed = Small().requires_grad_()
    with pytest.raises(TrainingError, match=r"frozen.bias is missing, expected \(8,\)"):
        load_weights(thawed, tmp_path)


# ---- batches, schedules, groups


def test_batches():
    order = Batches(np.arange(100, 111), 4, seed=2)
    assert len(order) == 2
    for epoch in range(5):
        first, second = order[2 * epoch], order[2 * epoch + 1]
        assert len(set(first) | set(second)) == 8 and set(first) | set(second) <= set(range(100, 111))
    for index in (7, 0, 3, 7):
        assert np.array_equal(order[index], Batches(np.arange(100, 111), 4, seed=2)[index])
    assert not np.array_equal(order[0], Batches(np.arange(100, 111), 4, seed=3)[0]) and not np.array_equal(
        order[0], order[2]
    )
    for items, size in ((3, 4), (0, 1), (5, 0)):
        with pytest.raises(TrainingError, match="cannot be drawn"):
            Batches(items, size)


def test_generators_differ_by_seed_and_step():
    drawn = {
        tuple(torch.rand(3, generator=step_generator(seed, i)).tolist())
        for seed in range(20)
        for i in range(20)
    }
    assert len(drawn) == 400


def test_schedules():
    assert (
        schedule_factor(0, 10) == 1
        and schedule_factor(0, 10, warmup=4) == 0.25
        and schedule_factor(5, 10) == 0.5
    )
    assert (
        schedule_factor(9, 10, "poly") == pytest.approx(0.1**0.9)
        and schedule_factor(9, 10, "constant", 3) == 1
    )
    # as detectron2's warm-up: a factor, not a shift
    assert schedule_factor(1, 100, "poly", 4) == pytest.approx(0.99**0.9 / 2)


def test_groups_as_in_the_papers():
    """Norms, biases, tables and positions do not decay;
    CLIP learns with a hundredth, whatever a matrix is called.
    """
    model = nn.Module()
    model.clip = nn.TransformerEncoderLayer(8, 2, 16)
    model.query = nn.Linear(8, 8)  # a layer that makes queries is a matrix like any other
    model.query_embed = nn.Embedding(5, 8)
    for name, shape in dict(
        pos_embed=(1, 4, 8),
        relative_position_bias_table=(9, 2),
        cls_token=(1, 1, 8),
        queries=(3, 8),
        proj=(8, 4),
        temperature=(),
    ).items():
        setattr(model, name, nn.Parameter(torch.zeros(shape)))
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    found = {
        name: (group["factor"], group["weight_decay"])
        for group in parameter_groups(model, 0.1, {"^clip.*attn": 0.01, "clip": 0.1})
        for name in group["names"]
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    decay = {
        "clip.self_attn.in_proj_weight",
        "clip.self_attn.out_proj.weight",
        "clip.linear1.weight",
        "clip.linear2.weight",
        "query.weight",
        "proj",
    }
    assert found == {
        name: (
            0.01 if "attn" in name else 0.1 if name.startswith("clip") else 1.0,
            0.1 if name in decay else 0.0,
        )
        for name in trained
    }
    with pytest.raises(TrainingError, match="no trainable parameter"):
        parameter_groups(model.frozen)


def test_groups_learn_at_their_rate(tmp_path):
    "Adam's first step has the size of its learning rate."
    model, before = Small(), state(Small())
    fit(
        model,
        step,
        batches,
        tmp_path,
        **RECIPE | dict(steps=1, warmup=0, weight_decay=0.0, clip=None, groups={"first": 0.01}),
    )
    moved = {name: (value - before[name]).abs().max() for name, value in state(model).items()}
    assert (
        0.9e-4 < moved["first.weight"] < 1.1e-4
        and 0.9e-2 < moved["last.weight"] < 1.1e-2
        and moved["frozen.weight"] == 0
    )


# ---- several processes, average, TensorBoard

SHARED = RECIPE | dict(accumulate=2)


def quiet():
    "Without dropout, whose numbers are every process's own."
    model = Small()
    model.drop.eval()
    return model


def as_a_pair(folder, resume):
    """What each of two processes does:
    an undisturbed run, two that must be refused, and one in which the second process dies at step 8; then
    that one again.
    """
    from ovss_nb.training.fit import processes

    number, _ = processes()
    steps = [0]

    def dies(model, batch):
        steps[0] += 1
        if steps[0] == 8 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(model, batch)

    def spoilt(model, batch):
        loss, values = step(model, batch)
        steps[0] += 1
        return loss * (float("nan") if steps[0] == 3 and number == 1 else 1), values

    def refused(*a, **k):
        try:
            fit(*a, progress=False, **k)
        except TrainingError as e:
            return str(e)

    if not resume:
        model = quiet() if number == 0 else Small(seed=7)  # the first one's weights are taken
        model.drop.eval()
        model.frozen.load_state_dict(Small().frozen.state_dict())

        def early(done, row):
            assert number == 0 and not row.get("score")
            row["score"] = done
            return done == 10

        whole = fit(model, step, batches, folder / "whole", **SHARED)
        said = dict(
            whole=whole,
            stopped=fit(quiet(), step, batches, folder / "stopped", on_interval=early, **SHARED),
            nan=refused(
                quiet(),
                spoilt,
                batches,
                folder / "nan",
                **{k: v for k, v in SHARED.items() if k != "progress"},
            ),
            odd=refused(quiet(), step, batches, folder / "odd", steps=3, accumulate=3),
        )
        fit(Small(), step, batches, folder / "calm", average=0.9, **SHARED)
        (folder / f"{number}.json").write_text(json.dumps(said))
        steps[0] = 0
    model = Small()
    fit(model, step if resume else dies, batches, folder / "dies", average=0.9, **SHARED)
    torch.save(model.state_dict(), folder / f"weights{number}.pt")


def pair(folder, resume=False):
    script = folder / "pair.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\nimport torch; torch.set_num_threads(1)\nfrom test_fit"
        " import *\nas_a_pair(Path(sys.argv[2]), sys.argv[3] == 'True')\n"
    )
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            Path(__file__).parent,
            folder,
            str(resume),
        ],
        capture_output=True,
        text=True,
    )


@posix
def test_two_processes_train_as_one(tmp_path):
    """Under torchrun:
    the curve and the weights of one process; a fault of one stops both; killed and started again, the same
    run.
    """
    killed = pair(tmp_path)
    assert killed.returncode and (tmp_path / "1.json").exists(), killed.stderr
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    model = quiet()
    alone = fit(model, step, batches, tmp_path / "alone", **SHARED)
    for ours, theirs in zip(alone, one["whole"], strict=True):
        assert ours.keys() == theirs.keys() and all(
            ours[k] == pytest.approx(theirs[k], abs=1e-5) for k in ours
        )
    shared = Small()
    load_weights(shared, tmp_path / "whole")
    # a batch norm counts the batches of its own process
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        (tensor - p).abs().max() < 1e-5
        for (name, tensor), p in zip(state(model).items(), state(shared).values())
        if name in trained
    )
    assert (
        one == two
        and "The loss is nan at step 3" in one["nan"]
        and "cannot be shared by 2 processes" in one["odd"]
    )
    assert (
        [row["step"] for row in one["stopped"]]
        == [row["score"] for row in one["stopped"]]
        == [2, 4, 6, 8, 10]
    )
    assert checkpoints(tmp_path / "dies")[-1].name == "step-00000006"
    again = pair(tmp_path, resume=True)
    assert not again.returncode, again.stderr
    assert (tmp_path / "dies/log.csv").read_bytes() == (tmp_path / "calm/log.csv").read_bytes()
    model = Small()
    load_weights(model, tmp_path / "calm")
    first, second = (torch.load(tmp_path / f"weights{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, state(model)) and all(first[name].equal(second[name]) for name in trained)
    with pytest.raises(TrainingError, match="processes=2"):
        _read_state(checkpoints(tmp_path / "dies")[-1], dict(processes=1))


def test_average(tmp_path, calm):
    """The average of the formula, shown to `on_interval` and left in the model;
    steps, log and exact resume are as without it.
    """
    after, shown, model = [], [], Small()

    def look(done, row):
        shown.append(model.last.weight.detach().clone())

    def noted(other, batch):
        after.append(other.last.weight.detach().clone())
        return step(other, batch)

    log = fit(
        model, noted, batches, tmp_path / "a", average=0.8, on_interval=look, **RECIPE | dict(log_every=1)
    )
    weights = Small()
    load_weights(weights, tmp_path / "a", average=False)
    expected = after[1].clone()
    for array, seen in zip(after[2:] + [weights.last.weight], shown[1:]):
        expected = 0.8 * expected + 0.2 * array
        assert torch.allclose(expected, seen, atol=1e-6)
    assert torch.allclose(model.last.weight, expected, atol=1e-6) and equal(state(weights), calm[2])
    finished = Small()
    load_weights(finished, tmp_path / "a")
    assert equal(state(finished), state(model)) and [row["loss"] for row in log[-1:]] == [
        row["loss"] for row in read(tmp_path / "a")[-1:]
    ]
    failed = [0]

    def failing(other, batch):
        failed[0] += 1
        if failed[0] == 9:
            raise OSError
        return step(other, batch)

    with pytest.raises(OSError):
        fit(Small(), failing, batches, tmp_path / "b", average=0.8, **RECIPE | dict(log_every=1))
    again = Small()
    assert fit(
        again, step, batches, tmp_path / "b", average=0.8, **RECIPE | dict(log_every=1)
    ) == log and equal(state(again), state(model))
    assert (
        equal(state(again), state(finished))
        and fit(finished, step, batches, tmp_path / "b", average=0.8, **RECIPE | dict(log_every=1)) == log
    )
    with pytest.raises(TrainingError, match="average must be a number above 0 to below 1"):
        fit(Small(), step, batches, tmp_path / "c", average=2, **RECIPE)
    with pytest.raises(TrainingError, match="average=0.8, now 0.9"):
        fit(Small(), step, batches, tmp_path / "b", average=0.9, **RECIPE | dict(log_every=1))


def test_a_faulty_measurement_shows_early(tmp_path, calm):
    asked = []

    def measure(done, row):
        asked.append((done, sorted(row)[:1]))
        if done == 1:
            raise RuntimeError("the test set is broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(Small(), step, batches, tmp_path, on_interval=measure, early=1, **RECIPE)
    assert (
        asked == [(1, [])]
        and fit(Small(), step, batches, tmp_path, on_interval=lambda *_: None, early=1, **RECIPE) == calm[1]
    )


def test_tensorboard(tmp_path):
    "Every number of the log, once, also after an accident."
    pytest.importorskip("tensorboard", reason="needs the extra `train`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    failed = [0]

    def failing(model, batch):
        failed[0] += 1
        if failed[0] == 9:
            raise OSError
        return step(model, batch)

    with pytest.raises(OSError):
        fit(Small(), failing, batches, tmp_path, tensorboard=True, **RECIPE | dict(log_every=1))
    log = fit(Small(), step, batches, tmp_path, tensorboard=True, **RECIPE | dict(log_every=1))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Scalars("loss")
    assert [result.step for result in found] == list(range(1, 15)) and np.allclose(
        [result.value for result in found], [row["loss"] for row in log]
    )


# ---- features


def test_features(tmp_path):
    found = features_once(tmp_path / "f", 0)
    assert (
        found["square"].shape == (23, 2)
        and found["square"].dtype == np.int32
        and found["half"].dtype == np.float16
        and found["half"][7] == 3.5
    )
    assert (
        found["square"][:, 0].tolist() == [i * i for i in range(23)]
        and isinstance(found["square"], np.memmap)
        and not found["square"].flags.writeable
    )
    asked = (tmp_path / "f.asked").read_text()
    assert asked.count("\n") == 6
    features_once(tmp_path / "f", 0)
    assert (tmp_path / "f.asked").read_text() == asked


def test_features_of_another_encoder(tmp_path):
    names, calls = ["a", "b", "c"], []

    def compute(rows):
        calls.append(rows)
        return dict(x=np.full((len(rows), 2), len(calls), np.float32))

    def get(names, fingerprint):
        return cached_features(compute, names, tmp_path, fingerprint, batch=8, progress=False)["x"][0, 0]

    assert [
        get(names, ("one", 448)),
        get(names, ("two", 448)),
        get(names, ("one", 224)),
        get(names[::-1], ("one", 448)),
        get(names[:2], ("one", 448)),
        get(names, ("one", 448)),
    ] == [1, 2, 3, 4, 5, 1]


class Mean:
    "What `stored_images` asks of a system: features that say what image they are of."

    def __init__(self):
        self.asked = 0

    def cache_key(self):
        return "mean", 8

    def encode_images(self, images):
        self.asked += len(images)
        return images

    def to_cache(self, image):
        return dict(mean=torch.from_numpy(image.reshape(-1, 3).mean(0)))


def labelled_set(root, level, suffix="bmp"):
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), level + i, np.uint8)).save(root / f"images/{i}.{suffix}")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / f"masks/{i}.png")
    (root / "classes.txt").write_text("a\nb\n")
    return FolderDataset.open(root)


def test_features_belong_to_the_content_of_pictures(tmp_path):
    """animals/train and kitchen/train have equal names;
    an edited picture may have its old size and time; a set that was moved finds its features again.
    """
    model = Mean()

    def means(dataset):
        kept = stored_images(model, dataset, range(3), tmp_path / "features", progress=False)
        return [round(float(level)) for level in kept["mean"][:, 0]]

    animals, kitchen = (
        labelled_set(tmp_path / "animals/train", 60),
        labelled_set(tmp_path / "kitchen/train", 100),
    )
    assert means(animals) == [60, 61, 62] and means(kitchen) == [100, 101, 102]
    path = tmp_path / "animals/train/images/1.bmp"
    times = path.stat()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and means(animals) == [60, 200, 62]
    asked = model.asked
    shutil.move(tmp_path / "kitchen/train", tmp_path / "cooking")
    assert means(FolderDataset.open(tmp_path / "cooking")) == [100, 101, 102] and model.asked == asked
    shutil.copytree(tmp_path / "cooking/images", tmp_path / "renamed/images")
    shutil.copytree(tmp_path / "cooking/masks", tmp_path / "renamed/masks")
    shutil.copy(tmp_path / "cooking/classes.txt", tmp_path / "renamed")
    for i in range(3):
        (tmp_path / f"renamed/images/{i}.bmp").rename(tmp_path / f"renamed/images/x{i}.bmp")
        (tmp_path / f"renamed/masks/{i}.png").rename(tmp_path / f"renamed/masks/x{i}.png")
    assert means(FolderDataset.open(tmp_path / "renamed")) == [100, 101, 102] and model.asked == asked


@pytest.mark.parametrize("notebook", ["train_lite", "train_lite_itm", "tune", "pnp_ablation"])
def test_no_experiment_keeps_by_name(notebook):
    "Neither stems nor names may be what a kept result is known by."
    cells = json.loads((Path(__file__).parent.parent / f"nbs/experiments/{notebook}.ipynb").read_text())[
        "cells"
    ]
    kept = [
        line
        for cell in cells
        if cell["cell_type"] == "code"
        for line in "".join(cell["source"]).splitlines()
        if re.search(
            r"= cached_features\(|return cached_features\(|cached_features\(|key = Cache\.key\(", line
        )
        and "import" not in line
    ]
    assert kept and not any(re.search(r"\bstems\b|\bnames, features|root\.name", line) for line in kept), kept


def test_captions_and_their_pictures_have_digests(tmp_path):
    "In a shard as in a folder: the digest is that of the picture's bytes."

    def png(level):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    pictures = {f"{i}.png": png(20 * i) for i in range(3)}
    for kind in ("folder", "shard"):
        root = tmp_path / kind
        root.mkdir()
        (root / "captions.json").write_text(json.dumps({name: ["a word"] for name in pictures}))
        if kind == "folder":
            (root / "images").mkdir()
            for name, data in pictures.items():
                (root / "images" / name).write_bytes(data)
        else:
            with tarfile.open(root / "a.tar", "w") as tar:
                for name, data in pictures.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    sets = [CaptionSet.open(tmp_path / kind) for kind in ("folder", "shard")]
    assert [sets[0].image_digest(i) for i in range(3)] == [sets[1].image_digest(i) for i in range(3)] and len(
        {sets[0].image_digest(i) for i in range(3)}
    ) == 3


def test_a_run_with_other_data_is_refused(tmp_path):
    recipe = SHORT | dict(data="one")
    fit(Small(), step, batches, tmp_path / "run", **recipe)
    with pytest.raises(TrainingError, match="data='one', now 'two'"):
        fit(Small(), step, batches, tmp_path / "run", **recipe | dict(data="two"))
    assert fit(Small(), step, batches, tmp_path / "run", **recipe)


def test_features_that_do_not_fit(tmp_path):
    def get(compute, folder="f", names="abcde"):
        return cached_features(compute, names, tmp_path / folder, "x", batch=2, progress=False)

    with pytest.raises(TrainingError, match="2 rows for the items from 'a' on"):
        get(lambda rows: dict(x=np.zeros((3, 2))))
    with pytest.raises(TrainingError, match="arrays with 2 rows"):
        get(lambda rows: {})
    with pytest.raises(TrainingError, match="items from 'e' on"):
        get(lambda rows: dict(x=np.zeros((len(rows), 2 if rows.start < 4 else 3))))
    with pytest.raises(TrainingError, match="from 'c' on"):
        get(lambda rows: dict(x=np.zeros((len(rows), 2), np.float32 if rows.start else np.float64)), "g")
    with pytest.raises(TrainingError, match="nothing to compute"):
        get(None, names="")
    with pytest.raises(TrainingError, match="GB left"):
        get(lambda rows: dict(x=np.broadcast_to(np.float32(0), (len(rows), 10**7, 10**7))), "h")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "rows.json").write_text("{"),
        lambda f: (f / "rows.json").write_text("3"),
        lambda f: (f / "square.npy").unlink(),
        lambda f: np.save(f / "square.npy", np.zeros((2, 2), np.int32)),
        lambda f: (f / "half.npy").write_bytes((f / "half.npy").read_bytes()[:140]),
    ],
    ids=["half", "number", "gone", "short", "cut"],
)
def test_damaged_features_are_named(tmp_path, damage):
    features_once(tmp_path / "f", 0)
    damage(next((tmp_path / "f").iterdir()))
    with pytest.raises(TrainingError, match="are damaged.*Delete the folder"):
        features_once(tmp_path / "f", 0)


def test_two_processes_compute_features_once(tmp_path):
    "The second waits for the first (here: a thread), and finds the work done."
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(features_once(tmp_path / "f", 0.02))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for item in threads:
        item.join()
    assert len(results) == 3 and sorted(
        int(key) for key in (tmp_path / "f.asked").read_text().split()
    ) == list(range(23))
