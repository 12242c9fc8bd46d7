"""The files of a Hugging Face folder: safetensors read slice by slice and written tensor by tensor."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_amd.checkpoint.hf_tensors import Family, Weight
from megatron_amd.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from megatron_amd.errors import InputError
from megatron_amd.models.model_files import INDEX, WEIGHTS, read_json, weights_folder

MCORE_MARKS = ("metadata.json", "config.json")
"""Files by which a converted model's folder is known."""
CARRIED = ("generation_config.json", *TOKENIZER_FILES)
"""Files beside config.json that pass unchanged through a conversion."""
MARK = {"format": "pt", "written_by": "megatron_amd"}
"""Metadata of all safetensors that are written here, by which an export is known. transformers asks for `format`."""
CONVERSION_MARK = ".written_by_megatron_amd"
"""Empty file by which a conversion to Megatron-Core is known to be one of ours."""

_SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_OF_EXPORT = {"config.json", INDEX, *CARRIED}
_OF_CONVERSION = {*MCORE_MARKS, CONVERSION_MARK, ".metadata", "__0_0.distcp", "common.pt", *CARRIED}

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class WeightFiles:
    """The safetensors of a folder or hub name, read slice by slice. A context manager.

    Raises InputError, from any method, for what is wrong with the files.
    """

    def __init__(self, source: str | Path, where: str, also: Iterable[str] = ()) -> None:
        """also: names of other files that are wanted in the folder, where a hub name has them."""
        self.folder = weights_folder(str(source), where, also)
        self._open_files: dict[Path, Any] = {}
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.is_file():
            self._file_of = dict.fromkeys(self._open(single).keys(), single)
        elif index.is_file():
            self._file_of = self._read_index(index)
        else:
            raise InputError(f"{where}: {self.folder} has no {WEIGHTS}{self._other_formats()}")

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Close the files; the next read opens its file again. What was read of a mapped file no longer counts as
        this process's memory."""
        for file in self._open_files.values():
            file.__exit__(None, None, None)
        self._open_files = {}

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> Tensor:
        """A slice of the tensor `name`, whose whole shape must be `shape`."""
        file, tensor = self._tensor(name, shape)
        try:
            return tensor[slices]
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error

    def dtype(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """The type of the tensor `name`, whose whole shape must be `shape`."""
        return _TYPES[self._tensor(name, shape)[1].get_dtype()]

    def check(self, weights: Mapping[str, Weight], family: Family, *, is_cut: bool) -> None:
        """Raise unless the files hold the tensors of `weights` and no others, by their heads alone.

        is_cut: tensors of other layers are left aside.
        """
        found = set()
        for weight in weights.values():
            for name, shape in weight.tensor_shapes().items():
                self._tensor(name, shape)
                found.add(self._find(name))
        # head and copies are compared with the embedding where that is read
        known = {f"{family.modules['output_layer']}.weight", *family.copies, *map(str, found)}
        if is_cut:
            known |= {_any_layer(name) for name in known}
        strangers = [name for name in self._file_of if name not in known and not re.fullmatch(family.ignored, name)]
        if is_cut:
            strangers = [name for name in strangers if _any_layer(name) not in known]
        strangers.sort()
        if strangers:
            more = f" and {len(strangers) - 3} others" if len(strangers) > 3 else ""
            raise InputError(
                f"{self._file_of[strangers[0]]}: holds {', '.join(strangers[:3])}{more}, for which config.json has no "
                "place; the folder is of another model, or its config.json is"
            )

    def where_is(self, name: str) -> str:
        """The file and the name under which it holds a tensor."""
        found = self._find(name)
        assert found is not None
        return f"{self._file_of[found]}: tensor {found}"

    def _tensor(self, name: str, shape: tuple[int, ...]) -> tuple[Path, Any]:
        """The file that holds a tensor, and the tensor, not yet read."""
        found_name = self._find(name)
        if found_name is None:
            raise InputError(
                f"{self.folder}: its weights have no tensor {name}; they are incomplete or not of this config.json"
            )
        file = self._file_of[found_name]
        try:
            tensor = self._open(file).get_slice(found_name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error
        found = tuple(tensor.get_shape())
        if found != shape:
            raise InputError(f"{file}: tensor {name} has shape {list(found)}, but config.json makes it {list(shape)}")
        if tensor.get_dtype() not in _TYPES:
            raise InputError(
                f"{file}: tensor {name} is of type {tensor.get_dtype()}: quantised weights are not supported; save the "
                "model in bf16"
            )
        return file, tensor

    def _find(self, name: str) -> str | None:
        # A folder saved from the model without its LM head has the names without their first part.
        candidates = (name, name.split(".", 1)[1]) if name.count(".") > 1 else (name,)
        return next((candidate for candidate in candidates if candidate in self._file_of), None)

    def _open(self, file: Path) -> Any:
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(file, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise _corrupt(file, error) from error
        return self._open_files[file]

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: has no weight_map; download or copy it again")
        held: dict[str, Path] = {}
        for file in sorted(set(map(str, weight_map.values()))):
            path = self.folder / file
            if Path(file).name != file or not path.is_file():
                raise InputError(f"{index}: names {file}, which is not in the folder; download or copy it again")
            names: list[str] = self._open(path).keys()
            for name in names:
                if weight_map.get(name) != file:
                    raise InputError(f"{path}: holds {name}, but {INDEX} does not say so; download or copy both again")
                held[name] = path
        for name, file in weight_map.items():
            if name not in held:
                raise InputError(f"{index}: says that {name} is in {file}, which does not hold it; copy both again")
        return held

    def _other_formats(self) -> str:
        if any(self.folder.glob("*-of-*.safetensors")):
            return f" and no {INDEX} for its shards; download or copy that again"
        for pattern, what in (("*.bin", "PyTorch .bin files"), ("*.pt*", "PyTorch files"), ("*.gguf", "GGUF files")):
            if any(self.folder.glob(pattern)):
                return f", only {what}; load it with transformers and save it with save_pretrained"
        return "; give the folder of a Hugging Face model with its weights"


class FolderWriter:
    """Writes tensors as they come, none of them kept, into a temporary folder that takes its name when complete.

    Other ranks are still sending when a write fails, so a failure is remembered, the rest of the tensors are dropped,
    and `finish` raises.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        max_shard_bytes: int,
    ) -> None:
        """tensors: shape and type of all that will come, in the order in which they come."""
        self._folder = folder.resolve()  # a link stays one
        self._partial = partial_folder(self._folder)
        self._tensors = dict(tensors)
        self._sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
        self._shards = self._share_out(max_shard_bytes)
        self._shard_of = {name: file for file, names in self._shards.items() for name in names}
        self._left = iter(tensors)
        self._open_file: Any = None
        self._failure: InputError | None = None
        self._guarded(self._begin)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        assert name == next(self._left)
        assert (tuple(tensor.shape), tensor.dtype) == self._tensors[name]
        self._guarded(lambda: self._write(name, tensor))

    def check(self) -> None:
        """Raise the failure there has been, for a caller on whom no other rank waits."""
        if self._failure:
            raise self._failure

    def finish(self, write_others: Callable[[Path], None]) -> None:
        """Complete the folder. Raises InputError when anything could not be written; nothing is left then.

        write_others: called with the folder, for the files beside the weights.
        """
        self._guarded(self._end)
        self._guarded(lambda: write_others(self._partial))
        self._guarded(lambda: publish(self._partial, self._folder, check_export_folder))
        if self._failure:
            self.abandon()
            raise self._failure

    def abandon(self) -> None:
        """Remove what was written."""
        if self._open_file is not None:
            with contextlib.suppress(OSError):  # it may still hold what a full disk did not take
                self._open_file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _guarded(self, step: Callable[[], None]) -> None:
        if self._failure:
            return
        try:
            step()
        except InputError as error:
            self._failure = error
        except OSError as error:
            self._failure = cannot_write(self._folder, error)

    def _begin(self) -> None:
        check_export_folder(self._folder)
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)

    def _share_out(self, max_shard_bytes: int) -> dict[str, list[str]]:
        """Names of the tensors in each file."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in self._sizes.items():
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        if len(shards) == 1:
            return {WEIGHTS: shards[0]}
        return {
            f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards)
        }

    def _write(self, name: str, tensor: Tensor) -> None:
        file = self._shard_of[name]
        if name == self._shards[file][0]:
            if self._open_file is not None:
                self._open_file.close()
            self._open_file = (self._partial / file).open("wb")
            self._open_file.write(self._head(self._shards[file]))
        self._open_file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    def _head(self, names: list[str]) -> bytes:
        """https://huggingface.co/docs/safetensors: the head's length in 8 bytes, then the head, a JSON object."""
        head: dict[str, Any] = {"__metadata__": MARK}
        first = 0
        for name in names:
            shape, dtype = self._tensors[name]
            end = first + self._sizes[name]
            head[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
            first = end
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)  # mapped tensors begin where vector instructions like them
        return len(text).to_bytes(8, "little") + text

    def _end(self) -> None:
        assert next(self._left, None) is None
        self._open_file.close()
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": self._shard_of}
            (self._partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def partial_folder(folder: Path) -> Path:
    """Where `folder` is written before it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def publish(partial: Path, folder: Path, check: Callable[[Path], None]) -> None:
    """Put a complete folder onto the disk and give it its name, in place of an earlier one.

    check: raises InputError where the folder that is there now must not be replaced.
    """
    for file in filter(Path.is_file, partial.rglob("*")):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    check(folder)
    earlier = folder.with_name(f".{folder.name}.earlier")
    if folder.exists() and earlier.exists():
        shutil.rmtree(earlier)
    try:
        if folder.exists():
            folder.rename(earlier)
        partial.rename(folder)
    except BaseException:
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def cannot_write(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    advice = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return InputError(f"{folder}: the model cannot be written: {reason}; {advice}choose another folder")


def check_export_folder(folder: Path) -> None:
    """Raise InputError where an export would replace something that is not an exported model, or more than that."""
    files = _names(folder)
    weights = set(filter(_SHARD.fullmatch, files))
    is_export = (
        bool(weights)
        and all(_marked(folder / name) for name in weights)
        and _known(folder, files - weights, _OF_EXPORT)
    )
    _check_replaced(folder, is_export, "exported model")


def check_conversion_folder(folder: Path) -> None:
    """Raise InputError where a conversion to Megatron-Core would replace something that is not an earlier one, or more
    than that."""
    files = _names(folder)
    is_conversion = CONVERSION_MARK in files and _known(folder, files, _OF_CONVERSION)
    _check_replaced(folder, is_conversion, "earlier conversion")


def _names(folder: Path) -> set[str]:
    """Of what lies in a folder, sub-folders with a slash; nothing where there is no folder."""
    return (
        {entry.name if entry.is_file() else f"{entry.name}/" for entry in folder.iterdir()}
        if folder.is_dir()
        else set()
    )


def _known(folder: Path, files: set[str], known: set[str]) -> bool:
    """Whether the folder's files are of these names, or sentencepiece models of any."""
    return all(name in known or (name.endswith(".model") and _is_tokenizer(folder / name)) for name in files)


def _is_tokenizer(file: Path) -> bool:
    try:
        return load_tokenizer(str(file)).vocab_size > 0
    except InputError:
        return False


def _marked(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() == MARK
    except (SafetensorError, OSError):
        return False


def _check_replaced(folder: Path, is_replaceable: bool, what: str) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not is_replaceable:
        raise InputError(
            f"{folder}: exists and is not an {what} of megatron_amd, or not that alone; move it or "
            "choose another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, where the {what} would be; move it or choose another folder")


def copy_carried(source: Path, target: Path) -> None:
    """Copy generation settings and tokenizer files, sentencepiece models of any name among them."""
    for name in {*CARRIED, *(file.name for file in source.glob("*.model"))}:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{}.", f".{name}")


def _corrupt(file: Path, error: Exception) -> InputError:
    size = file.stat().st_size if file.exists() else 0
    return InputError(f"{file}: is truncated or corrupt ({size} bytes; {error}); download or copy it again")
