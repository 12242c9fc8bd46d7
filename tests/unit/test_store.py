"""Checkpoint folders: names, retention, damage, and a death at any moment. Without models, on one rank."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.checkpoint import store
from megatron_amd.errors import InputError
from tests.distributed.runner import run_distributed

FINGERPRINT = {"student": {"hidden_size": 32, "tied": True}, "precision": "fp32"}


def save_steps(directory: Path, steps: list[int], keep: int) -> list[str]:
    """On a rank: save empty checkpoints one after the other; return the names in the folder at the end."""
    for step in steps:
        store.save(
            directory,
            step=step,
            roles={},
            state={"progress": step},
            fingerprint=FINGERPRINT,
            rank_state={"rng": torch.arange(step)},
            keep=keep,
        )
    return sorted(path.name for path in directory.iterdir())


def load(path: Path, fingerprint: dict[str, Any] = FINGERPRINT) -> tuple[int, list[int]]:
    """On a rank: (step, the tensor of the rank's state)."""
    state, rank_state = store.load(path, {}, fingerprint=fingerprint)
    return state["progress"], rank_state["rng"].tolist()


def names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert store.latest(tmp_path / "missing") is None
    assert store.latest(tmp_path) is None


def test_latest_is_the_highest_step_with_a_complete_name(tmp_path: Path) -> None:
    for name in ("step-99999999", "step-100000000", ".tmp-step-100000001", "step-100000002.bak", "step-7"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-100000003").write_text("a file")
    assert store.latest(tmp_path) == tmp_path / "step-100000000"


def test_a_replaced_checkpoint_counts_until_its_successor_has_the_name(tmp_path: Path) -> None:
    (tmp_path / ".replaced-step-00000002").mkdir()
    (tmp_path / "step-00000001").mkdir()
    assert store.latest(tmp_path) == tmp_path / ".replaced-step-00000002"
    (tmp_path / "step-00000002").mkdir()
    assert store.latest(tmp_path) == tmp_path / "step-00000002"


def test_keeps_the_newest_and_clears_what_dead_saves_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000009" / "student").mkdir(parents=True)
    assert run_distributed(save_steps, 1, tmp_path, [1, 2, 3, 4], 2) == [names(3, 4)]
    assert run_distributed(save_steps, 1, tmp_path, [4, 5], 1) == [names(5)]
    state = store.read_state(tmp_path / "step-00000005")
    assert (state["step"], state["progress"], state["fingerprint"]) == (5, 5, FINGERPRINT)
    assert state["versions"]["torch"] == torch.__version__


def test_saving_a_lower_step_never_deletes_it(tmp_path: Path) -> None:
    assert run_distributed(save_steps, 1, tmp_path, [5, 6, 2], 2) == [names(2, 6)]


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    def save_and_load() -> Any:
        save_steps(tmp_path, [3], 1)
        return load(tmp_path / "step-00000003")

    assert run_distributed(save_and_load, 1) == [(3, [0, 1, 2])]


def die_at_call(directory: Path, number: int) -> bool:
    """On a rank: save steps 1 and 2 again over 1 and 2, and die as by SIGKILL before a system call on files."""
    calls = 0

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
        setattr(os, name, mortal(getattr(os, name)))
    save_steps(directory, [2, 3], 2)
    return True


def recover(directory: Path) -> tuple[int, list[str]]:
    """On a rank, after a death: load the newest checkpoint, save another; (step loaded, names at the end)."""
    newest = store.latest(directory)
    assert newest is not None
    return load(newest)[0], save_steps(directory, [4], 3)


def test_a_death_at_any_moment_leaves_the_old_set_or_the_new(tmp_path: Path) -> None:
    """Saving 2 replaces a checkpoint of that name, saving 3 pushes 1 out; both are interrupted everywhere."""
    run_distributed(save_steps, 1, tmp_path / "whole", [1, 2], 2)
    loaded = []
    for number in range(1, 100):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", directory)
        try:
            run_distributed(die_at_call, 1, directory, number)
            break
        except AssertionError as error:
            if "died without a message" not in str(error):
                raise
        ((step, files),) = run_distributed(recover, 1, directory)
        loaded.append(step)
        assert all(name.startswith("step-") for name in files)
        assert files[-1] == "step-00000004"
    else:
        pytest.fail("the save never ended")
    assert len(loaded) > 12
    assert loaded == sorted(loaded)
    assert set(loaded) == {2, 3}


def not_json(state: dict[str, Any]) -> str:
    return json.dumps(state)[:-20]


def without_roles(state: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in state.items() if key != "roles"})


def from_the_future(state: dict[str, Any]) -> str:
    return json.dumps({**state, "format": 99})


@pytest.mark.parametrize(
    ("damage", "message"),
    [(not_json, "is damaged"), (without_roles, "has no roles"), (from_the_future, "newer megatron_amd, in format 99")],
)
def test_a_bad_state_file_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], str], message: str) -> None:
    run_distributed(save_steps, 1, tmp_path, [1], 1)
    file = tmp_path / "step-00000001" / "state.json"
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(InputError, match=message) as error:
        store.read_state(file.parent)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a checkpoint"):
        store.read_state(tmp_path)


def test_another_model_is_refused_with_the_sizes_that_differ(tmp_path: Path) -> None:
    def attempt() -> str:
        save_steps(tmp_path, [1], 1)
        with pytest.raises(InputError) as error:
            load(tmp_path / "step-00000001", {"student": {"hidden_size": 64, "tied": True}, "precision": "fp32"})
        return str(error.value)

    (message,) = run_distributed(attempt, 1)
    assert "student.hidden_size is 32, here 64" in message
    assert "tied" not in message
    assert "precision" not in message


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_no_permission_is_one_error_and_keeps_the_earlier_checkpoint(tmp_path: Path, call: str) -> None:
    def attempt() -> str:
        save_steps(tmp_path, [1], 1)
        original = getattr(os, call)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied")

        setattr(os, call, refuse)
        with pytest.raises(InputError) as error:
            save_steps(tmp_path, [2], 1)
        setattr(os, call, original)
        load(tmp_path / "step-00000001")
        return str(error.value)

    (message,) = run_distributed(attempt, 1)
    assert message.startswith(f"{tmp_path}: the checkpoint cannot be written: Permission denied")
    assert [path.name for path in tmp_path.iterdir()] == names(1)
