"""Masks:
SOS tokens against EBSeg's and SAN's numbers and against the concatenated form, positions and pooling by hand.
"""

import math
import open_clip
import doubles
from doubles import golden_weights
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.encoders.lite import LiteEncoder
from ovss_nb.text.text_bank import TextBank
from ovss_nb.encoders.attention import block_attention, carry, propose, sos_bias
from ovss_nb.components.mask_classification import TextClassifier, mask_pool, mask_scores, sine_positions

SPLIT = 4  # of six blocks
CASES = ["native", "resized", "shared_bias"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(**vision):
    "An open_clip model in which every parameter is random, so that a forgotten one shows."
    vision = dict(image_size=64, patch_size=16, width=64, layers=6, head_width=16) | vision
    model = (
        open_clip.CLIP(
            32, vision, dict(context_length=8, vocab_size=10, width=32, heads=2, layers=1), quick_gelu=True
        )
        .eval()
        .requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(
            noise / p[0].numel() ** 0.5 if p.ndim > 1 else noise * 0.2 + (1 if name.endswith("weight") else 0)
        )
    return CLIPEncoder(model, dense_mode="tokens", device="cpu")


@pytest.fixture(scope="module", params=["plain", "layer scale", "lite"])
def tower(request):
    return (
        LiteEncoder("random", device="cpu")
        if request.param == "lite"
        else tiny(ls_init_value=0.3 if request.param == "layer scale" else None)
    )


@pytest.fixture(scope="module")
def golden():
    return doubles.golden("ebseg_sos_attention")


@pytest.fixture(scope="module")
def encoder(golden):
    encoder = tiny()
    encoder.visual.load_state_dict(golden_weights(golden))
    return encoder


def at_split(encoder, images, split=SPLIT):
    tokens = encoder.embed(images)
    for block in encoder.blocks[:split]:
        tokens = block(tokens)
    return tokens


def end(encoder, sos, unit=True):
    return F.normalize(encoder.project(sos), dim=-1) if unit else encoder.project(sos)


# ---- the public codes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("resize", ["max", "bilinear"])
def test_ebseg_proposals(golden, encoder, case, resize):
    images, bias = golden[f"in.{case}.image"], golden[f"in.{case}.attn_bias"]
    tokens = at_split(encoder, images)
    assert torch.allclose(
        tokens[:, 1:].mT.unflatten(-1, encoder.grid(images)), golden[f"out.{case}.patch_feat_4"], atol=1e-5
    )
    sos, _ = propose(encoder.blocks[SPLIT:], tokens, sos_bias(bias, encoder.grid(images), resize))
    assert torch.allclose(end(encoder, sos), golden[f"out.{case}.sos_embed_{resize}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_bias_at_the_places(golden, encoder, case):
    "Against EBSeg's full mask: SOS rows, patch columns."
    ours = sos_bias(golden[f"in.{case}.attn_bias"], encoder.grid(golden[f"in.{case}.image"]))
    full = golden[f"out.{case}.formatted_bias_max"]
    assert torch.allclose(ours.expand(-1, 4, -1, -1), full[:, :, :5, 6:], atol=1e-6)
    assert (full[:, :, :5, 5] == -100).all() and (full[:, :, 5:, :5] == -100).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["cross", "concat"])
def test_san_proposals(golden, encoder, case, form):
    images = golden[f"in.{case}.image"]
    tokens, blocks = at_split(encoder, images), encoder.blocks[SPLIT:]
    first, second = (
        sos_bias(golden[f"in.{case}.{name}"], encoder.grid(images), "bilinear")
        for name in ("attn_bias", "attn_bias_second_layer")
    )
    for bias, name in ((first, "shared_bias_all_layers"), ([first, second], "per_layer_bias")):
        assert torch.allclose(
            end(encoder, propose(blocks, tokens, bias)[0], unit=False),
            golden[f"out.{case}.san_sos_{form}_{name}"],
            atol=2e-5,
            rtol=1e-5,
        )
    assert (
        propose(blocks, tokens, first)[0] - propose(blocks, tokens, [first, second])[0]
    ).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_ebseg_second_path(case, encoder):
    """Embeddings D together with the proposals, opened after the first of six blocks;
    the bias does not touch them.
    """
    golden = doubles.golden("ebseg_surgery")
    images = golden[f"in.{case}.image"]
    tokens, second = carry(encoder.blocks[1:SPLIT], encoder.blocks[0](encoder.embed(images)))
    assert torch.allclose(
        second.transpose(0, 1), golden[f"out.{case}.last_surgery_tokens"], atol=1e-5, rtol=0
    )
    assert torch.allclose(
        tokens[:, 1:].mT.flatten(2), golden[f"out.{case}.plain_patch_feat_4"].flatten(2), atol=1e-5, rtol=0
    )
    assert torch.allclose(tokens[:, 0], golden[f"out.{case}.plain_cls_token_4"][0], atol=1e-5, rtol=0)
    bias = 5 * random(len(tokens), 4, 3, tokens.shape[1] - 1)
    for finish in (True, False):
        *_, third = propose(encoder.blocks[SPLIT:], tokens, bias, surgery=second, finish=finish)
        assert torch.allclose(
            end(encoder, third[:, 1:]).mT.unflatten(-1, encoder.grid(images)),
            golden[f"out.{case}.dense_map"],
            atol=1e-5,
            rtol=0,
        )


def test_the_second_path_is_the_encoders_own():
    images, plain = random(2, 3, 96, 64), tiny()
    vv = CLIPEncoder(plain.model, dense_mode="vv", device="cpu")
    tokens, second = carry(vv.blocks[vv.surgery_start :], at_split(vv, images, vv.surgery_start))
    assert torch.allclose(vv.project(second[:, 1:]).mT.unflatten(-1, (6, 4)), vv.dense(images), atol=1e-5)
    assert torch.allclose(vv.pool(tokens), vv.encode(images).pooled, atol=1e-5)


# ---- what holds for any bias


def test_class_token_and_patches_are_plain_clip(tower):
    encoder = tower
    images = random(2, 3, 4 * encoder.stride, 6 * encoder.stride)
    tokens, heads = at_split(encoder, images, 1), encoder.blocks[0].attn.num_heads
    plain = at_split(encoder, images, len(encoder.blocks))
    for factor in (0.0, 1.0, 100.0, 1e4):
        sos, after = propose(encoder.blocks[1:], tokens, factor * random(2, heads, 7, 24))
        assert torch.allclose(after, plain, atol=2e-5) and sos.isfinite().all()
    assert torch.allclose(encoder.project(plain[:, 1:]), encoder.project(after[:, 1:]), atol=2e-5)


def concatenated(blocks, tokens, bias):
    "As the papers write it: one long sequence, one large mask, -100 for blocked."
    count, heads = bias.shape[2], blocks[0].attn.num_heads
    x = torch.cat([tokens[:, :1].expand(-1, count, -1), tokens], 1)
    mask = torch.zeros(len(x), heads, x.shape[1], x.shape[1])
    mask[..., :count] = -100
    mask[..., range(count), range(count)] = 0
    mask[..., :count, count] = -100
    mask[..., :count, count + 1 :] = bias
    for block in blocks:
        x = block(x, attn_mask=mask.flatten(0, 1))
    return x[:, :count], x[:, count:]


def test_the_concatenated_form(tower):
    encoder = tower
    tokens, heads = (
        at_split(encoder, random(2, 3, 3 * encoder.stride, 5 * encoder.stride), 2),
        encoder.blocks[0].attn.num_heads,
    )
    bias = 3 * random(2, heads, 6, 15)
    for ours, slow in zip(
        propose(encoder.blocks[2:], tokens, bias), concatenated(encoder.blocks[2:], tokens, bias)
    ):
        assert torch.allclose(ours, slow, atol=2e-5)


def test_one_proposal_at_a_time():
    "Proposals do not see each other, nor one picture another."
    encoder = tiny()
    tokens, bias = at_split(encoder, random(2, 3, 64, 48)), 3 * random(2, 4, 5, 12)
    together = propose(encoder.blocks[SPLIT:], tokens, bias)[0]
    for b in range(2):
        for n in range(5):
            assert torch.allclose(
                propose(encoder.blocks[SPLIT:], tokens[b : b + 1], bias[b : b + 1, :, n : n + 1])[0][0, 0],
                together[b, n],
                atol=1e-5,
            )


def test_bias_steers():
    """A patch that is hidden does not count;
    a bias that is the same everywhere only weighs a token against itself; one for all heads is repeated.
    """
    encoder = tiny()
    tokens, blocks = at_split(encoder, random(1, 3, 64, 64)), encoder.blocks[SPLIT:]
    bias = random(1, 1, 2, 16)
    assert torch.allclose(
        propose(blocks, tokens, bias)[0], propose(blocks, tokens, bias.expand(-1, 4, -1, -1))[0], atol=1e-6
    )
    hidden = bias.clone()
    hidden[..., 10:] = -torch.inf
    short = propose(blocks[:1], tokens[:, :11], bias[..., :10])[0]
    assert torch.allclose(propose(blocks[:1], tokens, hidden)[0], short, atol=1e-5)
    assert (propose(blocks, tokens, bias)[0] - propose(blocks, tokens, bias + 5)[0]).abs().max() > 1e-3


def test_proposals_may_start_elsewhere():
    encoder = tiny()
    tokens, blocks, bias = (
        at_split(encoder, random(2, 3, 64, 48)),
        encoder.blocks[SPLIT:],
        random(2, 4, 5, 12),
    )
    plain = propose(blocks, tokens, bias)[0]
    assert torch.equal(propose(blocks, tokens, bias, cls=tokens[:, :1])[0], plain)
    own = tokens[:, :1] + random(1, 5, 64, seed=1)
    other = propose(blocks, tokens, bias, cls=own)[0]
    assert (
        torch.allclose(
            other[:, 3], propose(blocks, tokens, bias[:, :, 3:4], cls=own[:, 3:4])[0][:, 0], atol=1e-5
        )
        and (other - plain).abs().max() > 1e-2
    )


def test_unfinished_tokens_change_nothing_else():
    encoder = tiny()
    tokens, blocks, bias = at_split(encoder, random(2, 3, 64, 48), 3), encoder.blocks[3:], random(2, 4, 5, 12)
    full, short = propose(blocks, tokens, bias), propose(blocks, tokens, bias, finish=False)
    assert torch.equal(full[0], short[0]) and torch.allclose(blocks[-1](short[1]), full[1], atol=1e-5)


def test_gradient_flows_into_the_bias_alone():
    encoder = tiny()
    bias = random(2, 4, 5, 9).requires_grad_()
    sos, tokens = propose(encoder.blocks[SPLIT:], at_split(encoder, random(2, 3, 48, 48)), bias)
    assert not tokens.requires_grad
    sos.square().sum().backward()
    assert bias.grad.isfinite().all() and (bias.grad.flatten(2).abs().amax(-1) > 0).all()
    assert all(p.grad is None for p in encoder.parameters())
    assert bias.grad.sum(-1).abs().max() > 1e-6  # unlike a plain softmax, a token competes with itself


def test_half_precision():
    encoder = tiny()
    tokens, bias = at_split(encoder, random(2, 3, 64, 48)), random(2, 4, 5, 12)
    plain = propose(encoder.blocks[SPLIT:], tokens, bias)[0]
    with torch.autocast("cpu", torch.bfloat16):
        short = propose(encoder.blocks[SPLIT:], tokens, bias)[0]
    assert (short.float() - plain).abs().max() < 0.1 * plain.abs().max()


def test_a_bias_that_does_not_fit_is_refused():
    encoder = tiny()
    tokens, blocks = at_split(encoder, random(2, 3, 64, 48)), encoder.blocks[SPLIT:]
    for wrong in (random(2, 4, 5, 13), random(2, 3, 5, 12), random(3, 4, 5, 12), random(2, 5, 12)):
        with pytest.raises(ValueError, match="bias must be"):
            propose(blocks, tokens, wrong)
    with pytest.raises(ValueError, match="1 biases for 2 blocks"):
        propose(blocks, tokens, [random(2, 4, 5, 12)])
    with pytest.raises(ValueError, match="bias must be"):
        propose(blocks, tokens, [random(2, 4, 5, 12), random(2, 4, 6, 12)])
    with pytest.raises(ValueError, match="no transformer block"):
        propose([nn.Linear(64, 64)], tokens, random(2, 4, 5, 12))
    with pytest.raises(ValueError, match="resize"):
        sos_bias(random(1, 1, 1, 4, 4), (2, 2), "mean")
    with pytest.raises(ValueError, match="B x heads x N"):
        sos_bias(random(1, 1, 4, 4), (2, 2))


# ---- attention


def test_block_attention_equals_torchs(tower):
    encoder = tower
    block = encoder.blocks[1]
    width, heads = block.attn.embed_dim, block.attn.num_heads
    queries, keys, bias = random(2, 3, width), random(2, 7, width, seed=1), random(2, heads, 3, 7, seed=2)
    for mask in (None, bias, bias[:, :1]):
        full = None if mask is None else mask.expand(-1, heads, -1, -1).flatten(0, 1)
        slow = block.ls_1(
            block.attn(
                block.ln_1(queries), block.ln_1(keys), block.ln_1(keys), need_weights=False, attn_mask=full
            )[0]
        )
        assert torch.allclose(block_attention(block, queries, keys, mask), slow, atol=1e-5)


# ---- positions


def test_positions_equal_mask2formers():
    assert torch.allclose(
        sine_positions(8, 12, 32).expand(2, -1, -1, -1),
        doubles.golden("ebseg_decoder")["out.pos_embed_2"],
        atol=1e-5,
    )
    ours = sine_positions(3, 5, 8)  # and the formula once more, entry by entry
    for c in range(8):
        for i in range(3):
            for j in range(5):
                place = (i + 1) / (3 + 1e-6) if c < 4 else (j + 1) / (5 + 1e-6)
                angle = 2 * math.pi * place / 10000 ** (2 * (c % 4 // 2) / 4)
                assert abs(ours[0, c, i, j] - (math.sin, math.cos)[c % 2](angle)) < 1e-5
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_positions(3, 5, 6)


# ---- pooling and scores


def test_mask_pool_place_by_place():
    features, masks = random(2, 3, 4, 5), random(2, 6, 4, 5, seed=1)
    masks[1, 2] = -1
    pooled = mask_pool(features, masks)
    for b in range(2):
        for n in range(6):
            chosen = features[b][:, masks[b, n] > 0]
            assert torch.allclose(
                pooled[b, n], chosen.mean(1) if chosen.numel() else torch.zeros(3), atol=1e-5
            )
    with pytest.raises(ValueError, match="resize one"):
        mask_pool(features, masks[..., :4])


def test_mask_pool_gradient():
    features, masks = random(1, 3, 4, 5).requires_grad_(), random(1, 2, 4, 5, seed=1).requires_grad_()
    mask_pool(features, masks).sum().backward()
    assert masks.grad is None and torch.allclose(features.grad.sum(), torch.tensor(6.0))


def test_classifier():
    torch.manual_seed(0)
    classifier, text, x = (
        TextClassifier(16, 30.0),
        F.normalize(random(4, 16), dim=-1),
        random(2, 5, 16, seed=1),
    )
    logits = classifier.logits(x, text)
    assert logits.shape == (2, 5, 5) and torch.allclose(logits[..., :4], 30 * x @ text.T, atol=1e-4)
    assert torch.allclose(
        logits[..., 4], 30 * x @ (classifier.background / classifier.background.norm()), atol=1e-4
    )
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(classifier.logits(x, text[order]), logits[..., [2, 0, 3, 1, 4]], atol=1e-5)
    assert torch.allclose(classifier.logits(2 * x, text), 2 * logits, atol=1e-4)
    logits[..., 4].sum().backward()
    assert (
        classifier.background.grad.abs().max() > 0 and 0.1 < TextClassifier(10000).background.std() * 100 < 10
    )


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_several_texts_of_a_class(pooling):
    classifier, x = TextClassifier(16, 30.0), random(2, 5, 16, seed=1)
    rows = [F.normalize(random(n, 16, seed=n), dim=-1) for n in (3, 1, 2)]
    filled = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    bank = TextBank(filled, filled.any(-1), ("a", "b", "c"), (("a",), ("b",), ("c",)), ("{}",))
    logits = classifier.compare(x, bank, pooling)
    assert logits.shape == (2, 5, 4) and torch.allclose(
        logits[..., 3], classifier.logits(x, rows[0])[..., -1], atol=1e-4
    )
    for k, texts in enumerate(rows):
        slow = (
            30 * x @ F.normalize(texts.mean(0), dim=0) if pooling == "mean" else (30 * x @ texts.T).amax(-1)
        )
        assert torch.allclose(logits[..., k], slow, atol=1e-4)


def test_scores_by_loops():
    logits, masks = random(2, 3, 5), random(2, 3, 2, 4, seed=1)
    scores = mask_scores(logits, masks)
    assert scores.shape == (2, 4, 2, 4)
    for b in range(2):
        for k in range(4):
            slow = sum(logits[b, q].softmax(0)[k] * masks[b, q].sigmoid() for q in range(3))
            assert torch.allclose(scores[b, k], slow, atol=1e-6)
    with pytest.raises(ValueError, match="queries"):
        mask_scores(logits, masks[:, :2])
