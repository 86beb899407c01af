"Every component notebook and tutorial runs from top to bottom, one test each."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT/"nbs").rglob("*.ipynb")
                   if "experiments" not in path.parts and ".ipynb_checkpoints" not in path.parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook):
    command = [Path(sys.executable).with_name("nbdev-test"), notebook, "--n-workers", "0"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0 and "Success" in result.stdout, result.stdout[-3000:] + result.stderr[-6000:]
