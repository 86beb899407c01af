"Region proposals, PAMR, the vote in regions and LPOSS against the authors' numbers and plain loops."

import json
import math
import sys

import numpy as np
import pytest
import torch
from doubles import recipes_golden
from PIL import Image
from torch.nn import functional as F

from ovss_nb.components.lposs import PixelGraph, conjugate_gradients, lposs, lposs_plus, patch_graph
from ovss_nb.components.lposs import patch_locations, rgb_to_lab
from ovss_nb.components.pamr import neighbor_weights, pamr, pamr_labels
from ovss_nb.components.region_proposals import (
    check_regions,
    load_whole_sam,
    paint_masks,
    propose_regions,
    sam_regions,
)
from ovss_nb.components.region_vote import region_vote
from ovss_nb.core.optional import MissingExtra
from ovss_nb.core.options import OptionError


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def picture(height, width, seed=0):
    "Soft colored blots, uint8."
    coarse = random(1, 3, 3, 4, seed=seed)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")[0]
    noise = 0.1 * random(3, height, width, seed=seed + 1)
    return (255 * (0.9 * smooth + noise)).clamp(0, 255).byte().movedim(0, -1).numpy()


def agree(ours, theirs, tolerance=1e-5):
    "Equal shapes, and differences small beside the largest value."
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# ---- PAMR


@pytest.mark.parametrize(
    "case, dilations, iterations, maps",
    [
        ("it10.d8_16", (8, 16), 10, "input.mask"),
        ("it10.d1_2_4_8_12_24", (1, 2, 4, 8, 12, 24), 10, "input.mask"),
        ("it1.d1.small", (1,), 1, "input.mask_small"),
    ],
)
def test_pamr_is_the_authors(case, dilations, iterations, maps):
    golden, _ = recipes_golden("pamr")
    image, given = golden["input.image"][0], golden[maps][0]
    agree(pamr(image, given, iterations, dilations), golden[f"expect.{case}"][0])
    # a gain and an offset of the colors change nothing
    agree(pamr(40 * image + 120, given, iterations, dilations), golden[f"expect.{case}"][0])


def plain_pamr(image, maps, iterations, dilations):
    "Pixel by pixel; `image` H x W x 3 and `maps` K x H x W of doubles."
    height, width, _ = image.shape
    at = lambda y, x: (min(max(y, 0), height - 1), min(max(x, 0), width - 1))
    ring = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    asked, weights = {}, {}
    for y in range(height):
        for x in range(width):
            asked[y, x] = [at(y + d * down, x + d * right) for d in dilations for down, right in ring]
            around = [image[q] for q in asked[y, x]]
            deviation = np.std(around + len(dilations) * [image[y, x]], axis=0, ddof=1)
            cost = [np.mean(abs(image[y, x] - other) / (1e-8 + 0.1 * deviation)) for other in around]
            likeness = np.exp(min(cost) - np.array(cost))
            weights[y, x] = likeness / likeness.sum()
    for _ in range(iterations):
        new = np.zeros_like(maps)
        for (y, x), others in asked.items():
            new[:, y, x] = sum(weight * maps[(slice(None), *q)] for weight, q in zip(weights[y, x], others))
        maps = new
    return maps


@pytest.mark.parametrize("size, dilations", [((8, 8), (1, 3)), ((6, 9), (2,)), ((5, 3), (4, 8))])
def test_pamr_against_a_loop(size, dilations):
    image, maps = picture(*size), random(3, *size)
    expected = plain_pamr(image.astype(float), maps.double().numpy(), 3, dilations)
    agree(pamr(image, maps, 3, dilations).double(), expected)


def test_pamr_of_many_classes_in_little_memory():
    image, maps = picture(24, 32), random(1000, 6, 8)
    refined = pamr(image, maps, 2, (1, 2))
    assert torch.equal(pamr_labels(image, maps, 2, (1, 2)), refined.argmax(0))
    assert torch.equal(pamr_labels(image, maps, 2, (1, 2), at_once=1), refined.argmax(0))
    few = [3, 500, 999]
    agree(pamr(image, maps[few], 2, (1, 2)), refined[few])
    assert pamr(image, maps[:1]).shape == (1, 24, 32)
    assert pamr_labels(image, maps[:1]).unique().tolist() == [0]


def test_pamr_in_half_precision_is_computed_in_single():
    image, maps = picture(24, 32), random(4, 6, 8)
    half = pamr(image, maps.bfloat16())
    assert half.dtype == torch.float32
    agree(half, pamr(image, maps.bfloat16().float()))
    assert (half.argmax(0) == pamr(image, maps).argmax(0)).float().mean() > 0.97


def test_pamr_takes_an_image_as_array_or_tensor():
    image = picture(9, 7)
    tensor = torch.tensor(image).movedim(-1, 0)
    assert torch.equal(neighbor_weights(image), neighbor_weights(tensor))
    for wrong in (image[..., 0], image[..., :2], torch.tensor(image), "image"):
        with pytest.raises(ValueError, match="H x W x 3"):
            pamr(wrong, random(2, 9, 7))
    with pytest.raises(OptionError, match="dilations"):
        pamr(image, random(2, 9, 7), dilations=(1.5,))
    with pytest.raises(ValueError, match="K x h x w"):
        pamr(image, random(0, 9, 7))


# ---- vote


def test_vote_is_the_authors():
    golden, _ = recipes_golden("corrclip")
    labels, voted = (golden[f"expect.post.{name}"][0].numpy() for name in ("without_vote", "voted"))
    regions = golden["input.regions.64x64.grid16x16"]
    assert (labels != voted).any()
    for unsegmented in ("zero", "lowest"):  # their map has a 0
        assert np.array_equal(region_vote(labels, regions, unsegmented), voted)
    # a map without 0: their code leaves one true region out
    assert not np.array_equal(region_vote(labels, regions + 1, "zero"), voted)
    assert np.array_equal(region_vote(labels, regions + 1, "lowest"), voted)


def plain_vote(labels, regions, unsegmented):
    voted = labels.copy()
    for number in set(regions.ravel().tolist()) - {unsegmented}:
        pixels = [
            (y, x) for y in range(len(labels)) for x in range(len(labels[0])) if regions[y, x] == number
        ]
        counts = {}
        for pixel in pixels:
            counts[labels[pixel]] = counts.get(labels[pixel], 0) + 1
        most = max(counts.values())
        winner = min(label for label, count in counts.items() if count == most)
        for pixel in pixels:
            voted[pixel] = winner
    return voted


@pytest.mark.parametrize("size", [(12, 12), (7, 15), (1, 20), (1, 1)])
def test_vote_against_a_loop(size):
    random = np.random.default_rng(0)
    for start in (0, 1):
        labels, regions = random.integers(0, 3, size), random.integers(start, 5, size)
        assert np.array_equal(region_vote(labels, regions), plain_vote(labels, regions, 0))
        lowest = plain_vote(labels, regions, regions.min())
        assert np.array_equal(region_vote(labels, regions, "lowest"), lowest)


def test_vote_of_large_numbers_and_many_classes():
    labels = np.array([[999, 999, 3]], np.int16)
    voted = region_vote(labels, np.array([[2**31 - 1] * 3]))
    assert voted.tolist() == [[999] * 3] and voted.dtype == np.int16
    assert np.array_equal(
        region_vote(torch.tensor([[1, 1, 2]]), torch.ones(1, 3, dtype=torch.int)), [[1, 1, 1]]
    )


def test_regions_must_fit():
    labels = np.zeros((4, 6), int)
    for regions, message in (
        (np.zeros((6, 4), int), "regions of 6 x 4 pixels do not fit an image of 4 x 6"),
        (np.zeros((4, 6)), "integers"),
        (np.zeros((1, 4, 6), int), "integers"),
        (np.full((4, 6), -1), "numbered from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            region_vote(labels, regions)
        with pytest.raises(ValueError, match=message):
            check_regions(regions, (4, 6))


# ---- LPOSS

CASES = [(128, 3, 0.01, 0.95), (40, 3, 0.01, 0.95), (20, 1, 0, 0.8)]


@pytest.mark.parametrize("neighbors, power, decay, alpha", CASES)
def test_lposs_is_the_authors(neighbors, power, decay, alpha):
    golden, _ = recipes_golden("lposs")
    name = f"k{neighbors}_gamma{power}_sigma{decay}_alpha{alpha}"
    features, logits = golden["input.features"], golden["input.predictions"]
    corners = [(int(top), int(left)) for top, _, left, _ in golden["input.locations"]]
    locations = patch_locations(corners, (8, 8), 8)
    graph = patch_graph(features, locations, neighbors, power, decay)
    agree(torch.eye(128) - alpha * torch.from_numpy(graph.toarray()), golden[f"expect.system.{name}"])
    ours = lposs(features, locations, logits, neighbors, power, decay, alpha)
    agree(ours, golden[f"expect.cg10.{name}"])
    exact = golden[f"expect.exact.{name}"]
    agree(lposs(features, locations, logits, neighbors, power, decay, alpha, steps=100), exact)
    agree(ours, exact, 4e-3)
    assert torch.equal(ours.argmax(1), exact.argmax(1))


def test_lposs_plus_is_the_authors():
    golden, _ = recipes_golden("lposs")
    rgb, lab = golden["input.rgb01"][0], golden["input.lab_scaled"].movedim(-1, 0)
    agree(rgb_to_lab(rgb) / torch.tensor([100, 128, 128])[:, None, None], lab)
    maps = golden["input.pixel_predictions"].T.contiguous()
    graph = PixelGraph(lab, reach=2, tau=0.01)
    apply = lambda rows: rows - 0.95 * (graph @ rows.view(-1, 12, 16)).flatten(1)
    agree(apply(torch.eye(192)[[0, 50]]), golden["expect.pixel.system_row0_50"])
    for steps, name in ((10, "cg10.tau0.01_neigh2_alpha0.95"), (200, "exact")):
        agree(conjugate_gradients(apply, maps, steps).T, golden[f"expect.pixel.{name}"])


def plain_system(weights, alpha):
    "I - alpha D^-1/2 W D^-1/2 of a table of weights, entry by entry."
    count = len(weights)
    degree = [sum(row) for row in weights]
    scale = [1 / math.sqrt(d) if d > 0 else 0 for d in degree]
    return np.array(
        [[(i == j) - alpha * scale[i] * weights[i][j] * scale[j] for j in range(count)] for i in range(count)]
    )


@pytest.mark.parametrize("grid, neighbors", [((3, 3), 9), ((2, 5), 4), ((1, 1), 400)])
def test_lposs_against_a_loop(grid, neighbors):
    count = 2 * grid[0] * grid[1]
    features, logits = random(count, 4, seed=1) - 0.3, random(count, 3, seed=2)
    locations = patch_locations([(0, 0), (0, 8)], grid, 8)
    x = [row / math.sqrt((row**2).sum()) for row in features.double().numpy()]
    z = [(8 * i + 4, 8 * j + 4 + 8 * w) for w in (0, 1) for i in range(grid[0]) for j in range(grid[1])]
    assert locations.tolist() == [list(point) for point in z]
    weights = [[0.0] * count for _ in range(count)]
    for i in range(count):
        alike = sorted(range(count), key=lambda j: -x[i] @ x[j])[:neighbors]
        for j in alike:
            if i != j:
                weight = max(0, x[i] @ x[j]) ** 3 * math.exp(-0.01 * math.dist(z[i], z[j]))
                weights[i][j] += weight
                weights[j][i] += weight
    expected = np.linalg.solve(plain_system(weights, 0.95), logits.double().numpy())
    agree(lposs(features, locations, logits, neighbors, steps=200).double(), expected)


@pytest.mark.parametrize("size", [(5, 5), (4, 7), (1, 6), (1, 1)])
def test_lposs_plus_against_a_loop(size):
    image, maps = picture(*size), random(2, *size, seed=3)
    lab = rgb_to_lab(torch.tensor(image).movedim(-1, 0) / 255).double().movedim(0, -1).numpy() / [
        100,
        128,
        128,
    ]
    pixels = [(y, x) for y in range(size[0]) for x in range(size[1])]
    near = lambda p, q: p != q and abs(p[0] - q[0]) <= 2 and abs(p[1] - q[1]) <= 2
    weights = [
        [math.exp(-math.dist(lab[p], lab[q]) / 0.1) if near(p, q) else 0.0 for q in pixels] for p in pixels
    ]
    expected = np.linalg.solve(plain_system(weights, 0.95), maps.double().flatten(1).T.numpy())
    agree(lposs_plus(image, maps, 2, 0.1, steps=200).flatten(1).T.double(), expected)


def test_lposs_of_one_location_a_thousand_classes_and_nothing():
    assert torch.equal(lposs(random(1, 4), torch.zeros(1, 2), random(1, 3)), random(1, 3))
    features, locations = random(12, 4), patch_locations([(0, 0)], (3, 4), 16)
    many = random(12, 1000)
    agree(lposs(features, locations, many)[:, 500:501], lposs(features, locations, many[:, 500:501]))
    assert not lposs(features, locations, 0 * many).any()
    apart = torch.eye(12)  # nobody is like anybody
    assert torch.equal(lposs(apart, locations, many), many)
    assert lposs(features.bfloat16(), locations, many.bfloat16()).dtype == torch.float32


def test_lposs_says_what_does_not_fit():
    features, locations, logits = random(12, 4), patch_locations([(0, 0)], (3, 4), 16), random(12, 2)
    for arguments, message in (
        ((features, locations[:3], logits), "locations N x 2"),
        ((features, locations, logits[:3]), "for 12 locations"),
        ((features, locations, logits > 0), "of floats"),
    ):
        with pytest.raises(ValueError, match=message):
            lposs(*arguments)
    for option in (dict(alpha=1), dict(alpha=2), dict(neighbors=0), dict(steps=0), dict(power=0)):
        with pytest.raises(ValueError, match=next(iter(option))):
            lposs(features, locations, logits, **option)
    with pytest.raises(ValueError, match="enlarge them first"):
        lposs_plus(picture(8, 8), random(2, 4, 4))


# ---- region proposals


def test_superpixels_cover_everything():
    image = picture(40, 60)
    for spec in ("slic", "slic:12", "felzenszwalb", "felzenszwalb:500"):
        regions = propose_regions(spec)(image)
        assert regions.shape == (40, 60) and regions.dtype == np.int32 and regions.min() == 1
        assert np.array_equal(regions, propose_regions(spec)(image, "some/name.jpg"))
    assert propose_regions("slic:12")(image).max() < propose_regions("slic:200")(image).max()


def test_superpixels_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(MissingExtra, match=r"ovss_nb\[regions\]"):
        propose_regions("slic")(picture(8, 8))


def test_masks_are_painted_largest_first():
    random = np.random.default_rng(0)
    masks = [random.random((9, 11)) < share for share in (0.5, 0.1, 0.9, 0.3)]
    for on_top, order in (("small", (2, 0, 3, 1)), ("large", (1, 3, 0, 2))):
        expected = np.zeros((9, 11), int)
        for number, k in enumerate(order, 1):
            expected[masks[k]] = number
        painted = paint_masks(masks, (9, 11), on_top)
        assert len(np.unique(painted)) == len(np.unique(expected))
        assert len(np.unique(painted * 10 + expected)) == len(np.unique(expected))  # the same partition
        assert np.array_equal(painted == 0, expected == 0) and painted.max() == len(np.unique(painted)) - 1


def tiny_sam():
    modeling = pytest.importorskip("segment_anything.modeling", reason="needs the extra sam")
    torch.manual_seed(0)
    shape = dict(img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2, out_chans=16)
    decoder = modeling.TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=16, num_heads=2)
    return modeling.Sam(
        modeling.ImageEncoderViT(**shape),
        modeling.PromptEncoder(16, (4, 4), (64, 64), 4),
        modeling.MaskDecoder(transformer_dim=16, transformer=decoder),
    ).eval()


def test_regions_of_segment_anything():
    sam, image = tiny_sam(), picture(48, 64)
    from segment_anything import SamAutomaticMaskGenerator

    generator = SamAutomaticMaskGenerator(
        sam, points_per_side=3, pred_iou_thresh=0.0, stability_score_thresh=0.0
    )
    masks = [mask["segmentation"] for mask in generator.generate(image)]
    assert masks
    for on_top in ("small", "large"):
        regions = sam_regions(sam, 3, 0.0, 0.0, on_top)(image)
        assert np.array_equal(regions, paint_masks(masks, (48, 64), on_top))
    assert not sam_regions(sam, 3, 1.0, 1.0)(image).any()  # nothing is good enough


def test_weights_of_segment_anything_are_asked_for():
    pytest.importorskip("segment_anything", reason="needs the extra sam")
    for spec, message in (
        ("sam", "say which weights"),
        ("sam:vit_b", "say which weights"),
        ("sam:vit_x/random", "vit_b"),
        ("sam:vit_b/no/such/file.pth", "There is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            propose_regions(spec)


def test_whole_segment_anything_from_a_file(tmp_path, monkeypatch):
    sam = tiny_sam()
    import segment_anything

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", tiny_sam)
    weights = {name: weight + 1 for name, weight in sam.state_dict().items()}
    torch.save(weights, tmp_path / "whole.pth")
    torch.save(
        {name: w for name, w in weights.items() if name.startswith("image_encoder.")}, tmp_path / "half.pth"
    )
    loaded = load_whole_sam("vit_b", tmp_path / "whole.pth").state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)
    with pytest.raises(ValueError, match="image encoder alone"):
        load_whole_sam("vit_b", tmp_path / "half.pth")
    regions = propose_regions(f"sam:vit_b/{tmp_path / 'whole.pth'}", "cpu", points_per_side=2)(
        picture(48, 64)
    )
    assert regions.shape == (48, 64)


def test_regions_from_files(tmp_path):
    image, regions = picture(6, 8), np.arange(48).reshape(6, 8) // 10
    Image.fromarray(regions.astype(np.uint8)).save(tmp_path / "a.png")
    np.savez(tmp_path / "b.npz", instance_mask=regions)
    square = {"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]], "image_id": 1}
    (tmp_path / "c.json").write_text(json.dumps([square]))
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "e.npz").write_text("no archive")
    read = propose_regions(f"file:{tmp_path}")
    assert np.array_equal(read(image, tmp_path / "x" / "a.jpg"), regions)
    assert np.array_equal(read(image, "b.jpg"), regions)
    assert read(image, "c.jpg").sum() == 16
    for name, size, message in (
        (None, 6, "this image has none"),
        ("z.jpg", 6, "no regions for 'z'"),
        ("a.jpg", 5, "a.png: regions of 6 x 8 pixels do not fit an image of 5 x 8"),
        ("d.jpg", 6, "d.json: a mask cannot be read"),
        ("e.jpg", 6, "e.npz"),
    ):
        with pytest.raises(ValueError, match=message):
            read(image[:size], name)
    listed = {"images": [{"id": 1, "file_name": "c.jpg"}], "annotations": [square]}
    (tmp_path / "all.json").write_text(json.dumps(listed))
    many = propose_regions(f"file:{tmp_path / 'all.json'}")
    assert np.array_equal(many(image, "c.png"), read(image, "c.jpg"))
    with pytest.raises(ValueError, match="has no image 'q'"):
        many(image, "q.png")
    with pytest.raises(ValueError, match="no COCO file"):
        propose_regions(f"file:{tmp_path / 'd.json'}")
