"A type checker understands a user's script: names, arguments and results have types, and a slip is found."

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ovss_nb

pytest.importorskip("mypy", reason="needs the package mypy, of the extra `dev`")

SCRIPT = """
from ovss_nb import Segmentation, Vocabulary, create, load_image, segment

image = load_image("cat.jpg")
words = Vocabulary.of({"cat": ["cat", "kitten"], "background": "wall"})
system = create("maskclip", size=448)
result: Segmentation = system.segment(image, words)
other: Segmentation = segment(image, ["cat", "sofa"])
other.overlay().save("overlay.png")
result.save_png("labels.png")
areas: dict[str, float] = result.areas()
coco: list[dict] = result.to_coco(1)
"""
# The types of heavy packages say nothing about ours, and take a minute to read.
CONFIG = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,torchvision.*,timm.*,open_clip.*,transformers.*,numpy.*,scipy.*,PIL.*,matplotlib.*]
follow_imports = skip
"""


def check(script, folder):
    "What mypy says about a script."
    (folder / "script.py").write_text(script)
    (folder / "mypy.ini").write_text(CONFIG)
    # mypy does not see what is installed as editable through an import hook.
    environment = os.environ | {"MYPYPATH": str(Path(ovss_nb.__file__).parents[1])}
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary"]
    done = subprocess.run(
        [*command, "--cache-dir", "cache", "script.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The second script is checked with the first one's cache."
    return tmp_path_factory.mktemp("typing")


def test_a_script_passes(folder):
    assert check(SCRIPT, folder) == ""


@pytest.mark.parametrize(
    "right, wrong, said",
    [
        ("system.segment(", "system.segmnt(", '"System" has no attribute "segmnt"'),
        ("result.areas()", "result.aeras()", '"Segmentation" has no attribute "aeras"'),
        ("import Segmentation,", "import Segmentation, segmnt,", 'has no attribute "segmnt"'),
        ("dict[str, float]", "list[float]", "Incompatible types in assignment"),
    ],
)
def test_a_slip_is_found(folder, right, wrong, said):
    output = check(SCRIPT.replace(right, wrong), folder)
    assert said in output and output.count("error:") == 1


def test_every_short_name_is_declared(folder):
    script = "import ovss_nb\n" + "\n".join(f"reveal_type(ovss_nb.{name})" for name in ovss_nb.__all__)
    output = check(script, folder)
    assert output.count("Revealed type") == len(ovss_nb.__all__) and '"Any"' not in output
