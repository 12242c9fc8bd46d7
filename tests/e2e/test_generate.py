"""tools/generate.py as a user starts it with torchrun, and a run on what it wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.launch import launch
from tests.tiny_run import make_files, read_metrics, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


def test_two_replicas_generate_and_a_run_learns_from_the_files(tmp_path: Path) -> None:
    """They say what they must and nothing else; the run's numbers are those of a teacher that speaks in training."""
    settings = make_files(tmp_path)
    settings["training"]["steps"] = 2
    write_config(tmp_path, settings)
    config = ["--config", str(tmp_path / "run.yaml")]
    output = tmp_path / "responses"
    ended = launch(tmp_path, *config, "--output", str(output), "--shard-size", "3", ranks=2, module="tools.generate")
    assert ended.status == 0, ended.stderr
    says = rf"{output}: 10 responses, \d+ tokens in \d+ s, [\d,]+ tokens/s over 2 replicas; \d+ % ended by themselves"
    (line,) = ended.lines()
    assert re.fullmatch(says, line), line
    assert len(list(output.iterdir())) == 5
    metrics = []
    for name, overrides in (
        ("file", ["rollout.off_policy=file", f"rollout.responses={output}"]),
        ("teacher", []),
    ):
        run = tmp_path / name
        done = launch(tmp_path, *config, f"run.directory={run}", "checkpoint.export=false", *overrides)
        assert done.status == 0, done.stderr
        assert not [line for line in done.lines() if "warning" in line]
        metrics.append(read_metrics(run))
    assert metrics[0] == metrics[1]


def test_torchrun_shows_one_line_of_ours(tmp_path: Path) -> None:
    settings = make_files(tmp_path)
    write_config(tmp_path, settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "full")]
    ended = launch(tmp_path, *arguments, ranks=2, module="tools.generate")
    assert ended.status != 0
    assert ended.lines() == [
        f"error: {tmp_path / 'full'}: holds thesis.tex and no header.json; choose an empty folder for --output"
    ]
