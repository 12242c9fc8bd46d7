"""Tokens drawn from vocabulary shards are those drawn from the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_amd.rollout.sampling import sample_tokens
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


def draw_on_shards() -> list[list[int]]:
    group = dist.group.WORLD
    shard = PADDED // group.size()
    start = group.rank() * shard
    logits = make_logits()[:, start : start + shard]
    uniforms = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [
        sample_tokens(logits, uniforms, vocab_size=VOCAB, shard_start=start, group=group, **settings).tolist()
        for settings in SETTINGS
    ]


@pytest.mark.distributed
def test_shards_draw_the_tokens_of_the_whole_vocabulary():
    (expected,) = run_distributed(draw_on_shards, 1)
    assert all(max(tokens) < VOCAB for tokens in expected)
    assert len(set(expected[0])) > 50
    for ranks in (2, 4):
        for actual in run_distributed(draw_on_shards, ranks):
            for settings, ours, theirs in zip(SETTINGS, actual, expected, strict=True):
                assert ours == theirs, (ranks, settings)
