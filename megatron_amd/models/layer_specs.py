"""Which modules a transformer layer is built from: Megatron-Core's own, or Transformer Engine's where it is there."""

from __future__ import annotations

from typing import Any, Literal

import torch

from megatron_amd import distributed  # noqa: F401  (before megatron.core: prepares torch and keeps imports quiet)

# isort: split
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_amd.config import TrainingConfig
from megatron_amd.errors import InputError, first_line
from megatron_amd.models.attention import CoreAttention

Implementation = Literal["local", "transformer_engine"]

FP8_DEFAULTS = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
"""FP8 fields of Megatron-Core's TransformerConfig that `training.fp8` may override. hybrid: E4M3 forward, E5M2
backward; tensorwise: each tensor scaled by its own largest value, so that a result does not depend on earlier ones."""


class SequenceParallelNorm:
    """torch's RMSNorm or LayerNorm, with parameters that Megatron-Core knows to be shared along a split sequence.

    Megatron-Core's own wrapper of the torch norms refuses sequence parallelism, although all it takes is this mark:
    each rank sees part of the tokens, and the gradients are summed over the tensor-parallel group. A class and no
    function, because its specs build classes only.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def choose_implementation(setting: Literal["auto", "local", "transformer_engine"], precision: str) -> Implementation:
    """Resolve `training.transformer_impl`.

    Raises:
        InputError: Transformer Engine is asked for, or needed for FP8, and cannot be used here.
    """
    problem = None if setting == "local" else _transformer_engine_problem()
    if setting == "transformer_engine" and problem:
        raise InputError(
            f"training.transformer_impl: transformer_engine cannot be used: {problem}; it needs a GPU and `pip install "
            "transformer-engine[pytorch]`; use auto or local"
        )
    implementation: Implementation = "local" if setting == "local" or problem else "transformer_engine"
    if precision == "fp8":
        reason = problem or _fp8_problem(setting)
        if reason:
            raise InputError(
                f"training.precision: fp8 cannot be used: {reason}; it needs Transformer Engine and a GPU of compute "
                "capability 8.9 or newer; use bf16"
            )
    return implementation


def _transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used here, if so."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or built for other libraries
        return f"it cannot be imported ({first_line(error)})"
    return None


def _fp8_problem(setting: str) -> str | None:
    if setting == "local":
        return "training.transformer_impl is local"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) >= (8, 9) else f"this GPU's compute capability is {major}.{minor}"


def fp8_multiple(training: TrainingConfig) -> int:
    """What every dimension of an FP8 matrix product must be a multiple of; 1 in other precisions."""
    if training.precision != "fp8":
        return 1
    return get_fp8_align_size((FP8_DEFAULTS | training.fp8)["fp8_recipe"])


def encoder_block_spec(
    config: TransformerConfig, implementation: Implementation, count: int
) -> TransformerBlockSubmodules:
    """`count` layers of an encoder."""
    layer = _plain_layer(config, implementation)
    layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.padding}
    return _finished(layer, config, implementation, count)


def decoder_block_spec(
    config: TransformerConfig, implementation: Implementation, count: int
) -> TransformerBlockSubmodules:
    """`count` layers of a decoder with cross-attention."""
    layer = _plain_layer(config, implementation)
    linear, norm = ColumnParallelLinear, SequenceParallelNorm
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        linear, norm = TEColumnParallelLinear, TENorm
    parts = layer.submodules
    parts.pre_cross_attn_layernorm, parts.cross_attn_bda = norm, parts.self_attn_bda
    parts.cross_attention = ModuleSpec(
        module=CrossAttention,
        params={"attn_mask_type": AttnMaskType.padding},
        submodules=CrossAttentionSubmodules(
            linear_q=linear,
            linear_kv=linear,
            core_attention=CoreAttention,
            linear_proj=parts.self_attention.submodules.linear_proj,
        ),
    )
    return _finished(layer, config, implementation, count)


def _plain_layer(config: TransformerConfig, implementation: Implementation) -> ModuleSpec:
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return get_gpt_layer_local_spec(normalization=config.normalization)


def _finished(
    layer: ModuleSpec, config: TransformerConfig, implementation: Implementation, count: int
) -> TransformerBlockSubmodules:
    """A block of such layers, with our core attention, which has the rollouts' KV cache, and norms that work under
    sequence parallelism."""
    parts, norm = layer.submodules, SequenceParallelNorm
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    else:
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def block_spec(config: TransformerConfig, implementation: Implementation, pp_rank: int) -> TransformerBlockSubmodules:
    """The layers of pipeline stage `pp_rank` of a decoder-only model."""
    layer = _plain_layer(config, implementation)
    return _finished(layer, config, implementation, get_num_layers_to_build(config, vp_stage=None, pp_rank=pp_rank))
