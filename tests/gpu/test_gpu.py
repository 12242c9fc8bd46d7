"""On one GPU: an iteration in bf16 and one in FP8, and rollouts that see what the optimizer has done.

pytest tests/gpu        # with `pip install transformer-engine[pytorch]`, on an H100 or newer for FP8
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.launch import launch
from tests.tiny_run import STUDENT, TEACHER, make_files, write_config

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # FP8 products want multiples of 16 and, for mxfp8, 32
PROMPTS = 32  # rows, which are the tokens of a step of generation


def needs_fp8() -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or newer")


def make_run(folder: Path, precision: str) -> None:
    settings = make_files(folder, teacher={**TEACHER, **SIZES}, student={**STUDENT, **SIZES})
    settings["critic"] |= {"features": "own"}
    settings["training"] |= {"steps": 1, "precision": precision, "global_batch_size": PROMPTS}
    settings["training"]["optim"] = {"learning_rate": 1e-2}
    settings["evaluation"] = {"prompts": 4, "max_response_length": 8}
    write_config(folder, settings)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_an_iteration_has_finite_losses(precision: str, tmp_path: Path) -> None:
    if precision == "fp8":
        needs_fp8()
    make_run(tmp_path, precision)
    ended = launch(tmp_path, "--config", str(tmp_path / "run.yaml"))
    assert ended.status == 0, ended.stderr
    (row,) = (
        row
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "student/loss" in (row := json.loads(line))
    )
    for name in ("student/loss", "student/grad_norm", "critic/loss", "critic/grad_norm", "distance/kl_on"):
        assert row[name] is not None, name  # null stands for a number that is not finite
        assert math.isfinite(row[name])
    assert row["student/grad_norm"] > 0
    assert row["train/skipped_student_steps"] == row["train/skipped_critic_steps"] == 0
    bound = row["amm/tv_bound_on"]
    assert abs(row["amm/d_mm_on"]) <= bound * 1.001
    evaluations = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [evaluation["when"] for evaluation in evaluations] == ["before", "after"]
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_rollouts_after_a_step_use_the_new_weights(precision: str, tmp_path: Path) -> None:
    if precision == "fp8":
        needs_fp8()
    make_run(tmp_path, precision)
    found = in_a_new_process(roll_out_around_a_step, tmp_path)
    # Transformer Engine's FP8 copies of the weights are what could be old; a model that was never stepped has none.
    torch.testing.assert_close(found["after"], found["fresh"], rtol=0, atol=1e-3)
    assert float((found["after"] - found["before"]).abs().max()) > 0.1
    assert found["responses"] == found["fresh responses"]


def test_graphs_change_no_token(tmp_path: Path) -> None:
    make_run(tmp_path, "fp32")
    found = in_a_new_process(roll_out_with_and_without_graphs, tmp_path)
    assert found["recorded"] > 2
    assert found["graphs"] == found["plain"]
    assert len({token for response in found["plain"] for token in response}) > 10


def roll_out_with_and_without_graphs(folder: Path) -> dict[str, Any]:
    from megatron_amd.config import load_config
    from megatron_amd.distributed.initialize import initialize, shutdown
    from megatron_amd.rollout.decode_graphs import DecodeGraphs
    from megatron_amd.training.setup import set_up

    config = load_config(folder / "run.yaml", ["evaluation.prompts=0"])
    layout = initialize(config)
    trainer, _ = set_up(config, layout)
    student = trainer.players.student
    recorded = 0
    record = DecodeGraphs._record

    def counting(*args: Any) -> None:
        nonlocal recorded
        recorded += 1
        record(*args)

    DecodeGraphs._record = counting  # type: ignore[method-assign]
    found: dict[str, Any] = {
        name: respond(student, layout, cuda_graphs=name == "graphs", batch_size=12, max_response_length=24)
        for name in ("plain", "graphs")
    }
    shutdown()
    return {**found, "recorded": recorded}


def roll_out_around_a_step(folder: Path) -> dict[str, Any]:
    """Log-probabilities after each prompt, as a rollout computes them, before and after an iteration of training.

    `fresh` are those of a new model that is given the trained one's weights.
    """
    from megatron_amd.config import load_config
    from megatron_amd.distributed.initialize import initialize, shutdown
    from megatron_amd.models.roles import build_model
    from megatron_amd.training.setup import set_up

    config = load_config(folder / "run.yaml", ["evaluation.prompts=0"])
    layout = initialize(config)
    trainer, _ = set_up(config, layout)
    student = trainer.players.student
    before = log_probs(student, layout)
    assert trainer.train() is None
    after = log_probs(student, layout)
    responses = respond(student, layout)
    fresh = build_model("student", config, trainer.plan, layout)
    weights = dict(student.named_parameters())
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(weights[name])
    found = {
        "before": before,
        "after": after,
        "fresh": log_probs(fresh, layout),
        "responses": responses,
        "fresh responses": respond(fresh, layout),
    }
    shutdown()
    return found


def prompts() -> list[list[int]]:
    return [[10 + (7 * row + column) % 200 for column in range(3 + row % 6)] for row in range(PROMPTS)]


def log_probs(model: Any, layout: Any) -> torch.Tensor:
    """[prompts, vocabulary] in fp32 on the CPU, by the passes of a rollout."""
    from megatron_amd.models.kv_cache import Segment
    from megatron_amd.rollout.passes import generation_mode, make_generator, stage_pass
    from megatron_amd.rollout.pool import Pass

    rows = prompts()
    segments = [Segment(number, 0, len(row)) for number, row in enumerate(rows)]
    coming = Pass([token for row in rows for token in row], [], segments, [], [])
    last = torch.tensor([len(row) for row in rows], device=layout.device).cumsum(0) - 1
    with generation_mode(model):
        generator = make_generator(model, 1.0, [len(rows)], 16, 16, layout)
        hidden = stage_pass(generator, 0, coming, layout)[last, 0]
        return (hidden @ model.head_weight().t()).float().log_softmax(dim=-1).cpu()


def respond(model: Any, layout: Any, **settings: Any) -> list[list[int]]:
    """Greedy responses."""
    from megatron_amd.batch import Prompts
    from megatron_amd.rollout.generate import generate

    rows = prompts()
    numbers = tuple(range(len(rows)))
    asked = Prompts(ids=numbers, visits=(0,) * len(rows), tokens=tuple(tuple(row) for row in rows))
    defaults = {"vocab_size": 250, "eos_ids": (0,), "seed": 1, "max_response_length": 8, "temperature": 0.0}
    rollouts = generate(model, asked, layout=layout, **(defaults | settings))
    return rollouts.responses()


def in_a_new_process(function: Callable[[Path], Any], folder: Path) -> Any:
    """What `function` returns there. A GPU's process is spawned: CUDA does not survive a fork."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (folder,))
