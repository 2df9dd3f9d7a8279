"""Tiny models of every family of causal language models that transformers builds from its configuration."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from saeflow.sources.architectures import architecture

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
BLOCKS = 4
WIDTH, HEADS, VOCABULARY = 64, 4, 320
_HEAD = WIDTH // HEADS
_TINY: list[tuple[int, str]] = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size unpadded_vocab_size "
    "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size"),
    (WIDTH, "hidden_size d_model n_embd emb_dim hidden_size_global text_hidden_size backbone_hidden_size dim_model_base "
    "out_hidden_size output_hidden_size vision_output_dim word_embed_proj_dim lru_width embed_dim audio_embed_dim "
    "input_embedding_size output_embedding_size embedding_size mm_embed_dim projector_input_dim projector_output_dim "
    "output_proj_dims adapter_in_dim projection_hidden_dim projector_hidden_size adapter_out_dim"),
    (BLOCKS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
    "num_encoder_layers num_blocks"),
    (2 * WIDTH, "mamba_d_ssm max_position_embeddings n_positions max_seq_len max_target_positions "
    "max_source_positions num_position_embeddings position_embedding_size mm_posemb_size"),
    (48, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dff d_inner dim_ff feed_forward_size ffn_hidden_size "
    "mlp_dim dense_intermediate_size intermediate_size_mlp"),
    (32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_intermediate_size shared_experts_intermediate_size q_lora_rank kv_lora_rank "
    "o_lora_rank moe_latent_size router_hidden_size prefix_dense_intermediate_size"),
    (_HEAD, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim dim_head d_head index_head_dim "
    "attention_head_size kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim "
    "mamba_d_state state_size ssm_state_size hidden_size_per_layer_input laurel_rank adapter_rank hc_lowrank "
    "pronunciation_embed_dim shape_embed_dim gated_norm_rank"),
    (8, "rotary_dim d_rel num_centroids"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads conf_num_attention_heads "
    "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads n_mamba_heads centroid_intermediate_top_k "
    "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads index_n_heads "
    "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts n_group topk_group "
    "depth conf_num_hidden_layers o_groups num_global_layers"),
    (1, "first_k_dense_replace num_dense_layers n_groups mamba_n_groups"),
]  # fmt: skip
"""Sizes that a configuration may have, by the value that they are given; the rest stays as transformers has it."""
_SIZES = {key: value for value, keys in _TINY for key in keys.split()}
_TWICE = {"intermediate_size": 2 * WIDTH}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": _HEAD, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 1000,
}  # fmt: skip
_OTHERS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_mamba": _TWICE,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 4}
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": _TWICE,
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""Sizes that depend on those, or that a family leaves open."""
_NOT_TEXT = ("image", "video", "audio", "vision", "boi", "eoi", "boa", "eoa")


def tiny_config(name: str) -> Any:
    """A family's configuration at tiny size; sizes that depend on one another are scaled alike."""
    sizes = _merged(shrunk(CONFIG_MAPPING[name]()), _OTHERS.get(name, {}))
    config = CONFIG_MAPPING[name](**sizes)
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The second over the first, parts of configurations entry by entry."""
    both = {k: _merged(first[k], v) if isinstance(v, dict) and isinstance(first.get(k), dict) else v for k, v in second.items()}  # fmt: skip
    return {**first, **both}


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Sizes that a configuration and its parts have, lists of one entry a block cut to their number."""
    found: dict[str, Any] = {}
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    depth = getattr(config, "num_hidden_layers", None)
    names = {own: name for name, own in config.attribute_map.items()}
    for key, value in values.items():
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if isinstance(value, PreTrainedConfig):
            found[key] = {"model_type": value.model_type, **shrunk(value)}
        elif is_size and (size := _SIZES.get(key, _SIZES.get(names.get(key, "")))):
            found[key] = size
        elif key.endswith("_token_id") and not key.startswith(_NOT_TEXT):
            found |= {key: 0} if isinstance(value, int) and value >= VOCABULARY else {}
            found |= {key: [0]} if isinstance(value, list) and max(value) >= VOCABULARY else {}
        elif isinstance(value, list | tuple) and depth and len(value) == depth:
            found[key] = _cut(value)
    heads = values.get("num_attention_heads")
    if "num_key_value_heads" in values and values["num_key_value_heads"] in (None, heads):
        found["num_key_value_heads"] = HEADS
    if "head_dim" in values and values["head_dim"] is None:
        found["head_dim"] = _HEAD
    patch = values.get("patch_size")
    if isinstance(values.get("image_size"), int) and isinstance(patch, int):
        found["image_size"] = 2 * patch
    return found


def _cut(values: Any) -> list[Any]:
    """Keep BLOCKS entries, with every kind of entry where there is room."""
    kinds = [v for i, v in enumerate(values) if v not in values[:i]]
    return (kinds + list(values))[:BLOCKS]


def tiny_family(name: str) -> Any:
    """A real model with random weights, large enough to tell its parts from noise, in the class that saeflow loads it with."""
    torch.manual_seed(0)
    config = tiny_config(name)
    model = architecture(config).from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)
