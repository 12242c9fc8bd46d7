"""The two players' moves: a critic ascent step and a student descent step, each one forward-backward pass.

Symbols as in docs/algorithm.md: p teacher, q student, f_1 and f_2 the critic's heads, w_t = gamma^(t-1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_amd.batch import Batch, from_grid, to_grid
from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.schedule import backward_without_trunk, forward_backward
from megatron_amd.models.critic import TrunkCritic
from megatron_amd.objectives.fused_head import TokenStatistics, critic_loss, head_statistics, student_loss
from megatron_amd.objectives.moments import policy_gradient_scores
from megatron_amd.training.optimizer import StepResult
from megatron_amd.training.players import Players
from megatron_amd.training.statistics import batch_metrics, broadcast_from_last_stage, share_sums


def measure(players: Players, batch: Batch, *, tempered: bool = True) -> dict[str, float]:
    """Distances between the models on the batch, and the critic's moments if there is one. Collective.

    tempered: the distributions at the objective's temperatures; otherwise the models' own.
    """
    statistics = _statistics(players, batch, players.critic_states(batch), tempered)
    return batch_metrics(batch, statistics, players.layout, players.config.critic.bound)


def critic_step(players: Players, batch: Batch) -> tuple[StepResult, dict[str, float], dict[str, float]]:
    """max over f_1, f_2 of beta * U_off + (1 - beta) * U_on, one ascent step. Student and teacher do not change.

    Returns:
        What the optimizer did; loss, gradient norm and rate as metrics; and the batch's distances and moments under
        the critic as it was before the step. Collective.
    """
    assert players.critic_optimization is not None
    optimization, objective = players.critic_optimization, players.config.objective

    def loss_function(index: int, own_states: Tensor | None) -> tuple[Tensor, tuple[TokenStatistics, Tensor]]:
        microbatch = batch.microbatches[index]
        assert batch.student_states is not None
        loss, statistics = critic_loss(
            players.student_head(batch.student_states[index]),
            players.teacher_head(batch, index),
            players.critic_head(batch, index, own_states),
            targets=microbatch.targets,
            weights=batch.weights[index] * batch.coefficient(index),
            on_policy=microbatch.on_policy,
            estimator=objective.estimator,
            vocabulary=players.vocabulary,
            options=players.head_options,
        )
        return loss, (statistics, loss.detach())

    optimization.zero_grad()
    if isinstance(players.critic, TrunkCritic):
        kept = forward_backward(optimization.model, batch.microbatches, players.layout, loss_function)
    else:
        kept = backward_without_trunk(optimization.model, len(batch.microbatches), players.layout, loss_function)
    step = optimization.step()
    statistics = None if kept is None else [statistics for statistics, _ in kept]
    loss_sum = float(sum(loss.double() for _, loss in kept or ()))
    moments = batch_metrics(batch, statistics, players.layout, players.config.critic.bound)
    shared = torch.tensor([step.grad_norm, step.learning_rate, float(step.applied)], dtype=torch.float64)
    broadcast_from_last_stage(shared, players.layout)
    grad_norm, learning_rate, applied = shared.tolist()
    moves = {
        "critic/loss": _sum_loss(loss_sum, players.layout),
        "critic/grad_norm": grad_norm,
        "critic/learning_rate": learning_rate,
    }
    return StepResult(applied=bool(applied), grad_norm=grad_norm, learning_rate=learning_rate), moves, moments


def student_step(players: Players, batch: Batch, name: str) -> tuple[StepResult, dict[str, float]]:
    """min over the student of the objective, one descent step. Critic and teacher do not change.

    Args:
        name: the objective's name, which during a warm-up is not `objective.name`.

    Returns:
        What the optimizer did, and metrics: the loss, and the batch's distances before the step or, for `amm`, its
        moments after the critic's training. Collective.
    """
    assert players.student_optimization is not None
    optimization = players.student_optimization
    own_states = players.critic_states(batch) if name == "amm" else None
    weights, scores, metrics = _student_weights(players, batch, name, own_states)

    def loss_function(index: int, states: Tensor) -> tuple[Tensor, tuple[TokenStatistics | None, Tensor]]:
        microbatch = batch.microbatches[index]
        share = batch.coefficient(index)
        own = own_states[index] if own_states is not None else None
        loss, tokens = student_loss(
            players.student_head(states),
            players.teacher_head(batch, index) if name != "sft" else None,
            players.critic_head(batch, index, own) if name == "amm" else None,
            objective=players.objective(name),
            targets=microbatch.targets,
            weights=weights[index] * share,
            scores=None if scores[index] is None else scores[index] * share,
            vocabulary=players.vocabulary,
            options=players.head_options,
            with_statistics=name not in ("amm", "sft"),
        )
        return loss, (tokens.statistics, loss.detach())

    optimization.zero_grad()
    kept = forward_backward(optimization.model, batch.microbatches, players.layout, loss_function)
    step = optimization.step()
    if name not in ("amm", "sft"):
        statistics = None if kept is None else [statistics for statistics, _ in kept]
        metrics |= batch_metrics(batch, statistics, players.layout, players.config.critic.bound)
    metrics |= {
        "student/loss": _sum_loss(float(sum(loss.double() for _, loss in kept or ())), players.layout),
        "student/grad_norm": step.grad_norm,
        "student/learning_rate": step.learning_rate,
    }
    return step, metrics


def _student_weights(
    players: Players, batch: Batch, name: str, own_states: list[Tensor] | None
) -> tuple[list[Tensor], list[Any], dict[str, float]]:
    """Weights and scores of each state in the student's loss.

    For AMM's on-policy term this is the statistics pass before the gradient pass: delta at every state, from which
    follow the returns D_{t+1} and the baseline over the global batch.
    """
    weights, scores = list(batch.weights), [None] * len(batch.microbatches)
    if name != "amm":
        return weights, scores, {}
    statistics = _statistics(players, batch, own_states)
    trained = batch_metrics(batch, statistics, players.layout, players.config.critic.bound)
    metrics = {f"amm/d_mm_trained_{p}": trained[f"amm/d_mm_{p}"] for p in ("off", "on") if f"amm/d_mm_{p}" in trained}
    on = [index for index, microbatch in enumerate(batch.microbatches) if microbatch.on_policy]
    objective = players.config.objective
    if not on or statistics is None or objective.policy_gradient == "per_step":
        return weights, scores, metrics
    microbatches = [batch.microbatches[index] for index in on]
    delta, mask = to_grid(microbatches, [statistics[index].delta for index in on])  # type: ignore[misc]
    sampled, _ = to_grid(
        microbatches,
        [statistics[index].expected_f_teacher - statistics[index].f_target for index in on],  # type: ignore[operator]
    )
    grid_weights, grid_scores = policy_gradient_scores(
        objective.policy_gradient, delta, sampled, mask, objective.gamma, players.layout.groups.dp
    )
    scale = batch.scales[True]
    for index, weight, score in zip(
        on, from_grid(microbatches, grid_weights), from_grid(microbatches, grid_scores), strict=True
    ):
        weights[index], scores[index] = weight * scale, score * scale  # type: ignore[call-overload]
    return weights, scores, metrics


def _statistics(
    players: Players, batch: Batch, own_states: list[Tensor] | None, tempered: bool = True
) -> list[TokenStatistics] | None:
    """Per-token statistics of every micro-batch on the last stage, else None."""
    with_critic = players.critic is not None
    if batch.student_states is None or batch.teacher_states is None:
        return None
    return [
        head_statistics(
            players.student_head(batch.student_states[index], tempered=tempered),
            players.teacher_head(batch, index, tempered=tempered),
            players.critic_head(batch, index, own_states[index] if own_states else None) if with_critic else None,
            microbatch.targets,
            players.vocabulary,
            players.head_options,
        )
        for index, microbatch in enumerate(batch.microbatches)
    ]


def _sum_loss(loss: float, layout: Layout) -> float:
    """Sum of the last stages' losses over data parallelism, on every rank."""
    total = torch.tensor([loss], dtype=torch.float64)
    share_sums(total, layout)
    return total.item()
