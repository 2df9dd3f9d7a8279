"""Models that predict no next tokens: encoders have hook points and SAEs, and no cross-entropy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from saeflow.errors import UserError
from saeflow.evaluation.baselines import Identity
from saeflow.evaluation.in_model.text import NextTokens, write_clean
from saeflow.sources.heads import no_predictions
from saeflow.sources.hook_points import capture
from saeflow.sources.models import fetch_model, load_model
from saeflow.sources.proof import prove_with_context

from ..sources.conftest import check_two_sequential_blocks, random_model

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
ENCODERS: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (SIZES, "BertLMHeadModel sees the tokens that it would predict"),
    "distilbert": (
        {"vocab_size": 61, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        "DistilBertModel has no lm head",
    ),
    "modernbert": (
        {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        "ModernBertModel has no lm head",
    ),
    "bart": (
        {
            "vocab_size": 61, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
        },
        "BartEncoder has no lm head",
    ),
    "t5": (
        {"vocab_size": 61, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2},
        "T5EncoderModel has no lm head",
    ),
}  # fmt: skip
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))


def encoder(name: str) -> Any:
    return random_model(name, **ENCODERS[name][0])


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_hook_points_are_proved(name: str) -> None:
    model = encoder(name)
    check_two_sequential_blocks(model)
    hidden = model(IDS, output_hidden_states=True).hidden_states
    found = capture(model, ["blocks.0.resid_post"], IDS)["blocks.0.resid_post"]
    assert torch.equal(found, hidden[1])


@pytest.mark.parametrize("name", ENCODERS)
def test_why_it_has_no_cross_entropy(name: str) -> None:
    assert no_predictions(encoder(name)) == ENCODERS[name][1]


def test_an_encoder_decoder_is_its_encoder(tmp_path: Path) -> None:
    """The decoder's activations depend on a second text, which a source does not have."""
    torch.manual_seed(0)
    whole = transformers.BartForConditionalGeneration(
        transformers.BartConfig(**ENCODERS["bart"][0])
    )
    whole.eval().save_pretrained(tmp_path / "local")
    (tmp_path / "model").mkdir()
    point = "blocks.1.resid_post"
    notes = fetch_model({"folder": str(tmp_path / "local")}, [point], tmp_path / "model")
    assert notes == {"model": "its encoder alone is run"}
    model = load_model(tmp_path / "model", "cpu")
    expected = whole.get_encoder()(IDS, output_hidden_states=True).hidden_states[2]
    assert torch.equal(capture(model, [point], IDS)[point], expected)
    with pytest.raises(UserError, match=r"2 blocks \(0\.\.1\)"):
        fetch_model({"folder": str(tmp_path / "local")}, ["blocks.2.mlp_out"], tmp_path / "model")


def test_a_context_that_is_longer_than_the_models_positions_is_refused() -> None:
    """RoBERTa's positions begin after its padding token, so that 12 of them are enough for 10 tokens."""
    sizes = {**SIZES, "max_position_embeddings": 12, "pad_token_id": 1}
    model = random_model("roberta", **sizes)
    assert prove_with_context(model, ["blocks.0.resid_post"], 10).identities == 1
    with pytest.raises(UserError, match=r"a context of 11 tokens \(row 12 of 12 is asked for\)"):
        prove_with_context(model, ["blocks.0.resid_post"], 11)


def test_a_model_that_a_short_context_changes_is_refused() -> None:
    """BigBird turns its sparse attention off for good when a context is short."""
    sizes = {**SIZES, "max_position_embeddings": 128, "block_size": 2, "num_random_blocks": 1}
    model = random_model("big_bird", **sizes)
    assert prove_with_context(model, ["blocks.0.resid_post"], 12).identities == 1
    model = random_model("big_bird", **sizes)
    with pytest.raises(
        UserError, match=r"of a context of 64 tokens before and after one of 8, found"
    ):
        prove_with_context(model, ["blocks.0.resid_post"], 64)


def test_a_decoder_of_the_same_family_has_one() -> None:
    config = transformers.BertConfig(**SIZES, is_decoder=True)
    assert no_predictions(transformers.BertLMHeadModel(config).eval()) is None


def test_its_clean_side_says_why_and_nothing_is_measured(tmp_path: Path) -> None:
    encoder("bert").save_pretrained(tmp_path / "model")
    (tmp_path / "inputs").mkdir()
    np.save(tmp_path / "inputs" / "evaluation.npy", IDS.numpy().astype(np.int32))
    np.save(tmp_path / "inputs" / "evaluation_documents.npy", np.arange(2, dtype=np.int32))
    source, out = {"skip_first": True, "forward_batch": 2}, tmp_path / "clean"
    out.mkdir()
    notes = write_clean(
        source, tmp_path, "blocks.0.resid_post", torch.zeros(16), {"ce_contexts": 2}, {}, "cpu", out
    )
    assert notes == {"cross-entropy": f"not measured: {ENCODERS['bert'][1]}"}
    assert json.loads((out / "clean.json").read_text())["why_not"] == ENCODERS["bert"][1]
    found = NextTokens(out, tmp_path / "model", "cpu").measure(Identity(16), is_trained=False)
    line = {"what": "cross-entropy", "why": ENCODERS["bert"][1]}
    assert (found.metrics, found.sums, found.tables) == ({}, {}, {"unmeasured": [line]})
