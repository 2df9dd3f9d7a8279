"""Models that predict no next tokens: encoders have hook points and SAEs, and no cross-entropy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from saeflow.evaluation.baselines import Identity
from saeflow.evaluation.in_model.text import NextTokens, write_clean
from saeflow.sources.heads import no_predictions
from saeflow.sources.hook_points import capture

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
    assert (found.metrics, found.sums, found.tables) == ({}, {}, {})
