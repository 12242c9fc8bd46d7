"""A world that is not there: process groups without processes and models without memory, for planning a run.

`fake_world` gives this one process the groups of any rank of a world of any size; collectives return at once and
move nothing. `on_meta` makes whatever is built or computed inside it a meta tensor, which has a shape and a type but
no data, whichever device the code names. `LiveBytes` counts what such a computation would have allocated.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds, shutdown
from megatron_amd.distributed.layout import Layout, build_layout

# isort: split
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

META = torch.device("meta")
_FROM_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@contextlib.contextmanager
def fake_world(config: Config, world_size: int, rank: int) -> Iterator[Layout]:
    """The layout of `rank` among `world_size` ranks, on the meta device, without any other process.

    `torch.distributed` must not be up; it is not afterwards, and the random state is as before.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import makes the backend "fake" known

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        layout = build_layout(config.parallel, META)
        with torch.random.fork_rng(devices=[]):
            set_seeds(config.run.seed, layout)
            yield layout
    finally:
        get_cuda_rng_tracker().reset()
        shutdown()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Make every new tensor a meta tensor. Belongs inside a `fake_world`.

    Until the end some functions are replaced: one that cannot gather from nobody, one that names types in a way that
    Megatron-Core's optimizers do not know, and two for which PyTorch has fused kernels on a GPU but which it takes
    apart on meta tensors: that would show memory that a GPU does not need ([S, S] scores, fp32 copies in RMSNorm).
    """
    named_type: Any = Tensor.type

    def gather_from_nobody(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)

    def type_as_if_real(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = named_type(self, *args, **kwargs)
        return f"torch.cuda.{name.rpartition('.')[2]}" if isinstance(name, str) else name

    with (
        _replaced(dist, "all_gather_object", gather_from_nobody),
        _replaced(Tensor, "type", type_as_if_real),
        _replaced(F, "scaled_dot_product_attention", _flash_attention),
        _replaced(F, "rms_norm", _fused_norm),
        _MetaTensors(),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Keeps query, key, value, output and one number a row for the backward pass.

    Where only the plain kernel is allowed (a CPU's for T5's trained bias, models/attention.py) the scores are made as
    well; a GPU's kernels make fewer.
    """
    if not torch.backends.cuda.flash_sdp_enabled():
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, scale=scale)[0]  # type: ignore[no-any-return]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, is_causal=is_causal, attn_mask=attn_mask, scale=scale)[0]


def _fused_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """LayerNorm in RMSNorm's place: has the same shapes, and keeps its input and a number or two for each row."""
    return torch.layer_norm(input, normalized_shape, weight, None, eps or 0.0)


class _MetaTensors(TorchDispatchMode):
    """Sends what is made for or moved to any device to the meta device; runs collectives, for which PyTorch has no
    meta kernel, on the fake groups as if from a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return func.redispatch(_FROM_CPU, *args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...)
            return torch.empty_like(args[0], device=META)
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the context that are alive, and the most there ever were.

    Views share their storage, which counts once, from its making to the end of its last reference, autograd's among
    them: what an allocator without fragmentation would hold. Kernels' own scratch memory is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at once."""
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in given:  # else a view, or changed in place
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def forget(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
