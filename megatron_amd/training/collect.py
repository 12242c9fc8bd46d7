"""From prompts to a batch: generate responses, lay them out, collect the models' hidden states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_amd.batch import (
    Batch,
    MicroBatch,
    Prompts,
    Rollouts,
    make_encoder_decoder_microbatches,
    make_microbatches,
)
from megatron_amd.config import Config, RolloutConfig
from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.schedule import forward_states
from megatron_amd.models.layer_specs import fp8_multiple
from megatron_amd.models.t5 import EncoderDecoderLM
from megatron_amd.objectives.moments import discount_weights
from megatron_amd.rollout.generate import generate, has_ended
from megatron_amd.training.players import Players

_FIRST_BATCHES = 10
"""Batches whose share of cut responses the later ones are held against, and that the latest share is a mean over."""
_CLEARLY_MORE = 0.2
Generating = Callable[[str, int], Callable[[int, int], None] | None]
"""Who is going to write, and how many responses -> what is told how many are complete, and their tokens."""
OFF, ON = False, True
"""Keys for the two kinds of states: the teacher's (or the data's) and the student's own."""


def noise_seed(seed: int, stream: str) -> int:
    """A seed of its own for each stream of sampling noise, so that student and teacher do not share theirs."""
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def respond(
    players: Players,
    model: torch.nn.Module,
    prompts: Prompts,
    eos_ids: tuple[int, ...],
    stream: str,
    generating: Generating | None = None,
    **sampling: Any,
) -> Rollouts:
    """Responses of one of the models, with the noise of a stream; `sampling` goes to `generate`."""
    rollout = players.config.rollout
    count = len(prompts) * sampling.get("samples_per_prompt", 1)
    rollouts = generate(
        model,
        prompts,
        layout=players.layout,
        vocab_size=players.vocabulary.size,
        eos_ids=eos_ids,
        seed=noise_seed(players.config.run.seed, stream),
        **ways_of_working(rollout),
        is_complete=players.is_complete,
        report=None if generating is None else generating(stream, count),
        **sampling,
    )
    if rollout.release_memory:
        torch.cuda.empty_cache()
    return rollouts


def ways_of_working(rollout: RolloutConfig) -> dict[str, Any]:
    """Those of `generate`'s settings that change its speed and memory and no response."""
    names = ("batch_size", "pass_tokens", "cache_tokens", "look_interval", "cuda_graphs")
    return {name: getattr(rollout, name) for name in names}


def student_responses(
    players: Players, prompts: Prompts, eos_ids: tuple[int, ...], generating: Generating | None = None
) -> Rollouts:
    """On-policy responses, `rollout.samples_per_prompt` to each prompt, from the student as it is now, mixed with the
    teacher where `rollout.teacher_share` says so."""
    r = players.config.rollout
    return respond(
        players,
        players.student,
        prompts,
        eos_ids,
        "student",
        generating,
        max_response_length=r.max_response_length,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        min_response_length=r.min_response_length,
        samples_per_prompt=r.samples_per_prompt,
        mixed_with=(players.teacher, r.teacher_share) if r.teacher_share else None,
    )


def off_policy_responses(
    players: Players, prompts: Prompts, eos_ids: tuple[int, ...], generating: Generating | None = None
) -> Rollouts:
    """Off-policy responses: sampled from the teacher at temperature 1, or those that came with the prompts."""
    r = players.config.rollout
    if r.off_policy != "teacher":
        assert prompts.responses is not None
        return Rollouts.from_lists(prompts.tokens, prompts.responses, players.layout.device)
    return respond(
        players,
        players.teacher,
        prompts,
        eos_ids,
        "teacher",
        generating,
        max_response_length=r.max_response_length,
    )


def make_batch(
    players: Players,
    rollouts: Mapping[bool, Rollouts],
    *,
    beta: float | None = None,
    student_states: bool = True,
    teacher_states: bool = True,
) -> Batch:
    """Cut sequences into micro-batches and collect final hidden states. Collective.

    Args:
        rollouts: by `OFF` and `ON`; one may be missing.
        beta: weight of the off-policy term; unset: the objective's.
        student_states: False where only the student's own step looks at its states, which computes them anyway.
        teacher_states: False where nothing looks at the teacher (sft).
    """
    config, layout = players.config, players.layout
    microbatches: list[MicroBatch] = []
    scales: dict[bool, float] = {}
    cut = _cutter(players, list(rollouts.values()))
    for on_policy, sequences in rollouts.items():
        parts = cut(sequences, on_policy=on_policy)
        scales[on_policy] = 1.0 / _normalizer(parts, len(sequences), config, layout)
        microbatches += parts
    weights = [discount_weights(m.steps, config.objective.gamma) * scales[m.on_policy] for m in microbatches]
    return Batch(
        microbatches=microbatches,
        weights=weights,
        scales=scales,
        beta=config.objective.beta if beta is None else beta,
        student_states=forward_states(players.student, microbatches, layout) if student_states else None,
        teacher_states=forward_states(players.teacher, microbatches, layout) if teacher_states else None,
    )


def _cutter(players: Players, rollouts: Sequence[Rollouts]) -> Callable[..., list[MicroBatch]]:
    """What cuts sequences into micro-batches, all of one shape."""
    config, layout, student = players.config, players.layout, players.student
    size = min(config.training.micro_batch_size, max(map(len, rollouts)))
    if not isinstance(student, EncoderDecoderLM):
        longest = max(sequences.tokens.shape[1] for sequences in rollouts)
        return partial(make_microbatches, size=size, width=padded_width(longest, config, layout))
    prompt = max(int(sequences.prompt_lengths.max()) for sequences in rollouts)
    response = max(int((sequences.lengths - sequences.prompt_lengths).max()) for sequences in rollouts)
    return partial(
        make_encoder_decoder_microbatches,
        size=size,
        prompt_width=padded_width(prompt, config, layout),
        response_width=padded_width(response, config, layout),
        start_id=student.decoder_start_id,
    )


def response_metrics(players: Players, rollouts: Mapping[bool, Rollouts], eos_ids: tuple[int, ...]) -> dict[str, float]:
    """Lengths and ends of the responses of the global batch. Collective over DP."""
    longest, layout = players.config.rollout.max_response_length, players.layout
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for on_policy, sequences in rollouts.items():
        responses = sequences.responses()
        full = [response for response in responses if len(response) >= longest]
        sums[int(on_policy)] = torch.tensor(
            [
                len(responses),
                sum(map(len, responses)),
                sum(bool(response) and response[-1] in eos_ids for response in responses),
                sum(not has_ended(response, eos_ids, players.is_complete) for response in full),
            ]
        )
    on_device = sums.to(layout.device)
    dist.all_reduce(on_device, group=layout.groups.dp)
    metrics = {}
    for policy, (count, tokens, ended, capped) in zip(("off", "on"), on_device.tolist(), strict=True):
        if count:
            metrics[f"rollout/response_length_{policy}"] = tokens / count
            metrics[f"rollout/eos_fraction_{policy}"] = ended / count
            metrics[f"rollout/capped_fraction_{policy}"] = capped / count
    return metrics


def capped_more(history: dict[str, list[float]], metrics: Mapping[str, float]) -> list[str]:
    """Warnings where clearly more responses are cut at the length limit than before.

    Args:
        history: of each policy the batches seen, the share of its first ones and that of its latest ones; updated.
        metrics: of `response_metrics`.
    """
    warnings = []
    for policy, whose in (("off", "off-policy"), ("on", "student's")):
        share = metrics.get(f"rollout/capped_fraction_{policy}")
        if share is None:
            continue
        count, first, latest = history.get(policy, (0, share, share))
        if count < _FIRST_BATCHES:
            first = latest = (first * count + share) / (count + 1)
        latest += (share - latest) / _FIRST_BATCHES
        if latest > first + _CLEARLY_MORE:
            warnings.append(
                f"warning: {latest:.0%} of the {whose} responses are cut at rollout.max_response_length, {first:.0%} "
                "before: raise it, or see that the models end with the same token"
            )
            first = latest  # and again when it is clearly more than that
        history[policy] = [count + 1, first, latest]
    return warnings


def padded_width(width: int, config: Config, layout: Layout) -> int:
    """Sequence parallelism splits S over TP ranks; FP8 products want a certain multiple of tokens on each."""
    multiple = fp8_multiple(config.training) * (layout.tp_size if layout.sequence_parallel else 1)
    return -(-width // multiple) * multiple


def _normalizer(microbatches: list[MicroBatch], sequences: int, config: Config, layout: Layout) -> float:
    """N of a term: sequences or response tokens of the global batch."""
    per_token = config.objective.normalization == "per_token"
    local = sum(m.num_states for m in microbatches) if per_token else sequences
    total = torch.tensor([local], dtype=torch.float64, device=layout.device)
    dist.all_reduce(total, group=layout.groups.dp)
    return max(total.item(), 1.0)
