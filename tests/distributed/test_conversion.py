"""The two conversion tools, as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_amd.checkpoint import store
from megatron_amd.checkpoint.hf import load_hf_weights
from megatron_amd.config import Config, ParallelConfig, config_to_yaml
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.models.roles import build_model, plan_models
from megatron_amd.training.first_weights import fill_model
from megatron_amd.training.optimizer import build_optimization, wrap_for_training
from tests.distributed.runner import run_distributed
from tests.hf_models import build_megatron, save_hf_model, state_dict
from tests.tiny_run import make_files, write_config

# isort: split
from megatron.core import dist_checkpointing

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def save_checkpoint(config: Config, run: Path) -> None:
    """What a run leaves behind: its settings, and a checkpoint of its student."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    plan = plan_models(config, None)
    model = build_model("student", config, plan, layout)
    fill_model(model, "student", config.student, plan.student, config.run.seed)
    optimization = build_optimization(
        wrap_for_training(model, layout, {}), config.training.optim, layout, 5, "training.optim"
    )
    store.save(
        run / "checkpoints",
        step=3,
        roles={"student": store.RoleState.of(optimization, layout)},
        state={},
        fingerprint={},
        rank_state={},
        keep=1,
    )
    if layout.tp_rank == layout.pp_rank == 0:
        (run / "config.yaml").write_text(config_to_yaml(config))


def test_the_student_of_a_checkpoint_becomes_a_folder(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_files(tmp_path))
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    run = tmp_path / "run"
    run_distributed(save_checkpoint, 4, replace(config, parallel=parallel), run)
    done = run_tool("convert_mcore_to_hf.py", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'checkpoints' / 'step-00000003'} -> {run / 'student'}\n"
    before, after = state_dict(tmp_path / "student"), state_dict(run / "student")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(transformers.AutoTokenizer.from_pretrained(run / "student")) > 0


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
    ("tool", "arguments", "message"),
    [
        ("convert_mcore_to_hf", ["{0}"], "{0}: has no config.yaml; give the directory of a run"),
        ("convert_mcore_to_hf", ["{0}/run"], "{0}/run/checkpoints: has no checkpoint"),
        ("convert_mcore_to_hf", ["{0}/run", "--step", "4"], "{0}/run/checkpoints: has no checkpoint of step 4"),
        ("convert_hf_to_mcore", ["{0}/hf", "-o", "{0}/new"], "source.path: there is no folder {0}/hf"),
        ("convert_hf_to_mcore", ["{0}", "-o", "{0}/run"], "{0}/run: exists already; choose another folder"),
        (
            "convert_hf_to_mcore",
            ["{0}", "-o", "{0}/new", "--pad-vocabulary-to", "0"],
            "--pad-vocabulary-to: must be at least 1, not 0",
        ),
    ],
)
def test_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(Config()))
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([argument.format(tmp_path) for argument in arguments]) == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp_path)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
