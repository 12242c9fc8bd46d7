"""The critic's own steps reach the best linear critic there is, whose d_MM is known in closed form (oracle 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_amd.batch import Batch
from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.training.steps import critic_step, measure
from tests import reference
from tests.dense_game import fixed_sequences
from tests.distributed.runner import run_distributed
from tests.tiny_game import Game, gathered
from tests.tiny_run import make_files, write_config

pytestmark = pytest.mark.distributed
VOCAB_SIZE = 290
STEPS = 60


def suprema(game: Game, batch: Batch) -> list[float]:
    """|E sum w (p-q) h^T|_F over the global batch, off-policy and on-policy: the sup of d_MM over |W|_F <= 1."""
    players, layout = game.players, game.layout
    totals = [torch.zeros(0), torch.zeros(0)]
    assert batch.student_states is not None
    assert batch.teacher_states is not None
    heads = [gathered(model.head_weight(), layout)[:VOCAB_SIZE] for model in (players.student, players.teacher)]
    for index, microbatch in enumerate(batch.microbatches):
        states = (batch.student_states[index], batch.teacher_states[index])
        q, p = (reference.logits(h, head).softmax(1) for h, head in zip(states, heads, strict=True))
        moment = (batch.weights[index].double()[:, None] * (p - q)).T @ states[1].double()
        number = int(microbatch.on_policy)
        totals[number] = totals[number] + moment if totals[number].numel() else moment
    for total in totals:
        dist.all_reduce(total, group=layout.groups.dp)
    return [total.norm().item() for total in totals]


@torch.no_grad()
def project(game: Game) -> None:
    """Each head back into |W|_F <= 1."""
    assert game.players.critic is not None
    for on_policy in (False, True):
        for weight in game.players.critic.head_weights(on_policy).values():
            square = weight.double().square().sum()
            dist.all_reduce(square, group=game.layout.groups.tp)
            weight /= square.sqrt().clamp(min=1).item()


def ascend(config: Config) -> tuple[list[float], list[float], list[float]]:
    """(d_MM before, d_MM after, its sup), each off-policy and on-policy."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(0, layout)
    game = Game(config, layout, VOCAB_SIZE, random_heads=True)
    batch = game.batch(fixed_sequences("mixed", VOCAB_SIZE))
    project(game)

    def distances() -> list[float]:
        found = measure(game.players, batch)
        return [found["amm/d_mm_off"], found["amm/d_mm_on"]]

    before, best = distances(), suprema(game, batch)
    for _ in range(STEPS):
        assert critic_step(game.players, batch)[0].applied
        project(game)
    return before, distances(), best


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (4, 2)], ids=["one", "tp2-dp2"])
def test_critic_steps_reach_the_best_linear_critic(tmp_path: Path, ranks: int, tensor: int) -> None:
    settings: dict[str, Any] = make_files(tmp_path)
    config = write_config(
        tmp_path,
        settings,
        f"parallel.tensor_model_parallel_size={tensor}",
        "critic.features=teacher",
        "critic.squash=none",
        "critic.center=false",
        "training.ddp={use_distributed_optimizer: false}",
        # With so large an eps Adam is gradient ascent with momentum; its own direction has another best point.
        "critic.optim={learning_rate: 1e+4, adam_eps: 1e+3, weight_decay: 0, clip_grad: 0, decay: constant}",
    )
    before, after, best = run_distributed(ascend, ranks, config)[0]
    for low, reached, supremum in zip(before, after, best, strict=True):
        assert low < 0.5 * supremum
        assert 0.99 * supremum < reached <= 1.00001 * supremum
