"""Losses:
by hand, against slow loops in plain Python, their gradients against finite differences, and against EBSeg's
numbers.
"""

import itertools
import math

import doubles
import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from ovss_nb.components.image_text_losses import (
    caption_contrast,
    distillation,
    hard_negatives,
    log_mean_exp,
    matching_loss,
    noun_loss,
    score_distillation,
)
from ovss_nb.components.mask_losses import (
    mask_classification_loss,
    mask_point_losses,
    mask_targets,
    match_masks,
    pair_costs,
    point_sample,
    query_class_loss,
    ssc_loss,
    uncertain_points,
)


def numbers(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def units(*shape, seed=0):
    return F.normalize(numbers(*shape, seed=seed), dim=-1)


def gradients_agree(function, *inputs):
    "Finite differences in double precision; the losses reckon in single, so steps and tolerances are wide."
    for i, x in enumerate(inputs):
        x = x.clone().requires_grad_()

        def value(z):
            return function(*inputs[:i], z, *inputs[i + 1 :])

        (gradient,) = torch.autograd.grad(value(x), x)
        for index in range(0, x.numel(), max(1, x.numel() // 7)):
            step = torch.zeros(x.numel(), dtype=x.dtype)
            step[index] = 1e-2
            step = step.view_as(x)
            slope = (value(x.detach() + step) - value(x.detach() - step)).double() / 2e-2
            assert abs(slope - gradient.flatten()[index]) <= 2e-3 + 1e-2 * abs(slope), (i, index)
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-6


# ---- pooling


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_log_mean_exp_equals_a_loop(sharpness):
    scores = numbers(3, 5, 4, scale=3)
    pooled = log_mean_exp(scores, sharpness)
    for b in range(3):
        for k in range(4):
            slow = math.log(sum(math.exp(sharpness * float(s)) for s in scores[b, :, k]) / 5) / sharpness
            assert abs(pooled[b, k] - slow) < 1e-12
    assert torch.autograd.gradcheck(lambda x: log_mean_exp(x, sharpness), scores.requires_grad_())


def test_log_mean_exp_limits():
    scores = numbers(2, 7, 3, scale=10)
    assert log_mean_exp(scores, 1e-5).allclose(scores.mean(1), atol=1e-2) and log_mean_exp(
        scores, 1e4
    ).allclose(scores.amax(1), atol=1e-3)
    assert log_mean_exp(torch.full((1, 9, 1), 500.0)) == 500  # no overflow
    assert log_mean_exp(scores[:, :1]).allclose(scores[:, 0])
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            log_mean_exp(scores, wrong)


# ---- nouns


def slow_noun_loss(scores, targets, weights):
    B, K = scores.shape
    nouns = images = total = 0.0
    for b in range(B):
        for k in range(K):
            weight = float(targets[b, k] * weights[k])
            if not weight:
                continue
            own = math.exp(scores[b, k])
            nouns += weight * -math.log(
                own / (own + sum(math.exp(scores[b, j]) for j in range(K) if targets[b, j] == 0))
            )
            images += weight * -math.log(
                own / (own + sum(math.exp(scores[c, k]) for c in range(B) if targets[c, k] == 0))
            )
            total += weight
    return nouns / total, images / total


def some_targets():
    return torch.tensor([[1, 0, 0.75, 0], [0, 1, 0, 0], [0.75, 0, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "weights", [None, torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)], ids=["plain", "weighted"]
)
def test_noun_loss_equals_a_loop(weights):
    scores, targets = numbers(3, 4, scale=3), some_targets()
    expected = slow_noun_loss(scores, targets, torch.ones(4) if weights is None else weights)
    assert (
        torch.stack(noun_loss(scores, targets, weights))
        .double()
        .allclose(torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    )
    if weights is not None:
        assert noun_loss(scores, targets, weights)[0].isclose(noun_loss(scores, targets, 10 * weights)[0])
    for term in (0, 1):
        gradients_agree(lambda s: noun_loss(s, targets, weights)[term], scores)


def test_noun_loss_by_hand():
    over_nouns, over_images = noun_loss(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.eye(2))
    assert over_nouns.isclose(torch.tensor(2.0).log()) and over_images.isclose(torch.tensor(2.0).log())
    over_nouns, over_images = noun_loss(
        torch.tensor([[3.0, 1.0], [1.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    )
    assert over_nouns.isclose(torch.tensor(1 + math.exp(-2)).log()) and over_images.isclose(
        torch.tensor(1 + math.exp(-2)).log()
    )


def test_named_nouns_are_no_negatives_of_each_other():
    scores, targets = numbers(2, 4), torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64)
    # a named noun that rises leaves the other's term as it was
    raised = scores.clone()
    raised[0, 1] += 3
    one = torch.zeros_like(targets)
    one[0, 0] = 1
    one[0, 1] = 1e-30
    assert noun_loss(scores, one)[0].isclose(noun_loss(raised, one)[0])


def test_noun_loss_without_negatives_or_names():
    scores = numbers(2, 3).requires_grad_()
    for targets, expected in ((torch.ones(2, 3), 0.0), (torch.zeros(2, 3), 0.0)):
        loss = sum(noun_loss(scores, targets))
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss == expected and (gradient == 0).all()
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        noun_loss(scores, torch.ones(2, 4))


def test_noun_loss_survives_large_and_short_numbers():
    "Scores of a learned temperature grow, and under AMP they come as bf16."
    scores = torch.tensor([[900.0, -900.0]], requires_grad=True)
    loss = noun_loss(scores, torch.tensor([[0.0, 1.0]]))[0]
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss == 1800 and gradient.tolist() == [[1, -1]]
    short = noun_loss(numbers(3, 4).bfloat16(), some_targets())[0]
    assert short.isfinite() and abs(short - noun_loss(numbers(3, 4), some_targets())[0]) < 0.02


# ---- captions


def slow_contrast(image, text, scale, same=None):
    B, total = len(image), 0.0

    def similarity(i, j):
        return math.exp(scale * float(image[i] @ text[j]))

    def kept(i, j):
        return i == j or same is None or not same[i, j]

    for i in range(B):
        total -= math.log(similarity(i, i) / sum(similarity(i, j) for j in range(B) if kept(i, j))) / 2
        total -= math.log(similarity(i, i) / sum(similarity(j, i) for j in range(B) if kept(j, i))) / 2
    return total / B


@pytest.mark.parametrize("marked", [False, True])
def test_caption_contrast_equals_a_loop(marked):
    image, text = units(5, 8), units(5, 8, seed=1)
    owner = torch.tensor([0, 1, 0, 2, 3])
    same = owner[:, None] == owner if marked else None
    assert abs(caption_contrast(image, text, 7.0, same) - slow_contrast(image, text, 7.0, same)) < 1e-5
    gradients_agree(
        lambda i, t, s: caption_contrast(i, t, s, same), image, text, torch.tensor(7.0, dtype=torch.float64)
    )


def test_caption_contrast_by_hand():
    image = torch.eye(2)
    assert caption_contrast(image, image, 1.0).isclose(torch.tensor(1 + math.exp(-1)).log())
    assert caption_contrast(image, image, 1.0, torch.ones(2, 2)) == 0  # nothing left to beat
    # the diagonal says nothing new
    assert caption_contrast(image, image, 1.0, torch.eye(2)).isclose(caption_contrast(image, image, 1.0))
    assert caption_contrast(image[:1], image[:1], 50.0) == 0
    with pytest.raises(ValueError, match="must both be B x d"):
        caption_contrast(image, image[:1], 1.0)
    with pytest.raises(ValueError, match=r"same must be \(2, 2\)"):
        caption_contrast(image, image, 1.0, torch.ones(2, dtype=torch.bool))


# ---- teachers


def test_distillation_equals_a_loop():
    x, t, w = numbers(2, 3, 4), numbers(2, 3, 4, seed=1), numbers(2, 3, seed=2).abs()

    def slow(weights):
        return (
            sum(
                weights[i, j] * (1 - float(x[i, j] @ t[i, j] / x[i, j].norm() / t[i, j].norm()))
                for i in range(2)
                for j in range(3)
            )
            / weights.sum()
        )

    assert (
        abs(distillation(x, t) - slow(torch.ones(2, 3))) < 1e-6
        and abs(distillation(x, t, w) - slow(w)) < 1e-6
    )
    assert distillation(x, t, 5 * w).isclose(distillation(x, t, w)) and distillation(x, 3 * t).isclose(
        distillation(x, t)
    )
    gradients_agree(lambda z: distillation(z, t, w), x)


def test_distillation_by_hand():
    x, t = (
        torch.tensor([[1.0, 0], [0, 2], [3, 0]], requires_grad=True),
        torch.tensor([[5.0, 0], [4, 0], [-1, 0]], requires_grad=True),
    )
    assert (
        distillation(x, t).isclose(torch.tensor((0 + 1 + 2) / 3))
        and distillation(x, t, torch.tensor([1.0, 1, 0])) == 0.5
    )
    distillation(x, t, torch.tensor([1.0, 1, 0])).backward()
    assert t.grad is None and (x.grad[2] == 0).all() and x.grad[1].abs().max() > 0
    assert distillation(x, t, torch.zeros(3)) == 0
    with pytest.raises(ValueError, match="one shape"):
        distillation(x, t[:2])
    with pytest.raises(ValueError, match=r"weights must be \(3,\)"):
        distillation(x, t, torch.ones(3, 1))


def test_score_distillation():
    ours, theirs = numbers(2, 3, 4, scale=2), numbers(2, 3, 4, seed=1, scale=2)
    slow = 0.0
    for i in range(2):
        for j in range(3):
            p, q = theirs[i, j].softmax(0), ours[i, j].softmax(0)
            slow += sum(float(a) * math.log(a / b) for a, b in zip(p, q)) / 6
    assert abs(score_distillation(ours, theirs) - slow) < 1e-5 and score_distillation(ours, ours + 3) < 1e-6
    # a certain teacher
    assert score_distillation(torch.tensor([0.0, 0.0]), torch.tensor([500.0, 0.0])).isclose(
        torch.tensor(2.0).log()
    )
    gradients_agree(lambda z: score_distillation(z, theirs), ours)
    teacher = theirs.clone().requires_grad_()
    score_distillation(ours.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    with pytest.raises(ValueError, match="one shape"):
        score_distillation(ours, theirs[0])


# ---- matching


def test_matching_loss():
    one, labels = numbers(6, scale=2), torch.tensor([1, 0, 0, 1, 1, 0])
    slow = sum(math.log(1 + math.exp(-float(x) if y else float(x))) for x, y in zip(one, labels)) / 6
    two = torch.stack([torch.zeros(6), one], 1)
    for y in (labels, labels.bool(), labels.float()):
        assert abs(matching_loss(one, y) - slow) < 1e-6 and abs(matching_loss(two, y) - slow) < 1e-6
    gradients_agree(lambda z: matching_loss(z, labels), one)
    gradients_agree(lambda z: matching_loss(z, labels), two)
    for wrong in (one[:5], two.T, two[..., None]):
        with pytest.raises(ValueError, match="N or N x 2 for 6 labels"):
            matching_loss(wrong, labels)


def test_hard_negatives_follow_the_softmax():
    similarity, owner = numbers(5, 5, scale=2), torch.tensor([0, 1, 0, 2, 3])
    same, generator = owner[:, None] == owner, torch.Generator().manual_seed(0)
    for marked in (None, same):
        wrong = torch.eye(5, dtype=torch.bool) if marked is None else marked
        drawn = torch.stack([hard_negatives(similarity, marked, generator) for _ in range(4000)])
        share = F.one_hot(drawn, 5).double().mean(0)
        assert (share[wrong] == 0).all() and share.allclose(
            similarity.masked_fill(wrong, -torch.inf).softmax(1), atol=0.035
        )


def test_hard_negatives_repeat_and_never_hit_the_partner():
    similarity = 1000 * torch.eye(6)  # so sure of the right one that no probability is left for another
    drawn = [hard_negatives(similarity, generator=torch.Generator().manual_seed(n)) for n in range(50)]
    assert all((d != torch.arange(6)).all() for d in drawn) and drawn[3].equal(
        hard_negatives(similarity, generator=torch.Generator().manual_seed(3))
    )
    assert not hard_negatives(similarity.clone().requires_grad_()).requires_grad
    with pytest.raises(ValueError, match="Row 0 has no wrong partner among 1"):
        hard_negatives(torch.ones(1, 1))
    with pytest.raises(ValueError, match="Row 2 has no wrong partner"):
        hard_negatives(torch.ones(3, 3), torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]]))
    with pytest.raises(ValueError, match="B x B"):
        hard_negatives(torch.ones(2, 3))


# ---- masks: EBSeg's numbers (Mask2Former's formulas)


@pytest.fixture(scope="module")
def golden():
    return doubles.golden("ebseg_balance")


def golden_targets(golden):
    return [(golden[f"in.match.target_labels_{b}"], golden[f"in.match.target_masks_{b}"]) for b in range(2)]


@pytest.mark.parametrize("layer", ["final", "aux"])
def test_matching_equals_ebsegs(golden, layer):
    logits, masks, targets = (
        golden[f"in.match.{layer}.pred_logits_A"],
        golden[f"in.match.{layer}.pred_masks"],
        golden_targets(golden),
    )
    points = torch.cat([golden[f"in.match.{layer}.match_points_{b}"] for b in range(2)])
    sampled = point_sample(masks, points)
    for b, (classes, true) in enumerate(targets):
        cost = pair_costs(logits[b], sampled[b], classes, point_sample(true[None], points[b : b + 1])[0])
        assert torch.allclose(cost, golden[f"out.match.{layer}.cost_{b}"], atol=1e-5)
    for b, (queries, meant) in enumerate(match_masks(logits, masks, targets, points)):
        assert torch.equal(queries, golden[f"out.match.{layer}.query_idx_{b}"]) and torch.equal(
            meant, golden[f"out.match.{layer}.target_idx_{b}"]
        )


@pytest.mark.parametrize("layer", ["final", "aux"])
def test_losses_equal_ebsegs(golden, layer):
    masks, targets = golden[f"in.match.{layer}.pred_masks"], golden_targets(golden)
    matches = [
        (golden[f"out.match.{layer}.query_idx_{b}"], golden[f"out.match.{layer}.target_idx_{b}"])
        for b in range(2)
    ]
    for table in "AB":
        assert torch.allclose(
            query_class_loss(golden[f"in.match.{layer}.pred_logits_{table}"], targets, matches),
            golden[f"out.match.{layer}.loss_ce_{table}"],
            atol=1e-5,
        )
    predicted = torch.cat([masks[b, queries] for b, (queries, _) in enumerate(matches)])
    true = torch.cat([o[meant] for (_, o), (_, meant) in zip(targets, matches)])
    points = golden[f"in.match.{layer}.loss_points"]
    bce, dice = mask_point_losses(
        point_sample(predicted[:, None], points)[:, 0], point_sample(true[:, None], points)[:, 0], 5
    )
    assert torch.allclose(bce, golden[f"out.match.{layer}.loss_mask"], atol=1e-5) and torch.allclose(
        dice, golden[f"out.match.{layer}.loss_dice"], atol=1e-5
    )


def test_ssc_equals_ebsegs(golden):
    matches = [(golden[f"in.ssc.query_idx_{b}"], golden[f"in.ssc.target_idx_{b}"]) for b in range(2)]
    targets = [(golden[f"in.ssc.labels_{b}"], torch.zeros(0)) for b in range(2)]
    text = golden["in.balance.text_embeddings"][:7]
    assert torch.allclose(
        ssc_loss(golden["in.ssc.embeddings"], text, matches, targets), golden["out.ssc.loss"], atol=1e-6
    )
    # texts are normalized
    assert torch.allclose(
        ssc_loss(golden["in.ssc.embeddings"], 5 * text, matches, targets), golden["out.ssc.loss"], atol=1e-6
    )


# ---- masks: by hand


def scene(batch=2, seed=0):
    "Labels of four classes in blocks, with a border to ignore."
    labels = (
        torch.randint(4, (batch, 4, 5), generator=torch.Generator().manual_seed(seed))
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    labels[:, :2] = 255
    return labels


def test_targets_by_hand():
    targets = mask_targets(torch.tensor([[[3, 3, 255], [0, 3, 0]], [[255] * 3] * 2]))
    classes, masks = targets[0]
    assert classes.tolist() == [0, 3] and masks.int().tolist() == [
        [[0, 0, 0], [1, 0, 1]],
        [[1, 1, 0], [0, 1, 0]],
    ]
    assert [tuple(o.shape) for o in targets[1]] == [(0,), (0, 2, 3)]
    assert mask_targets(torch.tensor([[[0, 1]]]), ignore=0)[0][0].tolist() == [1]
    for labels in scene():
        assert torch.equal(
            sum((k + 1) * m for k, m in zip(*mask_targets(labels[None])[0])), (labels + 1) * (labels != 255)
        )
    for wrong in (torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 2, 3)):
        with pytest.raises(ValueError, match="B x H x W class indices"):
            mask_targets(wrong)


def test_point_sample_by_loops():
    maps, points = (
        numbers(2, 3, 4, 5),
        torch.rand(2, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    sampled = point_sample(maps, points)

    def pixel(b, c, i, j):
        return float(maps[b, c, i, j]) if 0 <= i < 4 and 0 <= j < 5 else 0.0

    for b in range(2):
        for p in range(20):
            x, y = float(points[b, p, 0]) * 5 - 0.5, float(points[b, p, 1]) * 4 - 0.5
            j, i = math.floor(x), math.floor(y)
            u, v = x - j, y - i
            for c in range(3):
                slow = (1 - v) * ((1 - u) * pixel(b, c, i, j) + u * pixel(b, c, i, j + 1)) + v * (
                    (1 - u) * pixel(b, c, i + 1, j) + u * pixel(b, c, i + 1, j + 1)
                )
                assert abs(sampled[b, c, p] - slow) < 1e-9
    assert torch.autograd.gradcheck(lambda m: point_sample(m, points[:, :3]), maps.requires_grad_())


def test_costs_by_loops():
    logits, x, t, classes = (
        numbers(4, 6),
        numbers(4, 7, seed=1),
        torch.rand(3, 7, generator=torch.Generator().manual_seed(2)),
        torch.tensor([4, 0, 2]),
    )
    cost = pair_costs(logits, x, classes, t, (2, 5, 3))
    for q in range(4):
        for k in range(3):
            s = x[q].sigmoid()
            bce = (
                -sum(
                    float(t[k, p]) * math.log(s[p]) + (1 - float(t[k, p])) * math.log(1 - s[p])
                    for p in range(7)
                )
                / 7
            )
            dice = 1 - (2 * float((s * t[k]).sum()) + 1) / (float(s.sum()) + float(t[k].sum()) + 1)
            assert (
                abs(cost[q, k] - (-2 * float(logits[q].softmax(0)[classes[k]]) + 5 * bce + 3 * dice)) < 1e-5
            )
    assert pair_costs(logits, 500 * x, classes, t).isfinite().all()


def test_no_assignment_is_cheaper():
    """All permutations of six queries over three targets;
    and with more targets than queries each query gets one.
    """
    labels, logits, masks = scene(2), numbers(2, 6, 5).float(), numbers(2, 6, 16, 20, seed=1).float()
    targets, points = mask_targets(labels), torch.rand(2, 200, 2, generator=torch.Generator().manual_seed(2))
    for b, (queries, meant) in enumerate(match_masks(logits, masks, targets, points)):
        classes, true = targets[b]
        cost = pair_costs(
            logits[b], point_sample(masks, points)[b], classes, point_sample(true[None], points[b : b + 1])[0]
        )
        cheapest = min(
            sum(float(cost[q, k]) for k, q in enumerate(order))
            for order in itertools.permutations(range(6), len(classes))
        )
        assert abs(cost[queries, meant].sum() - cheapest) < 1e-4 and sorted(meant.tolist()) == list(
            range(len(classes))
        )
    few = match_masks(logits[:, :2], masks[:, :2], targets, points)
    assert all(len(q) == len(m) == len(set(m.tolist())) == 2 for q, m in few)


def test_a_class_beyond_the_logits_is_refused():
    targets = [(torch.tensor([0, 5]), torch.ones(2, 4, 4, dtype=torch.bool))]
    with pytest.raises(ValueError, match=r"classes \[0, 5\], but there are logits for 5"):
        match_masks(torch.zeros(1, 3, 6), torch.zeros(1, 3, 4, 4), targets, torch.rand(1, 9, 2))


def test_a_step_that_diverges_is_left_to_the_loop():
    targets, points = mask_targets(scene(1)), torch.rand(1, 50, 2)
    for bad in (float("nan"), float("inf")):
        matches = match_masks(torch.zeros(1, 6, 5), torch.full((1, 6, 8, 8), bad), targets, points)
        assert len(matches[0][0]) == len(targets[0][0])


def test_uncertain_points_are_the_least_sure():
    maps = 5 * numbers(3, 12, 16).float()
    points = uncertain_points(maps, 100, torch.Generator().manual_seed(0))
    assert points.shape == (3, 100, 2) and points.min() >= 0 and points.max() <= 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(3, 300 + 25, 2, generator=generator)  # three times 100, and 25 from anywhere
    away = point_sample(maps[:, None], drawn[:, :300])[:, 0].abs()
    for m in range(3):
        assert torch.equal(points[m, 75:], drawn[m, 300:])
        kept = {tuple(o) for o in points[m, :75].tolist()}
        assert kept == {tuple(o) for o in drawn[m, away[m].argsort()[:75]].tolist()}
    again, other = (uncertain_points(maps, 100, torch.Generator().manual_seed(n)) for n in (0, 1))
    assert torch.equal(points, again) and not torch.equal(points, other)
    assert uncertain_points(maps[:0], 100, torch.Generator()).shape == (0, 100, 2)
    assert uncertain_points(maps, 7, torch.Generator(), oversample=1, share=1.0).shape == (3, 7, 2)
    for wrong in (dict(oversample=0.5), dict(share=1.5)):
        with pytest.raises(ValueError, match="oversample="):
            uncertain_points(maps, 10, torch.Generator(), **wrong)


def test_class_loss_by_loops():
    logits, targets = numbers(2, 5, 4), [(torch.tensor([2, 0]), None), (torch.tensor([1]), None)]
    matches = [(torch.tensor([1, 4]), torch.tensor([1, 0])), (torch.tensor([3]), torch.tensor([0]))]
    wanted = [[3, 0, 3, 3, 2], [3, 3, 3, 1, 3]]
    for weight in (0.1, 1.0):
        total = weights = 0.0
        for b in range(2):
            for q in range(5):
                w = weight if wanted[b][q] == 3 else 1.0
                total -= w * math.log(logits[b, q].softmax(0)[wanted[b][q]])
                weights += w
        assert abs(query_class_loss(logits, targets, matches, weight) - total / weights) < 1e-5
    gradients_agree(lambda z: query_class_loss(z, targets, matches), logits)


def test_mask_losses_by_hand():
    x, t = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([[0.0, 1], [1, 1]])
    bce, dice = mask_point_losses(x, t, 4)
    assert abs(bce - (math.log(2) / 2 + math.log(4 / 3) / 2 + math.log(2)) / 4) < 1e-6
    assert abs(dice - ((1 - 2.5 / 3.25) + (1 - 3 / 4)) / 4) < 1e-6
    gradients_agree(lambda z: sum(mask_point_losses(z, t, 2)), x.double())
    assert [float(o) for o in mask_point_losses(torch.zeros(0, 9), torch.zeros(0, 9), 1)] == [0, 0]


# ---- masks: all together


def drawn():
    return torch.Generator().manual_seed(0)


def test_mask_classification_is_the_sum_of_its_parts():
    logits, masks, targets = (
        numbers(2, 6, 5).float(),
        numbers(2, 6, 16, 20, seed=1).float(),
        mask_targets(scene()),
    )
    loss, parts = mask_classification_loss(
        logits, masks, targets, drawn(), points=300, weights=(1.5, 4, 3), no_object=0.2
    )
    assert torch.isclose(
        loss, torch.tensor(1.5 * parts["class"] + 4 * parts["mask"] + 3 * parts["dice"]), atol=1e-4
    )
    assert (
        abs(
            loss
            - mask_classification_loss(
                logits, masks, targets, drawn(), points=300, weights=(1.5, 4, 3), no_object=0.2
            )[0]
        )
        < 1e-5
    )
    generator = drawn()
    matches = match_masks(logits, masks, targets, torch.rand(2, 300, 2, generator=generator))
    given, same = mask_classification_loss(logits, masks, targets, generator, points=300, matches=matches)
    assert (
        abs(same["class"] - float(query_class_loss(logits, targets, matches))) < 1e-6
        and abs(same["mask"] - parts["mask"]) < 1e-5
    )
    both, several = mask_classification_loss([logits, -logits], masks, targets, drawn(), points=300)
    # the first alone is matched by
    assert (
        torch.isclose(both, given + 2 * several["class1"], atol=1e-4)
        and abs(several["class0"] - same["class"]) < 1e-5
    )


def test_gradient_reaches_the_matched_masks_and_every_class():
    logits, masks, targets = (
        numbers(2, 6, 5).float().requires_grad_(),
        numbers(2, 6, 16, 20, seed=1).float().requires_grad_(),
        mask_targets(scene()),
    )
    matches = match_masks(logits, masks, targets, torch.rand(2, 300, 2, generator=drawn()))
    mask_classification_loss(logits, masks, targets, drawn(), points=300, matches=matches)[0].backward()
    assert (logits.grad.abs().amax(-1) > 0).all() and logits.grad.isfinite().all()
    for b, (queries, _) in enumerate(matches):
        moved = masks.grad[b].abs().amax((1, 2)) > 0
        assert moved[queries].all() and moved.sum() == len(queries)


def test_pictures_without_labels():
    "One of two, or all: finite, and every input has a gradient."
    labels = scene()
    labels[1] = 255
    for empty in (labels, labels[[1, 1]]):
        logits, masks = (
            numbers(2, 6, 5).float().requires_grad_(),
            numbers(2, 6, 16, 20, seed=1).float().requires_grad_(),
        )
        loss, parts = mask_classification_loss(logits, masks, mask_targets(empty), drawn(), points=300)
        loss.backward()
        assert (
            loss.isfinite()
            and masks.grad is not None
            and masks.grad.isfinite().all()
            and (logits.grad[1].abs().amax(-1) > 0).all()
        )
    assert parts["mask"] == parts["dice"] == 0
    assert ssc_loss(logits, torch.eye(5), [(torch.arange(0), torch.arange(0))] * 2, mask_targets(empty)) == 0


def test_images_of_a_batch_do_not_mix():
    "The sums over two images are those of each alone, weighted by masks and by queries."
    logits, masks, targets = (
        numbers(2, 6, 5).float(),
        numbers(2, 6, 16, 20, seed=1).float(),
        mask_targets(scene()),
    )
    points = torch.rand(2, 300, 2, generator=drawn())
    together = match_masks(logits, masks, targets, points)
    for b in range(2):
        (alone,) = match_masks(logits[b : b + 1], masks[b : b + 1], targets[b : b + 1], points[b : b + 1])
        assert all(torch.equal(x, y) for x, y in zip(alone, together[b]))


def test_short_numbers():
    "Under AMP logits and masks come as bf16."
    logits, masks, targets = (
        numbers(2, 6, 5).float(),
        numbers(2, 6, 16, 20, seed=1).float(),
        mask_targets(scene()),
    )
    matches = match_masks(logits, masks, targets, torch.rand(2, 300, 2, generator=drawn()))
    exact, short = (
        mask_classification_loss(logits.to(o), masks.to(o), targets, drawn(), points=300, matches=matches)[0]
        for o in (torch.float32, torch.bfloat16)
    )
    assert short.dtype == torch.float32 and abs(exact - short) < 0.05 * exact


def test_one_process_of_a_group(tmp_path):
    "The number of masks is averaged over processes; with one it stays."
    logits, masks, targets = (
        numbers(2, 6, 5).float().requires_grad_(),
        numbers(2, 6, 16, 20, seed=1).float(),
        mask_targets(scene()),
    )
    alone = mask_classification_loss(logits, masks, targets, drawn(), points=300)[1]
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        grouped = mask_classification_loss(logits, masks, targets, drawn(), points=300)[1]
    finally:
        distributed.destroy_process_group()
    assert all(abs(grouped[o] - alone[o]) < 1e-6 for o in alone)


def test_ssc_by_loops():
    x, text, matches = (
        numbers(2, 5, 6),
        numbers(4, 6, seed=1),
        [(torch.tensor([4, 0]), torch.tensor([1, 0])), (torch.tensor([2]), torch.tensor([0]))],
    )
    targets = [(torch.tensor([3, 1]), None), (torch.tensor([0]), None)]
    for normalize in (False, True):
        means = []
        for b, pairs in enumerate(([(4, 1), (0, 3)], [(2, 0)])):  # query and class
            total = 0.0
            for q, k in pairs:
                for r, l in pairs:
                    a, c = (F.normalize(x[b, o], dim=0) if normalize else x[b, o] for o in (q, r))
                    total += (float(a @ c) - float(F.cosine_similarity(text[k], text[l], dim=0))) ** 2
            means.append(total / len(pairs) ** 2)
        assert abs(ssc_loss(x, text, matches, targets, normalize) - sum(means) / 2) < 1e-4
        gradients_agree(lambda z: ssc_loss(z, text, matches, targets, normalize), x)
    # An image without targets counts neither as 0 nor as anything else.
    nobody = (torch.arange(0), torch.arange(0))
    assert abs(ssc_loss(x, text, [matches[0], nobody], targets, True) - means[0]) < 1e-5
