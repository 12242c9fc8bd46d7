"""Megatron-Core on a machine without a GPU: the names of `torch.cuda` that it uses, mapped to the CPU.

Megatron-Core asks for the current CUDA device, CUDA streams, CUDA generator states and `device="cuda"` without
asking whether they exist. Where CUDA is absent these names lead nowhere, so giving them a meaning takes nothing from
anybody: a program that does not ask for CUDA sees no difference. Where CUDA is present nothing is changed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "linspace", "ones", "ones_like", "rand", "randint", "randn",
    "tensor", "zeros", "zeros_like",
)  # fmt: skip
_installed = False


class _Stream:
    """A stream or event of a device that does everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    wait_event = synchronize = record = wait = lambda self, *args: None

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def install_where_cuda_is_absent() -> None:
    """Map the names, once, unless CUDA is there."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _map_torch_cuda()
    _map_factories()
    _map_tensor_methods()


def map_rng_state_of_megatron() -> None:
    """Let Megatron-Core's random-state tracker keep states of the CPU generator."""
    if not _installed:
        return
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _map_torch_cuda() -> None:
    def doing(action: Callable[..., Any]) -> Callable[..., Any]:
        # A function of its own for each name: torch._dynamo refuses one object that stands under two names.
        return lambda *args, **kwargs: action(*args, **kwargs)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    cuda: Any = torch.cuda
    for name in ("synchronize", "set_device", "empty_cache", "ipc_collect", "manual_seed_all"):
        setattr(cuda, name, doing(nothing))  # torch.manual_seed calls manual_seed_all after seeding the CPU itself
    cuda.manual_seed = manual_seed
    for module in (cuda, cuda.random):
        module.get_rng_state = doing(get_rng_state)
        module.set_rng_state = doing(set_rng_state)
    cuda.current_device = lambda: _CPU
    cuda.Stream, cuda.Event = _Stream, type("_Event", (_Stream,), {})
    cuda.current_stream = lambda device=None: _Stream()
    cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = doing(nothing), doing(nothing)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _map_factories() -> None:
    """`torch.zeros(..., device="cuda")` and its relatives make a CPU tensor."""

    def mapped(factory: Any) -> Any:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return make

    # torch lists the factories that `with torch.device(...)` acts on when it is first asked; the list must hold the
    # originals, which the mapped ones call.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, mapped(getattr(torch, name)))


def _map_tensor_methods() -> None:
    to, type_ = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(to)
    def mapped_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    @functools.wraps(type_)
    def mapped_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_(self, *args, **kwargs)
        if args or kwargs or not isinstance(result, str):
            return result
        # Megatron-Core's optimizers sort parameters by this name and know only the CUDA ones.
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return result.replace("torch.", "torch.cuda.", 1) if asker.startswith("megatron.core.") else result

    tensor: Any = torch.Tensor
    tensor.to = mapped_to
    tensor.type = mapped_type
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
