"""Time and peak memory of a model's conversion to Megatron-Core and back, beyond what the imports take.

    python benchmarks/conversion.py runs/demo/inputs/teacher
    python benchmarks/conversion.py runs/demo/inputs/teacher --shard-mib 100

Each conversion runs in a process of its own: what it needs is imported, Linux's mark of the most memory held at once
(VmHWM: the process's own memory and the pages of mapped files that it has touched) is reset, the tool's function runs,
and the mark is read. At the end the two folders' tensors and greedy generations are compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from megatron_amd.checkpoint.hf import hf_to_mcore, mcore_to_hf
from megatron_amd.checkpoint.hf_files import copy_carried
from megatron_amd.data import load_tokenizer
from megatron_amd.models.architecture import load_architecture

PROMPTS = ("What is a fox?", "Name three colours.", "Write a short poem about rain.", "2 + 2 =")


def memory(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def measure(what: str, source: str, output: Path, shard_mib: int) -> tuple[float, float]:
    """(seconds, MiB) of one conversion, in a process of its own."""
    from transformers import AutoTokenizer  # noqa: F401  (loads its part of transformers)

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.monotonic()
    if what == "tokenizer":
        load_tokenizer(source)
    elif what == "import":
        hf_to_mcore(source, output)
    else:
        architecture, copy = load_architecture(source, None, "source"), partial(copy_carried, Path(source))
        mcore_to_hf(Path(source), output, architecture, copy, max_shard_bytes=shard_mib * 2**20)
    return time.monotonic() - start, memory("VmHWM") - before


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def generate(folder: Path) -> list[list[int]]:
    """40 greedy tokens after each prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [
        model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=40)[0].tolist()
        for prompt in PROMPTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model with a tokenizer")
    parser.add_argument(
        "--shard-mib", type=int, default=4096, help="size of the exported files, which are imported too"
    )
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        steps = (
            ("tokenizer", options.model, folder / "none"),
            ("import", options.model, folder / "mcore"),
            ("export", folder / "mcore", folder / "hf"),
            ("import", folder / "hf", folder / "again"),
        )
        print("| step | largest file MiB | seconds | peak MiB | peak / largest file |\n|---|---|---|---|---|")
        for what, source, output in steps:
            with spawn.Pool(1) as pool:
                seconds, peak = pool.apply(measure, (what, str(source), output, options.shard_mib))
            files = (source if what == "import" else folder / "hf" if what == "export" else options.model).glob(
                "*.safe*"
            )
            largest = max(file.stat().st_size for file in files) / 2**20
            print(f"| {what} | {largest:.0f} | {seconds:.1f} | {peak:.0f} | {peak / largest:.2f} |", flush=True)
        before, after = tensors(options.model), tensors(folder / "hf")
        same = before.keys() == after.keys() and all(
            before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before
        )
        equal = generate(options.model) == generate(folder / "hf")
        print(json.dumps({"tensors": len(before), "bit_exact": same, "generations_equal": equal}))


if __name__ == "__main__":
    main()
