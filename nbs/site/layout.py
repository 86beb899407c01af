"""The folders of the library in their order, and a drawing of them: an import only ever goes down.

`python nbs/site/layout.py` writes `layout.svg` beside this file.
"""

import json
import re
from html import escape
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1]
# From the top to the ground; folders of one row do not import each other.
# Read by the tests, the site and the drawing.
LAYERS = (
    ("app",),
    ("inference", "training"),
    ("systems",),
    ("components",),
    ("encoders",),
    ("text", "benchmarks"),
    ("core",),
)
MEANING = {
    "app": "command line, viewer, experiments",
    "inference": "images in, label maps out",
    "training": "making trained systems",
    "systems": "one recipe each",
    "components": "one step of a method each",
    "encoders": "images and words become vectors",
    "text": "prompts and language models",
    "benchmarks": "labelled data and scores",
    "core": "words, images, files; no torch",
}
COLORS = ("#e7e7e7", "#f2d5cb", "#f3e2c7", "#e4dcec", "#d3e0ea", "#dfe6c8", "#d7e3d4")


def chapter(path):
    "Title, one-line summary and exported module (or None) of a notebook."
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    lines = "".join(cells[0]["source"]).splitlines()
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    module = re.search(r"^#\| default_exp (\S+)", code, re.M)
    summary = next((line.lstrip("> ") for line in lines if line.startswith(">")), "")
    return lines[0].lstrip("# "), summary, module and module[1]


def chapters(notebooks=NOTEBOOKS):
    "{folder: [(path, title, summary, module), ...]} from the ground up, as one would read them."
    folders = [folder for layer in reversed(LAYERS) for folder in layer]
    found = {folder: [] for folder in folders}
    for folder in folders:
        for path in sorted((Path(notebooks) / folder).glob("[0-9][0-9]_*.ipynb")):
            title, summary, module = chapter(path)
            if module:
                found[folder].append((path, title, summary, module))
    return found


def draw(found):
    "The folders and their modules as SVG text."
    width, left, gap, line = 940, 190, 8, 30
    body, y = [], 20
    for color, folder in ((color, folder) for color, layer in zip(COLORS, LAYERS) for folder in layer):
        boxes, x, rows = [], left + 14, 1
        for _, title, summary, module in found[folder]:
            name = module.split(".")[-1]
            wide = round(7.4 * len(name)) + 20
            if x + wide > width - 34:
                x, rows = left + 14, rows + 1
            boxes.append((x, rows - 1, wide, name, summary))
            x += wide + gap
        high = max(rows * (line + gap) + 20, 72)  # enough for the folder's name and two lines below it
        body.append(
            f'<rect x="20" y="{y}" width="{width - 40}" height="{high}" fill="{color}" stroke="#555"/>'
        )
        body.append(f'<text x="36" y="{y + high / 2 - 4}" font-size="17" font-weight="600">{folder}</text>')
        for k, part in enumerate(_wrapped(MEANING[folder], 24)):
            below = y + high / 2 + 14 + 14 * k
            body.append(f'<text x="36" y="{below}" font-size="11" fill="#444">{escape(part)}</text>')
        for x, row, wide, name, summary in boxes:
            top = y + 14 + row * (line + gap)
            body.append(
                f"<g><title>{escape(summary)}</title>"
                f'<rect x="{x}" y="{top}" width="{wide}" height="{line}" rx="5" fill="#fff" stroke="#777"/>'
                f'<text x="{x + wide / 2}" y="{top + 20}" font-size="13" text-anchor="middle" '
                f'font-family="ui-monospace,monospace">{escape(name)}</text></g>'
            )
        y += high
    arrow = (
        f'<path d="M {width - 10} 30 V {y - 8} M {width - 15} {y - 16} L {width - 10} {y - 6} '
        f'L {width - 5} {y - 16}" stroke="#333" stroke-width="2" fill="none"/>'
        f'<text x="{width / 2}" y="{y + 22}" font-size="13" text-anchor="middle" fill="#444">'
        "an import only goes down, and within a folder to a lower number</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 34}" width="{width}"'
        f' height="{y + 34}" font-family="system-ui,sans-serif" role="img" aria-label="The folders of'
        f' ovss_nb"><rect width="{width}" height="{y + 34}" fill="#fff"/>{"".join(body)}{arrow}</svg>\n'
    )


def _wrapped(text, width):
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    target = Path(__file__).with_name("layout.svg")
    target.write_text(draw(chapters()), encoding="utf-8")
    print(target)
