"""What each parameter of a Megatron-Core GPTModel or of our T5 is called, and made of, in a Hugging Face folder.

For every parameter: the tensors of the folder, how they are stacked, and how tensor parallelism splits the result.
Megatron-Core stacks differently from Hugging Face in three places:

- `linear_qkv` holds, for each query group in turn, the group's queries, its key and its value;
- `linear_kv` of cross-attention holds, for each head in turn, its key and its value;
- `linear_fc1` of a gated MLP holds, on each tensor-parallel rank, its rows of `gate`, then its rows of `up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_amd.models.architecture import Architecture

STACKS = ("encoder", "decoder")
# Transformer Engine fuses these norms into the linear layer that follows them.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names of a family's modules."""

    modules: Mapping[str, str | tuple[str, ...]]
    """Megatron-Core's module: the folder's, or the folder's several that are stacked in it; one that holds the whole
    stack in one tensor is named alone. `{}` is a layer's number. Shapes and biases follow from the architecture."""
    transposed: bool = False
    """The matrices of layers are stored [in, out]."""
    copies: tuple[str, ...] = ()
    """Further tensors that some folders hold of the embedding; they must be equal to it."""
    ignored: str = ""
    """Regular expression of tensors that some folders hold and that the model does without: constants, recomputed."""


_LLAMA = Family(
    modules={
        "embedding.word_embeddings": "model.embed_tokens",
        "decoder.layers.{}.input_layernorm": "model.layers.{}.input_layernorm",
        "decoder.layers.{}.self_attention.linear_qkv": (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ),
        "decoder.layers.{}.self_attention.linear_proj": "model.layers.{}.self_attn.o_proj",
        "decoder.layers.{}.pre_mlp_layernorm": "model.layers.{}.post_attention_layernorm",
        "decoder.layers.{}.mlp.linear_fc1": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
        "decoder.layers.{}.mlp.linear_fc2": "model.layers.{}.mlp.down_proj",
        "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
    },
    ignored=r"(.*\.)?rotary_emb\.inv_freq",
)
_QWEN3 = replace(
    _LLAMA,
    modules={
        **_LLAMA.modules,
        "decoder.layers.{}.self_attention.q_layernorm": "model.layers.{}.self_attn.q_norm",
        "decoder.layers.{}.self_attention.k_layernorm": "model.layers.{}.self_attn.k_norm",
    },
)
_GPT2 = Family(
    modules={
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "decoder.layers.{}.input_layernorm": "transformer.h.{}.ln_1",
        "decoder.layers.{}.self_attention.linear_qkv": "transformer.h.{}.attn.c_attn",
        "decoder.layers.{}.self_attention.linear_proj": "transformer.h.{}.attn.c_proj",
        "decoder.layers.{}.pre_mlp_layernorm": "transformer.h.{}.ln_2",
        "decoder.layers.{}.mlp.linear_fc1": "transformer.h.{}.mlp.c_fc",
        "decoder.layers.{}.mlp.linear_fc2": "transformer.h.{}.mlp.c_proj",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
    },
    transposed=True,
    ignored=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
)
_T5 = Family(
    modules={
        "embedding.word_embeddings": "shared",
        "encoder_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "encoder.layers.{}.input_layernorm": "encoder.block.{}.layer.0.layer_norm",
        "encoder.layers.{}.self_attention.linear_qkv": (
            "encoder.block.{}.layer.0.SelfAttention.q",
            "encoder.block.{}.layer.0.SelfAttention.k",
            "encoder.block.{}.layer.0.SelfAttention.v",
        ),
        "encoder.layers.{}.self_attention.linear_proj": "encoder.block.{}.layer.0.SelfAttention.o",
        "encoder.layers.{}.pre_mlp_layernorm": "encoder.block.{}.layer.1.layer_norm",
        "encoder.layers.{}.mlp.linear_fc1": "encoder.block.{}.layer.1.DenseReluDense.wi",
        "encoder.layers.{}.mlp.linear_fc2": "encoder.block.{}.layer.1.DenseReluDense.wo",
        "encoder.final_layernorm": "encoder.final_layer_norm",
        "decoder_bias": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "decoder.layers.{}.input_layernorm": "decoder.block.{}.layer.0.layer_norm",
        "decoder.layers.{}.self_attention.linear_qkv": (
            "decoder.block.{}.layer.0.SelfAttention.q",
            "decoder.block.{}.layer.0.SelfAttention.k",
            "decoder.block.{}.layer.0.SelfAttention.v",
        ),
        "decoder.layers.{}.self_attention.linear_proj": "decoder.block.{}.layer.0.SelfAttention.o",
        "decoder.layers.{}.pre_cross_attn_layernorm": "decoder.block.{}.layer.1.layer_norm",
        "decoder.layers.{}.cross_attention.linear_q": "decoder.block.{}.layer.1.EncDecAttention.q",
        "decoder.layers.{}.cross_attention.linear_kv": (
            "decoder.block.{}.layer.1.EncDecAttention.k",
            "decoder.block.{}.layer.1.EncDecAttention.v",
        ),
        "decoder.layers.{}.cross_attention.linear_proj": "decoder.block.{}.layer.1.EncDecAttention.o",
        "decoder.layers.{}.pre_mlp_layernorm": "decoder.block.{}.layer.2.layer_norm",
        "decoder.layers.{}.mlp.linear_fc1": "decoder.block.{}.layer.2.DenseReluDense.wi",
        "decoder.layers.{}.mlp.linear_fc2": "decoder.block.{}.layer.2.DenseReluDense.wo",
        "decoder.final_layernorm": "decoder.final_layer_norm",
        "output_layer": "lm_head",
    },
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    # A table of cross-attention that no T5 uses.
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
_GATED_T5 = replace(
    _T5,
    modules={
        **_T5.modules,
        "encoder.layers.{}.mlp.linear_fc1": (
            "encoder.block.{}.layer.1.DenseReluDense.wi_0",
            "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        ),
        "decoder.layers.{}.mlp.linear_fc1": (
            "decoder.block.{}.layer.2.DenseReluDense.wi_0",
            "decoder.block.{}.layer.2.DenseReluDense.wi_1",
        ),
    },
)
_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3, "gpt2": _GPT2}


def family_of(architecture: Architecture) -> Family:
    """The names of a model. OpenLLaMA and SmolLM2 are of type llama, Qwen2.5 of type qwen2, Flan-T5 of type t5."""
    if architecture.has_encoder:
        return _GATED_T5 if architecture.gated else _T5
    return _FAMILIES[architecture.family]


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one Hugging Face tensor, in Megatron-Core's orientation (a matrix is [out, in])."""

    tensor: str
    rows: int
    first_row: int = 0


@dataclass(frozen=True, kw_only=True)
class Weight:
    """How one parameter is made of Hugging Face tensors."""

    parts: tuple[Part, ...]
    columns: int | None
    """Width of a matrix; None for a vector."""
    split: Literal["rows", "columns", "vocabulary"] | None = None
    """What tensor parallelism divides: output rows, input columns, padded vocabulary rows, nothing."""
    groups: int = 1
    """Query groups whose rows the parts take turns in, over the whole model."""
    transposed: bool = False
    """The folder holds [in, out] (GPT-2's Conv1D)."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape in the folder of each tensor that the parameter is made of."""
        rows: dict[str, int] = {}
        for part in self.parts:
            rows[part.tensor] = rows.get(part.tensor, 0) + part.rows
        if self.columns is None:
            return {name: (count,) for name, count in rows.items()}
        return {
            name: (self.columns, count) if self.transposed else (count, self.columns) for name, count in rows.items()
        }


@dataclass(frozen=True)
class _Module:
    """The parameters of one of the model's modules: `weight`, and where it has one `bias`."""

    rows: tuple[int, ...]
    """Of each thing that is stacked in it; one number where that is one thing."""
    columns: int | None = None
    split: Literal["rows", "columns", "vocabulary"] | None = None
    bias: bool = False
    groups: int = 1


def _modules(a: Architecture) -> dict[str, _Module]:
    """Every module that some family has, as this architecture shapes it."""
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    norm = _Module((a.hidden_size,), bias=a.normalization == "LayerNorm")
    fc1_rows = (a.ffn_hidden_size, a.ffn_hidden_size) if a.gated else (a.ffn_hidden_size,)
    layer = {
        "input_layernorm": norm,
        "self_attention.linear_qkv": _Module(
            (queries, keys, keys), a.hidden_size, "rows", a.qkv_bias, a.num_query_groups
        ),
        "self_attention.q_layernorm": _Module((a.head_dim,)),
        "self_attention.k_layernorm": _Module((a.head_dim,)),
        "self_attention.linear_proj": _Module((a.hidden_size,), queries, "columns", a.attention_output_bias),
        "pre_mlp_layernorm": norm,
        "mlp.linear_fc1": _Module(fc1_rows, a.hidden_size, "rows", a.mlp_bias),
        "mlp.linear_fc2": _Module((a.hidden_size,), a.ffn_hidden_size, "columns", a.mlp_bias),
        "pre_cross_attn_layernorm": norm,
        "cross_attention.linear_q": _Module((queries,), a.hidden_size, "rows"),
        "cross_attention.linear_kv": _Module((keys, keys), a.hidden_size, "rows", groups=a.num_query_groups),
        "cross_attention.linear_proj": _Module((a.hidden_size,), queries, "columns"),
    }
    bias = _Module((a.relative_buckets,), a.num_attention_heads, "columns")
    return {
        "embedding.word_embeddings": _Module((a.vocab_size,), a.hidden_size, "vocabulary"),
        "embedding.position_embeddings": _Module((a.max_position_embeddings,), a.hidden_size),
        **{f"{stack}.layers.{{}}.{name}": module for stack in STACKS for name, module in layer.items()},
        **{f"{stack}.final_layernorm": norm for stack in STACKS},
        **{f"{stack}_bias": bias for stack in STACKS},
        "output_layer": _Module((a.vocab_size,), a.hidden_size, "vocabulary"),
    }


def model_weights(architecture: Architecture, layers: tuple[int, ...] | None = None) -> dict[str, Weight]:
    """Every parameter of the whole model by its Megatron-Core name, layers numbered over all pipeline stages.

    In the model's order: embeddings, layers, final norm, head. `layers[i]` is the folder's layer that model layer i is
    made of (in the encoder too where there is one); by default the same one. The copy of a tied embedding that the last
    pipeline stage holds, `output_layer.weight`, is listed too.
    """
    family, modules = family_of(architecture), _modules(architecture)
    counts = {"encoder": architecture.encoder_layers, "decoder": architecture.num_layers}
    weights: dict[str, Weight] = {}

    def add(name: str, number: int | None = None, source: int | None = None) -> None:
        module = modules[name]
        for kind in ("weight", "bias") if module.bias else ("weight",):
            transposed = family.transposed and number is not None
            weight = _weight(module, family.modules[name], kind, source, transposed)
            weights[f"{name.format(number)}.{kind}"] = weight

    of_layers = {stack: [name for name in family.modules if name.startswith(f"{stack}.layers.")] for stack in STACKS}
    for name in family.modules:
        stack, _, in_layer = name.partition(".layers.")
        if not in_layer:
            add(name)
        elif name == of_layers[stack][0]:
            for number, source in enumerate(layers if layers is not None else range(counts[stack])):
                for of_layer in of_layers[stack]:
                    add(of_layer, number, source)
    if architecture.tied:
        weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
    return weights


def _weight(module: _Module, sources: str | tuple[str, ...], kind: str, layer: int | None, transposed: bool) -> Weight:
    is_matrix = kind == "weight" and module.columns is not None
    if isinstance(sources, str):  # one tensor holds them one after another
        starts = accumulate(module.rows[:-1], initial=0)
        parts = [Part(sources, rows, first) for rows, first in zip(module.rows, starts, strict=True)]
    else:
        parts = [Part(source, rows) for source, rows in zip(sources, module.rows, strict=True)]
    return Weight(
        parts=tuple(replace(part, tensor=f"{part.tensor.format(layer)}.{kind}") for part in parts),
        columns=module.columns if is_matrix else None,
        split=module.split if is_matrix or module.split != "columns" else None,
        groups=module.groups,
        transposed=transposed and is_matrix,
    )


def stage_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of a pipeline stage under the names of the local layer spec, layers numbered over all stages."""
    stage = unwrap(model)
    parameters = {}
    for name, parameter in stage.named_parameters():
        stack, _, rest = name.partition(".layers.")
        if rest:
            index, rest = rest.split(".", 1)
            for fused, plain in FUSED_NORMS.items():
                rest = rest.replace(fused, plain)
            name = f"{stack}.layers.{getattr(stage, stack).layers[int(index)].layer_number - 1}.{rest}"
        parameters[name] = parameter
    return parameters


def unwrap(model: Any) -> Any:
    """The model inside Megatron-Core's DistributedDataParallel, or itself."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model


def join_shards(shards: list[Tensor], weight: Weight) -> dict[str, Tensor]:
    """All tensor-parallel shards of a parameter -> the folder's tensors: the inverse of reading them."""
    if weight.split == "rows":
        groups = max(1, weight.groups // len(shards))
        sizes = [part.rows // len(shards) // groups for part in weight.parts]
        split = [shard.unflatten(0, (groups, -1)).split(sizes, dim=1) for shard in shards]
        wholes = [_cat([piece.flatten(0, 1) for piece in pieces]) for pieces in zip(*split, strict=True)]
    elif weight.split == "columns":
        wholes = [_cat(shards, dim=1)]
    elif weight.split == "vocabulary":
        wholes = [_cat(shards)[: weight.parts[0].rows]]
    else:
        wholes = [shards[0]]
    stacked: dict[str, list[Tensor]] = {}
    for part, whole in zip(weight.parts, wholes, strict=True):
        stacked.setdefault(part.tensor, []).append(whole)
    tensors = {name: _cat(pieces) for name, pieces in stacked.items()}
    return {name: tensor.t().contiguous() if weight.transposed else tensor for name, tensor in tensors.items()}


def _cat(pieces: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat, which copies even one piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
