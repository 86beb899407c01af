"What labels say about words, against plain loops; no package of weights is needed."

import math

import pytest
import torch

from ovss_nb.training.word_labels import WordBank, any_word_loss, label_words


class Letters:
    "An encoder whose words are vectors of their letters."

    def text(self, prompts):
        rows = [
            [prompt.count(letter) + 0.01 for letter in "abcdefghijklmnopqrstuvwxyz"] for prompt in prompts
        ]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


WORDS = ["background", "dog", "puppy", "greyhound", "cat", "person", "boy", "shirt", "sky", "god"]


@pytest.fixture(scope="module")
def bank():
    return WordBank(Letters(), [*WORDS, "dog"], sentences=["{}", "{}!"])


def words_of(bank, mask):
    return {word for word, found in zip(bank.words, mask.tolist()) if found}


def test_a_bank_holds_each_word_once_in_every_sentence(bank):
    assert bank.words == WORDS and bank.embeddings.shape == (len(WORDS), 2, 26)
    assert torch.allclose(bank.embeddings.norm(dim=-1), torch.ones(len(WORDS), 2))
    assert words_of(bank, bank.mask(["sky", "unheard of"])) == {"sky"}


def test_kin_is_close_or_implied(bank):
    # by letters dog and god are one; the captions' table knows the others
    assert {"dog", "god", "puppy", "greyhound"} <= words_of(bank, bank.kin(bank.mask(["dog"])))
    assert "boy" in words_of(bank, bank.kin(bank.mask(["person"])))
    assert bank.related.diagonal().all() and torch.equal(bank.related, bank.related.T)


def test_right_and_allowed_words_of_a_set_with_a_rest(bank):
    own = label_words(bank, {3: ["dog"], 7: ["person", "boy"]}, rest=0, apart=["shirt", "dog"])
    assert words_of(bank, own.own) == {"dog", "person", "boy"}
    allowed = words_of(bank, own.allowed)
    assert {"dog", "person", "boy", "background"} <= allowed and not {"shirt", "puppy", "god"} & allowed
    assert words_of(bank, own.right[0]) == allowed - {"dog", "person", "boy"}
    assert own.known().nonzero().flatten().tolist() == [0, 3, 7]


def test_a_set_without_a_rest_does_not_speak_of_the_background(bank):
    own = label_words(bank, {0: ["sky"]})
    assert "background" not in words_of(bank, own.allowed) and own.rest is None
    with pytest.raises(ValueError, match="label 4: the bank has none of the words"):
        label_words(bank, {0: ["sky"], 4: ["zeppelin"]})


def test_loss_equals_plain_loops():
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(40, 7, generator=generator)
    right = torch.rand(40, 7, generator=generator) < 0.4
    allowed = torch.rand(40, 7, generator=generator) < 0.8
    found = any_word_loss(scores, right, allowed)
    for n in range(40):
        among = sum(math.exp(scores[n, k]) for k in range(7) if allowed[n, k])
        hit = sum(math.exp(scores[n, k]) for k in range(7) if allowed[n, k] and right[n, k])
        expected = min(20.0, math.log(among / hit)) if hit else 20.0
        assert found[n].item() == pytest.approx(expected, abs=1e-4)


def test_loss_has_finite_gradients_where_no_right_word_is_allowed():
    scores = torch.zeros(2, 3, requires_grad=True)
    right = torch.tensor([[True, False, False], [False, False, False]])
    any_word_loss(scores, right, torch.tensor([False, True, True])).sum().backward()
    assert scores.grad.isfinite().all()
