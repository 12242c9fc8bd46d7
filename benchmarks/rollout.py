"""Tokens per second of the rollout engine, `transformers.generate`, and the model's matrix products alone.

    make bench-rollout
    python benchmarks/rollout.py --models runs/demo/run/student --precisions fp32 --repeats 3

Models: SmolLM2-135M-Instruct and its student of the demo (`make demo` leaves both in runs/demo), prompts of the demo's
training file. Both sample at temperature 1, with as many threads in all.

`fixed`: a batch of 8 or 32 prompts, 64 new tokens each, EOS ignored; rates are for the whole call, prompts included.
`bound`: the matrix products of that generation and nothing else, as torch's `linear` makes them: the prompts' tokens
together, then one token of each prompt at a time. `eos`: 64 prompts that end where they end, at most 128 new tokens;
generate has that of several batch sizes which was best in a first round, in which everything warms up. Figures are
medians over the rounds after it, in which everything runs once. Two tensor-parallel ranks cannot share SmolLM2's 9
heads: they are measured on a twin with 8 heads of 64 numbers in 4 groups and random weights, beside one process on the
same twin. The last line of output is one JSON object with the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from megatron_amd.batch import Prompts
from megatron_amd.config import Config, DataConfig, InitConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_amd.data import first_prompts, load_rows, load_tokenizer
from megatron_amd.distributed.initialize import initialize, shutdown
from megatron_amd.distributed.quiet import silence_known_warnings
from megatron_amd.models.gpt import CausalLM
from megatron_amd.models.roles import build_model, plan_models
from megatron_amd.rollout.generate import generate
from megatron_amd.training.first_weights import fill_model

FIXED_TOKENS, EOS_TOKENS, EOS_PROMPTS = 64, 128, 64
BATCHES = (8, 32)
GENERATE_BATCHES = (16, 32, 64)
"""Batch sizes that `transformers` may use for prompts that end where they end."""
LAYOUTS = {"one process": (1, 1), "TP 2": (2, 1), "DP 2": (1, 2)}
"""(tensor, data) parallel sizes."""


class Case(NamedTuple):
    """What one set of processes measures."""

    model: str
    tokenizer: str
    data: str
    precision: str
    layout: str
    repeats: int
    port: int
    twin: bool = False
    """The model is only a config.json; nothing but our own generation is measured."""


def settings(case: Case) -> Config:
    tensor, _ = LAYOUTS[case.layout]
    model = ModelConfig(path=case.model, init=InitConfig(weights="random" if case.twin else "pretrained"))
    return Config(
        teacher=model,
        student=model,
        data=DataConfig(train=case.data, tokenizer=case.tokenizer, max_prompt_length=64, on_long_prompt="truncate"),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor),
        training=replace(TrainingConfig(), precision=case.precision, global_batch_size=64),
    )


def measure(rank: int, case: Case, results: Any) -> None:
    """One rank's part; rank 0 puts {name: seconds or tokens} into `results`."""
    tensor, data = LAYOUTS[case.layout]
    ranks = tensor * data
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(case.port), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    silence_known_warnings()
    config = settings(case)
    tokenizer = load_tokenizer(case.tokenizer)
    layout = initialize(config)
    plan = plan_models(config, tokenizer.vocab_size)
    model = build_model("student", config, plan, layout)
    fill_model(model, "student", config.student, plan.student, 0)
    model.requires_grad_(False)
    rows = load_rows(config.data, "train", tokenizer, responses=False)

    def share(count: int) -> Prompts:
        return first_prompts(rows, count, dp_rank=layout.dp_rank, dp_size=layout.dp_size)

    def ours(prompts: Prompts, eos_ids: tuple[int, ...], length: int) -> list[int]:
        rollouts = generate(
            model, prompts, layout=layout, vocab_size=plan.vocab_size, eos_ids=eos_ids, seed=next(seeds),
            max_response_length=length,
        )  # fmt: skip
        return (rollouts.lengths - rollouts.prompt_lengths).tolist()

    seeds = iter(range(10**6))
    tasks: dict[str, Callable[[], list[int]]] = {}
    for batch in BATCHES:
        prompts = share(batch)
        tasks[f"fixed {batch}: ours"] = lambda prompts=prompts: ours(prompts, (), FIXED_TOKENS)  # type: ignore[misc]
    everything = share(EOS_PROMPTS)
    tasks["eos: ours"] = lambda: ours(everything, tokenizer.eos_ids, EOS_TOKENS)
    if ranks == 1 and not case.twin:
        peer = Transformers(case.model, case.precision, tokenizer.eos_ids)
        products = [MatrixProducts(model, batch, sum(map(len, share(batch).tokens))) for batch in BATCHES]
        for batch, product in zip(BATCHES, products, strict=True):
            prompts = share(batch)
            tasks[f"fixed {batch}: generate"] = lambda prompts=prompts: peer.fixed(prompts)  # type: ignore[misc]
            tasks[f"fixed {batch}: bound"] = product.run
        for batch in GENERATE_BATCHES:
            tasks[f"eos: generate {batch}"] = lambda batch=batch: peer.until_eos(everything, batch)  # type: ignore[misc]

    def rate(task: Callable[[], list[int]]) -> float:
        torch.distributed.barrier()
        start = time.perf_counter()
        count = torch.tensor([float(sum(task()))], dtype=torch.float64)
        torch.distributed.all_reduce(count, group=layout.groups.dp)  # waits for all replicas
        return count.item() / (time.perf_counter() - start)

    first = {name: rate(task) for name, task in tasks.items()}  # warms up, and finds generate's best batch size
    slower = sorted((name for name in tasks if name.startswith("eos: generate")), key=first.__getitem__)[:-1]
    rounds = [
        {name: rate(task) for name, task in tasks.items() if name not in slower} for _ in range(case.repeats)
    ]  # fmt: skip
    if rank == 0:
        results.put({name: statistics.median(found[name] for found in rounds) for name in rounds[0]})
    shutdown()


class Transformers:
    """`generate` with its best settings on a CPU: scaled-dot-product attention, prompts of like length together."""

    def __init__(self, folder: str, precision: str, eos_ids: tuple[int, ...]):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.eos_ids = list(eos_ids)

    def fixed(self, prompts: Prompts) -> list[int]:
        found = self._generate(prompts.tokens, FIXED_TOKENS, eos_token_id=None)
        return [found.shape[1]] * found.shape[0]

    def until_eos(self, prompts: Prompts, batch: int) -> list[int]:
        rows, lengths = sorted(prompts.tokens, key=len), []
        for first in range(0, len(rows), batch):
            found = self._generate(rows[first : first + batch], EOS_TOKENS, eos_token_id=self.eos_ids)
            ended = torch.isin(found, torch.tensor(self.eos_ids))
            ends = torch.where(ended.any(1), ended.to(torch.uint8).argmax(1) + 1, found.shape[1])
            lengths += ends.tolist()
        return lengths

    @torch.inference_mode()
    def _generate(self, rows: Any, length: int, **options: Any) -> Tensor:
        width = max(map(len, rows))
        tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        found = self.model.generate(
            tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length,
            use_cache=True, pad_token_id=0, **options,
        )  # fmt: skip
        return found[:, width:]


class MatrixProducts:
    """Every matrix product of a generation, on inputs of no meaning: the prompts' tokens at once, then step by step."""

    def __init__(self, model: CausalLM, batch: int, prompt_tokens: int):
        weights = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embedding" not in name]
        self.weights = [*weights, model.head_weight()] if model.share_embeddings_and_output_weights else weights
        widths = {weight.shape[1]: weight.dtype for weight in self.weights}
        self.steps = {width: torch.randn(batch, width, dtype=dtype) for width, dtype in widths.items()}
        self.prompts = {width: torch.randn(prompt_tokens, width, dtype=dtype) for width, dtype in widths.items()}
        self.batch = batch

    @torch.inference_mode()
    def run(self) -> list[int]:
        *layers, head = self.weights
        for weight in layers:
            torch.nn.functional.linear(self.prompts[weight.shape[1]], weight)
        torch.nn.functional.linear(self.steps[head.shape[1]], head)
        for _ in range(FIXED_TOKENS - 1):
            for weight in self.weights:
                torch.nn.functional.linear(self.steps[weight.shape[1]], weight)
        return [FIXED_TOKENS] * self.batch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["runs/demo/inputs/teacher", "runs/demo/run/student"])
    parser.add_argument("--data", default="runs/demo/inputs/train.jsonl")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    ratios: dict[str, float] = {}
    for folder in options.models:
        for precision in options.precisions:
            name = f"{Path(folder).name} {precision}"
            case = Case(folder, folder, options.data, precision, "", options.repeats, 0)
            possible = [layout for layout in options.layouts if divides(folder, LAYOUTS[layout][0])]
            ratios |= report(name, case, possible)
            others = [layout for layout in options.layouts if layout not in possible]
            if others:
                with tempfile.TemporaryDirectory() as twin:
                    write_twin(folder, Path(twin))
                    case = case._replace(model=twin, twin=True)
                    ratios |= report(f"twin of {name}", case, ["one process", *others])
    print()
    print(json.dumps({key: round(ratio, 3) for key, ratio in ratios.items()}))


def divides(folder: str, tensor: int) -> bool:
    """Whether so many tensor-parallel ranks can share the model's heads."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return config["num_attention_heads"] % tensor == 0 and config["num_key_value_heads"] % tensor == 0


def write_twin(folder: str, twin: Path) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    (twin / "config.json").write_text(json.dumps(config))


def report(name: str, case: Case, layouts: Sequence[str]) -> dict[str, float]:
    """Measure under each layout, print a table, and return the ratios."""
    rates: dict[str, dict[str, float]] = {}
    for layout in layouts:
        tensor, data = LAYOUTS[layout]
        results = multiprocessing.get_context("spawn").SimpleQueue()
        here = case._replace(layout=layout, port=free_port())
        multiprocessing.spawn(measure, (here, results), nprocs=tensor * data)
        rates[layout] = results.get()
    print(f"\n{name}, tokens per second\n{'':<22}" + "".join(f"{layout:>14}" for layout in rates))
    for task in next(iter(rates.values())):
        shown = [f"{found[task]:>14.0f}" if task in found else f"{'':>14}" for found in rates.values()]
        print(f"{task:<22}" + "".join(shown), flush=True)
    return compare(name, rates)


def compare(name: str, rates: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours against generate and the bound, of one process; other layouts against one process."""
    one, ratios = rates.get("one process", {}), {}
    for batch in BATCHES:
        for other in ("generate", "bound"):
            if f"fixed {batch}: {other}" in one:
                key = f"{name}, fixed {batch}: ours / {other}"
                ratios[key] = one[f"fixed {batch}: ours"] / one[f"fixed {batch}: {other}"]
    best = max((rate for task, rate in one.items() if task.startswith("eos: generate")), default=None)
    if best is not None:
        ratios[f"{name}, eos: ours / generate"] = one["eos: ours"] / best
    for layout in rates.keys() - {"one process"}:
        for task, rate in rates[layout].items():
            if task in one:
                ratios[f"{name}, {task}: {layout} / one process"] = rate / one[task]
    return ratios


if __name__ == "__main__":
    main()
