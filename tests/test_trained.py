"""TrainedSystem:
weights files that fit and do not, stored features, and training through the four methods alone.
"""

import numpy as np
from functools import partial
import doubles
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from ovss_nb.systems.trained import TrainedSystem, state_dict_difference, read_weights, tune_queries_values
from ovss_nb.training.fit import fit
from ovss_nb.core.vocabulary import Vocabulary

small_clip = partial(doubles.small_clip, layers=3)

WORDS = ["cat", "dog", "tree"]
PHOTO = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)


class Turned(TrainedSystem):
    "Cosines of words with features that were turned by a learned matrix."

    authors = "the authors' turned.pth"

    def build(self):
        return nn.Conv2d(self.encoder.dim, self.encoder.dim, 1)

    def logits(self, images, text):
        return 20 * torch.einsum(
            "bdhw,kd->bkhw",
            F.normalize(self.network(torch.cat([image.features.dense for image in images]).float()), dim=1),
            text.mean(),
        )

    def scores(self, image, text):
        return self.logits([image], text)[0]

    def loss(self, images, labels, text, generator):
        return (
            F.cross_entropy(
                F.interpolate(self.logits(images, text), labels.shape[-2:], mode="bilinear"),
                labels,
                ignore_index=255,
            ),
            {},
        )


def turned(encoder=None, **options):
    return Turned(encoder or small_clip(), **dict(weights="random", size=64) | options)


def test_the_start_belongs_to_the_seed():
    "And nobody else's random numbers change."
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    encoder = small_clip()
    torch.manual_seed(5)
    one, two = turned(encoder), turned(encoder)
    assert torch.rand(2).equal(expected) and one.describe()["network"] == two.describe()["network"]
    two.reset(3)
    three = turned(encoder)
    three.reset(3)
    assert one.describe()["network"] != two.describe()["network"] == three.describe()["network"]
    assert (
        not any(parameter.requires_grad for parameter in two.network.parameters())
        and not two.network.training
    )


def test_what_a_system_must_give():
    class Empty(TrainedSystem):
        pass

    with pytest.raises(TypeError, match="Empty does not define `build`"):
        Empty(small_clip(), weights="random")

    class Mute(Turned):
        loss = TrainedSystem.loss

    with pytest.raises(TypeError, match="Mute does not define `loss`"):
        Mute(small_clip(), weights="random").loss([], None, None, None)
    with pytest.raises(ValueError, match="no weights.*or the authors' turned.pth.*weights='random'"):
        Turned(small_clip())


def test_files_that_do_not_fit(tmp_path):
    system, path = turned(), tmp_path / "own.safetensors"
    system.save(path, dict(note="for a test"))
    with safe_open(path, "pt") as file:
        assert file.metadata()["system"] == "Turned" and file.metadata()["note"] == "for a test"

    def refused(tensors, match):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=match):
            turned(weights=str(tmp_path / "other.safetensors"))

    state = read_weights(path)
    refused(
        state | {"network.extra": torch.zeros(2)},
        r"does not fit this configuration of Turned[\s\S]*1 unknown:\n  extra \(2\)",
    )
    refused({"network.bias": state["network.bias"]}, r"1 missing:\n  weight")
    refused(state | {"encoder.no": torch.zeros(2)}, "parts of another encoder")
    refused(state | {"sam.x": torch.zeros(1)}, "neither the authors' nor ours")
    for name, content in (("a.pth", b"PK"), ("b.safetensors", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="There is no file .*, or the authors' turned.pth"):
        turned(weights=str(tmp_path / "none.pth"))
    torch.save({"model": {"a": 3}}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="no plain table"):
        read_weights(tmp_path / "c.pth")


def test_the_authors_names(tmp_path):
    class Published(Turned):
        def convert_checkpoint(self, path, state):
            return (
                ({name[7:]: tensor for name, tensor in state.items()}, {})
                if all(name.startswith("theirs.") for name in state)
                else None
            )

    system = turned()
    torch.save(
        {"model": {f"theirs.{name}": tensor for name, tensor in system.network.state_dict().items()}},
        tmp_path / "turned.pth",
    )
    assert (
        Published(small_clip(), weights=str(tmp_path / "turned.pth"), size=64).describe()["network"]
        == system.describe()["network"]
    )
    with pytest.raises(ValueError, match="neither the authors' nor ours"):
        turned(weights=str(tmp_path / "turned.pth"))


def test_stored_features():
    system = turned()
    bank, image = system.encode_text(WORDS), system.encode_image(PHOTO)
    again = system.from_cache({name: tensor.half() for name, tensor in system.to_cache(image).items()})
    assert (
        again.image is None and (system.scores(again, bank) - system.scores(image, bank)).abs().max() < 0.05
    )
    assert system.cache_key() == turned(weights="random").cache_key() != turned(size=96).cache_key()
    with pytest.raises(ValueError, match="keep_aspect=false"):
        turned(keep_aspect=True).to_cache(image)
    assert (
        system.tune() == []
        and system.set_seen_classes(Vocabulary.of(WORDS)) is None
        and len(system.encode_images([PHOTO, PHOTO])) == 2
    )


def test_crops_bring_gradients_into_a_tuned_encoder():
    system = turned()
    tune_queries_values(system.encoder)
    crops = torch.from_numpy(np.stack([PHOTO, PHOTO[::-1]])).permute(0, 3, 1, 2)
    seen = system.encode_batch(crops)
    assert (
        len(seen) == 2
        and np.array_equal(seen[1].image, PHOTO[::-1])
        and seen[0].features.dense.shape == (1, 24, 4, 4)
    )
    system.loss(seen, torch.randint(0, 3, (2, 32, 32)), system.encode_text(WORDS).select([0, 1, 2]), None)[
        0
    ].backward()
    towers = {
        name.split(".")[1]
        for name, parameter in system.encoder.named_parameters()
        if parameter.grad is not None
    }
    assert towers == {"visual"}  # the bank was made beforehand


def test_training_through_the_contract(tmp_path):
    "Stored features, a loss and `fit` are all it takes; what was saved says what the trained system says."
    system = turned()
    bank = system.encode_text(WORDS)
    kept = [
        {name: tensor.half() for name, tensor in system.to_cache(system.encode_image(image)).items()}
        for image in (PHOTO, PHOTO[:, ::-1].copy())
    ]
    labels = torch.randint(0, 2, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    labels[:, :2] = 255

    def batches(number, generator):
        return dict(images=[system.from_cache(value) for value in kept], generator=generator)

    def step(_, batch):
        return system.loss(batch["images"], labels, bank.select([0, 2]), batch["generator"])

    system.network.requires_grad_(True).train()
    log = fit(system.module, step, batches, tmp_path / "run", steps=12, lr=0.01, log_every=1, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    system.save(tmp_path / "turned.safetensors")
    loaded = turned(system.encoder, weights=str(tmp_path / "turned.safetensors"))
    image = system.encode_image(PHOTO)
    assert (
        loaded.scores(image, bank).allclose(system.scores(image, bank).detach(), atol=1e-6)
        and loaded.tuned_names == []
    )


def test_differences_are_short():
    text = state_dict_difference(
        {f"b{i}": torch.zeros(2) for i in range(9)}, {"a": torch.zeros(()), "b0": torch.zeros(3)}
    )
    assert (
        text.splitlines()[:2] == ["1 missing:", "  a (scalar)"]
        and "  and 3 more" in text
        and text.endswith("  b0: 2, expected 3")
    )
