"""What settings must be: ranges, and what does not go together.

`Config` checks itself with these when it is made, so its module imports this one, which cannot name its type.
"""

from __future__ import annotations

import operator
from typing import Any

from megatron_amd.errors import InputError


def check(config: Any) -> None:
    """Raise InputError for what can be known to be wrong from the settings alone, those of a `Config`."""
    _check_ranges(config)
    _check_layout(config.parallel)
    _check_rollout(config)
    _check_reuse(config)
    _check_objective(config)
    if config.evaluation.prompts and config.data.train and not config.data.evaluation:
        raise InputError("evaluation.prompts: needs data.evaluation, the held-out prompts")
    for role, model in (
        ("student", config.student),
        ("teacher", config.teacher),
        ("critic.model", config.critic.model),
    ):
        if model.path and model.architecture:
            raise InputError(f"{role}: give path or architecture, not both")
        if model.architecture and model.init.layers:
            raise InputError(f"{role}.init.layers: cuts a pretrained model; with architecture, set its layer count")


_UNIT_INTERVAL = (
    "objective.beta",
    "warmup.beta",
    "rollout.min_p",
    "rollout.teacher_share",
    "rollout.reuse.initial_probability",
)
_SHARES = ("objective.gjs_weight", "objective.skew")
_POSITIVE_UNIT_INTERVAL = ("objective.gamma", "rollout.top_p", "rollout.reuse.fresh")
_AT_LEAST_ONE = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.log_interval",
    "training.max_nonfinite_steps",
    "training.head_chunk_tokens",
    "training.head_memory_mib",
    "rollout.max_response_length",
    "rollout.samples_per_prompt",
    "rollout.batch_size",
    "rollout.pass_tokens",
    "rollout.cache_tokens",
    "rollout.look_interval",
    "rollout.reuse.steps",
    "rollout.reuse.capacity",
    "evaluation.max_response_length",
    "data.max_prompt_length",
    "data.limit",
    "checkpoint.keep",
    *(f"{section}.optim.decay_steps" for section in ("training", "critic", "warmup")),
)
_POSITIVE = (
    "critic.bound",
    "parallel.timeout_minutes",
    "objective.student_temperature",
    "objective.teacher_temperature",
)
_NOT_NEGATIVE = (
    "objective.critic_steps",
    "critic.warmup_steps",
    "warmup.steps",
    "training.steps",
    "rollout.top_k",
    "rollout.temperature",
    "rollout.min_response_length",
    "checkpoint.save_interval",
    "evaluation.prompts",
    "evaluation.interval",
    "evaluation.samples",
    "run.seed",
    *(
        f"{section}.optim.{name}"
        for section in ("training", "critic", "warmup")
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "adam_eps", "clip_grad")
    ),
)


def _check_ranges(config: Any) -> None:
    for names, allowed, wanted in (
        (_UNIT_INTERVAL, lambda x: 0 <= x <= 1, "in [0, 1]"),
        (_SHARES, lambda x: 0.001 <= x <= 0.999, "in [0.001, 0.999]"),
        (_POSITIVE_UNIT_INTERVAL, lambda x: 0 < x <= 1, "in (0, 1]"),
        (_AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
        (_POSITIVE, lambda x: x > 0, "positive"),
        (_NOT_NEGATIVE, lambda x: x >= 0, "zero or more"),
    ):
        for name in names:
            value = operator.attrgetter(name)(config)
            if value is not None and not allowed(value):
                raise InputError(f"{name}: must be {wanted}, not {value:g}")
    for section in ("training", "critic", "warmup"):
        optim = operator.attrgetter(f"{section}.optim")(config)
        if not all(0 <= beta < 1 for beta in optim.adam_betas):
            shown = ", ".join(f"{beta:g}" for beta in optim.adam_betas)
            raise InputError(f"{section}.optim.adam_betas: must be in [0, 1), not [{shown}]")
        if optim.min_learning_rate > optim.learning_rate:
            raise InputError(
                f"{section}.optim.min_learning_rate: must not exceed learning_rate {optim.learning_rate:g}, but is "
                f"{optim.min_learning_rate:g}"
            )


def _check_layout(parallel: Any) -> None:
    if parallel.virtual_pipeline_model_parallel_size is not None:
        raise InputError("parallel.virtual_pipeline_model_parallel_size: is not supported yet; leave it unset")
    if parallel.context_parallel_size != 1:
        raise InputError("parallel.context_parallel_size: is not supported yet; leave it at 1")
    if parallel.expert_model_parallel_size != 1:
        raise InputError("parallel.expert_model_parallel_size: mixture-of-experts is not supported yet; leave it at 1")
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise InputError("parallel.sequence_parallel: needs parallel.tensor_model_parallel_size > 1")


def _check_objective(config: Any) -> None:
    objective, warmup, rollout = config.objective, config.warmup, config.rollout
    if warmup.name == "amm":
        raise InputError("warmup.name: must not be amm; use sft or a distance such as kl")
    if objective.name == "sft" and objective.beta != 1:
        raise InputError("objective.beta: must be 1 for sft, which learns from off-policy responses alone")
    if warmup.name == "sft" and warmup.beta != 1 and warmup.steps:
        raise InputError("warmup.beta: must be 1 for sft, which learns from off-policy responses alone")
    amm = objective.name == "amm"
    if amm and objective.beta > 0 and objective.estimator == "sampled" and rollout.off_policy == "data":
        raise InputError(
            "objective.estimator: sampled needs rollout.off_policy: teacher or file, because a gold token is not a "
            "sample of the teacher; use full_vocabulary with responses from the data"
        )
    if amm and objective.beta > 0 and objective.estimator == "sampled" and objective.teacher_temperature != 1:
        raise InputError(
            "objective.estimator: sampled needs objective.teacher_temperature 1, at which the teacher's responses are "
            "sampled; use full_vocabulary"
        )
    temperature = objective.student_temperature
    own = {"temperature": temperature, "top_k": 0, "top_p": 1, "min_p": 0, "min_response_length": 0, "teacher_share": 0,
           "reuse.mode": "none"}  # fmt: skip
    wanted = [
        f"rollout.{name} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in own.items()
        if operator.attrgetter(name)(rollout) != value
    ]
    if amm and objective.beta < 1 and wanted:
        for name, value, other in (
            ("policy_gradient", objective.policy_gradient, "per_step"),
            ("estimator", objective.estimator, "full_vocabulary"),
        ):
            if value != other:
                raise InputError(
                    f"objective.{name}: {value} is unbiased only for sequences of the student as it is, that is with "
                    f"{' and '.join(wanted)}; set that, or {name}: {other}"
                )
    if amm and config.critic.tightness_threshold is not None and not objective.critic_steps:
        raise InputError("critic.tightness_threshold: needs objective.critic_steps of at least 1")
    has_responses = config.data.response_field or config.data.messages_field
    if rollout.off_policy == "data" and not has_responses and config.uses_off_policy:
        raise InputError("rollout.off_policy: data needs data.response_field or data.messages_field")
    if rollout.off_policy == "file" and rollout.responses is None and config.uses_off_policy:
        raise InputError("rollout.off_policy: file needs rollout.responses, a folder written by tools/generate.py")


def _check_rollout(config: Any) -> None:
    rollout = config.rollout
    if rollout.min_response_length > rollout.max_response_length:
        raise InputError(
            f"rollout.min_response_length: must not exceed rollout.max_response_length "
            f"{rollout.max_response_length}, but is {rollout.min_response_length}"
        )
    if "" in rollout.stop_strings:
        raise InputError("rollout.stop_strings: must not hold an empty text")
    # A row of each model that generates, and one for the fillers that FP8 needs.
    models, spare = (2 if rollout.teacher_share else 1), (2 if config.training.precision == "fp8" else 1)
    longest = config.data.max_prompt_length + rollout.max_response_length
    needed = spare * max(models * longest, config.longest_sequence)
    if rollout.cache_tokens is not None and rollout.cache_tokens < needed:
        raise InputError(
            f"rollout.cache_tokens: {rollout.cache_tokens} positions have no room for data.max_prompt_length and the "
            f"longest response of training (of both models with teacher_share) or evaluation, {needed} tokens"
            f"{' with the rows that fp8 fills up' if spare > 1 else ''}; raise it, or lower those"
        )


def _check_reuse(config: Any) -> None:
    reuse = config.rollout.reuse
    if reuse.mode == "none":
        return
    if config.objective.resample:
        raise InputError(
            "objective.resample: draws a fresh batch for each critic step, which rollout.reuse cannot give"
        )
    sequences = config.training.global_batch_size * config.rollout.samples_per_prompt
    if reuse.mode != "steps" and reuse.capacity < sequences:
        raise InputError(
            f"rollout.reuse.capacity: {reuse.capacity} does not hold one iteration's {sequences} sequences; raise it"
        )
    if reuse.mode == "adaptive" and not (config.evaluation.prompts and config.evaluation.interval):
        raise InputError(
            "rollout.reuse.mode: adaptive follows the held-out distance and alternates with fixed sequences; set "
            "evaluation.prompts, evaluation.interval and rollout.off_policy: data or file"
        )
    if reuse.mode == "adaptive" and config.objective.beta == 1:
        raise InputError(
            "rollout.reuse.mode: adaptive is about the student's sequences, of which objective.beta 1 takes none; "
            "lower it"
        )
    if reuse.mode == "adaptive" and config.rollout.off_policy == "teacher":
        raise InputError(
            "rollout.reuse.mode: adaptive alternates with fixed sequences; set rollout.off_policy: data or file, or "
            "use replay"
        )
