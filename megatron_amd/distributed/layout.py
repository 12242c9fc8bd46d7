"""A role's layout: its process groups and this rank's place in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_amd.config import ParallelConfig
from megatron_amd.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Process groups of one role and this rank's place in them.

    A role gets its layout passed and never looks groups up, so that roles may come to have different ones.
    """

    groups: ProcessGroupCollection
    device: torch.device
    sequence_parallel: bool

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this replica's last pipeline stage (same TP rank)."""
        return dist.get_process_group_ranks(self.groups.pp)[-1]


def build_layout(parallel: ParallelConfig, device: torch.device) -> Layout:
    """Make the process groups of `parallel` over all ranks. Collective; `torch.distributed` must be up."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Megatron-Core asserts that these exist, also on stages that have no embedding.
    alone = None
    for name in ("embd", "pos_embd"):
        if getattr(groups, name, None) is None:
            alone = alone or parallel_state.get_context_parallel_group()
            setattr(groups, name, alone)
    return Layout(groups=groups, device=device, sequence_parallel=parallel.sequence_parallel)


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raise InputError unless `world_size` ranks can be split into tensor x pipeline x data."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tensor * pipeline):
        raise InputError(
            f"parallel: {world_size} rank(s) cannot be split into groups of {tensor * pipeline} (tensor {tensor} x "
            f"pipeline {pipeline}); start a multiple of {tensor * pipeline} ranks with torchrun --nproc-per-node, or "
            "change the sizes"
        )
