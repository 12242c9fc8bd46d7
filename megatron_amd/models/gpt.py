"""A decoder-only model that returns final hidden states instead of logits.

Shapes: b sequences, S tokens, H hidden size, V_local head rows on this tensor-parallel rank.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amd.distributed.layout import Layout

# isort: split
from megatron.core.enums import Fp8Recipe
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_amd.config import TrainingConfig
from megatron_amd.errors import InputError, first_line
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.kv_cache import KVCache
from megatron_amd.models.layer_specs import FP8_DEFAULTS, Implementation, block_spec

_NOT_SUPPORTED = (
    "context_parallel_size", "expert_model_parallel_size", "num_moe_experts", "virtual_pipeline_model_parallel_size",
    "fp8_param", "fp8_dot_product_attention", "fp8_multi_head_attention",
)  # fmt: skip
_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")
_CHOICES = {"fp8": ("e4m3", "hybrid"), "fp8_recipe": tuple(recipe.value for recipe in Fp8Recipe)}


class CausalLM(GPTModel):
    """Megatron-Core's GPTModel, ending at the final hidden states.

    The head is applied elsewhere, chunk by chunk with the other roles' heads, so that logits of a whole batch never
    exist (objectives/fused_head.py).
    """

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """One pipeline stage.

        Args:
            tokens: int64 [b, S]; used on the first stage, its shape on all.
            position_ids: int64 [b, S]; by default 0..S-1 in every row.

        Returns:
            [S, b, H] hidden states of this stage ([S/TP, b, H] under sequence parallelism); on the last stage after
            the final norm.
        """
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = self.embedding(tokens, position_ids.expand_as(tokens)) if self.pre_process else None
        return self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=self.rotary_angles(position_ids))

    def flat_pass(self, tokens: Tensor, cache: KVCache, received: Tensor | None) -> Tensor:
        """One stage of a pass of a generation, whose cache is attached.

        Args:
            tokens: int64 [T].
            cache: with their rows and positions.
            received: [T, 1, H] of the stage before; None on the first.

        Returns:
            [T, 1, H].
        """
        if received is not None:
            self.set_input_tensor([received])
        return self(tokens[None], cache.positions[None])  # type: ignore[no-any-return]

    def layer_numbers(self) -> list[int]:
        """Places in the whole model, from 0, of the layers that are on this stage."""
        return [layer.layer_number - 1 for layer in self.decoder.layers]

    def initial_std(self, name: str) -> float:
        """Standard deviation of a parameter's first random weights, by its global name: the config's
        `init_method_std`, of output projections divided by sqrt(2 * layers) as in GPT-2."""
        std: float = self.config.init_method_std
        return std / math.sqrt(2 * self.config.num_layers) if name.endswith(_OUTPUT_PROJECTIONS) else std

    def head_weight(self) -> Tensor:
        """[V_local, H] rows of the LM head (last stage)."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else (self.output_layer.weight)
        )

    def rotary_angles(self, position_ids: Tensor) -> Tensor | None:
        """[S, 1 or b, 1, head_dim] rotary angles at the given positions."""
        if self.position_embedding_type != "rope":
            return None
        table = self.rotary_pos_emb(self.max_sequence_length)  # [max, 1, 1, head_dim], cached by Megatron-Core
        return table[:, 0, 0][position_ids.t()].unsqueeze(2)


def transformer_config(
    architecture: Architecture,
    training: TrainingConfig,
    layout: Layout,
    extra: dict[str, Any],
    where: str,
) -> TransformerConfig:
    """A TransformerConfig of a role's own: schedules read the role's gradient hooks from it.

    Raises:
        InputError: `extra` (a role's `transformer` settings) or `training.fp8` names a field that does not exist or is
            not theirs to set, or Megatron-Core refuses the combination.
    """
    half = training.precision != "fp32"
    fixed: dict[str, Any] = {
        **architecture.transformer_config_fields(),
        "tensor_model_parallel_size": layout.tp_size,
        "pipeline_model_parallel_size": layout.pp_size,
        "sequence_parallel": layout.sequence_parallel,
        "params_dtype": torch.bfloat16 if half else torch.float32,
        "pipeline_dtype": torch.bfloat16 if half else torch.float32,
        "bf16": half,
        "calculate_per_token_loss": True,  # gradients are sums; the losses carry their normalisation
    }
    settings: dict[str, Any] = {
        # Weights come from a folder or from `initialize_weights`, but Megatron-Core marks tensor-parallel parameters
        # only where it initialises them.
        "init_method": leave,
        "output_layer_init_method": leave,
        "embedding_init_method": leave,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "deallocate_pipeline_outputs": True,
    }
    _check_extra(extra, fixed, f"{where}.transformer")
    _check_extra(training.fp8, fixed, "training.fp8")
    if training.precision == "fp8":
        settings |= FP8_DEFAULTS | training.fp8
    try:
        return TransformerConfig(**{**fixed, **settings, **extra})
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"{where}: Megatron-Core refuses this model: {first_line(error)}") from error


def _has_fused_weight_gradients() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _check_extra(extra: dict[str, Any], fixed: dict[str, Any], where: str) -> None:
    """Raise InputError for fields that do not exist, that are not supported, or that other settings decide."""
    known = TransformerConfig.__dataclass_fields__
    for name, value in extra.items():
        if name not in known:
            raise InputError(f"{where}.{name}: Megatron-Core's TransformerConfig has no such field")
        if name == "gradient_accumulation_fusion" and value and not _has_fused_weight_gradients():
            raise InputError(f"{where}.{name}: needs NVIDIA's Apex, built with its CUDA extensions; leave it out")
        if name in ("hidden_dropout", "attention_dropout") and value:
            raise InputError(f"{where}.{name}: must be 0; distances between models need fixed models")
        if name in _NOT_SUPPORTED and value != known[name].default:
            raise InputError(f"{where}.{name}: is not supported yet; leave it out")
        if value is not None and value not in _CHOICES.get(name, (value,)):
            raise InputError(f"{where}.{name}: must be {' or '.join(_CHOICES[name])}, not {value}")
        if name in fixed and value != fixed[name]:
            raise InputError(
                f"{where}.{name}: is decided by config.json, parallel.* and training.precision; leave it out"
            )


def leave(weight: Tensor) -> Tensor:
    """The initialisation that changes nothing."""
    return weight


def build_gpt(
    architecture: Architecture,
    config: TransformerConfig,
    layout: Layout,
    implementation: Implementation,
    padded_vocab_size: int,
    model_class: type[CausalLM] = CausalLM,
) -> CausalLM:
    """This rank's stage of the model, on the layout's device, with weights yet to be filled."""
    model = model_class(
        config=config,
        transformer_layer_spec=block_spec(config, implementation, layout.pp_rank),
        vocab_size=padded_vocab_size,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        pg_collection=layout.groups,
        **architecture.gpt_model_fields(),
    )
    if architecture.position_embedding == "rope":
        # Megatron-Core has Llama 3.1's scaling alone, with all but its factor fixed.
        rotary = model.rotary_pos_emb
        rotary.inv_freq = architecture.inverse_frequencies().to(rotary.inv_freq.device)
    return model


def global_parameter_name(name: str, model: LanguageModule) -> str:
    """A parameter's name in the whole model: layers counted from the first stage, one name for tied tables."""
    stack, *parts = name.split(".")
    if parts[:1] == ["layers"]:
        parts[1] = str(getattr(model, stack).layers[int(parts[1])].layer_number - 1)
    name = ".".join([stack, *parts])
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


@torch.no_grad()
def initialize_weights(model: Any, seed: str) -> None:
    """Random first weights of a `LanguageModel` that depend on the seed and each parameter's global name, not on the
    layout: normal with the model's `initial_std`; norms 1; biases 0."""
    tp_group = model.pg_collection.tp
    for name, parameter in model.named_parameters():
        name = global_parameter_name(name, model)
        fill_parameter(parameter, name, model.config, seed, tp_group, model.initial_std(name))


def fill_parameter(
    parameter: Tensor,
    name: str,
    config: TransformerConfig,
    seed: str,
    tp_group: dist.ProcessGroup,
    std: float | Tensor,
) -> None:
    """Fill one parameter (or this rank's shard of it) as `initialize_weights` says."""
    if parameter.dim() == 1:
        is_scale = name.endswith("weight")  # of a norm; everything else of one dimension is a bias
        parameter.fill_(1.0 if is_scale else 0.0)
        return
    size, rank = tp_group.size(), tp_group.rank()
    sharded = getattr(parameter, "tensor_model_parallel", False) and size > 1
    dim = getattr(parameter, "partition_dim", 0) if sharded else 0
    shape = list(parameter.shape)
    if sharded:
        shape[dim] *= size
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(shape, dtype=torch.float32).normal_(0.0, 1.0, generator=generator) * std
    if sharded and config.gated_linear_unit and "linear_fc1" in name:  # each rank holds [its gate; its up]
        part = torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    else:
        part = whole.chunk(size, dim)[rank] if sharded else whole
    parameter.copy_(part)
