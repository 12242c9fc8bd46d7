"""Starts the training program as a user does, or many times in one start, and reads what it left behind."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 180.0
"""Seconds until a start that hangs is ended: far more than any needs."""


@dataclass(frozen=True)
class Ended:
    """How a start ended. stdout and stderr have one text for each rank."""

    status: int
    stdout: list[str]
    stderr: list[str]

    def lines(self) -> list[str]:
        """Everything that our own processes printed."""
        return [line for text in (*self.stdout, *self.stderr) for line in text.splitlines()]


def launch(folder: Path, *arguments: str, ranks: int | None = None, module: str = "megatron_amd.train") -> Ended:
    """`python -m module` or, with `ranks`, `torchrun --nproc-per-node ranks -m module`.

    torchrun's own words are left out: the ranks write into files of `folder`.
    """
    if ranks is None:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        return Ended(done.returncode, [done.stdout], [done.stderr])
    logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
    options = ["--standalone", "--nproc-per-node", str(ranks), "--redirects", "3", "--log-dir", str(logs)]
    status = run_agents([[*options, "-m", module, *arguments]], folder)
    return Ended(status, *rank_logs(logs))


def run_agents(commands: Sequence[Sequence[str]], folder: Path) -> int:
    """Start a torchrun for each command at the same time; return the first status that is not 0."""
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command],
            cwd=ROOT, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]  # fmt: skip
    try:
        statuses = [agent.wait(timeout=TIMEOUT) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()  # it ends its ranks first
                agent.wait(timeout=60)
    return next((status for status in statuses if status), 0)


def rank_logs(logs: Path) -> tuple[list[str], list[str]]:
    """(stdout, stderr) of each rank, from the folder that torchrun wrote them into."""
    folders = sorted(logs.glob("*/attempt_0/*"), key=lambda folder: int(folder.name))
    return tuple([(folder / name).read_text() for folder in folders] for name in ("stdout.log", "stderr.log"))  # type: ignore[return-value]


def environment(folder: Path) -> dict[str, str]:
    """One thread per process, no network, caches that leave no trace, and no filters of pytest's."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets-cache")}
    return {**kept, **own, "PYTHONPATH": str(ROOT)}


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens at, below those that outgoing connections are given."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 22_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def launch_many(folder: Path, cases: Sequence[dict[str, Any]], ranks: int | None = None) -> dict[str, list[Any]]:
    """Run tests/e2e/many_runs.py; return for each case that ended the results of its ranks."""
    numbered = [{**case, "port": port} for case, port in zip(cases, free_ports(len(cases)), strict=True)]
    (folder / "cases.json").write_text(json.dumps(numbered))
    ended = launch(folder, str(folder), ranks=ranks, module="tests.e2e.many_runs")
    results: dict[str, list[Any]] = {}
    for rank in range(ranks or 1):
        file = folder / f"results-{rank}.jsonl"
        for line in file.read_text().splitlines() if file.exists() else ():
            result = json.loads(line)
            results.setdefault(result.pop("name"), []).append(result)
    if not results:
        raise AssertionError(f"no case ended; status {ended.status}\n" + "\n".join(ended.lines()))
    return results
