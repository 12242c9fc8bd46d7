"""Train a student from a teacher by adversarial moment matching.

    torchrun --nproc-per-node 8 -m megatron_amd.train --config run.yaml objective.beta=0.7

Without torchrun it runs as one process. Every setting of the YAML file can be overridden as section.field=value.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import NoReturn

from megatron_amd.config import Config, config_to_yaml, describe_fields, load_config
from megatron_amd.errors import InputError

USAGE_ERROR = 2
"""Exit status for problems that the user can mend."""
LOST_RANK = 3
"""Exit status where a process of another rank is gone or does not answer."""
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "NCCL communicator",
)
"""What torch.distributed says of it."""
_WAIT_FOR_THE_SPEAKER = 20.0
"""Seconds that silent ranks stay. torchrun ends all ranks when the first has left, also one that was about to speak;
once that one has spoken and left, torchrun does not let the others wait."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    try:
        return _run(_parse(arguments))
    except InputError as error:
        # What every rank knows the first one says; what a rank found by itself, such as a file that is missing, the
        # others on its node have found too.
        if _is_first("RANK") if error.on_all_ranks else _is_first("LOCAL_RANK"):
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
        else:
            time.sleep(_WAIT_FOR_THE_SPEAKER)
        return USAGE_ERROR
    except RuntimeError as error:
        reason = _lost_rank(error)
        if reason is None:
            raise
        print(
            f"error: rank {os.environ.get('RANK', '0')} lost another rank ({reason}): see above or in the other nodes' "
            "output which one ended first and why; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return LOST_RANK
    except BrokenPipeError:  # whoever read our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before the first step; from then on training/signals.py handles it
        return 128 + signal.SIGINT


def _lost_rank(error: RuntimeError) -> str | None:
    """What is said of a rank that is gone, if the error is about one."""
    return next((words for words in _LOST if words in str(error)), None)


def _run(options: argparse.Namespace) -> int:
    if options.help:
        _say(_help_text())
        return 0
    if options.world_size is not None and not options.dry_run:
        raise InputError("command line: --world-size is for --dry-run; start ranks with torchrun --nproc-per-node")
    config = load_config(options.config, options.overrides)
    if options.print_config:
        _say(config_to_yaml(config).rstrip("\n"))
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
        trainer, tokenizer = set_up(config, layout, warn=_warn)
        _say(trainer.describe_start())
        stopped_by = trainer.train()
        if stopped_by is not None:
            _say(f"stopped by signal {stopped_by} after saving a checkpoint; the same command goes on from it")
            return 128 + stopped_by
        if config.checkpoint.export:
            folder = Path(config.run.directory) / "student"
            export_hf(
                trainer.players.student, folder, trainer.plan.student, layout, copy_tokenizer=tokenizer.save_files
            )
            _say(f"{config.run.directory}: done; the student is in {folder}")
        return 0
    finally:
        shutdown()


def _dry_run(config: Config, world_size: int | None) -> int:
    from megatron_amd.distributed.quiet import silence_known_warnings
    from megatron_amd.training.plan import describe_plan

    silence_known_warnings()
    _say(describe_plan(config, world_size))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; --help shows what there is")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
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


def _is_first(variable: str) -> bool:
    """Whether this process is number 0 by torchrun's RANK (of all) or LOCAL_RANK (on its node), or has no torchrun."""
    return os.environ.get(variable, "0") == "0"


def _say(text: str) -> None:
    if _is_first("RANK"):
        print(text, flush=True)


def _warn(text: str) -> None:
    if _is_first("RANK"):
        print(f"warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
