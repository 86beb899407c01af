"""The library is what the notebooks export, imports go down, importing is cheap, the wheel carries its data,
and notebooks, library and tests are written so that they can be read.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def python(*arguments, **kw):
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, **kw
    ).stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project in which everything has been exported and cleaned once more."
    copy = tmp_path_factory.mktemp("export") / "project"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "out", "build", "*.egg-info", "__pycache__", ".ipynb_checkpoints"
        ),
    )
    for path in (copy / "ovss_nb").rglob("*.py"):
        if path.name != "__init__.py":
            path.unlink()  # a module whose notebook is gone must show up too
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([BIN / command], cwd=copy, check=True, capture_output=True)
    return copy


def contents(root, folder, pattern):
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in (root / folder).rglob(pattern)
        if ".ipynb_checkpoints" not in path.parts
    }


def test_library_equals_notebooks(exported):
    assert contents(ROOT, "ovss_nb", "*.py") == contents(exported, "ovss_nb", "*.py"), (
        "run nbdev-export and commit the result"
    )


def test_notebooks_are_clean(exported):
    assert contents(ROOT, "nbs", "*.ipynb") == contents(exported, "nbs", "*.ipynb"), (
        "run nbdev-clean and commit the result"
    )


sys.path.insert(0, str(ROOT / "nbs" / "site"))
from layout import LAYERS, NOTEBOOKS, chapters, draw  # noqa: E402


def imports(path):
    "Modules of the library that a module imports, as dotted names below `ovss_nb`."
    inside = path.relative_to(ROOT / "ovss_nb").with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield ".".join([*inside[: len(inside) - node.level], *((node.module or "").split("."))]), node
            elif (node.module or "").startswith("ovss_nb."):
                yield node.module.removeprefix("ovss_nb."), node
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("ovss_nb."):
                    yield name.name.removeprefix("ovss_nb."), node


def modules():
    return [path for path in (ROOT / "ovss_nb").rglob("*.py") if not path.name.startswith("_")]


def test_imports_go_down():
    "To a lower layer, or within a folder to a lower number."
    layer = {folder: depth for depth, row in enumerate(reversed(LAYERS)) for folder in row}
    number = {module: int(path.name[:2]) for found in chapters().values() for path, *_, module in found}
    found = 0
    for path in modules():
        own = path.relative_to(ROOT / "ovss_nb").with_suffix("").as_posix().replace("/", ".")
        folder = own.split(".")[0]
        for target, _ in imports(path):
            other = target.split(".")[0]
            if other == "data":
                continue
            found += 1
            if other == folder:
                assert number[target] < number[own], f"{own} imports {target}, which has no lower number"
            else:
                assert layer[other] < layer[folder], f"{own} imports {target}, which does not lie below it"
    assert found > 200


def test_numbers_are_unique_within_a_folder():
    for folder, found in chapters().items():
        numbers = [path.name[:2] for path, *_ in found]
        assert numbers and len(set(numbers)) == len(numbers), folder
        assert all(f"{folder}.{path.stem[3:]}" == module for path, *_, module in found), folder


def test_every_module_is_drawn():
    assert NOTEBOOKS == ROOT / "nbs"
    assert draw(chapters()) == (NOTEBOOKS / "site/layout.svg").read_text(), "run python nbs/site/layout.py"
    drawn = {module for found in chapters().values() for *_, module in found}
    assert drawn == {
        path.relative_to(ROOT / "ovss_nb").with_suffix("").as_posix().replace("/", ".") for path in modules()
    }


def test_core_is_free_of_torch():
    ground = [module for *_, module in chapters()["core"]] + [
        "inference.onnx_run",
        "text.language_model",
        "text.prompt_bank",
    ]
    code = (
        "import sys; "
        + "; ".join(f"import ovss_nb.{module}" for module in ground)
        + "; print('torch' in sys.modules)"
    )
    assert python("-c", code).strip() == "False"


def test_import_is_cheap():
    """`import ovss_nb` loads no torch and takes at most five times as long as `import numpy`, start of Python
    included.
    """
    assert python("-c", "import sys, ovss_nb; print('torch' in sys.modules)").strip() == "False"

    def fastest(statement):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            python("-c", statement)
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest("import ovss_nb") <= 5 * fastest("import numpy")


def test_public_names_are_there():
    import ovss_nb

    for name in ovss_nb.__all__:
        assert getattr(ovss_nb, name) is not None
    with pytest.raises(AttributeError):
        ovss_nb.no_such_name


def test_wheel_carries_its_data(tmp_path):
    "A wheel, unpacked far from the checkout, finds its vocabularies and subclasses."
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            tmp_path,
            ROOT,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        members = archive.namelist()
        metadata = archive.read(next(name for name in members if name.endswith("METADATA"))).decode()
    assert {"ovss_nb/py.typed", "ovss_nb/data/app/viewer.js", "ovss_nb/data/app/viewer.css"} <= set(members)
    assert (
        "Provides-Extra: crf" in metadata and "Provides-Extra: all" in metadata and "Apache-2.0" in metadata
    )
    code = (
        "import ovss_nb; from ovss_nb.core.vocabulary import load_vocabulary; from ovss_nb.text.prompt_bank"
        " import load_subclasses; print(ovss_nb.__file__, len(load_vocabulary('ADE-847')),"
        " len(load_subclasses('PC-60')))"
    )
    # -I ignores the checkout and this environment's editable install comes second.
    out = python(
        "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}", cwd=tmp_path
    )
    file, names, subclasses = out.split()
    assert file.startswith(str(tmp_path)) and (names, subclasses) == ("847", "60")


def test_missing_extra_names_the_command(tmp_path):
    "Without pydensecrf the CRF says what to install; nothing else breaks."
    code = (
        "import sys; sys.modules['pydensecrf'] = None; sys.modules['pydensecrf.densecrf'] = None\n"
        "from ovss_nb.components.crf import binary_crf, crf_available; import numpy as np\n"
        "assert not crf_available()\n"
        "try: binary_crf(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), .5))\n"
        "except ImportError as e: print(e)"
    )
    assert "pip install 'ovss_nb[crf]'" in python("-c", code)


# ---- how it is written

WIDTH = 110  # columns, as in pyproject.toml
LENGTH = 40  # lines of an exported cell
EXCUSE = re.compile(r"\b(longer|lines)\b")  # of a markdown cell that says why the cell after it is longer
# left behind by tools and machines, or about files that a reader does not have
TRACES = re.compile(
    r"\bSYSTEMS (section )?\d|\bSYSTEMS's|\bTARGETS\b|\bRECIPES \d|\.\./shared|Kernel is running"
    r"|(?<![\w.:/])/(work|tmp|root|home|Users|mnt)/\w|\d(it/s|s/it)\b|\d%\|"
)


def notebooks():
    "{path below nbs: cells} of every notebook."
    paths = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return {
        path.relative_to(ROOT / "nbs").as_posix(): json.loads(path.read_text(encoding="utf-8"))["cells"]
        for path in paths
        if ".ipynb_checkpoints" not in path.parts
    }


def source(cell):
    return "".join(cell["source"])


def library():
    "The modules but for nbdev's generated index."
    return [path for path in (ROOT / "ovss_nb").rglob("*.py") if path.name != "_modidx.py"]


def pieces_of_code():
    "(where, text) of the library without its generated `__all__`, of code cells, of tests and of the site."
    for path in library():
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(ROOT).as_posix(), re.sub(r"^__all__ = \[.*?\]", "", text, flags=re.M | re.S)
    for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "nbs/site").glob("*.py")]:
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for name, cells in notebooks().items():
        for cell in cells:
            if cell["cell_type"] == "code":
                yield f"{name} {cell['id']}", source(cell)


def test_lines_fit_the_page():
    wide = [
        f"{where}: {line.strip()[:60]}"
        for where, text in pieces_of_code()
        for line in text.splitlines()
        if len(line) > WIDTH
    ]
    assert not wide, "\n".join(wide)


def ruff(*arguments):
    return subprocess.run(
        [BIN / "ruff", *arguments, "--no-cache", "nbs", "tests"], cwd=ROOT, capture_output=True, text=True
    )


def test_formatted():
    done = ruff("format", "--check")
    assert not done.returncode, "run ruff format nbs tests\n" + done.stdout + done.stderr


def test_one_statement_a_line():
    done = ruff("check", "--select", "E701,E702", "--output-format", "concise")
    assert not done.returncode, done.stdout + done.stderr


def test_methods_stand_in_their_class():
    "A method that `patch` adds is seen by neither editors nor type checkers."
    assert not [where for where, text in pieces_of_code() if re.search(r"^@patch\b", text, re.M)]


def test_exported_cells_are_short():
    "Or the markdown cell before says why not."
    long = []
    for name, cells in notebooks().items():
        for before, cell in zip(cells, cells[1:]):
            lines = [line for line in source(cell).splitlines() if not line.startswith("#|")]
            if not source(cell).startswith("#| export") or len(lines) <= LENGTH:
                continue
            if before["cell_type"] != "markdown" or not EXCUSE.search(source(before)):
                long.append(f"{name} {cell['id']}: {len(lines)} lines")
    assert not long, "\n".join(long)


def test_every_chapter_shows_something():
    cells = notebooks()
    chapter_names = [
        path.relative_to(NOTEBOOKS).as_posix() for found in chapters().values() for path, *_ in found
    ]
    assert len(chapter_names) > 60
    assert not [name for name in chapter_names if not any(cell.get("outputs") for cell in cells[name])]


def texts(output):
    "What an output says, without its pictures."
    if output["output_type"] == "error":
        yield "\n".join(output["traceback"])
    yield "".join(output.get("text", []))
    for kind, content in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            yield content if isinstance(content, str) else "".join(map(str, content))


def pieces_to_read():
    "(where, text) of README, pages, library and notebooks, but for cells that say where data may lie."
    pages = (ROOT / "nbs/site/pages").rglob("*.md")
    for path in [ROOT / "README.md", *pages, *library()]:
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for name, cells in notebooks().items():
        for cell in cells:
            if "parameters" not in cell["metadata"].get("tags", []):
                yield f"{name} {cell['id']}", source(cell)
            for output in cell.get("outputs", []):
                for text in texts(output):
                    yield f"{name} {cell['id']}, output", text


def test_nothing_is_left_behind():
    "No reference to a file that is not here, no path of a machine, no progress bar, no warning of Jupyter."
    left = [
        f"{where}: {text[max(0, match.start() - 30) : match.end() + 30]!r}"
        for where, text in pieces_to_read()
        for match in TRACES.finditer(text)
    ]
    assert not left, "\n".join(left)


def test_errors_of_machines_are_not_shown():
    assert not [
        f"{name} {cell['id']}"
        for name, cells in notebooks().items()
        for cell in cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]
