"""Start and end of the process group, seeds, and agreement between ranks about errors."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_amd.config import Config
from megatron_amd.distributed.layout import Layout, build_layout, check_world_size
from megatron_amd.errors import InputError, first_line

_PATIENCE = datetime.timedelta(days=365)
"""How long a replica waits for the slowest one's work. A rank that dies ends the wait at once."""


def world_size_from_environment() -> int:
    """Number of processes as torchrun tells it; 1 when run without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: Config) -> Layout:
    """Join the process group (one process without torchrun), make the groups of the layout, set the seeds.

    NCCL where CUDA is present, else gloo. Collective.

    Raises:
        InputError: the layout does not fit the number of ranks, or fewer GPUs than local ranks.
    """
    world_size = world_size_from_environment()
    check_world_size(config.parallel, world_size)
    check_batch_split(config, world_size)
    device = rank_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
    try:
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # timeouts, addresses and ports, variables that are not set
        raise InputError(
            f"parallel: the {world_size} ranks did not find each other ({first_line(error)}); start them with "
            "torchrun, and see that every node reaches the others"
        ) from error
    layout = build_layout(config.parallel, device)
    set_seeds(config.run.seed, layout)
    return layout


def rank_device() -> torch.device:
    """This rank's GPU, made the current one; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:  # a fact that every rank of the node finds, so that none waits for one that has left
        raise InputError(f"parallel: {ranks} ranks on this node, but {gpus} GPU(s); lower --nproc-per-node")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def set_seeds(seed: int, layout: Layout) -> None:
    """Seed torch and Megatron-Core's tracker. Weights and sampling do not depend on these states."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=layout.tp_rank, ep_rank=0, etp_rank=0, force_reset_rng=True)


def check_batch_split(config: Config, world_size: int) -> None:
    """Raise InputError unless the data-parallel ranks can share a global batch evenly, and the held-out prompts."""
    parallel = config.parallel
    data = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    if config.training.global_batch_size % data:
        raise InputError(
            f"training.global_batch_size: {config.training.global_batch_size} prompts cannot be shared by {data} "
            f"data-parallel ranks; use a multiple of {data}"
        )
    if 0 < config.evaluation.prompts < data:
        raise InputError(
            f"evaluation.prompts: {config.evaluation.prompts} cannot be shared by {data} data-parallel ranks; use as "
            "many or more"
        )


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def agreed(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise on every rank what the user must mend on any, so that no rank waits for one that has stopped.

    Wraps work in which one rank may fail alone, such as reading or writing files. Collective on exit.

    Args:
        group: the ranks that must agree; unset: all.

    Raises:
        InputError: the message of the lowest rank that failed, `on_all_ranks`.
    """
    message = None
    try:
        yield
    except InputError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'file system'}: {error.strerror or error}; mend it and start again"
    messages: list[Any] = [message]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        messages = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
    for text in messages:
        if text is not None:
            shared = InputError(text)
            shared.on_all_ranks = True
            raise shared


@contextlib.contextmanager
def apart() -> Iterator[Callable[[], None]]:
    """For replicas that work on their own for as long as it takes them: all leave together, with one outcome.

    Yields a function that raises InputError where another replica has failed; call it between two pieces of work.
    What may fail on one rank of a replica must be `agreed` within it. Collective at the beginning and the end.

    Raises:
        InputError: what a replica failed with, `on_all_ranks`, when all have come to an end.
    """
    everyone = dist.new_group(backend="gloo", timeout=_PATIENCE)
    store = dist.PrefixStore("apart", dist.distributed_c10d._get_default_store())  # there is no public way to it

    def check_others() -> None:
        if store.check(["failure"]):
            raise InputError(store.get("failure").decode())

    with agreed(everyone):
        try:
            yield check_others
        except InputError as error:
            store.set("failure", str(error))
            raise
