"""Train a student from a teacher by adversarial moment matching.

    torchrun --nproc-per-node 8 -m megatron_amd.train --config run.yaml objective.beta=0.7

Without torchrun it runs as one process. Every setting of the YAML file can be overridden as section.field=value.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from megatron_amd.config import Config, config_to_yaml, describe_fields, load_config
from megatron_amd.errors import InputError

USAGE_ERROR = 2
"""Exit status for problems that the user can mend."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parse(arguments)
    if options.help:
        if _speaks():
            print(_help_text())
        return 0
    try:
        config = load_config(options.config, options.overrides)
        if options.print_config:
            if _speaks():
                print(config_to_yaml(config), end="")
            return 0
        return _dry_run(config, options.world_size) if options.dry_run else _train(config)
    except InputError as error:
        if _speaks():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR


def _train(config: Config) -> int:
    from pathlib import Path  # heavy imports wait until the settings are known to be right

    from megatron_amd.checkpoint.hf import export_hf
    from megatron_amd.distributed.initialize import initialize, shutdown
    from megatron_amd.training.setup import set_up

    try:
        layout = initialize(config)
        trainer, tokenizer = set_up(config, layout, warn=_warn)
        stopped_by = trainer.train()
        if stopped_by is not None:
            if _speaks():
                print(f"stopped by signal {stopped_by} after saving a checkpoint; the same command goes on from it")
            return 128 + stopped_by
        if config.checkpoint.export:
            folder = Path(config.run.directory) / "student"
            export_hf(
                trainer.players.student, folder, trainer.plan.student, layout, copy_tokenizer=tokenizer.save_files
            )
        return 0
    finally:
        shutdown()


def _dry_run(config: Config, world_size: int | None) -> int:
    from megatron_amd.training.plan import describe_plan

    text = describe_plan(config, world_size)
    if _speaks():
        print(text)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_amd.train", add_help=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args(arguments)


def _help_text() -> str:
    lines = [
        "usage: [torchrun --nproc-per-node N] -m megatron_amd.train --config run.yaml [section.field=value ...]",
        "",
        "  --config FILE      the run's settings (YAML); without it, the defaults below",
        "  --print-config     print the resolved settings and stop",
        "  --dry-run          print the layout, parameters and memory of each rank; needs config.json files only",
        "  --world-size N     for --dry-run outside torchrun: plan for N ranks (default: the layout's smallest)",
        "  --help             this text",
        "",
        "examples:",
        "  python -m megatron_amd.train --config run.yaml",
        "  torchrun --nproc-per-node 2 -m megatron_amd.train --config run.yaml parallel.tensor_model_parallel_size=2",
        "  python -m megatron_amd.train --config run.yaml --dry-run --world-size 64",
        "",
        "settings (section.field, default, meaning):",
    ]
    for name, kind, default, doc in describe_fields():
        shown = "unset" if default is None else default
        lines.append(f"\n  {name} ({kind}) = {shown}")
        lines.append(textwrap.fill(doc, width=100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def _speaks() -> bool:
    """Whether this process is the one that prints: the first rank, or a process without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def _warn(text: str) -> None:
    if _speaks():
        print(f"warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
