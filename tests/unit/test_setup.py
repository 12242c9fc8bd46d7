"""What is looked at before a run begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_amd.config import Config, ModelConfig, load_config
from megatron_amd.data.response_files import Header
from megatron_amd.training.setup import _compare_ends, _shared_tokenizer, _warn_of_settings
from tests.small_tokenizers import make_hf_tokenizer

ADAPTIVE = (
    "objective.policy_gradient=per_step", "rollout.reuse.mode=adaptive", "rollout.off_policy=data",
    "data.response_field=r", "evaluation.prompts=1", "evaluation.interval=1",
)  # fmt: skip
PER_STEP = ("objective.policy_gradient=per_step",)


def test_models_that_end_their_responses_differently_are_told_of(tmp_path: Path) -> None:
    for role in ("teacher", "student"):
        make_hf_tokenizer(tmp_path / role, vocab_size=300, eos="<|im_end|>")
    config = replace(
        Config(),
        teacher=ModelConfig(path=str(tmp_path / "teacher")),
        student=ModelConfig(path=str(tmp_path / "student")),
    )
    said: list[str] = []
    tokenizer = _shared_tokenizer(config, said.append)
    assert said == []
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert _shared_tokenizer(config, said.append).eos_ids == tokenizer.eos_ids
    (line,) = said
    assert f"{tmp_path / 'student'} ends a response with '<|im_end|>', {tokenizer.token(7)!r}" in line
    assert "may write on to the length limit" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["rollout.responses=x"], ["rollout.responses: is not read with rollout.off_policy: teacher"]),
        (["rollout.responses=x", "rollout.off_policy=file"], []),
        (
            ["rollout.reuse.steps=3", "rollout.reuse.capacity=9"],
            [f"rollout.reuse.{name}: changes nothing with rollout.reuse.mode: none" for name in ("steps", "capacity")],
        ),
        ([*PER_STEP, "rollout.reuse.mode=steps", "rollout.reuse.steps=3"], []),
        ([*PER_STEP, "rollout.reuse.mode=replay", "rollout.reuse.capacity=9", "rollout.reuse.fresh=0.2"], []),
        (
            [*ADAPTIVE, "training.steps=3", "critic.warmup_steps=1", "training.global_batch_size=6"],
            ["rollout.reuse.capacity: 1000 sequences are more than the run can generate, 24; adaptive generates"],
        ),
        (
            [
                *ADAPTIVE,
                "training.steps=3",
                "warmup.steps=1",
                "warmup.name=kl",
                "warmup.beta=0.5",
                "rollout.reuse.capacity=32",
            ],
            [],
        ),
        (
            [*ADAPTIVE, "training.steps=3", "warmup.steps=1", "rollout.reuse.capacity=32"],
            ["rollout.reuse.capacity: 32 sequences are more than the run can generate, 24; adaptive"],
        ),
    ],
)
def test_settings_that_change_nothing_are_told_of(overrides: list[str], expected: list[str]) -> None:
    said: list[str] = []
    _warn_of_settings(load_config(None, ["training.steps=1000", *overrides]), said.append)
    assert len(said) == len(expected)
    assert all(map(str.startswith, said, expected))


def test_files_whose_responses_end_otherwise_are_told_of() -> None:
    said: list[str] = []
    config = load_config(None, ["rollout.responses=out", "rollout.max_response_length=20", "rollout.stop_strings=[a]"])

    def compare(length: int, stop_strings: list[str]) -> None:
        sampling = {"max_response_length": length, "stop_strings": stop_strings}
        _compare_ends(config, Header(model={}, tokenizer={}, data={}, sampling=sampling, shard_size=1), said.append)

    compare(20, ["a"])
    compare(30, ["a"])
    assert said == []
    compare(19, ["b", "c"])
    assert said[0].startswith(
        "the responses in out were cut at 19 tokens, before rollout.max_response_length 20: those"
    )
    assert said[1] == "the responses in out end at the texts ['b', 'c'], the student's at rollout.stop_strings ['a']"
