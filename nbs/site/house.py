"""Draw the house: every notebook that exports a module is a room, and its number says on which floor it lies.

`python nbs/site/house.py` writes `house.svg` beside this file.
"""
import json
import re
from html import escape
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1]
FLOORS = ("ground", "encoders", "components", "systems", "work", "use")
MEANING = ("words, pictures, files; no torch", "pictures and words become vectors", "one step of a method each", "recipes: rooms put together",
           "data, evaluation, training, prediction", "command line, notebooks, experiments")
COLOURS = ("#d7e3d4", "#d3e0ea", "#e4dcec", "#f3e2c7", "#f2d5cb", "#e7e7e7")


def chapter(path):
    "Title, one-line summary and exported module (or None) of a notebook."
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    lines = "".join(cells[0]["source"]).splitlines()
    exports = (re.search(r"^#\| default_exp (\S+)", "".join(o["source"]), re.M) for o in cells if o["cell_type"] == "code")
    module = next((found[1] for found in exports if found), None)
    return lines[0].lstrip("# "), next((o.lstrip("> ") for o in lines if o.startswith(">")), ""), module


def rooms(notebooks=NOTEBOOKS):
    "{floor: [(path, title, summary, module), ...]} of all notebooks that export a module, in reading order."
    found = {floor: [] for floor in range(len(FLOORS))}
    paths = [o for o in Path(notebooks).rglob("[0-9][0-9]_*.ipynb") if not {"tutorials", "experiments", ".ipynb_checkpoints"} & set(o.parts)]
    for path in sorted(paths, key=lambda o: o.name):
        title, summary, module = chapter(path)
        if module: found[int(path.name[0])].append((path, title, summary, module))
    return found


def draw(found):
    "The house as SVG text."
    width, left, gap, line = 940, 190, 8, 30
    body, y = [], 96
    for floor in sorted(found, reverse=True):
        boxes, x, rows = [], left + 14, 1
        for _, title, summary, module in found[floor]:
            name = module.split(".")[-1]
            wide = round(7.4*len(name)) + 20
            if x + wide > width - 34: x, rows = left + 14, rows + 1
            boxes.append((x, rows - 1, wide, name, summary))
            x += wide + gap
        high = max(rows*(line + gap) + 20, 72)   # room for the floor's name and two lines below it
        body.append(f'<rect x="20" y="{y}" width="{width - 40}" height="{high}" fill="{COLOURS[floor]}" stroke="#555"/>')
        body.append(f'<text x="36" y="{y + high/2 - 4}" font-size="17" font-weight="600">{floor}  {FLOORS[floor]}</text>')
        for k, part in enumerate(_wrapped(MEANING[floor], 24)): body.append(f'<text x="36" y="{y + high/2 + 14 + 14*k}" font-size="11" fill="#444">{escape(part)}</text>')
        for x, row, wide, name, summary in boxes:
            top = y + 14 + row*(line + gap)
            body.append(f'<g><title>{escape(summary)}</title><rect x="{x}" y="{top}" width="{wide}" height="{line}" rx="5" fill="#fff" stroke="#777"/>'
                        f'<text x="{x + wide/2}" y="{top + 20}" font-size="13" text-anchor="middle" font-family="ui-monospace,monospace">{escape(name)}</text></g>')
        y += high
    roof = f'<polygon points="4,96 {width/2},14 {width - 4},96" fill="#b5573f" stroke="#555"/><text x="{width/2}" y="76" font-size="22" text-anchor="middle" fill="#fff" font-weight="600">ovss_nb</text>'
    arrow = (f'<g stroke="#333" stroke-width="2" fill="none"><path d="M {width - 10} 106 V {y - 8}"/><path d="M {width - 15} {y - 16} L {width - 10} {y - 6} L {width - 5} {y - 16}"/></g>'
             f'<text x="{width/2}" y="{y + 22}" font-size="13" text-anchor="middle" fill="#444">an import only goes down; a room may use any room on its own floor or below</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 34}" width="{width}" height="{y + 34}" font-family="system-ui,sans-serif" role="img" aria-label="The house of ovss_nb">'
            f'<rect width="{width}" height="{y + 34}" fill="#fff"/>{roof}{"".join(body)}{arrow}</svg>\n')


def _wrapped(text, width):
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width: lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    target = Path(__file__).with_name("house.svg")
    target.write_text(draw(rooms()), encoding="utf-8")
    print(target)
