"""CATSeg and LMSeg:
the authors' checkpoint names, windows and end-to-end numbers; LMSeg with w = 1 is CAT-Seg; every image,
vocabulary and encoder that should work does.
"""

import json
import numpy as np
import open_clip
from dataclasses import replace
from functools import partial
import doubles
from doubles import close, thinned
import pytest
import torch
from torch.nn import functional as F
from ovss_nb.encoders.base import ViTEncoder
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.core.images import fit_longest
from ovss_nb.components.fusion import sample_regions
from ovss_nb.text.prompt_checks import PromptError
from ovss_nb.systems.catseg import (
    CATSeg,
    CATSegConfig,
    CATSegNetwork,
    class_loss,
    cut_views,
    guidance_blocks,
    merge_views,
    convert_checkpoint,
)
from ovss_nb.encoders.registry import create_aux_encoder
from ovss_nb.systems.lmseg import LMSeg
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.systems.trained import state_dict_difference, read_weights, tune_queries_values
from ovss_nb.text.text_bank import TextBank

small_clip = partial(doubles.small_clip, layers=3)


AGGREGATOR, CLIP = "sem_seg_head.predictor.transformer.", "sem_seg_head.predictor.clip_model."
SIZES = dict(
    width=32, guidance=(20, 24), enlarged=(16, 8), decoder=(32, 16), decoder_guidance=(12, 6), shortest=None
)
SMALL = dict(
    weights="random",
    width=16,
    guidance=(8, 8),
    enlarged=(8, 8),
    decoder=(16, 16),
    decoder_guidance=(4, 4),
    grid=4,
    attention_window=2,
    length=24,
)


def golden_clip():
    "The tiny CLIP of the golden files, its weights still random: the checkpoint brings them."
    torch.manual_seed(3)
    model = open_clip.CLIP(
        32,
        dict(image_size=64, patch_size=16, width=128, layers=3, head_width=64),
        dict(context_length=77, vocab_size=100, width=64, heads=1, layers=1),
        quick_gelu=True,
    )
    return CLIPEncoder(model, device="cpu")


@pytest.fixture(scope="module")
def window():
    return doubles.golden("catseg_window")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, window):
    "The golden files as one checkpoint, as the authors' training writes it."
    state = {
        f"{CLIP}{k[2:]}": v for k, v in doubles.golden("catseg_clip_dense").items() if k.startswith("w.")
    }
    state |= {
        f"{AGGREGATOR}{k[2:]}": v
        for k, v in doubles.golden("catseg_aggregator").items()
        if k.startswith("w.")
    }
    state |= {k[2:]: v for k, v in window.items() if k.startswith("w.up")}
    path = tmp_path_factory.mktemp("catseg") / "model_tiny.pth"
    torch.save({"model": state, "iteration": 1}, path)
    return path


@pytest.fixture(scope="module")
def released(checkpoint):
    return CATSeg(golden_clip(), weights=str(checkpoint), **SIZES)


def bank(system):
    tokens = doubles.golden("catseg_clip_dense")["in.tokens"]
    with torch.inference_mode():
        vectors = F.normalize(system.encoder.model.encode_text(tokens), dim=-1)
    return TextBank(
        vectors[:, None],
        torch.ones(5, 1, dtype=torch.bool),
        tuple("abcde"),
        tuple((value,) for value in "abcde"),
        ("{}",),
    )


# ---- the authors' checkpoint


def test_checkpoint_names(released):
    """Every name and shape of the authors' checkpoint has its place with us, and nothing of ours is left
    without.
    """
    names = json.loads((doubles.GOLDEN / "catseg_checkpoint_keys.json").read_text())["keys"]
    state = {name: torch.zeros(shape) for name, shape in names.items()}
    network, clip, masks = convert_checkpoint(state)
    assert (
        state_dict_difference(network, released.network.state_dict()) == ""
        and state_dict_difference(clip, released.encoder.model.state_dict()) == ""
    )
    qkv = sum(name.endswith(("q_proj_weight", "k_proj_weight")) for name in names)
    assert len(names) == 204 and len(network) + len(clip) + len(masks) == 204 - qkv and len(masks) == 2


def test_a_checkpoint_that_does_not_fit_is_explained(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["model"]

    def refused(change, match, encoder=None, **options):
        other = dict(state)
        change(other)
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=match):
            CATSeg(encoder or golden_clip(), weights=str(tmp_path / "other.pth"), **(SIZES | options))

    def rename(o):
        o[f"{AGGREGATOR}head.wait"] = o.pop(f"{AGGREGATOR}head.weight")

    refused(
        rename, r"(?s)1 missing:\n  aggregation.head.weight \(1x16x3x3\)\n1 unknown:\n  aggregation.head.wait"
    )
    refused(lambda state: state.update({"upsample1.bias": torch.zeros(3)}), r"enlarge.0.bias: 3, expected 16")
    refused(lambda state: state.pop(f"{CLIP}visual.proj"), "another CLIP")
    refused(lambda state: None, "windows of 6", attention_window=6)
    refused(lambda state: None, "does not fit this configuration", aggregation_layers=3)
    refused(lambda state: None, "quickgelu", encoder=small_clip(quick_gelu=False))
    refused(lambda state: None, "another CLIP", encoder=small_clip())
    refused(lambda state: state.update({"sam.x": torch.zeros(1)}), "1 unknown:\n  sam.x")
    refused(
        lambda state: [state.pop(k) for k in list(state) if k.startswith(AGGREGATOR)],
        "neither the authors' nor ours",
    )
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="no file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="no weights.*weights='random'"):
        CATSeg(golden_clip())
    with pytest.raises(ValueError, match="no weights.*with fusion_weight=1.0 the authors'"):
        LMSeg(golden_clip(), aux_encoder=Edges())


def test_the_encoder_passed_stays_as_it_was(checkpoint):
    encoder = golden_clip()
    before = encoder.fingerprint
    system = CATSeg(encoder, weights=str(checkpoint), **SIZES)
    encoder._fingerprint = None
    assert encoder.fingerprint == before != system.encoder.fingerprint
    again = CATSeg(system.encoder, weights=str(checkpoint), **SIZES)
    assert again.encoder.fingerprint == system.encoder.fingerprint


# ---- windows and end to end


def pixels(window, name="in.image"):
    return window[name].permute(1, 2, 0).numpy().copy()


def test_windows_of_the_fake_model(released, window):
    "Part a of the golden file: what enters the encoder, view by view, and what becomes of its logits."
    views, corners, frame = released.preprocess(pixels(window))
    assert corners == [(0, 0), (0, 256), (256, 0), (256, 256)] and frame == (640, 640)
    close(F.avg_pool2d(views, 16), window["mid.fake_encoder_input_avg24"])
    close(views[1, :, :16, :16], window["mid.fake_encoder_input_window1_corner"])
    logits = (
        torch.einsum("kc,vchw->vkhw", window["in.fake_weight"], F.avg_pool2d(views, 16))
        + window["in.fake_bias"][:, None, None]
    )
    logits = F.interpolate(logits, scale_factor=4, mode="nearest")
    close(logits[..., ::4, ::4], window["mid.fake_logits96_stride4"])
    merged = merge_views(logits, corners, frame, 384, chunk=2)
    for name, size in (("native", (90, 160)), ("75x111", (75, 111))):
        resized = F.interpolate(merged[None], size, mode="bilinear")[0]
        close(thinned(resized, 4), window[f"out.fake_{name}_stride4"])


def test_end_to_end(released, window):
    "Part b: checkpoint, encoder, guides, network, windows."
    text, image = bank(released), released.encode_image(pixels(window))
    close(released.text_features(text)[0][None], window["mid.e2e_text"])
    close(thinned(image.features.dense), window["mid.e2e_img_feats_global_stride2"])
    guides = [up(row[-1:]) for up, row in zip(released.network.enlarge, image.layers)]
    close(thinned(guides[0]), window["mid.e2e_guidance_res4_global_stride2"])
    close(guides[1][..., ::2, ::2], window["mid.e2e_guidance_res5_global_stride2"])
    with torch.inference_mode():
        logits = released.network(image.views.dense, image.layers, released.text_features(text)[0])
    close(thinned(logits[[0, -1]], 4), window["mid.e2e_logits96_first_and_global_stride4"], 1e-4)
    scores = released.scores(image, text)
    for name, size in (("native", (90, 160)), ("75x111", (75, 111))):
        resized = F.interpolate(scores[None], size, mode="bilinear")[0]
        close(thinned(resized, 4), window[f"out.e2e_{name}_stride4"], 2e-5)
    labels = released.labels(image, text, scores, None)[::4, ::4]
    assert (labels == window["out.e2e_native_stride4"].argmax(0).numpy()).mean() > 0.999


def test_single_pass(checkpoint, window):
    system = CATSeg(golden_clip(), weights=str(checkpoint), windows=False, **SIZES)
    scores = system.scores(system.encode_image(pixels(window, "in.image_128x160")), bank(system))
    close(
        F.interpolate(scores[None], (128, 160), mode="bilinear")[0, :, ::2, ::2],
        window["out.e2e_single_pass_stride2"],
        2e-5,
    )


def test_windows_average_to_the_constant():
    for frame in ((640, 640), (640, 1000), (384, 384)):
        views, corners = cut_views(torch.rand(3, 50, 70), frame, 384, 0.333)
        assert merge_views(torch.full((len(views), 2, 7, 7), -0.4), corners, frame, 384).allclose(
            torch.tensor(-0.4).sigmoid()
        )


# ---- sizes of everything


@pytest.mark.parametrize("patch,blocks", [(16, (0, 1)), (14, (0, 1))])
def test_patches_of_16_and_14(patch, blocks):
    encoder = small_clip(patch=patch)
    system = CATSeg(encoder, **SMALL)
    assert system.blocks == blocks and system.encode_image(
        np.zeros((50, 80, 3), np.uint8)
    ).views.dense.shape == (5, 24, 4, 4)


def test_guiding_blocks_of_the_released_models():
    class Tower(ViTEncoder):
        name, blocks = "tower", ()

        def __init__(self, count):
            super().__init__()
            self.blocks = [None] * count

    assert [guidance_blocks(Tower(count)) for count in (12, 24, 4)] == [(3, 7), (7, 15), (0, 1)]
    with pytest.raises(ValueError, match="no transformer blocks"):
        guidance_blocks(Tower(0))
    with pytest.raises(ValueError, match="0 to 11"):
        guidance_blocks(Tower(12), (3, 12))


def test_released_sizes():
    "B/16 and L/14 differ in the encoder's dimensions alone; the network has the released shapes."
    for dim, width in ((512, 768), (768, 1024)):
        with torch.device("meta"):
            network = CATSegNetwork(dim, (width, width), CATSegConfig())
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        assert (
            shapes["enlarge.0.weight"] == (width, 256, 2, 2)
            and shapes["enlarge.1.weight"] == (width, 128, 4, 4)
            and shapes["aggregation.embed.weight"] == (128, 1, 7, 7)
        )
        assert shapes["aggregation.appearance.weight"] == (128, dim, 3, 3) and shapes[
            "aggregation.classes.1.attention.query.weight"
        ] == (128, 256)
        assert (
            shapes["aggregation.decoder.0.up.weight"] == (128, 96, 2, 2)
            and shapes["aggregation.decoder.1.conv2.weight"] == (32, 32, 3, 3)
            and "aggregation.spatial.2.guidance_norm.weight" not in shapes
        )


@pytest.mark.parametrize("words", [1, 20, 60])
@pytest.mark.parametrize("windows", [True, False])
def test_any_number_of_words(words, windows):
    system = CATSeg(small_clip(), windows=windows, size=96, window=64, **SMALL)
    result = system.segment(
        np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8),
        [f"thing {i}" for i in range(words)],
    )
    assert (
        result.labels.shape == (40, 70) and result.scores.shape == (words, 96, 96)
        if windows
        else result.scores.shape == (words, 16, 16)
    )


def test_847_words():
    system = CATSeg(small_clip(), windows=False, **(SMALL | dict(length=256)))
    result = system.segment(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8), "ADE-847")
    # sigmoid(-100) is 0 in half of float32's digits
    assert len(result.names) == 847 and (result.scores.max((1, 2)) == 0).sum() == 847 - 256


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (64, 64)])
@pytest.mark.parametrize(
    "options", [dict(), dict(keep_aspect=True), dict(windows=False), dict(windows=False, keep_aspect=True)]
)
def test_images_of_any_shape(shape, options):
    system = CATSeg(small_clip(), size=96, window=64, **(SMALL | options))
    image = system.encode_image(np.random.default_rng(1).integers(0, 255, (*shape, 3), dtype=np.uint8))
    result = system.segment(image, ["cat", "dog"])
    assert result.labels.shape == shape and np.isfinite(result.scores).all()
    height, width = result.scores.shape[1:]
    assert (height == width) == (shape[0] == shape[1] or not options.get("keep_aspect"))


def test_a_batch_equals_its_images():
    system = CATSeg(small_clip(), size=96, window=64, **SMALL)
    generator = np.random.default_rng(2)
    photos = [
        generator.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in ((40, 60), (60, 40), (50, 50))
    ]
    # more than `length`: each view drops its own
    text = system.encode_text([f"thing {i}" for i in range(30)])
    together = system.encode_images(photos)
    for one, scores in zip(photos, system.batch_scores(together, text)):
        close(system.scores(system.encode_image(one), text), scores, 1e-4)


def test_order_of_the_words():
    system, photo = (
        CATSeg(small_clip(), windows=False, **SMALL),
        np.random.default_rng(3).integers(0, 255, (40, 70, 3), dtype=np.uint8),
    )
    words = [f"thing {i}" for i in range(12)]
    one, two = system.segment(photo, words), system.segment(photo, words[::-1])
    assert np.abs(one.scores - two.scores[::-1]).max() < 1e-5


def test_several_words_of_one_class():
    photo = np.random.default_rng(4).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    words = {"animal": ["cat", "dog", "horse"], "plant": "tree"}

    def scores(**options):
        return CATSeg(small_clip(), windows=False, **(SMALL | options)).segment(photo, words).scores

    first = (
        CATSeg(small_clip(), windows=False, **SMALL).segment(photo, {"animal": "cat", "plant": "tree"}).scores
    )
    assert np.allclose(scores(first_word=True), first, atol=1e-6) and not np.allclose(
        scores(), first, atol=1e-6
    )
    assert not np.allclose(scores(pooling="max"), scores(), atol=1e-6) and scores(
        prompt_channels=3
    ).shape == (2, 16, 16)
    with pytest.raises(ValueError, match="3 texts.*2 prompt channels"):
        scores(prompt_channels=2)


def test_background_threshold():
    photo = np.random.default_rng(5).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    system = CATSeg(small_clip(), windows=False, background_threshold=0.999, **SMALL)
    assert (system.segment(photo, ["cat", "background"]).labels == 1).all()


# ---- training


def crops(count=2, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 255, (count, 3, 64, 96), dtype=np.uint8))


def spoken(system, words=("cat", "dog", "tree")):
    "A bank through the text tower, with gradients."
    return TextBank(
        system.encoder.text(list(words))[:, None],
        torch.ones(len(words), 1, dtype=torch.bool),
        tuple(words),
        tuple((name,) for name in words),
        ("{}",),
    )


def test_training_moves_queries_values_and_the_network_alone():
    system = CATSeg(small_clip(), **SMALL)
    system.network.requires_grad_(True).train()
    tune_queries_values(system.encoder)
    frozen = {name: tensor.clone() for name, tensor in system.encoder_state().items()}
    parameters = [parameter for parameter in system.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.1)
    labels = torch.randint(0, 3, (2, 64, 96))
    labels[:, :5] = 255
    losses = []
    for _ in range(8):
        loss, _ = system.loss(system.encode_batch(crops()), labels, spoken(system))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in system.encoder_state().items() if not torch.equal(tensor, frozen[name])}
    assert moved == {name for name in frozen if name.endswith("in_proj_weight")}
    for name in moved:
        changed = [
            not torch.equal(a, b)
            for a, b in zip(system.encoder_state()[name].chunk(3), frozen[name].chunk(3))
        ]
        assert changed == [True, False, True], name


def test_ignored_pixels():
    "As negatives by default, for they push every class down in the public code; left out if asked."
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 8, 8))
    labels[0] = 255
    (gradient,) = torch.autograd.grad(class_loss(logits, labels), logits)
    assert (gradient[0] > 0).all()
    (gradient,) = torch.autograd.grad(class_loss(logits, labels, ignore_as_negative=False), logits)
    assert (gradient[0] == 0).all() and gradient[1].any()
    one_hot = F.one_hot(labels[1:], 3).movedim(-1, 1).float()
    expected = F.binary_cross_entropy_with_logits(F.interpolate(logits[1:], (8, 8), mode="bilinear"), one_hot)
    assert torch.allclose(class_loss(logits, labels, ignore_as_negative=False), expected)


# ---- LMSeg


class Edges(torch.nn.Module):
    "A second encoder that counts how often it is asked."

    name, dim, stride, size, fingerprint = "edges", 6, 16, 64, "edges"

    def __init__(self):
        super().__init__()
        self.asked, self.conv = 0, torch.nn.Conv2d(3, 6, 16, 16)

    def preprocess(self, image, size):
        height, width = fit_longest(*image.shape[:2], size)
        x = F.interpolate(
            torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255,
            (height, width),
            mode="bilinear",
        )
        return F.pad(x, (0, size - width, 0, size - height))

    def dense(self, images):
        self.asked += 1
        return self.conv(images)


PHOTO = np.random.default_rng(6).integers(0, 255, (40, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize("options", [dict(), dict(windows=False), dict(windows=False, keep_aspect=True)])
@pytest.mark.parametrize("words", [["cat", "dog", "tree"], [f"thing {i}" for i in range(30)]])
def test_lmseg_with_weight_1_and_the_template_is_catseg(options, words, tmp_path):
    options = SMALL | dict(size=96, window=64) | options
    catseg = CATSeg(small_clip(), **options)
    for parameter in catseg.network.parameters():
        parameter.data += 0.02
    catseg.save(tmp_path / "catseg.safetensors")
    lmseg = LMSeg(
        small_clip(),
        aux_encoder=Edges(),
        prompts="names",
        fusion_weight=1.0,
        **(options | dict(weights=str(tmp_path / "catseg.safetensors"))),
    )
    assert lmseg.aux_encoder is None
    one, two = catseg.segment(PHOTO, words), lmseg.segment(PHOTO, words)
    assert np.array_equal(one.scores, two.scores) and np.array_equal(one.labels, two.labels)


def test_lmseg_with_the_authors_weights_is_catseg(checkpoint, window):
    system = LMSeg(golden_clip(), weights=str(checkpoint), fusion_weight=1.0, prompts="names", **SIZES)
    scores = system.scores(system.encode_image(pixels(window)), bank(system))
    resized = F.interpolate(scores[None], (90, 160), mode="bilinear")[0]
    close(thinned(resized, 4), window["out.e2e_native_stride4"], 5e-5)


def test_a_weight_that_becomes_1_makes_the_second_encoder_irrelevant():
    catseg, lmseg = CATSeg(small_clip(), **SMALL), LMSeg(small_clip(), aux_encoder=Edges(), **SMALL)
    lmseg.network.load_state_dict(catseg.network.state_dict(), strict=False)
    lmseg.network.requires_grad_(True)
    lmseg.network.fusion.theta.data += 50
    text = catseg.encode_text(["cat", "dog", "tree"]).select(range(3))
    logits = lmseg.view_logits(lmseg.encode_batch(crops()), text)
    assert torch.equal(logits, catseg.view_logits(catseg.encode_batch(crops()), text))
    logits.square().mean().backward()
    assert (
        not lmseg.network.fusion.project.weight.grad.any()
        and lmseg.network.aggregation.head.weight.grad.any()
    )


def test_the_second_encoder_runs_once_per_image():
    second = Edges()
    system = LMSeg(small_clip(), aux_encoder=second, size=96, window=64, **SMALL)
    images = system.encode_images([PHOTO, PHOTO[:, :30]])
    for words in (["cat", "dog"], ["tree"]):
        text = system.encode_text(words)
        for one, scores in zip(images, system.batch_scores(images, text)):
            close(system.scores(one, text), scores, 1e-4)
    assert second.asked == 2 and [image.aux_features.shape[-2:] for image in images] == [(4, 4)] * 2


def test_windows_see_their_own_share_of_the_second_map():
    """A map that holds its own coordinates:
    each view must get the coordinates of what it shows, in shares of the photo.
    """
    system = LMSeg(small_clip(), aux_encoder=Edges(), size=96, window=64, **SMALL)
    image = system.encode_image(PHOTO)
    filled = np.array(fit_longest(40, 70, 64)) / 64
    axis = (torch.arange(64) + 0.5) / 64
    coordinates = torch.stack(torch.meshgrid(axis / filled[0], axis / filled[1], indexing="ij"))[None].float()
    seen = sample_regions(coordinates, image.regions, (4, 4))
    for (top, left), rows in zip(image.corners, seen):
        close(rows[0, :, 0], (top + 64 * (torch.arange(4) + 0.5) / 4) / 96, 0.02)
        close(rows[1, 0], (left + 64 * (torch.arange(4) + 0.5) / 4) / 96, 0.02)
    close(seen[-1, 0, :, 0], (torch.arange(4) + 0.5) / 4, 0.02)


def test_lmseg_trains_weight_and_projection():
    system = LMSeg(small_clip(), aux_encoder=Edges(), fusion_weight="channel", **SMALL)
    system.network.requires_grad_(True).train()
    seen = system.encode_batch(crops())
    # a crop is fitted into the second encoder's square as every picture is
    assert system.aux_encoder.asked == 2 and seen[0].regions.allclose(torch.tensor([[0, 0, 43 / 64, 1]]))
    system.loss(seen, torch.randint(0, 3, (2, 64, 64)), spoken(system))[0].backward()
    fusion = system.network.fusion
    assert fusion.theta.shape == (24, 1, 1) and all(parameter.grad.any() for parameter in fusion.parameters())


def test_lmseg_weights_round_trip(tmp_path):
    system = LMSeg(small_clip(), aux_encoder=Edges(), **SMALL)
    for parameter in system.network.parameters():
        parameter.data += 0.02
    system.save(tmp_path / "lmseg.safetensors")
    again = LMSeg(
        small_clip(),
        aux_encoder=system.aux_encoder,
        **(SMALL | dict(weights=str(tmp_path / "lmseg.safetensors"))),
    )
    assert np.array_equal(
        system.segment(PHOTO, ["cat", "dog"]).scores, again.segment(PHOTO, ["cat", "dog"]).scores
    )
    assert (
        again.describe()["network"] == system.describe()["network"]
        and again.describe()["aux_encoder"] == "edges"
    )
    with pytest.raises(
        ValueError, match="a network of LMSeg, which has options that CATSegConfig lacks .*Create that system"
    ):
        CATSeg(small_clip(), weights=str(tmp_path / "lmseg.safetensors"))
    # the file knows the other options
    alone = LMSeg(
        small_clip(),
        aux_encoder=system.aux_encoder,
        weights=str(tmp_path / "lmseg.safetensors"),
        background_threshold=0.1,
    )
    assert alone.config.to_dict() == system.config.to_dict() | dict(
        weights=alone.config.weights, background_threshold=0.1
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(prompt_channels=4),
        dict(pooling="max"),
        dict(fusion_weight=1.0),
        dict(fusion_weight="channel"),
    ],
)
def test_what_is_packed_is_what_was_seen(options):
    """Scores and loss of stored features are those of the picture;
    half precision costs digits only; a part of a bank is a bank.
    """
    system = LMSeg(small_clip(), aux_encoder=Edges(), windows=False, **(SMALL | options))
    images, bank = (
        system.encode_images([PHOTO, PHOTO[:, :30]]),
        system.encode_text(["cat", "dog", "tree", "car"]),
    )
    packed = [system.to_cache(image) for image in images]
    assert {name: tensor.shape for name, tensor in packed[0].items()} == {
        name: tensor.shape for name, tensor in packed[1].items()
    } and ("aux_features" in packed[0]) == system.network.fusion.asks
    again, halves = (
        [system.from_cache({name: kind(tensor) for name, tensor in row.items()}) for row in packed]
        for kind in (torch.Tensor.float, torch.Tensor.half)
    )
    for one, two, half in zip(images, again, halves):
        close(system.scores(one, bank), system.scores(two, bank))
        close(system.scores(one, bank), system.scores(half, bank), 5e-3)
    some, labels = bank.select([2, 0]), torch.randint(0, 2, (2, 32, 32))
    for one, two in zip(again, system.batch_scores(again, some)):
        close(system.scores(one, bank.select([0, 2])).flip(0), two)
    close(system.loss(again, labels, some)[0], system.loss(images, labels, some)[0])
    assert (
        system.cache_key()
        == LMSeg(
            small_clip(), aux_encoder=Edges(), windows=False, **(SMALL | options | dict(aggregation_layers=1))
        ).cache_key()
    )
    with pytest.raises(ValueError, match="squashed"):
        LMSeg(small_clip(), aux_encoder=Edges(), **(SMALL | options)).to_cache(images[0])


def test_descriptions_and_the_fallback():
    system = LMSeg(small_clip(), aux_encoder=Edges(), **SMALL)
    assert system.encode_text("VOC-20").mask.sum(1).tolist() == [4] * 20
    text = system.encode_text(["cat", "quux"])
    assert text.mask.sum(1).tolist() == [4, 1] and text.words[1] == ("A photo of a quux in the scene",)
    named = CATSeg(small_clip(), **SMALL).encode_text(["cat", "quux"])
    close(text.mean()[1], named.mean()[1])
    assert (text.mean()[0] - named.mean()[0]).abs().max() > 1e-3
    assert system.encode_text("VOC-21").words[0] == ("A photo of a background in the scene",)
    with pytest.raises(PromptError, match="No descriptions ship for quux"):
        LMSeg(small_clip(), aux_encoder=Edges(), fallback=False, **SMALL).encode_text(["cat", "quux"])


def test_second_encoders_by_name():
    pytest.importorskip("segment_anything", reason="needs the extra `sam`")
    with pytest.raises(ValueError, match="no aux_encoder"):
        LMSeg(small_clip(), aux_encoder="dino", **SMALL)
    with pytest.raises(ValueError, match="Which weights for vit_b"):
        create_aux_encoder("sam:vit_b")


def test_foreign_windows_are_refused():
    from ovss_nb.systems.windows import SlidingWindows

    with pytest.raises(ValueError, match="brings its own windows"):
        SlidingWindows(CATSeg(small_clip(), windows=False, **SMALL), 96, 64).segment(PHOTO, ["cat", "dog"])


def test_the_training_loop_takes_the_module_and_its_checkpoint_comes_back(tmp_path):
    """`fit` with a learning rate of its own for the encoder;
    a finished run is read back; `save` keeps the tuned matrices.
    """
    from ovss_nb.training.fit import fit

    def run(folder):
        torch.manual_seed(0)
        system = LMSeg(small_clip(), aux_encoder=Edges(), **SMALL)
        tune_queries_values(system.encoder)
        system.network.requires_grad_(True).train()

        def batch(number, generator):
            return (
                torch.randint(0, 255, (2, 3, 64, 64), generator=generator, dtype=torch.uint8),
                torch.randint(0, 3, (2, 64, 64), generator=generator),
                generator,
            )

        def step(module, batch):
            return system.loss(system.encode_batch(batch[0]), batch[1], spoken(system), batch[2])

        rows = fit(
            system.module,
            step,
            batch,
            tmp_path / folder,
            steps=4,
            lr=1e-3,
            groups={"^encoder": 0.01},
            log_every=1,
            save_every=2,
            clip=0.01,
            progress=False,
        )
        return rows, system

    whole, system = run("whole")
    assert len(whole) == 4 and all(np.isfinite(row["loss"]) for row in whole)
    again, other = run("whole")  # finished: the checkpoint is read, nothing is trained
    assert again == whole and all(
        torch.equal(a, b) for a, b in zip(system.encoder_state().values(), other.encoder_state().values())
    )
    system.network.eval()
    system.save(tmp_path / "trained.safetensors")
    fresh = LMSeg(
        small_clip(),
        aux_encoder=system.aux_encoder,
        **(SMALL | dict(weights=str(tmp_path / "trained.safetensors"))),
    )
    assert (
        np.allclose(
            fresh.segment(PHOTO, ["cat", "dog"]).scores,
            system.segment(PHOTO, ["cat", "dog"]).scores,
            atol=1e-6,
        )
        and fresh.tuned_names
    )


# ---- a correction of the baseline


CORRECTION = dict(residual=True, loss="softmax", grid=8, windows=False)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("windows", [False, True])
def test_untrained_residual_scores_order_words_as_cosines_do(loss, windows):
    "Whatever is fused, pooled or left out beside them."
    encoder = small_clip(patch=8)
    options = SMALL | CORRECTION | dict(loss=loss, windows=windows, size=96, window=64, shortest=None)
    image = np.random.default_rng(1).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    words = [f"thing {i}" for i in range(30)]
    for system in (
        CATSeg(encoder, **options),
        CATSeg(encoder, **options, cost_grid=4, center_text=True, prompt_channels=2),
        LMSeg(encoder, **options, aux_encoder=Edges(), prompts="names", cost_grid=3),
    ):
        encoded, text = system.encode_image(image), system.encode_text(words)
        cosines = system.own_cosines(encoded.views.dense, text)
        logits = system.view_logits([encoded], text)
        assert logits.shape[-2:] == (max(16, 4 * (system.config.cost_grid or 8)),) * 2
        enlarged = F.interpolate(cosines, logits.shape[-2:], mode="bilinear")
        close(logits, 20 * enlarged - 10, 1e-4)
        scores = system.scores(encoded, text)
        assert 0 <= scores.min() <= scores.max() <= 1
        assert loss == "sigmoid" or scores.sum(0).allclose(torch.ones(()), atol=1e-4)


def test_residual_labels_are_those_of_the_baseline():
    "With descriptions, a background and the aspect kept, too."
    encoder = small_clip(patch=8)
    image = np.random.default_rng(1).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    for prompts, keep_aspect in (("names", False), ("names", True), ("descriptions", False)):
        shared = dict(keep_aspect=keep_aspect, prompts=prompts)
        system = LMSeg(encoder, **(SMALL | CORRECTION), aux_encoder=Edges(), **shared)
        nearest = MaskCLIP(encoder, size=64, **shared)
        bank, other = (one.encode_text("VOC-21") for one in (system, nearest))
        assert bank.words == other.words and bank.embeddings.equal(other.embeddings)
        close(system.encode_image(image).features.dense, nearest.encode_image(image).features.dense, 1e-5)
        labels, expected = (one.segment(image, "VOC-21").labels for one in (system, nearest))
        assert (labels == expected).mean() > 0.97


def test_residual_weights_carry_the_option_and_learn_from_zero(tmp_path):
    encoder = small_clip(patch=8)
    system = CATSeg(encoder, **(SMALL | CORRECTION), cost_grid=4)
    image = np.random.default_rng(1).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    encoded = system.from_cache(system.to_cache(system.encode_image(image)))
    text = replace(system.encode_text(["cat", "dog", "sky"]), background=("sky",))
    labels = torch.randint(0, 2, (1, 32, 32))
    labels[:, :8], labels[:, 8:12] = 254, 255
    system.network.requires_grad_(True)
    optimizer = torch.optim.Adam(system.network.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss, _ = system.loss([encoded], labels, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    system.save(tmp_path / "own.safetensors")
    again = CATSeg(
        encoder, **CATSegConfig.from_dict(dict(weights=str(tmp_path / "own.safetensors"))).to_dict()
    )
    assert again.config.residual and again.config.cost_grid == 4 and again.config.loss == "softmax"
    close(again.scores(encoded, text), system.scores(encoded, text).detach(), 1e-6)


def test_a_finer_map_is_brought_to_the_grid_of_the_blocks():
    "Else a map of stride 8 would cost sixteen times the network's work; `cost_grid` says otherwise."
    image = np.random.default_rng(1).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    sides = {}
    for grid in (None, 16):
        system = CATSeg(small_clip(patch=8), **(SMALL | CORRECTION | dict(residual=False, cost_grid=grid)))
        encoded = system.encode_image(image)
        encoded.views = replace(encoded.views, dense=F.interpolate(encoded.views.dense, scale_factor=2))
        assert encoded.views.dense.shape[-2:] == (16, 16)
        sides[grid] = system.scores(encoded, system.encode_text(["cat", "dog"])).shape[-1]
    assert sides == {None: 32, 16: 64}
