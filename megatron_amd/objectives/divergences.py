"""Step-wise distances between teacher p and student q, each as two functions.

For any D(p, q) with a_k = dD/dq_k, the gradient in the student's logits is dD/dz_k = q_k (a_k - sum_j q_j a_j).
A distance is therefore its value and its slope q*a. To add one, write these two functions and enter them in
`DIVERGENCES`; softmax, sharding, chunking and the head's gradient are shared (blocks.py, fused_head.py).

Both functions get p, q, ln p and ln q as [n, R] over the R ids of this vocabulary shard. `value` returns the shard's
part of the sum over the vocabulary, [n]; `slope` returns q*a, [n, R]. Everything is written in log-probabilities
(which are finite), so p or q may underflow to 0 without 0/0 or 0*inf, and every slope is exactly 0 or exactly
cancels where p and q are the same bits. A constant in a drops out of the gradient and is left out of the slope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

VocabularyFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Divergence(NamedTuple):
    """One step-wise distance."""

    name: str
    """Tells the two functions from all others, parameters included: what torch.compile made for one is not used for
    another of a different name."""
    value: VocabularyFunction
    """(p, q, ln p, ln q) -> the shard's part of D, [n], in nats where D has a logarithm."""
    slope: VocabularyFunction
    """(p, q, ln p, ln q) -> q*a, [n, R], a new tensor."""
    slope_sum: float | None = None
    """Sum of q*a over the vocabulary where it is the same for all p and q; None: it must be reduced over shards."""


def kl_value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) = sum p ln(p/q)."""
    return (log_p - log_q).mul_(p).sum(1)


def kl_slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a = -p/q."""
    return -p


def rkl_value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q||p) = sum q ln(q/p)."""
    return (log_q - log_p).mul_(q).sum(1)


def rkl_slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a = ln(q/p) + 1, less the constant."""
    return (log_q - log_p).mul_(q)


def tv_value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """TV = 1/2 sum |p - q|."""
    return 0.5 * (p - q).abs_().sum(1)


def tv_slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a = 1/2 sign(q - p)."""
    return (log_q - log_p).sign_().mul_(q).mul_(0.5)


def gjs(weight: float) -> Divergence:
    """GJS_b = b KL(p||m) + (1-b) KL(q||m) with m = b p + (1-b) q; a = (1-b) ln(q/m). b = 1/2 is JS.

    Args:
        weight: b, in (0, 1); beyond 1e-3 to 1 - 1e-3, fp32 gradients near p = q lose digits.
    """

    def value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        p_to_m, q_to_m = log_ratios_to_mixture(log_p, log_q, weight)
        return weight * p_to_m.mul_(p).sum(1) + (1 - weight) * q_to_m.mul_(q).sum(1)

    def slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        _, q_to_m = log_ratios_to_mixture(log_p, log_q, weight)
        return q_to_m.mul_(q).mul_(1 - weight)

    return Divergence(f"gjs {weight!r}", value, slope)


def skew_kl(skew: float) -> Divergence:
    """KL(p||m) with m = lambda p + (1-lambda) q; a = -(1-lambda) p/m, plus 1-lambda so that it is 0 where p = q.

    Args:
        skew: lambda, in (0, 1).
    """

    def value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        p_to_m, _ = log_ratios_to_mixture(log_p, log_q, skew)
        return p_to_m.mul_(p).sum(1)

    def slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        p_to_m, _ = log_ratios_to_mixture(log_p, log_q, skew)
        return p_to_m.expm1_().mul_(q).mul_(skew - 1)

    return Divergence(f"skew_kl {skew!r}", value, slope)


def skew_rkl(skew: float) -> Divergence:
    """KL(q||m) with m = (1-lambda) p + lambda q; a = ln(q/m) + 1 - lambda q/m, less the constant 1-lambda.

    Args:
        skew: lambda, in (0, 1).
    """

    def value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        _, q_to_m = log_ratios_to_mixture(log_p, log_q, 1 - skew)
        return q_to_m.mul_(q).sum(1)

    def slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        _, q_to_m = log_ratios_to_mixture(log_p, log_q, 1 - skew)
        return q_to_m.sub_(q_to_m.expm1(), alpha=skew).mul_(q)

    return Divergence(f"skew_rkl {skew!r}", value, slope)


def log_ratios_to_mixture(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(ln p/m, ln q/m) for m = share p + (1-share) q, with 0 < share < 1.

    Accurate near p = q and at any size of ln p - ln q: with the larger of p and q taken out of m, what is left is
    1 + (share of the smaller) (e^-|gap| - 1), or, where that is small, (share of the larger) + (of the smaller)
    e^-|gap|.
    """
    gap = log_p - log_q
    minus_gap = gap.abs().neg_()
    if share == 0.5:
        rest = minus_gap.expm1_().mul_(0.5).log1p_()
    else:
        p_is_larger, of_p, of_q = gap >= 0, gap.new_full((), share), gap.new_full((), 1 - share)
        of_smaller = torch.where(p_is_larger, of_q, of_p)
        lacking = of_smaller * minus_gap.expm1()
        remaining = torch.where(p_is_larger, of_p, of_q).add_(minus_gap.exp_().mul_(of_smaller))
        rest = torch.where(lacking > -0.5, lacking.log1p(), remaining.log_())
    return gap.clamp(max=0).sub_(rest), gap.clamp_(min=0).add_(rest).neg_()


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence("kl", kl_value, kl_slope, slope_sum=-1.0),
    "rkl": Divergence("rkl", rkl_value, rkl_slope),
    "js": gjs(0.5),
    "gjs": gjs(0.1),
    "skew_kl": skew_kl(0.1),
    "skew_rkl": skew_rkl(0.1),
    "tv": Divergence("tv", tv_value, tv_slope),
}
"""Name in the config -> the distance, where it has a parameter with that of the config's defaults."""


def divergence(name: str, *, gjs_weight: float, skew: float) -> Divergence:
    """The distance of that name: `gjs` with weight b, `skew_kl` and `skew_rkl` with lambda, the others as they are.

    Raises ValueError for a name that is not in `DIVERGENCES`.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"objective: {name!r} is not known")
    with_parameter = {
        "gjs": lambda: gjs(gjs_weight),
        "skew_kl": lambda: skew_kl(skew),
        "skew_rkl": lambda: skew_rkl(skew),
    }
    return with_parameter[name]() if name in with_parameter else DIVERGENCES[name]
