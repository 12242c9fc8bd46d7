"""Passes in which every row writes, as CUDA graphs: what they ask of the GPU, recorded once and repeated by one call.

A step of a generation is some hundred small operations, and a GPU is done with each before the host has asked for the
next. A graph's shapes and addresses are fixed, so there is one for each number of rows, a power of two, and each number
of columns that attention looks at, a multiple of 128. Rows that are free take part at position 0 of their own, where
nothing is. On a CPU the same passes are computed each time.

Shapes: R rows of a graph, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_amd.models.gpt import CausalLM
from megatron_amd.models.kv_cache import KVCache
from megatron_amd.models.lean import LeanLayer, lean_forward

_COLUMNS = 128


class DecodeGraphs:
    """The layers of a stage, for passes over one cache in which every row decodes.

    They hold the addresses of weights and cache, so they last as long as one generation.
    """

    def __init__(self, model: CausalLM, layers: Sequence[LeanLayer], cache: KVCache) -> None:
        self._model, self._layers, self._cache = model, layers, cache
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._memory: Any = None  # one pool for all graphs: they never run at once

    def rows(self, decoding: Sequence[tuple[int, int]]) -> int:
        """R of a pass in which these (row, position) decode and nothing else happens; 0: they are not the first."""
        count = len(decoding)
        if not count or any(row != place for place, (row, _) in enumerate(decoding)):
            return 0
        return min(1 << (count - 1).bit_length(), self._cache.rows)

    def run(self, hidden: Tensor) -> Tensor:
        """The pass that the cache expects, in which rows 0 to R - 1 decode.

        Args:
            hidden: [R, 1, H] of the embedding or of the stage before.

        Returns:
            [R, 1, H], which the next call overwrites.
        """
        columns = min(-(-self._cache.span // _COLUMNS) * _COLUMNS, self._cache.max_length)
        graph = self._graphs.get((len(hidden), columns))
        if graph is None:
            graph = self._graphs[len(hidden), columns] = _Graph(self._cache, hidden, columns)
        graph.hidden.copy_(hidden)
        graph.positions.copy_(self._cache.positions)
        if hidden.device.type != "cuda":
            return self._compute(graph)
        if graph.recorded is None:
            self._record(graph)
        assert graph.recorded is not None
        graph.recorded.replay()
        return graph.output

    def _compute(self, graph: _Graph) -> Tensor:
        graph.view.renew()
        with graph.view.attached():
            return lean_forward(self._model, self._layers, graph.hidden, graph.positions)

    def _record(self, graph: _Graph) -> None:
        stream = _stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once as usual: what a first call makes must not be made in a recording
            self._compute(graph)
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        # NCCL's watchdog asks for events from a thread of its own, which only this mode allows.
        with torch.cuda.graph(recorded, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            graph.output = self._compute(graph)
        graph.recorded = recorded


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream()


class _Graph:
    """Where one graph's numbers are."""

    def __init__(self, cache: KVCache, hidden: Tensor, columns: int) -> None:
        self.hidden = torch.empty_like(hidden)
        self.positions = cache.positions.clone()
        self.view = cache.fixed_view(len(hidden), columns, self.positions)
        self.output = self.hidden
        self.recorded: torch.cuda.CUDAGraph | None = None
