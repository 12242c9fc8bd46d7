"""One iteration played for its shapes and its memory, usually on meta tensors (distributed/fake.py).

Every model is the real one, with its gradient buffers and optimizer, and the passes are those of rollout/ and steps.py,
with one micro-batch of the longest sequences that the settings allow and no meaning. On real tensors it plays as well,
which is how its numbers are tested.

Shapes: b sequences in a micro-batch, S tokens in a sequence, N states (response positions) in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_amd.batch import Batch, MicroBatch
from megatron_amd.config import Config
from megatron_amd.distributed.fake import LiveBytes
from megatron_amd.distributed.layout import Layout
from megatron_amd.models.critic import HeadCritic, TrunkCritic
from megatron_amd.models.kv_cache import Segment
from megatron_amd.models.roles import LanguageModel, ModelPlan, build_critic, build_model
from megatron_amd.models.t5 import EncoderDecoderLM
from megatron_amd.objectives.fused_head import critic_loss, head_statistics, student_loss
from megatron_amd.objectives.vocab_parallel import Vocabulary
from megatron_amd.rollout.generate import pool_sizes
from megatron_amd.rollout.passes import (
    Sampling,
    draw,
    generation_mode,
    make_generator,
    padded_count,
    spare_rows,
    stage_pass,
)
from megatron_amd.rollout.pool import Pass, Response
from megatron_amd.training.collect import padded_width
from megatron_amd.training.optimizer import Optimization, build_optimization, wrap_for_training
from megatron_amd.training.players import Players

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

Model = LanguageModel | HeadCritic


@dataclass(frozen=True)
class RankBatch:
    """What one replica works on in an iteration of the main phase, at most."""

    prompts: int
    off_policy: int
    """Sequences from the teacher, the data or files."""
    on_policy: int
    """Sequences from the student."""
    micro_batch_size: int
    """b."""
    num_microbatches: int
    width: int
    """S: the longest prompt and response."""
    prompt_width: int
    """Of these the encoder's, of an encoder-decoder model; else 0."""
    response_length: int
    """Longest response."""
    evaluation: int
    """Held-out prompts."""
    evaluation_response_length: int

    @property
    def states_per_microbatch(self) -> int:
        """N."""
        return self.micro_batch_size * self.response_length

    @property
    def num_states(self) -> int:
        """Response positions of all sequences."""
        return (self.off_policy + self.on_policy) * self.response_length


def rank_batch(config: Config, layout: Layout, *, has_encoder: bool) -> RankBatch:
    """The largest batch that the settings allow. has_encoder: of the models."""
    prompts = config.training.global_batch_size // layout.dp_size
    off_policy = prompts if config.objective.beta > 0 or config.rollout.reuse.mode == "adaptive" else 0
    on_policy = prompts * config.rollout.samples_per_prompt if config.objective.beta < 1 else 0
    size = min(config.training.micro_batch_size, max(off_policy, on_policy))
    evaluation = -(-config.evaluation.prompts // layout.dp_size)
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    prompt_width = padded_width(prompt, config, layout) if has_encoder else 0
    width = prompt_width + padded_width(response if has_encoder else prompt + response, config, layout)
    return RankBatch(
        prompts=prompts,
        off_policy=off_policy,
        on_policy=on_policy,
        micro_batch_size=size,
        num_microbatches=-(-off_policy // size) + -(-on_policy // size),
        width=width,
        prompt_width=prompt_width,
        response_length=config.rollout.max_response_length,
        evaluation=evaluation,
        evaluation_response_length=config.evaluation.max_response_length,
    )


@dataclass
class RoleUse:
    """One role's part on one rank."""

    parameters: int = 0
    """Numbers on this rank."""
    whole_parameters: int = 0
    """Numbers of the model that this stage holds over all its tensor ranks, without a tied head's second copy."""
    layers: tuple[int, int] | None = None
    """First and last layer, counted from 0 in the whole model."""
    weights: int = 0
    """Bytes."""
    gradients: int = 0
    """Bytes of the gradient buffers."""
    optimizer: int = 0
    """Bytes of fp32 main weights and of Adam's moments."""

    @property
    def held(self) -> int:
        """Bytes."""
        return self.weights + self.gradients + self.optimizer


@dataclass
class StageUse:
    """What a rank of one pipeline stage holds, and what each part of an iteration takes on top, in bytes."""

    roles: dict[str, RoleUse]
    in_flight: int
    """Micro-batches whose activations are kept at once (1F1B)."""
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    """{"rollout": {"key-value cache": ...}, ...}: what is alive at once in each part."""

    @property
    def held(self) -> int:
        """Bytes of weights, gradients and optimizer states."""
        return sum(role.held for role in self.roles.values())

    @property
    def peak(self) -> int:
        """Bytes when the largest part runs."""
        return self.held + max(sum(part.values()) for part in self.parts.values())


def rehearse(config: Config, plan: ModelPlan, batch: RankBatch, layout: Layout) -> StageUse:
    """Build and play this rank's stage. Collective, where there are other ranks.

    Args:
        config: for meta tensors with a precision that the local layers have.
        plan: for meta tensors with the local implementation; Transformer Engine's layers need a GPU. Their parameters
            are the same.
        batch: what the replica works on.
        layout: this rank's.
    """
    return _Stage(config, plan, batch, layout).play()


class _Stage:
    """The players of one stage and the passes they take part in."""

    def __init__(self, config: Config, plan: ModelPlan, batch: RankBatch, layout: Layout) -> None:
        self.config, self.batch, self.layout = config, batch, layout
        with_critic = config.objective.name == "amm"
        rows = plan.padded_vocab_size // layout.tp_size
        vocabulary = Vocabulary(size=plan.vocab_size, shard_start=layout.tp_rank * rows, group=layout.groups.tp)
        student = build_model("student", config, plan, layout)
        teacher = build_model("teacher", config, plan, layout).requires_grad_(False).eval()
        critic = build_critic(config, plan, layout) if with_critic else None
        self.players = Players(config, layout, vocabulary, teacher, student, critic=critic)
        self.roles = {"student": _role_use(student, layout), "teacher": _role_use(teacher, layout)}
        self.trained_student = self._train("student", student, config.training.optim)
        if critic is not None:
            self.roles["critic"] = _role_use(critic, layout)
            self.trained_critic = self._train("critic", critic, config.critic.optim)
        self.in_flight = min(layout.pp_size - layout.pp_rank, batch.num_microbatches)

    def _train(self, role: str, model: Model, optim: Any) -> DistributedDataParallel:
        """Add gradient buffers and optimizer, and what they hold."""
        no_overlap = {"overlap_grad_reduce": False, "overlap_param_gather": False}  # would wait for other ranks
        wrapped = wrap_for_training(model, self.layout, {**self.config.training.ddp, **no_overlap})
        optimization = build_optimization(wrapped, optim, self.layout, 1, f"{role}.optim")
        use = self.roles[role]
        use.weights = _bytes(model.parameters())  # with the padding of the distributed optimizer's buffers
        use.gradients = sum(b.grad_data.nbytes for b in wrapped.buffers + wrapped.expert_parallel_buffers)
        use.optimizer = _optimizer_bytes(optimization, model)
        return wrapped

    def play(self) -> StageUse:
        """All parts of an iteration."""
        use = StageUse(self.roles, self.in_flight)
        sizes = [self.players.student.config.hidden_size, self.players.teacher.config.hidden_size]
        seen = sizes if self.config.objective.name == "amm" else sizes[1:]  # only a critic looks at the student's
        states = self._states_bytes(self.batch.num_states, *seen)
        trunk = self.players.critic.config.hidden_size if isinstance(self.players.critic, TrunkCritic) else 0
        own = self._states_bytes(self.batch.num_states, trunk)
        name = self.config.objective.name
        use.parts["rollout"] = self._play_rollouts()
        if name != "sft":
            count = 2 * self.batch.evaluation * self.batch.evaluation_response_length
            most = max(states + own, self._states_bytes(count, *sizes, trunk))
            use.parts["hidden pass"] = {"hidden states": most, **self._play_measuring()}
        if name == "amm":
            use.parts["critic step"] = {"hidden states": states, **self._play_critic_step()}
        kept = 0 if name == "sft" else states + own
        use.parts["student step"] = {"hidden states": kept, **self._play_student_step(name)}
        return use

    def _states_bytes(self, count: int, *hidden_sizes: int) -> int:
        """Final hidden states of `count` response positions under several models, which the last stage keeps."""
        kept = count if self.layout.is_last_stage else 0
        return kept * sum(hidden_sizes) * self.players.student.config.params_dtype.itemsize

    def _play_rollouts(self) -> dict[str, int]:
        """The largest of the generations: keys and values, and the pass over the prompts."""
        config, batch = self.config, self.batch
        teacher_rows = batch.off_policy if config.rollout.off_policy == "teacher" else 0
        found = [{"key-value cache": 0, "activations": 0}]
        for model, sequences in ((self.players.student, batch.on_policy), (self.players.teacher, teacher_rows)):
            asked = {(sequences, batch.response_length), (batch.evaluation, batch.evaluation_response_length)}
            asked = {(min(rows, config.rollout.batch_size or rows), length) for rows, length in asked}
            for rows, length in asked:
                larger = any(r >= rows and t >= length for r, t in asked - {(rows, length)})
                if rows and not larger:
                    found.append(self._play_generation(model, rows, length))
        if config.rollout.teacher_share and batch.on_policy:  # both at once
            rows = min(batch.on_policy, config.rollout.batch_size or batch.on_policy)
            both = [
                self._play_generation(model, rows, batch.response_length, models=2)
                for model in (self.players.student, self.players.teacher)
            ]
            found.append({part: sum(of_model[part] for of_model in both) for part in found[0]})
        return max(found, key=lambda part: sum(part.values()))

    def _play_generation(self, model: LanguageModel, rows: int, length: int, models: int = 1) -> dict[str, int]:
        """A pass full of prompts, and one in which every row decodes at its end. models: that generate together."""
        rollout, width = self.config.rollout, self.config.data.max_prompt_length
        sampling = Sampling(
            vocab_size=self.players.vocabulary.size, eos_ids=(0,), seed=0, max_response_length=length
        )  # fmt: skip
        [size, *_] = pool_sizes(
            rows,
            models * (width + length),
            self.layout.pp_size,
            rows,
            rollout.cache_tokens,
            spare=spare_rows(model),
        )
        responses = [Response(row, [0] * width, length) for row in range(size)]
        pieces = [Segment(row, 0, width) for row in range(max(1, min(size, rollout.pass_tokens // width)))]
        ends = [(row, width + length - 1) for row in range(size)]
        few = responses[: len(pieces)]
        reading = Pass([0] * width * len(pieces), [], pieces, list(range(len(pieces))), few)
        if isinstance(model, EncoderDecoderLM):
            first = list(range(len(few)))
            reading = Pass([0] * len(few), [(row, 0) for row in first], [], first, few, [r.prompt for r in few], first)
            ends = [(row, length - 1) for row in range(size)]
        passes = (reading, Pass([0] * size, ends, [], list(range(size)), responses))
        with LiveBytes() as live, generation_mode(model):
            generator = make_generator(model, 1.0, [size], width, length, self.layout)
            for coming in passes:
                noise = torch.full((len(coming.responses),), 0.5, dtype=torch.float64, device=self.layout.device)
                received = None
                if not self.layout.is_first_stage:
                    count = padded_count(generator, 0, coming)
                    shape = (count, 1, model.config.hidden_size)
                    received = torch.zeros(shape, dtype=model.config.params_dtype, device=self.layout.device)
                hidden = stage_pass(generator, 0, coming, self.layout, received)
                if self.layout.is_last_stage:
                    draw([generator], [hidden], coming, self.layout, sampling, noise)
            [cache] = generator.caches
            cached = sum(layer.buffer.nbytes for layer in cache.layers if layer.buffer is not None)
        return {"key-value cache": cached * self.layout.pp_size, "activations": live.peak - cached}

    def _synthetic_batch(self) -> Batch:
        """One micro-batch of the longest sequences; on the last stage with both models' states."""
        b, count = self.batch.micro_batch_size, self.batch.states_per_microbatch
        with_encoder = self.batch.prompt_width > 0

        def indices() -> Tensor:
            return torch.zeros(count, dtype=torch.int64, device=self.layout.device)

        microbatch = MicroBatch(
            tokens=torch.zeros(b, self.batch.width, dtype=torch.int64, device=self.layout.device),
            on_policy=self.config.objective.beta < 1,
            state_rows=indices(),
            state_columns=indices(),
            targets=indices(),
            steps=indices(),
            prompt_lengths=torch.ones(b, dtype=torch.int64, device=self.layout.device) if with_encoder else None,
            prompt_width=self.batch.prompt_width,
        )
        student, teacher = (self._states_of(model) for model in (self.players.student, self.players.teacher))
        return Batch([microbatch], [torch.ones(count, device=self.layout.device)], {}, 0.5, student, teacher)

    def _states_of(self, model: LanguageModel) -> list[Tensor] | None:
        if not self.layout.is_last_stage:
            return None
        shape = (self.batch.states_per_microbatch, model.config.hidden_size)
        return [torch.zeros(shape, dtype=model.config.params_dtype, device=self.layout.device)]

    def _play_critic_step(self) -> dict[str, int]:
        critic = self.players.critic
        batch, objective = self._synthetic_batch(), self.config.objective

        def loss(own_states: Tensor | None) -> Tensor:
            assert batch.student_states is not None
            value, _ = critic_loss(
                self.players.student_head(batch.student_states[0]),
                self.players.teacher_head(batch, 0),
                self.players.critic_head(batch, 0, own_states),
                targets=batch.microbatches[0].targets,
                weights=batch.weights[0],
                on_policy=batch.microbatches[0].on_policy,
                estimator=objective.estimator,
                vocabulary=self.players.vocabulary,
                options=self.players.head_options,
            )
            return value

        if isinstance(critic, TrunkCritic):
            return self._play_pass(self.trained_critic, critic, batch.microbatches[0], loss)
        with LiveBytes() as live:
            if self.layout.is_last_stage:
                torch.autograd.backward(loss(None))
        return {"heads and loss": live.peak}

    def _play_student_step(self, name: str) -> dict[str, int]:
        batch = self._synthetic_batch()
        critic = self.players.critic
        own = self._states_of(critic) if isinstance(critic, TrunkCritic) else None

        def loss(states: Tensor) -> Tensor:
            value, _ = student_loss(
                self.players.student_head(states),
                self.players.teacher_head(batch, 0) if name != "sft" else None,
                self.players.critic_head(batch, 0, own[0] if own else None) if name == "amm" else None,
                objective=self.players.objective(name),
                targets=batch.microbatches[0].targets,
                weights=batch.weights[0],
                scores=batch.weights[0],
                vocabulary=self.players.vocabulary,
                options=self.players.head_options,
                with_statistics=name not in ("amm", "sft"),
            )
            return value

        return self._play_pass(self.trained_student, self.players.student, batch.microbatches[0], loss)

    def _play_pass(
        self,
        wrapped: DistributedDataParallel,
        model: LanguageModel,
        microbatch: MicroBatch,
        loss: Callable[..., Tensor],
    ) -> dict[str, int]:
        """Forward and backward through this stage. Under 1F1B the activations of up to in_flight - 1 further
        micro-batches are there when the first backward pass runs."""
        layout = self.layout
        with LiveBytes() as live:
            self._receive(model, microbatch, requires_grad=True)
            output = wrapped(*microbatch.inputs)
            if not layout.is_last_stage:  # what is sent on is let go (deallocate_pipeline_outputs)
                kept = live.now - output.untyped_storage().nbytes()
                torch.autograd.backward(output, torch.empty_like(output))
                return {"activations": (self.in_flight - 1) * kept + live.peak, "heads and loss": 0}
            if layout.sequence_parallel:
                output = gather_from_sequence_parallel_region(
                    output, tensor_parallel_output_grad=False, group=layout.groups.tp
                )
            states = microbatch.select_states(output)
            before = live.peak
            torch.autograd.backward(loss(states))
        return {"activations": before, "heads and loss": live.peak - before}

    def _receive(self, model: LanguageModel, microbatch: MicroBatch, requires_grad: bool = False) -> None:
        """The previous stage's output, as the schedules hand it in."""
        if self.layout.is_first_stage:
            return
        b, width = microbatch.tokens.shape
        split = self.layout.tp_size if self.layout.sequence_parallel else 1
        shape = (width // split, b, model.config.hidden_size)
        hidden = torch.zeros(shape, dtype=model.config.pipeline_dtype, device=self.layout.device)
        model.set_input_tensor([hidden.requires_grad_(requires_grad)])

    def _play_measuring(self) -> dict[str, int]:
        """A forward pass of the teacher, then both models' statistics, with the critic's if there is one."""
        batch, critic = self._synthetic_batch(), self.players.critic
        own = self._states_of(critic) if isinstance(critic, TrunkCritic) else None
        with LiveBytes() as live, torch.no_grad():
            self._receive(self.players.teacher, batch.microbatches[0])
            self.players.teacher(*batch.microbatches[0].inputs)
            activations = live.peak
        with LiveBytes() as live:
            if batch.student_states is not None:
                head_statistics(
                    self.players.student_head(batch.student_states[0]),
                    self.players.teacher_head(batch, 0),
                    None if critic is None else self.players.critic_head(batch, 0, own[0] if own else None),
                    batch.microbatches[0].targets,
                    self.players.vocabulary,
                    self.players.head_options,
                )
        return {"activations": activations, "heads and loss": max(0, live.peak - activations)}


def _role_use(model: Model, layout: Layout) -> RoleUse:
    use = RoleUse(weights=_bytes(model.parameters()))
    for parameter in model.parameters():
        use.parameters += parameter.numel()
        ranks = layout.tp_size if getattr(parameter, "tensor_model_parallel", False) else 1
        if not getattr(parameter, "shared", False):  # the copy of a tied table on the last stage
            use.whole_parameters += parameter.numel() * ranks
    if isinstance(model, LanguageModel) and (numbers := model.layer_numbers()):
        use.layers = (numbers[0], numbers[-1])
    return use


def _optimizer_bytes(optimization: Optimization, model: Model) -> int:
    """Main weights that are not the model's own, and two moments, which come with the first step."""
    trained = [p for group in optimization.optimizer.param_groups for p in group["params"]]
    config = optimization.optimizer.config
    moments = sum(p.numel() for p in trained) * (config.exp_avg_dtype.itemsize + config.exp_avg_sq_dtype.itemsize)
    return _bytes([*model.parameters(), *trained]) - _bytes(model.parameters()) + moments


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors, each storage once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
