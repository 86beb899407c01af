"Every component notebook and tutorial runs from top to bottom as `nbdev-test` runs it, one test each."
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT/"nbs").rglob("*.ipynb")
                   if "experiments" not in path.parts and ".ipynb_checkpoints" not in path.parts)
# Imported once, in a process from which that of each notebook is forked: most of a notebook's time were its imports.
PRELOAD = ["nbdev.test", "matplotlib.pyplot", "torch", "torchvision", "open_clip", "transformers", "ovss_nb.encoders.lite"]


def run(notebook, log):
    "Run one notebook; what it prints goes to `log`."
    with open(log, "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    passed, _ = test_nb(ROOT/notebook, skip_flags=get_config(ROOT).tst_flags.split(), basepath=ROOT)
    sys.exit(not passed)


@pytest.fixture(scope="module")
def processes():
    "Where processes come from: a server with the imports done, and the environment of a notebook test."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(HF_HUB_OFFLINE="1", MPLBACKEND="agg").items(): patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        yield context


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, processes, tmp_path):
    process = processes.Process(target=run, args=(notebook, tmp_path/"log"))
    process.start()
    process.join(900)
    if process.is_alive(): process.kill()
    assert process.exitcode == 0, (tmp_path/"log").read_text()[-9000:]
