"""Multi30k English -> German from nothing: a teacher T5, a smaller T5, and what each objective makes of it.

    python examples/multi30k/run.py --data FOLDER          # of the corpus; without it, the hub's

Prepares data and tokenizer, trains the teacher, fine-tunes the student, and trains it on from there with supervised
fine-tuning, forward KL and adversarial moment matching for the same seconds each. Prints BLEU (sacrebleu) of greedy
translations of test 2016 as a table; the last line is the table as one JSON object. What was interrupted goes on with
the same command. BLEU needs `pip install -e ".[examples]"`. On two CPU cores about an hour.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from prepare import prepare

from megatron_amd.config import load_config
from megatron_amd.errors import InputError
from megatron_amd.models.model_files import read_json
from megatron_amd.program import Parser, run_program

HERE = Path(__file__).resolve().parent
GENERATE = HERE.parents[1] / "tools/generate.py"
OBJECTIVES: dict[str, list[str]] = {
    "SFT": ["objective.name=sft", "objective.beta=1"],
    "KL": ["objective.name=kl", "objective.beta=1"],
    "AMM": ["objective.name=amm"],
}
TIMED_STEPS = 8


def main() -> int:
    return run_program(lambda: run(parse()), goes_on="with what is not finished")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/multi30k"), help="folder for everything")
    parser.add_argument("--data", type=Path, help="folder of the Multi30k corpus; unset: the hub")
    parser.add_argument("--seconds", type=float, default=480, help="of each student's training after its fine-tuning")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("overrides", nargs="*", help="settings of all runs, such as training.precision=bf16")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """Play, and print the table. Returns the exit status; raises InputError."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise InputError('sacrebleu is missing, which measures BLEU: pip install -e ".[examples]"')
    for config in ("teacher.yaml", "student.yaml"):
        load_config(HERE / config, options.overrides)
    keep_to(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        rows = play(options)
    except subprocess.CalledProcessError as error:
        print(f"error: this ended with {error.returncode}, see above: {' '.join(error.cmd)}", file=sys.stderr)
        return 2
    print(f"\n{'':<10}{'parameters':>12}{'iterations':>12}{'seconds':>9}{'BLEU':>8}")
    for name, row in rows.items():
        size, effort = f"{row['parameters'] / 1e6:.2f} M", f"{row['iterations']:>12,}{row['seconds']:>9,.0f}"
        print(f"{name:<10}{size:>12}{effort}{row['bleu']:>8.2f}")
    print(json.dumps(rows))
    return 0


def keep_to(options: argparse.Namespace) -> None:
    """Write down what the folder's models are made with. Raises InputError where it was begun with other options."""
    data = options.data and str(options.data.resolve())
    asked = {"data": data, "seconds": options.seconds, "ranks": options.ranks, "overrides": options.overrides}
    file = options.output / "options.json"
    if not file.exists():
        if options.output.exists() and any(options.output.iterdir()):
            raise InputError(f"{options.output}: holds other things and no options.json; give another --output")
        options.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asked) + "\n", encoding="utf-8")
        return
    begun = read_json(file)
    changed = [f"{name} {begun.get(name)} -> {value}" for name, value in asked.items() if begun.get(name) != value]
    if changed:
        raise InputError(
            f"{options.output}: was begun with other options ({', '.join(changed)}); give those, or another --output"
        )


def play(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Everything, one after the other; the table's rows."""
    inputs = options.output / "inputs"
    if not (inputs / "spm.model").exists():
        prepare(inputs, options.data)
    shared = [
        f"data.train={inputs / 'train.jsonl'}", f"data.evaluation={inputs / 'val.jsonl'}",
        f"data.tokenizer={inputs / 'spm.model'}", *options.overrides,
    ]  # fmt: skip
    teacher, start = options.output / "teacher", options.output / "start"
    train(options, teacher, "teacher.yaml", shared)
    shared.append(f"teacher.path={teacher / 'student'}")
    train(options, start, "student.yaml", [*shared, "training.steps=0", "objective.name=kl", "evaluation.prompts=0"])
    begun = [*shared, "warmup.steps=0", f"student.path={start / 'student'}", "student.architecture=null"]
    folders = {"teacher": teacher, "start": start}
    for name, overrides in OBJECTIVES.items():
        timing = options.output / "timing" / name.lower()
        short = [f"training.steps={TIMED_STEPS}", "training.log_interval=1", "evaluation.prompts=0"]
        train(options, timing, "student.yaml", [*begun, *overrides, *short])
        seconds = statistics.median(record["time/iteration"] for record in records(timing)[2:])
        folders[name] = options.output / name.lower()
        steps = max(1, round(options.seconds / seconds))
        train(options, folders[name], "student.yaml", [*begun, *overrides, f"training.steps={steps}"])
    return {name: row(options, name, folder) for name, folder in folders.items()}


def train(options: argparse.Namespace, directory: Path, config: str, overrides: list[str]) -> None:
    """One run, unless it is there already."""
    if (directory / "student" / "config.json").exists():
        return
    print(f"\n== {directory}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
    command += ["-m", "megatron_amd.train", "--config", str(HERE / config), f"run.directory={directory}", *overrides]
    subprocess.run(command, check=True)


def records(directory: Path) -> list[dict[str, Any]]:
    """What a run has logged of its iterations."""
    return [record for record in lines_of(directory / "metrics.jsonl") if "time/iteration" in record]


def lines_of(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def row(options: argparse.Namespace, name: str, directory: Path) -> dict[str, Any]:
    """Size, effort and BLEU of a run's model."""
    import sacrebleu
    from safetensors import safe_open

    inputs, answers = options.output / "inputs", options.output / "test" / name.lower()
    if not list(answers.glob("responses-*.jsonl")):
        command = [sys.executable, str(GENERATE), "--config", str(HERE / "student.yaml"), "--role", "student"]
        command += ["--output", str(answers), f"student.path={directory / 'student'}", "student.architecture=null"]
        command += [f"teacher.path={directory / 'student'}", "rollout.temperature=0", "rollout.batch_size=64"]
        command += [
            f"data.train={inputs / 'test.jsonl'}",
            f"data.tokenizer={inputs / 'spm.model'}",
            "--shard-size=1000",
        ]
        subprocess.run(command, check=True)
    read = [line["response"] for file in sorted(answers.glob("responses-*.jsonl")) for line in lines_of(file)]
    gold = [line["response"] for line in lines_of(inputs / "test.jsonl")]
    with safe_open(directory / "student" / "model.safetensors", framework="pt") as weights:
        parameters = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
    made = records(directory)
    return {
        "parameters": parameters,
        "iterations": len(made),
        "seconds": round(sum(record["time/iteration"] for record in made), 1),
        "bleu": round(sacrebleu.corpus_bleu(read, [gold]).score, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
