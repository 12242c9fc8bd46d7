"""Tiny random models of each supported family, saved by `transformers`, and the same in Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_amd.config import ParallelConfig, TrainingConfig
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import Layout, build_layout
from megatron_amd.models.architecture import Architecture, load_architecture
from megatron_amd.models.gpt import transformer_config
from megatron_amd.models.roles import build_language_model

_LLAMA_LIKE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# At 64 positions every part of the scaling counts: wavelengths below 8 are kept, above 32 divided, mixed between.
_OTHER_ROPE = {
    **_LLAMA3_ROPE, "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {**_LLAMA_LIKE, "model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-biases": {**_LLAMA_LIKE, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {**_LLAMA_LIKE, "model_type": "llama", "head_dim": 16, "rope_parameters": _LLAMA3_ROPE},
    "llama3-other-rope": {**_LLAMA_LIKE, "model_type": "llama", "head_dim": 16, "rope_parameters": _OTHER_ROPE},
    "open-llama": {
        **_LLAMA_LIKE, "model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 64,
    },
    "smollm2": {
        **_LLAMA_LIKE, "model_type": "llama", "tie_word_embeddings": True, "rope_theta": 1e5, "num_attention_heads": 6,
        "hidden_size": 48, "vocab_size": 61,
    },
    "mistral": {**_LLAMA_LIKE, "model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, "head_dim": 12},
    "qwen2": {**_LLAMA_LIKE, "model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-tied": {**_LLAMA_LIKE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_LLAMA_LIKE, "model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "qwen3-tied": {**_LLAMA_LIKE, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True, "vocab_size": 55},
    "gpt2": {"model_type": "gpt2", "vocab_size": 53, "n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64},
    "gpt2-untied": {
        "model_type": "gpt2", "vocab_size": 53, "n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64,
        "n_inner": 40, "tie_word_embeddings": False,
    },
}  # fmt: skip
_T5 = {
    "vocab_size": 53, "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 2,
}  # fmt: skip
T5_MODELS: dict[str, dict[str, Any]] = {
    "t5": {**_T5, "model_type": "t5"},
    "t5-1.1": {**_T5, "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-silu": {
        **_T5, "model_type": "t5", "feed_forward_proj": "gated-silu", "num_layers": 4, "num_decoder_layers": 2,
        "relative_attention_num_buckets": 32,
    },
    "t5-own-head": {**_T5, "model_type": "t5", "tie_word_embeddings": False, "scale_decoder_outputs": True},
    "mt5": {**_T5, "model_type": "mt5", "num_decoder_layers": 3, "tie_word_embeddings": False},
}  # fmt: skip
PADDED_VOCAB = 64


def make_hf_model(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model with random weights; norms and biases too, so that nothing can hide behind a one or a zero."""
    settings = dict((MODELS | T5_MODELS)[kind])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(sum(map(ord, kind)))
    classes = transformers.AutoModelForSeq2SeqLM if kind in T5_MODELS else transformers.AutoModelForCausalLM
    model = classes.from_config(config, dtype=dtype).eval()
    if kind in T5_MODELS and not settings.get("tie_word_embeddings", True):  # transformers 5 makes them tied
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.15
            parameter.copy_(torch.randn(parameter.shape) * scale + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def save_hf_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """The same, saved as `transformers` saves it."""
    model = make_hf_model(kind, dtype)
    model.save_pretrained(folder, **options)
    return model


def build_megatron(
    folder: Path,
    parallel: ParallelConfig,
    *,
    layers: tuple[int, ...] | None = None,
    precision: Any = "fp32",
    layout: Layout | None = None,
) -> tuple[Any, Architecture, Layout]:
    """This rank's stage of the folder's model, not yet filled. Collective, unless `layout` is given."""
    architecture = load_architecture(str(folder), None, "model")
    if layers is not None:
        architecture = architecture.with_layers(layers)
    layout = layout or build_layout(parallel, torch.device("cpu"))
    set_seeds(1, layout)
    config = transformer_config(architecture, TrainingConfig(precision=precision), layout, {}, "model")
    model = build_language_model(architecture, config, layout, "local", PADDED_VOCAB)
    for parameter in model.parameters():  # a value that loading must overwrite
        parameter.data = torch.full_like(parameter, 7.0, dtype=config.params_dtype)
    return model.eval(), architecture, layout


def random_tokens(rows: int = 2, length: int = 17) -> Tensor:
    """int64 [rows, length] token ids."""
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def hf_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """[rows, length, V] logits of `transformers`. T5's encoder and decoder get the same."""
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return model(input_ids=tokens, labels=tokens).logits
    return model(input_ids=tokens).logits


def state_dict(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
