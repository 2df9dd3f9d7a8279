"""Absorption against hand-worked words, planted letters, scikit-learn's probes and plain forward passes.

tests/exchange/test_adapter.py compares it with SAEBench's own code.
"""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saeflow.config import ROOT, validate
from saeflow.errors import UserError
from saeflow.evaluation.absorption import (  # fmt: skip
    Words,
    absorb,
    absorbed,
    fit_probes,
    measure,
    split_latents,
)
from saeflow.evaluation.spelling import LETTERS, activations, first_letter, prompts, words_of

SETTINGS: dict[str, Any] = {
    "template": "{word} has the first letter:", "examples": 3, "words": None, "train_share": 0.7, "max_k": 3,
    "f1_jump": 0.03, "l1": 0.01, "min_probe_f1": 0.6, "min_letters": 2, "full_cosine": 0.025, "fraction_cosine": 0.1,
    "projection_share": 0.4, "absorbers": 3, "seed": 0,
}  # fmt: skip


def unit(*values: float) -> np.ndarray:
    return np.array(values) / np.linalg.norm(values)


def test_hand_worked_words() -> None:
    """The probe reads coordinate 0; latent 0 is the letter's own; what latents write there is their value x cosine."""
    directions = np.stack(
        [
            unit(1, 0, 0, 0),  # the letter's own, cosine 1
            unit(1, 1, 0, 0),  # 0.7071
            unit(1, 0, 99**0.5, 0),  # 0.1
            unit(1, 0, 0, 399**0.5),  # 0.05
            unit(1, 0, 3, 0),  # 0.3162
            unit(3, 0, 4, 0),  # 0.6
            unit(0, 1, 0, 0),  # 0
        ]
    )
    words = [
        # p, latents: fraction, full
        (2.0, {0: 2.0}, 0, False),  # its own writes all of it
        (1.0, {1: 2**0.5}, 1, True),  # its own is silent, latent 1 writes all of it
        (2.0, {0: 0.5, 1: 2**0.5}, 1 / 1.5, False),  # 1 of 1.5 written by another: the own one is weak
        (1.2, {0: 0.5, 1: 2**0.5}, 0.7 / 1.2, False),  # no more counts than the own one leaves over
        (1.0, {3: 20.0}, 0, True),  # cosine between the two thresholds
        (1.0, {1: 0.5}, 0, False),  # 0.35 < 0.4
        (1.0, {1: 0.2, 4: 0.4, 5: 0.2}, 0, False),  # 0.14 + 0.13 + 0.12 = 0.388
        (1.0, {1: 0.2, 4: 0.4, 5: 0.25}, 1, False),  # 0.418 together, none alone
        (1.0, {1: 0.16, 2: 1.0, 4: 0.32, 5: 0.18}, 0, False),  # 0.11 + 0.11 + 0.10, the fourth does not count
        (-1.0, {1: 2.0}, 0, False),  # not there at all
        (1.0, {6: 9.0}, 0, False),  # what is strongest writes nothing
        (1.0, {0: -1.0, 1: 2**0.5}, 1, True),  # a negative latent does not fire
    ]  # fmt: skip
    x = np.zeros((len(words), 4))
    z = np.zeros((len(words), 7))
    for row, (p, latents, _, _) in enumerate(words):
        x[row, 0] = p
        for latent, value in latents.items():
            z[row, latent] = value
    probe = np.array([5.0, 0, 0, 0])
    fractions, full = absorbed(x, sparse.csr_array(z), directions, probe, [0], SETTINGS)
    np.testing.assert_allclose(fractions, [fraction for _, _, fraction, _ in words], atol=1e-12)
    assert full.tolist() == [is_full for *_, is_full in words]


def planted(words: int, absorbed_words: int, seed: int) -> Words:
    """Words with s, t and b: `absorbed_words` of those with s are written by a latent of their own.

    Half of those with b are told by another latent than the rest.
    """
    rng = np.random.default_rng(seed)
    letters = np.repeat([LETTERS.index(letter) for letter in "stb"], words)
    x, z = rng.normal(0, 0.05, (3 * words, 8)), np.zeros((3 * words, 6))
    for row in range(3 * words):
        place, number = divmod(row, words)
        x[row, place] += 1
        if place == 0 and number < absorbed_words:
            x[row, 4] += 1  # (1, 0, 0, 0, 1, ...) = 1.41 times its own direction
            z[row, 3] = 2**0.5
        elif place == 2 and number % 2:
            z[row, 4] = 1
        else:
            z[row, place] = 1
    return Words(x.astype(np.float32), sparse.csr_array(z.astype(np.float32)), letters)


DIRECTIONS = np.zeros((6, 8))
for _latent, _places in enumerate(((0,), (1,), (2,), (0, 4), (2,), (6,))):
    DIRECTIONS[_latent, list(_places)] = len(_places) ** -0.5


def test_planted_absorption_is_found() -> None:
    train, test = planted(300, 9, 0), planted(100, 3, 1)
    lines = {line["letter"]: line for line in measure(train, test, DIRECTIONS, SETTINGS)}
    assert list(lines) == ["b", "s", "t", "mean"]
    for letter, own, share in (("s", "0", 0.03), ("t", "1", 0.0), ("b", "2 4", 0.0)):
        line = lines[letter]
        assert (line["words"], line["true_positives"], line["counted"]) == (100, 100, 1)
        assert line["probe_f1"] == 1
        assert sorted(line["latents"].split()) == own.split()
        assert line["absorption_fraction"] == pytest.approx(share)
        assert line["full_absorption"] == pytest.approx(share)
    assert lines["s"]["sparse_f1"] == pytest.approx(2 * 0.97 / 1.97)
    mean = lines["mean"]
    assert (mean["counted"], mean["words"]) == (3, 300)
    assert mean["absorption_fraction"] == pytest.approx(0.01)
    assert mean["split_latents"] == pytest.approx(4 / 3)


def test_where_absorbed_words_are_many_their_latent_is_a_split_one() -> None:
    lines = measure(planted(300, 60, 0), planted(100, 20, 1), DIRECTIONS, SETTINGS)
    line = next(line for line in lines if line["letter"] == "s")
    assert sorted(line["latents"].split()) == ["0", "3"]
    assert line["full_absorption"] == 0


def test_letters_that_the_activation_does_not_tell_do_not_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train, test = planted(100, 0, 0), planted(100, 0, 1)
    noise = np.random.default_rng(2).normal(size=(2, 300, 8)).astype(np.float32)
    train, test = (
        Words(x, words.latents, words.letters)
        for x, words in zip(noise, (train, test), strict=True)
    )
    with caplog.at_level(logging.WARNING):
        *lines, mean = measure(train, test, DIRECTIONS, SETTINGS)
    assert [line["counted"] for line in lines] == [0, 0, 0]
    assert all("absorption_fraction" not in line for line in (*lines, mean))
    assert "0 first letters, expected at least 2" in caplog.text


def test_one_more_latent_must_raise_f1_by_more_than_the_jump() -> None:
    train, test = planted(300, 30, 0), planted(100, 10, 1)
    letter, order = LETTERS.index("s"), np.array([0, 3, 1])
    with_one, with_two = 2 * 0.9 / 1.9, 1.0
    own, f1 = split_latents(train, test, letter, order, with_two - with_one - 1e-6)
    assert (own, f1) == ([0, 3], pytest.approx(with_two))
    own, f1 = split_latents(train, test, letter, order, with_two - with_one + 1e-6)
    assert (own, f1) == ([0], pytest.approx(with_one))


def test_probes_are_near_those_of_scikit_learn() -> None:
    """Few of one answer and overlapping: the weighted logistic regression; Adam's falling rate ends a little before."""
    rng = np.random.default_rng(0)
    answers = np.stack([rng.random(2000) < 0.1, rng.random(2000) < 0.5], axis=1)
    x = rng.normal(size=(2000, 6)).astype(np.float32)
    x[:, 0] += answers[:, 0]
    x[:, 1] -= answers[:, 1]
    weights, biases = fit_probes(x, answers, 64, 0.0, 0.0, torch.Generator().manual_seed(0), "cpu")
    for question in range(2):
        model = LogisticRegression(class_weight="balanced", C=1e6)
        model.fit(x, answers[:, question])
        ours, theirs = weights[question], model.coef_[0]
        assert ours @ theirs > 0.995 * np.linalg.norm(ours) * np.linalg.norm(theirs)
        np.testing.assert_allclose(ours, theirs, atol=0.2)
        assert biases[question] == pytest.approx(model.intercept_[0], abs=0.1)


def test_sparse_inputs_give_the_same_probe_and_l1_silences_what_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    answers = (rng.random((500, 1)) < 0.5).astype(bool)
    z = (rng.random((500, 20)) < 0.1).astype(np.float32)
    z[:, 3] = answers[:, 0]

    def fitted(inputs: Any, l1: float) -> np.ndarray:
        return fit_probes(inputs, answers, 50, 0.0, l1, torch.Generator().manual_seed(0), "cpu")[0]

    np.testing.assert_allclose(
        fitted(sparse.csr_array(z), 0.01), fitted(z, 0.01), atol=1e-6, rtol=1e-5
    )
    rest = [i for i in range(20) if i != 3]
    assert np.abs(fitted(z, 0.05)[0, rest]).max() < 0.1 * np.abs(fitted(z, 0.0)[0, rest]).max()


def params_with(absorption: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["evaluation"]["interpretability"]["absorption"] = absorption
    return params


def test_settings_that_the_docs_give_are_the_defaults_and_a_misspelt_one_is_named() -> None:
    text = (ROOT / "docs" / "interpretability.md").read_text()
    (block,) = re.findall(r"```yaml\n(absorption:.*?)```", text, re.DOTALL)
    given = yaml.safe_load(block)["absorption"]
    assert set(given) == set(SETTINGS)
    for stated in (given, {k: v for k, v in given.items() if k != "f1_jump"}, {}):
        whole = validate(params_with(stated))["evaluation"]["interpretability"]["absorption"]
        assert whole == given
    with pytest.raises(UserError, match=r"evaluation\.interpretability\.absorption.*f1_jmup"):
        validate(params_with(given | {"f1_jmup": 0.03}))


# With a model.


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [f" {a}{b}" for a in "abc" for b in "aeiouy"] + ["ab", "cd", " Ba", "é"]
    rest = [" has", " the", " first", " letter", ":", "\n", " A", " B", " C", "7"]
    held = {word: i for i, word in enumerate(["<s>", *words, *rest])}
    whole = Tokenizer(models.WordLevel(held, unk_token="<s>"))
    whole.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?\w+|:"), "isolated")
    whole.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


WORDS = [f" {a}{b}" for a in "abc" for b in "aeiouy"]


def test_words_are_tokens_of_letters() -> None:
    rest = {" Ba", " has", " the", " first", " letter", " A", " B", " C", "ab", "cd"}
    assert words_of(make_tokenizer()) == sorted({*WORDS, *rest})


def test_a_prompt_shows_other_words_and_their_letters() -> None:
    for word, prompt in zip(WORDS, prompts(WORDS, SETTINGS["template"], 3, 0), strict=True):
        first, *examples, last = prompt.text.split("\n")
        assert (first, last) == ("", f"{word} has the first letter:")
        assert prompt.text[prompt.end - 3 : prompt.end] == word
        shown = [example.partition(" has")[0] for example in examples]
        assert len({*shown, word}) == 4
        assert [line[-2:] for line in examples] == [f" {one[1].upper()}" for one in shown]


def test_too_few_words_and_a_template_without_one_are_refused() -> None:
    with pytest.raises(UserError, match="more than 18 words in each split"):
        prompts(WORDS, SETTINGS["template"], 18, 0)
    with pytest.raises(UserError, match=r"template: expected \{word\} once"):
        prompts(WORDS, "the first letter:", 3, 0)


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_activations_are_those_at_the_word(model: Any, prepend_bos: bool) -> None:
    """One forward pass a prompt, with every hidden state; words of unequal length beside each other."""
    tokenizer = make_tokenizer()
    asked = prompts(WORDS, SETTINGS["template"], 3, 0)[:5]
    asked += prompts(WORDS[::-1], SETTINGS["template"], 2, 0)[:2]
    policy = {"prepend_bos": prepend_bos, "forward_batch": 3}
    found = activations(model, tokenizer, "blocks.1.resid_post", asked, policy, "cpu")
    for row, prompt in zip(found, asked, strict=True):
        ids = tokenizer(prompt.text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids[-6]) == prompt.text[prompt.end - 3 : prompt.end]
        ids = [tokenizer.bos_token_id] * prepend_bos + ids
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(row, states[2][0, -6].numpy(), atol=1e-5)


def test_prompts_longer_than_the_model_reads_are_refused(model: Any) -> None:
    asked = prompts(WORDS, SETTINGS["template"], 8, 0)
    with pytest.raises(UserError, match=r"examples: expected prompts of at most 64 tokens.*of 71"):
        activations(
            model, make_tokenizer(), "blocks.1.resid_post", asked,
            {"prepend_bos": False, "forward_batch": 4}, "cpu",
        )  # fmt: skip


class Linear(torch.nn.Module):
    """An SAE whose decoder rows have norm 2."""

    d_sae = 30

    def __init__(self) -> None:
        super().__init__()
        directions = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
        self.W = 2 * torch.nn.functional.normalize(directions)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W.t() / 4 - 0.1).relu()

    def directions(self) -> torch.Tensor:
        return self.W


def test_an_sae_of_a_model_with_a_warning_that_both_are_small(
    model: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    setup: Any = SimpleNamespace(
        in_model=SimpleNamespace(model=model), folders=SimpleNamespace(model=tmp_path),
        hook_point="blocks.1.resid_post", source_params={"prepend_bos": True, "forward_batch": 4},
        device="cpu", settings={"batch_size": 7},
    )  # fmt: skip
    settings = SETTINGS | {"min_letters": 1, "min_probe_f1": 0.0, "max_k": 2}
    with caplog.at_level(logging.WARNING):
        *lines, _ = absorb(Linear(), setup, settings)
    assert "and the SAE 30 latents; below 1e+09 and 16384 the measure means nothing" in caplog.text
    assert {line["letter"] for line in lines} <= set("abcfhlt")
    assert sum(line["words"] for line in lines) <= 9  # 30 % of 28
    assert lines == absorb(Linear(), setup, settings)[:-1]
    words = np.random.default_rng(0).permutation(words_of(tokenizer)).tolist()
    assert [first_letter(word) for word in words[-9:]].count(lines[0]["letter"]) == lines[0]["words"]  # fmt: skip
