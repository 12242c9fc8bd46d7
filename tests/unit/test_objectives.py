"""Fused head, divergences and moments on one process against tests/reference.py, and their hard cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_amd.objectives import moments
from megatron_amd.objectives.divergences import DIVERGENCES
from megatron_amd.objectives.fused_head import (
    CHUNK_BYTES,
    CriticHead,
    Head,
    critic_loss,
    default_chunk_tokens,
    head_statistics,
    student_loss,
)
from megatron_amd.objectives.vocab_parallel import Vocabulary
from tests import reference
from tests.objective_cases import VOCABULARY, Case, Problem, check_everything, check_student, close

OBJECTIVES = (*DIVERGENCES, "amm", "sft")


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(dtype: torch.dtype, chunk_tokens: int | None) -> None:
    check_everything(Case(dtype=dtype, chunk_tokens=chunk_tokens), None)


def test_values_and_gradients_equal_the_reference_without_padding() -> None:
    check_everything(Case(padded=VOCABULARY), None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float64_survives_wide_logits(objective: str) -> None:
    """Logits of several hundred: most probabilities underflow in exp."""
    check_student(Case(scale=200.0), objective, None)


def one_state(z_teacher: list[float], z_student: list[float]) -> tuple[Head, Head, Vocabulary]:
    """(student, teacher) of one token with these fp32 logits."""
    hidden = torch.ones(1, 1)
    student = Head(hidden.clone().requires_grad_(), torch.tensor(z_student)[:, None].requires_grad_())
    return student, Head(hidden, torch.tensor(z_teacher)[:, None]), Vocabulary(len(z_student))


@pytest.mark.parametrize("objective", list(DIVERGENCES))
@pytest.mark.parametrize(
    ("z_teacher", "z_student"),
    [
        ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
        ([1e4, 0.0, 0.0], [1e4, 1.0, -1.0]),
        ([0.0, 0.0, 0.0], [0.0, -1e4, 1e4]),
    ],
)
def test_extreme_logits_in_fp32(objective: str, z_teacher: list[float], z_student: list[float]) -> None:
    """p or q is 0 in fp32; values and gradients are finite and the reference's."""
    student, teacher, vocabulary = one_state(z_teacher, z_student)
    targets, weights = torch.tensor([1]), torch.ones(1)
    loss, tokens = student_loss(
        student, teacher, None, objective=objective, targets=targets, weights=weights, vocabulary=vocabulary
    )
    loss.backward()
    z = torch.tensor([z_student], dtype=torch.float64, requires_grad=True)
    expected = reference.distance(objective, torch.tensor([z_teacher], dtype=torch.float64), z)
    expected.sum().backward()
    assert z.grad is not None
    assert student.weight.grad is not None
    torch.testing.assert_close(tokens.value.double(), expected.detach(), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(student.weight.grad[:, 0].double(), z.grad[0], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("objective", ["kl", "rkl", "js", "tv"])
def test_bf16_is_no_worse_than_dense_bf16_with_fp32_softmax(objective: str) -> None:
    """bf16 heads: errors against float64 stay within those of the plain way, logits in bf16 and the rest in fp32."""
    problem = Problem(Case(dtype=torch.bfloat16))
    shard = problem.shard(None)
    loss, _ = student_loss(
        shard.head("student"),
        shard.head("teacher"),
        None,
        objective=objective,
        targets=problem.targets,
        weights=problem.weights,
        vocabulary=shard.vocabulary,
    )
    assert loss.dtype == torch.float32
    loss.backward()
    z_teacher, z_student = problem.reference_logits()
    exact = (problem.weights * reference.distance(objective, z_teacher, z_student)).sum()
    gradients = problem.reference_gradients(exact, ["student.hidden", "student.weight"])

    plain = {name: leaf.detach()[: VOCABULARY if name.endswith("weight") else None].clone().requires_grad_()
             for name, leaf in shard.leaves.items()}  # fmt: skip
    p, q = (plain[f"{role}.hidden"] @ plain[f"{role}.weight"].T for role in ("teacher", "student"))
    dense = (problem.weights.float() * reference.distance(objective, p.float(), q.float())).sum()
    dense.backward()
    slack = 2**-9 * abs(exact.item())
    assert (loss - exact).abs() <= 1.5 * (dense - exact).abs() + slack
    for name, want in gradients.items():
        got, dense_gradient = shard.leaves[name].grad, plain[name].grad
        assert got is not None
        assert dense_gradient is not None
        assert got.dtype == torch.bfloat16
        error, dense_error = (
            (got[: want.shape[0]] - want).norm(),
            (dense_gradient - want[: dense_gradient.shape[0]]).norm(),
        )
        assert error <= 1.5 * dense_error + 2**-9 * want.norm(), name


def test_tied_head_adds_to_the_embedding_gradient() -> None:
    problem = Problem(Case(padded=VOCABULARY))
    shard = problem.shard(None)
    z_teacher, _ = problem.reference_logits()
    weight, mixer = shard.leaves["student.weight"], torch.randn(3, 3, dtype=torch.float64)

    def hidden() -> torch.Tensor:
        return torch.nn.functional.embedding(problem.targets, weight) @ mixer

    expected = (problem.weights * reference.distance("rkl", z_teacher, reference.logits(hidden(), weight))).sum()
    (want,) = torch.autograd.grad(expected, [weight])
    loss, _ = student_loss(
        Head(hidden(), weight),
        shard.head("teacher"),
        None,
        objective="rkl",
        targets=problem.targets,
        weights=problem.weights,
        vocabulary=shard.vocabulary,
    )
    loss.backward()
    assert weight.grad is not None
    close(weight.grad, want, 1e-9, "tied weight")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_tokens_give_a_connected_zero(objective: str) -> None:
    problem = Problem(Case())
    shard = problem.shard(None)
    student, teacher = (Head(head.hidden[:0], head.weight) for head in (shard.head("student"), shard.head("teacher")))
    terms = tuple((hidden[:0], weight, sign) for hidden, weight, sign in shard.critic().terms)
    empty = {"targets": problem.targets[:0], "weights": problem.weights[:0], "vocabulary": shard.vocabulary}
    loss, tokens = student_loss(student, teacher, CriticHead(terms), objective=objective, **empty)
    loss.backward()
    gradient = shard.leaves["student.weight"].grad
    assert gradient is not None
    assert loss.item() == 0
    assert not gradient.any()
    assert tokens.value.shape == (0,)
    loss, statistics = critic_loss(student, teacher, CriticHead(terms), on_policy=True, estimator="sampled", **empty)
    loss.backward()
    assert shard.leaves["term0.weight"].grad is not None
    assert all(field.shape == (0,) for field in vars(statistics).values())


def test_without_grad_mode_nothing_is_connected() -> None:
    problem = Problem(Case())
    shard = problem.shard(None)
    common = {"targets": problem.targets, "weights": problem.weights, "vocabulary": shard.vocabulary}
    with torch.no_grad():
        loss, _ = student_loss(shard.head("student"), shard.head("teacher"), None, objective="tv", **common)
    assert not loss.requires_grad
    heads = (shard.head("student"), shard.head("teacher"), shard.critic())
    loss, statistics = critic_loss(*heads, on_policy=False, estimator="full_vocabulary", **common)
    assert loss.requires_grad
    assert not any(field.requires_grad for field in vars(statistics).values())


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers in any one tensor that is made while it is active."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_no_tensor_of_all_tokens_by_vocabulary() -> None:
    tokens, vocabulary, width, chunk = 64, 1000, 4, 8
    student, teacher = (
        Head(torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True))
        for _ in range(2)
    )
    critic = CriticHead(((teacher.hidden, torch.randn(vocabulary, width, requires_grad=True), 1.0),), prior="log_ratio")
    common = {
        "targets": torch.zeros(tokens, dtype=torch.int64),
        "weights": torch.ones(tokens),
        "vocabulary": Vocabulary(vocabulary),
        "chunk_tokens": chunk,
    }
    with LargestTensor() as largest:
        head_statistics(student, teacher, critic, common["targets"], common["vocabulary"], chunk)
        for objective in OBJECTIVES:
            student_loss(student, teacher, critic, objective=objective, **common)[0].backward()
        critic_loss(student, teacher, critic, on_policy=True, estimator="sampled", **common)[0].backward()
    assert largest.numel == chunk * vocabulary


def test_default_chunk_fits_its_working_set() -> None:
    assert default_chunk_tokens(10**9) == 1
    assert default_chunk_tokens(0) > 1
    chunk = default_chunk_tokens(49152)
    assert CHUNK_BYTES / 2 < chunk * 49152 * 4 * 10 <= CHUNK_BYTES
    assert default_chunk_tokens(49152, torch.float64) == chunk // 2


def test_calls_that_cannot_be_right_are_refused() -> None:
    problem = Problem(Case())
    shard = problem.shard(None)
    student, teacher, critic = shard.head("student"), shard.head("teacher"), shard.critic()
    common = {"targets": problem.targets, "weights": problem.weights, "vocabulary": shard.vocabulary}
    with pytest.raises(ValueError, match="'mse' is not known"):
        student_loss(student, teacher, None, objective="mse", **common)
    with pytest.raises(ValueError, match="needs the teacher"):
        student_loss(student, None, None, objective="kl", **common)
    with pytest.raises(ValueError, match="and a critic"):
        student_loss(student, teacher, None, objective="amm", **common)
    with pytest.raises(ValueError, match="estimator"):
        critic_loss(student, teacher, critic, on_policy=False, estimator="exact", **common)
    with pytest.raises(ValueError, match="does not go with a student"):
        head_statistics(student, Head(teacher.hidden, teacher.weight[:8]), None, problem.targets, shard.vocabulary)
    for wrong in (Vocabulary(VOCABULARY, shard_start=16), Vocabulary(17)):
        with pytest.raises(ValueError, match="not its share"):
            head_statistics(student, teacher, None, problem.targets, wrong)


def grid(*rows: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths -> ([B, T] with nonsense where there is no token, mask)."""
    width = max(len(row) for row in rows)
    values = torch.tensor([row + [1e6] * (width - len(row)) for row in rows], dtype=torch.float64)
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
    return values, mask


ROWS = ([1.0, -2.0, 3.0], [0.5], [4.0, 2.5], [-1.0, 1.0, 2.0, 7.0])


def test_returns_are_the_sums_they_stand_for() -> None:
    gamma = 0.9
    values, mask = grid(*ROWS)
    after = moments.returns_after(values, mask, gamma)
    total = moments.discounted_returns(values, mask, gamma)
    for i, row in enumerate(ROWS):
        for t in range(len(row)):
            assert after[i, t].item() == pytest.approx(sum(gamma**k * r for k, r in enumerate(row[t + 1 :])))
            assert total[i, t].item() == pytest.approx(sum(gamma**k * r for k, r in enumerate(row[t:])))
    assert moments.returns_after(values[:0, :0], mask[:0, :0], gamma).shape == (0, 0)


def test_baseline_is_the_mean_of_the_others_that_have_the_step() -> None:
    values, mask = grid(*ROWS)
    baseline = moments.leave_one_out_baseline(values, mask)
    for i, row in enumerate(ROWS):
        for t in range(values.shape[1]):
            others = [other[t] for j, other in enumerate(ROWS) if j != i and t < len(other)]
            expected = sum(others) / len(others) if others and t < len(row) else 0.0
            assert baseline[i, t].item() == pytest.approx(expected)


def test_policy_gradient_scores_by_definition() -> None:
    gamma = 0.8
    delta, mask = grid(*ROWS)
    sampled = -2 * delta + 1
    discount = torch.tensor([gamma**t for t in range(delta.shape[1])], dtype=torch.float64) * mask
    after = gamma * moments.returns_after(delta, mask, gamma)
    total = moments.discounted_returns(sampled, mask, gamma)
    none = torch.zeros_like(delta)
    expected = {
        "per_step": (discount, none),
        "rao_blackwell": (discount, discount * (after - moments.leave_one_out_baseline(after, mask))),
        "reinforce": (none, discount * (total - moments.leave_one_out_baseline(total, mask))),
    }
    for name, (weights, scores) in expected.items():
        got_weights, got_scores = moments.policy_gradient_scores(name, delta, sampled, mask, gamma)
        torch.testing.assert_close(got_weights, weights)
        torch.testing.assert_close(got_scores, scores)
        assert not got_scores[~mask].any()
    with pytest.raises(ValueError, match="not known"):
        moments.policy_gradient_scores("ppo", delta, sampled, mask, gamma)


def test_discount_weights() -> None:
    steps = torch.tensor([0, 1, 5])
    torch.testing.assert_close(moments.discount_weights(steps, 0.5), torch.tensor([1.0, 0.5, 0.5**5]))
    assert moments.discount_weights(steps, 1.0).tolist() == [1.0, 1.0, 1.0]
    assert math.isclose(moments.discount_weights(steps, 0.9, torch.float64)[2].item(), 0.9**5)


def test_top1_agreement_takes_the_first_of_equals() -> None:
    hidden = torch.ones(2, 1)
    student, teacher = (
        Head(hidden, torch.tensor([[1.0], [2.0], [2.0]])),
        Head(hidden, torch.tensor([[0.0], [1.0], [3.0]])),
    )
    targets = torch.zeros(2, dtype=torch.int64)
    assert head_statistics(student, student, None, targets, Vocabulary(3)).top1_agreement.tolist() == [1.0, 1.0]
    assert head_statistics(student, teacher, None, targets, Vocabulary(3)).top1_agreement.tolist() == [0.0, 0.0]
    # Without the third id both prefer the second.
    assert head_statistics(student, teacher, None, targets, Vocabulary(2)).top1_agreement.tolist() == [1.0, 1.0]
