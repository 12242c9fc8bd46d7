"""What flows between the parts: prompts, sequences, the states of a batch.

Shapes: B sequences on this data-parallel rank, S tokens in the longest of them, N states (response positions).

Sequences are a prompt followed at once by its response, padded on the right. Under causal attention the padding is
then invisible to every real position, so that a decoder-only model needs no attention mask. The state s_t that predicts
response token y_t is the position just before it. An encoder-decoder model gets the prompt in its encoder and the
response in its decoder, behind a start token: s_t is then the place that y_{t-1} goes in at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    sits in the model's output, and `targets[i]` is the response token it predicts.
    """

    tokens: Tensor
    """int64 [b, S], padded on the right to the S that all micro-batches of an iteration share. For an encoder-decoder
    model the encoder's tokens, `prompt_width` columns, then the decoder's."""
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
    prompt_lengths: Tensor | None = None
    """int64 [b], of the encoder's tokens; None for a decoder-only model."""
    prompt_width: int = 0

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a model's `forward` takes."""
        return (self.tokens,) if self.prompt_lengths is None else (self.tokens, self.prompt_lengths, self.prompt_width)

    @property
    def num_states(self) -> int:
        return self.targets.shape[0]

    def select_states(self, hidden: Tensor) -> Tensor:
        """[S, b, H] hidden states of all positions (of the decoder) -> [N, H] of the response states."""
        return hidden[self.state_columns, self.state_rows]


def make_microbatches(rollouts: Rollouts, *, on_policy: bool, size: int, width: int) -> list[MicroBatch]:
    """Split sequences into micro-batches of exactly `size` rows of `width` tokens, for decoder-only models.

    A pipeline wants one shape for all, so the last micro-batch may end in empty rows, which have no states.
    """
    tokens = F.pad(rollouts.tokens[:, :width], (0, max(0, width - rollouts.tokens.shape[1])))
    starts = (rollouts.prompt_lengths - 1)[:, None]
    column = torch.arange(width, device=tokens.device)
    inside = (column >= starts) & (column < rollouts.lengths[:, None] - 1)
    return _cut(size, on_policy, tokens, inside, targets=tokens.roll(-1, 1), steps=column - starts)


def make_encoder_decoder_microbatches(
    rollouts: Rollouts, *, on_policy: bool, size: int, prompt_width: int, response_width: int, start_id: int
) -> list[MicroBatch]:
    """The same for encoder-decoder models: `prompt_width` tokens of the encoder, `response_width` of the decoder.

    Args:
        start_id: the decoder's first token.
    """
    lengths = rollouts.prompt_lengths
    column = torch.arange(response_width, device=lengths.device)
    inside = column < (rollouts.lengths - lengths)[:, None]
    places = (lengths[:, None] + column).clamp(max=rollouts.tokens.shape[1] - 1)
    responses = rollouts.tokens.gather(1, places).where(inside, 0)
    prompts = F.pad(rollouts.tokens[:, :prompt_width], (0, max(0, prompt_width - rollouts.tokens.shape[1])))
    prompts = prompts.where(torch.arange(prompt_width, device=lengths.device) < lengths[:, None], 0)
    before = F.pad(responses[:, :-1], (1, 0), value=start_id)
    tokens = torch.cat([prompts, before], dim=1)
    steps = column.expand_as(responses)
    return _cut(size, on_policy, tokens, inside, responses, steps, prompt_lengths=lengths, prompt_width=prompt_width)


def _cut(
    size: int,
    on_policy: bool,
    tokens: Tensor,
    inside: Tensor,
    targets: Tensor,
    steps: Tensor,
    prompt_lengths: Tensor | None = None,
    prompt_width: int = 0,
) -> list[MicroBatch]:
    """Micro-batches of `size` rows each, the last filled up with empty ones.

    Args:
        tokens: int64 [B, S].
        inside: bool [B, columns of the model's output], where a state is.
        targets: int64, of each state, in its place.
        steps: int64, the same.
    """
    missing = -len(tokens) % size
    tokens, inside = F.pad(tokens, (0, 0, 0, missing)), F.pad(inside, (0, 0, 0, missing))
    if prompt_lengths is not None:
        prompt_lengths = F.pad(prompt_lengths, (0, missing))
    microbatches = []
    for first in range(0, len(tokens), size):
        rows = slice(first, first + size)
        state_rows, state_columns = torch.nonzero(inside[rows], as_tuple=True)
        place = (first + state_rows, state_columns)
        microbatches.append(
            MicroBatch(
                tokens=tokens[rows],
                on_policy=on_policy,
                state_rows=state_rows,
                state_columns=state_columns,
                targets=targets[place],
                steps=steps[place],
                prompt_lengths=None if prompt_lengths is None else prompt_lengths[rows],
                prompt_width=prompt_width,
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
