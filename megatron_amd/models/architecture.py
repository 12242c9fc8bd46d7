"""What a model is: sizes and switches, and nothing of how it is run. hf_config.py reads them from a config.json.

An `Architecture` says everything that decides the shapes and the mathematics of a model. It maps onto the fields of
Megatron-Core's `TransformerConfig` and `GPTModel`; what these cannot express is refused by name, because a model
that differs silently from the one in the folder is worse than an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_amd.errors import InputError
from megatron_amd.models.hf_config import LLAMA3_ROPE, architecture_fields
from megatron_amd.models.model_files import has_own_head, model_file, read_json

_LAYER_COUNTS = {
    "gpt2": ("n_layer",),
    "t5": ("num_layers", "num_decoder_layers"),
    "mt5": ("num_layers", "num_decoder_layers"),
}
"""Keys of config.json that count layers, where there is no `num_hidden_layers`."""


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): `gelu_new` of GPT-2."""
    return F.gelu(x, approximate="tanh")


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches of one model."""

    family: str
    """One of hf_config.py's `FAMILIES`: decides the names of the tensors in its folder."""
    num_layers: int
    """Of the decoder."""
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP (of each of its two halves when `gated`)."""
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads: grouped-query attention where fewer than `num_attention_heads`."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the folder; may exceed the tokenizer's size."""
    max_position_embeddings: int
    normalization: str
    """`RMSNorm` or `LayerNorm`."""
    norm_epsilon: float
    activation: str
    """`silu`, `gelu`, `gelu_tanh` or `relu`."""
    gated: bool
    """MLP is act(gate) * up."""
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    tied: bool
    """The LM head is the embedding."""
    position_embedding: str
    """`rope`, `learned_absolute` or `relative` (T5's buckets)."""
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """None, or llama3's scaling: rope_type, factor, low_freq_factor, high_freq_factor and
    original_max_position_embeddings."""
    qk_norm: bool = False
    """RMSNorm of each head's query and key, before their rotation."""
    encoder_layers: int = 0
    """Of an encoder-decoder model; 0: there is only a decoder."""
    decoder_start_id: int | None = None
    """Token before a response in the decoder of an encoder-decoder model."""
    relative_buckets: int = 0
    """Of distances between positions, each with a bias for each head."""
    relative_max_distance: int = 0
    """Distance from which all are in the last bucket."""
    softmax_scale: float | None = None
    """Of attention's scores; None: 1 / sqrt(head_dim)."""
    output_scale: float = 1.0
    """Of the final hidden states before the LM head."""
    hf_config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What config.json said; written back on export."""

    @staticmethod
    def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
        """Read a config.json's contents; `where` names it in errors.

        Raises InputError for a model_type, a feature or a value that is not supported, naming the key.
        """
        architecture = Architecture(hf_config=dict(config), **architecture_fields(config, where))
        architecture._check(where)
        return architecture

    def with_layers(self, layers: tuple[int, ...], where: str = "init.layers") -> Architecture:
        """The model that keeps only `layers` (indices from 0, in the order given; a layer may be used twice), in the
        encoder too where there is one.

        Raises InputError when there is none, or one that the model does not have.
        """
        if not layers:
            raise InputError(f"{where}: must name at least one layer")
        count = min(self.num_layers, self.encoder_layers or self.num_layers)
        for layer in layers:
            if not 0 <= layer < count:
                raise InputError(f"{where}: {layer} is not one of the model's layers 0 to {count - 1}")
        hf_config = dict(self.hf_config)
        for key in _LAYER_COUNTS.get(self.family, ("num_hidden_layers",)):
            hf_config[key] = len(layers)
        if hf_config.get("layer_types"):
            hf_config["layer_types"] = [hf_config["layer_types"][layer] for layer in layers]
        encoder_layers = len(layers) if self.encoder_layers else 0
        return replace(self, num_layers=len(layers), encoder_layers=encoder_layers, hf_config=hf_config)

    @property
    def has_encoder(self) -> bool:
        """Whether prompts go into an encoder."""
        return self.encoder_layers > 0

    def sizes(self) -> dict[str, Any]:
        """Everything but what the folder's config.json said: equal for two models that compute the same function."""
        # qk_norm only where it is: checkpoints are older than the field
        hidden = {"hf_config"} if self.qk_norm else {"hf_config", "qk_norm"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}

    def check_layout(self, tensor_parallel: int, pipeline_parallel: int, where: str) -> None:
        """Raise InputError when the model cannot be split over so many tensor ranks and pipeline stages."""
        for what, count in (
            ("attention heads", self.num_attention_heads),
            ("key-value heads", self.num_query_groups),
            ("MLP columns", self.ffn_hidden_size),
        ):
            if count % tensor_parallel:
                raise InputError(
                    f"{where}: its {count} {what} cannot be divided by parallel.tensor_model_parallel_size "
                    f"{tensor_parallel}"
                )
        layers = self.num_layers + self.encoder_layers
        if self.has_encoder and layers < pipeline_parallel:
            raise InputError(
                f"{where}: its {layers} layers are fewer than parallel.pipeline_model_parallel_size {pipeline_parallel}"
            )
        if not self.has_encoder and self.num_layers % pipeline_parallel:
            raise InputError(
                f"{where}: its {self.num_layers} layers cannot be divided by parallel.pipeline_model_parallel_size "
                f"{pipeline_parallel}"
            )

    def transformer_config_fields(self) -> dict[str, Any]:
        """The fields of Megatron-Core's TransformerConfig that the architecture fixes.

        Dropout is off: a distance between two models is defined without it.
        """
        return {
            "num_layers": self.num_layers + self.encoder_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "softmax_scale": self.softmax_scale,
            "normalization": self.normalization,
            "layernorm_epsilon": self.norm_epsilon,
            "activation_func": _FUNCTIONS[self.activation],
            "gated_linear_unit": self.gated,
            "add_bias_linear": self.mlp_bias,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }

    def gpt_model_fields(self) -> dict[str, Any]:
        """The arguments of Megatron-Core's GPTModel that the architecture fixes (the vocabulary's padding aside)."""
        arguments: dict[str, Any] = {
            "position_embedding_type": self.position_embedding,
            "share_embeddings_and_output_weights": self.tied,
            "max_sequence_length": self.max_position_embeddings,
        }
        if self.position_embedding == "rope":
            arguments["rotary_base"] = self.rotary_base
        return arguments

    def inverse_frequencies(self) -> torch.Tensor:
        """Radians by which one position turns each pair of a head's numbers, float32 [head_dim / 2].

        base^(-2i / head_dim). Llama 3's scaling divides the frequencies whose wavelength exceeds
        original_max_position_embeddings / low_freq_factor by `factor`, keeps those whose wavelength is below
        original_max_position_embeddings / high_freq_factor, and goes linearly in 1 / wavelength between the two
        (arXiv:2407.21783; the same operations as `transformers`, so that the numbers are equal).
        """
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu")
        plain = 1.0 / (self.rotary_base ** (steps / self.head_dim))
        if self.rope_scaling is None:
            return plain
        factor, low, high, original = (self.rope_scaling[name] for name in LLAMA3_ROPE)
        wavelength = 2 * math.pi / plain
        kept = (original / wavelength - low) / (high - low)
        between = (1 - kept) * plain / factor + kept * plain
        scaled = torch.where(wavelength > original / low, plain / factor, between)
        return torch.where(wavelength < original / high, plain, scaled)

    def count_parameters(self, padded_vocab_size: int | None = None) -> int:
        """Number of parameters, exactly, with the vocabulary padded to `padded_vocab_size` (default: not padded).

        A tied head counts once.
        """
        hidden, heads, groups = self.hidden_size, self.num_attention_heads, self.num_query_groups
        qkv_rows = (heads + 2 * groups) * self.head_dim
        fc1_rows = self.ffn_hidden_size * (2 if self.gated else 1)
        norm = hidden * (2 if self.normalization == "LayerNorm" else 1)
        layer = (qkv_rows + heads * self.head_dim) * hidden + (fc1_rows + self.ffn_hidden_size) * hidden + 2 * norm
        layer += 2 * self.head_dim * self.qk_norm
        layer += qkv_rows * self.qkv_bias + hidden * self.attention_output_bias + (fc1_rows + hidden) * self.mlp_bias
        table = (padded_vocab_size or self.vocab_size) * hidden
        positions = self.max_position_embeddings * hidden if self.position_embedding == "learned_absolute" else 0
        encoder = 0
        if self.has_encoder:
            positions = 2 * self.relative_buckets * heads
            encoder = self.encoder_layers * layer + norm
            layer += 4 * heads * self.head_dim * hidden + norm  # cross-attention
        return encoder + self.num_layers * layer + norm + positions + table * (1 if self.tied else 2)

    def _check(self, where: str) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"{where}: num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_query_groups}"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise InputError(f"{where}: head_dim {self.head_dim} must be even for rotary embeddings")
        # Megatron-Core has one switch for the biases of the output projection and the MLP.
        if self.attention_output_bias != self.mlp_bias:
            raise InputError(
                f"{where}: attention_bias {str(self.attention_output_bias).lower()} with mlp_bias "
                f"{str(self.mlp_bias).lower()} is not supported; Megatron-Core needs both or neither"
            )


def load_architecture(path: str | None, inline: Mapping[str, Any] | None, where: str) -> Architecture:
    """The architecture of a folder or hub name (`path`), or of a config.json's contents (`inline`).

    `where` names the setting in errors, such as `teacher`. Raises InputError for a missing folder, a missing or
    invalid config.json, and whatever `Architecture.from_hf` refuses.
    """
    if inline is not None and path is None:
        return Architecture.from_hf(inline, f"{where}.architecture")
    if path is None:
        raise InputError(f"{where}: needs a path (a folder or hub name) or an architecture")
    return folder_architecture(path, f"{where}.path")


def folder_architecture(path: str, where: str) -> Architecture:
    """The same of a folder or hub name; `where` is the setting itself."""
    file = model_file(path, "config.json", where)
    architecture = Architecture.from_hf(read_json(file), str(file))
    if architecture.has_encoder and architecture.tied and has_own_head(path, where):
        return replace(architecture, tied=False)
    return architecture
