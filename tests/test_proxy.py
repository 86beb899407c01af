"""Proxy encoders: small networks of timm's on images of any size, from files and by description."""

import pytest
import timm
import torch
from doubles import close, small_clip
from huggingface_hub import constants
from ovss_nb.core.options import OptionError
from ovss_nb.encoders.proxy import EncoderProxy, TimmProxy, fit_pixels, pixels_of
from ovss_nb.encoders.registry import PROXIES, create_proxy, list_proxies
from safetensors.torch import save_file


def small(name="vit_small_patch16_224.dino", **options):
    torch.manual_seed(0)
    options = dict(embed_dim=24, depth=2, num_heads=2) | options
    return (
        timm.create_model(name, num_classes=0, dynamic_img_size=True, **options).requires_grad_(False).eval()
    )


def image(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("read", ["tokens", "qk", "values", "keys"])
def test_batch_gives_what_single_images_give(name, read):
    proxy, pixels = TimmProxy(small(name), read=read, device="cpu"), image(64, 96, 3)
    together = proxy(pixels)
    assert together.shape == (3, 24, 4, 6) and together.dtype == torch.float32
    for item in range(3):
        close(together[item : item + 1], proxy(pixels[item : item + 1]), 1e-5)


def test_queries_keys_values_are_those_of_the_last_block():
    network = small()
    proxy, pixels = TimmProxy(network, read="qk", device="cpu"), image(32, 80)
    mean, std = (
        torch.tensor(three).view(3, 1, 1) for three in (network.pretrained_cfg[k] for k in ("mean", "std"))
    )
    tokens = []
    handle = network.blocks[-1].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    network((pixels / 255 - mean) / std)
    handle.remove()
    block = network.blocks[-1]
    table = block.attn.qkv(block.norm1(tokens[0]))[0, 1:]  # without class token
    ours = proxy(pixels)[0]
    for row in range(2):
        for column in range(5):
            line = table[row * 5 + column]
            close(ours[:, row, column], line[:24] + line[24:48], 1e-5)


@pytest.mark.parametrize("size", [(100, 64), (7, 300), (225, 33)])
@pytest.mark.parametrize("name", ["vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"])
def test_patches_that_do_not_divide_the_image(size, name):
    proxy = TimmProxy(small(name, img_size=56), device="cpu")
    grid = tuple(max(1, round(side / 14)) for side in size)
    pixels = image(*size)
    features = proxy(pixels)
    assert features.shape == (1, 24, *grid)
    close(features, proxy(fit_pixels(pixels, 14)), 1e-5)


def test_normalized_windows_of_clip_come_back_as_pixels():
    encoder, proxy = small_clip(), TimmProxy(small(), device="cpu")
    pixels = image(64, 96)
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (encoder.mean, encoder.std))
    normalized = (pixels / 255 - mean) / std
    close(proxy(pixels_of(normalized, encoder)), proxy(pixels), 1e-4)
    with pytest.raises(ValueError, match="pixels_of"):
        proxy(normalized)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_directions(precision):
    pixels = image(64, 96)
    full = TimmProxy(small(), device="cpu")(pixels)
    half = TimmProxy(small(), precision=precision, device="cpu")(pixels)
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(full, half, dim=1).min() > 0.99


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(small().state_dict(), path)
    with pytest.raises(ValueError, match="(?s)does not fit.*timm/vit_small_patch16_224.dino"):
        TimmProxy("vit_small_patch16_224.dino", path, device="cpu")
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        TimmProxy("vit_small_patch16_224.dino", path, device="cpu")


def test_without_a_network_the_file_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="offline.*huggingface.co/timm/vit_small_patch16_224.dino"):
        create_proxy("dino:vits16", device="cpu")


def test_middle_of_clip_is_its_block():
    encoder = small_clip(layers=6)
    proxy, pixels = create_proxy("middle", encoder), image(64, 48)
    assert isinstance(proxy, EncoderProxy) and proxy.layer == 4
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (encoder.mean, encoder.std))
    (expected,) = encoder.layers((pixels / 255 - mean) / std, [4])
    close(proxy(pixels), expected, 1e-5)
    assert proxy.fingerprint != create_proxy("middle:3", encoder).fingerprint


@pytest.mark.parametrize(
    "spec, message",
    [
        ("dinno:vitb8", "did you mean 'dino'"),
        ("dino:vitb9/random", "did you mean 'vitb8'|There are"),
        ("stem", "no stem of its own"),
        ("stem:3", "cannot be"),
        ("middle:7", "blocks 0 to 3"),
        ("middle:-1", "counted from 0"),
        ("timm:resnet_five/random", "timm has no network"),
        ("", "no proxy"),
    ],
)
def test_wrong_descriptions_say_what_there_is(spec, message):
    with pytest.raises(ValueError, match=message):
        create_proxy(spec, small_clip())


def test_every_kind_says_what_it_is():
    assert list(list_proxies()) == list(PROXIES) and all(list_proxies().values())
    with pytest.raises(OptionError, match="'fp16'"):
        create_proxy("timm:vit_tiny_patch16_224/random", precision="int8", device="cpu")
