"""The examples of docs/data.md work as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml

from megatron_amd.config import DataConfig
from megatron_amd.data import load_rows, load_tokenizer
from tests.small_tokenizers import CHATML, make_hf_tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)]
SETTINGS = [block["data"] for block in BLOCKS if "data" in block]
ALPACA = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}]


def test_examples_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = load_tokenizer(str(make_hf_tokenizer(tmp_path / "tokenizer", chat_template=CHATML)))
    rows = [*re.findall(r"```json\n(.*?)```", PAGE, flags=re.S), json.dumps(ALPACA)]
    assert len(rows) == len(SETTINGS) == 3
    Path("data").mkdir()
    for settings, text in zip(SETTINGS, rows, strict=True):
        Path(settings["train"]).write_text(text)
        dataset = load_rows(DataConfig(**settings), "train", tokenizer)
        assert dataset.has_responses
        assert len(dataset) == text.count("\n") or settings["template"] == "alpaca"
