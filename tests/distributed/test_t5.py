"""T5 through tensor, sequence and pipeline parallelism: logits, gradients, weights and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_amd.batch import MicroBatch, Prompts, Rollouts, make_encoder_decoder_microbatches
from megatron_amd.checkpoint.hf import export_hf, load_hf_weights
from megatron_amd.config import ParallelConfig
from megatron_amd.distributed.layout import Layout
from megatron_amd.distributed.schedule import forward_states
from megatron_amd.models.t5 import relative_buckets, stage_layers
from megatron_amd.rollout.generate import generate
from tests.distributed.runner import run_distributed
from tests.hf_models import T5_MODELS, build_megatron, make_hf_model, save_hf_model, state_dict

pytestmark = pytest.mark.distributed

LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (1, 3, False), (2, 2, True), (2, 3, True)]
"""(TP, PP, sequence parallelism)."""
PROMPTS = [[5, 9, 3], [7], [8, 8, 2, 41, 17, 6, 30, 12, 4], [11, 22, 33, 44, 1], [26, 50], [1, 14, 8, 29, 47, 35, 2]]
RESPONSES = [[4, 8], [12, 40, 6, 9, 3, 1, 7, 5, 5, 19, 2], [1], [20, 21, 22], [13], [9, 10, 11, 12, 24]]
SCALED = (".wo.weight", ".wi.weight", ".wi_0.weight", ".wi_1.weight")
EOS = (3, 17, 31)
LONGEST = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in T5_MODELS:
        model = save_hf_model(kind, root / kind)
        torch.save(logits_of_transformers(model), root / kind / "logits.pt")
    return {kind: root / kind for kind in T5_MODELS}


@torch.no_grad()
def logits_of_transformers(model: Any) -> list[torch.Tensor]:
    """[T, V] of each response, its prompt alone."""
    start = model.config.decoder_start_token_id
    return [
        model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *response[:-1]]])).logits[0]
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]


def parallel(tensor: int, pipeline: int, sequence: bool) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, sequence_parallel=sequence
    )


def logits_of_states(
    model: Any, microbatches: list[MicroBatch], layout: Layout, vocab_size: int
) -> torch.Tensor | None:
    """[N, V] at all states, on the last stage."""
    states = forward_states(model, microbatches, layout)
    if states is None:
        return None
    local = torch.cat(states) @ model.head_weight().t()
    shards = [torch.empty_like(local) for _ in range(layout.tp_size)]
    torch.distributed.all_gather(shards, local, group=layout.groups.tp)
    return torch.cat(shards, dim=-1)[:, :vocab_size]


def load_compare_export(folders: dict[str, Path], exported: Path, *sizes: Any) -> dict[str, float]:
    """For each folder, load it, compare logits at all states, export it. Largest differences on the last stage."""
    worst, layout = {}, None
    for kind, folder in folders.items():
        model, architecture, layout = build_megatron(folder, parallel(*sizes), layout=layout)
        load_hf_weights(model, folder, architecture)
        microbatches = make_encoder_decoder_microbatches(
            Rollouts.from_lists(PROMPTS, RESPONSES), on_policy=True, size=4, prompt_width=10, response_width=12,
            start_id=model.decoder_start_id,
        )  # fmt: skip
        logits = logits_of_states(model, microbatches, layout, architecture.vocab_size)
        if logits is not None:
            expected = torch.cat(torch.load(folder / "logits.pt"))
            assert torch.cat([m.targets for m in microbatches]).tolist() == sum(RESPONSES, [])
            worst[kind] = ((logits - expected).abs().max() / expected.abs().max()).item()
        export_hf(model, exported / kind, architecture, layout)
    return worst


@pytest.mark.parametrize(("tensor", "pipeline", "sequence"), LAYOUTS)
def test_logits_equal_transformers_and_the_round_trip_is_bit_exact(
    folders: dict[str, Path], tmp_path: Path, tensor: int, pipeline: int, sequence: bool
) -> None:
    results = run_distributed(load_compare_export, tensor * pipeline, folders, tmp_path, tensor, pipeline, sequence)
    compared = [worst for worst in results if worst]
    assert len(compared) == tensor
    for worst in compared:
        assert set(worst) == set(folders)
        assert max(worst.values()) < 1e-5, worst
    for kind, folder in folders.items():
        before, after = state_dict(folder), state_dict(tmp_path / kind)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), kind


def test_an_exported_folder_loads_in_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    run_distributed(load_compare_export, 2, folders, tmp_path, 1, 2, False)
    for kind, folder in folders.items():
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / kind)
        for found, expected in zip(logits_of_transformers(model), torch.load(folder / "logits.pt"), strict=True):
            assert torch.equal(found, expected), kind


def load_cut(folder: Path, exported: Path) -> None:
    model, architecture, layout = build_megatron(folder, parallel(2, 2, False), layers=(2, 0))
    load_hf_weights(model, folder, architecture, layers=(2, 0))
    export_hf(model, exported, architecture, layout)


def test_a_cut_keeps_the_chosen_layers_of_both_stacks(folders: dict[str, Path], tmp_path: Path) -> None:
    run_distributed(load_cut, 4, folders["t5-1.1"], tmp_path / "cut")
    whole, cut = state_dict(folders["t5-1.1"]), state_dict(tmp_path / "cut")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for stack in ("encoder", "decoder"):
        assert torch.equal(cut[f"{stack}.{bias}"], whole[f"{stack}.{bias}"]), "the table of all layers"
        for place, source in enumerate((2, 0)):
            for name in ("layer.0.SelfAttention.k.weight", "layer.1.layer_norm.weight"):
                assert torch.equal(cut[f"{stack}.block.{place}.{name}"], whole[f"{stack}.block.{source}.{name}"])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "cut")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 2)
    assert len(cut) == len(model.state_dict()) - 2  # without the embedding's two other names


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 300)
    for buckets, longest in ((32, 128), (8, 20), (16, 17)):
        expected = T5Attention._relative_position_bucket(distances, bidirectional, buckets, longest)
        assert torch.equal(relative_buckets(distances, buckets, longest, bidirectional=bidirectional), expected)


def test_every_layer_is_on_one_stage() -> None:
    class Sizes:
        encoder_layers, num_layers = 5, 3

    for stages in range(1, 9):
        cut = [stage_layers(Sizes, stages, stage) for stage in range(stages)]  # type: ignore[arg-type]
        assert [layer for encoder, _ in cut for layer in encoder] == list(range(5))
        assert [layer for _, decoder in cut for layer in decoder] == list(range(3))
        assert {len(encoder) + len(decoder) for encoder, decoder in cut} <= {8 // stages, -(-8 // stages)}


def sharp_model(kind: str) -> Any:
    """One whose likeliest token depends on the whole past."""
    model = make_hf_model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(SCALED):
                parameter *= 6
    return model


def prompts() -> Prompts:
    return Prompts(ids=tuple(range(6)), visits=(0,) * 6, tokens=tuple(map(tuple, PROMPTS)))


def greedy_of_transformers(model: Any) -> list[list[int]]:
    responses = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=LONGEST,
            eos_token_id=list(EOS), pad_token_id=0, use_cache=False,  # its cache takes as many layers as the encoder's
        )  # fmt: skip
        responses.append(found[0, 1:].tolist())
    return responses


def generate_ours(folders: dict[str, Path], batch_size: int, *sizes: Any) -> dict[str, Any]:
    """Of the `sharp` models greedy tokens; of all sampled ones, with the largest difference between their
    log-probabilities and those of the trainer's forward pass."""
    found: dict[str, Any] = {}
    layout = None
    for kind, folder in folders.items():
        model, architecture, layout = build_megatron(folder, parallel(*sizes), layout=layout)
        load_hf_weights(model, folder, architecture)
        settings: dict[str, Any] = {
            "layout": layout, "vocab_size": architecture.vocab_size, "eos_ids": EOS, "seed": 7,
            "max_response_length": LONGEST, "batch_size": batch_size, "pass_tokens": 24,
            "look_interval": 5 if batch_size == 64 else None,
        }  # fmt: skip
        greedy = generate(model, prompts(), temperature=0, **settings).responses() if "sharp" in kind else None
        sampled = generate(model, prompts(), samples_per_prompt=2, **settings)
        assert sampled.log_probs is not None
        longest = int((sampled.lengths - sampled.prompt_lengths).max())
        [microbatch] = make_encoder_decoder_microbatches(
            sampled, on_policy=True, size=len(sampled), prompt_width=10, response_width=longest + longest % 2,
            start_id=model.decoder_start_id,
        )  # fmt: skip
        logits = logits_of_states(model, [microbatch], layout, architecture.vocab_size)
        difference = 0.0
        if logits is not None:
            exact = logits.log_softmax(-1).gather(1, microbatch.targets[:, None])[:, 0]
            own = sampled.log_probs[microbatch.state_rows, microbatch.steps]
            difference = (exact - own).abs().max().item()
        found[kind] = (greedy, sampled.responses(), difference)
    return found


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, list[list[int]]]]:
    root, expected = tmp_path_factory.mktemp("sharp"), {}
    for kind in T5_MODELS:
        model = sharp_model(kind)
        model.save_pretrained(root / kind)
        expected[f"sharp {kind}"] = greedy_of_transformers(model)
    return {f"sharp {kind}": root / kind for kind in T5_MODELS}, expected


@pytest.fixture(scope="module")
def one_process(folders: dict[str, Path], sharp: Any) -> dict[str, Any]:
    return run_distributed(generate_ours, 1, folders | sharp[0], 64, 1, 1, False)[0]


def test_the_case_is_not_trivial(sharp: Any, one_process: dict[str, Any]) -> None:
    for kind, responses in sharp[1].items():
        assert len({token for response in responses for token in response}) > 6, kind
    for kind, (_, sampled, _) in one_process.items():
        assert len(set(map(len, sampled))) > 4, kind
        assert len(set(map(tuple, sampled))) > 9, kind


@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence", "batch_size"),
    [(1, 1, False, 3), (2, 1, True, 3), (1, 2, False, 3), (1, 3, False, 1), (2, 2, True, 64)],
)
def test_generation(
    folders: dict[str, Path],
    sharp: Any,
    one_process: dict[str, Any],
    tensor: int,
    pipeline: int,
    sequence: bool,
    batch_size: int,
) -> None:
    """Greedy tokens are transformers', sampled ones the same for every layout and pool, log-probabilities exact."""
    models, sizes = folders | sharp[0], (tensor, pipeline, sequence)
    for found in run_distributed(generate_ours, tensor * pipeline, models, batch_size, *sizes):
        for kind, (greedy, sampled, difference) in found.items():
            assert greedy == sharp[1].get(kind), kind
            assert sampled == one_process[kind][1], kind
            assert difference < (1e-4 if "sharp" in kind else 1e-5), kind
