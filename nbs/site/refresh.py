"""Run chapters and keep what they show: printed results, and pictures as small JPEGs.

`python nbs/site/refresh.py` refreshes all chapters and tutorials,
`python nbs/site/refresh.py nbs/core/03_files.ipynb` one.
Cells that tests skip (`#| slow`, `#| notest`, `#| gpu`, `#| eval: false`) keep the outputs that they have.
"""

import os
import re
import sys
import tempfile
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from layout import NOTEBOOKS, chapters
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from PIL import Image

SKIPPED = re.compile(r"^#\|\s*(slow|notest|gpu|eval:\s*false)\b", re.M)
PROGRESS = re.compile(r"\d%\|")  # a bar of tqdm
# Temporary folders and the checkout itself, in which a path begins.
PATHS = re.compile(rf"{re.escape(tempfile.gettempdir())}/tmp\w+|{re.escape(str(NOTEBOOKS.parent))}(?=/)")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # plots are outputs
QUALITY = 82  # of JPEGs: lettering of plots stays readable


def small_picture(png: str) -> str:
    "A PNG in base64 as a JPEG in base64."
    image = Image.open(BytesIO(b64decode(png))).convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    buffer = BytesIO()
    paper.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return b64encode(buffer.getvalue()).decode()


def without_traces(text: str) -> str:
    "Without addresses in memory and the part of a path that is this machine's."
    return PATHS.sub("...", re.sub(r" at 0x[0-9a-f]+", "", text))


def kept(outputs: list) -> list:
    "Outputs without stderr, widgets, progress bars and traces of the machine, and with pictures as JPEGs."
    keep = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            output.text = without_traces(output.text)
        data = output.get("data", {})
        if PROGRESS.search(data.get("text/plain", "")):
            continue
        data.pop("application/vnd.jupyter.widget-view+json", None)  # of a kernel that is gone
        if "image/png" in data:
            data["image/jpeg"] = small_picture(data.pop("image/png"))
        for kind, text in data.items():
            if kind.startswith("text/") and isinstance(text, str):
                data[kind] = without_traces(text)
        keep.append(output)
    return keep


def refresh(path: Path):
    "Run one notebook in its own folder and write it back with its outputs, or raise nbclient's error."
    notebook = nbformat.read(path, 4)
    run = nbformat.read(path, 4)
    for cell in run.cells:
        if cell.cell_type == "code" and SKIPPED.search(cell.source):
            cell.source = ""
    NotebookClient(
        run, timeout=1800, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    for cell, done in zip(notebook.cells, run.cells, strict=True):
        if cell.cell_type == "code" and not SKIPPED.search(cell.source):
            cell.outputs, cell.execution_count = kept(done.outputs), done.execution_count
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


if __name__ == "__main__":
    os.environ.update(QUIET | INLINE)
    every = [path for found in chapters().values() for path, *_ in found]
    every += sorted((NOTEBOOKS / "tutorials").glob("*.ipynb"))
    for path in [Path(name).resolve() for name in sys.argv[1:]] or every:
        print(path.relative_to(NOTEBOOKS))
        refresh(path)
