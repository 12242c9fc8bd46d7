"""The cast of a run: who plays student, teacher and critic, checked first and built after.

`plan_models` reads nothing but `config.json` files (and of a T5 that is said to be tied, head and embedding) and finds
every contradiction; `build_*` allocate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_amd.config import Config, ModelConfig
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import Architecture, load_architecture
from megatron_amd.models.critic import CausalCritic, EncoderDecoderCritic, HeadCritic, TrunkCritic
from megatron_amd.models.gpt import CausalLM, build_gpt, transformer_config
from megatron_amd.models.layer_specs import Implementation, choose_implementation, fp8_multiple
from megatron_amd.models.t5 import EncoderDecoderLM, build_t5

# isort: split
from megatron.core.transformer.transformer_config import TransformerConfig

LanguageModel = CausalLM | EncoderDecoderLM
"""Student, teacher, or a critic's trunk: a stage of a model that ends at final hidden states."""
VOCABULARY_MULTIPLE = 128
"""Embeddings are padded to a multiple of this times TP, so that shards stay aligned."""


@dataclass(frozen=True)
class ModelPlan:
    """Everything about the models that is known before any of them exists."""

    student: Architecture
    teacher: Architecture
    critic_trunk: Architecture | None
    """Trunk of a critic with `features: own`, its head untied from the embedding."""
    implementation: Implementation
    vocab_size: int
    """Real size: ids from here on are padding, masked out everywhere."""
    padded_vocab_size: int
    """Rows of every embedding and head."""


def plan_models(config: Config, vocab_size: int | None, implementation: Implementation | None = None) -> ModelPlan:
    """Read the architectures and check them against each other, the layout and the tokenizer.

    Args:
        vocab_size: the tokenizer's size; None takes the smallest of the models' (for planning without a tokenizer).
        implementation: of the layers; None chooses by the settings and by what this machine has.

    Raises:
        InputError: whatever does not fit, before anything is allocated.
    """
    if implementation is None:
        implementation = choose_implementation(config.training.transformer_impl, config.training.precision)
    student = role_architecture(config.student, "student")
    teacher = role_architecture(config.teacher, "teacher")
    trunk = _critic_trunk(config, student, teacher)
    tensor = config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size
    models = {"student": student, "teacher": teacher, **({"critic": trunk} if trunk else {})}
    _check_kinds(models)
    longest = config.longest_sequence
    smallest = min(model.vocab_size for model in models.values())
    for where, model in models.items():
        model.check_layout(tensor, pipeline, where)
        _check_fp8_sizes(model, tensor, fp8_multiple(config.training), where)
        if vocab_size is not None and vocab_size > model.vocab_size:
            raise InputError(
                f"{where}: its embedding has {model.vocab_size} rows, fewer than the tokenizer's {vocab_size} tokens; "
                "student, teacher and tokenizer must share one vocabulary"
            )
        if longest > model.max_position_embeddings:
            raise InputError(
                f"{where}: takes {model.max_position_embeddings} positions, but data.max_prompt_length and the longest "
                f"response of training (rollout.max_response_length) or evaluation (evaluation.max_response_length) "
                f"together need {longest}; shorten them"
            )
    multiple = VOCABULARY_MULTIPLE * tensor
    rows = max(model.vocab_size for model in models.values())
    return ModelPlan(
        student=student,
        teacher=teacher,
        critic_trunk=trunk,
        implementation=implementation,
        vocab_size=smallest if vocab_size is None else vocab_size,
        padded_vocab_size=-(-rows // multiple) * multiple,
    )


def _check_kinds(models: Mapping[str, Architecture]) -> None:
    """Raise InputError unless all models take prompts and responses in the same places."""
    (first, one), *others = models.items()
    for where, other in others:
        if other.has_encoder != one.has_encoder:
            kinds = ("only a decoder", "an encoder and a decoder")
            raise InputError(
                f"{where}: has {kinds[other.has_encoder]} ({other.family}), {first} has {kinds[one.has_encoder]} "
                f"({one.family}); all must be of one kind"
            )
        if other.decoder_start_id != one.decoder_start_id:
            raise InputError(
                f"{where}: its decoder starts with token {other.decoder_start_id}, that of {first} with "
                f"{one.decoder_start_id}; they must start alike"
            )


def role_architecture(model: ModelConfig, where: str) -> Architecture:
    """The architecture a role's settings describe, cut layers applied."""
    architecture = load_architecture(model.path, model.architecture, where)
    if model.init.layers is not None:
        architecture = architecture.with_layers(model.init.layers, f"{where}.init.layers")
    return architecture


def _critic_trunk(config: Config, student: Architecture, teacher: Architecture) -> Architecture | None:
    if config.objective.name != "amm" or config.critic.features != "own":
        return None
    choices = {"student": student, "teacher": teacher}
    trunk = choices.get(config.critic.trunk) or role_architecture(config.critic.model, "critic.model")
    return replace(trunk, tied=False)


def _check_fp8_sizes(model: Architecture, tensor: int, multiple: int, where: str) -> None:
    """Raise InputError unless every dimension of the layers' matrices on one rank suits FP8 products."""
    for what, size in (
        ("hidden size", model.hidden_size),
        ("query columns", model.num_attention_heads * model.head_dim // tensor),
        (
            "query, key and value columns",
            (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim // tensor,
        ),
        ("MLP columns", model.ffn_hidden_size // tensor),
    ):
        if size % multiple:
            raise InputError(
                f"{where}: its {size} {what} on one rank are not a multiple of {multiple}, which training.precision: "
                "fp8 needs; use bf16 or another parallel.tensor_model_parallel_size"
            )


def role_transformer_config(role: str, config: Config, plan: ModelPlan, layout: Layout) -> TransformerConfig:
    """Megatron-Core's settings of `student`, `teacher` or `critic`, a new object at each call.

    Raises:
        InputError: the role's `transformer` settings or training.fp8 do not fit.
    """
    choices: dict[str, tuple[Architecture, dict[str, Any]]] = {
        "student": (plan.student, config.student.transformer),
        "teacher": (plan.teacher, config.teacher.transformer),
        "critic": (plan.critic_trunk or plan.student, config.critic.model.transformer if plan.critic_trunk else {}),
    }
    architecture, extra = choices[role]
    if architecture.has_encoder and extra.get("recompute_granularity"):
        raise InputError(
            f"{role}.transformer.recompute_granularity: is not supported for {architecture.family}: its position "
            "biases would lose their gradients; leave it out"
        )
    return transformer_config(architecture, config.training, layout, extra, role)


def build_model(role: str, config: Config, plan: ModelPlan, layout: Layout) -> LanguageModel:
    """This rank's stage of `student`, `teacher` or `critic` (a `TrunkCritic`), allocated and not yet filled."""
    architectures = {"student": plan.student, "teacher": plan.teacher, "critic": plan.critic_trunk}
    architecture = architectures[role]
    assert architecture is not None
    transformer = role_transformer_config(role, config, plan, layout)
    model = build_language_model(
        architecture, transformer, layout, plan.implementation, plan.padded_vocab_size, is_critic=role == "critic"
    )
    for parameter in model.parameters():  # learned positions are made in fp32 whatever the config says
        parameter.data = parameter.data.to(transformer.params_dtype)
    return model


def build_language_model(
    architecture: Architecture,
    config: TransformerConfig,
    layout: Layout,
    implementation: Implementation,
    padded_vocab_size: int,
    *,
    is_critic: bool = False,
) -> LanguageModel:
    """This rank's stage of a model of any family, or of a `TrunkCritic` on it."""
    sizes = (architecture, config, layout, implementation, padded_vocab_size)
    if architecture.has_encoder:
        return build_t5(*sizes, EncoderDecoderCritic if is_critic else EncoderDecoderLM)
    return build_gpt(*sizes, CausalCritic if is_critic else CausalLM)


def build_critic(config: Config, plan: ModelPlan, layout: Layout) -> TrunkCritic | HeadCritic:
    """This rank's stage of the critic, not yet filled."""
    if config.critic.features == "own":
        return build_model("critic", config, plan, layout)  # type: ignore[return-value]
    widths = {"teacher": plan.teacher.hidden_size}
    if config.critic.features == "pair":
        widths["student"] = plan.student.hidden_size
    transformer = role_transformer_config("critic", config, plan, layout)
    return HeadCritic(transformer, widths, plan.padded_vocab_size, layout)
