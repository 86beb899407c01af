"""Losses on masks: EBSeg's numbers, by hand, against slow loops, gradients against finite differences."""

import itertools
import math

import pytest
import torch
import doubles
from doubles import gradients_agree, numbers
from torch import distributed
from torch.nn import functional as F

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
    true = torch.cat([masks[meant] for (_, masks), (_, meant) in zip(targets, matches)])
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
    assert [tuple(part.shape) for part in targets[1]] == [(0,), (0, 2, 3)]
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
        kept = {tuple(point) for point in points[m, :75].tolist()}
        assert kept == {tuple(point) for point in drawn[m, away[m].argsort()[:75]].tolist()}
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
    assert [float(loss) for loss in mask_point_losses(torch.zeros(0, 9), torch.zeros(0, 9), 1)] == [0, 0]


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
        logits, masks, targets, drawn(), loss_points=300, weights=(1.5, 4, 3), no_object=0.2
    )
    assert torch.isclose(
        loss, torch.tensor(1.5 * parts["class"] + 4 * parts["mask"] + 3 * parts["dice"]), atol=1e-4
    )
    assert (
        abs(
            loss
            - mask_classification_loss(
                logits, masks, targets, drawn(), loss_points=300, weights=(1.5, 4, 3), no_object=0.2
            )[0]
        )
        < 1e-5
    )
    generator = drawn()
    matches = match_masks(logits, masks, targets, torch.rand(2, 300, 2, generator=generator))
    given, same = mask_classification_loss(
        logits, masks, targets, generator, loss_points=300, matches=matches
    )
    assert (
        abs(same["class"] - float(query_class_loss(logits, targets, matches))) < 1e-6
        and abs(same["mask"] - parts["mask"]) < 1e-5
    )
    both, several = mask_classification_loss([logits, -logits], masks, targets, drawn(), loss_points=300)
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
    mask_classification_loss(logits, masks, targets, drawn(), loss_points=300, matches=matches)[0].backward()
    assert (logits.grad.abs().amax(-1) > 0).all() and logits.grad.isfinite().all()
    for b, (queries, _) in enumerate(matches):
        moved = masks.grad[b].abs().amax((1, 2)) > 0
        assert moved[queries].all() and moved.sum() == len(queries)


def test_images_without_labels():
    "One of two, or all: finite, and every input has a gradient."
    labels = scene()
    labels[1] = 255
    for empty in (labels, labels[[1, 1]]):
        logits, masks = (
            numbers(2, 6, 5).float().requires_grad_(),
            numbers(2, 6, 16, 20, seed=1).float().requires_grad_(),
        )
        loss, parts = mask_classification_loss(logits, masks, mask_targets(empty), drawn(), loss_points=300)
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
        mask_classification_loss(
            logits.to(dtype), masks.to(dtype), targets, drawn(), loss_points=300, matches=matches
        )[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert short.dtype == torch.float32 and abs(exact - short) < 0.05 * exact


def test_one_process_of_a_group(tmp_path):
    "The number of masks is averaged over processes; with one it stays."
    logits, masks, targets = (
        numbers(2, 6, 5).float().requires_grad_(),
        numbers(2, 6, 16, 20, seed=1).float(),
        mask_targets(scene()),
    )
    alone = mask_classification_loss(logits, masks, targets, drawn(), loss_points=300)[1]
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        grouped = mask_classification_loss(logits, masks, targets, drawn(), loss_points=300)[1]
    finally:
        distributed.destroy_process_group()
    assert all(abs(grouped[name] - alone[name]) < 1e-6 for name in alone)


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
                    a, c = (F.normalize(x[b, k], dim=0) if normalize else x[b, k] for k in (q, r))
                    total += (float(a @ c) - float(F.cosine_similarity(text[k], text[l], dim=0))) ** 2
            means.append(total / len(pairs) ** 2)
        assert abs(ssc_loss(x, text, matches, targets, normalize) - sum(means) / 2) < 1e-4
        gradients_agree(lambda z: ssc_loss(z, text, matches, targets, normalize), x)
    # An image without targets counts neither as 0 nor as anything else.
    nobody = (torch.arange(0), torch.arange(0))
    assert abs(ssc_loss(x, text, [matches[0], nobody], targets, True) - means[0]) < 1e-5
