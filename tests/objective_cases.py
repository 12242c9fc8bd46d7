"""Random heads, sharded or whole, and their comparison with tests/reference.py: shared by the unit and TP tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amd.objectives.fused_head import CriticHead, Head, critic_loss, head_statistics, student_loss
from megatron_amd.objectives.vocab_parallel import Vocabulary
from tests import reference

NUM_TOKENS, VOCABULARY, PADDED = 9, 11, 16
"""With 16 rows on 4 shards the third holds three real ids and the fourth none."""
FEATURES = ("teacher", "own", "pair")


@dataclass(frozen=True)
class Case:
    """One problem: heads of different widths on the same tokens, and how to treat them."""

    features: str = "pair"
    squash: str = "tanh"
    center: bool = True
    prior: str = "none"
    chunk_tokens: int | None = 7
    dtype: torch.dtype = torch.float64
    padded: int = PADDED
    scale: float = 1.0
    seed: int = 0

    @property
    def tolerance(self) -> float:
        """Relative to the largest entry of what is compared."""
        return 1e-9 if self.dtype == torch.float64 else 1e-4


def critic_cases(case: Case) -> Iterator[Case]:
    """Every kind of critic."""
    for features, center, prior in itertools.product(FEATURES, (False, True), ("none", "log_ratio")):
        yield replace(case, features=features, center=center, prior=prior)
    yield replace(case, squash="none")


class Problem:
    """Leaf tensors of a case: whole heads [padded, H] and hidden states, all asking for gradients."""

    def __init__(self, case: Case):
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(case.dtype).requires_grad_()

        widths = {"student": 3, "teacher": 5, "own": 4}
        self.hidden = {role: normal(NUM_TOKENS, width) for role, width in widths.items()}
        # Padding rows are large: a forgotten mask must show.
        self.weight = {role: normal(case.padded, width, scale=case.scale) for role, width in widths.items()}
        terms = {"teacher": [("teacher", 1.0)], "own": [("own", 1.0)], "pair": [("teacher", 1.0), ("student", -1.0)]}
        self.term_hidden, self.term_weight, self.signs = [], [], []
        for role, sign in terms[case.features]:
            # The critic's hidden states are its own leaves, so that its gradient can be told from the student's.
            self.term_hidden.append(self.hidden[role].detach().clone().requires_grad_())
            self.term_weight.append(normal(case.padded, widths[role], scale=0.3))
            self.signs.append(sign)
        with torch.no_grad():
            for weight in (*self.weight.values(), *self.term_weight):
                weight[VOCABULARY:] = 50.0
        self.targets = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
        self.weights = torch.rand(NUM_TOKENS, generator=generator, dtype=torch.float64)
        self.scores = torch.randn(NUM_TOKENS, generator=generator, dtype=torch.float64)

    def leaves(self) -> dict[str, Tensor]:
        """Everything that could receive a gradient, by name; heads whole."""
        named = {f"{role}.hidden": tensor for role, tensor in self.hidden.items()}
        named |= {f"{role}.weight": tensor for role, tensor in self.weight.items()}
        named |= {f"term{j}.hidden": tensor for j, tensor in enumerate(self.term_hidden)}
        return named | {f"term{j}.weight": tensor for j, tensor in enumerate(self.term_weight)}

    def critic_options(self) -> dict[str, Any]:
        case = self.case
        return {
            "bound": 1.7,
            "squash": case.squash,
            "center": case.center,
            "prior": case.prior,
            "prior_scale": 0.6,
        }

    # The reference's side

    def reference_logits(self) -> tuple[Tensor, Tensor]:
        """(teacher's, student's)."""
        return tuple(
            reference.logits(self.hidden[role], self.weight[role][:VOCABULARY]) for role in ("teacher", "student")
        )  # type: ignore[return-value]

    def reference_critic(self) -> Tensor:
        z_teacher, z_student = self.reference_logits()
        weights = [weight[:VOCABULARY] for weight in self.term_weight]
        terms = list(zip(self.term_hidden, weights, self.signs, strict=True))
        return reference.critic_values(terms, z_teacher, z_student, **self.critic_options())

    def reference_gradients(self, loss: Tensor, names: list[str]) -> dict[str, Tensor]:
        leaves = self.leaves()
        return dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))

    # The implementation's side

    def shard(self, group: dist.ProcessGroup | None) -> Shard:
        return Shard(self, group)


class Shard:
    """This rank's part of a problem: its own leaves, heads cut to its rows."""

    def __init__(self, problem: Problem, group: dist.ProcessGroup | None):
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        rows = problem.case.padded // size
        self.rows = slice(rank * rows, (rank + 1) * rows)
        self.problem, self.vocabulary = problem, Vocabulary(VOCABULARY, rank * rows, group)
        self.leaves = {
            name: (tensor.detach()[self.rows] if name.endswith("weight") else tensor.detach()).clone().requires_grad_()
            for name, tensor in problem.leaves().items()
        }

    def head(self, role: str) -> Head:
        return Head(self.leaves[f"{role}.hidden"], self.leaves[f"{role}.weight"])

    def critic(self) -> CriticHead:
        terms = tuple(
            (self.leaves[f"term{j}.hidden"], self.leaves[f"term{j}.weight"], sign)
            for j, sign in enumerate(self.problem.signs)
        )
        return CriticHead(terms, **self.problem.critic_options())

    def check_gradients(self, expected: dict[str, Tensor]) -> None:
        """The named leaves have these gradients (heads cut to this shard), all others none."""
        for name, leaf in self.leaves.items():
            if name not in expected:
                assert leaf.grad is None, f"{name} has a gradient"
                continue
            assert leaf.grad is not None, f"{name} has no gradient"
            want = expected[name]
            if name.endswith("weight"):
                assert (leaf.grad[max(0, VOCABULARY - self.rows.start) :] == 0).all(), f"{name}: padding has a gradient"
                close(leaf.grad, want[self.rows], self.problem.case.tolerance, name, scale=want)
            else:
                close(leaf.grad, want, self.problem.case.tolerance, name)


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str, scale: Tensor | None = None) -> None:
    """Equal within `tolerance` times the largest expected entry."""
    assert actual.shape == expected.shape, name
    largest = (expected if scale is None else scale).abs().max().double()
    error = (actual.double() - expected.double()).abs().max() if actual.numel() else torch.zeros(())
    assert error <= tolerance * largest, f"{name}: off by {error:.3g}, largest value {largest:.3g}"


def check_student(case: Case, objective: str, group: dist.ProcessGroup | None) -> None:
    """`student_loss` equals the reference in value, per-token values and gradients."""
    problem = Problem(case)
    z_teacher, z_student = problem.reference_logits()
    f = problem.reference_critic()
    y, weights, scores = problem.targets, problem.weights, problem.scores
    expected = reference.student_loss(objective, z_teacher, z_student, f, y, weights, scores)
    gradients = problem.reference_gradients(expected, ["student.hidden", "student.weight"])
    shard = problem.shard(group)
    loss, tokens = student_loss(
        shard.head("student"),
        None if objective == "sft" else shard.head("teacher"),
        shard.critic() if objective == "amm" else None,
        objective=objective,
        targets=y,
        weights=weights,
        scores=scores,
        vocabulary=shard.vocabulary,
        chunk_tokens=case.chunk_tokens,
    )
    close(loss.detach(), expected.detach(), case.tolerance, "loss")
    values = reference.student_values(objective, z_teacher, z_student, f, y).detach()
    close(tokens.value, values, case.tolerance, "value")
    close(tokens.student_logprob, -reference.student_values("sft", None, z_student, None, y), case.tolerance, "logprob")
    (-3 * loss).backward()
    shard.check_gradients({name: -3 * gradient for name, gradient in gradients.items()})


def check_critic(case: Case, estimator: str, on_policy: bool, group: dist.ProcessGroup | None) -> None:
    """`critic_loss` equals the reference in value, statistics and gradients; other roles get no gradient."""
    problem = Problem(case)
    z_teacher, z_student = problem.reference_logits()
    f = problem.reference_critic()
    moments = reference.moments(estimator, on_policy, z_teacher, z_student, f, problem.targets)
    expected = -(problem.weights * moments).sum()
    names = [name for name in problem.leaves() if name.startswith("term")]
    gradients = problem.reference_gradients(expected, names)
    shard = problem.shard(group)
    loss, statistics = critic_loss(
        shard.head("student"),
        shard.head("teacher"),
        shard.critic(),
        targets=problem.targets,
        weights=problem.weights,
        on_policy=on_policy,
        estimator=estimator,
        vocabulary=shard.vocabulary,
        chunk_tokens=case.chunk_tokens,
    )
    close(loss.detach(), expected.detach(), case.tolerance, "loss")
    check_fields(statistics, reference.statistics(z_teacher, z_student, f, problem.targets), case.tolerance)
    loss.backward()
    shard.check_gradients(gradients)


def check_statistics(case: Case, with_critic: bool, group: dist.ProcessGroup | None) -> None:
    """`head_statistics` equals the reference; without a critic its fields are None."""
    problem = Problem(case)
    z_teacher, z_student = problem.reference_logits()
    f = problem.reference_critic() if with_critic else None
    shard = problem.shard(group)
    statistics = head_statistics(
        shard.head("student"),
        shard.head("teacher"),
        shard.critic() if with_critic else None,
        problem.targets,
        shard.vocabulary,
        case.chunk_tokens,
    )
    check_fields(statistics, reference.statistics(z_teacher, z_student, f, problem.targets), case.tolerance)


def check_fields(statistics: Any, expected: dict[str, Tensor], tolerance: float) -> None:
    for name, actual in vars(statistics).items():
        if name in expected:
            close(actual, expected[name].detach(), tolerance, name)
        else:
            assert actual is None, f"{name} without a critic"


def check_everything(case: Case, group: dist.ProcessGroup | None) -> None:
    """All objectives, estimators and critics of one chunk size and type."""
    for objective in ("kl", "rkl", "js", "tv", "sft"):
        check_student(case, objective, group)
    check_statistics(case, False, group)
    for critic_case in critic_cases(case):
        check_statistics(critic_case, True, group)
        check_student(critic_case, "amm", group)
        for estimator, on_policy in itertools.product(("full_vocabulary", "sampled"), (False, True)):
            check_critic(critic_case, estimator, on_policy, group)
