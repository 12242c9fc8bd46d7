"""What happens to logits between the matrix products: element-wise, with sums over this shard's ids.

A block is a few tokens' logits on this rank's shard of the vocabulary. Everything here works in place where it can
and makes temporaries of a block's size, so that on a CPU, where blocks are small, they stay in its cache. On a GPU a
block is a whole chunk and `compiled` turns each of these functions into one or two kernels (torch.compile), so an
objective stays two functions in divergences.py, whatever runs it.

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
def compiled(function: F) -> F:
    """The function as fused kernels, for any number of tokens."""
    return torch.compile(function, dynamic=True)  # type: ignore[return-value]


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

    objective: `amm`, with D = delta and a = -f; `sft`, whose a is left to the scores; or the distance's name.
    torch.compile looks at a string each time, but takes two distances for one where it has met their functions
    elsewhere. The statistics are those of `statistics`.
    """
    q, p, f = evaluate(block)
    found = statistics(block, q, p, f) if with_statistics else None
    logprob = block.targets.take(block.student)
    if objective == "sft":
        return logprob, -logprob, found, q, None
    if objective == "amm" or distance is None:
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
        f.square_().mul_(-1 / block.bound).add_(block.bound).mul_(direction)
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
    """This shard's part of the sums, [8 or 12, n] in the order of `TokenStatistics`, and of the maxima, [2 or 4, n]."""
    log_q, log_p = block.student, block.teacher
    sums = [DIVERGENCES[name].value(p, q, log_p, log_q) for name in ("kl", "rkl", "tv", "js")]
    sums += [-(q * log_q).sum(1), -(p * log_p).sum(1)]
    sums += [block.targets.take(log_q), block.targets.take(log_p)]
    maxima = [-_top_id(block, log_q, block.of_student), -_top_id(block, log_p, block.of_teacher)]
    if f is not None:
        sums += [(p - q).mul_(f).sum(1), block.targets.take(f), (p * f).sum(1), (q * f).sum(1)]
        maxima += [-_local_min(f), local_max(f)]
    return torch.stack(sums), torch.stack(maxima)


def _top_id(block: Block, log_probs: Tensor, partition: Partition) -> Tensor:
    """[n] id of the likeliest token if it is on this shard, else the vocabulary's size. Exact in fp32 up to 2^24."""
    if not log_probs.shape[1]:
        return log_probs.new_full((log_probs.shape[0],), block.vocab_size)
    ids = (log_probs.argmax(1) + block.first_id).to(log_probs.dtype)
    return torch.where(partition.holds_top, ids, block.vocab_size)


def _local_min(values: Tensor) -> Tensor:
    return values.amin(1) if values.shape[1] else values.new_full((values.shape[0],), torch.inf)
