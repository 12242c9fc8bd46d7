"""Checkpoints of real models and optimizers: a continued run equals one that never stopped, bit for bit."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_amd.checkpoint import store
from megatron_amd.checkpoint.hf import export_hf
from megatron_amd.errors import InputError
from tests.checkpointed_run import TinyRun, differing, make_config
from tests.distributed.runner import run_distributed

pytestmark = pytest.mark.distributed

# tensor, pipeline, data, further settings
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "one": (1, 1, 1, {}),
    "one-bf16-own": (1, 1, 1, {"precision": "bf16", "features": "own", "tied": False}),
    "tp2": (2, 1, 1, {}),
    "tp2-bf16-own": (2, 1, 1, {"precision": "bf16", "features": "own"}),
    "pp2": (1, 2, 1, {}),
    "pp2-bf16": (1, 2, 1, {"precision": "bf16"}),
    "pp2-own-untied": (1, 2, 1, {"features": "own", "tied": False}),
    "dp2": (1, 1, 2, {}),
    "dp2-bf16-own": (1, 1, 2, {"precision": "bf16", "features": "own"}),
    "tp2-pp2-bf16": (2, 2, 1, {"precision": "bf16"}),
    "pp3-t5-own": (1, 3, 1, {"family": "t5", "features": "own", "tied": False}),
    "tp2-dp2-t5": (2, 1, 2, {"family": "t5"}),
    "pp2-dp2-t5-bf16": (1, 2, 2, {"family": "t5", "precision": "bf16"}),
}


def stop_and_go(directory: Path, settings: dict[str, Any], before: int) -> tuple[int, list[str]]:
    """On a rank: train, save, go on; build everything anew, load, go on as well. Compare."""
    config = make_config(**settings)
    run = TinyRun(config)
    run.train(before)
    path = run.save(directory, before)
    expected_records, expected = run.train(3), run.snapshot()
    resumed = TinyRun(config, run.layout)
    assert before == 0 or differing(resumed.snapshot(), expected)
    state, rank_state = resumed.load(path)
    assert state["progress"] == {"iteration": before, "rate": 0.1}
    assert rank_state["rank"] == dist.get_rank()
    records, found = resumed.train(3), resumed.snapshot()
    assert records == expected_records
    assert any(key.startswith("student.exp_avg_sq") for key in found)
    return len(found), differing(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    tensor, pipeline, data, settings = CASES[name]
    settings = {**settings, "tensor": tensor, "pipeline": pipeline}
    for count, different in run_distributed(stop_and_go, tensor * pipeline * data, tmp_path, settings, 3):
        assert different == []
        assert count > 30


def test_a_run_saved_before_its_first_step_starts_equal(tmp_path: Path) -> None:
    """The optimizer has no state yet, and must not get another than its first step would have made."""

    def start_twice() -> tuple[list[Any], list[Any], list[str]]:
        run = TinyRun(make_config())
        untouched = TinyRun(make_config(), run.layout)
        run.save(tmp_path, 0)
        rng = torch.get_rng_state()
        records, expected = untouched.train(2), untouched.snapshot()
        torch.set_rng_state(rng)
        return run.train(2), records, differing(run.snapshot(), expected)

    ((records, expected, different),) = run_distributed(start_twice, 1)
    assert records == expected
    assert different == []
    ((_, different),) = run_distributed(stop_and_go, 1, tmp_path, {}, 0)
    assert different == []


def forget_adam_step(run: TinyRun) -> None:
    for part in run.student.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"].zero_()


def share_adam_step(run: TinyRun) -> None:
    """As Megatron-Core leaves it: one tensor for all parameters, which each of them advances."""
    for part in run.student.optimizer.chained_optimizers:
        states = list(part.optimizer.state.values())
        for state in states:
            state["step"] = states[0]["step"]


def forget_rng(run: TinyRun) -> None:
    torch.manual_seed(0)


def forget_schedule(run: TinyRun) -> None:
    run.student.scheduler.num_steps = 0


@pytest.mark.parametrize("forget", [forget_adam_step, share_adam_step, forget_rng, forget_schedule])
def test_the_comparison_notices_what_is_forgotten(tmp_path: Path, forget: Callable[[TinyRun], None]) -> None:
    def resume_badly() -> list[str]:
        run = TinyRun(make_config())
        run.train(3)
        path = run.save(tmp_path, 3)
        run.train(1)
        resumed = TinyRun(make_config(), run.layout)
        resumed.load(path)
        forget(resumed)
        resumed.train(1)
        return differing(run.snapshot(), resumed.snapshot())

    (different,) = run_distributed(resume_badly, 1)
    assert "student.module.decoder.final_layernorm.weight" in different


def run_out_of_room(directory: Path, settings: dict[str, Any], full_rank: int) -> list[str]:
    """On a rank: save with smaller and smaller largest files on one rank; the messages."""
    run = TinyRun(make_config(**settings))
    run.train(1)
    path = run.save(directory, 1)
    expected = run.snapshot()
    messages = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (150_000, 20_000, 6_000, 0):  # within moments, between archives, within the random state, at once
        if dist.get_rank() == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # Python ignores SIGXFSZ
        with pytest.raises(InputError) as error:
            run.save(directory, 2, keep=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        messages.append(str(error.value))
        dist.barrier()  # the first rank has removed what was written
        assert [path.name for path in directory.iterdir()] == ["step-00000001"]
        dist.barrier()
    run.train(1)
    run.load(path)
    assert differing(run.snapshot(), expected) == []
    return messages


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_on_one_rank_is_one_error_on_all(tmp_path: Path, full_rank: int) -> None:
    settings = {"pipeline": 2}
    messages, others = run_distributed(run_out_of_room, 2, tmp_path, settings, full_rank)
    assert messages == others
    for message in messages:
        assert message.startswith(f"{tmp_path}: the checkpoint cannot be written: ")
        assert "\n" not in message


def load_what_does_not_fit(directory: Path) -> dict[str, str]:
    """On a rank: one checkpoint, several wrong ways to load it; the messages."""
    messages: dict[str, str] = {}
    run = TinyRun(make_config(tensor=2), critic=False)
    path = run.save(directory, 1)

    def attempt(name: str, other: TinyRun) -> None:
        with pytest.raises(InputError) as error:
            other.load(path)
        messages[name] = str(error.value)

    attempt("model", TinyRun(make_config(tensor=2, hidden_size=16), run.layout, critic=False))
    attempt("role", TinyRun(make_config(tensor=2), run.layout))
    for kind, change in (("cut", cut_short), ("flipped", flip_bits), ("gone", Path.unlink)):
        for name in ("student/__1_0.distcp", "student/common.pt", "student/.metadata", "rank_00001.pt"):
            content = (path / name).read_bytes()
            dist.barrier()
            if dist.get_rank() == 0:
                change(path / name)
            dist.barrier()
            attempt(f"{kind} {name}", run)
            if dist.get_rank() == 0:
                (path / name).write_bytes(content)
            dist.barrier()
    run.load(path)
    return messages


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_bits(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def test_what_does_not_fit_is_one_error_on_both_ranks(tmp_path: Path) -> None:
    messages, others = run_distributed(load_what_does_not_fit, 2, tmp_path)
    assert messages == others
    path = tmp_path / "step-00000001"
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages.values())
    assert "student.hidden_size is 32, here 16" in messages.pop("model")
    assert "holds no critic, only student" in messages.pop("role")
    for what, message in messages.items():
        kind, name = what.split()
        assert message.startswith(f"{path / name}: is {'missing' if kind == 'gone' else 'damaged'}"), what


def test_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    run_distributed(lambda: TinyRun(make_config(tensor=2), critic=False).save(tmp_path, 1), 2)

    def resume() -> str:
        with pytest.raises(InputError) as error:
            TinyRun(make_config(), critic=False).load(tmp_path / "step-00000001")
        return str(error.value)

    messages = run_distributed(resume, 2)
    assert len(set(messages)) == 1
    assert "tensor 2 x pipeline 1 x data 1" in messages[0]
    assert "tensor 1 x pipeline 1 x data 2" in messages[0]


@pytest.mark.parametrize(("family", "pipeline"), [("llama", 2), ("t5", 3)])
def test_weights_load_into_another_layout(tmp_path: Path, family: str, pipeline: int) -> None:
    """Without the optimizer, a checkpoint of several tensor ranks and stages is the same model on one rank."""

    def train_and_export() -> None:
        run = TinyRun(make_config(family=family, tensor=2, pipeline=pipeline, tied=False), critic=False)
        run.train(2)
        run.save(tmp_path / "checkpoints", 2)
        export_hf(run.student.model, tmp_path / "expected", run.plan.student, run.layout)

    def load_and_export() -> None:
        run = TinyRun(make_config(family=family, tied=False), critic=False)
        store.load_weights(tmp_path / "checkpoints" / "step-00000002", "student", run.student.model, run.layout)
        export_hf(run.student.model, tmp_path / "found", run.plan.student, run.layout)

    run_distributed(train_and_export, 2 * pipeline)
    run_distributed(load_and_export, 1)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
