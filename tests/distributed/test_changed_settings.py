"""A run that goes on with other settings than it began with: which take effect, which are refused, where it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.checkpoint.folder import latest, read_state
from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import Layout, build_layout
from megatron_amd.training.setup import set_up
from megatron_amd.training.trainer import Trainer
from tests.distributed.runner import run_distributed
from tests.tiny_game import snapshot
from tests.tiny_run import make_files, read_metrics, write_config

pytestmark = pytest.mark.distributed
RATES = ("student/learning_rate", "critic/learning_rate")
OPTIM = "{learning_rate: 0.001, warmup_steps: 2, decay: cosine}"
COMMON = ("checkpoint.export=false", f"training.optim={OPTIM}", f"critic.optim={OPTIM}")
MOST_STEPS = 20
"""More than any run here has."""
Place = tuple[str, int]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path, make_files(tmp_path)


def open_trainer(config: Config, layout: Layout) -> Trainer:
    set_seeds(config.run.seed, layout)
    return set_up(config, layout)[0]


def stop_after(trainer: Trainer, place: Place | None) -> None:
    """Have the run told to stop in the iteration with which it comes to `place`, after its last step."""
    finish, count = trainer._finish_iteration, 0

    def finish_then_stop() -> None:
        nonlocal count
        count += 1
        assert count <= MOST_STEPS, "the run does not end"
        if (trainer.progress.phase, trainer.progress.iteration + 1) == place:
            os.kill(os.getpid(), signal.SIGTERM)
        finish()

    trainer._finish_iteration = finish_then_stop  # type: ignore[method-assign]


def train(runs: list[tuple[Config, Place | None]]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """On a rank, one run after another: the metrics on the disk, and what the players and their optimizers are."""
    results = []
    layout = build_layout(runs[0][0].parallel, torch.device("cpu"))
    for config, place in runs:
        trainer = open_trainer(config, layout)
        stop_after(trainer, place)
        assert trainer.train() == (signal.SIGTERM if place else None)
        players = trainer.players
        state = {
            f"{player}.{name}": tensor.double().numpy()
            for player, optimization in (
                ("student", players.student_optimization),
                ("critic", players.critic_optimization),
            )
            for name, tensor in snapshot(optimization).items()
        }
        results.append((read_metrics(Path(config.run.directory)), state))
    return results


def play(*runs: tuple[Config, Place | None], ranks: int = 1) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """What the last rank saw of each run."""
    return run_distributed(train, ranks, list(runs))[-1]


def places(rows: list[dict[str, Any]]) -> list[Place]:
    return [(row["phase"], row["iteration"]) for row in rows]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


# Longer runs and other rates


@pytest.mark.parametrize(
    "overrides",
    [(), ("training.precision=bf16",), ("training.ddp={use_distributed_optimizer: false}",)],
    ids=["fp32", "bf16", "plain optimizer"],
)
def test_a_longer_run_goes_on_with_the_rates_of_one_that_was_longer_from_the_start(files: Any, overrides: Any) -> None:
    short = write_config(*files, *COMMON, *overrides, "training.steps=2")
    longer = write_config(*files, *COMMON, *overrides, "training.steps=6")
    whole = write_config(*files, *COMMON, *overrides, "training.steps=6", f"run.directory={files[0] / 'whole'}")
    (first, _), (extended, _), (expected, _) = play((short, None), (longer, None), (whole, None))
    assert [row["iteration"] for row in extended] == [1, 2, 3, 4, 5, 6]
    assert extended[:2] == first
    for name in RATES:
        rates = [row[name] for row in extended]
        assert rates[2:] == [row[name] for row in expected[2:]], name
        assert rates[2] > rates[3] > rates[4] > rates[5] > 0, name


def groups(config: Config) -> list[dict[str, Any]]:
    """On a rank: the settings of all groups of parameters, as the run would go on with them."""
    players = open_trainer(config, build_layout(config.parallel, torch.device("cpu"))).players
    optimizations = (players.student_optimization, players.critic_optimization)
    parts = [part for o in optimizations if o for part in getattr(o.optimizer, "chained_optimizers", [o.optimizer])]
    return [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for part in parts
        for group in part.param_groups
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_settings_of_the_optimizers_take_effect(files: Any, precision: str) -> None:
    common = (*COMMON, f"training.precision={precision}")
    changed = (
        "training.optim={learning_rate: 0.5, min_learning_rate: 0.1, weight_decay: 0.2, adam_betas: [0.7, 0.8]}",
        "critic.optim={learning_rate: 0.25, decay: linear, adam_eps: 0.001}",
        "training.steps=4",
    )
    whole = write_config(*files, *common, *changed, f"run.directory={files[0] / 'whole'}")
    ended = write_config(*files, *common, "training.steps=2")
    going_on = write_config(*files, *common, *changed)
    play((ended, None))
    play((whole, ("main", 2)))
    found, expected = (run_distributed(groups, 1, config)[0] for config in (going_on, whole))
    assert {group["betas"] for group in found} == {(0.7, 0.8), (0.9, 0.95)}
    assert {group["eps"] for group in found} == {1e-8, 1e-3}
    assert found == expected
    (rows, _), (uninterrupted, _) = play((going_on, None), (whole, None))
    for name in RATES:
        assert [row[name] for row in rows[2:]] == [row[name] for row in uninterrupted[2:]]
    assert rows[2]["student/learning_rate"] > 0.1


# Shorter phases


@pytest.mark.parametrize(
    ("phase", "setting"), [("warmup", "warmup.steps"), ("critic", "critic.warmup_steps")], ids=["warm-up", "critic's"]
)
def test_a_phase_that_was_made_shorter_than_it_already_is_ends(files: Any, phase: str, setting: str) -> None:
    common = (*COMMON, "warmup.name=kl", "training.steps=2", "checkpoint.save_interval=1")
    long, short = (write_config(*files, *common, f"{setting}={steps}") for steps in (5, 1))
    (stopped, _), (ended, _) = play((long, (phase, 3)), (short, None))
    assert places(stopped) == [(phase, 1), (phase, 2), (phase, 3)]
    assert places(ended) == [*places(stopped), ("main", 1), ("main", 2)]
    assert names(files[0]) == ["step-00000004", "step-00000005"]


def test_checkpoints_keep_their_order_when_an_earlier_phase_is_made_shorter(files: Any) -> None:
    common = (*COMMON, "objective.name=kl", "warmup.name=kl", "checkpoint.save_interval=1")
    before = write_config(*files, *common, "warmup.steps=4", "training.steps=2")
    after = write_config(*files, *common, "warmup.steps=1", "training.steps=4")
    play((before, None))
    assert names(files[0]) == ["step-00000005", "step-00000006"]
    ((rows, state),) = play((after, None))
    assert names(files[0]) == ["step-00000007", "step-00000008"]
    newest = latest(files[0] / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000008"
    assert read_state(newest)["progress"]["iteration"] == 4
    ((again, found),) = play((after, None))  # finds that there is nothing left to do
    assert again == rows
    assert all((found[name] == tensor).all() for name, tensor in state.items())


# Without Megatron-Core's distributed optimizer


@pytest.mark.parametrize(
    ("ranks", "precision", "place"),
    [(1, "fp32", ("main", 2)), (1, "bf16", ("critic", 1)), (2, "fp32", ("critic", 1)), (2, "bf16", ("warmup", 1))],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_the_plain_optimizer_resumes_bit_for_bit(files: Any, ranks: int, precision: str, place: Place) -> None:
    settings = (
        *COMMON, f"training.precision={precision}", "training.ddp={use_distributed_optimizer: false}",
        "warmup.steps=2", "warmup.name=kl", "critic.warmup_steps=1", "critic.features=own", "training.steps=3",
    )  # fmt: skip
    whole, halves = (
        write_config(*files, *settings, f"run.directory={files[0] / name}") for name in ("whole", "halves")
    )
    (expected, state), _, (found, resumed) = play((whole, None), (halves, place), (halves, None), ranks=ranks)
    assert len(expected) == 6
    assert found == expected
    assert resumed.keys() == state.keys()
    assert [name for name, values in state.items() if not (values == resumed[name]).all()] == []
