"""An encoder-decoder model that ends at the decoder's final hidden states, under every layout.

Ordinary pipeline schedules send one tensor from stage to stage. Here it is the encoder's hidden states and, behind them
along the sequence, the decoder's. The first stage makes both from the embedding; stages with encoder layers work on the
first part, stages with decoder layers on the second with cross-attention to the first, and each hands on both. Any
split of the encoder's and decoder's layers over stages is possible, one stage may have some of each.

Under sequence parallelism each part is split over the tensor-parallel ranks by itself.

Shapes: b sequences, S_e encoder and S_d decoder tokens, H hidden size, np heads on this rank. In a pass of a generation
T tokens of the decoder, n prompts of up to S_e tokens.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amd import distributed  # noqa: F401  (before megatron.core: prepares torch and keeps imports quiet)

# isort: split
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_amd.distributed.layout import Layout
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.kv_cache import KVCache
from megatron_amd.models.layer_specs import Implementation, decoder_block_spec, encoder_block_spec


class EncoderDecoderLM(LanguageModule):
    """T5, of parts of Megatron-Core. Prompts go into the encoder, responses come out of the decoder.

    Args:
        config: the role's; its `num_layers` are the encoder's and the decoder's together.
        architecture: sizes.
        implementation: of the layers.
        vocab_size: rows of the embedding and the head, padding included.
        pg_collection: process groups; the place in `pp` decides which layers are here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        implementation: Implementation,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, pg_collection)
        self.model_type = ModelType.encoder_or_decoder  # as far as schedules see: one tensor between stages
        stages, stage = pg_collection.pp.size(), pg_collection.pp.rank()
        self.pre_process, self.post_process = stage == 0, stage == stages - 1
        self.vocab_size = vocab_size
        self.share_embeddings_and_output_weights = architecture.tied
        self.max_sequence_length = architecture.max_position_embeddings
        assert architecture.decoder_start_id is not None
        self.decoder_start_id = architecture.decoder_start_id
        self.output_scale = architecture.output_scale
        self._buckets = architecture.relative_buckets
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, self.max_sequence_length, position_embedding_type="none", tp_group=self.tp_group
            )
        encoder, decoder = stage_layers(architecture, stages, stage)
        self._layer_numbers = [*encoder, *(architecture.encoder_layers + number for number in decoder)]
        self.encoder = self.decoder = self.encoder_bias = self.decoder_bias = None
        if encoder:
            spec = encoder_block_spec(config, implementation, len(encoder))
            self.encoder = LayerStack(config, spec, encoder, architecture.encoder_layers, pg_collection)
            self.encoder_bias = RelativeBias(
                config, architecture, pg_collection, bidirectional=True, is_copy=encoder.start > 0
            )
        if decoder:
            spec = decoder_block_spec(config, implementation, len(decoder))
            self.decoder = LayerStack(config, spec, decoder, architecture.num_layers, pg_collection)
            self.decoder_bias = RelativeBias(
                config, architecture, pg_collection, bidirectional=False, is_copy=decoder.start > 0
            )
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.tp_group,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """What the stage before has sent, handed in by the schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, tokens: Tensor, prompt_lengths: Tensor, prompt_width: int) -> Tensor:
        """One pipeline stage.

        Args:
            tokens: int64 [b, S_e + S_d], the encoder's and then the decoder's; used on the first stage, its shape on
                all.
            prompt_lengths: int64 [b], of the encoder's tokens.
            prompt_width: S_e.

        Returns:
            [S_e + S_d, b, H] for the next stage; on the last [S_d, b, H] after the final norm. Under sequence
            parallelism this rank's part of each.
        """
        widths = [prompt_width, tokens.shape[1] - prompt_width]
        if self.pre_process:
            encoded, decoded = (self.embedding(part, None) for part in tokens.split(widths, dim=1))
        else:
            ranks = self.tp_group.size() if self.config.sequence_parallel else 1
            encoded, decoded = self.input_tensor.split([width // ranks for width in widths])
        hidden = padding_mask(prompt_lengths, prompt_width)
        if self.encoder is not None:
            encoded = self._encode(encoded, hidden)
        if self.decoder is not None and self.decoder_bias is not None:
            columns = torch.arange(widths[1], device=tokens.device)
            decoded = self.decoder(
                decoded,
                attention_mask=None,
                context=encoded,
                context_mask=hidden,
                attention_bias=self.decoder_bias(columns, columns),
            )
        return decoded * self.output_scale if self.post_process else torch.cat([encoded, decoded])

    def flat_pass(self, tokens: Tensor, cache: KVCache, received: Tensor | None) -> Tensor:
        """One stage of a pass of a generation, whose cache is attached.

        Args:
            tokens: int64 [T] of the decoder.
            cache: with what the pass holds: prompts to be read [n, S_e], the rows they and the tokens belong to.
            received: of the stage before; None on the first.

        Returns:
            [S_e * n + T, 1, H], the prompts first, position by position; on the last stage [T, 1, H].
        """
        count, width = cache.prompts.shape
        if received is None:
            decoded = self.embedding(tokens[None], None)
            encoded = self.embedding(cache.prompts, None) if count else decoded[:0]
        else:
            encoded, decoded = received.split([width * count, len(tokens)])
            encoded = encoded.view(width, count, -1) if count else encoded
        if count and self.encoder is not None:
            encoded = self._encode(encoded, padding_mask(cache.new_lengths, width))
        if self.decoder is not None and self.decoder_bias is not None:
            bias = self.decoder_bias(cache.positions, torch.arange(cache.max_length, device=tokens.device))
            decoded = self.decoder(decoded, attention_mask=None, context=encoded, attention_bias=bias)
        if self.post_process:
            return decoded * self.output_scale
        return torch.cat([encoded.flatten(0, 1).unsqueeze(1) if count else encoded, decoded])

    def _encode(self, encoded: Tensor, hidden: Tensor) -> Tensor:
        assert self.encoder is not None and self.encoder_bias is not None
        width = hidden.shape[-1]
        columns = torch.arange(width, device=hidden.device)
        bias = self.encoder_bias(columns, columns)
        return self.encoder(encoded, attention_mask=hidden, attention_bias=bias)  # type: ignore[no-any-return]

    def layer_numbers(self) -> list[int]:
        """Places in the whole model, from 0 and the encoder's first, of the layers that are on this stage."""
        return self._layer_numbers

    def initial_std(self, name: str) -> float | Tensor:
        """Standard deviation of a parameter's first random weights, by its global name, as T5X has them.

        Scores of attention are not scaled, so that the weights of queries carry 1 / sqrt(head_dim).
        """
        config = self.config
        width, hidden = config.kv_channels, config.hidden_size
        if name.startswith("embedding"):
            return 1.0
        if name.endswith("linear_fc2.weight"):
            return float(config.ffn_hidden_size**-0.5)
        if name.endswith("linear_proj.weight"):
            return float((config.num_attention_heads * width) ** -0.5)
        if name.endswith("linear_q.weight"):
            return float((hidden * width) ** -0.5)
        if name.endswith("linear_qkv.weight"):  # of each head queries, key, value
            of_head = torch.tensor([width**-0.5, 1.0, 1.0]).repeat_interleave(width)
            return of_head.repeat(config.num_attention_heads)[:, None] * hidden**-0.5
        return float(hidden**-0.5)

    def sum_gradients_of_copies(self) -> None:
        """Add up the gradients of the stages' copies of the position biases. Collective over the pipeline."""
        any_gradient: Tensor = next(self.parameters()).main_grad  # type: ignore[attr-defined]
        shape = (self._buckets, self.config.num_attention_heads // self.tp_group.size())
        biases: tuple[RelativeBias | None, ...] = (self.encoder_bias, self.decoder_bias)
        for bias in biases:
            none = any_gradient.new_zeros(shape)
            dist.all_reduce(none if bias is None else bias.weight.main_grad, group=self.pp_group)  # type: ignore[attr-defined]

    def head_weight(self) -> Tensor:
        """[V_local, H] rows of the LM head (last stage)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class LayerStack(TransformerBlock):
    """A stage's layers of the encoder or of the decoder.

    Megatron-Core's block counts its layers from the stage's place in a pipeline through one stack of layers. Here its
    config knows of no pipeline, and the layers' numbers in the whole stack are set after they are built.
    """

    def __init__(
        self, config: TransformerConfig, spec: Any, layers: range, total: int, pg_collection: ProcessGroupCollection
    ) -> None:
        config = copy.copy(config)
        config.pipeline_model_parallel_size, config.num_layers = 1, total
        super().__init__(config, spec, post_process=layers.stop == total, pg_collection=pg_collection)
        for layer, number in zip(self.layers, layers, strict=True):
            layer.layer_number = number + 1

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For `dist_checkpointing`: a tensor of all layers together has them along its first dimension."""
        shards: dict[str, Any] = {}
        for index, layer in enumerate(self.layers):
            own = f"{prefix}layers.{index}."
            place = [(0, layer.layer_number - 1, self.config.num_layers)]
            of_layer = layer.sharded_state_dict(own, place, metadata)
            replace_prefix_for_sharding(of_layer, own, f"{prefix}layers.")
            shards |= of_layer
        if self.final_layernorm is not None:
            name = f"{prefix}final_layernorm."
            shards |= sharded_state_dict_default(
                self.final_layernorm, name, sharded_offsets, metadata, tp_group=self.tp_group
            )
        return shards


class RelativeBias(MegatronModule):
    """What T5 adds to the scores of self-attention: a number for each head and bucket of distances.

    One table serves all layers of a stack. Every pipeline stage that has some holds a copy
    (`EncoderDecoderLM.sum_gradients_of_copies`). is_copy: an earlier stage has it too.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        pg_collection: ProcessGroupCollection,
        *,
        bidirectional: bool,
        is_copy: bool,
    ) -> None:
        super().__init__(config)
        self.is_copy = is_copy
        self.bidirectional = bidirectional
        self.max_distance = architecture.relative_max_distance
        self.pg_collection = pg_collection
        heads = config.num_attention_heads // pg_collection.tp.size()
        shape = (architecture.relative_buckets, heads)
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1, stride=1)
        if pg_collection.pp.size() > 1:
            # A bucket of its own in the gradient buffer, so that all stages cut it alike over the replicas; counted
            # once in gradient norms.
            self.weight.shared_embedding = True  # type: ignore[attr-defined]
            self.weight.shared = is_copy  # type: ignore[attr-defined]

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[1, np, queries, keys] for int64 positions of queries and keys."""
        buckets = relative_buckets(
            keys[None] - queries[:, None], self.weight.shape[0], self.max_distance, bidirectional=self.bidirectional
        )
        return torch.nn.functional.embedding(buckets, self.weight).permute(2, 0, 1).unsqueeze(0)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For `dist_checkpointing`; the first stage's copy is written."""
        groups = self.pg_collection
        name = f"{prefix}weight"
        return {
            name: make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                name,
                tp_axis=1,
                replica_id=(groups.pp.rank() if self.is_copy else 0, 0, groups.dp_cp.rank()),
                tp_group=groups.tp,
                dp_cp_group=groups.dp_cp,
            )
        }


def relative_buckets(distances: Tensor, buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Bucket of each distance (key's position minus query's), int64 of the same shape (Raffel et al. 2020).

    Half of the buckets hold one distance each, the others ranges that grow logarithmically up to `max_distance`, beyond
    which all are one. `bidirectional`: keys behind and before the query have buckets of their own; else keys behind it
    are all at distance 0.
    """
    first = torch.zeros_like(distances)
    if bidirectional:
        buckets //= 2
        first = (distances > 0) * buckets
        distances = distances.abs()
    else:
        distances = -distances.clamp(max=0)
    exact = buckets // 2
    # In fp32 and in this order, as T5 was trained: another rounding would move distances to a neighbouring bucket.
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distances < exact, distances, logarithmic)


def padding_mask(lengths: Tensor, width: int) -> Tensor:
    """bool [b, 1, 1, width], True at padding. An empty row sees its first position, so that nothing is NaN."""
    columns = torch.arange(width, device=lengths.device)
    return (columns >= lengths.clamp(min=1)[:, None])[:, None, None]


def stage_layers(architecture: Architecture, stages: int, stage: int) -> tuple[range, range]:
    """The encoder's and the decoder's layers of a pipeline stage, counted from 0 in each stack.

    The layers of both, one behind the other, are cut into pieces that differ by one layer at most.
    """
    encoder, decoder = architecture.encoder_layers, architecture.num_layers
    cuts = [place * (encoder + decoder) // stages for place in (stage, stage + 1)]
    return (
        range(*(min(cut, encoder) for cut in cuts)),
        range(*(max(cut - encoder, 0) for cut in cuts)),
    )


def build_t5(
    architecture: Architecture,
    config: TransformerConfig,
    layout: Layout,
    implementation: Implementation,
    padded_vocab_size: int,
    model_class: type[EncoderDecoderLM] = EncoderDecoderLM,
) -> EncoderDecoderLM:
    """This rank's stage of the model, on the layout's device, with weights yet to be filled."""
    return model_class(
        config=config,
        architecture=architecture,
        implementation=implementation,
        vocab_size=padded_vocab_size,
        pg_collection=layout.groups,
    )
