"""Megatron-Core's distributed optimizer for one trained role, and the step that never applies a bad gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_amd.config import OptimConfig
from megatron_amd.distributed.layout import Layout

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_amd.errors import InputError, first_line


@dataclass
class Optimization:
    """A trained model with its gradient buffers, optimizer and learning-rate schedule."""

    model: DistributedDataParallel
    optimizer: Any
    scheduler: OptimizerParamScheduler

    def zero_grad(self) -> None:
        """Empty the gradient buffers before a pass."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> StepResult:
        """Clip and apply the finished gradient, unless it is not finite.

        Collective over the role's ranks, which all come to the same decision: the norm is global.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            return StepResult(applied=False, grad_norm=grad_norm, learning_rate=self.learning_rate)
        self.scheduler.step(1)  # before the update: the first step uses 1/warmup of the rate, not 0
        learning_rate = self.learning_rate
        self.optimizer.step()
        return StepResult(applied=True, grad_norm=grad_norm, learning_rate=learning_rate)

    @property
    def has_parameters(self) -> bool:
        """Whether this rank holds any part of the model."""
        return any(True for _ in self.model.parameters())

    @property
    def learning_rate(self) -> float:
        """Current rate; 0 on a stage where the model has no parameters."""
        groups = self.optimizer.param_groups
        return float(groups[0]["lr"]) if groups else 0.0


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    applied: bool
    """False: the gradient was not finite and nothing changed."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    """Rate the step used."""


_RESERVED_DDP = {
    "overlap_param_gather": "heads are read without a forward pass of their module, which would wait for the gather",
    "average_in_collective": "gradients are sums; the losses carry their normalisation",
    "use_megatron_fsdp": "it is not supported",
}
_RESERVED_OPTIMIZER = {
    "optimizer": "only adam is supported",
    "lr": "use learning_rate",
    "min_lr": "use min_learning_rate",
    "fp16": "use training.precision",
    "bf16": "use training.precision",
    "params_dtype": "use training.precision",
    "loss_scale": "losses are not scaled",
    "use_distributed_optimizer": "use training.ddp",
    "overlap_param_gather": "see training.ddp.overlap_param_gather",
}
"""Fields that the gradient's normalisation or other settings decide, and why."""


def wrap_for_training(model: MegatronModule, layout: Layout, extra: dict[str, Any]) -> DistributedDataParallel:
    """Give a model Megatron-Core's gradient buffers: fp32, summed over DP, each rank keeping its shard.

    Raises:
        InputError: as `ddp_config`.
    """
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=ddp_config(extra),
        module=model,
        pg_collection=layout.groups,
    )
    model.config.no_sync_func = wrapped.no_sync  # schedules reduce gradients once, after the last micro-batch
    return wrapped


def build_optimization(
    model: DistributedDataParallel, optim: OptimConfig, layout: Layout, total_steps: int, where: str
) -> Optimization:
    """AdamW with fp32 main weights over `model`'s current weights, and its schedule over `total_steps`.

    Raises:
        InputError: as `optimizer_config`.
    """
    optimizer = get_megatron_optimizer(
        optimizer_config(
            optim,
            where,
            bf16=model.config.bf16,
            params_dtype=torch.bfloat16 if model.config.bf16 else torch.float32,
            use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        ),
        [model],
        use_gloo_process_groups=False,
        pg_collection=layout.groups,
    )
    decay_steps = optim.decay_steps or total_steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.learning_rate,
        min_lr=optim.min_learning_rate,
        lr_warmup_steps=min(optim.warmup_steps, decay_steps),
        lr_decay_steps=decay_steps + 1,  # the end of the decay falls after the last step, which still moves
        lr_decay_style=optim.decay,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
    )
    return Optimization(model=model, optimizer=optimizer, scheduler=scheduler)


def ddp_config(extra: dict[str, Any]) -> DistributedDataParallelConfig:
    """Megatron-Core's settings of the gradient buffers.

    Raises:
        InputError: `extra` (training.ddp) names a field that does not exist, or Megatron-Core refuses it.
    """
    _check_reserved([name for name, value in extra.items() if value], _RESERVED_DDP, "training.ddp")
    settings = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, **extra}
    return _build(DistributedDataParallelConfig, settings, "training.ddp")


def optimizer_config(optim: OptimConfig, where: str, **model_settings: Any) -> OptimizerConfig:
    """Megatron-Core's settings of one role's optimizer.

    Raises:
        InputError: `optim.optimizer` names a field that does not exist, or Megatron-Core refuses it.
    """
    _check_reserved(optim.optimizer, _RESERVED_OPTIMIZER, f"{where}.optimizer")
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "lr": optim.learning_rate,
        "min_lr": optim.min_learning_rate,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.adam_betas[0],
        "adam_beta2": optim.adam_betas[1],
        "adam_eps": optim.adam_eps,
        "clip_grad": optim.clip_grad,
    }
    return _build(OptimizerConfig, {**settings, **model_settings, **optim.optimizer}, f"{where}.optimizer")


def _check_reserved(names: Iterable[str], reserved: dict[str, str], where: str) -> None:
    for name in names:
        if name in reserved:
            raise InputError(f"{where}.{name}: cannot be set here: {reserved[name]}; leave it out")


def _build(cls: Any, settings: dict[str, Any], where: str) -> Any:
    for name in settings:
        if name not in cls.__dataclass_fields__:
            raise InputError(f"{where}.{name}: Megatron-Core's {cls.__name__} has no such field")
    try:
        return cls(**settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"{where}: Megatron-Core refuses these settings: {first_line(error)}") from error
