"""What a run that goes well says: its progress, and nothing that a library has to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.conftest import Run
from tests.e2e.launch import launch
from tests.tiny_run import make_files, write_config

pytestmark = pytest.mark.e2e

PROGRESS = re.compile(r"(warmup|critic|main  ) +\d+/\d+ \| .* left")
EVALUATION = re.compile(
    r"measuring on \d+ held-out prompts \.\.\.|held out, (before|after) the main phase: TV .* on, KL .* on"
)


def said(run: Path, layout: str) -> list[str]:
    """What the first rank says on standard output."""
    return [f"{run}: begins (amm, {layout})", f"{run}: done; the student is in {run / 'student'}"]


@pytest.mark.distributed
def test_two_ranks_say_where_they_are_and_nothing_else(run_of_two_ranks: Run) -> None:
    ended = run_of_two_ranks.ended
    assert ended.status == 0, ended.stderr
    assert ended.stdout[0].splitlines() == said(run_of_two_ranks.directory, "tensor 1 x pipeline 1 x data 2")
    assert ended.stdout[1] == ""
    assert ended.stderr[0] == ""
    lines = ended.stderr[1].splitlines()
    others = [line for line in lines if not PROGRESS.fullmatch(line)]
    assert [line for line in others if not EVALUATION.fullmatch(line)] == []
    assert (len(lines), len(others)) == (7, 4)


def test_one_rank_says_where_it_is_and_nothing_else(tmp_path: Path) -> None:
    """With the options whose parts of Megatron-Core have much to say: tensor and sequence parallelism aside."""
    settings = make_files(tmp_path)
    settings["training"] |= {"steps": 2, "precision": "bf16"}
    settings["critic"]["features"] = "own"
    settings["student"]["transformer"] = {"recompute_granularity": "selective"}
    write_config(tmp_path, settings)
    ended = launch(tmp_path, "--config", str(tmp_path / "run.yaml"))
    assert ended.status == 0, ended.stderr
    assert ended.stdout[0].splitlines() == said(tmp_path / "run", "tensor 1 x pipeline 1 x data 1")
    lines = ended.stderr[0].splitlines()
    assert [line for line in lines if not PROGRESS.fullmatch(line)] == []
    assert len(lines) == 2
