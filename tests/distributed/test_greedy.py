"""Greedy generation equals that of `transformers`, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_amd.batch import Prompts
from megatron_amd.checkpoint.hf import load_hf_weights
from megatron_amd.config import ParallelConfig
from megatron_amd.rollout.generate import generate
from tests.distributed.runner import run_distributed
from tests.hf_models import MODELS, build_megatron, make_hf_model, random_tokens

pytestmark = pytest.mark.distributed

EOS = (3, 17, 31)
LONGEST = 40
LENGTHS = (1, 2, 5, 9, 17, 20)


def prompts() -> Prompts:
    rows = random_tokens(len(LENGTHS), max(LENGTHS)).tolist()
    tokens = tuple(tuple(row[:length]) for row, length in zip(rows, LENGTHS, strict=True))
    return Prompts(ids=tuple(range(len(tokens))), visits=(0,) * len(tokens), tokens=tokens)


def sharp_model(kind: str) -> torch.nn.Module:
    """One whose likeliest token depends on the whole past: large weights, small biases."""
    model = make_hf_model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter *= 4
            elif name.endswith("bias"):
                parameter *= 0.1
    return model


def of_transformers(model: torch.nn.Module) -> list[list[int]]:
    """Each prompt alone, so that there is no padding."""
    responses = []
    for prompt in prompts().tokens:
        tokens = torch.tensor([prompt])
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=LONGEST,
            eos_token_id=list(EOS), pad_token_id=0,
        )  # fmt: skip
        responses.append(found[0, len(prompt) :].tolist())
    return responses


def ours(folders: dict[str, Path], tensor: int, pipeline: int) -> dict[str, list[list[int]]]:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    responses, layout = {}, None
    for kind, folder in folders.items():
        model, architecture, layout = build_megatron(folder, parallel, layout=layout)
        load_hf_weights(model, folder, architecture)
        rollouts = generate(
            model, prompts(), layout=layout, vocab_size=architecture.vocab_size, eos_ids=EOS, seed=0,
            max_response_length=LONGEST, temperature=0, batch_size=4,
        )  # fmt: skip
        responses[kind] = rollouts.responses()
    return responses


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tmp_path_factory.mktemp(kind) for kind in MODELS}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    responses = {}
    for kind, folder in folders.items():
        model = sharp_model(kind)
        model.save_pretrained(folder)
        responses[kind] = of_transformers(model)
    return responses


def test_the_case_is_not_trivial(expected):
    for kind, responses in expected.items():
        assert len({token for response in responses for token in response}) > 10, kind
    lengths = [len(response) for responses in expected.values() for response in responses]
    assert LONGEST in lengths
    assert len(set(lengths)) > 5


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_greedy_equals_transformers(folders, expected, tensor, pipeline):
    for found in run_distributed(ours, tensor * pipeline, folders, tensor, pipeline):
        assert found == expected
