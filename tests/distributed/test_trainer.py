"""The trainer's own decisions: who moves when, on how many batches, and what is logged about it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_amd.batch import Batch, Prompts
from megatron_amd.config import Config
from megatron_amd.data import load_tokenizer
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.training.setup import set_up
from megatron_amd.training.steps import measure
from megatron_amd.training.trainer import Trainer
from tests.distributed.runner import run_distributed
from tests.tiny_run import PROMPTS, make_files, write_config

pytestmark = pytest.mark.distributed
SHORT = ("training.steps=2", "checkpoint.export=false")
MOMENTS = ("amm/d_mm_off", "amm/d_mm_on")
Place = tuple[str, int]
"""Phase and iteration, from 1 on."""


@dataclass
class Seen:
    """What a run did, iteration by iteration."""

    rows: dict[Place, dict[str, float]] = field(default_factory=dict)
    """Its metrics."""
    draws: Counter[Place] = field(default_factory=Counter)
    """Batches of prompts."""
    consumed: int = 0
    """Position in the data at the end."""
    tokens: Counter[Place] = field(default_factory=Counter)
    """Response tokens generated."""
    batches: dict[Place, list[int]] = field(default_factory=dict)
    """Number of the batch of each step: the critic's, then the student's."""
    moments: dict[Place, list[dict[str, float]]] = field(default_factory=dict)
    """Measured before each step on its batch."""
    moved: dict[Place, set[str]] = field(default_factory=dict)
    """The players that changed."""
    changes: dict[Place, NDArray] = field(default_factory=dict)
    """Of all parameters of the student."""
    responses: list[tuple[str, list[int]]] = field(default_factory=list)
    """Off-policy prompts and responses."""
    heads: dict[str, NDArray] = field(default_factory=dict)
    """Of the critic as it enters, and of the other models then."""
    trunks: dict[str, NDArray] = field(default_factory=dict)
    """Parameters of the critic's trunk and of the student then."""


def flat(model: Any, leave_out: str = "none") -> NDArray:
    """A copy of all parameters."""
    kept = [p.detach().flatten() for name, p in model.named_parameters() if leave_out not in name]
    return torch.cat(kept).numpy()


class Watch:
    """Looks on as a trainer trains."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.seen = trainer, Seen()
        self.numbers: list[Batch] = []  # kept alive, so that each has an identity of its own
        self.before: dict[str, NDArray] = {}
        self.prompts: Prompts | None = None
        self.next, self.sample, self.write = trainer.loader.next, trainer.sample, trainer.journal.write
        trainer.loader.next = self._next  # type: ignore[method-assign]
        trainer.sample = self._sample  # type: ignore[method-assign]
        trainer.journal.write = self._write  # type: ignore[method-assign]
        for name in ("critic_step", "student_step"):
            setattr(trainer, name, self._watching(getattr(trainer, name)))

    @property
    def place(self) -> Place:
        return self.trainer.progress.phase, self.trainer.progress.iteration + 1

    def _next(self) -> Prompts:
        players = self.trainer.players
        if players.critic is not None and not self.seen.heads:
            self._look_at_critic()
        if not self.seen.draws[self.place]:
            self.before = {"student": flat(players.student)}
            self.before |= {"critic": flat(players.critic)} if players.critic is not None else {}
        self.seen.draws[self.place] += 1
        self.prompts = self.next()
        return self.prompts

    def _look_at_critic(self) -> None:
        players = self.trainer.players
        assert players.critic is not None
        heads = {f"{on}.{name}": w for on in (False, True) for name, w in players.critic.head_weights(on).items()}
        heads |= {"student": players.student.head_weight(), "teacher": players.teacher.head_weight()}
        self.seen.heads = {name: weight.detach().clone().numpy() for name, weight in heads.items()}
        self.seen.trunks = {
            "critic": flat(players.critic, leave_out="output_layer"),
            "student": flat(players.student, leave_out="output_layer"),
        }

    def _sample(self) -> Batch:
        is_new = self.trainer.batch is None
        batch = self.sample()
        if is_new:
            self.numbers.append(batch)
            self.seen.tokens[self.place] += sum(m.num_states for m in batch.microbatches)
            assert self.prompts is not None
            rows = [
                m.targets[m.state_rows == r].tolist() for m in batch.microbatches if not m.on_policy for r in (0, 1)
            ]
            self.seen.responses += zip(self.prompts.texts or (), rows, strict=False)
        return batch

    def _watching(self, step: Any) -> Any:
        def watched(batch: Batch) -> None:
            number = next(number for number, kept in enumerate(self.numbers) if kept is batch)
            self.seen.batches.setdefault(self.place, []).append(number)
            if batch.student_states is not None and batch.teacher_states is not None:
                self.seen.moments.setdefault(self.place, []).append(measure(self.trainer.players, batch))
            step(batch)

        return watched

    def _write(self, phase: str, iteration: int, metrics: dict[str, float]) -> None:
        place, players = (phase, iteration), self.trainer.players
        now = {"student": flat(players.student)}
        now |= {"critic": flat(players.critic)} if players.critic is not None else {}
        self.seen.rows[place] = dict(metrics)
        self.seen.moved[place] = {name for name in self.before if not np.array_equal(now[name], self.before[name])}
        self.seen.changes[place] = now["student"] - self.before["student"]
        self.seen.consumed = self.trainer.loader.consumed
        self.write(phase, iteration, metrics)


def watch(config: Config) -> Seen:
    """On a rank: a whole run."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    watched = Watch(set_up(config, layout)[0])
    assert watched.trainer.train() is None
    return watched.seen


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trainer")
    return folder, make_files(folder)


def run(files: tuple[Path, dict[str, Any]], directory: Path, *overrides: str) -> Seen:
    """A run of two iterations of the main phase in a directory of its own."""
    (seen,) = run_distributed(watch, 1, write_config(*files, f"run.directory={directory}", *SHORT, *overrides))
    return seen


# The student waits


def test_the_student_waits_while_the_smaller_tightness_is_below_the_threshold(files: Any, tmp_path: Path) -> None:
    first = ("main", 1)
    free = run(files, tmp_path / "free", "training.steps=1")
    assert "train/waiting" not in free.rows[first]
    assert "student" in free.moved[first]
    low, high = sorted(free.rows[first][f"amm/tightness_{states}"] for states in ("off", "on"))
    assert high - low > 1e-3
    for name, threshold, waits in (
        ("below both", low - 1e-3, False),
        ("the lower one itself", low, False),
        ("between", (low + high) / 2, True),
        ("above both", high + 1e-3, True),
    ):
        seen = run(files, tmp_path / name, "training.steps=1", f"critic.tightness_threshold={threshold:.17f}")
        row = seen.rows[first]
        assert row["train/waiting"] == waits, name
        assert seen.moved[first] == ({"critic"} if waits else {"critic", "student"}), name
        assert ("student/loss" in row) != waits, name
        assert sorted(row[f"amm/tightness_{states}"] for states in ("off", "on")) == [low, high], "of fresh states"


def test_a_critic_phase_moves_the_critic_alone(files: Any, tmp_path: Path) -> None:
    overrides = ("critic.warmup_steps=2", "warmup.steps=1", "objective.critic_steps=3", "training.steps=1")
    seen = run(files, tmp_path, *overrides, "critic.tightness_threshold=-1")
    assert list(seen.rows) == [("warmup", 1), ("critic", 1), ("critic", 2), ("main", 1)]
    assert list(seen.moved.values()) == [{"student"}, {"critic"}, {"critic"}, {"critic", "student"}]
    assert [len(steps) for steps in seen.batches.values()] == [1, 1, 1, 4]
    assert ["train/waiting" in row for row in seen.rows.values()] == [False, False, False, True]


# Batches


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_resample_draws_a_batch_for_each_step(files: Any, tmp_path: Path, resample: bool, steps: int) -> None:
    overrides = (f"objective.resample={resample}", f"objective.critic_steps={steps}", "warmup.steps=1")
    seen = run(files, tmp_path, *overrides, "critic.warmup_steps=1", "rollout.samples_per_prompt=2")
    in_main = steps + 1 if resample else 1
    assert dict(seen.draws) == {("warmup", 1): 1, ("critic", 1): 1, ("main", 1): in_main, ("main", 2): in_main}
    drawn = sum(seen.draws.values())
    assert seen.consumed == 4 * drawn
    state = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["loader"]["consumed"] == 4 * drawn
    for place in (("main", 1), ("main", 2)):
        assert len(seen.batches[place]) == steps + 1
        assert len(set(seen.batches[place])) == in_main
        assert seen.batches[place] == sorted(seen.batches[place]), "each step has a newer one"
    for place, row in seen.rows.items():
        counted = row["throughput/tokens_per_second"] * row["time/iteration"]
        assert counted == pytest.approx(seen.tokens[place], rel=1e-9), place


# Responses


def test_stop_strings_end_responses(files: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(files[0] / "teacher"))
    free = run(files, tmp_path / "free", "rollout.max_response_length=24", "training.steps=1").responses
    text = tokenizer.decode(max((tokens for _, tokens in free), key=len))
    stop = next(letter for letter in text[2:] if letter.isascii() and letter.isalnum())
    seen = run(
        files,
        tmp_path / "stop",
        "rollout.max_response_length=24",
        "training.steps=1",
        f"rollout.stop_strings=['{stop}']",
    )
    stopped = 0
    for (prompt, tokens), (same_prompt, whole) in zip(seen.responses, free, strict=True):
        assert prompt == same_prompt
        assert whole[: len(tokens)] == tokens, "the same response, ended earlier"
        assert stop not in tokenizer.decode(tokens[:-1])
        stopped += len(tokens) < len(whole)
    assert stopped
    assert seen.rows["main", 1]["rollout/capped_fraction_off"] < 1


def test_teacher_mixed_sampling(files: Any, tmp_path: Path) -> None:
    """A share of 1 is the teacher: off- and on-policy distances are alike in what the teacher thinks of the tokens."""
    mass = {}
    for share in (0, 1):
        overrides = (f"rollout.teacher_share={share}", "objective.policy_gradient=per_step", "training.steps=1")
        row = run(files, tmp_path / str(share), *overrides, "rollout.samples_per_prompt=8").rows["main", 1]
        mass[share] = row["distance/teacher_mass_on"], row["distance/teacher_mass_off"]
    assert mass[0][1] == mass[1][1]
    assert mass[1][0] > 4 * mass[0][0]


# Moments


@pytest.mark.parametrize("features", ["pair", "own"])
def test_moments_before_and_after_the_critics_steps(files: Any, tmp_path: Path, features: str) -> None:
    rate = "critic.optim.learning_rate=0.01"
    seen = run(files, tmp_path, f"critic.features={features}", "objective.critic_steps=2", "warmup.steps=1", rate)
    assert not any(name.startswith("amm/") for name in seen.rows["warmup", 1])
    for place in (("main", 1), ("main", 2)):
        row, (fresh, _, trained) = seen.rows[place], seen.moments[place]
        for name in MOMENTS:
            assert row[name] == pytest.approx(fresh[name], rel=1e-6)
            after = name.replace("d_mm", "d_mm_trained")
            assert row[after] == pytest.approx(trained[name], rel=1e-6)
            assert abs(row[after] - row[name]) > 1e-3 * abs(row[name]), "the critic has moved"


def test_no_trained_moments_where_the_critic_has_not_trained_on_the_batch(files: Any, tmp_path: Path) -> None:
    seen = run(files, tmp_path, "objective.critic_steps=2", "objective.resample=true", "critic.warmup_steps=1")
    for place, row in seen.rows.items():
        assert not any("trained" in name for name in row), place
        last = seen.moments[place][0 if place[0] == "critic" else 1]  # on the last batch of the critic's own
        assert [row[name] for name in MOMENTS] == pytest.approx([last[name] for name in MOMENTS], rel=1e-6)


@pytest.mark.parametrize("features", ["teacher", "own"])
def test_without_critic_steps_the_critic_stays_and_is_measured(files: Any, tmp_path: Path, features: str) -> None:
    seen = run(files, tmp_path, "objective.critic_steps=0", f"critic.features={features}", "training.steps=3")
    assert list(seen.rows) == [("main", 1), ("main", 2), ("main", 3)]
    for place, row in seen.rows.items():
        assert seen.moved[place] == {"student"}
        (measured,) = seen.moments[place]
        assert measured.keys() <= row.keys()
        assert [row[name] for name in measured] == pytest.approx(list(measured.values()), rel=1e-6)
        assert measured["amm/d_mm_on"] != 0
        assert not any("trained" in name or name in ("critic/loss", "critic/learning_rate") for name in row)


# Responses of the data


@pytest.mark.parametrize("longest", [3, 60])
def test_gold_responses_are_cut_at_the_longest_response(files: Any, tmp_path: Path, longest: int) -> None:
    overrides = ("rollout.off_policy=data", f"rollout.max_response_length={longest}", "training.steps=3")
    seen = run(files, tmp_path, *overrides, "objective.name=sft", "objective.beta=1")
    tokenizer = load_tokenizer(str(files[0] / "teacher"))
    assert len(seen.responses) == 12
    whole = 0
    for prompt, response in seen.responses:
        (question,) = [question for question in PROMPTS if question in prompt]
        gold = [*tokenizer.encode(question[::-1]), tokenizer.eos_id]
        assert response == gold[:longest]
        whole += response == gold
    assert whole == (0 if longest == 3 else 12)


# The start of the main phase


@pytest.mark.parametrize("features", ["pair", "teacher", "own"])
@pytest.mark.parametrize("init", ["lm_head", "zero", "random"])
def test_first_weights_of_the_critic(files: Any, tmp_path: Path, features: str, init: str) -> None:
    overrides = (f"critic.features={features}", f"critic.head_init={init}", "critic.head_scale=0.5")
    seen = run(files, tmp_path, *overrides, "warmup.steps=1", "warmup.optim.learning_rate=0.01", "training.steps=1")
    sources = {"pair": ("teacher", "student"), "teacher": ("teacher",), "own": ("own",)}[features]
    heads = {name: weight for name, weight in seen.heads.items() if "." in name}
    assert sorted(heads) == sorted(f"{on}.{source}" for on in (False, True) for source in sources)
    for name, weight in heads.items():
        source = name.partition(".")[2].replace("own", "student")
        if init == "lm_head":  # the student's as the warm-up has left it
            assert np.array_equal(weight, seen.heads[source] * 0.5), name
        elif init == "zero":
            assert not weight.any(), name
        else:
            assert weight.std() == pytest.approx(0.02, rel=0.05), name
            assert abs(weight.mean()) < 1e-3, name
    if init == "random":
        assert len({tuple(weight[0].tolist()) for weight in heads.values()}) == len(heads), "each has its own"
    if features == "own":
        assert np.array_equal(seen.trunks["critic"], seen.trunks["student"])


def test_the_main_phase_starts_with_fresh_moments(files: Any, tmp_path: Path) -> None:
    """Adam's first step moves every parameter by the learning rate, whatever its gradient; a later one does not."""
    optim = "{learning_rate: 0.001, weight_decay: 0, clip_grad: 0, decay: constant, adam_eps: 1.0e-16}"
    kl = ("warmup.steps=3", "warmup.name=kl", "objective.name=kl", "objective.beta=1", "training.steps=2")
    seen = run(files, tmp_path, *kl, f"warmup.optim={optim}", f"training.optim={optim}")

    def share_of_full_steps(place: Place) -> float:
        size = np.abs(seen.changes[place])
        return float((np.abs(size[size > 0] - 0.001) < 2e-5).mean())

    shares = {place: share_of_full_steps(place) for place in seen.rows}
    assert all(math.isfinite(share) for share in shares.values())
    assert shares["warmup", 1] > 0.95
    assert shares["main", 1] > 0.95
    assert all(shares[place] < 0.5 for place in (("warmup", 2), ("warmup", 3), ("main", 2)))


def test_each_rank_gets_its_random_state_back(files: Any, tmp_path: Path) -> None:
    """Nothing in a run draws from torch's generators today; what comes to draw must find them where they were."""
    folder, settings = files
    overrides = (f"run.directory={tmp_path / 'run'}", "training.steps=1", "checkpoint.export=false")
    config = write_config(folder, settings, *overrides, "evaluation.prompts=0")

    def save_and_resume() -> tuple[list[int], list[int], list[int]]:
        layout = build_layout(config.parallel, torch.device("cpu"))
        set_seeds(config.run.seed, layout)
        trainer, _ = set_up(config, layout)
        torch.manual_seed(100 + layout.dp_rank)
        saved = torch.get_rng_state().tolist()
        trainer.train()
        torch.manual_seed(5)
        other = torch.get_rng_state().tolist()
        set_up(config, layout)
        return saved, other, torch.get_rng_state().tolist()

    results = run_distributed(save_and_resume, 2)
    for saved, other, resumed in results:
        assert saved != other
        assert resumed == saved
    assert results[0][0] != results[1][0]
