"""Weights from and to Hugging Face folders, and the conversion of whole folders.

Both directions follow the one description in hf_tensors.py. A rank reads only its own slices of each tensor; an
export gathers the tensors one by one onto the rank that writes. A conversion holds one parameter at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_amd.checkpoint.hf_files import (
    CARRIED,
    CONVERSION_MARK,
    FolderWriter,
    WeightFiles,
    cannot_write,
    check_conversion_folder,
    check_export_folder,
    copy_carried,
    partial_folder,
    publish,
)
from megatron_amd.checkpoint.hf_tensors import (
    Part,
    Weight,
    family_of,
    join_shards,
    model_weights,
    stage_parameters,
    unwrap,
)
from megatron_amd.checkpoint.mcore import MegatronWeights, write_weights
from megatron_amd.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from megatron_amd.distributed.initialize import agreed
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import Architecture, folder_architecture
from megatron_amd.models.hf_config import FAMILIES

__all__ = [
    "MAX_SHARD_BYTES", "check_export_folder", "check_hf_weights", "export_hf", "hf_to_mcore", "load_hf_weights",
    "mcore_to_hf", "read_head",
]  # fmt: skip

MAX_SHARD_BYTES = 4 * 2**30
"""Size at which an export begins another file."""
_PIECE = 2**20
"""Numbers that are looked at in one piece."""


def hf_to_mcore(
    source: str, folder: Path, *, dtype: torch.dtype | None = None, vocabulary_multiple: int = 128
) -> Architecture:
    """Write a Hugging Face model as a Megatron-Core checkpoint, with what is needed to turn it back beside it.

    Holds one parameter at a time. The folder appears complete or not at all; an earlier conversion in its place is
    replaced.

    Args:
        source: folder or hub name.
        dtype: of the weights written; None keeps each tensor's own.
        vocabulary_multiple: rows of embedding and head are padded with zeros to a multiple of this.

    Raises:
        InputError: whatever is wrong with the folder, or it cannot be written.
    """
    folder = folder.resolve()  # a link stays one
    check_conversion_folder(folder)
    if (Path(source) / ".metadata").is_file():
        raise InputError(f"source: {source} is a Megatron-Core checkpoint; tools/convert_mcore_to_hf.py turns it back")
    if folder.is_relative_to(Path(source).expanduser().resolve()):
        raise InputError(f"{folder}: lies in the model's own folder; choose another folder")
    architecture = folder_architecture(source, "source")
    weights = _own_weights(architecture)
    with WeightFiles(source, "source", also=CARRIED) as files:
        files.check(weights, family_of(architecture), is_cut=False)
        check_tokenizer(files.folder, architecture.vocab_size)
        padded_vocab_size = -(-architecture.vocab_size // vocabulary_multiple) * vocabulary_multiple
        dtypes = {name: dtype or _folder_dtype(files, weight) for name, weight in weights.items()}

        def read(name: str) -> Tensor:
            weight = weights[name]
            rows = padded_vocab_size if weight.split == "vocabulary" else sum(part.rows for part in weight.parts)
            parameter = _read_shard(files, weight, 0, 1, rows)
            files.release()
            _check_shard(files, parameter, weight, architecture, 0, 1)
            bar.update(parameter.numel() * dtypes[name].itemsize)
            return _convert(parameter, dtypes[name], name)

        partial = partial_folder(folder)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with _progress(weights, dtypes) as bar:
                write_weights(partial, architecture, padded_vocab_size, dtypes, read)
            _write_config(partial, architecture, next(iter(dtypes.values())))
            copy_carried(files.folder, partial)
            (partial / CONVERSION_MARK).touch()
            publish(partial, folder, check_conversion_folder)
        except OSError as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return architecture


def mcore_to_hf(
    checkpoint: Path,
    folder: Path,
    architecture: Architecture,
    copy_others: Callable[[Path], None],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Megatron-Core checkpoint of any layout as a Hugging Face folder that `transformers` loads.

    Holds one parameter at a time. The folder appears complete or not at all; an earlier export in its place is
    replaced. No code that the checkpoint may name is run.

    Args:
        checkpoint: folder in `torch_dist` format that holds a model's parameters.
        copy_others: called with the folder to put tokenizer files in.
        dtype: of the weights written; None keeps each parameter's own.

    Raises:
        InputError: the checkpoint is damaged or of another model, or the folder cannot be written.
    """
    check_export_folder(folder)
    megatron = MegatronWeights(checkpoint)
    weights = _own_weights(architecture)
    megatron.check(weights)
    dtypes = {name: dtype or megatron.dtype(name) for name in weights}
    writer = FolderWriter(folder, _tensors_of(weights, dtypes), max_shard_bytes)
    try:
        with _progress(weights, dtypes) as bar:
            for name, weight in weights.items():
                parameter = megatron.read(name, weight)
                if not is_finite(parameter):
                    raise InputError(f"{checkpoint}: parameter {name} holds NaN or infinite numbers; use another one")
                for tensor_name, tensor in join_shards([parameter], weight).items():
                    writer.add(tensor_name, _convert(tensor, dtypes[name], tensor_name))
                writer.check()
                bar.update(parameter.numel() * dtypes[name].itemsize)

        def write_others(partial: Path) -> None:
            _write_config(partial, architecture, next(iter(dtypes.values())))
            copy_others(partial)

        writer.finish(write_others)
    except BaseException:
        writer.abandon()
        raise


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise InputError where the folder's tokenizer cannot be read or has more tokens than the embedding rows."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    try:
        tokens = load_tokenizer(str(folder)).vocab_size
    except InputError as error:
        text = str(error).removeprefix("data.tokenizer: ")
        advice = "" if ";" in text else "; download or copy the tokenizer's files again, or remove them"
        raise InputError(f"{text}{advice}") from error
    if tokens > vocab_size:
        raise InputError(
            f"{folder}: its tokenizer has {tokens} tokens, but the embedding only {vocab_size} rows (vocab_size in "
            "config.json); the tokenizer files are another model's"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite. By sums, which are finite where all numbers of real weights are; in
    pieces, since a sum of bf16 makes a copy in fp32."""
    for piece in tensor.split(max(1, _PIECE // max(1, tensor[0].numel()))):
        if not piece.sum(dtype=torch.float32).isfinite() and not piece.isfinite().all():
            return False
    return True


def _convert(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    converted = tensor.to(dtype)
    if converted is not tensor and not is_finite(converted):
        raise InputError(f"{name}: holds numbers that are too large for {dtype}; convert to bf16, or keep the type")
    return converted


def _own_weights(architecture: Architecture) -> dict[str, Weight]:
    """The parameters of the whole model, a tied one once."""
    weights = model_weights(architecture)
    if architecture.tied:
        del weights["output_layer.weight"]
    return weights


def _tensors_of(
    weights: Mapping[str, Weight], dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of the folder's tensors, in order."""
    return {
        tensor: (shape, dtypes[name])
        for name, weight in weights.items()
        for tensor, shape in weight.tensor_shapes().items()
    }


def _folder_dtype(files: WeightFiles, weight: Weight) -> torch.dtype:
    """The type that holds every number of a parameter's tensors."""
    dtypes = [files.dtype(name, shape) for name, shape in weight.tensor_shapes().items()]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _progress(weights: Mapping[str, Weight], dtypes: Mapping[str, torch.dtype]) -> tqdm:
    """A bar of bytes on the terminal; none where stderr is not one."""
    numbers = {
        name: sum(part.rows for part in weight.parts) * (weight.columns or 1) for name, weight in weights.items()
    }
    total = sum(count * dtypes[name].itemsize for name, count in numbers.items())
    return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None)


def load_hf_weights(
    model: torch.nn.Module,
    source: str | Path,
    architecture: Architecture,
    *,
    layers: tuple[int, ...] | None = None,
    where: str = "path",
) -> None:
    """Fill the parameters of one pipeline stage of a model from a folder or hub name.

    Args:
        model: the stage, wrapped or not. Padding rows of the vocabulary become zero. A critic's second head gets the
            LM head as its first does.
        architecture: of `model`, so after a cut.
        layers: layers of the folder that a cut model keeps, in order.
        where: the setting that names `source`, for errors.

    Each rank reads on its own: wrap the call in `agreed()` where an error must reach all ranks.

    Raises:
        InputError: no safetensors, a truncated or corrupt file, a missing tensor, one too many, one of another shape,
            or numbers that are not finite (among those that this rank reads).
    """
    weights = model_weights(architecture, layers)
    tp_group = unwrap(model).pg_collection.tp
    with WeightFiles(source, where) as files, torch.no_grad():
        files.check(weights, family_of(architecture), is_cut=layers is not None)
        for name, parameter in stage_parameters(model).items():
            if name.startswith("output_layer"):
                name = "output_layer.weight"
            if name not in weights:
                raise ValueError(f"parameter {name} has no counterpart in the family {architecture.family}")
            weight, rank, size = weights[name], tp_group.rank(), tp_group.size()
            shard = _read_shard(files, weight, rank, size, parameter.shape[0])
            if shard.shape != parameter.shape:
                raise ValueError(f"parameter {name} is {list(parameter.shape)}, its tensors make {list(shard.shape)}")
            _check_shard(files, shard, weight, architecture, rank, size)
            parameter.copy_(shard)


def check_hf_weights(
    source: str | Path, architecture: Architecture, *, layers: tuple[int, ...] | None = None, where: str = "path"
) -> None:
    """Raise what `load_hf_weights` would raise for a folder or hub name, from the heads of its files alone."""
    with WeightFiles(source, where) as files:
        files.check(model_weights(architecture, layers), family_of(architecture), is_cut=layers is not None)


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
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face folder that `transformers` loads. Collective over all ranks.

    Tensors are gathered one at a time onto the first rank, which writes each as it comes.
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
        weights = _own_weights(architecture)
        writer = FolderWriter(folder, _tensors_of(weights, dict.fromkeys(weights, dtype)), max_shard_bytes)

        def write_others(partial: Path) -> None:
            _write_config(partial, architecture, dtype)
            if copy_tokenizer is not None:
                copy_tokenizer(partial)

        try:
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.finish(write_others)
        except BaseException:
            writer.abandon()
            raise


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


def _check_shard(
    files: WeightFiles,
    shard: Tensor,
    weight: Weight,
    architecture: Architecture,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Raise InputError where a parameter's shard is not finite, or the embedding differs from what must be equal to it:
    its further copies, and the head where the two are tied."""
    if not is_finite(shard):
        for part in weight.parts:
            tensor = files.read(part.tensor, weight.tensor_shapes()[part.tensor], (slice(None),))
            if not is_finite(tensor):
                raise InputError(
                    f"{files.where_is(part.tensor)} holds NaN or infinite numbers; download or copy it again"
                )
    if weight.split != "vocabulary":
        return
    family = family_of(architecture)
    (part,) = weight.parts
    others = {}
    if part.tensor == f"{family.modules['embedding.word_embeddings']}.weight":
        others = dict.fromkeys(family.copies, "; two embeddings in one model are not supported")
    if architecture.tied:
        says = ", but config.json says tie_word_embeddings: true; set it to false"
        others[f"{family.modules['output_layer']}.weight"] = says
    for name, objection in others.items():
        if name in files:
            other = _read_shard(
                files, replace(weight, parts=(replace(part, tensor=name),)), tp_rank, tp_size, len(shard)
            )
            if not torch.equal(other.to(shard.dtype), shard):
                raise InputError(f"{files.where_is(name)} differs from {part.tensor}{objection}")


def _read_part(files: WeightFiles, weight: Weight, part: Part, rows: slice, columns: slice) -> Tensor:
    shape = weight.tensor_shapes()[part.tensor]
    if weight.columns is None:
        return files.read(part.tensor, shape, (rows,))
    if weight.transposed:
        return files.read(part.tensor, shape, (columns, rows)).t()
    return files.read(part.tensor, shape, (rows, columns))


def _gather_tensors(
    model: torch.nn.Module, architecture: Architecture, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by their names in a folder, one at a time, on the first rank of data-parallel rank 0.

    Collective over that replica's ranks; the others' tensors are none of the caller's business.
    """
    weights = _own_weights(architecture)
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
                tensors = join_shards(shards, weights[name])
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


def _write_config(folder: Path, architecture: Architecture, dtype: torch.dtype) -> None:
    config = _exported_config(architecture, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _exported_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the exported model: the original's, with what has changed."""
    config = dict(architecture.hf_config)
    config.pop("auto_map", None)  # names Python files of the original folder
    config["architectures"] = [FAMILIES[architecture.family]]
    config["tie_word_embeddings"] = architecture.tied
    if architecture.family == "t5":  # a head of its own may go with the scaling
        config["scale_decoder_outputs"] = architecture.output_scale != 1.0
    # transformers 4 reads torch_dtype, 5 reads both
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return config
