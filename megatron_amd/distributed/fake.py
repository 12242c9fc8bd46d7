"""A world that is not there: process groups without processes and models without memory, for planning a run.

`fake_world` gives this one process the groups of any rank of a world of any size; collectives return at once and
move nothing. `on_meta` makes whatever is built or computed inside it a meta tensor, which has a shape, a type and
strides but no data, wherever the code asks for a GPU or CPU tensor. Both undo what they did.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds, shutdown
from megatron_amd.distributed.layout import Layout, build_layout

# isort: split
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

META = torch.device("meta")


@contextlib.contextmanager
def fake_world(config: Config, world_size: int, rank: int) -> Iterator[Layout]:
    """The layout of `rank` in a world of `world_size` ranks, on the meta device, without any other process.

    `torch.distributed` must not be up; it is not afterwards.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    def gather_from_nobody(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)

    gather, dist.all_gather_object = dist.all_gather_object, gather_from_nobody
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        layout = build_layout(config.parallel, META)
        with torch.random.fork_rng(devices=[]):
            set_seeds(config.run.seed, layout)
            yield layout
    finally:
        dist.all_gather_object = gather
        get_cuda_rng_tracker().reset()
        shutdown()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Make every new tensor a meta tensor, whichever device the code names; collectives on them do nothing."""
    with _MetaFactories(), _SilentCollectives():
        yield


class _MetaFactories(TorchFunctionMode):
    """Sends factories and moves between devices to the meta device, and attention to a kernel that can follow."""

    def __init__(self) -> None:
        super().__init__()
        self._factories = _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._factories or kwargs.get("device") is not None:
            kwargs["device"] = META
        if func in (Tensor.cuda, Tensor.cpu):
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:  # Megatron-Core's optimizers know CUDA's names
            return func(*args).replace("meta.", "cuda." if torch.cuda.is_available() else "")
        if func is Tensor.to:
            args = tuple(META if isinstance(a, (torch.device, str)) or type(a) is int else a for a in args)
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            # PyTorch's choice on meta tensors is the kernel that keeps the [S, S] scores, which none is chosen for
            # on a GPU or CPU. This one keeps query, key, value, output and one number a row, as all flash kernels do.
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return attend(*args[:3], is_causal=kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


class _SilentCollectives(TorchDispatchMode):
    """Hands collectives on meta tensors, for which PyTorch has no kernel, to the fake groups as if from a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the context that are alive, and the most there ever were.

    Views share their storage and count once. What a tensor's storage holds counts from its making to the end of its
    last reference, autograd's among them, as a caching allocator would see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result
