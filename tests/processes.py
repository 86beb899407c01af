"""Processes with the costly imports done:
forked from a server that has made them once, which is most of the time of a short run.
"""

import multiprocessing
import os
import sys
from functools import lru_cache
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest

PRELOAD = [
    "nbdev.test",
    "matplotlib.pyplot",
    "torch",
    "torchvision",
    "open_clip",
    "transformers",
    "ovss_nb.encoders.lite",
]


@lru_cache
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(HF_HUB_OFFLINE="1", MPLBACKEND="agg").items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    return context


def child(target, arguments, folder, environment):
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "w") as file:
            os.dup2(file.fileno(), stream)
    sys.exit(target(*arguments))


def forked(target, *arguments, folder, timeout=900):
    """What `target` gave back as exit code, and what it printed, in a process of its own.

    `folder` is for its output.
    """
    process = server().Process(
        target=child,
        args=(target, arguments, folder, os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}),
    )
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return SimpleNamespace(
        returncode=process.exitcode, **{name: (folder / name).read_text() for name in ("stdout", "stderr")}
    )
