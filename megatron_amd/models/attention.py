"""Attention: Megatron-Core's `core_attention`, with a key-value cache for generation.

Megatron-Core's own attention for plain layers takes neither an additive bias nor a cache whose rows differ in
length. This module takes both, and serves training and generation with the same arithmetic. It is plugged in by
`ModuleSpec`, beside Megatron-Core's local layers and beside Transformer Engine's.

Shapes: b rows, sq query and sk key positions, np query heads and ng key-value heads on this rank, hn numbers a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_amd import distributed  # noqa: F401  (before megatron.core: prepares torch and keeps imports quiet)

# isort: split
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_amd.errors import InputError


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
            attention_bias: [1 or b, np, sq, sk], added to the scores.
            packed_seq_params: must be None.

        Returns:
            [sq, b, np * hn].
        """
        if packed_seq_params is not None:
            raise NotImplementedError("packed sequences are not supported")
        # Heads before positions: [b, np, sq, hn] and [b, ng, sk, hn].
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        # Padding on the right is invisible to causal attention, so the two causal kinds are one.
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        if self.cache is not None:
            key, value, attention_bias, causal = self.cache.extend(key, value, attention_bias)
        elif not causal and attention_mask is not None:
            attention_bias = forbid(attention_mask, attention_bias, query.dtype)
        if causal and attention_bias is not None:
            future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
            attention_bias, causal = forbid(future, attention_bias, query.dtype), False
        context = self._attend(query, key, value, attention_bias, causal)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        """[b, np, sq, hn]."""
        rows, heads, positions, width = query.shape
        groups = key.shape[1]
        if positions == 1 and heads > groups and (bias is None or bias.shape[1] == 1):
            # One query position: the heads of a group become positions of one head, which every kernel can do.
            folded = query.reshape(rows, groups, heads // groups, width)
            attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=self.softmax_scale)
            return attended.reshape(rows, heads, 1, width)
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


class LayerCache:
    """Keys and values of one layer: two buffers [rows, ng, max_length, hn], column j holding position j."""

    def __init__(self, owner: KVCache) -> None:
        self._owner = owner
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Store the keys and values [b, ng, s, hn] of the positions that `KVCache` announced.

        Returns:
            What to attend over: keys and values [b, ng, span, hn], the bias [b, 1, s, span] (None for a prompt
            from position 0) and whether attention is causal by position.
        """
        owner = self._owner
        if self.keys is None or self.values is None:
            shape = (owner.rows, key.shape[1], owner.max_length, key.shape[3])
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        if owner.positions is None:
            self.keys[:, :, : owner.span] = key
            self.values[:, :, : owner.span] = value
            return key, value, bias, True
        rows, columns = owner.row_index, owner.positions
        # Two index tensors around a slice put their own dimensions first: [b, s, ng, hn].
        self.keys[rows, :, columns] = key.transpose(1, 2)
        self.values[rows, :, columns] = value.transpose(1, 2)
        mask = owner.bias(key.dtype)
        return (
            self.keys[:, :, : owner.span],
            self.values[:, :, : owner.span],
            mask if bias is None else bias + mask,
            False,
        )

    def move(self, sources: Tensor, holes: Tensor, rows: int) -> None:
        """Copy rows `sources` over rows `holes`, then keep the first `rows` rows."""
        if self.keys is not None and self.values is not None:
            for buffer in (self.keys, self.values):
                buffer[holes] = buffer[sources]
            self.keys, self.values = self.keys[:rows], self.values[:rows]


class KVCache:
    """Keys and values of every layer of a model stage, for rows of different lengths.

    Before each forward pass the caller announces which positions its tokens have: `start` for prompts, then `step`
    for the tokens after them. Column j of a row always holds position j, so a row's result does not depend on how
    long its neighbours are. Padding behind a short prompt is stored, never visible, and overwritten in time.
    """

    def __init__(self, rows: int, max_length: int) -> None:
        self.rows = rows
        """Rows in use."""
        self.max_length = max_length
        """Positions there is room for."""
        self.span = 0
        """Columns that the coming pass attends over."""
        self.positions: Tensor | None = None
        """int64 [rows, s] of the coming pass; None for prompts, whose positions are 0 to span - 1."""
        self.row_index = torch.arange(rows)[:, None]
        self.layers: list[LayerCache] = []
        self._bias: Tensor | None = None

    def start(self, width: int) -> None:
        """The coming pass holds prompts: positions 0 to width - 1 of every row, shorter prompts padded."""
        self.span, self.positions, self._bias = width, None, None

    def step(self, positions: Tensor, span: int) -> None:
        """The coming pass holds tokens at `positions` [rows, s]; `span` exceeds them all (an int, so that a GPU need
        not be asked)."""
        self.span, self.positions, self._bias = span, positions, None
        if self.row_index.device != positions.device:
            self.row_index = self.row_index.to(positions.device)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """[rows, 1, s, span]: 0 at a position's past and itself, -inf beyond. The same for every layer of a pass."""
        assert self.positions is not None
        if self._bias is None or self._bias.dtype != dtype:
            columns = torch.arange(self.span, device=self.positions.device)
            self._bias = forbid(columns > self.positions[:, None, :, None], None, dtype)
        return self._bias

    def keep(self, alive: Tensor) -> Tensor:
        """Drop the rows where `alive` (bool [rows]) is False. Rows from the end move into the holes.

        Returns:
            int64 [kept]: for each row now, where it was.
        """
        count = int(alive.sum())
        holes = torch.nonzero(~alive[:count]).flatten()
        sources = torch.nonzero(alive[count:]).flatten() + count
        for layer in self.layers:
            layer.move(sources, holes, count)
        order = torch.arange(count, device=alive.device)
        order[holes] = sources
        self.rows, self.row_index, self.positions, self._bias = count, self.row_index[:count], None, None
        return order


@contextmanager
def kv_cache(model: nn.Module, rows: int, max_length: int) -> Iterator[KVCache]:
    """Give every `CoreAttention` of `model` a cache for `rows` sequences of at most `max_length` tokens."""
    cache = KVCache(rows, max_length)
    attentions = [module for module in model.modules() if isinstance(module, CoreAttention)]
    for attention in attentions:
        attention.cache = LayerCache(cache)
        cache.layers.append(attention.cache)
    try:
        yield cache
    finally:
        for attention in attentions:
            attention.cache = None
