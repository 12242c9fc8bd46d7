"""Time and peak memory of LM head and objective, forward and backward: dense torch, TRL's chunked loss, and ours.

    make bench-fused-head
    python benchmarks/fused_head.py --sizes small --repeats 5 --device cuda

Inputs: random hidden states and heads of the sizes of Qwen2.5-0.5B-like (V 151,936, H 1024) and SmolLM2-135M (V 49,152,
H 576) models; student, teacher and critic of one width; fp32 on a CPU, bf16 on a GPU.

Times are medians over rounds in which every implementation runs once, in one process. `products` is the bound: the
four matrix products that a distance cannot do without (two heads, two gradients), at the best chunk size. Memory is
measured in a fresh process for each line: the peak beyond inputs and the gradients that a step leaves behind.

The last line of output is one JSON object with the ratios.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_amd.objectives.fused_head import critic_loss, student_loss
from megatron_amd.objectives.heads import CriticHead, Head, HeadOptions
from megatron_amd.objectives.vocab_parallel import Vocabulary

SIZES = {"large": (151_936, 1024), "small": (49_152, 576)}
"""(V, H)."""
LONG = 4096
"""Tokens of the run that shows that memory does not grow."""
CHUNKS_OF_PRODUCTS = (64, 128, 256, 512, 1024)
TASKS = ("kl", "js", "amm student", "amm critic")


class Case(NamedTuple):
    """One line of the table."""

    size: str
    tokens: int
    task: str
    implementation: str


class Inputs:
    """Random heads on one batch of tokens, and `main_grad` buffers as Megatron-Core gives them."""

    def __init__(self, size: str, tokens: int, device: str):
        vocabulary, width = SIZES[size]
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

        self.hidden = {role: normal(tokens, width) for role in ("student", "teacher")}
        # Logits have a standard deviation of 2.
        self.weight = {
            role: normal(vocabulary, width, scale=2 * width**-0.5) for role in ("student", "teacher", "critic")
        }
        self.hidden["critic"] = self.hidden["teacher"]
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        self.weights = torch.full((tokens,), 1 / tokens, device=device)
        self.vocabulary = Vocabulary(vocabulary)

    def trained(self, task: str) -> list[Tensor]:
        """Leaves that get gradients."""
        if task == "amm critic":
            return [self.weight["critic"]]
        return [self.hidden["student"], self.weight["student"]]


def dense(inputs: Inputs, task: str) -> None:
    """As one writes it in plain torch."""
    logits = {role: (inputs.hidden[role] @ inputs.weight[role].T).float() for role in ("student", "teacher")}
    log_q, log_p = logits["student"].log_softmax(-1), logits["teacher"].log_softmax(-1)
    if task == "kl":
        value = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    elif task == "js":
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        to_m = [torch.nn.functional.kl_div(log_m, log_x, log_target=True, reduction="none") for log_x in (log_p, log_q)]
        value = 0.5 * (to_m[0] + to_m[1]).sum(-1)
    else:
        p, q = log_p.exp(), log_q.exp()
        raw = (inputs.hidden["critic"] @ inputs.weight["critic"].T).float() + (log_p - log_q).detach()
        raw = raw - (0.5 * (p + q).detach() * raw).sum(-1, keepdim=True)
        f = torch.tanh(raw)
        value = ((p - q) * f.detach()).sum(-1) if task == "amm student" else -((p - q) * f).sum(-1)
    (inputs.weights * value).sum().backward()


def trl(inputs: Inputs, task: str) -> None:
    """TRL's DistillationTrainer: forward KL or JSD over hidden states."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        inputs.hidden["student"][None],
        inputs.hidden["teacher"][None],
        inputs.weight["student"],
        inputs.weight["teacher"],
        torch.ones(1, len(inputs.targets), device=inputs.targets.device),
        beta={"kl": 0.0, "js": 0.5}[task],
    )
    loss.backward()


def liger(inputs: Inputs, task: str) -> None:
    """Liger's fused linear JSD (GPU alone)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta={"kl": 0.0, "js": 0.5}[task])
    loss(
        inputs.hidden["student"],
        inputs.weight["student"],
        inputs.hidden["teacher"],
        inputs.weight["teacher"],
        inputs.targets,
    ).backward()


def ours(inputs: Inputs, task: str) -> None:
    """The fused head, with no chunk size given."""
    student, teacher = (Head(inputs.hidden[role], inputs.weight[role]) for role in ("student", "teacher"))
    critic = CriticHead(((inputs.hidden["critic"], inputs.weight["critic"], 1.0),), prior="log_ratio")
    common: dict[str, Any] = {
        "targets": inputs.targets,
        "weights": inputs.weights,
        "vocabulary": inputs.vocabulary,
        "options": HeadOptions(),
    }
    if task == "amm critic":
        loss, _ = critic_loss(student, teacher, critic, on_policy=False, estimator="full_vocabulary", **common)
    else:
        loss, _ = student_loss(student, teacher, critic, objective=task.removesuffix(" student"), **common)
    loss.backward()


def products(inputs: Inputs, chunk: int, gradients: tuple[Tensor, Tensor]) -> None:
    """The unavoidable matrix products: logits of both models, gradients of hidden states and head."""
    hidden, weight = inputs.hidden["student"].detach(), inputs.weight["student"].detach()
    count, (of_hidden, of_weight) = len(hidden), gradients
    z = torch.empty(min(chunk, count), len(weight), device=hidden.device, dtype=hidden.dtype)
    for first in range(0, count, chunk):
        rows = slice(first, min(first + chunk, count))
        out = z[: rows.stop - rows.start]
        torch.mm(inputs.hidden["teacher"][rows], inputs.weight["teacher"].T, out=out)
        torch.mm(hidden[rows], weight.T, out=out)
        torch.mm(out, weight, out=of_hidden[rows])
        of_weight.addmm_(out.T, hidden[rows])


IMPLEMENTATIONS: dict[str, Callable[[Inputs, str], None]] = {"dense": dense, "TRL": trl, "Liger": liger, "ours": ours}


def implementations(task: str, device: str) -> list[str]:
    """What a task is compared with."""
    if task.startswith("amm"):
        return ["dense", "ours"]
    return ["dense", "TRL", *(["Liger"] if device == "cuda" else []), "ours"]


def prepare(inputs: Inputs, task: str, implementation: str) -> None:
    """Leaves ask for gradients, which are empty: `main_grad` for ours, `grad` for the others."""
    for role in inputs.weight:
        inputs.weight[role] = inputs.weight[role].detach()
    inputs.hidden = {role: hidden.detach() for role, hidden in inputs.hidden.items()}
    for leaf in inputs.trained(task):
        leaf.requires_grad_()
        if implementation == "ours" and leaf.shape[0] == inputs.vocabulary.size:
            leaf.main_grad = torch.zeros_like(leaf, dtype=torch.float32)  # type: ignore[attr-defined]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], None], device: str) -> float:
    """Of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def time_task(size: str, task: str, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of every implementation at 1,024 tokens, and of `products` for a distance."""
    inputs = Inputs(size, 1024, device)
    names = implementations(task, device)
    found: dict[str, list[float]] = {name: [] for name in names}
    chunks = CHUNKS_OF_PRODUCTS if task == "kl" else ()
    of_products: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for turn in range(repeats + 1):
        for name in names:
            prepare(inputs, task, name)
            found[name].append(seconds(functools.partial(IMPLEMENTATIONS[name], inputs, task), device))
        prepare(inputs, task, "dense")
        for chunk in chunks:
            gradients = tuple(torch.zeros_like(leaf) for leaf in inputs.trained("kl"))
            call = functools.partial(products, inputs, chunk, gradients)  # type: ignore[arg-type]
            of_products[chunk].append(seconds(call, device))
        if turn == 0:  # warms up
            for times in (*found.values(), *of_products.values()):
                times.clear()
    result = {name: statistics.median(times) for name, times in found.items()}
    if chunks:
        result["products"] = min(statistics.median(times) for times in of_products.values())
    return result


def peak_extra_mib(case: Case, device: str) -> float:
    """Peak memory of a first call, beyond what was there before and the gradients it leaves, in MiB."""
    inputs = Inputs(case.size, case.tokens, device)
    prepare(inputs, case.task, case.implementation)
    IMPLEMENTATIONS[case.implementation](small_inputs(device), case.task)  # libraries take their own memory first
    left = sum(leaf.nbytes for leaf in inputs.trained(case.task) if not hasattr(leaf, "main_grad"))
    before = reset_peak(device)
    IMPLEMENTATIONS[case.implementation](inputs, case.task)
    synchronize(device)
    return (peak(device) - before - left) / 2**20


def small_inputs(device: str) -> Inputs:
    inputs = Inputs("small", 8, device)
    for leaf in (*inputs.weight.values(), *inputs.hidden.values()):
        leaf.requires_grad_()
    return inputs


def reset_peak(device: str) -> int:
    """Start measuring; bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    """Most bytes in use since `reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "trl")}
    print(f"{versions}, {options.device}, {torch.get_num_threads()} threads, {options.repeats} rounds")
    ratios: dict[str, float] = {}
    for size in options.sizes:
        vocabulary, width = SIZES[size]
        for task in TASKS:
            names = implementations(task, options.device)
            times = in_fresh_process(time_task, size, task, options.repeats, options.device)
            memory = {
                (tokens, name): in_fresh_process(peak_extra_mib, Case(size, tokens, task, name), options.device)
                for tokens, name in [*((1024, name) for name in names), (LONG, "ours")]
            }
            print(f"\n{task}, V {vocabulary:,}, H {width}\n{'':<10}{'tokens':>8}{'seconds':>10}{'peak extra, MiB':>18}")
            for name in names:
                print(f"{name:<10}{1024:>8}{times[name]:>10.3f}{memory[1024, name]:>18.0f}")
            print(f"{'ours':<10}{LONG:>8}{'':>10}{memory[LONG, 'ours']:>18.0f}", flush=True)
            key = f"{task} {size}"
            for name in names[:-1]:
                ratios[f"{key}: time / {name}"] = times["ours"] / times[name]
            if "products" in times:
                print(f"{'products':<10}{1024:>8}{times['products']:>10.3f}")
                ratios[f"{key}: time / products"] = times["ours"] / times["products"]
            ratios[f"{key}: memory / dense"] = memory[1024, "ours"] / memory[1024, "dense"]
            ratios[f"{key}: memory at {LONG} / at 1024"] = memory[LONG, "ours"] / memory[1024, "ours"]
    print()
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
