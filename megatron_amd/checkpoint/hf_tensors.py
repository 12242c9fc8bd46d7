"""What each parameter of a Megatron-Core GPTModel is called, and made of, in a Hugging Face folder.

For every parameter: the tensors of the folder, how they are stacked, and how tensor parallelism splits the result.
Megatron-Core stacks differently from Hugging Face in two places:

- `linear_qkv` holds, for each query group in turn, the group's queries, its key and its value;
- `linear_fc1` of a gated MLP holds, on each tensor-parallel rank, its rows of `gate`, then its rows of `up`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_amd.models.architecture import Architecture

# Transformer Engine fuses these norms into the linear layer that follows them.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


_LLAMA_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layer": "model.layers.{}.",
    "final_norm": "model.norm",
    "head": "lm_head.weight",
}
_GPT2_NAMES = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "layer": "transformer.h.{}.",
    "final_norm": "transformer.ln_f",
    "head": "lm_head.weight",
}


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


def model_weights(architecture: Architecture, layers: tuple[int, ...] | None = None) -> dict[str, Weight]:
    """Every parameter of the whole model by its Megatron-Core name, layers numbered over all pipeline stages.

    `layers[i]` is the folder's layer that model layer i is made of; by default the same one. The copy of a tied
    embedding that the last pipeline stage holds, `output_layer.weight`, is listed too.
    """
    if architecture.has_encoder:
        return _t5_weights(architecture, layers)
    names = _GPT2_NAMES if architecture.family == "gpt2" else _LLAMA_NAMES
    hidden, vocabulary = architecture.hidden_size, architecture.vocab_size
    embedding = Weight(parts=(Part(names["embedding"], vocabulary),), columns=hidden, split="vocabulary")
    head = Weight(parts=(Part(names["head"], vocabulary),), columns=hidden, split="vocabulary")
    weights = {"embedding.word_embeddings.weight": embedding}
    if architecture.position_embedding == "learned_absolute":
        positions = Part(names["positions"], architecture.max_position_embeddings)
        weights["embedding.position_embeddings.weight"] = Weight(parts=(positions,), columns=hidden)
    sources = layers if layers is not None else tuple(range(architecture.num_layers))
    for index, source in enumerate(sources):
        prefix = names["layer"].format(source)
        layer = (
            _gpt2_layer(architecture, prefix) if architecture.family == "gpt2" else _llama_layer(architecture, prefix)
        )
        weights.update({f"decoder.layers.{index}.{name}": weight for name, weight in layer.items()})
    weights.update(_norm("decoder.final_layernorm", names["final_norm"], architecture))
    weights["output_layer.weight"] = embedding if architecture.tied else head
    return weights


def stage_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of a pipeline stage under the names of the local layer spec, layers numbered over all stages."""
    stage = unwrap(model)
    parameters = {}
    for name, parameter in stage.named_parameters():
        stack, _, rest = name.partition(".layers.")
        if rest:
            index, rest = rest.split(".", 1)
            for fused, plain in _FUSED_NORMS.items():
                rest = rest.replace(fused, plain)
            name = f"{stack}.layers.{getattr(stage, stack).layers[int(index)].layer_number - 1}.{rest}"
        parameters[name] = parameter
    return parameters


def unwrap(model: Any) -> Any:
    """The GPTModel inside Megatron-Core's DistributedDataParallel, or itself."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model


def _norm(name: str, source: str, architecture: Architecture) -> dict[str, Weight]:
    kinds = ("weight", "bias") if architecture.normalization == "LayerNorm" else ("weight",)
    size = architecture.hidden_size
    return {f"{name}.{kind}": Weight(parts=(Part(f"{source}.{kind}", size),), columns=None) for kind in kinds}


def _llama_layer(a: Architecture, prefix: str) -> dict[str, Weight]:
    """A layer of Llama, Mistral or Qwen2."""

    def linear(
        name: str, sources: dict[str, int], columns: int, bias: bool, row_parallel: bool, groups: int = 1
    ) -> None:
        for kind in ("weight", "bias") if bias else ("weight",):
            split: Literal["rows", "columns"] | None = "rows"
            if row_parallel:
                split = "columns" if kind == "weight" else None
            layer[f"{name}.{kind}"] = Weight(
                parts=tuple(Part(f"{prefix}{source}.{kind}", rows) for source, rows in sources.items()),
                columns=columns if kind == "weight" else None,
                split=split,
                groups=groups,
            )

    layer = _norm("input_layernorm", f"{prefix}input_layernorm", a)
    layer.update(_norm("pre_mlp_layernorm", f"{prefix}post_attention_layernorm", a))
    hidden, ffn = a.hidden_size, a.ffn_hidden_size
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    qkv = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    linear("self_attention.linear_qkv", qkv, hidden, a.qkv_bias, False, a.num_query_groups)
    linear("self_attention.linear_proj", {"self_attn.o_proj": hidden}, queries, a.attention_output_bias, True)
    linear("mlp.linear_fc1", {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}, hidden, a.mlp_bias, False)
    linear("mlp.linear_fc2", {"mlp.down_proj": hidden}, ffn, a.mlp_bias, True)
    return layer


def _t5_weights(a: Architecture, layers: tuple[int, ...] | None) -> dict[str, Weight]:
    """T5 and mT5: an encoder and a decoder, whose first layers hold the position biases of all."""
    table = Weight(parts=(Part("shared.weight", a.vocab_size),), columns=a.hidden_size, split="vocabulary")
    head = Weight(parts=(Part("lm_head.weight", a.vocab_size),), columns=a.hidden_size, split="vocabulary")
    weights = {"embedding.word_embeddings.weight": table}
    for stack, count in (("encoder", a.encoder_layers), ("decoder", a.num_layers)):
        bias = Part(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", a.relative_buckets)
        weights[f"{stack}_bias.weight"] = Weight(parts=(bias,), columns=a.num_attention_heads, split="columns")
        for index, source in enumerate(layers or range(count)):
            layer = _t5_layer(a, f"{stack}.block.{source}.layer.", decodes=stack == "decoder")
            weights |= {f"{stack}.layers.{index}.{name}": weight for name, weight in layer.items()}
        weights |= _norm(f"{stack}.final_layernorm", f"{stack}.final_layer_norm", a)
    return {**weights, "output_layer.weight": table if a.tied else head}


def _t5_layer(a: Architecture, prefix: str, *, decodes: bool) -> dict[str, Weight]:
    """A layer of the encoder, or of the decoder: its cross-attention stands before the feed-forward network."""
    inner, hidden, ffn, heads = a.num_attention_heads * a.head_dim, a.hidden_size, a.ffn_hidden_size, a.num_query_groups
    own, cross, last = "0.SelfAttention.", "1.EncDecAttention.", 2 if decodes else 1
    dense = f"{last}.DenseReluDense."
    first = (dense + "wi_0", dense + "wi_1") if a.gated else (dense + "wi",)
    norms = {"input_layernorm": 0, "pre_mlp_layernorm": last}
    matrices: dict[str, tuple[tuple[str, ...], int, int, Literal["rows", "columns"], int]] = {
        "self_attention.linear_qkv": ((own + "q", own + "k", own + "v"), inner, hidden, "rows", heads),
        "self_attention.linear_proj": ((own + "o",), hidden, inner, "columns", 1),
        "mlp.linear_fc1": (first, ffn, hidden, "rows", 1),
        "mlp.linear_fc2": ((dense + "wo",), hidden, ffn, "columns", 1),
    }
    if decodes:
        norms["pre_cross_attn_layernorm"] = 1
        matrices |= {
            "cross_attention.linear_q": ((cross + "q",), inner, hidden, "rows", 1),
            "cross_attention.linear_kv": ((cross + "k", cross + "v"), inner, hidden, "rows", heads),
            "cross_attention.linear_proj": ((cross + "o",), hidden, inner, "columns", 1),
        }
    layer: dict[str, Weight] = {}
    for name, place in norms.items():
        layer |= _norm(name, f"{prefix}{place}.layer_norm", a)
    for name, (sources, rows, columns, split, groups) in matrices.items():
        parts = tuple(Part(f"{prefix}{source}.weight", rows) for source in sources)
        layer[f"{name}.weight"] = Weight(parts=parts, columns=columns, split=split, groups=groups)
    return layer


def _gpt2_layer(a: Architecture, prefix: str) -> dict[str, Weight]:
    """A layer of GPT-2: one tensor for queries, keys and values, and matrices stored [in, out]."""
    hidden, ffn = a.hidden_size, a.ffn_hidden_size
    layer = _norm("input_layernorm", f"{prefix}ln_1", a)
    layer.update(_norm("pre_mlp_layernorm", f"{prefix}ln_2", a))
    for kind, columns in (("weight", True), ("bias", False)):
        qkv = tuple(Part(f"{prefix}attn.c_attn.{kind}", hidden, first_row=i * hidden) for i in range(3))
        across: Literal["columns"] | None = "columns" if columns else None
        for name, parts, width, split, groups in (
            ("self_attention.linear_qkv", qkv, hidden, "rows", a.num_query_groups),
            ("self_attention.linear_proj", (Part(f"{prefix}attn.c_proj.{kind}", hidden),), hidden, across, 1),
            ("mlp.linear_fc1", (Part(f"{prefix}mlp.c_fc.{kind}", ffn),), hidden, "rows", 1),
            ("mlp.linear_fc2", (Part(f"{prefix}mlp.c_proj.{kind}", hidden),), ffn, across, 1),
        ):
            layer[f"{name}.{kind}"] = Weight(
                parts=parts,
                columns=width if columns else None,
                split=split,  # type: ignore[arg-type]
                groups=groups,
                transposed=columns,
            )
    return layer
