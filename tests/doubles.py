"Small stand-ins that several test files share."

import torch
from ovss_nb.encoders.base import Encoder, ImageFeatures


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
