"""How a prompt becomes token ids ready for generation: the tokenizer's chat template, or one of ours.

`alpaca` has the words of tatsu-lab/stanford_alpaca, with a line break after "### Response:"; `chatml` and `llama2` are
the formats that models of those names were trained on. BOS is put first where the tokenizer's own
convention does so, and never twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_amd.config import DataConfig
from megatron_amd.data.tokenizer import Message, Tokenizer
from megatron_amd.errors import InputError

ROLES = ("system", "user", "assistant")

_ALPACA = (
    "Below is an instruction that describes a task{pair}. Write a response that appropriately completes the request."
)
_ALPACA_PAIR = ", paired with an input that provides further context"


@dataclass(frozen=True)
class PromptTemplate:
    """One of our templates or the tokenizer's own, settled for a run."""

    name: str
    """none, chat, alpaca, chatml or llama2."""
    tokenizer: Tokenizer
    system: str | None = None
    """System message put before conversations that have none."""

    def encode(self, prompt: str, extra_input: str | None = None) -> list[int]:
        """Token ids of a prompt; `extra_input` fills alpaca's place for an input."""
        if self.name == "none":
            return self.tokenizer.encode(prompt, add_bos=True)
        if self.name == "alpaca":
            return self.tokenizer.encode(_alpaca([_user(prompt)], self.system, extra_input), add_bos=True)
        return self.encode_messages([_user(prompt)])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next turn begins.

        Raises InputError (with a reason, without the row, which only the caller knows) when the template has no
        form for the conversation.
        """
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        if self.name == "chat":
            return self.tokenizer.apply_chat_template(messages)
        if self.name == "chatml":
            return self.tokenizer.encode(_chatml(messages), add_bos=True)
        system, turns = _system_and_turns(messages)
        if self.name == "alpaca":
            return self.tokenizer.encode(_alpaca(turns, system, None), add_bos=True)
        return self._llama2(turns, system)

    def _llama2(self, turns: Sequence[Message], system: str | None) -> list[int]:
        """Each user turn with its answer is a text of its own, from BOS to EOS."""
        ids: list[int] = []
        for index in range(0, len(turns), 2):
            content = turns[index]["content"].strip()
            if index == 0 and system is not None:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
            text = f"[INST] {content} [/INST]"
            if index + 1 < len(turns):
                ids += self.tokenizer.encode(f"{text} {turns[index + 1]['content'].strip()} ", add_bos=True)
                ids.append(self.tokenizer.eos_id)
            else:
                ids += self.tokenizer.encode(text, add_bos=True)
        return ids


def make_template(config: DataConfig, tokenizer: Tokenizer) -> PromptTemplate:
    """The template that `data.template` names, tried on one message. Raises InputError when the settings clash."""
    name = config.template
    if name == "auto":
        name = "chat" if tokenizer.has_chat_template else "none"
    if name == "chat" and not tokenizer.has_chat_template:
        raise InputError(
            f"data.template: chat needs a chat template, and the tokenizer {tokenizer.source} has none; "
            "use none, alpaca, chatml or llama2"
        )
    if name == "none" and config.system is not None:
        raise InputError(f"data.system: the template in use, none, has no place for it; {_other_template(config)}")
    if name == "none" and config.messages_field is not None:
        raise InputError(f"data.messages_field: messages need a template, not none; {_other_template(config)}")
    if config.input_field is not None and name != "alpaca":
        raise InputError(f"data.input_field: the template {name} has no place for it; set data.template: alpaca")
    template = PromptTemplate(name, tokenizer, config.system)
    try:
        template.encode("Hello")
    except InputError as error:
        raise InputError(f"data.template: {name} does not work for a single user message: {error}") from error
    return template


def _other_template(config: DataConfig) -> str:
    chosen = "the tokenizer has no chat template, so set" if config.template == "auto" else "set"
    return f"{chosen} data.template: alpaca, chatml or llama2"


def _user(prompt: str) -> Message:
    return {"role": "user", "content": prompt}


def _system_and_turns(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """Split off a first system message and check that user and assistant alternate and the user speaks last."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = messages[1:] if system is not None else messages
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
    if [turn["role"] for turn in turns] != expected or len(turns) % 2 == 0:
        raise InputError("user and assistant messages must alternate, beginning and ending with the user")
    return system, turns


def _alpaca(turns: Sequence[Message], system: str | None, extra_input: str | None) -> str:
    preamble = _ALPACA.format(pair=_ALPACA_PAIR if extra_input else "") if system is None else system
    text = f"{preamble}\n\n"
    for turn in turns:
        if turn["role"] == "assistant":
            text += f"{turn['content']}\n\n"
            continue
        text += f"### Instruction:\n{turn['content']}\n\n"
        text += f"### Input:\n{extra_input}\n\n### Response:\n" if extra_input else "### Response:\n"
    return text


def _chatml(messages: Sequence[Message]) -> str:
    turns = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return f"{turns}<|im_start|>assistant\n"
