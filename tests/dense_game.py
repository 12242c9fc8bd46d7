"""Both players' objectives on whole models: dense, float64, one process, gradients by plain autograd.

The models are transformers' own, read from the folders of a tiny run; the equations are tests/reference.py and the
loops below. Nothing is shared with megatron_amd but the settings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor

from megatron_amd.config import Config
from tests import reference

HEAD_ROWS = 512
"""Rows of the critic's heads before they are cut to a layout's padded vocabulary."""


@dataclass(frozen=True)
class Sequences:
    """Prompts with the responses of one policy, as lists of token ids."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]


def fixed_sequences(kind: str, vocab_size: int) -> dict[bool, Sequences]:
    """Four responses of each policy. `short rank`: the second data-parallel rank of two has one-token ones alone."""
    lengths = {"mixed": ((3, 1, 5, 2), (2, 6, 1, 3)), "short rank": ((4, 2, 1, 1), (3, 5, 1, 1))}[kind]
    draw = random.Random(kind)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    return {
        on_policy: Sequences([tokens(n) for n in (3, 1, 4, 2)], [tokens(n) for n in lengths[on_policy]])
        for on_policy in (False, True)
    }


def critic_head(on_policy: bool, source: str, hidden_size: int) -> Tensor:
    """[HEAD_ROWS, H] of f_2 or f_1, fp32: random, and different for the two."""
    generator = torch.Generator().manual_seed(sum(map(ord, source)) * 2 + on_policy)
    return torch.randn(HEAD_ROWS, hidden_size, generator=generator) * 0.15


@dataclass
class _States:
    """One sequence's states (response positions) through the models; T states."""

    y: Tensor
    """int64 [T]."""
    hidden: dict[str, Tensor]
    """[T, H] final hidden states by model: `student`, `teacher`, `own` (the critic's trunk)."""
    z_student: Tensor
    z_teacher: Tensor

    def tempered(self, config: Config) -> _States:
        """With the logits of the objective's distributions."""
        objective = config.objective
        return replace(
            self,
            z_student=self.z_student / objective.student_temperature,
            z_teacher=self.z_teacher / objective.teacher_temperature,
        )


class DenseGame:
    """The game on given sequences.

    Args:
        student: folder of the student.
        teacher: folder of the teacher.
        trunk: folder of the critic's own trunk.
        vocab_size: real token ids.
        sequences: by `on_policy`.
    """

    def __init__(
        self, student: Path, teacher: Path, trunk: Path, vocab_size: int, sequences: dict[bool, Sequences]
    ) -> None:
        self.vocab_size = vocab_size
        self.models = {"student": _load(student), "teacher": _load(teacher), "own": _load(trunk)}
        self.heads = {
            (on_policy, source): critic_head(on_policy, source, model.config.hidden_size).double().requires_grad_()
            for source, model in self.models.items()
            for on_policy in (False, True)
        }
        self._sequences = sequences

    @cached_property
    def states(self) -> dict[bool, list[_States]]:
        """Every sequence's states, by `on_policy`."""
        return {
            on_policy: [self._run(prompt, response) for prompt, response in zip(s.prompts, s.responses, strict=True)]
            for on_policy, s in self._sequences.items()
        }

    def student_gradients(self, config: Config) -> dict[str, Tensor]:
        """Gradient of what the student minimises in every parameter, by transformers' names."""
        objective = config.objective
        loss = torch.zeros((), dtype=torch.float64)
        for on_policy, share in ((False, objective.beta), (True, 1 - objective.beta)):
            states = [s.tempered(config) for s in self.states[on_policy]]
            critics = [self._critic(config, on_policy, s).detach() for s in states]
            weights, scores = self._student_weights(config, states, on_policy, critics)
            parameters = {"gjs_weight": objective.gjs_weight, "skew": objective.skew}
            for s, f, w, score in zip(states, critics, weights, scores, strict=True):
                term = reference.student_loss(objective.name, s.z_teacher, s.z_student, f, s.y, w, score, **parameters)
                loss = loss + share / self._normalizer(config, on_policy) * term
        return _gradients(loss, dict(self.models["student"].named_parameters()))

    def critic_gradients(self, config: Config) -> dict[str, Tensor]:
        """Gradient of the critic's loss -U: trunk by transformers' names, heads as `off.own`, `on.teacher`..."""
        objective = config.objective
        loss = torch.zeros((), dtype=torch.float64)
        for on_policy, share in ((False, objective.beta), (True, 1 - objective.beta)):
            for s in (s.tempered(config) for s in self.states[on_policy]):
                f = self._critic(config, on_policy, s)
                u = reference.moments(objective.estimator, on_policy, s.z_teacher, s.z_student, f, s.y)
                discounts = objective.gamma ** torch.arange(len(s.y), dtype=torch.float64)
                loss = loss - share / self._normalizer(config, on_policy) * (discounts * u).sum()
        parameters = {
            f"{'on' if on_policy else 'off'}.{source}": self.heads[on_policy, source]
            for on_policy in (False, True)
            for source in _sources(config)
        }
        if config.critic.features == "own":
            parameters |= dict(self.models["own"].named_parameters())
        return _gradients(loss, parameters)

    def _run(self, prompt: Sequence[int], response: Sequence[int]) -> _States:
        tokens = torch.tensor([[*prompt, *response]])
        span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        hidden = {
            name: _encoder_decoder_states(model, prompt, response)
            if model.config.is_encoder_decoder
            else model.model(tokens).last_hidden_state[0, span]
            for name, model in self.models.items()
        }
        z = {
            name: reference.logits(hidden[name], self.models[name].lm_head.weight[: self.vocab_size])
            for name in ("student", "teacher")
        }
        return _States(torch.tensor(response), hidden, z["student"], z["teacher"].detach())

    def _critic(self, config: Config, on_policy: bool, s: _States) -> Tensor:
        """f of every state, [T, V]; student and teacher are constants to it."""
        c = config.critic
        terms = [
            (
                reference.logits(
                    s.hidden[source] if source == "own" else s.hidden[source].detach(),
                    self.heads[on_policy, source][: self.vocab_size],
                ),
                -1.0 if source == "student" else 1.0,
            )
            for source in _sources(config)
        ]
        shape = {"bound": c.bound, "squash": c.squash, "center": c.center}
        prior = {"prior": c.prior, "prior_scale": c.prior_scale}
        return reference.critic_values(terms, s.z_teacher, s.z_student.detach(), **shape, **prior)

    def _normalizer(self, config: Config, on_policy: bool) -> int:
        states = self.states[on_policy]
        return sum(len(s.y) for s in states) if config.objective.normalization == "per_token" else len(states)

    def _student_weights(
        self, config: Config, states: list[_States], on_policy: bool, critics: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each state: the weight of D and of ln q(y)."""
        objective, gamma = config.objective, config.objective.gamma
        discounts = [gamma ** torch.arange(len(s.y), dtype=torch.float64) for s in states]
        none = [torch.zeros_like(w) for w in discounts]
        if objective.name != "amm" or not on_policy or objective.policy_gradient == "per_step":
            return discounts, none
        returns = []
        for s, f in zip(states, critics, strict=True):
            p, q = s.z_teacher.softmax(1), s.z_student.detach().softmax(1)
            steps = range(len(s.y))
            if objective.policy_gradient == "rao_blackwell":  # gamma D_{t+1}
                delta = ((p - q) * f).sum(1)
                returns.append([sum(gamma ** (k - t) * delta[k].item() for k in steps if k > t) for t in steps])
            else:  # G_t
                reward = (p * f).sum(1) - f.gather(1, s.y[:, None])[:, 0]
                returns.append([sum(gamma ** (k - t) * reward[k].item() for k in steps if k >= t) for t in steps])
        scores = []
        for i, own in enumerate(returns):
            row = []
            for t, value in enumerate(own):
                others = [other[t] for j, other in enumerate(returns) if j != i and t < len(other)]
                row.append(value - (sum(others) / len(others) if others else 0.0))
            scores.append(discounts[i] * torch.tensor(row, dtype=torch.float64))
        return (discounts if objective.policy_gradient == "rao_blackwell" else none), scores


def _load(folder: Path) -> transformers.PreTrainedModel:
    with_encoder = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).is_encoder_decoder
    classes = transformers.AutoModelForSeq2SeqLM if with_encoder else transformers.AutoModelForCausalLM
    return classes.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", local_files_only=True)


def _encoder_decoder_states(
    model: transformers.PreTrainedModel, prompt: Sequence[int], response: Sequence[int]
) -> Tensor:
    """[T, H] states of a T5 that its LM head is applied to."""
    read = model.encoder(torch.tensor([list(prompt)])).last_hidden_state
    tokens = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
    states = model.decoder(tokens, encoder_hidden_states=read).last_hidden_state[0]
    return states * model.config.d_model**-0.5 if model.config.scale_decoder_outputs else states


def _sources(config: Config) -> tuple[str, ...]:
    """The models whose states the critic's heads read."""
    return {"own": ("own",), "teacher": ("teacher",), "pair": ("teacher", "student")}[config.critic.features]


def _gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
