"""What a model is, read from a Hugging Face `config.json`: sizes and switches, and nothing of how it is run.

An `Architecture` says everything that decides the shapes and the mathematics of a model. It maps onto the fields of
Megatron-Core's `TransformerConfig` and `GPTModel`; what these cannot express is refused by name, because a model
that differs silently from the one in the folder is worse than an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from megatron_amd.data.hub import check_hub_reachable, is_hub_name
from megatron_amd.errors import InputError, first_line

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

_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


_LAYER_COUNTS = {
    "gpt2": ("n_layer",),
    "t5": ("num_layers", "num_decoder_layers"),
    "mt5": ("num_layers", "num_decoder_layers"),
}
"""Keys of config.json that count layers, where there is no `num_hidden_layers`."""
_T5_TABLES = {"shared.weight", "lm_head.weight"}
_ANY_LENGTH = 2**20
"""Positions of a model whose position biases have no end."""


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
    """One of `FAMILIES`: decides the names of the tensors in its folder."""
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
        family = config.get("model_type")
        if family not in FAMILIES:
            said = "is missing" if family is None else f"{family!r} is not supported"
            raise InputError(f"{where}: model_type {said}; supported are {', '.join(FAMILIES)}")
        _refuse_features(config, where)
        if family in ("t5", "mt5"):
            sizes = _t5(config, where, family)
        else:
            sizes = _gpt2(config, where) if family == "gpt2" else _llama_like(config, where, family)
        architecture = Architecture(family=family, hf_config=dict(config), **sizes)
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
        factor, low, high, original = (self.rope_scaling[name] for name in _LLAMA3_ROPE)
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
                f"{where}: attention_bias {_json(self.attention_output_bias)} with mlp_bias {_json(self.mlp_bias)} is "
                "not supported; Megatron-Core needs both or neither"
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
    file = model_file(path, "config.json", f"{where}.path")
    architecture = Architecture.from_hf(read_json(file), str(file))
    if architecture.has_encoder and architecture.tied and _has_own_head(file.parent):
        return replace(architecture, tied=False)
    return architecture


def _has_own_head(folder: Path) -> bool:
    """Whether a T5's files hold an LM head that is not the embedding.

    transformers 5 writes into config.json that the two are tied also where they are not, and looks at the weights.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in _T5_TABLES & set(opened.keys())}
        except (SafetensorError, OSError):  # whoever loads the weights says so
            return False
    return len(tensors) == len(_T5_TABLES) and not torch.equal(*tensors.values())


def model_file(source: str, name: str, where: str) -> Path:
    """A file of a model's folder, or of a hub name: then it is downloaded to the hub's cache.

    Raises InputError when there is no such folder, hub name or file.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise InputError(f"{where}: {folder} has no {name}; give the folder of a Hugging Face model")
        return folder / name
    if folder.exists():
        raise InputError(f"{where}: {folder} is not a folder; give the folder of a Hugging Face model")
    if not is_hub_name(source):
        raise InputError(f"{where}: there is no folder {source}")
    from huggingface_hub import hf_hub_download

    check_hub_reachable(source, where)
    try:
        return Path(hf_hub_download(source, name))
    except Exception as error:  # the client's exceptions differ between versions
        raise InputError(f"{where}: {source} cannot be read from the hub: {first_line(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError naming the file otherwise."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold a JSON object, not {type(content).__name__}")
    return content


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _refuse_features(config: Mapping[str, Any], where: str) -> None:
    """Features of the supported families that Megatron-Core's GPTModel or this project lacks."""
    if config.get("quantization_config"):
        raise InputError(f"{where}: quantization_config: quantised weights are not supported; save the model in bf16")
    _refuse_own_code(config, where)
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if (config.get(key) or 0) > 1:
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
    ):
        if config.get(key, wanted) not in (None, wanted):
            raise InputError(f"{where}: {key}: only {_json(wanted)} is supported, not {_json(config[key])}")


def _refuse_own_code(config: Mapping[str, Any], where: str) -> None:
    """The folder's own Python files are never run; a model that they change would be another one here."""
    own_classes = config.get("auto_map") or {}
    for kind in ("AutoModelForCausalLM", "AutoModel"):
        name = str(own_classes.get(kind, "")) if isinstance(own_classes, Mapping) else str(own_classes)
        family_class = FAMILIES[config["model_type"]]
        if name and name.rpartition(".")[2] not in (family_class, family_class.replace("ForCausalLM", "Model")):
            raise InputError(
                f"{where}: auto_map: the model's own code ({name}) is not run; if it computes what {family_class} of "
                "transformers does, remove auto_map"
            )


def _refuse_sliding_window(config: Mapping[str, Any], where: str, family: str, positions: int) -> None:
    """A window counts only where transformers would use it and a sequence can be longer than it."""
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise InputError(f"{where}: layer_types: {kind!r} is not supported, only 'full_attention'")
    if family == "mistral":
        active = True
    elif family in ("qwen2", "qwen3") and not config.get("layer_types"):
        active = bool(config.get("use_sliding_window")) and config.get("max_window_layers", 28) < config.get(
            "num_hidden_layers", 0
        )
    else:
        active = False
    window = config.get("sliding_window", 4096)  # transformers' default where the key is missing
    if active and window is not None and window < positions:
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
    attention_bias = family in ("llama", "qwen3") and bool(config.get("attention_bias"))
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
        "mlp_bias": family == "llama" and bool(config.get("mlp_bias")),
        "tied": bool(config.get("tie_word_embeddings", False)),
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
        "tied": bool(config.get("tie_word_embeddings", True)),
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
    tied = bool(config.get("tie_word_embeddings", family == "t5"))
    scales = config.get("scale_decoder_outputs", tied) if family == "t5" else False
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
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
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
    scaling: dict[str, Any] = {"rope_type": "llama3"}
    for name in _LLAMA3_ROPE:
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


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, str):
        # YAML reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise InputError(f"{where}: {key}: must be a positive number, not {_json(config.get(key))}")
    return float(value)


def _divide(hidden: int, heads: int, key: str, config: Mapping[str, Any], where: str) -> int:
    if hidden % heads and config.get("head_dim") is None:
        raise InputError(f"{where}: {key} {hidden} must be a multiple of the {heads} attention heads")
    return hidden // heads


def _activation(config: Mapping[str, Any], key: str, where: str, default: str) -> str:
    name = config.get(key, default)
    if name not in _HF_ACTIVATIONS:
        raise InputError(f"{where}: {key}: {_json(name)} is not supported, only {', '.join(_HF_ACTIVATIONS)}")
    return _HF_ACTIVATIONS[name]
