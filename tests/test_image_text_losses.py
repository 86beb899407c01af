"""Losses on images and sentences: by hand, against slow loops, gradients against finite differences."""

import math

import pytest
import torch
from doubles import gradients_agree, numbers, units
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
