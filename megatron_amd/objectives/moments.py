"""Discounts, returns and baselines: how per-state values become the weights of a policy gradient.

Grids are [B, T]: B sequences of this data-parallel rank, T response steps, with a bool mask that is True where a
sequence has a token. Column t-1 holds token y_t and its state s_t.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amd.objectives.vocab_parallel import max_over_group, sum_over_group


def discount_weights(steps: Tensor, gamma: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """w_t = gamma^(t-1) from steps = t-1 (int64, any shape)."""
    return torch.full(steps.shape, gamma, dtype=dtype, device=steps.device) ** steps


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{k>=0} gamma^k r_{t+k} over the tokens that exist; [B, T] -> [B, T]."""
    rewards = rewards.masked_fill(~mask, 0)
    returns = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = rewards[:, t] + gamma * following
        returns[:, t] = following
    return returns


def returns_after(delta: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """D_{t+1} = sum_{k>=0} gamma^k delta_{t+1+k}: what choosing y_t leads to; 0 at a sequence's last token."""
    returns = discounted_returns(delta, mask, gamma)
    return torch.cat([returns[:, 1:], returns.new_zeros(returns.shape[0], 1)], dim=1)[:, : returns.shape[1]]


def leave_one_out_baseline(values: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean, at each step, of the other sequences' values; 0 where no other sequence has that step. [B, T] -> [B, T].

    group: data-parallel ranks whose sequences count as well, each with its own B and T. A mean that included the
    sequence's own value would shrink the gradient by (n-1)/n.
    """
    width = values.shape[1]
    if group is not None and group.size() > 1:
        width = int(max_over_group(torch.tensor([width], device=values.device), group).item())
    sums = values.new_zeros(2, width)
    sums[0, : values.shape[1]] = values.masked_fill(~mask, 0).sum(0)
    sums[1, : values.shape[1]] = mask.sum(0)
    total, count = sum_over_group(sums, group)[:, : values.shape[1]]
    return torch.where(mask & (count > 1), (total - values) / (count - 1).clamp(min=1), 0)


def policy_gradient_scores(
    policy_gradient: str,
    delta: Tensor,
    sampled: Tensor,
    mask: Tensor,
    gamma: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of the two parts of the on-policy AMM gradient at each state, [B, T], before any normalisation.

    The student minimises sum_t weights_t * delta_t(q) + scores_t * ln q(y_t|s_t), with delta's states held fixed:
      rao_blackwell: weights w_t, scores w_t (gamma D_{t+1} - b_t)   exact over the next token, unbiased
      reinforce:     weights 0,   scores w_t (G_t - b_t)             G_t from r_t = E_p f - f(y_t), unbiased
      per_step:      weights w_t, scores 0                           ignores that states depend on the student
    The first two are unbiased for rollouts at temperature 1, untruncated, unmixed and from the current student only.

    delta: E_p f - E_q f. sampled: E_p f - f(y_t), read by `reinforce` alone. group: data-parallel ranks that share the
    leave-one-out baseline b_t. Raises ValueError for another name.
    """
    steps = torch.arange(delta.shape[1], device=delta.device).expand(delta.shape)
    weights = discount_weights(steps, gamma, delta.dtype) * mask
    if policy_gradient == "per_step":
        return weights, torch.zeros_like(weights)
    if policy_gradient == "rao_blackwell":
        returns = gamma * returns_after(delta, mask, gamma)
        return weights, weights * (returns - leave_one_out_baseline(returns, mask, group))
    if policy_gradient == "reinforce":
        returns = discounted_returns(sampled, mask, gamma)
        return torch.zeros_like(weights), weights * (returns - leave_one_out_baseline(returns, mask, group))
    raise ValueError(f"policy_gradient: {policy_gradient!r} is not known")
