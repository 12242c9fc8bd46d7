"""What the programs that run under torchrun share: one line for an error, said once, and the exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

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


class Parser(argparse.ArgumentParser):
    """Raises InputError for what is wrong with the command line, so that one rank says it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; --help shows what there is")


def run_program(run: Callable[[], int], *, goes_on: str) -> int:
    """Call `run` and return the exit status: its own, or that of the error, after one line about it.

    Args:
        goes_on: where the same command goes on after a rank was lost, such as `from the last checkpoint`.
    """
    try:
        return run()
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
            f"output which one ended first and why; the same command goes on {goes_on}",
            file=sys.stderr,
            flush=True,
        )
        return LOST_RANK
    except BrokenPipeError:  # whoever read our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # in training, before the first step: from then on training/signals.py handles it
        if _is_first("RANK"):
            print(f"interrupted; the same command goes on {goes_on}", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def leave_at_sigterm() -> None:
    """Make SIGTERM an exception, as SIGINT is one, so that what is half written is removed on the way out."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def say(text: str) -> None:
    """Print on the first rank."""
    if _is_first("RANK"):
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning on the first rank."""
    if _is_first("RANK"):
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _lost_rank(error: RuntimeError) -> str | None:
    """What is said of a rank that is gone, if the error is about one."""
    return next((words for words in _LOST if words in str(error)), None)


def _is_first(variable: str) -> bool:
    """Whether this process is number 0 by torchrun's RANK (of all) or LOCAL_RANK (on its node), or has no torchrun."""
    return os.environ.get(variable, "0") == "0"
