"""The equations, literally: dense, float64, one process, gradients by plain autograd.

Nothing here is shared with megatron_amd. Shapes: N states, V real token ids, H features. p is the teacher, q the
student, f the critic; logits, p, q and f are [N, V].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states [N, H] through an unpadded head [V, H], in float64."""
    return hidden.double() @ weight.double().T


GJS_WEIGHT, SKEW = 0.1, 0.1
"""b of gjs and lambda of skew_kl and skew_rkl where nothing else is said."""


def distance(
    name: str, z_teacher: Tensor, z_student: Tensor, *, gjs_weight: float = GJS_WEIGHT, skew: float = SKEW
) -> Tensor:
    """Step-wise distance of each state [N], by its definition."""
    log_p, log_q = z_teacher.log_softmax(1), z_student.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    if name == "kl":
        return (p * (log_p - log_q)).sum(1)
    if name == "rkl":
        return (q * (log_q - log_p)).sum(1)
    if name == "tv":
        return (p - q).abs().sum(1) / 2
    if name in ("js", "gjs"):
        b = 0.5 if name == "js" else gjs_weight
        log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log(1 - b))
        return b * (p * (log_p - log_m)).sum(1) + (1 - b) * (q * (log_q - log_m)).sum(1)
    if name == "skew_kl":
        log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log(1 - skew))
        return (p * (log_p - log_m)).sum(1)
    if name == "skew_rkl":
        log_m = torch.logaddexp(log_p + math.log(1 - skew), log_q + math.log(skew))
        return (q * (log_q - log_m)).sum(1)
    raise ValueError(name)


def critic_values(
    terms: Sequence[tuple[Tensor, float]],
    z_teacher: Tensor,
    z_student: Tensor,
    *,
    bound: float = 1.0,
    squash: str = "tanh",
    center: bool = True,
    prior: str = "none",
    prior_scale: float = 1.0,
) -> Tensor:
    """f [N, V] of terms (logits of a critic's head [N, V], sign); p and q are constants."""
    log_p, log_q = z_teacher.detach().log_softmax(1), z_student.detach().log_softmax(1)
    raw = torch.zeros_like(log_p)
    for values, sign in terms:
        raw = raw + sign * values
    if prior == "log_ratio":
        raw = raw + prior_scale * (log_p - log_q)
    if center:
        m = (log_p.exp() + log_q.exp()) / 2
        raw = raw - (m * raw).sum(1, keepdim=True)
    return bound * torch.tanh(raw) if squash == "tanh" else raw


def student_values(
    objective: str, z_teacher: Tensor | None, z_student: Tensor, f: Tensor | None, y: Tensor, **parameters: float
) -> Tensor:
    """D of each state [N]; f is a constant. parameters: of `distance`."""
    if objective == "sft":
        return -z_student.log_softmax(1).gather(1, y[:, None])[:, 0]
    assert z_teacher is not None
    if objective == "amm":
        assert f is not None
        return ((z_teacher.softmax(1) - z_student.softmax(1)) * f.detach()).sum(1)
    return distance(objective, z_teacher, z_student, **parameters)


def student_loss(
    objective: str,
    z_teacher: Tensor | None,
    z_student: Tensor,
    f: Tensor | None,
    y: Tensor,
    weights: Tensor,
    scores: Tensor,
    **parameters: float,
) -> Tensor:
    """sum weights D + sum scores ln q(y). parameters: of `distance`."""
    logprobs = z_student.log_softmax(1).gather(1, y[:, None])[:, 0]
    return (weights * student_values(objective, z_teacher, z_student, f, y, **parameters)).sum() + (
        scores * logprobs
    ).sum()


def moments(estimator: str, on_policy: bool, z_teacher: Tensor, z_student: Tensor, f: Tensor, y: Tensor) -> Tensor:
    """U of each state [N], in which only f varies."""
    p, q = z_teacher.detach().softmax(1), z_student.detach().softmax(1)
    f_y = f.gather(1, y[:, None])[:, 0]
    if estimator == "full_vocabulary":
        return ((p - q) * f).sum(1)
    return (p * f).sum(1) - f_y if on_policy else f_y - (q * f).sum(1)


def statistics(z_teacher: Tensor, z_student: Tensor, f: Tensor | None, y: Tensor) -> dict[str, Tensor]:
    """Every field of TokenStatistics that is not None, each [N]."""
    log_p, log_q = z_teacher.log_softmax(1), z_student.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    result = {name: distance(name, z_teacher, z_student) for name in ("kl", "rkl", "tv", "js")}
    result["entropy_student"] = -(q * log_q).sum(1)
    result["entropy_teacher"] = -(p * log_p).sum(1)
    result["student_logprob"] = log_q.gather(1, y[:, None])[:, 0]
    result["teacher_logprob"] = log_p.gather(1, y[:, None])[:, 0]
    result["top1_agreement"] = (p.argmax(1) == q.argmax(1)).double()
    if f is not None:
        result["delta"] = ((p - q) * f).sum(1)
        result["f_target"] = f.gather(1, y[:, None])[:, 0]
        result["expected_f_teacher"] = (p * f).sum(1)
        result["expected_f_student"] = (q * f).sum(1)
        result["f_min"] = f.min(1).values
        result["f_max"] = f.max(1).values
    return result


@dataclass(frozen=True)
class Trajectory:
    """One path through a token tree: the state and the token of each step."""

    states: tuple[int, ...]
    tokens: tuple[int, ...]


class TokenTree:
    """All responses of at most `depth` tokens to one prompt; token 0 is EOS. Policies are tables, [num_states, V]."""

    def __init__(self, vocabulary: int, depth: int):
        self.children: dict[tuple[int, int], int] = {}
        self.num_states, self.vocabulary = 0, vocabulary
        self.trajectories: list[Trajectory] = []
        self._grow((), (), depth)

    def _grow(self, states: tuple[int, ...], tokens: tuple[int, ...], left: int) -> None:
        if left == 0 or (tokens and tokens[-1] == 0):
            self.trajectories.append(Trajectory(states, tokens))
            return
        state = self.num_states
        self.num_states += 1
        if states:
            self.children[states[-1], tokens[-1]] = state
        for token in range(self.vocabulary):
            self._grow((*states, state), (*tokens, token), left - 1)

    def probability(self, trajectory: Trajectory, policy: Tensor) -> Tensor:
        """Product of the policy's probabilities [num_states, V] along a trajectory."""
        return policy[list(trajectory.states), list(trajectory.tokens)].prod()

    def expectation(self, policy: Tensor, per_state: Tensor, gamma: float) -> Tensor:
        """E over the policy's trajectories of sum_t gamma^(t-1) per_state(s_t), per_state [num_states]."""
        return torch.stack(
            [
                self.probability(trajectory, policy) * gamma**t * per_state[state]
                for trajectory in self.trajectories
                for t, state in enumerate(trajectory.states)
            ]
        ).sum()

    def action_values(self, policy: Tensor, reward: Tensor, gamma: float) -> Tensor:
        """Q(s, y) = r(s, y) + gamma E_policy[Q(s', .)], with 0 after EOS and at the depth; all [num_states, V]."""
        values = reward.clone()
        # A child is numbered after its parent.
        for state in range(self.num_states - 1, -1, -1):
            for token in range(self.vocabulary):
                child = self.children.get((state, token))
                if child is not None:
                    values[state, token] = reward[state, token] + gamma * (policy[child] * values[child]).sum()
        return values
