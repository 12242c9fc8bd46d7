"""tools/convert_mcore_to_hf.py on a finished run of four ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_amd.checkpoint.hf import export_hf
from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.training.setup import set_up
from tests.distributed.runner import run_distributed
from tests.tiny_run import make_files, write_config

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def train_and_export(config: Config, folder: Path) -> None:
    """On a rank: what a run does, with the student exported to `folder`."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    trainer, tokenizer = set_up(config, layout)
    assert trainer.train() is None
    export_hf(trainer.players.student, folder, trainer.plan.student, layout, copy_tokenizer=tokenizer.save_files)


def convert(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_mcore_to_hf.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def test_the_converted_student_is_the_exported_one(tmp_path: Path) -> None:
    settings = make_files(tmp_path)
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
    config = write_config(tmp_path, settings, "training.steps=1", *layout)
    run_distributed(train_and_export, 4, config, tmp_path / "expected")
    result = convert(tmp_path / "run", tmp_path / "found", "--verify")
    assert result.returncode == 0, result.stderr
    assert "verified: logits differ from those of transformers by at most " in result.stdout
    expected = sorted(file.name for file in (tmp_path / "expected").iterdir())
    assert sorted(file.name for file in (tmp_path / "found").iterdir()) == expected
    for name in expected:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    result = convert(tmp_path, tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}: is neither a checkpoint nor a run directory")
    assert result.stderr.count("\n") == 1
