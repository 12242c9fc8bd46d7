"""Random heads on random sequences, sharded or whole, and their comparison with tests/reference.py.

A case goes the whole way of a training step's last stage: hidden states of padded sequences, split along the sequence
or not, with the embedding tied to the head or not; selection of the response positions; the fused head; its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_amd.distributed  # noqa: F401  the CPU mode, before Megatron-Core
from megatron_amd.objectives import head_gradient
from megatron_amd.objectives import heads as heads_module
from megatron_amd.objectives.divergences import DIVERGENCES, divergence
from megatron_amd.objectives.fused_head import critic_loss, head_statistics, student_loss
from megatron_amd.objectives.heads import CriticHead, Head, HeadOptions
from megatron_amd.objectives.vocab_parallel import Vocabulary
from tests import reference
from tests.pairs import Case as Settings

# isort: split
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

VOCABULARY, BATCH, LENGTH = 11, 3, 8
GJS_WEIGHT, SKEW = 0.3, 0.2
CRITIC_LOSSES = {
    f"critic {estimator} {'on' if on_policy else 'off'}": (estimator, on_policy)
    for estimator in ("full_vocabulary", "sampled")
    for on_policy in (False, True)
}
CRITICS: dict[str, dict[str, Any]] = {
    "own": {"features": "own"},
    "teacher": {"features": "teacher", "center": False},
    "pair": {"features": "pair"},
    "teacher prior": {"features": "teacher", "prior": "log_ratio"},
    "own prior": {"features": "own", "prior": "log_ratio", "center": False},
    "pair prior": {"features": "pair", "prior": "log_ratio"},
    "unsquashed": {"features": "pair", "squash": "none", "center": False},
    "unsquashed centred": {"features": "own", "squash": "none"},
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "loss": (*DIVERGENCES, "sft", "amm", "statistics", *CRITIC_LOSSES),
    "tensor": (1, 2, 4),
    "sequence_parallel": (False, True),
    "chunk": (1, 7, None),
    "tied": (False, True),
    "padding": ("least", "more"),
    "responses": ("all", "ragged", "empty rows", "none"),
    "widths": ("equal", "different"),
    "dtype": (torch.float64, torch.float32, torch.bfloat16),
    "temperatures": ((1.0, 1.0), (0.7, 1.6)),
    "critic": tuple(CRITICS),
    "scores": (False, True),
    "main_grad": (False, True),
    "small_blocks": (False, True),
}
DEFAULTS: Settings = {
    "loss": "kl", "tensor": 1, "sequence_parallel": False, "chunk": 7, "tied": False, "padding": "more",
    "responses": "ragged", "widths": "different", "dtype": torch.float64, "temperatures": (1.0, 1.0),
    "critic": "pair", "scores": True, "main_grad": False, "small_blocks": True,
    "scale": 1.0,
}  # fmt: skip
SMALL_BLOCK, FEW_ROWS = 25, 3
"""Logits of a block, and rows of a head's gradient, so that a chunk of this vocabulary has several."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Norm of an error, relative to the norm of what it is an error of."""


def possible(case: Settings) -> bool:
    """One rank has no sequence parallelism."""
    return not (case.get("tensor") == 1 and case.get("sequence_parallel"))


@dataclass
class Outcome:
    """What is compared: loss, per-token values by name, gradients by leaf."""

    loss: Tensor
    tokens: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Problem:
    """A case's whole tensors. Hidden states are [LENGTH, BATCH, H], heads [padded, H]."""

    def __init__(self, case: Settings):
        self.case = {**DEFAULTS, **case}
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(self.case["dtype"])

        widths = {"student": 3, "teacher": 5, "own": 4}
        if self.case["widths"] == "equal":
            widths = dict.fromkeys(widths, 4)
        tensor = self.case["tensor"]
        self.rows = -(-VOCABULARY // tensor) if self.case["padding"] == "least" else 16 // tensor
        padded = self.rows * tensor
        self.leaves = {f"{role}.hidden": normal(LENGTH, BATCH, width) for role, width in widths.items()}
        self.leaves |= {
            f"{role}.weight": normal(padded, width, scale=self.case["scale"]) for role, width in widths.items()
        }
        self.critic_options = {"bound": 1.7, "prior_scale": 0.6, **CRITICS[self.case["critic"]]}
        terms = {"teacher": [("teacher", 1.0)], "own": [("own", 1.0)], "pair": [("teacher", 1.0), ("student", -1.0)]}
        self.signs = []
        for j, (role, sign) in enumerate(terms[self.critic_options.pop("features")]):
            # The critic's hidden states are its own leaves, so that its gradient can be told from the student's.
            self.leaves[f"term{j}.hidden"] = self.leaves[f"{role}.hidden"].clone()
            self.leaves[f"term{j}.weight"] = normal(padded, widths[role], scale=0.3)
            self.signs.append(sign)
        for name, tensor_ in self.leaves.items():
            if name.endswith("weight"):
                tensor_[VOCABULARY:] = 50.0  # large: padding that is not cut off must show
        lengths = {
            "all": [LENGTH] * BATCH, "ragged": [5, 1, 3], "empty rows": [0, 4, 0], "none": [0] * BATCH,
        }[self.case["responses"]]  # fmt: skip
        mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
        self.row, self.column = mask.nonzero(as_tuple=True)
        self.tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        count = len(self.row)
        self.targets = torch.randint(VOCABULARY, (count,), generator=generator)
        self.weights = torch.rand(count, generator=generator, dtype=torch.float64)
        self.scores = torch.randn(count, generator=generator, dtype=torch.float64) * self.case["scores"]
        self.trained = ["student.hidden", "student.weight"]
        if self.case["loss"] in CRITIC_LOSSES:
            self.trained = [name for name in self.leaves if name.startswith("term")]
        elif self.case["loss"] == "statistics":
            self.trained = []

    def states(self, hidden: Tensor) -> Tensor:
        """[LENGTH, BATCH, H] -> [N, H] at the response positions."""
        return hidden[self.column, self.row]

    # The reference's side

    def reference(self, project: Callable[[Tensor, Tensor], Tensor] | None = None) -> Outcome:
        """Dense, by autograd: in float64, or from the leaves' own type with heads applied by `project`."""
        case = self.case
        leaves = {
            name: (leaf.double() if project is None else leaf).clone().requires_grad_()
            for name, leaf in self.leaves.items()
        }
        project = project or reference.logits

        def logits(role: str) -> Tensor:
            hidden, weight = leaves[f"{role}.hidden"], leaves[f"{role}.weight"]
            if role == "student" and case["tied"]:
                hidden = hidden + weight[self.tokens.T]
            return project(self.states(hidden), weight[:VOCABULARY])

        student_temperature, teacher_temperature = case["temperatures"]
        z_student, z_teacher = logits("student") / student_temperature, logits("teacher") / teacher_temperature
        terms = [(logits(f"term{j}"), sign) for j, sign in enumerate(self.signs)]
        f = reference.critic_values(terms, z_teacher, z_student, **self.critic_options)
        y, weights = self.targets, self.weights.to(z_student.dtype)
        tokens = reference.statistics(z_teacher, z_student, f, y)
        if case["loss"] in CRITIC_LOSSES:
            estimator, on_policy = CRITIC_LOSSES[case["loss"]]
            loss = -(weights * reference.moments(estimator, on_policy, z_teacher, z_student, f, y)).sum()
        elif case["loss"] == "statistics":
            loss = z_student.new_zeros(())
        else:
            extra = {"gjs_weight": GJS_WEIGHT, "skew": SKEW}
            tokens["value"] = reference.student_values(case["loss"], z_teacher, z_student, f, y, **extra)
            scores = self.scores.to(z_student.dtype)
            loss = (weights * tokens["value"]).sum() + (scores * tokens["student_logprob"]).sum()
        found = torch.autograd.grad(loss, [leaves[name] for name in self.trained]) if self.trained else ()
        gradients = dict(zip(self.trained, found, strict=True))
        return Outcome(loss.detach(), {name: value.detach() for name, value in tokens.items()}, gradients)

    # The implementation's side

    def run(self, group: dist.ProcessGroup | None) -> tuple[Outcome, Shard]:
        """This rank's part through the code under test."""
        if not self.case["small_blocks"]:
            return self._run(group)
        rows = mock.patch.object(head_gradient, "PRODUCT_ROWS", FEW_ROWS)
        with mock.patch.object(heads_module, "BLOCK_NUMBERS", SMALL_BLOCK), rows:
            return self._run(group)

    def _run(self, group: dist.ProcessGroup | None) -> tuple[Outcome, Shard]:
        case, shard = self.case, Shard(self, group)
        y, options = self.targets, HeadOptions(chunk_tokens=case["chunk"])
        heads = (shard.student_head(), shard.head("teacher"))
        if case["loss"] == "statistics":
            statistics = head_statistics(*heads, shard.critic_head(), y, shard.vocabulary, options)
            return Outcome(torch.zeros(()), vars(statistics)), shard
        if case["loss"] in CRITIC_LOSSES:
            estimator, on_policy = CRITIC_LOSSES[case["loss"]]
            loss, statistics = critic_loss(
                *heads,
                shard.critic_head(),
                targets=y,
                weights=self.weights,
                on_policy=on_policy,
                estimator=estimator,
                vocabulary=shard.vocabulary,
                options=options,
            )
            tokens = vars(statistics)
        else:
            objective = case["loss"]
            if objective in DIVERGENCES:
                objective = divergence(objective, gjs_weight=GJS_WEIGHT, skew=SKEW)
            loss, student_tokens = student_loss(
                heads[0],
                None if objective == "sft" else heads[1],
                shard.critic_head() if objective == "amm" else None,
                objective=objective,
                targets=y,
                weights=self.weights,
                scores=self.scores,
                vocabulary=shard.vocabulary,
                options=options,
                with_statistics=objective != "sft",
            )
            tokens = {"value": student_tokens.value, "student_logprob": student_tokens.student_logprob}
            if student_tokens.statistics is not None:
                tokens |= {name: value for name, value in vars(student_tokens.statistics).items() if value is not None}
        factor = 1.0 if case["main_grad"] else -3.0  # what is in main_grad can no longer be scaled
        (factor * loss).backward()
        return Outcome(loss.detach(), tokens, shard.gradients(factor)), shard


class Shard:
    """This rank's part of a problem: its own leaves, heads cut to its rows, hidden states to its positions."""

    def __init__(self, problem: Problem, group: dist.ProcessGroup | None):
        rank = 0 if group is None else group.rank()
        self.problem, self.group = problem, group
        self.vocabulary = Vocabulary(VOCABULARY, rank * problem.rows, group)
        self.sequence_parallel = problem.case["sequence_parallel"]
        self.leaves = {name: self.cut(name, leaf).clone().requires_grad_() for name, leaf in problem.leaves.items()}
        self.main_grads: dict[str, Tensor] = {}
        if problem.case["main_grad"]:
            for name in problem.trained:
                if name.endswith("weight"):
                    leaf: Any = self.leaves[name]
                    wide = torch.float64 if leaf.dtype == torch.float64 else torch.float32
                    leaf.main_grad = self.main_grads[name] = torch.full_like(leaf, 2.0, dtype=wide)
                    leaf.zero_out_wgrad = problem.case["tied"] and name.startswith("student")

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a leaf or of its gradient."""
        rank = 0 if self.group is None else self.group.rank()
        if name.endswith("weight"):
            return whole[rank * self.problem.rows : (rank + 1) * self.problem.rows]
        if self.sequence_parallel and self.group is not None:
            return whole.chunk(self.group.size())[rank]
        return whole

    def head(self, role: str) -> Head:
        temperature = self.problem.case["temperatures"][1] if role == "teacher" else 1.0
        return Head(self.states(self.leaves[f"{role}.hidden"]), self.leaves[f"{role}.weight"], 1 / temperature)

    def student_head(self) -> Head:
        hidden, weight = self.leaves["student.hidden"], self.leaves["student.weight"]
        if self.problem.case["tied"]:
            hidden = hidden + self._embed(weight)
        return Head(self.states(hidden), weight, 1 / self.problem.case["temperatures"][0])

    def critic_head(self) -> CriticHead:
        terms = tuple(
            (self.states(self.leaves[f"term{j}.hidden"]), self.leaves[f"term{j}.weight"], sign)
            for j, sign in enumerate(self.problem.signs)
        )
        return CriticHead(terms, **self.problem.critic_options)

    def states(self, hidden: Tensor) -> Tensor:
        """As distributed/schedule.py does on the last stage."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.group)
        return self.problem.states(hidden)

    def _embed(self, weight: Tensor) -> Tensor:
        """Embedding of the tokens with a table split over the vocabulary, [LENGTH, BATCH, H]."""
        tokens = self.problem.tokens.T - self.vocabulary.shard_start
        held = (tokens >= 0) & (tokens < len(weight))
        local = (weight[tokens.clamp(0, len(weight) - 1)] * held[..., None]).contiguous()  # reduced in place
        if self.group is None:
            return local
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(local, group=self.group)
        return reduce_from_tensor_model_parallel_region(local, group=self.group)

    def gradients(self, factor: float) -> dict[str, Tensor]:
        """What the trained leaves got, before the factor; what no other leaf may have."""
        found = {}
        for name, leaf in self.leaves.items():
            if name not in self.problem.trained:
                assert leaf.grad is None, f"{name} has a gradient"
                continue
            gradient = leaf.grad
            if name in self.main_grads:  # as Megatron-Core's hook adds what autograd found
                total = self.main_grads[name] - 2
                added = getattr(leaf, "grad_added_to_main_grad", False) and not leaf.zero_out_wgrad  # type: ignore[attr-defined]
                if gradient is not None and not added:
                    total = total + gradient
                gradient = total
            assert gradient is not None, f"{name} has no gradient"
            found[name] = gradient / factor
        return found


def check(case: Settings, group: dist.ProcessGroup | None) -> None:
    """The code under test equals the reference on this rank: loss, per-token values, gradients, zeros of padding."""
    problem = Problem(case)
    expected = problem.reference()
    outcome, shard = problem.run(group)
    if problem.case["dtype"] == torch.bfloat16:
        plain = problem.reference(lambda hidden, weight: (hidden @ weight.T).float())
        check_no_worse(outcome, expected, plain, shard)
        return
    tolerance = TOLERANCES[problem.case["dtype"]]
    close(outcome.loss, expected.loss, tolerance, "loss")
    for name, value in outcome.tokens.items():
        close(value, expected.tokens[name], tolerance, name)
    for name, gradient in outcome.gradients.items():
        check_padding(name, gradient, shard)
        # A shard's own part may be small or nothing: errors are relative to the whole gradient.
        whole = expected.gradients[name]
        close(gradient, shard.cut(name, whole), tolerance, name, scale=whole)


def check_no_worse(outcome: Outcome, exact: Outcome, plain: Outcome, shard: Shard) -> None:
    """bf16: errors within those of the plain way, logits in bf16 and the rest in fp32."""
    assert outcome.loss.dtype == torch.float32 or not shard.problem.trained
    slack = 2.0**-8
    magnitude = (shard.problem.weights.sum() + shard.problem.scores.abs().sum()).item()
    within(outcome.loss, exact.loss, plain.loss, slack * magnitude, "loss")
    for name in outcome.tokens.keys() - {"top1_agreement"}:  # which rounding may turn
        size = exact.tokens[name].norm().item() + len(exact.tokens[name]) ** 0.5
        within(outcome.tokens[name], exact.tokens[name], plain.tokens[name], slack * size, name)
    for name, gradient in outcome.gradients.items():
        check_padding(name, gradient, shard)
        parts = (shard.cut(name, whole.gradients[name]) for whole in (exact, plain))
        within(gradient, *parts, slack * exact.gradients[name].norm().item(), name)


def within(actual: Tensor, exact: Tensor, plain: Tensor, slack: float, name: str) -> None:
    # Both errors are random, so one may well be some way above the other.
    error, allowed = (actual.double() - exact).norm(), 2 * (plain.double() - exact).norm() + slack
    assert error <= allowed, f"{name}: off by {error:.3g}, the plain way by less than {allowed:.3g}"


def check_padding(name: str, gradient: Tensor, shard: Shard) -> None:
    if name.endswith("weight"):
        assert not gradient[max(0, VOCABULARY - shard.vocabulary.shard_start) :].any(), (
            f"{name}: padding has a gradient"
        )


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str, scale: Tensor | None = None) -> None:
    """|error| <= tolerance * |expected| in the Euclidean norm; where nothing is expected, 1e-12."""
    assert actual.shape == expected.shape, name
    size = (expected if scale is None else scale).double().norm()
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * size + 1e-12, f"{name}: off by {error:.3g}, of {size:.3g}"
