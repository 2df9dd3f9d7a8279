"""Text becomes packed contexts, contexts become activations."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from saeflow.errors import UserError
from saeflow.sources import external_inputs, open_source, prepare_inputs
from saeflow.sources.documents import Document, is_evaluation, shuffled
from saeflow.sources.models import fetch_model
from saeflow.sources.text import TextSource

from .conftest import tiny_model

WORDS = [
    "the",
    "value",
    "of",
    "an",
    "object",
    "is",
    "not",
    "found",
    "in",
    "a",
    "list",
    "when",
    "it",
    "was",
    "never",
    "put",
    "there",
]
PARAMS: dict[str, Any] = {
    "kind": "text",
    "model": {"folder": "not used"},
    "hook_points": ["blocks.1.mlp_out", "blocks.2.resid_post"],
    "evaluation_share": 0.3,
    "context_length": 16,
    "prepend_bos": True,
    "skip_first": True,
    "max_norm_multiple": None,
    "forward_batch": 4,
    "contexts_per_document": None,
    "shared_run": None,
    "seed": 0,
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Documents of very different lengths, one of them empty."""
    rng = np.random.default_rng(0)
    lengths = [1, 400, 0, *rng.integers(2, 60, 150)]
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


@pytest.fixture
def params(documents: list[str], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return PARAMS | {"text": {"files": [str(path)], "column": "text"}}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A source's folder: model/ and an empty inputs/."""
    folder = tmp_path / "source"
    (folder / "inputs").mkdir(parents=True)
    (folder / "model").symlink_to(model_folder)
    return folder


def prepare(params: dict[str, Any], folder: Path, **rows: int) -> dict[str, Any]:
    return prepare_inputs(params, rows, folder / "model", folder / "inputs")


def packed(
    documents: list[str], split: str, params: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[list[int]], list[int]]:
    """Independent reference, one token at a time: all contexts, and the document of each one's middle."""
    stream = []
    for number, (text, _) in shuffled((Document(t, "") for t in documents if t), params["seed"]):
        if is_evaluation(text, params["evaluation_share"]) == (split == "evaluation"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            stream += [(number, token) for token in [*ids, tokenizer.eos_token_id]]
    bos = [tokenizer.bos_token_id] if params["prepend_bos"] else []
    contexts, middle = [], []
    while len(stream) >= params["context_length"] - len(bos):
        size = params["context_length"] - len(bos)
        contexts.append(bos + [token for _, token in stream[:size]])
        middle.append(stream[size // 2][0])
        stream = stream[size:]
    return contexts, middle


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("skip_first", [True, False])
def test_contexts_hold_the_documents_of_their_split_one_after_another(
    prepend_bos: bool,
    skip_first: bool,
    params: dict[str, Any],
    documents: list[str],
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    params |= {"prepend_bos": prepend_bos, "skip_first": skip_first}
    rows = {"train": 600, "evaluation": 100}
    prepare(params, folder, **rows)
    for split, n in rows.items():
        tokens = np.load(folder / "inputs" / f"{split}.npy")
        of = np.load(folder / "inputs" / f"{split}_documents.npy")
        contexts, numbers = packed(documents, split, params, tokenizer)
        assert tokens.dtype == of.dtype == np.int32
        assert len(tokens) == -(-n // (16 - skip_first)) < len(contexts)
        assert tokens.tolist() == contexts[: len(tokens)]
        assert of.tolist() == numbers[: len(tokens)]


def test_what_was_read_is_counted_by_file(
    params: dict[str, Any],
    documents: list[str],
    folder: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "saeflow.sources.documents.SHUFFLE_CHARACTERS", 0
    )  # in the files' own order
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"other {text}"}) + "\n" for text in documents))
    unread = tmp_path / "empty.jsonl"
    unread.write_text('{"text": null}\n')
    paths = [*params["text"]["files"], str(other), str(unread)]
    read = prepare(
        params | {"text": {"files": paths, "column": "text"}}, folder, train=6000, evaluation=1500
    )
    assert list(read["files"]) == paths
    contexts = sum(len(np.load(folder / "inputs" / f"{s}.npy")) for s in ("train", "evaluation"))
    assert sum(of["tokens"] for of in read["files"].values()) == contexts * 15  # without BOS
    assert read["left_out"] == {"empty": 1, "null": 1}
    first, second, third = read["files"].values()
    assert third == {"documents": 0, "tokens": 0}
    assert (
        abs(first["tokens"] - second["tokens"]) < 800
    )  # the longest document has 600 tokens or less
    kept = np.concatenate(
        [np.load(folder / "inputs" / f"{s}.npy")[:, 1:].ravel() for s in ("train", "evaluation")]
    )
    ends = int((kept == tokenizer.eos_token_id).sum())
    assert (
        ends <= first["documents"] + second["documents"] <= ends + 2
    )  # the last of each split is cut


@pytest.mark.parametrize("most", [1, 3])
def test_a_document_gives_no_more_contexts_than_are_allowed(
    most: int,
    params: dict[str, Any],
    documents: list[str],
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = {"train": 600, "evaluation": 100}
    read = prepare(params | {"contexts_per_document": most}, folder, **rows)
    given = [text for text in documents if text]
    sizes = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in given]
    beyond = read["left_out"][f"tokens beyond contexts_per_document: {most}"]
    assert 0 < beyond <= sum(max(0, size - most * 15) for size in sizes)  # of those that it took
    for split in rows:
        tokens = np.load(folder / "inputs" / f"{split}.npy")[:, 1:].ravel()
        of = np.load(folder / "inputs" / f"{split}_documents.npy")
        assert np.unique(of, return_counts=True)[1].max() <= most
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
        for start, stop in itertools.pairwise(ends):  # whole documents, or parts of long ones
            piece = tokens[start + 1 : stop]
            assert len(piece) < most * 15
            assert any(tokenizer.decode(piece) in text for text in given)


def test_evaluation_contexts_with_a_run_of_train_are_left_out(
    params: dict[str, Any], documents: list[str], folder: Path, tmp_path: Path
) -> None:
    """Random words, so that only what was copied is shared; every second held-out document quotes one of train."""
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(4000)]
    texts = [" ".join(rng.choice(words, 40)) for _ in range(300)]
    quoted = next(text for text in texts if not is_evaluation(text, 0.3))
    texts = [f"{text} {quoted[:80]}" if i % 2 else text for i, text in enumerate(texts)] + [quoted]
    path = tmp_path / "quotes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    params |= {"text": {"files": [str(path)], "column": "text"}, "shared_run": 13}
    read = prepare(params, folder, train=9000, evaluation=3000)["splits"]
    train, held_out = (
        np.load(folder / "inputs" / f"{s}.npy")[:, 1:] for s in ("train", "evaluation")
    )
    flat = train.ravel().tolist()
    known = {tuple(flat[i : i + 13]) for i in range(len(flat) - 12)}
    assert not any(tuple(row[i : i + 13]) in known for row in held_out.tolist() for i in range(3))
    assert read["evaluation"] == {
        "contexts": 200, "documents": len(set(np.load(folder / "inputs" / "evaluation_documents.npy").tolist())),
        "tokens": 3000, "shared": read["evaluation"]["shared"],
    }  # fmt: skip
    assert read["evaluation"]["shared"] > 3
    assert read["train"]["contexts"] == len(train)
    assert read["train"]["shared"] == 0
    with pytest.raises(UserError, match=r"share a run of 2 tokens .* 200 are asked for"):
        prepare(params | {"shared_run": 2}, folder, train=9000, evaluation=3000)


def test_others_are_looked_for_where_most_contexts_are_left_out(
    params: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine of ten held-out documents stand in train too, behind a word of their own; what the message says then works."""
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(4000)]
    own = [" ".join(rng.choice(words, 40)) for _ in range(1200)]
    train = [text for text in own if not is_evaluation(text, 0.3)]
    held_out = [text for text in own if is_evaluation(text, 0.3)][:30]
    quoting = (f"{a} {text}" for text in train for a in words[:3])
    held_out += [text for text in quoting if is_evaluation(text, 0.3)][:270]
    path = tmp_path / "quotes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*train, *held_out]))
    params |= {"text": {"files": [str(path)], "column": "text"}, "shared_run": 13}
    monkeypatch.setattr("saeflow.sources.text._CHARACTERS_AT_ONCE", 1000)

    def advised(split: str, **rows: int) -> int:
        with pytest.raises(UserError, match="are asked for") as refused:
            prepare(params, folder, **rows)
        found = re.search(rf"Lower {split}_rows in stores to (\d+),", str(refused.value))
        assert found is not None
        return int(found[1])

    rows = advised("train", train=10**7, evaluation=450)
    read = prepare(params, folder, train=rows, evaluation=450)["splits"]["evaluation"]
    assert read["contexts"] < read["shared"]  # so that twice as many were not enough
    kept = np.load(folder / "inputs/evaluation.npy")
    every = advised("evaluation", train=rows, evaluation=10**6)  # with those that are left out
    prepare(
        params, folder, train=rows, evaluation=advised("evaluation", train=rows, evaluation=every)
    )
    assert np.array_equal(np.load(folder / "inputs/evaluation.npy")[: len(kept)], kept)


def test_pieces_of_any_size_pack_alike(
    params: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(params, folder, train=600, evaluation=100)
    files = sorted((folder / "inputs").iterdir())
    expected = [path.read_bytes() for path in files]
    for characters in (1, 100, 3000):
        monkeypatch.setattr("saeflow.sources.text._CHARACTERS_AT_ONCE", characters)
        prepare(params, folder, train=600, evaluation=100)
        assert [path.read_bytes() for path in files] == expected


def test_the_whole_text_can_be_used_but_no_more(
    params: dict[str, Any], documents: list[str], folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    most = len(packed(documents, "train", params, tokenizer)[0])
    prepare(params, folder, train=most * 15, evaluation=15)
    message = rf"gives {most} contexts of 16 tokens for the train split, {most + 1} are asked for"
    with pytest.raises(UserError, match=message):
        prepare(params, folder, train=most * 15 + 1, evaluation=15)


def test_a_tokenizer_without_bos_is_refused_only_if_bos_is_asked_for(
    params: dict[str, Any], folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (folder / "model").unlink()
    tiny_model("llama").save_pretrained(folder / "model")
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    plain.save_pretrained(folder / "model")
    with pytest.raises(UserError, match=r"it has no BOS token; set prepend_bos: false"):
        prepare(params, folder, train=100, evaluation=100)
    prepare(params | {"prepend_bos": False}, folder, train=100, evaluation=100)
    assert (np.load(folder / "inputs" / "train.npy") > 1).any()


def test_a_tokenizer_of_another_model_is_refused(
    params: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (folder / "model").unlink()
    model = tiny_model("llama")
    model.resize_token_embeddings(200)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with pytest.raises(
        UserError, match=r"the tokenizer gives id \d+, the model knows ids below 200"
    ):
        prepare(params, folder, train=100, evaluation=100)


def test_contexts_longer_than_the_models_positions_are_refused(
    params: dict[str, Any], folder: Path
) -> None:
    with pytest.raises(UserError, match=r"context_length: expected at most 64 .* found 65"):
        prepare(params | {"context_length": 65}, folder, train=100, evaluation=100)


@pytest.mark.parametrize("skip_first", [True, False])
def test_rows_are_the_models_hidden_states_in_order(
    skip_first: bool, params: dict[str, Any], folder: Path
) -> None:
    params |= {"skip_first": skip_first}
    prepare(params, folder, train=300, evaluation=100)
    source = open_source(params, folder, "cpu")
    assert isinstance(source, TextSource)
    assert source.hook_points == params["hook_points"]
    assert source.d_in == {"blocks.1.mlp_out": 16, "blocks.2.resid_post": 16}
    assert source.rows_per_context == 16 - skip_first
    tokens = np.load(folder / "inputs" / "train.npy")
    assert source.n_contexts("train") == len(tokens)
    block = source.block("train", 3, 9)
    ids = torch.from_numpy(tokens[3:9].astype(np.int64))
    hidden = tiny_model("llama")(ids, output_hidden_states=True).hidden_states[3]
    expected = hidden[:, int(skip_first) :].reshape(-1, 16)
    torch.testing.assert_close(block.activations["blocks.2.resid_post"], expected)
    first = int(skip_first)
    rows = [(c, p, tokens[c, p]) for c in range(3, 9) for p in range(first, 16)]
    got = zip(
        *(block.columns[name].tolist() for name in ("context", "position", "token")), strict=True
    )
    assert list(got) == rows
    for name, (dtype, shape) in source.columns.items():
        assert block.columns[name].dtype == dtype
        assert block.columns[name].shape == (len(rows), *shape)


def test_every_block_is_extracted_in_one_pass(params: dict[str, Any], folder: Path) -> None:
    """Each batch of contexts runs once, whatever the number of hook points, with the rows of one alone."""
    points = [f"blocks.{n}.resid_post" for n in range(4)]
    prepare(params, folder, train=300, evaluation=100)
    source: Any = open_source(params | {"hook_points": points}, folder, "cpu")
    seen: list[int] = []
    first = source.model.model.layers[0]  # loaded and proved before it is counted
    first.register_forward_hook(lambda *_: seen.append(1))
    block = source.block("train", 0, 8)
    assert len(seen) == 8 / params["forward_batch"]
    assert set(block.activations) == set(points)
    for point in points:
        alone = open_source(params | {"hook_points": [point]}, folder, "cpu").block("train", 0, 8)
        assert torch.equal(block.activations[point], alone.activations[point])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_runs_in_the_dtype_of_its_source(
    dtype: str, params: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    for name in ("model", "inputs"):
        (folder / name).mkdir(parents=True)
    fetch_model(
        {"folder": str(model_folder), "dtype": dtype}, params["hook_points"], folder / "model"
    )
    prepare(params, folder, train=100, evaluation=100)
    block = open_source(params, folder, "cpu").block("train", 0, 4)
    kind = getattr(torch, dtype)
    ids = torch.from_numpy(np.load(folder / "inputs" / "train.npy")[:4].astype(np.int64))
    expected = AutoModelForCausalLM.from_pretrained(model_folder, dtype=kind)(
        ids, output_hidden_states=True
    ).hidden_states[3]
    found = block.activations["blocks.2.resid_post"]
    assert found.dtype == kind
    assert torch.equal(found, expected[:, int(params["skip_first"]) :].reshape(-1, 16))


def test_blocks_of_any_division_hold_the_same_bits(params: dict[str, Any], folder: Path) -> None:
    prepare(params, folder, train=400, evaluation=100)
    source = open_source(params, folder, "cpu")
    n = source.n_contexts("train")
    assert n % params["forward_batch"]
    whole = source.block("train", 0, n)
    for step in (1, 4, 7, 8):
        parts = [source.block("train", i, min(i + step, n)) for i in range(0, n, step)]
        for name, x in whole.activations.items():
            assert torch.equal(torch.cat([part.activations[name] for part in parts]), x)
        for name, column in whole.columns.items():
            assert np.array_equal(np.concatenate([part.columns[name] for part in parts]), column)
    with pytest.raises(ValueError, match="expected a range within"):
        source.block("train", n - 1, n + 1)


def test_inputs_that_are_not_there_are_named(params: dict[str, Any], folder: Path) -> None:
    with pytest.raises(UserError, match=r"train\.npy: no such file"):
        open_source(params, folder, "cpu").n_contexts("train")


def test_a_layer_the_model_lacks_is_refused(params: dict[str, Any], folder: Path) -> None:
    prepare(params, folder, train=100, evaluation=100)
    source = open_source(params | {"hook_points": ["blocks.4.mlp_out"]}, folder, "cpu")
    with pytest.raises(UserError, match="4 blocks"):
        source.block("train", 0, 1)


def test_the_text_is_its_provenance(params: dict[str, Any]) -> None:
    assert list(external_inputs(params)) == params["text"]["files"]
