"""The hash behind the noise, and sampling on one shard against dense probabilities."""

from __future__ import annotations

import pytest
import torch

from megatron_amd.rollout.sampling import mixture, sample_tokens, token_log_probs, uniform


def draw(logits, uniforms, *, vocab_size=None, **settings):
    vocab_size = vocab_size or logits.shape[1]
    tokens, log_probs = sample_tokens(logits, uniforms, vocab_size=vocab_size, shard_start=0, group=None, **settings)
    plain = logits[:, :vocab_size].double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), plain, rtol=1e-6, atol=1e-6, equal_nan=True)
    return tokens


def even(count):
    """`count` numbers spread evenly over (0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def assert_draws(probabilities, logits, **settings):
    """Each id is drawn by the number in the middle of its stretch of the cumulative distribution.

    `probabilities` (float64) are the expected ones, 0 for ids that must not be drawn. Ids too rare for float32 weights
    to place exactly are left out.
    """
    ids = torch.nonzero(probabilities > 1e-5).flatten()
    middles = (probabilities.cumsum(dim=0) - probabilities / 2)[ids]
    assert torch.equal(draw(logits.expand(len(ids), -1), middles, **settings), ids)
    others = draw(logits.expand(500, -1), even(500), **settings)
    assert (probabilities[others] > 0).all()


def some_logits(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def hash_along(axis, count, seed=5, fixed=3):
    arguments = [torch.full((count,), fixed) for _ in range(4)]
    arguments[axis] = torch.arange(count)
    return uniform(seed, *arguments)


@pytest.mark.parametrize("axis", range(4))
def test_noise_is_uniform_along_each_argument(axis):
    numbers = hash_along(axis, 100_000)
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
    assert chi_square(counts) < 160  # 99 degrees of freedom: mean 99, standard deviation 14


@pytest.mark.parametrize("axis", range(4))
def test_neighbours_are_independent(axis):
    numbers = hash_along(axis, 100_001)
    cells = (numbers[:-1] * 10).long() * 10 + (numbers[1:] * 10).long()
    assert chi_square(torch.bincount(cells, minlength=100).double()) < 160


def test_arguments_are_independent_of_each_other_and_of_the_seed():
    streams = [hash_along(axis, 50_000, seed=seed) for axis in range(4) for seed in (5, 6)]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(8, dtype=torch.float64)
    # Streams of one seed meet where the moving argument is 3: one value in 50,000.
    assert float(correlations.abs().max()) < 0.025
    grid = torch.arange(30)
    numbers = uniform(1, grid[:, None, None, None], grid[:, None, None], grid[:, None], grid)
    assert numbers.unique().numel() == 30**4


def splitmix_in_python(seed, *arguments):
    """The hash on Python's integers."""
    ones = (1 << 64) - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ones
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ones
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    state = mix((seed + golden) & ones)
    for argument in arguments:
        state = mix((state + argument + golden) & ones)
    return ((state >> 12) + 0.5) * 2.0**-52


def test_noise_is_frozen():
    """Rollouts of a seed must not change between versions."""
    one = torch.tensor([1])
    assert uniform(1234, torch.tensor([0, 1, 2**40]), one, one, one).tolist() == [
        0.07039050168541972,
        0.2879332371008788,
        0.4478579161280397,
    ]
    for seed in (0, -1, 1 << 63, 2**64 - 1):
        numbers = uniform(seed, torch.arange(50), torch.tensor(2), torch.tensor(3), torch.tensor(4))
        assert numbers.tolist() == [splitmix_in_python(seed, i, 2, 3, 4) for i in range(50)]


@pytest.mark.parametrize("size", [7, 256, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_stretches_are_the_softmax(size, temperature):
    logits = some_logits(size)
    assert_draws((logits.double() / temperature).softmax(dim=0), logits, temperature=temperature)


def test_hashed_noise_draws_the_softmax():
    logits = some_logits(20, seed=3)
    count = 50_000
    zero = torch.zeros(1, dtype=torch.int64)
    tokens = draw(logits.expand(count, -1), uniform(0, torch.arange(count), zero, zero, zero))
    expected = logits.double().softmax(dim=0) * count
    counts = torch.bincount(tokens, minlength=20).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 19 + 6 * 38**0.5


@pytest.mark.parametrize("k", [1, 5, 300, 5000])
def test_top_k(k):
    logits = some_logits(1000)
    kept = torch.zeros(1000, dtype=torch.bool)
    kept[logits.argsort(descending=True)[:k]] = True
    assert_draws(logits.double().masked_fill(~kept, float("-inf")).softmax(dim=0), logits, top_k=k)


def kept_by_top_p(probabilities, p):
    """The smallest set of largest probabilities whose sum reaches p, by a sort."""
    order = probabilities.argsort(descending=True)
    count = int((probabilities[order].cumsum(dim=0) < p).sum()) + 1
    kept = torch.zeros(len(probabilities), dtype=torch.bool)
    kept[order[:count]] = True
    return kept


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_top_p(p, scale):
    """The flat distribution keeps more entries than the first offer of 512, so that the search must go on."""
    logits = some_logits(3000) * scale
    probabilities = logits.double().softmax(dim=0)
    kept = kept_by_top_p(probabilities, p)
    expected = probabilities.masked_fill(~kept, 0.0)
    assert_draws(expected / expected.sum(), logits, top_p=p)


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_min_p(p, temperature):
    logits = some_logits(300)
    probabilities = (logits.double() / temperature).softmax(dim=0)
    kept = probabilities >= p * probabilities.max()
    assert 1 <= kept.sum() < 300
    assert_draws(probabilities * kept / probabilities[kept].sum(), logits, min_p=p, temperature=temperature)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5}, {"min_p": 0.5}, {"top_p": 0.5}])
def test_forbidden_ids_are_never_drawn(settings):
    """Cuts are made among what is left."""
    logits = some_logits(300)
    forbidden = torch.zeros(1, 300, dtype=torch.bool)
    forbidden[0, logits.argsort(descending=True)[:40]] = True
    uniforms = even(500)
    found = draw(logits.expand(500, -1), uniforms, forbidden=forbidden.expand(500, -1), **settings)
    assert not forbidden[0, found].any()
    left = logits.masked_fill(forbidden[0], -torch.inf)
    expected, _ = sample_tokens(left.expand(500, -1), uniforms, vocab_size=300, shard_start=0, group=None, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_mixture(temperature):
    first, second = some_logits(300), some_logits(300, seed=1)
    shares = [0.3, 0.7]
    expected = sum(
        share * (logits[:250].double() / temperature).softmax(dim=0)
        for share, logits in zip(shares, (first, second), strict=True)
    )
    where = {"vocab_size": 250, "shard_start": 0, "group": None}
    found = mixture([first[None], second[None]], shares, temperature=temperature, **where)
    torch.testing.assert_close(found[0, :250].double().exp(), expected, rtol=1e-5, atol=1e-9)
    assert torch.isinf(found[0, 250:]).all()
    log_probs = token_log_probs(first.expand(3, -1), torch.tensor([0, 100, 249]), **where)
    torch.testing.assert_close(log_probs, first[:250].log_softmax(0)[[0, 100, 249]])


def test_top_k_comes_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two kept, the first has 0.57 of the probability.
    assert not draw(logits.expand(100, -1), even(100), top_k=2, top_p=0.5).any()


def test_ties_with_the_last_kept_are_kept():
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0])
    expected = logits.double().masked_fill(logits == 0, float("-inf")).softmax(dim=0)
    assert_draws(expected, logits, top_k=2)
    assert_draws(expected, logits, top_p=0.6)


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert draw(logits, torch.tensor([0.99, 0.99], dtype=torch.float64), temperature=0.0).tolist() == [1, 0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.99}])
def test_padded_ids_are_never_drawn(settings):
    logits = torch.tensor([0.0, 1.0, 0.5, 100.0, 50.0])
    original = logits.clone()
    assert (draw(logits.expand(500, -1), even(500), vocab_size=3, **settings) < 3).all()
    assert torch.equal(logits, original)


@pytest.mark.parametrize("u", [2.0**-53, 1 - 2.0**-53, 1.0, 1.5])
def test_ends_of_the_unit_interval_give_tokens_of_nonzero_probability(u):
    """Also where rounding has carried the number to 1: the search must not walk off the end into zeros."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 1000, generator=generator)
    logits[:, 700:] = float("-inf")
    logits[:, :300] = float("-inf")
    tokens = draw(logits, torch.full((64,), u, dtype=torch.float64))
    assert ((tokens >= 300) & (tokens < 700)).all()
    assert (tokens == (300 if u < 0.5 else 699)).all()


def test_stretches_include_their_beginning():
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert draw(logits, torch.tensor([0.5], dtype=torch.float64)).tolist() == [2]


def test_nan_logits_still_give_a_valid_id():
    """A diverged model must be reported by the trainer, not crash in an embedding look-up."""
    logits = torch.full((2, 10), float("nan"))
    for settings in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}):
        tokens = draw(logits, torch.tensor([0.1, 0.9], dtype=torch.float64), vocab_size=8, **settings)
        assert ((tokens >= 0) & (tokens < 8)).all()


def test_row_does_not_depend_on_its_neighbours():
    logits = torch.stack([some_logits(1000, seed) for seed in range(8)])
    uniforms = even(8)
    for settings in ({}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 0.0}):
        together = draw(logits, uniforms, **settings)
        alone = [draw(logits[i : i + 1], uniforms[i : i + 1], **settings) for i in range(8)]
        assert torch.equal(together, torch.cat(alone))
