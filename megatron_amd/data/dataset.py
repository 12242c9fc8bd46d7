"""A data set of prompts: every row checked once at the start, then read and tokenised again when it is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_amd.batch import Prompts
from megatron_amd.config import DataConfig
from megatron_amd.data.sources import Source, open_sources
from megatron_amd.data.templates import ROLES, PromptTemplate, make_template
from megatron_amd.data.tokenizer import Message, Tokenizer
from megatron_amd.errors import InputError


@dataclass(frozen=True)
class Example:
    """One row, tokenised."""

    prompt: list[int]
    response: list[int] | None
    """Gold response with EOS, where the row has one."""
    text: str
    """The prompt as the row has it, for showing."""
    is_truncated: bool


class _LongPrompt(InputError):
    """The prompt of a row exceeds data.max_prompt_length."""


class RowEncoder:
    """Row -> Example by the settings of a run. Raises InputError with a reason but without the row's place."""

    def __init__(
        self,
        config: DataConfig,
        template: PromptTemplate,
        *,
        need_response: bool,
        keep_response: bool,
        max_response_length: int | None,
        end_prompts: bool,
    ):
        self._config = config
        self._end = [template.tokenizer.eos_id] if end_prompts else []
        self._template = template
        self._need_response = need_response
        self._keep_response = keep_response
        self._max_response_length = max_response_length

    def encode(self, row: dict[str, Any]) -> Example:
        """Check and tokenise one row."""
        config = self._config
        response = None
        if config.messages_field is not None:
            messages = _messages(row, config.messages_field)
            if messages[-1]["role"] == "assistant":
                response = messages.pop()["content"]
            elif self._need_response:
                raise InputError(f"field {config.messages_field!r} does not end with an assistant message")
            if not messages:
                raise InputError(f"field {config.messages_field!r} has no message before the assistant's")
            text = messages[-1]["content"]
            prompt = self._template.encode_messages(messages)
        else:
            text = _text(row, config.prompt_field, "data.prompt_field")
            extra = _optional_text(row, config.input_field)
            prompt = self._template.encode(text, extra)
            text = f"{text}\n{extra}" if extra else text
        if config.response_field is not None and self._keep_response:
            response = _text(row, config.response_field, "data.response_field")
        if not prompt:
            raise InputError("the prompt has no tokens")
        shortened = self._fit(prompt)
        is_truncated = len(shortened) < len(prompt)
        return Example(shortened + self._end, self._response_tokens(response), text, is_truncated)

    def _fit(self, prompt: list[int]) -> list[int]:
        longest = self._config.max_prompt_length
        limit = longest - len(self._end)
        if len(prompt) <= limit:
            return prompt
        if self._config.on_long_prompt != "truncate":
            raise _LongPrompt(
                f"the prompt has {len(prompt) + len(self._end)} tokens, more than data.max_prompt_length {longest}; "
                "raise it, or set data.on_long_prompt: skip or truncate"
            )
        # BOS stays in front: models are not used to texts without it.
        bos = prompt[:1] if prompt[0] == self._template.tokenizer.bos_id and limit > 1 else []
        return bos + prompt[len(prompt) - limit + len(bos) :]

    def _response_tokens(self, response: str | None) -> list[int] | None:
        if response is None or not self._keep_response:
            return None
        tokenizer = self._template.tokenizer
        # As in generation, a response that reaches the limit has no EOS.
        return [*tokenizer.encode(response), tokenizer.eos_id][: self._max_response_length]


class PromptDataset:
    """The usable rows of a data set, by position 0 .. len - 1. Made by `load_rows`."""

    def __init__(self, sources: list[Source], encoder: RowEncoder, scan: _Scan):
        self._sources = sources
        self._encoder = encoder
        self._first_rows = np.cumsum([0] + [len(source) for source in sources])
        self._rows = np.asarray(scan.rows, dtype=np.int64)
        self.lengths = np.asarray(scan.lengths, dtype=np.int64)
        """Tokens of each usable row: its prompt, and its gold response where that is given."""
        self.fingerprint: str = scan.digest.hexdigest()
        """Changes with any usable row's number or tokens, and so with the tokenizer and the template."""
        self.skipped: int = scan.bad + scan.long
        """Rows left out because they were bad or too long."""
        self.truncated: int = scan.truncated
        """Rows whose prompt lost tokens at its beginning."""
        self.has_responses: bool = scan.without_response == 0
        """Whether every row has a gold response; otherwise none is given."""
        self._responses: Callable[[int, int], Sequence[int]] | None = None

    @property
    def rows(self) -> Sequence[int]:
        """Number of each usable row in the whole data set."""
        return self._rows.tolist()

    def use_responses(self, tokens: Callable[[int, int], Sequence[int]], fingerprint: str, longest: int) -> None:
        """Give responses from elsewhere in the place of the rows' own.

        Args:
            tokens: the response to the row at a position in its visit number so and so.
            fingerprint: of the responses, to become a part of the data set's.
            longest: they are cut to so many tokens.
        """
        self._responses = lambda position, visit: tokens(position, visit)[:longest]
        self.fingerprint = f"{self.fingerprint}-{fingerprint}"

    def __len__(self) -> int:
        return len(self._rows)

    def prompts(self, positions: Sequence[int], visits: Sequence[int]) -> Prompts:
        """The rows at `positions` with their epochs. `Prompts.ids` are row numbers from 0 in the whole data set, rows
        that are not used included, so that they do not depend on what is skipped."""
        rows = [int(self._rows[position]) for position in positions]
        examples = [self._example(row) for row in rows]
        responses = None
        if self._responses is not None:
            responses = tuple(tuple(self._responses(*place)) for place in zip(positions, visits, strict=True))
        elif self.has_responses:
            responses = tuple(tuple(e.response or ()) for e in examples)
        return Prompts(
            ids=tuple(rows),
            visits=tuple(visits),
            tokens=tuple(tuple(e.prompt) for e in examples),
            responses=responses,
            texts=tuple(e.text for e in examples),
        )

    def _example(self, row: int) -> Example:
        index = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        source = self._sources[index]
        fields = source.parse(source.raw_row(row - int(self._first_rows[index])))
        assert fields is not None  # the scan kept no blank line
        return self._encoder.encode(fields)


def load_rows(
    config: DataConfig,
    split: Literal["train", "evaluation"],
    tokenizer: Tokenizer,
    *,
    responses: bool | None = None,
    max_response_length: int | None = None,
    count: int | None = None,
    end_prompts: bool = False,
    warn: Callable[[str], None] | None = None,
) -> PromptDataset:
    """Open `data.train` or `data.evaluation` and check every row (some thousand rows a second).

    Args:
        responses: True: every row must have a gold response. False: none is given. None: given when every row has
            one, and needed when data.response_field is set.
        max_response_length: longer gold responses are cut to so many tokens and then have no EOS.
        count: stop after so many usable rows (for a held-out set of which only the first are used).
        end_prompts: put EOS behind each prompt, as T5's encoder is used to.
        warn: called with one line when rows were skipped or truncated; pass it on rank 0 only.

    Raises InputError naming the file, the row and the field, and what to do.
    """
    setting = f"data.{split}"
    location = getattr(config, split)
    if location is None:
        raise InputError(f"{setting}: is not set; give a file, a folder or a hub data set's name")
    _check_fields(config, responses)
    template = make_template(config, tokenizer)
    need = responses if responses is not None else config.response_field is not None
    encoder = RowEncoder(
        config,
        template,
        need_response=need,
        keep_response=responses is not False,
        max_response_length=max_response_length,
        end_prompts=end_prompts,
    )
    settings = _settings_of_fields(config, with_response=need)
    sources = open_sources(location, config.train_split if split == "train" else config.evaluation_split, setting)
    sources = [source.select(list(settings), settings) for source in sources]
    scan = _Scan(config, setting, encoder)
    for source in sources:
        if not scan.run(source, count):
            break
    scan.finish(location)
    if responses is False:
        scan.without_response = len(scan.rows)
    if warn is not None and (scan.bad or scan.long or scan.truncated):
        warn(scan.summary())
    return PromptDataset(sources, encoder, scan)


class _Scan:
    """One pass over all rows: which are usable, how many are not, and a digest of the tokens."""

    def __init__(self, config: DataConfig, setting: str, encoder: RowEncoder):
        self._config = config
        self._setting = setting
        self._encoder = encoder
        self._next_row = 0
        self._first_problem = ""
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.seen = self.bad = self.long = self.truncated = self.without_response = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def run(self, source: Source, count: int | None) -> bool:
        """Scan a source; False when enough rows are found."""
        first, self._next_row = self._next_row, self._next_row + len(source)
        for index, raw in enumerate(source.raw_rows()):
            if self.seen == self._config.limit or len(self.rows) == count:
                return False
            try:
                row = source.parse(raw)
                if row is None:  # a blank line is no row
                    continue
                example = self._encoder.encode(row)
            except InputError as error:
                self._problem(error, source.where(index))
                continue
            self._add(first + index, example)
        return True

    def _add(self, row: int, example: Example) -> None:
        response = example.response
        self.seen += 1
        self.rows.append(row)
        self.lengths.append(len(example.prompt) + len(response or ()))
        self.truncated += example.is_truncated
        self.without_response += response is None
        numbers = [row, len(example.prompt), *example.prompt, -1 if response is None else len(response)]
        self.digest.update(np.array(numbers + (response or []), dtype="<i8").tobytes())

    def _problem(self, error: InputError, where: str) -> None:
        is_long = isinstance(error, _LongPrompt)
        policy = self._config.on_long_prompt if is_long else self._config.on_bad_row
        message = f"{where}: {error}"
        if policy != "skip":
            advice = "" if is_long else "; mend the row, or set data.on_bad_row: skip"
            raise InputError(f"{self._setting}: {message}{advice}") from error
        self.seen += 1
        self._first_problem = self._first_problem or message
        self.long += is_long
        self.bad += not is_long

    def finish(self, location: str) -> None:
        """Raise InputError when no row is usable."""
        if self.rows:
            return
        if self.bad + self.long:
            raise InputError(
                f"{self._setting}: {location} has no usable row: all {self.bad + self.long} were skipped, "
                f"the first being {self._first_problem}"
            )
        raise InputError(f"{self._setting}: {location} is empty: it has no rows")

    def summary(self) -> str:
        """What was skipped and truncated, on one line."""
        parts = []
        if self.bad + self.long:
            parts.append(
                f"skipped {self.bad + self.long} of {self.seen} rows ({self.bad} bad, {self.long} longer than "
                f"data.max_prompt_length; the first: {self._first_problem})"
            )
        if self.truncated:
            parts.append(f"cut {self.truncated} prompts to data.max_prompt_length {self._config.max_prompt_length}")
        return f"{self._setting}: {', '.join(parts)}"


def _check_fields(config: DataConfig, responses: bool | None) -> None:
    if config.messages_field is not None:
        for name in ("input_field", "response_field"):
            if getattr(config, name) is not None:
                raise InputError(f"data.{name}: cannot go with data.messages_field; unset one of the two")
    elif responses and config.response_field is None:
        raise InputError("data.response_field: is not set, but gold responses are needed; name their column")


def _settings_of_fields(config: DataConfig, *, with_response: bool) -> dict[str, str]:
    """Column -> the setting that names it, for the columns that are read."""
    if config.messages_field is not None:
        return {config.messages_field: "data.messages_field"}
    fields = {config.prompt_field: "data.prompt_field"}
    if config.input_field is not None:
        fields[config.input_field] = "data.input_field"
    if with_response and config.response_field is not None:
        fields[config.response_field] = "data.response_field"
    return fields


def _text(row: dict[str, Any], field: str, setting: str) -> str:
    if field not in row:
        raise InputError(f"no field {field!r} (it has: {', '.join(row) or 'none'}); set {setting} to one of them")
    value = row[field]
    if value is None or value == "":
        raise InputError(f"field {field!r} is empty")
    return _checked(value, f"field {field!r}")


def _checked(value: Any, name: str) -> str:
    """The value if it is text that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, not {type(value).__name__}")
    if value.isspace() or not value:
        raise InputError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def _optional_text(row: dict[str, Any], field: str | None) -> str | None:
    value = None if field is None else row.get(field)
    if value is None or value == "":
        return None
    return _checked(value, f"field {field!r}")


def _messages(row: dict[str, Any], field: str) -> list[Message]:
    """The conversation in a row, only role and content of each message."""
    if field not in row:
        raise InputError(
            f"no field {field!r} (it has: {', '.join(row) or 'none'}); set data.messages_field to one of them"
        )
    value = row[field]
    if not isinstance(value, list) or not value:
        if value in (None, "", []):
            raise InputError(f"field {field!r} is empty")
        raise InputError(f"field {field!r} must be a list of messages, not {type(value).__name__}")
    messages = []
    for number, message in enumerate(value, 1):
        name = f"field {field!r}, message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError(f"{name} is not {{role, content}}")
        if message["role"] not in ROLES:
            raise InputError(f"{name} has the role {message['role']!r}; known are {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _checked(message["content"], f"{name}, content")})
    return messages
