"""Text to token ids and back: a Hugging Face tokenizer or a sentencepiece model behind one small class."""

from __future__ import annotations

import abc
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_amd.data.hub import check_hub_reachable, is_hub_name, quieten_hub
from megatron_amd.errors import InputError, first_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""The names under which tokenizers are kept in model folders."""

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


class Tokenizer(abc.ABC):
    """What the trainer needs of a tokenizer."""

    source: str
    """The folder, hub name or file it was read from."""
    vocab_size: int
    """Real size: the highest id of any token, added ones included, plus 1. Never a padded size."""
    eos_ids: tuple[int, ...]
    """Every id that ends a turn, the tokenizer's own end-of-sequence token first. Never empty."""
    bos_id: int | None
    """Id of the token that begins a text, where there is one."""
    adds_bos: bool
    """Whether the tokenizer's own convention puts `bos_id` before a text."""
    has_chat_template: bool
    """Whether `apply_chat_template` can be called."""
    files: tuple[Path, ...]
    """The local files it was read from; empty for a hub name."""

    @property
    def eos_id(self) -> int:
        """The token put after a gold response."""
        return self.eos_ids[0]

    @abc.abstractmethod
    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of `text`, without EOS. `add_bos` puts BOS first where `adds_bos` holds and the text does not
        already begin with it."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    @abc.abstractmethod
    def token(self, id: int) -> str | None:
        """The vocabulary's name of one id (such as 'Ġthe'); None where no token has the id."""

    @abc.abstractmethod
    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation by the tokenizer's own template, ready for the assistant's next turn.

        Raises InputError when there is no template or it refuses the messages.
        """

    def fingerprint(self) -> str:
        """Changes with any id's token and with the ids that end a response."""
        tokens = [self.token(id) for id in range(self.vocab_size)]
        return hashlib.sha256(json.dumps([tokens, sorted(self.eos_ids)]).encode()).hexdigest()

    def save_files(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into an existing folder. Files are copied byte by byte, so a tokenizer does not
        change by passing through a run; a `generation_config.json` already in the folder is kept."""
        for file in self.files:
            target = Path(folder) / file.name
            if file.name != "generation_config.json" or not target.exists():
                shutil.copyfile(file, target)

    def _with_bos(self, ids: list[int], add_bos: bool) -> list[int]:
        if add_bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the transformers library."""

    def __init__(self, tokenizer: Any, source: str, files: tuple[Path, ...], generation_eos: list[int]):
        self._tokenizer = tokenizer
        self._names = {id: token for token, id in tokenizer.get_vocab().items()}
        self.source = source
        self.files = files
        self.vocab_size = max(self._names) + 1
        self.eos_ids = _end_ids(tokenizer.eos_token_id, generation_eos, self.vocab_size, source)
        self.bos_id = tokenizer.bos_token_id
        # What the tokenizer puts before a text is found by trying: the flags for it differ between classes.
        text = self._encode("a", special=True)
        self.adds_bos = self.bos_id is not None and text[:1] == [self.bos_id]
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))

    def _encode(self, text: str, special: bool) -> list[int]:
        # verbose=False: no warning about texts beyond the model's length; the limit is data.max_prompt_length.
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        # EOS and the like are never wanted after a prompt, so the special tokens are not left to the tokenizer.
        return self._with_bos(self._encode(text, special=False), add_bos)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token(self, id: int) -> str | None:
        return self._names.get(id)

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        if not self.has_chat_template:
            raise InputError(f"data.tokenizer: {self.source} has no chat template; set data.template to one of ours")
        # The template is a program from the model's folder. transformers runs it in Jinja's immutable sandbox: it can
        # reach neither files nor Python's own names.
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises is about these messages or the template itself
            raise InputError(f"the chat template of {self.source} refuses it: {first_line(error)}") from error
        # A template writes its own special tokens, BOS among them: none may be added.
        return self._encode(text, special=False)

    def save_files(self, folder: str | Path) -> None:
        if self.files:
            super().save_files(folder)
        else:
            self._tokenizer.save_pretrained(str(folder))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file, read by sentencepiece itself. BOS is added where the model has one."""

    has_chat_template = False

    def __init__(self, processor: Any, file: Path, generation_eos: list[int]):
        self._processor = processor
        self.source = str(file)
        self.files = (file,)
        self.vocab_size = processor.get_piece_size()
        eos, bos = processor.eos_id(), processor.bos_id()
        self.eos_ids = _end_ids(None if eos < 0 else eos, generation_eos, self.vocab_size, self.source)
        self.bos_id = None if bos < 0 else bos
        self.adds_bos = self.bos_id is not None

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return self._with_bos(self._processor.encode(text, out_type=int), add_bos)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(id) for id in ids])

    def token(self, id: int) -> str | None:
        return self._processor.id_to_piece(id) if 0 <= id < self.vocab_size else None

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        raise InputError(f"data.tokenizer: {self.source} has no chat template; set data.template to one of ours")


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Read a tokenizer from a Hugging Face folder, a sentencepiece `.model` file, or the hub.

    A local path never touches the network, and no code from a model's folder is run. Raises InputError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        files = tuple(path / name for name in (*TOKENIZER_FILES, "generation_config.json") if (path / name).is_file())
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(f"data.tokenizer: the folder {path} holds no tokenizer files, such as tokenizer.json")
        tokenizer = _from_transformers(str(path), local=True)
        return HuggingFaceTokenizer(tokenizer, str(path), files, _generation_eos(path / "generation_config.json"))
    if path.is_file():
        if path.suffix != ".model":
            raise InputError(
                f"data.tokenizer: {path} is neither a folder nor a sentencepiece .model file; "
                "give the folder that holds tokenizer.json"
            )
        return _from_sentencepiece(path)
    if path.suffix == ".model" or not is_hub_name(name_or_path):
        raise InputError(f"data.tokenizer: {name_or_path} does not exist; give a folder, a .model file or a hub name")
    check_hub_reachable(name_or_path, "data.tokenizer")
    tokenizer = _from_transformers(name_or_path, local=False)
    return HuggingFaceTokenizer(tokenizer, name_or_path, (), _hub_generation_eos(name_or_path))


def stopping_rule(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Told the tokens of a text so far, whether its end holds one of the strings; None where there are none."""
    if not strings:
        return None
    window = max(len(text.encode()) for text in strings) + 4

    def complete(tokens: Sequence[int]) -> bool:
        count = window  # tokens have at least one byte, but for special ones
        while True:
            text = tokenizer.decode(tokens[-count:])
            if any(string in text for string in strings):
                return True
            if count >= len(tokens) or len(text.encode()) >= window:
                return False
            count *= 2

    return complete


def check_stop_strings(tokenizer: Tokenizer, strings: Sequence[str]) -> None:
    """Raise InputError for a string with a special token, which decoding leaves out of the text."""
    for id in range(tokenizer.vocab_size if strings else 0):
        token = tokenizer.token(id)
        held_by = next((string for string in strings if token and token in string), None)
        if held_by is not None and not tokenizer.decode([id]):
            raise InputError(
                f"rollout.stop_strings: {held_by!r} holds the special token {token!r}, which {tokenizer.source} leaves "
                "out of decoded text; name the token in eos_token_id of generation_config.json instead"
            )


def check_same_vocabulary(a: Tokenizer, b: Tokenizer) -> None:
    """Raise InputError unless both tokenizers give every id the same token.

    The models' distributions are compared id by id, so that any difference would compare unlike words.
    """
    for id in range(max(a.vocab_size, b.vocab_size)):
        if a.token(id) != b.token(id):
            in_a, in_b = ("no token" if t is None else repr(t) for t in (a.token(id), b.token(id)))
            raise InputError(
                f"vocabularies differ: id {id} is {in_a} in {a.source} but {in_b} in {b.source}; "
                "student and teacher must share one tokenizer"
            )


def _from_transformers(name: str, local: bool) -> Any:
    import transformers  # here because it takes a second to import

    quieten_hub()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
        if tokenizer.get_vocab():
            return tokenizer
        reason = "its vocabulary is empty"
    except Exception as error:  # missing files, broken JSON, code in the folder: every case is about these files
        reason = first_line(error)
    place = "the folder" if local else "the hub's"
    raise InputError(f"data.tokenizer: no tokenizer can be read from {place} {name}: {reason}")


def _from_sentencepiece(path: Path) -> SentencePieceTokenizer:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"data.tokenizer: {path} is no sentencepiece model: {first_line(error)}") from error
    return SentencePieceTokenizer(processor, path, _generation_eos(path.parent / "generation_config.json"))


def _end_ids(eos_id: int | None, generation_eos: list[int], vocab_size: int, source: str) -> tuple[int, ...]:
    """Distinct ids in order; ids that no token has are never sampled and left out."""
    ids = ([] if eos_id is None else [eos_id]) + generation_eos
    known = tuple(dict.fromkeys(id for id in ids if 0 <= id < vocab_size))
    if not known:
        raise InputError(
            f"data.tokenizer: {source} names no end-of-sequence token, so no response would ever end; "
            "set eos_token in its tokenizer_config.json"
        )
    return known


def _generation_eos(file: Path) -> list[int]:
    """`eos_token_id` of a generation_config.json, which may be missing, a number or a list."""
    if not file.is_file():
        return []
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        return [] if value is None else [int(id) for id in (value if isinstance(value, list) else [value])]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"data.tokenizer: {file} cannot be read: {first_line(error)}") from error


def _hub_generation_eos(name: str) -> list[int]:
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise InputError(f"data.tokenizer: {name} cannot be read from the hub: {first_line(error)}") from error
    return [] if file is None else _generation_eos(Path(file))
