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


@pytest.mark.distributed
def test_two_ranks_say_nothing_but_their_progress(run_of_two_ranks: Run) -> None:
    ended = run_of_two_ranks.ended
    assert ended.status == 0, ended.stderr
    assert ended.stdout == ["", ""]
    assert ended.stderr[0] == ""
    lines = ended.stderr[1].splitlines()
    assert [line for line in lines if not PROGRESS.fullmatch(line)] == []
    assert len(lines) == 3


def test_one_rank_says_nothing_but_its_progress(tmp_path: Path) -> None:
    """With the options whose parts of Megatron-Core have much to say: tensor and sequence parallelism aside."""
    settings = make_files(tmp_path)
    settings["training"] |= {"steps": 2, "precision": "bf16"}
    settings["critic"]["features"] = "own"
    settings["student"]["transformer"] = {"recompute_granularity": "selective"}
    write_config(tmp_path, settings)
    ended = launch(tmp_path, "--config", str(tmp_path / "run.yaml"))
    assert ended.status == 0, ended.stderr
    assert ended.stdout == [""]
    lines = ended.stderr[0].splitlines()
    assert [line for line in lines if not PROGRESS.fullmatch(line)] == []
    assert len(lines) == 2
