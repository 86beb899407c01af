"""Fusion:
regions against plain indexing and F.interpolate, the formula by loops, w = 1 leaves the second encoder alone.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ovss_nb.components.fusion import FeatureFusion, sample_regions


def maps(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, 4, 6, generator=generator), torch.randn(
        batch, 5, 10, 12, generator=generator
    )


def test_the_whole_map_is_interpolation():
    second = maps()[1]
    for grid in ((4, 6), (10, 12), (20, 24), (3, 7)):
        assert torch.allclose(
            sample_regions(second, [(0, 0, 1, 1)], grid),
            F.interpolate(second, grid, mode="bilinear", align_corners=False),
            atol=1e-5,
        )


def test_regions_on_cell_edges_are_slices():
    second = maps()[1]
    for mode in ("bilinear", "bicubic", "nearest"):
        cut = sample_regions(second, [(0.2, 0.25, 0.7, 0.75), (0, 0.5, 0.5, 1)], (5, 6), mode)
        assert cut.shape == (4, 5, 5, 6)
        for i in range(2):
            assert torch.allclose(cut[2 * i], second[i, :, 2:7, 3:9], atol=1e-5) and torch.allclose(
                cut[2 * i + 1], second[i, :, :5, 6:], atol=1e-5
            )


def test_each_map_may_have_its_own_regions():
    second = maps()[1]
    own = sample_regions(second, [[(0, 0, 0.5, 1)], [(0.5, 0, 1, 1)]], (5, 12))
    assert torch.allclose(own, torch.stack([second[0, :, :5], second[1, :, 5:]]), atol=1e-5)


@pytest.mark.parametrize(
    "regions",
    [
        [(0, 0, 1)],
        [(0, 0, 1.1, 1)],
        [(-0.1, 0, 1, 1)],
        [(0.5, 0, 0.5, 1)],
        [[(0, 0, 1, 1)]] * 3,
        (0, 0, 1, 1),
    ],
)
def test_bad_regions_are_refused(regions):
    with pytest.raises(ValueError, match="regions"):
        sample_regions(maps()[1], regions, (2, 2))


def test_formula_place_by_place():
    "LM-2 and LM-3 with all defaults, one place at a time."
    torch.manual_seed(0)
    first, second = maps()
    fusion = FeatureFusion(8, 5, initial=0.7)
    nn.init.normal_(fusion.norm.weight)
    nn.init.normal_(fusion.norm.bias)
    fused = fusion(first, second)
    projected = torch.empty(2, 8, 10, 12)
    for b in range(2):
        for i in range(10):
            for j in range(12):
                projected[b, :, i, j] = F.layer_norm(
                    fusion.project.weight[:, :, 0, 0] @ second[b, :, i, j] + fusion.project.bias,
                    (8,),
                    fusion.norm.weight,
                    fusion.norm.bias,
                )
    projected = F.interpolate(projected, (4, 6), mode="bilinear")
    for b in range(2):
        for i in range(4):
            for j in range(6):
                c, s = first[b, :, i, j], projected[b, :, i, j]
                assert torch.allclose(fused[b, :, i, j], 0.7 * c + 0.3 * s / s.norm() * c.norm(), atol=1e-5)


def test_weight_1_has_no_parameters_and_asks_nobody():
    def asked():
        raise AssertionError("the second encoder was run")

    for fusion in (FeatureFusion(8, 5, weight=1.0), FeatureFusion(8, 5, weight=1)):
        first = maps()[0]
        assert fusion(first, asked) is first and fusion(first, None) is first
        assert not fusion.asks and not fusion.state_dict() and fusion.weight == 1


def test_the_function_is_asked_once_and_late():
    first, second = maps()
    asked = []
    fusion = FeatureFusion(8, 5, weight=0.25)
    out = fusion(first, lambda: asked.append(1) or second)
    assert asked == [1] and torch.equal(out, fusion(first, second)) and fusion.asks
    with pytest.raises(ValueError, match="weight=1.0"):
        fusion(first)
    with pytest.raises(ValueError, match="weight=1.0"):
        fusion(first, lambda: None)


def test_views_of_one_image():
    "Two views of each of two images: region by region as if each were alone."
    _, second = maps()
    first = torch.randn(4, 8, 4, 6)
    regions = [(0, 0, 0.5, 0.5), (0.1, 0.2, 1, 1)]
    fusion = FeatureFusion(8, 5)
    together = fusion(first, second, regions)
    for i in range(4):
        assert torch.allclose(
            together[i], fusion(first[i : i + 1], second[i // 2 : i // 2 + 1], [regions[i % 2]])[0], atol=1e-6
        )
    with pytest.raises(ValueError, match="as many regions as views"):
        fusion(first[:3], second, regions)


@pytest.mark.parametrize("kind,count", [("scalar", 1), ("channel", 8)])
def test_learned_weights_start_where_they_are_told_and_move(kind, count):
    first, second = maps()
    fusion = FeatureFusion(8, 5, weight=kind, initial=0.88)
    assert fusion.theta.numel() == count and torch.allclose(fusion.weight, torch.tensor(0.88))
    target = FeatureFusion(8, 5, weight=0.2)
    target.project, target.norm = fusion.project, fusion.norm
    optimizer = torch.optim.Adam([fusion.theta], 0.1)
    for _ in range(100):
        loss = (fusion(first, second) - target(first, second).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(fusion.weight, torch.tensor(0.2), atol=0.02)


def test_lengths():
    first, second = maps()

    def made(normalize):
        torch.manual_seed(0)
        return FeatureFusion(8, 5, weight=0.0, normalize=normalize)(first, second)

    match, unit, plain = map(made, ("match", "unit", "none"))
    assert torch.allclose(match.norm(dim=1), first.norm(dim=1), rtol=1e-4) and torch.allclose(
        unit.norm(dim=1), torch.ones(2, 4, 6), atol=1e-5
    )
    # one direction, three lengths
    for fused in (match, plain):
        assert torch.allclose(F.normalize(fused, dim=1), unit, atol=1e-5)
    assert not torch.allclose(plain.norm(dim=1), first.norm(dim=1), rtol=1e-2)
    same = FeatureFusion(8, 8, weight=0.0, project=False, normalize="none")
    assert torch.allclose(same(first, first.flip(1)), first.flip(1), atol=1e-5)


def test_a_zero_vector_stays_finite():
    first, second = maps()
    first[0, :, 0, 0] = 0
    out = FeatureFusion(8, 5)(first.requires_grad_(True), second * 0)
    out.sum().backward()
    assert out.isfinite().all() and first.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        dict(weight=1.5),
        dict(weight=-0.1),
        dict(weight="pixel"),
        dict(initial=0),
        dict(initial=1),
        dict(normalize="max"),
        dict(resize="area"),
        dict(project=False),
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        FeatureFusion(8, 5, **options)
