"""Weights of a GPTModel in Megatron-Core's `torch_dist` format, written and read one parameter at a time.

`dist_checkpointing` takes and gives whole models. Here neither direction holds more than a parameter: the tensors'
names, places and sizes come from the model built on meta tensors, or from the checkpoint's own list. A parameter is
written whole, as a layout of one rank has it; it is read whatever the layout that wrote it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_amd.checkpoint.folder import piece_intact, read_list_of_tensors
from megatron_amd.checkpoint.hf_tensors import FUSED_NORMS, STACKS, Weight
from megatron_amd.config import Config, TrainingConfig
from megatron_amd.distributed.fake import fake_world, on_meta
from megatron_amd.errors import InputError, first_line
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.gpt import transformer_config
from megatron_amd.models.roles import build_language_model

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

_FILE = "__0_0.distcp"
_MODEL = ("embedding.", *STACKS, "output_layer.")
"""How the names of a model's parameters begin; a checkpoint may hold an optimizer's state too."""


def write_weights(
    folder: Path,
    architecture: Architecture,
    padded_vocab_size: int,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
) -> None:
    """Write every parameter into an existing folder.

    Args:
        dtypes: of each parameter, by its Megatron-Core name.
        read: gives a parameter by its name, of the type of `dtypes`, as one rank alone holds it. Called once for each,
            in the model's order.

    Raises:
        OSError: it cannot be written.
    """
    items: dict[str, list[WriteItem]] = {}
    objects: dict[MetadataIndex, bytes] = {}
    for name, entry in _sharded_parameters(architecture, padded_vocab_size):
        if isinstance(entry, ShardedObject):
            content = io.BytesIO()
            torch.save([entry.data], content)
            objects[MetadataIndex(entry.unique_key)] = content.getvalue()
            continue
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        items[name] = [_write_item(piece, dtypes[name]) for piece in pieces]
    byte_items = [WriteItem(index, WriteItemType.BYTE_IO) for index in objects]
    _, metadata = create_default_global_save_plan([SavePlan([*byte_items, *chain(*items.values())])])
    results = []
    with (folder / _FILE).open("wb") as stream:

        def record(item: WriteItem, first: int) -> None:
            length = stream.tell() - first
            results.append(WriteResult(item.index, length, _StorageInfo(_FILE, first, length)))

        for item in byte_items:
            first = stream.tell()
            stream.write(objects[item.index])
            record(item, first)
        assert items.keys() == dtypes.keys()
        for name in dtypes:
            whole, row = read(name), 0
            for item in items[name]:
                assert item.tensor_data is not None
                sizes = item.tensor_data.chunk.sizes
                rows = sizes[len(sizes) - whole.dim()]
                piece = whole[row : row + rows]
                first, row = stream.tell(), row + rows
                # torch.save writes the whole storage that a view is of
                torch.save((piece.clone() if rows < len(whole) else piece).reshape(sizes), stream)
                record(item, first)
            assert row == len(whole), name
    FileSystemWriter(folder).finish(metadata, [results])
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _sharded_parameters(architecture: Architecture, padded_vocab_size: int) -> Iterator[tuple[str, Any]]:
    """Megatron-Core's description of each parameter, by name, and of the empty objects it wants beside them."""
    config = Config(training=TrainingConfig(precision="fp32", transformer_impl="local"))
    with fake_world(config, 1, 0) as layout, on_meta():
        transformer = transformer_config(architecture, config.training, layout, {}, "model")
        model = build_language_model(architecture, transformer, layout, "local", padded_vocab_size)
        yield from model.sharded_state_dict().items()


def _write_item(piece: Any, dtype: torch.dtype) -> WriteItem:
    """piece: a ShardedTensor. Its axes in the checkpoint may be one more than its own: layers are stacked there."""
    offsets, sizes = torch.Size(piece.global_offset), tuple(piece.local_shape)
    sizes = torch.Size((1,) * (len(offsets) - len(sizes)) + sizes)
    return WriteItem(
        MetadataIndex(piece.key, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(piece.global_shape),
        ),
    )


class MegatronWeights:
    """The parameters of a `torch_dist` folder.

    Runs no code that the folder's list of tensors may name. Raises InputError, from any method, for what is wrong with
    the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        with self._damage(f"{folder / '.metadata'}: is damaged"):
            try:
                metadata = read_list_of_tensors(folder)
            except FileNotFoundError as error:
                raise InputError(
                    f"{folder}: has no .metadata, so it is no checkpoint in Megatron-Core's torch_dist format; give a "
                    "folder that holds one"
                ) from error
            places = {(piece.relative_path, piece.offset) for piece in metadata.storage_data.values()}
            if len(places) < len(metadata.storage_data):
                raise ValueError("two tensors have one place")
            self._reader.set_up_storage_reader(metadata, True)
            self._tensors = {
                key: tensor
                for key, tensor in metadata.state_dict_metadata.items()
                if isinstance(tensor, TensorStorageMetadata)
            }

    def check(self, weights: Mapping[str, Weight]) -> None:
        """Raise unless the checkpoint holds the parameters of `weights`, and no others, in their shapes."""
        with self._damage(f"{self.folder / '.metadata'}: is damaged"):
            self._check(weights)

    def _check(self, weights: Mapping[str, Weight]) -> None:
        known = set()
        for name, weight in weights.items():
            key, layer = self._find(name)
            known.add(key)
            size = tuple(self._tensors[key].size)
            if layer is not None:
                stack = name.partition("layers.")[0]
                layers = len({other.split(".")[2] for other in weights if other.startswith(f"{stack}layers.")})
                if size[0] != layers:
                    raise InputError(f"{self.folder}: holds {size[0]} layers, but config.json says {layers}")
            found = size[layer is not None :]
            rows = sum(part.rows for part in weight.parts)
            wanted = (rows,) if weight.columns is None else (rows, weight.columns)
            is_padded = weight.split == "vocabulary" and found[1:] == wanted[1:] and found[0] >= rows
            if found != wanted and not is_padded:
                raise InputError(
                    f"{self.folder}: parameter {name} has shape {list(found)}, but config.json makes it {list(wanted)}"
                )
            dtype = self._tensors[key].properties.dtype
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise InputError(f"{self.folder}: parameter {name} is of type {dtype}; save the model in bf16")
        strangers = [key for key in self._tensors if key.startswith(_MODEL) and key not in known]
        if strangers:
            more = f" and {len(strangers) - 3} others" if len(strangers) > 3 else ""
            raise InputError(
                f"{self.folder}: holds {', '.join(strangers[:3])}{more}, for which config.json has no place; one of "
                "the two is of another model"
            )

    def dtype(self, name: str) -> torch.dtype:
        """Type of the parameter `name`."""
        return self._tensors[self._find(name)[0]].properties.dtype

    def read(self, name: str, weight: Weight) -> Tensor:
        """The whole parameter, [rows, columns] or [rows], without padding of the vocabulary."""
        with self._damage(f"{self.folder}: {name} cannot be read, a .distcp file is missing or damaged"):
            return self._read(name, weight)

    def _read(self, name: str, weight: Weight) -> Tensor:
        key, layer = self._find(name)
        rows = sum(part.rows for part in weight.parts)
        first = () if layer is None else (layer,)
        shape = (*((1,) if first else ()), rows, *(() if weight.columns is None else (weight.columns,)))
        start = (*first, *(0,) * (len(shape) - len(first)))
        target = torch.empty(shape, dtype=self.dtype(name))
        reads = []
        for chunk in self._tensors[key].chunks:
            begin = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            end = [min(a + n, b + m) for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)]
            lengths = torch.Size(max(0, stop - go) for go, stop in zip(begin, end, strict=True))
            if lengths.numel():
                reads.append(
                    ReadItem(
                        type=LoadItemType.TENSOR,
                        dest_index=MetadataIndex(key),
                        dest_offsets=torch.Size(a - b for a, b in zip(begin, start, strict=True)),
                        storage_index=MetadataIndex(key, chunk.offsets),
                        storage_offsets=torch.Size(a - b for a, b in zip(begin, chunk.offsets, strict=True)),
                        lengths=lengths,
                    )
                )
        if sum(read.lengths.numel() for read in reads) != target.numel():
            raise InputError(f"{self.folder}: holds only parts of {name}; copy it again")
        for read in reads:
            self._check_piece(read.storage_index)
        self._reader.read_data(LoadPlan(reads), _Into(target))
        return target if layer is None else target[0]

    def _check_piece(self, index: MetadataIndex) -> None:
        piece = self._reader.storage_data[index]
        file = self.folder / piece.relative_path
        with file.open("rb") as stream:
            if not piece_intact(stream, piece):
                raise ValueError(f"the checksums in {file.name} are others")

    @contextlib.contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """One line for whatever a damaged file makes torch and pickle raise."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{what} ({first_line(error)}); copy it again") from error

    def _find(self, name: str) -> tuple[str, int | None]:
        """A parameter's key, and its place on the axis of stacked layers where there is one."""
        names = [name, *(name.replace(plain, fused) for fused, plain in FUSED_NORMS.items() if plain in name)]
        for candidate in names:
            if candidate in self._tensors:
                return candidate, None
            head, _, rest = candidate.partition(".layers.")
            number, _, rest = rest.partition(".")
            if f"{head}.layers.{rest}" in self._tensors:
                return f"{head}.layers.{rest}", int(number)
        raise InputError(f"{self.folder}: has no parameter {name}; it is incomplete or not of this config.json")


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target
