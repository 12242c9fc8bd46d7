"""Rows from real files to token ids, and each thing that can be wrong with them."""

from __future__ import annotations

import csv
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_amd.config import DataConfig
from megatron_amd.data import PromptDataset, Tokenizer, first_prompts, load_rows, load_tokenizer
from megatron_amd.errors import InputError
from tests.small_tokenizers import CHATML, make_hf_tokenizer

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [{"prompt": f"Question {n}?", "answer": f"It is {n}."} for n in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(make_hf_tokenizer(tmp_path_factory.mktemp("plain"))))


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    template = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
    return load_tokenizer(str(make_hf_tokenizer(tmp_path_factory.mktemp("chat"), chat_template=template)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


def load(path: Path, tokenizer: Tokenizer, warn: Callable[[str], None] | None = None, **settings: Any) -> PromptDataset:
    arguments = {name: settings.pop(name) for name in ("responses", "max_response_length", "count") if name in settings}
    return load_rows(DataConfig(train=str(path), **settings), "train", tokenizer, warn=warn, **arguments)


@pytest.mark.parametrize("extension", list(WRITERS))
def test_every_format_gives_the_same_rows(extension: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = WRITERS[extension](tmp_path / f"rows [1]{extension}", ROWS)
    dataset = load(path, tokenizer, response_field="answer")
    prompts = dataset.prompts([4, 0], [7, 8])
    assert (len(dataset), dataset.skipped, dataset.truncated, dataset.has_responses) == (5, 0, 0, True)
    assert (prompts.ids, prompts.visits, prompts.texts) == ((4, 0), (7, 8), ("Question 4?", "Question 0?"))
    assert prompts.tokens == tuple(tuple(tokenizer.encode(ROWS[n]["prompt"])) for n in (4, 0))
    assert prompts.responses == tuple((*tokenizer.encode(ROWS[n]["answer"]), 1) for n in (4, 0))
    reference = load(write_jsonl(tmp_path / "reference.jsonl", ROWS), tokenizer, response_field="answer")
    assert dataset.fingerprint == reference.fingerprint


def test_a_json_file_may_hold_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "lines.json", ROWS)
    assert load(path, tokenizer).prompts([1], [0]).texts == ("Question 1?",)


def test_digits_and_newlines_and_na_in_csv_are_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_csv(tmp_path / "a.csv", [{"prompt": "12"}, {"prompt": "two\nlines"}, {"prompt": "NA"}])
    assert load(path, tokenizer).prompts([0, 1, 2], [0, 0, 0]).texts == ("12", "two\nlines", "NA")


def test_byte_order_mark_and_blank_and_windows_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\u2028b"}\r\n\r\n  \r\n{"prompt": "c"}')
    prompts = load(path, tokenizer).prompts([0, 1], [0, 0])
    assert (prompts.ids, prompts.texts) == ((0, 3), ("a\u2028b", "c"))


def test_folder_is_read_in_order_of_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_csv(folder / "b.csv", ROWS[2:])
    write_jsonl(folder / "a.jsonl", ROWS[:2])
    (folder / "README.md").write_text("not data")
    dataset = load(folder, tokenizer)
    assert dataset.prompts(range(5), [0] * 5).ids == (0, 1, 2, 3, 4)
    assert dataset.prompts([4, 1], [0, 0]).texts == ("Question 4?", "Question 1?")
    (folder / "b.csv").write_text('prompt\nfine\n" "\n')
    with pytest.raises(InputError, match=r"^data.train: .*b.csv row 2: field 'prompt' is empty; mend the row, or set"):
        load(folder, tokenizer)


def test_limit_and_count(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": 1}, *ROWS, {"prompt": 2}])
    assert len(load(path, tokenizer, limit=3, on_bad_row="skip")) == 2
    assert len(load(path, tokenizer, count=3, on_bad_row="skip")) == 3


def test_a_rewritten_file_is_read_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    first = load(path, tokenizer)
    write_jsonl(path, [{"prompt": "New"}, *ROWS[1:]])
    second = load(path, tokenizer)
    assert second.prompts([0], [0]).texts == ("New",)
    assert second.fingerprint != first.fingerprint


def test_alpaca_input(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "Add.", "more": "1 and 2"}, {"prompt": "Sing.", "more": ""}, {"prompt": "Sing.", "more": None}]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "Sing."}])
    prompts = load(path, tokenizer, template="alpaca", input_field="more").prompts(range(4), [0] * 4)
    assert "### Input:\n1 and 2\n\n### Response:\n" in tokenizer.decode(prompts.tokens[0])
    assert prompts.texts == ("Add.\n1 and 2", "Sing.", "Sing.", "Sing.")
    assert "### Input" not in tokenizer.decode(prompts.tokens[1])
    assert prompts.tokens[1] == prompts.tokens[2] == prompts.tokens[3]


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".parquet"])
def test_messages(extension: str, tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = WRITERS[extension](tmp_path / f"a{extension}", [{"m": turns}, {"m": turns + turns}])
    dataset = load(path, chat_tokenizer, messages_field="m")
    prompts = dataset.prompts([0, 1], [0, 0])
    assert prompts.tokens[0] == tuple(chat_tokenizer.apply_chat_template(turns[:1]))
    assert prompts.tokens[1] == tuple(chat_tokenizer.apply_chat_template([*turns, *turns[:1]]))
    assert prompts.responses == (((*chat_tokenizer.encode("Ho"), 1),) * 2)
    assert prompts.texts == ("Hi", "Hi")
    assert load(path, chat_tokenizer, messages_field="m", responses=False).prompts([0], [0]).responses is None


def test_messages_without_an_answer(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": turns}, {"m": turns[:1]}])
    dataset = load(path, chat_tokenizer, messages_field="m")
    assert not dataset.has_responses
    assert dataset.prompts([0, 1], [0, 0]).responses is None
    with pytest.raises(InputError, match=r"a.jsonl line 2: field 'm' does not end with an assistant message; mend"):
        load(path, chat_tokenizer, messages_field="m", responses=True)


def test_long_responses_are_cut_as_in_generation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    full = load(path, tokenizer, response_field="answer").prompts([0], [0]).responses
    assert full is not None
    length = len(full[0])
    same = load(path, tokenizer, response_field="answer", max_response_length=length).prompts([0], [0]).responses
    shorter = load(path, tokenizer, response_field="answer", max_response_length=length - 2).prompts([0], [0])
    assert same == full
    assert shorter.responses == (full[0][:-2],)


LONG = [{"prompt": "a b c d"}, {"prompt": "x " * 40}, {"prompt": "e f g h"}]


def test_long_prompt_is_an_error_or_skipped_or_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", LONG)
    length = len(tokenizer.encode(LONG[1]["prompt"]))
    said: list[str] = []
    with pytest.raises(
        InputError,
        match=rf"^data.train: .*a.jsonl line 2: the prompt has {length} tokens, more than data.max_prompt_length 20; "
        "raise it, or set data.on_long_prompt: skip or truncate$",
    ):
        load(path, tokenizer, max_prompt_length=20)
    skipping = load(path, tokenizer, said.append, max_prompt_length=20, on_long_prompt="skip")
    assert skipping.prompts([0, 1], [0, 0]).ids == (0, 2)
    cutting = load(path, tokenizer, said.append, max_prompt_length=20, on_long_prompt="truncate")
    assert cutting.prompts([1], [0]).tokens == (tuple(tokenizer.encode(LONG[1]["prompt"])[-20:]),)
    assert (skipping.skipped, cutting.truncated) == (1, 1)
    assert len(said) == 2
    assert said[0].startswith("data.train: skipped 1 of 3 rows (0 bad, 1 longer than data.max_prompt_length; the first")
    assert said[1] == "data.train: cut 1 prompts to data.max_prompt_length 20"


def test_a_cut_prompt_keeps_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_hf_tokenizer(tmp_path / "bos", adds_bos=True)))
    path = write_jsonl(tmp_path / "a.jsonl", LONG)
    dataset = load(path, tokenizer, max_prompt_length=20, on_long_prompt="truncate")
    assert dataset.prompts([1], [0]).tokens == ((0, *tokenizer.encode(LONG[1]["prompt"])[-19:]),)


GOOD = '{"prompt": "fine", "answer": "yes"}'
BAD_LINES = {
    "not_json": ('{"prompt": "fine"', r"invalid JSON \(Expecting ',' delimiter, column 18\)"),
    "not_object": ("[1]", r"a JSON list instead of an object with fields"),
    "no_field": (
        '{"question": "q", "answer": "a"}',
        r"no field 'prompt' \(it has: question, answer\); set data.prompt_field to one of them",
    ),
    "null": ('{"prompt": null, "answer": "a"}', "field 'prompt' is empty"),
    "blank": ('{"prompt": " ", "answer": "a"}', "field 'prompt' is empty"),
    "number": ('{"prompt": 3, "answer": "a"}', "field 'prompt' must be text, not int"),
    "list": ('{"prompt": ["a"], "answer": "a"}', "field 'prompt' must be text, not list"),
    "surrogate": ('{"prompt": "ab\\ud83d", "answer": "a"}', "field 'prompt' holds half of a surrogate .* character 3"),
    "no_answer": ('{"prompt": "q"}', r"no field 'answer' \(it has: prompt\); set data.response_field to one of them"),
    "answer_empty": ('{"prompt": "q", "answer": ""}', "field 'answer' is empty"),
}


@pytest.mark.parametrize("kind", list(BAD_LINES))
def test_bad_line_is_named_or_skipped(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    line, reason = BAD_LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([GOOD, GOOD, line, GOOD]))
    place = rf"^data.train: {path} line 3: {reason}; mend the row, or set data.on_bad_row: skip$"
    with pytest.raises(InputError, match=place):
        load(path, tokenizer, response_field="answer")
    said: list[str] = []
    dataset = load(path, tokenizer, said.append, response_field="answer", on_bad_row="skip")
    assert dataset.skipped == 1
    assert dataset.prompts(range(3), [0] * 3).ids == (0, 1, 3)
    (warning,) = said
    assert warning.startswith("data.train: skipped 1 of 4 rows (1 bad, 0 longer than data.max_prompt_length; the firs")


BAD_MESSAGES = {
    "text": ("hello", "must be a list of messages, not str"),
    "empty": ([], "is empty"),
    "no_content": ([{"role": "user"}], r", message 1 is not {role, content}"),
    "role": ([{"role": "bot", "content": "a"}], ", message 1 has the role 'bot'; known are system, user, assistant"),
    "content": ([{"role": "user", "content": 5}], ", message 1, content must be text, not int"),
    "only_answer": ([{"role": "assistant", "content": "a"}], "has no message before the assistant's"),
}


@pytest.mark.parametrize("kind", list(BAD_MESSAGES))
def test_bad_messages(kind: str, tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    value, reason = BAD_MESSAGES[kind]
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": value}])
    with pytest.raises(InputError, match=rf"^data.train: {path} line 1: field 'm' ?{reason}; mend"):
        load(path, chat_tokenizer, messages_field="m")


def test_conversation_that_the_chat_template_refuses(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": turns}])
    with pytest.raises(InputError, match=r"line 1: the chat template of .* refuses it: the user begins; mend the row"):
        load(path, chat_tokenizer, messages_field="m")


@pytest.mark.parametrize("extension", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({"prompt_field": "text"}, "text"),
        ({"response_field": "gold"}, "gold"),
        ({"input_field": "extra", "template": "alpaca"}, "extra"),
        ({"messages_field": "chat", "template": "chatml"}, "chat"),
    ],
)
def test_missing_column(extension: str, settings: dict, column: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = WRITERS[extension](tmp_path / f"a{extension}", ROWS)
    message = rf"^data.\w+_field: {path} has no column '{column}'; its columns are: prompt, answer$"
    with pytest.raises(InputError, match=message):
        load(path, tokenizer, **settings)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def folder_without_data(tmp_path: Path) -> Path:
    return write(tmp_path / "README.md", "none").parent


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p / "no.jsonl", r"no.jsonl does not exist; give a file, a folder or a hub data set's name"),
    "missing_text": (lambda p: Path("data/no.txt"), r"data/no.txt does not exist; give a file"),
    "extension": (
        lambda p: write(p / "a.txt", "x"),
        r"a.txt has the unknown extension '.txt'; known are .jsonl, .json",
    ),
    "folder": (folder_without_data, r"the folder .* holds no .jsonl, .json, .csv, .parquet file"),
    "empty_jsonl": (lambda p: write(p / "a.jsonl", ""), "a.jsonl is empty"),
    "empty_csv": (lambda p: write(p / "a.csv", ""), "a.csv is empty"),
    "blank_lines": (lambda p: write(p / "a.jsonl", "\n\n"), "a.jsonl is empty: it has no rows"),
    "empty_list": (lambda p: write(p / "a.json", "[]"), "a.json cannot be read: it has no rows"),
    "header_only": (lambda p: write(p / "a.csv", "prompt,answer\n"), "a.csv cannot be read: it has no rows"),
    "no_rows": (
        lambda p: (
            (pyarrow.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), p / "a.parquet"), p)[1]
            / "a.parquet"
        ),
        "a.parquet cannot be read: it has no rows",
    ),
    "json_list": (
        lambda p: write(p / "a.json", '[{"prompt": "a"},\n {"prompt": }]'),
        "a.json cannot be read: invalid JSON at line 2, column 13: Expecting value",
    ),
    "parquet": (lambda p: write(p / "a.parquet", b"PAR1 no"), "a.parquet cannot be read: "),
    "binary": (lambda p: write(p / "a.jsonl", b'{"prompt": "\xff"}\n'), "a.jsonl cannot be read: it is not UTF-8 text"),
    "csv_cells": (lambda p: write(p / "a.csv", "prompt\na\nb,c\n"), "a.csv cannot be read: .*"),
    "csv_first_cells": (lambda p: write(p / "a.csv", "prompt\na,b\nc,d\n"), "a.csv cannot be read: .*"),
}


@pytest.mark.parametrize("kind", list(BAD_FILES))
def test_bad_file(kind: str, tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    make, reason = BAD_FILES[kind]
    (tmp_path / "files").mkdir()
    with pytest.raises(InputError, match="^data.train: .*" + reason) as caught:
        load(make(tmp_path / "files"), tokenizer)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_all_rows_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(
        InputError, match=r"a.jsonl has no usable row: all 2 were skipped, the first being .* line 1: no"
    ):
        load(path, tokenizer, on_bad_row="skip")


def test_unset_and_contradictory_settings(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"^data.evaluation: is not set; give a file"):
        load_rows(DataConfig(train="x"), "evaluation", tokenizer)
    with pytest.raises(InputError, match=r"^data.response_field: is not set, but gold responses are needed"):
        load(tmp_path, tokenizer, responses=True)
    with pytest.raises(InputError, match=r"^data.response_field: cannot go with data.messages_field"):
        load(tmp_path, tokenizer, messages_field="m", response_field="r")


def test_unreachable_hub(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"^data.train: 'openai/gsm8k' is no file or folder here, and the hub at .*"):
        load_rows(DataConfig(train="openai/gsm8k:main"), "train", tokenizer)


def test_hub_data_set(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the download alone: what load_dataset returns is a real data set."""
    asked = []

    def download(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        if configuration is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", download)
    config = DataConfig(train="some/set:main", evaluation="some/set", evaluation_split="validation")
    assert load_rows(config, "train", tokenizer).prompts([2], [0]).texts == ("Question 2?",)
    with pytest.raises(InputError, match=r"^data.evaluation: .*Config name is missing; write .* some/set:CONFIG$"):
        load_rows(config, "evaluation", tokenizer)
    assert asked == [("some/set", "main", "train"), ("some/set", None, "validation")]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_may_load_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS * 20)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        prints = pool.starmap(_fingerprint, [(path, tokenizer)] * 4)
    assert len(set(prints)) == 1


def _fingerprint(path: Path, tokenizer: Tokenizer) -> str:
    return load(path, tokenizer).fingerprint


def test_cache_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "cache")  # below a file: not even root may
    with pytest.raises(InputError, match=r"a.jsonl cannot be read: .*Not a directory.*; HF_DATASETS_CACHE sets where"):
        load(path, tokenizer)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the GSM8K files")
def test_gsm8k(tokenizer: Tokenizer) -> None:
    config = DataConfig(
        train=str(SHARED_DATA / "gsm8k_train.jsonl"),
        evaluation=str(SHARED_DATA / "gsm8k_test.jsonl"),
        prompt_field="question",
        response_field="answer",
        template="alpaca",
        max_prompt_length=1024,
    )
    train = load_rows(config, "train", tokenizer)
    assert (len(train), train.skipped) == (7473, 0)
    prompts = train.prompts([0], [0])
    assert prompts.texts is not None
    assert prompts.responses is not None
    assert prompts.texts[0].startswith("Natalia sold clips")
    assert tokenizer.decode(prompts.responses[0]).endswith("#### 72")
    held_out = first_prompts(load_rows(config, "evaluation", tokenizer, count=64), 64)
    assert held_out.ids == tuple(range(64))
