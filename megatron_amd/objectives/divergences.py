"""Step-wise distances between teacher p and student q, each as two functions.

For any D(p, q) with a_k = dD/dq_k, the gradient in the student's logits is dD/dz_k = q_k (a_k - sum_j q_j a_j).
A distance is therefore its value and its slope q*a. To add one, write these two functions and enter them in
`DIVERGENCES`; softmax, sharding, chunking and the head's gradient are shared (fused_head.py).

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

    value: VocabularyFunction
    """(p, q, ln p, ln q) -> the shard's part of D, [n], in nats where D has a logarithm."""
    slope: VocabularyFunction
    """(p, q, ln p, ln q) -> q*a, [n, R]."""
    slope_sum: float | None = None
    """Sum of q*a over the vocabulary where it is the same for all p and q; None: it must be reduced over shards."""


def kl_value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) = sum p ln(p/q)."""
    return (p * (log_p - log_q)).sum(1)


def kl_slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a = -p/q."""
    return -p


def rkl_value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q||p) = sum q ln(q/p)."""
    return (q * (log_q - log_p)).sum(1)


def rkl_slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a = ln(q/p) + 1, less the constant."""
    return q * (log_q - log_p)


def tv_value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """TV = 1/2 sum |p - q|."""
    return 0.5 * (p - q).abs().sum(1)


def tv_slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a = 1/2 sign(q - p)."""
    return 0.5 * q * (log_q - log_p).sign()


def js_value(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS = 1/2 KL(p||m) + 1/2 KL(q||m) with m = (p+q)/2."""
    gap = log_p - log_q
    return 0.5 * (p * _log_ratio_to_mean(gap) + q * _log_ratio_to_mean(-gap)).sum(1)


def js_slope(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a = 1/2 ln(q/m)."""
    return 0.5 * q * _log_ratio_to_mean(log_q - log_p)


def _log_ratio_to_mean(gap: Tensor) -> Tensor:
    """ln(x/m) from gap = ln x - ln y, where m = (x+y)/2: -ln((1 + e^-gap)/2), accurate near gap = 0 and at any size."""
    return -((-gap).clamp(min=0) + torch.log1p(0.5 * torch.expm1(-gap.abs())))


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(kl_value, kl_slope, slope_sum=-1.0),
    "rkl": Divergence(rkl_value, rkl_slope),
    "js": Divergence(js_value, js_slope),
    "tv": Divergence(tv_value, tv_slope),
}
"""Name in the config -> the distance."""
