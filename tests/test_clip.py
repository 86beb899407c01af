"""CLIPEncoder against plain tensor algebra written here, against open_clip itself, and against the numbers of
CAT-Seg and EBSeg.
"""

import hashlib, json, os, subprocess, sys, warnings
import numpy as np
import open_clip
import doubles
from doubles import golden_weights
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from ovss_nb.encoders.base import resize_positions
from ovss_nb.encoders.clip import MEANS, CLIPEncoder, count_tokens, file_settings, load_clip
from ovss_nb.encoders.registry import create_encoder

WIDTH, HEADS, LAYERS, PATCH, DIM = 48, 3, 7, 8, 20
# a text tower for CLIP's real tokenizer
WORDS = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
SIZES = [(32, 32), (48, 72), (16, 40)]  # native, larger, smaller than native on one side


def tiny(seed=0, quick_gelu=True, embed_dim=DIM, text=None, **vision):
    "An open_clip model in which every parameter is random, so that a forgotten one shows."
    vision = (
        dict(image_size=32, patch_size=PATCH, width=WIDTH, layers=LAYERS, head_width=WIDTH // HEADS) | vision
    )
    # most tests never read
    text = text or dict(context_length=8, vocab_size=10, width=32, heads=2, layers=1)
    model = open_clip.CLIP(embed_dim, vision, text, quick_gelu=quick_gelu).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(
            noise / p[0].numel() ** 0.5 if p.ndim > 1 else noise * 0.2 + (1 if name.endswith("weight") else 0)
        )
    return model


def images(height, width, batch=2):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width)
    )


# ---- the reference: numpy in double precision, one image at a time, loops instead of batches


class Reference:
    def __init__(self, model, exact_gelu=False):
        self.w = {k: v.double().numpy() for k, v in model.visual.state_dict().items()}
        self.exact_gelu = exact_gelu

    def norm(self, x, name):
        centerd = x - x.mean(-1, keepdims=True)
        return (
            centerd / np.sqrt((centerd**2).mean(-1, keepdims=True) + 1e-5) * self.w[f"{name}.weight"]
            + self.w[f"{name}.bias"]
        )

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def embed(self, image):
        _, height, width = image.shape
        rows, columns = height // PATCH, width // PATCH
        cut = (
            image.reshape(3, rows, PATCH, columns, PATCH).transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        )
        patches = cut @ self.w["conv1.weight"].reshape(WIDTH, -1).T
        table = self.w["positional_embedding"]
        native = int((len(table) - 1) ** 0.5)
        places = np.stack(
            [bicubic(table[1:, c].reshape(native, native), rows, columns).ravel() for c in range(WIDTH)], -1
        )
        x = np.concatenate([self.w["class_embedding"][None] + table[:1], patches + places])
        return self.norm(x, "ln_pre")

    def qkv(self, x, block):
        x = self.norm(x, f"{block}.ln_1")
        weight, bias = self.w[f"{block}.attn.in_proj_weight"], self.w[f"{block}.attn.in_proj_bias"]
        return [
            x @ weight[i * WIDTH : (i + 1) * WIDTH].T + bias[i * WIDTH : (i + 1) * WIDTH] for i in range(3)
        ]

    def attend(self, q, k, v, block):
        out, size = np.zeros_like(v), WIDTH // HEADS
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
            out[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
        return self.scaled(self.linear(out, f"{block}.attn.out_proj"), f"{block}.ls_1")

    def scaled(self, x, name):
        return x * self.w.get(f"{name}.gamma", 1)

    def mlp(self, x, block):
        hidden = self.linear(self.norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        if self.exact_gelu:
            hidden = hidden * (1 + torch.erf(torch.from_numpy(hidden) / 2**0.5).numpy()) / 2
        else:
            hidden = hidden / (1 + np.exp(-1.702 * hidden))
        return self.scaled(self.linear(hidden, f"{block}.mlp.c_proj"), f"{block}.ls_2")

    def run(self, image, way, residual="cls", surgery_start=LAYERS // 6):
        """Projected tokens N x d of one image in one of the ways, class token first;
        and the tokens after each block.
        """
        x, second, outputs = self.embed(image), None, []
        for i in range(LAYERS):
            block = f"transformer.resblocks.{i}"
            q, k, v = self.qkv(x, block)
            if way == "vv" and i == surgery_start:
                second = x.copy()
            if way == "vv" and i >= surgery_start:
                second += self.attend(v, v, v, block)
            if way == "value" and i == LAYERS - 1:
                kept = np.repeat(x[:1], len(x), 0) if residual == "cls" else x
                second = kept + self.scaled(self.linear(v, f"{block}.attn.out_proj"), f"{block}.ls_1")
                second = second + self.mlp(second, block)
            x = x + self.attend(q, k, v, block)
            x = x + self.mlp(x, block)
            outputs.append(x)
        return self.norm(x if second is None else second, "ln_post") @ self.w["proj"], outputs


def bicubic(grid, height, width, a=-0.75):
    "Cubic convolution with the half-pixel convention and clamped borders, written as two small matrices."

    def matrix(old, new):
        m = np.zeros((new, old))
        for i in range(new):
            center = (i + 0.5) * old / new - 0.5
            for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
                d = abs(center - j)
                weight = (
                    (a + 2) * d**3 - (a + 3) * d**2 + 1
                    if d <= 1
                    else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                )
                m[i, min(max(j, 0), old - 1)] += weight
        return m

    return matrix(grid.shape[0], height) @ grid @ matrix(grid.shape[1], width).T


WAYS = [
    ("tokens", {}),
    ("loda", {}),
    ("value", dict(residual="cls")),
    ("value", dict(residual="token")),
    ("vv", {}),
    ("vv", dict(surgery_start=0)),
    ("vv", dict(surgery_start=4)),
]


@pytest.mark.parametrize(
    "vision",
    [{}, dict(ls_init_value=0.3), dict(quick_gelu=False)],
    ids=["plain", "layer scale", "exact gelu"],
)
@pytest.mark.parametrize("size", SIZES, ids=lambda case: f"{case[0]}x{case[1]}")
@pytest.mark.parametrize("way,options", WAYS, ids=lambda case: str(case))
def test_dense_equals_plain_algebra(way, options, size, vision):
    model, x = tiny(**vision), images(*size)
    dense = CLIPEncoder(model, dense_mode=way, device="cpu", **options).dense(x)
    assert dense.shape == (2, DIM, size[0] // PATCH, size[1] // PATCH)
    reference = Reference(model, exact_gelu=not vision.get("quick_gelu", True))
    for b in range(2):
        expected = reference.run(x[b].double().numpy(), way, **options)[0][1:].T.reshape(dense.shape[1:])
        assert np.abs(dense[b].double().numpy() - expected).max() <= 1e-5


def test_ways_differ():
    model, x = tiny(), images(48, 72)
    maps = [
        CLIPEncoder(model, dense_mode=way, device="cpu", **options).dense(x)
        for way, options in WAYS
        if way != "loda"
    ]
    for i, a in enumerate(maps):
        for b in maps[:i]:
            assert (a - b).abs().max() > 1e-2


def test_default_start_is_a_sixth_of_the_blocks():
    assert [CLIPEncoder(tiny(layers=n), dense_mode="vv", device="cpu").surgery_start for n in (4, 6, 12)] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("way", ["tokens", "value", "vv"])
@pytest.mark.parametrize(
    "vision",
    [
        {},
        dict(pool_type="avg"),
        dict(pool_type="avg", final_ln_after_pool=True),
        dict(final_ln_after_pool=True),
        dict(no_ln_pre=True),
    ],
    ids=str,
)
def test_pooled_equals_open_clip(way, vision):
    model, x = tiny(**vision), images(32, 32)
    assert torch.allclose(
        CLIPEncoder(model, dense_mode=way, device="cpu").encode(x).pooled,
        model.encode_image(x),
        atol=1e-5,
        rtol=0,
    )


def test_loda_pools_the_five_largest_per_channel():
    x, model = images(48, 72), tiny()
    encoded = CLIPEncoder(model, dense_mode="loda", device="cpu").encode(x)
    largest = np.sort(encoded.dense.flatten(2).numpy(), -1)[..., -5:].mean(-1)
    assert np.allclose(encoded.pooled.numpy(), largest, atol=1e-6)
    assert (
        encoded.pooled - CLIPEncoder(model, dense_mode="tokens", device="cpu").encode(x).pooled
    ).abs().max() > 1e-2


def test_other_size_equals_open_clip_built_for_that_size():
    "open_clip builds a tower for 64 x 64 pixels from the same weights, given a table resized in advance."
    model, wide, x = tiny(), tiny(image_size=64), images(64, 64)
    state = model.state_dict()
    state["visual.positional_embedding"] = resize_positions(
        state["visual.positional_embedding"], (4, 4), (8, 8)
    )
    wide.load_state_dict(state)
    assert torch.allclose(
        CLIPEncoder(model, dense_mode="tokens", device="cpu").encode(x).pooled,
        wide.encode_image(x),
        atol=1e-5,
    )


def test_layers_equal_plain_algebra():
    model, x = tiny(), images(48, 72)
    outputs = Reference(model).run(x[0].double().numpy(), "tokens")[1]
    for i, layer in zip((5, 0, 3), CLIPEncoder(model, device="cpu").layers(x, [5, 0, 3])):
        assert layer.shape == (2, WIDTH, 6, 9)
        assert np.abs(layer[0].numpy() - outputs[i][1:].T.reshape(WIDTH, 6, 9)).max() <= 1e-5


def test_bf16_is_close():
    x = images(48, 72)
    for way in ("tokens", "value", "vv"):
        a, b = (
            CLIPEncoder(
                tiny(text=WORDS),
                dense_mode=way,
                precision=kind,
                device="cpu",
                tokenizer=open_clip.SimpleTokenizer(),
            )
            for kind in ("fp32", "bf16")
        )
        assert b.dtype == torch.bfloat16 and b.dense(x).dtype == torch.float32
        assert F.cosine_similarity(a.dense(x), b.dense(x), dim=1).min() > 0.98
        assert F.cosine_similarity(a.text(["a cat"]), b.text(["a cat"])).min() > 0.98


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way,options", WAYS, ids=lambda case: str(case))
def test_cuda_agrees_with_the_cpu(way, options):
    x = images(48, 72)
    cpu, cuda = (
        CLIPEncoder(tiny(), dense_mode=way, device=kind, **options).encode(x) for kind in ("cpu", "auto")
    )
    assert cuda.dense.is_cuda
    # TF32 in the convolution
    assert torch.allclose(cpu.dense, cuda.dense.cpu(), atol=5e-3) and torch.allclose(
        cpu.pooled, cuda.pooled.cpu(), atol=5e-3
    )


# ---- published code


def test_catseg_dense_clip():
    """CAT-Seg's CLIP:
    `value` with the class-token residual, guidance layers, position table, pooled vector, text.
    """
    golden = doubles.golden("catseg_clip_dense")
    state = golden_weights(golden)
    # the checkpoint keeps query, key and value apart
    for key in [key for key in state if key.endswith("q_proj_weight")]:
        stem = key.removesuffix("q_proj_weight")
        state[f"{stem}in_proj_weight"] = torch.cat([state.pop(f"{stem}{each}_proj_weight") for each in "qkv"])
    model = tiny(
        embed_dim=32,
        image_size=64,
        patch_size=16,
        width=128,
        layers=3,
        head_width=64,
        text=dict(context_length=77, vocab_size=100, width=64, heads=1, layers=1),
    )
    model.load_state_dict(state)
    encoder = CLIPEncoder(model, dense_mode="value", residual="cls", device="cpu")

    def close(a, b):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5

    close(resize_positions(model.visual.positional_embedding, (4, 4), (6, 6)), golden["mid.pos_embed_96"])
    for size in (96, 64):
        encoded = encoder.encode(golden[f"in.image_{size}"])
        close(encoded.dense.flatten(2).mT, golden[f"out.dense_{size}"][:, 1:])
    close(encoded.pooled, golden["out.pooled_64"])
    for layer, name in zip(encoder.layers(golden["in.image_96"], [0, 1]), ("out.block0_96", "out.block1_96")):
        close(layer.flatten(2).permute(2, 0, 1), golden[name][1:])
    close(model.encode_text(golden["in.tokens"]), golden["out.text"])
    assert (
        CLIPEncoder(model, dense_mode="value", residual="token", device="cpu")
        .dense(golden["in.image_64"])
        .flatten(2)
        .mT
        - golden["out.dense_64"][:, 1:]
    ).abs().max() > 0.1


@pytest.mark.parametrize("case", ["native", "resized", "shared_bias"])
def test_ebseg_surgery(case):
    "EBSeg's frozen embeddings D: `vv`, second path opened after one of six blocks, unit length per place."
    golden = doubles.golden("ebseg_surgery")
    model = tiny(embed_dim=32, image_size=64, patch_size=16, width=64, layers=6, head_width=16)
    model.visual.load_state_dict(golden_weights(golden))
    encoder, x = CLIPEncoder(model, dense_mode="vv", device="cpu"), golden[f"in.{case}.image"]
    assert (F.normalize(encoder.dense(x), dim=1) - golden[f"out.{case}.dense_map"]).abs().max() <= 1e-5
    assert (encoder.layers(x, [3])[0] - golden[f"out.{case}.plain_patch_feat_4"]).abs().max() <= 1e-5


# ---- text


def test_text_equals_open_clip():
    model, tokenizer = tiny(text=WORDS), open_clip.SimpleTokenizer()
    prompts = ["a photo of a cat.", "rocket", "cat &amp; dog", "crème brûlée", "!"]
    vectors = CLIPEncoder(model, device="cpu", tokenizer=tokenizer).text(prompts)
    assert torch.allclose(vectors, F.normalize(model.encode_text(tokenizer(prompts)), dim=-1), atol=1e-6)


def test_token_counts_equal_the_tokenizers_own():
    tokenizer = open_clip.SimpleTokenizer()
    prompts = [
        "",
        "cat",
        "a photo of a cat.",
        "!!! 2024",
        "猫と犬",
        "supercalifragilisticexpialidocious " * 30,
    ]
    assert count_tokens(tokenizer, prompts) == [len(tokenizer.encode(prompt)) + 2 for prompt in prompts]


def test_a_prompt_too_long_is_named():
    encoder = CLIPEncoder(tiny(text=WORDS), device="cpu", tokenizer=open_clip.SimpleTokenizer())
    assert encoder.text(["dog " * 75]).shape == (1, DIM)
    with pytest.raises(ValueError, match="78 tokens.*at most 77.*dog dog"):
        encoder.text(["cat", "dog " * 76])


def test_short_context():
    "A context other than the tokenizer's default of 77 is the model's to decide."
    model = tiny(text=WORDS | dict(context_length=12))
    encoder = CLIPEncoder(model, device="cpu", tokenizer=open_clip.SimpleTokenizer())
    assert encoder.text(["dog " * 10]).shape == (1, DIM)
    with pytest.raises(ValueError, match="13 tokens.*at most 12"):
        encoder.text(["dog " * 11])


# ---- loading and mistakes

CONFIG = dict(
    embed_dim=DIM,
    vision_cfg=dict(image_size=32, patch_size=PATCH, width=WIDTH, layers=LAYERS, head_width=WIDTH // HEADS),
    text_cfg=WORDS,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for name, extra in (("ovss-test", {}), ("ovss-test-quick", dict(quick_gelu=True))):
        (folder / f"{name}.json").write_text(json.dumps(CONFIG | extra))
    for name in ("ovss-test", "ovss-test-quick"):
        open_clip.add_model_config(folder / f"{name}.json")
    return folder


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_checkpoint_file(folder, suffix):
    state, path = tiny(seed=7, text=WORDS).state_dict(), folder / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    x = images(48, 72)
    encoder = CLIPEncoder("ovss-test-quick", path, dense_mode="tokens", device="cpu")
    assert torch.equal(
        encoder.dense(x), CLIPEncoder(tiny(seed=7, text=WORDS), dense_mode="tokens", device="cpu").dense(x)
    )
    assert encoder.text(["cat"]).shape == (1, DIM)
    # The same weights under another activation are another encoder.
    assert CLIPEncoder("ovss-test", path, device="cpu").fingerprint != encoder.fingerprint


def test_local_folder(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(
            dict(
                model_cfg=CONFIG | dict(quick_gelu=True),
                preprocess_cfg=dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]),
            )
        )
    )
    save_file(tiny(seed=7, text=WORDS).state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder, x = CLIPEncoder(f"local-dir:{tmp_path}", dense_mode="tokens", device="cpu"), images(32, 32)
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.std == (0.25, 0.25, 0.25)
    assert torch.equal(
        encoder.dense(x), CLIPEncoder(tiny(seed=7, text=WORDS), dense_mode="tokens", device="cpu").dense(x)
    )
    (tmp_path / "open_clip_model.safetensors").unlink()
    # never random by accident
    with pytest.raises(ValueError, match="Cannot get local-dir"):
        load_clip(f"local-dir:{tmp_path}")


# ---- what a file was trained with

OPENAI, IMAGENET, HALF = (
    {"mean": mean, "std": std, "interpolation": "bicubic"}
    for mean, std in (MEANS["openai-mean"], MEANS["imagenet-mean"], MEANS["inception-mean"])
)
QUICK = OPENAI | dict(quick_gelu=True)


@pytest.fixture
def published(folder, monkeypatch, tmp_path):
    "A function that gives the small architecture published tags; and a file of weights."

    def publish(**tags):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ovss-test", tags)

    torch.save(tiny(seed=7, text=WORDS).state_dict(), path := tmp_path / "weights.pt")
    return publish, path


class Module(torch.nn.Module):
    def forward(self, x):
        return x


def archive(path, state, **numbers):
    "A TorchScript archive like OpenAI's: half precision, and three numbers among the weights."
    root = Module()
    for name, value in (state | {key: torch.tensor(tensor) for key, tensor in numbers.items()}).items():
        module = root
        for part in name.split(".")[:-1]:
            if not hasattr(module, part):
                module.add_module(part, Module())
            module = getattr(module, part)
        module.register_buffer(name.rpartition(".")[2], value.half() if value.is_floating_point() else value)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(root).save(path)


MARKED = dict(input_resolution=32, context_length=77, vocab_size=49408)


def test_a_file_of_one_of_several_kinds_is_asked_for(published):
    publish, path = published
    publish(openai=QUICK, laion=OPENAI)
    for call in (
        lambda: CLIPEncoder("ovss-test", path),
        lambda: create_encoder(f"clip:ovss-test/{path}"),
        lambda: create_encoder(f"clip:ovss-test//{str(path)[1:]}"),
    ):
        with pytest.raises(
            ValueError,
            match=(
                f"clip:ovss-test/openai={path}.*like='openai'.*QuickGELU, openai mean.*: openai; exact"
                " GELU.*: laion"
            ),
        ):
            call()
    x, exact, quick = images(32, 32), tiny(seed=7, text=WORDS, quick_gelu=False), tiny(seed=7, text=WORDS)
    for like, expected in (("openai", quick), ("laion", exact)):
        reference = CLIPEncoder(expected, device="cpu").dense(x)
        assert torch.equal(CLIPEncoder("ovss-test", path, like=like, device="cpu").dense(x), reference)
        assert torch.equal(create_encoder(f"clip:ovss-test/{like}={path}", device="cpu").dense(x), reference)
    with pytest.raises(ValueError, match="neither a tag of ovss-test .openai, laion."):
        CLIPEncoder("ovss-test", path, like="dfn")


@pytest.mark.parametrize("model", ["ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"])
def test_published_architectures_of_several_kinds(model, tmp_path):
    "For the real names, before anything is built; what is no checkpoint is told so first."
    (path := tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="does not fit.*cannot be read"):
        load_clip(model, path)
    torch.save({"logit_scale": torch.ones(())}, path)
    with pytest.raises(ValueError, match="several kinds.*QuickGELU.*metaclip_fullcc"):
        load_clip(model, path)
    assert (
        file_settings(f"{model}-quickgelu", path, {})
        == file_settings(model, path, {}, like="metaclip_fullcc")
        == (True, (*MEANS["openai-mean"], "bicubic"))
    )


@pytest.mark.parametrize(
    "model", ["ViT-L-14-CLIPA", "ViT-L-14-CLIPA-336", "ViT-H-14-CLIPA-336", "ViT-bigG-14-CLIPA"]
)
def test_clipa_files_have_its_own_normalization(model, tmp_path):
    assert file_settings(model, tmp_path / "weights.pt", {}) == (False, (*MEANS["imagenet-mean"], "bilinear"))


def test_normalization_and_filter_of_a_file_are_those_of_all_tags(published):
    publish, path = published
    publish(
        a=IMAGENET | dict(interpolation="bilinear"),
        b=IMAGENET | dict(interpolation="bilinear", resize_mode="squash"),
    )
    encoder = CLIPEncoder("ovss-test", path, device="cpu")
    assert (encoder.mean, encoder.std) == MEANS["imagenet-mean"] and encoder.resample.name == "BILINEAR"
    assert CLIPEncoder("ovss-test", "random", device="cpu").mean == encoder.mean
    publish(a=OPENAI, b=HALF)
    with pytest.raises(
        ValueError, match="exact GELU, openai mean, bicubic: a; exact GELU, inception mean, bicubic: b"
    ):
        CLIPEncoder("ovss-test", path)
    publish(a=OPENAI, b=OPENAI | dict(interpolation="bilinear"))
    with pytest.raises(ValueError, match="bilinear: b"):
        CLIPEncoder("ovss-test", path)


def test_normalization_belongs_into_the_fingerprint(published):
    publish, path = published
    publish(a=OPENAI, b=HALF, c=OPENAI | dict(interpolation="bilinear"))
    found = {each: CLIPEncoder("ovss-test", path, like=each, device="cpu") for each in "abc"}
    assert (
        len({encoder.fingerprint for encoder in found.values()}) == 3
        and found["a"].fingerprint == CLIPEncoder("ovss-test", path, like="a", device="cpu").fingerprint
    )
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    assert not torch.allclose(
        found["a"].preprocess(picture), found["b"].preprocess(picture)
    ) and not torch.equal(found["a"].preprocess(picture), found["c"].preprocess(picture))
    assert torch.equal(found["a"].text(["cat"]), found["b"].text(["cat"]))
    # So does the way of reading; texts are the same, and are cached once.
    assert len({encoder.text_fingerprint for encoder in found.values()}) == 1
    assert (
        len(
            {
                CLIPEncoder("ovss-test", path, dense_mode=kind, like="a", device="cpu").fingerprint
                for kind in ("tokens", "value", "vv", "loda")
            }
        )
        == 4
    )


@pytest.mark.parametrize("form", ["archive", "table", "wrapped", "safetensors"])
def test_openais_own_file_is_known_by_its_marks(published, form):
    publish, path = published
    publish(openai=QUICK, laion=OPENAI)
    state = tiny(seed=7, text=WORDS).state_dict()
    if form == "archive":
        archive(path, state, **MARKED)
    elif form == "safetensors":
        save_file(
            state | {name: torch.tensor(tensor) for name, tensor in MARKED.items()},
            path := path.with_suffix(".safetensors"),
        )
    else:
        table = state | {name: torch.tensor(tensor) for name, tensor in MARKED.items()}
        torch.save(
            table
            if form == "table"
            else dict(state_dict={f"module.{name}": tensor for name, tensor in table.items()}),
            path,
        )
    encoder, x = create_encoder(f"clip:ovss-test/{path}", device="cpu"), images(32, 32)
    expected = tiny(seed=7, text=WORDS)
    if form == "archive":
        expected.load_state_dict({name: tensor.half().float() for name, tensor in state.items()})
    assert "QuickGELU" in encoder.name and torch.equal(
        encoder.dense(x), CLIPEncoder(expected, device="cpu").dense(x)
    )
    with pytest.raises(ValueError, match="OpenAI's own file.*like='laion' denies"):
        CLIPEncoder("ovss-test", path, like="laion")


def test_an_archive_of_somebody_else_is_not_openais(published):
    publish, path = published
    publish(openai=QUICK, laion=OPENAI)
    archive(path, tiny(seed=7, text=WORDS).state_dict())
    with pytest.raises(ValueError, match="several kinds"):
        CLIPEncoder("ovss-test", path)


@pytest.mark.parametrize(
    "url",
    [
        "https://openaipublic.azureedge.net/clip/models/{}/small.pt",
        "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/small-{:.8}.pt",
    ],
)
def test_a_published_digest_tells(published, url):
    publish, path = published
    url = url.format(hashlib.sha256(path.read_bytes()).hexdigest())
    publish(mine=QUICK | dict(url=url), other=HALF | dict(url=url.replace("/", "-")))
    encoder = CLIPEncoder("ovss-test", path, device="cpu")
    assert "QuickGELU" in encoder.name and encoder.mean == MEANS["openai-mean"][0]
    with pytest.raises(ValueError, match="published file of mine"):
        CLIPEncoder("ovss-test", path, like="other")


def test_the_configuration_beside_a_file_counts(published):
    publish, path = published
    publish(openai=QUICK, laion=OPENAI)
    beside = path.with_name("open_clip_config.json")
    beside.write_text(
        json.dumps(
            dict(
                model_cfg=CONFIG | dict(quick_gelu=True),
                preprocess_cfg=dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], interpolation="bilinear"),
            )
        )
    )
    encoder = CLIPEncoder("ovss-test", path, device="cpu")
    assert "QuickGELU" in encoder.name and (encoder.mean, encoder.std, encoder.resample.name) == (
        (0.5,) * 3,
        (0.25,) * 3,
        "BILINEAR",
    )
    # an explicit word counts for more
    assert CLIPEncoder("ovss-test", path, like="laion", device="cpu").mean == MEANS["openai-mean"][0]
    # Hugging Face's cache: links, the configuration beside the link
    link = path.parent / "snapshot" / "open_clip_pytorch_model.bin"
    link.parent.mkdir()
    link.symlink_to(path)
    beside.rename(link.with_name(beside.name))
    assert CLIPEncoder("ovss-test", link, device="cpu").mean == (0.5,) * 3
    with pytest.raises(ValueError, match="take clip:local-dir"):
        CLIPEncoder("ovss-test", link.parent)
    # another architecture's, or none
    for other in (
        dict(model_cfg=CONFIG | dict(embed_dim=21, quick_gelu=True)),
        dict(preprocess_cfg={}),
        [],
        "{",
    ):
        link.with_name(beside.name).write_text(other if isinstance(other, str) else json.dumps(other))
        with pytest.raises(ValueError, match="several kinds"):
            CLIPEncoder("ovss-test", link)


def test_an_architecture_of_ones_own_is_warned_of(published):
    path = published[1]
    with pytest.warns(UserWarning, match=f"no published weights.*clip:ovss-test/openai-mean={path}"):
        assert CLIPEncoder("ovss-test", path, device="cpu").mean == MEANS["openai-mean"][0]
    with warnings.catch_warnings(action="error"):
        assert (
            create_encoder(f"clip:ovss-test-quick/imagenet-mean={path}", device="cpu").mean
            == MEANS["imagenet-mean"][0]
        )


def test_a_file_knows_its_grid_and_its_number_of_tokens(folder, tmp_path):
    """A table of 6 x 6 positions is of 48 pixels, whatever size the architecture's name means;
    nothing is resampled.
    """
    torch.save(
        (model := tiny(seed=7, text=WORDS | dict(context_length=40), image_size=48)).state_dict(),
        path := tmp_path / "weights.pt",
    )
    encoder, x = CLIPEncoder("ovss-test-quick", path, like="openai-mean", device="cpu"), images(48, 48)
    assert encoder.size == 48 and torch.equal(
        encoder.visual.positional_embedding, model.visual.positional_embedding
    )
    assert (
        torch.equal(encoder.dense(x), CLIPEncoder(model, device="cpu").dense(x))
        and encoder.model.context_length == 40
    )


def test_a_folder_must_say_its_normalization(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=CONFIG)))
    save_file(tiny(seed=7, text=WORDS).state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="preprocess_cfg"):
        create_encoder(f"clip:local-dir:{tmp_path}")
    assert (
        CLIPEncoder(f"local-dir:{tmp_path}", like="imagenet-mean", device="cpu").mean
        == MEANS["imagenet-mean"][0]
    )
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(
            dict(
                model_cfg=CONFIG,
                preprocess_cfg=dict(mean=[0.5] * 3, std=[0.25] * 3, interpolation="bilinear"),
            )
        )
    )
    encoder = create_encoder(f"clip:local-dir:{tmp_path}", device="cpu")
    assert encoder.mean == (0.5,) * 3 and encoder.resample.name == "BILINEAR"


def test_a_folder_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="no folder.*nowhere"):
        create_encoder(f"clip:local-dir:{tmp_path / 'nowhere'}")


def test_like_is_for_files(folder):
    for options in (
        dict(model="ovss-test", pretrained="random"),
        dict(model="ViT-B-16", pretrained="openai"),
        dict(model=tiny()),
    ):
        with pytest.raises(ValueError, match="like"):
            CLIPEncoder(**options, like="openai")


def test_random_must_be_asked_for(folder):
    with pytest.raises(ValueError, match="list_pretrained"):
        CLIPEncoder("ovss-test")
    a, b = (CLIPEncoder("ovss-test", "random", device="cpu") for _ in range(2))
    assert a.fingerprint != b.fingerprint and a.size == 32 and a.stride == PATCH and a.dim == DIM


def test_openai_weights_bring_their_activation(monkeypatch):
    """`ViT-B-16` with OpenAI's weights must be built with QuickGELU, although the architecture's default is
    GELU.
    """
    seen = {}

    def create_model(model, pretrained, **options):
        seen.update(options)
        return tiny()

    monkeypatch.setattr(open_clip, "create_model", create_model)
    load_clip("ViT-B/16", "openai")
    assert seen["force_quick_gelu"]
    load_clip("ViT-B-16", "laion2b_s34b_b88k")
    assert not seen["force_quick_gelu"]


def test_offline_names_the_fix(tmp_path):
    code = (
        "from ovss_nb.encoders.clip import CLIPEncoder\ntry: CLIPEncoder('ViT-B-16', 'openai')\nexcept"
        " ValueError as e: print('CAUGHT', e)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path)),
    )
    assert (
        "CAUGHT Cannot get ViT-B-16 (weights 'openai')" in run.stdout
        and "pass the file: pretrained=" in run.stdout
    ), run.stderr


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(model="RN50", pretrained="random"), "no ViT image tower"),
        (dict(model="ViT-B-16-SigLIP", pretrained="random"), "no ViT image tower"),
        (dict(model="ViT-B-61", pretrained="random"), "did you mean 'ViT-B-16'"),
        (dict(model="ViT-B-16", pretrained="opneai"), "neither a file nor a tag.*openai"),
        (dict(dense_mode="values"), "'tokens', 'value', 'vv' or 'loda'"),
        (dict(residual="none"), "'cls' or 'token'"),
        (dict(precision="fp16"), "'fp32' or 'bf16'"),
        (dict(dense_mode="vv", surgery_start=7), "from 0 to 6"),
        (dict(pretrained="openai"), "leave `pretrained` away"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPEncoder(**(dict(model=tiny()) | options))


def test_towers_that_cannot_be_read():
    with pytest.raises(ValueError, match="pools its tokens by attention"):
        CLIPEncoder(tiny(attentional_pool=True, attn_pooler_heads=2))
    custom = tiny(qk_norm=True)
    with pytest.raises(ValueError, match="cannot take it apart"):
        CLIPEncoder(custom, dense_mode="value", device="cpu")
    x = images(32, 32)
    assert torch.allclose(
        CLIPEncoder(custom, dense_mode="tokens", device="cpu").encode(x).pooled,
        custom.encode_image(x),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "shape", [(1, 3, 30, 32), (1, 3, 32, 36), (3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)]
)
def test_wrong_image_shapes(shape):
    encoder = CLIPEncoder(tiny(), device="cpu")
    for call in (encoder.encode, encoder.dense, lambda x: encoder.layers(x, [0])):
        with pytest.raises(ValueError, match="multiples of 8"):
            call(torch.zeros(shape))


def test_wrong_layers():
    encoder = CLIPEncoder(tiny(), device="cpu")
    for indices in ([7], [-1], []):
        with pytest.raises(ValueError, match="0 to 6"):
            encoder.layers(images(32, 32), indices)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="get_tokenizer"):
        CLIPEncoder(tiny(), device="cpu").text(["cat"])
