"""SAMEncoder against SamPredictor on a photograph, against plain tensor algebra written here at other sizes,
and its files, errors and gradients.
"""

import copy, sys, tempfile
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from skimage import data
from torch import nn
from torch.nn import functional as F
from doubles import randomize
from ovss_nb.encoders.sam import CHECKPOINTS, SAMEncoder, load_sam
from ovss_nb.core.optional import MissingExtra
from ovss_nb.core.images import load_image

PHOTO = load_image(Path(data.__file__).parent / "chelsea.png")  # 300 x 451
WIDTH, HEADS, PATCH, WINDOW, DIM = 32, 2, 4, 3, 16
SIZES = [(32, 32), (48, 60), (20, 44), (8, 8)]  # native; larger; mixed; smaller than a window


def tiny(seed=0, depth=2, global_blocks=(1,), **options):
    options = (
        dict(
            img_size=32,
            patch_size=PATCH,
            embed_dim=WIDTH,
            num_heads=HEADS,
            out_chans=DIM,
            window_size=WINDOW,
            use_rel_pos=True,
        )
        | options
    )
    return randomize(
        ImageEncoderViT(
            depth=depth,
            global_attn_indexes=global_blocks,
            norm_layer=lambda c: nn.LayerNorm(c, eps=1e-6),
            **options,
        ),
        seed,
    )


def encoder(model=None, **options):
    return SAMEncoder(model or tiny(), **dict(size=32, device="cpu") | options)


def images(height, width, batch=2):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width)
    )


# ---- SamPredictor


def cut(model, kept, size):
    """The image encoder of `model` at its true width with the blocks `kept` only, random, made for `size`
    pixels.
    """
    with torch.device("meta"):
        network = sam_model_registry[model]().image_encoder
    network.blocks = nn.ModuleList(network.blocks[i] for i in kept)
    network.img_size, side = size, size // 16
    network.pos_embed = nn.Parameter(torch.empty(1, side, side, network.pos_embed.shape[-1], device="meta"))
    return randomize(network.to_empty(device="cpu"))


@pytest.fixture(scope="module")
def sam():
    "The whole of SAM around ViT-B."
    return sam_model_registry["vit_b"]().eval().requires_grad_(False)


@pytest.mark.parametrize(
    "model,kept,size",
    [("vit_b", (1, 2), 1024), ("vit_b", range(12), 128), ("vit_l", (0, 5), 128), ("vit_h", (6, 7), 128)],
)
def test_dense_equals_sam_predictor(sam, model, kept, size):
    """A photograph that is not square, from the file's pixels to the embedding.

    At 1024, SAM's size, one windowed and one global block.
    """
    whole = copy.copy(sam)
    whole._modules = dict(sam._modules) | {"image_encoder": cut(model, kept, size)}
    predictor = SamPredictor(whole)
    predictor.set_image(PHOTO)
    ours = SAMEncoder(whole, size=size, device="cpu")
    x = ours.preprocess(PHOTO)
    pixels = torch.from_numpy(predictor.transform.apply_image(PHOTO)).permute(2, 0, 1)[None]
    assert x.shape == (1, 3, size, size) and (x - whole.preprocess(pixels)).abs().max() <= 1e-6
    expected = predictor.get_image_embedding()
    assert expected.shape == (1, 256, size // 16, size // 16) and expected.std() > 0.3
    with torch.inference_mode():
        dense = ours.dense(x)
    assert (dense - expected).abs().max() <= 1e-5


# ---- the reference: numpy in double precision, one image at a time, loops instead of batches


def resample(old, new, kernel, reach):
    "Interpolation with the half-pixel convention and clamped borders as a matrix new x old."
    matrix = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(center)) - reach + 1, int(np.floor(center)) + reach + 1):
            matrix[i, min(max(j, 0), old - 1)] += kernel(abs(center - j))
    return matrix


def linear(d):
    return max(0, 1 - d)


def cubic(d, a=-0.75):
    return (
        (a + 2) * d**3 - (a + 3) * d**2 + 1
        if d <= 1
        else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        if d < 2
        else 0
    )


class Reference:
    def __init__(self, network):
        self.network, self.w = network, {k: v.double().numpy() for k, v in network.state_dict().items()}

    def norm(self, x, name):
        centerd = x - x.mean(-1, keepdims=True)
        return (
            centerd / np.sqrt((centerd**2).mean(-1, keepdims=True) + 1e-6) * self.w[f"{name}.weight"]
            + self.w[f"{name}.bias"]
        )

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def distances(self, table, count):
        """Vectors for the distance from each of `count` places to each other, count x count x c;
        the table is stretched linearly.
        """
        table = resample(len(table), 2 * count - 1, linear, 1) @ table
        return np.stack([[table[i - j + count - 1] for j in range(count)] for i in range(count)])

    def attend(self, x, name):
        h, w, _ = x.shape
        q, k, v = np.split(self.linear(x, f"{name}.qkv").reshape(h * w, -1), 3, -1)
        vertical, horizontal = (
            self.distances(self.w[f"{name}.rel_pos_{each}"], n) for each, n in (("h", h), ("w", w))
        )
        row, column = np.divmod(np.arange(h * w), w)
        out, size = np.zeros_like(v), WIDTH // HEADS
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            logits = q[:, part] @ k[:, part].T / np.sqrt(size)
            for i in range(h * w):
                logits[i] += (vertical[row[i], row] + horizontal[column[i], column]) @ q[i, part]
            weights = np.exp(logits - logits.max(1, keepdims=True))
            out[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
        return self.linear(out, f"{name}.proj").reshape(h, w, -1)

    def block(self, x, i):
        name, window = f"blocks.{i}", self.network.blocks[i].window_size
        h, w, _ = x.shape
        y = self.norm(x, f"{name}.norm1")
        if not window:
            y = self.attend(y, f"{name}.attn")
        else:
            out = np.zeros_like(y)
            for top in range(0, h, window):
                for left in range(0, w, window):
                    filled = np.zeros((window, window, WIDTH))
                    real = y[top : top + window, left : left + window]
                    filled[: real.shape[0], : real.shape[1]] = real
                    out[top : top + window, left : left + window] = self.attend(filled, f"{name}.attn")[
                        : real.shape[0], : real.shape[1]
                    ]
            y = out
        x = x + y
        hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.lin1")
        return x + self.linear(
            hidden * (1 + torch.erf(torch.from_numpy(hidden) / 2**0.5).numpy()) / 2, f"{name}.mlp.lin2"
        )

    def run(self, image):
        "Outputs of each block, h x w x C, and of the neck, DIM x h x w."
        h, w = image.shape[1] // PATCH, image.shape[2] // PATCH
        patches = image.reshape(3, h, PATCH, w, PATCH).transpose(1, 3, 0, 2, 4).reshape(h, w, -1)
        x = patches @ self.w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + self.w["patch_embed.proj.bias"]
        table = self.w["pos_embed"][0]
        x = x + np.einsum(
            "ij,jkc,lk->ilc", resample(len(table), h, cubic, 2), table, resample(table.shape[1], w, cubic, 2)
        )
        outputs = []
        for i in range(len(self.network.blocks)):
            x = self.block(x, i)
            outputs.append(x)
        x = self.norm(x @ self.w["neck.0.weight"][:, :, 0, 0].T, "neck.1")
        framed, out = np.pad(x, ((1, 1), (1, 1), (0, 0))), 0
        for dy in range(3):
            for dx in range(3):
                out = out + framed[dy : dy + h, dx : dx + w] @ self.w["neck.2.weight"][:, :, dy, dx].T
        return outputs, self.norm(out, "neck.3").transpose(2, 0, 1)


@pytest.mark.parametrize("size", SIZES, ids=lambda case: f"{case[0]}x{case[1]}")
@pytest.mark.parametrize(
    "blocks", [dict(depth=2, global_blocks=(1,)), dict(depth=3, global_blocks=(0, 2))], ids=str
)
def test_other_sizes_equal_plain_algebra(blocks, size):
    network, x = tiny(**blocks), images(*size)
    ours = encoder(network)
    dense, layers = ours.dense(x), ours.layers(x, list(range(len(network.blocks))))
    assert dense.shape == (2, DIM, size[0] // PATCH, size[1] // PATCH) and layers[0].shape == (
        2,
        WIDTH,
        size[0] // PATCH,
        size[1] // PATCH,
    )
    for b in range(2):
        outputs, neck = Reference(network).run(x[b].double().numpy())
        assert np.abs(dense[b].double().numpy() - neck).max() <= 1e-5
        for ours_i, expected in zip(layers, outputs):
            assert np.abs(ours_i[b].permute(1, 2, 0).double().numpy() - expected).max() <= 1e-5


def test_reference_and_encoder_equal_the_package_at_its_own_size():
    network, x = tiny(), images(32, 32)
    expected = network(x)
    assert (encoder(network).dense(x) - expected).abs().max() <= 1e-5
    assert (
        np.abs(Reference(network).run(x[0].double().numpy())[1] - expected[0].double().numpy()).max() <= 1e-5
    )


# ---- pyramid and layers


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (40, 24)], ids=str)
def test_pyramid_resizes_the_global_blocks(size):
    ours, x = encoder(tiny(depth=6, global_blocks=(0, 2, 3, 5))), images(*size)
    levels = ours.pyramid(x)
    assert ours.global_blocks == (0, 2, 3, 5)
    # the patch is 4: strides 1, 2, 4, 8
    assert [tuple(level.shape[1:]) for level in levels] == [
        (WIDTH, size[0] // s, size[1] // s) for s in (1, 2, 4, 8)
    ]
    for level, output, scale in zip(levels, ours.layers(x, [0, 2, 3, 5]), (4, 2, 1, 0.5)):
        h, w = output.shape[2:]
        vertical, horizontal = (resample(n, int(n * scale), linear, 1) for n in (h, w))
        assert (
            np.abs(
                np.einsum("ij,bcjk,lk->bcil", vertical, output.double().numpy(), horizontal)
                - level.double().numpy()
            ).max()
            <= 1e-5
        )


def test_pyramid_refuses_what_has_no_four_levels():
    with pytest.raises(ValueError, match="multiples of 8"):
        encoder(tiny(depth=4, global_blocks=(0, 1, 2, 3))).pyramid(images(36, 32))
    with pytest.raises(ValueError, match=r"four blocks.*\[1\]"):
        encoder().pyramid(images(32, 32))


def test_published_global_blocks_and_widths():
    for model, width, blocks in (
        ("vit_b", 768, (2, 5, 8, 11)),
        ("vit_l", 1024, (5, 11, 17, 23)),
        ("vit_h", 1280, (7, 15, 23, 31)),
    ):
        with torch.device("meta"):
            network = sam_model_registry[model]().image_encoder
        ours = SAMEncoder(network, device="meta")
        assert (ours.width, ours.dim, ours.stride, ours.size, ours.global_blocks) == (
            width,
            256,
            16,
            1024,
            blocks,
        )


def test_layers_keep_order_and_stop_early():
    ours, x, ran = encoder(tiny(depth=4, global_blocks=(1, 3))), images(20, 44), []
    for i, block in enumerate(ours.blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: ran.append(i))
    a, b, c = ours.layers(x, [2, 0, 2])
    assert ran == [0, 1, 2] and torch.equal(a, c) and not torch.equal(a, b)
    for wrong in ([4], [-1], []):
        with pytest.raises(ValueError, match="0 to 3"):
            ours.layers(x, wrong)


def test_images_of_a_batch_do_not_meet():
    ours, x = encoder(tiny(depth=4, global_blocks=(0, 1, 2, 3))), images(32, 48, batch=3)
    for together, alone in zip(
        [ours.dense(x), *ours.pyramid(x)],
        zip(*[[ours.dense(each[None]), *ours.pyramid(each[None])] for each in x]),
    ):
        assert (together - torch.cat(alone)).abs().max() <= 1e-5
    other = x.clone()
    other[1] = 7
    assert (ours.dense(other)[[0, 2]] - ours.dense(x)[[0, 2]]).abs().max() <= 1e-6
    assert (ours.dense(other)[1] - ours.dense(x)[1]).abs().max() > 0.1


# ---- positions


def test_other_sizes_leave_the_weights_alone():
    network = tiny(depth=4, global_blocks=(0, 1, 2, 3))
    before, ours = copy.deepcopy(network.state_dict()), encoder(network)
    native, fingerprint = ours.dense(images(32, 32)), ours.fingerprint
    for size in SIZES:
        ours.dense(images(*size))
    ours.pyramid(images(48, 64))
    assert before.keys() == ours.model.state_dict().keys() and all(
        torch.equal(tensor, before[k]) for k, tensor in ours.model.state_dict().items()
    )
    assert encoder(network).fingerprint == fingerprint and torch.equal(ours.dense(images(32, 32)), native)


def test_positions_are_remembered_but_never_stale_nor_many():
    ours = encoder()
    first = ours.positions((5, 7))
    assert ours.positions((5, 7)) is first and ours.positions((8, 8)) is ours.model.pos_embed
    ours.model.pos_embed.mul_(2)
    assert torch.allclose(ours.positions((5, 7)), 2 * first, atol=1e-6)
    ours.model.load_state_dict(tiny(seed=1).state_dict())
    assert (ours.positions((5, 7)) - first).abs().max() > 0.1
    exact = ours.positions((5, 7)).clone()
    ours.model.to(torch.bfloat16)
    assert ours.positions((5, 7)).dtype == torch.bfloat16
    ours.to(torch.float32)
    # rounded on the way, and so is what is remembered
    assert 0 < (ours.positions((5, 7)) - exact).abs().max() < 0.02
    ours.model.pos_embed = nn.Parameter(tiny().pos_embed.clone(), requires_grad=False)
    assert torch.allclose(ours.positions((5, 7)), first)
    for seed in range(20):  # a new table may get the address of one that is gone
        ours.model.pos_embed = None
        ours.model.pos_embed = nn.Parameter(torch.full((1, 8, 8, WIDTH), float(seed)), requires_grad=False)
        assert torch.allclose(ours.positions((5, 7)), torch.tensor(float(seed)), atol=1e-4)
    for side in range(1, 40):
        ours.positions((side, 3))
    assert len(ours._positions) <= 8


def test_gradients_reach_images_and_unfrozen_positions():
    ours, x = encoder(tiny().requires_grad_()), images(20, 44).requires_grad_()
    with torch.inference_mode():  # what is remembered here must not disturb training
        assert torch.equal(ours.dense(x), encoder().dense(x))
    ours.dense(x).square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad.abs().amax((2, 3)) > 0).all()
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ours.model.pos_embed.requires_grad_()
    ours.dense(x.detach()).square().sum().backward()
    gradient = ours.model.pos_embed.grad.clone()
    assert (
        gradient.isfinite().all()
        and gradient.abs().max() > 0
        and all(parameter.grad is None for n, parameter in ours.model.named_parameters() if n != "pos_embed")
    )
    # a difference quotient in double precision agrees
    exact = copy.deepcopy(ours).to(torch.float64)
    step = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            exact.model.pos_embed.add_(sign * 1e-4 * step)
            tokens = exact.embed(x.detach())
            # the package's own blocks; `dense` would round to fp32
            for block in exact.blocks:
                tokens = block(tokens)
            values.append(exact.model.neck(tokens.permute(0, 3, 1, 2)).square().sum())
            exact.model.pos_embed.sub_(sign * 1e-4 * step)
    assert torch.isclose((values[0] - values[1]) / 2e-4, (gradient.double() * step).sum(), rtol=1e-2)


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_bf16_is_close(size):
    full, half = encoder(), encoder(precision="bf16")
    x = images(*size)
    a, b = full.dense(x), half.dense(x)
    assert (
        half.dtype == torch.bfloat16
        and b.dtype == torch.float32
        and half.layers(x, [1])[0].dtype == torch.float32
    )
    assert F.cosine_similarity(a, b, dim=1).min() > 0.99 and 0 < (a - b).abs().max() < 0.2 * a.std()


# ---- files


def stand_in(model):
    "State dict of the whole of SAM with the right names and shapes and no memory: one zero, repeated."
    with torch.device("meta"):
        whole = sam_model_registry[model]()
    return {k: torch.zeros(1).expand(tensor.shape) for k, tensor in whole.state_dict().items()}


def test_checkpoints_go_round(sam):
    """A file as Meta publishes it, the same in safetensors, and the encoder alone in half precision:
    all give the network back.
    """
    randomize(sam)
    expected = sam.image_encoder.state_dict()
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.save(sam.state_dict(), folder / "whole.pth")
        save_file(sam.state_dict(), folder / "whole.safetensors")
        dense = []
        for file in ("whole.pth", "whole.safetensors"):
            ours = SAMEncoder("vit_b", folder / file, device="cpu")
            assert ours.model.state_dict().keys() == expected.keys()
            assert all(
                torch.equal(tensor, expected[k]) and tensor.dtype == torch.float32
                for k, tensor in ours.model.state_dict().items()
            )
            assert (
                ours.name == "sam vit_b"
                and not any(parameter.requires_grad for parameter in ours.parameters())
                and not ours.model.training
            )
            dense.append((ours.dense(x), ours.fingerprint))
            (folder / file).unlink()
        assert torch.equal(dense[0][0], dense[1][0]) and dense[0][1] == dense[1][1]
        assert torch.allclose(dense[0][0], SAMEncoder(sam, device="cpu").dense(x), atol=1e-6)
        torch.save({k: tensor.half() for k, tensor in expected.items()}, folder / "encoder.pth")
        ours = SAMEncoder("vit_b", str(folder / "encoder.pth"), device="cpu")
        assert ours.dtype == torch.float32 and torch.equal(
            ours.model.pos_embed, expected["pos_embed"].half().float()
        )


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_every_architecture_is_recognised(tmp_path, model):
    torch.save(stand_in(model), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 1e6  # shapes without memory
    network = load_sam(model, tmp_path / "weights.pth")
    with torch.device("meta"):
        expected = sam_model_registry[model]().image_encoder.state_dict()
    assert {k: tensor.shape for k, tensor in network.state_dict().items()} == {
        k: tensor.shape for k, tensor in expected.items()
    }
    for other in CHECKPOINTS.keys() - {model}:
        with pytest.raises(
            ValueError,
            match=f"holds {model}, not {other}: pass model='{model}', or the file {CHECKPOINTS[other][0]}",
        ):
            SAMEncoder(other, tmp_path / "weights.pth", device="cpu")


def test_missing_and_unknown_weights_say_what_to_do(tmp_path):
    for model, (file, _) in CHECKPOINTS.items():
        for checkpoint in (None, tmp_path / "absent.pth"):
            with pytest.raises(ValueError, match=file) as e:
                SAMEncoder(model, checkpoint)
            assert f"https://dl.fbaipublicfiles.com/segment_anything/{file}" in str(e.value)
    with pytest.raises(ValueError, match="vit_b, vit_l, vit_h"):
        SAMEncoder("vit_g", "random")
    with pytest.raises(ValueError, match="There is no file"):
        SAMEncoder("vit_b", tmp_path)  # a folder


def test_other_networks_are_refused(tmp_path):
    weights = {
        k: tensor
        for k, tensor in stand_in("vit_b").items()
        if not k.startswith("image_encoder.blocks.7.attn")
    }
    torch.save(weights, tmp_path / "short.pth")
    with pytest.raises(
        ValueError, match=r"does not fit vit_b \(6 tensors differ\): blocks.7.attn.proj.bias is missing"
    ):
        load_sam("vit_b", tmp_path / "short.pth")
    torch.save({"vision_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, tmp_path / "renamed.pth")
    with pytest.raises(
        ValueError, match="names and shapes of segment_anything are needed.*sam_vit_b_01ec64.pth"
    ):
        load_sam("vit_b", tmp_path / "renamed.pth")
    weights = stand_in("vit_b") | {"image_encoder.pos_embed": torch.zeros(1).expand(1, 40, 40, 768)}
    torch.save(weights, tmp_path / "resized.pth")
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 40, 40, 768\), expected \(1, 64, 64, 768\)"):
        load_sam("vit_b", tmp_path / "resized.pth")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_damaged_files_are_named_and_pickles_never_run(tmp_path):
    torch.save({"image_encoder.pos_embed": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    torch.save(stand_in("vit_b"), tmp_path / "good.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    torch.save({"model": {"pos_embed": torch.zeros(1)}}, tmp_path / "nested.pth")
    for name in ("bomb.pth", "half.pth", "empty.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_sam("vit_b", tmp_path / name)
    # the wrapping is taken off, and then too little is there
    with pytest.raises(ValueError, match=r"does not fit vit_b.*missing"):
        load_sam("vit_b", tmp_path / "nested.pth")
    assert not (tmp_path / "exploded").exists()


def test_random_weights_must_be_asked_for():
    torch.manual_seed(3)
    a = load_sam("vit_b", "random").patch_embed.proj.weight
    torch.manual_seed(3)
    b = load_sam("vit_b", "random").patch_embed.proj.weight
    assert torch.equal(a, b) and a.std() > 0


def test_without_the_extra(monkeypatch):
    for name in [module for module in sys.modules if module.split(".")[0] == "segment_anything"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"pip install 'ovss_nb\[sam\]'"):
        SAMEncoder("vit_b", "random")
    with pytest.raises(MissingExtra, match=r"pip install 'ovss_nb\[sam\]'"):
        load_sam("vit_b", "random")


# ---- the contract


def test_what_sam_cannot_do_is_said():
    ours = encoder()
    with pytest.raises(TypeError, match="no text tower.*CLIPEncoder"):
        ours.text(["cat"])
    with pytest.raises(TypeError, match="`dense`, `layers` or `pyramid`"):
        ours.encode(images(32, 32))


@pytest.mark.parametrize(
    "shape", [(2, 3, 30, 32), (2, 4, 32, 32), (3, 32, 32), (0, 3, 32, 32), (1, 3, 0, 32)], ids=str
)
def test_other_shapes_are_refused(shape):
    for reading in (encoder().dense, lambda x: encoder().layers(x, [0])):
        with pytest.raises(ValueError, match="multiples of 4"):
            reading(torch.zeros(shape))


def test_other_options_are_refused():
    for options, message in (
        (dict(size=30), "multiple of 4"),
        (dict(size=0), "size must be"),
        (dict(precision="fp8"), "'fp32' or 'bf16'"),
        (dict(checkpoint="random"), "leave `checkpoint` away"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(**options)
    with pytest.raises(ValueError, match="Linear is no image encoder of SAM"):
        SAMEncoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="with absolute positions"):
        encoder(tiny(use_abs_pos=False))


def test_fingerprint_sees_weights_and_windows():
    assert encoder().fingerprint == encoder().fingerprint
    # native size 8 x 8: the same weights, seen through a window
    one, other = tiny(), tiny()
    other.blocks[1].window_size = 8
    assert (
        len(
            {encoder(each).fingerprint for each in (one, other, tiny(seed=1))}
            | {encoder(precision="bf16").fingerprint}
        )
        == 4
    )


@pytest.mark.parametrize("shape", [(90, 200), (200, 90), (64, 64), (113, 256), (1000, 3), (5, 7)], ids=str)
def test_frame_equals_the_package_at_any_shape(sam, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    ours = encoder(tiny(patch_size=16, img_size=128), size=128)
    framed = ours.preprocess(image)
    height, width = (max(1, int(side * 128 / max(shape) + 0.5)) for side in shape)
    assert (
        framed.shape == (1, 3, 128, 128)
        and (framed[..., height:, :] == 0).all()
        and (framed[..., width:] == 0).all()
    )
    # torchvision cannot make a picture without columns; SAM's rule leaves none here
    if shape != (1000, 3):
        transform = SamPredictor(sam).transform
        transform.target_length = 128
        pixels = torch.from_numpy(transform.apply_image(image)).permute(2, 0, 1)
        expected = (pixels - sam.pixel_mean) / sam.pixel_std
        assert (framed[0, :, :height, :width] - expected).abs().max() <= 1e-5


def test_squash_and_other_ways_to_resize():
    ours = encoder(tiny(patch_size=16, img_size=128), size=128)
    squashed, pair, shorter = (
        ours.preprocess(PHOTO, 96, pad=False),
        ours.preprocess(PHOTO, (64, 112)),
        ours.preprocess(PHOTO, 64, keep_aspect=True),
    )
    assert (
        squashed.shape == (1, 3, 96, 96) and pair.shape == (1, 3, 64, 112) and shorter.shape == (1, 3, 64, 96)
    )
    from PIL import Image

    pixels = np.asarray(Image.fromarray(PHOTO).resize((96, 96), Image.Resampling.BILINEAR))
    expected = (pixels - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert np.abs(squashed[0].permute(1, 2, 0).numpy() - expected).max() <= 1e-5
    with pytest.raises(ValueError, match="multiple of 16"):
        ours.preprocess(PHOTO, 100)


def test_copies_are_independent():
    ours, x = encoder(), images(20, 44)
    before = ours.dense(x)
    other = copy.deepcopy(ours)
    other.model.pos_embed.mul_(-1)
    assert (other.dense(x) - before).abs().max() > 0.1 and torch.equal(ours.dense(x), before)
