"""Check on your own model that a teacher equal to the student teaches nothing it should not.

    python tools/check_equal_models.py --config run.yaml                    # the run's student in both parts
    python tools/check_equal_models.py --config run.yaml --role teacher     # the run's teacher in both parts
    torchrun --nproc-per-node 2 tools/check_equal_models.py --model FOLDER parallel.tensor_model_parallel_size=2

The same weights play teacher p and student q, both answer a few prompts, and these must hold, up to rounding:

  every distance between them is 0, and so is its gradient in the student;
  d_MM is 0 for every critic, and so is the critic's gradient;
  the student's gradient is 0 under a critic that is constant over the vocabulary: heads started at zero, or the
  log-ratio prior alone;
  under a random critic it is -w q (f - E_q f) at the logits. That is not 0: a critic that has learned nothing pushes
  the student away from the teacher. Written out over the whole vocabulary and carried back by autograd it is
  compared with the trainer's over all parameters. The policy gradient's D_{t+1} must add nothing to it.

Gradients are given relative to ones that do not vanish on the same sequences: the student's to that of sft, the
critic's to that of the sampled estimator. Layout, precision, critic and data come from the config; nothing is written.
With --model alone: fp32, a `pair` critic, prompts of its own. Exit status: 0, 1 if a check failed, or 2 with one line
about what is wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_amd.batch import Batch, Prompts
from megatron_amd.config import (
    Config,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    WarmupConfig,
    load_config,
)
from megatron_amd.data import Tokenizer, first_prompts, load_rows, load_tokenizer
from megatron_amd.data.templates import make_template
from megatron_amd.distributed.initialize import agreed, initialize, shutdown, world_size_from_environment
from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.quiet import silence_known_warnings
from megatron_amd.distributed.schedule import forward_backward
from megatron_amd.errors import InputError
from megatron_amd.models.roles import ModelPlan, plan_models
from megatron_amd.training.collect import OFF, ON, make_batch, off_policy_responses, student_responses, ways_of_working
from megatron_amd.training.optimizer import Optimization, build_optimization, wrap_for_training
from megatron_amd.training.players import Players, build_players, enter_critic
from megatron_amd.training.steps import critic_step, measure, student_step

# isort: split
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

BETA = 0.5
RESPONSE_TOKENS = 32
PROMPT_TOKENS = 64
TEXTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three animals that live in a forest.",
    "How many minutes are there in two hours?",
)
DISTANCES = {"kl": "KL(p||q)", "rkl": "KL(q||p)", "js": "JS", "tv": "TV"}
CRITICS: dict[str, dict[str, Any]] = {
    "zero heads": {"head_init": "zero", "prior": "none"},
    "prior alone": {"head_init": "zero", "prior": "log_ratio"},
    "random critic": {"head_init": "random", "prior": "none"},
}
ALLOWED_VALUE = {"fp32": 1e-6, "bf16": 1e-4, "fp8": 1e-4}
ALLOWED_GRADIENT = {"fp32": 1e-4, "bf16": 3e-2, "fp8": 1e-1}
"""By precision: rounding of hidden states' gradients reaches every parameter."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    measured: float
    allowed: float

    @property
    def passed(self) -> bool:
        return abs(self.measured) <= self.allowed  # not for NaN

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        return f"{self.what:<58} {self.measured:>10.1e} {self.allowed:>10.0e}  {verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    silence_known_warnings()
    try:
        options = _parse(arguments)
        config, tokenizer_source = settings(options)
        try:
            return run(config, tokenizer_source, options.prompts)
        finally:
            shutdown()
    except InputError as error:
        if os.environ.get("RANK" if error.on_all_ranks else "LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
        return 2


def settings(options: argparse.Namespace) -> tuple[Config, str]:
    """The config of a game between equal models in which nothing moves, and where the tokenizer is.

    Raises:
        InputError: neither a config nor a model is given, or the config is wrong.
    """
    if options.config is None and options.model is None:
        raise InputError("command line: give --config run.yaml or --model FOLDER; --help shows examples")
    defaults = [] if options.config else ["training.precision=fp32", f"data.max_prompt_length={PROMPT_TOKENS}"]
    config = load_config(options.config, [*defaults, *options.overrides])
    model = ModelConfig(path=options.model) if options.model else getattr(config, options.role)
    source = config.data.tokenizer or (None if options.model else config.teacher.path) or model.path
    if source is None:
        raise InputError("data.tokenizer: give a folder, hub name or .model file, since the model has no path")
    still = OptimConfig(learning_rate=0.0, weight_decay=0.0, clip_grad=0.0)
    checked = replace(
        config,
        teacher=model,
        student=model,
        critic=replace(config.critic, optim=still),
        objective=replace(
            config.objective, name="amm", beta=BETA, estimator="full_vocabulary", normalization="per_token"
        ),
        warmup=WarmupConfig(),
        evaluation=EvaluationConfig(),
        rollout=RolloutConfig(  # the models' own samples, however the run draws
            max_response_length=min(config.rollout.max_response_length, RESPONSE_TOKENS),
            **ways_of_working(config.rollout),
        ),
        training=replace(config.training, optim=still, global_batch_size=world_size_from_environment()),
    )
    return checked, source


def run(config: Config, tokenizer_source: str, num_prompts: int) -> int:
    """Set up, check, print the table. Collective. Returns the exit status; raises InputError."""
    layout = initialize(config)
    with agreed():
        tokenizer = load_tokenizer(tokenizer_source)
        plan = plan_models(config, tokenizer.vocab_size)
        prompts = read_prompts(config, tokenizer, layout, num_prompts, end_prompts=plan.student.has_encoder)
    players = build_equal_players(config, plan, layout)
    rollouts = {
        OFF: off_policy_responses(players, prompts, tokenizer.eos_ids),
        ON: student_responses(players, prompts, tokenizer.eos_ids),
    }
    batch = make_batch(players, rollouts)
    say = print if dist.get_rank() == 0 else _keep_quiet
    model = config.student.path or "the model"
    say(
        f"{model} as teacher and student: TP {layout.tp_size} x PP {layout.pp_size} x DP {layout.dp_size}, "
        f"{config.training.precision}, critic {config.critic.features}"
    )
    say(f"{'':<58} {'measured':>10} {'allowed':>10}")
    failed = count = 0
    for check in checks(players, plan, batch):
        say(check, flush=True)
        count += 1
        failed += not check.passed
    say(f"{failed} of {count} checks failed" if failed else f"all {count} checks passed")
    return 1 if failed else 0


def read_prompts(config: Config, tokenizer: Tokenizer, layout: Layout, count: int, *, end_prompts: bool) -> Prompts:
    """This replica's share of the data's first prompts, or of `TEXTS` where there is no data. Raises InputError."""
    if config.data.train is not None:
        rows = load_rows(config.data, "train", tokenizer, responses=False, count=count, end_prompts=end_prompts)
        count = min(count, len(rows))
    if count < layout.dp_size:
        raise InputError(f"--prompts: {count} cannot be shared by {layout.dp_size} data-parallel ranks; use more")
    if config.data.train is not None:
        return first_prompts(rows, count, dp_rank=layout.dp_rank, dp_size=layout.dp_size)
    template = make_template(config.data, tokenizer)
    mine = range(count * layout.dp_rank // layout.dp_size, count * (layout.dp_rank + 1) // layout.dp_size)
    end = [tokenizer.eos_id] if end_prompts else []
    return Prompts(
        ids=tuple(mine),
        visits=(0,) * len(mine),
        tokens=tuple((*template.encode(TEXTS[index % len(TEXTS)]), *end) for index in mine),
    )


def build_equal_players(config: Config, plan: ModelPlan, layout: Layout) -> Players:
    """Teacher and student with the same weights, the student ready for training."""
    players = build_players(config, plan, layout)
    with torch.no_grad():  # two models without a folder start from different random weights
        for mine, other in zip(players.teacher.parameters(), players.student.parameters(), strict=True):
            mine.copy_(other)
    model = wrap_for_training(players.student, layout, config.training.ddp)
    players.student_optimization = build_optimization(model, config.training.optim, layout, 1, "training.optim")
    return players


def checks(players: Players, plan: ModelPlan, batch: Batch) -> Iterator[Check]:
    """Everything that must hold, in the order of the table. Collective."""
    config = players.config
    value, gradient = ALLOWED_VALUE[config.training.precision], ALLOWED_GRADIENT[config.training.precision]
    sft = student_gradient(players, batch, "sft")
    distances = measure(players, batch)
    for state, label in (("off", "teacher states"), ("on", "student states")):
        for name, symbol in DISTANCES.items():
            yield Check(f"{label}: {symbol}", distances[f"distance/{name}_{state}"], value)
    for name, symbol in DISTANCES.items():
        yield Check(f"student's gradient of {symbol}", student_gradient(players, batch, name) / sft, gradient)
    for label, start in CRITICS.items():
        set_objective(players, policy_gradient="per_step", estimator="sampled")
        players.config = replace(players.config, critic=replace(players.config.critic, **start))
        enter_critic(players, plan, total_steps=1)
        sampled = critic_step(players, batch)[0].grad_norm
        set_objective(players, policy_gradient="per_step", estimator="full_vocabulary")
        step, _, moments = critic_step(players, batch)
        for state in ("off", "on"):
            d_mm = moments[f"amm/d_mm_{state}"] / (2 * config.critic.bound)
            yield Check(f"{label}: d_MM {state}, of the largest possible", d_mm, value)
        yield Check(f"{label}: critic's gradient", step.grad_norm / sampled, gradient)
        if label != "random critic":
            moved = student_gradient(players, batch, "amm") / sft
            yield Check(f"{label}: student's gradient", moved, gradient)
    literal, norm = literal_gradient(players, batch)
    for policy in ("per_step", "rao_blackwell"):
        set_objective(players, policy_gradient=policy)
        student_gradient(players, batch, "amm")
        away = distance_from(players, literal) / norm if norm > 0 else math.nan
        yield Check(f"random critic: student ({policy}) is -w q (f - E_q f)", away, gradient)


def student_gradient(players: Players, batch: Batch, name: str) -> float:
    """Norm of the student's gradient of an objective, which stays in the buffers: its step has length 0."""
    return student_step(players, batch, name)[0].grad_norm


def set_objective(players: Players, **changes: Any) -> None:
    """Play on with other settings of the objective."""
    players.config = replace(players.config, objective=replace(players.config.objective, **changes))


def literal_gradient(players: Players, batch: Batch) -> tuple[list[Tensor], float]:
    """The student's gradient from -w q (f - E_q f) at the logits: copies of the buffers, and its norm.

    Dense over the whole vocabulary, and apart from the trainer's objectives.
    """
    layout, vocab_size = players.layout, players.vocabulary.size
    own_states = players.critic_states(batch)

    def whole(logits: Tensor) -> Tensor:
        """This rank's columns [N, V_local] -> all real ones [N, V]."""
        shards = [torch.empty_like(logits) for _ in range(layout.tp_size)]
        dist.all_gather(shards, logits.detach().contiguous(), group=layout.groups.tp)
        return torch.cat(shards, dim=1)[:, :vocab_size]

    def loss_function(index: int, states: Tensor) -> tuple[Tensor, None]:
        head = players.student.head_weight()
        hidden = copy_to_tensor_model_parallel_region(states, layout.groups.tp)
        logits = (hidden @ head.t()).float()  # the product in the model's own type, as the trainer takes it
        q = whole(logits).softmax(1)
        critic = players.critic_head(batch, index, own_states[index] if own_states else None)
        parts = [sign * whole((read @ weight.t()).float()) for read, weight, sign in critic.terms]
        raw = torch.stack(parts).sum(0)
        if critic.center:
            raw = raw - (q * raw).sum(1, keepdim=True)
        f = critic.bound * torch.tanh(raw) if critic.squash == "tanh" else raw
        w = batch.weights[index] * batch.coefficient(index)
        slope = -w[:, None] * q * (f - (q * f).sum(1, keepdim=True))
        rows = head.shape[0]
        mine = F.pad(slope, (0, rows * layout.tp_size - vocab_size))[:, layout.tp_rank * rows :][:, :rows]
        return (logits * mine).sum(), None

    optimization = _trained_student(players)
    optimization.zero_grad()
    forward_backward(optimization.model, batch.microbatches, layout, loss_function)
    norm = _gradient_norm(optimization)
    return [buffer.grad_data.clone() for buffer in optimization.model.buffers], norm


def distance_from(players: Players, other: list[Tensor]) -> float:
    """Norm of the difference between the student's gradient buffers, which it replaces, and copies of earlier ones."""
    optimization = _trained_student(players)
    for buffer, earlier in zip(optimization.model.buffers, other, strict=True):
        buffer.grad_data.sub_(earlier)
    return _gradient_norm(optimization)


def _gradient_norm(optimization: Optimization) -> float:
    optimization.optimizer.prepare_grads()
    return float(optimization.optimizer.get_grad_norm())


def _trained_student(players: Players) -> Optimization:
    assert players.student_optimization is not None
    return players.student_optimization


def _keep_quiet(*_: object, **__: object) -> None:
    """What the other ranks say."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; --help shows what there is")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="the run's settings (YAML)")
    parser.add_argument("--model", help="folder or hub name of the model to check, in place of the run's")
    parser.add_argument("--role", choices=("student", "teacher"), default="student", help="whose model of the run")
    parser.add_argument("--prompts", type=int, default=4, help="prompts over all data-parallel ranks (default: 4)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
