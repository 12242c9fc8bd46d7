"""Continuous batching: which rows of a cache work on which responses, and what goes into each pass.

Everything here happens on the host and follows from the tokens drawn alone, so that all ranks of a replica decide
alike without asking each other. A finished row takes the next prompt at once. Prompts are read in pieces, beside the
tokens of the rows that decode, as far as a pass has room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_amd.models.kv_cache import KVCache, Segment


@dataclass(eq=False)
class Response:
    """A response in work."""

    number: int
    """Its place among the rollouts."""
    prompt: Sequence[int]
    most: int
    """Longest it may become, EOS included."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stored: int = 0
    """Tokens of the prompt in the cache."""


@dataclass(frozen=True)
class Pass:
    """T tokens that go through the model together."""

    tokens: list[int]
    """T token ids of the decoder: of the rows that decode, then of the segments."""
    decoding: list[tuple[int, int]]
    """(row, position) of each decoding row's one token."""
    segments: list[Segment]
    """Pieces of prompts."""
    drawn: list[int]
    """Places among the T tokens after which a token is drawn."""
    responses: list[Response]
    """Whose tokens these are."""
    prompts: list[Sequence[int]] = field(default_factory=list)
    """That the encoder reads, of an encoder-decoder model."""
    prompt_rows: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens that go through the model, prompts padded to the longest."""
        return len(self.tokens) + len(self.prompts) * max(map(len, self.prompts), default=0)


class Pool:
    """The rows of one cache.

    Args:
        queue: responses to begin; several pools may take from one.
        rows: most responses in work.
        caches: of every model that generates, each with that many rows.
        pass_tokens: most tokens of a pass; never fewer than one for each row in work.
        ended: whether a response is complete with the token it has got last.
        start_id: first token of the decoder of an encoder-decoder model, whose encoder reads a prompt at once.
    """

    def __init__(
        self,
        queue: deque[Response],
        rows: int,
        caches: Sequence[KVCache],
        pass_tokens: int,
        ended: Callable[[Response], bool],
        start_id: int | None = None,
    ) -> None:
        self._queue, self._rows, self.caches, self._ended = queue, rows, caches, ended
        self._pass_tokens, self._start_id = pass_tokens, start_id
        self._working: list[Response | None] = []
        """By row; only while the queue holds others may a row be empty between two passes."""
        self.coming: Pass | None = None
        """The pass that is planned or under way; None: all is done."""

    def plan(self) -> None:
        """Fill empty rows and set out the coming pass."""
        self._fill()
        self.coming = self._read_in_pieces() if self._start_id is None else self._encode(self._start_id)

    def _encode(self, start_id: int) -> Pass | None:
        """A token of each row, the first behind a prompt that the encoder reads in the same pass."""
        decoding: list[tuple[int, int]] = []
        tokens: list[int] = []
        prompts: list[Sequence[int]] = []
        prompt_rows: list[int] = []
        responses: list[Response] = []
        room, longest = self._pass_tokens - len(self._working), 0
        for row, response in enumerate(self._working):
            if response is None:
                continue
            if not response.tokens:
                longest = max(longest, len(response.prompt))
                if prompts and (len(prompts) + 1) * longest > room:
                    longest = max(map(len, prompts))
                    continue
                prompts.append(response.prompt)
                prompt_rows.append(row)
            decoding.append((row, len(response.tokens)))
            tokens.append(response.tokens[-1] if response.tokens else start_id)
            responses.append(response)
        drawn = list(range(len(tokens)))
        return Pass(tokens, decoding, [], drawn, responses, prompts, prompt_rows) if tokens else None

    def _read_in_pieces(self) -> Pass | None:
        """A token of each row that writes, and pieces of prompts."""
        decoding: list[tuple[int, int]] = []
        tokens: list[int] = []
        drawn_for: list[Response] = []
        for row, response in enumerate(self._working):
            if response is not None and response.tokens:
                decoding.append((row, len(response.prompt) + len(response.tokens) - 1))
                tokens.append(response.tokens[-1])
                drawn_for.append(response)
        drawn, segments = list(range(len(tokens))), []
        room = max(self._pass_tokens - len(tokens), 1)
        for row, response in enumerate(self._working):
            if response is None or response.tokens or not room:
                continue
            count = min(room, len(response.prompt) - response.stored)
            segments.append(Segment(row, response.stored, count))
            tokens += response.prompt[response.stored : response.stored + count]
            response.stored += count
            room -= count
            if response.stored == len(response.prompt):
                drawn.append(len(tokens) - 1)
                drawn_for.append(response)
        return Pass(tokens, decoding, segments, drawn, drawn_for) if tokens else None

    def steps_ahead(self, most: int) -> int:
        """Tokens, up to `most`, that may be drawn for each response of the coming pass before anybody looks at them."""
        assert self.coming is not None
        if self.coming.segments or self.coming.prompts:
            return 1
        return min(most, *(response.most - len(response.tokens) for response in self.coming.responses))

    def take(self, tokens: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]]) -> list[Response]:
        """Give the coming pass's responses the tokens drawn for them, a row for each step; those that are complete
        leave their rows, and what was drawn after their end is dropped."""
        assert self.coming is not None
        complete: list[Response] = []
        for step_tokens, step_log_probs in zip(tokens, log_probs, strict=True):
            for response, token, log_prob in zip(self.coming.responses, step_tokens, step_log_probs, strict=True):
                if response in complete:
                    continue
                response.tokens.append(token)
                response.log_probs.append(log_prob)
                if len(response.tokens) == response.most or self._ended(response):
                    complete.append(response)
        self._working = [None if response in complete else response for response in self._working]
        return complete

    def _fill(self) -> None:
        """New responses into empty rows. Where there are none left, rows from the end move into the holes."""
        for row in range(self._rows):
            if self._queue and row == len(self._working):
                self._working.append(self._queue.popleft())
            elif self._queue and self._working[row] is None:
                self._working[row] = self._queue.popleft()
        for hole, response in enumerate(self._working):
            while self._working and self._working[-1] is None:
                self._working.pop()
            if response is None and hole < len(self._working):
                for cache in self.caches:
                    cache.move(len(self._working) - 1, hole)
                self._working[hole] = self._working.pop()
