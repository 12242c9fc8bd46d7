"""Train a student from a teacher by adversarial moment matching.

    torchrun --nproc-per-node 8 -m megatron_amd.train --config run.yaml objective.beta=0.7

Without torchrun it runs as one process. Every setting of the YAML file can be overridden as section.field=value.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence

from megatron_amd.config import Config, config_to_yaml, describe_fields, load_config
from megatron_amd.errors import InputError
from megatron_amd.program import Parser, run_program, say, warn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    return run_program(lambda: _run(_parse(arguments)), goes_on="from the last checkpoint")


def _run(options: argparse.Namespace) -> int:
    if options.help:
        say(_help_text())
        return 0
    if options.world_size is not None and not options.dry_run:
        raise InputError("command line: --world-size is for --dry-run; start ranks with torchrun --nproc-per-node")
    config = load_config(options.config, options.overrides)
    if options.print_config:
        say(config_to_yaml(config).rstrip("\n"))
        return 0
    return _dry_run(config, options.world_size) if options.dry_run else _train(config)


def _train(config: Config) -> int:
    from pathlib import Path  # heavy imports wait until the settings are known to be right

    from megatron_amd.checkpoint.hf import export_hf
    from megatron_amd.distributed.initialize import initialize, shutdown
    from megatron_amd.distributed.quiet import silence_known_warnings
    from megatron_amd.training.setup import set_up

    silence_known_warnings()
    try:
        layout = initialize(config)
        trainer, tokenizer = set_up(config, layout, warn=warn)
        say(trainer.describe_start())
        stopped_by = trainer.train()
        if stopped_by is not None:
            say(f"stopped by signal {stopped_by} after saving a checkpoint; the same command goes on from it")
            return 128 + stopped_by
        if config.checkpoint.export:
            folder = Path(config.run.directory) / "student"
            export_hf(
                trainer.players.student, folder, trainer.plan.student, layout, copy_tokenizer=tokenizer.save_files
            )
            say(f"{config.run.directory}: done; the student is in {folder}")
        return 0
    finally:
        shutdown()


def _dry_run(config: Config, world_size: int | None) -> int:
    from megatron_amd.distributed.quiet import silence_known_warnings
    from megatron_amd.training.plan import describe_plan

    silence_known_warnings()
    say(describe_plan(config, world_size))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args(arguments)  # options may stand between overrides


def _help_text() -> str:
    lines = [
        "usage: python -m megatron_amd.train --config run.yaml [section.field=value ...]",
        "       torchrun --nproc-per-node N -m megatron_amd.train --config run.yaml [section.field=value ...]",
        "",
        "  --config FILE      the run's settings (YAML); without it, the defaults below",
        "  --print-config     print the resolved settings and stop",
        "  --dry-run          print the layout, parameters and memory of each rank; needs config.json files only (from",
        "                     the hub, of a T5 that is said to be tied, its weights too: they tell whether it is)",
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


if __name__ == "__main__":
    sys.exit(main())
