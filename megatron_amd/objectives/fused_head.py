"""LM heads and objective in one: values and gradients over the whole vocabulary without a [tokens, vocabulary] tensor.

The heads of student, teacher and critic are applied together to a chunk of tokens at a time, on this rank's shard of
the vocabulary, and the gradient of every objective is formed in the same pass from one formula:

    dL/dz_k = weight * q_k (a_k - sum_j q_j a_j) + score * (1[k = y] - q_k),   a_k = dD/dq_k,   amm: a = -f.

It is then carried back through the head: hidden states' gradients are summed over the tensor-parallel group here,
once (so a gather from sequence-parallel regions before the head must not sum them again); a head's weight gradient
belongs to its shard and needs no communication. It is added at once to the weight's `main_grad`, where Megatron-Core
gave it one of the arithmetic's type. Matrix products are in the heads' own type; all else is fp32, or fp64 for fp64
hidden states, the sums of gradients over chunks too.

Memory and speed: a chunk has one [chunk, V_local] buffer for each of student, teacher and critic, used again for the
next chunk, and the gradient takes their place. What is element-wise goes over a chunk in blocks that a CPU's cache
holds (blocks.py). A small chunk costs time, because each one reads and writes the heads' whole gradient.

Communication per chunk: one exchange of the softmaxes' maxima and sums, and one sum of q*a (none for kl, whose sum is
known; for the critic only where it is centred). Statistics are reduced once, after the last chunk.

Shapes: N tokens (states), n of them in a chunk, V_local rows in this rank's shard of a head, R of them real ids.
All functions belong on the last pipeline stage, and every rank of the tensor-parallel group calls them with equal N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from megatron_amd.objectives import blocks
from megatron_amd.objectives.blocks import Block
from megatron_amd.objectives.divergences import DIVERGENCES, Divergence
from megatron_amd.objectives.head_gradient import HeadGradient, with_gradients
from megatron_amd.objectives.heads import AppliedHeads, CriticHead, Head, HeadOptions, arithmetic
from megatron_amd.objectives.vocab_parallel import Vocabulary, max_over_group, sum_over_group


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token quantities, each [N] in fp32 (fp64 for fp64 hidden states), equal on all tensor-parallel ranks."""

    kl: Tensor
    """KL(p||q), nats."""
    rkl: Tensor
    """KL(q||p), nats."""
    tv: Tensor
    """Total variation, in [0, 1]."""
    js: Tensor
    """Jensen-Shannon divergence, nats."""
    entropy_student: Tensor
    """-sum q ln q."""
    entropy_teacher: Tensor
    """-sum p ln p."""
    student_logprob: Tensor
    """ln q(y)."""
    teacher_logprob: Tensor
    """ln p(y)."""
    top1_agreement: Tensor
    """1 where both models' likeliest token is the same (of equally likely ones the first), else 0."""
    delta: Tensor | None = None
    """E_p f - E_q f. This and the following are None without a critic."""
    f_target: Tensor | None = None
    """f(y)."""
    expected_f_teacher: Tensor | None = None
    """E_p f."""
    expected_f_student: Tensor | None = None
    """E_q f."""
    f_min: Tensor | None = None
    """Smallest f over the real vocabulary."""
    f_max: Tensor | None = None
    """Largest f over the real vocabulary."""

    @property
    def teacher_mass(self) -> Tensor:
        """p(y)."""
        return self.teacher_logprob.exp()


@dataclass(frozen=True)
class StudentTokens:
    """What `student_loss` knows of each token, each [N]."""

    value: Tensor
    """D(p, q): delta for amm, the distance in nats (tv: in [0, 1]), -ln q(y) for sft."""
    student_logprob: Tensor
    """ln q(y)."""
    statistics: TokenStatistics | None = None
    """Everything else, where it was asked for."""


@torch.no_grad()
def head_statistics(
    student: Head,
    teacher: Head,
    critic: CriticHead | None,
    targets: Tensor,
    vocabulary: Vocabulary,
    options: HeadOptions | None = None,
) -> TokenStatistics:
    """Every per-token statistic, without gradients. targets: int64 [N]."""
    heads = AppliedHeads(student, teacher, critic, targets, vocabulary, options or HeadOptions())
    measure = heads.kernel(blocks.block_statistics)
    parts = [measure(block) for rows in heads.chunks() for _, block in heads.apply(rows)]
    return _finish_statistics(heads, parts)


def student_loss(
    student: Head,
    teacher: Head | None,
    critic: CriticHead | None,
    *,
    objective: str | Divergence,
    targets: Tensor,
    weights: Tensor,
    scores: Tensor | None = None,
    vocabulary: Vocabulary,
    options: HeadOptions | None = None,
    with_statistics: bool = False,
) -> tuple[Tensor, StudentTokens]:
    """sum_i weights_i D_i + sum_i scores_i ln q_i(y_i), differentiable in the student's hidden states and head.

    objective: `amm` (D = delta, f held fixed), a distance or its name in `DIVERGENCES`, or `sft` (D = -ln q(y), which
    needs no teacher). targets: int64 [N], real ids; weights, scores: [N], constants. Only `amm` reads the critic. The
    loss is equal on all tensor-parallel ranks. with_statistics: collect the statistics in the same pass (not for `sft`,
    which sees no teacher). Backward can be made once. A weight with a `main_grad` of the arithmetic's type has its
    gradient added there by this call, not by backward, which must then come with a gradient of 1; it may have no other
    path to the loss, unless Megatron-Core marked it as tied to an embedding (`zero_out_wgrad`). Raises ValueError for
    an unknown objective, a missing head, or sizes that do not go together.
    """
    distance = DIVERGENCES.get(objective) if isinstance(objective, str) else objective
    name = str(objective) if distance is None else distance.name
    if distance is None and objective not in ("amm", "sft"):
        raise ValueError(f"objective: {name!r} is not known")
    if (teacher is None and objective != "sft") or (critic is None and objective == "amm"):
        raise ValueError(f"objective {name} needs the teacher's head" + (" and a critic" * (objective == "amm")))
    if objective == "sft" and with_statistics:
        raise ValueError("objective sft sees no teacher, so there are no statistics to collect")
    gradient = HeadGradient(student, arithmetic(student.hidden))
    with torch.no_grad():
        heads = AppliedHeads(
            student,
            None if objective == "sft" else teacher,
            critic if objective == "amm" else None,
            targets,
            vocabulary,
            options or HeadOptions(),
        )
        weights = heads.one_each("weights", weights)
        scores = torch.zeros_like(weights) if scores is None else heads.one_each("scores", scores)
        if objective == "sft":
            scores, weights = scores - weights, torch.zeros_like(weights)
        # Partial sums over this shard: D and ln q(y).
        tokens = torch.zeros(2, heads.num_tokens, dtype=heads.dtype, device=heads.device)
        parts: list[Any] = []
        slope_sum_known = objective == "sft" or (distance is not None and distance.slope_sum is not None)
        at_once = vocabulary.num_shards == 1 or slope_sum_known
        to_gradient = heads.kernel(blocks.student_gradient_at_once)
        to_slope, from_slope = heads.kernel(blocks.student_slope), heads.kernel(blocks.student_gradient)
        for rows in heads.chunks():
            waiting: list[tuple[slice, Block, Tensor]] = []
            for at, block in heads.apply(rows):
                if at_once:
                    tokens[1, at], tokens[0, at], found = to_gradient(
                        block, name, distance, with_statistics, weights[at], scores[at]
                    )
                    parts.append(found)
                else:
                    tokens[1, at], tokens[0, at], found, slope_sum = to_slope(block, name, distance, with_statistics)
                    parts.append(found)
                    waiting.append((at, block, slope_sum))
            for (at, block, _), slope_sum in zip(waiting, _over_shards(waiting, vocabulary), strict=True):
                from_slope(block, slope_sum, weights[at], scores[at])
            gradient.add(rows, heads.student_gradient(rows), heads.student, student.logit_scale)
        value, logprob = sum_over_group(tokens, vocabulary.group)
        loss = (weights * value).sum() + (scores * logprob).sum()
        gradient.reduce(vocabulary)
        statistics = _finish_statistics(heads, parts) if with_statistics else None
    return with_gradients(loss, [gradient]), StudentTokens(value, logprob, statistics)


def critic_loss(
    student: Head,
    teacher: Head,
    critic: CriticHead,
    *,
    targets: Tensor,
    weights: Tensor,
    on_policy: bool,
    estimator: str,
    vocabulary: Vocabulary,
    options: HeadOptions | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """-sum_i weights_i U_i, differentiable in the critic's terms alone, and the statistics of the same pass.

    estimator `full_vocabulary`: U = delta. `sampled`: U = f(y) - E_q f off-policy (y from the teacher), E_p f - f(y)
    on-policy (y from the student). targets: int64 [N]; weights: [N], constants. `main_grad` is used as by
    `student_loss`. Raises ValueError for another estimator, or sizes that do not go together.
    """
    if estimator not in ("full_vocabulary", "sampled"):
        raise ValueError(f"estimator: {estimator!r} is not known")
    dtype = arithmetic(student.hidden)
    gradients = [HeadGradient(Head(hidden, weight), dtype) for hidden, weight, _ in critic.terms]
    with torch.no_grad():
        heads = AppliedHeads(student, teacher, critic, targets, vocabulary, options or HeadOptions())
        weights = heads.one_each("weights", weights)
        parts = []
        to_gradient, to_centered = heads.kernel(blocks.critic_gradient), heads.kernel(blocks.center_gradient)
        for rows in heads.chunks():
            waiting: list[tuple[slice, Block, Tensor]] = []
            for at, block in heads.apply(rows):
                total, found = to_gradient(block, weights[at], on_policy, estimator)
                parts.append(found)
                if critic.center and vocabulary.num_shards > 1:
                    waiting.append((at, block, total))
                elif critic.center:
                    to_centered(block, total)
            for (_, block, _), total in zip(waiting, _over_shards(waiting, vocabulary), strict=True):
                to_centered(block, total)
            for gradient, (head, sign) in zip(gradients, heads.terms, strict=True):
                gradient.add(rows, heads.critic_gradient(rows), head, sign)
        for gradient in gradients:
            gradient.reduce(vocabulary)
        statistics = _finish_statistics(heads, parts)
        loss = -(weights * _moments(statistics, on_policy, estimator)).sum()
    return with_gradients(loss, gradients), statistics


def _over_shards(waiting: Sequence[tuple[slice, Block, Tensor]], vocabulary: Vocabulary) -> Sequence[Tensor]:
    """The blocks' sums [n] over all shards, in one exchange."""
    if not waiting:
        return ()
    sums = [part for _, _, part in waiting]
    return sum_over_group(torch.cat(sums), vocabulary.group).split([len(part) for part in sums])


def _moments(statistics: TokenStatistics, on_policy: bool, estimator: str) -> Tensor:
    """U of each token, [N]."""
    values = (statistics.delta, statistics.f_target, statistics.expected_f_teacher, statistics.expected_f_student)
    delta, f_target, expected_f_teacher, expected_f_student = cast("tuple[Tensor, ...]", values)
    if estimator == "full_vocabulary":
        return delta
    return expected_f_teacher - f_target if on_policy else f_target - expected_f_student


def _finish_statistics(heads: AppliedHeads, parts: Sequence[tuple[Tensor, Tensor]]) -> TokenStatistics:
    """Join the chunks and reduce over the shards: one SUM and one MAX."""
    group = heads.vocabulary.group
    names, tops = blocks.SUMS, blocks.MAXIMA
    if heads.critic is not None:
        names, tops = names + blocks.CRITIC_SUMS, tops + blocks.CRITIC_MAXIMA
    nothing = torch.zeros(len(names), 0, dtype=heads.dtype, device=heads.device)
    sums = sum_over_group(torch.cat([nothing, *[part[0] for part in parts]], dim=1), group)
    maxima = max_over_group(torch.cat([nothing[: len(tops)], *[part[1] for part in parts]], dim=1), group)
    found, largest = dict(zip(names, sums, strict=True)), dict(zip(tops, maxima, strict=True))
    agree = largest["minus_student_id"] == largest["minus_teacher_id"]
    if heads.critic is not None:
        found |= {"f_min": -largest["minus_f_min"], "f_max": largest["f_max"]}
    return TokenStatistics(**found, top1_agreement=agree.to(heads.dtype))
