"""Workers:
items done exactly once whatever happens to processes, and none left behind. Real processes, a real Ray.
"""

import os, signal, subprocess, sys, threading, time
from importlib.util import find_spec

import numpy as np
import psutil
import pytest

from ovss_nb.core.parallel import WorkerDied, spread

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")


def by_position(results):
    rows = list(results)
    positions = [position for position, _, _ in rows]
    assert len(set(positions)) == len(positions)
    return {position: (result, error) for position, result, error in rows}


def worker_processes():
    """Our children that serve, but for loky's and multiprocessing's trackers of shared resources, which stay
    for the life of the program.
    """
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "popen_loky" in " ".join(child.cmdline())
    ]


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert worker_processes() == []


def gone(pid, seconds=15):
    "Whether a process, not necessarily ours, ends in time."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def deadly(folder, always=(), once=()):
    "Counts the calls per item in `folder`; some items kill the worker, always or the first time."

    def build():
        def call(item):
            with open(folder / str(item), "a") as file:
                file.write(f"{os.getpid()}\n")
            times = len((folder / str(item)).read_text().split())
            if item in always or (item in once and times == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
            return item * item

        return call

    return build


def calls(folder):
    return {int(file.name): len(file.read_text().split()) for file in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_result_does_not_depend_on_workers(workers):
    def build():
        return lambda seed: np.random.default_rng(seed).normal(size=(50, 50)).cumsum()

    rows = by_position(spread(build, range(20), workers))
    assert sorted(rows) == list(range(20))
    for seed, (result, error) in rows.items():
        assert error is None and (result == build()(seed)).all()


def test_as_they_finish():
    "A slow item holds up nobody, and everybody has one item at most."

    def build():
        return lambda seconds: (time.sleep(seconds), os.getpid())[1]

    rows = list(spread(build, [1.5, 0, 0, 0, 0], workers=2))
    assert rows[-1][0] == 0 and len({pid for _, pid, _ in rows}) == 2


def test_builds_once_per_worker(tmp_path):
    def build():
        (tmp_path / str(os.getpid())).touch()
        return lambda item: os.getpid()

    pids = {result for _, result, _ in spread(build, range(30), workers=3)}
    assert {int(file.name) for file in tmp_path.iterdir()} >= pids and 1 <= len(list(tmp_path.iterdir())) <= 3


def test_errors_belong_to_items():
    class Awkward(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a}-{b}")

    def build():
        def call(item):
            if item == "value":
                raise ValueError("no such color")
            if item == "awkward":
                raise Awkward(1, 2)
            if item == "result":
                return threading.Lock()
            return item.upper()

        return call

    rows = by_position(
        spread(build, ["cat", "value", "awkward", "result", threading.Lock(), "dog"], workers=2)
    )
    assert rows[0] == ("CAT", None) and rows[5] == ("DOG", None)
    assert (
        isinstance(rows[1][1], ValueError)
        and str(rows[1][1]) == "no such color"
        and "in call" in rows[1][1].__notes__[0]
    )
    assert "Awkward: 1-2" in str(rows[2][1]) or type(rows[2][1]).__name__ == "Awkward"
    assert "cannot be sent" in str(rows[3][1]) and isinstance(rows[4][1], TypeError)
    assert all(rows[n][0] is None for n in (1, 2, 3, 4))


def test_build_failure():
    def build():
        raise FileNotFoundError("weights.safetensors")

    with pytest.raises(FileNotFoundError, match="weights") as caught:
        list(spread(build, range(5), workers=2))
    assert "in build" in caught.value.__notes__[0]


def test_build_that_dies():
    with pytest.raises(WorkerDied, match=r"build\(\), 2 times.*exit code 3"):
        list(spread(lambda: os._exit(3), range(5), workers=2, retries=1))


def test_killed_once(tmp_path):
    "Two of forty items kill their worker once: every item is done, the others are met once only."
    rows = by_position(spread(deadly(tmp_path, once=(7, 20)), range(40), workers=3))
    assert {n: result for n, (result, error) in rows.items() if error is None} == {
        n: n * n for n in range(40)
    }
    assert calls(tmp_path) == {n: 2 if n in (7, 20) else 1 for n in range(40)}


@pytest.mark.parametrize("retries", [0, 2])
def test_always_dies(tmp_path, retries):
    rows = by_position(spread(deadly(tmp_path, always=(0, 5)), range(12), workers=2, retries=retries))
    assert [n for n in sorted(rows) if rows[n][1] is not None] == [0, 5]
    assert (
        isinstance(rows[5][1], WorkerDied)
        and f"item 5, {retries + 1} times" in str(rows[5][1])
        and "SIGKILL" in str(rows[5][1])
    )
    assert calls(tmp_path) == {n: 1 + retries if n in (0, 5) else 1 for n in range(12)}


def test_killed_from_outside(tmp_path):
    "As the kernel does it when memory runs out: at any moment, here again and again."

    def build():
        def call(item):
            time.sleep(0.05)
            with open(tmp_path / str(item), "a") as file:
                file.write("done\n")
            return np.full(100_000, item)

        return call

    stop, killed = threading.Event(), []

    def killer():
        rng, pause = np.random.default_rng(0), 0.3
        while not stop.wait(pause):
            if alive := worker_processes():
                killed.append(alive[rng.integers(len(alive))])
                killed[-1].kill()
                pause *= 1.1  # on a busy computer a worker may need longer to start

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        rows = by_position(spread(build, range(30), workers=2, retries=1000))
    finally:
        stop.set()
        thread.join()
    assert sorted(rows) == list(range(30)) and all(
        error is None and (result == n).all() for n, (result, error) in rows.items()
    )
    assert len(killed) >= 2


def test_environment(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

    def build():
        time.sleep(0.3)  # so that nobody is done before all have begun
        return lambda item: (time.sleep(0.1), tuple(map(os.environ.get, names)))[1]

    def seen(**options):
        return {result for _, result, _ in spread(build, range(8), workers=4, **options)}

    assert seen(devices=[2, 5], threads=3) == {("2", "3", "3", "3"), ("5", "3", "3", "3")}
    assert seen() == {(None, "1", "1", "1")}
    assert seen(devices=[]) == {("", "1", "1", "1")}
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and "OPENBLAS_NUM_THREADS" not in os.environ


def test_thread_limit_reaches_the_libraries():
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="comes with scikit-learn or joblib")

    def build():
        return lambda item: (
            [pool["num_threads"] for pool in threadpoolctl.threadpool_info()] if np.ones(1).sum() else None
        )

    [(_, result, _)] = spread(build, [0], threads=1)
    assert result and set(result) == {1}


def test_items_are_drawn_as_needed():
    "An endless generator: never more items are drawn than given back plus one per worker and one more."
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    results = spread(lambda: lambda item: -item, endless(), workers=2)
    for n in range(1, 51):
        assert next(results)[2] is None and drawn <= n + 4
    results.close()
    drawn_then = drawn
    assert worker_processes() == [] and list(results) == [] and drawn == drawn_then


def test_items_that_fail():
    def items():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(spread(lambda: abs, items(), workers=2))


def test_no_items_start_no_process(tmp_path):
    def build():
        (tmp_path / "built").touch()
        return abs

    assert list(spread(build, [], workers=4)) == [] and not (tmp_path / "built").exists()
    spread(build, [1])  # never drawn from
    assert not (tmp_path / "built").exists()


def test_close_ends_busy_workers_and_their_children(tmp_path):
    def build():
        def call(item):
            if not item:
                return 0
            child = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
            )
            (tmp_path / "pid").write_text(str(child.pid))
            time.sleep(600)

        return call

    results = spread(build, [0, 1, 1], workers=2)
    assert next(results) == (0, 0, None)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    assert psutil.pid_exists(pid)
    results.close()
    assert worker_processes() == [] and gone(pid)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(workers=0), "workers must"),
        (dict(workers=True), "workers must"),
        (dict(retries=-1), "retries must"),
        (dict(threads=0.5), "threads must"),
        (dict(devices="0,1"), "a list of CUDA ids"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(ValueError, match=words):
        spread(lambda: abs, [1], **wrong)
    with pytest.raises(ValueError, match="returns a function"):
        spread([1], [1])


SCRIPT = """
import os, signal, sys, time
from ovss_nb.core.parallel import spread
class Answer:
    def __init__(self, value): self.value = value
def build():
    def call(item):
        if item < 0: print(os.getpid(), flush=True); time.sleep(600)
        return Answer(item + 1)
    return call
"""


@pytest.mark.parametrize("way", ["-c", "file"])
def test_functions_of_a_script(tmp_path, way):
    "No main guard, classes of __main__ there and back, and a generator left open does not hold up the exit."
    script = (
        SCRIPT + "print(sum(result.value for _, result, _ in spread(build, range(5), workers=2)),"
        " isinstance(next(spread(build, [1]))[1], Answer))\n"
        + "left = spread(build, range(100), workers=2); next(left)\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, *(["-c", script] if way == "-c" else [str(tmp_path / "script.py")])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.split() == ["15", "True"], done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_caller_is_stopped(how):
    """Kill -9, a polite end, Ctrl-C (which a terminal sends to the workers too):
    busy workers do not stay behind.
    """
    # tests that run in a shell's background are deaf to Ctrl-C, and so are their children
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    caller = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + heard + "list(spread(build, [-1, -1], workers=2))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(caller.stdout.readline()) for _ in range(2)]
    if how == signal.SIGINT:
        os.killpg(caller.pid, how)
    else:
        caller.send_signal(how)
    errors = caller.communicate(timeout=30)[1]
    assert caller.returncode == -how and all(map(gone, pids))
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1, errors


@pytest.fixture(scope="module")
def cluster():
    "A Ray with two cores, as another program would have started it."
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
    yield cluster.address
    cluster.shutdown()


@needs_ray
def test_ray(cluster, tmp_path):
    "One item kills its actor once, one always; environment and errors as with processes."
    import ray

    rows = by_position(
        spread(deadly(tmp_path, always=(5,), once=(2,)), range(10), workers=2, retries=1, ray=cluster)
    )
    assert {n: result for n, (result, error) in rows.items() if error is None} == {
        n: n * n for n in range(10) if n != 5
    }
    assert isinstance(rows[5][1], WorkerDied) and calls(tmp_path) == {
        n: 2 if n in (2, 5) else 1 for n in range(10)
    }
    assert not ray.is_initialized()  # disconnected, while the cluster runs on

    def build():
        return lambda item: (
            (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]) if item else 1 // item
        )

    rows = by_position(spread(build, [1, 0, 1, 1, 1, 1], workers=2, devices=[3, 4], ray=cluster))
    assert isinstance(rows[1][1], ZeroDivisionError) and "in <lambda>" in rows[1][1].__notes__[0]
    assert {result for result, error in rows.values() if error is None} <= {("3", "1"), ("4", "1")}

    def broken():
        raise FileNotFoundError("weights")

    with pytest.raises(FileNotFoundError, match="weights"):
        list(spread(broken, range(3), workers=2, ray=cluster))


@needs_ray
def test_ray_of_ones_own(tmp_path):
    "ray='local' starts one and, closed early, ends it with its busy actors."
    import ray

    def build():
        return lambda item: (time.sleep(item), os.getpid())[1]

    results = spread(build, [0, 600, 600], workers=2, ray="local")
    _, pid, error = next(results)
    assert (
        error is None
        and ray.is_initialized()
        and ray.cluster_resources()["CPU"] == 2
        and psutil.pid_exists(pid)
    )
    results.close()
    assert not ray.is_initialized() and gone(pid)
