"""What the config.json of public models says, as far as their architecture goes: for plans without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


_T5 = {
    "d_kv": 64, "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_XL = {**_T5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32}
_BASE = {**_T5, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
_QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_OPEN_LLAMA = {"model_type": "llama", "vocab_size": 32000, "num_attention_heads": 32, "max_position_embeddings": 2048}
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.3-70B-Instruct": {
        **_LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "rope_scaling": _llama3_rope(8.0),
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "rope_scaling": _llama3_rope(8.0),
    },
    "meta-llama/Llama-3.2-1B-Instruct": {
        **_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True, "rope_scaling": _llama3_rope(32.0),
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        **_QWEN2, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {
        **_QWEN2, "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "openlm-research/open_llama_7b": {
        **_OPEN_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    },
    "openlm-research/open_llama_3b": {
        **_OPEN_LLAMA, "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26,
    },
    "openai-community/gpt2-xl": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024,
    },
    "openai-community/gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    },
    "google/t5-v1_1-xl": {**_XL, "model_type": "t5", "vocab_size": 32128},
    "google/t5-v1_1-base": {**_BASE, "model_type": "t5", "vocab_size": 32128},
    "google/mt5-xl": {**_XL, "model_type": "mt5", "vocab_size": 250112},
    "google/mt5-base": {**_BASE, "model_type": "mt5", "vocab_size": 250112},
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_REVISION = "0" * 40


def write_hub_cache(folder: Path) -> None:
    """The configs as the hub's client caches them; set HF_HUB_CACHE to the folder and HF_HUB_OFFLINE to 1."""
    for name, config in HUB_CONFIGS.items():
        model = folder / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / _REVISION
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(_REVISION)
