"""Passes of micro-batches through a role's pipeline, by Megatron-Core's schedules.

Whatever the layout, a pass is one call here: the schedule moves activations between stages, and only the last
stage sees final hidden states. Losses arrive fully normalised, so gradients are summed and never rescaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_amd.batch import MicroBatch
from megatron_amd.distributed.layout import Layout

LossFunction = Callable[[int, Tensor], tuple[Tensor, Any]]
"""(index of the micro-batch, final hidden states of its response positions [N, H]) -> (loss, anything to keep)."""


def forward_states(model: torch.nn.Module, microbatches: Sequence[MicroBatch], layout: Layout) -> list[Tensor] | None:
    """Final hidden states at the response positions, without gradients.

    Returns:
        On the last stage a tensor [N, H] for each micro-batch (equal on all TP ranks), elsewhere None.
    """

    def keep(index: int, states: Tensor) -> Tensor:
        return states

    with torch.no_grad():
        kept = _run(model, microbatches, layout, keep, forward_only=True)
    return kept if layout.is_last_stage else None


def forward_backward(
    model: DistributedDataParallel, microbatches: Sequence[MicroBatch], layout: Layout, loss_function: LossFunction
) -> list[Any] | None:
    """Accumulate the gradient of the sum of the losses over micro-batches and data-parallel ranks.

    The model's gradient buffers must be zero. On return they hold the finished gradient (each rank its shard with the
    distributed optimizer).

    Returns:
        On the last stage what `loss_function` gave to keep, for each micro-batch; elsewhere None.
    """

    def loss(index: int, states: Tensor) -> tuple[Tensor, Tensor, Any]:
        value, keep = loss_function(index, states)
        return value, torch.zeros([], dtype=torch.int), keep  # a token count, which nothing divides by

    kept = _run(model, microbatches, layout, loss, forward_only=False)
    finalize_model_grads([model], None, pg_collection=layout.groups)
    if layout.pp_size > 1 and hasattr(model.module, "sum_gradients_of_copies"):
        model.module.sum_gradients_of_copies()
    return kept if layout.is_last_stage else None


def backward_without_trunk(
    model: DistributedDataParallel,
    num_microbatches: int,
    layout: Layout,
    loss_function: Callable[[int, None], tuple[Tensor, Any]],
) -> list[Any] | None:
    """`forward_backward` for a model that is only heads, on the last stage: nothing runs before the loss."""
    kept = []
    for index in range(num_microbatches if layout.is_last_stage else 0):
        is_last = index == num_microbatches - 1
        with contextlib.nullcontext() if is_last else model.no_sync():
            loss, keep = loss_function(index, None)
            loss.backward()
        kept.append(keep)
    model.finish_grad_sync()
    return kept if layout.is_last_stage else None


def _run(
    model: torch.nn.Module,
    microbatches: Sequence[MicroBatch],
    layout: Layout,
    function: Callable[[int, Tensor], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    numbered = iter(enumerate(microbatches))

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Callable]:
        index, microbatch = next(iterator)

        def on_last_stage(hidden: Tensor, non_loss_data: bool = False) -> Any:
            if layout.sequence_parallel:  # the head's input gradient is complete on every rank: backward only splits
                hidden = gather_from_sequence_parallel_region(
                    hidden, tensor_parallel_output_grad=False, group=layout.groups.tp
                )
            return function(index, microbatch.select_states(hidden))

        return model(*microbatch.inputs), on_last_stage

    first = microbatches[0].tokens
    communicator = P2PCommunicator(layout.groups.pp, get_model_config(model)) if layout.pp_size > 1 else None
    schedule = get_forward_backward_func(pp_size=layout.pp_size, vp_size=None)
    return schedule(
        forward_step_func=forward_step,
        data_iterator=numbered,
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=first.shape[1],
        micro_batch_size=first.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        p2p_communicator=communicator,
        pg_collection=layout.groups,
    )
