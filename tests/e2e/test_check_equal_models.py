"""tools/check_equal_models.py: it passes where the models are equal, and would fail where they are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from tests.dense_game import fixed_sequences
from tests.distributed.runner import run_distributed
from tests.tiny_game import Game
from tests.tiny_run import make_files, write_config
from tools.check_equal_models import checks, main

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "check_equal_models.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equal")
    write_config(folder, make_files(folder))
    return folder


def call(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)


def verdicts(output: str) -> list[str]:
    return [line.split()[-1] for line in output.splitlines() if line.endswith(("PASS", "FAIL"))]


def test_a_run_s_student_passes_on_one_rank(folder: Path) -> None:
    result = call(TOOL, "--config", str(folder / "run.yaml"), "critic.features=own")
    assert result.returncode == 0, result.stdout + result.stderr
    assert verdicts(result.stdout) == ["PASS"] * 25
    assert f"{folder / 'student'} as teacher and student: TP 1 x PP 1 x DP 1, fp32, critic own" in result.stdout
    assert result.stdout.endswith("all 25 checks passed\n")
    assert result.stderr == ""


def test_however_the_run_draws_its_sequences(folder: Path) -> None:
    settings = ("rollout.reuse.mode=steps", "rollout.teacher_share=0.2", "rollout.min_p=0.1", "rollout.top_k=5")
    result = call(
        TOOL, "--config", str(folder / "run.yaml"), "objective.policy_gradient=per_step", *settings
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all 25 checks passed\n")


@pytest.mark.distributed
def test_a_folder_alone_passes_on_two_ranks(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TOOL)
    result = call(*torchrun, "--model", str(folder / "teacher"), "parallel.tensor_model_parallel_size=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert verdicts(result.stdout) == ["PASS"] * 25, "one rank prints"
    assert f"{folder / 'teacher'} as teacher and student: TP 2 x PP 1 x DP 1, fp32, critic pair" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "command line: give --config run.yaml or --model FOLDER"),
        (("--model", "somewhere", "parallel.tensor=2"), "parallel.tensor"),
        (("--models", "somewhere"), "command line: unrecognized arguments: --models"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_too_few_prompts_are_one_line(folder: Path) -> None:
    result = call(TOOL, "--model", str(folder / "teacher"), "--prompts", "0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: --prompts: 0 cannot be shared by 1 data-parallel ranks; use more\n"


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "torchrun --nproc-per-node 2 tools/check_equal_models.py --model FOLDER" in capsys.readouterr().out


def failed_checks(config: Config) -> list[str]:
    """Of models that are not equal."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(0, layout)
    game = Game(config, layout, 290)
    batch = game.batch(fixed_sequences("mixed", 290))
    return [check.what for check in checks(game.players, game.plan, batch) if not check.passed]


def test_unequal_models_fail(folder: Path) -> None:
    """All checks but those that hold for any two models: a critic of zeros sees no difference."""
    still = "{learning_rate: 0, weight_decay: 0, clip_grad: 0}"
    config = write_config(folder, make_files(folder), f"training.optim={still}", f"critic.optim={still}")
    (failed,) = run_distributed(failed_checks, 1, config)
    assert len(failed) == 25 - 3
    assert not [what for what in failed if what.startswith("zero heads: ") and "critic's gradient" not in what]
