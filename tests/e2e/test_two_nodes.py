"""The same two ranks, on one node and on two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Run
from tests.e2e.launch import free_ports, rank_logs, run_agents
from tests.tiny_run import read_metrics

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


def test_two_agents_give_the_losses_of_one(run_of_two_ranks: Run, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    nodes = [
        [
            *("--nnodes", "2", "--nproc-per-node", "1"),
            *("--rdzv-id", "two-nodes", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"),
            *("--redirects", "3", "--log-dir", str(tmp_path / f"node-{node}")),
            *("-m", "megatron_amd.train", *run_of_two_ranks.arguments, f"run.directory={tmp_path / 'run'}"),
        ]
        for node in range(2)
    ]
    status = run_agents(nodes, tmp_path)
    assert status == 0, [rank_logs(tmp_path / f"node-{node}") for node in range(2)]
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows if "student/loss" in row] == [1, 1, 2]
    assert rows == read_metrics(run_of_two_ranks.directory)
    for name in ("evaluation.json", "student/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run_of_two_ranks.directory / name).read_bytes()
