"""Weights from and to Hugging Face folders.

Both directions follow the one description in hf_tensors.py. A rank reads only its own slices of each tensor; an
export gathers the tensors one by one onto the rank that writes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_amd.checkpoint.hf_tensors import Part, Weight, model_weights, stage_parameters, unwrap
from megatron_amd.data.hub import check_hub_reachable, is_hub_name
from megatron_amd.distributed.initialize import agreed
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError, first_line
from megatron_amd.models.architecture import Architecture, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_hf_weights(
    model: torch.nn.Module,
    source: str | Path,
    architecture: Architecture,
    *,
    layers: tuple[int, ...] | None = None,
    where: str = "path",
) -> None:
    """Fill the parameters of one pipeline stage of a GPTModel from a folder or hub name.

    Args:
        model: the stage, wrapped or not. Padding rows of the vocabulary become zero. A critic's second head gets the
            LM head as its first does.
        architecture: of `model`, so after a cut.
        layers: layers of the folder that a cut model keeps, in order.
        where: the setting that names `source`, for errors.

    Each rank reads on its own: wrap the call in `agreed()` where an error must reach all ranks.

    Raises:
        InputError: no safetensors, a truncated or corrupt file, a missing tensor, or one of another shape.
    """
    weights = model_weights(architecture, layers)
    tp_group = unwrap(model).pg_collection.tp
    with WeightFiles(source, where) as files, torch.no_grad():
        for name, parameter in stage_parameters(model).items():
            if name.startswith("output_layer"):
                name = "output_layer.weight"
            if name not in weights:
                raise ValueError(f"parameter {name} has no counterpart in the family {architecture.family}")
            shard = _read_shard(files, weights[name], tp_group.rank(), tp_group.size(), parameter.shape[0])
            if shard.shape != parameter.shape:
                raise ValueError(f"parameter {name} is {list(parameter.shape)}, its tensors make {list(shard.shape)}")
            parameter.copy_(shard)


def check_hf_weights(
    source: str | Path, architecture: Architecture, *, layers: tuple[int, ...] | None = None, where: str = "path"
) -> None:
    """Raise what `load_hf_weights` would raise for a folder or hub name, from the heads of its files alone."""
    with WeightFiles(source, where) as files:
        for weight in model_weights(architecture, layers).values():
            for name, shape in weight.tensor_shapes().items():
                files.check(name, shape)


def read_head(
    source: str | Path,
    architecture: Architecture,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
    where: str = "path",
) -> Tensor:
    """One tensor-parallel rank's rows of the LM head, [padded_vocab_size / tp_size, H], in the folder's dtype.

    Padding rows are zero. Raises InputError as `load_hf_weights` does.
    """
    weight = model_weights(architecture)["output_layer.weight"]
    with WeightFiles(source, where) as files:
        return _read_shard(files, weight, tp_rank, tp_size, padded_vocab_size // tp_size)


def export_hf(
    model: torch.nn.Module,
    folder: str | Path,
    architecture: Architecture,
    layout: Layout,
    *,
    copy_tokenizer: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a GPTModel as a Hugging Face folder that `transformers` loads. Collective over all ranks.

    Tensors are gathered one at a time onto the first rank, which holds at most `max_shard_bytes` and one tensor.
    The folder appears complete or not at all; an earlier export in its place is replaced.

    Args:
        copy_tokenizer: called on the writing rank with the folder to put tokenizer files in.

    Raises:
        InputError: on all ranks, when the folder cannot be written.
    """
    folder = Path(folder)
    dtype = next(model.parameters()).dtype
    with agreed():
        if layout.dp_rank != 0:
            return
        tensors = _gather_tensors(model, architecture, layout, dtype)
        if layout.tp_rank != 0 or layout.pp_rank != 0:
            for _ in tensors:
                pass
            return
        writer = _FolderWriter(folder, architecture, dtype, max_shard_bytes)
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish(copy_tokenizer)


def check_export_folder(folder: Path) -> None:
    """Raise InputError where an export would replace something that is not an exported model."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: exists and is not an exported model; move it or choose another folder")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, where the exported model would be; move it or choose another folder")


class WeightFiles:
    """The safetensors of a folder or hub name, read slice by slice. A context manager.

    Raises InputError, from any method, for what is wrong with the files.
    """

    def __init__(self, source: str | Path, where: str) -> None:
        self.folder = _weights_folder(str(source), where)
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
        for file in self._open_files.values():
            file.__exit__(None, None, None)

    def read(self, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> Tensor:
        """A slice of the tensor `name`, whose whole shape must be `shape`."""
        file, tensor = self._tensor(name, shape)
        try:
            return tensor[slices]
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless there is a tensor `name` of this shape."""
        self._tensor(name, shape)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> tuple[Path, Any]:
        """The file that holds a tensor, and the tensor, not yet read."""
        file, name = self._find(name)
        try:
            tensor = self._open(file).get_slice(name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error
        found = tuple(tensor.get_shape())
        if found != shape:
            raise InputError(f"{file}: tensor {name} has shape {list(found)}, but config.json makes it {list(shape)}")
        return file, tensor

    def _find(self, name: str) -> tuple[Path, str]:
        # A folder saved from the model without its LM head has the names without their first part.
        for candidate in (name, name.split(".", 1)[1]):
            if candidate in self._file_of:
                return self._file_of[candidate], candidate
        raise InputError(
            f"{self.folder}: its weights have no tensor {name}; they are incomplete or not of this config.json"
        )

    def _open(self, file: Path) -> Any:
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(file, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise _corrupt(file, error) from error
        return self._open_files[file]

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: has no weight_map")
        for file in sorted(set(map(str, weight_map.values()))):
            if not (self.folder / file).is_file():
                raise InputError(f"{index}: names {file}, which is not in the folder; download or copy it again")
        return {name: self.folder / file for name, file in weight_map.items()}

    def _other_formats(self) -> str:
        for pattern, what in (("*.bin", "PyTorch .bin files"), ("*.pt*", "PyTorch files"), ("*.gguf", "GGUF files")):
            if any(self.folder.glob(pattern)):
                return f", only {what}; load it with transformers and save it with save_pretrained"
        return "; give the folder of a Hugging Face model with its weights"


def _read_shard(files: WeightFiles, weight: Weight, tp_rank: int, tp_size: int, local_rows: int) -> Tensor:
    """One tensor-parallel rank's shard of a parameter. `local_rows`: its rows, padding of the vocabulary included."""
    if weight.split == "vocabulary":
        (part,) = weight.parts
        first = min(tp_rank * local_rows, part.rows)
        real = _read_part(files, weight, part, slice(first, min(first + local_rows, part.rows)), slice(None))
        return torch.nn.functional.pad(real, (0, 0, 0, local_rows - real.shape[0]))
    columns = slice(None)
    if weight.split == "columns":
        assert weight.columns is not None
        width = weight.columns // tp_size
        columns = slice(tp_rank * width, (tp_rank + 1) * width)
    pieces = []
    for part in weight.parts:
        rows = slice(part.first_row, part.first_row + part.rows)
        if weight.split == "rows":
            count = part.rows // tp_size
            first = part.first_row + tp_rank * count
            rows = slice(first, first + count)
        pieces.append(_read_part(files, weight, part, rows, columns))
    groups = max(1, weight.groups // tp_size)
    return torch.cat([piece.unflatten(0, (groups, -1)) for piece in pieces], dim=1).flatten(0, 1)


def _read_part(files: WeightFiles, weight: Weight, part: Part, rows: slice, columns: slice) -> Tensor:
    shape = weight.tensor_shapes()[part.tensor]
    if weight.columns is None:
        return files.read(part.tensor, shape, (rows,))
    if weight.transposed:
        return files.read(part.tensor, shape, (columns, rows)).t()
    return files.read(part.tensor, shape, (rows, columns))


def _join_shards(shards: list[Tensor], weight: Weight) -> dict[str, Tensor]:
    """All tensor-parallel shards of a parameter -> the folder's tensors: the inverse of `_read_shard`."""
    if weight.split == "rows":
        groups = max(1, weight.groups // len(shards))
        sizes = [part.rows // len(shards) // groups for part in weight.parts]
        split = [shard.unflatten(0, (groups, -1)).split(sizes, dim=1) for shard in shards]
        wholes = [torch.cat([piece.flatten(0, 1) for piece in pieces]) for pieces in zip(*split, strict=True)]
    elif weight.split == "columns":
        wholes = [torch.cat(shards, dim=1)]
    elif weight.split == "vocabulary":
        wholes = [torch.cat(shards)[: weight.parts[0].rows]]
    else:
        wholes = [shards[0]]
    stacked: dict[str, list[Tensor]] = {}
    for part, whole in zip(weight.parts, wholes, strict=True):
        stacked.setdefault(part.tensor, []).append(whole)
    tensors = {name: torch.cat(pieces) for name, pieces in stacked.items()}
    return {name: tensor.t().contiguous() if weight.transposed else tensor for name, tensor in tensors.items()}


def _gather_tensors(
    model: torch.nn.Module, architecture: Architecture, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by their names in a folder, one at a time, on the first rank of data-parallel rank 0.

    Collective over that replica's ranks; the others' tensors are none of the caller's business.
    """
    weights = model_weights(architecture)
    if architecture.tied:
        del weights["output_layer.weight"]
    parameters = stage_parameters(model)
    held: list[list[str]] = [[name for name in weights if name in parameters]]
    if layout.pp_size > 1:
        own = held[0]
        held = [[] for _ in range(layout.pp_size)]
        dist.all_gather_object(held, own, group=layout.groups.pp)
    seen: set[str] = set()
    for stage, names in enumerate(held):
        for name in (name for name in names if name not in seen):  # a copy on a later stage is equal
            seen.add(name)
            tensors = {}
            if stage == layout.pp_rank:
                shards = _gather_shards(parameters[name].detach().to(dtype), layout)
                if layout.tp_rank != 0:
                    continue
                tensors = _join_shards(shards, weights[name])
            if layout.tp_rank == 0:
                yield from _bring_to_first_stage(tensors, weights[name], stage, layout, dtype)


def _gather_shards(shard: Tensor, layout: Layout) -> list[Tensor]:
    """Every tensor-parallel rank's shard, on the first of them."""
    if layout.tp_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(layout.tp_size)] if layout.tp_rank == 0 else None
    dist.gather(shard.contiguous(), shards, dst=dist.get_global_rank(layout.groups.tp, 0), group=layout.groups.tp)
    return shards or []


def _bring_to_first_stage(
    tensors: dict[str, Tensor], weight: Weight, stage: int, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    group = layout.groups.pp
    for name, shape in weight.tensor_shapes().items():
        if layout.pp_rank == 0:
            tensor = tensors[name] if stage == 0 else torch.empty(shape, dtype=dtype, device=layout.device)
            if stage != 0:
                dist.recv(tensor, src=dist.get_global_rank(group, stage), group=group)
            yield name, tensor
        elif stage == layout.pp_rank:
            dist.send(tensors[name], dst=dist.get_global_rank(group, 0), group=group)


class _FolderWriter:
    """Writes tensors as they come into a temporary folder that takes its name when it is complete.

    Other ranks are still sending when a write fails, so a failure is remembered, the rest of the tensors are dropped,
    and `finish` raises.
    """

    def __init__(self, folder: Path, architecture: Architecture, dtype: torch.dtype, max_shard_bytes: int) -> None:
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._architecture = architecture
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._failure: InputError | None = None
        self._guarded(self._begin)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is written when a shard is full."""
        if self._failure:
            return
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self._max_shard_bytes:
            self._guarded(self._write_shard)
        self._shard[name] = tensor.cpu()
        self._shard_bytes += size
        self._total_bytes += size

    def finish(self, copy_tokenizer: Callable[[Path], None] | None) -> None:
        """Complete the folder. Raises InputError when anything could not be written; nothing is left then."""
        self._guarded(self._write_shard)
        self._guarded(self._name_shards)
        self._guarded(self._write_config)
        if copy_tokenizer is not None:
            self._guarded(lambda: copy_tokenizer(self._partial))
        self._guarded(self._publish)
        if self._failure:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise self._failure

    def _guarded(self, step: Callable[[], None]) -> None:
        if self._failure:
            return
        try:
            step()
        except InputError as error:
            self._failure = error
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._failure = InputError(
                f"{self._folder}: the model cannot be written: {reason}; make room or choose another folder"
            )
            self._shard = {}

    def _begin(self) -> None:
        check_export_folder(self._folder)
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)

    def _write_shard(self) -> None:
        save_file(self._shard, self._partial / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _name_shards(self) -> None:
        if len(self._shards) == 1:
            (self._partial / "shard-0").rename(self._partial / WEIGHTS)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._partial / f"shard-{number}").rename(self._partial / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write_config(self) -> None:
        config = _exported_config(self._architecture, self._dtype)
        (self._partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _publish(self) -> None:
        mode = (self._partial / "config.json").stat().st_mode  # safetensors makes files that only their owner can read
        for file in filter(Path.is_file, self._partial.rglob("*")):
            file.chmod(mode)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        earlier = self._folder.with_name(f".{self._folder.name}.earlier")
        if self._folder.exists():
            if earlier.exists():
                shutil.rmtree(earlier)
            self._folder.rename(earlier)
        self._partial.rename(self._folder)
        shutil.rmtree(earlier, ignore_errors=True)


def _exported_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the exported model: the original's, with what has changed."""
    classes = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "t5": "T5ForConditionalGeneration",
        "mt5": "MT5ForConditionalGeneration",
    }
    config = dict(architecture.hf_config)
    config.pop("auto_map", None)  # names Python files of the original folder
    config["architectures"] = [classes[architecture.family]]
    config["tie_word_embeddings"] = architecture.tied
    # transformers 4 reads torch_dtype, 5 reads both
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return config


def _weights_folder(source: str, where: str) -> Path:
    """The folder itself, or a hub name's safetensors downloaded to the hub's cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(source):
        raise InputError(f"{where}: there is no folder {source}")
    from huggingface_hub import snapshot_download

    check_hub_reachable(source, where)
    try:
        return Path(snapshot_download(source, allow_patterns=["model*.safetensors", INDEX]))
    except Exception as error:  # the client's exceptions differ between versions
        raise InputError(f"{where}: {source} cannot be read from the hub: {first_line(error)}") from error


def _corrupt(file: Path, error: Exception) -> InputError:
    size = file.stat().st_size if file.exists() else 0
    return InputError(f"{file}: is truncated or corrupt ({size} bytes; {error}); download or copy it again")
