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
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from megatron_amd import __version__
from megatron_amd.checkpoint.folder import (
    FORMAT,
    STATE_FILE,
    begin,
    check_files,
    describe_files,
    latest,
    prune,
    publish,
    read_state,
    write,
)
from megatron_amd.checkpoint.hf_tensors import unwrap
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

from megatron_amd.errors import InputError, first_line

__all__ = ["STATE_FILE", "RoleState", "check_role", "latest", "load", "load_weights", "read_state", "save"]

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
                begin(directory, partial)
        with agreed(), _writing(directory):
            if not partial.is_dir():
                raise InputError(f"{directory}: is not the same folder on all ranks; put it where all nodes see it")
            write(partial / f"rank_{rank:05d}.pt", _pickled(dict(rank_state)))
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
                    "files": describe_files(partial),
                }
                write(partial / STATE_FILE, (json.dumps(document, indent=1) + "\n").encode())
                path = publish(directory, partial)
                prune(directory, path, keep)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory / f"step-{step:08d}"


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
        check_fit(path, state, {name: role.layout if role else None for name, role in roles.items()}, fingerprint)
        check_files(path, state["files"])
        rank_state = torch.load(path / f"rank_{rank:05d}.pt", map_location="cpu", weights_only=True)
    for name, role in roles.items():
        _load_role(path / name, role)
    return state, rank_state


def load_weights(path: str | Path, role: str, model: torch.nn.Module, layout: Layout) -> None:
    """Fill a model of any layout with a role's weights, without its optimizer. Collective. As `load` otherwise."""
    path = Path(path)
    with agreed():
        check_role(path, role)
    stage = unwrap(model)
    content = {**_CONTENT, "dp_cp_group": layout.groups.dp_cp}
    loaded = _read({"model": stage.sharded_state_dict(metadata=content)}, path / role)
    stage.load_state_dict(loaded["model"])


def check_role(path: Path, role: str) -> None:
    """Raise InputError unless a checkpoint holds the role and its files are as they were written."""
    state = read_state(path)
    _check_role(path, state, role)
    check_files(path, {name: kept for name, kept in state["files"].items() if name.startswith(f"{role}/")})


# Saving


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
            write(folder / "common.pt", _pickled(common))
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    with _writing(folder.parent.parent), _quiet():
        torch_checkpoint.save(mcore_to_pyt_state_dict(by_key), storage_writer=FileSystemWriter(folder), planner=planner)


def _state_dict(role: RoleState, *, is_loading: bool = False) -> dict[str, Any]:
    """The role for `dist_checkpointing`, under the names that Megatron-LM uses."""
    _fill_optimizer_state(role.optimizer)
    content = {**_CONTENT, "dp_cp_group": role.layout.groups.dp_cp}
    weights = unwrap(role.model).sharded_state_dict(metadata=content)
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


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()  # torch.save to a path reports a full disk as a RuntimeError
    torch.save(value, buffer)
    return buffer.getvalue()


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


def check_fit(
    path: Path, state: dict[str, Any], layouts: Mapping[str, Layout | None], fingerprint: Mapping[str, Any]
) -> None:
    """Raise InputError unless a checkpoint's roles, model and layout are this run's. Reads no tensors.

    Args:
        path: the checkpoint.
        state: its `read_state`.
        layouts: the roles that must be there, each with its layout now; None where this rank has no part of it.
        fingerprint: as for `load`.
    """
    for name in layouts:
        _check_role(path, state, name)
    found = [f"{name} is {saved}, here {here}" for name, saved, here in differences(state["fingerprint"], fingerprint)]
    if found:
        raise InputError(f"{path}: does not fit this run: {', '.join(found[:5])}; choose another run.directory")
    for name, layout in layouts.items():
        if layout is not None and state["roles"][name] != _layout_sizes(layout):
            saved, here = (
                " x ".join(f"{key} {size}" for key, size in sizes.items())
                for sizes in (state["roles"][name], _layout_sizes(layout))
            )
            raise InputError(f"{path}: was saved at {saved} ranks and cannot go on at {here}; use the saved layout")


def _check_role(path: Path, state: dict[str, Any], role: str) -> None:
    if role not in state["roles"]:
        raise InputError(f"{path}: holds no {role}, only {', '.join(state['roles'])}; resume with the settings it has")


def differences(saved: Any, here: Any) -> list[tuple[str, Any, Any]]:
    """Where two trees of JSON values differ: dotted name, the saved value, the value here (None: absent).

    `here` may hold tuples, as `saved` did before it was written.
    """

    def walk(saved: Any, here: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(saved, dict) and isinstance(here, dict):
            for key in sorted(saved.keys() | here.keys()):
                yield from walk(saved.get(key), here.get(key), f"{where}.{key}" if where else key)
        elif saved != here:
            yield where, saved, here

    return list(walk(saved, json.loads(json.dumps(here)), ""))


def _load_role(folder: Path, role: RoleState | None) -> None:
    loaded = _read(_state_dict(role, is_loading=True) if role else {}, folder)
    if role is None:
        return
    unwrap(role.model).load_state_dict(loaded["model"])
    parts = _parts(role.optimizer)
    states = [loaded["optimizer"]] if len(parts) == 1 else [loaded["optimizer"][index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        own = [{name: value for name, value in group.items() if name != "params"} for group in part.param_groups]
        _load_optimizer(part, state)
        # Rates, betas and decay are this run's settings; only the place in the schedule is the checkpoint's.
        for group, settings in zip(part.param_groups, own, strict=True):
            group.update({name: value for name, value in settings.items() if name != "step"})
    role.scheduler.num_steps = 0
    role.scheduler.step(loaded["opt_param_scheduler"]["num_steps"])


def _read(sharded_state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`dist_checkpointing.load`. Torch brings a rank's failure to all ranks."""
    try:
        with _quiet():
            return dist_checkpointing.load(sharded_state_dict, str(folder), validate_access_integrity=False)
    except CheckpointException as error:
        *_, cause = _causes(error)
        raise InputError(f"{folder}: does not fit this run: {first_line(cause)}") from error


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore one optimizer.

    Megatron-Core gives all parameters one tensor as their step count, which every parameter's update would then
    advance, and its reader of the moments expects no step count among them.
    """
    state = dict(state)
    moments = state.pop("param_state", None)  # absent without training.ddp's use_distributed_optimizer
    if moments is None and isinstance(optimizer.optimizer, torch.optim.Adam):
        state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))  # not saved where it is 0
    optimizer.load_state_dict(state)
    states = list(optimizer.optimizer.state.values())
    steps = [state.pop("step", None) for state in states]
    if moments is not None:
        optimizer.load_parameter_state_from_fully_reshardable(moments)
    for state, step in zip(states, steps, strict=True):
        if step is not None:
            state["step"] = step.clone()


# Both


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers inside a ChainedOptimizer."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings about their own deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
