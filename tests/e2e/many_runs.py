"""The training program several times in the same processes: one start, with its seconds of imports, for many tests.

    [torchrun --nproc-per-node N] -m tests.e2e.many_runs FOLDER

FOLDER/cases.json lists the cases. A case has a name, the program's `arguments` (one list, or one for each rank), a
`port` of its own at which the ranks meet, and perhaps faults:

    "stop": {"rank", "signal", "after": "critic_step" | "student_step", "phase", "iteration", "critic_steps"}
        the rank sends itself the signal in the middle of an iteration
    "file_limit": {"rank", "bytes"}
        the rank can write no file longer than this, as if the disk were full
    "unreadable": {"rank"}
        the rank's data cannot be read once the run has begun

Each rank appends a line to FOLDER/results-RANK.jsonl when a case has ended: the exit status, what it printed, the
seconds it took and how many models it had built.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_amd import program, train
from megatron_amd.data import PromptDataset
from megatron_amd.models import roles
from megatron_amd.training.trainer import Trainer

RANK = int(os.environ.get("RANK", "0"))


def run_cases(folder: Path) -> None:
    """Run every case and write down how it ended."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the agent's store remembers the addresses of earlier cases
    program._WAIT_FOR_THE_SPEAKER = 0.0  # both ranks go on to the next case
    for case in json.loads((folder / "cases.json").read_text()):
        os.environ["MASTER_PORT"] = str(case["port"])
        arguments = case["arguments"]
        began = time.monotonic()
        with keeping_prints() as lines, faults(case), counting_models() as built:
            status = run(arguments if isinstance(arguments[0], str) else arguments[RANK])
        result = {
            "name": case["name"],
            "status": status,
            "lines": lines,
            "seconds": time.monotonic() - began,
            "models": built[0],
        }
        with (folder / f"results-{RANK}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def run(arguments: list[str]) -> int:
    """The program's exit status, as the interpreter would set it."""
    try:
        return train.main(arguments)
    except BaseException:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def keeping_prints() -> Iterator[list[str]]:
    """A list that at the end has the lines which this process printed, libraries in C++ included."""
    lines: list[str] = []
    saved = os.dup(1), os.dup(2)
    reader, writer = os.pipe()  # which has room for 64 KiB, also where the disk is full
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)
    try:
        yield lines
    finally:
        sys.stdout.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with open(reader, encoding="utf-8") as file:
            lines += file.read().splitlines()


@contextlib.contextmanager
def counting_models() -> Iterator[list[int]]:
    """A list whose one number is how many models were built."""
    count, build = [0], roles.build_gpt

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return build(*args, **kwargs)

    with mock.patch.object(roles, "build_gpt", counted):
        yield count


@contextlib.contextmanager
def faults(case: dict[str, Any]) -> Iterator[None]:
    """What this rank suffers in a case."""
    with contextlib.ExitStack() as stack:
        for name, fault in (("stop", stopping), ("file_limit", limiting_files), ("unreadable", hiding_rows)):
            if case.get(name, {}).get("rank") == RANK:
                stack.enter_context(fault(case[name]))
        yield


@contextlib.contextmanager
def stopping(stop: dict[str, Any]) -> Iterator[None]:
    step = getattr(Trainer, stop["after"])
    place = {name: stop[name] for name in ("phase", "iteration", "critic_steps") if name in stop}

    def then_signalled(trainer: Trainer, *args: Any) -> None:
        step(trainer, *args)
        if all(getattr(trainer.progress, name) == value for name, value in place.items()):
            for _ in range(stop.get("times", 1)):
                os.kill(os.getpid(), stop["signal"])

    with mock.patch.object(Trainer, stop["after"], then_signalled):
        yield


@contextlib.contextmanager
def limiting_files(limit: dict[str, Any]) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit["bytes"], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def hiding_rows(_: dict[str, Any]) -> Iterator[None]:
    def unreadable(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "train.jsonl")

    with mock.patch.object(PromptDataset, "prompts", unreadable):
        yield


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
