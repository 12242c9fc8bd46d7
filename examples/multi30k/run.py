"""Multi30k English -> German from nothing: a teacher T5, a smaller T5, and what each objective makes of it.

    python examples/multi30k/run.py --data FOLDER          # of the corpus; without it, the hub's

Prepares data and tokenizer, trains the teacher, fine-tunes the student, and trains it on from there with supervised
fine-tuning, forward KL and adversarial moment matching for the same seconds each. Prints BLEU (sacrebleu) of greedy
translations of test 2016 as a table; the last line is the table as one JSON object. What is finished is not done again,
and refused where it was made with other settings. On two CPU cores about an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_amd.errors import InputError

HERE = Path(__file__).resolve().parent
SETTINGS = "example.json"
"""In a finished run's folder: what this program asked for."""
OBJECTIVES: dict[str, list[str]] = {
    "SFT": ["objective.name=sft", "objective.beta=1"],
    "KL": ["objective.name=kl", "objective.beta=1"],
    "AMM": ["objective.name=amm"],
}
TIMED_STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/multi30k"), help="folder for everything")
    parser.add_argument("--data", type=Path, help="folder of the Multi30k corpus; unset: the hub")
    parser.add_argument("--seconds", type=float, default=480, help="of each student's training after its fine-tuning")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("overrides", nargs="*", help="settings of all runs, such as training.precision=bf16")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        rows = play(options)
    except subprocess.CalledProcessError as error:
        print(
            f"error: {' '.join(map(str, error.cmd[:6]))} ... ended with {error.returncode}; see above", file=sys.stderr
        )
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{'':<10}{'parameters':>12}{'iterations':>12}{'seconds':>9}{'BLEU':>8}")
    for name, row in rows.items():
        size, effort = f"{row['parameters'] / 1e6:.2f} M", f"{row['iterations']:>12,}{row['seconds']:>9,.0f}"
        print(f"{name:<10}{size:>12}{effort}{row['bleu']:>8.2f}")
    print(json.dumps(rows))
    return 0


def play(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Everything, one after the other; the table's rows."""
    inputs = options.output / "inputs"
    if not (inputs / "spm.model").exists():
        data = ["--data", options.data] if options.data else []
        subprocess.run([sys.executable, HERE / "prepare.py", "--output", inputs, *data], check=True)
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
    """One run, unless it is there already. Raises InputError where it was made with other settings."""
    asked = [f"--ranks {options.ranks}", *overrides]
    if (directory / "student" / "config.json").exists():
        file = directory / SETTINGS
        made_with = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if made_with != asked:
            others = ", ".join(setting for setting in made_with if setting not in asked) or "others"
            wanted = ", ".join(setting for setting in asked if setting not in made_with) or "fewer"
            raise InputError(
                f"{directory}: was made with other settings ({others}; now {wanted}); remove it, or "
                "give another --output"
            )
        return
    print(f"\n== {directory}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
    command += ["-m", "megatron_amd.train", "--config", str(HERE / config), f"run.directory={directory}", *overrides]
    subprocess.run(command, check=True)
    (directory / SETTINGS).write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")


def records(directory: Path) -> list[dict[str, Any]]:
    """What a run has logged of its iterations."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "time/iteration" in record]


def row(options: argparse.Namespace, name: str, directory: Path) -> dict[str, Any]:
    """Size, effort and BLEU of a run's model."""
    import sacrebleu
    from safetensors import safe_open

    inputs, answers = options.output / "inputs", options.output / "test" / name.lower()
    if not list(answers.glob("responses-*.jsonl")):
        command = [sys.executable, str(HERE.parents[1] / "tools" / "generate.py")]
        command += ["--config", str(HERE / "student.yaml"), "--role", "student"]
        command += ["--output", str(answers), f"student.path={directory / 'student'}", "student.architecture=null"]
        command += [f"teacher.path={directory / 'student'}", "rollout.temperature=0", "rollout.batch_size=64"]
        command += [
            f"data.train={inputs / 'test.jsonl'}",
            f"data.tokenizer={inputs / 'spm.model'}",
            "--shard-size=1000",
        ]
        subprocess.run(command, check=True)
    files = sorted(answers.glob("responses-*.jsonl"))
    read = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    gold = [json.loads(line)["response"] for line in (inputs / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    with safe_open(directory / "student" / "model.safetensors", framework="pt") as weights:
        parameters = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
    made = records(directory)
    return {
        "parameters": parameters,
        "iterations": len(made),
        "seconds": round(sum(record["time/iteration"] for record in made), 1),
        "bleu": round(sacrebleu.corpus_bleu([line["response"] for line in read], [gold]).score, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
