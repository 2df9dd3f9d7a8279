"""Checks of a model's own files before the first job: each mistake is one line of `saeflow validate`, with exit code 2."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from saeflow.cli import main
from saeflow.errors import UserError
from saeflow.sources.models import fetch_model

from .conftest import random_model, tiny_model


def parameters(model: Path, *hook_points: str, **source: Any) -> dict[str, Any]:
    return {
        "sources": {
            "mine": {
                "kind": "text", "model": {"folder": str(model)}, "hook_points": list(hook_points), "text": {"bundled": "english"},
                "evaluation_share": 0.2, "context_length": 16, **source,
            }
        },
        "stores": {"mine": {"train_rows": 600, "evaluation_rows": 100}},
        "training": {"tokens": 1024, "batch_size": 64},
        "saes": {"topk": {"variant": "topk", "store": f"mine/{hook_points[0]}", "d_sae": 32, "options": {"k": 4}}},
    }  # fmt: skip


@pytest.fixture
def validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run `saeflow validate` on parameters: exit code, and what it writes as errors."""
    monkeypatch.chdir(tmp_path)

    def run(params: dict[str, Any]) -> tuple[int, list[str]]:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(params))
        capsys.readouterr()  # what saving a model writes
        monkeypatch.setattr(sys, "argv", ["saeflow", "validate", "--params", "mine.yaml"])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        assert not (tmp_path / "results").exists()
        return int(code or 0), capsys.readouterr().err.strip().splitlines()

    return run


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("blocks.1.attn_in", None),
        ("module.transformer.h.1.attn.output.0", None),
        ("blocks.4.mlp_in", r"the model has 4 blocks \(0\.\.3\), found hook point blocks\.4\.mlp_in"),
        ("module.transformer.h.1.atn.output", r"transformer\.h\.1 has ln_1, attn, ln_2, mlp, found 'atn'"),
        ("module.transformer.h.1.attn.output.1", r"attn\.output\.1: expected a tensor, found NoneType\. Name output\.0"),
        ("module.transformer.h.1.attn.output.7", r"the module gives 2 values \(0\.\.1\), found output\.7"),
        ("module.transformer.h.1.attn.attn_dropout.output", r"the module does not run \(a fused kernel may take its place\)"),
    ],
)  # fmt: skip
def test_a_hook_point_that_a_model_lacks(
    point: str, message: str | None, gpt2: Path, validated: Any
) -> None:
    code, said = validated(parameters(gpt2, point))
    if message is None:
        assert code == 0
        return
    assert (code, len(said)) == (2, 1)
    (line,) = said
    assert line.startswith("error: mine.yaml: sources.mine")
    assert re.search(message, line), line


def test_an_unknown_structure_prints_candidates(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, validated: Any
) -> None:
    """XLNet's blocks take (position, batch, width)."""
    folder = tmp_path / "xlnet"
    random_model("xlnet", vocab_size=320, d_model=16, n_layer=2, n_head=2, d_inner=24).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    code, said = validated(parameters(folder, "blocks.1.resid_post"))
    assert (code, len(said)) == (2, 1)
    assert (
        "expected a list of blocks that each take and give (batch, position, width), found none."
        in said[0]
    )
    assert "transformer.layer (2 XLNetLayer, takes 6 x 2 x 16)" in said[0]
    assert said[0].endswith("Name a module's path instead (module.PATH.output).")


@pytest.mark.parametrize(
    ("given", "source", "message"),
    [
        ({"eos_token": "</s>"}, {}, "it has no BOS token; set prepend_bos: false."),
        ({"eos_token": "</s>"}, {"prepend_bos": False}, None),
        ({"bos_token": "<s>"}, {}, "it has no EOS token; choose a model whose tokenizer has one."),
        ({}, {"prepend_bos": False}, "it has no EOS token; choose a model whose tokenizer has one."),
    ],
)  # fmt: skip
def test_a_tokenizer_without_the_tokens_of_an_end(
    given: dict[str, str], source: dict[str, Any], message: str | None,
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, validated: Any,
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **given)
    plain.save_pretrained(folder)
    code, said = validated(parameters(folder, "blocks.1.resid_post", **source))
    if message is None:
        assert code == 0
    else:
        assert (code, said) == (2, [f"error: mine.yaml: sources.mine: tokenizer: {message}"])
    if (
        message and "EOS" in message
    ):  # a model of the hub is refused by the first job that has its files
        (tmp_path / "fetched").mkdir()
        with pytest.raises(UserError, match=r"it has no EOS token"):
            fetch_model({"folder": str(folder)}, ["blocks.1.resid_post"], tmp_path / "fetched")
        assert not list((tmp_path / "fetched").iterdir())


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", "the tokenizer cannot be loaded"),
        (
            "gpt2",
            "expected a tokenizer, found none but for special tokens",
        ),  # transformers makes one
    ],
)
def test_a_folder_without_a_tokenizer(
    family: str, message: str, tmp_path: Path, validated: Any
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    code, said = validated(parameters(tmp_path / "model", "blocks.1.resid_post"))
    assert (code, len(said)) == (2, 1)
    assert f"model: {message}" in said[0]
