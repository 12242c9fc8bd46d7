"""Rows as they stand in files or on the hub, read through the datasets library and kept on disk.

`datasets` keeps what it reads as Arrow files in its cache folder and maps them into memory, so a large file costs
each rank little memory. JSON Lines are kept as text lines and parsed row by row: this way a malformed row has a
line number and cannot spoil the other rows' types.
"""

from __future__ import annotations

import csv
import errno
import glob
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_amd.data.hub import check_hub_reachable, is_hub_name, quieten_hub
from megatron_amd.errors import InputError, first_line

if TYPE_CHECKING:
    import datasets

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
CHUNK_ROWS = 1000
_TEXT = "text"
_CANNOT_WRITE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


@dataclass(frozen=True)
class Source:
    """The rows of one file or one hub split."""

    name: str
    """File path, or hub name and split."""
    unit: str
    """What a row is called in messages: `line` where rows are a file's lines, else `row`."""
    table: datasets.Dataset
    """One column `text` of JSON objects when `columns` is None, else the columns themselves."""
    columns: tuple[str, ...] | None
    """Column names, where they are known before any row is read."""

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """`data/train.jsonl line 7` for index 6."""
        return f"{self.name} {self.unit} {index + 1}"

    def select(self, fields: list[str], setting_of: dict[str, str]) -> Source:
        """Only the columns `fields`. Raises InputError when one does not exist (`setting_of` names its setting)."""
        if self.columns is None:
            return self
        for field in fields:
            if field not in self.columns:
                raise InputError(
                    f"{setting_of[field]}: {self.name} has no column {field!r}; "
                    f"its columns are: {', '.join(self.columns)}"
                )
        return Source(self.name, self.unit, self.table.select_columns(fields), self.columns)

    def raw_rows(self) -> Iterator[Any]:
        """Every row in order, unparsed, read from the disk in chunks."""
        for start in range(0, len(self.table), CHUNK_ROWS):
            chunk = self.table[start : start + CHUNK_ROWS]
            if self.columns is None:
                yield from chunk[_TEXT]
            else:
                names = list(chunk)
                yield from (dict(zip(names, values, strict=True)) for values in zip(*chunk.values(), strict=True))

    def raw_row(self, index: int) -> Any:
        """One row, unparsed."""
        row = self.table[index]
        return row[_TEXT] if self.columns is None else row

    def parse(self, raw: Any) -> dict[str, Any] | None:
        """A raw row as a mapping of fields; None for a blank line. Raises InputError on invalid JSON."""
        if self.columns is not None:
            return raw
        if not raw or raw.isspace():
            return None
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            raise InputError(f"invalid JSON ({error.msg}, column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"invalid JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise InputError(f"a JSON {_json_type(row)} instead of an object with fields")
        return row


def open_sources(location: str, hub_split: str, setting: str) -> list[Source]:
    """Open a file, every data file of a folder in order of name, or a hub data set (`owner/name` or
    `owner/name:config`). Reads no row. `setting` is the setting that holds `location`, for messages.

    Raises InputError: nothing there, an unknown extension, an unreadable or empty file, an unreachable hub.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in EXTENSIONS and f.name[0] != "." and f.is_file())
        if not files:
            raise InputError(f"{setting}: the folder {path} holds no {', '.join(EXTENSIONS)} file")
        return [_open_file(file, setting) for file in files]
    if path.exists():
        return [_open_file(path, setting)]
    name, _, configuration = location.partition(":")
    if path.suffix in (*EXTENSIONS, ".txt", ".tsv", ".gz", ".zst") or not is_hub_name(name):
        raise InputError(f"{setting}: {location} does not exist; give a file, a folder or a hub data set's name")
    return [_open_hub(name, configuration or None, hub_split, setting)]


def _open_file(path: Path, setting: str) -> Source:
    if path.suffix not in EXTENSIONS:
        raise InputError(
            f"{setting}: {path} has the unknown extension {path.suffix!r}; known are {', '.join(EXTENSIONS)}"
        )
    datasets = _datasets()
    if path.stat().st_size == 0:
        raise InputError(f"{setting}: {path} is empty")
    try:
        with warnings.catch_warnings():
            # pandas only warns of rows that have more cells than the header, and drops what is too much
            warnings.filterwarnings("error", message="Length of header or names does not match")
            if path.suffix == ".parquet":
                source = _columns(str(path), _read_parquet(path))
            elif path.suffix == ".csv":
                source = _columns(str(path), _read_csv(path))
            elif path.suffix == ".json" and _begins_with_bracket(path):
                source = Source(str(path), "row", _read_json_list(path), None)
            else:
                lines = datasets.Dataset.from_text(glob.escape(str(path)), encoding="utf-8-sig")
                source = Source(str(path), "line", lines, None)
    except Exception as error:  # datasets wraps what its readers raise: pandas', pyarrow's and the system's errors
        raise InputError(f"{setting}: {path} cannot be read: {_root_cause(error)}") from error
    return source


def _columns(name: str, table: datasets.Dataset) -> Source:
    return Source(name, "row", table, tuple(table.column_names))


def _read_parquet(path: Path) -> datasets.Dataset:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if file.metadata.num_rows == 0:
            raise ValueError("it has no rows")
    return _datasets().Dataset.from_parquet(glob.escape(str(path)))


def _read_csv(path: Path) -> datasets.Dataset:
    """Every cell as text: a prompt of digits stays text, and an empty cell is empty."""
    datasets = _datasets()
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if not any(reader):  # a blank line has no cells
            raise ValueError("it has no rows")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return datasets.Dataset.from_csv(
        glob.escape(str(path)), features=features, keep_default_na=False, index_col=False, encoding="utf-8-sig"
    )


def _begins_with_bracket(path: Path) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        return file.read(4096).lstrip()[:1] == "["


def _read_json_list(path: Path) -> datasets.Dataset:
    """A JSON list cannot be read in part: it is parsed at once and kept as one JSON text per row."""
    with open(path, encoding="utf-8-sig") as file:
        rows = json.load(file)
    if not rows:
        raise ValueError("it has no rows")
    return _datasets().Dataset.from_dict({_TEXT: [json.dumps(row) for row in rows]})


def _open_hub(name: str, configuration: str | None, split: str, setting: str) -> Source:
    check_hub_reachable(name, setting)
    datasets = _datasets()
    try:
        table = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # the library documents no complete list; each case is about this name and split
        reason = _root_cause(error)
        if "Config name is missing" in str(error):
            reason += f"; write {setting}: {name}:CONFIG"
        raise InputError(f"{setting}: the hub data set {name!r}, split {split!r}, cannot be read: {reason}") from error
    return _columns(f"{name} ({split})", table)


def _datasets() -> Any:
    """The datasets library, silent. Imported late: it takes half a second."""
    import datasets

    quieten_hub()
    datasets.disable_progress_bars()
    # Its readers log an error and then raise it: once is enough.
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return f"{first_line(error)}; HF_DATASETS_CACHE sets where the copy of it is kept"
    return first_line(error)


def _json_type(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", type(None): "null"}
    return kinds.get(type(value), "object")
