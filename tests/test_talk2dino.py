"""Talk2DINO: the authors' numbers, and its place among encoders."""

import timm
import torch
from doubles import close, recipes_golden, same, small_clip
from ovss_nb.encoders.proxy import TimmProxy
from ovss_nb.encoders.talk2dino import (
    Talk2DINOEncoder,
    TextProjection,
    class_attention,
    clean_background,
    load_projection,
)
from ovss_nb.text.text_bank import encode_text
from safetensors.torch import save_file
from torch.nn import functional as F


def test_authors_numbers(tmp_path):
    tensors, _ = recipes_golden("talk2dino")
    weights = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    save_file(weights, tmp_path / "projection.safetensors")
    projection = load_projection(tmp_path / "projection.safetensors")
    text = projection(tensors["input.text_outputs"].mean(1))
    same(text, tensors["expect.text"])
    features = tensors["input.features"]
    similarity = torch.tensordot(text, F.normalize(features, dim=1), ([1], [1])).movedim(1, 0)
    same(similarity, tensors["expect.similarity"])
    same(similarity.sigmoid(), tensors["expect.mask"])
    cleaned = clean_background(similarity.sigmoid(), features, tensors["input.class_attention"], text)
    same(cleaned, tensors["expect.cleaned"])


def test_cleaning_by_hand_image_by_image():
    torch.manual_seed(0)
    scores, features = torch.rand(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
    attention, text = torch.randn(2, 2, 8), F.normalize(torch.randn(3, 5), dim=-1)
    ours = clean_background(scores, features, attention, text)
    for item in range(2):
        flat = features[item].flatten(1).T
        heads = [sum(float(a) * f for a, f in zip(row, flat)) for row in attention[item]]
        heads = [head / head.norm() for head in heads]
        maps = []
        for word in text:
            likes = torch.tensor([float(word @ head) for head in heads]).exp()
            mixed = sum(like / likes.sum() * row for like, row in zip(likes, attention[item]))
            maps.append(mixed.exp() / mixed.exp().sum())
        low, high = min(float(x.min()) for x in maps), max(float(x.max()) for x in maps)
        bottom, top = float(scores[item].min()), float(scores[item].max())
        for k, values in enumerate(maps):
            stretched = (values - low) / high * (top - bottom) + bottom
            close(ours[item, k].flatten(), (scores[item, k].flatten() + 0.2 * stretched) / 1.2, 1e-5)


def small_talk2dino(**options):
    torch.manual_seed(0)
    options = dict(img_size=56, embed_dim=32, depth=2, num_heads=2) | options
    network = timm.create_model(
        "vit_base_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True, **options
    )
    return Talk2DINOEncoder(
        TextProjection(24, 32), small_clip(), TimmProxy(network, device="cpu"), device="cpu"
    )


def test_templates_are_averaged_before_the_projection():
    encoder, templates = small_talk2dino(), ("a photo of a {}.", "a drawing of the {}", "{}")
    bank = encode_text(encoder, ["cat", "two dogs"], templates, progress=False)
    for row, word in zip(bank.embeddings[:, 0], ("cat", "two dogs")):
        tokens = encoder.clip.tokenizer([template.replace("{}", word) for template in templates])
        vectors = encoder.clip.model.encode_text(tokens)
        close(row, encoder.projection(vectors.mean(0)), 1e-5)
    one = encode_text(encoder, ["cat", "two dogs"], "plain", progress=False)
    close(one.embeddings[:, 0], encoder.text(["cat", "two dogs"]), 1e-5)


def test_batches_and_images_that_are_not_square():
    encoder = small_talk2dino()
    images = torch.randn(3, 3, 28, 70)
    together = encoder.encode(images)
    assert together.dense.shape == (3, 32, 2, 5)
    attention = class_attention(encoder.vision, images)
    assert attention.shape == (3, 2, 10)
    for item in range(3):
        alone = images[item : item + 1]
        close(encoder.encode(alone).dense, together.dense[item : item + 1], 1e-5)
        close(class_attention(encoder.vision, alone), attention[item : item + 1], 1e-5)
