"""Attention: Megatron-Core's `core_attention`, with a key-value cache for generation.

Megatron-Core's own attention for plain layers takes neither an additive bias nor a cache whose rows differ in
length. This module takes both, and serves training and generation with the same arithmetic. It is plugged in by
`ModuleSpec`, beside Megatron-Core's local layers and beside Transformer Engine's.

Shapes: b rows, sq query and sk key positions, np query heads and ng key-value heads on this rank, hn numbers a head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_amd import distributed  # noqa: F401  (before megatron.core: prepares torch and keeps imports quiet)

# isort: split
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_amd.errors import InputError
from megatron_amd.models.kv_cache import Bundle, LayerCache, Segment

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
"""Padding on the right is invisible to causal attention, so the two are one."""


class CoreAttention(MegatronModule):
    """softmax(scale * q k^T + bias) v, by PyTorch's `scaled_dot_product_attention`.

    Sequences are padded on the right, so a causal model needs no mask tensor: padding is never visible to a real
    position. Query heads share key-value heads (GQA) when ng < np.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        """Called by Megatron-Core's `Attention`.

        Raises:
            InputError: the configuration asks for a kind of attention that is not implemented here.
        """
        super().__init__(config=config)
        unsupported = {
            "context_parallel_size": config.context_parallel_size != 1,
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
            "attention_dropout": bool(config.attention_dropout if attention_dropout is None else attention_dropout),
        }
        for name, asked in unsupported.items():
            if asked:
                raise InputError(f"transformer.{name}={getattr(config, name)} is not supported: leave it out")
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        # Megatron-Core's config divides the scores by the layer's number, for fp16, and multiplies them back inside
        # its fp32 softmax. Our softmax is fp32 throughout, so the two cancel and the scale stays as it is.
        self.cache: LayerCache | None = None
        self.takes_cache = attention_type == "cross" or attn_mask_type in _CAUSAL  # an encoder reads a prompt at once

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, np, hn].
            key: [sk, b, ng, hn].
            value: [sk, b, ng, hn].
            attention_mask: bool, broadcastable to [b, np, sq, sk], True where attention is forbidden (Megatron's
                convention). Read only when attention is not causal.
            attn_mask_type: overrides the module's own mask type.
            attention_bias: [1 or b, np, sq, sk], added to the scores. With a cache: [1, np, T, columns].
            packed_seq_params: must be None.

        Returns:
            [sq, b, np * hn].

        With a cache, b is 1 and the T = sq tokens are those of a flat pass (kv_cache.py); keys and values of
        cross-attention are those of the prompts that the pass reads.
        """
        if packed_seq_params is not None:
            raise NotImplementedError("packed sequences are not supported")
        if self.cache is not None and self.attention_type == "cross":
            return self._attend_prompts(query[:, 0], key, value).unsqueeze(1)
        if self.cache is not None:
            grouped, pairs = query[:, 0].unflatten(1, (key.shape[2], -1)), torch.stack([key[:, 0], value[:, 0]], dim=2)
            return self.attend_cached(grouped, pairs, attention_bias).unsqueeze(1)
        # Heads before positions: [b, np, sq, hn] and [b, ng, sk, hn].
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        trained_bias = attention_bias is not None
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        if not causal and attention_mask is not None:
            attention_bias = forbid(attention_mask, attention_bias, query.dtype)
        if causal and attention_bias is not None:
            future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
            attention_bias, causal = forbid(future, attention_bias, query.dtype), False
        # A CPU has one kernel that trains a bias and a faster one that does not: passes with and without gradients take
        # the same, so that two equal models have equal states.
        only = sdpa_kernel(SDPBackend.MATH) if trained_bias and not query.is_cuda else nullcontext()
        with only:
            context = self._attend(query, key, value, attention_bias, causal)
        return context.permute(2, 0, 1, 3).flatten(2)

    def attend_cached(self, query: Tensor, pairs: Tensor, bias: Tensor | None = None) -> Tensor:
        """Each token of a flat pass over its own row's past.

        Args:
            query: [T, ng, np / ng, hn], of the heads of each group.
            pairs: [T, ng, 2, hn], each group's key and value.
            bias: [1, np, T, columns], added to the scores.

        Returns:
            [T, np * hn].
        """
        assert self.cache is not None
        owner = self.cache.owner
        keys, values = self.cache.store(pairs)
        decoded = self._decode(query[: owner.decoding], keys, values, bias) if owner.decoding else None
        if decoded is not None and len(decoded) == len(query):
            return decoded
        context = query.new_zeros(len(query), query.shape[1] * query.shape[2] * query.shape[3])
        if decoded is not None:
            context[: len(decoded)] = decoded
        first = owner.decoding
        for piece in owner.bundles if bias is None else owner.segments:
            part = slice(first, first + piece.length)
            if isinstance(piece, Bundle):
                context[part] = self._read_bundle(piece, query, keys, values)
            else:
                own_bias = None if bias is None else bias[:, :, part, : piece.start + piece.length]
                context[part] = self._read_segment(piece, query[part], keys, values, own_bias)
            first += piece.length
        return context

    def _attend_prompts(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each token of a flat pass over its own row's prompt: cross-attention.

        Args:
            query: [T, np, hn].
            key: [S_e, n, np, hn], of the n prompts that the pass reads.
            value: [S_e, n, np, hn].

        Returns:
            [T, np * hn].
        """
        assert self.cache is not None
        owner = self.cache.owner
        keys, values = self.cache.store_prompts(key, value)
        count, rows = owner.decoding, owner.row_index[: owner.decoding]
        by_row = query.new_zeros(owner.first_rows, *query.shape[1:]).index_copy_(0, rows, query[:count])
        found = self._attend(by_row.unsqueeze(2), keys, values, owner.prompt_bias(query.dtype), causal=False)
        context = query.new_zeros(len(query), query.shape[1] * query.shape[2])  # fillers have no prompt
        context[:count] = found[rows].flatten(1)
        return context

    def _read_bundle(self, bundle: Bundle, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[tokens of the bundle, np * hn]: several prompts from their beginning."""
        found = self._attend(
            query[bundle.places].flatten(2, 3).transpose(1, 2),
            keys[bundle.rows, :, : bundle.longest],
            values[bundle.rows, :, : bundle.longest],
            None,
            causal=True,
        )
        return found.transpose(1, 2).flatten(2).flatten(0, 1)[bundle.real]

    def _read_segment(
        self, segment: Segment, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        """[tokens of the segment, np * hn]. bias: [1, np, tokens of the segment, positions up to its end]."""
        row, start, length = segment
        end = start + length
        if start or bias is not None:
            future = torch.ones(length, end, dtype=torch.bool, device=query.device).triu(start + 1)
            bias = forbid(future, bias, query.dtype)
        found = self._attend(
            query.flatten(1, 2).transpose(0, 1).unsqueeze(0),
            keys[row, :, :end].unsqueeze(0),
            values[row, :, :end].unsqueeze(0),
            bias,
            causal=bias is None,
        )
        return found[0].transpose(0, 1).flatten(1)

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """[D, np * hn]: of the rows that decode, one position each."""
        assert self.cache is not None
        owner = self.cache.owner
        count, (_, groups, per_group, width) = owner.decoding, query.shape
        rows = owner.row_index[:count]
        mask = owner.bias(query.dtype)  # [first_rows, 1, 1, span]
        if bias is not None:
            own = bias[0, :, :count, : owner.span].transpose(0, 1).view(count, groups, per_group, owner.span)
            mask = mask + own.new_zeros(owner.first_rows, *own.shape[1:]).index_copy_(0, rows, own)
        if not owner.in_order:
            query = query.new_zeros(owner.first_rows, groups, per_group, width).index_copy_(0, rows, query)
        query = query.contiguous()  # strided queries take the kernel's slow way
        # The heads of a group as positions of one head, which every kernel can do.
        blocks = [
            F.scaled_dot_product_attention(
                query[block],
                keys[block, :, :span],
                values[block, :, :span],
                attn_mask=mask[block, ..., :span],
                scale=self.softmax_scale,
            )
            for block, span in owner.blocks
        ]
        found = (torch.cat(blocks) if len(blocks) > 1 else blocks[0]).flatten(1)
        return found if owner.in_order else found[rows]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        """[b, np, sq, hn]."""
        heads, groups = query.shape[1], key.shape[1]
        if heads > groups and query.is_cuda and (bias is not None or query.dtype == torch.float32):
            # On a GPU only the flash kernel shares keys between heads, and it takes neither a bias nor fp32.
            key, value = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=heads > key.shape[1],
        )


def forbid(forbidden: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Additive bias that is `bias` (or 0) where attention is allowed and -inf where it is forbidden."""
    if bias is None:
        bias = torch.zeros((), dtype=dtype, device=forbidden.device)
    return bias.to(dtype).masked_fill(forbidden, float("-inf"))
