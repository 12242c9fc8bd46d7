"""Sampling on vocabulary shards, with noise that is a function of what is sampled.

The uniform number behind a token depends on (seed, prompt, sample, visit, position) alone, so the same tokens come
out under every layout, batch split and restart. Each tensor-parallel rank holds the logits of its own part of the
vocabulary; a token is found by inverting the cumulative distribution in two levels, first over the shards, then
within one, and a few numbers per row are all that travels.

Shapes: b rows, V_local vocabulary entries on this rank, V over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amd.objectives.vocab_parallel import (
    LocalTargets,
    local_max,
    max_over_group,
    reduce_over_group,
    sum_over_group,
)

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants, as signed 64-bit integers
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_BLOCK = 256
"""Vocabulary entries whose probabilities are summed before the search looks inside."""
_CPU_NUMBERS = 2**18
"""Logits that a CPU turns into probabilities together: as many as its cache holds."""
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
    state = _mix(torch.full((), _signed(seed), dtype=torch.int64, device=prompt_ids.device) + _GOLDEN)
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
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from logits split over a tensor-parallel group. Collective over `group`.

    Probabilities are formed in float32, summed in blocks of 256 and then in float64. Of the entries from `vocab_size`
    on, none is ever drawn. Order of the settings: temperature, top-k, top-p, min-p. Entries that tie with the last one
    kept are kept too, so that the result cannot depend on an order among equals: top-k compares logits, the others
    float32 probabilities.

    Args:
        logits: [b, V_local].
        uniforms: float64 [b], in (0, 1), the same on every rank.
        vocab_size: real entries over all ranks.
        shard_start: vocabulary id of this rank's first entry.
        group: the tensor-parallel group; None for one rank.
        temperature: divides the logits; 0 takes the likeliest token, the lowest id among equals.
        top_k: draw among the k likeliest; 0: all.
        top_p: draw among the fewest likeliest entries whose probabilities reach p; 1: all.
        min_p: draw among entries at least this many times as likely as the likeliest; 0: all.
        forbidden: bool [b, V_local], True for entries that must not be drawn.

    Returns:
        The tokens, int64 [b], and their log-probabilities under the plain softmax of the logits over the real
        vocabulary, float32 [b]: at temperature 1, with nothing cut off or forbidden. Both the same on every rank.
    """
    if group is not None and group.size() == 1:
        group = None
    if temperature == 1 and not top_k and top_p == 1 and not min_p and forbidden is None:
        return _sample_softmax(logits, uniforms, vocab_size, shard_start, group)
    centered = _center(logits, vocab_size, shard_start, group)
    choices = centered
    if forbidden is not None:
        choices = _center(logits.masked_fill(forbidden, -torch.inf), vocab_size, shard_start, group)
    if temperature == 0:
        tokens = _lowest_id(choices == 0, vocab_size, shard_start, group)
    else:
        if top_k > 0:
            choices = _keep_top_k(choices, top_k, group)
        weights = (choices / temperature).exp_()
        if top_p < 1:
            weights = _keep_top_p(weights, top_p, group)
        if min_p > 0:
            weights = weights.masked_fill(weights < min_p, 0.0)  # the likeliest weighs 1
        blocks = _in_blocks(weights)
        rows = torch.arange(len(blocks), device=blocks.device)
        tokens, _, _ = _invert_cdf(
            blocks.sum(2).double(), lambda block: blocks[rows, block], uniforms, vocab_size, shard_start, group
        )
    return tokens, _log_probs(centered, tokens, shard_start, group)


def _sample_softmax(
    logits: Tensor, uniforms: Tensor, vocab_size: int, shard_start: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of the softmax itself, whose probabilities never exist all at once."""
    rows, size = logits.shape
    real = min(max(vocab_size - shard_start, 0), size)
    peak = max_over_group(local_max(logits[:, :real]).float(), group)[:, None]
    sums = torch.zeros(rows, -(-size // _BLOCK), dtype=torch.float64, device=logits.device)
    count = max(1, _CPU_NUMBERS // size) if logits.device.type == "cpu" else max(1, rows)
    for first in range(0, rows, count):
        part = slice(first, first + count)
        found = _in_blocks((logits[part, :real] - peak[part]).exp_()).sum(2)
        sums[part, : found.shape[1]] = found

    def inside(block: Tensor) -> Tensor:
        places = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
        weights = (logits.gather(1, places.clamp(max=size - 1)) - peak).exp_()
        return weights.masked_fill_(places >= real, 0.0)

    tokens, weight, total = _invert_cdf(sums, inside, uniforms, vocab_size, shard_start, group)
    return tokens, (weight.log() - total.log()).float()


def mixture(
    logits: Sequence[Tensor],
    shares: Sequence[float],
    *,
    vocab_size: int,
    shard_start: int,
    group: dist.ProcessGroup | None,
    temperature: float,
) -> Tensor:
    """ln sum_i share_i softmax(logits_i / temperature) over the real vocabulary, float32 [b, V_local].

    The arguments are those of `sample_tokens`, with temperature 0 taken for 1.
    """
    mixed = torch.zeros_like(logits[0], dtype=torch.float32)
    for own, share in zip(logits, shares, strict=True):
        weights = (_center(own, vocab_size, shard_start, group) / (temperature or 1.0)).exp_()
        total = sum_over_group(weights.sum(1, dtype=torch.float64), group)
        mixed.addcmul_(weights, (share / total).float()[:, None])
    return mixed.log_()


def token_log_probs(
    logits: Tensor, tokens: Tensor, *, vocab_size: int, shard_start: int, group: dist.ProcessGroup | None
) -> Tensor:
    """What `sample_tokens` returns of given tokens [b], float32 [b]."""
    return _log_probs(_center(logits, vocab_size, shard_start, group), tokens, shard_start, group)


def _log_probs(centered: Tensor, tokens: Tensor, shard_start: int, group: dist.ProcessGroup | None) -> Tensor:
    total = centered.exp().sum(1, dtype=torch.float64)
    own = LocalTargets.of(tokens, shard_start, centered.shape[1]).take(centered)
    own, total = sum_over_group(torch.stack([own.double(), total]), group)
    return (own - total.log()).float()


def _center(logits: Tensor, vocab_size: int, shard_start: int, group: dist.ProcessGroup | None) -> Tensor:
    """A copy less each row's largest, padding -inf."""
    real = max(vocab_size - shard_start, 0)
    peak = max_over_group(local_max(logits[:, :real]).float(), group)
    centered = logits.float() - peak[:, None]
    centered[:, real:] = -torch.inf
    return centered


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
    return reduce_over_group(ids, group, dist.ReduceOp.MIN)


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
    target = top_p * sum_over_group(weights.sum(dim=1, dtype=torch.float64), group)
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
        unseen = max_over_group(offered[:, -1:].clone(), group)  # bounds every weight not offered
        if bool((reached.any(dim=1, keepdim=True) & (threshold >= unseen)).all()):
            break
        count *= 8
    return weights.masked_fill(weights < threshold, 0.0)


def _in_blocks(weights: Tensor) -> Tensor:
    """[b, n] -> [b, blocks, 256], zeros at the end."""
    missing = -weights.shape[1] % _BLOCK
    if missing:
        weights = torch.nn.functional.pad(weights, (0, missing))
    return weights.view(len(weights), weights.shape[1] // _BLOCK, _BLOCK)


def _invert_cdf(
    block_sums: Tensor,
    inside: Callable[[Tensor], Tensor],
    uniforms: Tensor,
    vocab_size: int,
    shard_start: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The id whose stretch of the cumulated weights holds `uniforms` times their total, in the order of the ids.

    Args:
        block_sums: float64 [b, blocks], of the weights of this rank's entries in blocks of 256.
        inside: block [b] -> the weights in it, [b, 256].

    Returns:
        Ids, their weights and the totals, float64 [b].
    """
    shard_ends = _gather(block_sums.sum(dim=1, keepdim=True), group).cumsum(dim=1)
    shard, rest = _find(shard_ends, uniforms * shard_ends[:, -1])
    block, rest = _find(block_sums.cumsum(dim=1), rest)
    weights = inside(block).double()
    entry, _ = _find(weights.cumsum(dim=1), rest)
    weight = weights.gather(1, entry[:, None])[:, 0]
    ids = (block * _BLOCK + entry + shard_start).clamp(max=vocab_size - 1)
    if group is None:
        return ids, weight, shard_ends[:, -1]
    # In one exchange, as float64, which holds every id.
    found = torch.where(shard == group.rank(), torch.stack([ids.double(), weight]), 0.0)
    ids, weight = sum_over_group(found, group)
    return ids.long(), weight, shard_ends[:, -1]


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
