"""Tiny models of every layout, with random weights, and a real small tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from saeflow.sources import english
from saeflow.sources.architectures import architecture
from saeflow.sources.layouts import PLACES
from saeflow.sources.proof import prove

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 5, "layer_types": MIXED, "final_logit_softcapping": 0.5},
    ),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": 5, "layer_types": MIXED}),
    "gemma3": ("Gemma3Config", {"sliding_window": 5, "layer_types": MIXED}),
}
FINAL_NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


def config_of(name: str) -> Any:
    kind, extra = CONFIGS[name]
    sizes = {} if name == "gpt2" else SIZES
    ids = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    if name == "gemma3":  # with a vision tower
        vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision |= {"intermediate_size": 8, "image_size": 28}
        return transformers.Gemma3Config(
            text_config={**sizes, **ids, **extra}, vision_config=vision, image_token_index=400
        )
    return getattr(transformers, kind)(**{**sizes, **ids, **extra})


def tiny_model(name: str, seed: int = 0) -> Any:
    """A real model of the library with random weights, large enough to tell its parts from noise."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot, with BOS 0 and EOS 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(english.documents()[:20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def model_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Llama-like model and its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_model(name: str, **options: Any) -> Any:
    """The model of a `model_type` in the class that saeflow loads it with; weights large enough to tell blocks apart."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **options)
    model = architecture(config).from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def check_two_sequential_blocks(model: Any) -> None:
    """Every place, link, sum and hidden state of two blocks is proved."""
    proof = prove(model)
    assert proof.places == list(PLACES)
    assert (proof.linked, proof.sums, proof.hidden_states) == (1, 2, 2)
    assert proof.identities == 2 * len(PLACES)
