"""The model in the loop against whole forward passes with hand-made hooks and Hugging Face's loss."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from saeflow.errors import UserError
from saeflow.evaluation.baselines import Identity, Mean
from saeflow.evaluation.in_model import token_losses
from saeflow.evaluation.in_model.text import NextTokens, write_clean
from saeflow.files import write_json

WIDTH, LENGTH, CONTEXTS, VOCABULARY = 16, 12, 7, 61
Case = tuple[str, str]
CASES = [
    ("llama", "blocks.1.resid_post"), ("llama", "blocks.2.resid_post"),
    ("llama", "blocks.0.resid_pre"), ("llama", "blocks.1.mlp_out"), ("llama", "blocks.2.attn_out"),
    ("gpt2", "blocks.1.resid_post"), ("gpt2", "blocks.1.attn_out"), ("gpt2", "blocks.2.mlp_out"),
    ("gemma2", "blocks.1.resid_post"),
]  # fmt: skip


def tiny_model(kind: str) -> Any:
    """A model of three blocks whose predictions depend strongly on every block."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                initializer_range=0.3,
            )
        )  # fmt: skip
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=4, initializer_range=0.3,
                max_position_embeddings=32, sliding_window=5, final_logit_softcapping=2.0,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=32,
                initializer_range=0.3, resid_pdrop=0.1, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    return model.eval()


def measured(loop: NextTokens, replace: Callable[[Tensor], Tensor]) -> dict[str, float]:
    return loop.metrics(loop.sums(replace))


@contextmanager
def replaced(model: Any, hook_point: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace an activation in whole forward passes, with a hook written for these two models."""
    _, number, place = hook_point.split(".")
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    block = blocks[int(number)]
    attention = block.self_attn if hasattr(model, "model") else block.attn

    def after(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (replace(output[0]), *output[1:])
        return replace(output)

    def before(module: Any, args: Any) -> Any:
        return (replace(args[0]), *args[1:])

    if place == "resid_pre":
        handle = block.register_forward_pre_hook(before)
    else:
        module = {"resid_post": block, "mlp_out": block.mlp, "attn_out": attention}[place]
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def all_but_first(replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([x[:, :1], replace(x)[:, 1:]], dim=1)


def make_source(tmp_path: Path, kind: str, contexts: int = CONTEXTS) -> tuple[Path, Any, Tensor]:
    """A source's folder, its model and the token ids of its evaluation split."""
    model, folder = tiny_model(kind), tmp_path / "sources" / kind
    model.save_pretrained(folder / "model")
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (contexts, LENGTH)).astype(np.int32)
    (folder / "inputs").mkdir()
    np.save(folder / "inputs" / "evaluation.npy", ids)
    np.save(folder / "inputs" / "evaluation_documents.npy", np.arange(contexts) // 2)
    return folder, model, torch.tensor(ids, dtype=torch.int64)


def make_loop(
    folder: Path,
    hook_point: str,
    *,
    skip_first: bool,
    forward_batch: int = 3,
    out: str = "clean",
    contexts: int | None = CONTEXTS,
) -> NextTokens:
    clean = folder / out
    clean.mkdir()
    source = {"skip_first": skip_first, "forward_batch": forward_batch}
    write_clean(source, folder, hook_point, MEAN, {"ce_contexts": contexts}, {}, "cpu", clean)
    return NextTokens(clean, folder / "model", "cpu")


MEAN = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)


def damaged(x: Tensor) -> Tensor:
    """A reconstruction that is far from perfect and not linear."""
    return 0.8 * x + 0.1 * torch.relu(x) + 0.05


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize(("kind", "hook_point"), CASES)
def test_matches_whole_forward_passes(
    tmp_path: Path, kind: str, hook_point: str, skip_first: bool
) -> None:
    folder, model, ids = make_source(tmp_path, kind)
    loop = make_loop(folder, hook_point, skip_first=skip_first)
    # For the formulas' sake; a random model is not always worse without an activation.
    loop.zero_costs = loop.mean_costs = True
    got = measured(loop, damaged)
    only = all_but_first if skip_first else (lambda replace: replace)
    mean = MEAN.float()
    expected, scores = {}, {}
    with torch.no_grad():
        for name, replace in {
            "ce_clean": lambda x: x,
            "ce_spliced": only(damaged),
            "ce_mean": only(lambda x: mean.expand_as(x)),
            "ce_zero": only(torch.zeros_like),
        }.items():
            with replaced(model, hook_point, replace):
                output = model(input_ids=ids, labels=ids)
            expected[name], scores[name] = float(output.loss), output.logits[:, :-1].double()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=2e-6), name
    assert abs(expected["ce_spliced"] - expected["ce_clean"]) > 1e-4  # the damage can be seen
    assert got["ce_degradation"] == pytest.approx(
        expected["ce_spliced"] - expected["ce_clean"], abs=3e-6
    )
    for name, ablated in (("loss_recovered", "ce_zero"), ("loss_recovered_of_mean", "ce_mean")):
        recovered = (expected[ablated] - expected["ce_spliced"]) / (
            expected[ablated] - expected["ce_clean"]
        )
        assert got[name] == pytest.approx(recovered, rel=1e-3, abs=1e-4)
    assert got["ce_uniform"] == pytest.approx(float(torch.tensor(VOCABULARY).double().log()))
    kl = kl_div(
        scores["ce_spliced"].log_softmax(-1).flatten(0, 1),
        scores["ce_clean"].log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert got["kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-6)
    assert got["ce_tokens"] == CONTEXTS * (LENGTH - 1)


@pytest.mark.parametrize(("kind", "hook_point"), CASES[1:5:2])
def test_identity_costs_nothing_and_the_mean_baseline_is_ce_mean(
    tmp_path: Path, kind: str, hook_point: str
) -> None:
    folder, _, _ = make_source(tmp_path, kind)
    loop = make_loop(folder, hook_point, skip_first=True)
    loop.zero_costs = True
    identity = measured(loop, Identity(WIDTH).forward)
    assert identity["ce_degradation"] == pytest.approx(0, abs=1e-6)
    assert identity["kl"] == pytest.approx(0, abs=1e-6)
    assert identity["loss_recovered"] == pytest.approx(1, abs=1e-4)
    loop.mean_costs = True
    mean = measured(loop, Mean(MEAN).forward)
    assert mean["loss_recovered_of_mean"] == pytest.approx(0, abs=1e-4)
    assert mean["ce_spliced"] == pytest.approx(mean["ce_mean"], abs=1e-6)
    assert measured(loop, torch.zeros_like)["loss_recovered"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("is_needed", [True, False])
def test_loss_is_recovered_only_where_the_ablation_costs_any(
    tmp_path: Path, is_needed: bool
) -> None:
    """On what the model itself writes each block matters; one whose MLP gives nothing is not missed."""
    folder, model, ids = make_source(tmp_path, "gpt2")
    if not is_needed:
        torch.nn.init.zeros_(model.transformer.h[1].mlp.c_proj.weight)
        model.save_pretrained(folder / "model")
    written = model.generate(
        ids[:, :1], min_length=LENGTH, max_length=LENGTH, do_sample=False, pad_token_id=0
    )
    np.save(folder / "inputs" / "evaluation.npy", written.numpy().astype(np.int32))
    found = measured(make_loop(folder, "blocks.1.mlp_out", skip_first=False), damaged)
    assert ("loss_recovered" in found) == is_needed
    assert (found["ce_zero"] - found["ce_clean"] > 0.1) == is_needed


@pytest.mark.parametrize(("kind", "hook_point"), [CASES[0], CASES[3], CASES[5], CASES[8]])
def test_a_model_in_bfloat16_is_spliced_as_it_is(
    tmp_path: Path, kind: str, hook_point: str
) -> None:
    folder, model, ids = make_source(tmp_path, kind)
    write_json(folder / "model" / "loading.json", {"dtype": "bfloat16"})
    loop = make_loop(folder, hook_point, skip_first=False, forward_batch=CONTEXTS)
    seen = []

    def damage(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return damaged(x.float()).to(x.dtype)

    got = measured(loop, damage)
    assert seen == [torch.float32]  # an SAE sees rows in its own dtype
    model = type(model).from_pretrained(folder / "model", dtype=torch.bfloat16)
    with torch.no_grad(), replaced(model, hook_point, damage):
        scores = model(input_ids=ids).logits[:, :-1].float()
    expected = cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
    assert got["ce_spliced"] == pytest.approx(float(expected), abs=2e-6)
    assert measured(loop, Identity(WIDTH).forward)["ce_degradation"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.5])
def test_losses_over_a_large_vocabulary_match_float64(shift: float) -> None:
    """float32 sums over 50 000 entries would be off by 1e-5 nats and more, always to one side."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50_000, hidden_size=32, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=False, initializer_range=0.4,
        )
    )  # fmt: skip
    ids = torch.randint(0, 50_000, (2, 20))
    clean = 1.5 * torch.randn(2, 20, 32)
    hidden = clean + shift * torch.randn(2, 20, 32)
    head = token_losses.linear_head(model)
    assert head is not None
    with torch.no_grad():
        p, q = (
            (h[:, :-1].flatten(0, 1).double() @ head.double().T).log_softmax(-1)
            for h in (clean, hidden)
        )
        clean_losses, *terms = token_losses.clean_expectations(model, head, clean, ids)
        assert torch.equal(clean_losses, token_losses.token_losses(model, clean, ids))
        fast = token_losses.losses_and_divergences_from_expectations(model, hidden, *terms, ids)
        plain = token_losses.losses_and_divergences(model, hidden, clean, ids)
    targets = ids[:, 1:].flatten()
    expected_kl = kl_div(q, p, log_target=True, reduction="batchmean")
    expected_ce = torch.nn.functional.cross_entropy(q, targets)
    for losses, divergences in (fast, plain):
        assert float(losses.mean()) == pytest.approx(float(expected_ce), abs=2e-6)
        assert float(divergences.mean()) == pytest.approx(float(expected_kl), rel=3e-5, abs=2e-6)
    assert float(fast[1].mean()) == pytest.approx(float(expected_kl), rel=1e-6, abs=1e-6)


def test_batches_and_slices_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = make_source(tmp_path, "llama")
    expected = measured(make_loop(folder, CASES[0][1], skip_first=True), damaged)
    monkeypatch.setattr(token_losses, "_LOGITS_AT_ONCE", 4 * VOCABULARY)
    loop = make_loop(folder, CASES[0][1], skip_first=True, forward_batch=2, out="again")
    assert measured(loop, damaged) == pytest.approx(expected, abs=2e-6)


def test_the_sae_sees_rows_without_first_positions(tmp_path: Path) -> None:
    folder, _, _ = make_source(tmp_path, "gpt2")
    seen: list[torch.Size] = []

    def note(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x

    measured(make_loop(folder, CASES[5][1], skip_first=True, forward_batch=4), note)
    assert seen == [(4 * (LENGTH - 1), WIDTH), (3 * (LENGTH - 1), WIDTH)]


def test_contexts_are_spread_over_the_split(tmp_path: Path) -> None:
    folder, model, ids = make_source(tmp_path, "llama", contexts=3 * CONTEXTS)
    got = measured(make_loop(folder, CASES[0][1], skip_first=False), damaged)
    with torch.no_grad():
        expected = float(model(input_ids=ids[::3], labels=ids[::3]).loss)
    assert got["ce_clean"] == pytest.approx(expected, abs=2e-6)


def test_all_contexts_are_run_where_no_number_is_given(tmp_path: Path) -> None:
    folder, model, ids = make_source(tmp_path, "llama", contexts=3 * CONTEXTS)
    got = measured(make_loop(folder, CASES[0][1], skip_first=False, contexts=None), damaged)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert got["ce_clean"] == pytest.approx(expected, abs=2e-6)
    assert (got["ce_contexts"], got["ce_share"]) == (3 * CONTEXTS, 1)


def test_sums_are_those_of_documents(tmp_path: Path) -> None:
    """Two contexts a document, each with its own loss from a plain run of the model."""
    folder, model, ids = make_source(tmp_path, "llama")
    loop = make_loop(folder, CASES[0][1], skip_first=False)
    found = loop.measure(SimpleNamespace(forward=damaged), is_trained=True)
    with torch.no_grad():
        clean = model(input_ids=ids).logits[:, :-1]
        with replaced(model, CASES[0][1], damaged):
            spliced = model(input_ids=ids).logits[:, :-1]
    targets = ids[:, 1:]
    rise = cross_entropy(spliced.transpose(1, 2), targets, reduction="none").double().sum(1)
    rise -= cross_entropy(clean.transpose(1, 2), targets, reduction="none").double().sum(1)
    expected = [float(rise[i : i + 2].sum()) for i in range(0, CONTEXTS, 2)]
    assert found.units.tolist() == [0, 1, 2, 3]
    assert found.sums["rise"].tolist() == pytest.approx(expected, abs=1e-4)
    assert found.sums["tokens"].tolist() == [22, 22, 22, 11]


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_a_zero_ablation_worse_than_a_uniform_guess_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: float
) -> None:
    folder, model, _ = make_source(tmp_path, "llama")
    model.lm_head.weight.data.mul_(scale)
    model.save_pretrained(folder / "model")
    summary = make_loop(folder, CASES[3][1], skip_first=False).summary
    is_above = summary["ce_zero"] > np.log(VOCABULARY)
    assert is_above == (scale > 0)  # a model without a head guesses uniformly
    assert ("inflated" in caplog.text) == is_above


@pytest.mark.parametrize("is_own_text", [True, False])
def test_a_model_no_better_than_a_uniform_guess_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_own_text: bool
) -> None:
    """A model with random weights predicts tokens that it chose itself, and no random ones."""
    folder, model, _ = make_source(tmp_path, "llama")
    path = folder / "inputs" / "evaluation.npy"
    if is_own_text:
        tokens = torch.from_numpy(np.load(path).astype(np.int64))
        for position in range(1, tokens.shape[1]):
            with torch.no_grad():
                tokens[:, position] = model(tokens[:, :position]).logits[:, -1].argmax(1)
        np.save(path, tokens.numpy().astype(np.load(path).dtype))
    summary = make_loop(folder, CASES[3][1], skip_first=False).summary
    assert (summary["ce_clean"] < np.log(VOCABULARY)) == is_own_text
    assert ("no less than" in caplog.text) != is_own_text


def test_clean_side_is_kept_in_pieces_with_its_summary(tmp_path: Path) -> None:
    folder, _, _ = make_source(tmp_path, "llama")
    make_loop(folder, CASES[0][1], skip_first=True)
    assert sorted(path.name for path in (folder / "clean").iterdir()) == [
        "clean.json", *(f"contexts-{i:05d}.safetensors" for i in range(3)),
    ]  # fmt: skip
    summary = json.loads((folder / "clean" / "clean.json").read_text())
    assert summary["contexts"] == CONTEXTS
    assert summary["keep_first"] is True


def test_more_contexts_than_there_are_is_refused(tmp_path: Path) -> None:
    folder, _, _ = make_source(tmp_path, "llama", contexts=CONTEXTS - 1)
    with pytest.raises(UserError, match=f"expected at most {CONTEXTS - 1}"):
        make_loop(folder, CASES[0][1], skip_first=True)


def test_a_reconstruction_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder, _, _ = make_source(tmp_path, "llama")
    loop = make_loop(folder, CASES[0][1], skip_first=True)
    with pytest.raises(UserError, match="not finite"):
        measured(loop, lambda x: x * float("nan"))
