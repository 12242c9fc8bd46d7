"""A stand-in for Transformer Engine on a machine without a GPU: its modules' arguments, parameters and mathematics.

Megatron-Core itself is the real one; it is shown this package under the name `transformer_engine`, in a process of its
own, since it looks for it when it is imported. As in Transformer Engine a linear layer under `fp8_autocast` keeps a
cast copy of its weight, made anew only in the first micro-batch: the trap that a rollout may fall into. Tensor
parallelism and the rounding to 8 bits are left out.
"""

from __future__ import annotations

import contextlib
import enum
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECIPES: list[Any] = []
"""The recipes of the `fp8_autocast` contexts that are open."""
FP8_TOKENS: set[int] = set()
"""Numbers of tokens that linear layers have seen under FP8."""


class Linear(nn.Module):
    """y = x W^T, and b where there is one, added or returned."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        params_dtype: Any,
        tp_size: int,
        **_: Any,
    ) -> None:
        assert tp_size == 1
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        init_method(self.weight)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None
        self.return_bias = return_bias
        self.save_original_input = False
        self._cast_weight: Tensor | None = None

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        weight: Tensor = self.weight
        if RECIPES:
            FP8_TOKENS.add(x.shape[:-1].numel())
            if is_first_microbatch or self._cast_weight is None:
                self._cast_weight = weight.detach().clone()
            weight = self._cast_weight
        if self.return_bias:
            return F.linear(x, weight), self.bias
        return F.linear(x, weight, self.bias)


class LayerNormLinear(Linear):
    """A norm, then a linear layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        params_dtype: Any,
        **arguments: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **arguments)
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, dtype=params_dtype))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        if hasattr(self, "layer_norm_bias"):
            x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(x, is_first_microbatch)


class RMSNorm(nn.RMSNorm):
    """Its size has a new name, `normalized_shape`, and an older one."""

    def __init__(
        self, *, normalized_shape: Any = None, hidden_size: Any = None, eps: float, params_dtype: Any, **_: Any
    ) -> None:
        super().__init__(normalized_shape or hidden_size, eps=eps, dtype=params_dtype)


class LayerNorm(nn.LayerNorm):
    """Its size has a new name, `normalized_shape`, and an older one."""

    def __init__(
        self, *, normalized_shape: Any = None, hidden_size: Any = None, eps: float, params_dtype: Any, **_: Any
    ) -> None:
        super().__init__(normalized_shape or hidden_size, eps=eps, dtype=params_dtype)


class NotUsed(nn.Module):
    """A class that Megatron-Core derives from and this project leaves alone."""


class Format(enum.Enum):
    E4M3 = "E4M3"
    HYBRID = "HYBRID"


@dataclass
class Recipe:
    fp8_format: Format
    fp8_dpa: bool = False


class Float8CurrentScaling(Recipe):
    """`tensorwise`."""


class MXFP8BlockScaling(Recipe):
    """`mxfp8`."""


class Float8BlockScaling(Recipe):
    """`blockwise`."""


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    if not enabled:
        yield
        return
    RECIPES.append(fp8_recipe)
    try:
        yield
    finally:
        RECIPES.pop()


def fp8_model_init(enabled: bool = True, recipe: Any = None) -> Any:
    raise NotImplementedError("weights kept in FP8")


def install() -> None:
    """Let `import transformer_engine` find this; before megatron.core is imported."""
    modules = {
        "transformer_engine": {"__version__": "2.6.0"},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {
            "Format": Format,
            "DelayedScaling": NotUsed,
            "Float8CurrentScaling": Float8CurrentScaling,
            "MXFP8BlockScaling": MXFP8BlockScaling,
            "Float8BlockScaling": Float8BlockScaling,
        },
        "transformer_engine.pytorch": {
            "Linear": Linear,
            "LayerNormLinear": LayerNormLinear,
            "RMSNorm": RMSNorm,
            "LayerNorm": LayerNorm,
            "DotProductAttention": NotUsed,
            "GroupedLinear": NotUsed,
            "ops": types.SimpleNamespace(Sequential=NotUsed, FusibleOperation=NotUsed),
            "fp8_autocast": fp8_autocast,
            "fp8_model_init": fp8_model_init,
        },
        "transformer_engine.pytorch.fp8": {
            "FP8GlobalStateManager": NotUsed,
            "fp8_autocast": fp8_autocast,
            "fp8_model_init": fp8_model_init,
        },
        "transformer_engine.pytorch.tensor": {"QuantizedTensor": NotUsed},
        "transformer_engine.pytorch.distributed": {
            "CudaRNGStatesTracker": object,
            "activation_recompute_forward": None,
        },
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__path__ = []  # a package
        vars(module).update(contents)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
