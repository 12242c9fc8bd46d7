"""Folders of responses that tools/generate.py writes: what their header says, and reading them in training.

A folder has `header.json` and shards `responses-00000-of-00012.jsonl`. Shard k holds the usable rows at positions
[k * shard_size, (k + 1) * shard_size) of the data set, in their order, a prompt's samples in neighbouring lines. A
file is complete or absent: it gets its name when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

import megatron_amd
from megatron_amd.data.sources import Source, open_sources
from megatron_amd.errors import InputError, first_line

HEADER = "header.json"
FORMAT = 1
"""Version of the files' layout; a newer one is refused."""
SAMPLING = (
    "max_response_length", "min_response_length", "samples_per_prompt", "temperature", "top_k", "top_p", "min_p"
)  # fmt: skip
"""The settings of `rollout` that responses depend on, which are also arguments of `generate`."""

_AGAIN = "run tools/generate.py again"
_REMOVE = f"remove the file and {_AGAIN}"
_RESTORE = "restore it, or generate into another folder"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What decides the responses of a folder."""

    model: dict[str, str]
    """`hash` of the model (training/model_hash.py), its `role` in the run, and its `path` as it was given."""
    tokenizer: dict[str, str]
    """`hash` (`Tokenizer.fingerprint`) and `source`."""
    data: dict[str, Any]
    """`fingerprint` of the prompts, number of usable `rows`, and `path`."""
    sampling: dict[str, Any]
    """The settings `SAMPLING` and `stop_strings`, the run's `seed` and `precision`."""
    shard_size: int
    """Prompts in a shard."""
    format: int = FORMAT
    version: str = field(default_factory=lambda: megatron_amd.__version__)
    """Of the program that wrote it."""

    @property
    def samples(self) -> int:
        """Responses to each prompt."""
        return self.sampling["samples_per_prompt"]

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.data["rows"] // self.shard_size)

    def positions(self, shard: int) -> range:
        """Of the rows in a shard."""
        return range(self.data["rows"])[shard * self.shard_size : (shard + 1) * self.shard_size]

    def file_name(self, shard: int) -> str:
        """Of a shard."""
        return f"responses-{shard:05}-of-{self.shards:05}.jsonl"

    def missing(self, folder: Path) -> list[int]:
        """Shards that are not in the folder."""
        return [shard for shard in range(self.shards) if not (folder / self.file_name(shard)).is_file()]

    def causes(self) -> dict[str, Any]:
        """Everything a change of which changes the files: no paths, no version."""
        return {
            "model": {name: self.model[name] for name in ("role", "hash")},
            "tokenizer": {"hash": self.tokenizer["hash"]},
            "data": {name: self.data[name] for name in ("fingerprint", "rows")},
            "sampling": {
                **{name: self.sampling[name] for name in (*SAMPLING, "seed", "precision")},
                "stop_strings": sorted(set(self.sampling["stop_strings"])),
            },
            "shard_size": self.shard_size,
        }

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the responses."""
        return hashlib.sha256(json.dumps(self.causes(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_header(folder: Path) -> Header:
    """The header of a folder. Raises InputError when it is none of ours, damaged, or of a newer program."""
    file = folder / HEADER
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("is no JSON object")
        if values["format"] > FORMAT:
            raise InputError(
                f"{file}: was written by a newer megatron_amd, in format {values['format']}; update this one"
            )
        header = Header(**{known.name: values[known.name] for known in fields(Header)})
        header.causes()  # raises where one is missing
        for name, count in (
            ("shard_size", header.shard_size),
            ("rows", header.data["rows"]),
            ("samples_per_prompt", header.samples),
            ("max_response_length", header.sampling["max_response_length"]),
        ):
            if type(count) is not int or count < 1:  # True is an int too
                raise ValueError(f"{name} is {count!r}")
        texts = {"model.path": header.model["path"], "model.role": header.model["role"]}
        texts |= {f"stop_strings[{i}]": text for i, text in enumerate(header.sampling["stop_strings"])}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(f"{name} is {text!r}")
        return header
    except KeyError as error:
        raise InputError(f"{file}: is damaged (has no {error}); {_RESTORE}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: is damaged ({first_line(error)}); {_RESTORE}") from None
    except (FileNotFoundError, NotADirectoryError):
        what = f"has no {HEADER}" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder}: {what}; give a folder that tools/generate.py has written") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


class ResponseFiles:
    """The responses of a complete folder, mapped into memory. Made by `open_response_files`."""

    def __init__(self, header: Header, sources: Sequence[Source], fingerprint: str) -> None:
        self.header = header
        self.fingerprint = fingerprint
        """Changes with any token."""
        self._sources = sources

    def tokens(self, position: int, visit: int) -> list[int]:
        """The response to the row at a position, EOS included; each visit takes the next sample, round and round."""
        shard, place = divmod(position, self.header.shard_size)
        source = self._sources[shard]
        line = source.parse(source.raw_row(place * self.header.samples + visit % self.header.samples))
        assert line is not None  # all lines have been checked
        return line["tokens"]


def open_response_files(
    folder: str | Path, rows: Sequence[int], *, fingerprint: str, tokenizer_hash: str, vocab_size: int, setting: str
) -> ResponseFiles:
    """Open a folder and check it against a run's data and tokenizer, every line included.

    Args:
        rows: the run's usable rows, by position.
        fingerprint: of the run's prompts (`PromptDataset.fingerprint`, loaded without responses).
        tokenizer_hash: of the run's tokenizer (`Tokenizer.fingerprint`).
        vocab_size: real entries of the vocabulary.
        setting: that names the folder, for messages.

    Raises:
        InputError: no or a damaged header, missing shards, another tokenizer or other data, a damaged line.
    """
    folder = Path(folder).expanduser()
    try:
        header = read_header(folder)
        differing = []
        if header.tokenizer["hash"] != tokenizer_hash:
            differing.append("the tokenizer")
        if header.data["fingerprint"] != fingerprint:
            differing.append("the data (rows, template or lengths of prompts)")
        if differing:
            raise InputError(
                f"{folder}: was generated with other settings: {' and '.join(differing)} "
                f"{'differ' if len(differing) > 1 else 'differs'} from this run's; generate anew with this run's YAML "
                "file"
            )
        if header.data["rows"] != len(rows):
            raise InputError(f"{folder / HEADER}: is damaged ({header.data['rows']} rows of {len(rows)}); {_RESTORE}")
        if missing := header.missing(folder):
            present = header.shards - len(missing)
            raise InputError(f"{folder}: has {present} of {header.shards} shards; {_AGAIN} to complete it")
        sources = []
        digest = hashlib.sha256(header.fingerprint.encode())
        for shard in range(header.shards):
            [source] = open_sources(str(folder / header.file_name(shard)), "", setting)
            of_shard = [rows[position] for position in header.positions(shard)]
            for tokens in _checked_tokens(source, of_shard, header.samples, vocab_size):
                digest.update(np.array([len(tokens), *tokens], dtype="<i8").tobytes())
            sources.append(source)
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(setting) else f"{setting}: {text}") from None
    return ResponseFiles(header, sources, digest.hexdigest())


def _checked_tokens(source: Source, rows: Sequence[int], samples: int, vocab_size: int) -> Iterator[list[int]]:
    """Each line's tokens. Raises InputError unless a shard has the lines that it must have, and each a response."""
    if len(source) != len(rows) * samples:
        raise InputError(f"{source.name}: has {len(source)} lines instead of {len(rows) * samples}; {_REMOVE}")
    for index, raw in enumerate(source.raw_rows()):
        row, sample = rows[index // samples], index % samples
        try:
            line = source.parse(raw)
            if line is None:
                raise InputError("is blank")
            if (line.get("row"), line.get("sample")) != (row, sample):
                raise InputError(
                    f"is row {line.get('row')}, sample {line.get('sample')}, in the place of row {row}, sample {sample}"
                )
            tokens = line.get("tokens")
            if not isinstance(tokens, list) or not tokens:
                raise InputError("field 'tokens' is no list of token ids")
            for token in tokens:
                if type(token) is not int or not 0 <= token < vocab_size:  # True is an int too
                    raise InputError(f"field 'tokens' holds {token!r}, which is no token id below {vocab_size}")
            yield tokens
        except InputError as error:
            raise InputError(f"{source.where(index)}: {error}; {_REMOVE}") from None
