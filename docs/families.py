"""Tiny models of every family of causal language models that transformers builds from its configuration."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
BLOCKS = 4
_TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 128,
}
"""Overrides of whatever sizes of these names a configuration has; the rest stays as transformers has it."""
_TWICE = {"intermediate_size": 2 * _TINY["hidden_size"]}
_OTHERS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "falcon_mamba": _TWICE,
    "gptj": {"rotary_dim": 8},
    "mamba": _TWICE,
}
"""Sizes that depend on those, in families that do not work them out."""


def tiny_config(name: str, **extra: Any) -> Any:
    """A family's configuration at tiny size; sizes that depend on one another are scaled alike."""
    default = CONFIG_MAPPING[name]()
    text = default.get_text_config()
    sizes = shrunk(text) | _OTHERS.get(name, {}) | extra
    if text is default:
        config = CONFIG_MAPPING[name](**sizes)
    else:
        key = next(k for k in vars(default) if getattr(default, k) is text)
        config = CONFIG_MAPPING[name](**{key: sizes})
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The overrides of _TINY that a configuration has a place for, and lists of one entry a block cut to their number."""
    found = {}
    depth = getattr(config, "num_hidden_layers", None)
    own = {*config.to_dict(), *config.attribute_map}
    for key, value in _TINY.items():
        if key in own and getattr(config, key) is not None:
            found[key] = value
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= _TINY["vocab_size"]:
            found[key] = 0
        if isinstance(value, list | tuple) and depth and len(value) == depth:
            found[key] = _cut(value)
    return found


def _cut(values: Any) -> list[Any]:
    """Keep BLOCKS entries, with every kind of entry where there is room."""
    kinds = [v for i, v in enumerate(values) if v not in values[:i]]
    return (kinds + list(values))[:BLOCKS]


def tiny_family(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """A real model with random weights, large enough to tell its parts from noise."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **(overrides or {})))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)
