"""Sharding the vocabulary changes nothing: values and gradients against the dense reference on TP 2 and 4."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_amd.objectives.divergences import DIVERGENCES
from megatron_amd.objectives.fused_head import critic_loss, head_statistics, student_loss
from megatron_amd.objectives.heads import CriticHead, Head, HeadOptions
from megatron_amd.objectives.moments import leave_one_out_baseline, policy_gradient_scores
from megatron_amd.objectives.vocab_parallel import Vocabulary
from tests.distributed.runner import run_distributed
from tests.objective_cases import FACTORS, VOCABULARY, check, possible
from tests.pairs import all_pairs, meetings, possible_meetings

pytestmark = pytest.mark.distributed


CASES = all_pairs(FACTORS, possible)


def test_every_combination_equals_the_dense_reference() -> None:
    """Objectives, critics, estimators, layouts of the heads, chunks, padding, masks, types: every pair of settings."""

    def check_all() -> None:
        rank = dist.get_rank()
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        groups = {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}
        for case in CASES:
            try:
                check(case, groups[case["tensor"]])
            except Exception as error:
                raise AssertionError(f"{case}") from error

    run_distributed(check_all, 4)


def test_cases_cover_all_pairs() -> None:
    """Guards the guard: each setting meets each other one."""
    assert possible_meetings(FACTORS, possible) <= set().union(*map(meetings, CASES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_are_exactly_equal_on_shards(dtype: torch.dtype) -> None:
    """Same logits, same bits of p and q, whatever order the shards are added in; so distance and gradient are 0."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        group, rows, tokens = dist.group.WORLD, 25, 37
        start = dist.get_rank() * rows
        hidden = torch.randn(tokens, 8, generator=generator).to(dtype)
        weight, critic_weight = (
            torch.randn(4 * rows, 8, generator=generator)[start : start + rows].to(dtype) for _ in range(2)
        )
        student = Head(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        critic = CriticHead(((hidden, critic_weight.requires_grad_(), 1.0),), prior="log_ratio")
        teacher, vocabulary = Head(hidden, weight), Vocabulary(97, start, group)
        targets, weights = torch.arange(tokens), torch.ones(tokens)
        common = {"targets": targets, "weights": weights, "vocabulary": vocabulary}
        common["options"] = HeadOptions(chunk_tokens=10)
        for objective in DIVERGENCES:
            loss, tokens_of_loss = student_loss(student, teacher, None, objective=objective, **common)
            for gradient in torch.autograd.grad(loss, [student.hidden, student.weight]):
                assert not gradient.any(), objective
            assert not tokens_of_loss.value.any(), objective
        loss, statistics = critic_loss(student, teacher, critic, on_policy=True, estimator="full_vocabulary", **common)
        assert not torch.autograd.grad(loss, [critic_weight])[0].any()
        for name in ("kl", "rkl", "tv", "js", "delta"):
            assert not getattr(statistics, name).any(), name
        assert statistics.top1_agreement.all()

    run_distributed(check, 4)


def test_no_tokens_on_shards_do_not_hang() -> None:
    def check() -> None:
        vocabulary = Vocabulary(VOCABULARY, 8 * dist.get_rank(), dist.group.WORLD)
        hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(8, 3, requires_grad=True)
        head, critic = Head(hidden, weight), CriticHead(((hidden, weight, 1.0),))
        none = torch.zeros(0, dtype=torch.int64)
        head_statistics(head, head, critic, none, vocabulary)
        common = {"targets": none, "weights": torch.zeros(0), "vocabulary": vocabulary}
        for objective in ("amm", "sft", "tv"):
            student_loss(head, head, critic, objective=objective, **common)[0].backward()
        critic_loss(head, head, critic, on_policy=False, estimator="sampled", **common)[0].backward()
        assert weight.grad is not None
        assert not weight.grad.any()

    run_distributed(check, 2, timeout=30)


def test_baseline_over_data_parallel_ranks_equals_one_rank() -> None:
    """Ranks with different numbers and lengths of sequences, one rank with none."""
    generator = torch.Generator().manual_seed(0)
    delta, sampled = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([2, 3, 6, 1, 4])
    mask = torch.arange(6) < lengths[:, None]
    whole = leave_one_out_baseline(delta, mask)
    scores = {
        name: policy_gradient_scores(name, delta, sampled, mask, 0.9)[1] for name in ("reinforce", "rao_blackwell")
    }
    parts = [(slice(0, 2), 3), (slice(2, 5), 6), (slice(5, 5), 0)]

    def check() -> None:
        rows, width = parts[dist.get_rank()]
        part = (delta[rows, :width], sampled[rows, :width], mask[rows, :width])
        baseline = leave_one_out_baseline(part[0], part[2], dist.group.WORLD)
        torch.testing.assert_close(baseline, whole[rows, :width])
        for name, expected in scores.items():
            _, got = policy_gradient_scores(name, *part, 0.9, dist.group.WORLD)
            torch.testing.assert_close(got, expected[rows, :width])

    run_distributed(check, 3)
