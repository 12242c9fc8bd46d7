"""What flows between the parts: prompts, sequences, the states of a batch.

Shapes: B sequences on this data-parallel rank, S tokens in the longest of them, N states (response positions).

Sequences are a prompt followed at once by its response, padded on the right. Under causal attention the padding is
then invisible to every real position, so no attention mask exists anywhere. The state s_t that predicts response
token y_t is the position just before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Prompts:
    """One rank's share of a global batch of prompts."""

    ids: tuple[int, ...]
    """Row number of each prompt in its data set: stable across epochs, layouts and restarts."""
    visits: tuple[int, ...]
    """How often each row has been drawn before (its epoch)."""
    tokens: tuple[tuple[int, ...], ...]
    """Token ids of each prompt."""
    responses: tuple[tuple[int, ...], ...] | None = None
    """Response tokens, EOS included, where the data or files of responses have them."""
    texts: tuple[str, ...] | None = None
    """The raw prompt texts, for showing."""

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, count: int) -> Prompts:
        """The first `count` prompts, or all where there are fewer."""
        return Prompts(
            ids=self.ids[:count],
            visits=self.visits[:count],
            tokens=self.tokens[:count],
            responses=None if self.responses is None else self.responses[:count],
            texts=None if self.texts is None else self.texts[:count],
        )

    def repeat(self, count: int) -> Prompts:
        """Each prompt `count` times in a row."""

        def spread(items: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(item for item in items for _ in range(count))

        return Prompts(
            ids=spread(self.ids),
            visits=spread(self.visits),
            tokens=spread(self.tokens),
            responses=None if self.responses is None else spread(self.responses),
            texts=None if self.texts is None else spread(self.texts),
        )


@dataclass(frozen=True)
class Rollouts:
    """Prompts with their responses."""

    tokens: Tensor
    """int64 [B, S]: prompt, response, padding."""
    prompt_lengths: Tensor
    """int64 [B]."""
    lengths: Tensor
    """int64 [B]: prompt and response together, EOS included."""
    log_probs: Tensor | None = None
    """float32 [B, T], T tokens in the longest response: each response token's log-probability under the model that
    generated it, at temperature 1; 0 behind a response. None where it is not known."""

    @staticmethod
    def from_lists(
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        log_probs: Sequence[Sequence[float]] | None = None,
    ) -> Rollouts:
        """Pad lists of token ids into tensors (padding is token 0, which nothing reads)."""
        rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
        return Rollouts(
            tokens=_padded(rows, torch.int64, device),
            prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.int64, device=device),
            lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device),
            log_probs=None if log_probs is None else _padded(log_probs, torch.float32, device),
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def responses(self) -> list[list[int]]:
        """Response token ids of each row, EOS included."""
        spans = zip(self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:end] for row, start, end in spans]


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[rows, longest], zeros behind the shorter ones."""
    width = max((len(row) for row in rows), default=0)
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device).view(len(rows), width)


@dataclass(frozen=True)
class MicroBatch:
    """A few sequences that go through a model together, all from one policy.

    The N states are listed row by row, each row in time order: `state_rows[i], state_columns[i]` is where state i
    sits in `tokens`, and `targets[i]` is the response token it predicts.
    """

    tokens: Tensor
    """int64 [b, S], padded on the right to the S that all micro-batches of an iteration share."""
    on_policy: bool
    """Sampled from the student (its states belong to critic f_2), else from the teacher or the data (f_1)."""
    state_rows: Tensor
    """int64 [N]."""
    state_columns: Tensor
    """int64 [N]."""
    targets: Tensor
    """int64 [N]: y_t."""
    steps: Tensor
    """int64 [N]: t - 1, the number of response tokens before y_t."""

    @property
    def num_states(self) -> int:
        return self.targets.shape[0]

    def select_states(self, hidden: Tensor) -> Tensor:
        """[S, b, H] hidden states of all positions -> [N, H] of the response states."""
        return hidden[self.state_columns, self.state_rows]


def make_microbatches(rollouts: Rollouts, *, on_policy: bool, size: int, width: int) -> list[MicroBatch]:
    """Split sequences into micro-batches of exactly `size` rows of `width` tokens.

    A pipeline wants one shape for all, so the last micro-batch may end in empty rows, which have no states.
    """
    missing = -len(rollouts) % size
    tokens = F.pad(rollouts.tokens[:, :width], (0, max(0, width - rollouts.tokens.shape[1]), 0, missing))
    starts = F.pad(rollouts.prompt_lengths - 1, (0, missing))
    ends = F.pad(rollouts.lengths - 1, (0, missing))
    column = torch.arange(width, device=tokens.device)
    microbatches = []
    for first in range(0, len(rollouts) + missing, size):
        rows = slice(first, first + size)
        inside = (column >= starts[rows, None]) & (column < ends[rows, None])
        state_rows, state_columns = torch.nonzero(inside, as_tuple=True)
        microbatches.append(
            MicroBatch(
                tokens=tokens[rows],
                on_policy=on_policy,
                state_rows=state_rows,
                state_columns=state_columns,
                targets=tokens[rows][state_rows, state_columns + 1],
                steps=state_columns - starts[rows][state_rows],
            )
        )
    return microbatches


def to_grid(microbatches: Sequence[MicroBatch], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Values at the states of several micro-batches, as one grid by sequence and step.

    Args:
        values: one tensor [N] for each micro-batch.

    Returns:
        [B, T] values, zero where a sequence has no such step, and the bool mask [B, T] of where it has.
    """
    width = max((int(m.steps.max()) + 1 for m in microbatches if m.num_states), default=0)
    grids, masks = [], []
    for microbatch, value in zip(microbatches, values, strict=True):
        grid = value.new_zeros(microbatch.tokens.shape[0], width)
        grid[microbatch.state_rows, microbatch.steps] = value
        mask = torch.zeros_like(grid, dtype=torch.bool)
        mask[microbatch.state_rows, microbatch.steps] = True
        grids.append(grid)
        masks.append(mask)
    return torch.cat(grids), torch.cat(masks)


def from_grid(microbatches: Sequence[MicroBatch], grid: Tensor) -> list[Tensor]:
    """The inverse of `to_grid`: [B, T] -> one tensor [N] for each micro-batch."""
    parts = grid.split([m.tokens.shape[0] for m in microbatches])
    return [part[m.state_rows, m.steps] for m, part in zip(microbatches, parts, strict=True)]


@dataclass(frozen=True)
class Batch:
    """One iteration's sequences on this replica, with what the players need of them.

    Lists have one entry for each micro-batch. Hidden states are there on the last pipeline stage only.
    """

    microbatches: list[MicroBatch]
    weights: list[Tensor]
    """[N] in fp32: w_t / N of the state's own term (off or on), without beta."""
    scales: dict[bool, float]
    """1/N of each term, by `on_policy`: N counts sequences or response tokens of the global batch."""
    beta: float
    """Weight of the off-policy term: L = beta * off + (1 - beta) * on."""
    student_states: list[Tensor] | None
    """[N, H_student] final hidden states under the current student; None also where no critic looks at them."""
    teacher_states: list[Tensor] | None
    """[N, H_teacher]; None also where the objective needs no teacher."""

    def coefficient(self, index: int) -> float:
        """Weight of the micro-batch's term in L."""
        return 1.0 - self.beta if self.microbatches[index].on_policy else self.beta
