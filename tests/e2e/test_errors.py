"""What a user can do wrong: each gives one line from all ranks together, status 2, and ends within seconds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.train import main
from megatron_amd.training.setup import set_up
from tests.distributed.runner import run_distributed
from tests.e2e.launch import launch, launch_many
from tests.e2e.mistakes import NO_GPU, ONE_RANK, TWO_RANKS, Case
from tests.small_tokenizers import make_hf_tokenizer
from tests.tiny_run import STUDENT, make_files, save_model, write_config

pytestmark = pytest.mark.e2e

SECONDS = 20.0
"""Longest time a case may take. Alone each takes under 2; a machine may be busy."""


def train_one_step(config: Config) -> None:
    """On a rank: a run that leaves a checkpoint."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    trainer, _ = set_up(config, layout)
    assert trainer.train() is None


def make_broken_files(folder: Path) -> None:
    """Everything that a case names."""
    student = {**STUDENT, "model_type": "llama"}

    def variant(name: str, **changes: Any) -> Path:
        """The student's folder with another config.json."""
        copy = shutil.copytree(folder / "student", folder / name)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        return copy

    (folder / "empty").mkdir()
    (folder / "broken.yaml").write_text("run:\n  seed: [1\n")
    (variant("bad_json") / "config.json").write_text("{")
    variant("mamba", model_type="mamba")
    variant("other_sizes", intermediate_size=44)
    variant("few_rows", vocab_size=100)
    (variant("no_weights") / "model.safetensors").unlink()
    truncated = variant("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    make_hf_tokenizer(variant("other_words"), vocab_size=280)
    save_model(folder / "three_heads", {**student, "num_attention_heads": 3, "num_key_value_heads": 3}, 400, seed=3)

    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "empty.jsonl").touch()
    (folder / "bad_row.jsonl").write_text("".join([*rows[:2], '{"question": "?"}\n', *rows[2:]]))
    (folder / "bad_line.jsonl").write_text(rows[0] + '{"prompt": \n')


def make_runs(folder: Path, settings: dict[str, Any]) -> None:
    """Finished runs, whole and damaged."""
    for name, ranks, *overrides in (("run", 1), ("run-of-two", 2), ("kl-run", 1, "objective.name=kl")):
        run = [f"run.directory={folder / name}", "checkpoint.export=false"]
        run_distributed(train_one_step, ranks, write_config(folder, settings, *run, *overrides))
    checkpoint = Path("checkpoints", "step-00000001")
    damaged = next((shutil.copytree(folder / "run", folder / "damaged") / checkpoint / "student").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    state = shutil.copytree(folder / "run", folder / "damaged_state") / checkpoint / "state.json"
    state.write_text(state.read_text()[:-20])
    state = shutil.copytree(folder / "run", folder / "no_progress") / checkpoint / "state.json"
    kept = json.loads(state.read_text())
    del kept["progress"]
    state.write_text(json.dumps(kept))


def make_obstacles(folder: Path) -> None:
    """Run directories without a run, some with something in its way."""
    for name in ("full-0", "full-1", "full-2", "full-3", "rows", "node-0", "node-1", "blocked"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "full-2").mkdir()
    (folder / "full-2" / "metrics.jsonl").symlink_to("/dev/full")
    (folder / "blocked").mkdir()
    (folder / "blocked" / "student").touch()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    settings = make_files(folder)
    settings["training"]["steps"] = 1
    settings["parallel"] = {"timeout_minutes": 1}
    make_broken_files(folder)
    make_runs(folder, settings)
    settings["run"]["directory"] = str(folder / "new")
    write_config(folder, settings)
    return folder


def run_all(files: Path, folder: Path, cases: list[Case], ranks: int | None) -> dict[str, list[Any]]:
    """Every case, in one start."""

    def filled(arguments: tuple[str, ...]) -> list[str]:
        return [argument.replace("{}", str(files)) for argument in arguments]

    described = [
        {
            "name": case.name,
            "arguments": [filled(case.arguments), filled(case.second_rank)]
            if case.second_rank
            else filled(case.arguments),
            **case.faults,
        }
        for case in cases
    ]
    make_obstacles(files)
    return launch_many(folder, described, ranks)


@pytest.fixture(scope="module")
def on_one_rank(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_all(files, tmp_path_factory.mktemp("one"), ONE_RANK, None)


@pytest.fixture(scope="module")
def on_two_ranks(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_all(files, tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


def check(case: Case, results: list[Any], ranks: int) -> None:
    assert len(results) == ranks, "a rank did not come to an end"
    assert [result["status"] for result in results] == [2] * ranks, results
    lines = [line for result in results for line in result["lines"] if not is_progress(line)]
    assert len(lines) == 1, "\n".join(lines)
    assert re.match(rf"error: {case.says}", lines[0]), lines[0]
    for result in results:
        assert result["seconds"] < SECONDS
        assert (result["models"] > 0) == case.models


def is_progress(line: str) -> bool:
    """A line that a run prints as it begins and goes, before it fails."""
    return re.match(r"(warmup|critic|main) +\d+/\d+ \||[^:]+: (begins|goes on|has finished) ", line) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a GPU has")
@pytest.mark.parametrize("case", NO_GPU, ids=lambda case: case.name)
def test_what_needs_a_gpu_is_refused_in_one_line(case: Case, on_one_rank: dict[str, list[Any]]) -> None:
    check(case, on_one_rank.get(case.name, []), 1)


@pytest.mark.parametrize("case", [case for case in ONE_RANK if case not in NO_GPU], ids=lambda case: case.name)
def test_one_rank_ends_with_one_line(case: Case, on_one_rank: dict[str, list[Any]]) -> None:
    check(case, on_one_rank.get(case.name, []), 1)


@pytest.mark.distributed
@pytest.mark.parametrize("case", TWO_RANKS, ids=lambda case: case.name)
def test_two_ranks_end_with_one_line(case: Case, on_two_ranks: dict[str, list[Any]]) -> None:
    check(case, on_two_ranks.get(case.name, []), 2)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.betta=0.5", "objective.betta: unknown key"),
        ("data.train={}/bad_row.jsonl", "bad_row.jsonl line 3: no field 'prompt'"),
    ],
)
def test_torchrun_shows_one_line_of_ours(override: str, says: str, files: Path, tmp_path: Path) -> None:
    config = ["--config", str(files / "run.yaml")]
    ended = launch(tmp_path, *config, override.replace("{}", str(files)), ranks=2)
    (line,) = ended.lines()
    assert line.startswith("error: ")
    assert says in line
    assert ended.status != 0


def test_a_mistake_on_another_node_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the ranks have met, the first one of each node speaks, and only that one."""
    arguments = ["--config", "/none.yaml"]
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: config /none.yaml: cannot be read (No such file or directory)")
    monkeypatch.setenv("LOCAL_RANK", "1")
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert main(arguments) == 2
    assert capsys.readouterr().err == ""
    assert waited == [pytest.approx(20)], "a rank that leaves first silences the one that speaks"


def test_ranks_that_cannot_meet(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when somebody sets RANK without torchrun, or a node is out of reach."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["--config", str(files / "run.yaml")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: parallel: the 1 ranks did not find each other (")
    assert line.count("\n") == 1


def test_a_lost_rank_is_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a rank was killed, its neighbours say so; any other RuntimeError stays a bug with its traceback."""
    says = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:42"

    def fail(message: str) -> None:
        raise RuntimeError(message)

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("megatron_amd.train._train", lambda _config: fail(says))
    assert main(["--config", str(files / "run.yaml")]) == 3
    assert capsys.readouterr().err.startswith("error: rank 3 lost another rank (Connection closed by peer): ")
    monkeypatch.setattr("megatron_amd.train._train", lambda _config: fail("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["--config", str(files / "run.yaml")])
