"""The folder of a model, or the hub's copy of it: finding its files and reading the small ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_amd.data.hub import check_hub_reachable, is_hub_name
from megatron_amd.errors import InputError, first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_T5_TABLES = {"shared.weight", "lm_head.weight"}
_ROWS = 4096
"""Of a table that are compared at once."""


def model_file(source: str, name: str, where: str) -> Path:
    """A file of a model's folder, or of a hub name: then it is downloaded to the hub's cache.

    Raises InputError when there is no such folder, hub name or file.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise InputError(f"{where}: {folder} has no {name}; give the folder of a Hugging Face model")
        return folder / name
    if folder.exists():
        raise InputError(f"{where}: {folder} is not a folder; give the folder of a Hugging Face model")
    if not is_hub_name(source):
        raise InputError(f"{where}: there is no folder {source}")
    from huggingface_hub import hf_hub_download

    check_hub_reachable(source, where)
    try:
        return Path(hf_hub_download(source, name))
    except Exception as error:  # the client's exceptions differ between versions
        raise InputError(f"{where}: {source} cannot be read from the hub: {first_line(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError naming the file otherwise."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold a JSON object, not {type(content).__name__}")
    return content


def weights_folder(source: str, where: str, also: Iterable[str] = ()) -> Path:
    """The folder itself, or a hub name's safetensors, downloaded to the hub's cache.

    also: names of other files that are wanted in the folder, where a hub name has them. Raises InputError when there is
    no such folder or hub name.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(source):
        raise InputError(f"{where}: there is no folder {source}")
    from huggingface_hub import snapshot_download

    check_hub_reachable(source, where)
    try:
        return Path(snapshot_download(source, allow_patterns=["model*.safetensors", INDEX, *also]))
    except Exception as error:  # the client's exceptions differ between versions
        raise InputError(f"{where}: {source} cannot be read from the hub: {first_line(error)}") from error


def has_own_head(source: str, where: str) -> bool:
    """Whether a T5's files hold an LM head that is not the embedding. A hub name's weights are downloaded for that.

    transformers 5 writes into config.json that the two are tied also where they are not, and looks at the weights.
    """
    folder = weights_folder(source, where)
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    tables: dict[str, Any] = {}
    try:
        with contextlib.ExitStack() as stack:
            for file in files:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                tables |= {name: opened.get_slice(name) for name in _T5_TABLES & set(opened.keys())}
            return len(tables) == len(_T5_TABLES) and not _equal(*tables.values())
    except (SafetensorError, OSError):  # whoever loads the weights says so
        return False


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors of files hold the same numbers, a few rows at a time."""
    if one.get_shape() != other.get_shape():
        return False
    starts = range(0, one.get_shape()[0] if one.get_shape() else 0, _ROWS)
    pieces = ((table[first : first + _ROWS].float() for table in (one, other)) for first in starts)
    return all(torch.equal(*pair) for pair in pieces)
