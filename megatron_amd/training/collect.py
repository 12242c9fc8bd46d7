"""From prompts to a batch: generate responses, lay them out, collect the models' hidden states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_amd.batch import Batch, MicroBatch, Prompts, Rollouts, make_microbatches
from megatron_amd.config import Config
from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.schedule import forward_states
from megatron_amd.models.layer_specs import fp8_multiple
from megatron_amd.objectives.moments import discount_weights
from megatron_amd.rollout.generate import generate
from megatron_amd.training.players import Players

OFF, ON = False, True
"""Keys for the two kinds of states: the teacher's (or the data's) and the student's own."""


def noise_seed(seed: int, stream: str) -> int:
    """A seed of its own for each stream of sampling noise, so that student and teacher do not share theirs."""
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def respond(
    players: Players, model: torch.nn.Module, prompts: Prompts, eos_ids: tuple[int, ...], stream: str, **sampling: Any
) -> Rollouts:
    """Responses of one of the models, with the noise of a stream; `sampling` goes to `generate`."""
    rollout = players.config.rollout
    return generate(
        model,
        prompts,
        layout=players.layout,
        vocab_size=players.vocabulary.size,
        eos_ids=eos_ids,
        seed=noise_seed(players.config.run.seed, stream),
        batch_size=rollout.batch_size,
        pass_tokens=rollout.pass_tokens,
        cache_tokens=rollout.cache_tokens,
        **sampling,
    )


def student_responses(players: Players, prompts: Prompts, eos_ids: tuple[int, ...]) -> Rollouts:
    """On-policy responses, `rollout.samples_per_prompt` to each prompt, from the student as it is now."""
    r = players.config.rollout
    return respond(
        players,
        players.student,
        prompts,
        eos_ids,
        "student",
        max_response_length=r.max_response_length,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        min_response_length=r.min_response_length,
        samples_per_prompt=r.samples_per_prompt,
    )


def off_policy_responses(players: Players, prompts: Prompts, eos_ids: tuple[int, ...]) -> Rollouts:
    """Off-policy responses: sampled from the teacher at temperature 1, or those that came with the prompts."""
    r = players.config.rollout
    if r.off_policy != "teacher":
        assert prompts.responses is not None
        return Rollouts.from_lists(prompts.tokens, prompts.responses, players.layout.device)
    return respond(players, players.teacher, prompts, eos_ids, "teacher", max_response_length=r.max_response_length)


def make_batch(
    players: Players, rollouts: Mapping[bool, Rollouts], *, student_states: bool = True, teacher_states: bool = True
) -> Batch:
    """Cut sequences into micro-batches and collect final hidden states. Collective.

    Args:
        rollouts: by `OFF` and `ON`; one may be missing.
        student_states: False where only the student's own step looks at its states, which computes them anyway.
        teacher_states: False where nothing looks at the teacher (sft).
    """
    config, layout = players.config, players.layout
    size = min(config.training.micro_batch_size, max(map(len, rollouts.values())))
    width = padded_width(max(r.tokens.shape[1] for r in rollouts.values()), config, layout)
    microbatches: list[MicroBatch] = []
    scales: dict[bool, float] = {}
    for on_policy, sequences in rollouts.items():
        parts = make_microbatches(sequences, on_policy=on_policy, size=size, width=width)
        scales[on_policy] = 1.0 / _normalizer(parts, len(sequences), config, layout)
        microbatches += parts
    weights = [discount_weights(m.steps, config.objective.gamma) * scales[m.on_policy] for m in microbatches]
    return Batch(
        microbatches=microbatches,
        weights=weights,
        scales=scales,
        student_states=forward_states(players.student, microbatches, layout) if student_states else None,
        teacher_states=forward_states(players.teacher, microbatches, layout) if teacher_states else None,
    )


def response_metrics(rollouts: Mapping[bool, Rollouts], eos_ids: tuple[int, ...], layout: Layout) -> dict[str, float]:
    """Mean response length and share of responses that end with EOS, over the global batch. Collective over DP."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for on_policy, sequences in rollouts.items():
        responses = sequences.responses()
        sums[int(on_policy)] = torch.tensor(
            [
                sum(map(len, responses)),
                sum(bool(response) and response[-1] in eos_ids for response in responses),
                len(responses),
            ]
        )
    on_device = sums.to(layout.device)
    dist.all_reduce(on_device, group=layout.groups.dp)
    metrics = {}
    for policy, (tokens, ended, count) in zip(("off", "on"), on_device.tolist(), strict=True):
        if count:
            metrics[f"rollout/response_length_{policy}"] = tokens / count
            metrics[f"rollout/eos_fraction_{policy}"] = ended / count
    return metrics


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
