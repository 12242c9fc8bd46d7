"""What is looked at before a run begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from megatron_amd.config import Config, ModelConfig
from megatron_amd.training.setup import _shared_tokenizer
from tests.small_tokenizers import make_hf_tokenizer


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
