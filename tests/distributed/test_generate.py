"""Generation gives the same tokens under every layout and batch split, and those of a loop without a cache."""

from __future__ import annotations

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
from megatron_amd.models.attention import CoreAttention, kv_cache
from megatron_amd.models.gpt import CausalLM, build_gpt, initialize_weights, transformer_config
from megatron_amd.rollout.generate import generate
from megatron_amd.rollout.sampling import sample_tokens, uniform
from tests.distributed.runner import run_distributed

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
PROMPTS = Prompts(
    ids=(10, 11, 12, 13),
    visits=(0, 0, 1, 0),
    tokens=((20, 21, 22), (30,), (40, 41, 42, 43, 44, 45, 46), (50, 51)),
)
SAMPLES, LONGEST, SEED = 2, 12, 99


def make_model(
    hf_config: dict[str, Any] = LLAMA, *, tp: int = 1, pp: int = 1, sequence_parallel: bool = False,
    precision: str = "fp32",
) -> tuple[CausalLM, Layout]:  # fmt: skip
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sequence_parallel
    )
    layout = build_layout(parallel, torch.device("cpu"))
    set_seeds(1, layout)
    architecture = Architecture.from_hf(hf_config, "test")
    config = transformer_config(
        architecture, TrainingConfig(precision=precision), layout, {"perform_initialization": True}, "student"
    )
    config.init_method_std = 0.3  # sharp enough that a wrong cache shows
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
    """{prompt id: its responses} of this replica."""
    model, layout = make_model(hf_config, tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    flags = {
        name: module.sequence_parallel for name, module in model.named_modules() if hasattr(module, "sequence_parallel")
    }
    prompts = share(PROMPTS, layout.dp_rank, layout.dp_size)
    responses = run_generate(model, layout, prompts, **settings).responses()
    assert model.config.sequence_parallel == sequence_parallel
    assert flags == {name: module.sequence_parallel for name, module in model.named_modules() if name in flags}
    assert all(module.training for module in model.modules())
    assert all(module.cache is None for module in model.modules() if isinstance(module, CoreAttention))
    return {prompt: responses[i * SAMPLES : (i + 1) * SAMPLES] for i, prompt in enumerate(prompts.ids)}


def full_forward_loop(hf_config: dict[str, Any]) -> dict[int, list[list[int]]]:
    """One row at a time, the whole sequence anew for each token: what `generate` must equal."""
    model, _ = make_model(hf_config)
    responses: dict[int, list[list[int]]] = {}
    for prompt_id, visit, prompt in zip(PROMPTS.ids, PROMPTS.visits, PROMPTS.tokens, strict=True):
        responses[prompt_id] = []
        for sample in range(SAMPLES):
            sequence = list(prompt)
            while len(sequence) < len(prompt) + LONGEST and sequence[-1] not in EOS:
                with torch.no_grad():
                    logits = model(torch.tensor([sequence]))[-1] @ model.head_weight().t()
                noise = uniform(
                    SEED, *(torch.tensor([x]) for x in (prompt_id, sample, visit, len(sequence) - len(prompt)))
                )
                token = sample_tokens(
                    logits, noise, vocab_size=VOCAB, shard_start=0, group=None, temperature=1.0, top_k=0, top_p=1.0
                )
                sequence.append(int(token))
            responses[prompt_id].append(sequence[len(prompt) :])
    return responses


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def expected(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[int, list[list[int]]]]:
    hf_config = {"llama": LLAMA, "gpt2": GPT2}[request.param]
    (responses,) = run_distributed(full_forward_loop, 1, hf_config)
    return hf_config, responses


def test_the_case_is_not_trivial(expected):
    lengths = [len(r) for responses in expected[1].values() for r in responses]
    ended = [r[-1] in EOS for responses in expected[1].values() for r in responses]
    assert len(set(lengths)) > 2
    assert any(ended)
    assert len({token for responses in expected[1].values() for r in responses for token in r}) > 10


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "sequence_parallel", "batch_size"),
    [
        (1, 1, 1, False, None), (1, 1, 1, False, 3), (1, 1, 1, False, 1), (2, 1, 1, False, None), (1, 2, 1, False, 3),
        (1, 1, 2, False, None), (2, 2, 1, False, None), (2, 1, 1, True, 3), (2, 2, 1, True, None), (1, 2, 2, False, 2),
    ],
)  # fmt: skip
def test_layouts_and_batch_splits(expected, tp, pp, dp, sequence_parallel, batch_size):
    hf_config, responses = expected

    def work():
        return responses_by_prompt(hf_config, tp, pp, sequence_parallel, batch_size=batch_size)

    results = run_distributed(work, tp * pp * dp)
    merged: dict[int, list[list[int]]] = {}
    for result in results:
        for prompt_id, found in result.items():
            assert merged.setdefault(prompt_id, found) == found, "ranks of a replica disagree"
    assert merged == responses


def logprob_difference() -> float:
    """Largest difference between log-probabilities of sampled tokens from cached decoding and from one full forward."""
    model, layout = make_model()
    rollouts = run_generate(model, layout)
    with torch.no_grad():
        logits = model(rollouts.tokens).transpose(0, 1) @ model.head_weight().t()
        full = logits[..., :VOCAB].log_softmax(dim=-1)
        differences = []
        width = int(rollouts.prompt_lengths.max())
        with kv_cache(model.eval(), len(rollouts), rollouts.tokens.shape[1]) as cache:
            cache.start(width)
            hidden = model(rollouts.tokens[:, :width])
            rows = torch.arange(len(rollouts))
            current = hidden[rollouts.prompt_lengths - 1, rows]
            for step in range(rollouts.tokens.shape[1] - width):
                cached = (current @ model.head_weight().t())[:, :VOCAB].log_softmax(dim=-1)
                columns = rollouts.prompt_lengths + step
                alive = columns < rollouts.lengths
                targets = rollouts.tokens[rows, columns.clamp(max=rollouts.tokens.shape[1] - 1)]
                difference = cached[rows, targets] - full[rows, columns - 1, targets]
                differences.append(float(difference[alive].abs().max()) if alive.any() else 0.0)
                cache.step(columns[:, None], width + step + 1)
                current = model(targets[:, None], columns[:, None])[0]
    assert len(differences) > 5
    return max(differences)


def test_logprobs_equal_those_of_a_full_forward():
    (difference,) = run_distributed(logprob_difference, 1)
    assert difference < 1e-5


def wrapped_and_greedy() -> None:
    model, layout = make_model()
    modes = []
    hook = model.decoder.register_forward_pre_hook(lambda module, _: modes.append(module.training))
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


def row_multiples() -> None:
    """As FP8 needs them: filler rows and rows kept after their end change nothing."""
    model, layout = make_model()
    expected = run_generate(model, layout).responses()
    sizes = []
    hook = model.decoder.register_forward_hook(lambda _module, _args, output: sizes.append(output.shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_amd.rollout.generate.row_multiple", lambda _model: 3)
        assert run_generate(model, layout).responses() == expected
    hook.remove()
    assert sizes[0] == 9
    assert len(set(sizes)) > 1
    assert not any(size % 3 for size in sizes)


def test_row_multiples():
    run_distributed(row_multiples, 1)


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


def half_precision() -> None:
    model, layout = make_model(tp=2, precision="bf16", sequence_parallel=True)
    rollouts = run_generate(model.bfloat16(), layout)
    gathered = [torch.empty_like(rollouts.tokens) for _ in range(2)]
    dist.all_gather(gathered, rollouts.tokens)
    assert torch.equal(*gathered)
    assert (rollouts.tokens < VOCAB).all()


@pytest.mark.distributed
def test_half_precision():
    run_distributed(half_precision, 2)
