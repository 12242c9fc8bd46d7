"""Which modules a transformer layer is built from: Megatron-Core's own, or Transformer Engine's where it is there."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

from megatron_amd import distributed  # noqa: F401  (before megatron.core: prepares torch and keeps imports quiet)

# isort: split
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_amd.errors import InputError
from megatron_amd.models.attention import CoreAttention

Implementation = Literal["local", "transformer_engine"]


class SequenceParallelNorm:
    """torch's RMSNorm or LayerNorm whose parameters Megatron-Core knows to be shared along a split sequence.

    Megatron-Core's own wrapper of the torch norms refuses sequence parallelism, although all it takes is this mark:
    each rank sees part of the tokens, and the gradients are summed over the tensor-parallel group.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def choose_implementation(setting: Literal["auto", "local", "transformer_engine"], precision: str) -> Implementation:
    """Resolve `training.transformer_impl`.

    Raises:
        InputError: Transformer Engine is asked for, or needed for FP8, and cannot be used here.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    usable = installed and torch.cuda.is_available()
    if setting == "transformer_engine" and not usable:
        raise InputError(
            "training.transformer_impl: transformer_engine needs a GPU and `pip install transformer-engine[pytorch]`; "
            "use auto or local"
        )
    implementation: Implementation = "transformer_engine" if usable and setting != "local" else "local"
    if precision == "fp8" and implementation == "local":
        raise InputError(
            "training.precision: fp8 needs Transformer Engine and a GPU of compute capability 8.9 or newer, and "
            "transformer_impl auto or transformer_engine; use bf16"
        )
    return implementation


def block_spec(config: TransformerConfig, implementation: Implementation, pp_rank: int) -> TransformerBlockSubmodules:
    """The layers of pipeline stage `pp_rank`, all with our core attention, which has the rollouts' KV cache."""
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization=config.normalization), SequenceParallelNorm
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    count = get_num_layers_to_build(config, vp_stage=None, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
