"""Generation gives the same tokens under every layout and batch split, and those of a loop without a cache."""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_amd.batch import Prompts, Rollouts
from megatron_amd.config import ParallelConfig, TrainingConfig
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import Layout, build_layout
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.attention import CoreAttention
from megatron_amd.models.gpt import CausalLM, build_gpt, initialize_weights, transformer_config
from megatron_amd.models.kv_cache import KVCache, LayerCache, kv_cache
from megatron_amd.models.lean import Product, lean_layers
from megatron_amd.rollout.decode_graphs import DecodeGraphs
from megatron_amd.rollout.generate import generate
from megatron_amd.rollout.sampling import sample_tokens, uniform
from tests.distributed.runner import run_distributed
from tests.hf_models import build_megatron, save_hf_model

VOCAB, PADDED, EOS = 90, 96, tuple(range(1, 90, 8))
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_embd": 32, "n_layer": 4,
    "n_head": 4, "n_positions": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip
QWEN2 = {
    **LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = Prompts(
    ids=(10, 11, 12, 13, 7, 8),
    visits=(0, 0, 1, 0, 2, 0),
    tokens=((20, 21, 22), (30,), (40, 41, 42, 43, 44, 45, 46), (50, 51), tuple(range(60, 80)), (5,)),
)
SAMPLES, LONGEST, SEED = 2, 16, 99


def make_model(
    hf_config: dict[str, Any] = LLAMA, *, tp: int = 1, pp: int = 1, sequence_parallel: bool = False,
    precision: str = "fp32", layout: Layout | None = None,
) -> tuple[CausalLM, Layout]:  # fmt: skip
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sequence_parallel
    )
    layout = layout or build_layout(parallel, torch.device("cpu"))
    set_seeds(1, layout)
    architecture = Architecture.from_hf(hf_config, "test")
    config = transformer_config(
        architecture, TrainingConfig(precision=precision), layout, {"perform_initialization": True}, "student"
    )
    config.init_method_std = 0.25  # sharp enough that a wrong cache shows
    model = build_gpt(architecture, config, layout, "local", PADDED)
    initialize_weights(model, seed=3)
    return model.train(), layout


def run_generate(model: torch.nn.Module, layout: Layout, prompts: Prompts = PROMPTS, **settings: Any) -> Rollouts:
    defaults = {"vocab_size": VOCAB, "eos_ids": EOS, "seed": SEED, "max_response_length": LONGEST}
    return generate(model, prompts, layout=layout, **{**defaults, "samples_per_prompt": SAMPLES, **settings})


def share(prompts: Prompts, rank: int, ranks: int) -> Prompts:
    """A data-parallel rank's part: every ranks-th prompt, so that parts differ in their lengths."""
    return Prompts(prompts.ids[rank::ranks], prompts.visits[rank::ranks], prompts.tokens[rank::ranks])


def responses_by_prompt(hf_config: dict[str, Any], tp: int, pp: int, sequence_parallel: bool, **settings: Any):
    """{prompt id: its responses and their log-probabilities} of this replica."""
    model, layout = make_model(hf_config, tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    flags = {
        name: module.sequence_parallel for name, module in model.named_modules() if hasattr(module, "sequence_parallel")
    }
    prompts = share(PROMPTS, layout.dp_rank, layout.dp_size)
    rollouts = run_generate(model, layout, prompts, **settings)
    assert rollouts.log_probs is not None
    log_probs = [row[: len(r)] for row, r in zip(rollouts.log_probs.tolist(), rollouts.responses(), strict=True)]
    found = list(zip(rollouts.responses(), log_probs, strict=True))
    assert model.config.sequence_parallel == sequence_parallel
    assert flags == {name: module.sequence_parallel for name, module in model.named_modules() if name in flags}
    assert all(module.training for module in model.modules())
    assert all(module.cache is None for module in model.modules() if isinstance(module, CoreAttention))
    return {prompt: found[i * SAMPLES : (i + 1) * SAMPLES] for i, prompt in enumerate(prompts.ids)}


def full_forward_loop(hf_config: dict[str, Any]) -> dict[int, list[tuple[list[int], list[float]]]]:
    """One row at a time, the whole sequence anew for each token: what `generate` must equal."""
    model, _ = make_model(hf_config)
    responses: dict[int, list[tuple[list[int], list[float]]]] = {}
    for prompt_id, visit, prompt in zip(PROMPTS.ids, PROMPTS.visits, PROMPTS.tokens, strict=True):
        responses[prompt_id] = []
        for sample in range(SAMPLES):
            sequence, log_probs = list(prompt), []
            while len(sequence) < len(prompt) + LONGEST and sequence[-1] not in EOS:
                with torch.no_grad():
                    logits = model(torch.tensor([sequence]))[-1] @ model.head_weight().t()
                noise = uniform(
                    SEED, *(torch.tensor([x]) for x in (prompt_id, sample, visit, len(sequence) - len(prompt)))
                )
                token, _ = sample_tokens(logits, noise, vocab_size=VOCAB, shard_start=0, group=None)
                sequence.append(int(token))
                log_probs.append(float(logits[0, :VOCAB].double().log_softmax(0)[token]))
            responses[prompt_id].append((sequence[len(prompt) :], log_probs))
    return responses


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def expected(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[int, list[tuple[list[int], list[float]]]]]:
    hf_config = {"llama": LLAMA, "qwen2": QWEN2, "gpt2": GPT2}[request.param]
    (responses,) = run_distributed(full_forward_loop, 1, hf_config)
    return hf_config, responses


def test_the_case_is_not_trivial(expected):
    responses = [tokens for found in expected[1].values() for tokens, _ in found]
    assert len(set(map(len, responses))) > 2
    assert any(tokens[-1] in EOS for tokens in responses)
    assert len({token for tokens in responses for token in tokens}) > 10


@pytest.mark.distributed
def test_a_shard_forbids_its_own_end_tokens():
    """EOS before `min_response_length`, on each shard of the vocabulary."""
    ends = (*EOS, VOCAB - 2, VOCAB - 5)  # on both

    def work(tp: int) -> Any:
        return responses_by_prompt(LLAMA, tp, 1, False, min_response_length=5, eos_ids=ends)

    (expected,) = run_distributed(work, 1, 1)
    lengths = [len(tokens) for found in expected.values() for tokens, _ in found]
    assert min(lengths) >= 5
    assert any(5 <= length < LONGEST for length in lengths), "some do end"
    for found in run_distributed(work, 2, 2):
        for prompt, responses in expected.items():
            assert [tokens for tokens, _ in found[prompt]] == [tokens for tokens, _ in responses]


@pytest.mark.distributed
@pytest.mark.parametrize("pool", [1, 3, 16])
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "sequence_parallel"),
    [
        (1, 1, 1, False), (2, 1, 1, False), (1, 2, 1, False), (1, 1, 2, False), (2, 2, 1, False), (2, 2, 1, True),
        (1, 2, 2, False), (1, 4, 1, False),
    ],
)  # fmt: skip
def test_layouts_and_pools(expected, tp, pp, dp, sequence_parallel, pool):
    """Whatever the layout and the pool: a loop's tokens, and its log-probabilities within 1e-5."""
    hf_config, responses = expected
    pass_tokens = {1: 5, 3: 8, 16: 1024}[pool]  # prompts in pieces of 4 or 5, or all at once

    def work():
        with pytest.MonkeyPatch.context() as patch:
            if pool == 3:  # the others with packed weights
                patch.setattr("megatron_amd.rollout.generate._PACK_FROM", LONGEST + 1)
            patch.setattr("megatron_amd.rollout.decode_graphs._COLUMNS", 8)  # several graphs
            return responses_by_prompt(
                hf_config, tp, pp, sequence_parallel, batch_size=pool, pass_tokens=pass_tokens,
                look_interval={1: 1, 3: 5, 16: 64}[pool], cuda_graphs=pool != 1,
            )  # fmt: skip

    results = run_distributed(work, tp * pp * dp)
    merged: dict[int, list[tuple[list[int], list[float]]]] = {}
    for result in results:
        for prompt_id, found in result.items():
            assert merged.setdefault(prompt_id, found) == found, "ranks of a replica disagree"
    assert merged.keys() == responses.keys()
    for prompt_id, wanted in responses.items():
        for (tokens, log_probs), (wanted_tokens, wanted_log_probs) in zip(merged[prompt_id], wanted, strict=True):
            assert tokens == wanted_tokens
            assert log_probs == pytest.approx(wanted_log_probs, abs=1e-5)


@pytest.mark.distributed
def test_every_rank_is_told_what_is_complete():
    def work():
        model, layout = make_model(pp=2)
        told: list[tuple[int, int]] = []
        rollouts = run_generate(model, layout, batch_size=3, report=lambda *counts: told.append(counts))
        return told, [len(response) for response in rollouts.responses()]

    (told, lengths), (also_told, _) = run_distributed(work, 2)
    assert told == also_told
    assert [count for count, _ in told] == list(range(1, len(lengths) + 1))
    tokens = [0, *(tokens for _, tokens in told)]
    assert sorted(after - before for before, after in zip(tokens, tokens[1:], strict=False)) == sorted(lengths)


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_through_the_modules(expected, tp, pp):
    """As where layers cannot go the lean way: Megatron-Core's own modules on the same passes."""
    hf_config, responses = expected

    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_amd.rollout.passes.lean_layers", lambda _model, **_: None)
            return responses_by_prompt(hf_config, tp, pp, False, batch_size=3, pass_tokens=8)

    for found in run_distributed(work, tp * pp):
        assert {prompt: [tokens for tokens, _ in rows] for prompt, rows in found.items()} == {
            prompt: [tokens for tokens, _ in rows] for prompt, rows in responses.items()
        }


def what_goes_the_lean_way() -> None:
    model, _ = make_model()
    layers = lean_layers(model)
    assert layers is not None
    assert len(layers) == 4
    for name, value in (
        ("fp8", "hybrid"), ("fp32_residual_connection", True), ("activation_func_clamp_value", 7.0),
        ("rotary_interleaved", True), ("layernorm_zero_centered_gamma", True),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.config, name, value)
            assert lean_layers(model) is None, name
    model.decoder.layers[2].self_attention.q_layernorm = torch.nn.RMSNorm(8)
    assert lean_layers(model) is None


def test_what_goes_the_lean_way():
    run_distributed(what_goes_the_lean_way, 1)


def qwen3_goes_the_lean_way(folder: Path) -> None:
    model, _, _ = build_megatron(folder, ParallelConfig())
    layers = lean_layers(model)
    assert layers is not None
    assert all(layer.head_norms is not None for layer in layers)


def test_norms_of_queries_and_keys_go_the_lean_way(tmp_path: Path):
    """That it gives the same tokens is in test_greedy.py."""
    save_hf_model("qwen3", tmp_path)
    run_distributed(qwen3_goes_the_lean_way, 1, tmp_path)


def logprob_difference(**settings: Any) -> float:
    """Largest difference between the log-probabilities of a rollout and those of the trainer's forward on it, relative
    to those below -1."""
    model, layout = make_model()
    rollouts = run_generate(model, layout, **settings)
    with torch.no_grad():
        logits = model(rollouts.tokens).transpose(0, 1) @ model.head_weight().t()
    full = logits[..., :VOCAB].double().log_softmax(dim=-1)
    assert rollouts.log_probs is not None
    differences = []
    for row, response in enumerate(rollouts.responses()):
        first = int(rollouts.prompt_lengths[row])
        states = torch.arange(first - 1, first - 1 + len(response))
        expected = full[row, states, torch.tensor(response)]
        difference = (rollouts.log_probs[row, : len(response)] - expected) / expected.abs().clamp(min=1)
        differences.append(float(difference.abs().max()))
        assert not rollouts.log_probs[row, len(response) :].any()
    return max(differences)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {"temperature": 0.0}, {"min_response_length": 4}]
)
def test_log_probs_equal_those_of_a_full_forward(settings: dict[str, Any]):
    """Under the model itself: at temperature 1, with nothing cut off, whatever the tokens were drawn from."""
    (difference,) = run_distributed(lambda: logprob_difference(**settings), 1)
    assert difference < 1e-5


def wrapped_and_greedy() -> None:
    model, layout = make_model()
    modes = []
    hook = model.embedding.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    bare = run_generate(model, layout, temperature=0.0)
    hook.remove()
    assert modes
    assert not any(modes)
    wrapper = torch.nn.Module()
    wrapper.module = model
    wrapped = run_generate(wrapper, layout, temperature=0.0, seed=SEED + 1)
    assert bare.responses() == wrapped.responses(), "greedy decoding must not depend on the seed"
    assert bare.responses()[::2] == bare.responses()[1::2], "nor on the sample"
    sampled = run_generate(model, layout)
    assert sampled.responses() != run_generate(model, layout, seed=SEED + 1).responses()
    assert sampled.responses()[::2] != sampled.responses()[1::2]
    second = run_generate(model, layout, samples_per_prompt=1, sample_index=[1] * len(PROMPTS))
    assert second.responses() == sampled.responses()[1::2]
    never = run_generate(model, layout, eos_ids=())
    assert (never.lengths - never.prompt_lengths == LONGEST).all()
    assert len(run_generate(model, layout, Prompts((), (), ()))) == 0


def token_multiples() -> None:
    """As FP8 needs them: fillers change nothing."""
    model, layout = make_model()
    expected = run_generate(model, layout).responses()
    sizes = []
    hook = model.embedding.register_forward_hook(lambda _module, _args, output: sizes.append(output.shape[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_amd.rollout.passes.token_multiple", lambda _model: 3)
        assert run_generate(model, layout).responses() == expected
        assert run_generate(model, layout, look_interval=4).responses() == expected
    hook.remove()
    assert len(set(sizes)) > 1
    assert not any(size % 3 for size in sizes)


def test_token_multiples():
    run_distributed(token_multiples, 1)


def settings_of_length() -> None:
    model, layout = make_model()
    plain = run_generate(model, layout)
    assert (plain.lengths - plain.prompt_lengths).min() < 4
    late = run_generate(model, layout, min_response_length=4)
    assert late.responses() == run_generate(model, layout, min_response_length=4, look_interval=6).responses()
    assert (late.lengths - late.prompt_lengths).min() >= 4
    more = run_generate(model, layout, min_response_length=4, samples_per_prompt=8).responses()
    assert not any(set(response[:4]) & set(EOS) for response in more)
    assert any(response[4:5] and response[4] in EOS for response in more), "as transformers' min_new_tokens"
    one = run_generate(model, layout, max_response_length=1)
    assert [r[:1] for r in plain.responses()] == one.responses()
    stopped = run_generate(model, layout, is_complete=lambda tokens: len(tokens) == 3)
    assert [r[:3] for r in plain.responses()] == stopped.responses()
    edge = Prompts((3,), (0,), (tuple(range(20, 20 + 64 - LONGEST)),))  # to the last of the model's positions
    assert run_generate(model, layout, edge, eos_ids=()).lengths.tolist() == [64, 64]


def after_a_change() -> None:
    """Packed weights are those of the moment: not of the generation before."""
    model, layout = make_model()
    before = run_generate(model, layout).responses()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    packed = run_generate(model, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_amd.rollout.generate._PACK_FROM", LONGEST + 1)
        plain = run_generate(model, layout)
    assert packed.responses() == plain.responses() != before
    torch.testing.assert_close(packed.log_probs, plain.log_probs, rtol=0, atol=1e-5)


def test_after_a_change():
    run_distributed(after_a_change, 1)


def what_graphs_are_made() -> None:
    """Those of 12 rows and, as responses end, of 8, 4, 2 and 1, each for several numbers of columns."""
    model, layout = make_model()
    passes, made = [], []
    compute, view = DecodeGraphs._compute, KVCache.fixed_view
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_amd.rollout.decode_graphs._COLUMNS", 8)
        patch.setattr(DecodeGraphs, "_compute", lambda *args: passes.append(len(args[1].hidden)) or compute(*args))
        patch.setattr(KVCache, "fixed_view", lambda *args: made.append(args[1:3]) or view(*args))
        run_generate(model, layout, cuda_graphs=True, look_interval=2)
        assert len(passes) >= LONGEST - 1
        assert len(set(made)) == len(made) < len(passes)
        assert set(passes) == {rows for rows, _ in made} <= {12, 8, 4, 2, 1}
        assert len(set(passes)) > 2
        assert len({columns for _, columns in made}) > 2
        passes.clear()
        run_generate(model, layout)
        assert not passes


def test_what_graphs_are_made():
    run_distributed(what_graphs_are_made, 1)


def what_stays_of_a_generation(**settings: Any) -> None:
    """No circle of references keeps keys, values and packed weights until the next collection of garbage."""
    model, layout = make_model()
    made: list[weakref.ref] = []
    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for kind in (KVCache, LayerCache, Product, DecodeGraphs):
                start = kind.__init__

                def noting(self: Any, *args: Any, start: Any = start, **kwargs: Any) -> None:
                    made.append(weakref.ref(self))
                    start(self, *args, **kwargs)

                patch.setattr(kind, "__init__", noting)
            run_generate(model, layout, **settings)
        assert len(made) > 10
        assert [found for ref in made if (found := ref()) is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("settings", [{}, {"cuda_graphs": True}])
def test_nothing_stays_of_a_generation(settings: dict[str, Any]):
    run_distributed(lambda: what_stays_of_a_generation(**settings), 1)


def looks() -> None:
    """Where nothing is read, the host makes up its mind after five steps, else after each."""
    model, layout = make_model()
    counts = {"expect": 0, "advance": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            method = getattr(KVCache, name)

            def counting(cache: KVCache, *args: Any, name: str = name, method: Any = method) -> None:
                counts[name] += 1
                method(cache, *args)

            patch.setattr(KVCache, name, counting)
        run_generate(model, layout, eos_ids=(), look_interval=5)
    assert counts == {"expect": 4, "advance": 12}  # one to read, three of five steps each
    assert LONGEST == 16


def test_looks():
    run_distributed(looks, 1)


def test_lengths():
    run_distributed(settings_of_length, 1)


def mixed() -> None:
    """Half of each token's distribution from another model; a share of 0 or 1 is one model alone."""
    model, layout = make_model()
    other, _ = make_model(QWEN2, layout=layout)
    initialize_weights(other, seed="another")
    alone, of_other = run_generate(model, layout), run_generate(other, layout)
    assert alone.responses() != of_other.responses()
    assert run_generate(model, layout, mixed_with=(other, 0.0)).responses() == alone.responses()
    only_other = run_generate(model, layout, mixed_with=(other, 1.0))
    assert only_other.responses() == of_other.responses()
    half = run_generate(model, layout, mixed_with=(other, 0.5), batch_size=3)
    with torch.no_grad():
        for rollouts in (half, only_other):  # log-probabilities stay those of the first model
            logits = model(rollouts.tokens).transpose(0, 1) @ model.head_weight().t()
            full = logits[..., :VOCAB].log_softmax(dim=-1)
            for row, response in enumerate(rollouts.responses()):
                states = torch.arange(len(response)) + rollouts.prompt_lengths[row] - 1
                expected = full[row, states, torch.tensor(response)]
                torch.testing.assert_close(rollouts.log_probs[row, : len(response)], expected, rtol=0, atol=1e-5)
    # The first tokens are draws from the mean of both distributions.
    prompt, count = Prompts((3,), (0,), ((20, 21),)), 4000
    first = run_generate(
        model, layout, prompt, samples_per_prompt=count, max_response_length=1, mixed_with=(other, 0.5)
    )
    with torch.no_grad():
        both = [m(torch.tensor([[20, 21]]))[-1, 0] @ m.head_weight()[:VOCAB].t() for m in (model, other)]
    mean = torch.stack([logits.double().softmax(0) for logits in both]).mean(0)
    counts = torch.bincount(first.tokens[:, 2], minlength=VOCAB).double()
    common = mean * count > 5
    statistic = float(((counts - mean * count) ** 2 / (mean * count))[common].sum())
    freedom = int(common.sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_mixture_of_two_models():
    run_distributed(mixed, 1)


@pytest.mark.distributed
def test_mixture_under_tensor_and_pipeline_parallelism():
    def work(tp: int, pp: int) -> list[list[int]]:
        model, layout = make_model(tp=tp, pp=pp)
        other, _ = make_model(QWEN2, tp=tp, pp=pp, layout=layout)
        return run_generate(model, layout, mixed_with=(other, 0.3), batch_size=5).responses()

    (expected,) = run_distributed(lambda: work(1, 1), 1)
    assert run_distributed(lambda: work(2, 2), 4) == [expected] * 4


def bounded_memory() -> None:
    """500 prompts of wildly different lengths in a pool of 8: no row nor byte more than the budget allows."""
    model, layout = make_model()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 64 - LONGEST, (500,), generator=generator).tolist()
    prompts = Prompts(tuple(range(500)), (0,) * 500, tuple((20 + i % 60,) * n for i, n in enumerate(lengths)))
    largest, passes, in_work = 0, [], []
    attend = CoreAttention.attend_cached

    def look(module: CoreAttention, query: torch.Tensor, *others: Any) -> torch.Tensor:
        nonlocal largest
        found = attend(module, query, *others)
        assert module.cache is not None
        assert module.cache.buffer is not None
        if module.layer_number == 1:
            largest = max(largest, module.cache.buffer.shape[1] * module.cache.buffer.shape[3])
            passes.append(len(query))
            in_work.append(module.cache.owner.decoding)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoreAttention, "attend_cached", look)
        rollouts = run_generate(
            model, layout, prompts, samples_per_prompt=1, batch_size=8, cache_tokens=6 * 64, pass_tokens=40
        )
    assert len(rollouts) == 500
    assert largest <= 6 * 64
    assert max(passes) <= 40
    assert max(in_work) == 6
    tokens = int((rollouts.lengths - 1).sum())
    assert sum(passes) == tokens, "each token goes through the model once, and no padding does"
    with pytest.raises(InputError, match=r"rollout.cache_tokens=60 has no room"):
        run_generate(model, layout, prompts, cache_tokens=60)


def budget_of_all_caches() -> None:
    """A mixture's two models share the budget, and the rows for FP8's fillers are in it."""
    model, layout = make_model()
    other, _ = make_model(QWEN2, layout=layout)
    prompts = Prompts((1, 2, 3, 4), (0,) * 4, ((20,) * (64 - LONGEST), (21,), (22,), (23,)))
    for mixed_with, multiple, rows in (
        (None, 1, [4]),
        ((other, 0.3), 1, [2, 2]),
        (None, 8, [4]),
        ((other, 0.3), 8, [2, 2]),
    ):
        made: list[int] = []

        def counting(model: Any, rows: int, *sizes: Any, made: list[int] = made) -> KVCache:
            made.append(rows)
            return kv_cache(model, rows, *sizes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_amd.rollout.passes.kv_cache", counting)
            patch.setattr("megatron_amd.rollout.passes.token_multiple", lambda _, multiple=multiple: multiple)
            run_generate(model, layout, prompts, samples_per_prompt=1, cache_tokens=4 * 64, mixed_with=mixed_with)
        assert made == rows


def test_the_budget_is_of_all_caches():
    run_distributed(budget_of_all_caches, 1)


def test_memory_is_bounded():
    run_distributed(bounded_memory, 1)


@pytest.mark.distributed
def test_a_replica_without_prompts_does_not_wait():
    def work() -> int:
        model, layout = make_model(pp=2)
        prompts = PROMPTS if layout.dp_rank == 0 else Prompts((), (), ())
        return len(run_generate(model, layout, prompts))

    assert sorted(run_distributed(work, 4, timeout=60)) == [0, 0, 12, 12]


def test_settings():
    run_distributed(wrapped_and_greedy, 1)


def errors() -> None:
    model, layout = make_model()
    with pytest.raises(InputError, match="prompt 3 has no tokens"):
        run_generate(model, layout, Prompts((3,), (0,), ((),)))
    with pytest.raises(InputError, match="exceed the model's 64 positions"):
        run_generate(model, layout, Prompts((3,), (0,), ((1,) * 60,)))
    model.head_weight = None  # any failure midway
    with pytest.raises(TypeError):
        run_generate(model, layout)
    assert model.training
    assert torch.is_grad_enabled()
    assert all(module.cache is None for module in model.modules() if isinstance(module, CoreAttention))


def test_errors_and_restoring():
    run_distributed(errors, 1)


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_half_precision(tp: int, pp: int):
    """Ranks agree, and greedy tokens are those of the modules or as good as them, up to bf16's rounding."""

    def work() -> tuple[list[list[int]], float]:
        model, layout = make_model(tp=tp, pp=pp, precision="bf16", sequence_parallel=tp > 1)
        model = model.bfloat16()
        rollouts = run_generate(model, layout, temperature=0.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_amd.rollout.passes.lean_layers", lambda _model, **_: None)
            plain = run_generate(model, layout, temperature=0.0)
        assert rollouts.log_probs is not None
        assert plain.log_probs is not None
        return rollouts.responses(), float((rollouts.log_probs[:, 0] - plain.log_probs[:, 0]).abs().max())

    results = run_distributed(work, tp * pp)
    for responses, difference in results:
        assert responses == results[0][0]
        assert all(token < VOCAB for response in responses for token in response)
        assert difference < 0.1


def many_generations() -> tuple[int, int, float]:
    """Tensors alive after 100 and after 1,000 generations, and MiB of memory that came between."""
    model, layout = make_model()
    counts, resident = [], []
    for turn in range(1000):
        run_generate(model, layout, PROMPTS.head(2), samples_per_prompt=1, max_response_length=2, seed=turn)
        if turn in (99, 999):
            gc.collect()
            counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
    return counts[0], counts[1], resident[1] - resident[0]


def test_nothing_is_left_behind():
    ((first, last, grown),) = run_distributed(many_generations, 1)
    assert last == first
    assert grown < 16


@pytest.mark.distributed
def test_a_killed_rank_ends_the_others():
    """Its neighbour in a pipeline gets an error at once and does not wait for the timeout."""

    def work() -> tuple[str, float]:
        model, layout = make_model(pp=2)
        killed_at = 0.0

        def maybe_die(tokens: Sequence[int]) -> bool:
            nonlocal killed_at
            if len(tokens) == 3:
                killed_at = time.monotonic()
                if dist.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            return False

        with pytest.raises(RuntimeError) as caught:
            run_generate(model, layout, eos_ids=(), is_complete=maybe_die)
        return str(caught.value), time.monotonic() - killed_at

    (message, seconds), _ = run_distributed(work, 2, dies=1)
    assert "peer" in message
    assert seconds < 20
