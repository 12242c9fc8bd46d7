"""Tokenizers and prompt templates, on tokenizers trained here and read back by the real libraries."""

from __future__ import annotations

import contextlib
import filecmp
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_amd.config import DataConfig
from megatron_amd.data import check_same_vocabulary, load_tokenizer, make_template
from megatron_amd.data.tokenizer import check_stop_strings, stopping_rule
from megatron_amd.errors import InputError
from tests.small_tokenizers import CHATML, make_hf_tokenizer, make_sentencepiece

TEXT = "The quick brown fox, déjà vu 🦊"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No chat template, no BOS."""
    return make_hf_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def bos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adds BOS and EOS by itself; its chat template writes BOS too."""
    return make_hf_tokenizer(tmp_path_factory.mktemp("bos"), adds_bos=True, chat_template="{{ bos_token }}" + CHATML)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model")


def test_hugging_face_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = json.loads((folder / "tokenizer.json").read_text())
    highest = max(*ids["model"]["vocab"].values(), *(added["id"] for added in ids["added_tokens"]))
    assert tokenizer.vocab_size == highest + 1
    assert tokenizer.token(highest) == "<|extra|>"
    assert tokenizer.token(highest + 1) is None
    assert (tokenizer.eos_ids, tokenizer.eos_id, tokenizer.bos_id) == ((1,), 1, 0)
    assert not tokenizer.adds_bos
    assert not tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([0, *tokenizer.encode(TEXT), 1]) == TEXT
    assert tokenizer.encode(TEXT, add_bos=True) == tokenizer.encode(TEXT)


def test_sentencepiece_file(model_file: Path) -> None:
    tokenizer = load_tokenizer(str(model_file))
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.adds_bos) == ((2,), 1, True)
    assert tokenizer.token(2) == "</s>"
    assert tokenizer.token(tokenizer.vocab_size) is None
    assert tokenizer.token(tokenizer.vocab_size - 1) is not None
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(TEXT, add_bos=True) == [1, *tokenizer.encode(TEXT)]


def test_bos_is_added_once_and_eos_never(bos_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bos_folder))
    assert tokenizer.adds_bos
    plain = tokenizer.encode(TEXT)
    assert plain[0] != 0
    assert tokenizer.encode(TEXT, add_bos=True) == [0, *plain]
    assert tokenizer.encode("<s>" + TEXT, add_bos=True) == [0, *plain]


def test_every_id_that_ends_a_turn_is_known(tmp_path: Path) -> None:
    several = make_hf_tokenizer(tmp_path / "several", generation_eos=[3, 1, 999_999])
    assert load_tokenizer(str(several)).eos_ids == (1, 3)
    single = make_hf_tokenizer(tmp_path / "single", generation_eos=3, eos=None)
    assert load_tokenizer(str(single)).eos_ids == (3,)


@pytest.mark.parametrize("kind", ["hugging_face", "sentencepiece"])
def test_saved_files_are_the_same_tokenizer(kind: str, tmp_path: Path, model_file: Path) -> None:
    if kind == "hugging_face":
        source = make_hf_tokenizer(tmp_path / "in", chat_template=CHATML, generation_eos=[3])
    else:
        source = model_file
    tokenizer = load_tokenizer(str(source))
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.save_files(out)
    for file in tokenizer.files:
        assert filecmp.cmp(file, out / file.name, shallow=False)
    again = load_tokenizer(str(out if kind == "hugging_face" else out / source.name))
    check_same_vocabulary(tokenizer, again)
    assert again.eos_ids == tokenizer.eos_ids
    assert again.has_chat_template == tokenizer.has_chat_template


def test_stop_strings(folder: Path, model_file: Path) -> None:
    for source in (folder, model_file):
        tokenizer = load_tokenizer(str(source))
        assert stopping_rule(tokenizer, ()) is None
        complete = stopping_rule(tokenizer, ("fox", "in April"))
        assert complete is not None
        for text, stop in (("The quick brown fox jumps", "fox"), ("A dog in April. Jump", "in April")):
            tokens = tokenizer.encode(text)
            first = next(count for count in range(1, len(tokens) + 1) if complete(tokens[:count]))
            assert stop in tokenizer.decode(tokens[:first])
            assert stop not in tokenizer.decode(tokens[: first - 1]), "with the token that completes it"
        assert not complete(tokenizer.encode("The lazy dog in May"))
        assert complete(tokenizer.encode("word " * 50 + "fox"))


def test_stop_strings_that_no_text_can_hold(tmp_path: Path, model_file: Path) -> None:
    source = make_hf_tokenizer(tmp_path, eos="<|im_end|>")
    for folder, special in ((source, "<|im_end|>"), (model_file, "</s>")):
        tokenizer = load_tokenizer(str(folder))
        check_stop_strings(tokenizer, ("fox", "\n\n", " a", special[:-1], "Q:\n"))
        check_stop_strings(tokenizer, ())
        message = rf"rollout\.stop_strings: '{re.escape(special)}\\n' holds the special token '{re.escape(special)}'"
        with pytest.raises(InputError, match=message):
            check_stop_strings(tokenizer, ("fox", f"{special}\n"))


def test_special_tokens_within_a_stop_string_do_not_hide_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_hf_tokenizer(tmp_path, eos="<|im_end|>")))
    complete = stopping_rule(tokenizer, ("fox",))
    assert complete is not None
    [*begin, end] = [*tokenizer.encode("f"), *tokenizer.encode("o"), *tokenizer.encode("x")]
    assert complete([*begin, *[tokenizer.eos_id] * 30, end])
    assert not complete([*begin, *[tokenizer.eos_id] * 30])


def test_saving_keeps_a_generation_config_that_is_there(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_hf_tokenizer(tmp_path / "in", generation_eos=[3])))
    (tmp_path / "generation_config.json").write_text("{}")
    tokenizer.save_files(tmp_path)
    assert (tmp_path / "generation_config.json").read_text() == "{}"


def test_vocabularies_are_compared_id_by_id(tmp_path: Path, folder: Path) -> None:
    plain = load_tokenizer(str(folder))
    check_same_vocabulary(plain, load_tokenizer(str(folder)))
    smaller = load_tokenizer(str(make_hf_tokenizer(tmp_path / "smaller", vocab_size=300)))
    with pytest.raises(InputError, match=r"^vocabularies differ: id 300 is '.+' in .*plain.* but '<\|extra\|>' in .*"):
        check_same_vocabulary(plain, smaller)
    config = json.loads((folder / "tokenizer.json").read_text())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] != "<|extra|>"]
    shorter = make_hf_tokenizer(tmp_path / "shorter")
    (shorter / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is '<\|extra\|>' in .* but no token in .*shorter"):
        check_same_vocabulary(plain, load_tokenizer(str(shorter)))


def test_quiet_and_lazy(folder: Path) -> None:
    program = (
        "import sys, megatron_amd.data as data\n"
        "assert not {'transformers', 'datasets'} & set(sys.modules)\n"
        f"data.load_tokenizer({str(folder)!r}).encode('a long text ' * 100)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def broken_json(tmp_path: Path) -> Path:
    folder = make_hf_tokenizer(tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"version": ')
    return folder


def own_code(tmp_path: Path) -> Path:
    folder = make_hf_tokenizer(tmp_path / "code")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text("open('ran', 'w')\nclass Mine: pass\n")
    return folder


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def text_file(tmp_path: Path) -> Path:
    (tmp_path / "tokens.txt").write_text("a\n")
    return tmp_path / "tokens.txt"


def false_model(tmp_path: Path) -> Path:
    (tmp_path / "false.model").write_text("not a model")
    return tmp_path / "false.model"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken_json, r"no tokenizer can be read from the folder .*broken: "),
        (empty_folder, r"the folder .*empty holds no tokenizer files, such as tokenizer.json"),
        (text_file, r"tokens.txt is neither a folder nor a sentencepiece .model file; give the folder"),
        (false_model, r"false.model is no sentencepiece model: "),
        (lambda path: path / "missing.model", r"missing.model does not exist; give a folder, a .model file or a hub"),
        (lambda path: path / "missing", r"missing does not exist; give a folder"),
        (lambda path: make_hf_tokenizer(path / "t", eos=None), r"names no end-of-sequence token, .* set eos_token"),
        (lambda path: make_sentencepiece(path / "s.model", eos=False), r"s.model names no end-of-sequence token"),
        (lambda path: make_hf_tokenizer(path / "g", generation_eos="x"), r"generation_config.json cannot be read"),  # type: ignore[arg-type]
    ],
)
def test_one_line_says_what_is_wrong(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^data.tokenizer: .*" + message) as caught:
        load_tokenizer(str(make(tmp_path)))
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(InputError):  # versions of transformers differ in whether they refuse such a folder
        load_tokenizer(str(own_code(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"^data.tokenizer: 'some/model' is no file or folder here, and the hub at .*"):
        load_tokenizer("some/model")


# Templates


def ids_of(folder: Path, **settings: object) -> tuple:
    tokenizer = load_tokenizer(str(folder))
    return tokenizer, make_template(DataConfig(**settings), tokenizer)  # type: ignore[arg-type]


def raw(tokenizer: Any, ids: list[int]) -> str:
    """Text with the special tokens shown."""
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def test_auto_takes_the_chat_template_where_there_is_one(folder: Path, bos_folder: Path) -> None:
    assert ids_of(folder)[1].name == "none"
    assert ids_of(bos_folder)[1].name == "chat"


def test_chat_template_equals_the_library_and_has_one_bos(bos_folder: Path) -> None:
    tokenizer, template = ids_of(bos_folder, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = template.encode("Hi")
    expected = tokenizer._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == list(getattr(expected, "input_ids", expected))
    assert ids.count(0) == 1
    assert raw(tokenizer, ids) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    # A conversation with a system message of its own keeps it.
    assert template.encode_messages([{"role": "system", "content": "Sing."}, messages[1]]) != ids


def test_none_is_the_text_itself(folder: Path, bos_folder: Path) -> None:
    tokenizer, template = ids_of(folder, template="none")
    assert template.encode("Hi there") == tokenizer.encode("Hi there")
    tokenizer, template = ids_of(bos_folder, template="none")
    assert template.encode("Hi there") == [0, *tokenizer.encode("Hi there")]


def test_alpaca(folder: Path) -> None:
    tokenizer, template = ids_of(folder, template="alpaca", input_field="input")
    assert tokenizer.decode(template.encode("Add.", "1 and 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    assert tokenizer.decode(template.encode("Sing.")) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n"
    )
    _, own = ids_of(folder, template="alpaca", system="Be brief.")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    ids = own.encode_messages([{"role": role, "content": content} for role, content in turns])
    assert tokenizer.decode(ids) == (
        "Be brief.\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\n"
    )


def test_chatml(folder: Path, bos_folder: Path) -> None:
    tokenizer, template = ids_of(folder, template="chatml")
    ids = template.encode("Hi")
    assert raw(tokenizer, ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(2) == 2  # special tokens of the vocabulary are used, not spelt out
    assert ids_of(bos_folder, template="chatml")[1].encode("Hi") == [0, *ids]


def test_llama2(bos_folder: Path, model_file: Path) -> None:
    tokenizer, template = ids_of(bos_folder, template="llama2", system="Be brief.")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert raw(tokenizer, template.encode_messages(messages)) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]"
    )
    # sentencepiece never reads "<s>" out of a text: BOS and EOS must be ids.
    _, template = ids_of(model_file, template="llama2")
    ids = template.encode_messages(messages)
    assert [id for id in ids if id in (1, 2)] == [1, 2, 1]


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
@pytest.mark.parametrize("roles", [["user", "user"], ["assistant", "user"], ["user", "assistant"], ["system"]])
def test_turns_that_do_not_alternate(template: str, roles: list[str], folder: Path) -> None:
    _, made = ids_of(folder, template=template)
    with pytest.raises(InputError, match="^user and assistant messages must alternate, beginning and ending with"):
        made.encode_messages([{"role": role, "content": "a"} for role in roles])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "chat"}, r"data.template: chat needs a chat template, and the tokenizer .* has none; use none,"),
        ({"system": "x"}, r"data.system: the template in use, none, has no place for it; the tokenizer has no chat"),
        ({"template": "none", "system": "x"}, r"data.system: .* has no place for it; set data.template: alpaca"),
        ({"messages_field": "m"}, r"data.messages_field: messages need a template, not none; "),
        ({"template": "chatml", "input_field": "i"}, r"data.input_field: the template chatml has no place for it; "),
    ],
)
def test_settings_that_clash(settings: dict, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match="^" + message):
        ids_of(folder, **settings)


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
    ids=["refuses", "broken", "escapes"],
)
def test_bad_chat_template(chat_template: str, reason: str, tmp_path: Path) -> None:
    folder = make_hf_tokenizer(tmp_path / "t", chat_template=chat_template)
    with pytest.raises(InputError, match=rf"^data.template: chat does not work .*{re.escape(reason)}"):
        ids_of(folder)
