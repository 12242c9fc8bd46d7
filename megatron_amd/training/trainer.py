"""Algorithm 1: min over the student, max over two critics, on sequences that the student generates as it learns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_amd.batch import Batch, Prompts, Rollouts
from megatron_amd.checkpoint import store
from megatron_amd.config import Config, ObjectiveConfig, WarmupConfig, config_to_dict
from megatron_amd.data.loader import PromptLoader
from megatron_amd.distributed.initialize import agreed
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError
from megatron_amd.evaluation.distances import HeldOut
from megatron_amd.models.roles import ModelPlan
from megatron_amd.rollout.replay import Replay
from megatron_amd.training.collect import (
    OFF,
    ON,
    capped_more,
    make_batch,
    off_policy_responses,
    response_metrics,
    student_responses,
)
from megatron_amd.training.journal import Journal
from megatron_amd.training.metrics import Timers
from megatron_amd.training.optimizer import build_optimization, wrap_for_training
from megatron_amd.training.players import Players, enter_critic
from megatron_amd.training.signals import StopSignals
from megatron_amd.training.statistics import memory_metrics
from megatron_amd.training.steps import critic_step, measure, student_step


@dataclass
class Progress:
    """Where a run is: all that a checkpoint needs to know of the loop."""

    phase: str = "warmup"
    """`warmup`, `critic` (critic-only steps) or `main`."""
    iteration: int = 0
    """Finished iterations of the phase."""
    total_iterations: int = 0
    """Finished iterations of all phases: the number of a checkpoint."""
    tokens: float = 0.0
    """Response tokens of the current iteration so far, over the global batch."""
    critic_steps: int = 0
    """Critic steps done in the current iteration: the place inside K."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the current iteration so far."""
    skipped: dict[str, int] = field(default_factory=lambda: {"student": 0, "critic": 0})
    """Steps of each player that were skipped for a gradient that was not finite."""
    skipped_in_a_row: dict[str, int] = field(default_factory=lambda: {"student": 0, "critic": 0})
    """The same since the player's last step that was not."""
    capped: dict[str, list[float]] = field(default_factory=dict)
    """Of each policy's responses, for `capped_more`."""


class Trainer:
    """One run. `train` is the paper's algorithm; the rest is what each of its lines takes.

    Args:
        config: the run's settings.
        plan: the models' sizes.
        players: teacher and student, filled with their first weights, the student not yet wrapped for training.
        loader: prompts of this replica, at its place in the run.
        eos_ids: tokens that end a response.
        held_out: the evaluation, or None.
        resume_from: what `find_checkpoint` has found.

    All methods are collective.

    Raises:
        InputError: the run directory cannot be written, or its checkpoint is damaged.
    """

    def __init__(
        self,
        config: Config,
        plan: ModelPlan,
        players: Players,
        loader: PromptLoader,
        eos_ids: tuple[int, ...],
        held_out: HeldOut | None,
        resume_from: Checkpoint | None = None,
    ) -> None:
        self.config, self.plan, self.players = config, plan, players
        self.loader, self.eos_ids, self.held_out = loader, eos_ids, held_out
        self.progress = Progress()
        self.timers = Timers()
        self.batch: Batch | None = None
        prompts = config.training.global_batch_size
        needed = {OFF: prompts, ON: prompts * config.rollout.samples_per_prompt}
        self.replay = Replay(config.rollout.reuse, config.run.seed, players.layout, needed)
        self._before_batch: dict[str, Any] = {}  # what the batch was drawn from, as it was then
        self._checkpoints = Path(config.run.directory) / "checkpoints"
        critic_only = config.critic.warmup_steps if config.objective.name == "amm" else 0
        self.phases = {"warmup": config.warmup.steps, "critic": critic_only, "main": config.training.steps}
        self._student = wrap_for_training(players.student, players.layout, config.training.ddp)
        self._start(resume_from)

    def describe_start(self) -> str:
        """One line: what begins, or where it goes on from."""
        layout, progress = self.players.layout, self.progress
        ranks = f"tensor {layout.tp_size} x pipeline {layout.pp_size} x data {layout.dp_size}"
        place = "begins"
        if progress.total_iterations or progress.critic_steps:
            place = f"goes on after {progress.phase} {progress.iteration}/{self.phases[progress.phase]}"
        if progress.phase == "main" and progress.iteration >= self.phases["main"]:
            place = f"has finished its {progress.iteration} iterations; more training.steps would go on from there"
        return f"{self.config.run.directory}: {place} ({self.config.objective.name}, {ranks})"

    def train(self) -> int | None:
        """Run to the end, or until a signal asks to stop.

        Returns:
            None when the run is complete, else the number of the signal, after a checkpoint.
        """
        progress = self.progress
        with StopSignals(self.players.layout) as stop, self.journal:
            while progress.iteration < self.phases[progress.phase] or progress.phase != "main":
                if progress.iteration >= self.phases[progress.phase]:
                    self._next_phase()
                    continue
                self._iteration(stop)
                if stop.signal is not None:
                    self.save()
                    return stop.signal
            self.evaluate("after")
            self.save()
        return None

    def _iteration(self, stop: StopSignals) -> None:
        """Algorithm 1, one iteration. A warm-up has no critic, a critic-only phase no student step."""
        with self.timers("iteration"):
            if self.progress.critic_steps and not self.config.objective.resample:
                self.sample()  # resumed inside K: draw the batch again, also if nothing is left to do with it
            while self.progress.critic_steps < self._critic_steps():
                self.critic_step(self.sample())
                if self.config.objective.resample:
                    self.batch = None
                if stop.requested():
                    return
            if self.progress.phase != "critic" and not self._student_waits():
                self.student_step(self.sample())
        self._finish_iteration()
        stop.requested()

    def sample(self) -> Batch:
        """The iteration's batch: prompts, the teacher's and the student's responses, both models' hidden states."""
        if self.batch is not None:
            return self.batch
        objective = self._objective()
        self._before_batch = self._sources()
        with self.timers("rollout"):
            rollouts = self._rollouts(objective.beta)
        with self.timers("hidden"):
            self.batch = make_batch(
                self.players,
                rollouts,
                beta=objective.beta if ON in rollouts else 1.0,
                student_states=objective.name == "amm",
                teacher_states=objective.name != "sft",
            )
            if objective.name == "amm" and not self._critic_steps():  # other steps measure as they go
                self.progress.metrics |= measure(self.players, self.batch)
        lengths = response_metrics(self.players, rollouts, self.eos_ids)
        self.progress.metrics |= lengths
        count, samples = self.config.training.global_batch_size, self.config.rollout.samples_per_prompt
        if not self.config.objective.resample:
            self.progress.tokens = 0.0  # of this very batch, where the run goes on in the middle of an iteration
        self.progress.tokens += count * lengths.get("rollout/response_length_off", 0.0)
        self.progress.tokens += count * samples * lengths.get("rollout/response_length_on", 0.0)
        return self.batch

    def _rollouts(self, beta: float) -> dict[bool, Rollouts]:
        """The iteration's sequences: generated now, kept from earlier iterations, or the data's."""
        progress = self.progress
        by_teacher = self.config.rollout.off_policy == "teacher"
        done = progress.iteration / max(self.phases["main"], 1) if progress.phase == "main" else 0.0
        kinds = [kind for kind, used in ((OFF, beta > 0 and by_teacher), (ON, beta < 1)) if used]
        turn = self.replay.turn(progress.total_iterations, done, kinds)
        beta = beta if turn.student else 1.0
        prompts = None
        if turn.fresh or (beta > 0 and not by_teacher):
            with agreed():
                prompts = self.loader.next()

        def off_policy(prompts: Prompts) -> Rollouts:
            return off_policy_responses(self.players, prompts, self.eos_ids, self.journal.generating)

        def on_policy(prompts: Prompts) -> Rollouts:
            return student_responses(self.players, prompts, self.eos_ids, self.journal.generating)

        rollouts: dict[bool, Rollouts] = {}
        if beta > 0 and by_teacher:
            rollouts[OFF], _ = self.replay.serve(turn, OFF, prompts, off_policy)
        elif beta > 0 and prompts is not None:
            rollouts[OFF] = off_policy(prompts)
        if beta < 1:
            rollouts[ON], progress.metrics["rollout/staleness"] = self.replay.serve(turn, ON, prompts, on_policy)
        if self.config.rollout.reuse.mode == "adaptive":
            progress.metrics["rollout/student_probability"] = self.replay.probability
        return rollouts

    def _sources(self) -> dict[str, Any]:
        """What the next batch is drawn from."""
        return {"loader": self.loader.state_dict(), "replay": self.replay.state_dict()}

    def critic_step(self, batch: Batch) -> None:
        """max over f_1, f_2: one ascent step."""
        with self.timers("critic"):
            step, moves, moments = critic_step(self.players, batch)
        # Only a batch's first critic step sees moments of states that the critic has not trained on.
        fresh = moments if self.progress.critic_steps == 0 or self.config.objective.resample else {}
        self.progress.metrics |= fresh | moves
        self.progress.critic_steps += 1
        self._count(step.applied, "critic")

    def student_step(self, batch: Batch) -> None:
        """min over the student: one descent step."""
        with self.timers("student"):
            step, metrics = student_step(self.players, batch, self._objective().name)
        if self.config.objective.resample or not self._critic_steps():  # then no critic has trained on this batch
            metrics = {name: value for name, value in metrics.items() if not name.startswith("amm/d_mm_trained")}
        self.progress.metrics |= metrics
        self._count(step.applied, "student")

    def evaluate(self, when: str) -> None:
        """Measure the held-out distances, unless that is done already at this point of the run."""
        point = {"when": when, "phase": self.progress.phase, "iteration": self.progress.iteration}
        if self.held_out is None or self.journal.has_evaluation(point):
            return
        place = f"iteration {self.progress.iteration}" if when == "step" else f"{when} the main phase"
        self.journal.say(f"measuring on {self.config.evaluation.prompts} held-out prompts ...")
        result = self.held_out.evaluate(self.players)
        self.journal.add_evaluation(point, result)
        self.replay.heed(result["kl_off"])
        self.journal.say(
            f"held out, {place}: TV {result['tv_off']:.4f} off {result['tv_on']:.4f} on, "
            f"KL {result['kl_off']:.4f} off {result['kl_on']:.4f} on"
        )

    def save(self) -> None:
        """Write a checkpoint from which the run goes on bit for bit."""
        store.save(
            self._checkpoints,
            step=self.progress.total_iterations,
            roles=self._roles(),
            state={
                "progress": asdict(self.progress),
                **(self._before_batch if self.batch is not None else self._sources()),
                "evaluations": self.journal.evaluations,
                "config": config_to_dict(self.config),
            },
            fingerprint=fingerprint(self.config, self.plan),
            rank_state={"rng": _random_states()},
            keep=self.config.checkpoint.keep,
        )

    def _objective(self) -> ObjectiveConfig | WarmupConfig:
        return self.config.warmup if self.progress.phase == "warmup" else self.config.objective

    def _critic_steps(self) -> int:
        """K of the current phase."""
        if self.progress.phase == "warmup" or self.config.objective.name != "amm":
            return 0
        return 1 if self.progress.phase == "critic" else self.config.objective.critic_steps

    def _student_waits(self) -> bool:
        """Whether the critic is too loose to be followed, judged on states that it has not trained on."""
        threshold = self.config.critic.tightness_threshold
        if threshold is None or not self._critic_steps():
            return False
        tightness = [value for name, value in self.progress.metrics.items() if name.startswith("amm/tightness_")]
        waits = min(tightness, default=1.0) < threshold
        self.progress.metrics["train/waiting"] = float(waits)
        return waits

    def _count(self, applied: bool, player: str) -> None:
        """Count the steps skipped for a gradient that is not finite; stop the run when they do not end."""
        progress = self.progress
        if applied:
            progress.skipped_in_a_row[player] = 0
            return
        progress.skipped[player] += 1
        progress.skipped_in_a_row[player] += 1
        count = progress.skipped_in_a_row[player]
        if count >= self.config.training.max_nonfinite_steps:
            raise InputError(
                f"{count} {player} steps in a row had a gradient that is not finite, the last one in iteration "
                f"{progress.iteration + 1} of the {progress.phase} phase; lower the learning rates, or look at the "
                "data there"
            )

    def _finish_iteration(self) -> None:
        progress, config = self.progress, self.config
        progress.iteration += 1
        progress.total_iterations += 1
        progress.critic_steps = 0
        self.batch = None
        metrics, progress.metrics = progress.metrics, {}
        for warning in capped_more(progress.capped, metrics):
            self.journal.say(warning)
        times = self.timers.collect()
        tokens, progress.tokens = progress.tokens, 0.0
        counts = {
            "throughput/tokens_per_second": tokens / times["time/iteration"],
            "train/skipped_student_steps": progress.skipped["student"],
            "train/skipped_critic_steps": progress.skipped["critic"],
        }
        memory = memory_metrics(self.players.layout)
        self.journal.write(progress.phase, progress.iteration, metrics | times | counts | memory)
        if progress.iteration >= self.phases[progress.phase]:
            return  # the end of a phase has its own evaluation and checkpoint
        if progress.phase == "main" and _is_due(progress.iteration, config.evaluation.interval):
            self.evaluate("step")
        if _is_due(progress.iteration, config.checkpoint.save_interval):
            self.save()

    def _next_phase(self) -> None:
        """Leave a finished phase. After the warm-up come the first evaluation and the critic's entrance."""
        if self.progress.phase == "warmup":
            self.evaluate("before")
        self.progress.phase = {"warmup": "critic", "critic": "main"}[self.progress.phase]
        self.progress.iteration = 0
        if self.progress.phase == "critic":
            self._enter_main_game()

    def _enter_main_game(self) -> None:
        """Bring in the critic, started from the models as they are, and give the student a fresh optimizer."""
        players, config = self.players, self.config
        players.student_optimization = None  # the warm-up's, before the next is built
        players.student_optimization = build_optimization(
            self._student, config.training.optim, players.layout, config.training.steps, "training.optim"
        )
        if config.objective.name == "amm":
            steps = self.phases["critic"] + self.phases["main"] * config.objective.critic_steps
            enter_critic(players, self.plan, steps)

    def _start(self, resume_from: Checkpoint | None) -> None:
        config, players = self.config, self.players
        path, state = resume_from or (None, None)
        if state is not None:
            self.progress = Progress(**state["progress"])
            if "replay" in state:
                self.replay.load_state_dict(state["replay"])
        self.journal = Journal(config, self.phases, resume=state)
        if self.progress.phase == "warmup":
            players.student_optimization = build_optimization(
                self._student, config.warmup.optim, players.layout, max(1, config.warmup.steps), "warmup.optim"
            )
        else:
            self._enter_main_game()
        if path is not None and state is not None:
            _, rank_state = store.load(path, self._roles(), fingerprint=fingerprint(config, self.plan))
            _restore_random_states(rank_state["rng"])

    def _roles(self) -> dict[str, Any]:
        """The trained roles as the checkpoint wants them."""
        players = self.players
        roles: dict[str, Any] = {"student": store.RoleState.of(players.student_optimization, players.layout)}
        critic = players.critic_optimization
        if critic is not None:  # one that is only heads has no part on earlier stages
            roles["critic"] = store.RoleState.of(critic if critic.has_parameters else None, players.layout)
        return roles


Checkpoint = tuple[Path, dict[str, Any]]
"""A checkpoint's folder and its state."""


def find_checkpoint(config: Config, plan: ModelPlan, layout: Layout) -> Checkpoint | None:
    """The newest checkpoint of `run.directory`, from which the run goes on; None where there is none. Collective.

    Raises:
        InputError: it does not fit this run, or checkpoint.resume is off.
    """
    found = None
    with agreed():
        path = store.latest(Path(config.run.directory) / "checkpoints")
        if path is not None and not config.checkpoint.resume:
            raise InputError(
                f"{config.run.directory}: already holds a run; set checkpoint.resume: true to go on with it, or "
                "choose another run.directory"
            )
        if path is not None:
            found = path, store.read_state(path)
            for key in ("progress", "loader", "evaluations"):
                if key not in found[1]:
                    raise InputError(f"{path}: holds no {key}; it is no checkpoint of a run of this program")
            roles = ["student"]
            if config.objective.name == "amm" and found[1]["progress"]["phase"] != "warmup":
                roles.append("critic")
            store.check_fit(*found, dict.fromkeys(roles, layout), fingerprint(config, plan))
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, found and found[0].name)
    if len(set(names)) > 1:
        seen = " and ".join(sorted({name or "no checkpoint" for name in names}))
        raise InputError(f"{config.run.directory}: ranks see {seen} there; give a folder that is the same on all nodes")
    return found


def fingerprint(config: Config, plan: ModelPlan) -> dict[str, Any]:
    """What must be equal for a checkpoint to fit a run."""
    return {
        "student": plan.student.sizes(),
        "teacher": plan.teacher.sizes(),
        "seed": config.run.seed,
        "critic": _critic_fingerprint(config, plan),
        "precision": config.training.precision,
    }


def _critic_fingerprint(config: Config, plan: ModelPlan) -> Any:
    if config.objective.name != "amm":
        return "none"
    return plan.critic_trunk.sizes() if plan.critic_trunk else config.critic.features


def changed_settings(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Settings that differ from those a checkpoint was saved with, its place aside, as "section.field old -> new"."""
    found = store.differences(checkpoint[1].get("config", {}), config_to_dict(config))
    return [f"{name} {saved} -> {now}" for name, saved, now in found if name != "run.directory"]


def _is_due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0


def _random_states() -> dict[str, Any]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
