"""The paper's task data as prompts and responses: SAMSum, IWSLT'17 English -> German, StrategyQA, from the hub.

    python examples/t5/prepare.py samsum --output runs/data/samsum

Writes train.jsonl and validation.jsonl (and test.jsonl where there is one), rows {"prompt", "response"}. Exit status:
0, or 2 with one line about what is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_amd.errors import InputError, first_line

Row = dict[str, str]


class Task(NamedTuple):
    """Where a task's rows are on the hub, and what becomes of them."""

    name: str
    configuration: str | None
    convert: Callable[[Mapping[str, Any]], Row]
    held_out: int = 0
    """Last rows of `train` that become `validation`, where the hub has none."""


def _samsum(row: Mapping[str, Any]) -> Row:
    return {"prompt": f"summarize: {row['dialogue']}", "response": row["summary"]}


def _iwslt17(row: Mapping[str, Any]) -> Row:
    pair = row["translation"]
    return {"prompt": f"translate English to German: {pair['en']}", "response": pair["de"]}


def _strategyqa(row: Mapping[str, Any]) -> Row:
    answer = "yes" if row["answer"] else "no"
    return {"prompt": f"question: {row['question']}", "response": f"{row['facts']} So the answer is {answer}."}


TASKS = {
    "samsum": Task("knkarthick/samsum", None, _samsum),
    "iwslt17": Task("IWSLT/iwslt2017", "iwslt2017-en-de", _iwslt17),
    "strategyqa": Task("ChilleD/StrategyQA", None, _strategyqa, held_out=200),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    try:
        write(read(TASKS[options.task]), TASKS[options.task], options.output)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read(task: Task) -> dict[str, list[Mapping[str, Any]]]:
    """Every split's rows."""
    import datasets

    try:
        found = datasets.load_dataset(task.name, task.configuration)
    except Exception as error:  # whatever the client raises without a network
        raise InputError(f"{task.name} cannot be read from the hub ({first_line(error)})") from None
    return {split: list(rows) for split, rows in found.items()}


def write(splits: Mapping[str, Iterable[Mapping[str, Any]]], task: Task, output: Path) -> None:
    """The files, without rows of which one side is empty."""
    output.mkdir(parents=True, exist_ok=True)
    converted = {split: [task.convert(row) for row in rows] for split, rows in splits.items()}
    kept = {
        split: [row for row in rows if all(text.strip() for text in row.values())] for split, rows in converted.items()
    }
    if "validation" not in kept:
        kept["train"], kept["validation"] = kept["train"][: -task.held_out], kept["train"][-task.held_out :]
    for split, rows in kept.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{output}: {', '.join(f'{len(rows):,} {split}' for split, rows in kept.items())}")


if __name__ == "__main__":
    sys.exit(main())
