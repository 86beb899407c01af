"""EBSeg against the numbers of its public code, against an independent naming of its checkpoint, and its
promises: any picture, any vocabulary, one walk through the last blocks.
"""

import numpy as np
import open_clip
import doubles
from doubles import close, thinned
import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from torch.nn import functional as F
from ovss_nb.benchmarks.protocols import system_facts
from ovss_nb.encoders.base import Encoder
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.encoders.sam import SAMEncoder
from ovss_nb.components.mask_losses import ssc_loss
from ovss_nb.components.mask_decoder import Prediction
from ovss_nb.encoders.attention import propose, sos_bias
from ovss_nb.systems import ebseg
from ovss_nb.systems.ebseg import (
    EBSeg,
    LayerFusion,
    adaptive_balance,
    all_words,
    published_flags,
    seen_classes,
    convert_checkpoint,
)
from ovss_nb.systems.mask_system import resize_matrix, semantic_inference
from ovss_nb.systems.trained import state_dict_difference
from ovss_nb.core.vocabulary import Vocabulary, load_vocabulary

SMALL = dict(
    weights="random",
    size=64,
    encoder_scale=1.0,
    templates="single",
    width=16,
    encoder_layers=1,
    encoder_hidden=16,
    groups=4,
    queries=5,
    decoder_layers=3,
    heads=2,
    hidden=16,
    loss_points=32,
)
WORDS = ["cat", "sofa", "grass", "saxophone"]


def randomize(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                noise / p[0].numel() ** 0.5
                if p.ndim > 1
                else 0.1 * noise + (1 if name.endswith("weight") else 0)
            )
    return module.eval().requires_grad_(False)


def small_clip(seed=0, quick_gelu=True, layers=6):
    model = doubles.small_clip_model(layers=layers, quick_gelu=quick_gelu)
    return CLIPEncoder(randomize(model, seed), tokenizer=open_clip.SimpleTokenizer(), device="cpu")


def small_sam(seed=0):
    network = ImageEncoderViT(
        depth=5,
        global_attn_indexes=(0, 2, 3, 4),
        norm_layer=lambda c: nn.LayerNorm(c, eps=1e-6),
        img_size=64,
        patch_size=16,
        embed_dim=24,
        num_heads=2,
        out_chans=8,
        window_size=3,
        use_rel_pos=True,
    )
    return SAMEncoder(randomize(network, seed), size=64, device="cpu")


def small(seed=0, aux_encoder="sam", **options):
    return EBSeg(
        small_clip(seed),
        aux_encoder=small_sam(seed) if aux_encoder == "sam" else aux_encoder,
        **(SMALL | options),
    )


def photo(height=48, width=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- published code


def test_fusion():
    g = doubles.golden("ebseg_pixel_decoder")
    fusion = LayerFusion(768, (24, 32, 40))
    fusion.load_state_dict(
        {
            f"{ours}.{i}.{kind}": g[f"w.clip_fusion_layers.{i}.{k}.{kind}"]
            for i in range(3)
            for k, ours in enumerate(("norms", "projects"))
            for kind in ("weight", "bias")
        }
    )
    for ours, i in zip(
        fusion([g[f"in.res{i}"] for i in (3, 4, 5)], [g[f"in.clip_feat_{i}"] for i in (3, 6, 9)]), (3, 4, 5)
    ):
        close(ours, g[f"out.fused_res{i}"])


def golden_clip(file):
    model = open_clip.CLIP(
        32,
        dict(image_size=64, patch_size=16, width=64, layers=6, head_width=16),
        dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
        quick_gelu=True,
    )
    tensors = doubles.golden(file)
    model.visual.load_state_dict(
        {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    )
    encoder = CLIPEncoder(model, tokenizer=open_clip.SimpleTokenizer(), device="cpu")
    encoder.mean, encoder.std = (0, 0, 0), (1, 1, 1)  # the stored images are normalized
    system = EBSeg(encoder, aux_encoder=None, **(SMALL | dict(proposal_start=4)))
    system.pad_multiple = 16  # the stored images are no multiples of 32, and their masks come from elsewhere
    return system, tensors


@pytest.mark.parametrize("case", ["native", "resized", "shared_bias"])
def test_frozen_map(case):
    system, g = golden_clip("ebseg_surgery")
    assert (system.proposal_start, system.surgery_start, system.fused_layers) == (4, 1, (1, 3, 4))
    images = system.encode_pixels(g[f"in.{case}.image"])
    for i, one in enumerate(images):
        close(one.features.dense[0], g[f"out.{case}.dense_map"][i])
        close(
            one.tokens[0, 1:].mT.unflatten(-1, g[f"out.{case}.plain_patch_feat_4"].shape[-2:]),
            g[f"out.{case}.plain_patch_feat_4"][i],
        )
        close(one.tokens[0, :1], g[f"out.{case}.plain_cls_token_4"][:, i])
    trained = system.encode_pixels(g[f"in.{case}.image"], training=True)
    close(trained[0].tokens, images[0].tokens, 1e-5)
    assert trained[0].features is None


@pytest.mark.parametrize("case", ["native", "resized", "shared_bias"])
def test_mask_attention_embeddings(case, monkeypatch):
    "B of a prediction with the stored bias; twice in one go, which must not matter."
    system, g = golden_clip("ebseg_sos_attention")
    bias = g[f"in.{case}.attn_bias"]
    stored = Prediction(torch.randn(2, 5, 8, 8), torch.randn(2, 5, 32), bias)
    monkeypatch.setattr(
        system.network,
        "forward",
        lambda *inputs: [Prediction(stored.masks, stored.embeddings, -bias), stored],
    )
    answers = system.branch_embeddings(system.encode_pixels(g[f"in.{case}.image"]), every=True)
    close(answers[1].B, g[f"out.{case}.sos_embed_max"])
    assert not torch.allclose(answers[0].B, answers[1].B, atol=1e-3) and answers[0].D is None


@pytest.fixture(scope="module")
def golden():
    return doubles.golden("ebseg_balance")


def test_pooled_frozen_embeddings(golden):
    masks = F.interpolate(
        golden["in.balance.pred_masks"],
        golden["in.balance.D"].shape[-2:],
        mode="bilinear",
        align_corners=False,
    )
    close(ebseg.mask_pool(golden["in.balance.D"], masks), golden["out.balance.pooled_D"], 1e-6)


@pytest.mark.parametrize("model", ["B", "L"])
def test_balancing(golden, model, monkeypatch):
    "From embeddings to semantic scores."
    exponents = golden[f"const.{model}.alpha_beta_gamma"].double().tolist()
    exponents = dict(zip(("alpha", "beta", "gamma"), (round(value, 6) for value in exponents)))
    assert exponents == (
        dict(alpha=0.09, beta=0.3, gamma=0.7) if model == "B" else dict(alpha=0.12, beta=0.4, gamma=0.6)
    )
    logits = [golden[f"out.balance.logits_{name}"] for name in "ABD"]
    classifier = ebseg.TextClassifier(16, float(golden["in.balance.logit_scale_log"].exp()))
    with torch.no_grad():
        classifier.background.copy_(golden["in.balance.text_embeddings"][-1])
    for found, row in zip(
        (golden["in.balance.A"], golden["in.balance.B"], golden["out.balance.pooled_D"]), logits
    ):
        close(classifier.logits(found, golden["in.balance.text_embeddings"][:-1]), row)
    p = adaptive_balance(*logits, golden["in.balance.overlap"].bool(), **exponents)
    close(p, golden[f"out.balance.{model}.class_probs"], 1e-5)
    # of probabilities near 1e-8
    close((p + 1e-8).log(), golden[f"out.balance.{model}.log_class_probs"], 2e-3)
    padded = tuple(golden["in.balance.padded_size"].tolist())
    for i in range(2):
        resized, size = (
            tuple(golden[f"in.balance.{name}"][i].tolist()) for name in ("image_sizes", "output_sizes")
        )
        masks = golden["in.balance.pred_masks"][i]
        close(
            thinned(
                torch.cat(
                    [strip for _, strip in semantic_inference(p[i], masks, padded, resized, size, 10_000)], 1
                )
            ),
            golden[f"out.balance.{model}.sem_seg_{i}_stride2"],
        )
        rows, columns = (resize_matrix(*row) for row in zip(masks.shape[1:], padded, resized, size))
        close(thinned(rows @ masks @ columns.T), golden[f"out.balance.mask_logits_resized_{i}_stride2"])


def test_overlap_of_published_lists(golden):
    "Every flag of the six sets; and without corrections nearly all."
    for title, name in {
        "VOC-20": "voc_sem_seg_val",
        "PC-59": "pcontext_sem_seg_val",
        "PC-459": "pcontext_full_sem_seg_val",
        "ADE-150": "ade20k_sem_seg_val",
        "ADE-847": "ade20k_full_sem_seg_val",
        "COCO-Stuff-171": "coco_2017_test_stuff_sem_seg",
    }.items():
        vocabulary, theirs = load_vocabulary(title), golden[f"overlap.{name}"].bool()
        assert torch.equal(published_flags()[vocabulary.names], theirs), title
        plain = seen_classes(vocabulary.words, all_words(load_vocabulary("COCO-Stuff-171")))
        assert (plain != theirs).sum() == sum(map(len, system_facts("ebseg", title).values())), title


# ---- the authors' checkpoint: their names, written by hand from the structure of the public code, without
# the loader's expressions


def authors_state(system, clip, sam):
    layers, blocks, first, start = (
        len(system.network.decoder.layers),
        len(clip.visual.transformer.resblocks),
        4,
        1,
    )
    found, network = {}, system.network.state_dict()

    def put(theirs, ours, source=network):
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in source:
                found[f"{theirs}.{kind}"] = source[f"{ours}.{kind}"].clone()

    for i in range(3):
        put(f"sem_seg_head.clip_fusion_layers.{i}.0", f"fusion.norms.{i}")
        put(f"sem_seg_head.clip_fusion_layers.{i}.1", f"fusion.projects.{i}")
        for k in range(2):
            put(f"sem_seg_head.pixel_decoder.input_proj.{i}.{k}", f"pixels.project.{i}.{k}")
    encoder = "sem_seg_head.pixel_decoder.transformer.encoder.layers"
    for i in range(len(system.network.pixels.layers)):
        put(f"{encoder}.{i}.linear1", f"pixels.layers.{i}.mlp.0")
        put(f"{encoder}.{i}.linear2", f"pixels.layers.{i}.mlp.2")
        put(f"{encoder}.{i}.norm1", f"pixels.layers.{i}.norm1")
        put(f"{encoder}.{i}.norm2", f"pixels.layers.{i}.norm2")
        for a, b in (
            ("sampling_offsets", "offsets"),
            ("attention_weights", "weights"),
            ("value_proj", "value"),
            ("output_proj", "output"),
        ):
            put(f"{encoder}.{i}.self_attn.{a}", f"pixels.layers.{i}.attention.{b}")
    found["sem_seg_head.pixel_decoder.transformer.level_embed"] = network["pixels.level_positions"]
    for a, b in (
        ("mask_features", "mask_features"),
        ("adapter_1", "lateral.0"),
        ("adapter_1.norm", "lateral.1"),
        ("layer_1", "smooth.0"),
        ("layer_1.norm", "smooth.1"),
    ):
        put(f"sem_seg_head.pixel_decoder.{a}", f"pixels.{b}")
    predictor = "sem_seg_head.predictor"
    for i in range(layers):
        for kind, ours, norm in (("cross", "cross", "norm1"), ("self", "mutual", "norm2")):
            theirs = f"{predictor}.transformer_{kind}_attention_layers.{i}"
            attention = f"{theirs}.{'multihead_attn' if kind == 'cross' else 'self_attn'}"
            put(f"{attention}.out_proj", f"decoder.layers.{i}.{ours}.out_proj")
            put(f"{theirs}.norm", f"decoder.layers.{i}.{norm}")
            for part in ("weight", "bias"):
                found[f"{attention}.in_proj_{part}"] = network[f"decoder.layers.{i}.{ours}.in_proj_{part}"]
        for a, b in (("linear1", "mlp.0"), ("linear2", "mlp.2"), ("norm", "norm3")):
            put(f"{predictor}.transformer_ffn_layers.{i}.{a}", f"decoder.layers.{i}.{b}")
    for i in range(3):
        for a, b in (("mask_embed", "mask"), ("mask_embed1", "embed"), ("attn_proj", "attend")):
            put(f"{predictor}.{a}.layers.{i}", f"decoder.head.{b}.{2 * i}")
    for a, b in (
        ("decoder_norm", "norm"),
        ("pool_proj.0", "pooled.0"),
        ("pool_proj.1", "pooled.1"),
        ("bias_scaling", "bias_scale"),
    ):
        put(f"{predictor}.{a}", f"decoder.head.{b}")
    for a, b in (
        ("query_feat.weight", "queries"),
        ("query_embed.weight", "query_positions"),
        ("level_embed.weight", "level_positions"),
        ("logit_scale", "head.scale"),
    ):
        found[f"{predictor}.{a}"] = network[f"decoder.{b}"]
    # CLIP in three pieces
    visual = clip.visual.state_dict()
    for i in range(blocks):
        ours, theirs = (
            f"transformer.resblocks.{i}",
            (f"clip_visual_extractor.resblocks.{i}" if i < first else f"clip_rec_head.resblocks.{i - first}"),
        )
        for one in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            put(f"{theirs}.{one}", f"{ours}.{one}", visual)
        plain = i < start
        put(f"{theirs}.attn.{'out_proj' if plain else 'proj'}", f"{ours}.attn.out_proj", visual)
        for part in ("weight", "bias"):
            found[f"{theirs}.attn.{'in_proj_' if plain else 'qkv.'}{part}"] = visual[
                f"{ours}.attn.in_proj_{part}"
            ]
    for one in ("ln_pre", "ln_post", "conv1"):
        put(f"clip_visual_extractor.{one}", one, visual)
    for one in ("class_embedding", "positional_embedding", "proj"):
        found[f"clip_visual_extractor.{one}"] = visual[one]
    put("clip_rec_head.ln_post", "ln_post", visual)
    found["clip_rec_head.proj"] = visual["proj"]
    found |= {
        f"ov_classifier.{name}": tensor
        for name, tensor in clip.state_dict().items()
        if not name.startswith("visual.")
    }
    found |= {
        "ov_classifier.bg_embed": network["classifier.background"][None],
        "ov_classifier.attn_mask": torch.zeros(77, 77),
        "criterion.empty_weight": torch.ones(172),
    }
    return found | {
        f"backbone.{name}": tensor
        for name, tensor in sam.state_dict().items()
        if not name.startswith("neck.")
    }


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "A small model as the authors would have saved it, and the system it was made from."
    system = small(seed=1)
    randomize(system.network, 7)
    with torch.no_grad():
        system.encoder.model.logit_scale.fill_(2.5)
    system.network.classifier.scale.fill_(float(np.exp(2.5)))
    path = tmp_path_factory.mktemp("released") / "EBSeg_small.pth"
    torch.save(
        {
            "model": authors_state(system, system.encoder.model, system.aux_encoder.model),
            "iteration": 119999,
            "optimizer": {},
        },
        path,
    )
    return path, system


def test_authors_checkpoint(released):
    path, system = released
    encoder, second = small_clip(5), small_sam(5)
    first = system.segment(photo(), WORDS)
    loaded = EBSeg(encoder, aux_encoder=second, **(SMALL | dict(weights=str(path))))
    for ours, theirs in ((loaded.network, system.network), (loaded.encoder, system.encoder)):
        assert state_dict_difference(ours.state_dict(), theirs.state_dict()) == "" and all(
            torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items()
        )
    own = {name: tensor for name, tensor in loaded.aux_encoder.state_dict().items() if ".neck." not in name}
    assert all(
        torch.equal(tensor, system.aux_encoder.state_dict()[name]) for name, tensor in own.items()
    ) and float(loaded.network.classifier.scale) == pytest.approx(float(np.exp(2.5)))
    assert (
        loaded.encoder is not encoder
        and loaded.aux_encoder is not second
        and loaded.aux_encoder.fingerprint != second.fingerprint
    )
    again = loaded.segment(photo(), WORDS)
    assert (
        np.allclose(again.scores, first.scores, atol=1e-5) and (again.labels == first.labels).mean() > 0.999
    )


VALUES = dict(
    B=dict(encoder_scale=0.5, alpha=0.09, beta=0.3, gamma=0.7),
    L=dict(encoder_scale=0.7, alpha=0.12, beta=0.4, gamma=0.6),
)


@pytest.mark.parametrize("layers, size", [(6, "B"), (12, "B"), (24, "L")])
def test_authors_checkpoint_brings_the_values_of_its_size(tmp_path, layers, size):
    """EBSeg's released models:
    what CLIP sees and the balance differ between EBSeg_base.pth and EBSeg_large.pth; what the caller says
    counts for more.
    """
    options = {name: value for name, value in SMALL.items() if name != "encoder_scale"}
    made = EBSeg(small_clip(1, layers=layers), aux_encoder=small_sam(1), **options)
    torch.save(
        {"model": authors_state(made, made.encoder.model, made.aux_encoder.model)},
        path := tmp_path / "EBSeg.pth",
    )

    def load(**more):
        return EBSeg(
            small_clip(5, layers=layers),
            aux_encoder=small_sam(5),
            **(options | dict(weights=str(path)) | more),
        )

    loaded = load()

    def values(system):
        return {name: getattr(system.config, name) for name in VALUES[size]}

    assert (
        values(loaded) == VALUES[size] == {name: loaded.describe()["config"][name] for name in VALUES[size]}
    )
    # of 64 x 128 filled-up pixels
    assert loaded.encode_image(photo()).layers[0].shape[-2:] == (2, 4 if size == "B" else 5)
    for name, value in dict(encoder_scale=0.6, alpha=0.2, beta=0.25, gamma=0.5).items():
        assert values(load(**{name: value})) == VALUES[size] | {name: value}
    assert values(load(alpha=0.09, beta=0.3, gamma=0.7)) == VALUES[size] | dict(
        alpha=0.09, beta=0.3, gamma=0.7
    )
    loaded.save(ours := str(tmp_path / "ours.safetensors"))
    assert values(load(weights=ours)) == VALUES[size]


def test_what_differs_by_size_follows_from_the_encoder():
    """Without any file too:
    blocks that are fused, that proposals start at and that the second path starts at.
    """
    options = {name: value for name, value in SMALL.items() if name != "encoder_scale"}
    for layers, first, start, fused in ((12, 9, 2, (3, 6, 9)), (24, 18, 4, (6, 12, 18))):
        system = EBSeg(small_clip(layers=layers), aux_encoder=None, **options)
        assert (system.proposal_start, system.surgery_start, system.fused_layers) == (
            first,
            start,
            fused,
        ) and system.config.alpha == (0.09 if layers == 12 else 0.12)
    # gamma is 0.7 here
    with pytest.raises(ValueError, match="may pass 1 - gamma"):
        EBSeg(small_clip(), aux_encoder=None, **options, beta=0.35)


def test_authors_checkpoint_survives_our_own_file(released, tmp_path):
    path, system = released
    loaded = EBSeg(small_clip(5), aux_encoder=small_sam(5), **(SMALL | dict(weights=str(path))))
    loaded.save(tmp_path / "ours.safetensors")
    again = EBSeg(
        small_clip(6), aux_encoder=small_sam(6), **(SMALL | dict(weights=str(tmp_path / "ours.safetensors")))
    )
    assert np.allclose(again.segment(photo(), WORDS).scores, system.segment(photo(), WORDS).scores, atol=1e-5)
    assert "aux_encoder.model.pos_embed" in again.tuned_names and again.trained_words == loaded.trained_words


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("sem_seg_head.predictor.query_feat.weight"), "decoder.queries"),
        (lambda s: s.update({"sem_seg_head.predictor.extra": torch.ones(2)}), "decoder.extra"),
        (
            lambda s: s.pop("clip_rec_head.resblocks.1.attn.qkv.bias"),
            "visual.transformer.resblocks.5.attn.in_proj_bias",
        ),
        (lambda s: s.update({"clip_rec_head.proj": s["clip_rec_head.proj"] + 1}), "clip_rec_head.proj"),
        (lambda s: s.pop("backbone.pos_embed"), "pos_embed"),
        (lambda s: s.update({"backbone.blocks.0.attn.qkv.weight": torch.ones(2, 2)}), "2x2, expected 72x24"),
    ],
)
def test_strict(released, tmp_path, change, message):
    state = dict(torch.load(released[0], weights_only=True)["model"])
    change(state)
    torch.save({"model": state}, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        EBSeg(
            small_clip(5), aux_encoder=small_sam(5), **(SMALL | dict(weights=str(tmp_path / "changed.pth")))
        )


def test_authors_checkpoint_needs_its_encoders(released):
    for encoder, second, message in (
        (small_clip(5, quick_gelu=False), small_sam(5), "QuickGELU"),
        (small_clip(5), None, "SAM as second"),
        (small_clip(5, layers=5), small_sam(5), "another CLIP"),
    ):
        with pytest.raises(ValueError, match=message):
            EBSeg(encoder, aux_encoder=second, **(SMALL | dict(weights=str(released[0]))))


def test_released_sizes():
    "The first block of the last module counts on: 9 for B, 18 for L."
    for count, first, start in ((12, 9, 2), (24, 18, 4)):
        names = [
            f"clip_visual_extractor.resblocks.{i}.attn.{'in_proj_bias' if i < start else 'qkv.bias'}"
            for i in range(first)
        ] + [f"clip_rec_head.resblocks.{i}.attn.qkv.bias" for i in range(count - first)]
        assert list(convert_checkpoint(dict.fromkeys(names, torch.zeros(1)))[1]) == [
            f"visual.transformer.resblocks.{i}.attn.in_proj_bias" for i in range(count)
        ]


# ---- pictures


@pytest.mark.parametrize("aux_encoder", ["sam", None])
@pytest.mark.parametrize("size", [(48, 80), (90, 30), (64, 64), (7, 100)])
def test_any_picture(aux_encoder, size):
    system = small(aux_encoder=aux_encoder)
    found = system.segment(photo(*size), WORDS)
    assert (
        found.labels.shape == size
        and found.scores.shape[0] == 4
        and np.isfinite(found.scores).all()
        and set(np.unique(found.labels)) <= set(range(4))
    )
    image = system.encode_image(photo(*size))
    assert (
        all(side % 32 == 0 for side in image.padded_size)
        and found.scores.shape[1:] == tuple(-(-side // 4) for side in image.resized_size)
        and min(image.resized_size) in (64, 18)
    )


def test_one_at_a_time_or_together():
    system = small()
    pictures = [photo(seed=i) for i in range(3)] + [photo(64, 64)]
    together, alone = system.encode_images(pictures), [system.encode_image(image) for image in pictures]
    for a, b in zip(together, alone):
        close(a.tokens, b.tokens)
        close(a.features.dense, b.features.dense)
    batch = system.branch_embeddings(together[:3])[-1]
    for i in range(3):
        single = system.branch_embeddings([alone[i]])[-1]
        for name in ("masks", "A", "B", "D"):
            close(getattr(batch, name)[i], getattr(single, name)[0], 1e-3)
    with pytest.raises(ValueError, match="one size"):
        system.branch_embeddings(together)


def test_all_answers_together_equal_one_by_one():
    "The copies of the class token of all predictions share one walk; the public code walks once for each."
    system = small()
    images = [system.encode_image(photo())]
    answers = system.branch_embeddings(images, every=True)
    predictions = system.network(
        [level.float() for level in images[0].maps], images[0].layers, images[0].padded_size, every=True
    )
    assert len(answers) == len(predictions) == 4
    for answer, prediction in zip(answers, predictions):
        proposals, _ = propose(
            system.encoder.blocks[system.proposal_start :],
            images[0].tokens,
            sos_bias(prediction.bias, images[0].layers[0].shape[-2:]),
        )
        close(answer.B, F.normalize(system.encoder.project(proposals), dim=-1), 1e-5)
    close(system.branch_embeddings(images)[-1].B, answers[-1].B, 1e-5)


def test_padding_is_zero_after_normalizing():
    "What lies beyond the picture has no influence on where the picture ends: the encoders see zeros there."
    system, seen = small(), []
    plain = system.encoder.embed
    system.encoder.embed = lambda x: seen.append(x) or plain(x)
    image = system.encode_image(photo(64, 70))
    assert (
        image.resized_size == (64, 70)
        and image.padded_size == (64, 96)
        and (seen[0][..., 70:] == 0).all()
        and (seen[0][..., 69] != 0).any()
    )


def test_scaled_clip():
    system = small(encoder_scale=0.5, size=128)
    assert system.pad_multiple == 32 and system.encode_image(photo(64, 64)).layers[0].shape[-2:] == (4, 4)
    assert small(encoder_scale=0.7).pad_multiple == 32 and small(encoder_scale=0.25).pad_multiple == 64


def test_full_resolution_and_quarter_agree_mostly():
    fine, coarse = (
        small(resolution=option).segment(photo(64, 96), WORDS).labels for option in ("image", "masks")
    )
    assert (fine == coarse).mean() > 0.8 and fine.dtype == coarse.dtype


def test_frozen_embedding_of_a_full_mask():
    system = small()
    image = system.encode_image(photo())
    system.network.forward = lambda *inputs: [
        Prediction(torch.ones(1, 5, 16, 24), torch.randn(1, 5, 24), torch.zeros(1, 2, 5, 16, 24))
    ]
    found = system.branch_embeddings([image])[-1]
    close(found.D[0], image.features.dense.mean((2, 3)).expand(5, -1), 1e-5)
    close(found.B[0, 0], found.B[0, 4], 1e-6)  # with one bias all copies are one


# ---- words


def test_permuting_classes_permutes_scores():
    system, order = small(seen=("cat", "sofa")), [2, 0, 3, 1]
    image = system.encode_image(photo())
    before, after = (
        system.scores(image, system.encode_text(value)) for value in (WORDS, [WORDS[i] for i in order])
    )
    close(after, before[order], 1e-5)


@pytest.mark.parametrize("use, exponents", [("A", (1, 0, 0)), ("B", (0, 0, 1)), ("D", (0, 1, 0))])
def test_one_opinion(use, exponents):
    system = small(use=use)
    answers, text = system.last_embeddings(system.encode_image(photo())), system.encode_text(WORDS)
    classifier, words = system.network.classifier, text.mean()
    p = system.class_probabilities(answers, text)
    chosen = dict(A=answers.A, B=answers.B, D=answers.D)[use]
    close(p[..., :-1] / (1 - p[..., -1:]), (classifier.scale * chosen @ words.T).softmax(-1), 1e-4)
    close(p[..., -1], classifier.logits(answers.A, words).softmax(-1)[..., -1], 1e-6)


def test_exponents_sum_to_one():
    for alpha, beta, gamma in ((0.09, 0.3, 0.7), (0.12, 0.4, 0.6)):
        logits = torch.randn(2, 3, 6)
        for flags in (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
            p = adaptive_balance(logits, logits, logits, flags, alpha, beta, gamma)
            close(p[..., :-1] / (1 - p[..., -1:]), logits[..., :-1].softmax(-1), 1e-5)
            a, b, d = (torch.randn(1, 1, 3) for _ in range(3))
            x = alpha if flags.all() else beta
            expected = (
                (1 - x - gamma) * a[..., :-1].log_softmax(-1)
                + x * d[..., :-1].log_softmax(-1)
                + gamma * b[..., :-1].log_softmax(-1)
            ).softmax(-1)
            p = adaptive_balance(a, b, d, flags[:2], alpha, beta, gamma)
            close(p[..., :-1] / (1 - p[..., -1:]), expected, 1e-5)


def test_what_counts_as_seen():
    system = small(seen=("Cat", "couch "))
    assert system.seen(
        system.encode_text({"sofa": ["sofa", "Couch"], "cat": ["cats"], "dog": ["dog"]})
    ).tolist() == [True, False, False]
    assert system.seen(system.encode_text(["cat", "grass"])).tolist() == [True, False]
    assert small().seen(small().encode_text(WORDS)).tolist() == [True, True, True, False]
    shipped = small(overlap="published", first_word=True)
    text = shipped.encode_text("VOC-20")
    assert (
        text.embeddings.shape[1] == 1
        and shipped.seen(text).all()
        and shipped.seen(shipped.encode_text(["saxophone"])).tolist() == [False]
    )
    # a bank from elsewhere has the words that it says: diningtable, pottedplant and tvmonitor are new
    assert small().seen(text).sum() == 17


def test_seen_words_change_the_result():
    image = photo()
    one, other = (
        small(seen=value).segment(image, WORDS).scores for value in (("cat", "grass"), ("sofa", "saxophone"))
    )
    assert not np.allclose(one, other, atol=1e-4)


# ---- training


def batch(system, count=2, side=64):
    """Pictures of four colored quarters and some noise, and their labels;
    the uppermost rows are not labelled.
    """
    quarters = torch.stack([torch.tensor([0, 1, 2, 3]).roll(i).view(2, 2) for i in range(count)])
    labels = quarters.repeat_interleave(side // 2, 1).repeat_interleave(side // 2, 2)
    pixels = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])[
        labels
    ] + torch.randint(-30, 30, (count, side, side, 3), generator=torch.Generator().manual_seed(0))
    labels[:, :4] = 255
    return pixels.to(torch.uint8).movedim(-1, 1), labels


def test_loss_falls():
    system = small(keep_aspect=False)
    pixels, labels = batch(system)
    images, text, generator = (
        system.encode_batch(pixels),
        system.encode_text(WORDS),
        torch.Generator().manual_seed(0),
    )
    system.network.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(system.network.parameters(), 5e-3), []
    for _ in range(36):
        value, numbers = system.loss(images, labels, text, generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert np.mean(losses[-5:]) < 0.78 * np.mean(losses[:3]) and all(np.isfinite(list(numbers.values())))
    for name, p in system.network.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_pixels_of_the_rest_are_no_class():
    from ovss_nb.components.mask_losses import REST

    system = small(keep_aspect=False)
    pixels, labels = batch(system, 1)
    images, text = system.encode_batch(pixels), system.encode_text(WORDS)
    values = []
    for label in (255, REST):
        other = labels.clone()
        other[:, -4:] = label
        values.append(system.loss(images, other, text, torch.Generator().manual_seed(0))[0].item())
    assert np.isfinite(values).all() and values[0] == pytest.approx(values[1], rel=1e-5)


def test_words_of_the_training_are_remembered(tmp_path):
    system = small()
    assert "cat" in system.trained_words and "saxophone" not in system.trained_words
    system.set_seen_classes(Vocabulary.of({"horn": ["Saxophone", "trumpet"]}))
    # says some words only
    system.loss(
        [system.encode_image(photo())], batch(system, 1)[1], system.encode_text(WORDS), torch.Generator()
    )
    assert system.trained_words == {"saxophone", "trumpet"}
    system.save(tmp_path / "taught.safetensors")
    again = small(weights=str(tmp_path / "taught.safetensors"))
    assert (
        again.seen(again.encode_text(WORDS)).tolist() == [False, False, False, True]
        and again.describe()["seen"] != small().describe()["seen"]
    )


def test_loss_is_the_sum_of_its_parts():
    "One layer, so two answers; without points that chance could move, and with and without SSC."
    system = small(keep_aspect=False, decoder_layers=1)
    pixels, labels = batch(system)
    images, text = system.encode_batch(pixels), system.encode_text(WORDS)

    def value(**options):
        for name, one in options.items():
            object.__setattr__(system.config, name, one)
        return system.loss(images, labels, text, torch.Generator().manual_seed(3))

    (whole, numbers), (bare, _), (cosine, other) = (
        value(),
        value(ssc=0.0),
        value(ssc=10.0, ssc_normalize=True),
    )
    assert whole.item() - bare.item() == pytest.approx(
        10 * numbers["ssc"], rel=1e-3
    ) and cosine.item() - bare.item() == pytest.approx(10 * other["ssc"], rel=1e-3)
    assert set(numbers) == {"class_A", "class_B", "mask", "dice", "ssc"}
    single = 1.5 * (numbers["class_A"] + numbers["class_B"]) + 5 * (numbers["mask"] + numbers["dice"])
    assert single < bare.item() < 4 * single  # the last answer and one before it


def test_structure_is_no_loss_when_it_agrees():
    text = F.normalize(torch.randn(4, 8), dim=-1)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    targets = [(torch.tensor([2, 0]), torch.ones(2, 4, 4, dtype=torch.bool))]
    matches = [(torch.tensor([1, 3]), torch.tensor([0, 1]))]
    embeddings = torch.zeros(1, 5, 8)
    embeddings[0, 1], embeddings[0, 3] = text[2] @ rotation, text[0] @ rotation
    assert (
        ssc_loss(embeddings, text, matches, targets)
        < 1e-10
        < ssc_loss(2 * embeddings, text, matches, targets)
    )


def test_chance_comes_from_the_generator():
    system = small(keep_aspect=False)
    pixels, labels = batch(system)
    images, text = system.encode_batch(pixels), system.encode_text(WORDS)
    one, same, other = (
        system.loss(images, labels, text, torch.Generator().manual_seed(i))[0].item() for i in (1, 1, 2)
    )
    assert one == pytest.approx(same, rel=1e-5) and one != pytest.approx(other, rel=1e-6)


def test_packed_features_say_the_same():
    system = small(keep_aspect=False)
    image, text = system.encode_image(photo()), system.encode_text(WORDS)
    again = system.from_cache(system.to_cache(image))
    close(system.scores(again, text), system.scores(image, text), 1e-5)
    assert set(system.to_cache(image)) == {
        "tokens",
        "dense",
        "pooled",
        "layer1",
        "layer3",
        "map0",
        "map1",
        "map2",
        "map3",
    }
    assert set(
        small(aux_encoder=None, keep_aspect=False).to_cache(
            small(aux_encoder=None, keep_aspect=False).encode_image(photo())
        )
    ) == {"tokens", "dense", "pooled", "layer1", "layer3"}
    system.loss([again], batch(system, 1)[1], text, torch.Generator())
    assert (
        system.cache_key()
        == small(keep_aspect=False, gamma=0.5, width=32).cache_key()
        != small(keep_aspect=False, proposal_start=3).cache_key()
    )
    with pytest.raises(ValueError, match="keep_aspect"):
        small().to_cache(image)


def test_positions_are_trained_and_kept(tmp_path):
    system = small(keep_aspect=False)
    positions = system.tune()
    assert len(positions) == 2 and small(train_positions=False).tune() == []
    pixels, labels = batch(system)
    value, _ = system.loss(
        system.encode_batch(pixels), labels, system.encode_text(WORDS), torch.Generator().manual_seed(0)
    )
    value.backward()
    assert (
        all(value.grad is not None and value.grad.any() for value in positions)
        and sum(parameter.requires_grad for parameter in system.module.parameters()) == 2
    )
    with torch.no_grad():
        for one in positions:
            one -= 0.1 * one.grad.sign()
    system.save(tmp_path / "tuned.safetensors")
    encoder, aux_encoder = small_clip(), small_sam()
    loaded = EBSeg(
        encoder,
        aux_encoder=aux_encoder,
        **(SMALL | dict(weights=str(tmp_path / "tuned.safetensors"), keep_aspect=False)),
    )
    assert sorted(loaded.tuned_names) == ["aux_encoder.model.pos_embed", "model.visual.positional_embedding"]
    assert np.allclose(
        loaded.segment(photo(), WORDS).scores, system.segment(photo(), WORDS).scores, atol=1e-5
    )
    assert not np.allclose(
        small(keep_aspect=False).segment(photo(), WORDS).scores,
        system.segment(photo(), WORDS).scores,
        atol=1e-3,
    )
    assert torch.equal(
        aux_encoder.model.pos_embed, small_sam().model.pos_embed
    ) and loaded.aux_encoder.model.pos_embed.equal(system.aux_encoder.model.pos_embed)


def test_answers_follow_the_network():
    "An encoded picture is kept while the network changes: what it said before must not be repeated."
    system = small()
    image, text = system.encode_image(photo()), system.encode_text(WORDS)
    before = system.scores(image, text)
    assert system.scores(image, text).equal(before)
    with torch.no_grad():
        system.network.decoder.queries.mul_(-1)
    changed = system.scores(image, text)
    assert not torch.allclose(changed, before, atol=1e-4)
    system.reset(1)
    assert not torch.allclose(system.scores(image, text), changed, atol=1e-4)


# ---- what does not fit


class Blind(Encoder):
    name, dim, stride = "blind", 3, 16


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EBSeg(Blind(), weights="random"), "no transformer blocks"),
        (lambda: small(proposal_start=6), "from 0 to 5"),
        (lambda: small(fused_layers=(1, 2)), "fused_layers must be a list of 3"),
        (lambda: small(surgery_start=-1), "surgery_start must be a whole number from 0 up"),
        (lambda: small(aux_encoder="dino"), "no aux_encoder"),
        (lambda: small(weights=None), "no weights"),
        (lambda: small(overlap="meaning"), "overlap must be"),
        (lambda: small().scores(photo(), small().encode_text(WORDS)), "encode_image"),
        (lambda: small(gamma=1.2), "gamma must be a number from 0 to 1"),
        (lambda: small(gamma=0.8), "shares"),
        (lambda: small(groups=5), "multiple of groups"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_file_with_another_second_encoder(tmp_path):
    system = small()
    system.tune()
    system.save(tmp_path / "tuned.safetensors")
    other = ImageEncoderViT(
        depth=4,
        global_attn_indexes=(0, 1, 2, 3),
        img_size=128,
        patch_size=16,
        embed_dim=24,
        num_heads=2,
        out_chans=8,
        window_size=3,
        use_rel_pos=True,
    )
    with pytest.raises(ValueError, match="second encoder"):
        EBSeg(
            small_clip(),
            aux_encoder=SAMEncoder(randomize(other, 0), size=128, device="cpu"),
            **(SMALL | dict(weights=str(tmp_path / "tuned.safetensors"))),
        )


def test_sliding_windows_are_refused():
    from ovss_nb.systems.windows import SlidingWindows

    with pytest.raises(ValueError, match="windows"):
        SlidingWindows(small(), 96, 64).segment(photo(), WORDS)
