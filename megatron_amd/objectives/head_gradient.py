"""Gradients of LM heads that are known before backward runs: collected over chunks, and connected to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_amd.objectives.heads import Head
from megatron_amd.objectives.vocab_parallel import Vocabulary, sum_over_group

PRODUCT_ROWS = 2**13
"""Rows of a head's gradient that are multiplied at once where the product needs memory of its own."""


class HeadGradient:
    """Gradient of one head's hidden states and weight, as far as they and the caller's grad mode ask for one.

    A weight with a `main_grad` (Megatron-Core's gradient buffer) of the arithmetic's type collects its gradient there:
    no second buffer of the head's size, and no rounding to the weight's type on the way.
    """

    def __init__(self, head: Head, dtype: torch.dtype):
        self.head = head
        wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in (head.hidden, head.weight)]
        main_grad = getattr(head.weight, "main_grad", None)
        self.in_main_grad = wanted[1] and main_grad is not None and main_grad.dtype == dtype
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype) if wanted[0] else None
        self.weight = None
        if wanted[1]:
            self.weight = main_grad if self.in_main_grad else torch.zeros_like(head.weight, dtype=dtype)

    def add(self, rows: slice, logits_gradient: Tensor, head: Head, scale: float) -> None:
        """Carry scale * [n, R], the gradient of a chunk's logits, back through the head's real rows."""
        logits_gradient = logits_gradient.to(head.weight.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[rows], logits_gradient, head.weight, scale)
        if self.weight is not None:
            for first in range(0, head.weight.shape[0], PRODUCT_ROWS):
                part = slice(first, min(first + PRODUCT_ROWS, head.weight.shape[0]))
                _add_product(self.weight[part], logits_gradient.T[part], head.hidden[rows], scale)

    def reduce(self, vocabulary: Vocabulary) -> None:
        """Sum the hidden states' gradient over the shards: each gave only its own rows' part."""
        if self.hidden is not None:
            sum_over_group(self.hidden, vocabulary.group)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total += scale * left right, the product in its factors' type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def with_gradients(loss: Tensor, gradients: Sequence[HeadGradient]) -> Tensor:
    """Connect a loss to the tensors whose gradients are already known."""
    tensors = [tensor for gradient in gradients for tensor in (gradient.head.hidden, gradient.head.weight)]
    return _KnownGradients.apply(loss, gradients, *tensors)


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients were formed together with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[HeadGradient], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of this loss has been made already: its gradients are handed over")
        gradients, ctx.gradients = ctx.gradients, None
        results: list[Tensor | None] = []
        for gradient in gradients:
            # Scaled in fp32, then rounded to the tensor's type. In place: a head's gradient is large.
            hidden, weight = (
                None if known is None else known.mul_(grad_output).to(tensor.dtype)
                for known, tensor in (
                    (gradient.hidden, gradient.head.hidden),
                    (None if gradient.in_main_grad else gradient.weight, gradient.head.weight),
                )
            )
            if gradient.in_main_grad:
                _check_is_one(grad_output)
                _tell_megatron(gradient.head.weight)
            results += [hidden, weight]
        return None, None, *results


def _check_is_one(grad_output: Tensor) -> None:
    """What is in `main_grad` already can no longer be scaled."""
    if grad_output.device.type == "cuda":
        torch._assert_async(grad_output == 1)  # without waiting for the GPU
    elif grad_output.device.type == "cpu" and grad_output.item() != 1:
        raise RuntimeError(
            "the backward pass of a loss whose gradient is in main_grad already came with a gradient of "
            f"{grad_output.item():g}: scale weights and scores instead of the loss"
        )


def _tell_megatron(weight: Any) -> None:
    """Autograd gets no gradient for a weight whose gradient is in `main_grad` already.

    Megatron-Core's hook runs when autograd is done with the weight. It wants to see some `grad`, and leaves it alone
    where it finds `grad_added_to_main_grad`. One number stands for it: autograd would make a whole tensor of one that
    came by its way. A weight that is also the embedding of this stage (`zero_out_wgrad`) gets its gradient from there,
    which the hook must add. Any other path from the weight to the loss fails in autograd, which cannot add to that one
    number: better than a gradient that is lost.
    """
    if not getattr(weight, "zero_out_wgrad", False):
        weight.grad_added_to_main_grad = True
        weight.grad = weight.new_zeros(()).expand_as(weight)
