"""From a Hugging Face `config.json` to the fields of an `Architecture`, family by family.

Every field that changes what a model computes is read or refused by name, with what it says where that is no value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_amd.errors import InputError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
}
"""Values of `model_type` that are supported, and the class of `transformers` that computes each."""

_HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ANY_LENGTH = 2**20
"""Positions of a model whose position biases have no end."""


def architecture_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of `Architecture` but for `hf_config`; `where` names the config.json in errors.

    Raises InputError for a model_type, a feature or a value that is not supported, naming the key.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        said = "is missing" if family is None else f"{family!r} is not supported"
        raise InputError(f"{where}: model_type {said}; supported are {', '.join(FAMILIES)}")
    _refuse_features(config, where)
    if family in ("t5", "mt5"):
        fields = _t5(config, where, family)
    else:
        fields = _gpt2(config, where) if family == "gpt2" else _llama_like(config, where, family)
    return {"family": family, **fields}


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _refuse_features(config: Mapping[str, Any], where: str) -> None:
    """Features of the supported families that Megatron-Core's GPTModel or this project lacks."""
    if config.get("quantization_config"):
        raise InputError(f"{where}: quantization_config: quantised weights are not supported; save the model in bf16")
    _refuse_own_code(config, where)
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if _count(config, key, where, 0) > 1:
            raise InputError(f"{where}: {key}: mixture-of-experts models are not supported")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise InputError(f"{where}: partial_rotary_factor: only 1 is supported, not {config['partial_rotary_factor']}")
    for key, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
        ("is_encoder_decoder", config.get("model_type") in ("t5", "mt5")),
        ("qk_layernorm", False),
        ("use_qk_norm", False),
        # transformers passes over these in our families; whoever wrote them meant another model
        ("rope_interleaved", False),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
        ("logit_scale", 1),
    ):
        if config.get(key, wanted) not in (None, wanted):
            raise InputError(f"{where}: {key}: only {_json(wanted)} is supported, not {_json(config[key])}")


def _refuse_own_code(config: Mapping[str, Any], where: str) -> None:
    """The folder's own Python files are never run; a model that they change would be another one here."""
    own_classes = config.get("auto_map") or {}
    for kind in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        name = str(own_classes.get(kind, "")) if isinstance(own_classes, Mapping) else str(own_classes)
        family_class = FAMILIES[config["model_type"]]
        if name and name.rpartition(".")[2] not in (
            family_class,
            re.sub("For[A-Z].*|LMHeadModel", "Model", family_class),
        ):
            raise InputError(
                f"{where}: auto_map: the model's own code ({name}) is not run; if it computes what {family_class} of "
                "transformers does, remove auto_map"
            )


def _refuse_sliding_window(config: Mapping[str, Any], where: str, family: str, positions: int) -> None:
    """A window counts only where transformers would use it and a sequence can be longer than it."""
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise InputError(f"{where}: layer_types: must be a list, not {_json(kinds)}")
    for kind in kinds:
        if kind != "full_attention":
            raise InputError(f"{where}: layer_types: {kind!r} is not supported, only 'full_attention'")
    layers = _size(config, "num_hidden_layers", where)
    if kinds and len(kinds) != layers:
        raise InputError(f"{where}: layer_types: names {len(kinds)} layers, but num_hidden_layers is {layers}")
    if family == "mistral":
        active = True
    elif family in ("qwen2", "qwen3") and not kinds:
        active = _flag(config, "use_sliding_window", where, False)
        active = active and _count(config, "max_window_layers", where, 28) < layers
    else:
        active = False
    if not active or config.get("sliding_window", 4096) is None:
        return
    window = _size(config, "sliding_window", where, 4096)  # transformers' default where the key is missing
    if window < positions:
        raise InputError(
            f"{where}: sliding_window: {window} is not supported; set it to null if no sequence is longer than that"
        )


def _llama_like(config: Mapping[str, Any], where: str, family: str) -> dict[str, Any]:
    """Llama, Mistral, Qwen2 and Qwen3. Defaults are those of their configuration classes in transformers."""
    hidden = _size(config, "hidden_size", where)
    heads = _size(config, "num_attention_heads", where)
    default_groups = {"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[family]
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        default_groups = heads
    default_positions = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}[family]
    positions = _size(config, "max_position_embeddings", where, default_positions)
    _refuse_sliding_window(config, where, family, positions)
    base, scaling = _rope(config, where, positions)
    attention_bias = family in ("llama", "qwen3") and _flag(config, "attention_bias", where, False)
    head_dim = 128 if family == "qwen3" else _divide(hidden, heads, "hidden_size", config, where)
    return {
        "num_layers": _size(config, "num_hidden_layers", where),
        "hidden_size": hidden,
        "ffn_hidden_size": _size(config, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": _size(config, "num_key_value_heads", where, default_groups),
        "head_dim": _size(config, "head_dim", where, head_dim),
        "vocab_size": _size(config, "vocab_size", where),
        "max_position_embeddings": positions,
        "normalization": "RMSNorm",
        "norm_epsilon": _number(config, "rms_norm_eps", where, 1e-6),
        "activation": _activation(config, "hidden_act", where, "silu"),
        "gated": True,
        "qkv_bias": family == "qwen2" or attention_bias,
        "attention_output_bias": attention_bias,
        "mlp_bias": family == "llama" and _flag(config, "mlp_bias", where, False),
        "tied": _flag(config, "tie_word_embeddings", where, False),
        "position_embedding": "rope",
        "rotary_base": base,
        "rope_scaling": scaling,
        "qk_norm": family == "qwen3",
    }


def _gpt2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    hidden = _size(config, "n_embd", where)
    heads = _size(config, "n_head", where)
    return {
        "num_layers": _size(config, "n_layer", where),
        "hidden_size": hidden,
        "ffn_hidden_size": _size(config, "n_inner", where, 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "head_dim": _divide(hidden, heads, "n_embd", {}, where),
        "vocab_size": _size(config, "vocab_size", where),
        "max_position_embeddings": _size(config, "n_positions", where, 1024),
        "normalization": "LayerNorm",
        "norm_epsilon": _number(config, "layer_norm_epsilon", where, 1e-5),
        "activation": _activation(config, "activation_function", where, "gelu_new"),
        "gated": False,
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tied": _flag(config, "tie_word_embeddings", where, True),
        "position_embedding": "learned_absolute",
    }


def _t5(config: Mapping[str, Any], where: str, family: str) -> dict[str, Any]:
    """T5 1.0 and 1.1 (Flan-T5) and mT5."""
    heads = _size(config, "num_heads", where, 8)
    layers = _size(config, "num_layers", where, 6)
    hidden = _size(config, "d_model", where)
    kind = config.get("feed_forward_proj", "relu" if family == "t5" else "gated-gelu")
    gated, _, name = kind.rpartition("-") if isinstance(kind, str) else ("?", "", "")
    if gated not in ("", "gated") or name not in _HF_ACTIVATIONS:
        raise InputError(f"{where}: feed_forward_proj: {_json(kind)} is not supported")
    if kind == "gated-gelu":  # by which transformers means the tanh approximation
        name = "gelu_new"
    # T5 1.0 ties its head to the embedding and scales; 1.1 and mT5 do neither. transformers 5 ties in any case and
    # writes down whether it scales.
    tied = _flag(config, "tie_word_embeddings", where, family == "t5")
    scales = family == "t5" and _flag(config, "scale_decoder_outputs", where, tied)
    return {
        "num_layers": _size(config, "num_decoder_layers", where, layers),
        "encoder_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": _size(config, "d_ff", where),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "head_dim": _size(config, "d_kv", where),
        "vocab_size": _size(config, "vocab_size", where),
        "max_position_embeddings": _ANY_LENGTH,
        "normalization": "RMSNorm",
        "norm_epsilon": _number(config, "layer_norm_epsilon", where, 1e-6),
        "activation": _HF_ACTIVATIONS[name],
        "gated": gated == "gated",
        "qkv_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "tied": tied,
        "position_embedding": "relative",
        "decoder_start_id": _token(config, "decoder_start_token_id", where, _token(config, "pad_token_id", where, 0)),
        "relative_buckets": _size(config, "relative_attention_num_buckets", where, 32),
        "relative_max_distance": _size(config, "relative_attention_max_distance", where, 128),
        "softmax_scale": 1.0,
        "output_scale": hidden**-0.5 if scales else 1.0,
    }


def _token(config: Mapping[str, Any], key: str, where: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{where}: {key}: must be a token id, not {_json(value)}")
    return value


def _rope(config: Mapping[str, Any], where: str, positions: int) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, as transformers 5 writes them (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    # The first of the two that says something, as in transformers.
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: {key}: must be a mapping, not {_json(rope)}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{where}: {key}: different rotary embeddings per kind of layer are not supported")
    theta = rope if "rope_theta" in rope else config
    base = _number(theta, "rope_theta", where, 10000.0)
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise InputError(f"{where}: {key}.partial_rotary_factor: only 1 is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise InputError(f"{where}: {key}: type {kind!r} is not supported, only 'default' and 'llama3'")
    if config.get("original_max_position_embeddings") is not None:  # it goes first in transformers too
        rope = {**rope, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    scaling: dict[str, Any] = {"rope_type": "llama3"}
    for name in LLAMA3_ROPE:
        default = positions if name == "original_max_position_embeddings" else None
        scaling[name] = _number(rope, name, f"{where}: {key}", default)
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{where}: {key}: low_freq_factor must be less than high_freq_factor")
    return base, scaling


def _size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            raise InputError(f"{where}: {key} is missing")
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: {key}: must be a positive integer, not {_json(value)}")
    return value


def _count(config: Mapping[str, Any], key: str, where: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{where}: {key}: must be a whole number from 0 on, not {_json(value)}")
    return value


def _flag(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key}: must be true or false, not {_json(value)}")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    try:
        if isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            number = float(value)  # YAML reads 1e-5 as text
            if number > 0 and math.isfinite(number):
                return number
    except (ValueError, OverflowError):
        pass
    raise InputError(f"{where}: {key}: must be a positive number, not {_json(config.get(key))}")


def _divide(hidden: int, heads: int, key: str, config: Mapping[str, Any], where: str) -> int:
    if hidden % heads and config.get("head_dim") is None:
        raise InputError(f"{where}: {key} {hidden} must be a multiple of the {heads} attention heads")
    return hidden // heads


def _activation(config: Mapping[str, Any], key: str, where: str, default: str) -> str:
    name = config.get(key, default)
    if not isinstance(name, str) or name not in _HF_ACTIVATIONS:
        raise InputError(f"{where}: {key}: {_json(name)} is not supported, only {', '.join(_HF_ACTIVATIONS)}")
    return _HF_ACTIVATIONS[name]
