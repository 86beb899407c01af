"""Runs and sweeps of small real notebooks, in real kernels:
refused, repeated, failed, killed, resumed, on workers and on Ray.
"""

import argparse, hashlib, json, os, shutil, signal, subprocess, sys, time, warnings
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

papermill = pytest.importorskip("papermill", reason="needs the extra `jupyter`")

from ovss_nb.app.experiments import (
    ExperimentError,
    RunFailed,
    add_commands,
    check_parameters,
    cuda_devices,
    environment,
    parse_parameter,
    plot_results,
    read_parameters,
    read_run,
    read_sweep,
    results,
    results_table,
    run_inputs,
    run_notebook,
    sweep,
)

ROOT = Path(__file__).parent.parent
PARAMETERS = """
value: float = 1.0  # squared
word: str = "cat"
sizes: list[int] = []
options = {}
fail: bool = False
wait = 0.0
run_dir: str = "out"
"""
# Each run leaves a line in started.txt beside its run folder: the side effect that tells whether it ran at
# all.
BODY = (
    """
import json, os, pathlib, time
folder = pathlib.Path(run_dir)
with open(folder.parent/"started.txt", "a") as file:
    file.write(f"{folder.name}\\n")
resumed = (folder/"half.txt").exists()
(folder/"half.txt").write_text(str(os.getpid()))
time.sleep(0 if resumed else wait)
""",
    """
if fail:
    raise ValueError(f"{word} is no dog")
metrics = dict(square=value**2, resumed=resumed, word=word, cwd=os.getcwd(), nested=dict(a=1), rows=[1, 2])
metrics["device"] = os.environ.get("CUDA_VISIBLE_DEVICES")
(folder/"metrics.json").write_text(json.dumps(metrics))
""",
)


def write(path, parameters=PARAMETERS, *cells, tags=("parameters",)):
    "A notebook without kernelspec or language, as some editors write it."
    cells = [
        dict(
            cell_type="code",
            id=f"c{n}",
            metadata=dict(tags=list(tags)) if n == 0 else {},
            source=source,
            execution_count=None,
            outputs=[],
        )
        for n, source in enumerate((parameters, *cells))
    ]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


@pytest.fixture
def notebook(tmp_path):
    return write(tmp_path / "square.ipynb", PARAMETERS, *BODY)


def started(folder):
    return (folder / "started.txt").read_text().split() if (folder / "started.txt").exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# Refusals, before anything runs


@pytest.mark.parametrize(
    "parameters, words",
    [
        (dict(vaule=2), "no parameter `vaule`; did you mean 'value'?.* It has: value, word"),
        (dict(zzz=2), "no parameter `zzz`. It has"),
        (dict(value="2"), "`value` must be float, not str '2'"),
        (dict(value=True), "must be float, not bool"),
        (dict(value=float("inf")), "what JSON has"),
        (dict(word=2), "must be str.*quote it twice"),
        (dict(word=None), "must be str"),
        (dict(word=Path("a")), "what JSON has"),
        (dict(fail=1), "must be bool"),
        (dict(sizes=[1, 2.5]), r"must be list\[int\]"),
        (dict(sizes=(1, 2)), "what JSON has"),
        (dict(sizes=3), r"list\[int\]"),
        (dict(options=[]), "`options` must be dict"),
        (dict(options={1: 2}), "what JSON has"),
        (dict(wait="1"), "`wait` must be float"),
        (dict(run_dir="x"), "`run_dir` is set"),
    ],
)
def test_wrong_parameters(notebook, tmp_path, parameters, words):
    with pytest.raises(ExperimentError, match=words):
        run_notebook(notebook, parameters, tmp_path / "run")
    assert not (tmp_path / "run").exists() and started(tmp_path) == []


@pytest.mark.parametrize(
    "source, words",
    [
        ("x = Path('a')", "must be a plain value"),
        ("x = 2*3", "must be a plain value"),
        ("x: int", "not `missing`"),
        ("x = y = 1", "write each parameter"),
        ("x, y = 'ab'", "write each parameter"),
        ("x[0] = 1", "write each parameter"),
        ("x: Path = 'a'", "the type `Path`"),
        ("x: int = 'a'", "`x` must be int"),
        ("x = (1, 2)", "what JSON has"),
        ("%matplotlib inline", "not plain Python"),
        ("x = 1", "lacks the parameter `run_dir: str"),
    ],
)
def test_cells_that_cannot_be_read(tmp_path, source, words):
    run_dir = "" if "lacks" in words else "\nrun_dir = 'out'"
    with pytest.raises(ExperimentError, match=words):
        run_notebook(write(tmp_path / "n.ipynb", source + run_dir, *BODY), {}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_not_one_tagged_cell(tmp_path):
    for tags, words in (((), "has no cells tagged"), (("parameter",), "has no cells tagged")):
        with pytest.raises(ExperimentError, match=words):
            run_notebook(write(tmp_path / "n.ipynb", PARAMETERS, *BODY, tags=tags), {}, tmp_path / "run")
    content = json.loads(write(tmp_path / "n.ipynb", PARAMETERS, *BODY).read_text())
    content["cells"][1]["metadata"]["tags"] = ["parameters"]
    (tmp_path / "n.ipynb").write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match="2 cells tagged"):
        read_parameters(tmp_path / "n.ipynb")
    (tmp_path / "n.ipynb").write_text("[]")
    with pytest.raises(ExperimentError, match="not a notebook"):
        read_parameters(tmp_path / "n.ipynb")
    with pytest.raises(ExperimentError, match="cannot be read: No such file"):
        read_parameters(tmp_path / "absent.ipynb")
    assert started(tmp_path) == []


def test_types(tmp_path):
    notebook = write(
        tmp_path / "n.ipynb",
        'import os\na: int|None = None\nb: "float" = 1\nc: Literal["x", "y"] = "x"\nd = None\ne: dict[str,'
        ' list[float]] = {}\nf: str = None\ng, h = 1, "h"\nrun_dir = "out"',
    )
    assert check_parameters(notebook, {}) == dict(a=None, b=1.0, c="x", d=None, e={}, f=None, g=1, h="h")
    values = check_parameters(notebook, dict(a=3, b=2, c="y", d=[1], e={"k": [1, 2.5]}, f="f"))
    assert (
        values == dict(a=3, b=2.0, c="y", d=[1], e={"k": [1.0, 2.5]}, f="f", g=1, h="h")
        and type(values["b"]) is type(values["e"]["k"][0]) is float
    )
    for wrong in (dict(a=1.0), dict(c="z"), dict(e={"k": 1}), dict(f=1), dict(h=1)):
        with pytest.raises(ExperimentError):
            check_parameters(notebook, wrong)


def test_experiment_notebooks_of_the_project_are_read():
    for path in (ROOT / "nbs/experiments").glob("*.ipynb"):
        assert "run_dir" in read_parameters(path)


def test_parse_parameter():
    assert parse_parameter(
        "a=1", "b=-2.5", "c=true", "d=[1, 2]", 'e={"k": 1}', "f={k = 1}", "g=x=y", "h=", "i='0'", "j=null"
    ) == dict(a=1, b=-2.5, c=True, d=[1, 2], e={"k": 1}, f={"k": 1}, g="x=y", h="", i="0", j=None)
    assert parse_parameter("a=True", "b=1\nc=2", "c=NaN", "d=12:00:00") == dict(
        a="True", b="1\nc=2", c="NaN", d="12:00:00"
    )
    for wrong in ("a", "=1", "a-b=1"):
        with pytest.raises(ExperimentError, match="key=value"):
            parse_parameter(wrong)


# One run


def test_run(notebook, tmp_path):
    out = tmp_path / "runs {braces} and spaces" / "one"
    run = run_notebook(notebook, dict(value=3, sizes=[1]), out)
    assert (
        run["state"] == "finished"
        and run["metrics"]["square"] == 9.0
        and run["metrics"]["cwd"] == os.getcwd()
        and run["error"] is None
        and run["seconds"] > 0
    )
    assert run["parameters"] == dict(value=3.0, word="cat", sizes=[1], options={}, fail=False, wait=0.0)
    assert sorted(file.name for file in out.iterdir() if file.name[0] != ".") == [
        "environment.json",
        "half.txt",
        "metrics.json",
        "notebook.ipynb",
        "run.json",
    ]
    here = json.loads((out / "environment.json").read_text())
    assert (
        here["python"] == ".".join(map(str, sys.version_info[:3]))
        and here["packages"]["papermill"] == papermill.__version__
        and here["git"] is None
    )
    code = [cell["source"] for cell in json.loads(notebook.read_text())["cells"]]
    assert (
        run["hash"]
        == hashlib.sha256(
            json.dumps(
                dict(code=code, parameters=run["parameters"]), sort_keys=True, separators=(",", ":")
            ).encode()
        ).hexdigest()
    )

    # again: nothing runs, whether a default is spelt out or a float is given as an int
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert run_notebook(notebook, dict(value=3.0, sizes=[1], word="cat"), out) == run == read_run(out)
    assert started(out.parent) == ["one"] and before == {
        file: file.stat().st_mtime_ns for file in out.iterdir()
    }

    # other parameters, other code: refused; forced: from an empty folder
    with pytest.raises(ExperimentError, match=r"holds another run \(value=3.0\): choose"):
        run_notebook(notebook, dict(value=2, sizes=[1]), out)
    write(notebook, PARAMETERS, *BODY, "pass")
    with pytest.raises(ExperimentError, match="of an earlier state of square.ipynb"):
        run_notebook(notebook, dict(value=3, sizes=[1]), out)
    assert started(out.parent) == ["one"] and read_run(out) == run
    forced = run_notebook(notebook, dict(value=2), out, force=True)
    assert (
        forced["metrics"]["square"] == 4.0
        and not forced["metrics"]["resumed"]
        and started(out.parent) == ["one"] * 2
    )

    # metrics.json removed by hand: not finished any more
    (out / "metrics.json").unlink()
    assert (
        read_run(out)["state"] == "failed"
        and run_notebook(notebook, dict(value=2), out)["metrics"]["square"] == 4.0
    )


def test_folders_that_are_not_ours(notebook, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("meow")
    with pytest.raises(ExperimentError, match="not empty and holds no run"):
        run_notebook(notebook, {}, tmp_path / "photos")
    run_notebook(notebook, {}, tmp_path / "photos", force=True)
    # force replaces a run, not somebody's files
    assert (tmp_path / "photos/cat.jpg").read_text() == "meow"
    (tmp_path / "photos/run.json").write_text('{"state": "fini')
    with pytest.raises(ExperimentError, match="damaged"):
        run_notebook(notebook, {}, tmp_path / "photos")
    (tmp_path / "photos/run.json").write_text("{}")
    with pytest.raises(ExperimentError, match="not the record of a run"):
        results(tmp_path)


def test_failed_run(notebook, tmp_path):
    with pytest.raises(
        RunFailed, match=r"square.ipynb failed: ValueError: cow is no dog \(In \[4\]\).*notebook.ipynb"
    ) as caught:
        run_notebook(notebook, dict(fail=True, word="cow"), tmp_path / "run")
    assert caught.value.__cause__ is None and "\n" not in str(caught.value)
    run = read_run(tmp_path / "run")
    assert run["state"] == "failed" and run["error"].startswith("ValueError: cow") and run["metrics"] == {}
    assert (
        "ValueError" in (tmp_path / "run/notebook.ipynb").read_text()
        and not (tmp_path / "run/running.ipynb").exists()
    )
    # a failure is no result: it is tried again
    with pytest.raises(RunFailed):
        run_notebook(notebook, dict(fail=True, word="cow"), tmp_path / "run")
    assert started(tmp_path) == ["run"] * 2


@pytest.mark.parametrize(
    "cell, words",
    [
        ("", "written no metrics.json"),
        ("open(f'{run_dir}/metrics.json', 'w').write('{')", "is damaged"),
        ("open(f'{run_dir}/metrics.json', 'w').write('[1]')", "it holds no object"),
        ("import os; os._exit(9)", "Kernel died"),
    ],
)
def test_runs_without_result(tmp_path, cell, words):
    with pytest.raises(RunFailed, match=words):
        run_notebook(write(tmp_path / "n.ipynb", "run_dir = 'out'", cell), {}, tmp_path / "run")
    assert read_run(tmp_path / "run")["state"] == "failed" and (tmp_path / "run/notebook.ipynb").exists()


RUN = (
    "import sys; from ovss_nb.app.experiments import run_notebook; print(run_notebook(sys.argv[1],"
    " dict(wait=float(sys.argv[2])), sys.argv[3])['metrics'])"
)


def test_killed_run(notebook, tmp_path):
    "Kill -9 in the middle; while it runs nobody else may; afterwards the notebook finds the files it left."
    out = tmp_path / "run"
    running = subprocess.Popen(
        [sys.executable, "-c", RUN, str(notebook), "600", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (out / "half.txt").exists() and (out / "half.txt").read_text())
    with pytest.raises(ExperimentError, match="is in use"):
        run_notebook(notebook, dict(wait=600), out)
    running.kill()
    running.wait()
    kernel = int((out / "half.txt").read_text())
    wait_for(lambda: is_gone(kernel))
    assert read_run(out)["state"] == "running" and (out / "running.ipynb").exists()
    with pytest.raises(ExperimentError, match=r"another run \(wait=600.0\)"):
        run_notebook(notebook, dict(wait=0), out)

    run = run_notebook(notebook, dict(wait=600), out)
    assert run["state"] == "finished" and run["metrics"]["resumed"] and started(tmp_path) == ["run"] * 2
    assert not [file.name for file in out.iterdir() if file.name.startswith("running")]


def test_a_run_stopped_by_ctrl_c_says_so_and_goes_on(notebook, tmp_path):
    "The terminal sends the signal to the kernel too."
    out, program = (
        tmp_path / "run",
        "import sys; from ovss_nb.app.cli import main; sys.exit(main(sys.argv[1:]))",
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program, "run", str(notebook), "-p", "wait=600", "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: (out / "half.txt").exists() and (out / "half.txt").read_text())
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode in (1, 130) and "Traceback" not in said and read_run(out)["state"] == "failed"
    assert run_notebook(notebook, dict(wait=600), out)["metrics"]["resumed"]


def test_killed_while_clearing(notebook, tmp_path):
    "A forced run that was stopped while it emptied the folder must not resume from what is left."
    run = run_notebook(notebook, {}, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | dict(state="clearing")))
    again = run_notebook(notebook, {}, tmp_path / "run")
    assert (
        again["state"] == "finished"
        and not again["metrics"]["resumed"]
        and again["hash"] == run["hash"]
        and started(tmp_path) == ["run"] * 2
    )


def test_same_package_from_any_folder(tmp_path):
    "The kernel imports the package that started it, not another one that happens to be installed."
    shutil.copytree(ROOT / "ovss_nb", tmp_path / "copy/ovss_nb")
    body = (
        "import json, ovss_nb\nopen(f'{run_dir}/metrics.json',"
        " 'w').write(json.dumps(dict(file=ovss_nb.__file__)))"
    )
    notebook = write(tmp_path / "n.ipynb", "run_dir = 'out'", body)
    (tmp_path / "elsewhere").mkdir()
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'copy')!r}); from ovss_nb.app.experiments import"
        f" run_notebook; run_notebook({str(notebook)!r}, {{}}, 'run')"
    )
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "elsewhere", check=True, capture_output=True
    )
    assert (
        read_run(tmp_path / "elsewhere/run")["metrics"]["file"] == str(tmp_path / "copy/ovss_nb/__init__.py")
        and "PYTHONPATH" not in os.environ
    )


def test_environment(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert environment(tmp_path / "n.ipynb")["git"] == dict(commit=commit, dirty=False)
    (tmp_path / "a.txt").write_text("b")
    assert environment(tmp_path / "n.ipynb")["git"]["dirty"] is True
    # devices, with an nvidia-smi of our own
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: H200 (UUID: GPU-a)'\necho 'GPU 1: H200 (UUID: GPU-b)'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda_devices() == ["0", "1"] and len(environment(tmp_path)["device"]["cuda"]) == 2
    for value, devices in (("3, 5", ["3", "5"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert cuda_devices() == devices


def test_no_torch():
    "Supervising a sweep must not load torch, and with it CUDA."
    subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys, ovss_nb.app.experiments as e; e.environment('.'); assert 'torch' not in"
                " sys.modules and 'papermill' not in sys.modules"
            ),
        ],
        check=True,
    )


# Sweeps


def sweep_file(tmp_path, text, notebook="square.ipynb"):
    (tmp_path / "sweep.toml").write_text(f'notebook = "{notebook}"\n' + text)
    return tmp_path / "sweep.toml"


def test_read_sweep(notebook, tmp_path):
    runs = read_sweep(
        sweep_file(tmp_path, '[base]\nword = "dog"\n[grid]\nvalue = [1, 2]\nsizes = [[], [1, 2]]\n')
    )
    assert [run.name.rpartition(",")[0] for run in runs] == [
        "value=1.0,sizes=",
        "value=1.0,sizes=1-2",
        "value=2.0,sizes=",
        "value=2.0,sizes=1-2",
    ]
    assert [(run.parameters["value"], run.parameters["sizes"]) for run in runs] == [
        (1.0, []),
        (1.0, [1, 2]),
        (2.0, []),
        (2.0, [1, 2]),
    ]
    assert all(run.parameters["word"] == "dog" and run.notebook == notebook for run in runs)
    runs = read_sweep(
        sweep_file(
            tmp_path, '[grid]\nvalue = [1, 2]\n[[runs]]\nword = "a"\n[[runs]]\nword = "b"\nfail = true\n'
        )
    )
    assert [run.name for run in runs] == [
        "value=1.0,word=a,fail=false",
        "value=2.0,word=a,fail=false",
        "value=1.0,word=b,fail=true",
        "value=2.0,word=b,fail=true",
    ]
    assert [run.name for run in read_sweep(sweep_file(tmp_path, "[base]\nvalue = 2\n"))] == ["run"]
    # unsafe or look-alike values: safe and distinct names, the same ones each time
    text = "[grid]\nword = ['../a b', '../a  b', 'ä/ö', 'ö/ä', 'Cat', 'cat', '', '%s', '%s']\n" % (
        "x" * 300,
        "x" * 299,
    )
    names = [run.name for run in read_sweep(sweep_file(tmp_path, text))]
    assert len({name.lower() for name in names}) == 9 and all(
        len(name) < 120 and not set(name) & set('/\\ :*?"<>|') for name in names
    )
    assert "word=cat" in names and names == [run.name for run in read_sweep(sweep_file(tmp_path, text))]


@pytest.mark.parametrize(
    "text, words",
    [
        ("grids = 1", "has the key `grids`; did you mean 'grid'"),
        ("base = 1", r"`base` must be a table \[base\]"),
        ("runs = 1", r"`runs` must be tables"),
        ("runs = [1]", r"`runs` must be tables"),
        ("runs = []", "`runs` must be tables"),
        ("[grid]\nvalue = 1", "must be a list of values"),
        ("[grid]\nvalue = []", "must be a list of values"),
        ("[grid]\nvaleu = [1]", "no parameter `valeu`"),
        ("[base]\nvalue = 1\n[grid]\nvalue = [2]", "say it once"),
        ("[grid]\nvalue = [2]\n[[runs]]\nvalue = 1", "say it once"),
        ("[[runs]]\nvalue = 1\n[[runs]]\nvalue = 'a'", "`value` must be float"),
        ("[grid]\nvalue = [2, 3, 2.0]", "the runs 1 and 3 are the same"),
        ("[base", "is not TOML"),
        ("[base]\nword = 2026-11-21", "what JSON has"),
        ("[base]\nrun_dir = 'x'", "`run_dir` is set"),
    ],
)
def test_wrong_sweeps(notebook, tmp_path, text, words):
    with pytest.raises(ExperimentError, match=words):
        sweep(sweep_file(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sweep_files_that_are_not_there(tmp_path):
    with pytest.raises(ExperimentError, match="cannot be read"):
        read_sweep(tmp_path / "absent.toml")
    with pytest.raises(ExperimentError, match="square.ipynb cannot be read"):
        read_sweep(sweep_file(tmp_path, ""))
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ExperimentError, match="must say which notebook"):
        read_sweep(tmp_path / "empty.toml")


def test_sweep(notebook, tmp_path, monkeypatch):
    "Four runs over two workers with a device each; one fails; again: only that one; the table, the picture."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    file, out = (
        sweep_file(
            tmp_path,
            "[[runs]]\nvalue = 1\n[[runs]]\nvalue = 2\nfail = true\n[[runs]]\nvalue = 3\n[[runs]]\nvalue"
            " = 4\n",
        ),
        tmp_path / "out",
    )
    rows = sweep(file, out, workers=2)
    assert [row["state"] for row in rows] == [
        "finished",
        "failed",
        "finished",
        "finished",
    ] and "cat is no dog" in rows[1]["error"]
    assert [row["metrics"].get("square") for row in rows] == [1, None, 9, 16] and {
        row["metrics"]["device"] for row in rows if row["metrics"]
    } == {"4", "7"}
    assert (
        sorted(started(out))
        == sorted(row["run"] for row in rows)
        == ["value=1.0,fail=false", "value=2.0,fail=true", "value=3.0,fail=false", "value=4.0,fail=false"]
    )
    assert results(out) == rows
    assert sweep(file, out, workers=2) and started(out)[4:] == ["value=2.0,fail=true"]

    assert set(rows[0]["metrics"]) == {"square", "resumed", "word", "cwd", "device"}  # scalars only
    lines = results_table(rows).splitlines()
    assert lines[0].split() == ["value", "fail", "square", "resumed", "state", "seconds"] and lines[
        3
    ].split()[:5] == ["3", "false", "9", "false", "finished"]
    assert len(lines) == 6 and lines[5].startswith("value=2, fail=true: ValueError")
    assert results_table(rows, ["word"]).splitlines()[0].split() == [
        "value",
        "fail",
        "word",
        "state",
        "seconds",
    ]
    with pytest.raises(ExperimentError, match="did you mean 'square'"):
        results_table(rows, ["sqare"])
    with pytest.raises(ExperimentError, match="no run in"):
        results(tmp_path / "nothing")

    figure = plot_results(rows, "square", tmp_path / "square.png")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1, 9, 16] and (
        tmp_path / "square.png"
    ).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ExperimentError, match="no metric|has the metric `word`"):
        plot_results(rows, "word", tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()

    # a changed notebook is refused for the whole sweep, before anything runs
    write(notebook, PARAMETERS, *BODY, "pass")
    with pytest.raises(ExperimentError, match="earlier state of square.ipynb"):
        sweep(file, out, workers=2)
    assert len(started(out)) == 5


def test_interrupted_sweep(notebook, tmp_path):
    "Kill -9 while two of four runs wait: no kernel stays behind; the second start does the rest, once each."
    file, out = sweep_file(tmp_path, "[grid]\nwait = [0, 0.1, 600, 601]\n"), tmp_path / "out"
    script = (
        "import sys; from ovss_nb.app.experiments import sweep; sweep(sys.argv[1], sys.argv[2], workers=2)"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", script, str(file), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    halves = [out / f"wait={wait}/half.txt" for wait in (600.0, 601.0)]
    wait_for(lambda: all(half.exists() and half.read_text() for half in halves))
    family = [*psutil.Process(running.pid).children(recursive=True)]
    running.kill()
    running.wait()
    kernels = [int(half.read_text()) for half in halves]
    assert set(kernels) <= {process.pid for process in family}
    wait_for(lambda: all(is_gone(process.pid) for process in family))
    states = {row["run"]: row["state"] for row in results(out)}
    assert states == {
        "wait=0.0": "finished",
        "wait=0.1": "finished",
        "wait=600.0": "running",
        "wait=601.0": "running",
    }
    rows = sweep(file, out, workers=2)
    assert [row["state"] for row in rows] == ["finished"] * 4 and [
        row["metrics"]["resumed"] for row in rows
    ] == [False, False, True, True]
    assert sorted(started(out)) == [
        "wait=0.0",
        "wait=0.1",
        "wait=600.0",
        "wait=600.0",
        "wait=601.0",
        "wait=601.0",
    ]


def test_worker_that_is_killed(tmp_path):
    """A notebook that takes its supervisor along, every time:
    its run is recorded as failed, the other one is finished.
    """
    body = (
        (
            "import json, os, signal\nif n == 1: os.kill(os.getppid(),"
            " signal.SIGKILL)\nopen(f'{run_dir}/metrics.json', 'w').write(json.dumps(dict(n=n)))"
        ),
    )
    write(tmp_path / "square.ipynb", "n = 0\nrun_dir = 'out'", *body)
    rows = sweep(sweep_file(tmp_path, "[grid]\nn = [1, 2]\n"), tmp_path / "out", workers=1)
    assert (
        [row["state"] for row in rows] == ["failed", "finished"]
        and "died" in rows[0]["error"]
        and rows == results(tmp_path / "out")
    )


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
def test_sweep_on_ray(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = sweep(
        sweep_file(tmp_path, "[[runs]]\nvalue = 1\n[[runs]]\nvalue = 2\nfail = true\n[[runs]]\nvalue = 3\n"),
        "out",
        workers=2,
        ray="local",
    )
    assert [row["state"] for row in rows] == ["finished", "failed", "finished"] and [
        row["metrics"].get("square") for row in rows
    ] == [1, None, 9]
    assert {row["metrics"]["cwd"] for row in rows if row["metrics"]} == {str(tmp_path)} and len(
        started(tmp_path / "out")
    ) == 3


# Command line


def carry_out(*arguments):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.func(args)


def said(capsys, *arguments):
    return carry_out(*arguments), *capsys.readouterr()


def test_commands(notebook, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = said(capsys, "run", notebook, "-p", "value=2", "-p", "sizes=[1]")
    assert (
        code == 0
        and out.startswith("out/square\n")
        and '"square": 4.0' in out
        and read_run("out/square")["parameters"]["sizes"] == [1]
    )
    code, out, err = said(capsys, "run", notebook, "-p", "fail=true", "--out", "out/failed")
    assert code == 1 and "cat is no dog" in err
    code, out, err = said(capsys, "run", notebook, "-p", "value=5", "--out", "out/failed", "--force")
    assert code == 0 and '"square": 25.0' in out
    with pytest.raises(ExperimentError, match="no parameter"):
        said(capsys, "run", notebook, "-p", "valu=2")
    code, out, _ = said(capsys, "sweep", sweep_file(tmp_path, "[grid]\nfail = [true, false]\n"))
    assert (
        code == 1
        and sorted(path.name for path in (tmp_path / "out/sweep").glob("fail*"))
        == ["fail=false", "fail=true"]
        and "finished" in out
    )
    code, out, _ = said(capsys, "results", "out", "--metric", "square", "--plot", "square.svg")
    assert (
        code == 0
        and len(out.splitlines()) == 6
        and (tmp_path / "square.svg").read_text().count("</svg>") == 1
    )
    with pytest.raises(ExperimentError, match="name it with --metric"):
        said(capsys, "results", "out", "--plot", "a.png")


# What a run reads


def input_of_a_run(tmp_path):
    from PIL import Image

    data = tmp_path / "set"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (4, 4), (60 + i, 90, 90)).save(data / f"images/{i}.bmp")
        Image.new("L", (4, 4), i).save(data / f"masks/{i}.png", compress_level=0)
    for path in (data / "classes.txt", tmp_path / "words.txt"):
        path.write_text("cat\ndog\n")
    return dict(data=str(data), vocabulary=str(tmp_path / "words.txt"))


def flip(path):
    "Another byte, with the old size and time."
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "changed", ["words.txt", "set/masks/1.png", "set/images/1.bmp", "set/classes.txt", "set/images/2.bmp"]
)
@pytest.mark.parametrize("protocol", [None, ""])
def test_what_a_run_reads(tmp_path, changed, protocol):
    "Word lists and data sets, plain ones and those of a protocol; in a list or a dict too."
    parameters = (
        input_of_a_run(tmp_path)
        | ({} if protocol is None else dict(protocol=protocol))
        | dict(word="cat", long="a b" * 3000, empty="", folder=str(tmp_path))
    )
    if protocol == "":
        (tmp_path / "set/masks").rename(tmp_path / "set/labels")
        changed = changed.replace("masks", "labels")
    before = run_inputs(parameters)
    assert set(before) == {parameters["data"], parameters["vocabulary"]} and run_inputs(
        dict(nested=dict(a=[parameters["vocabulary"]]))
    ).keys() == {parameters["vocabulary"]}
    if (tmp_path / changed).exists():
        flip(tmp_path / changed)
    else:
        (tmp_path / changed).touch()
    after = run_inputs(parameters)
    assert sum(after[path] != before[path] for path in before) == 1


def test_a_run_of_changed_input_is_refused(tmp_path):
    "Forced, it is run again, and then stands."
    parameters = input_of_a_run(tmp_path)
    write(
        tmp_path / "n.ipynb",
        "".join(f"{name} = {value!r}\n" for name, value in parameters.items()) + PARAMETERS,
        *BODY,
    )
    (tmp_path / "s.toml").write_text('notebook = "n.ipynb"\n')
    sweep(tmp_path / "s.toml", tmp_path / "out", workers=1)
    flip(tmp_path / "set/masks/1.png")
    with pytest.raises(ExperimentError, match="earlier state of .*force"):
        sweep(tmp_path / "s.toml", tmp_path / "out", workers=1)
    assert len(started(tmp_path / "out")) == 1
    for force in (True, False):
        sweep(tmp_path / "s.toml", tmp_path / "out", workers=1, force=force)
    assert len(started(tmp_path / "out")) == 2


def test_another_library_is_said(notebook, tmp_path):
    "A night's runs are not thrown away for a comment in the package, but it is said."
    run_notebook(notebook, {}, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_notebook(notebook, {}, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | dict(library="of last week")))
    with pytest.warns(UserWarning, match="1 of 1 finished runs .* another state of ovss_nb"):
        run_notebook(notebook, {}, tmp_path / "run")


def test_a_plot_never_replaces_a_run(notebook, tmp_path):
    run_notebook(notebook, {}, tmp_path / "out/run")
    (tmp_path / "plot.png").symlink_to(tmp_path / "out/run/metrics.json")
    results_of_out = ["results", tmp_path / "out", "--metric", "square", "--plot"]
    with pytest.raises(ValueError, match="written over"):
        carry_out(*results_of_out, tmp_path / "plot.png")
    for _ in range(2):
        carry_out(*results_of_out, tmp_path / "out/square.png")
    with pytest.raises(ExperimentError, match="suffix"):
        carry_out(*results_of_out, tmp_path / "chart")
