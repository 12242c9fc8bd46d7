"""Generation on the training weights, under tensor, pipeline and data parallelism, with a key-value cache.

No weights are converted or copied, so a rollout's log-probabilities are those of the trainer. Data-parallel replicas
work on their own prompts and never wait for each other; within a replica all ranks call `generate` with the same
arguments.

Shapes: b sequences generated together, W tokens in the longest prompt, T tokens in the longest response.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_amd.batch import Prompts, Rollouts
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError
from megatron_amd.models.attention import KVCache, kv_cache
from megatron_amd.models.gpt import CausalLM
from megatron_amd.rollout.sampling import sample_tokens, uniform

_FP8_ROWS = 32
"""FP8 matrix products want the number of tokens to be a multiple of this, also with one token a row."""
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
    """T, EOS included."""
    temperature: float
    top_k: int
    top_p: float


def generate(
    model: nn.Module,
    prompts: Prompts,
    *,
    layout: Layout,
    vocab_size: int,
    eos_ids: Collection[int],
    seed: int,
    max_response_length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    sample_index: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Rollouts:
    """Sample responses to this replica's prompts. Collective over the replica's tensor and pipeline ranks.

    A row's tokens depend on its prompt, the weights and its own noise; neighbours, `batch_size` and the layout change
    them through floating-point rounding only, which in fp32 practically never reaches a token.

    Args:
        model: a `CausalLM`, bare or wrapped for data parallelism. Its mode and sequence parallelism are restored.
        prompts: the same on all ranks of the replica.
        layout: the model's layout.
        vocab_size: real entries of the vocabulary.
        eos_ids: tokens that end a response; they are kept in it.
        seed: of the noise. Give student and teacher different ones, else they share it.
        max_response_length: longest response, EOS included.
        temperature: 0 takes the likeliest token.
        top_k: see `sample_tokens`.
        top_p: see `sample_tokens`.
        samples_per_prompt: responses to each prompt, in neighbouring rows.
        sample_index: each row's sample number in the noise; by default 0 to samples_per_prompt - 1 in turn.
        batch_size: sequences generated together; unset: all.

    Returns:
        Rollouts of len(prompts) * samples_per_prompt rows, in the order of `prompts.repeat(samples_per_prompt)`.

    Raises:
        InputError: a prompt is empty, or prompt and response may exceed the model's positions.
    """
    model = unwrap(model)
    rows = prompts.repeat(samples_per_prompt)
    if sample_index is None:
        sample_index = [index for _ in range(len(prompts)) for index in range(samples_per_prompt)]
    check_lengths(prompts, max_response_length, model.max_sequence_length)
    sampling = Sampling(
        vocab_size=vocab_size,
        eos_ids=tuple(eos_ids),
        seed=seed,
        max_response_length=max_response_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    # Neighbours of like length waste the least; the order changes no result.
    order = sorted(range(len(rows)), key=lambda row: len(rows.tokens[row]))
    responses: list[list[int]] = [[] for _ in order]
    size = batch_size or max(1, len(rows))
    with generation_mode(model):
        for first in range(0, len(rows), size):
            chunk = order[first : first + size]
            found = generate_chunk(model, rows, sample_index, chunk, layout, sampling)
            for row, response in zip(chunk, found, strict=True):
                responses[row] = response
    return Rollouts.from_lists(rows.tokens, responses, layout.device)


def unwrap(model: nn.Module) -> CausalLM:
    """The CausalLM inside wrappers that keep it under `.module`."""
    inner: Any = model
    while not isinstance(inner, CausalLM):
        if not hasattr(inner, "module"):
            raise TypeError(f"cannot generate with a {type(model).__name__}")
        inner = inner.module
    return inner


def check_lengths(prompts: Prompts, max_response_length: int, max_positions: int) -> None:
    """Raise InputError if a prompt is empty or leaves no room for the response."""
    for prompt_id, tokens in zip(prompts.ids, prompts.tokens, strict=True):
        if not tokens:
            raise InputError(f"prompt {prompt_id} has no tokens: remove it or use a template that adds some")
        if len(tokens) + max_response_length > max_positions:
            raise InputError(
                f"prompt {prompt_id}: {len(tokens)} tokens and a response of {max_response_length} exceed the model's "
                f"{max_positions} positions; lower data.max_prompt_length or the response length"
            )


@contextmanager
def generation_mode(model: CausalLM) -> Iterator[None]:
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


def generate_chunk(
    model: CausalLM,
    prompts: Prompts,
    sample_index: Sequence[int],
    rows: Sequence[int],
    layout: Layout,
    sampling: Sampling,
) -> list[list[int]]:
    """Responses to the prompts numbered `rows`, generated together."""
    device, count = layout.device, len(rows)
    multiple = row_multiple(model)
    rows = [*rows, *[rows[-1]] * (-count % multiple)]
    lengths = torch.tensor([len(prompts.tokens[row]) for row in rows], device=device)
    width = max(len(prompts.tokens[row]) for row in rows)
    noise = token_noise(prompts, sample_index, rows, sampling, device)
    eos = torch.tensor(sampling.eos_ids, dtype=torch.int64, device=device)

    responses = torch.zeros(len(rows), sampling.max_response_length, dtype=torch.int64, device=device)
    response_lengths = torch.full((len(rows),), sampling.max_response_length, dtype=torch.int64, device=device)
    # What follows is per row still in work; `numbers` says which rows of the chunk those are.
    numbers, finished = torch.arange(len(rows), device=device), torch.zeros(len(rows), dtype=torch.bool, device=device)
    with kv_cache(model, len(rows), width + sampling.max_response_length) as cache:
        hidden = prefill(model, cache, [prompts.tokens[row] for row in rows], lengths, layout)
        for step in range(sampling.max_response_length):
            tokens = next_tokens(model, hidden, noise[numbers, step], layout, sampling)
            responses[numbers, step] = torch.where(finished, responses[numbers, step], tokens)
            ended = torch.isin(tokens, eos) & ~finished
            response_lengths[numbers[ended]] = step + 1
            finished = finished | ended
            running = int((~finished).sum())
            if running == 0 or step + 1 == sampling.max_response_length:
                break
            if running < len(finished):
                kept = cache.keep(rows_to_keep(finished, multiple))
                numbers, finished, lengths, tokens = numbers[kept], finished[kept], lengths[kept], tokens[kept]
            positions = (lengths + step)[:, None]
            cache.step(positions, width + step + 1)
            hidden = stage_pass(model, tokens[:, None], positions, layout)[0]
    return [
        response[:length]
        for response, length in zip(responses[:count].tolist(), response_lengths[:count].tolist(), strict=True)
    ]


def token_noise(
    prompts: Prompts, sample_index: Sequence[int], rows: Sequence[int], sampling: Sampling, device: torch.device
) -> Tensor:
    """float64 [b, T]: the uniform number behind each token."""

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor([values[row] for row in rows], dtype=torch.int64, device=device)[:, None]

    steps = torch.arange(sampling.max_response_length, device=device)
    return uniform(sampling.seed, column(prompts.ids), column(sample_index), column(prompts.visits), steps)


def row_multiple(model: CausalLM) -> int:
    """What the number of rows generated together must be a multiple of."""
    return _FP8_ROWS if model.config.fp8 else 1


def rows_to_keep(finished: Tensor, multiple: int) -> Tensor:
    """bool [b]: the unfinished rows, and as many finished ones as fill them up to a multiple."""
    keep = ~finished
    fillers = torch.nonzero(finished).flatten()[: int(-keep.sum() % multiple)]
    keep[fillers] = True
    return keep


def prefill(
    model: CausalLM, cache: KVCache, prompts: Sequence[Sequence[int]], lengths: Tensor, layout: Layout
) -> Tensor:
    """Fill the cache with the prompts. [b, H] output of this stage at each prompt's last token."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=layout.device)
    positions = torch.arange(width, device=layout.device).expand_as(tokens)
    cache.start(width)
    hidden = stage_pass(model, tokens, positions, layout)
    return hidden[lengths - 1, torch.arange(len(prompts), device=layout.device)]


def stage_pass(model: CausalLM, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """This stage's share of a forward pass over [b, S] tokens: receive, compute, send on. [S, b, H]."""
    stages = dist.get_process_group_ranks(layout.groups.pp) if layout.pp_size > 1 else []
    if not layout.is_first_stage:
        shape = (tokens.shape[1], tokens.shape[0], model.config.hidden_size)
        received = torch.empty(shape, dtype=model.config.pipeline_dtype, device=layout.device)
        dist.recv(received, src=stages[layout.pp_rank - 1], group=layout.groups.pp)
        model.set_input_tensor([received])
    hidden = model(tokens, positions)
    if not layout.is_last_stage:
        dist.send(hidden.contiguous(), dst=stages[layout.pp_rank + 1], group=layout.groups.pp)
    return hidden


def next_tokens(model: CausalLM, hidden: Tensor, uniforms: Tensor, layout: Layout, sampling: Sampling) -> Tensor:
    """int64 [b]: drawn on the last stage from its [b, H] final hidden states, then sent to all stages."""
    if layout.is_last_stage:
        head = model.head_weight()
        tokens = sample_tokens(
            (hidden @ head.t()).float(),
            uniforms,
            vocab_size=sampling.vocab_size,
            shard_start=layout.tp_rank * head.shape[0],
            group=layout.groups.tp,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
    else:
        tokens = torch.empty(hidden.shape[0], dtype=torch.int64, device=layout.device)
    if layout.pp_size > 1:
        dist.broadcast(tokens, src=layout.last_stage_rank, group=layout.groups.pp)
    return tokens
