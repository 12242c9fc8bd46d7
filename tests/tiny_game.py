"""The players of a tiny run on this rank, ready to move, and their gradients put together from all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amd.batch import Batch, Rollouts
from megatron_amd.checkpoint.hf import export_hf
from megatron_amd.config import Config
from megatron_amd.distributed.layout import Layout
from megatron_amd.models.critic import TrunkCritic
from megatron_amd.models.roles import build_critic, build_model, plan_models
from megatron_amd.training.collect import make_batch
from megatron_amd.training.first_weights import fill_critic
from megatron_amd.training.optimizer import Optimization, build_optimization, wrap_for_training
from megatron_amd.training.players import Players, build_players
from tests.dense_game import Sequences, critic_head


class Game:
    """Teacher, student and critic of `config` with their optimizers.

    Args:
        vocab_size: real token ids.
        random_heads: fill the critic's heads with tests/dense_game.py's; else they start as `config.critic` says.
    """

    def __init__(self, config: Config, layout: Layout, vocab_size: int, *, random_heads: bool = False) -> None:
        self.layout, self.plan = layout, plan_models(config, vocab_size)
        self.players: Players = build_players(config, self.plan, layout)
        student = wrap_for_training(self.players.student, layout, config.training.ddp)
        self.players.student_optimization = build_optimization(student, config.training.optim, layout, 10, "student")
        if config.objective.name == "amm":
            self.enter_critic(config, random_heads=random_heads)

    def enter_critic(self, config: Config, *, random_heads: bool = False) -> None:
        """Bring in a new critic."""
        self.players.config = config
        self.plan = plan_models(config, self.plan.vocab_size)
        critic = build_critic(config, self.plan, self.layout)
        fill_critic(critic, config, self.players.student, self.players.teacher)
        if random_heads and self.layout.is_last_stage:
            _fill_heads(critic, self.layout)
        model = wrap_for_training(critic, self.layout, {**config.training.ddp, "overlap_grad_reduce": False})
        self.players.critic = critic
        self.players.critic_optimization = build_optimization(model, config.critic.optim, self.layout, 10, "critic")

    def batch(self, sequences: dict[bool, Sequences], config: Config | None = None) -> Batch:
        """A batch of this replica's consecutive share of fixed sequences."""
        if config is not None:
            self.players.config = config
        rollouts = {}
        for on_policy, s in sequences.items():
            share = len(s.prompts) // self.layout.dp_size
            rows = slice(share * self.layout.dp_rank, share * (self.layout.dp_rank + 1))
            rollouts[on_policy] = Rollouts.from_lists(s.prompts[rows], s.responses[rows])
        return make_batch(self.players, rollouts, teacher_states=self.players.config.objective.name != "sft")

    def write_student_gradients(self, folder: Path) -> None:
        """The whole student's finished gradient, as a Hugging Face folder in place of weights. Collective."""
        assert self.players.student_optimization is not None
        self._write_gradients(self.players.student_optimization, "student", folder)

    def write_critic_gradients(self, folder: Path) -> dict[str, np.ndarray]:
        """The trunk's as `write_student_gradients`; the heads', on the last stage, are returned by name."""
        optimization, critic = self.players.critic_optimization, self.players.critic
        assert optimization is not None
        assert critic is not None
        if isinstance(critic, TrunkCritic):
            self._write_gradients(optimization, "critic", folder)
        else:
            finish_gradients(optimization)
        heads = {}
        for on_policy in (False, True) if self.layout.is_last_stage else ():
            for source, weight in critic.head_weights(on_policy).items():
                heads[f"{'on' if on_policy else 'off'}.{source}"] = gathered(weight.main_grad, self.layout).numpy()
        return heads

    def _write_gradients(self, optimization: Optimization, role: str, folder: Path) -> None:
        finish_gradients(optimization)
        check_copies(optimization, self.layout)
        architecture = self.plan.student if role == "student" else self.plan.critic_trunk
        assert architecture is not None
        carrier = build_model(role, self.players.config, self.plan, self.layout)
        gradients = {name.removeprefix("module."): p.main_grad for name, p in optimization.model.named_parameters()}
        with torch.no_grad():
            for name, parameter in carrier.named_parameters():
                parameter.copy_(gradients[name])
        export_hf(carrier, folder, architecture, self.layout)


def gathered(shard: Tensor, layout: Layout) -> Tensor:
    """A head's rows on all tensor-parallel ranks, padding included. Collective."""
    shards = [torch.empty_like(shard) for _ in range(layout.tp_size)]
    dist.all_gather(shards, shard.detach().contiguous(), group=layout.groups.tp)
    return torch.cat(shards)


def finish_gradients(optimization: Optimization) -> None:
    """Make every rank's gradient buffers whole where the distributed optimizer left each rank its shard."""
    model = optimization.model
    if not model.ddp_config.use_distributed_optimizer:
        return
    for buffer in model.buffers:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def check_copies(optimization: Optimization, layout: Layout) -> None:
    """Parameters that several ranks hold have the same gradient on each."""
    for name, parameter in optimization.model.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            _check_equal(parameter.main_grad, layout.groups.tp, name)
    model: Any = optimization.model.module
    if layout.pp_size > 1 and model.share_embeddings_and_output_weights and layout.groups.embd.size() > 1:
        _check_equal(model.shared_embedding_or_output_weight().main_grad, layout.groups.embd, "tied embedding")
    for name in ("encoder_bias", "decoder_bias") if hasattr(model, "encoder_bias") else ():
        bias = getattr(model, name)
        of_stages: list[Any] = [None] * layout.pp_size
        dist.all_gather_object(of_stages, None if bias is None else bias.weight.main_grad, group=layout.groups.pp)
        copies = [gradient for gradient in of_stages if gradient is not None]
        assert all(torch.equal(copy, copies[0]) for copy in copies), f"{name} differs between its holders"


def snapshot(optimization: Optimization | None) -> dict[str, Tensor]:
    """Copies of everything that a step may change: parameters, main parameters, Adam's state, rates, the schedule."""
    tensors: dict[str, Tensor] = {}
    if optimization is None:
        return tensors
    for name, parameter in optimization.model.named_parameters():
        tensors[name] = parameter.detach().clone()
    for number, part in enumerate(getattr(optimization.optimizer, "chained_optimizers", [optimization.optimizer])):
        for g, group in enumerate(part.param_groups):
            tensors[f"{number}.{g}.rate"] = torch.tensor([group["lr"], group["weight_decay"]], dtype=torch.float64)
            for p, main in enumerate(group["params"]):
                tensors[f"{number}.{g}.{p}.main"] = main.detach().clone()
                for key, value in part.optimizer.state[main].items() if main in part.optimizer.state else ():
                    tensors[f"{number}.{g}.{p}.{key}"] = torch.as_tensor(value).clone()
    tensors["steps"] = torch.tensor(optimization.scheduler.num_steps)
    return tensors


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same bit for bit."""
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]


@torch.no_grad()
def _fill_heads(critic: Any, layout: Layout) -> None:
    for on_policy in (False, True):
        for source, weight in critic.head_weights(on_policy).items():
            rows, width = weight.shape
            first = layout.tp_rank * rows
            weight.copy_(critic_head(on_policy, source, width)[first : first + rows])


def _check_equal(tensor: Tensor, group: dist.ProcessGroup, name: str) -> None:
    copies = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(copies, tensor.contiguous(), group=group)
    for copy in copies:
        torch.testing.assert_close(copy, copies[0], rtol=1e-4, atol=1e-6, msg=f"{name} differs between its holders")
