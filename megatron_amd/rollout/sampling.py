"""Sampling on vocabulary shards, with noise that is a function of what is sampled.

The uniform number behind a token depends on (seed, prompt, sample, visit, position) alone, so the same tokens come
out under every layout, batch split and restart. Each tensor-parallel rank holds the logits of its own part of the
vocabulary; a token is found by inverting the cumulative distribution in two levels, first over the shards, then
within one, and a few numbers per row are all that travels.

Shapes: b rows, V_local vocabulary entries on this rank, V over all ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants, as signed 64-bit integers
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_BLOCK = 256
"""Vocabulary entries whose probabilities are summed before the search looks inside."""
_CANDIDATES = 512
"""Likeliest entries per shard that top-p looks at first."""


def uniform(seed: int, prompt_ids: Tensor, sample_index: Tensor, visits: Tensor, positions: Tensor) -> Tensor:
    """One number in (0, 1) for each token to be sampled.

    A hash: splitmix64's finaliser, applied after each argument is added (Steele, Lea and Flood 2014). No state, no
    order, the same on every device.

    Args:
        seed: the run's seed.
        prompt_ids: int64, row numbers of the prompts in their data set.
        sample_index: int64, which of a prompt's samples.
        visits: int64, how often the prompt has been drawn before.
        positions: int64, index of the token in the response.

    Returns:
        float64, of the shape to which the arguments broadcast: odd multiples of 2**-53.
    """
    state = torch.tensor(_signed(seed), dtype=torch.int64, device=prompt_ids.device)
    state = _mix(state + _GOLDEN)
    for argument in (prompt_ids, sample_index, visits, positions):
        state = _mix(state + argument + _GOLDEN)
    return (_shift_right(state, 12).double() + 0.5) * 2.0**-52


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift that fills with zeros (torch's fills with the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    vocab_size: int,
    shard_start: int,
    group: dist.ProcessGroup | None,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Draw one token per row from logits split over a tensor-parallel group. Collective over `group`.

    Probabilities are formed in float32 and summed in float64. Of the entries from `vocab_size` on, none is ever drawn.
    Order of the settings: temperature, top-k, top-p. Entries that tie with the last one kept are kept too, so that
    the result cannot depend on an order among equals: top-k compares logits, top-p float32 probabilities.

    Args:
        logits: float32 [b, V_local].
        uniforms: float64 [b], in (0, 1), the same on every rank.
        vocab_size: real entries over all ranks.
        shard_start: vocabulary id of this rank's first entry.
        group: the tensor-parallel group; None for one rank.
        temperature: divides the logits; 0 takes the likeliest token, the lowest id among equals.
        top_k: draw among the k likeliest; 0: all.
        top_p: draw among the fewest likeliest entries whose probabilities reach p; 1: all.

    Returns:
        int64 [b], the same on every rank.
    """
    if group is not None and group.size() == 1:
        group = None
    real = vocab_size - shard_start
    if real < logits.shape[1]:
        logits = logits.clone()
        logits[:, max(real, 0) :] = float("-inf")
    peak = _reduce(logits.amax(dim=1), dist.ReduceOp.MAX, group)
    if temperature == 0:
        return _lowest_id(logits == peak[:, None], vocab_size, shard_start, group)
    if top_k > 0:
        logits = _keep_top_k(logits, top_k, group)
    # In place on a copy: exp((logits - peak) / temperature).
    weights = (logits - peak[:, None]).div_(temperature).exp_()
    if top_p < 1:
        weights = _keep_top_p(weights, top_p, group)
    return _invert_cdf(weights, uniforms, vocab_size, shard_start, group)


def _reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, op=op, group=group)
    return values


def _gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[b, n] on each rank -> [b, ranks * n] in rank order."""
    if group is None:
        return values
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _lowest_id(chosen: Tensor, vocab_size: int, shard_start: int, group: dist.ProcessGroup | None) -> Tensor:
    """Lowest vocabulary id at which `chosen` [b, V_local] is True on any rank."""
    first = chosen.to(torch.uint8).argmax(dim=1) + shard_start  # argmax returns the first of equal values
    ids = torch.where(chosen.any(dim=1), first, vocab_size - 1)
    return _reduce(ids, dist.ReduceOp.MIN, group)


def _keep_top_k(logits: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """Logits below the k-th largest of a row become -inf."""
    local = logits.topk(min(k, logits.shape[1]), dim=1).values
    largest = _gather(local, group)
    threshold = largest.topk(min(k, largest.shape[1]), dim=1).values[:, -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def _keep_top_p(weights: Tensor, top_p: float, group: dist.ProcessGroup | None) -> Tensor:
    """Weights outside the smallest set of largest weights whose share reaches `top_p` become 0.

    Each rank offers its largest weights. Together they are the row's largest down to the greatest of the ranks' own
    last offers; where the share is reached above that, the answer is exact, else all offer more.
    """
    target = top_p * _reduce(weights.sum(dim=1, dtype=torch.float64), dist.ReduceOp.SUM, group)
    size, count = weights.shape[1], _CANDIDATES
    while True:
        offered = weights.topk(min(count, size), dim=1).values
        merged = _gather(offered, group).sort(dim=1, descending=True).values
        reached = merged.cumsum(dim=1, dtype=torch.float64) >= target[:, None]
        # First place where the share is reached; the last place where rounding never lets it be.
        place = torch.where(reached.any(dim=1), reached.to(torch.uint8).argmax(dim=1), merged.shape[1] - 1)
        threshold = merged.gather(1, place[:, None])
        if count >= size:
            break
        unseen = _reduce(offered[:, -1:].clone(), dist.ReduceOp.MAX, group)  # bounds every weight not offered
        if bool((reached.any(dim=1, keepdim=True) & (threshold >= unseen)).all()):
            break
        count *= 8
    return weights.masked_fill(weights < threshold, 0.0)


def _invert_cdf(
    weights: Tensor, uniforms: Tensor, vocab_size: int, shard_start: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The id whose stretch of the cumulated weights [b, V_local] holds `uniforms` times their total."""
    rows, size = weights.shape
    blocks = -(-size // _BLOCK)
    if size % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, blocks * _BLOCK - size))
    weights = weights.view(rows, blocks, _BLOCK)
    block_sums = weights.sum(dim=2, dtype=torch.float64)
    shard_ends = _gather(block_sums.sum(dim=1, keepdim=True), group).cumsum(dim=1)
    shard, rest = _find(shard_ends, uniforms * shard_ends[:, -1])
    block, rest = _find(block_sums.cumsum(dim=1), rest)
    inside = weights[torch.arange(rows, device=weights.device), block].double()
    entry, _ = _find(inside.cumsum(dim=1), rest)
    ids = (block * _BLOCK + entry + shard_start).clamp(max=vocab_size - 1)
    if group is None:
        return ids
    return _reduce(torch.where(shard == group.rank(), ids, 0), dist.ReduceOp.MAX, group)


def _find(ends: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first interval whose end exceeds the target, and the target's distance from that interval's beginning.

    `ends` [b, n] are cumulated weights. A target that rounding has carried to the last end or beyond is pulled back
    just below it: the interval found then never is an empty one.
    """
    last = ends[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    index = torch.searchsorted(ends, target[:, None], right=True).clamp_(max=ends.shape[1] - 1)
    beginning = torch.where(index > 0, ends.gather(1, (index - 1).clamp_(min=0)), 0.0)
    return index[:, 0], target - beginning[:, 0]
