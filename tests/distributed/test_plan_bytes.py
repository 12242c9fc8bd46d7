"""The dry run's bytes against those of real ranks: what a run holds, and what its passes take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.config import Config, build_section
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.models.roles import plan_models
from megatron_amd.training.optimizer import Optimization
from megatron_amd.training.plan import plan_run
from megatron_amd.training.rehearsal import StageUse, rank_batch, rehearse
from megatron_amd.training.setup import set_up
from tests.distributed.runner import run_distributed
from tests.tiny_run import T5_STUDENT, T5_TEACHER, make_files, write_config

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),  # Megatron-Core calls by former names
]

# (TP, PP, DP), precision, critic.features
RUNS = {
    "tp2-pp2": (2, 2, 1, "fp32", "pair"),
    "dp2": (1, 1, 2, "fp32", "own"),
    "dp2-bf16": (1, 1, 2, "bf16", "pair"),
}
T5_RUNS = {"tp2-pp3": (2, 3, 1, "fp32", "own"), "dp2-bf16": (1, 1, 2, "bf16", "pair")}


def real_bytes(config: Config) -> dict[str, tuple[int, int, int]]:
    """{role: weights, gradients, optimizer states} of this rank, counted on its tensors after an iteration."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    trainer, _ = set_up(config, layout)
    assert trainer.train() is None
    players = trainer.players
    assert players.student_optimization is not None
    assert players.critic_optimization is not None
    return {
        "teacher": (sum(p.nbytes for p in players.teacher.parameters()), 0, 0),
        "student": _trained(players.student_optimization),
        "critic": _trained(players.critic_optimization),
    }


def _trained(optimization: Optimization) -> tuple[int, int, int]:
    weights = sum(p.nbytes for p in optimization.model.parameters())
    gradients = sum(buffer.grad_data.nbytes for buffer in optimization.model.buffers)
    states = 0
    for group in optimization.optimizer.param_groups:
        for p in group["params"]:
            parts = getattr(optimization.optimizer, "chained_optimizers", [optimization.optimizer])
            (moments,) = [o.optimizer.state[p] for o in parts if p in o.optimizer.state]
            states += moments["exp_avg"].nbytes + moments["exp_avg_sq"].nbytes
            if optimization.model.config.bf16:  # else the main weights are the weights
                states += p.nbytes
    return weights, gradients, states


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_holds(name: str, tmp_path: Path):
    check_held(tmp_path, make_files(tmp_path), *RUNS[name])


def check_held(
    tmp_path: Path, settings: dict[str, Any], tensor: int, pipeline: int, data: int, precision: str, features: str
) -> None:
    settings["critic"]["features"] = features
    config = write_config(
        tmp_path,
        settings,
        "training.steps=1",
        f"training.precision={precision}",
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
    )
    plan = plan_run(config, tensor * pipeline * data)
    ranks = run_distributed(real_bytes, tensor * pipeline * data, config)
    for rank, found in enumerate(ranks):
        stage = plan.stages[rank // (tensor * data)]
        for role, (weights, gradients, states) in found.items():
            use = stage.roles[role]
            # Buffers are padded to multiples of 64 or 128 numbers, which the parameters' own bytes do not show.
            assert use.weights == pytest.approx(weights, rel=0.01, abs=2048), (rank, role)
            assert use.gradients == pytest.approx(gradients, rel=0.01), (rank, role)
            assert use.optimizer == pytest.approx(states, rel=0.01, abs=2048), (rank, role)


GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 512}
"""No RMSNorm, which meta tensors have a stand-in for."""


T5 = {
    "model_type": "t5", "vocab_size": 300, "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 4,
}  # fmt: skip
STUDENTS = {
    "gpt2": (GPT2, {"n_embd": 32, "n_layer": 2, "tie_word_embeddings": False}, 0.02),
    "t5": (T5, {"d_model": 32, "tie_word_embeddings": False}, 0.12),  # has RMSNorm, of which real tensors keep more
}
"""Teacher, what a student has otherwise, tolerance."""


@pytest.mark.parametrize("name", T5_RUNS)
def test_what_a_run_of_t5_holds(name: str, tmp_path: Path):
    check_held(tmp_path, make_files(tmp_path, teacher=T5_TEACHER, student=T5_STUDENT), *T5_RUNS[name])


@pytest.mark.parametrize(
    ("kind", "pipeline", "features"),
    [
        ("gpt2", 1, "pair"), ("gpt2", 2, "pair"), ("gpt2", 2, "own"), ("gpt2", 2, "teacher"), ("t5", 1, "own"),
        ("t5", 3, "pair"),
    ],
)  # fmt: skip
def test_what_passes_take(kind: str, pipeline: int, features: str):
    """The same rehearsal on real tensors counts the same bytes.

    Without tensor parallelism, whose collectives gloo runs on threads that let go of tensors a moment later.
    """
    teacher, changes, tolerance = STUDENTS[kind]
    settings: dict[str, Any] = {
        "teacher": {"architecture": teacher},
        "student": {"architecture": {**teacher, **changes}},
        "critic": {"features": features},
        "data": {"max_prompt_length": 24},
        "rollout": {"max_response_length": 8},
        "training": {"precision": "fp32"},
        "parallel": {"pipeline_model_parallel_size": pipeline},
    }
    config = build_section(Config(), settings, source="test", where="")

    def play() -> StageUse:
        layout = build_layout(config.parallel, torch.device("cpu"))
        set_seeds(config.run.seed, layout)
        plan = plan_models(config, None)
        return rehearse(config, plan, rank_batch(config, layout, has_encoder=plan.student.has_encoder), layout)

    plan = plan_run(config, None)
    for stage, found in enumerate(run_distributed(play, pipeline)):
        expected = plan.stages[stage]
        assert found.roles == expected.roles
        for part, sizes in expected.parts.items():
            for kind, size in sizes.items():
                assert found.parts[part][kind] == pytest.approx(size, rel=tolerance, abs=4096), (stage, part, kind)
