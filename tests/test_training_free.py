"Recipes of the training-free family as systems: by name, in windows, with regions, and against plain loops."

import numpy as np
import pytest
import torch
from doubles import small_clip
from ovss_nb.app.viewer import _run_stages
from ovss_nb.benchmarks.datasets import FolderDataset
from ovss_nb.benchmarks.evaluate import evaluate
from ovss_nb.benchmarks.protocols import PROTOCOLS
from ovss_nb.components.region_vote import region_vote
from ovss_nb.core.options import option_kinds
from ovss_nb.core.vocabulary import Vocabulary
from PIL import Image
from ovss_nb.systems.registry import SYSTEMS, create, describe_systems, system_options
from ovss_nb.systems.training_free import TrainingFree, TrainingFreeConfig
from ovss_nb.systems.windows import SlidingWindows, StridedWindows
from torch.nn import functional as F

RECIPES = [name for name, record in SYSTEMS.items() if record.module == "training_free"]
GIVEN = {
    "proxyclip": dict(proxy="middle"),
    "trident": dict(proxy="middle"),
    "corrclip": dict(proxy="middle", regions="slic:12"),
}
WORDS = {"background": ["wall"], "pet": ["cat", "dog"], "cup": ["cup"]}


def picture(height=64, width=64, seed=0):
    small = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(small, (height, width), mode="bilinear")[0]
    return (255 * pixels).byte().movedim(0, -1).numpy()


@pytest.fixture(scope="module")
def clip():
    return small_clip()


def built(name, clip, **options):
    small = dict(size=96 if name in ("scclip", "sfp") else 64, templates="single")
    return create(name, clip, cache=None, **small | GIVEN.get(name, {}) | options)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_every_pixel(name, clip):
    system = built(name, clip, background_threshold=0.2)
    for shape in ((64, 64), (64, 112), (100, 70)):
        result = system.segment(picture(*shape), WORDS)
        assert result.labels.shape == shape and set(np.unique(result.labels)) <= {0, 1, 2}
        assert np.isfinite(result.scores).all() and np.abs(result.scores).max() <= 1.001
    facts = system.describe()
    assert facts["config"]["reading"] == name
    assert facts.get("proxy") is None or name in GIVEN


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_in_windows(name, clip):
    system = built(name, clip)
    side = system.config.size
    windows = StridedWindows(system, side, side - 16, 16)
    result = windows.segment(picture(70, 100), WORDS)
    assert result.labels.shape == (70, 100) and np.isfinite(result.scores).all()
    # one window that sees all is the image seen whole
    whole = StridedWindows(system, side, side, side)
    square = picture(side, side)
    text = system.encode_text(WORDS)
    rows, _ = system.rows(text)
    alone = whole.scores(whole.encode_image(square), rows)
    plain = system.scores(system.encode_image(square), rows)
    plain = F.interpolate(plain[None].float(), alone.shape[-2:], mode="bilinear")[0]
    if system.config.merge == "average":
        assert torch.allclose(alone, plain, atol=1e-4)


@pytest.mark.parametrize("name", ["clearclip", "naclip", "proxyclip"])
def test_half_precision_gives_nearly_the_same_labels(name):
    exact = built(name, small_clip()).segment(picture(64, 96), WORDS).labels
    half = built(name, small_clip().to(torch.bfloat16)).segment(picture(64, 96), WORDS).labels
    assert (exact == half).mean() > 0.9


def last_block_by_loops(clip, image, term):
    "MaskCLIP's or ClearCLIP's cosines of one image, in plain loops over heads and locations."
    with torch.inference_mode():
        pixels = clip.preprocess(image, image.shape[:2])
        tokens = clip.embed(pixels)
        for block in clip.blocks[:-1]:
            tokens = block(tokens)
        last = clip.blocks[-1]
        x = last.ln_1(tokens)[0].double().numpy()
        weight, bias = (p.double().numpy() for p in (last.attn.in_proj_weight, last.attn.in_proj_bias))
        out, shift = (p.double().numpy() for p in (last.attn.out_proj.weight, last.attn.out_proj.bias))
        count, width = x.shape
        heads = last.attn.num_heads
        size = width // heads
        q, k, v = np.split(x @ weight.T + bias, 3, axis=1)
        said = np.zeros((count, width))
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            for i in range(count):
                if term == "identity":
                    said[i, own] = v[i, own]
                    continue
                scores = np.array([q[i, own] @ q[j, own] for j in range(count)]) / size**0.5
                weights = np.exp(scores - scores.max())
                said[i, own] = sum(w * v[j, own] for j, w in enumerate(weights / weights.sum()))
        said = torch.from_numpy(said[1:] @ out.T + shift).float()
        return F.normalize(clip.project(said[None]), dim=-1)[0].numpy()


@pytest.mark.parametrize("name, term", [("maskclip", "identity"), ("clearclip", "qq")])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_scores_by_loops(clip, name, term, shape):
    system = TrainingFree(clip, reading=name, size=shape, keep_aspect=False, templates="single")
    image = picture(*shape)
    text = system.encode_text(["cat", "sky"])
    vectors = last_block_by_loops(clip, image, term)
    expected = text.embeddings[:, 0].float().numpy() @ vectors.T
    ours = system.scores(system.encode_image(image), text).flatten(1).numpy()
    assert np.abs(ours - expected).max() < 1e-5


def test_regions_are_cut_with_the_windows(clip):
    "CorrCLIP's regions of a window are those of the image there; the vote asks the whole map."
    system = built("corrclip", clip)
    seen = []
    inner = system.encode_window

    def encode_window(image, regions=None):
        seen.append(regions)
        return inner(image, regions)

    system.encode_window = encode_window
    windows = StridedWindows(system, 64, 48, 16)
    image = picture(64, 96)
    encoded = windows.encode_image(image)
    whole = system.region_map(encoded)
    corners = [(top, left) for top, left, _ in encoded.windows]
    assert all((own == whole[y : y + 48, x : x + 48]).all() for own, (y, x) in zip(seen, corners))
    labels = windows.segment(image, WORDS).labels
    assert np.array_equal(labels, region_vote(labels, whole))


@pytest.mark.parametrize("name", ["naclip", "resclip", "corrclip"])
def test_windows_with_a_look_at_the_whole(clip, name):
    "The rule windows: of every system; one window as large as the image is the image itself."
    system = built(name, clip)
    image = picture(64, 64)
    text, _ = system.rows(system.encode_text(WORDS))
    windows = SlidingWindows(system, 64, 64, 0)
    both = windows.scores(windows.encode_image(image), text)
    alone = system.scores(system.encode_image(image), text)
    alone = F.interpolate(alone[None].float(), (64, 64), mode="bilinear")[0]
    assert torch.allclose(both, alone, atol=1e-5)


@pytest.mark.parametrize(
    "name, resize", [("corrclip", ""), ("corrclip", "slide:64:48:16"), ("clearclip", "")]
)
def test_evaluation_finds_regions_in_files(clip, tmp_path, name, resize):
    "One region that covers the image: after the vote every pixel has one label."
    for folder in ("images", "masks", "regions"):
        (tmp_path / folder).mkdir()
    for stem in ("a.1", "b"):
        Image.fromarray(picture(48, 64)).save(tmp_path / "images" / f"{stem}.png")
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "masks" / f"{stem}.png")
        Image.fromarray(np.ones((48, 64), np.uint8)).save(tmp_path / "regions" / f"{stem}.png")
    (tmp_path / "classes.txt").write_text("sky\ncat\n")
    options = dict(templates="single", refine="vote", regions=f"file:{tmp_path / 'regions'}")
    options |= dict(proxy="middle") if name == "corrclip" else {}
    system = create(name, clip, cache=None, resize=resize, **options)
    evaluate(system, FolderDataset(tmp_path), run_dir=tmp_path / "run", save_predictions=True, progress=False)
    predictions = list((tmp_path / "run" / "predictions").iterdir())
    assert [len(np.unique(np.asarray(Image.open(path)))) for path in predictions] == [1, 1]


def test_the_viewer_decides_as_segment_does(clip):
    "Thresholds ask the probability among all names, not among classes."
    image = picture(64, 96)
    for threshold in (0.15, 0.28):  # five names of about a fifth each, three classes of about a third
        system = built("naclip", clip, background_threshold=threshold, logit_scale=0.1)
        stages, shown, _ = _run_stages(system, system.encode_image(image), Vocabulary.of(WORDS))
        assert np.array_equal(shown.labels, system.segment(image, WORDS).labels)
        assert all(len(scores) == len(WORDS) for scores in stages.values())


def test_locations_for_lposs_are_pixels_whatever_the_grid(clip):
    "A map on a finer grid lies on the same pixels."
    system = built("proxyclip", clip)
    encoded = system.encode_image(picture(64, 96))
    fine = F.interpolate(encoded.features.dense, scale_factor=2)
    encoded.features = type(encoded.features)(fine, encoded.features.pooled)
    assert system.patches(encoded)[0].size == (64, 96)


def test_sam_spreads_a_canvas(clip):
    "Trident's second filter, by hand: SAM's attention where its values are alike, on spliced features."
    pytest.importorskip("segment_anything", reason="needs the extra `sam`")
    from ovss_nb.encoders.joined_windows import attention_filter, sam_heads, spread
    from ovss_nb.encoders.sam import SAMEncoder
    from segment_anything.modeling import ImageEncoderViT

    torch.manual_seed(0)
    network = ImageEncoderViT(
        img_size=64, embed_dim=24, depth=2, num_heads=2, out_chans=8, window_size=3, use_rel_pos=True
    )
    network.blocks[-1].window_size = 0
    sam = SAMEncoder(network, size=64, device="cpu")
    options = dict(reading="trident", proxy="middle", merge="splice", templates="single")
    system = TrainingFree(clip, size=64, attention_encoder=sam, **options)
    image = picture(48, 64)
    joined = StridedWindows(system, 48, 32, 16).encode_image(image)
    assert joined.features.dense.shape[-2:] == (3, 4)
    plain = TrainingFree(clip, size=64, **options)
    parts = [plain.encode_window(image[y : y + 32, x : x + 32].copy()) for y in (0, 16) for x in (0, 16, 32)]
    total, count = torch.zeros(1, clip.width, 3, 4), torch.zeros(3, 4)
    for part, (y, x) in zip(parts, [(y, x) for y in (0, 1) for x in (0, 1, 2)]):
        total[:, :, y : y + 2, x : x + 2] += part.features.dense
        count[y : y + 2, x : x + 2] += 1
    values, heads = sam_heads(sam, sam.preprocess(image), (3, 4))
    expected = spread(clip, total / count, attention_filter(values, heads), (3, 4))
    assert torch.allclose(joined.features.dense, expected, atol=1e-5)
    # the whole image, without windows, is a canvas too
    square, tokens = picture(64, 64), plain.encode_window(picture(64, 64)).features.dense
    values, heads = sam_heads(sam, sam.preprocess(square), (4, 4))
    expected = spread(clip, tokens, attention_filter(values, heads), (4, 4))
    assert torch.allclose(system.encode_image(square).features.dense, expected, atol=1e-5)
    assert system.describe()["attention_fingerprint"] and system.segment(image, WORDS).labels.shape == (
        48,
        64,
    )


def test_options_of_a_reading_by_name(clip):
    plain, wide = built("naclip", clip), built("naclip", clip, prior=0)
    image = picture(64, 96)
    clear = built("clearclip", clip, terms=("kk",))
    bank = plain.encode_text(WORDS)
    rows, _ = plain.rows(bank)
    scores = [system.scores(system.encode_image(image), rows) for system in (plain, wide, clear)]
    assert not torch.allclose(scores[0], scores[1], atol=1e-6) and torch.equal(scores[1], scores[2])


def test_none_in_the_shell_takes_away_what_a_recipe_has():
    texts = ["residual=none", "before=none", "after=none", "repair=none", "prior=0"]
    options = system_options("scclip", texts, "--set ")
    assert [options[name] for name in ("residual", "before", "after", "repair")] == ["none"] * 4
    assert TrainingFreeConfig(reading="sclip", residual="none").dense_reading().residual == "none"
    assert system_options("scclip", ["residual=null", "prior=none", "residual_mix=none"]) == dict(
        residual=None, prior=None, residual_mix="none"
    )


def test_published_settings_can_be_built(clip):
    for protocol in PROTOCOLS.values():
        for name, facts in protocol.system_facts.items():
            if name not in RECIPES:
                continue
            options = {key: value for key, value in facts.items() if key != "resize"}
            system_options(name, options)
            system = create(
                name, clip, cache=None, settings=f"published:{protocol.name}", **GIVEN.get(name, {})
            )
            told = system.describe()
            assert told["settings"] == f"published:{protocol.name}" and facts["resize"]
            assert (facts["resize"].startswith("slide")) == isinstance(system, StridedWindows)
            threshold = told["config"]["background_threshold"]
            assert (threshold is not None) == (protocol.background is not None)
            assert ("background_words" in facts) == (protocol.background is not None)


@pytest.mark.parametrize(
    "name, title, count, bed",
    [
        ("sclip", "VOC-21", 26, True),
        ("corrclip", "VOC-21", 26, True),
        ("sfp", "COCO-80+bg", 25, False),  # a bed is one of its objects
        ("proxyclip", "COCO-80+bg", 16, False),
        ("corrclip", "COCO-80+bg", 16, False),
        ("clearclip", "VOC-21", 1, False),
        ("naclip", "PC-60", 1, False),
    ],
)
def test_published_settings_have_the_words_of_the_background(clip, name, title, count, bed):
    options = dict(cache=None, settings=f"published:{title}", templates="single") | GIVEN.get(name, {})
    system = create(name, clip, **options)
    vocabulary = PROTOCOLS[title].vocabulary
    words = Vocabulary.of(vocabulary)
    told = getattr(system, "system", system).stand_ins(words).get(words.background[0], list(words.words[0]))
    assert len(told) == count and ("bed" in told) == bed
    assert told == ["background"] or told[:3] == ["sky", "wall", "tree"]


def test_files_of_regions_are_part_of_what_a_system_is(clip, tmp_path):
    def told():
        return built("maskclip", clip, size=64, refine="vote", regions=f"file:{tmp_path}").describe()

    Image.fromarray(np.ones((4, 4), np.uint8)).save(tmp_path / "a.png")
    first = told()
    assert first == told() and len(first["regions"]) == 64
    Image.fromarray(np.full((4, 4), 2, np.uint8)).save(tmp_path / "a.png")
    assert told()["regions"] != first["regions"]
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({told()["regions"], first["regions"]}) == 2
    assert "regions" not in built("maskclip", clip, refine="vote", regions="slic:9").describe()


def test_a_second_pass_can_be_switched_off(clip):
    off = system_options("resclip", ["feedback=none", "residual_mix=none"])
    resclip, naclip = built("resclip", clip, **off), built("naclip", clip)
    image = picture()
    assert torch.equal(resclip.encode_image(image).features.dense, naclip.encode_image(image).features.dense)
    assert np.array_equal(resclip.segment(image, WORDS).labels, naclip.segment(image, WORDS).labels)


def test_splicing_needs_windows(clip):
    options = dict(cache=None, proxy="middle", merge="splice")
    for name, resize in (("proxyclip", ""), ("proxyclip", "windows:96:64"), ("trident", "windows:96:64")):
        with pytest.raises(ValueError, match="merge='splice' and resize="):
            create(name, clip, resize=resize, **options)
    assert isinstance(create("proxyclip", clip, resize="slide:64:48:16", **options), StridedWindows)


def test_recipes_are_evaluated(clip, tmp_path):
    "In windows too: an evaluation asks systems by the names of their methods what they are."
    from ovss_nb.benchmarks.evaluate import evaluate

    class Set:
        names, stems = ["cat", "dog"], ["a", "b"]
        __len__ = lambda self: 2
        image = lambda self, i: picture(seed=i)
        labels = lambda self, i: (picture(seed=i)[..., 0] > 128).astype(np.uint8)

    for resize in ("", "slide:64:48:16"):
        options = {} if resize else dict(size=64)
        system = create("naclip", clip, cache=None, resize=resize, templates="single", **options)
        found = evaluate(system, Set(), ["cat", "dog"], progress=False)
        assert found.images == 2 and not found.bad


def test_the_user_goes_before_the_paper(clip):
    told = create(
        "scclip", clip, cache=None, resize="shortest:96", settings="published:VOC-21", logit_scale=7
    ).describe()
    assert told["config"]["logit_scale"] == 7 and told["config"]["min_area"] == 0.1
    assert told["config"]["size"] == 96 and "windows" not in told


def test_lists_say_family_and_needs():
    lines = describe_systems()
    assert lines["corrclip"].startswith("training-free") and "regions" in lines["corrclip"]
    assert lines["catseg"].startswith("trained") and "weights" in lines["catseg"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reading="clearclipp"), "did you mean 'clearclip'"),
        (dict(reading="proxyclip"), "needs a proxy"),
        (dict(reading="corrclip", proxy="middle"), "needs regions"),
        (dict(reading="maskclip", regions="slic"), "nothing here uses regions"),
        (dict(reading="naclip", proxy="middle"), "nothing here uses proxy"),
        (dict(reading="naclip", terms=["identity"]), "prior=5"),
        (dict(attention="sam:vit_b/random"), "say merge='splice' too"),
        (dict(reading="clearclip", cut_rule="cut:0.9"), "nothing here uses cut_rule='cut:0.9'"),
        (dict(reading="clearclip", proxy_read="qk"), "nothing here uses proxy_read='qk'"),
        (dict(reading="clearclip", feedback_threshold=0.3), "nothing here uses feedback_threshold=0.3"),
        (dict(reading="resclip", merge="splice"), "and merge='splice' disagree"),
        (dict(reading="gem", feedback=(2.1, 0.7)), "side_blocks=6 and feedback"),
        (dict(refine="vote", regions="slick"), "did you mean 'slic'"),
        (dict(refine="vote", regions="slic:0"), "a whole number from 1 up"),
        (dict(proxy_rule="sharpp:4", reading="proxyclip", proxy="middle"), "sharpp"),
    ],
)
def test_what_does_not_fit_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingFreeConfig(**options)


def test_bad_input(clip):
    system = built("clearclip", clip, background_threshold=0.1)
    with pytest.warns(UserWarning, match="only name"):
        assert system.segment(picture(), ["cat"]).labels.max() == 0
    many = system.segment(picture(64, 48), [f"thing {i}" for i in range(1000)])
    assert many.labels.shape == (64, 48) and many.scores.shape[0] == 1000
    wrong = built("corrclip", clip)
    wrong._propose = lambda image, name: np.ones((5, 5), np.int32)
    with pytest.raises(ValueError, match="do not fit an image"):
        wrong.segment(picture(64, 96), WORDS)
    assert "reading" in option_kinds(TrainingFreeConfig)
