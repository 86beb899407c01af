"Small stand-ins that several test files share."

import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F
from ovss_nb.encoders.base import Encoder, ImageFeatures
from ovss_nb.encoders.clip import CLIPEncoder
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
RECIPES = Path(__file__).parents[2] / "shared/golden/recipes"


def golden(name):
    """Tensors of `tests/golden/NAME.safetensors` by name, those that it shares with another file included.

    Names that end in `_strideN` hold every N-th row and column: see `thinned`.
    """
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        others = (file.metadata() or {}).get("others")
    tensors = load_file(path)
    if others:
        shared = golden(others)
        tensors |= {key: shared[key] for key in shared if key.startswith(("w.", "in."))}
    return tensors


def recipes_golden(name):
    """Tensors of a published recipe, run by its authors' own modules on random weights, and its network.

    They stay outside of the project, as some of the repositories have no license: the test skips where they
    are not. The network is open_clip's CLIP with the file's image tower, or None for a file without one.
    """
    path = RECIPES / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"numbers of the authors' code lie outside of the project, here is no {path.name}")
    with safe_open(path, "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
    tensors = load_file(path)
    if "layers" not in config:
        return tensors, None
    vision = {key: config[key] for key in ("layers", "width", "image_size")}
    vision |= dict(patch_size=config["patch"], head_width=config["width"] // config["heads"])
    text = dict(context_length=8, vocab_size=16, width=16, heads=2, layers=1)
    model = open_clip.CLIP(config["output_dim"], vision, text, quick_gelu=config["activation"] == "QuickGELU")
    model.visual.load_state_dict(golden_weights(tensors, "visual."))
    return tensors, model.eval().requires_grad_(False)


class WithPositions(CLIPEncoder):
    "An encoder that takes a table of positions as it is, in place of its own resized one."

    positions = None

    def embed(self, images):
        if self.positions is None:
            return super().embed(images)
        visual = self.visual
        x = visual.conv1(images).flatten(2).mT
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        return visual.ln_pre(x + self.positions)


def recipe_encoder(tensors, model, size, **options):
    "An encoder around a recipe's network, with the authors' position table for images of a size, e.g. 48x64."
    encoder = WithPositions(model, device="cpu", **options)
    encoder.positions = tensors.get(f"input.positions.{size}", tensors.get(f"check.positions.{size}"))
    return encoder


def same(ours, theirs, tolerance=1e-5):
    "Equal shapes, and no number further off than a share of the largest."
    close(ours, theirs, tolerance * float(theirs.abs().max()))


def golden_weights(tensors, prefix="w."):
    "The weights among golden tensors, under their original names."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def thinned(maps, step=2):
    "Every `step`-th row and column of maps, as large ones are stored."
    return maps[..., ::step, ::step]


def close(ours, theirs, tolerance=1e-5):
    "Equal shapes, and no number further off than `tolerance`."
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = (ours - theirs).abs().max()
    assert difference <= tolerance, float(difference)


def small_clip_model(patch=16, layers=4, quick_gelu=True, seed=0, vocab_size=49408):
    "open_clip's own CLIP, tiny and random: a ViT of width 32 on a grid of 4 x 4."
    torch.manual_seed(seed)
    vision = dict(image_size=4 * patch, patch_size=patch, width=32, layers=layers, head_width=16)
    text = dict(context_length=77, vocab_size=vocab_size, width=32, heads=2, layers=1)
    return open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu)


def small_clip(**options):
    "An encoder around `small_clip_model`, which takes the options."
    return CLIPEncoder(small_clip_model(**options), tokenizer=open_clip.SimpleTokenizer(), device="cpu")


def randomize(module, seed=0, scale=1.0):
    """Every parameter random and large enough to matter, so that a forgotten or swapped one shows.

    Matrices have unit gain times `scale`, norms are near one, tables of positions and embeddings are noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "pos" in name or "embed" in name and "patch" not in name:
                parameter.copy_(noise / 2)
            elif parameter.ndim > 1:
                parameter.copy_(scale * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + name.endswith("weight"))
    return module.eval().requires_grad_(False)


class Colors(Encoder):
    "Red, green, blue as a space of three dimensions, and three words for them."

    name, dim, stride, size, mean, std = "colors", 3, 16, 48, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3), requires_grad=False)

    def encode(self, images):
        return ImageFeatures(torch.nn.functional.avg_pool2d(images, 16), images.mean((2, 3)))

    def text(self, prompts):
        return torch.stack([self.weight[1 * ("green" in p) + 2 * ("blue" in p)] for p in prompts])


def finite_difference(value, module, place, amount=1e-5):
    "Central difference of `value()` by one entry of what `module` is given."

    def nudged(sign):
        def push(_, inputs):
            changed = inputs[0].clone()
            changed[place] += sign * amount
            return (changed,)

        handle = module.register_forward_pre_hook(push)
        try:
            return float(value())
        finally:
            handle.remove()

    return (nudged(1) - nudged(-1)) / (2 * amount)


def numbers(*shape, seed=0, scale=1.0):
    "Normal numbers in double precision, the same every time."
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def units(*shape, seed=0):
    "Vectors of length one."
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
