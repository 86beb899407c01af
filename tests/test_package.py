"The library is what the notebooks export, imports go down the floors, importing is cheap, and the wheel carries its data."
import ast
import json
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
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, **kw).stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project in which everything has been exported and cleaned once more."
    copy = tmp_path_factory.mktemp("export")/"project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "build", "*.egg-info", "__pycache__", ".ipynb_checkpoints"))
    for path in (copy/"ovss_nb").rglob("*.py"):
        if path.name != "__init__.py": path.unlink()   # a module whose notebook is gone must show up too
    for command in ("nbdev-export", "nbdev-clean"): subprocess.run([BIN/command], cwd=copy, check=True, capture_output=True)
    return copy


def contents(root, folder, pattern):
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in (root/folder).rglob(pattern) if ".ipynb_checkpoints" not in path.parts}


def test_library_equals_notebooks(exported):
    assert contents(ROOT, "ovss_nb", "*.py") == contents(exported, "ovss_nb", "*.py"), "run nbdev-export and commit the result"


def test_notebooks_are_clean(exported):
    assert contents(ROOT, "nbs", "*.ipynb") == contents(exported, "nbs", "*.ipynb"), "run nbdev-clean and commit the result"


def test_component_notebooks_have_no_outputs():
    for path in (ROOT/"nbs").rglob("*.ipynb"):
        if {"tutorials", "experiments", ".ipynb_checkpoints"} & set(path.parts): continue
        assert not any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"]), f"{path} is committed with outputs"


FLOORS = {"extras": 0, "options": 0, "fonts": 0, "vocabulary": 0, "language_model": 0, "prompts": 0, "images": 0, "cache": 0, "segmentation": 0, "formats": 0, "onnx_run": 0, "workers": 0, "checkpoints": 1, "encoders": 1, "text": 1,
          "subclasses": 2, "class_selection": 2, "refine": 2, "losses": 2, "salience": 2, "fusion": 2, "cost": 2, "masks": 2, "mask_decoder": 2, "multires": 2, "systems": 3, "metrics": 4, "label_files": 4, "datasets": 4, "mess": 4, "protocols": 4, "prepare": 4,
          "captions": 4, "evaluate": 4, "predict": 4, "train": 4, "augment": 4, "tune": 4, "tiles": 4, "video": 4, "onnx_export": 4, "app": 5}


def imports(path):
    "Rooms of the library that a module imports, as dotted names below `ovss_nb`."
    inside = path.relative_to(ROOT/"ovss_nb").with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level: yield ".".join([*inside[:len(inside) - node.level], *((node.module or "").split("."))]), node
            elif (node.module or "").startswith("ovss_nb."): yield node.module.removeprefix("ovss_nb."), node
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("ovss_nb."): yield name.name.removeprefix("ovss_nb."), node


def modules():
    return [path for path in (ROOT/"ovss_nb").rglob("*.py") if not path.name.startswith("_")]


def test_no_import_runs_up_a_floor():
    found = 0
    for path in modules():
        own = path.relative_to(ROOT/"ovss_nb").with_suffix("").parts[0]
        for target, _ in imports(path):
            room = target.split(".")[0]
            if room == "data": continue
            found += 1
            assert FLOORS[room] <= FLOORS[own], f"{path.name} (floor {FLOORS[own]}) imports {target} (floor {FLOORS[room]})"
    assert found > 20


def test_ground_floor_is_free_of_torch():
    ground = [name for name, floor in FLOORS.items() if floor == 0]
    loaded = python("-c", "import sys; " + "; ".join(f"import ovss_nb.{o}" for o in ground) + "; print('torch' in sys.modules)")
    assert loaded.strip() == "False"


def test_import_is_cheap():
    "`import ovss_nb` loads no torch and takes at most five times as long as `import numpy`, start of Python included."
    assert python("-c", "import sys, ovss_nb; print('torch' in sys.modules)").strip() == "False"
    def fastest(statement):
        times = []
        for _ in range(7):
            start = time.perf_counter(); python("-c", statement); times.append(time.perf_counter() - start)
        return min(times)
    assert fastest("import ovss_nb") <= 5*fastest("import numpy")


def test_public_names_are_there():
    import ovss_nb
    for name in ovss_nb.__all__: assert getattr(ovss_nb, name) is not None
    with pytest.raises(AttributeError): ovss_nb.no_such_name


def test_wheel_carries_its_data(tmp_path):
    "A wheel, unpacked far from the checkout, finds its vocabularies and subclasses."
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT], check=True, capture_output=True)
    wheel, = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path/"site")
        metadata = archive.read(next(o for o in archive.namelist() if o.endswith("METADATA"))).decode()
    assert "Provides-Extra: crf" in metadata and "Provides-Extra: all" in metadata and "Apache-2.0" in metadata
    code = ("import ovss_nb; from ovss_nb.vocabulary import load_vocabulary; from ovss_nb.prompts import load_subclasses; "
            "print(ovss_nb.__file__, len(load_vocabulary('ADE-847')), len(load_subclasses('PC-60')))")
    # -I ignores the checkout and this environment's editable install comes second.
    out = python("-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path/'site')!r}); {code}", cwd=tmp_path)
    file, names, subclasses = out.split()
    assert file.startswith(str(tmp_path)) and (names, subclasses) == ("847", "60")


def test_missing_extra_names_the_command(tmp_path):
    "Without pydensecrf the CRF says what to install; nothing else breaks."
    code = ("import sys; sys.modules['pydensecrf'] = None; sys.modules['pydensecrf.densecrf'] = None\n"
            "from ovss_nb.refine import binary_crf, crf_available; import numpy as np\n"
            "assert not crf_available()\n"
            "try: binary_crf(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), .5))\n"
            "except ImportError as e: print(e)")
    assert "pip install 'ovss_nb[crf]'" in python("-c", code)
