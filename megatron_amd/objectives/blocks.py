"""What happens to logits between the matrix products: element-wise, with sums over this shard's ids.

A block is a few tokens' logits on this rank's shard of the vocabulary. Everything here works in place where it can
and makes temporaries of a block's size, so that on a CPU, where blocks are small, they stay in its cache. On a GPU a
block is a whole chunk and `compiled` turns each of these functions into one or two kernels (torch.compile), so an
objective stays two functions in divergences.py, whatever runs it.

What a block's memory holds after each call:

    call                            student                    teacher     raw
    (given out by heads.py)         logits less the largest    the same    raw values
    evaluate                        ln q                       ln p        f
    student_gradient_at_once        dL/dz                      ln p        -
    student_slope                   ln q                       q a         -
    student_gradient, after it      dL/dz                      q a         -
    critic_gradient                 ln q                       ln p        dL/draw (before centring)
    center_gradient, after it       q                          p           dL/draw

Shapes: n tokens in the block, R real ids on this shard. Arithmetic is fp32, or fp64 where the logits are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_amd.objectives.divergences import DIVERGENCES, Divergence
from megatron_amd.objectives.vocab_parallel import LocalTargets, Partition, local_max

F = TypeVar("F", bound=Callable[..., Any])

SUMS: tuple[str, ...] = (
    "kl",
    "rkl",
    "tv",
    "js",
    "entropy_student",
    "entropy_teacher",
    "student_logprob",
    "teacher_logprob",
)
"""Statistics that are sums over the vocabulary: fields of `TokenStatistics`."""
CRITIC_SUMS: tuple[str, ...] = ("delta", "f_target", "expected_f_teacher", "expected_f_student")
"""The same with a critic."""
MAXIMA: tuple[str, ...] = ("minus_student_id", "minus_teacher_id")
"""What is maximised over the vocabulary: the likeliest tokens' ids, of equally likely ones the first."""
CRITIC_MAXIMA: tuple[str, ...] = ("minus_f_min", "f_max")
_COMPILED_VARIANTS = 64
"""Objectives, with and without statistics, that one process may compile a function for."""


@dataclass(frozen=True)
class Block:
    """Logits of student and teacher and the critic's raw values, with what makes distributions and f of them.

    The teacher is missing for `sft`, the critic where no f is needed.
    """

    student: Any
    """[n, R] logits less this shard's largest; `evaluate` makes it ln q."""
    of_student: Partition
    teacher: Any
    """[n, R] logits less this shard's largest; `evaluate` makes it ln p."""
    of_teacher: Any
    raw: Any
    """[n, R] raw values; `evaluate` makes it f."""
    shift: Any
    """[n], subtracted from the raw values; or None."""
    bound: float | None
    """c of f = c tanh(.); None: f is the raw value."""
    targets: LocalTargets
    first_id: int
    """Id of this shard's first row."""
    vocab_size: int
    """Real ids of all shards."""


@functools.cache
def compiled(function: F, **options: Any) -> F:
    """The function as fused kernels, for any number of tokens. options: further arguments of torch.compile."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VARIANTS)
    return torch.compile(function, dynamic=True, **options)  # type: ignore[return-value]


def evaluate(block: Block) -> tuple[Tensor, Any, Any]:
    """Make ln q, ln p and f of what the block holds, once; (q, p, f), each [n, R], p or f None without their model."""
    for log_probs, partition in ((block.student, block.of_student), (block.teacher, block.of_teacher)):
        if log_probs is not None:
            log_probs.sub_(partition.shift[:, None])
    if block.raw is not None:
        if block.shift is not None:
            block.raw.sub_(block.shift[:, None])
        if block.bound is not None:
            block.raw.tanh_().mul_(block.bound)
    return block.student.exp(), None if block.teacher is None else block.teacher.exp(), block.raw


def student_values(
    block: Block, objective: str, distance: Divergence | None, with_statistics: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor, Tensor | None]:
    """(ln q(y) [n], D [n], statistics, q [n, R], q a [n, R]); the first three are this shard's parts.

    objective: `amm`, with D = delta and a = -f; `sft`, whose a is left to the scores; or the distance's name, which
    torch.compile compares at each call, as it does not compare functions. The statistics are those of `statistics`.
    """
    q, p, f = evaluate(block)
    found = statistics(block, q, p, f) if with_statistics else None
    logprob = block.targets.take(block.student)
    if objective == "sft" and distance is None:  # in this order: the name must always be looked at
        return logprob, -logprob, found, q, None
    if distance is None:
        value, slope = p.sub_(q).mul_(f).sum(1), f.mul_(q).neg_()
    else:
        value = distance.value(p, q, block.teacher, block.student)
        slope = distance.slope(p, q, block.teacher, block.student)
    return logprob, value, found, q, slope


def student_slope(
    block: Block, objective: str, distance: Divergence | None, with_statistics: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor]:
    """The first three of `student_values` and the shard's sum of q a, [n]. Leaves q a in the teacher's memory.

    Where the sum over all shards must be waited for, before `student_gradient`.
    """
    logprob, value, found, _, slope = student_values(block, objective, distance, with_statistics)
    assert slope is not None
    block.teacher.copy_(slope)
    return logprob, value, found, slope.sum(1)


def student_gradient(block: Block, slope_sum: Tensor, weights: Tensor, scores: Tensor) -> None:
    """What `student_gradient_at_once` leaves, after `student_slope`. slope_sum: sum of q a over all shards, [n]."""
    _gradient(block, block.student.exp(), block.teacher, slope_sum, weights, scores)


def student_gradient_at_once(
    block: Block,
    objective: str,
    distance: Divergence | None,
    with_statistics: bool,
    weights: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """The first three of `student_values`, where the sum of q a is known without other shards.

    Leaves weight * q (a - sum q a) + score * (1[k = y] - q) in the student's memory. weights, scores: [n].
    """
    logprob, value, found, q, slope = student_values(block, objective, distance, with_statistics)
    slope_sum: Any = None if distance is None else distance.slope_sum
    if slope is not None and slope_sum is None:
        slope_sum = slope.sum(1)
    _gradient(block, q, slope, slope_sum, weights, scores)
    return logprob, value, found


def _gradient(
    block: Block, q: Tensor, slope: Tensor | None, slope_sum: Tensor | float, weights: Tensor, scores: Tensor
) -> None:
    if slope is None:
        torch.mul(q, -scores[:, None], out=block.student)
    else:
        torch.mul(q, (-(weights * slope_sum) - scores)[:, None], out=block.student)
        block.student.addcmul_(slope, weights[:, None])
    block.targets.add_(block.student, scores)


def critic_gradient(
    block: Block, weights: Tensor, on_policy: bool, estimator: str
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Leaves the gradient of -weight * U in the raw values in their memory; (its sum [n], statistics), shard's parts.

    The sum is what `center_gradient` needs, after a reduction over the shards, where the raw values are centred.
    """
    q, p, f = evaluate(block)
    found = statistics(block, q, p, f)
    if estimator == "full_vocabulary":
        direction = q.sub_(p)
    elif on_policy:
        direction = p.neg_()
        block.targets.add_(direction, 1.0)
    else:
        direction = q
        block.targets.add_(direction, -1.0)
    direction.mul_(weights[:, None])
    if block.bound is not None:
        f.div_(block.bound).square_().neg_().add_(1.0).mul_(block.bound).mul_(direction)  # exactly 0 at +-bound
    else:
        f.copy_(direction)
    return f.sum(1), found


def center_gradient(block: Block, total: Tensor) -> None:
    """Carry the raw values' gradient through the subtraction of their mean under (p+q)/2. total: [n], its sum."""
    block.raw.sub_(block.teacher.exp_().add_(block.student.exp_()).mul_(0.5 * total[:, None]))


def block_statistics(block: Block) -> tuple[Tensor, Tensor]:
    """`statistics` of a block that is not evaluated yet."""
    return statistics(block, *evaluate(block))


def statistics(block: Block, q: Tensor, p: Tensor, f: Tensor | None) -> tuple[Tensor, Tensor]:
    """This shard's part of the sums, [SUMS (+ CRITIC_SUMS), n], and of the maxima, [MAXIMA (+ CRITIC_MAXIMA), n]."""
    log_q, log_p = block.student, block.teacher
    sums = {name: DIVERGENCES[name].value(p, q, log_p, log_q) for name in ("kl", "rkl", "tv", "js")}
    sums["entropy_student"], sums["entropy_teacher"] = -(q * log_q).sum(1), -(p * log_p).sum(1)
    sums["student_logprob"], sums["teacher_logprob"] = block.targets.take(log_q), block.targets.take(log_p)
    maxima = {"minus_student_id": -_top_id(block, log_q, block.of_student)}
    maxima["minus_teacher_id"] = -_top_id(block, log_p, block.of_teacher)
    if f is not None:
        sums["delta"], sums["f_target"] = (p - q).mul_(f).sum(1), block.targets.take(f)
        sums["expected_f_teacher"], sums["expected_f_student"] = (p * f).sum(1), (q * f).sum(1)
        maxima["minus_f_min"], maxima["f_max"] = -_local_min(f), local_max(f)
    names, tops = (SUMS, MAXIMA) if f is None else (SUMS + CRITIC_SUMS, MAXIMA + CRITIC_MAXIMA)
    return torch.stack([sums[name] for name in names]), torch.stack([maxima[name] for name in tops])


def _top_id(block: Block, log_probs: Tensor, partition: Partition) -> Tensor:
    """[n] id of the likeliest token if it is on this shard, else the vocabulary's size. Exact in fp32 up to 2^24."""
    if not log_probs.shape[1]:
        return log_probs.new_full((log_probs.shape[0],), block.vocab_size)
    ids = (log_probs.argmax(1) + block.first_id).to(log_probs.dtype)
    return torch.where(partition.holds_top, ids, block.vocab_size)


def _local_min(values: Tensor) -> Tensor:
    return values.amin(1) if values.shape[1] else values.new_full((values.shape[0],), torch.inf)
