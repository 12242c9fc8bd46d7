"""The forward pass of a stage without gradients, on the weights where they are, for passes of few tokens.

A token's way through Megatron-Core's local layers takes longer in Python and in small operations than in its matrix
products: autograd functions around every product, angles made anew in every layer. Generation takes this way instead.
It is the same arithmetic (tests/distributed/test_generate.py holds it against the modules) on the modules' own
parameters, those of Megatron-Core's local layers or of Transformer Engine's. FP8, and settings that change what a layer
computes, keep the modules: `lean_layers` says which stages can go this way.

Shapes: T tokens of a flat pass (kv_cache.py), H hidden size, np query heads and ng key-value heads on this rank, hn
numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_amd import distributed  # noqa: F401  (before megatron.core: prepares torch and keeps imports quiet)

# isort: split
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_amd.models.attention import CoreAttention
from megatron_amd.models.gpt import CausalLM

_PLAIN: dict[str, Any] = {
    "fp8": None, "fp4": None, "fp32_residual_connection": False, "apply_residual_connection_post_layernorm": False,
    "layernorm_zero_centered_gamma": False, "activation_func_clamp_value": None, "glu_linear_offset": 0.0,
    "rotary_interleaved": False, "multi_latent_attention": False, "attention_output_gate": False, "qk_clip": False,
    "use_te_activation_func": False, "no_rope_freq": None, "num_moe_experts": None, "enable_hyper_connections": False,
    "experimental_attention_variant": None, "cpu_offloading": False,
}  # fmt: skip
"""Fields of TransformerConfig that change what a layer computes, and their values here."""
_LINEAR = ("megatron.core.tensor_parallel", "megatron.core.extensions.transformer_engine")
"""Modules whose linear layers are a product with `weight` and `bias`, and perhaps a norm before it."""
_PACKED_TOKENS = 1024
"""Tokens up to which a CPU's products with a packed weight are the faster ones."""

Norm = Callable[[Tensor], Tensor]


class LeanLayer:
    """One transformer layer: its parameters as they are now, without the modules around them. pack: see `Product`."""

    def __init__(self, layer: TransformerLayer, pack: bool) -> None:
        attention, mlp, config = layer.self_attention, layer.mlp, layer.config
        self.core: CoreAttention = attention.core_attention
        self.groups: int = attention.num_query_groups_per_partition
        self.head_width: int = config.kv_channels
        self.norms = (
            _norm_before(attention.linear_qkv, layer.input_layernorm),
            _norm_before(mlp.linear_fc1, layer.pre_mlp_layernorm),
        )
        self.head_norms: tuple[Norm, Norm] | None = None
        if config.qk_layernorm:
            self.head_norms = (_norm(attention.q_layernorm), _norm(attention.k_layernorm))
        self.qkv, self.proj, self.fc1, self.fc2 = (
            Product(linear.weight, _bias(linear), pack=pack)
            for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        )
        self.gated: bool = config.gated_linear_unit
        self.activation: Callable[[Tensor], Tensor] = config.activation_func
        tp_group: dist.ProcessGroup = attention.pg_collection.tp
        self.group = tp_group if tp_group.size() > 1 else None

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """[T, H] -> [T, H]. angles: cosines and sines [T, 1, 1, hn], the sines of the first half negative."""
        # In each group the queries of its heads, one key, one value.
        mixed = self.qkv(self.norms[0](hidden)).reshape(hidden.shape[0], self.groups, -1, self.head_width)
        if self.head_norms is not None:
            for heads, norm in zip((mixed[:, :, :-2], mixed[:, :, -2:-1]), self.head_norms, strict=True):
                heads.copy_(norm(heads))
        if angles is not None:
            turning = mixed[:, :, :-1]
            swapped = turning.roll(self.head_width // 2, -1)
            turning.mul_(angles[0]).addcmul_(swapped, angles[1])
        context = self.core.attend_cached(mixed[:, :, :-2], mixed[:, :, -2:])
        hidden = self._add(hidden, context, self.proj)
        between = self.fc1(self.norms[1](hidden))
        if self.gated:
            gate, up = between.chunk(2, dim=-1)
            between = self.activation(gate).mul_(up)
        else:
            between = self.activation(between)
        return self._add(hidden, between, self.fc2)

    def _add(self, hidden: Tensor, inputs: Tensor, linear: Product) -> Tensor:
        """hidden plus the product with a weight whose columns are split over the group."""
        if self.group is None:
            return linear(inputs, hidden)
        output = linear(inputs, with_bias=False)
        dist.all_reduce(output, group=self.group)
        return hidden + (output if linear.bias is None else output + linear.bias)


class Product:
    """Products of tokens with one weight [N, K], and its bias [N].

    pack: keep a copy of the weight in the order in which the CPU's kernels read it. It is made at once, takes as long
    as a few products with few tokens, and saves up to half of each; where oneDNN does not do this, there is none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool) -> None:
        self.weight, self.bias = weight.detach(), bias
        self._packed: Tensor | None = None
        if pack and weight.device.type == "cpu" and _can_pack(weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PACKED_TOKENS)

    def __call__(self, inputs: Tensor, added: Tensor | None = None, *, with_bias: bool = True) -> Tensor:
        """[T, K] -> [T, N], plus `added` [T, N]."""
        bias = self.bias if with_bias else None
        if self._packed is not None and len(inputs) <= _PACKED_TOKENS:
            if added is None:
                return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, bias, "none", [], "")  # type: ignore[no-any-return]
            return torch.ops.mkldnn._linear_pointwise.binary(inputs, added, self._packed, bias, "add")  # type: ignore[no-any-return]
        if added is None:
            return F.linear(inputs, self.weight, bias)
        output = torch.addmm(added, inputs, self.weight.t())
        return output if bias is None else output.add_(bias)


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this type on this machine's CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _bias(linear: nn.Module) -> Tensor | None:
    """Where there is none, Transformer Engine has an empty tensor."""
    bias: Any = linear.bias
    return bias if bias is not None and bias.numel() else None


def _norm(module: nn.Module) -> Norm:
    """A norm module, RMSNorm without what calling a module costs."""
    if type(module) is not nn.RMSNorm:
        return module
    return partial(_rms_norm, list(module.normalized_shape), module.weight, module.eps)


def _norm_before(linear: Any, module: nn.Module) -> Norm:
    """The norm of a product's inputs: inside the linear layer, as Transformer Engine has it, or the module."""
    scale, shift = (getattr(linear, f"layer_norm_{name}", None) for name in ("weight", "bias"))
    if scale is None:
        return _norm(module)
    if shift is None:
        return partial(_rms_norm, list(scale.shape), scale, linear.eps)
    return partial(F.layer_norm, normalized_shape=list(scale.shape), weight=scale, bias=shift, eps=linear.eps)


def _rms_norm(shape: list[int], weight: Tensor, eps: float | None, inputs: Tensor) -> Tensor:
    return torch.rms_norm(inputs, shape, weight, eps)


def lean_layers(model: LanguageModule, *, pack: bool = False) -> list[LeanLayer] | None:
    """The stage's layers for `lean_forward`; None where only the modules will do. pack: see `Product`."""
    config = model.config
    if not isinstance(model, CausalLM):
        return None
    if any(getattr(config, name, plain) != plain for name, plain in _PLAIN.items()):
        return None
    layers: Sequence[TransformerLayer] = model.decoder.layers
    return [LeanLayer(layer, pack) for layer in layers] if all(map(_is_plain, layers)) else None


def _is_plain(layer: TransformerLayer) -> bool:
    """Self-attention and a dense feed-forward network, of Megatron-Core's or Transformer Engine's linear layers, with
    norms of queries and keys where the config has them."""
    attention = layer.self_attention
    return (
        isinstance(layer.cross_attention, IdentityOp)
        and isinstance(attention.core_attention, CoreAttention)
        and type(layer.mlp) is MLP
        and all(
            (norm is not None and not isinstance(norm, IdentityOp)) == attention.config.qk_layernorm
            for norm in (attention.q_layernorm, attention.k_layernorm)
        )
        and type(attention.linear_qkv).__module__.startswith(_LINEAR)
        and attention.config.num_query_groups % attention.pg_collection.tp.size() == 0
    )


def lean_forward(model: CausalLM, layers: Sequence[LeanLayer], hidden: Tensor, positions: Tensor) -> Tensor:
    """What the layers of `model` and its final norm make of a flat pass whose cache is attached.

    Args:
        hidden: [T, 1, H] of the embedding or of the stage before.
        positions: int64 [T].

    Returns:
        [T, 1, H], on the last stage after the final norm.
    """
    hidden = hidden[:, 0]
    angles = model.rotary_angles(positions[None])
    turned = None
    if angles is not None:  # [T, 1, 1, hn]
        cosines, sines = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        sines[..., : sines.shape[-1] // 2].neg_()
        turned = (cosines, sines)
    for layer in layers:
        hidden = layer.forward(hidden, turned)
    if model.post_process:
        hidden = model.decoder.final_layernorm(hidden)
    return hidden.unsqueeze(1).contiguous()  # which may be sent to the next stage
