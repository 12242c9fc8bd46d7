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
from tests.tiny_run import make_files, write_config

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
    tensor, pipeline, data, precision, features = RUNS[name]
    settings = make_files(tmp_path)
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


@pytest.mark.parametrize(("pipeline", "features"), [(1, "pair"), (2, "pair"), (2, "own"), (2, "teacher")])
def test_what_passes_take(pipeline: int, features: str):
    """The same rehearsal on real tensors counts the same bytes.

    Without tensor parallelism, whose collectives gloo runs on threads that let go of tensors a moment later.
    """
    settings: dict[str, Any] = {
        "teacher": {"architecture": GPT2},
        "student": {"architecture": {**GPT2, "n_embd": 32, "n_layer": 2, "tie_word_embeddings": False}},
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
                assert found.parts[part][kind] == pytest.approx(size, rel=0.02, abs=4096), (stage, part, kind)
