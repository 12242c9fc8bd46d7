"""Generation on the training weights, under tensor, pipeline and data parallelism, with continuous batching.

No weights are converted or copied, so a rollout's log-probabilities are those of the trainer. Data-parallel replicas
work on their own prompts and never wait for each other; within a replica all ranks call `generate` with the same
arguments and follow the same plan (pool.py). With a pipeline there are as many pools as stages: while one stage works
on a pass of one pool, the others work on passes of the others.

Shapes: T tokens in a flat pass, M of them with a token to be drawn after them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_amd.batch import Prompts, Rollouts
from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.transfer import to_device
from megatron_amd.errors import InputError
from megatron_amd.models.roles import LanguageModel
from megatron_amd.rollout.passes import (
    Generator,
    Sampling,
    draw,
    generation_mode,
    make_generator,
    padded_count,
    spare_rows,
    stage_pass,
)
from megatron_amd.rollout.pool import Pass, Pool, Response
from megatron_amd.rollout.sampling import uniform

_GPU_LOOK_INTERVAL = 8
_PACK_FROM = 16
"""Longest response from which packing the weights pays."""


def generate(
    model: nn.Module,
    prompts: Prompts,
    *,
    layout: Layout,
    vocab_size: int,
    eos_ids: Collection[int],
    seed: int,
    max_response_length: int,
    min_response_length: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    samples_per_prompt: int = 1,
    sample_index: Sequence[int] | None = None,
    batch_size: int | None = None,
    pass_tokens: int = 1024,
    cache_tokens: int | None = None,
    look_interval: int | None = None,
    cuda_graphs: bool = False,
    mixed_with: tuple[nn.Module, float] | None = None,
    is_complete: Callable[[Sequence[int]], bool] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Rollouts:
    """Sample responses to this replica's prompts. Collective over the replica's tensor and pipeline ranks.

    A response depends on its prompt, the weights and its own noise; neighbours, the sizes of pool and passes and the
    layout change it through floating-point rounding only, which in fp32 practically never reaches a token.

    Args:
        model: a `LanguageModel`, bare or wrapped for data parallelism. Its mode and sequence parallelism are restored.
        prompts: the same on all ranks of the replica.
        layout: the model's layout.
        vocab_size: real entries of the vocabulary.
        eos_ids: tokens that end a response; they are kept in it.
        seed: of the noise. Give student and teacher different ones, else they share it.
        max_response_length: longest response, EOS included.
        min_response_length: EOS is not drawn before that many tokens.
        temperature: 0 takes the likeliest token.
        top_k: see `sample_tokens`.
        top_p: see `sample_tokens`.
        min_p: see `sample_tokens`.
        samples_per_prompt: responses to each prompt, in neighbouring rows.
        sample_index: each row's sample number in the noise; by default 0 to samples_per_prompt - 1 in turn.
        batch_size: most responses in work at once; unset: all.
        pass_tokens: most tokens that go through the model together: prompts are read in pieces of what is left beside
            one token for each response that is being written.
        cache_tokens: most positions with cached keys and values, over both models of a mixture, which bounds the
            caches' memory: fewer responses are in work at once where each may grow long; unset: no bound.
        look_interval: tokens that each response is given between two looks of the host, where no prompt is being read,
            so that a GPU need not wait for the host after each; what was drawn after a response's end is dropped.
            Unset: 8 on a GPU, 1 on a CPU. With a pipeline always 1.
        cuda_graphs: replay passes in which every row writes (decode_graphs.py), where layers go the lean way.
        mixed_with: (another model of the same layout and vocabulary, its share): tokens are drawn from
            (1 - share) * model + share * other, both at `temperature`.
        is_complete: told a response's tokens so far, whether it ends here (stop strings).
        report: told, at each response that is complete, how many are and their tokens in all.

    Returns:
        Rollouts of len(prompts) * samples_per_prompt rows, in the order of `prompts.repeat(samples_per_prompt)`, with
        the log-probabilities of their tokens under `model` at temperature 1.

    Raises:
        InputError: a prompt is empty, prompt and response may exceed the model's positions, or `cache_tokens` has no
            room for one of them.
    """
    models = [(unwrap(model), 1.0)]
    if mixed_with is not None:
        models = [(models[0][0], 1 - mixed_with[1]), (unwrap(mixed_with[0]), mixed_with[1])]
    rows = prompts.repeat(samples_per_prompt)
    if sample_index is None:
        sample_index = [index for _ in range(len(prompts)) for index in range(samples_per_prompt)]
    for generating, _ in models:
        check_lengths(prompts, max_response_length, generating.max_sequence_length)
    sampling = Sampling(
        vocab_size=vocab_size,
        eos_ids=tuple(eos_ids),
        seed=seed,
        max_response_length=max_response_length,
        min_response_length=min_response_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )

    def ended(response: Response) -> bool:
        return has_ended(response.tokens, sampling.eos_ids, is_complete)

    def noise(coming: Pass, step: int) -> Tensor:
        numbers = [response.number for response in coming.responses]
        columns = [
            [rows.ids[number] for number in numbers],
            [sample_index[number] for number in numbers],
            [rows.visits[number] for number in numbers],
            [len(response.tokens) + step for response in coming.responses],
        ]
        return uniform(sampling.seed, *to_device(columns, layout.device))

    # Neighbours of like length share their attention's columns; the order changes no result.
    order = sorted(range(len(rows)), key=lambda number: len(rows.tokens[number]))
    queue = deque(Response(number, rows.tokens[number], max_response_length) for number in order)
    longest = max((len(prompt) for prompt in prompts.tokens), default=0)
    sizes = pool_sizes(
        len(rows),
        len(models) * (longest + max_response_length),
        layout.pp_size,
        batch_size,
        cache_tokens,
        spare=spare_rows(models[0][0]),
    )
    ahead = look_interval or (_GPU_LOOK_INTERVAL if layout.device.type == "cuda" else 1)
    with ExitStack() as stack:
        generators = []
        for generating, share in models:
            stack.enter_context(generation_mode(generating))
            made = make_generator(
                generating, share, sizes, longest, max_response_length, layout,
                pack=max_response_length >= _PACK_FROM, cuda_graphs=cuda_graphs,
            )  # fmt: skip
            generators.append(made)
        start_id = getattr(models[0][0], "decoder_start_id", None)
        pools = [
            Pool(queue, size, [generator.caches[number] for generator in generators], pass_tokens, ended, start_id)
            for number, size in enumerate(sizes)
        ]
        complete: list[Response] = []
        tokens = 0
        for response in run(generators, pools, layout, sampling, noise, ahead):
            complete.append(response)
            tokens += len(response.tokens)
            if report is not None:
                report(len(complete), tokens)
    complete.sort(key=lambda response: response.number)
    return Rollouts.from_lists(
        rows.tokens,
        [response.tokens for response in complete],
        layout.device,
        log_probs=[response.log_probs for response in complete],
    )


def has_ended(
    tokens: Sequence[int], eos_ids: Collection[int], is_complete: Callable[[Sequence[int]], bool] | None
) -> bool:
    """Whether EOS or a stop string ends a response, rather than its length."""
    return tokens[-1] in eos_ids or (is_complete is not None and is_complete(tokens))


def unwrap(model: nn.Module) -> LanguageModel:
    """The model inside wrappers that keep it under `.module`."""
    inner: Any = model
    while not isinstance(inner, LanguageModel):
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


def pool_sizes(
    responses: int, width: int, stages: int, batch_size: int | None, cache_tokens: int | None, *, spare: int = 0
) -> list[int]:
    """Rows of each stage's pool.

    Args:
        width: positions of a row, in the caches of all models that generate.
        spare: further rows of a pool that works, for fillers.

    Raises:
        InputError: `cache_tokens` is below the positions of one row.
    """
    rows = min(batch_size or responses, responses)
    if cache_tokens is not None:
        if cache_tokens < (1 + spare) * width:
            raise InputError(
                f"rollout.cache_tokens={cache_tokens} has no room for the longest prompt and its response, "
                f"{(1 + spare) * width} tokens: raise it, or lower data.max_prompt_length or "
                "rollout.max_response_length"
            )
        while (rows + spare * min(rows, stages)) * width > cache_tokens:
            rows -= 1
    return [rows // stages + (number < rows % stages) for number in range(stages)]


def run(
    generators: Sequence[Generator],
    pools: Sequence[Pool],
    layout: Layout,
    sampling: Sampling,
    noise: Callable[[Pass, int], Tensor],
    ahead: int = 1,
) -> Iterator[Response]:
    """Complete the responses of all pools, in any order.

    One turn a tick: in tick t, stage s works on the pass of pool (t - s) mod stages, so a pass goes one stage further
    each tick. Then all stages exchange at once: outputs with the next stage, and the last stage's tokens with all.

    Args:
        noise: of the tokens that a pass is given in its step number so and so.
        ahead: tokens that a response may be given before the host looks at them; without a pipeline.
    """
    stages, stage = layout.pp_size, layout.pp_rank
    for pool in pools:
        pool.plan()
    received: list[Tensor] = []
    tick = 0
    while any(pool.coming for pool in pools):
        number = _pool_at(pools, tick - stage)
        outputs: list[Tensor] = []
        drawn: Tensor | None = None
        if number is not None:
            coming = pools[number].coming
            assert coming is not None
            steps = pools[number].steps_ahead(ahead) if stages == 1 else 1
            outputs, drawn = _work(generators, number, coming, steps, received, layout, sampling, noise)
        last = _pool_at(pools, tick - (stages - 1))
        if stages > 1:
            following = None if layout.is_first_stage else _pool_at(pools, tick + 1 - stage)
            shapes = []
            if following is not None:
                coming = pools[following].coming
                assert coming is not None
                shapes = [(padded_count(g, following, coming), 1, g.model.config.hidden_size) for g in generators]
            expected = 0 if last is None else len(pools[last].coming.responses)  # type: ignore[union-attr]
            received, drawn = _exchange(outputs, drawn, shapes, expected, generators, layout)
        if last is not None:
            found = [] if drawn is None else drawn.tolist()
            yield from pools[last].take([[int(t) for t in tokens] for tokens, _ in found], [lps for _, lps in found])
            pools[last].plan()
        tick += 1


def _work(
    generators: Sequence[Generator],
    pool: int,
    coming: Pass,
    steps: int,
    received: Sequence[Tensor],
    layout: Layout,
    sampling: Sampling,
    noise: Callable[[Pass, int], Tensor],
) -> tuple[list[Tensor], Tensor | None]:
    """A pass, and further ones that need nothing of the host: outputs of the last, and what was drawn.

    Returns:
        [T, 1, H] of each model; float64 [steps, 2, M] on the last stage, where a token is drawn.
    """
    outputs: list[Tensor] = []
    drawn: list[Tensor] = []
    for step in range(steps):
        tokens = drawn[-1][0].long() if drawn else None
        outputs = [
            stage_pass(generator, pool, coming, layout, received[i] if received else None, tokens)
            for i, generator in enumerate(generators)
        ]
        if layout.is_last_stage and coming.drawn:
            found = draw(generators, outputs, coming, layout, sampling, noise(coming, step), step)
            drawn.append(torch.stack(found))
    return outputs, torch.stack(drawn) if drawn else None


def _pool_at(pools: Sequence[Pool], turn: int) -> int | None:
    """Number of the pool whose pass some stage works on in its `turn`, if there is one."""
    number = turn % len(pools)
    return number if turn >= 0 and pools[number].coming is not None else None


def _exchange(
    outputs: Sequence[Tensor],
    drawn: Tensor | None,
    shapes: Sequence[tuple[int, int, int]],
    count: int,
    generators: Sequence[Generator],
    layout: Layout,
) -> tuple[list[Tensor], Tensor | None]:
    """What a tick sends: outputs to the next stage, what was drawn (float64 [1, 2, M]) to all.

    Args:
        shapes: of what comes from the stage before.
        count: M of what was drawn in this tick; 0: nothing was.
    """
    group, device = layout.groups.pp, layout.device
    ranks, last = dist.get_process_group_ranks(group), layout.pp_size - 1
    received = [
        torch.empty(shape, dtype=generator.model.config.pipeline_dtype, device=device)
        for shape, generator in zip(shapes, generators, strict=bool(shapes))
    ]
    operations = [dist.P2POp(dist.irecv, hidden, ranks[layout.pp_rank - 1], group) for hidden in received]
    if not layout.is_last_stage:
        operations += [dist.P2POp(dist.isend, hidden, ranks[layout.pp_rank + 1], group) for hidden in outputs]
        if count:
            drawn = torch.empty(1, 2, count, dtype=torch.float64, device=device)
            operations.append(dist.P2POp(dist.irecv, drawn, ranks[last], group))
    elif drawn is not None:
        operations += [dist.P2POp(dist.isend, drawn, rank, group) for rank in ranks[:last]]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received, drawn
