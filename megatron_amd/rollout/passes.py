"""One pass of a generation: a stage's share of it, and the tokens that are drawn after it.

Shapes: T tokens in a flat pass, M of them with a token to be drawn after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.transfer import to_device
from megatron_amd.models.gpt import CausalLM
from megatron_amd.models.kv_cache import KVCache, kv_cache
from megatron_amd.models.lean import LeanLayer, Product, lean_forward, lean_layers
from megatron_amd.models.roles import LanguageModel
from megatron_amd.models.t5 import EncoderDecoderLM
from megatron_amd.rollout.decode_graphs import DecodeGraphs
from megatron_amd.rollout.pool import Pass
from megatron_amd.rollout.sampling import mixture, sample_tokens, token_log_probs

_FP8_TOKENS = 32
"""FP8 matrix products want the number of tokens to be a multiple of this."""
_SPLIT_SEQUENCE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    vocab_size: int
    """Real entries of the vocabulary; ids beyond are padding and never drawn."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""
    seed: int
    """Of the noise."""
    max_response_length: int
    """Longest response, EOS included."""
    min_response_length: int = 0
    """EOS is not drawn before a response has this many tokens."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Generator:
    """A model that generates, or one of two whose distributions are mixed."""

    model: LanguageModel
    share: float
    """Of its distribution in what is drawn from."""
    caches: list[KVCache]
    """One for each pool."""
    head: Product | None
    """The LM head, on the last stage."""
    layers: list[LeanLayer] | None
    """The stage's layers, where passes go through them; None: through the model."""
    graphs: list[DecodeGraphs] | None = None
    """For each pool, where passes that only decode are replayed."""

    def rows_of_graph(self, pool: int, coming: Pass) -> int:
        """Rows of the graph that a pass is; 0: it is none."""
        if self.graphs is None or coming.segments or coming.prompts:
            return 0
        return self.graphs[pool].rows(coming.decoding)


def make_generator(
    model: LanguageModel,
    share: float,
    sizes: Sequence[int],
    prompt_length: int,
    response_length: int,
    layout: Layout,
    *,
    pack: bool = False,
    cuda_graphs: bool = False,
) -> Generator:
    """With a cache for each pool. sizes: rows of each pool; pack: see `Product`; cuda_graphs: see `generate`."""
    spare = spare_rows(model)
    lengths = (
        (response_length, prompt_length)
        if isinstance(model, EncoderDecoderLM)
        else (prompt_length + response_length, 0)
    )
    caches = [kv_cache(model, size + spare, lengths[0], layout.device, lengths[1]) for size in sizes]
    head = Product(model.head_weight(), pack=pack) if layout.is_last_stage else None
    layers, graphs = lean_layers(model, pack=pack), None
    if cuda_graphs and layers is not None:
        assert isinstance(model, CausalLM)
        graphs = [DecodeGraphs(model, layers, cache) for cache in caches]
    return Generator(model, share, caches, head, layers, graphs)


@contextmanager
def generation_mode(model: LanguageModel) -> Iterator[None]:
    """No gradients, evaluation mode, sequences not split over tensor ranks; all restored at the end.

    Megatron-Core has a function that switches sequence parallelism, but it turns every flag on at the end, also
    those that were off, and keeps lists of modules by the address of models that may be gone.
    """
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))}
    flags = [
        (owner, name)
        for owner in owners.values()
        for name in _SPLIT_SEQUENCE_FLAGS
        if owner is not None and getattr(owner, name, False) is True
    ]
    training = {module: module.training for module in model.modules()}
    try:
        for owner, name in flags:
            setattr(owner, name, False)
        model.eval()
        # Transformer Engine keeps FP8 copies of weights; the first pass after a change must make them anew.
        model.set_is_first_microbatch()
        with torch.no_grad():
            yield
    finally:
        for owner, name in flags:
            setattr(owner, name, True)
        for module, mode in training.items():
            module.training = mode


def token_multiple(model: LanguageModel) -> int:
    """What the number of tokens of a pass must be a multiple of."""
    return _FP8_TOKENS if model.config.fp8 else 1


def spare_rows(model: LanguageModel) -> int:
    """Rows of a cache that only fillers use."""
    return int(token_multiple(model) > 1)


def padded_count(generator: Generator, pool: int, coming: Pass) -> int:
    """Tokens of a model's pass over a pool with fillers."""
    multiple = token_multiple(generator.model)
    return generator.rows_of_graph(pool, coming) or -(-coming.size // multiple) * multiple


def stage_pass(
    generator: Generator,
    pool: int,
    coming: Pass,
    layout: Layout,
    received: Tensor | None = None,
    following: Tensor | None = None,
) -> Tensor:
    """This stage's share of a pass of a pool, [T, 1, H] (the stages of an encoder-decoder model: `flat_pass`).

    Args:
        received: the output of the stage before.
        following: int64 [T], tokens that come after those of the pass, which has been made and only decodes.
    """
    model, cache = generator.model, generator.caches[pool]
    fillers = padded_count(generator, pool, coming) - coming.size
    rows = generator.rows_of_graph(pool, coming)
    if following is not None:
        cache.advance()
        tokens = F.pad(following, (0, fillers))
    else:
        if rows:  # those that are free take part
            cache.expect([*coming.decoding, *((row, 0) for row in range(coming.size, rows))], [])
        else:
            cache.expect(coming.decoding, coming.segments, fillers)
        if isinstance(model, EncoderDecoderLM):
            cache.expect_prompts(coming.prompts, coming.prompt_rows)
        tokens = to_device(coming.tokens + [0] * fillers, layout.device)
    if generator.layers is None:
        with cache.attached():
            return model.flat_pass(tokens, cache, received).contiguous()
    hidden = model.embedding(tokens[None], cache.positions[None]) if received is None else received
    if rows:
        assert generator.graphs is not None
        return generator.graphs[pool].run(hidden)
    assert isinstance(model, CausalLM)
    with cache.attached():
        return lean_forward(model, generator.layers, hidden, cache.positions)


def draw(
    generators: Sequence[Generator],
    outputs: Sequence[Tensor],
    coming: Pass,
    layout: Layout,
    sampling: Sampling,
    uniforms: Tensor,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """The tokens that follow in a pass and their log-probabilities under the first model, each float64 [M].

    Args:
        outputs: [T, 1, H] final hidden states of each model, on the last stage.
        uniforms: float64 [M].
        step: tokens that were drawn in the pass before these.
    """
    places = to_device(coming.drawn, layout.device)
    heads = [generator.head for generator in generators if generator.head is not None]
    logits = [head(output[places, 0]) for output, head in zip(outputs, heads, strict=True)]
    rows = heads[0].weight.shape[0]
    start = layout.tp_rank * rows
    forbidden = None
    early = [len(response.tokens) + step < sampling.min_response_length for response in coming.responses]
    if any(early):
        eos = to_device(sampling.eos_ids, layout.device)
        ids = torch.arange(start, start + rows, device=layout.device)
        forbidden = torch.isin(ids, eos) & to_device(early, layout.device, torch.bool)[:, None]
    shards: dict[str, Any] = {
        "vocab_size": sampling.vocab_size, "shard_start": start, "group": layout.groups.tp
    }  # fmt: skip
    settings: dict[str, Any] = {
        "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p, "forbidden": forbidden
    }  # fmt: skip
    temperature = sampling.temperature
    if len(generators) == 1:
        tokens, log_probs = sample_tokens(logits[0], uniforms, temperature=temperature, **shards, **settings)
    else:
        mixed = mixture(logits, [generator.share for generator in generators], temperature=temperature, **shards)
        tokens, _ = sample_tokens(mixed, uniforms, temperature=float(temperature > 0), **shards, **settings)
        log_probs = token_log_probs(logits[0], tokens, **shards)
    return tokens.double(), log_probs.double()
