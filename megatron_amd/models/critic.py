"""The Q-value functions f_1 (teacher states) and f_2 (student states): one model, two vocabulary-wide heads.

What a head reads depends on `critic.features`: the states of a trunk of the critic's own, of the teacher, or of
teacher and student both (a `pair`: the teacher's part minus the student's). How raw values become f is in
objectives/heads.py and blocks.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_amd.distributed.layout import Layout

# isort: split
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_amd.models.gpt import CausalLM
from megatron_amd.models.t5 import EncoderDecoderLM

SIGNS = {"own": 1.0, "teacher": 1.0, "student": -1.0}
"""How a head's part enters the raw value, by the model whose states it reads."""


class _TwoHeads(torch.nn.Module):
    """A critic with a trunk of its own: a language model whose output layer is f_1's head, and a second one for f_2."""

    config: TransformerConfig
    pg_collection: Any
    post_process: bool
    vocab_size: int
    output_layer: ColumnParallelLinear

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tp_group = self.pg_collection.tp
        if self.post_process:
            self.output_layer_on = vocabulary_head(
                self.config, self.config.hidden_size, self.vocab_size, self.pg_collection.tp
            )

    def head_weights(self, on_policy: bool) -> dict[str, Tensor]:
        """{"own": [V_local, H]} of f_2 (`on_policy`) or f_1."""
        return {"own": self.output_layer_on.weight if on_policy else self.output_layer.weight}


class CausalCritic(_TwoHeads, CausalLM):
    """With a decoder-only trunk."""


class EncoderDecoderCritic(_TwoHeads, EncoderDecoderLM):
    """With a T5 trunk; its heads sit on the decoder's states."""


TrunkCritic = CausalCritic | EncoderDecoderCritic


class HeadCritic(MegatronModule):
    """A critic that is only heads, on the final states of the teacher or of teacher and student.

    It lives on the last pipeline stage; on the others it has no parameters.
    """

    def __init__(
        self, config: TransformerConfig, hidden_sizes: dict[str, int], padded_vocab_size: int, layout: Layout
    ) -> None:
        """`hidden_sizes` gives the width of each model that the heads read: {"teacher": ..., "student": ...}."""
        super().__init__(config)
        self.tp_group = layout.groups.tp

        def heads() -> torch.nn.ModuleDict:
            return torch.nn.ModuleDict(
                {
                    source: vocabulary_head(config, width, padded_vocab_size, layout.groups.tp)
                    for source, width in hidden_sizes.items()
                    if layout.is_last_stage
                }
            )

        self.off, self.on = heads(), heads()

    def head_weights(self, on_policy: bool) -> dict[str, Tensor]:
        """{"teacher": [V_local, H_teacher], "student": [V_local, H_student]} (or the first alone) of f_2 or f_1."""
        heads = self.on if on_policy else self.off
        return {source: head.weight for source, head in heads.items()}  # type: ignore[misc]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The heads for `dist_checkpointing`, whose default takes what is in a ModuleDict for unsplit."""
        shards: dict[str, Any] = {}
        for name, heads in (("off", self.off), ("on", self.on)):
            for source, head in heads.items():
                shards |= head.sharded_state_dict(f"{prefix}{name}.{source}.", sharded_offsets, metadata)  # type: ignore[operator]
        return shards


def vocabulary_head(
    config: TransformerConfig, hidden_size: int, padded_vocab_size: int, tp_group: Any
) -> ColumnParallelLinear:
    """A head over the vocabulary, split by rows over the tensor-parallel group."""
    return ColumnParallelLinear(
        hidden_size,
        padded_vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=tp_group,
    )
