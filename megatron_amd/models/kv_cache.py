"""Keys and values of a generation, for rows of different lengths that come and go.

A generation runs the model on flat passes: T tokens of any rows one behind the other, no padding between them. First
come single tokens, one each of the rows that are decoding, then segments of the prompts that are being read. Column j
of a row always holds position j, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megatron_amd.distributed.transfer import to_device

_BLOCK_ROWS = 8
"""Decoding rows that attend together on a CPU, over as many columns as the longest of them needs."""
_CALL_POSITIONS = 128
"""Positions to look at in vain that cost a CPU as much as another call: neighbouring blocks that add fewer are one."""
_PADDING = 1.25
"""Most that a bundle of prompts may grow by being padded to the longest."""


class Segment(NamedTuple):
    """Neighbouring tokens of one row in a pass."""

    row: int
    start: int
    """Position of the first."""
    length: int


class Bundle(NamedTuple):
    """Segments that attend together: neighbouring rows, read from their beginning, of nearly one length."""

    rows: slice
    length: int
    """Tokens of all."""
    longest: int
    """Tokens of the longest."""
    places: Tensor
    """int64 [rows, longest] in the pass; behind a segment's end any of its tokens."""
    real: Tensor
    """int64: of rows * longest, those that are tokens."""


class _Attention(Protocol):
    cache: LayerCache | None


class LayerCache:
    """Keys and values of one layer, in one buffer [2, rows, ng, max_length, hn].

    Refers to its owner weakly: no circle keeps the memory of a generation that has ended.
    """

    def __init__(self, owner: KVCache, buffer: Tensor | None = None) -> None:
        self._owner = weakref.ref(owner)
        self.buffer = buffer

    @property
    def owner(self) -> KVCache:
        """Where it is announced what the coming pass holds."""
        owner = self._owner()
        assert owner is not None
        return owner

    def store_prompts(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put cross-attention's keys and values [S_e, n, np, hn] of the prompts of a pass in their rows.

        Returns:
            Those of all rows up to the last that decodes, each [first_rows, np, columns, hn].
        """
        owner = self.owner
        if self.buffer is None:
            shape = (2, owner.rows, keys.shape[2], owner.max_prompt_length, keys.shape[3])
            self.buffer = keys.new_zeros(shape)
        if owner.prompts.shape[0]:
            for buffer, new in zip(self.buffer, (keys, values), strict=True):
                buffer[owner.prompt_rows, :, : keys.shape[0]] = new.permute(1, 2, 0, 3)
        first, longest = owner.first_rows, owner.longest_prompt
        keys, values = self.buffer[:, :first, :, :longest]
        return keys, values

    def store(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values [T, ng, 2, hn] of a pass in their places.

        Returns:
            Everybody's keys and values, each [rows, ng, max_length, hn].
        """
        owner = self.owner
        if self.buffer is None:
            # Zeros: what a row has not written yet is masked, and a mask does not survive a NaN.
            self.buffer = pairs.new_zeros(2, owner.rows, pairs.shape[1], owner.max_length, pairs.shape[3])
        # Two index tensors around a slice put their own dimension first: [T, 2, ng, hn].
        self.buffer[:, owner.row_index, :, owner.positions] = pairs.transpose(1, 2)
        keys, values = self.buffer
        return keys, values


class KVCache:
    """Keys and values of every layer of a model stage. Before each pass, `expect` says which tokens it holds."""

    def __init__(
        self,
        attentions: Sequence[_Attention],
        rows: int,
        max_length: int,
        device: torch.device,
        max_prompt_length: int = 0,
    ) -> None:
        self.rows = rows
        self.max_length = max_length
        """Positions of a row there is room for."""
        self.max_prompt_length = max_prompt_length
        """The same for the prompts of an encoder-decoder model, which are not among a row's own positions."""
        self.prompts = torch.empty(0, 0, dtype=torch.int64)
        """int64 [n, S_e]: prompts that the coming pass of an encoder-decoder model reads, padded."""
        self.prompt_rows = self.new_lengths = torch.empty(0, dtype=torch.int64)
        """int64 [n]: their rows and lengths."""
        self.longest_prompt = 0
        self._prompt_lengths = [0] * rows
        self._prompt_bias: Tensor | None = None
        self.device = device
        self.layers = [LayerCache(self) for _ in attentions]
        self._attentions = attentions
        self.positions = self.row_index = torch.empty(0, dtype=torch.int64)
        """int64 [T] of the coming pass."""
        self.decoding = 0
        """Rows that decode in the coming pass: one token each, the first of the T."""
        self.segments: tuple[Segment, ...] = ()
        """What follows them."""
        self.bundles: list[Bundle | Segment] = []
        """The same, where nothing is added to the scores."""
        self.span = 0
        """Columns that hold all positions of the rows that decode."""
        self.blocks: list[tuple[slice, int]] = []
        """Rows that attend together, and the columns they need: all rows up to the last that decodes."""
        self.first_rows = 0
        """Rows 0 to first_rows - 1 hold all that decode."""
        self.in_order = True
        """The rows that decode are the first ones, in order."""
        self._bias: Tensor | None = None

    def expect(self, decoding: Sequence[tuple[int, int]], segments: Sequence[Segment], fillers: int = 0) -> None:
        """Announce the coming pass.

        Args:
            decoding: (row, position) of each row's one token.
            segments: of other rows, in the order of their tokens.
            fillers: tokens at the end that mean nothing; they are stored in the last row.
        """
        rows, positions = [row for row, _ in decoding], [position for _, position in decoding]
        self.decoding, self.segments, self._bias = len(rows), tuple(segments), None
        self.span = max(positions, default=-1) + 1
        self.first_rows = max(rows, default=-1) + 1
        self.in_order = rows == list(range(len(rows)))
        last = dict(decoding)
        size = _BLOCK_ROWS if self.device.type == "cpu" else max(self.first_rows, 1)
        self.blocks = []
        for first in range(0, self.first_rows, size):
            block = slice(first, min(first + size, self.first_rows))
            self._add_block(block, max(last.get(row, 0) for row in range(block.start, block.stop)) + 1)
        self.bundles = list(self._bundled(len(rows)))
        for row, start, length in segments:
            rows += [row] * length
            positions += range(start, start + length)
        rows += [self.rows - 1] * fillers
        positions += [self.max_length - 1] * fillers
        self.row_index, self.positions = to_device([rows, positions], self.device)

    def expect_prompts(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Announce the prompts that the encoder reads in the coming pass, after `expect`."""
        width = max(map(len, prompts), default=0)
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        self.prompts = to_device(padded, self.device).view(len(prompts), width)
        lengths = [len(prompt) for prompt in prompts]
        self.prompt_rows, self.new_lengths = to_device([rows, lengths], self.device)
        for row, length in zip(rows, lengths, strict=True):
            self._prompt_lengths[row] = length
        self.longest_prompt = max(1, *self._prompt_lengths[: self.first_rows])
        self._prompt_bias = None

    def prompt_bias(self, dtype: torch.dtype) -> Tensor:
        """[first_rows, 1, 1, columns]: 0 at a row's prompt, -inf beyond. The same for every layer."""
        if self._prompt_bias is None or self._prompt_bias.dtype != dtype:
            # A row without a prompt sees column 0, so that nothing is NaN.
            lengths = to_device(self._prompt_lengths[: self.first_rows], self.device).clamp_(min=1)
            beyond = torch.arange(self.longest_prompt, device=self.device) >= lengths[:, None]
            self._prompt_bias = torch.zeros(beyond.shape, dtype=dtype, device=self.device)
            self._prompt_bias.masked_fill_(beyond, -torch.inf)
        return self._prompt_bias[:, None, None]

    def advance(self) -> None:
        """Announce a pass that is like the last, which only decoded, each token one position further."""
        self.positions = self.positions.clone()
        self.positions[: self.decoding] += 1
        self.span += 1
        self.blocks = [(rows, span + 1) for rows, span in self.blocks]
        self._bias = None
        self.prompts, self.prompt_rows = self.prompts[:0], self.prompt_rows[:0]

    def _bundled(self, first: int) -> Iterator[Bundle | Segment]:
        """The segments, the first of which has its tokens at place `first`."""
        groups: list[list[Segment]] = []
        for segment in self.segments:
            if groups and _go_together([*groups[-1], segment]):
                groups[-1].append(segment)
            else:
                groups.append([segment])
        for group in groups:
            yield group[0] if len(group) == 1 else self._bundle(group, first)
            first += sum(segment.length for segment in group)

    def _bundle(self, segments: Sequence[Segment], first: int) -> Bundle:
        longest, end = max(s.length for s in segments), first
        places: list[list[int]] = []
        real: list[int] = []
        for number, (_, _, length) in enumerate(segments):
            places.append([end + min(column, length - 1) for column in range(longest)])
            real += range(number * longest, number * longest + length)
            end += length
        return Bundle(
            slice(segments[0].row, segments[-1].row + 1),
            end - first,
            longest,
            to_device(places, self.device),
            to_device(real, self.device),
        )

    def _add_block(self, block: slice, span: int) -> None:
        if self.blocks:
            before, span_before = self.blocks[-1]
            widest = max(span, span_before)
            in_vain = (before.stop - before.start) * (widest - span_before)
            in_vain += (block.stop - block.start) * (widest - span)
            if in_vain < _CALL_POSITIONS:
                self.blocks[-1] = slice(before.start, block.stop), widest
                return
        self.blocks.append((block, span))

    def bias(self, dtype: torch.dtype) -> Tensor:
        """[first_rows, 1, 1, span]: 0 at a decoding row's past and itself, -inf beyond. The same for every layer."""
        if self._bias is None or self._bias.dtype != dtype:
            # Rows that do not decode see column 0, so that nothing is NaN.
            last = self.positions.new_zeros(self.first_rows)
            last[self.row_index[: self.decoding]] = self.positions[: self.decoding]
            future = torch.arange(self.span, device=self.device) > last[:, None]
            self._bias = torch.zeros(future.shape, dtype=dtype, device=self.device).masked_fill_(future, -torch.inf)
        return self._bias[:, None, None]

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        self._prompt_lengths[target] = self._prompt_lengths[source]
        for layer in self.layers:
            if layer.buffer is not None:
                layer.buffer[:, target] = layer.buffer[:, source]

    def fixed_view(self, rows: int, columns: int, positions: Tensor) -> KVCache:
        """The same keys and values, for passes of one shape: rows 0 to rows - 1 decode and look at `columns` columns.

        Args:
            positions: int64 [rows], of their tokens; may be changed in place between passes, before `renew`.
        """
        assert all(layer.buffer is not None for layer in self.layers), "a prompt has been read"
        view = copy.copy(self)
        view.layers = [LayerCache(view, layer.buffer) for layer in self.layers]
        view.decoding = view.first_rows = rows
        view.segments, view.bundles, view.in_order = (), [], True
        view.span, view.blocks = columns, [(slice(0, rows), columns)]
        view.row_index, view.positions = torch.arange(rows, device=self.device), positions
        view.renew()
        return view

    def renew(self) -> None:
        """Positions have changed in place."""
        self._bias = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model's attention works on this cache."""
        for attention, layer in zip(self._attentions, self.layers, strict=True):
            attention.cache = layer
        try:
            yield
        finally:
            for attention in self._attentions:
                attention.cache = None


def _go_together(segments: Sequence[Segment]) -> bool:
    """Whether these may be a bundle, the last of them being new to it."""
    lengths = [segment.length for segment in segments]
    from_the_beginning = all(segment.start == 0 for segment in segments)
    neighbours = segments[-1].row == segments[-2].row + 1
    return from_the_beginning and neighbours and len(lengths) * max(lengths) <= _PADDING * sum(lengths)


def kv_cache(model: nn.Module, rows: int, max_length: int, device: torch.device, max_prompt_length: int = 0) -> KVCache:
    """A cache for `rows` sequences of at most `max_length` tokens in every attention of `model` that takes one.

    max_prompt_length: of an encoder-decoder model's prompts, which only cross-attention sees.
    """
    attentions = [module for module in model.modules() if getattr(module, "takes_cache", False)]
    return KVCache(attentions, rows, max_length, device, max_prompt_length)  # type: ignore[arg-type]
