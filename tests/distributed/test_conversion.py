"""tools/convert_hf_to_mcore.py, as a user runs it; its opposite is in tests/e2e/test_convert_mcore_to_hf.py."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.checkpoint.hf import load_hf_weights
from megatron_amd.config import Config, ParallelConfig, config_to_yaml
from tests.distributed.runner import run_distributed
from tests.hf_models import build_megatron, save_hf_model

# isort: split
from megatron.core import dist_checkpointing

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def read_megatron_checkpoint(source: Path, converted: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    model, architecture, layout = build_megatron(source, parallel)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(converted))
    model.load_state_dict(loaded["model"])
    expected, _, _ = build_megatron(source, parallel, layout=layout)
    load_hf_weights(expected, source, architecture)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_folder_becomes_a_megatron_core_checkpoint(tmp_path: Path) -> None:
    source, converted = tmp_path / "hf", tmp_path / "mcore"
    save_hf_model("gpt2", source)
    done = run_tool("convert_hf_to_mcore.py", source, "-o", converted, "--precision", "fp32", "--pad-vocabulary-to", 64)
    assert done.returncode == 0, done.stderr
    assert json.loads((converted / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    run_distributed(read_megatron_checkpoint, 4, source, converted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/hf", "-o", "{0}/new"], "source.path: there is no folder {0}/hf"),
        (["{0}", "-o", "{0}/run"], "{0}/run: exists already; choose another folder"),
        (
            ["{0}", "-o", "{0}/new", "--pad-vocabulary-to", "0"],
            "--pad-vocabulary-to: must be at least 1, not 0",
        ),
    ],
)
def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(Config()))
    file = ROOT / "tools" / "convert_hf_to_mcore.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([argument.format(tmp_path) for argument in arguments]) == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp_path)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
