"""Folders of generated responses: the header, who writes which shard, reading, and what is noticed when it is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_amd.batch import Prompts
from megatron_amd.config import DataConfig, InitConfig, ModelConfig
from megatron_amd.data import load_rows, load_tokenizer, open_response_files
from megatron_amd.data.response_files import FORMAT, HEADER, Header, ResponseFiles, read_header
from megatron_amd.errors import InputError
from megatron_amd.rollout.response_files import _lines, _publish, prepare_folder, share_of
from megatron_amd.training.model_hash import model_hash
from tests.small_tokenizers import make_hf_tokenizer, make_sentencepiece
from tests.tiny_run import TEACHER, save_model

ROWS, SAMPLES, SHARD_SIZE, VOCAB = (0, 2, 3, 5, 8), 2, 2, 90
SAMPLING = {
    "samples_per_prompt": SAMPLES, "max_response_length": 10, "min_response_length": 0, "temperature": 1.0, "top_k": 0,
    "top_p": 1.0, "min_p": 0.0, "stop_strings": [], "seed": 7, "precision": "fp32",
}  # fmt: skip
HEADER_OF_THREE = Header(
    model={"path": "models/teacher", "role": "teacher", "hash": "1" * 64},
    tokenizer={"source": "models/teacher", "hash": "2" * 64},
    data={"path": "train.jsonl", "rows": len(ROWS), "fingerprint": "3" * 32},
    sampling=SAMPLING,
    shard_size=SHARD_SIZE,
)


def tokens_of(row: int, sample: int) -> list[int]:
    return [row, 10 + sample, 20]


def make_folder(folder: Path, header: Header = HEADER_OF_THREE) -> Path:
    """A complete folder."""
    folder.mkdir()
    (folder / HEADER).write_text(header.to_json())
    for shard in range(header.shards):
        lines = [
            json.dumps({"row": ROWS[position], "sample": sample, "tokens": tokens_of(ROWS[position], sample)})
            for position in header.positions(shard)
            for sample in range(SAMPLES)
        ]
        (folder / header.file_name(shard)).write_text("".join(line + "\n" for line in lines))
    return folder


def read(folder: Path, rows: Sequence[int] = ROWS, **changes: Any) -> ResponseFiles:
    expected = {"fingerprint": "3" * 32, "tokenizer_hash": "2" * 64, "vocab_size": VOCAB, **changes}
    return open_response_files(folder, rows, setting="rollout.responses", **expected)


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@dataclasses.dataclass
class Replica:
    dp_rank: int
    dp_size: int


def test_shards_are_dealt_by_the_tokens_of_prompts_and_longest_responses() -> None:
    lengths = [1, 2, 3, 4, 500]
    shares = [share_of(HEADER_OF_THREE, [0, 1, 2], lengths, Replica(rank, 2)) for rank in range(2)]  # type: ignore[arg-type]
    assert shares == [[2], [0, 1]]
    assert share_of(HEADER_OF_THREE, [0, 2], [1, 2, 3, 4, 5], Replica(0, 2)) == [0]  # type: ignore[arg-type]
    assert share_of(HEADER_OF_THREE, [1], lengths, Replica(1, 2)) == []  # type: ignore[arg-type]


def test_a_header_comes_back_as_it_was(tmp_path: Path) -> None:
    header = HEADER_OF_THREE
    (tmp_path / HEADER).write_text(header.to_json())
    assert read_header(tmp_path) == header
    assert header.shards == 3
    assert [list(header.positions(shard)) for shard in range(3)] == [[0, 1], [2, 3], [4]]
    assert header.file_name(2) == "responses-00002-of-00003.jsonl"
    moved = dataclasses.replace(header, model={**header.model, "path": "elsewhere"}, version="9")
    assert moved.fingerprint == header.fingerprint
    assert dataclasses.replace(header, shard_size=3).fingerprint != header.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "{0}: has no header.json; give a folder that tools/generate.py has written"),
        ("{", "{0}/header.json: is damaged (Expecting property name"),
        ("[]", "{0}/header.json: is damaged (is no JSON object); restore it"),
        ("[" * 10**5, "{0}/header.json: is damaged (maximum recursion depth"),
        ('{"format": 1}', "{0}/header.json: is damaged (has no 'model')"),
        (json.dumps({"format": FORMAT + 1}), "{0}/header.json: was written by a newer megatron_amd, in format 2"),
        (
            dataclasses.replace(HEADER_OF_THREE, shard_size=0).to_json(),
            "{0}/header.json: is damaged (shard_size is 0)",
        ),
        (dataclasses.replace(HEADER_OF_THREE, sampling={}).to_json(), "{0}/header.json: is damaged (has no 'max_r"),
        (
            dataclasses.replace(HEADER_OF_THREE, shard_size="2").to_json(),
            "{0}/header.json: is damaged (shard_size is '2'",
        ),
        (
            dataclasses.replace(HEADER_OF_THREE, data={**HEADER_OF_THREE.data, "rows": True}).to_json(),
            "{0}/header.json: is damaged (rows is True)",
        ),
        *(
            (dataclasses.replace(HEADER_OF_THREE, **changes).to_json(), "{0}/header.json: is damaged (" + what)
            for changes, what in (
                ({"sampling": {**SAMPLING, "max_response_length": "8"}}, "max_response_length is '8'"),
                ({"sampling": {**SAMPLING, "stop_strings": None}}, "'NoneType' object is not iterable"),
                ({"sampling": {**SAMPLING, "stop_strings": [3]}}, "stop_strings[0] is 3"),
                ({"model": {"hash": "1" * 64, "role": "teacher"}}, "has no 'path'"),
            )
        ),
        (
            dataclasses.replace(HEADER_OF_THREE, sampling={**SAMPLING, "samples_per_prompt": -1}).to_json(),
            "{0}/header.json: is damaged (samples_per_prompt is -1)",
        ),
    ],
)
def test_a_header_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / HEADER).write_text(text)
    assert error_of(lambda: read_header(tmp_path)).startswith(message.replace("{0}", str(tmp_path)))


def test_a_folder_is_begun_and_gone_on_in(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert prepare_folder(folder, HEADER_OF_THREE) == (HEADER_OF_THREE, [0, 1, 2])
    assert [path.name for path in folder.iterdir()] == [HEADER]
    (folder / HEADER_OF_THREE.file_name(1)).touch()
    (folder / f".{HEADER_OF_THREE.file_name(0)}.partial").touch()
    again = dataclasses.replace(HEADER_OF_THREE, version="9", data={**HEADER_OF_THREE.data, "path": "copy.jsonl"})
    assert prepare_folder(folder, again) == (again, [0, 2])
    other_size = dataclasses.replace(again, shard_size=256)
    assert prepare_folder(folder, other_size) == (again, [0, 2]), "nobody asked for a size: the folder's"
    assert "shard_size 2 -> 5" in error_of(lambda: prepare_folder(folder, again, 5))
    assert prepare_folder(tmp_path / "new", HEADER_OF_THREE, 5)[0].shard_size == 5


def test_a_folder_begun_and_killed_before_its_header_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f".{HEADER}.partial").write_text("{")
    assert prepare_folder(tmp_path, HEADER_OF_THREE) == (HEADER_OF_THREE, [0, 1, 2])
    assert read_header(tmp_path) == HEADER_OF_THREE
    assert [path.name for path in tmp_path.iterdir()] == [HEADER]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"sampling": {**SAMPLING, "temperature": 0.5}}, "sampling.temperature 1.0 -> 0.5"),
        (
            {"sampling": {**SAMPLING, "seed": 8, "max_response_length": 9}},
            "sampling.max_response_length 10 -> 9, sampling.seed 7 -> 8",
        ),
        ({"model": {**HEADER_OF_THREE.model, "hash": "a" * 64}}, "model.hash 11111111… -> aaaaaaaa…"),
        ({"model": {**HEADER_OF_THREE.model, "role": "student"}}, "model.role teacher -> student"),
        ({"tokenizer": {"source": "x", "hash": "b" * 64}}, "tokenizer.hash 22222222… -> bbbbbbbb…"),
        ({"data": {"path": "x", "rows": 4, "fingerprint": "3" * 32}}, "data.rows 5 -> 4"),
    ],
)
def test_going_on_with_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any], shown: str) -> None:
    prepare_folder(tmp_path, HEADER_OF_THREE)
    message = error_of(lambda: prepare_folder(tmp_path, dataclasses.replace(HEADER_OF_THREE, **changes)))
    assert message == f"{tmp_path}: holds responses of other settings ({shown}); use those, or choose another --output"


def test_a_folder_of_other_things_and_one_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert error_of(lambda: prepare_folder(tmp_path, HEADER_OF_THREE)) == (
        f"{tmp_path}: holds thesis.tex and no header.json; choose an empty folder for --output"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    blocked = tmp_path / "thesis.tex" / "out"
    assert error_of(lambda: prepare_folder(blocked, HEADER_OF_THREE)).startswith(f"{blocked}: cannot be written (")
    file = blocked.parent
    assert error_of(lambda: prepare_folder(file, HEADER_OF_THREE)) == f"{file}: is no folder; choose another --output"
    assert error_of(lambda: read_header(file)).startswith(f"{file}: is no folder; give a folder that")


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "responses-00000-of-00001.jsonl"
    file.mkdir()  # in its way when it gets its name
    assert error_of(lambda: _publish(file, "{}\n")).startswith(f"{file}: cannot be written (Is a directory); mend that")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_each_visit_reads_the_next_sample(tmp_path: Path) -> None:
    files = read(make_folder(tmp_path / "out"))
    for position, row in enumerate(ROWS):
        assert [files.tokens(position, visit) for visit in range(3)] == [tokens_of(row, s) for s in (0, 1, 0)]


def test_lines_hold_any_text(tmp_path: Path) -> None:
    """Also characters that some call line ends, of which JSON leaves U+2028 as it is."""
    tokenizer = load_tokenizer(str(make_hf_tokenizer(tmp_path / "tokenizer", vocab_size=300, eos="<|im_end|>")))
    text = "a\u2028b\x85c\r\nd\u00fc\u6f22 \U0001f600"
    header = dataclasses.replace(HEADER_OF_THREE, data={**HEADER_OF_THREE.data, "rows": 1})
    ended, cut = [*tokenizer.encode(text), tokenizer.eos_id], tokenizer.encode(text)[:2]
    lines = _lines(
        Prompts(ids=(0,), visits=(0,), tokens=((5,),), texts=(text,)),
        2,
        [ended, cut],
        [[-0.12345678] * len(ended), [-1.0] * len(ended)],
        [True, False],
        tokenizer,
    )
    folder = tmp_path / "out"
    prepare_folder(folder, header)
    _publish(folder / header.file_name(0), "".join(lines))
    files = read(folder, ROWS[:1], vocab_size=tokenizer.vocab_size)
    assert [files.tokens(0, visit) for visit in (0, 1)] == [ended, cut]
    first, second = map(json.loads, lines)
    assert (first["prompt"], first["response"], first["ended"], second["ended"]) == (text, text, True, False)
    assert first["log_probs"] == [-0.123457] * len(ended)
    assert second["log_probs"] == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "is blank"),
        ('{"row": 3', "invalid JSON ("),
        ('{"row": 5, "sample": 0, "tokens": [1]}', "is row 5, sample 0, in the place of row 3, sample 1"),
        ('{"row": 3, "sample": 0, "tokens": [1]}', "is row 3, sample 0, in the place of row 3, sample 1"),
        ('{"row": 3, "sample": 1}', "field 'tokens' is no list of token ids"),
        ('{"row": 3, "sample": 1, "tokens": []}', "field 'tokens' is no list of token ids"),
        ('{"row": 3, "sample": 1, "tokens": [1, 90]}', "field 'tokens' holds 90, which is no token id below 90"),
        ('{"row": 3, "sample": 1, "tokens": [-1]}', "field 'tokens' holds -1"),
        ('{"row": 3, "sample": 1, "tokens": [true]}', "field 'tokens' holds True"),
        ('{"row": 3, "sample": 1, "tokens": [1.0]}', "field 'tokens' holds 1.0"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = make_folder(tmp_path / "out") / HEADER_OF_THREE.file_name(1)
    lines = file.read_text().splitlines()
    lines[1] = line
    file.write_text("".join(text + "\n" for text in lines))
    message = error_of(lambda: read(tmp_path / "out"))
    assert message.startswith(f"rollout.responses: {file} line 2: {says}")
    assert message.endswith("; remove the file and run tools/generate.py again")


def test_files_that_are_short_empty_or_missing_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out")
    file = folder / HEADER_OF_THREE.file_name(1)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    assert error_of(lambda: read(folder)) == (
        f"rollout.responses: {file}: has 3 lines instead of 4; remove the file and run tools/generate.py again"
    )
    file.write_text("")
    assert error_of(lambda: read(folder)) == f"rollout.responses: {file} is empty"
    file.unlink()
    assert error_of(lambda: read(folder)) == (
        f"rollout.responses: {folder}: has 2 of 3 shards; run tools/generate.py again to complete it"
    )
    assert error_of(lambda: read(tmp_path / "none")).startswith(f"rollout.responses: {tmp_path / 'none'}: does not exi")
    fewer = dataclasses.replace(HEADER_OF_THREE, data={**HEADER_OF_THREE.data, "rows": 4})
    (folder / HEADER).write_text(fewer.to_json())
    assert "header.json: is damaged (4 rows of 5)" in error_of(lambda: read(folder))


def test_an_edited_token_is_another_data_set(tmp_path: Path) -> None:
    """So that a run does not go on with other responses than it began with."""
    folder = make_folder(tmp_path / "out")
    before = read(folder).fingerprint
    file = folder / HEADER_OF_THREE.file_name(0)
    text = file.read_text()
    file.write_text(text.replace("[0, 10, 20]", "[0, 10, 21]", 1))
    assert read(folder).fingerprint != before
    file.write_text(text)
    assert read(folder).fingerprint == before


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokenizer_hash": "x"}, "the tokenizer differs from"),
        ({"fingerprint": "x"}, "the data (rows, template or lengths of prompts) differs from"),
        ({"tokenizer_hash": "x", "fingerprint": "x"}, "the tokenizer and the data (rows, template or"),
    ],
)
def test_what_does_not_belong_to_the_run_is_named(tmp_path: Path, changes: dict[str, str], what: str) -> None:
    folder = make_folder(tmp_path / "out")
    assert f"{folder}: was generated with other settings: {what}" in error_of(lambda: read(folder, **changes))


def test_a_data_set_gives_responses_of_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_hf_tokenizer(tmp_path / "tokenizer", vocab_size=300)))
    rows = [{"prompt": "fox"}, {"prompt": ""}, {"prompt": "lazy dog"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(tmp_path / "train.jsonl"), on_bad_row="skip")
    dataset = load_rows(config, "train", tokenizer, responses=False)
    assert list(dataset.rows) == [0, 2]
    before = dataset.prompts([0, 1], [0, 0])
    assert before.responses is None
    assert dataset.lengths.tolist() == [len(tokens) for tokens in before.tokens]
    fingerprint = dataset.fingerprint
    dataset.use_responses(lambda position, visit: [position, visit, 7, 8], "abc", longest=3)
    assert dataset.prompts([1, 0], [4, 5]).responses == ((1, 4, 7), (0, 5, 7))
    assert dataset.fingerprint not in (fingerprint, "abc")


def test_a_tokenizer_is_known_by_its_tokens_and_ends(tmp_path: Path) -> None:
    first = make_hf_tokenizer(tmp_path / "first", vocab_size=300)
    fingerprint = load_tokenizer(str(first)).fingerprint()
    copy = shutil.copytree(first, tmp_path / "copy")
    assert load_tokenizer(str(copy)).fingerprint() == fingerprint
    (copy / "generation_config.json").write_text('{"eos_token_id": [3]}')
    words = make_hf_tokenizer(tmp_path / "words", vocab_size=290)
    piece = make_sentencepiece(tmp_path / "piece.model")
    others = [load_tokenizer(str(path)).fingerprint() for path in (copy, words, piece)]
    assert len({fingerprint, *others}) == 4


def test_a_model_is_known_by_its_sizes_and_weights(tmp_path: Path) -> None:
    first = save_model(tmp_path / "first", TEACHER, 300, seed=1)
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / "README.md").touch()
    settings = ModelConfig(path=str(first))
    known = model_hash(settings, "teacher", 1)
    assert model_hash(ModelConfig(path=str(copy)), "student", 2) == known
    random = dataclasses.replace(settings, init=InitConfig(weights="random"))
    cut = dataclasses.replace(settings, init=InitConfig(layers=(0, 1, 2, 3)))
    other_cut = dataclasses.replace(settings, init=InitConfig(layers=(0, 1, 3, 2)))
    hashes = [model_hash(settings, "teacher", 1) for settings in (cut, other_cut, random)]
    hashes += [model_hash(random, "student", 1), model_hash(random, "teacher", 2)]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    hashes.append(model_hash(ModelConfig(path=str(copy)), "teacher", 1))
    hashes.append(model_hash(ModelConfig(path=str(save_model(tmp_path / "other", TEACHER, 300, seed=2))), "teacher", 1))
    faster = dataclasses.replace(settings, transformer={"recompute_granularity": "full", "bias_dropout_fusion": True})
    assert model_hash(faster, "teacher", 1) == known
    scaled = dataclasses.replace(settings, transformer={"softmax_scale": 0.02})
    hashes.append(model_hash(scaled, "teacher", 1))
    assert len({known, *hashes}) == 1 + len(hashes)


def test_large_files_are_sampled_from_end_to_end(tmp_path: Path) -> None:
    """Changed bytes at the beginning, in the middle sample and at the end are seen."""
    folder = save_model(tmp_path / "model", TEACHER, 300, seed=1)
    file = folder / "model.safetensors"
    weights = torch.arange(2**20, dtype=torch.int32)
    save_file({"model.weight": weights}, file)
    settings = ModelConfig(path=str(folder))
    known = model_hash(settings, "teacher", 1)
    content, hashes = file.read_bytes(), []
    head = 8 + int.from_bytes(content[:8], "little")
    for place in (head, (len(content) - 65536) * 8 // 15, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        hashes.append(model_hash(settings, "teacher", 1))
    assert len({known, *hashes}) == 4
    file.write_bytes(content)
    file.rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_hash(settings, "teacher", 1) == known


def test_all_of_a_long_head_counts(tmp_path: Path) -> None:
    """A tensor's other name, behind the first sample and before the second."""
    folder = save_model(tmp_path / "model", TEACHER, 300, seed=1)
    file = folder / "model.safetensors"
    weights = {f"w{number:05}.weight": torch.zeros(1) for number in range(3000)}
    save_file({"a": torch.zeros(2**20), **weights}, file)
    known = model_hash(ModelConfig(path=str(folder)), "teacher", 1)
    content = file.read_bytes()
    assert 65536 < content.index(b"w01500") < (len(content) - 65536) // 15
    file.write_bytes(content.replace(b"w01500", b"x01500"))
    assert model_hash(ModelConfig(path=str(folder)), "teacher", 1) != known
