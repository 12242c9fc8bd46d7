"""A run that was stopped or killed, and started again with the same command, ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.launch import launch, launch_many
from tests.tiny_run import make_files, read_metrics, write_config

pytestmark = pytest.mark.e2e

LAST_STEP = "step-00000007"
"""Of two warm-up iterations, one critic-only and four of the main phase."""

# In the order in which they come: in the warm-up, in the critic's own phase, between two of K critic steps, and after
# the student's step. Only one rank hears of each.
STOPS: list[dict[str, Any]] = [
    {"signal": signal.SIGTERM, "after": "student_step", "phase": "warmup", "iteration": 0},
    {"signal": signal.SIGINT, "after": "critic_step", "phase": "critic", "iteration": 0},
    {"signal": signal.SIGTERM, "times": 2, "after": "critic_step", "phase": "main", "iteration": 1, "critic_steps": 1},
    {"signal": signal.SIGTERM, "after": "student_step", "phase": "main", "iteration": 2},
]
KILL = {"signal": signal.SIGKILL, "after": "critic_step", "phase": "main", "iteration": 3, "critic_steps": 1}
"""An iteration and a half after the newest checkpoint."""

REPLAY = ("rollout.reuse.mode=replay", "rollout.reuse.capacity=7", "objective.policy_gradient=per_step")
LAYOUTS = {"tp": "parallel.tensor_model_parallel_size=2", "pp": "parallel.pipeline_model_parallel_size=2"}


def make_run(folder: Path) -> None:
    settings = make_files(folder)
    settings["critic"] |= {"features": "own", "warmup_steps": 1}
    settings["critic"]["optim"] |= {"warmup_steps": 3, "decay": "cosine"}
    settings["objective"] = {"critic_steps": 2}
    settings["warmup"] = {"steps": 2, "name": "kl", "beta": 0.5}
    settings["training"] |= {"steps": 4, "max_nonfinite_steps": 1}
    settings["training"]["optim"] |= {"warmup_steps": 2}
    settings["evaluation"] = {"prompts": 4, "interval": 2, "max_response_length": 4}
    settings["checkpoint"] = {"save_interval": 2}
    settings["parallel"] = {"timeout_minutes": 1}
    write_config(folder, settings)


def cases(folder: Path, name: str, *overrides: str, stops: list[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
    """A run without a pause in NAME-whole; one in NAME-stopped, as often as it takes to the end."""

    def case(suffix: str, directory: str, **faults: Any) -> dict[str, Any]:
        return {"name": f"{name}-{suffix}", "arguments": command(folder, directory, *overrides), **faults}

    interrupted = [case(f"stop-{i}", f"{name}-stopped", stop={**stop, "rank": rank}) for i, stop in enumerate(stops)]
    return [case("whole", f"{name}-whole"), *interrupted, case("rest", f"{name}-stopped")]


def killed(folder: Path, name: str, *overrides: str, rank: int) -> dict[str, Any]:
    """A run that is killed, the last case of its processes."""
    return {
        "name": f"{name}-killed",
        "arguments": command(folder, f"{name}-killed", *overrides),
        "stop": {**KILL, "rank": rank},
    }


def command(folder: Path, directory: str, *overrides: str) -> list[str]:
    return ["--config", str(folder / "run.yaml"), f"run.directory={folder / directory}", *overrides]


def check_stops(results: dict[str, list[Any]], name: str, stops: list[dict[str, Any]], ranks: int) -> None:
    for index, stop in enumerate(stops):
        ended = results[f"{name}-stop-{index}"]
        assert [result["status"] for result in ended] == [128 + stop["signal"]] * ranks, ended
        said = [
            line for result in ended for line in result["lines"] if line.startswith(("stopped", "error", "warning"))
        ]
        assert said == [
            f"stopped by signal {stop['signal']:d} after saving a checkpoint; the same command goes on from it"
        ]
    for case in ("whole", "rest"):
        assert [result["status"] for result in results[f"{name}-{case}"]] == [0] * ranks, results[f"{name}-{case}"]


def check_equal(found: Path, expected: Path) -> None:
    """Bit for bit, but for what is about time, memory and the folder's own name."""
    rows = read_metrics(found)
    assert rows == read_metrics(expected)
    iterations = [(row["phase"], row["iteration"]) for row in rows if "student/loss" in row or row["phase"] == "critic"]
    assert iterations == [
        ("warmup", 1), ("warmup", 2), ("critic", 1), ("main", 1), ("main", 2), ("main", 3), ("main", 4)
    ]  # fmt: skip
    evaluations = [(e["when"], e["iteration"]) for e in json.loads((found / "evaluation.json").read_text())]
    assert evaluations == [("before", 2), ("step", 2), ("after", 4)]
    compared = ["evaluation.json"]
    compared += [str(file.relative_to(expected)) for file in sorted((expected / "student").iterdir())]
    last = expected / "checkpoints" / LAST_STEP
    compared += [str(file.relative_to(expected)) for file in sorted(last.rglob("*")) if file.is_file()]
    assert sum(name.endswith((".safetensors", ".distcp")) for name in compared) >= 3
    for name in compared:
        if name.endswith(".pt"):  # equal contents may be pickled in more than one way
            assert same(torch.load(found / name), torch.load(expected / name)), name
        elif not name.endswith(("state.json", ".metadata")):  # which hold the folder's name
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    states = [json.loads((run / "checkpoints" / LAST_STEP / "state.json").read_text()) for run in (found, expected)]
    for state in states:
        state["config"]["run"].pop("directory")
        state.pop("files")  # sizes and checksums, also of state.json itself
    assert states[0] == states[1]


def same(a: Any, b: Any) -> bool:
    """Whether two trees of dicts, lists, tensors and plain values are equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("one")
    make_run(folder)
    listed = [
        *cases(folder, "run", stops=STOPS, rank=0),
        *cases(folder, "replay", *REPLAY, stops=STOPS[2:], rank=0),
        killed(folder, "run", rank=0),
    ]
    return folder, launch_many(folder, listed)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("two")
    make_run(folder)
    listed = [
        *cases(folder, "tp", LAYOUTS["tp"], "parallel.sequence_parallel=true", stops=STOPS[:2], rank=1),
        *cases(folder, "pp", LAYOUTS["pp"], stops=STOPS[2:], rank=0),
        killed(folder, "pp", LAYOUTS["pp"], rank=1),
    ]
    return folder, launch_many(folder, listed, ranks=2)


def test_stopped_and_resumed_equals_uninterrupted(one_rank: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, results = one_rank
    check_stops(results, "run", STOPS, 1)
    check_equal(folder / "run-stopped", folder / "run-whole")


def test_with_replayed_sequences(one_rank: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, results = one_rank
    check_stops(results, "replay", STOPS[2:], 1)
    check_equal(folder / "replay-stopped", folder / "replay-whole")
    assert any(row.get("rollout/staleness") for row in read_metrics(folder / "replay-whole"))


def test_killed_and_resumed_equals_uninterrupted(one_rank: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, results = one_rank
    assert "run-killed" not in results  # it was
    assert not (folder / "run-killed" / "student").exists()
    ended = launch(folder, *command(folder, "run-killed"))
    assert ended.status == 0, ended.stderr
    check_equal(folder / "run-killed", folder / "run-whole")


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "stops"), [("tp", STOPS[:2]), ("pp", STOPS[2:])], ids=["tp", "pp"])
def test_two_ranks_of_which_one_is_told_stop_together(
    layout: str, stops: list[dict[str, Any]], two_ranks: tuple[Path, dict[str, list[Any]]]
) -> None:
    folder, results = two_ranks
    check_stops(results, layout, stops, 2)
    check_equal(folder / f"{layout}-stopped", folder / f"{layout}-whole")


@pytest.mark.distributed
def test_two_ranks_of_which_one_is_killed_resume(two_ranks: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, results = two_ranks
    assert all(result["status"] != 0 for result in results.get("pp-killed", []))
    ended = launch(folder, *command(folder, "pp-killed", LAYOUTS["pp"]), ranks=2)
    assert ended.status == 0, ended.stderr
    check_equal(folder / "pp-killed", folder / "pp-whole")
