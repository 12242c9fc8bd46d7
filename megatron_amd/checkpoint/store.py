"""A run's own checkpoints: everything that a bit-exact continuation needs.

A checkpoint is a folder that appears complete or not at all (docs/checkpoints.md shows what is in it). Each trained
role has a sub-folder in Megatron-Core's `torch_dist` format, optimizer state in its `fully_reshardable` form.

`dist_checkpointing.save` itself is not used: its first rank writes files between collectives, so that a full disk
there leaves the other ranks waiting, and it starts helper processes. The same files are written here with the same
planner by torch's own writer, in this process, and every failure reaches every rank.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from megatron_amd import __version__
from megatron_amd.data.hub import first_line
from megatron_amd.distributed.initialize import agreed
from megatron_amd.distributed.layout import Layout

# isort: split
import megatron.core
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

from megatron_amd.errors import InputError

STATE_FILE = "state.json"
FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""

_TENSORS = ".distcp"
"""Suffix of the large files, which torch writes."""

_NAME = re.compile(r"(?P<replaced>\.replaced-)?step-(?P<step>\d{8,})")
_ADVICE = "restore it from a copy, or remove this checkpoint to use an earlier one"
_CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class Trained(Protocol):
    """What a role's training consists of, such as training.optimizer.Optimization."""

    model: Any
    optimizer: Any
    scheduler: Any


@dataclass(frozen=True)
class RoleState:
    """One trained role on this rank."""

    model: torch.nn.Module
    """The model, wrapped in DistributedDataParallel or not."""
    optimizer: Any
    """Megatron-Core's distributed optimizer."""
    scheduler: Any
    """Megatron-Core's OptimizerParamScheduler."""
    layout: Layout
    """The role's own layout."""

    @staticmethod
    def of(trained: Trained | None, layout: Layout) -> RoleState | None:
        """The state of a role; None on a rank that holds no part of it."""
        if trained is None:
            return None
        return RoleState(trained.model, trained.optimizer, trained.scheduler, layout)


def save(
    directory: str | Path,
    *,
    step: int,
    roles: Mapping[str, RoleState | None],
    state: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and delete all but the `keep` newest. Collective over all ranks.

    Until the new checkpoint is complete the earlier ones are untouched, whatever happens; remains of saves that were
    killed are removed first.

    Args:
        directory: the run's checkpoints/, one folder for all ranks, used by one run at a time.
        roles: the same names on all ranks; None where a rank holds no part of a role.
        state: what all ranks share, as JSON allows it.
        fingerprint: what must be equal for a checkpoint to fit a model, as JSON allows it.
        rank_state: this rank's own: tensors, numbers, strings, and lists, tuples and dicts of them.

    Returns:
        The checkpoint's folder, `directory`/step-<8 digits>.

    Raises:
        InputError: on all ranks, when any of them cannot write (a full disk, no permission).
    """
    directory = Path(directory)
    rank = dist.get_rank()
    partial = directory / f".tmp-step-{step:08d}"
    try:
        with agreed(), _writing(directory):
            if rank == 0:
                _begin(directory, partial)
        with agreed(), _writing(directory):
            if not partial.is_dir():
                raise InputError(f"{directory}: is not the same folder on all ranks; put it where all nodes see it")
            _write(partial / f"rank_{rank:05d}.pt", _pickled(dict(rank_state)))
        layouts = _share_layouts(roles)
        for name, role in roles.items():
            _save_role(partial / name, role, writes_common=rank == layouts[name][0])
        with agreed(), _writing(directory):
            if rank == 0:
                document = {
                    "format": FORMAT,
                    "step": step,
                    "versions": _versions(),
                    "roles": {name: sizes for name, (_, sizes) in layouts.items()},
                    "fingerprint": dict(fingerprint),
                    **state,
                    "files": _describe_files(partial),
                }
                _write(partial / STATE_FILE, (json.dumps(document, indent=1) + "\n").encode())
                path = _publish(directory, partial)
                _prune(directory, path, keep)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory / f"step-{step:08d}"


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
    kinds = {"format": int, "step": int, "roles": dict, "fingerprint": dict, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise InputError(f"{file}: is damaged (it has no {key}); {_ADVICE}")
    if state["format"] > FORMAT:
        raise InputError(f"{file}: was written by a newer megatron_amd, in format {state['format']}; update this one")
    return state


def load(
    path: str | Path, roles: Mapping[str, RoleState | None], *, fingerprint: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bring models, optimizers and schedules to where they were saved, bit for bit. Collective over all ranks.

    Trust: unpickles files of the folder. Load only checkpoints of one's own.

    Args:
        roles: as for `save`; the checkpoint may hold more.
        fingerprint: compared with the saved one.

    Returns:
        What `read_state` returns, and this rank's `rank_state`.

    Raises:
        InputError: on all ranks: not a checkpoint, a damaged file, another model, another layout, a missing role.
    """
    path = Path(path)
    rank = dist.get_rank()
    with agreed():
        state = read_state(path)
        _check_fit(path, state, roles, fingerprint)
        _check_files(path, state["files"])
        rank_state = torch.load(path / f"rank_{rank:05d}.pt", map_location="cpu", weights_only=True)
    for name, role in roles.items():
        _load_role(path / name, role)
    return state, rank_state


def load_weights(path: str | Path, role: str, model: torch.nn.Module, layout: Layout) -> None:
    """Fill a model of any layout with a role's weights, without its optimizer. Collective. As `load` otherwise."""
    path = Path(path)
    with agreed():
        state = read_state(path)
        _check_role(path, state, role)
        _check_files(path, {name: kept for name, kept in state["files"].items() if name.startswith(f"{role}/")})
    stage = _unwrapped(model)
    content = {**_CONTENT, "dp_cp_group": layout.groups.dp_cp}
    loaded = _read({"model": stage.sharded_state_dict(metadata=content)}, path / role)
    stage.load_state_dict(loaded["model"])


# Saving


def _begin(directory: Path, partial: Path) -> None:
    """An empty folder to write into, and room: what earlier saves left behind goes."""
    directory.mkdir(parents=True, exist_ok=True)
    for remains in directory.glob(".tmp-*"):
        shutil.rmtree(remains)
    partial.mkdir()


def _share_layouts(roles: Mapping[str, RoleState | None]) -> dict[str, tuple[int, dict[str, int]]]:
    """(first rank that holds it, layout sizes) of each role, on all ranks."""
    own = {name: None if role is None else _layout_sizes(role.layout) for name, role in roles.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {
        name: next((rank, sizes[name]) for rank, sizes in enumerate(everyone) if sizes[name] is not None)
        for name in own
    }


def _layout_sizes(layout: Layout) -> dict[str, int]:
    return {"tensor": layout.tp_size, "pipeline": layout.pp_size, "data": layout.dp_size}


def _save_role(folder: Path, role: RoleState | None, *, writes_common: bool) -> None:
    """`dist_checkpointing.save`, every failure of which reaches all ranks. A rank without the role has no tensors."""
    with agreed(), _writing(folder.parent.parent):
        folder.mkdir(exist_ok=True)
    # Whether the shards cover each tensor exactly once is checked by torch's global plan.
    sharded, common = save_preprocess(_state_dict(role) if role else {}, validate_access_integrity=False)
    with agreed(), _writing(folder.parent.parent):
        if writes_common:
            _write(folder / "common.pt", _pickled(common))
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    with _writing(folder.parent.parent), _quiet():
        torch_checkpoint.save(mcore_to_pyt_state_dict(by_key), storage_writer=FileSystemWriter(folder), planner=planner)


def _state_dict(role: RoleState, *, is_loading: bool = False) -> dict[str, Any]:
    """The role for `dist_checkpointing`, under the names that Megatron-LM uses."""
    _fill_optimizer_state(role.optimizer)
    content = {**_CONTENT, "dp_cp_group": role.layout.groups.dp_cp}
    weights = _unwrapped(role.model).sharded_state_dict(metadata=content)
    return {
        "model": weights,
        "optimizer": role.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=content),
        "opt_param_scheduler": role.scheduler.state_dict(),
        "content_metadata": dict(_CONTENT),
    }


def _fill_optimizer_state(optimizer: Any) -> None:
    """Moments of an optimizer that has not stepped yet, as its first step would make them."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _publish(directory: Path, partial: Path) -> Path:
    """Give the complete folder its name. Where one of that name exists, there is always one of the two."""
    path = directory / partial.name.removeprefix(".tmp-")
    for folder in (partial, *filter(Path.is_dir, partial.iterdir())):
        _sync(folder)
    if path.exists():
        replaced = directory / f".replaced-{path.name}"
        _remove(replaced)
        path.rename(replaced)
    partial.rename(path)
    _sync(directory)
    return path


def _prune(directory: Path, newest: Path, keep: int) -> None:
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


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()  # torch.save to a path reports a full disk as a RuntimeError
    torch.save(value, buffer)
    return buffer.getvalue()


def _describe_files(folder: Path) -> dict[str, dict[str, int]]:
    """Size of each file, and a checksum of the small ones; torch keeps checksums inside the large ones."""
    described = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        description = {"size": file.stat().st_size}
        if file.suffix != _TENSORS:
            description["crc32"] = zlib.crc32(file.read_bytes())
        described[file.relative_to(folder).as_posix()] = description
    return described


def _versions() -> dict[str, str]:
    return {
        "megatron_amd": __version__,
        "megatron_core": megatron.core.__version__,
        "torch": str(torch.__version__),
    }


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses into an InputError, also from inside torch's writer."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = _file_system_reason(error)
        if reason is None:
            raise
        raise InputError(
            f"{directory}: the checkpoint cannot be written: {reason}; earlier ones are intact; mend it and resume"
        ) from error


def _file_system_reason(error: BaseException) -> str | None:
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    # torch's archive writer notices first that fewer bytes arrived than it wrote, and the OSError is lost.
    if any(isinstance(cause, RuntimeError) and "inline_container" in str(cause) for cause in causes):
        return "a file was cut short (is the disk full?)"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and in torch's collective exception those of the ranks that failed."""
    yield error
    if isinstance(error, CheckpointException):
        for _, (inner, _) in sorted(error.failures.items()):
            yield from _causes(inner)
    following = error.__cause__ or error.__context__
    if following is not None:
        yield from _causes(following)


# Loading


def _check_fit(
    path: Path, state: dict[str, Any], roles: Mapping[str, RoleState | None], fingerprint: Mapping[str, Any]
) -> None:
    for name in roles:
        _check_role(path, state, name)
    differences = list(_differences(state["fingerprint"], json.loads(json.dumps(fingerprint)), ""))
    if differences:
        raise InputError(f"{path}: is of another model: {', '.join(differences[:5])}; choose another run.directory")
    for name, role in roles.items():
        if role is not None and state["roles"][name] != _layout_sizes(role.layout):
            saved, here = (
                " x ".join(f"{key} {size}" for key, size in sizes.items())
                for sizes in (state["roles"][name], _layout_sizes(role.layout))
            )
            raise InputError(f"{path}: was saved at {saved} ranks and cannot go on at {here}; use the saved layout")


def _check_role(path: Path, state: dict[str, Any], role: str) -> None:
    if role not in state["roles"]:
        raise InputError(f"{path}: holds no {role}, only {', '.join(state['roles'])}; resume with the settings it has")


def _differences(saved: Any, expected: Any, where: str) -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(expected, dict):
        for key in sorted(saved.keys() | expected.keys()):
            yield from _differences(saved.get(key), expected.get(key), f"{where}.{key}" if where else key)
    elif saved != expected:
        yield f"{where} is {saved}, here {expected}"


def _check_files(path: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Raise InputError unless every file is as it was written. The ranks share the reading; call it in `agreed()`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, saved in files.items():  # first, since the other check reads one file to understand another
        file = path / name
        if not file.is_file():
            raise InputError(f"{file}: is missing; {_ADVICE}")
        size = file.stat().st_size
        if size != saved["size"]:
            raise InputError(f"{file}: is damaged ({size} bytes instead of {saved['size']}); {_ADVICE}")
        if "crc32" in saved and zlib.crc32(file.read_bytes()) != saved["crc32"]:
            raise InputError(f"{file}: is damaged; {_ADVICE}")
    for name in sorted(name for name in files if name.endswith(_TENSORS))[rank::ranks]:
        if not _tensors_intact(path / name):
            raise InputError(f"{path / name}: is damaged; {_ADVICE}")


def _tensors_intact(file: Path) -> bool:
    """Whether a file of tensors is as torch wrote it: one zip archive per tensor, with checksums torch never reads."""
    stored = FileSystemReader(file.parent).read_metadata().storage_data.values()
    with file.open("rb") as stream:
        for piece in stored:
            if piece.relative_path != file.name:
                continue
            stream.seek(piece.offset)
            try:
                with zipfile.ZipFile(io.BytesIO(stream.read(piece.length))) as archive:
                    if archive.testzip() is not None:
                        return False
            except zipfile.BadZipFile:
                return False
    return True


def _load_role(folder: Path, role: RoleState | None) -> None:
    loaded = _read(_state_dict(role, is_loading=True) if role else {}, folder)
    if role is None:
        return
    _unwrapped(role.model).load_state_dict(loaded["model"])
    parts = _parts(role.optimizer)
    states = [loaded["optimizer"]] if len(parts) == 1 else [loaded["optimizer"][index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        _load_optimizer(part, state)
    role.scheduler.num_steps = 0  # loading adds the saved steps
    role.scheduler.load_state_dict(loaded["opt_param_scheduler"])


def _read(sharded_state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`dist_checkpointing.load`. Torch brings a rank's failure to all ranks."""
    try:
        with _quiet():
            return dist_checkpointing.load(sharded_state_dict, str(folder), validate_access_integrity=False)
    except CheckpointException as error:
        *_, cause = _causes(error)
        raise InputError(f"{folder}: does not fit this run: {first_line(cause)}") from error


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore one distributed optimizer.

    Megatron-Core gives all parameters one tensor as their step count, which every parameter's update would then
    advance, and its reader of the moments expects no step count among them.
    """
    state = dict(state)
    moments = state.pop("param_state")
    optimizer.load_state_dict(state)
    states = list(optimizer.optimizer.state.values())
    steps = [state.pop("step", None) for state in states]
    optimizer.load_parameter_state_from_fully_reshardable(moments)
    for state, step in zip(states, steps, strict=True):
        if step is not None:
            state["step"] = step.clone()


# Both


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        # A replaced one counts while its successor has not taken its name; it sorts first.
        if match and path.is_dir():
            found[int(match["step"])] = path
    return [found[step] for step in sorted(found)]


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers inside a ChainedOptimizer."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _unwrapped(model: Any) -> Any:
    """The model inside Megatron-Core's DistributedDataParallel, or itself."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings about their own deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
