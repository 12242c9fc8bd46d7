"""First weights of every role: a folder's, random ones, or copies of the other players'."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amd.checkpoint.hf import load_hf_weights
from megatron_amd.config import Config, ModelConfig
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.critic import HeadCritic, TrunkCritic
from megatron_amd.models.gpt import fill_parameter, initialize_weights
from megatron_amd.models.roles import LanguageModel, role_architecture


def fill_model(model: LanguageModel, role: str, settings: ModelConfig, architecture: Architecture, seed: int) -> None:
    """Weights of the role's folder, or random ones that depend on the seed and the role, not on the layout.

    Raises:
        InputError: the folder's weights are missing, damaged or of other sizes. Each rank reads on its own.
    """
    if has_pretrained_weights(settings):
        load_hf_weights(model, str(settings.path), architecture, layers=settings.init.layers, where=f"{role}.path")
    else:
        initialize_weights(model, f"{seed}:{role}")


def has_pretrained_weights(settings: ModelConfig) -> bool:
    """Whether the first weights are read from a folder."""
    return settings.path is not None and settings.init.weights == "pretrained"


def freeze(model: torch.nn.Module) -> None:
    """Make a model the teacher: no gradients, evaluation mode."""
    model.requires_grad_(False)
    model.eval()


@torch.no_grad()
def fill_critic(
    critic: TrunkCritic | HeadCritic, config: Config, student: LanguageModel, teacher: LanguageModel
) -> None:
    """Start the critic from student and teacher as they are now (after a warm-up), as `critic.*` says."""
    sources: dict[str, LanguageModel] = {"student": student, "teacher": teacher}
    if isinstance(critic, TrunkCritic):
        sources["own"] = _fill_trunk(critic, config, sources)
    if not student.post_process:  # heads are on the last stage
        return
    heads = {source: sources[source].head_weight().detach().clone() for source in critic.head_weights(False)}
    for on_policy in (False, True):
        for source, weight in critic.head_weights(on_policy).items():
            name = f"{'on' if on_policy else 'off'}.{source}.weight"
            _fill_head(weight, heads[source], config, name, critic)


def _fill_trunk(critic: TrunkCritic, config: Config, sources: dict[str, LanguageModel]) -> LanguageModel:
    """Fill the trunk; returns the model whose LM head the critic's heads start from."""
    settings = config.critic
    if settings.trunk == "model":
        architecture = role_architecture(settings.model, "critic.model")
        fill_model(critic, "critic.model", settings.model, architecture, config.run.seed)
        return critic
    source = sources[settings.trunk]
    weights = dict(source.named_parameters())
    for name, parameter in critic.named_parameters():
        if not name.startswith("output_layer"):
            parameter.copy_(weights[name])
    return source


def _fill_head(weight: Tensor, lm_head: Tensor, config: Config, name: str, critic: TrunkCritic | HeadCritic) -> None:
    if config.critic.head_init == "lm_head":
        weight.copy_(lm_head * config.critic.head_scale)
    elif config.critic.head_init == "zero":
        weight.zero_()
    else:
        seed = f"{config.run.seed}:critic"
        fill_parameter(weight, name, critic.config, seed, critic.tp_group, critic.config.init_method_std)
