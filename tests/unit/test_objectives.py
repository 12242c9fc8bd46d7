"""Fused head, divergences and moments on one process against tests/reference.py, and their hard cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_amd.objectives import moments
from megatron_amd.objectives.blocks import compiled
from megatron_amd.objectives.divergences import DIVERGENCES, log_ratios_to_mixture
from megatron_amd.objectives.fused_head import critic_loss, head_statistics, student_loss
from megatron_amd.objectives.heads import AppliedHeads, CriticHead, Head, HeadOptions
from megatron_amd.objectives.vocab_parallel import Vocabulary
from tests import reference
from tests.objective_cases import FACTORS, VOCABULARY, Problem, Shard, check
from tests.pairs import Case, all_pairs

OBJECTIVES = (*DIVERGENCES, "amm", "sft")
ONE_RANK = {**FACTORS, "tensor": (1,), "sequence_parallel": (False,)}


@pytest.mark.parametrize("case", all_pairs(ONE_RANK), ids=lambda case: f"{case['loss']}-{case['dtype']}")
def test_values_and_gradients_equal_the_reference(case: Case) -> None:
    check(case, None)


@pytest.mark.parametrize("loss", [loss for loss in FACTORS["loss"] if loss != "statistics"])
def test_float64_survives_wide_logits(loss: str) -> None:
    """Logits of several hundred: most probabilities underflow in exp."""
    check({"loss": loss, "scale": 200.0}, None)


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
    check_one_state(objective, z_teacher, z_student)


def check_one_state(objective: str, z_teacher: list[float], z_student: list[float]) -> None:
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
    torch.testing.assert_close(tokens.value.double(), expected.detach(), rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(student.weight.grad[:, 0].double(), z.grad[0], rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("z_student", [[0.0, -1e9, 1.0], [-1e9, -1e9, 0.0]])
@pytest.mark.parametrize("objective", list(DIVERGENCES))
def test_masked_ids_in_fp32(objective: str, z_student: list[float]) -> None:
    """Ids that both models exclude with -1e9 take no part."""
    check_one_state(objective, [1.0, -1e9, 0.5], z_student)


def test_without_grad_mode_nothing_is_connected() -> None:
    shard = Shard(Problem({"main_grad": True}), None)
    problem = shard.problem
    common = {"targets": problem.targets, "weights": problem.weights, "vocabulary": shard.vocabulary}
    with torch.no_grad():
        loss, _ = student_loss(shard.student_head(), shard.head("teacher"), None, objective="tv", **common)
    assert not loss.requires_grad
    assert (shard.main_grads["student.weight"] == 2).all()
    heads = (shard.student_head(), shard.head("teacher"), shard.critic_head())
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
        "options": HeadOptions(chunk_tokens=chunk),
    }
    with LargestTensor() as largest:
        head_statistics(student, teacher, critic, common["targets"], common["vocabulary"], common["options"])
        for objective in OBJECTIVES:
            student_loss(student, teacher, critic, objective=objective, **common)[0].backward()
        critic_loss(student, teacher, critic, on_policy=True, estimator="sampled", **common)[0].backward()
    assert largest.numel == chunk * vocabulary


def test_a_chunk_fits_its_memory() -> None:
    options, cpu, cuda = HeadOptions(memory_mib=100), torch.device("cpu"), torch.device("cuda")
    assert options.tokens(10**9, 2, torch.float32, cuda) == 1
    assert options.tokens(0, 2, torch.float32, cuda) > 1
    size = options.tokens(49152, 2, torch.float32, cuda)
    assert 90 * 2**20 < size * 49152 * 4 * 2 <= 100 * 2**20
    assert size % 128 == 0
    assert 99 * 2**20 < options.tokens(10**6, 1, torch.float32, cuda) * 10**6 * 4 <= 100 * 2**20  # below a tile
    assert options.tokens(49152, 2, torch.float32, cpu) == size
    assert options.tokens(49152, 2, torch.float64, cuda) == size // 2
    assert options.tokens(1, 2, torch.float32, cpu) < options.tokens(1, 2, torch.float32, cuda)
    assert HeadOptions(chunk_tokens=5000, memory_mib=1).tokens(10**9, 2, torch.float32, cpu) == 5000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.999, 1e-3, 1e-8, 1 - 1e-7])
def test_ratios_to_a_mixture_at_any_share_and_gap(share: float, dtype: torch.dtype) -> None:
    """Against 50 digits of ln p - ln(b p + (1-b) q)."""
    from mpmath import mp, mpf

    gaps = [0.0, 1e-6, -1e-3, 0.3, -2.0, 15.0, -40.0, 90.0, -700.0, 1e4]
    p, q = (torch.tensor([[sign * gap / 2 for gap in gaps]], dtype=dtype) for sign in (1, -1))
    found = log_ratios_to_mixture(p, q, share)
    with mp.workdps(50):
        for column, (a, b) in enumerate(zip(p[0].tolist(), q[0].tolist(), strict=True)):
            mixture = mp.log(mpf(share) * mp.exp(mpf(a)) + (1 - mpf(share)) * mp.exp(mpf(b)))
            for ours, exact in zip(found, (mpf(a) - mixture, mpf(b) - mixture), strict=True):
                error = abs(float(ours[0, column]) - float(exact))
                assert error <= 4 * torch.finfo(dtype).eps * max(1.0, abs(a - b))


def test_scaling_a_loss_whose_gradient_is_in_main_grad_is_refused() -> None:
    shard = Shard(Problem({"main_grad": True}), None)
    problem = shard.problem
    loss, _ = student_loss(
        shard.student_head(), shard.head("teacher"), None, objective="kl", targets=problem.targets,
        weights=problem.weights, vocabulary=shard.vocabulary,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="came with a gradient of 2: scale weights"):
        (2 * loss).backward()


def test_a_narrow_main_grad_is_left_to_megatron() -> None:
    """Where gradients are reduced in bf16, chunks are still summed in fp32."""
    shard = Shard(Problem({"dtype": torch.bfloat16}), None)
    problem, head = shard.problem, shard.student_head()
    weight: Any = head.weight
    weight.main_grad = torch.zeros_like(weight)
    loss, _ = student_loss(
        head, shard.head("teacher"), None, objective="kl", targets=problem.targets, weights=problem.weights,
        vocabulary=shard.vocabulary,
    )  # fmt: skip
    loss.backward()
    assert not weight.main_grad.any()
    assert weight.grad.any()
    assert not hasattr(weight, "grad_added_to_main_grad")


def test_teacher_with_more_padding_than_the_student() -> None:
    shard = Shard(Problem({}), None)
    problem, student, teacher = shard.problem, shard.student_head(), shard.head("teacher")
    wider = Head(teacher.hidden, torch.cat([teacher.weight, torch.full((5, 5), 9.0, dtype=torch.float64)]))
    common = {"targets": problem.targets, "weights": problem.weights, "vocabulary": shard.vocabulary, "objective": "kl"}
    losses = [student_loss(student, head, None, **common)[0] for head in (teacher, wider)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", ["kl", "gjs", "sft", "amm", "critic full_vocabulary off", "critic sampled on"])
def test_element_wise_functions_are_one_graph(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU compiles is traced here without a break and gives the same numbers (run without generated code)."""

    used = trace_kernels(monkeypatch)
    check({"loss": loss, "critic": "pair prior"}, None)
    assert used


def test_what_is_compiled_for_one_distance_is_not_used_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_kernels(monkeypatch)
    for loss in ("kl", "rkl", "js", "gjs", "skew_kl", "amm"):
        check({"loss": loss}, None)


def trace_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have torch.compile trace the element-wise functions; collects those that are called."""

    used: list[Any] = []

    def kernel(_: AppliedHeads, function: Any) -> Any:
        used.append(function)
        return compiled(function, fullgraph=True, backend="aot_eager")

    torch._dynamo.reset()
    compiled.cache_clear()
    monkeypatch.setattr(AppliedHeads, "kernel", kernel)
    return used


def test_calls_that_cannot_be_right_are_refused() -> None:
    shard = Shard(Problem({}), None)
    problem = shard.problem
    student, teacher, critic = shard.student_head(), shard.head("teacher"), shard.critic_head()
    common = {"targets": problem.targets, "weights": problem.weights, "vocabulary": shard.vocabulary}
    with pytest.raises(ValueError, match="'mse' is not known"):
        student_loss(student, teacher, None, objective="mse", **common)
    with pytest.raises(ValueError, match="needs the teacher"):
        student_loss(student, None, None, objective="kl", **common)
    with pytest.raises(ValueError, match="objective gjs 0.5 needs the teacher"):
        student_loss(student, None, None, objective=DIVERGENCES["js"], **common)
    with pytest.raises(ValueError, match="sft sees no teacher"):
        student_loss(student, None, None, objective="sft", with_statistics=True, **common)
    longer = torch.ones(len(problem.targets) + 1)
    for wrong in ({"weights": longer}, {"scores": longer}, {"weights": torch.ones(1)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: .* numbers for {len(problem.targets)} targets"):
            student_loss(student, teacher, None, objective="kl", **{**common, **wrong})
    ignored = problem.targets.clone()
    ignored[0] = -100
    with pytest.raises(ValueError, match="ids from -100 to"):
        student_loss(student, teacher, None, objective="kl", **{**common, "targets": ignored})
    with pytest.raises(ValueError, match="squash 'tanhh'"):
        CriticHead(critic.terms, squash="tanhh")
    with pytest.raises(ValueError, match="0 terms"):
        CriticHead(())
    with pytest.raises(ValueError, match="and a critic"):
        student_loss(student, teacher, None, objective="amm", **common)
    with pytest.raises(ValueError, match="estimator"):
        critic_loss(student, teacher, critic, on_policy=False, estimator="exact", **common)
    with pytest.raises(ValueError, match="not its share"):
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
