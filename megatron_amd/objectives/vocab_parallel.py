"""Sums over a vocabulary of which each rank of a tensor-parallel group holds a shard.

Rank r of the group owns the rows [r * V_local, (r+1) * V_local) of every head. Rows with ids >= the vocabulary's real
size are padding. They are the last rows of the last shards, so they are cut off before anything is computed, and a
shard may have no real row at all. Below, R is the number of real ids of this rank's shard and n counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The real vocabulary and this rank's place in it."""

    size: int
    """Real ids: 0 .. size-1. Head rows beyond are padding."""
    shard_start: int = 0
    """First id of this rank's shard: rank in `group` times rows per shard."""
    group: dist.ProcessGroup | None = None
    """Ranks that together hold the vocabulary. None or a group of one: no communication."""

    @property
    def num_shards(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    def real_rows(self, rows: int) -> int:
        """How many of this shard's `rows` are real ids.

        Raises ValueError where shards of that many rows, one a rank, are not where `shard_start` says or cannot hold
        the vocabulary.
        """
        rank = 0 if self.group is None else self.group.rank()
        if self.shard_start != rank * rows or rows * self.num_shards < self.size:
            raise ValueError(
                f"rank {rank} of {self.num_shards} has {rows} head rows from id {self.shard_start}: "
                f"this is not its share of a vocabulary of {self.size}"
            )
        return min(max(self.size - self.shard_start, 0), rows)


def sum_over_group(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`reduce_over_group` with SUM."""
    return reduce_over_group(tensor, group, dist.ReduceOp.SUM)


def max_over_group(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`reduce_over_group` with MAX."""
    return reduce_over_group(tensor, group, dist.ReduceOp.MAX)


def reduce_over_group(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> Tensor:
    """All-reduce in place. Empty tensors are left alone, on every rank alike."""
    if group is not None and group.size() > 1 and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def local_max(values: Tensor) -> Tensor:
    """Largest of each row of [n, R]; -inf where the shard has no real id."""
    return values.amax(1) if values.shape[1] else values.new_full((values.shape[0],), -torch.inf)


@dataclass(frozen=True)
class Partition:
    """What normalises one softmax over the whole vocabulary, each [n]."""

    local_top: Tensor
    """Largest logit of this shard; -inf where it has no real id."""
    top: Tensor
    """Largest logit."""
    log_total: Tensor
    """ln sum exp(z - top)."""
    shift: Tensor
    """What log-probabilities are below logits less `local_top`."""
    expectation: Tensor | None
    """Mean of `values` under the softmax, where values were given."""

    @property
    def holds_top(self) -> Tensor:
        """bool: the largest logit lies on this shard."""
        return self.local_top == self.top

    def __getitem__(self, part: slice) -> Partition:
        """Of these tokens alone."""
        expectation = None if self.expectation is None else self.expectation[part]
        return Partition(self.local_top[part], self.top[part], self.log_total[part], self.shift[part], expectation)


def subtract_top(logits: Tensor, values: Tensor | None) -> Tensor:
    """Subtract each token's largest from logits [n, R] in place: [2 or 3, n] of what `partitions` exchanges.

    These are that largest, the sum of the exponentials of what is left, and that sum weighted with `values` [n, R].
    """
    top = local_max(logits)
    weights = logits.sub_(top[:, None]).exp()
    sums = [top, weights.sum(1)]
    if values is not None:
        sums.append(weights.mul_(values).sum(1))
    return torch.stack(sums)


def whole_partition(sums: Tensor) -> Partition:
    """The partition where this shard is the whole vocabulary. sums: [2 or 3, n], what `subtract_top` gave."""
    top, total, *weighted = sums
    log_total = total.log()
    return Partition(top, top, log_total, log_total, weighted[0] / total if weighted else None)


def partitions(sums: Tensor, group: dist.ProcessGroup) -> list[Partition]:
    """The partition of each of several softmaxes in one exchange.

    sums: [softmaxes, 2 or 3, n], of each what `subtract_top` gave. They are gathered rather than all-reduced: one round
    instead of a MAX and a SUM, and the shards are added in the order of their ranks, so that equal logits give equal
    bits (a ring adds in an order that depends on where a number lies in the buffer).
    """
    shards = _all_gather(sums, group)
    return [_combine(own[0], [shard[i] for shard in shards]) for i, own in enumerate(sums)]


def _combine(local_top: Tensor, shards: Sequence[Tensor]) -> Partition:
    """Shards' (top, total[, weighted]), each [2 or 3, n], of one softmax."""
    top = shards[0][0]
    for shard in shards[1:]:
        top = torch.maximum(top, shard[0])
    sums = torch.zeros_like(shards[0][1:])
    for shard in shards:
        sums += shard[1:] * (shard[0] - top).exp()
    log_total = sums[0].log()
    expectation = sums[1] / sums[0] if len(sums) > 1 else None
    return Partition(local_top, top, log_total, (top - local_top) + log_total, expectation)


@dataclass(frozen=True)
class LocalTargets:
    """Target ids of n tokens, as far as this shard holds them. Ids outside the vocabulary belong to no shard."""

    index: Tensor
    """int64 [n, 1]: row of the shard, where it is owned."""
    owned: Tensor
    """bool [n]."""

    @classmethod
    def of(cls, targets: Tensor, shard_start: int, real_rows: int) -> LocalTargets:
        """targets: int64 [n]; the shard holds the ids shard_start .. shard_start + real_rows - 1."""
        index = targets - shard_start
        return cls(index.clamp(0, max(real_rows - 1, 0))[:, None], (index >= 0) & (index < real_rows))

    def __getitem__(self, part: slice) -> LocalTargets:
        """Of these tokens alone."""
        return LocalTargets(self.index[part], self.owned[part])

    def take(self, values: Tensor) -> Tensor:
        """[n, R] -> values at the targets [n], 0 where another shard holds the target: the sum over shards is whole."""
        if not values.shape[1]:
            return values.new_zeros(values.shape[0])
        return torch.where(self.owned, values.gather(1, self.index)[:, 0], 0)

    def add_(self, values: Tensor, amounts: Tensor | float) -> None:
        """Add `amounts` ([n] or a number) to the targets' entries of values [n, R], in place."""
        if values.shape[1]:
            values.scatter_add_(1, self.index, (self.owned * amounts).to(values.dtype)[:, None])
