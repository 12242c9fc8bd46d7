"""A whole run in miniature: a teacher and a student on disk, a tokenizer, data, and the settings that join them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_amd.config import Config, load_config
from tests.small_tokenizers import CHATML, make_hf_tokenizer

TEACHER = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
STUDENT = {**TEACHER, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "tie_word_embeddings": False}
T5_TEACHER = {
    "model_type": "t5", "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip
T5_STUDENT = {**T5_TEACHER, "d_model": 24, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 1}
PROMPTS = (
    "How many clips did Natalia sell?", "What is a fox?", "Write a response.", "Describe the lazy dog in April.",
    "The quick brown fox", "Name a task.", "How many dogs?", "Sell clips in May.", "An instruction, please.", "Jump!",
)  # fmt: skip


def save_model(folder: Path, architecture: dict[str, Any], vocab_size: int, seed: int) -> Path:
    """A random model with sharp enough distributions that two of them differ clearly."""
    settings = dict(architecture)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), vocab_size=vocab_size, **settings)
    torch.manual_seed(seed)
    with_encoder = config.is_encoder_decoder
    classes = transformers.AutoModelForSeq2SeqLM if with_encoder else transformers.AutoModelForCausalLM
    model = classes.from_config(config, dtype=torch.float32)
    if with_encoder and not settings.get("tie_word_embeddings", True):  # transformers 5 makes them tied
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    scale = 0.15 if with_encoder else 0.3  # T5 does not scale its attention
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * scale + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    return folder


def make_files(folder: Path, *, teacher: dict[str, Any] = TEACHER, student: dict[str, Any] = STUDENT) -> dict[str, Any]:
    """Write models, tokenizer and data under `folder`; return the settings of a small fp32 AMM run on them."""
    make_hf_tokenizer(folder / "teacher", vocab_size=300, chat_template=CHATML, eos="<|im_end|>")
    vocab_size = 1 + max(json.loads((folder / "teacher" / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    save_model(folder / "teacher", teacher, vocab_size, seed=1)
    save_model(folder / "student", student, vocab_size + 3, seed=2)  # more rows than tokens, as real models have
    rows = [{"prompt": prompt, "response": prompt[::-1]} for prompt in PROMPTS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"directory": str(folder / "run"), "seed": 7},
        "teacher": {"path": str(folder / "teacher")},
        "student": {"path": str(folder / "student")},
        "critic": {"features": "pair", "optim": {"learning_rate": 1e-3}},
        "data": {
            "train": str(folder / "train.jsonl"), "evaluation": str(folder / "train.jsonl"),
            "response_field": "response", "max_prompt_length": 64,
        },
        "rollout": {"max_response_length": 8},
        "training": {
            "steps": 5, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32",
            "optim": {"learning_rate": 1e-3},
        },
    }  # fmt: skip


def write_config(folder: Path, settings: dict[str, Any], *overrides: str) -> Config:
    """Save settings as run.yaml (JSON is YAML) and load them as a run does."""
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return load_config(path, overrides)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    volatile = ("time/", "throughput/", "memory/")
    return [{name: value for name, value in row.items() if not name.startswith(volatile)} for row in rows]
