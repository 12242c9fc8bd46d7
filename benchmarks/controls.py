"""What adversarial moment matching adds, against controls at equal seconds from the same warmed-up student.

    python benchmarks/controls.py training.precision=bf16 --inputs runs/demo/inputs --output runs/controls

Warms a student up once, as the demo does, exports it, and trains it on from there with each control and seed. A
control's number of iterations comes from a short timing run, so that all spend the same seconds in their main phase.
Prints one row for each run and the means. Run it on an otherwise idle machine (docs/log.md has the figures).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTROLS: dict[str, list[str]] = {
    "continued warm-up": ["objective.name=kl", "objective.beta=1"],
    "TV": ["objective.name=tv"],
    "AMM, plain critic": [
        "objective.name=amm",
        "critic.prior=none",
        "critic.features=pair",
        "critic.head_init=lm_head",
    ],
    "AMM, log-ratio prior": ["objective.name=amm", "critic.prior=log_ratio"],
}
DISTANCES = ("tv_off", "kl_off", "tv_on", "kl_on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/demo/demo.yaml", help="settings that all runs share")
    parser.add_argument("--inputs", type=Path, required=True, help="folder made by tools/prepare_demo.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seconds", type=float, default=75, help="seconds of each control's main phase")
    parser.add_argument("--timing-steps", type=int, default=4, help="iterations of the timing runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", help="further settings, such as training.optim.learning_rate=1e-4")
    options = parser.parse_args()
    start = options.output / "start"
    run(options, start, options.seeds[0], ["training.steps=0", "objective.name=kl", "evaluation.prompts=0"])
    common = ["warmup.steps=0", f"student.path={start / 'student'}", "student.init.layers=null"]
    steps = {}
    for name, overrides in CONTROLS.items():
        directory = options.output / "timing" / name.replace(" ", "-")
        count = f"training.steps={options.timing_steps}"
        run(options, directory, options.seeds[0], [*common, *overrides, count, "evaluation.prompts=0"])
        later = read_records(directory)[1:]  # the first iteration warms up
        steps[name] = max(1, round(options.seconds / statistics.mean(r["time/iteration"] for r in later)))
    rows = []
    for seed in options.seeds:
        for name, overrides in CONTROLS.items():
            directory = options.output / f"seed{seed}" / name.replace(" ", "-")
            run(options, directory, seed, [*common, *overrides, f"training.steps={steps[name]}"])
            rows.append(row(directory, name, seed))
            print(json.dumps(rows[-1]), flush=True)
    print_means(rows)


def run(options: argparse.Namespace, directory: Path, seed: int, overrides: list[str]) -> None:
    """One training run on two ranks, unless it is there already."""
    if (directory / "student" / "config.json").exists():
        return
    teacher = options.inputs / "teacher"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_amd.train",
        "--config", options.config, f"run.directory={directory}", f"run.seed={seed}", f"teacher.path={teacher}",
        f"student.path={teacher}", f"data.train={options.inputs / 'train.jsonl'}",
        f"data.evaluation={options.inputs / 'heldout.jsonl'}", *options.overrides, *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The iterations of a run."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in records if "time/iteration" in record]


def row(directory: Path, name: str, seed: int) -> dict[str, Any]:
    """What a control reached."""
    evaluations = {e["when"]: e for e in json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))}
    records = read_records(directory)
    return {
        "control": name,
        "seed": seed,
        "steps": len(records),
        "seconds": round(sum(record["time/iteration"] for record in records), 1),
        "before": {d: round(evaluations["before"][d], 4) for d in DISTANCES},
        "after": {d: round(evaluations["after"][d], 4) for d in DISTANCES},
    }


def print_means(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds of each distance after training."""
    print("\n| control | steps | seconds | " + " | ".join(DISTANCES) + " |")
    print("|---" * (3 + len(DISTANCES)) + "|")
    for name in ("before", *CONTROLS):
        chosen = rows if name == "before" else [r for r in rows if r["control"] == name]
        cells = []
        for distance in DISTANCES:
            values = [r["before" if name == "before" else "after"][distance] for r in chosen]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        effort = ["", ""] if name == "before" else [
            str(chosen[0]["steps"]), f"{statistics.mean(r['seconds'] for r in chosen):.0f}"
        ]  # fmt: skip
        print(f"| {name} | " + " | ".join([*effort, *cells]) + " |")


if __name__ == "__main__":
    main()
