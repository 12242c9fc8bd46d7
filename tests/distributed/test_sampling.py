"""Tokens drawn from vocabulary shards are those drawn from the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_amd.rollout.sampling import sample_tokens, uniform
from tests.distributed.runner import run_distributed

ROWS, PADDED, VOCAB = 200, 4096, 2500  # the last of four shards holds padding only, and the third some
SETTINGS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 2000, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.5},
    {"temperature": 1.3, "top_k": 100, "top_p": 0.5},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 300, "top_p": 0.95, "min_p": 0.01},
]


def make_logits() -> torch.Tensor:
    """Sharp rows; flat rows, of which top-p keeps more than it is first offered; rows with ties across shards; and
    rows of which one shard of four holds likelier entries than the others' first offers, beyond its own first offer."""
    logits = torch.randn(ROWS, PADDED, generator=torch.Generator().manual_seed(0)) * 3
    logits[50:100] *= 0.01
    logits[100:150] = logits[100:150].round()
    logits[150:] *= 0.01
    logits[150:, : PADDED // 4] += 1.0
    logits[:, VOCAB:] = 50.0
    return logits


def draw_on_shards() -> list[list[list[float]]]:
    group = dist.group.WORLD
    shard = PADDED // group.size()
    start = group.rank() * shard
    logits = make_logits()[:, start : start + shard]
    uniforms = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [
        [
            found.tolist()
            for found in sample_tokens(logits, uniforms, vocab_size=VOCAB, shard_start=start, group=group, **settings)
        ]
        for settings in SETTINGS
    ]


def draw_at_a_border() -> list[int]:
    """All mass in the first shard's last block, which the shard does not fill; noise as near to 1 as there is."""
    group, rows, shard = dist.group.WORLD, 2000, 300
    start = group.rank() * shard
    logits = torch.full((rows, 2 * shard), -200.0)
    logits[:, 256:shard] = torch.randn(rows, shard - 256, generator=torch.Generator().manual_seed(2))
    uniforms = torch.full((rows,), 1 - 2.0**-53, dtype=torch.float64)
    part = logits[:, start : start + shard]
    tokens, log_probs = sample_tokens(part, uniforms, vocab_size=2 * shard, shard_start=start, group=group)
    exact = logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert float((log_probs - exact).abs().max()) < 1e-5
    return tokens.tolist()


@pytest.mark.distributed
def test_a_shard_that_ends_within_a_block_draws_its_own_tokens():
    for tokens in run_distributed(draw_at_a_border, 2):
        assert all(256 <= token < 300 for token in tokens)


@pytest.mark.distributed
def test_shards_draw_the_tokens_of_the_whole_vocabulary():
    (expected,) = run_distributed(draw_on_shards, 1)
    assert all(max(tokens) < VOCAB for tokens, _ in expected)
    assert len(set(expected[0][0])) > 50
    for ranks in (2, 4):
        for actual in run_distributed(draw_on_shards, ranks):
            for settings, (ours, log_probs), (theirs, others) in zip(SETTINGS, actual, expected, strict=True):
                assert ours == theirs, (ranks, settings)
                assert log_probs == pytest.approx(others, abs=1e-5)


DRAWS, SMALL = 60_000, 40
DISTRIBUTIONS: list[dict[str, Any]] = [
    {}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]  # fmt: skip


def exact(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """The distribution in float64, entry by entry: temperature, top-k, top-p, min-p."""
    kept = list(range(len(logits)))
    kept.sort(key=lambda i: -float(logits[i]))
    kept = kept[:top_k] if top_k else kept
    weights = {i: float(((logits[i].double() - logits.max().double()) / temperature).exp()) for i in kept}
    nucleus, total = [], 0.0
    for i in kept:
        nucleus.append(i)
        total += weights[i]
        if total >= top_p * sum(weights.values()):
            break
    nucleus = [i for i in nucleus if weights[i] >= min_p * weights[kept[0]]]
    probabilities = torch.zeros(len(logits), dtype=torch.float64)
    for i in nucleus:
        probabilities[i] = weights[i] / sum(weights[j] for j in nucleus)
    return probabilities


def counts_of_draws() -> list[list[int]]:
    group = dist.group.WORLD
    rows = 48 // group.size()
    start = group.rank() * rows
    logits = torch.randn(48, generator=torch.Generator().manual_seed(4)) * 2
    noise = uniform(5, torch.arange(DRAWS) % 100, torch.tensor(0), torch.tensor(1), torch.arange(DRAWS) // 100)
    shard = logits[start : start + rows].expand(DRAWS, -1)
    return [
        torch.bincount(
            sample_tokens(shard, noise, vocab_size=SMALL, shard_start=start, group=group, **settings)[0],
            minlength=SMALL,
        ).tolist()
        for settings in DISTRIBUTIONS
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_draws_follow_the_exact_distribution(ranks):
    """Chi-squared over 60,000 draws with the rollouts' own noise: 100 prompts at 600 positions."""
    logits = (torch.randn(48, generator=torch.Generator().manual_seed(4)) * 2)[:SMALL]
    for found in run_distributed(counts_of_draws, ranks):
        for settings, counts in zip(DISTRIBUTIONS, found, strict=True):
            expected = exact(logits, **settings) * DRAWS
            counted = torch.tensor(counts, dtype=torch.float64)
            assert not counted[expected == 0].any(), settings
            common = expected >= 5
            freedom = int(common.sum()) - 1
            statistic = float(((counted - expected) ** 2 / expected)[common].sum())
            assert statistic < freedom + 5 * (2 * freedom) ** 0.5, settings  # five standard deviations
