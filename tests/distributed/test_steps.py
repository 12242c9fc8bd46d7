"""The players' moves on real models: who changes, what bounds them, equal models, and gradients that are not finite.

Their values are compared with a dense computation in test_step_gradients.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_amd.batch import Batch
from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import Layout, build_layout
from megatron_amd.errors import InputError
from megatron_amd.objectives.fused_head import head_statistics
from megatron_amd.training.players import Players
from megatron_amd.training.setup import set_up
from megatron_amd.training.steps import critic_step, measure, student_step
from megatron_amd.training.trainer import Trainer
from tests import reference
from tests.dense_game import fixed_sequences
from tests.distributed.runner import run_distributed
from tests.tiny_game import Game, differing, finish_gradients, gathered, snapshot
from tests.tiny_run import make_files, write_config

pytestmark = pytest.mark.distributed
VOCAB_SIZE = 290
TP2 = ("parallel.tensor_model_parallel_size=2",)
PP2 = ("parallel.pipeline_model_parallel_size=2",)
FEATURES = ("own", "teacher", "pair")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("steps")
    return folder, make_files(folder)


def open_layout(config: Config) -> Layout:
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    return layout


def open_trainer(config: Config) -> Trainer:
    return set_up(config, open_layout(config))[0]


# Who changes


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_frozen(players: Players) -> None:
    """The teacher has no gradients, and no optimizer or gradient buffer holds any of it."""
    trained = [o.model for o in (players.student_optimization, players.critic_optimization) if o is not None]
    storages = {p.untyped_storage().data_ptr() for model in trained for p in model.parameters()}
    for name, parameter in players.teacher.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
        assert not hasattr(parameter, "main_grad"), name
        assert parameter.untyped_storage().data_ptr() not in storages, name


def moves(configs: list[Config]) -> list[tuple[bool, bool]]:
    """On a rank, for each config: whether the critic, and whether the student, changed by its own step."""
    layout = open_layout(configs[0])
    results = []
    for config in configs:
        game = Game(config, layout, VOCAB_SIZE, random_heads=True)
        players = game.players
        batch = game.batch(fixed_sequences("mixed", VOCAB_SIZE))
        teacher = copies(players.teacher)
        student, critic = snapshot(players.student_optimization), snapshot(players.critic_optimization)
        assert critic_step(players, batch)[0].applied
        assert not differing(student, snapshot(players.student_optimization))
        changed_critic = snapshot(players.critic_optimization)
        assert student_step(players, batch, "amm")[0].applied
        assert not differing(changed_critic, snapshot(players.critic_optimization))
        assert not differing(teacher, copies(players.teacher))
        check_frozen(players)
        head = "output_layer" if config.critic.features == "own" else "."
        results.append(
            (
                any(head in name for name in differing(critic, changed_critic)),
                "module.decoder.layers.0.mlp.linear_fc1.weight"
                in differing(student, snapshot(players.student_optimization)),
            )
        )
    return results


@pytest.mark.parametrize(("ranks", "layout"), [(1, ()), (2, TP2), (2, PP2)], ids=["one", "tp2", "pp2"])
def test_a_step_changes_its_own_player_alone(files: Any, ranks: int, layout: tuple[str, ...]) -> None:
    configs = [write_config(*files, f"critic.features={features}", *layout) for features in FEATURES]
    results = run_distributed(moves, ranks, configs)
    for number in range(len(FEATURES)):
        assert results[-1][number][0], "the critic's heads are on the last stage"
        assert all(result[number][1] for result in results), "each rank holds a part of the student"


# What bounds them


def state_statistics(players: Players, batch: Batch) -> list[Any]:
    """Statistics of every state under the critic as it is now; none where this is not the last stage."""
    own = players.critic_states(batch)
    if batch.student_states is None:
        return []
    return [
        head_statistics(
            players.student_head(batch.student_states[index]),
            players.teacher_head(batch, index),
            players.critic_head(batch, index, None if own is None else own[index]),
            microbatch.targets,
            players.vocabulary,
        )
        for index, microbatch in enumerate(batch.microbatches)
    ]


def train_within_bounds(config: Config) -> tuple[float, list[dict[str, Any]]]:
    """A whole run, checked at every state before and after each critic step. The largest tightness, the metrics."""
    trainer = open_trainer(config)
    teacher, bound, largest = copies(trainer.players.teacher), config.critic.bound, 0.0

    def check(batch: Batch) -> None:
        nonlocal largest
        for token in state_statistics(trainer.players, batch):
            assert (token.f_min >= -bound).all()
            assert (token.f_max <= bound).all()
            room = 2 * bound * token.tv
            assert (token.delta <= room + 1e-6 * bound).all(), (token.delta - room).max()
            assert (-token.delta <= room + 1e-6 * bound).all(), (token.delta + room).min()
            largest = max(largest, (token.delta / room).max().item())

    def checked_critic_step(batch: Batch) -> None:
        check(batch)
        type(trainer).critic_step(trainer, batch)
        check(batch)

    trainer.critic_step = checked_critic_step  # type: ignore[method-assign]
    assert trainer.train() is None
    assert not differing(teacher, copies(trainer.players.teacher))
    check_frozen(trainer.players)
    rows = (Path(config.run.directory) / "metrics.jsonl").read_text().splitlines()
    return largest, [json.loads(row) for row in rows]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ("critic.features=teacher", "critic.bound=0.5", "critic.warmup_steps=1")),
        (2, ("critic.features=pair", "critic.bound=2", "critic.prior=log_ratio", "critic.prior_scale=4", *TP2)),
        (2, ("critic.features=own", "objective.critic_steps=2", *PP2)),
    ],
    ids=["teacher", "pair and prior, tp2", "own, pp2"],
)
def test_no_state_exceeds_the_bound(files: Any, tmp_path: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    run = (f"run.directory={tmp_path}", "training.steps=3", "critic.optim.learning_rate=0.01")
    results = run_distributed(train_within_bounds, ranks, write_config(*files, *run, *overrides))
    largest, rows = results[-1]
    assert largest > (0.98 if "critic.prior=log_ratio" in overrides else 0.3), "the bound was never near"
    rows = [row for row in rows if "amm/d_mm_off" in row]
    assert len(rows) >= 3
    for row in rows:
        for state in ("off", "on"):
            assert abs(row[f"amm/d_mm_{state}"]) <= row[f"amm/tv_bound_{state}"]
            assert abs(row[f"amm/tightness_{state}"]) <= 1


# Equal models


def real_rows(shard: Tensor, layout: Layout) -> Tensor:
    """Shards of a head on all tensor-parallel ranks -> its real rows in float64."""
    return gathered(shard, layout)[:VOCAB_SIZE].double()


def check_random_critic(game: Game, batch: Batch) -> None:
    """-w q (f - E_q f) at the logits, carried to the head and, by the final norm's weight, to the hidden states."""
    players, layout = game.players, game.layout
    step, _ = student_step(players, batch, "amm")
    assert step.grad_norm > 0.01
    assert players.student_optimization is not None
    assert batch.student_states is not None
    finish_gradients(players.student_optimization)
    head = real_rows(players.student.head_weight(), layout)
    norm = players.student.decoder.final_layernorm.weight
    head_gradient, norm_gradient = torch.zeros_like(head), torch.zeros_like(norm, dtype=torch.float64)
    for index, microbatch in enumerate(batch.microbatches):
        critic = players.critic_head(batch, index, None)
        h, z = batch.student_states[index].double(), reference.logits(batch.student_states[index], head)
        f = reference.critic_values(
            [(reference.logits(s, real_rows(w, layout)), sign) for s, w, sign in critic.terms], z, z
        )
        q = z.softmax(1)
        w = (batch.weights[index].double() * 0.5)[:, None]
        slope = -w * q * (f - (q * f).sum(1, keepdim=True))
        head_gradient += slope.T @ h
        norm_gradient += ((slope @ head) * h / norm.double()).sum(0)
        assert microbatch.num_states == len(h)
    torch.testing.assert_close(
        real_rows(players.student.head_weight().main_grad, layout), head_gradient, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(norm.main_grad.double(), norm_gradient, rtol=1e-4, atol=1e-6)


def play_equal_models(configs: dict[str, Config]) -> None:
    layout = open_layout(configs["zero heads"])
    game = Game(configs["zero heads"], layout, VOCAB_SIZE)
    players = game.players
    batch = game.batch(fixed_sequences("mixed", VOCAB_SIZE))
    for name in ("kl", "rkl", "js", "tv"):
        assert student_step(players, batch, name)[0].grad_norm < 1e-7
    for start, config in configs.items():
        game.enter_critic(config, random_heads=start == "random")
        metrics = measure(players, batch)
        for state in ("off", "on"):
            assert metrics[f"amm/d_mm_{state}"] == metrics[f"amm/tv_bound_{state}"] == 0
            assert all(abs(metrics[f"distance/{name}_{state}"]) < 1e-7 for name in ("kl", "rkl", "js", "tv"))
            assert metrics[f"distance/top1_agreement_{state}"] == 1
        assert critic_step(players, batch)[0].grad_norm < 1e-7
        if start != "random":
            assert student_step(players, batch, "amm")[0].grad_norm < 1e-7
        elif layout.is_last_stage:
            check_random_critic(game, batch)


@pytest.mark.parametrize("ranks", [1, 2])
def test_equal_models_teach_nothing_but_what_a_random_critic_says(files: Any, ranks: int) -> None:
    folder, settings = files
    still = "{learning_rate: 0, weight_decay: 0, clip_grad: 0}"
    common = (f"teacher.path={folder / 'student'}", f"training.optim={still}", f"critic.optim={still}")
    common += ("objective.policy_gradient=per_step", *(TP2 if ranks == 2 else ()))
    starts = {
        "zero heads": ("critic.head_init=zero",),
        "prior alone": ("critic.head_init=zero", "critic.prior=log_ratio", "critic.prior_scale=4"),
        "random": (),
    }
    configs = {name: write_config(folder, settings, *common, *start) for name, start in starts.items()}
    run_distributed(play_equal_models, ranks, configs)


# Gradients that are not finite


def spoil_batch(batch: Batch, layout: Layout) -> None:
    """One state's weight on one replica: the reduction over data parallelism must carry it to the others."""
    if layout.dp_rank == 0:
        batch.weights[0][0] = torch.nan


def spoil_gradient(game: Game, player: str, value: float) -> None:
    """One entry of one head's finished gradient, on one tensor-parallel rank of the last stage."""
    players = game.players
    optimization = players.student_optimization if player == "student" else players.critic_optimization
    assert optimization is not None
    assert players.critic is not None
    prepare = optimization.optimizer.prepare_grads

    def prepare_spoilt() -> Any:
        if game.layout.is_last_stage and game.layout.tp_rank == game.layout.tp_size - 1:
            heads = players.critic.head_weights(True)  # type: ignore[union-attr]
            weight = players.student.head_weight() if player == "student" else next(iter(heads.values()))
            weight.main_grad[0, 0] = value
        optimization.optimizer.prepare_grads = prepare
        return prepare()

    optimization.optimizer.prepare_grads = prepare_spoilt


def skip_steps(config: Config) -> None:
    layout = open_layout(config)
    game = Game(config, layout, VOCAB_SIZE, random_heads=True)
    players = game.players

    def play(player: str, batch: Batch) -> bool:
        step = student_step(players, batch, "amm")[0] if player == "student" else critic_step(players, batch)[0]
        return step.applied

    for player in ("student", "critic"):
        batch = game.batch(fixed_sequences("mixed", VOCAB_SIZE))
        assert play(player, batch)
        before = snapshot(players.student_optimization), snapshot(players.critic_optimization)
        spoilt = game.batch(fixed_sequences("mixed", VOCAB_SIZE))
        spoil_batch(spoilt, layout)
        assert not play(player, spoilt)
        if layout.dp_size == 1:  # else a replica's optimizer reads its own part of the head alone
            for value in (torch.nan, torch.inf):
                spoil_gradient(game, player, value)
                assert not play(player, batch)
        assert not differing(before[0], snapshot(players.student_optimization))
        assert not differing(before[1], snapshot(players.critic_optimization))
        assert play(player, batch)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ("critic.features=own",)),
        (2, ()),
        (2, ("training.ddp={use_distributed_optimizer: false}",)),
        (4, (*TP2, *PP2)),
    ],
    ids=["one", "dp2", "dp2, plain optimizer", "tp2-pp2"],
)
def test_a_gradient_that_is_not_finite_changes_nothing(files: Any, ranks: int, overrides: tuple[str, ...]) -> None:
    run_distributed(skip_steps, ranks, write_config(*files, *overrides))


def train_on_spoilt_batches(
    config: Config, spoilt: Collection[int]
) -> tuple[str | None, int, int, list[dict[str, Any]]]:
    """A run whose batches of some iterations are spoilt: its error, skipped steps of student and critic, metrics."""
    trainer = open_trainer(config)
    sample = trainer.sample

    def spoiling_sample() -> Batch:
        batch = sample()
        if trainer.progress.iteration in spoilt:
            spoil_batch(batch, trainer.players.layout)
        return batch

    trainer.sample = spoiling_sample  # type: ignore[method-assign]
    message = None
    try:
        trainer.train()
    except InputError as error:
        message = str(error)
    parameters = trainer.players.student.parameters()
    assert all(parameter.isfinite().all() for parameter in parameters)
    rows = (Path(config.run.directory) / "metrics.jsonl").read_text().splitlines()
    progress = trainer.progress
    return message, progress.skipped["student"], progress.skipped["critic"], [json.loads(row) for row in rows]


def test_skipped_steps_are_counted_and_the_run_goes_on(files: Any, tmp_path: Path) -> None:
    run = (f"run.directory={tmp_path}", "training.steps=5", "training.max_nonfinite_steps=3")
    results = run_distributed(train_on_spoilt_batches, 2, write_config(*files, *run), (1, 3))
    for message, student, critic, rows in results:
        assert (message, student, critic) == (None, 2, 2), "four in all, but never three in a row"
        assert [row["train/skipped_student_steps"] for row in rows] == [0, 1, 1, 2, 2]
        assert [row["train/skipped_critic_steps"] for row in rows] == [0, 1, 1, 2, 2]
        assert [row["student/grad_norm"] is None for row in rows] == [False, True, False, True, False]


def test_a_run_stops_with_one_line_after_too_many_of_them(files: Any, tmp_path: Path) -> None:
    run = (f"run.directory={tmp_path}", "training.steps=5", "training.max_nonfinite_steps=3")
    results = run_distributed(train_on_spoilt_batches, 2, write_config(*files, *run), range(1, 5))
    for message, student, critic, rows in results:
        assert message is not None
        assert message == results[0][0]
        assert "\n" not in message
        assert "3 critic steps in a row" in message
        assert "iteration 4 of the main phase" in message
        assert (student, critic, len(rows)) == (2, 3, 3)
