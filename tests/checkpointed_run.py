"""A student and a critic in training, small, for tests of checkpoints."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amd.batch import MicroBatch, Rollouts, make_encoder_decoder_microbatches, make_microbatches
from megatron_amd.checkpoint import store
from megatron_amd.config import Config, CriticConfig, ModelConfig, OptimConfig, ParallelConfig, TrainingConfig
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import Layout, build_layout
from megatron_amd.distributed.schedule import backward_without_trunk, forward_backward
from megatron_amd.models.critic import HeadCritic
from megatron_amd.models.roles import build_critic, build_model, plan_models
from megatron_amd.models.t5 import EncoderDecoderLM
from megatron_amd.training.optimizer import Optimization, build_optimization, wrap_for_training

# isort: split
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


T5 = {
    "model_type": "t5", "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2,
    "num_decoder_layers": 1, "num_heads": 4,
}  # fmt: skip


def make_config(
    *,
    family: str = "llama",
    tied: bool = True,
    precision: Any = "fp32",
    features: Any = "pair",
    hidden_size: int = 32,
    tensor: int = 1,
    pipeline: int = 1,
) -> Config:
    """The settings of a run whose student and critic train, with learning rates that change from step to step."""
    sizes = {**T5, "d_model": hidden_size} if family == "t5" else {**LLAMA, "hidden_size": hidden_size}
    model = ModelConfig(architecture={**sizes, "tie_word_embeddings": tied})
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=2, decay="cosine")
    return Config(
        student=model,
        teacher=model,
        critic=CriticConfig(features=features, optim=optim),
        training=TrainingConfig(precision=precision, optim=optim, micro_batch_size=2),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
    )


class TinyRun:
    """Student and critic with made-up losses on random tokens and states drawn from torch's global generator."""

    def __init__(self, config: Config, layout: Layout | None = None, *, critic: bool = True) -> None:
        self.config = config
        self.layout = layout or build_layout(config.parallel, torch.device("cpu"))
        set_seeds(config.run.seed, self.layout)
        self.plan = plan_models(config, None)
        student = build_model("student", config, self.plan, self.layout)
        fill(student, self.layout)
        self.student = self._optimize(student)
        self.critic: Optimization | None = None
        if critic:
            model = build_critic(config, self.plan, self.layout)
            fill(model, self.layout)
            self.critic = self._optimize(model)

    def _optimize(self, model: Any) -> Optimization:
        wrapped = wrap_for_training(model, self.layout, {})
        return build_optimization(wrapped, self.config.training.optim, self.layout, 20, "training.optim")

    def train(self, steps: int) -> list[tuple[float, float, float]]:
        """(loss, gradient norm, learning rate) of each role's steps on this rank."""
        return [record for _ in range(steps) for record in self._step()]

    def _step(self) -> list[tuple[float, float, float]]:
        tokens = torch.randint(0, 300, (4, 6))
        states = torch.randn(4, 32).to(next(self.student.model.parameters()).dtype)
        rollouts = Rollouts(tokens, torch.tensor([2, 1, 3, 2]), torch.tensor([6, 5, 6, 4]))
        student = self.student.model.module
        if isinstance(student, EncoderDecoderLM):
            batches = make_encoder_decoder_microbatches(
                rollouts, on_policy=False, size=2, prompt_width=3, response_width=5, start_id=student.decoder_start_id
            )
        else:
            batches = make_microbatches(rollouts, on_policy=False, size=2, width=6)
        records = [self._move(self.student, batches, lambda hidden: self._loss(hidden, [student.head_weight()]))]
        if self.critic is not None:
            critic = self.critic.model.module

            def critic_loss(hidden: Tensor | None) -> Tensor:
                weights = [weight for on in (False, True) for weight in critic.head_weights(on).values()]
                return self._loss(states if hidden is None else hidden, weights)

            records.append(self._move(self.critic, batches, critic_loss))
        return records

    def _move(self, role: Optimization, batches: list[MicroBatch], loss: Any) -> tuple[float, float, float]:
        def function(index: int, hidden: Any) -> tuple[Tensor, Tensor]:
            value = loss(hidden)
            return value, value.detach()

        role.zero_grad()
        if isinstance(role.model.module, HeadCritic):
            kept = backward_without_trunk(role.model, len(batches), self.layout, function)
        else:
            kept = forward_backward(role.model, batches, self.layout, function)
        step = role.step()
        assert step.applied
        learning_rate = step.learning_rate if role.has_parameters else 0.0  # else nobody's
        return float(sum(kept or [torch.zeros(())])), step.grad_norm, learning_rate

    def _loss(self, states: Tensor, weights: list[Tensor]) -> Tensor:
        """Some loss whose gradient reaches states and heads."""
        states = copy_to_tensor_model_parallel_region(states, self.layout.groups.tp).float()
        return torch.stack([((states @ w.float().t()).tanh() - 0.3).square().mean() for w in weights]).sum()

    def roles(self) -> dict[str, store.RoleState | None]:
        roles = {"student": store.RoleState.of(self.student, self.layout)}
        if self.critic is not None:
            roles["critic"] = store.RoleState.of(self.critic if self.critic.has_parameters else None, self.layout)
        return roles

    def fingerprint(self) -> dict[str, Any]:
        return {"student": self.plan.student.sizes(), "precision": self.config.training.precision}

    def save(self, directory: Path, step: int, *, keep: int = 2) -> Path:
        return store.save(
            directory,
            step=step,
            roles=self.roles(),
            state={"progress": {"iteration": step, "rate": 0.1}},
            fingerprint=self.fingerprint(),
            rank_state={"rng": torch.get_rng_state(), "rank": dist.get_rank()},
            keep=keep,
        )

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        state, rank_state = store.load(path, self.roles(), fingerprint=self.fingerprint())
        torch.set_rng_state(rank_state["rng"])
        return state, rank_state

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that a step changes on this rank: parameters, fp32 main parameters, moments, steps, rates."""
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        for name, role in (("student", self.student), ("critic", self.critic)):
            if role is None or not role.has_parameters:
                continue
            for key, parameter in role.model.named_parameters():
                tensors[f"{name}.{key}"] = parameter.detach().clone()
            for part in role.optimizer.chained_optimizers:
                for g, group in enumerate(part.optimizer.param_groups):
                    tensors[f"{name}.rate.{g}"] = torch.tensor(
                        [group["lr"], group["weight_decay"]], dtype=torch.float64
                    )
                    for p, main in enumerate(group["params"]):
                        tensors[f"{name}.main.{g}.{p}"] = main.detach().clone()
                        for key, value in part.optimizer.state[main].items():
                            tensors[f"{name}.{key}.{g}.{p}"] = torch.as_tensor(value).clone()
            tensors[f"{name}.scheduled"] = torch.tensor(role.scheduler.num_steps)
        return tensors


@torch.no_grad()
def fill(model: torch.nn.Module, layout: Layout) -> None:
    """Random weights: equal on all ranks for what they share, different for what they hold shards of."""
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight" and getattr(model, "share_embeddings_and_output_weights", False):
            name = "embedding.word_embeddings.weight"
        seed = f"{name}.{layout.tp_rank if parameter.dim() > 1 else 0}".encode()
        generator = torch.Generator().manual_seed(zlib.crc32(seed))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.dim() == 1))


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    return sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or not torch.equal(a[key], b[key]))
