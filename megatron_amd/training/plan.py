"""What a run would be, before there is one: its layout, its models, its batch and each rank's memory, as text.

Everything is taken from the real models, built and played on meta tensors (rehearsal.py) for one rank of each pipeline
stage, so it takes seconds and no memory, whatever the size of the models and the world.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_amd.config import Config
from megatron_amd.distributed.fake import fake_world, on_meta
from megatron_amd.distributed.initialize import check_batch_split, rank_device, world_size_from_environment
from megatron_amd.distributed.layout import check_world_size
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.layer_specs import choose_implementation
from megatron_amd.models.roles import ModelPlan, plan_models
from megatron_amd.training.rehearsal import RankBatch, StageUse, rank_batch, rehearse
from megatron_amd.training.setup import check_megatron_settings

ROLES = ("teacher", "student", "critic")
COLUMNS = 7
"""Pipeline stages side by side."""
LABEL = 26
"""Width of a line's name."""
WIDTH = 100
"""Of running text."""


@dataclass(frozen=True)
class RunPlan:
    """A run as it would be."""

    config: Config
    models: ModelPlan
    batch: RankBatch
    world_size: int
    stages: tuple[StageUse, ...]
    """One rank of each pipeline stage: the first of the first replica."""
    implementation: str
    """Of the layers, in words."""

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * len(self.stages))


def describe_plan(config: Config, world_size: int | None) -> str:
    """The plan as text.

    Args:
        world_size: ranks to plan for; None takes torchrun's number, or without torchrun the layout's smallest.

    Raises:
        InputError: whatever a real start would find wrong before it reads weights, tokenizer or data.
    """
    return describe(plan_run(config, world_size))


def plan_run(config: Config, world_size: int | None) -> RunPlan:
    """Check the settings and rehearse one rank of each stage. Arguments and errors as `describe_plan`."""
    parallel = config.parallel
    launched = "RANK" in os.environ
    if launched:
        rank_device()  # raises where a node has fewer GPUs than ranks
    stages = parallel.pipeline_model_parallel_size
    smallest = parallel.tensor_model_parallel_size * stages
    if world_size is None:
        world_size = world_size_from_environment() if launched else smallest
    if world_size < 1:
        raise InputError(f"--world-size: must be at least 1, not {world_size}")
    check_world_size(parallel, world_size)
    check_batch_split(config, world_size)
    implementation = _implementation(config, must_exist=launched)
    models = plan_models(config, None, implementation="local")
    playable = config
    if config.training.precision == "fp8":  # whose weights are kept in bf16; the local layers cannot compute in it
        playable = replace(config, training=replace(config.training, precision="bf16"))
    uses = []
    for stage in range(stages):
        with fake_world(config, world_size, rank=stage * (world_size // stages)) as layout, on_meta():
            if stage == 0:
                check_megatron_settings(config, models, layout)
                batch = rank_batch(config, layout, has_encoder=models.student.has_encoder)
            uses.append(rehearse(playable, models, batch, layout))
    return RunPlan(config, models, batch, world_size, tuple(uses), implementation)


def _implementation(config: Config, must_exist: bool) -> str:
    """The layers in words. Another machine may have what this one has not, so only a launched run must have it."""
    training = config.training
    try:
        chosen = choose_implementation(training.transformer_impl, training.precision)
    except InputError:
        if must_exist:
            raise
        return "Transformer Engine (not usable on this machine)"
    if chosen == "transformer_engine":
        return "Transformer Engine"
    auto = training.transformer_impl == "auto"
    return "Megatron-Core local" + (" (Transformer Engine on GPUs that have it)" if auto else "")


def describe(plan: RunPlan) -> str:
    """A plan as text."""
    sections = [_layout(plan), _models(plan), _batch(plan), _memory(plan)]
    title = "Dry run: what this run would be. Nothing was trained, and no weights or data were read."
    return "\n\n".join([title, *sections])


def _line(label: str, text: str) -> str:
    return f"  {label:<{LABEL - 2}}{text}".rstrip()


def _layout(plan: RunPlan) -> str:
    parallel = plan.config.parallel
    stages, tensor, data = len(plan.stages), plan.tensor, plan.data
    gpu = torch.cuda.is_available()
    precision = {
        "fp32": "fp32",
        "bf16": "bf16 (main weights and gradients in fp32)",
        "fp8": "fp8 matrix products (weights in bf16, main weights and gradients in fp32)",
    }[plan.config.training.precision]
    lines = [
        "Layout",
        _line("ranks", f"{plan.world_size:,} = tensor {tensor} x pipeline {stages} x data {data}"),
        _line("sequence parallel", "yes" if parallel.sequence_parallel else "no"),
        _line("communication", "NCCL" if gpu else "gloo (NCCL on GPUs)"),
        _line("precision", precision),
        _line("layers", plan.implementation),
    ]
    for name, groups in rank_groups(tensor, stages, data).items():
        if len(groups[0]) > 1:
            lines.append(
                _line(f"{name} groups", f"{_count(len(groups), 'group')} of {len(groups[0])}: {_shown(groups)}")
            )
    return "\n".join(lines)


def rank_groups(tensor: int, pipeline: int, data: int) -> dict[str, list[list[int]]]:
    """Global ranks of all groups of each kind, in Megatron-Core's order: tensor, then data, then pipeline."""

    def rank(t: int, d: int, p: int) -> int:
        return t + tensor * (d + data * p)

    ts, ds, ps = range(tensor), range(data), range(pipeline)
    return {
        "tensor": [[rank(t, d, p) for t in ts] for p in ps for d in ds],
        "data": [[rank(t, d, p) for d in ds] for p in ps for t in ts],
        "pipeline": [[rank(t, d, p) for p in ps] for d in ds for t in ts],
    }


def _shown(groups: list[list[int]]) -> str:
    """`{0-7} {8-15} ... {56-63}`."""
    texts = ["{" + _ranks(group) + "}" for group in groups]
    return " ".join(texts if len(texts) <= 4 else [*texts[:2], "...", texts[-1]])


def _ranks(group: Sequence[int]) -> str:
    first, last = group[0], group[-1]
    if len(group) > 1 and last - first == len(group) - 1:
        return f"{first}-{last}"
    return ", ".join(map(str, group if len(group) <= 4 else [*group[:2], "...", last]))


def _models(plan: RunPlan) -> str:
    config, models = plan.config, plan.models
    header = ("layers", "hidden", "MLP", "heads", "KV heads", "head tied", "parameters")
    lines = ["Models".ljust(LABEL) + "".join(f"{name:>11}" for name in header)]
    trunks = {"teacher": models.teacher, "student": models.student, "critic": models.critic_trunk}
    for role in ROLES:
        trunk = trunks[role]
        if role not in plan.stages[0].roles:
            continue
        total = _amount(sum(stage.roles[role].whole_parameters for stage in plan.stages))
        cells = _sizes(trunk) if trunk else [""] * 6
        name = f"{role} ({_family(config, role, trunk)})"
        lines.append(f"  {name:<{LABEL - 2}}" + "".join(f"{cell:>11}" for cell in [*cells, total]))
    rows = models.padded_vocab_size
    lines.append(_line("vocabulary", f"{models.vocab_size:,} ids, or fewer if the tokenizer has fewer"))
    lines.append(
        _line("padded vocabulary", f"{rows:,} rows in every embedding and head, {rows // plan.tensor:,} on a rank")
    )
    if "critic" in plan.stages[0].roles:
        reads = {
            "own": "the states of a trunk of its own",
            "teacher": "the teacher's states",
            "pair": "the teacher's and the student's states",
        }[config.critic.features]
        lines.append(_line("critic", f"two heads over the vocabulary, f1 and f2, on {reads}"))
    return "\n".join(lines)


def _family(config: Config, role: str, trunk: Architecture | None) -> str:
    return trunk.family if role != "critic" and trunk else config.critic.features


def _sizes(trunk: Architecture) -> list[str]:
    return [
        f"{trunk.encoder_layers} + {trunk.num_layers}" if trunk.has_encoder else f"{trunk.num_layers}",
        f"{trunk.hidden_size:,}",
        f"{trunk.ffn_hidden_size:,}",
        f"{trunk.num_attention_heads}",
        f"{trunk.num_query_groups}",
        "yes" if trunk.tied else "no",
    ]


def _batch(plan: RunPlan) -> str:
    config, batch = plan.config, plan.batch
    off, on = batch.off_policy * plan.data, batch.on_policy * plan.data
    source = {"teacher": "the teacher", "data": "the data", "file": "files"}[config.rollout.off_policy]
    kinds = [f"{off:,} off-policy (from {source})"] if off else []
    kinds += [f"{on:,} on-policy (from the student)"] if on else []
    prompt, response = config.data.max_prompt_length, batch.response_length
    tokens = (off + on) * (prompt + response)
    micro = (
        f"{batch.num_microbatches:,} a replica, each of {_count(batch.micro_batch_size, 'sequence')} x {batch.width:,} "
        f"tokens, {batch.states_per_microbatch:,} of them states"
    )
    lines = [
        "Batch of one iteration",
        _line("prompts", f"{config.training.global_batch_size:,} = {_count(plan.data, 'replica')} x {batch.prompts:,}"),
        _line("sequences", f"{off + on:,} = " + " + ".join(kinds)),
        _line("longest sequence", f"{prompt + response:,} tokens = prompt {prompt:,} + response {response:,}"),
        _line("micro-batches", micro),
        _line("tokens", f"at most {tokens:,}, {(off + on) * response:,} of them generated or learned from"),
    ]
    passes = _passes(config)
    lines.append(_line("passes over it", passes))
    return "\n".join(lines)


def _passes(config: Config) -> str:
    steps = config.objective.critic_steps if config.objective.name == "amm" else 0
    if not steps:
        return "1 student step"
    fresh = ", each on a fresh batch" if config.objective.resample else ""
    return f"{_count(steps, 'critic step')} and 1 student step{fresh}"


def _memory(plan: RunPlan) -> str:
    tables = [
        "\n".join(_table(plan, first, plan.stages[first : first + COLUMNS]))
        for first in range(0, len(plan.stages), COLUMNS)
    ]
    worst = max(range(len(plan.stages)), key=lambda stage: plan.stages[stage].peak)
    use = plan.stages[worst]
    part = max(use.parts, key=lambda name: sum(use.parts[name].values()))
    most = f"The most: {_gib(use.peak)} GiB on a rank of stage {worst}, in the {part}. {_LESS[part]}"
    notes = [*textwrap.wrap(most, WIDTH), *textwrap.wrap(_notes(plan), WIDTH)]
    return "\n\n".join([*tables, textwrap.indent("\n".join(notes), "  ")])


_LESS = {
    "rollout": "Less: a smaller rollout.batch_size or rollout.cache_tokens.",
    "hidden pass": "Less: a smaller training.micro_batch_size or training.global_batch_size.",
    "critic step": "Less: a smaller training.micro_batch_size or training.head_chunk_tokens.",
    "student step": "Less: a smaller training.micro_batch_size, or student.transformer.recompute_granularity.",
}


def _notes(plan: RunPlan) -> str:
    shards = f"1/{plan.data} of them on each data-parallel rank" if plan.data > 1 else "all on each rank"
    config = plan.config
    if not config.training.ddp.get("use_distributed_optimizer", True):
        shards = "all on each rank"
    return (
        "Held is exact; the rest is an estimate. Optimizer states: main weights in fp32 where the weights are not, and "
        f"two moments, {shards}. Activations: what is alive at the peak of a pass of one micro-batch of the longest "
        "sequences, played on meta tensors, plus what the other micro-batches in flight (1F1B) keep for their backward "
        "passes. Not counted: the CUDA context, communication buffers, kernels' scratch memory, fragmentation"
        + (", FP8 copies of the weights (1 or 2 bytes a parameter)." if config.training.precision == "fp8" else ".")
    )


def _table(plan: RunPlan, first: int, stages: Sequence[StageUse]) -> list[str]:
    """The stages side by side."""
    span = plan.tensor * plan.data

    def row(label: str, cells: Sequence[str], indent: int = 2) -> str:
        return f"{' ' * indent}{label:<{LABEL - indent}}" + "".join(f"{cell:>13}" for cell in cells)

    def gib(label: str, size: Callable[[StageUse], int], indent: int = 4) -> list[str]:
        """A row in GiB, left out where it is zero on all stages."""
        sizes = [size(stage) for stage in stages]
        return [row(label, [_gib(size) for size in sizes], indent)] if any(sizes) else []

    def of_role(role: str, kind: str) -> Callable[[StageUse], int]:
        return lambda stage: getattr(stage.roles[role], kind)

    def of_part(part: str, kind: str) -> Callable[[StageUse], int]:
        return lambda stage: stage.parts[part][kind]

    roles = [role for role in ROLES if role in stages[0].roles]
    rule = " " * LABEL + "".join(f"{'-' * 11:>13}" for _ in stages)
    lines = [row("Each rank of", [f"stage {first + i}" for i in range(len(stages))], 0)]
    lines.append(row("ranks", [_ranks(range((first + i) * span, (first + i + 1) * span)) for i in range(len(stages))]))
    for role in roles:
        if stages[0].roles[role].layers:
            lines.append(row(f"{role} layers", [_span(stage.roles[role].layers) for stage in stages]))
    lines.append("  parameters")
    lines += [row(role, [_amount(stage.roles[role].parameters) for stage in stages], 4) for role in roles]
    for title, kind in (("weights", "weights"), ("gradients", "gradients"), ("optimizer states", "optimizer")):
        lines.append(f"  GiB of {title}")
        for role in roles:
            lines += gib(role, of_role(role, kind))
    lines += [rule, *gib("held all the time", lambda stage: stage.held, 2)]
    lines.append(row("micro-batches in flight", [str(stage.in_flight) for stage in stages]))
    for part in stages[0].parts:
        lines.append(f"  + GiB in the {part}")
        for kind in stages[0].parts[part]:
            lines += gib(kind, of_part(part, kind))
    lines += [rule, *gib("GiB at the peak", lambda stage: stage.peak, 2)]
    return lines


def _span(layers: tuple[int, int] | None) -> str:
    return "" if layers is None else f"{layers[0]}-{layers[1]}" if layers[0] < layers[1] else str(layers[0])


def _amount(number: int) -> str:
    """Parameters to three decimals of the fitting unit."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3f} {unit}"
    return str(number)


def _gib(size: int) -> str:
    """GiB to two decimals, more where that would read 0."""
    value = size / 2**30
    return "-" if not size else f"{value:,.2f}" if value >= 0.995e-2 else f"{value:.1g}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
