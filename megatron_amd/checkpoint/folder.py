"""The folders of checkpoints: their names, how they appear and vanish, and whether their files are whole.

A folder `step-<8 digits>` is complete: it gets this name in one step, when everything in it is on the disk. Names
that begin with `.tmp-` are what a save has not finished or a deletion has not.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from megatron_amd.errors import InputError

STATE_FILE = "state.json"
FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""

TENSOR_SUFFIX = ".distcp"
"""Suffix of the large files, which torch writes."""

_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip
_NAME = re.compile(r"(?:\.replaced-)?step-(?P<step>\d{8,})")
_ADVICE = "restore it from a copy, or remove this checkpoint to use an earlier one"


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoints/, or None. Raises OSError when it cannot be listed."""
    found = _checkpoints(Path(directory))
    return found[-1] if found else None


def read_state(path: str | Path) -> dict[str, Any]:
    """What all ranks share: the `state` that was saved, with `step`, `fingerprint`, `roles` and `versions`.

    Reads one small JSON file and nothing else.

    Raises:
        InputError: `path` is not a checkpoint, or its state.json is damaged.
    """
    path = Path(path)
    file = path / STATE_FILE
    if not file.is_file():
        raise InputError(f"{path}: is not a checkpoint: it has no {STATE_FILE}; give a folder checkpoints/step-...")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: is damaged ({error}); {_ADVICE}") from None
    kinds: dict[str, type] = {"format": int, "step": int, "roles": dict, "fingerprint": dict, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise InputError(f"{file}: is damaged (it has no {key}); {_ADVICE}")
    if state["format"] > FORMAT:
        raise InputError(f"{file}: was written by a newer megatron_amd, in format {state['format']}; update this one")
    return state


def begin(directory: Path, partial: Path) -> None:
    """An empty folder to write into, and room: what earlier saves left behind goes."""
    directory.mkdir(parents=True, exist_ok=True)
    for remains in directory.glob(".tmp-*"):
        shutil.rmtree(remains)
    partial.mkdir()


def publish(directory: Path, partial: Path) -> Path:
    """Give the complete folder its name. Where one of that name exists, there is always one of the two."""
    path = directory / partial.name.removeprefix(".tmp-")
    for folder in (partial, *filter(Path.is_dir, partial.iterdir())):
        sync(folder)
    if path.exists():
        replaced = directory / f".replaced-{path.name}"
        _remove(replaced)
        path.rename(replaced)
    partial.rename(path)
    sync(directory)
    return path


def prune(directory: Path, newest: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, never `newest` itself."""
    for replaced in directory.glob(".replaced-*"):
        _remove(replaced)
    others = [path for path in _checkpoints(directory) if path != newest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; killed half-way, no part of it has a checkpoint's name."""
    if path.exists():
        doomed = path.with_name(f".tmp-removed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def write(file: Path, content: bytes) -> None:
    """Write a file onto the disk, not only into the system's memory."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Put a folder's list of names onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_files(folder: Path) -> dict[str, dict[str, int]]:
    """Size of each file, and a checksum of the small ones; torch keeps checksums inside the large ones."""
    described = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        description = {"size": file.stat().st_size}
        if file.suffix != TENSOR_SUFFIX:
            description["crc32"] = zlib.crc32(file.read_bytes())
        described[file.relative_to(folder).as_posix()] = description
    return described


def check_files(path: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Raise InputError unless every file is as it was written. Ranks, where there are any, share the reading; call it
    in `agreed()` then."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, saved in files.items():  # first, since the other check reads one file to understand another
        file = path / name
        if not file.is_file():
            raise InputError(f"{file}: is missing; {_ADVICE}")
        size = file.stat().st_size
        if size != saved["size"]:
            raise InputError(f"{file}: is damaged ({size} bytes instead of {saved['size']}); {_ADVICE}")
        if "crc32" in saved and zlib.crc32(file.read_bytes()) != saved["crc32"]:
            raise InputError(f"{file}: is damaged; {_ADVICE}")
    for name in sorted(name for name in files if name.endswith(TENSOR_SUFFIX))[rank::ranks]:
        if not _tensors_intact(path / name):
            raise InputError(f"{path / name}: is damaged; {_ADVICE}")


def _tensors_intact(file: Path) -> bool:
    """Whether a file of tensors is as torch wrote it."""
    with file.open("rb") as stream:
        for piece in read_list_of_tensors(file.parent).storage_data.values():
            if piece.relative_path == file.name and not piece_intact(stream, piece):
                return False
    return True


def piece_intact(stream: IO[bytes], piece: Any) -> bool:
    """Whether a piece of a file of tensors (its place is that of a list of tensors) is one zip archive that agrees with
    its checksums. Torch never reads them, and of two archives it takes the last."""
    stream.seek(piece.offset)
    content = io.BytesIO(stream.read(piece.length))
    try:
        with zipfile.ZipFile(content) as archive:
            return min(member.header_offset for member in archive.infolist()) == 0 and archive.testzip() is None
    except OSError:
        raise
    except Exception:  # a changed byte can make zipfile raise about anything
        return False


def read_list_of_tensors(folder: Path) -> Metadata:
    """The `.metadata` of a folder in torch's format, without running code that it may name.

    Raises FileNotFoundError where there is none, and whatever unpickling raises where it is damaged.
    """
    with (folder / ".metadata").open("rb") as stream:
        return _ListOfTensors(stream).load()


_InPython: Any = pickle._Unpickler
"""Whose steps can be looked at, unlike those of `pickle.Unpickler`."""


class _ListOfTensors(_InPython):  # type: ignore[misc]
    """Admits the classes that torch and Megatron-Core write there. A name with a dot could lead through them to others,
    so whole names are compared; a class or function may be called, not changed."""

    dispatch = dict(_InPython.dispatch)

    def load_build(self) -> None:
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError(f"{self.stack[-2]} is to be changed by a list of tensors")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of tensors")


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        # A replaced one counts while its successor has not taken its name; it sorts first.
        if match and path.is_dir():
            found[int(match["step"])] = path
    return [found[step] for step in sorted(found)]
