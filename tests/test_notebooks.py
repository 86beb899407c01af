"""Every component notebook and tutorial runs from top to bottom as `nbdev-test` runs it, one test each;
with `OVSS_NB_BIG=1` its slow cells, too.
"""

import os
from pathlib import Path

import pytest
from processes import forked

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if "experiments" not in path.parts and ".ipynb_checkpoints" not in path.parts
)


def run(notebook):
    from nbdev.config import get_config
    from nbdev.test import test_nb

    flags = set(get_config(ROOT).tst_flags.split()) - ({"slow"} if "OVSS_NB_BIG" in os.environ else set())
    passed, _ = test_nb(notebook, skip_flags=flags, basepath=ROOT)
    return int(not passed)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, tmp_path):
    result = forked(run, ROOT / notebook, folder=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def test_a_failing_notebook_fails(tmp_path):
    import nbformat

    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")]),
        tmp_path / "wrong.ipynb",
    )
    result = forked(run, tmp_path / "wrong.ipynb", folder=tmp_path)
    assert result.returncode == 1 and "AssertionError" in result.stderr
