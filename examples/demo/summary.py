"""The demo's last words: distances before and after, seconds, a few answers, and one JSON object on the last line.

python examples/demo/summary.py runs/demo/run --seconds 600
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DISTANCES = {
    "tv_off": "total variation, teacher states",
    "tv_on": "total variation, student states",
    "kl_off": "KL(teacher||student), teacher states",
    "kl_on": "KL(teacher||student), student states",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--seconds", type=float, required=True, help="how long the demo took, for the JSON line")
    options = parser.parse_args()
    try:
        evaluations = json.loads((options.run / "evaluation.json").read_text(encoding="utf-8"))
        lines = (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        before, after = ({e["when"]: e for e in evaluations}[when] for when in ("before", "after"))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {options.run}: holds no finished run ({error}); run make demo again", file=sys.stderr)
        return 2
    records = [json.loads(line) for line in lines]
    peak = max(record.get("memory/total_gib") or 0.0 for record in records)
    print_table(before, after)
    shares = print_times([record for record in records if "time/iteration" in record and record["phase"] == "main"])
    print_answers(before, after)
    result = {
        "before": {name: before[name] for name in DISTANCES},
        "after": {name: after[name] for name in DISTANCES},
        "seconds": options.seconds,
        "peak_gib": round(peak, 2),
        "rollout_share": round(shares["rollout"], 3),
    }
    print(json.dumps(result))
    return 0


def print_table(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Each distance before and after adversarial moment matching."""
    print(f"\nOn {after['prompts']} held-out prompts, mean per token, before -> after adversarial moment matching:\n")
    for name, text in DISTANCES.items():
        change = (after[name] / before[name] - 1) * 100
        print(f"  {text:38} {before[name]:7.4f} -> {after[name]:7.4f}   {change:+6.1f} %")


def print_times(iterations: list[dict[str, Any]]) -> dict[str, float]:
    """Where the seconds of the main phase's iterations went, as shares."""
    total = sum(record["time/iteration"] for record in iterations)
    parts = ("rollout", "hidden", "critic", "student")
    shares = {part: sum(record.get(f"time/{part}") or 0.0 for record in iterations) / total for part in parts}
    shown = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    print(f"\n  {total / len(iterations):.1f} s an iteration: {shown}")
    return shares


def print_answers(before: dict[str, Any], after: dict[str, Any]) -> None:
    """What teacher and student say to the same prompts."""
    for old, new in zip(before["samples"], after["samples"], strict=True):
        print(f"\n  prompt          {_line(old['prompt'])}")
        print(f"  teacher         {_line(old['teacher'])}")
        print(f"  student before  {_line(old['student'])}")
        print(f"  student after   {_line(new['student'])}")
    print()


def _line(text: str, width: int = 96) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


if __name__ == "__main__":
    sys.exit(main())
