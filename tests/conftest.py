"Marks, which tests stay together, and the reason for which GPU tests are skipped."

import os
import signal

import pytest

# A process in a shell's background ignores Ctrl-C, and so would every one that a test starts and stops.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers side by side that each take all cores wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "gpu: runs an experiment notebook at full size on a CUDA device; `pytest -m gpu` runs these alone",
    )
    config.addinivalue_line(
        "markers", "xdist_group(name): with `--dist loadgroup`, tests of one name run in one process"
    )


def pytest_collection_modifyitems(items):
    """For `--dist loadgroup`:
    the tests of a file stay together, as they share what is costly to make. Notebooks share nothing, and fill
    the gaps at the end.
    """
    for item in items:
        if item.path.name != "test_notebooks.py":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_runtest_setup(item):
    if not item.get_closest_marker("gpu"):
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; the same notebook runs at tiny size in test_experiments.py")
