"""The recipes are the papers':
every number, one published text per class, and what of CLIP is trained.
"""

import open_clip
import pytest
import torch
from torch.nn import functional as F
from ovss_nb.training.augment import Augmentation
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.systems.registry import create
from ovss_nb.training.optimizer import parameter_groups
from ovss_nb.training.recipes import choose_recipe, part_rows, recipes, tuned_bank
from ovss_nb.core.vocabulary import Vocabulary, load_vocabulary


def published(encoder="clip:ViT-B-16-quickgelu/openai", aux_encoder="sam:vit_b/sam.pth"):
    return recipes(encoder, aux_encoder)


SAN_CROPS = dict(shortest=[320, 960], step=64, longest=2560, crop=640)
PAPERS = {
    "coco-stuff-80k": dict(
        steps=80_000,
        batch=4,
        lr=2e-4,
        weight_decay=1e-4,
        schedule="cosine",
        warmup=0,
        clip=0.01,
        tune=True,
        encoder_lr=0.01,
        precision="fp32",
        words=0,
        augmentation={},
    ),
    "coco-stuff-san": dict(
        steps=60_000,
        batch=32,
        lr=1e-4,
        weight_decay=1e-4,
        schedule="poly",
        warmup=0,
        clip=0.01,
        tune=True,
        encoder_lr=1.0,
        precision="bf16",
        words=0,
        augmentation=SAN_CROPS,
    ),
    "coco-stuff-ebseg": dict(
        steps=120_000,
        batch=16,
        lr=1e-4,
        weight_decay=0.05,
        schedule="poly",
        warmup=0,
        clip=0.01,
        tune=True,
        encoder_lr=1.0,
        precision="bf16",
        words=0,
        augmentation=SAN_CROPS,
    ),
    "coco-stuff-mrovseg": dict(
        steps=60_000,
        batch=32,
        lr=2e-4,
        weight_decay=1e-4,
        schedule="poly",
        warmup=0,
        clip=0.01,
        tune=False,
        precision="bf16",
        words=0,
        augmentation=dict(scale=[0.5, 2.0], crop=640),
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_are_the_papers(name):
    found = published()[name]
    assert {key: found[key] for key in PAPERS[name]} == PAPERS[name] and found["unseen"] == []
    assert all(options["first_word"] for options in found["options"].values())
    Augmentation(**found["augmentation"])
    large = published("clip:ViT-L-14-336-quickgelu/openai")[name]
    assert (
        large["lr"] == (8e-5 if name == "coco-stuff-ebseg" else PAPERS[name]["lr"])
        and large["options"].get("mrovseg", {}).get("size", 672) == 672
    )


EVALUATED = {"voc2012-val-subset", "coco-object-mini", "camvid11", "cocostuff171-mini", "ccp59-subset"}


@pytest.mark.parametrize("system", ["catseg", "lmseg", "san", "ebseg", "mrovseg"])
def test_mixed_learns_from_nothing_that_is_scored(system):
    "Nor from its sets of development; no picture is changed, and a class is the mean of its words."
    found = choose_recipe("mixed", system)
    assert found["augmentation"] is None and not found["tune"] and "first_word" not in found["options"]
    learnt, measured = found["train"], found["development"]
    assert not {name for name, *_ in learnt + measured} & (EVALUATED | {"camvid-train11"})
    for name, _, part in measured:
        others = [other for own, _, other in learnt if own == name]
        assert all(not set(part_rows(400, part)) & set(part_rows(400, other)) for other in others), (
            f"{name} is learnt from and measured"
        )
    assert set(found["shares"]) == {name for name, *_ in learnt}
    create(system, "lite", weights="random", device="cpu", **found["options"])


def test_what_a_recipe_says_must_agree():
    with pytest.raises(ValueError, match="distractors=false with tune"):
        choose_recipe("coco-stuff-80k", "catseg", changes=dict(distractors=True))
    mine = dict(train=[["mine", "", "all"]])
    assert choose_recipe("mixed", "catseg", changes=mine)["shares"] == {}
    with pytest.raises(ValueError, match="give development"):
        choose_recipe("mixed", "catseg", changes=mine | dict(keep="best"))


def texts_read(system, words):
    "What a system's text tower is given for a vocabulary."
    said, text = [], system.encoder.text
    system.encoder.text = lambda prompts: said.extend(prompts) or text(prompts)
    try:
        system.encode_text(words)
    finally:
        del system.encoder.text
    return said


def text_system(name, **options):
    "A system over a small CLIP that reads real words."
    small = (
        dict(image_size=64, patch_size=16, width=32, layers=4, head_width=16),
        dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
    )
    encoder = CLIPEncoder(open_clip.CLIP(24, *small), tokenizer=open_clip.SimpleTokenizer(), device="cpu")
    sizes = dict(
        catseg=dict(
            width=16,
            guidance=(8, 8),
            enlarged=(8, 8),
            decoder=(16, 16),
            decoder_guidance=(4, 4),
            attention_window=6,
        ),
        san=dict(width=16, depth=4, heads=2, queries=4),
        mrovseg=dict(size=64, width=16, depth=5, heads=2, queries=4),
        ebseg=dict(
            aux_encoder="none", width=16, encoder_layers=1, groups=4, queries=4, decoder_layers=3, heads=2
        ),
    )
    return create(
        name,
        encoder,
        cache=None,
        weights="random",
        **sizes.get(name, sizes["catseg"] | dict(fusion_weight=1.0, prompts="names")),
        **options,
    )


@pytest.mark.parametrize("name", ["catseg", "lmseg", "san", "ebseg", "mrovseg"])
def test_published_texts_are_one_per_class(name):
    """All 171 classes of COCO-Stuff by their published name, in every system;
    without the option 53 classes have more words.
    """
    stuff = load_vocabulary("COCO-Stuff-171")
    said = texts_read(text_system(name, templates="single", first_word=True), stuff)
    assert said == [f"A photo of a {name} in the scene" for name in stuff.names] and len(said) == 171
    assert (
        sum(len(value) > 1 for value in stuff.words) == 53
        and len(texts_read(text_system(name, templates="single"), stuff)) > 171 + 52
    )


def test_a_tuned_text_tower_reads_the_published_texts():
    "Words read anew, while the text tower learns."
    model, stuff = text_system("catseg", first_word=True), load_vocabulary("COCO-Stuff-171")
    model.tune()

    chosen = (1, 3, 62)  # bicycle, motorcycle, tv: all have a second word
    words = Vocabulary(tuple(stuff.names[k] for k in chosen), tuple(stuff.words[k] for k in chosen))
    bank = tuned_bank(model, words)
    assert bank.embeddings.shape[:2] == (3, 1) and bank.embeddings.requires_grad
    expected = F.normalize(
        model.encoder.text([f"A photo of a {stuff.names[k]} in the scene" for k in (1, 3, 62)]), dim=-1
    )
    assert torch.allclose(bank.embeddings[:, 0], expected, atol=1e-6)


def test_san_trains_the_position_table():
    """By one step of the recipe's rules on a picture:
    CLIP's positions move, at the full learning rate and without decay, and nothing else of it.
    """
    model, found = (
        text_system("san", size=64, keep_aspect=False, first_word=True, templates="single", loss_points=16),
        published()["coco-stuff-san"],
    )
    tuned = model.tune() if found["tune"] else []
    groups = parameter_groups(
        model.module, found["weight_decay"], {"^(encoder|aux_encoder)": found["encoder_lr"]}
    )
    table = (
        [group for group in groups if any(name.startswith("encoder.") for name in group["names"])]
        if tuned
        else []
    )
    model.network.requires_grad_(True)
    loss, _ = model.loss(
        model.encode_batch(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)),
        torch.zeros(1, 64, 64, dtype=torch.long),
        model.encode_text(["cat", "sofa"]),
        torch.Generator().manual_seed(0),
    )
    loss.backward()
    assert [(group["names"], group["factor"], group["weight_decay"]) for group in table] == [
        (["encoder.model.visual.positional_embedding"], 1.0, 0.0)
    ]
    assert (
        tuned[0].grad.abs().sum() > 0
        and sum(parameter.grad is not None for parameter in model.encoder.parameters()) == 1
    )
