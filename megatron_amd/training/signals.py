"""SIGINT and SIGTERM: finish the step, save, leave. All ranks stop at the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_amd.distributed.layout import Layout


class StopSignals:
    """Remembers a signal that arrives while the context is open.

    A second SIGINT ends the process at once: somebody does not want to wait. Further SIGTERMs change nothing, since
    one request may come more than once: Slurm signals every process of a job, and torchrun passes its own on.
    """

    def __init__(self, layout: Layout) -> None:
        self._device = layout.device
        self._received = 0
        self._previous: dict[int, Any] = {}
        self.signal: int | None = None
        """The signal that all ranks have agreed on."""

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether any rank has received a signal. Collective."""
        received = torch.tensor([self._received], dtype=torch.int64, device=self._device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        self.signal = int(received.item()) or None
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # not Python's handler, which a waiting collective would hold up
