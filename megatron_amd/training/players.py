"""Who plays: teacher, student and critic on this rank, and how they enter the game."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_amd.batch import Batch
from megatron_amd.config import Config
from megatron_amd.distributed.initialize import agreed
from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.schedule import forward_states
from megatron_amd.models.critic import SIGNS, HeadCritic, TrunkCritic
from megatron_amd.models.roles import LanguageModel, ModelPlan, build_critic, build_model
from megatron_amd.objectives.divergences import Divergence, divergence
from megatron_amd.objectives.heads import CriticHead, Head, HeadOptions
from megatron_amd.objectives.vocab_parallel import Vocabulary
from megatron_amd.training.first_weights import fill_critic, fill_model, freeze
from megatron_amd.training.optimizer import Optimization, build_optimization, wrap_for_training


@dataclass
class Players:
    """Everybody in the game on this rank."""

    config: Config
    layout: Layout
    vocabulary: Vocabulary
    teacher: LanguageModel
    student: LanguageModel
    is_complete: Callable[[Sequence[int]], bool] | None = None
    """Told a response's tokens so far, whether a stop string ends it."""
    student_optimization: Optimization | None = None
    critic: TrunkCritic | HeadCritic | None = None
    """None before the main game, and where the objective has no critic."""
    critic_optimization: Optimization | None = None

    def objective(self, name: str) -> str | Divergence:
        """`amm`, `sft`, or the distance of that name with the run's parameters."""
        if name in ("amm", "sft"):
            return name
        return divergence(name, gjs_weight=self.config.objective.gjs_weight, skew=self.config.objective.skew)

    @property
    def head_options(self) -> HeadOptions:
        """How the vocabulary-wide work is done."""
        training = self.config.training
        return HeadOptions(training.head_chunk_tokens, training.head_memory_mib, training.compile_heads)

    def student_head(self, states: Tensor, *, tempered: bool = True) -> Head:
        """The student's LM head on given states [N, H], at the objective's temperature if `tempered`, else at 1."""
        temperature = self.config.objective.student_temperature if tempered else 1.0
        return Head(states, self.student.head_weight(), 1 / temperature)

    def teacher_head(self, batch: Batch, index: int, *, tempered: bool = True) -> Head:
        """The teacher's LM head on its states of a micro-batch, at the objective's temperature if `tempered`."""
        assert batch.teacher_states is not None
        temperature = self.config.objective.teacher_temperature if tempered else 1.0
        return Head(batch.teacher_states[index], self.teacher.head_weight(), 1 / temperature)

    def critic_head(self, batch: Batch, index: int, own_states: Tensor | None) -> CriticHead:
        """The critic's head for a micro-batch; `own_states` [N, H] come from its trunk, if it has one."""
        assert self.critic is not None and batch.student_states is not None and batch.teacher_states is not None
        states = {"own": own_states, "teacher": batch.teacher_states[index], "student": batch.student_states[index]}
        weights = self.critic.head_weights(batch.microbatches[index].on_policy)
        c = self.config.critic
        return CriticHead(
            terms=tuple((states[name], weight, SIGNS[name]) for name, weight in weights.items()),  # type: ignore[misc]
            bound=c.bound,
            squash=c.squash,
            center=c.center,
            prior=c.prior,
            prior_scale=c.prior_scale,
        )

    def critic_states(self, batch: Batch) -> list[Tensor] | None:
        """Final states of the critic's own trunk under its current weights; None for a critic without one."""
        if not isinstance(self.critic, TrunkCritic):
            return None
        return forward_states(self.critic, batch.microbatches, self.layout)


def build_players(
    config: Config, plan: ModelPlan, layout: Layout, is_complete: Callable[[Sequence[int]], bool] | None = None
) -> Players:
    """Teacher and student with their first weights. Collective."""
    student = build_model("student", config, plan, layout)
    teacher = build_model("teacher", config, plan, layout)
    with agreed():
        fill_model(student, "student", config.student, plan.student, config.run.seed)
        fill_model(teacher, "teacher", config.teacher, plan.teacher, config.run.seed)
    freeze(teacher)
    rows = plan.padded_vocab_size // layout.tp_size
    vocabulary = Vocabulary(size=plan.vocab_size, shard_start=layout.tp_rank * rows, group=layout.groups.tp)
    return Players(config, layout, vocabulary, teacher, student, is_complete)


def enter_critic(players: Players, plan: ModelPlan, total_steps: int) -> None:
    """Bring in the critic, started from student and teacher as they are, with its optimizer. Collective.

    Args:
        total_steps: critic steps of the run, for the learning-rate schedule.
    """
    config, layout = players.config, players.layout
    players.critic = build_critic(config, plan, layout)
    with agreed():
        fill_critic(players.critic, config, players.student, players.teacher)
    # A micro-batch trains one of the two heads: a bucket that waits for both would never be reduced.
    model = wrap_for_training(players.critic, layout, {**config.training.ddp, "overlap_grad_reduce": False})
    players.critic_optimization = build_optimization(model, config.critic.optim, layout, total_steps, "critic.optim")
