"""Runs a function on several gloo ranks, each a forked child of the test.

Forking keeps the parent's imports: 0.3 s for four ranks, where spawning takes 19 s.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, dies: int | None = None
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks that share a gloo default group; return what each rank returned.

    `fn` may be a closure; what it returns must be picklable. The first failure on any rank is raised as an
    AssertionError with that rank's traceback, and the other ranks are then killed, as they are after `timeout`
    seconds. Rank `dies` is expected to be killed by `fn`, and returns None. The caller must not have initialised
    torch.distributed itself: a forked child cannot use that state.
    """
    assert not dist.is_initialized(), "run_distributed: destroy this process's own process group first"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        readers: list[Connection] = []
        workers = []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            call = (fn, args, rank, world_size, store, timeout, dies is None, writer)
            worker = context.Process(target=_work, args=call, name=f"rank{rank}", daemon=True)
            worker.start()
            writer.close()
            readers.append(reader)
            workers.append(worker)
        try:
            results = _collect(readers, time.monotonic() + timeout, timeout, dies)
            for worker in workers:
                worker.join(timeout=10)
            return results
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
            for reader in readers:
                reader.close()


def _collect(readers: list[Connection], deadline: float, timeout: float, dies: int | None) -> list[Any]:
    """Wait for one message from every rank; raise at the first that tells of a failure."""
    results: dict[int, Any] = {}
    waiting = {reader: rank for rank, reader in enumerate(readers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} gave no result within {timeout:g} s")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            try:
                succeeded, result = reader.recv()
            except EOFError:
                if rank == dies:
                    results[rank] = None
                    continue
                raise AssertionError(f"rank {rank} died without a message (killed, or os._exit)") from None
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(readers))]


def _work(
    fn: Callable[..., Any],
    args: tuple,
    rank: int,
    world_size: int,
    store: Path,
    timeout: float,
    all_live: bool,
    writer: Connection,
) -> None:
    try:
        # The parent's OpenMP threads do not survive a fork: a parallel region in the child would wait for them.
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = fn(*args)
        if all_live:
            dist.barrier()  # a rank that leaves early closes its sockets under the others
            dist.destroy_process_group()
        writer.send((True, result))
    except BaseException:  # pytest's skip and fail exceptions among them
        writer.send((False, traceback.format_exc()))
