"""Which prompts come next: a position in an endless, reproducible sequence of rows.

The sequence is epoch after epoch of the whole data set, each epoch in an order that depends on (seed, epoch) alone.
Global batch number i is rows [i * B, (i + 1) * B) of it, however many ranks share the batch. Ranks get equally many,
and as nearly as that allows equally many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_amd.batch import Prompts
from megatron_amd.data.dataset import PromptDataset
from megatron_amd.errors import InputError


class PromptLoader:
    """This rank's share of one global batch after another."""

    def __init__(
        self,
        dataset: PromptDataset,
        *,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool,
    ):
        if global_batch_size % dp_size:
            raise InputError(
                f"training.global_batch_size: {global_batch_size} is not divisible by the data-parallel size {dp_size} "
                "(world size / (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))"
            )
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._seed = seed
        self._shuffle = shuffle
        self._consumed = 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def consumed(self) -> int:
        """Prompts handed out so far, over all ranks and epochs."""
        return self._consumed

    def next(self) -> Prompts:
        """This rank's prompts of the next global batch. A batch may run over into the next epoch."""
        start = self._consumed
        self._consumed += self._global_batch_size
        places = [divmod(place, len(self._dataset)) for place in range(start, self._consumed)]
        positions = [int(self._epoch_order(epoch)[index]) for epoch, index in places]
        lengths = self._dataset.lengths[positions]
        mine = deal(lengths.tolist(), self._dp_size, self._global_batch_size // self._dp_size)[self._dp_rank]
        return self._dataset.prompts([positions[i] for i in mine], visits=[places[i][0] for i in mine])

    def state_dict(self) -> dict[str, Any]:
        """Position in the sequence and a fingerprint of the data; equal on all ranks and for every dp_size."""
        return {"consumed": self._consumed, "fingerprint": self._dataset.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises InputError when it was saved with other data."""
        if state["fingerprint"] != self._dataset.fingerprint:
            raise InputError(
                "data.train: rows, tokenizer, template or responses differ from those of the checkpoint; resume with "
                "the same data settings, or start in another run.directory"
            )
        self._consumed = int(state["consumed"])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._dataset), self._seed, epoch, self._shuffle))
        return self._order[1]


def deal(costs: Sequence[float], ranks: int, most: int | None = None) -> list[list[int]]:
    """Items for each rank, so that the ranks' sums of costs differ little: the dearest first, each to the rank that has
    the least so far and has not `most` items yet. Each rank's items in ascending order."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        open_ranks = [rank for rank in range(ranks) if most is None or len(hands[rank]) < most]
        rank = min(open_ranks, key=lambda rank: (sums[rank], rank))
        hands[rank].append(item)
        sums[rank] += costs[item]
    return [sorted(hand) for hand in hands]


def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of `rows` rows in an epoch, int64 [rows].

    Sorts by the raw output of a Philox generator, which numpy promises not to change, unlike its `permutation`.
    """
    if not shuffle:
        return np.arange(rows)
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(rows)
    return np.argsort(keys, kind="stable")


def first_prompts(dataset: PromptDataset, count: int, *, dp_rank: int = 0, dp_size: int = 1) -> Prompts:
    """This rank's share of the data set's first `count` rows, in their own order and with visit 0.

    The shares are consecutive, differ in length by at most one, and may be empty when count < dp_size.
    Raises InputError when there are fewer rows.
    """
    if count > len(dataset):
        raise InputError(
            f"evaluation.prompts: {count} prompts are asked for, but data.evaluation has {len(dataset)} usable rows"
        )
    start, stop = count * dp_rank // dp_size, count * (dp_rank + 1) // dp_size
    return dataset.prompts(range(start, stop), [0] * (stop - start))
