"""SAN:
the public code's numbers and names, pictures of any shape, batches, orders of classes, training, weights.
"""

import json
import re
import numpy as np
import open_clip
import doubles
from doubles import golden_weights, thinned
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from ovss_nb.encoders.base import Encoder
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.encoders.lite import LiteEncoder
from ovss_nb.systems.san import SAN, SANConfig, SideNetwork, convert_checkpoint
from ovss_nb.text.text_bank import TextBank


TINY = dict(size=64, queries=6, patch=8, width=24, depth=5, heads=3, channels=16)
SMALL = dict(
    weights="random",
    size=64,
    encoder_scale=1.0,
    queries=5,
    width=16,
    depth=4,
    heads=2,
    channels=8,
    templates="single",
    loss_points=64,
)


def tiny_clip(quick_gelu=True):
    "The tower of the golden file, with other weights until the checkpoint brings them."
    torch.manual_seed(3)
    vision, text = (
        dict(image_size=32, patch_size=8, width=32, layers=4, head_width=16),
        dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1),
    )
    return CLIPEncoder(
        open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu), dense_mode="tokens", device="cpu"
    )


def bank(vectors):
    return TextBank(
        vectors[:, None],
        torch.ones(len(vectors), 1, dtype=torch.bool),
        tuple(f"class {k}" for k in range(len(vectors))),
        (("",),) * len(vectors),
        ("{}",),
    )


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def golden():
    return doubles.golden("san_tiny")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, golden):
    "As the authors' training writes it."
    path = tmp_path_factory.mktemp("san") / "san_tiny.pth"
    torch.save({"model": golden_weights(golden), "iteration": 60000}, path)
    return path


@pytest.fixture(scope="module")
def lite():
    return LiteEncoder(device="cpu")


@pytest.fixture(scope="module")
def small(lite):
    return SAN(lite, **SMALL)


# ---- the public code


def golden_image(system, golden, b=0):
    """What the public code is given:
    normalized pixels, filled up; the output of 75 x 110 pixels is the image's.
    """
    picture = F.pad(golden["in.image"][b : b + 1], (0, 4, 0, 4))
    (image,) = system.encode_pixels(picture)
    return system.with_sizes(image, np.zeros((75, 110, 3), np.uint8), (60, 92))


@pytest.mark.parametrize("name,scale", [("half", 0.5), ("odd", 0.7)])
def test_the_public_codes_numbers(golden, checkpoint, name, scale):
    """Side network, biases, proposals and scores of the public modules (MendelXu/SAN, MIT, commit e19262d;
    run on the CPU with stand-ins for detectron2's registries,
    all parameters random) on two pictures of 60 x 92; with `odd` the encoder sees 44 x 67 pixels, of which
    its patches of 8 leave out a rest.
    """
    for resolution in ("input", "image"):
        system = SAN(tiny_clip(), weights=str(checkpoint), encoder_scale=scale, resolution=resolution, **TINY)
        images, text = [golden_image(system, golden, b) for b in range(2)], bank(golden["in.text"])
        outputs = system.predict(images, text, every=True)
        for i, (logits, masks) in enumerate(outputs):
            assert torch.allclose(masks, golden[f"out.{name}.masks_{i}"], atol=1e-4) and torch.allclose(
                logits, golden[f"out.{name}.logits_{i}"], atol=1e-4
            )
        bias = system.network(
            torch.cat([image.pixels for image in images]),
            [torch.cat([image.layers[k] for image in images]) for k in system.fused_layers],
        )[0][1]
        assert torch.allclose(bias, golden[f"out.{name}.bias_1"], atol=1e-4)
        step = 2 if resolution == "input" else 4
        expected = golden[f"out.{name}.sem_seg_{resolution}_stride{step}"][0]
        scores = thinned(system.scores(images[0], text), step)
        assert torch.allclose(scores[: len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize(
    "layers, patch, scale, entered, start",
    [
        (4, 16, 0.5, (0, 1, 2, 3), 3),
        (12, 16, 0.5, (0, 3, 6, 9), 9),
        (24, 14, 0.7, (0, 6, 12, 18), 18),
        (24, 16, 0.7, (0, 6, 12, 18), 18),
    ],
)
def test_what_differs_by_size_follows_from_the_encoder(layers, patch, scale, entered, start):
    """SAN's two sizes:
    B/16 sees half of the picture's pixels, L/14 seven tenths; a option that is given counts for more.
    """
    vision = dict(image_size=4 * patch, patch_size=patch, width=32, layers=layers, head_width=16)
    encoder = CLIPEncoder(
        open_clip.CLIP(24, vision, dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)),
        device="cpu",
    )
    system = SAN(encoder, weights="random", **TINY)
    assert (system.config.encoder_scale, system.fused_layers, system.proposal_start) == (
        scale,
        entered,
        start,
    )
    assert SAN(encoder, weights="random", encoder_scale=0.6, **TINY).config.encoder_scale == 0.6


def test_what_follows_from_the_checkpoint(golden, checkpoint):
    system = SAN(tiny_clip(), weights=str(checkpoint), **TINY)
    assert (system.fused_layers, system.proposal_start) == ((0, 1, 2, 3), 3)
    assert torch.allclose(system.network.classifier.scale, golden["w.ov_classifier.logit_scale"].exp())
    assert torch.equal(
        system.encoder.visual.positional_embedding, golden["w.clip_visual_extractor.positional_embedding"]
    )
    assert torch.equal(
        system.encoder.blocks[3].ln_1.weight, golden["w.clip_rec_head.resblocks.0.ln_1.weight"]
    )


# ---- names


def authors(name, value, grid):
    "Our name and tensor in the authors' naming, written by hand in the other direction."
    side, parts = "side_adapter_network.", name.split(".")
    if name == "queries":
        return side + "query_embed", value[None]
    if name == "query_positions":
        return side + "query_pos_embed", value[None]
    if name == "positions":
        return side + "vit_model.pos_embed", value.reshape(len(value), grid * grid).T[None]
    if name == "gain":
        return side + "mask_decoder.bias_scaling.weight", value.reshape(1, 1)
    if name == "offset":
        return side + "mask_decoder.bias_scaling.bias", value.reshape(1)
    if name == "classifier.background":
        return "ov_classifier.bg_embed", value[None]
    if name == "classifier.scale":
        return "ov_classifier.logit_scale", value.log()
    if parts[0] == "patches":
        return f"{side}vit_model.patch_embed.proj.{parts[1]}", value
    if parts[0] == "blocks":
        return side + "vit_model." + name, value
    if parts[0] == "enter":
        _, i, j, kind = parts
        return f"{side}fusion_layers.layer_{i}.input_proj.{j}.{kind}", (
            value[..., None, None] if j == "1" and kind == "weight" else value
        )
    branch = dict(vector="query_mlp", pixels="pix_mlp", attention="attn_mlp")[parts[0]]
    convolution = parts[0] != "vector" and parts[2] == "weight"
    return f"{side}mask_decoder.{branch}.layers.{int(parts[1]) // 2}.{parts[2]}", (
        value[..., None, None] if convolution else value
    )


@pytest.mark.parametrize(
    "model,dim,width,heads", [("vit_b_16", 512, 768, 12), ("vit_large_14", 768, 1024, 16)]
)
def test_all_names_of_the_released_networks(model, dim, width, heads):
    """There and back:
    our tensors have exactly the names and shapes that the training logs list, and come back unchanged.
    """
    listed = {
        name: tuple(shape)
        for name, shape in json.loads((doubles.GOLDEN / "san_checkpoint_keys.json").read_text())[
            model
        ].items()
    }
    ours = SideNetwork(dim, width, heads, 4, 100.0, SANConfig()).state_dict()
    theirs = dict(
        authors(name, torch.randn(value.shape) if name != "classifier.scale" else value, 40)
        for name, value in ours.items()
    )
    scale = theirs.pop("ov_classifier.logit_scale")  # not trained, so the log does not list it
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        name: tensor
        for name, tensor in listed.items()
        if name != "clip_visual_extractor.positional_embedding"
    }
    network, clip, _ = convert_checkpoint(theirs | {"ov_classifier.logit_scale": scale})
    assert network.keys() == ours.keys() and all(network[name].shape == ours[name].shape for name in ours)
    for name in ours:
        assert torch.allclose(
            authors(name, network[name], 40)[1],
            theirs.get(authors(name, network[name], 40)[0], scale),
            rtol=1e-5,
        )
    assert listed["clip_visual_extractor.positional_embedding"] == (
        197 if width == 768 else 577,
        width,
    ) and set(clip) == {"logit_scale"}


def test_names_of_clip(golden):
    "The three pieces of the tiny checkpoint are open_clip's model, all of it."
    network, clip, start = convert_checkpoint(golden_weights(golden))
    expected = tiny_clip().model.state_dict()
    assert start == 3 and {k: v.shape for k, v in clip.items()} == {k: v.shape for k, v in expected.items()}
    assert {k: v.shape for k, v in network.items()} == {
        k: v.shape for k, v in SideNetwork(24, 32, 2, 4, 1, SANConfig(**TINY)).state_dict().items()
    }


def damaged(checkpoint, tmp_path, change):
    state = torch.load(checkpoint, weights_only=True)["model"]
    change(state)
    torch.save({"model": state}, tmp_path / "damaged.pth")
    return str(tmp_path / "damaged.pth")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.pop("side_adapter_network.query_embed"), r"1 missing:\n  queries \(6x24\)"),
        (lambda s: s.update({"side_adapter_network.more": torch.zeros(2)}), r"1 unknown:\n  more \(2\)"),
        (
            lambda s: s.update({"ov_classifier.bg_embed": torch.zeros(1, 30)}),
            "classifier.background: 30, expected 24",
        ),
        (lambda s: s.pop("clip_rec_head.proj"), r"another CLIP than[^\n]*\n1 missing:\n  visual.proj"),
        (lambda s: s.pop("clip_visual_extractor.conv1.weight"), "visual.conv1.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_where(checkpoint, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        SAN(tiny_clip(), weights=damaged(checkpoint, tmp_path, change), **TINY)


def test_a_checkpoint_for_another_encoder_is_refused(checkpoint, lite):
    with pytest.raises(ValueError, match="QuickGELU, which lite"):
        SAN(lite, weights=str(checkpoint), **TINY)
    with pytest.raises(ValueError, match="QuickGELU, which clip"):
        SAN(tiny_clip(quick_gelu=False), weights=str(checkpoint), **TINY)
    with pytest.raises(ValueError, match="proposal_start=3, not 2"):
        SAN(tiny_clip(), weights=str(checkpoint), proposal_start=2, **TINY)
    with pytest.raises(ValueError, match="has no weights.*san_vit_b_16.pth"):
        SAN(lite)


# ---- pictures


@pytest.mark.parametrize("shape", [(64, 64), (50, 90), (301, 77), (20, 33)])
@pytest.mark.parametrize("resolution", ["image", "input", "masks"])
def test_pictures_of_any_shape(small, lite, shape, resolution):
    system = SAN(lite, **SMALL, resolution=resolution)
    seen, text = system.encode_image(pixels(*shape)), system.encode_text(["cat", "dog", "sky"])
    height, width = seen.pixels.shape[-2:]
    assert (
        min(seen.resized_size) == 64
        and height % 32 == width % 32 == 0
        and 0 <= height - seen.resized_size[0] < 32
        and 0 <= width - seen.resized_size[1] < 32
    )
    assert abs(seen.resized_size[0] / seen.resized_size[1] / (shape[0] / shape[1]) - 1) < 0.03
    assert (seen.pixels[..., seen.resized_size[0] :, :] == 0).all() and (
        seen.pixels[..., seen.resized_size[1] :] == 0
    ).all()
    scores = system.scores(seen, text)
    expected = dict(
        image=shape, input=seen.resized_size, masks=tuple(round(side / 16) for side in seen.resized_size)
    )[resolution]
    assert tuple(scores.shape) == (3, *expected) and scores.isfinite().all() and (scores >= 0).all()


def test_a_long_picture_is_limited(lite):
    system = SAN(lite, **SMALL, longest=128)
    assert system.encode_image(pixels(40, 400)).resized_size == (13, 128)


def test_several_pictures_are_each_as_alone(small):
    text, images = (
        small.encode_text(["cat", "dog", "sky"]),
        [small.encode_image(pixels(70, 90, seed)) for seed in range(3)],
    )
    with torch.inference_mode():
        together = small.predict(images, text, every=True)
    for b, image in enumerate(images):
        with torch.inference_mode():
            alone = small.predict([image], text, every=True)
        for (logits, masks), (own_logits, own_masks) in zip(together, alone):
            assert torch.allclose(logits[b : b + 1], own_logits, atol=1e-4) and torch.allclose(
                masks[b : b + 1], own_masks, atol=1e-4
            )
    # the last output is the one that counts
    with torch.inference_mode():
        assert torch.allclose(small.predict(images, text)[0][0], together[-1][0], atol=1e-4)


def test_classes_in_any_order_and_any_number(small):
    seen, names = small.encode_image(pixels(64, 80)), ["cat", "dog", "sky", "grass", "car"]
    scores, order = small.scores(seen, small.encode_text(names)), [3, 0, 4, 2, 1]
    assert torch.allclose(
        small.scores(seen, small.encode_text([names[k] for k in order])), scores[order], atol=1e-5
    )
    assert small.scores(seen, small.encode_text(["cat"])).shape[0] == 1
    twice = small.scores(seen, small.encode_text({"a": ["cat", "dog"], "b": ["sky"]}))
    assert twice.shape[0] == 2 and not torch.allclose(
        twice,
        SAN(small.encoder, **SMALL, pooling="max").scores(
            seen, small.encode_text({"a": ["cat", "dog"], "b": ["sky"]})
        ),
    )


def test_end_to_end(small, tmp_path):
    found = small.segment(pixels(48, 72), ["cat", "dog"])
    assert found.labels.shape == (48, 72) and set(np.unique(found.labels)) <= {0, 1}
    assert small.describe()["system"] == "SAN" and re.fullmatch("[0-9a-f]{64}", small.describe()["network"])


def test_other_encoders(lite):
    "CLIP with its own scale and heads, one bias for all heads, other layers and starts; no blocks, no SAN."
    clip = tiny_clip()
    system = SAN(
        clip,
        weights="random",
        bias_per_head=False,
        fused_layers=[0, 4],
        proposal_start=1,
        encoder_scale=0.5,
        **TINY,
    )
    assert (
        system.network.biases == 1
        and system.fused_layers == (0, 4)
        and abs(float(system.network.classifier.scale) * 0.07 - 1) < 1e-3
    )
    seen = system.encode_image(pixels(64, 100))
    assert sorted(seen.layers) == [0, 1, 4] and system.scores(
        seen, bank(F.normalize(torch.randn(3, 24), dim=-1))
    ).shape == (3, 64, 100)
    assert SAN(clip, weights="random", logit_scale=7.0, **TINY).network.classifier.scale == 7
    for wrong in (dict(proposal_start=4), dict(fused_layers=[5]), dict(depth=3, supervised=1)):
        with pytest.raises(ValueError, match="layers"):
            SAN(clip, weights="random", **TINY | wrong)
    with pytest.raises(ValueError, match="no transformer blocks"):
        SAN(Encoder(), weights="random")
    with pytest.raises(ValueError, match="raise size or encoder_scale"):
        SAN(lite, **SMALL | dict(encoder_scale=0.1)).encode_image(pixels(64, 64))
    with pytest.raises(ValueError, match="in its own way"):
        system.predict([object()], None)


def test_half_precision_encoder():
    torch.manual_seed(3)
    clip = tiny_clip()
    half = CLIPEncoder(
        open_clip.CLIP(
            24,
            dict(image_size=32, patch_size=8, width=32, layers=4, head_width=16),
            dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1),
            quick_gelu=True,
        ),
        dense_mode="tokens",
        precision="bf16",
        device="cpu",
    )
    half.model.load_state_dict(clip.model.state_dict())
    text, scores = (
        bank(F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)),
        [],
    )
    for encoder in (clip, half):
        system = SAN(encoder, weights="random", encoder_scale=0.5, **TINY)
        scores.append(system.scores(system.encode_image(pixels(64, 64)), text))
    assert (
        scores[1].dtype == torch.float32
        and (scores[0] - scores[1]).abs().max() < 0.05 * scores[0].abs().max()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        dict(resolution="screen"),
        dict(patch=12),
        dict(keep_aspect=False, size=650),
        dict(width=100),
        dict(supervised=9),
    ],
)
def test_bad_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=|must be"):
        SANConfig(**wrong)


# ---- training


def test_what_is_stored_is_what_was_seen(lite):
    system = SAN(lite, **SMALL, keep_aspect=False)
    text, image = system.encode_text(["cat", "dog"]), system.encode_image(pixels(64, 96))
    arrays = system.to_cache(image)
    assert {name: tuple(tensor.shape) for name, tensor in arrays.items()} == dict(
        pixels=(3, 64, 64),
        cls=(192,),
        layer0=(192, 2, 2),
        layer1=(192, 2, 2),
        layer2=(192, 2, 2),
        layer3=(192, 2, 2),
    )
    again = system.from_cache({name: tensor.half() for name, tensor in arrays.items()})
    assert again.image is None and again.pixels.dtype == torch.float32
    assert torch.allclose(
        system.scores(again, text),
        SAN(lite, **SMALL, keep_aspect=False, resolution="input").scores(image, text),
        atol=0.02,
    )
    assert all(torch.equal(v, system.to_cache(again)[k]) for k, v in system.to_cache(again).items())
    with pytest.raises(ValueError, match="keep_aspect=false"):
        SAN(lite, **SMALL).to_cache(image)
    assert (
        system.cache_key()
        == SAN(lite, **SMALL | dict(channels=16), keep_aspect=False, no_object=0.3).cache_key()
        != SAN(lite, **SMALL | dict(size=96), keep_aspect=False).cache_key()
    )


def test_crops_are_seen_as_pictures(lite):
    system = SAN(lite, **SMALL, keep_aspect=False)
    crops = torch.from_numpy(np.stack([pixels(64, 64, seed) for seed in range(2)])).permute(0, 3, 1, 2)
    for crop, seen in zip(crops, system.encode_batch(crops)):
        own = system.encode_image(crop.permute(1, 2, 0).numpy())
        assert torch.allclose(seen.pixels, own.pixels, atol=1e-5) and torch.allclose(
            seen.cls, own.cls, atol=1e-4
        )
        assert all(torch.allclose(seen.layers[k], own.layers[k], atol=1e-4) for k in own.layers)


def test_the_loss_falls_and_repeats(lite):
    system, pictures = (
        SAN(lite, **SMALL, keep_aspect=False, logit_scale=20.0),
        [pixels(64, 64, seed) // 4 for seed in range(2)],
    )
    pictures[0][:, 32:] += 180
    pictures[1][32:] += 180  # one half is bright
    images, labels = (
        [system.from_cache(system.to_cache(system.encode_image(image))) for image in pictures],
        torch.zeros(2, 32, 32, dtype=torch.long),
    )
    labels[0, :, 16:], labels[1, 16:], labels[:, :4] = 1, 2, 255
    text, histories = system.encode_text(["cat", "dog", "sky"]), []
    for _ in range(2):
        system.reset(seed=1)
        system.network.requires_grad_(True).train()
        optimizer, generator, history = (
            torch.optim.Adam(system.network.parameters(), 4e-3),
            torch.Generator().manual_seed(0),
            [],
        )
        for _ in range(14):
            loss, parts = system.loss(images, labels, text, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(float(loss.detach()))
        histories.append(history)
    assert (
        min(history[-3:]) < 0.85 * history[0]
        and np.allclose(*histories, rtol=1e-2)
        and set(parts) == {"class", "mask", "dice"}
    )
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.network.parameters())
    assert not any(p.requires_grad for p in lite.parameters())


def test_gradient_reaches_clips_positions(tmp_path):
    """The authors train CLIP's position table too:
    what `encode_batch` gives leads back to it, and `save` takes it along.
    """
    system = SAN(tiny_clip(), weights="random", keep_aspect=False, loss_points=64, **TINY)
    (positions,) = system.tune()
    assert (
        positions is system.encoder.visual.positional_embedding
        and SAN(tiny_clip(), weights="random", train_positions=False, **TINY).tune() == []
    )
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, 32:] = 1
    loss, _ = system.loss(
        system.encode_batch(torch.from_numpy(pixels(64, 64)).permute(2, 0, 1)[None]),
        labels,
        bank(F.normalize(torch.randn(2, 24), dim=-1)),
        torch.Generator().manual_seed(0),
    )
    loss.backward()
    assert positions.grad.abs().max() > 0 and all(
        p.grad is None for name, p in system.encoder.named_parameters() if "visual.positional" not in name
    )
    with torch.no_grad():
        positions += 1
    system.save(tmp_path / "tuned.safetensors")
    assert torch.equal(
        SAN(
            tiny_clip(), weights=str(tmp_path / "tuned.safetensors"), **TINY
        ).encoder.visual.positional_embedding,
        positions,
    )


# ---- weights


def test_weights_go_out_and_in(checkpoint, golden, tmp_path):
    """A file of the authors', saved as ours:
    the scale and CLIP's tensors go along, for an encoder that starts anew.
    """
    first = SAN(tiny_clip(), weights=str(checkpoint), **TINY)
    first.save(tmp_path / "ours.safetensors")
    again = SAN(tiny_clip(), weights=str(tmp_path / "ours.safetensors"), **TINY)
    text = bank(golden["in.text"])
    assert torch.allclose(
        first.scores(golden_image(first, golden), text),
        again.scores(golden_image(again, golden), text),
        atol=1e-6,
    )
    assert (
        first.describe()["network"] == again.describe()["network"]
        and first.encoder.fingerprint == again.encoder.fingerprint
    )
    save_file({"network.queries": torch.zeros(6, 24)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"does not fit.*\n\d+ missing"):
        SAN(tiny_clip(), weights=str(tmp_path / "part.safetensors"), **TINY)


# ---- a correction of the baseline (ours)


def corrected(name, encoder, **options):
    "SAN or MROVSeg at a small size, whose masks correct the encoder's cosines."
    from ovss_nb.systems.registry import create

    more = dict(keep_aspect=False, residual=True) | options
    if name == "san":
        return create("san", encoder, cache=None, **SMALL | more)
    small = dict(size=128, width=16, depth=3, heads=2, queries=5, channels=8, loss_points=64)
    small |= dict(templates="single", weights="random", fused_layers=[1, 3, 4], pyramid=[2, 1, 0])
    return create("mrovseg", encoder, cache=None, **small | dict(proposal_start=1) | more)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", ["san", "mrovseg"])
def test_an_untrained_correction_labels_as_the_baseline(name, coarse, lite):
    "A bare background means what it means to maskclip, for an encoder that was taught the word and one not."
    from skimage import data
    from ovss_nb.systems.registry import create

    encoder, words = lite.coarse() if coarse else lite, ["cat", "coffee cup", "background"]
    system = corrected(name, encoder)
    plain = create("maskclip", encoder, cache=None, size=system.config.size, templates="single")
    found, expected = system.segment(data.chelsea(), words), plain.segment(data.chelsea(), words)
    assert (found.labels == expected.labels).mean() > 0.98
    assert system.encode_text(words).words == plain.encode_text(words).words


@pytest.mark.parametrize("name", ["san", "mrovseg"])
def test_a_step_moves_the_gate_and_knows_the_rest(name, lite):
    from ovss_nb.components.mask_losses import REST

    system = corrected(name, lite)
    system.network.requires_grad_(True)
    text = system.encode_text(["cat", "cup", "background"])
    side = system.config.size
    labels = torch.zeros(1, side // 4, side // 4, dtype=torch.long)
    labels[:, :8], labels[:, 8:12] = 1, REST
    images = system.encode_batch(torch.from_numpy(pixels(side, side)).movedim(-1, 0)[None])
    loss, numbers = system.loss(images, labels, text, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite() and numbers["words"] > 0
    assert system.network.residual.gate.grad.abs() > 0 and float(system.network.residual.gate.detach()) == 0


@pytest.mark.parametrize("name", ["san", "mrovseg"])
def test_stored_features_of_a_correction_are_others(name, lite):
    "Features stored without the encoder's own map are not taken for those with it."
    with_map, without = corrected(name, lite), corrected(name, lite, residual=False)
    assert with_map.cache_key() != without.cache_key()
    image = with_map.encode_image(pixels(64, 64))
    again = with_map.from_cache({key: array.clone() for key, array in with_map.to_cache(image).items()})
    text = with_map.encode_text(["cat", "cup"])
    assert torch.allclose(with_map.scores(again, text), with_map.scores(image, text), atol=1e-5)
    assert "own" not in without.to_cache(without.encode_image(pixels(64, 64)))
